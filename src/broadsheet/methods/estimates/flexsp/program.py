"""The authors' planner, a mixed-integer program for each micro-batch (section 4.3), and enumeration for small ones.

Lengths are rounded up to the bounds of buckets, so that sequences of one bucket are alike; A[k, p] of bucket k go to
candidate group p, which is used (m[p]) or not, and the longest group's time M is minimised.

Deviations, each of which helps the program: equal groups are ordered (by use, then by load), which their symmetry needs for
any bound; devices may idle (the authors' must not: with few sequences nothing is feasible); M starts at `makespan_bound`;
only those candidates are left out that cannot exist (theirs counts the longest sequences as if no two could share a group).
HiGHS takes no first solution through scipy. The authors give theirs the plans with groups of one degree; here the best of
those is taken where the program found nothing better.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from broadsheet.core.perf.planning import Program, bucket_bounds, exhaustive_makespan, makespan_bound

from .planners import Found, Greedy, partitions_of
from .plans import Group, Problem


def buckets_of(problem: Problem, ids: Sequence[int], first: int = 16) -> list[tuple[int, list[int]]]:
    """Bounds and ids of the buckets: ``first`` of them, and more until rounding adds at most half of the room that is left.

    The authors' even-spaced alternative loses the longest sequence (its test is a strict one); it is not offered.
    """
    lengths = [problem.lengths[i] for i in ids]
    most = (sum(lengths) + problem.room) / 2
    for count in range(min(first, len(lengths)), len(lengths) + 1):
        bounds = bucket_bounds(lengths, count)
        places = np.searchsorted(bounds, lengths)
        if sum(bounds[place] for place in places) <= most or len(bounds) < count:
            break
    return [(bound, [i for i, at in zip(ids, places, strict=True) if at == k]) for k, bound in enumerate(bounds)]


def candidates(problem: Problem, ids: Sequence[int]) -> list[int]:
    """The degrees of all groups that a plan could have, ascending.

    What needs the largest degree takes that many devices, or as many as hold all of it, from groups that are smaller.
    """
    needs = {i: problem.smallest_degree(problem.lengths[i]) for i in ids}
    widest = max(needs.values())
    tokens = sum(problem.lengths[i] for i in ids if needs[i] == widest)
    left = problem.devices - max(widest, -(-tokens // problem.capacity))
    return [d for d in problem.degrees for _ in range((problem.devices if d >= widest else max(left, 0)) // d)]


class Milp:
    """Plans one chunk by mixed-integer program. ``buckets`` 0: none, every length for itself (exact, for small chunks)."""

    def __init__(self, problem: Problem, time_limit: float | None = 5.0, buckets: int = 16, seed: int = 0):
        self.problem, self.time_limit, self.buckets = problem, time_limit, buckets
        self.random = random.Random(seed)
        self.fallback = Greedy(problem, alike=True)

    def __call__(self, ids: Sequence[int]) -> Found:
        problem, cost = self.problem, self.problem.cost
        buckets = buckets_of(problem, ids, self.buckets or len(ids))
        sizes = [bound for bound, _ in buckets]
        options = candidates(problem, ids)
        times = cost.times(sizes, problem.degrees)
        times = np.where(np.array(sizes)[:, None] <= problem.capacity * np.array(problem.degrees), times, np.inf)
        program = Program()
        below = makespan_bound(np.repeat(times, [len(m) for _, m in buckets], 0), problem.degrees, problem.devices)
        longest = program.variable(lower=below + cost.beta1, cost=1.0)
        used = [program.variable(upper=1, whole=True) for _ in options]
        many = [[program.variable(upper=len(members), whole=True) for _ in options] for _, members in buckets]
        for row, (_, members) in zip(many, buckets, strict=True):
            program.row(dict.fromkeys(row, 1.0), len(members), len(members))
        program.row({m: float(d) for m, d in zip(used, options, strict=True)}, upper=problem.devices)
        for p, degree in enumerate(options):
            column = [row[p] for row in many]
            spent = times[:, problem.degrees.index(degree)]
            for variable, ms in zip(column, spent, strict=True):
                if not np.isfinite(ms):
                    program.upper[variable] = 0.0
            load = {v: float(ms) for v, ms in zip(column, spent, strict=True) if np.isfinite(ms)}
            program.row({**load, longest: -1.0}, upper=-cost.beta1)
            program.row(
                dict(zip(column, map(float, sizes), strict=True)) | {used[p]: -1.0 * problem.capacity * degree}, upper=0
            )
            program.row(dict.fromkeys(column, 1.0) | {used[p]: -1.0}, lower=0)
            if p and options[p - 1] == degree:
                program.row({used[p - 1]: 1.0, used[p]: -1.0}, lower=0)
                before = {row[p - 1]: load[row[p]] for row in many if row[p] in load}
                program.row({**before, **{v: -ms for v, ms in load.items()}}, lower=0)
        found = program.solve(self.time_limit)
        return self._read(ids, buckets, options, many, found)

    def _read(self, ids: Sequence[int], buckets: Any, options: list[int], many: list[list[int]], found: Any) -> Found:
        """Real sequences for what the program counted, the better of that and one degree for all."""
        detail = {"status": found.status, "program_gap": found.gap, "program_seconds": found.seconds}
        plain, _ = self.fallback(ids)
        groups: list[list[int]] = [[] for _ in options]
        if found.found:
            for row, (_, members) in zip(many, buckets, strict=True):
                left = self.random.sample(members, len(members))
                for p, variable in enumerate(row):
                    for _ in range(round(found.values[variable])):
                        groups[p].append(left.pop())
        ours = tuple(Group(d, tuple(members)) for d, members in zip(options, groups, strict=True) if members)
        if not ours or (plain and self._time(plain) < self._time(ours)):
            return plain, {**detail, "from": "one degree"}
        return ours, {**detail, "from": "program"}

    def _time(self, groups: Sequence[Group]) -> float:
        cost, lengths = self.problem.cost, self.problem.lengths
        return max(cost.group_time([lengths[i] for i in g.sequences], g.degree) for g in groups)


class Exhaustive:
    """Plans one chunk of at most 12 sequences by trying everything."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __call__(self, ids: Sequence[int]) -> Found:
        problem = self.problem
        if len(ids) > 12:
            raise ValueError(f"everything can be tried for 12 sequences in a micro-batch, not for {len(ids)}")
        sizes = [problem.lengths[i] for i in ids]
        best: tuple[float, list[int], list[int]] = (np.inf, [], [])
        for counts in partitions_of(problem.devices, problem.degrees):
            kinds = np.repeat(np.arange(len(counts)), counts)
            rooms = [problem.capacity * problem.degrees[kind] for kind in kinds]
            span, chosen = exhaustive_makespan(problem.times[np.array(ids)][:, kinds], sizes, rooms)
            if span < best[0]:
                best = span, [problem.degrees[kind] for kind in kinds], chosen
        if not best[2]:
            return None, {}
        groups = [
            Group(degree, tuple(i for i, at in zip(ids, best[2], strict=True) if at == g))
            for g, degree in enumerate(best[1])
        ]
        return tuple(group for group in groups if group.sequences), {}
