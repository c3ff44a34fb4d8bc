"""Intervals and tests: paired bootstrap, exact McNemar with its odds ratio, Wilcoxon by group, Benjamini-Hochberg."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import beta, binomtest, wilcoxon


def bootstrap_ci(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values``.

    ``groups``: values of one group (the turns of one session) are drawn together, because they are not independent.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0:
        raise ValueError("no values to bootstrap")
    numbers: dict[Hashable, int] = {}  # in order of appearance: the same samples give the same interval
    labels = range(array.size) if groups is None else groups
    inverse = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
    count = inverse.max() + 1
    sums, sizes = np.bincount(inverse, array, count), np.bincount(inverse, minlength=count)
    picks = np.random.default_rng(seed).integers(0, count, (draws, count))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Mean of a - b over the same items, with its bootstrap interval."""
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in length: {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return float(difference.mean()), bootstrap_ci(difference.tolist(), groups, level, draws, seed)


def discordant(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int]:
    """On how many of the same items only ``a`` is right, and only ``b``."""
    if len(a) != len(b):
        raise ValueError(f"paired samples differ in length: {len(a)} and {len(b)}")
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    return int((first & ~second).sum()), int((second & ~first).sum())


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that two methods are right equally often on the same items.

    Items count as independent: of several samples of one task it makes too much, see `grouped_wilcoxon`.
    """
    only_a, only_b = discordant(a, b)
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_odds_ratio(a: Sequence[bool], b: Sequence[bool], level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Items on which only ``a`` is right to those on which only ``b`` is: McNemar's odds ratio, with its exact interval.

    The interval is Clopper and Pearson's of the share of discordant items, turned into odds. Infinite when there are none of
    the second kind, nan when there are none of either.
    """
    only_a, only_b = discordant(a, b)
    total, tail = only_a + only_b, (1 - level) / 2
    if total == 0:
        return float("nan"), (0.0, float("inf"))
    low = float(beta.ppf(tail, only_a, only_b + 1)) if only_a else 0.0
    high = float(beta.ppf(1 - tail, only_a + 1, only_b)) if only_b else 1.0
    return _odds(only_a / total), (_odds(low), _odds(high))


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else float("inf")


def grouped_wilcoxon(a: Sequence[float], b: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test on the groups' means of a - b (the samples of one task are a group).

    Groups without a difference are left out, as usual; 1 when none has one.
    """
    if not len(a) == len(b) == len(groups):
        raise ValueError(f"paired samples and their groups differ in length: {len(a)}, {len(b)} and {len(groups)}")
    sums: dict[Hashable, list[float]] = {}
    for x, y, group in zip(a, b, groups, strict=True):
        sums.setdefault(group, []).append(float(x) - float(y))
    means = np.array([np.mean(some) for some in sums.values()])
    means = np.round(means[np.abs(means) > 1e-12], 12)  # equal differences are ties, whatever their last bit
    return float(wilcoxon(means).pvalue) if means.size else 1.0


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that control the false discovery rate, in the order given."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    ranked = p[order] * p.size / np.arange(1, p.size + 1)
    adjusted = np.minimum.accumulate(ranked[::-1])[::-1].clip(max=1.0)
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result.tolist()
