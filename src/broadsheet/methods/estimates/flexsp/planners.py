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

from broadsheet.core.perf.planning import makespan_bound, power_of_two_partitions

from .kernels import enumerate_partitions, fill, improve, pack, tighten
from .plans import Group, Plan, Problem

#: the groups of one micro-batch, or None where no plan was found, and what there is to tell of them
Found = tuple[tuple[Group, ...] | None, dict[str, Any]]
#: halvings of the distance between a limit that holds and the bound
_STEPS = 8


def in_chunks(
    problem: Problem, micro_batches: int | str, order: str, name: str, solve: Callable[[Sequence[int]], Found]
) -> Plan:
    """The best number of micro-batches for ``solve``, which plans one chunk of ids. Numbers whose bound is above what is
    found already are not tried."""
    begun = time.thread_time()
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
            return Plan(problem, best.micro_batches, name, time.thread_time() - begun, best.detail)
        if micro_batches != "auto" or counts[-1] == len(problem.lengths):
            raise ValueError(f"no plan in {counts[-1]} micro-batches fits the memory: allow more of them")
        counts = [counts[-1] + 1]


# --- ours ---


#: devices up to which every set of groups is tried
_ALL = 64


@cache
def partitions_of(devices: int, degrees: tuple[int, ...]) -> np.ndarray:
    """How many groups of each degree, for every way to use all devices: [partitions, degrees].

    Beyond 64 devices there are too many (692,004 for 256): those whose groups have at least devices/64, and the same with
    all of the smallest of these cut into halves, quarters and so on.
    """
    unit = max(degrees[0], devices // _ALL)
    rows = []
    for parts in power_of_two_partitions(devices, min(unit, degrees[-1])):
        if parts[0] > degrees[-1]:
            continue
        counts = [parts.count(degree) for degree in degrees]
        rows.append(counts)
        at = degrees.index(min(unit, degrees[-1]))
        for finer in range(at):
            if counts[at]:
                cut = list(counts)
                cut[at], cut[finer] = 0, counts[at] * degrees[at] // degrees[finer]
                rows.append(cut)
    return np.array(rows, np.int64)


class Greedy:
    """Tries every set of groups that uses all devices, sequences longest first, each where its group is done the soonest.

    ``search``: goes on from there. Against each set of groups, sequences are packed where they cost the least, within a
    limit that is lowered by bisection while some set holds it; sequences of the slowest group are moved and swapped. Never
    worse than without. ``alike``: only sets of groups of one degree: what balance alone gains.
    """

    def __init__(self, problem: Problem, search: bool = False, alike: bool = False):
        self.problem, self.search = problem, search
        self.partitions = partitions_of(problem.devices, problem.degrees)
        if alike:
            self.partitions = self.partitions[(self.partitions > 0).sum(1) == 1]
        self.degrees = np.array(problem.degrees, np.int64)
        self.rooms = self.degrees * problem.capacity

    def __call__(self, ids: Sequence[int]) -> Found:
        problem = self.problem
        order = sorted(ids, key=lambda i: -problem.lengths[i])
        times, lengths = problem.times[order], np.array([problem.lengths[i] for i in order], np.int64)
        most = int(self.partitions.sum(1).max())
        loads, used, chosen = np.empty(most), np.empty(most, np.int64), np.empty(len(order), np.int64)
        given = times, lengths, self.rooms, self.degrees, self.partitions, most
        place, span = enumerate_partitions(*given)
        if place >= 0:
            fill(times, lengths, self.rooms, self.partitions[place], np.inf, loads, used, chosen)
        if self.search:
            if place >= 0:
                span = improve(times, lengths, self.rooms, self._kinds(place), chosen, 10 * len(order))
            else:
                span = float(np.where(np.isfinite(times), times, 0).max(1).sum())  # no plan is as bad
            below = makespan_bound(times, problem.degrees, problem.devices)
            tighter, limit = tighten(*given, span, below, _STEPS)
            if tighter >= 0:
                place = tighter
                pack(times, lengths, self.rooms, self.partitions[place], limit, loads, used, chosen)
                improve(times, lengths, self.rooms, self._kinds(place), chosen, 10 * len(order))
        if place < 0:
            return None, {}
        groups = [
            Group(problem.degrees[kind], tuple(np.array(order)[chosen == group].tolist()))
            for group, kind in enumerate(self._kinds(place))
        ]
        return tuple(group for group in groups if group.sequences), {}

    def _kinds(self, place: int) -> np.ndarray:
        """Which degree each group of a partition has."""
        return np.repeat(np.arange(len(self.degrees)), self.partitions[place])


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
    begun = time.thread_time()
    degree = degree or problem.smallest_degree(max(problem.lengths))
    if degree not in problem.degrees:
        raise ValueError(f"groups are of {', '.join(map(str, problem.degrees))} devices, not {degree}")
    groups = best_fit(problem, degree)
    if groups is None:
        raise ValueError(f"groups of {degree} cannot hold the longest sequence, of {max(problem.lengths):,} tokens")
    return Plan(problem, groups, "static", time.thread_time() - begun, {"degree": degree})


def adaptive(problem: Problem) -> Plan:
    """The best single degree for this batch (FlexSP-BatchAda)."""
    begun = time.thread_time()
    plans = [static(problem, d) for d in problem.degrees if max(problem.lengths) <= problem.capacity * d]
    best = min(plans, key=lambda plan: plan.time)
    return Plan(problem, best.micro_batches, "adaptive", time.thread_time() - begun, best.detail)
