"""FinGPT-Benchmark: what instruction tuning on financial tasks gives (Wang et al. 2023, arXiv 2310.04793).

Four families of tasks, all of them instruction, input and answer: sentiment (three classes), headline (nine questions to a
gold headline), ner (persons, organisations, locations in agreements), re (29 relations). Three phases: *single*, a model
for each task; *multi*, one for all; *zero*, tuned on classification versions with options of three families and tested on
the fourth.

`FinGPTBenchmark` asks any model the test questions; `phase_data` says what a phase trains on, `tune` trains. Data are the
public files from the user's path, or SYNTHETIC rows of our own (`synthetic`). Scores are strict by default and the official
ones with ``compat=True``; see `scoring` for the official scorers' faults, `readers` for those of the data and `training`
for the mask's. Extraction sets are small (98 test rows): every number has its bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..base import Benchmark, Mark, Metric, Sample, Scored, means
from . import baselines, scoring
from .rows import FAMILIES, RELATIONS, Row, check_apart
from .scoring import (
    Result,
    read_entities,
    read_option,
    read_sentiment,
    read_triples,
    read_yes_no,
    score_headline,
    score_ner,
    score_options,
    score_re,
    score_sentiment,
    vote,
)
from .tasks import MULTI, NAMES, FinTask, Mix, Phase, Split, build_mix, phase_data
from .training import LORA, Tuned, tune

__all__ = [
    "FAMILIES",
    "LORA",
    "MULTI",
    "NAMES",
    "RELATIONS",
    "FinGPTBenchmark",
    "FinTask",
    "Mix",
    "Phase",
    "Result",
    "Row",
    "Split",
    "Tuned",
    "baselines",
    "build_mix",
    "check_apart",
    "phase_data",
    "run_phase",
    "score_headline",
    "score_ner",
    "score_re",
    "score_rows",
    "score_sentiment",
    "tune",
]

#: the test of a family in the phases that tune on it, and in the zero-shot phase
_TESTS = {"sentiment": "sentiment", "headline": "headline", "ner": "ner", "re": "finred-re"}
_ZERO = {"sentiment": "sentiment-cls", "headline": "headline-cls", "ner": "ner-cls", "re": "finred-cls"}


def score_rows(rows: Sequence[Row], preds: Sequence[str], compat: bool = False) -> Result:
    """The scores of answers to rows of one family, by the family's rule (or, where options were listed, by the option
    chosen)."""
    golds = [row.output for row in rows]
    if not rows:
        raise ValueError("the test split is empty: there is nothing to score")
    family = rows[0].family
    if family == "sentiment" and (compat or not rows[0].options):
        return score_sentiment(preds, golds, compat)
    if family == "headline":
        return score_headline(preds, golds, [row.kind for row in rows], compat)
    if rows[0].options or rows[0].kind == "classify":
        return score_options(preds, golds, [row.options or RELATIONS for row in rows])
    inputs = [row.input for row in rows]
    return score_ner(preds, golds, inputs, compat) if family == "ner" else score_re(preds, golds, inputs, compat)


@dataclass(frozen=True)
class FinGPTBenchmark(Benchmark):
    """``task``: families, comma-separated, or "all". ``phase``: "zero" asks the versions with options (sentiment: each
    question in five wordings, and their vote), the others the plain ones; which phase a model was tuned in is yours to say
    truly. ``path``: a folder with the public files (see `tasks.FILES`), else SYNTHETIC rows. ``items``: so many test rows a
    family (0: all; those of one question or sentence stay together, so that it may be a few more). ``compat``: the official
    scores.

    ``accuracy`` is the share of answers that are right as a whole: the class, or all entities and triples and no more.
    """

    task: str = "all"
    phase: str = "single"
    path: str | None = None
    items: int = 100
    seed: int = 0
    compat: bool = False
    accept_noncommercial: bool = False
    epochs: int = 1

    slug: ClassVar[str] = "fingpt-benchmark"
    primary: ClassVar[str] = "accuracy"
    request: ClassVar[Mapping[str, Any]] = {"temperature": 0.0, "max_tokens": 128}

    def __post_init__(self) -> None:
        if self.phase not in ("single", "multi", "zero"):
            raise ValueError(f"a phase is single, multi or zero, got '{self.phase}'")
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise ValueError(f"there is no family of tasks '{unknown[0]}': choose from {', '.join(FAMILIES)}, or all")
        if self.items < 0 or self.epochs < 1:
            raise ValueError(f"items must be at least 0 and epochs at least 1, got {self.items} and {self.epochs}")

    @property
    def families(self) -> list[str]:
        return list(FAMILIES) if self.task == "all" else [name.strip() for name in self.task.split(",")]

    def rows(self) -> dict[str, list[Row]]:
        """The test rows by family."""
        names = _ZERO if self.phase == "zero" else _TESTS
        found = {}
        for family in self.families:
            setting: dict[str, Any] = {
                "path": self.path,
                "accept_noncommercial": self.accept_noncommercial,
                "seed": self.seed,
            }
            # A quarter of the synthetic texts are for testing, and each gives at least one row but of neutral sentiment.
            items = max(16 * self.items, 400)
            test = list(FinTask(names[family], items=items, **setting).load().test)
            found[family] = _first(test, self.items) if self.items else test
        return found

    def samples(self) -> list[Sample]:
        return [
            Sample(
                f"{family}/{number}",
                ({"role": "user", "content": row.prompt},),
                {"row": row},
                {"task": family, "source": row.source} | ({"kind": row.kind} if family == "headline" else {}),
            )
            for family, rows in self.rows().items()
            for number, row in enumerate(rows)
        ]

    def mark(self, sample: Sample, text: str) -> Mark:
        row: Row = sample.data["row"]
        if self.compat and not row.options:
            said, gold = (scoring.official_reading(row.family, one, row.input) for one in (text, row.output))
            return Mark({"accuracy": float(said == gold)}, f"officially read as {said}")
        said, gold = _read(row, text), _read(row, row.output)
        outcome = "unparsed" if said is None else "scored"
        return Mark({"accuracy": float(said == gold)}, f"read as {said}", outcome)  # type: ignore[arg-type]

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Accuracy by task and source; every family's own scores, with the share of unread answers; the vote over
        wordings."""
        found = means(scored)
        for family in dict.fromkeys(one.sample.axes["task"] for one in scored):
            pairs = [
                (one.sample.data["row"], choice.text if choice.ok else "")
                for one in scored
                if one.sample.axes["task"] == family
                for choice in one.answers
            ]
            rows, texts = [row for row, _ in pairs], [text for _, text in pairs]
            result = score_rows(rows, texts, self.compat)
            for name, value in result.metrics.items():
                if name != "accuracy":
                    found.append(Metric(name, value, result.ci95.get(name), result.n, "task", family))
            found.append(Metric("unparsed", result.unparsed / result.n, None, result.n, "task", family))
            if family == "sentiment" and rows[0].group:
                found.append(_voted(rows, texts))
        return found


def _read(row: Row, text: str) -> Any:
    """What an answer says, in a form that can be compared; None where it cannot be read."""
    if row.options or row.kind == "classify":
        return read_option(text, row.options or RELATIONS)
    if row.family == "sentiment":
        said = read_sentiment(text)
        return said and scoring.SEVEN.get(said, said)
    if row.family == "headline":
        return read_yes_no(text)
    found = read_entities(text) if row.family == "ner" else read_triples(text, row.input)
    return None if found is None else sorted(tuple(part.lower() for part in one) for one in found)


def _first(rows: Sequence[Row], count: int) -> list[Row]:
    """The first rows, up to the end of a group."""
    end = min(count, len(rows))
    while end < len(rows) and rows[end].group and rows[end].group == rows[end - 1].group:
        end += 1
    return list(rows[:end])


def _voted(rows: Sequence[Row], texts: Sequence[str]) -> Metric:
    golds = {row.group: row.output for row in rows}
    voted = vote(texts, [row.group for row in rows])
    result = score_sentiment([voted[group] for group in golds], list(golds.values()))
    return Metric("vote_accuracy", result.metrics["accuracy"], result.ci95["accuracy"], result.n, "task", "sentiment")


def run_phase(
    model: Any,
    tokenizer: Any,
    phase: Phase,
    lora: Mapping[str, Any] | None = LORA,
    mask: Any = "ignore",
    **setting: Any,
) -> Tuned:
    """Tunes a model for one phase (`phase_data`), with the paper's epochs and warm-up where ``setting`` (of `tune`) has no
    others. The learning rate, rank and dropout are the paper's."""
    return tune(model, tokenizer, phase.train, lora, mask, **{"epochs": phase.epochs, "warmup": phase.warmup, **setting})
