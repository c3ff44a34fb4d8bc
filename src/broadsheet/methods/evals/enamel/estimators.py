"""eff@k, pass@k, the Hodges-Lehmann time, and what given times are worth; after the paper's Sections 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from statistics import median


def eff_at_k(scores: Sequence[float], k: int) -> float:
    """Unbiased estimate of the expected best of ``k`` samples, from the efficiency scores of n >= k samples.

    The mean of the maximum over all subsets of size k, by order statistics: sum over r of C(r-1, k-1) / C(n, k) e_(r), the
    weights computed downwards from k/n (Algorithm 1), which does not overflow. For scores of 0 and 1 it is pass@k.
    Raises ValueError for k outside 1..n and for scores that are missing: a missing sample is not a zero.
    """
    _check_k(len(scores), k)
    if not all(isinstance(score, int | float) and math.isfinite(score) for score in scores):
        raise ValueError("a score is missing or not a number; leave the problem out or measure the sample again")
    ordered, weight, total = sorted(scores), k / len(scores), 0.0
    for rank in range(len(scores), k - 1, -1):
        total += weight * ordered[rank - 1]
        if rank > 1:
            weight *= 1 - (k - 1) / (rank - 1)
    return total


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples passes, when ``c`` of ``n`` did."""
    _check_k(n, k)
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} samples cannot have passed")
    missed = 1.0
    for i in range(n - c + 1, n + 1):
        missed *= max(0.0, 1 - k / i)
    return 1 - missed if n - c >= k else 1.0


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"the best of k={k} needs at least so many samples of every problem, there are {n}")


def hodges_lehmann(times: Sequence[float]) -> float:
    """The median over pairs i <= j of (t_i + t_j) / 2: as precise as the mean, and deaf to the one run that was disturbed.

    Raises ValueError for no times and for negative or missing ones.
    """
    if not times or not all(math.isfinite(time) and time >= 0 for time in times):
        raise ValueError("run times are numbers of at least 0; measure again")
    return median((a + b) / 2 for a, b in combinations_with_replacement(times, 2))


def level_scores(
    levels: Sequence[float | None], reference: Sequence[float], hardness: Sequence[float], alpha: float = 2.0
) -> list[float]:
    """f_l = max(0, T - t_l) / (T - t*_l), T = alpha max t*_l over the levels that count; 0 where it did not finish.

    ``levels``: the sample's longest time at each level, None from the level on that it did not finish. ``reference``: the
    reference's. A sample that is faster than the reference scores more than 1.
    """
    counted = [time for time, weight in zip(reference, hardness, strict=True) if weight]
    if not counted or min(counted) < 0 or alpha <= 1:
        raise ValueError("there must be a level that counts, with times of at least 0, and alpha must be above 1")
    limit = alpha * max(counted)
    if limit <= 0:
        raise ValueError("the reference is faster than the clock's resolution: take larger inputs or another clock")
    return [
        0.0 if time is None or not weight else max(0.0, limit - time) / (limit - best)
        for time, best, weight in zip(levels, reference, hardness, strict=True)
    ]


def sample_score(levels: Sequence[float], hardness: Sequence[float]) -> float:
    """The mean of a sample's level scores, weighted by hardness."""
    return sum(f * h for f, h in zip(levels, hardness, strict=True)) / sum(hardness)
