"""LongProc: long procedures to be written out line by line (Ye et al. 2025, arXiv 2501.05414).

Six tasks whose right answer is a long, deterministic trace: rows of a page (html_to_tsv), C++ from pseudocode
(pseudo_to_code), a route (path_traversal), beliefs (tom_tracking), and two searches (countdown, travel_planning), at about
500, 2,000 and 8,000 output tokens. Every score is a rule; decoding is greedy.

Items are the official files' (``path``), or generated: five of the tasks have generators whose length is set in *steps*
(lines of the trace), because a token is not the same for every model. Prompts of generated items are our own wording;
traces have the official grammar, character for character. Scoring deviates from the official code where that is wrong (see
`compat` for the list and for its numbers): partial scores are shares of right lines, 0 when the first line is wrong and 1
only for a right trace; equations are read by a pattern and never evaluated; C++ runs in the sandbox.

An average at one length is over the tasks that exist at it (5, 6 and 5 in the paper), so averages at different lengths are
not points of one curve; which tasks went in is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from broadsheet.core.chat.protocol import Choice

from ..base import Benchmark, Mark, Metric, Sample, Scored, means
from . import compat as official_scores
from . import countdown, html_to_tsv, path_traversal, pseudo_to_code, tom_tracking, travel_planning
from .common import Item, Score
from .countdown import make_countdown
from .html_to_tsv import make_html
from .official import LEVELS, load_longproc, split_name
from .path_traversal import make_path_traversal
from .tom_tracking import make_tom
from .travel_planning import make_travel

__all__ = [
    "GENERATED", "LEVELS", "Item", "LongProc", "Score", "Summary", "evaluate", "generate", "load_longproc",
    "make_countdown", "make_html", "make_path_traversal", "make_tom", "make_travel", "score",
]  # fmt: skip

TASKS: dict[str, ModuleType] = {
    "html_to_tsv": html_to_tsv, "pseudo_to_code": pseudo_to_code, "path_traversal": path_traversal,
    "tom_tracking": tom_tracking, "countdown": countdown, "travel_planning": travel_planning,
}  # fmt: skip
#: steps of generated traces that take about 500, 2,000 and 8,000 tokens of four characters
GENERATED: dict[str, dict[str, int]] = {
    "html_to_tsv": {"0.5k": 40, "2k": 160, "8k": 640},
    "path_traversal": {"0.5k": 40, "2k": 160, "8k": 640},
    "tom_tracking": {"0.5k": 10, "2k": 40, "8k": 160},
    "countdown": {"0.5k": 28, "2k": 100, "8k": 400},
    "travel_planning": {"2k": 90, "8k": 360},
}
#: tokens an answer may have: its reference and as much again, so that a cut answer is the model's doing
_ROOM = {"0.5k": 1024, "2k": 4096, "8k": 12288}


def generate(name: str, seed: int, steps: int | None = None) -> Item:
    """The item number ``seed`` of a generated task and length, or of ``steps`` lines. Raises ValueError for unknown
    names."""
    task, level = split_name(name)
    if task not in GENERATED:
        raise ValueError(f"{task} has no generator: give path=, the data folder of princeton-pli/LongProc")
    count = GENERATED[task][level] if steps is None else steps
    make = {
        "html_to_tsv": make_html, "tom_tracking": lambda n, seed: make_tom(n, seed=seed), "travel_planning": make_travel,
        "path_traversal": lambda n, seed: make_path_traversal(n, seed=seed), "countdown": make_countdown,
    }[task]  # fmt: skip
    return make(count, seed=seed)


def score(task: str, item: Item, text: str, compat: bool = False) -> Score:
    """What one answer is worth; ``compat``: by the official rules, see `compat`. Never raises for any text."""
    return official_scores.EVALUATORS[task](item, text) if compat else TASKS[task].score(item, text)


@dataclass(frozen=True)
class Summary:
    """Means over answers: ``accuracy`` (html_to_tsv: F1), ``partial``, ``prefix_len`` (right lines before the first wrong
    one), the shares of answers in which an answer was found (``extraction``) and that were cut off (``truncated``; nan when
    nobody said)."""

    name: str
    n: int
    accuracy: float
    partial: float
    prefix_len: float
    extraction: float
    truncated: float = float("nan")


def evaluate(
    name: str,
    predictions: Sequence[str],
    references: Sequence[Mapping[str, Any] | Item],
    compat: bool = False,
    cut: Sequence[bool] | None = None,
) -> Summary:
    """Scores answers to the items of one task. ``references``: rows of `load_longproc` or `Item`s; ``cut``: which answers
    hit the limit of tokens. Raises ValueError when the counts differ, and for an unknown name."""
    task, _ = split_name(name)
    if len(predictions) != len(references) or (cut is not None and len(cut) != len(predictions)):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references of {name}: give one for each")
    if not predictions:
        raise ValueError(f"there are no predictions for {name}")
    items = [reference if isinstance(reference, Item) else Item.of(reference) for reference in references]
    scores = [score(task, item, text, compat) for item, text in zip(items, predictions, strict=True)]
    return Summary(
        name,
        len(scores),
        fmean(one.accuracy for one in scores),
        fmean(one.partial for one in scores),
        fmean(one.prefix for one in scores),
        fmean(one.extracted for one in scores),
        sum(cut) / len(cut) if cut else float("nan"),
    )


@dataclass(frozen=True)
class LongProc(Benchmark):
    """``tasks``: names such as "path_traversal" (all its lengths in ``levels``) or "path_traversal_0.5k"; "" are all that
    can be had. ``path``: the official data folder, else items are generated: ``items`` of every task and length, which with
    ``seed`` are always the same. ``steps`` sets the length of generated traces instead of the levels' (tokens allowed: the
    highest level's). ``items`` is a limit for official files (0: all). ``thinking``: tokens allowed beside the answer's.
    ``compat``: the official scores. ``procedure``: False leaves out of the prompts how it is done, so that rules and format
    alone are left, to see what the procedure's text is worth (generated items). Raises ValueError for names and lengths
    that do not exist.
    """

    tasks: str = ""
    levels: str = "0.5k,2k,8k"
    path: str | None = None
    items: int = 20
    steps: int | None = None
    seed: int = 0
    thinking: int = 0
    compat: bool = False
    procedure: bool = True
    epochs: int = 1

    slug: ClassVar[str] = "longproc"
    primary: ClassVar[str] = "accuracy"
    request: ClassVar[Mapping[str, Any]] = {"temperature": 0.0}

    def __post_init__(self) -> None:
        if self.items < 0 or (self.items == 0 and self.path is None):
            raise ValueError(f"items must be at least 1 (or 0 for all of the official files), got {self.items}")
        if self.thinking < 0 or self.epochs < 1:
            raise ValueError(f"thinking must be at least 0 and epochs at least 1, got {self.thinking} and {self.epochs}")
        if self.steps is not None and self.path is not None:
            raise ValueError("steps sets the length of generated items: leave path out")
        if not self.procedure and self.path is not None:
            raise ValueError("procedure can be left out of generated items only: leave path out")
        if not self.names:
            raise ValueError(f"nothing to run: none of the tasks comes in {self.levels}")

    @property
    def names(self) -> list[str]:
        """The tasks with their lengths. A task named with its length is taken at it, else at every one of ``levels``."""
        levels = [level.strip() for level in self.levels.split(",") if level.strip()]
        for level in levels:
            if level not in _ROOM:
                raise ValueError(f"there is no length '{level}': choose from {', '.join(_ROOM)}")
        found = []
        for task in [part.strip() for part in self.tasks.split(",") if part.strip()] or list(
            GENERATED if self.path is None else LEVELS
        ):
            if task in LEVELS:
                # With the length set in steps, one level is as good as another.
                exist = [level for level in levels if level in LEVELS[task]]
                found += [f"{task}_{level}" for level in (exist[-1:] if self.steps else exist)]
            else:
                split_name(task)
                found.append(task)
        return list(dict.fromkeys(found))

    def problems(self) -> list[tuple[str, Item]]:
        """(name, item) of everything that is asked."""
        found: list[tuple[str, Item]] = []
        for name in self.names:
            if self.path is None:
                first = self.seed * 1_000_003
                left_out = "" if self.procedure else TASKS[split_name(name)[0]].PROCEDURE
                for number in range(self.items):
                    item = generate(name, first + number, self.steps)
                    found.append((name, replace(item, prompt=item.prompt.replace(left_out, ""))))
            else:
                rows = load_longproc(name, Path(self.path))
                found += [(name, Item.of(row)) for row in rows[: self.items or None]]
        return found

    def samples(self) -> list[Sample]:
        made = []
        for number, (name, item) in enumerate(self.problems()):
            task, level = split_name(name)
            axes = {"task": task} if self.steps else {"task": task, "level": level, "name": name}
            made.append(
                Sample(
                    f"{name}/{number}",
                    ({"role": "user", "content": item.prompt},),
                    {"item": item, "task": task},
                    axes,
                    {"max_tokens": _ROOM[level] + self.thinking},
                )
            )
        return made

    def mark(self, sample: Sample, text: str) -> Mark:
        one = score(sample.data["task"], sample.data["item"], text, self.compat)
        values = {"accuracy": one.accuracy, "partial": one.partial, "extraction": float(one.extracted), **one.values}
        if not self.compat:
            values |= {"prefix": one.prefix / one.lines, "prefix_lines": float(one.prefix)}
        return Mark(values, one.evidence, "scored" if one.extracted else "unparsed")

    def marked(self, sample: Sample, choice: Choice) -> Mark:
        """An answer that was cut off has the right lines that it has, but no accuracy."""
        if choice.finish_reason != "length":
            return super().marked(sample, choice)
        mark = self.mark(sample, choice.text)
        return replace(mark, values={**mark.values, self.primary: 0.0}, outcome="truncated")

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """Means by task and length, and at every length the mean over its tasks (``average``)."""
        found = means(scored)
        levels = dict.fromkeys(one.sample.axes["level"] for one in scored if "level" in one.sample.axes)
        return found + [_average(scored, level) for level in levels]


def _average(scored: Sequence[Scored], level: str) -> Metric:
    """The mean of the tasks' accuracies at a length, every task counting the same; the interval draws items within tasks."""
    draw = np.random.default_rng(0)
    by_task: dict[str, list[float]] = {}
    for one in scored:
        if one.sample.axes.get("level") == level:
            by_task.setdefault(one.sample.axes["task"], []).append(fmean(mark.values["accuracy"] for mark in one.marks))
    drawn = [np.array(values)[draw.integers(0, len(values), (2000, len(values)))].mean(1) for values in by_task.values()]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    total = sum(len(values) for values in by_task.values())
    tasks = f"{level} ({len(by_task)} tasks)"
    return Metric("average", fmean(map(fmean, by_task.values())), (float(low), float(high)), total, "level", tasks)
