"""Estimators of cost: networks on tokens, trees on counts, lines on FLOPs, all ``fit(programs, values)`` and
``predict(programs)`` with values [programs, targets] in their units.

A target is learnt as a standardised logarithm (of 1 + value; a share as it is); a missing label (NaN) has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from .features import Counts, Features, TotalScale, count, interface
from .forest import Forest
from .networks import Kind, Network, Training, fit_network, run_networks
from .stablehlo import Function
from .tokens import Scheme, Vocabulary, tokenise

Array = np.ndarray[Any, Any]
#: learnt as they are
_LINEAR = ("vector_util",)


@dataclass(frozen=True)
class Scale:
    """Targets to standardised numbers and back."""

    targets: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, targets: Sequence[str], values: Array) -> Scale:
        raw = cls(tuple(targets), (0.0,) * len(targets), (1.0,) * len(targets)).forward(values)
        std = np.nanstd(raw, 0)
        return cls(tuple(targets), tuple(np.nanmean(raw, 0).tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))

    def forward(self, values: Array) -> Array:
        columns = [
            values[:, place] if name in _LINEAR else np.log1p(values[:, place]) for place, name in enumerate(self.targets)
        ]
        return (np.stack(columns, 1) - self.mean) / self.std

    def backward(self, scaled: Array) -> Array:
        raw = scaled * self.std + self.mean
        columns = [
            np.clip(raw[:, place], 0, 1) if name in _LINEAR else np.expm1(np.clip(raw[:, place], 0, 50))
            for place, name in enumerate(self.targets)
        ]
        return np.stack(columns, 1)


@dataclass
class TokenModel:
    """A network on tokens (the paper's) with its vocabulary and scale."""

    targets: tuple[str, ...]
    kind: Kind = "conv"
    scheme: Scheme = "operands"
    training: Training = field(default_factory=Training)

    def fit(
        self, programs: Sequence[Function], values: Array, validation: Sequence[int],
        tick: Callable[[int, float], None] | None = None,
    ) -> TokenModel:  # fmt: skip
        """``validation``: places of the rows that say when to stop. Vocabulary and scale are of the others."""
        rest = np.setdiff1d(np.arange(len(programs)), validation)
        split = [tokenise(program, self.scheme) for program in programs]
        self.vocabulary = Vocabulary.build([split[place] for place in rest])
        self.scale = Scale.fit(self.targets, values[rest])
        torch.manual_seed(self.training.seed)
        self.network = Network(self.kind, len(self.vocabulary), len(self.targets))
        codes = [self.vocabulary.encode(tokens) for tokens in split]
        fit_network(self.network, codes, self.scale.forward(values), validation, self.training, tick)
        return self

    def predict(self, programs: Sequence[Function]) -> Array:
        codes = [self.vocabulary.encode(tokenise(program, self.scheme)) for program in programs]
        return self.scale.backward(run_networks([self.network], codes)[0])


@dataclass
class Trees:
    """Gradient-boosted trees on counts and sizes (scikit-learn's histogram trees), one model a target."""

    targets: tuple[str, ...]
    sized: bool = True
    iterations: int = 150
    seed: int = 0

    def fit(self, programs: Sequence[Function], values: Array, validation: Sequence[int] = ()) -> Trees:
        """On all rows: trees need nobody to say when to stop."""
        counts = [count(program) for program in programs]
        self.features, self.scale = Features.build(counts, self.sized), Scale.fit(self.targets, values)
        self.forest = Forest.fit(self.features(counts), self.scale.forward(values), self.iterations, self.seed)
        return self

    def predict(self, programs: Sequence[Function]) -> Array:
        return self.scale.backward(self.forest(self.features([count(program) for program in programs])))


@dataclass
class Line:
    """Least squares in the scaled target on one number of the program: log2 of its FLOPs ("flops"), of a roofline's time
    ("roofline"), of a weighted sum of its totals ("additive", `TotalScale`), or nothing ("mean").

    The roofline is max(FLOPs / peak, bytes of the interface / bandwidth); only the ratio of the two matters to a line in
    its logarithm, and that is chosen among powers of two by the fit.
    """

    targets: tuple[str, ...]
    kind: Literal["mean", "flops", "roofline", "additive"] = "flops"

    def fit(self, programs: Sequence[Function], values: Array, validation: Sequence[int] = ()) -> Line:
        counts = [count(program) for program in programs]
        self.scale = Scale.fit(self.targets, values)
        self.sums = TotalScale.fit(np.array([one.totals for one in counts]), values)
        y = self.scale.forward(values)
        self.lines = list[tuple[float, Array]]()  # (ratio of the roofline, slope and intercept)
        for place in range(len(self.targets)):
            known = ~np.isnan(y[:, place])
            tried = []
            for ratio in (2.0 ** np.arange(-2, 9)).tolist() if self.kind == "roofline" else (1.0,):
                x = np.stack([self._input(counts, place, ratio)[known], np.ones(known.sum())], 1)
                line = np.linalg.lstsq(x, y[known, place], rcond=None)[0]
                tried.append((float(((x @ line - y[known, place]) ** 2).sum()), ratio, line))
            self.lines.append(min(tried, key=lambda one: one[0])[1:])
        return self

    def _input(self, counts: Sequence[Counts], target: int, ratio: float) -> Array:
        """[programs]."""
        if self.kind == "mean":
            return np.zeros(len(counts))
        if self.kind == "additive":
            return self.sums.sums(np.array([one.totals for one in counts]))[:, target]
        work = np.array([float(sum(one.flops)) for one in counts])
        if self.kind == "roofline":
            work = np.maximum(work, ratio * np.array([interface(one.function) for one in counts]))
        return np.log2(1 + work)

    def predict(self, programs: Sequence[Function]) -> Array:
        counts = [count(program) for program in programs]
        columns = [self._input(counts, target, ratio) * line[0] + line[1] for target, (ratio, line) in enumerate(self.lines)]
        return self.scale.backward(np.stack(columns, 1))
