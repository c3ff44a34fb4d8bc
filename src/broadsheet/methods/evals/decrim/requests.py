"""Requests as people make them, with several constraints each: a small set of our own, and files of that form.

RealInstruct, the paper's data, was never released. ``requests.jsonl`` beside this file holds requests that we wrote, every
constraint with a check of `core.constraints`, so that the score needs no judge and no decomposition: it is always on
the gold list.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from broadsheet.core.constraints import Constraint, Verdict
from broadsheet.core.constraints.ifeval import constraint

from ..base import Benchmark, Mark, Sample

_OURS = Path(__file__).parent / "requests.jsonl"


@dataclass(frozen=True)
class Gold:
    """A constraint in words, its type (content, style, format, quantity, ...) and its check where it has one."""

    text: str
    type: str = ""
    check: Constraint | None = None


@dataclass(frozen=True)
class RealRequest:
    """A request, its task without the constraints, and these."""

    prompt: str
    task: str
    constraints: tuple[Gold, ...]

    def critic(self, text: str, constraints: Sequence[str]) -> list[Verdict]:
        """The checks in the role of `DeCRIM`'s critic, for ``decomposer=[gold texts]``. Raises ValueError for other
        constraints than its own, and for one without a check."""
        checks = {gold.text: gold.check for gold in self.constraints if gold.check}
        if lacking := [one for one in constraints if one not in checks]:
            raise ValueError(f"there is no check for '{lacking[0]}'")
        return [checks[one].check(text) for one in constraints]


def load_requests(path: str | Path = "") -> list[RealRequest]:
    """Requests of a JSONL file, or our own. A row has ``prompt``, ``task`` and ``constraints``: strings, or objects with
    ``text`` and, where there are any, ``type`` and ``check`` with ``kwargs`` (an IFEval instruction). Raises ValueError."""
    return list(_load(Path(path) if path else _OURS))


@cache
def _load(path: Path) -> tuple[RealRequest, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read requests at {path}: {error.strerror}") from None
    return tuple(_request(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _request(line: str, where: str) -> RealRequest:
    try:
        row = json.loads(line)
        golds = [_gold(one, where) for one in row["constraints"]]
        made = RealRequest(row["prompt"], row.get("task", ""), tuple(golds))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: a row has 'prompt', 'task' and 'constraints' ({error})") from None
    if not golds or not isinstance(made.prompt, str) or not made.prompt.strip():
        raise ValueError(f"{where}: a request needs a prompt and at least one constraint")
    return made


def _gold(given: str | Mapping[str, Any], where: str) -> Gold:
    if isinstance(given, str):
        return Gold(given)
    if "check" not in given:
        return Gold(given["text"], given.get("type", ""))
    check = constraint(given["check"], given.get("kwargs"))
    if not isinstance(check, Constraint):
        raise ValueError(f"{where}: {check.reason}")
    return Gold(given["text"], given.get("type", ""), check)


@dataclass(frozen=True)
class RealRequests(Benchmark):
    """Share of constraints met, and of requests with all of them met, by checks on the gold list. ``path``: a JSONL
    file of the form that `load_requests` reads, every constraint with a check; without one our own 24 requests (94
    constraints)."""

    path: str = ""

    slug: ClassVar[str] = "decrim"
    primary: ClassVar[str] = "instruction_level"
    request: ClassVar[Mapping[str, Any]] = {"max_tokens": 1024}

    def samples(self) -> Sequence[Sample]:
        found = []
        for number, request in enumerate(load_requests(self.path)):
            for gold in request.constraints:
                if gold.check is None:
                    raise ValueError(
                        f"request {number}: '{gold.text}' has no check, so that it cannot be marked by code; add one"
                    )
            messages = ({"role": "user", "content": request.prompt},)
            axes = {"constraints": str(len(request.constraints))}
            found.append(Sample(str(number), messages, {"request": request}, axes))
        return found

    def mark(self, sample: Sample, text: str) -> Mark:
        verdicts = [(gold.text, gold.check.check(text)) for gold in sample.data["request"].constraints if gold.check]
        values = {
            "instruction_level": float(all(said.ok for _, said in verdicts)),
            "constraint_level": statistics.fmean(said.ok for _, said in verdicts),
        }
        return Mark(values, "; ".join(f"{text}: {said.evidence}" for text, said in verdicts if not said.ok))

    def missing(self, sample: Sample, outcome: Any) -> Mark:
        return Mark({"instruction_level": 0.0, "constraint_level": 0.0}, outcome, outcome)
