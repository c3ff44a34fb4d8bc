"""Code tasks."""
from dataclasses import dataclass


@dataclass(frozen=True)
class CodeTask:
    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...] = ()
    solution: str = ""
