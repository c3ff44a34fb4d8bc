"""Planning of work on devices: general parts that know nothing of models.

A *program* is a mixed-integer linear program, solved by HiGHS (through scipy) under a time limit; what comes back says how
good it is (bound, gap) and what it took. The exact checker by enumeration, the greedy rule and the bounds are what a planner
is held against. Times are in any one unit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


# --- mixed-integer programs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """``status``: "optimal", "feasible" (stopped by the time limit), "infeasible" or "none" (stopped with nothing found).

    ``bound``: no solution is better than this. ``values`` is empty where nothing was found.
    """

    status: str
    values: Floats
    objective: float
    bound: float
    seconds: float

    @property
    def found(self) -> bool:
        return self.values.size > 0

    @property
    def gap(self) -> float:
        """How far below the objective the bound is, as a share of the objective; 0 when optimal."""
        if not self.found:
            return float("inf")
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective else 0.0


@dataclass
class Program:
    """A linear program that grows by variables and rows, all minimised under ``cost``."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    rows: list[tuple[Mapping[int, float], float, float]] = field(default_factory=list)

    def variable(self, lower: float = 0.0, upper: float = np.inf, whole: bool = False, cost: float = 0.0) -> int:
        """Its number. ``whole``: integer."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(whole)
        self.cost.append(cost)
        return len(self.cost) - 1

    def row(self, weights: Mapping[int, float], lower: float = -np.inf, upper: float = np.inf) -> None:
        """lower <= sum of weight x variable <= upper."""
        self.rows.append((weights, lower, upper))

    def solve(self, time_limit: float | None = None, gap: float = 0.0) -> Solution:
        """HiGHS' answer; stops at ``time_limit`` seconds or when the gap is at most ``gap``."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        begun = time.perf_counter()
        data = [weight for weights, _, _ in self.rows for weight in weights.values()]
        columns = [variable for weights, _, _ in self.rows for variable in weights]
        starts = np.cumsum([0, *(len(weights) for weights, _, _ in self.rows)])
        matrix = csr_array((data, columns, starts), shape=(len(self.rows), len(self.cost)))
        limits = LinearConstraint(matrix, [low for _, low, _ in self.rows], [high for _, _, high in self.rows])
        options: dict[str, float] = {"mip_rel_gap": gap} | ({} if time_limit is None else {"time_limit": time_limit})
        found = milp(
            np.array(self.cost), integrality=np.array(self.whole, int), bounds=Bounds(self.lower, self.upper),
            constraints=limits, options=options,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        bound = -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
        if found.x is None:
            return Solution("infeasible" if found.status == 2 else "none", np.zeros(0), np.inf, bound, seconds)
        return Solution("optimal" if found.status == 0 else "feasible", found.x, float(found.fun), bound, seconds)


# --- jobs on machines ---------------------------------------------------------------------------------------------------


def longest_first(times: Sequence[float], machines: int) -> list[int]:
    """Graham's rule: the longest job first, each to the machine that is free the soonest. The machine of every job.

    At most 4/3 - 1/(3 machines) of the best makespan on identical machines.
    """
    loads, chosen = [0.0] * machines, [0] * len(times)
    for job in sorted(range(len(times)), key=lambda j: -times[j]):
        machine = min(range(machines), key=loads.__getitem__)
        chosen[job] = machine
        loads[machine] += times[job]
    return chosen


def exhaustive_makespan(times: Floats, sizes: Sequence[float], rooms: Sequence[float]) -> tuple[float, list[int]]:
    """The best assignment of jobs to unrelated machines, by enumeration with pruning: for a dozen jobs at most.

    ``times`` [jobs, machines]; a job takes ``sizes[job]`` of ``rooms[machine]``. Machines with equal columns and rooms
    are interchangeable, so of those that are still empty only the first is tried. Returns (makespan, machine of every job);
    (inf, []) when nothing fits.
    """
    jobs, machines = times.shape
    order = sorted(range(jobs), key=lambda j: -times[j].min())
    kinds = [(*times[:, m], rooms[m]) for m in range(machines)]
    loads, used, taken = [0.0] * machines, [0.0] * machines, [-1] * jobs
    best: tuple[float, list[int]] = (float("inf"), [])

    def place(depth: int, makespan: float) -> None:
        nonlocal best
        if makespan >= best[0]:
            return
        if depth == jobs:
            best = (makespan, list(taken))
            return
        job, tried = order[depth], set()
        for machine in range(machines):
            if used[machine] + sizes[job] > rooms[machine] * (1 + 1e-12) or not np.isfinite(times[job, machine]):
                continue
            state = (kinds[machine], loads[machine], used[machine])
            if state in tried:
                continue
            tried.add(state)
            before = loads[machine], used[machine]
            loads[machine] += float(times[job, machine])
            used[machine] += sizes[job]
            taken[job] = machine
            place(depth + 1, max(makespan, loads[machine]))
            loads[machine], used[machine] = before

    place(0, 0.0)
    return best


def makespan_bound(times: Floats, widths: Sequence[int], devices: int) -> float:
    """No plan is shorter: jobs run on groups of devices, ``times`` [jobs, widths] is what a job takes on a group of so many
    devices (inf where it must not), and the groups of one plan have ``devices`` together.

    Within time T a job can only use widths on which it takes at most T, and the work (devices x time) of all jobs is at most
    ``devices`` x T: the smallest T for which both can be.
    """
    work = times * np.asarray(widths, float)
    # The least work of each job under T changes only where T passes one of its times: search over those, then take the
    # larger of that point and the work it asks for.
    points = np.unique(times[np.isfinite(times)])
    low, high = 0, len(points) - 1
    smallest = float(times.min(1).max())
    if not np.isfinite(smallest):
        raise ValueError("a job runs on no group: make more devices or more memory available")

    def needed(limit: float) -> float:
        return float(np.where(times <= limit, work, np.inf).min(1).sum()) / devices

    while low < high:  # the first point that leaves room for its own work
        middle = (low + high) // 2
        if needed(points[middle]) <= points[middle]:
            high = middle
        else:
            low = middle + 1
    at = float(points[low])
    if needed(at) > at:  # work alone decides, every width is open
        return max(smallest, needed(at))
    # Between the point before and this one the open widths are those of the point before.
    before = needed(float(points[low - 1])) if low else np.inf
    return max(smallest, min(at, before))


def power_of_two_partitions(total: int, smallest: int = 1) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as a sum of powers of two not below ``smallest``, parts in descending order."""
    if total < 1 or total % smallest:
        return

    @cache
    def parts(rest: int, largest: int) -> tuple[tuple[int, ...], ...]:
        if rest == 0:
            return ((),)
        if largest < smallest:
            return ()
        with_it = tuple((largest, *others) for others in parts(rest - largest, largest)) if largest <= rest else ()
        return with_it + parts(rest, largest // 2)

    yield from parts(total, 1 << (total.bit_length() - 1))


# --- runs of a sequence -------------------------------------------------------------------------------------------------


def contiguous_partition(weights: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """``weights`` in order, cut into ``parts`` runs whose largest sum is the smallest possible: [start, end) of each.

    By bisection over that sum. Every run has at least one weight.
    """
    if not 1 <= parts <= len(weights):
        raise ValueError(f"{len(weights)} weights cannot be cut into {parts} runs: ask for 1 to {len(weights)}")

    def cuts(limit: int) -> list[int]:
        ends, load = [], 0
        for place, weight in enumerate(weights):
            if load + weight > limit and load:
                ends.append(place)
                load = 0
            load += weight
        return [*ends, len(weights)]

    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if len(cuts(middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    ends = cuts(low)
    runs = list(zip([0, *ends[:-1]], ends, strict=True))
    while len(runs) < parts:  # fewer suffice: cut the heaviest that can be cut, which raises no sum
        heavy = max((run for run in runs if run[1] - run[0] > 1), key=lambda run: sum(weights[run[0] : run[1]]))
        at = runs.index(heavy)
        half = _balanced_cut(weights[heavy[0] : heavy[1]]) + heavy[0]
        runs[at : at + 1] = [(heavy[0], half), (half, heavy[1])]
    return runs


def _balanced_cut(weights: Sequence[int]) -> int:
    sums = np.cumsum(weights)
    return int(np.argmin(np.maximum(sums[:-1], sums[-1] - sums[:-1]))) + 1


def bucket_bounds(values: Sequence[int], buckets: int) -> list[int]:
    """At most ``buckets`` upper bounds, ascending, so that the values rounded up to theirs grow by the least in sum.

    Dynamic program over sorted distinct values: cost(j, i) = v_i (n_i - n_j) - (S_i - S_j). Exact.
    """
    if not len(values) or buckets < 1:
        raise ValueError("bucketing takes at least one value and one bucket")
    distinct, counts = np.unique(np.asarray(values, np.int64), return_counts=True)
    n = len(distinct)
    if buckets >= n:
        return [int(value) for value in distinct]
    many, sums = np.concatenate([[0], np.cumsum(counts)]), np.concatenate([[0], np.cumsum(counts * distinct)])
    # cost[j, i]: the values j..i-1 (0-based, i excluded) all rounded up to the last of them
    tops = np.concatenate([[0], distinct])
    cost = tops[None, :] * (many[None, :] - many[:, None]) - (sums[None, :] - sums[:, None])
    cost = np.where(np.arange(n + 1)[:, None] < np.arange(n + 1)[None, :], cost, np.iinfo(np.int64).max // 4)
    best, choice = cost[0].copy(), [np.zeros(n + 1, int)]
    for _ in range(buckets - 1):
        total = best[:, None] + cost
        picked = total[1:].argmin(0) + 1  # at least one value in what came before
        choice.append(picked)
        best = total[picked, np.arange(n + 1)]
    bounds, end = [], n
    for picked in reversed(choice):
        bounds.append(int(distinct[end - 1]))
        end = int(picked[end])
    return bounds[::-1]
