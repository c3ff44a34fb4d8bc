"""SIMULATED: a coder that draws from four tiers of known solutions, an instrument for audits of ENAMEL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from broadsheet.core.chat import Request
from broadsheet.core.chat.simulated import Draw

from . import _FAST
from .problems import Problem

TIERS = ("wrong", "slow", "ok", "best")


@dataclass(frozen=True)
class SimCoder:
    """Answers each problem by one of its tiers, with chances ``plain``, or ``asked`` when the prompt asks for speed.

    Sample n of a problem draws the same number under both prompts, so that equal chances of ``wrong`` are the same answers.
    """

    problems: Sequence[Problem]
    plain: tuple[float, float, float, float] = (0.3, 0.3, 0.3, 0.1)
    asked: tuple[float, float, float, float] = (0.3, 0.2, 0.2, 0.3)

    def __post_init__(self) -> None:
        for chances in (self.plain, self.asked):
            if min(chances) < 0 or abs(sum(chances) - 1) > 1e-9:
                raise ValueError(f"chances of the four tiers add up to 1, got {chances}")

    def reply(self, request: Request, draw: Draw) -> str:
        text = str(request.messages[-1]["content"])  # type: ignore[index]
        problem = next(one for one in self.problems if one.prompt in text)
        paired = Draw(
            "\0".join([*draw.key.split("\0", 3)[:3], problem.id])
        )  # the model, its seed, the sample; not the words
        where, chances = paired.uniform("tier"), self.asked if _FAST in text else self.plain
        tier = next((t for t, end in zip(TIERS, _sums(chances), strict=True) if where < end), TIERS[-1])
        return f"Here it is.\n\n```python\n{dict(problem.tiers)[tier]}```\n"


def _sums(chances: Sequence[float]) -> list[float]:
    total, found = 0.0, []
    for chance in chances:
        total += chance
        found.append(total)
    return found


def expected_best(values: Mapping[str, float], chances: Sequence[float], k: int = 1) -> float:
    """E[max of k draws] of a tier's score, from the scores of the tiers: the closed form."""
    ordered = sorted(zip([values[tier] for tier in TIERS], chances, strict=True))
    below, expected = 0.0, 0.0
    for value, chance in ordered:
        expected += value * ((below + chance) ** k - below**k)
        below += chance
    return expected
