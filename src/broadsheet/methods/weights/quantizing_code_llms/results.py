"""What a study found: the tidy table, and arms compared by pass or fail of the same samples."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from broadsheet.core.codetasks import CodeTask
from broadsheet.core.records import Record, now, provenance
from broadsheet.core.stats import (
    benjamini_hochberg,
    bootstrap_ci,
    discordant,
    grouped_wilcoxon,
    mcnemar,
    paired_difference,
    paired_odds_ratio,
)

SLUG = "quantizing-code-llms"
BENCH = "code-study"
BASELINE = "bf16"
FACTORS = ("model", "method", "precision", "calibration")


@dataclass(frozen=True)
class Arm:
    """One cell of the design. ``precision``: the budget in bits a weight, None for the model as it is. ``calibration``: a
    text's name, empty where the method needs none."""

    model: str
    method: str = BASELINE
    precision: float | None = None
    calibration: str = ""

    @property
    def label(self) -> str:
        bits = "" if self.precision is None else f" {self.precision:g} bits"
        return f"{self.method}{bits}" + (f", {self.calibration}" if self.calibration else "")


@dataclass(frozen=True)
class ArmResult:
    """``statuses`` and ``completions``: for every task, for every sample. ``facts``: true ``bits`` a weight, ``bytes``,
    ``disk_bytes``, ``perplexity`` by text, ``parameters``; or ``least`` alone, when the method cannot go down to the
    precision.
    """

    arm: Arm
    facts: dict[str, Any]
    statuses: tuple[tuple[str, ...], ...]
    completions: tuple[tuple[str, ...], ...]

    @property
    def reached(self) -> bool:
        return "least" not in self.facts

    def passed(self, tasks: Sequence[int]) -> tuple[list[bool], list[int]]:
        """Every sample of these tasks, and which task it is of. A missing completion has not passed."""
        flags = [status == "pass" for index in tasks for status in self.statuses[index]]
        return flags, [index for index in tasks for _ in self.statuses[index]]


@dataclass(frozen=True)
class Comparison:
    """An arm against its baseline on the same samples of the same tasks.

    ``only_baseline`` and ``only_arm``: samples that one of the two alone passes; ``odds_ratio``: the first over the second,
    with its exact interval; ``p``: McNemar's exact test over samples; ``p_tasks``: Wilcoxon's signed-rank test over tasks;
    both also adjusted within the model and language. ``difference`` of pass@1 with a 95 % bootstrap interval over tasks.
    """

    arm: Arm
    baseline: Arm
    language: str
    bits: float
    baseline_bits: float
    pass_at_1: float
    baseline_pass_at_1: float
    difference: float
    interval: tuple[float, float]
    samples: int
    tasks: int
    only_baseline: int
    only_arm: int
    odds_ratio: float
    odds_interval: tuple[float, float]
    p: float
    p_adjusted: float
    p_tasks: float
    p_tasks_adjusted: float
    alpha: float

    @property
    def significant(self) -> bool:
        return self.p_adjusted < self.alpha

    @property
    def significant_by_task(self) -> bool:
        return self.p_tasks_adjusted < self.alpha

    @property
    def disagree(self) -> bool:
        """Whether the two levels come to different verdicts; the task level is to be believed."""
        return self.significant != self.significant_by_task


@dataclass(frozen=True)
class Results:
    """What a study found. ``arms`` are in the order of the design."""

    tasks: tuple[CodeTask, ...]
    arms: tuple[ArmResult, ...]
    n_samples: int
    temperature: float
    seed: int

    @property
    def languages(self) -> list[str]:
        return list(dict.fromkeys(task.language for task in self.tasks))

    def of_language(self, language: str) -> list[int]:
        """The places of a language's tasks."""
        return [index for index, task in enumerate(self.tasks) if task.language == language]

    def pass_at_1(self, arm: ArmResult, language: str) -> tuple[float, tuple[float, float]]:
        """The mean share of samples that pass, with a 95 % bootstrap interval over tasks."""
        flags, groups = arm.passed(self.of_language(language))
        values = [float(flag) for flag in flags]
        return float(np.mean(values)), bootstrap_ci(values, groups)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The tidy table: a row a sample."""
        for result in self.arms:
            for task, statuses, completions in zip(
                self.tasks, result.statuses, result.completions, strict=bool(result.statuses)
            ):
                for index, (status, completion) in enumerate(zip(statuses, completions, strict=True)):
                    yield {
                        **asdict(result.arm),
                        "bits": result.facts["bits"],
                        "language": task.language,
                        "task": task.name,
                        "sample": index,
                        "passed": status == "pass",
                        "status": status,
                        "completion": completion,
                        "seed": self.seed,
                        "temperature": self.temperature,
                    }

    def write(self, path: str | Path) -> None:
        """Writes the tidy table as ``.csv`` or ``.parquet``. Raises ValueError for another ending, or without pyarrow."""
        path, rows = Path(path), list(self.rows())
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} to write {path.name} into")
        if path.suffix == ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".parquet":
            if not find_spec("pyarrow"):
                raise ValueError("a Parquet table needs pyarrow: pip install 'broadsheet[data]', or write a .csv")
            from pyarrow import Table, parquet

            parquet.write_table(Table.from_pylist(rows), path)
        else:
            raise ValueError(f"a table is written as .csv or .parquet, not '{path.name}'")

    def compare(
        self,
        baseline: str | Mapping[str, Any] = BASELINE,
        test: Literal["mcnemar-exact"] = "mcnemar-exact",
        correction: Literal["bh", "none"] = "bh",
        alpha: float = 0.05,
    ) -> list[Comparison]:
        """Every arm against its baseline: the arm with the same factors but for those that ``baseline`` names.

        ``baseline``: a method's name, or factors such as ``{"calibration": "random"}``. P-values are adjusted by Benjamini
        and Hochberg within a model and language. Raises ValueError when no arm has a baseline, or their samples are not
        paired.
        """
        wanted = {"method": baseline} if isinstance(baseline, str) else dict(baseline)
        if wanted == {"method": BASELINE}:
            wanted |= {"precision": None, "calibration": ""}
        found = self._compared(
            [(result, other) for result in self.arms for other in self._like(result, wanted)], test, correction, alpha
        )
        if not found:
            raise ValueError(f"unpaired results: no arm has a baseline with {wanted} and is another; add it to the factors")
        return found

    def pairwise(
        self,
        factor: str,
        test: Literal["mcnemar-exact"] = "mcnemar-exact",
        correction: Literal["bh", "none"] = "bh",
        alpha: float = 0.05,
    ) -> list[Comparison]:
        """Every two levels of a factor, all else equal, the later against the earlier; adjusted together. May be empty."""
        levels = list(dict.fromkeys(asdict(result.arm).get(factor) for result in self.arms if result.arm.method != BASELINE))
        pairs = [
            (result, other)
            for result in self.arms
            if result.arm.method != BASELINE and (own := asdict(result.arm).get(factor)) is not None
            for level in levels[: levels.index(own)]
            for other in self._like(result, {factor: level})
        ]
        return self._compared(pairs, test, correction, alpha)

    def _like(self, result: ArmResult, wanted: Mapping[str, Any]) -> list[ArmResult]:
        """The other arms with these factors and the rest as in ``result``; one without calibration goes with any."""
        for name in wanted:
            if name not in FACTORS:
                raise ValueError(f"unknown factor '{name}'; factors are {', '.join(FACTORS)}")
        aim = {**asdict(result.arm), **wanted}

        def fits(arm: Arm) -> bool:
            facts = asdict(arm)
            free = {"calibration"} - set(wanted) if "" in (facts["calibration"], aim["calibration"]) else set()
            return all(facts[name] == aim[name] for name in aim if name not in free)

        return [other for other in self.arms if other is not result and fits(other.arm)]

    def _compared(
        self, pairs: Sequence[tuple[ArmResult, ArmResult]], test: str, correction: str, alpha: float
    ) -> list[Comparison]:
        """These pairs, those of a model and language together."""
        if test != "mcnemar-exact":
            raise ValueError(f"unknown test '{test}'; there is mcnemar-exact, with a task-level test beside it")
        if correction not in ("bh", "none"):
            raise ValueError(f"unknown correction '{correction}'; there are bh and none")
        reached = [pair for pair in pairs if pair[0].reached and pair[1].reached]
        return [
            one
            for language in self.languages
            for model in dict.fromkeys(result.arm.model for result, _ in reached)
            for one in self._family([pair for pair in reached if pair[0].arm.model == model], language, correction, alpha)
        ]

    def _family(
        self, pairs: Sequence[tuple[ArmResult, ArmResult]], language: str, correction: str, alpha: float
    ) -> Iterator[Comparison]:
        """Comparisons whose p-values are adjusted together."""
        places, tests = self.of_language(language), []
        for result, other in pairs:
            if [len(row) for row in result.statuses] != [len(row) for row in other.statuses]:
                raise ValueError(
                    f"unpaired results: {result.arm.label} and {other.arm.label} have other samples; run both again"
                )
            ours, groups = result.passed(places)
            theirs, _ = other.passed(places)
            tests.append((ours, theirs, groups, mcnemar(ours, theirs), grouped_wilcoxon(ours, theirs, groups)))
        raw = [[one[3] for one in tests], [one[4] for one in tests]]
        adjusted = [benjamini_hochberg(some) if correction == "bh" else some for some in raw]
        for index, (result, other) in enumerate(pairs):
            ours, theirs, groups, p, p_tasks = tests[index]
            difference, interval = paired_difference([float(x) for x in ours], [float(x) for x in theirs], groups)
            only_baseline, only_arm = discordant(theirs, ours)
            ratio, odds_interval = paired_odds_ratio(theirs, ours)
            yield Comparison(
                arm=result.arm,
                baseline=other.arm,
                language=language,
                bits=result.facts["bits"],
                baseline_bits=other.facts["bits"],
                pass_at_1=float(np.mean(ours)),
                baseline_pass_at_1=float(np.mean(theirs)),
                difference=difference,
                interval=interval,
                samples=len(ours),
                tasks=len(places),
                only_baseline=only_baseline,
                only_arm=only_arm,
                odds_ratio=ratio,
                odds_interval=odds_interval,
                p=p,
                p_adjusted=adjusted[0][index],
                p_tasks=p_tasks,
                p_tasks_adjusted=adjusted[1][index],
                alpha=alpha,
            )

    def records(self) -> list[Record]:
        """The arms as records: pass@1 by language, bits, bytes, perplexities; ``reachable`` = 0 where there is nothing."""
        made: list[Record] = []
        for result in self.arms:
            if not result.reached:
                made.append(self._record(result, "reachable", 0.0, setting={"least": round(result.facts["least"], 4)}))
                continue
            for language in self.languages:
                value, interval = self.pass_at_1(result, language)
                count = len(self.of_language(language)) * self.n_samples
                setting = {"language": language, "temperature": self.temperature}
                made.append(self._record(result, "pass@1", value, ci=interval, n=count, setting=setting))
            for metric, unit in (
                ("bits", "bits per weight"),
                ("bytes", "bytes held"),
                ("disk_bytes", "bytes of weights' files"),
            ):
                made.append(self._record(result, metric, result.facts[metric], unit=unit))
            for text, value in result.facts["perplexity"].items():
                made.append(self._record(result, "perplexity", value, setting={"text": text}))
        return made

    def comparison_records(self, comparisons: Sequence[Comparison], question: str) -> list[Record]:
        """Comparisons as records ``pass@1_difference``: who against, both tests and what they rest on in the setting."""
        arms = {result.arm: result for result in self.arms}
        return [
            self._record(
                arms[one.arm],
                "pass@1_difference",
                one.difference,
                ci=one.interval,
                n=one.samples,
                setting={
                    "question": question,
                    "language": one.language,
                    "against": {"method": one.baseline.method, "calibration": one.baseline.calibration},
                    "bits": one.bits,
                    "against_bits": one.baseline_bits,
                    "only_against": one.only_baseline,
                    "only_this": one.only_arm,
                    "p_mcnemar": one.p_adjusted,
                    "p_tasks": one.p_tasks_adjusted,
                },
            )
            for one in comparisons
        ]

    def _record(
        self, result: ArmResult, metric: str, value: float, setting: Mapping[str, Any] | None = None, **fields: Any
    ) -> Record:
        """Fills in what all records of an arm share."""
        place: dict[str, Any] = {} if result.arm.precision is None else {"budget": result.arm.precision}
        place |= {"calibration": result.arm.calibration} if result.arm.calibration else {}
        return Record(
            paper=SLUG,
            method=result.arm.method,
            bench=BENCH,
            metric=metric,
            value=value,
            seed=self.seed,
            model=result.facts.get("model", result.arm.model),
            parameters=result.facts.get("parameters", {}),
            setting={**place, **(setting or {})},
            time=now(),
            **provenance(),
            **fields,
        )
