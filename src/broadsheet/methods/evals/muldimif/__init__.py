"""MulDimIF: instructions with one to seven constraints, each judged by code (Ye et al. 2025, arXiv 2505.07591).

`MulDimIF` is the benchmark, `Pipeline` makes its data with a model, `as_reward` gives the verdicts to reinforcement
learning. Constraints are free text; `compile_constraint` reads them into typed checkers and says what it cannot read.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from broadsheet.core.constraints import Constraint, Unverifiable
from broadsheet.core.replies import answer_part
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.base import Benchmark, Mark, Metric, Outcome, Report, Sample, Scored, means

from . import official
from .compiling import compile_constraint, demand_of
from .items import LEVELS, PATTERNS, Grammar, Item, Triple, load_muldimif
from .pipeline import Pipeline
from .taxonomy import MAIN, TAXONOMY, category

__all__ = [
    "LEVELS", "MAIN", "PATTERNS", "TAXONOMY", "Grammar", "Item", "MulDimIF", "Pipeline", "Triple", "as_reward", "audit",
    "category", "compile_constraint", "demand_of", "load_muldimif", "official", "to_table",
]  # fmt: skip

Compat = Literal["ours", "official"]


@lru_cache(maxsize=65536)
def _verdict(triple: Triple, answer: str, compat: Compat) -> tuple[bool | None, str]:
    """(verdict, evidence); None for what cannot be verified."""
    if compat == "official":
        ok = official.verdict(*triple[:2], category(*triple[:2])[1], triple[2], answer)
        return ok, "as the original decides"
    checker = compile_constraint(*triple)
    if isinstance(checker, Unverifiable):
        return None, checker.reason
    verdict = checker.check(answer)
    return verdict.ok, verdict.evidence


@dataclass(frozen=True)
class MulDimIF(Benchmark):
    """The benchmark: an item counts only if the answer obeys all its constraints (paper section 3).

    ``path``: the official ``test.json``; None asks ``count`` items of our own (`Grammar`, ``seed``), made by the same rules:
    three patterns and four levels in turn, level n drawing from n main categories.

    ``compat``: "ours" judges by typed checkers. A constraint that cannot be verified is left out of its item and counted
    (``verifiable``); an item without any other is left out. Nothing vacuous passes, and a blank answer obeys nothing.
    "official" decides as the authors' code does, which lets what it cannot read pass or fail by category, and passes 40 of
    the 1,200 items for an empty answer.

    Metrics: ``accuracy`` (all constraints of an item), whole, by level, by pattern, and by main category, where an item
    counts if it obeys all its constraints of that category; ``satisfied`` by second level, a mean of constraints; ``macro``,
    the mean of the items' shares, ``micro``, the mean of constraints. Reasoning up to the last ``</think>`` is not judged.
    """

    path: str | None = None
    compat: Compat = "ours"
    count: int = 240
    seed: int = 0

    slug: ClassVar[str] = "muldimif"
    primary: ClassVar[str] = "accuracy"
    request: ClassVar[Mapping[str, Any]] = {"max_tokens": 4096}

    def __post_init__(self) -> None:
        if self.compat not in ("ours", "official"):
            raise ValueError(f"compat is 'ours' or 'official', got '{self.compat}'")
        if self.count < 1:
            raise ValueError(f"count is at least 1, got {self.count}")

    def items(self) -> list[Item]:
        """What is asked. Raises ValueError for a file that cannot be read."""
        return load_muldimif(self.path) if self.path else Grammar(self.seed).items(self.count)

    def samples(self) -> Sequence[Sample]:
        return [
            Sample(
                item.id,
                ({"role": "user", "content": item.prompt},),
                {"constraints": item.constraints},
                {"level": item.level, "pattern": item.pattern},
            )
            for item in self.items()
        ]

    def verdicts(self, constraints: Sequence[Triple], answer: str | None) -> list[tuple[bool | None, str]]:
        """(verdict, evidence) of every constraint; None is unverifiable. An answer of None obeys nothing that is."""
        if answer is None:
            return [
                (None if _verdict(triple, "x", self.compat)[0] is None else False, "no answer") for triple in constraints
            ]
        if not isinstance(answer, str):
            raise ValueError(f"an answer is a string, got {type(answer).__name__}")
        if self.compat == "official":  # which strips only line ends, and only after reasoning
            _, mark, tail = answer.rpartition("</think>")
            text = tail.strip("\n") if mark else tail
        else:
            text = answer_part(answer)
        return [_verdict(triple, text, self.compat) for triple in constraints]

    def mark(self, sample: Sample, text: str) -> Mark:
        found = self.verdicts(sample.data["constraints"], text)
        evidence = "; ".join(
            f"{triple[2]!r}: {'unverifiable' if ok is None else 'yes' if ok else 'no'} ({why})"
            for triple, (ok, why) in zip(sample.data["constraints"], found, strict=True)
        )
        return Mark(_values([ok for ok, _ in found]), evidence)

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        return Mark(_values([ok for ok, _ in self.verdicts(sample.data["constraints"], None)]), outcome, outcome)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        found = means(scored, ["accuracy", "macro"])
        by_main: dict[str, list[float]] = defaultdict(list)
        by_second: dict[str, list[tuple[int, float]]] = defaultdict(list)
        micro: list[tuple[int, float]] = []
        seen = 0
        for number, one in enumerate(scored):
            triples: Sequence[Triple] = one.sample.data["constraints"]
            for choice in one.answers:
                verdicts = [ok for ok, _ in self.verdicts(triples, choice.text if choice.ok else None)]
                seen += len(verdicts)
                mains: dict[str, list[bool]] = defaultdict(list)
                for triple, ok in zip(triples, verdicts, strict=True):
                    if ok is not None:
                        main, second = category(*triple[:2])
                        mains[main].append(ok)
                        by_second[second].append((number, float(ok)))
                        micro.append((number, float(ok)))
                for main, oks in mains.items():
                    by_main[main].append(float(all(oks)))
        for main in TAXONOMY:
            if values := by_main[main]:
                found.append(
                    Metric("accuracy", statistics.fmean(values), bootstrap_ci(values), len(values), "category", main)
                )
        cuts = [("satisfied", "kind", second, by_second[second]) for second in MAIN] + [("micro", "", "", micro)]
        for name, axis, cut, pairs in cuts:
            if pairs:
                groups, values = [group for group, _ in pairs], [value for _, value in pairs]
                found.append(Metric(name, statistics.fmean(values), bootstrap_ci(values, groups), len(values), axis, cut))
        if seen:
            found.append(Metric("verifiable", len(micro) / seen, None, seen))
        return found


def _values(verdicts: Sequence[bool | None]) -> dict[str, float]:
    known = [ok for ok in verdicts if ok is not None]
    return {"accuracy": float(all(known)), "macro": sum(known) / len(known)} if known else {}


def to_table(report: Report, by: Sequence[str] = ("level", "pattern", "category", "kind")) -> str:
    """The report's metrics as text, a line each, whole first and then by the axes of ``by``."""
    rows = [("", "overall", report.get("accuracy"))]
    rows += [("", name, report.get(name)) for name in ("macro", "micro")]
    rows += [(axis, metric.value_of, metric) for axis in by for metric in report.metrics if metric.axis == axis
             and metric.name in ("accuracy", "satisfied")]  # fmt: skip
    lines = [f"{'axis':<9} {'':<14} {'%':>6}  {'95 % interval':<15} {'n':>6}"]
    for axis, name, metric in rows:
        low, high = metric.ci or (metric.value, metric.value)
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(f"{axis:<9} {name:<14} {100 * metric.value:>6.2f}  {interval:<15} {metric.n:>6}")
    return "\n".join(lines)


def audit(items: Sequence[Item]) -> dict[str, Any]:
    """What of the items' constraints can be verified, and what the original makes of the rest.

    ``reasons``: why constraints are unverifiable; ``vacuous`` and ``impossible``: what the original does not understand and
    therefore passes or fails whatever the answer (`official.reads`), and how many items have one; ``empty``: what a blank
    answer passes, (constraints, items), by the original and by ours.
    """
    triples = [triple for item in items for triple in item.constraints]
    checkers = {triple: compile_constraint(*triple) for triple in set(triples)}
    reads = {triple: official.reads(category(*triple[:2])[1], triple[2]) for triple in checkers}
    reasons = Counter(c.reason.split(" (")[0] for t in triples if isinstance(c := checkers[t], Unverifiable))
    modes: tuple[Compat, ...] = ("official", "ours")
    empty = {mode: [[bool(_verdict(t, "", mode)[0]) for t in item.constraints] for item in items] for mode in modes}
    kinds = ("vacuous", "impossible")
    return {
        "items": len(items),
        "constraints": len(triples),
        "verifiable": sum(isinstance(checkers[triple], Constraint) for triple in triples),
        "reasons": dict(reasons.most_common()),
        **{kind: sum(reads[triple] == kind for triple in triples) for kind in kinds},
        **{f"{kind}_items": sum(any(reads[t] == kind for t in item.constraints) for item in items) for kind in kinds},
        "empty": {mode: (sum(map(sum, rows)), sum(map(all, rows))) for mode, rows in empty.items()},
    }


RewardMode = Literal["count", "fraction", "all"]


def as_reward(checkers: Sequence[Constraint] | None = None, mode: RewardMode = "count") -> Callable[..., list[float]]:
    """A reward function for trl's ``GRPOTrainer(reward_funcs=...)``.

    It rewards the number of satisfied constraints (``count``, the paper's in training), their share (``fraction``) or all of
    them (``all``, the paper's in validation). Without ``checkers`` the constraints come from the data set's column
    ``constraints``, lists of (main, sub, text); those that cannot be verified are left out. Raises ValueError where nothing
    is left to reward.
    """
    if mode not in ("count", "fraction", "all"):
        raise ValueError(f"mode is 'count', 'fraction' or 'all', got '{mode}'")

    def reward(completions: Sequence[Any], constraints: Sequence[Sequence[Triple]] | None = None, **_: Any) -> list[float]:
        if checkers is None and constraints is None:
            raise ValueError("give as_reward checkers, or the data set a column 'constraints'")
        values = []
        for place, completion in enumerate(completions):
            some = checkers
            if some is None:
                compiled = [compile_constraint(*triple) for triple in (constraints or [])[place]]
                some = [one for one in compiled if isinstance(one, Constraint)]
            if not some:
                raise ValueError(f"no constraint of completion {place} can be verified; drop such items from the data set")
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            kept = sum(bool(checker.check(answer_part(text))) for checker in some)
            values.append(float(kept if mode == "count" else kept == len(some) if mode == "all" else kept / len(some)))
        return values

    return reward
