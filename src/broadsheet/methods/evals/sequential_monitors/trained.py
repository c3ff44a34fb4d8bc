"""Monitors that are classifiers: features of the requests and a logistic head. Needs scikit-learn.

Five ways to use one head, at one price of training: on the last request ("single"), on all so far ("cumulative"), on the
last few ("windowed"), on all but only at the end ("final"), and as a sum of what single requests tell ("cusum": Page's
statistic, log-odds of every request, never below 0). They are measured like any monitor: `traces` go to
`scoring.metrics_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .scoring import NEVER, Trace
from .tasks import Task

Array = NDArray[np.float64]
Embed = Callable[[Sequence[str]], Array]


@dataclass
class TrainedMonitor:
    """``embed``: requests -> [requests, width], averaged over what is read; None is a bag of words, with ``pairs`` also
    which words occur together (a goal is reached by a combination, which no sum over words expresses). ``c``: inverse of
    the L2 penalty. ``label``: what a step is taught: "task", whether its task is harmful; or "goal", whether harm is done
    by then. Raises ValueError for unknown modes and when it is asked before `fit`."""

    mode: Literal["single", "cumulative", "windowed", "cusum", "final"] = "cumulative"
    window: int = 3
    start: int = 2
    embed: Embed | None = None
    pairs: bool = False
    c: float = 1.0
    label: Literal["task", "goal"] = "task"
    _head: Any = field(default=None, init=False, repr=False)
    _words: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("single", "cumulative", "windowed", "cusum", "final"):
            raise ValueError(f"mode is single, cumulative, windowed, cusum or final, got {self.mode}")
        if self.label not in ("task", "goal"):
            raise ValueError(f"label is task or goal, got {self.label}")
        if self.window < 1 or self.start < 1 or self.c <= 0:
            raise ValueError(f"window and start are at least 1 and c is positive, got {self.window}, {self.start}, {self.c}")

    def fit(self, tasks: Sequence[Task]) -> TrainedMonitor:
        """Learns from every step of every task: what is read at it, and its label."""
        from sklearn.linear_model import LogisticRegression

        shown = [view for task in tasks for view in self._views(task)]
        labels = [self._label(task, step) for task in tasks for step in range(1, len(task.subtasks) + 1)]
        if len(set(labels)) < 2:
            raise ValueError("training needs harmful and benign tasks")
        self._words = None if self.embed else self._bag().fit([_joined(view) for view in shown])
        self._head = LogisticRegression(C=self.c, max_iter=500).fit(self._features(shown), labels)
        return self

    def traces(self, tasks: Sequence[Task]) -> list[Trace]:
        """Every step's score, from what had been requested by then."""
        if self._head is None:
            raise ValueError("train the monitor with fit() first")
        views = [self._views(task) for task in tasks]
        flat = self._head.decision_function(self._features([view for some in views for view in some]))
        found, place = [], 0
        for task, some in zip(tasks, views, strict=True):
            odds = flat[place : place + len(some)]
            place += len(some)
            if self.mode == "cusum":
                odds = _page(odds)
            scores = [1 / (1 + math.exp(-max(min(value, 30), -30))) for value in odds]
            if self.mode == "final":
                scores = [NEVER] * (len(scores) - 1) + scores[-1:]
            scores = [score if step >= self.start else NEVER for step, score in enumerate(scores, 1)]
            found.append(Trace(task, tuple(scores)))
        return found

    def _label(self, task: Task, step: int) -> bool:
        return task.harmful and (self.label == "task" or step >= task.last_call)

    def _views(self, task: Task) -> list[tuple[str, ...]]:
        """What is read at every step."""
        size = {"single": 1, "cusum": 1, "windowed": self.window}.get(self.mode, len(task.subtasks))
        return [task.subtasks[max(0, end - size) : end] for end in range(1, len(task.subtasks) + 1)]

    def _bag(self) -> Any:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures

        parts = [PolynomialFeatures(2, interaction_only=True, include_bias=False)] if self.pairs else []
        return make_pipeline(CountVectorizer(binary=True), *parts)

    def _features(self, shown: Sequence[Sequence[str]]) -> Any:
        if self._words is not None:
            return self._words.transform([_joined(view) for view in shown])
        texts = sorted({text for view in shown for text in view})
        rows = dict(zip(texts, np.asarray(self.embed(texts)), strict=True))  # type: ignore[misc]
        return np.stack([np.mean([rows[text] for text in view], axis=0) for view in shown])


def _joined(view: Sequence[str]) -> str:
    return " \n ".join(view)


def _page(odds: Array) -> list[float]:
    total, found = 0.0, []
    for value in odds:
        total = max(0.0, total + float(value))
        found.append(total)
    return found


def hidden_states(model: Any, tokenizer: Any) -> Embed:
    """An ``embed`` from a local transformers model: the mean of the last layer's states over a request's tokens."""
    import torch

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Array:
        rows = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
            rows.append(model.base_model(ids, use_cache=False).last_hidden_state[0].mean(0).double().cpu().numpy())
        return np.stack(rows)

    return embed
