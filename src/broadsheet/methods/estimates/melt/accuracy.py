"""What a format of weights costs in accuracy (section 5).

The paper's five tasks are multiple choice by log-likelihood, as lm-eval scores: they are read from JSON lines (``{"query",
"choices", "gold"}``). For the built-in models five tasks of the microworld stand in: recall as multiple choice, and
arithmetic in four written steps and lists as answers that are written and checked. Every row carries its number of items
and its standard error, and a difference below two standard errors, taken over the same items, is printed as "no
difference". Compare formats within a runtime: servers count log-probabilities in their own ways.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broadsheet.methods.estimates.base import Table

from .runtimes import StepRuntime

#: below so many standard errors two accuracies are not told apart
CERTAIN = 2.0
#: tasks of the microworld: chosen among the answers to other questions, and written
CHOSEN, WRITTEN = ("kv", "prefix_suffix", "needle"), ("arithmetic", "lists")


@dataclass(frozen=True)
class Item:
    """A question, the texts of which one is right, and which."""

    query: str
    choices: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        if len(set(self.choices)) != len(self.choices) or len(self.choices) < 2:
            raise ValueError(f"an item needs at least two different choices, got {self.choices}")
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold is the place of the right choice, 0 to {len(self.choices) - 1}; got {self.gold}")


def read_items(path: str | Path) -> list[Item]:
    """From JSON lines. Raises ValueError, naming the line."""
    path, found = Path(path), []
    if not path.is_file():
        raise ValueError(f"no items at {path}; give JSON lines of query, choices and gold")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                found.append(Item(row["query"], tuple(row["choices"]), int(row["gold"])))
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: not an item ({error})") from None
    if not found:
        raise ValueError(f"{path} holds no items")
    return found


def microworld_items(task: str, count: int = 200, seed: int = 0, choices: int = 8, context: int = 320) -> list[Item]:
    """Questions of a session, each with the answers to the session's other questions as wrong choices."""
    from broadsheet.core.microworld.tasks import make_sessions

    if task not in CHOSEN:
        raise ValueError(f"no task '{task}'; there are {', '.join(CHOSEN)}")
    found: list[Item] = []
    number = 0
    while len(found) < count:
        session = make_sessions(task, 1, context, choices + 2, seed=f"melt/{seed}/{number}")[0]
        number += 1
        answers = list(dict.fromkeys(str(turn.answer) for turn in session.turns))
        turn = session.turns[0]
        answer, text = str(turn.answer), str(turn.extra.get("reference", turn.answer))
        others = [one for one in answers if one != answer][: choices - 1]
        if answer not in text or not others:
            continue
        texts = [text, *(text.replace(answer, other) for other in others)]
        gold = number % len(texts)  # so that no place is the right one more often
        texts[0], texts[gold] = texts[gold], texts[0]
        if len(set(texts)) == len(texts):
            found.append(Item(f"{session.context} {turn.input}".strip(), tuple(texts), gold))
    return found


def chosen_items(count: int) -> dict[str, list[Item]]:
    """The microworld's tasks of multiple choice."""
    return {task: microworld_items(task, count) for task in CHOSEN}


@dataclass(frozen=True)
class Accuracy:
    """Which items were answered rightly."""

    task: str
    format: str
    right: tuple[bool, ...]

    @property
    def n(self) -> int:
        return len(self.right)

    @property
    def value(self) -> float:
        return statistics.fmean(self.right)

    @property
    def error(self) -> float:
        """Standard error, with n - 1 as lm-eval has it."""
        return math.sqrt(self.value * (1 - self.value) / (self.n - 1)) if self.n > 1 else math.nan


def measure_accuracy(
    runtime: StepRuntime, task: str, items: Sequence[Item], tick: Callable[[int, int], None] | None = None
) -> Accuracy:
    """The choice of the highest log-likelihood behind the question (not divided by its length). The runtime is loaded."""
    right = []
    for number, item in enumerate(items):
        right.append(_chosen(runtime, item) == item.gold)
        if tick:
            tick(number + 1, len(items))
    return Accuracy(task, runtime.format, tuple(right))


def measure_written(
    runtime: StepRuntime, task: str, count: int = 200, seed: int = 0, tick: Callable[[int, int], None] | None = None
) -> Accuracy:
    """Answers to a task's questions, written by the loaded runtime as its config samples, and checked."""
    from broadsheet.core.microworld.checkers import check
    from broadsheet.core.microworld.tasks import arithmetic, lists

    if task not in WRITTEN:
        raise ValueError(f"no task '{task}'; there are {', '.join(WRITTEN)}")
    right = []
    for number in range(count):
        rng = random.Random(f"melt/{task}/{seed}/{number}")
        session = arithmetic(rng, 64, 1, steps=4) if task == "arithmetic" else lists(rng, 64, 1)
        turn = session.turns[0]
        runtime.begin(number)
        right.append(check(runtime.answer(f"{session.context} {turn.input}".strip()).text, turn) == 1.0)
        if tick:
            tick(number + 1, count)
    return Accuracy(task, runtime.format, tuple(right))


def _chosen(runtime: StepRuntime, item: Item) -> int:
    replies = [runtime.dialogue.tokenize(" " + choice) for choice in item.choices]
    scores = runtime.log_likelihoods(runtime.dialogue.opening(item.query), replies)
    return max(range(len(scores)), key=scores.__getitem__)


def difference(one: Accuracy, other: Accuracy) -> tuple[float, float, str]:
    """``one`` - ``other`` over the same items, its standard error, and "better", "worse" or "no difference".

    Raises ValueError for different items.
    """
    if one.n != other.n or one.task != other.task:
        raise ValueError(f"{one.format} has {one.n} items of {one.task}, {other.format} {other.n} of {other.task}")
    gaps = [int(a) - int(b) for a, b in zip(one.right, other.right, strict=True)]
    mean = statistics.fmean(gaps)
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    certain = abs(mean) >= CERTAIN * error and mean != 0
    return mean, error, ("better" if mean > 0 else "worse") if certain else "no difference"


def accuracy_table(found: Mapping[str, Sequence[Accuracy]]) -> Table:
    """``found``: task -> the formats' accuracies, the reference first."""
    rows = []
    for task, some in found.items():
        for one in some:
            mean, error, verdict = difference(one, some[0])
            gap = "reference" if one is some[0] else f"{mean:+.3f} ± {error:.3f}"
            rows.append(
                (task, one.format, one.n, f"{one.value:.3f} ± {one.error:.3f}", gap, "" if one is some[0] else verdict)
            )
    note = f"± is one standard error; a difference below {CERTAIN:g} of them, over the same items, is no difference."
    return Table("Accuracy", ("task", "format", "n", "accuracy", "difference", "verdict"), tuple(rows), note)
