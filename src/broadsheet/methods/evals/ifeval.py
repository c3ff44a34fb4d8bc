"""IFEval: instructions that programs can verify (Zhou et al. 2023, arXiv 2311.07911); the benchmark that everybody knows.

Prompts are the official file's (``path``), or forty of our own put together from the same 25 instructions, so that it
runs without a download; scores of the two are not comparable. Checks are `core.constraints.ifeval`'s, which names where they
deviate from the official ones. Four numbers: all instructions of a prompt, or each, hold strictly, or loosely (for one of
eight variants of the answer).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from broadsheet.core.constraints import Constraint, Unverifiable
from broadsheet.core.constraints.ifeval import Item, check_loose, constraint, load_ifeval
from broadsheet.core.stats import bootstrap_ci

from .base import Benchmark, Mark, Metric, Outcome, Sample, Scored, means

_TASKS = (
    "Write a short story about a lighthouse keeper.", "Explain how bread rises.", "Describe a market on a rainy morning.",
    "Write an e-mail that invites colleagues to a walk.", "Give advice to somebody who plants a first garden.",
    "Write a review of a small museum.", "Explain what a library catalogue is for.", "Write a letter to a future neighbour.",
    "Describe the view from a night train.", "Write a note that says why the meeting was moved.",
)  # fmt: skip
#: the instructions that built-in prompts are made of, with arguments to draw from
_GIVEN: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "keywords:existence": ({"keywords": ["harbour"]}, {"keywords": ["copper", "window"]}),
    "keywords:forbidden_words": ({"forbidden_words": ["very"]}, {"forbidden_words": ["good", "nice"]}),
    "keywords:frequency": ({"keyword": "light", "frequency": 3, "relation": "at least"},),
    "length_constraints:number_words": (
        {"num_words": 60, "relation": "less than"},
        {"num_words": 120, "relation": "at least"},
    ),
    "length_constraints:number_sentences": ({"num_sentences": 6, "relation": "less than"},),
    "detectable_content:number_placeholders": ({"num_placeholders": 2},),
    "detectable_content:postscript": ({"postscript_marker": "P.S."},),
    "detectable_format:number_bullet_lists": ({"num_bullets": 3}, {"num_bullets": 5}),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2},),
    "detectable_format:title": ({},),
    "change_case:english_capital": ({},),
    "change_case:english_lowercase": ({},),
    "punctuation:no_comma": ({},),
    "startend:end_checker": ({"end_phrase": "That is all there is."},),
    "startend:quotation": ({},),
}


def built_in() -> list[Item]:
    """Forty prompts with one to three instructions each, of different groups; always the same."""
    made = []
    for number in range(40):
        rng = random.Random(number)
        groups: dict[str, list[str]] = {}
        for name in _GIVEN:
            groups.setdefault(name.partition(":")[0], []).append(name)
        names = [rng.choice(groups[group]) for group in rng.sample(sorted(groups), rng.randint(1, 3))]
        kwargs = [rng.choice(_GIVEN[name]) for name in names]
        checkers = [constraint(name, given) for name, given in zip(names, kwargs, strict=True)]
        told = "; ".join(checker.text for checker in checkers if isinstance(checker, Constraint))
        made.append(Item(f"b{number}", f"{rng.choice(_TASKS)} What I need: {told}.", tuple(names), tuple(kwargs)))
    return made


@dataclass(frozen=True)
class IFEval(Benchmark):
    """``path``: the official ``input_data.jsonl`` or its folder; "" takes the built-in prompts.

    An instruction that cannot be verified here (no language detector, say) leaves its prompt out of the prompt-level
    numbers; how many there are is the metric ``unverifiable``.
    """

    path: str = ""

    slug: ClassVar[str] = "ifeval"
    primary: ClassVar[str] = "prompt_strict"
    request: ClassVar[Mapping[str, Any]] = {"max_tokens": 1280}

    def samples(self) -> Sequence[Sample]:
        items = load_ifeval(self.path) if self.path else built_in()
        return [
            Sample(
                item.key, ({"role": "user", "content": item.prompt},), {"checkers": item.checkers},
                {"instructions": str(len(item.checkers))},
            )
            for item in items
        ]  # fmt: skip

    def mark(self, sample: Sample, text: str) -> Mark:
        checkers = sample.data["checkers"]
        known = [one for one in checkers if isinstance(one, Constraint)]
        strict = [one.check(text) for one in known]
        loose = [check_loose(one, text) for one in known]
        evidence = "; ".join(f"{one.text}: {said.evidence}" for one, said in zip(known, strict, strict=True) if not said)
        return Mark(self._values(sample, [said.ok for said in strict], [said.ok for said in loose]), evidence)

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        none = [False for one in sample.data["checkers"] if isinstance(one, Constraint)]
        return Mark(self._values(sample, none, none), outcome, outcome)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Numbers of instructions are over all of these, not means of prompts' shares."""
        return [
            self._of_instructions(metric, scored) if metric.name.startswith("inst_") else metric for metric in means(scored)
        ]

    def _of_instructions(self, metric: Metric, scored: Sequence[Scored]) -> Metric:
        values, groups = [], []
        for one in scored:
            if metric.axis and one.sample.axes[metric.axis] != metric.value_of:
                continue
            count = sum(isinstance(checker, Constraint) for checker in one.sample.data["checkers"])
            for mark in one.marks:
                values += [mark.values[metric.name]] * count if count else []
                groups += [one.sample.id] * count
        return replace(metric, value=statistics.fmean(values), ci=bootstrap_ci(values, groups), n=len(values))

    def _values(self, sample: Sample, strict: Sequence[bool], loose: Sequence[bool]) -> dict[str, float]:
        checkers = sample.data["checkers"]
        unverifiable = sum(isinstance(one, Unverifiable) for one in checkers)
        values = {"unverifiable": float(unverifiable)}
        for mode, held in (("strict", strict), ("loose", loose)):
            if held:
                values[f"inst_{mode}"] = sum(held) / len(held)
            if not unverifiable:
                values[f"prompt_{mode}"] = float(all(held))
        return values
