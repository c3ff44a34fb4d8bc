"""How a model is run: the public YAML model config, and what a run adds to it.

One config is translated for every runtime, so that all see the same settings (section 3.2): `llama_flags` for llama.cpp's
command line, `mlc_settings` for MLC's ``mlc-chat-config.json``; our own runtimes read the dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

Part = TypeVar("Part")


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token. ``repetition_penalty`` divides the logits of the last
    ``repeat_last_n`` tokens, ``n_batch`` tokens of a prompt are run at once."""

    temperature: float = 0.7
    repetition_penalty: float = 1.0
    top_p: float = 0.95
    top_k: int = 40
    repeat_last_n: int = 64
    n_batch: int = 512

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.repetition_penalty <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("sampling: temperature is at least 0, repetition_penalty above 0, top_p in (0, 1]")
        if min(self.top_k, self.repeat_last_n) < 0 or self.n_batch < 1:
            raise ValueError("sampling: top_k and repeat_last_n are at least 0 (0: off), n_batch at least 1")


@dataclass(frozen=True)
class Generation:
    """Lengths in tokens. ``vocab_size`` and ``mean_gen_len`` are for MLC."""

    mean_gen_len: int = 128
    max_gen_len: int = 256
    max_window_size: int = 4096
    vocab_size: int = 32000

    def __post_init__(self) -> None:
        if min(self.max_gen_len, self.max_window_size) < 1:
            raise ValueError("generation: max_gen_len and max_window_size are at least 1 token")


@dataclass(frozen=True)
class Prompt:
    """The chat format: ``text`` opens the conversation, every prompt stands between ``in_prefix`` and ``in_suffix``, and a
    reply ends before ``reverse``. The public files quote these for a shell; `plain` takes the quotes off."""

    conv_template: str = ""
    text: str = ""
    in_prefix: str = ""
    in_suffix: str = ""
    reverse: str = ""

    @property
    def plain(self) -> Prompt:
        return Prompt(*(_unquoted(getattr(self, one.name)) for one in fields(self)))


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    return text.replace("\\n", "\n").replace('\\"', '"')


@dataclass(frozen=True)
class ModelConfig:
    """A model's YAML file. ``model`` is its alias, and what is loaded when a run names nothing else."""

    model: str
    url: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    generation: Generation = field(default_factory=Generation)
    prompt: Prompt = field(default_factory=Prompt)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: str | Path) -> None:
        """As YAML, in the public schema."""
        text = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True)
        Path(path).write_text("---\n\n" + text, encoding="utf-8")


def read_config(path: str | Path) -> ModelConfig:
    """Raises ValueError, naming the field, for a file that is no model config."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no model config at {path}; give a YAML file with model, sampling, generation and prompt")
    try:
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(row, dict) or not isinstance(row.get("model"), str):
        raise ValueError(f"{path} names no model; its first field is 'model: alias'")
    parts = {"sampling": Sampling, "generation": Generation, "prompt": Prompt}
    if unknown := sorted(row.keys() - {"model", "url", *parts}):
        raise ValueError(
            f"{path} has unknown fields {', '.join(map(str, unknown))}; there are model, url, {', '.join(parts)}"
        )
    made: dict[str, Any] = {name: _part(path, name, kind, row.get(name) or {}) for name, kind in parts.items()}
    return ModelConfig(row["model"], str(row.get("url") or ""), **made)


def _part(path: Path, name: str, kind: type[Part], row: Any) -> Part:
    types = get_type_hints(kind)
    if not isinstance(row, Mapping):
        raise ValueError(f"{path}: {name} must be a mapping")
    for key, value in row.items():
        if key not in types:
            raise ValueError(f"{path}: {name} has no '{key}'; it has {', '.join(types)}")
        wanted = (int, float) if types[key] is float else types[key]
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"{path}: {name}.{key} must be {types[key].__name__}, got {value!r}")
    return kind(**row)


@dataclass(frozen=True)
class RunSettings:
    """What a run adds to a model's config; the authors' defaults.

    ``context``: tokens that the cache holds. ``max_gen``: tokens of a reply at most; with ``ignore_eos`` every reply has
    as many. ``conversations``: the first so many. ``keep_cache``: a turn prefills only what is new. ``idle`` and ``tail``:
    seconds in which a meter sees nothing run, before and after. ``warmup``: turns before that, which are not counted.
    ``cold``: the kernel forgets the model's files before every load. ``max_busy``: the run is refused when other processes
    take more than this share of the CPUs. ``sustain``: instead of so many repetitions, as many as begin within these
    seconds.
    """

    context: int = 2048
    max_gen: int = 256
    repetitions: int = 3
    conversations: int = 5
    threads: int = 1
    seed: int = 42
    ignore_eos: bool = False
    keep_cache: bool = True
    idle: float = 60.0
    tail: float = 10.0
    warmup: int = 1
    cold: bool = False
    max_busy: float = 0.1
    sustain: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_gen", "repetitions", "conversations", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise ValueError(f"a context of {self.context} tokens has no room for a prompt and a reply")
        if min(self.idle, self.tail, self.warmup, self.sustain) < 0 or not 0 <= self.max_busy <= 1:
            raise ValueError(
                "idle, tail, sustain (seconds) and warmup (turns) are at least 0, max_busy is a share from 0 to 1"
            )


def llama_flags(config: ModelConfig, settings: RunSettings) -> list[str]:
    """The options of ``llama-cli`` (``main`` of older releases) for this model and run."""
    sampling, prompt = config.sampling, config.prompt.plain
    flags = [
        "-c", str(settings.context), "-n", str(settings.max_gen), "-b", str(sampling.n_batch), "-t", str(settings.threads),
        "--temp", f"{sampling.temperature:g}", "--top-p", f"{sampling.top_p:g}", "--top-k", str(sampling.top_k),
        "--repeat-penalty", f"{sampling.repetition_penalty:g}", "--repeat-last-n", str(sampling.repeat_last_n),
        "--seed", str(settings.seed),
    ]  # fmt: skip
    for flag, text in (("-p", prompt.text), ("--in-prefix", prompt.in_prefix), ("--in-suffix", prompt.in_suffix)):
        flags += [flag, text] if text else []
    flags += ["-r", prompt.reverse] if prompt.reverse else []
    return flags + (["--ignore-eos"] if settings.ignore_eos else [])


def mlc_settings(config: ModelConfig, settings: RunSettings) -> dict[str, Any]:
    """The fields of ``mlc-chat-config.json`` for this model and run."""
    sampling, generation = config.sampling, config.generation
    return {
        "conv_template": config.prompt.plain.conv_template, "temperature": sampling.temperature,
        "repetition_penalty": sampling.repetition_penalty, "top_p": sampling.top_p,
        "mean_gen_len": generation.mean_gen_len, "max_gen_len": settings.max_gen,
        "context_window_size": min(settings.context, generation.max_window_size), "vocab_size": generation.vocab_size,
    }  # fmt: skip
