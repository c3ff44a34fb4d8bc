"""ENAMEL: how efficient is the code that a model writes? eff@k beside pass@k (Qiu et al., ICLR 2025).

Every sample is timed on inputs of growing size beside the best known solution, and scored by how near it comes: 1 as fast as
the reference, 0 at ``alpha`` times its longest time and for whatever is wrong. Runs that take longer, or too much memory,
are censored: they and all larger levels score 0, but the sample still passes. eff@k is the expected score of the best of k
samples, estimated without bias from n >= k.

`ENAMEL` is the benchmark; `Efficiency` measures code that is there already (`read_samples`). The built-in
problems are our own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from broadsheet.core.chat import Chat, Choice
from broadsheet.core.chat.client import here, in_order

from ..base import Benchmark, Mark, Metric, Outcome, Report, Sample, Scored
from .builtin import builtin_problems
from .efficiency import LEAST_SELF_SCORE, Efficiency, Evaluation, Score
from .estimators import eff_at_k, hodges_lehmann, level_scores, pass_at_k, sample_score
from .problems import Problem, code_of, read_problems, read_samples

__all__ = [
    "ENAMEL", "LEAST_SELF_SCORE", "Efficiency", "Evaluation", "Problem", "Score", "builtin_problems", "code_of", "eff_at_k",
    "hodges_lehmann", "level_scores", "pass_at_k", "read_problems", "read_samples", "sample_score",
]  # fmt: skip

_ASK = "Complete this Python function. Reply with the whole function in one ```python block.\n\n```python\n{}```"
_FAST = " It must be as efficient as possible: of the lowest time complexity, and fast on large inputs."


@dataclass(frozen=True)
class ENAMEL(Benchmark):
    """Asks a model for ``epochs`` solutions of every problem and measures them; see the package.

    ``path``: the official ``enamel.csv`` (142 of its problems count), "" for the ten built-in problems. ``ks``: for which k.
    ``ask_for_speed``: whether the prompt asks for efficiency. ``temperature``: 0 with one sample, as the paper, else 0.8.
    ``allow_noise``: report even if the references score below 0.9 against themselves. ``efficiency``: how it is measured.
    Raises ValueError for settings and files that cannot be meant.
    """

    slug: ClassVar[str] = "enamel"
    primary: ClassVar[str] = "eff@1"

    epochs: int = 1
    path: str = ""
    ks: tuple[int, ...] = (1,)
    ask_for_speed: bool = False
    temperature: float | None = None
    allow_noise: bool = False
    efficiency: Efficiency = field(default_factory=Efficiency)

    def __post_init__(self) -> None:
        if not self.ks or not all(1 <= k <= self.epochs for k in self.ks):
            raise ValueError(f"the best of k needs k of 1 to epochs={self.epochs} samples, got ks={self.ks}")

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(read_problems(self.path)) if self.path else builtin_problems()

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    def samples(self) -> Sequence[Sample]:
        warmth = self.temperature if self.temperature is not None else 0.0 if self.epochs == 1 else 0.8
        return [
            Sample(
                problem.id,
                ({"role": "user", "content": _ASK.format(problem.prompt) + (_FAST if self.ask_for_speed else "")},),
                data={"problem": problem},
                parameters={"temperature": warmth, "max_tokens": 2048},
            )
            for problem in self.problems
        ]

    def mark(self, sample: Sample, text: str) -> Mark:
        return self.mark_all(sample, [Choice(text)])[0]

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        return Mark({"e": 0.0, "pass": 0.0}, outcome, outcome)

    def mark_all(self, sample: Sample, answers: Sequence[Choice]) -> list[Mark]:
        """The marks of all answers to one problem, measured together beside its reference.

        ``values``: "e" the efficiency score, "pass", and "self" what the reference scored as if it were a sample.
        """
        problem: Problem = sample.data["problem"]
        codes = [code_of(choice.text, problem) if choice.ok else None for choice in answers]
        found, again = self.efficiency.measure(problem, [code for code in codes if code is not None])
        scores = iter(found)
        marks = []
        for choice, code in zip(answers, codes, strict=True):
            if not choice.ok:
                mark = self.marked(sample, choice)
            elif code is None:
                mark = Mark({"e": 0.0, "pass": 0.0}, "no code that defines the function", "unparsed")
            else:
                score = next(scores)
                where = "" if score.level is None else f" at level {score.level}"
                mark = Mark(
                    {"e": score.value, "pass": float(score.passed)}, f"{score.outcome}{where} {score.message}".strip()
                )
            marks.append(replace(mark, values={**mark.values, "self": again.value}))
        return marks

    async def aevaluate(
        self, chat: Chat, limit: int | None = None, done: Callable[[int, int], None] | None = None
    ) -> Report:
        """Asks everything first and measures afterwards, one problem after the other, so that asking does not disturb the
        clock."""
        chosen = list(self.samples())[:limit]
        before = chat.spent

        async def ask(sample: Sample) -> list[Choice]:
            return await chat.acomplete(sample.messages, n=self.epochs, tag=self.slug, **sample.parameters)

        answers = await here(in_order(ask, chosen, 2 * chat.concurrency))
        scored = []
        for sample, some in zip(chosen, answers, strict=True):
            marks = await asyncio.to_thread(self.mark_all, sample, some)
            scored.append(Scored(sample, tuple(some), tuple(marks)))
            if done:
                done(len(scored), len(chosen))
        return self.report(chat, scored, before)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """eff@k and pass@k for every k, and the references' own score."""

        def score(mark: Mark) -> Score:
            return Score(mark.values["pass"] > 0, mark.values["e"], (mark.values["e"],))

        found = Evaluation(
            {one.sample.id: tuple(map(score, one.marks)) for one in scored},
            {one.sample.id: Score(True, one.marks[0].values["self"], ()) for one in scored},
            self.efficiency.clock,
        )
        return found.metrics(self.ks, self.allow_noise)
