"""Gradient-boosted trees as arrays: trained by scikit-learn, kept in safetensors and read without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
#: of every tree; scikit-learn stops before
DEPTH = 6


@dataclass(frozen=True)
class Forest:
    """The trees of all targets, each a complete tree of `DEPTH`: node i has the children 2i + 1 and 2i + 2.

    ``feature`` and ``threshold`` [trees, 2^DEPTH - 1]: an input above the threshold goes right; ``leaf`` [trees,
    2^DEPTH]; ``first`` [targets]: where each target's trees start; ``base`` [targets]: what every prediction starts from.
    """

    feature: Array
    threshold: Array
    leaf: Array
    first: Array
    base: Array

    @classmethod
    def fit(cls, x: Array, y: Array, iterations: int, seed: int) -> Forest:
        """One boosted model a column of ``y``, on the rows where it is known."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        trees, first, base = list[tuple[Array, Array, Array]](), list[int](), list[float]()
        for column in y.T:
            known = ~np.isnan(column)
            model = HistGradientBoostingRegressor(
                max_iter=iterations, learning_rate=0.1, min_samples_leaf=10, max_depth=DEPTH, random_state=seed
            ).fit(x[known], column[known])
            first.append(len(trees))
            base.append(float(model._baseline_prediction.item()))
            trees += [_complete(predictor.nodes) for (predictor,) in model._predictors]
        feature, threshold, leaf = (np.stack(part) for part in zip(*trees, strict=True))
        return cls(feature, threshold, leaf, np.array(first, np.int64), np.array(base))

    def __call__(self, x: Array) -> Array:
        """[programs, features] -> [programs, targets]."""
        rows, trees = np.arange(len(x))[:, None], np.arange(len(self.leaf))[None]
        place = np.zeros((len(x), len(self.leaf)), np.int64)
        for _ in range(DEPTH):
            right = x[rows, self.feature[trees, place]] > self.threshold[trees, place]
            place = 2 * place + 1 + right
        values = self.leaf[trees, place - (2**DEPTH - 1)].astype(float)
        return np.add.reduceat(values, self.first, 1) + self.base

    def rescaled(self, slope: Array, shift: Array) -> Forest:
        """Predictions times ``slope`` plus ``shift``, each [targets]."""
        sizes = np.diff([*self.first, len(self.leaf)])
        leaf = (self.leaf * np.repeat(slope, sizes)[:, None]).astype(np.float32)
        return replace(self, leaf=leaf, base=self.base * slope + shift)


def _complete(nodes: Array) -> tuple[Array, Array, Array]:
    """A tree of scikit-learn as a complete one: below an early leaf everything has its value."""
    inner = 2**DEPTH - 1
    feature, threshold = np.zeros(inner, np.int16), np.zeros(inner, np.float64)
    leaf = np.zeros(2**DEPTH, np.float32)
    waiting = [(0, 0)]  # (place here, node there)
    while waiting:
        place, node = waiting.pop()
        one = nodes[node]
        if place >= inner:
            leaf[place - inner] = one["value"]
        elif one["is_leaf"]:
            waiting += [(2 * place + 1, node), (2 * place + 2, node)]
        else:
            feature[place], threshold[place] = one["feature_idx"], one["num_threshold"]
            waiting += [(2 * place + 1, one["left"]), (2 * place + 2, one["right"])]
    return feature, threshold, leaf
