"""The unit of work: a context and the questions asked about it, each with its checker.

The schema is SCBench's (arXiv 2412.10319): ``{"id", "task", "context", "multi_turns": [{"input", "answer", ...}]}``,
so that generated sessions, the official data set and a user's own file go through the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One question with its gold answer.

    ``checker`` names a function of `broadsheet.core.microworld.checkers`; ``max_new_tokens`` caps the answer so that a
    model which recites the whole context cannot score by containment; ``extra`` carries what a checker needs beside
    the answer (options, a format, the task of this turn in a mixed session).
    """

    input: str
    answer: str | tuple[str, ...]
    checker: str = "contains"
    max_new_tokens: int = 16
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """One shared context and its turns, in order."""

    id: str
    task: str
    context: str
    turns: tuple[Turn, ...]

    def to_json(self) -> dict[str, Any]:
        turns = []
        for turn in self.turns:
            answer = list(turn.answer) if isinstance(turn.answer, tuple) else turn.answer
            turns.append(
                {
                    "input": turn.input,
                    "answer": answer,
                    "checker": turn.checker,
                    "max_new_tokens": turn.max_new_tokens,
                    **turn.extra,
                }
            )
        return {"id": self.id, "task": self.task, "context": self.context, "multi_turns": turns}

    @classmethod
    def from_json(cls, row: dict[str, Any], task: str | None = None) -> Session:
        """Reads one record; raises ValueError naming the record when a field is missing."""
        name = row.get("id", "?")
        for key in ("context", "multi_turns"):
            if key not in row:
                raise ValueError(f"session {name}: field '{key}' is missing")
        if not row["multi_turns"]:
            raise ValueError(f"session {name}: 'multi_turns' is empty")
        turns = []
        for number, turn in enumerate(row["multi_turns"], 1):
            for key in ("input", "answer"):
                if key not in turn:
                    raise ValueError(f"session {name}, turn {number}: field '{key}' is missing")
            known = {"input", "answer", "checker", "max_new_tokens"}
            answer = turn["answer"]
            turns.append(
                Turn(
                    input=turn["input"],
                    answer=tuple(map(str, answer)) if isinstance(answer, list) else str(answer),
                    checker=turn.get("checker", "contains"),
                    max_new_tokens=int(turn.get("max_new_tokens", 16)),
                    extra={key: value for key, value in turn.items() if key not in known},
                )
            )
        return cls(id=str(name), task=task or row.get("task", "kv"), context=row["context"], turns=tuple(turns))


def write_sessions(sessions: Iterable[Session], path: str | Path) -> None:
    """One JSON object a line."""
    with open(path, "w", encoding="utf-8") as file:
        for session in sessions:
            file.write(json.dumps(session.to_json(), ensure_ascii=False) + "\n")


def read_sessions(path: str | Path, task: str | None = None) -> Iterator[Session]:
    """Yields the sessions of a JSON-lines file; raises ValueError (one line, with the place) on a bad or empty file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no session file at {path}")
    count = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield Session.from_json(row, task)
            count += 1
    if count == 0:
        raise ValueError(f"{path} holds no sessions; write one JSON object with 'context' and 'multi_turns' per line")
