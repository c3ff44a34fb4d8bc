"""Who plans: the authors' mixed-integer program, their two baselines, and ours, which tries every set of groups.

A planner takes a `Problem` and returns a `Plan`. All but the baselines cut the batch into micro-batches first
(`Problem.chunks`), plan each, and keep the number of micro-batches with the smallest total.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from broadsheet.core.perf.planning import power_of_two_partitions

from .kernels import enumerate_partitions, fill, improve
from .plans import Group, Plan, Problem

#: the groups of one micro-batch, or None where no plan was found, and what there is to tell of them
Found = tuple[tuple[Group, ...] | None, dict[str, Any]]
#: the best makespans whose groups are searched from
_STARTS = 4


def in_chunks(
    problem: Problem, micro_batches: int | str, order: str, name: str, solve: Callable[[Sequence[int]], Found]
) -> Plan:
    """The best number of micro-batches for ``solve``, which plans one chunk of ids. Numbers whose bound is above what is
    found already are not tried."""
    begun = time.perf_counter()
    counts, best = problem.counts(micro_batches, order), None
    while True:
        for count in counts:
            if best is not None and best.time <= problem.bound_of(count):
                break  # more of them only add their beta1
            found = [solve(chunk) for chunk in problem.chunks(count, order)]
            groups = tuple(groups for groups, _ in found if groups is not None)
            if len(groups) < len(found):
                continue
            told: dict[str, Any] = {}
            for _, detail in found:
                for key, value in detail.items():
                    told.setdefault(key, []).append(value)
            plan = Plan(problem, groups, name, detail=told)
            if best is None or plan.time < best.time:
                best = plan
        if best is not None:
            return Plan(problem, best.micro_batches, name, time.perf_counter() - begun, best.detail)
        if micro_batches != "auto" or counts[-1] == len(problem.lengths):
            raise ValueError(f"no plan in {counts[-1]} micro-batches fits the memory: allow more of them")
        counts = [counts[-1] + 1]


# --- ours ---


@cache
def _partitions(devices: int, degrees: tuple[int, ...]) -> np.ndarray:
    """How many groups of each degree, for every way to use all devices: [partitions, degrees]."""
    rows = [
        [parts.count(degree) for degree in degrees]
        for parts in power_of_two_partitions(devices, degrees[0])
        if parts[0] <= degrees[-1]
    ]
    return np.array(rows, np.int64)


class Greedy:
    """Tries every set of groups that uses all devices, sequences longest first, each where its group is done the soonest.

    ``search``: then moves and swaps sequences out of the slowest group, from the best few sets; never worse than without.
    ``alike``: only sets of groups of one degree (what balance alone gains, without groups of different degrees).
    """

    def __init__(self, problem: Problem, search: bool = False, alike: bool = False):
        self.problem, self.search = problem, search
        self.partitions = _partitions(problem.devices, problem.degrees)
        if alike:
            self.partitions = self.partitions[(self.partitions > 0).sum(1) == 1]
        self.degrees = np.array(problem.degrees, np.int64)
        self.rooms = self.degrees * problem.capacity
        # What fills up the soonest first: its makespan cuts the others short.
        self.hint = 0

    def __call__(self, ids: Sequence[int]) -> Found:
        problem = self.problem
        order = sorted(ids, key=lambda i: -problem.lengths[i])
        times, lengths = problem.times[order], np.array([problem.lengths[i] for i in order], np.int64)
        turns = np.r_[self.hint, : self.hint, self.hint + 1 : len(self.partitions)]
        most = int(self.partitions.sum(1).max())
        slack = 1.02 if self.search else 1.0
        spans = enumerate_partitions(times, lengths, self.rooms, self.degrees, self.partitions[turns], most, slack)
        places = np.argsort(spans, kind="stable")[: _STARTS if self.search else 1]
        if not np.isfinite(spans[places[0]]):
            return None, {}
        self.hint = int(turns[places[0]])
        best: tuple[float, np.ndarray, np.ndarray] | None = None
        for place in places[np.isfinite(spans[places])]:
            counts = self.partitions[turns[place]]
            kinds, chosen = np.repeat(np.arange(len(counts)), counts), np.empty(len(order), np.int64)
            loads, used = np.empty(most), np.empty(most, np.int64)
            span = fill(times, lengths, self.rooms, counts, np.inf, loads, used, chosen)
            if self.search:
                span = improve(times, lengths, self.rooms, kinds, chosen, 10 * len(order))
            if best is None or span < best[0]:
                best = float(span), kinds, chosen
        assert best is not None
        _, kinds, chosen = best
        groups = [Group(problem.degrees[kind], tuple(np.array(order)[chosen == g].tolist())) for g, kind in enumerate(kinds)]
        return tuple(group for group in groups if group.sequences), {}


# --- the authors' baselines ---


def best_fit(problem: Problem, degree: int) -> tuple[tuple[Group, ...], ...] | None:
    """The authors' plan with groups of one degree: None where a group cannot hold the longest sequence.

    Sequences, longest first, go into the fullest group with room, at 0.9 of the memory (or the longest sequence); groups in
    the order in which they were opened make micro-batches. The groups that the last micro-batch lacks take a sequence each
    from the last groups that have two. From 16 devices a group, the last micro-batch's sequences are then moved from groups
    above its mean into those below, where there were groups to fill.
    """
    lengths, per = problem.lengths, problem.devices // degree
    longest = max(lengths)
    if longest > problem.capacity * degree:
        return None
    room = max(0.9 * problem.capacity * degree, longest)
    bins: list[list[int]] = []
    free: list[float] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        open_ones = [b for b in range(len(bins)) if free[b] >= lengths[i]]
        if open_ones:
            b = min(open_ones, key=free.__getitem__)
        else:
            b = len(bins)
            bins.append([])
            free.append(room)
        bins[b].append(i)
        free[b] -= lengths[i]
    empty = -len(bins) % per
    for _ in range(empty):
        donor = next((b for b in reversed(bins) if len(b) > 1), None)
        bins.append([donor.pop(donor.index(min(donor)))] if donor else [])  # the one that came first in the batch
    if degree >= 16 and empty:
        _even_out(bins[-per:], lengths, room)
    rows = [bins[a : a + per] for a in range(0, len(bins), per)]
    return tuple(tuple(Group(degree, tuple(b)) for b in row if b) for row in rows)


def _even_out(bins: list[list[int]], lengths: Sequence[int], room: float) -> None:
    """Tokens nearer their mean, in place: later groups below it take from earlier ones above it, in the batch's order."""
    tokens = [sum(lengths[i] for i in b) for b in bins]
    mean = sum(tokens) // len(bins)
    for to in range(1, len(bins)):
        if tokens[to] > mean:
            continue
        for source in range(to):
            for i in sorted(bins[source]):
                if tokens[to] >= mean or tokens[source] <= mean or len(bins[source]) < 2:
                    break
                if tokens[to] + lengths[i] <= room:
                    bins[source].remove(i)
                    bins[to].append(i)
                    tokens[source] -= lengths[i]
                    tokens[to] += lengths[i]


def static(problem: Problem, degree: int | None = None) -> Plan:
    """One degree for the whole run: by default the smallest that holds the longest sequence of this batch."""
    begun = time.perf_counter()
    degree = degree or problem.smallest_degree(max(problem.lengths))
    if degree not in problem.degrees:
        raise ValueError(f"groups are of {', '.join(map(str, problem.degrees))} devices, not {degree}")
    groups = best_fit(problem, degree)
    if groups is None:
        raise ValueError(f"groups of {degree} cannot hold the longest sequence, of {max(problem.lengths):,} tokens")
    return Plan(problem, groups, "static", time.perf_counter() - begun, {"degree": degree})


def adaptive(problem: Problem) -> Plan:
    """The best single degree for this batch (FlexSP-BatchAda)."""
    begun = time.perf_counter()
    plans = [static(problem, d) for d in problem.degrees if max(problem.lengths) <= problem.capacity * d]
    best = min(plans, key=lambda plan: plan.time)
    return Plan(problem, best.micro_batches, "adaptive", time.perf_counter() - begun, best.detail)
