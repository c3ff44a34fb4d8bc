"""Compiled loops of the planners: sequences, longest first, into groups; and the search from there.

A *partition* is how many groups of each degree there are. All arrays: ``times`` [sequences, degrees] in ms (inf where memory
forbids it) and ``lengths`` [sequences], both longest first; ``rooms`` [degrees] tokens that a group holds.
"""

from __future__ import annotations

import numpy as np

from broadsheet.core.numerics.jit import compiled


def _fill(times, lengths, rooms, counts, limit, loads, used, kinds, chosen):
    """Each sequence to the group whose time is the smallest with it in. Returns the longest group's time, or inf as soon as
    that passes ``limit`` or a sequence fits nowhere."""
    groups = 0
    for kind in range(counts.size):
        for _ in range(counts[kind]):
            kinds[groups] = kind
            loads[groups] = 0.0
            used[groups] = 0
            groups += 1
    makespan = 0.0
    for i in range(lengths.size):
        best, where = np.inf, -1
        last = -1
        for group in range(groups):
            kind = kinds[group]
            if used[group] == 0:  # empty groups of one degree are alike
                if last == kind:
                    continue
                last = kind
            then = loads[group] + times[i, kind]
            if then < best and used[group] + lengths[i] <= rooms[kind]:
                best, where = then, group
        if where < 0 or best > limit:
            return np.inf
        loads[where] = best
        used[where] += lengths[i]
        chosen[i] = where
        makespan = max(makespan, best)
    return makespan


def _enumerate(times, lengths, rooms, partitions, most, slack):
    """The makespan of every partition, inf for those that are not within ``slack`` of the best so far."""
    loads, used, kinds = np.empty(most), np.empty(most, np.int64), np.empty(most, np.int64)
    chosen, found = np.empty(lengths.size, np.int64), np.empty(partitions.shape[0])
    best = np.inf
    for p in range(partitions.shape[0]):
        found[p] = fill(times, lengths, rooms, partitions[p], best * slack, loads, used, kinds, chosen)
        best = min(best, found[p])
    return found


def _improve(times, lengths, rooms, kinds, chosen, rounds):
    """Moves and swaps out of the longest group, the best first, until none makes the pair of groups shorter.

    ``kinds`` [groups]; ``chosen`` [sequences] is changed in place. Returns the makespan; it never grows.
    """
    groups, n = kinds.size, lengths.size
    loads, used = np.zeros(groups), np.zeros(groups, np.int64)
    for i in range(n):
        loads[chosen[i]] += times[i, kinds[chosen[i]]]
        used[chosen[i]] += lengths[i]
    for _ in range(rounds):
        top = 0
        for group in range(groups):
            if loads[group] > loads[top]:
                top = group
        best, first, second, to = loads[top] * (1 - 1e-9), -1, -1, -1
        for i in range(n):
            if chosen[i] != top:
                continue
            without = loads[top] - times[i, kinds[top]]
            for group in range(groups):
                then = max(without, loads[group] + times[i, kinds[group]])
                if group != top and then < best and used[group] + lengths[i] <= rooms[kinds[group]]:
                    best, first, second, to = then, i, -1, group
            for j in range(n):
                other = chosen[j]
                if other == top:
                    continue
                after = without + times[j, kinds[top]]
                if after >= best:
                    continue
                then = max(after, loads[other] - times[j, kinds[other]] + times[i, kinds[other]])
                if (
                    then < best
                    and used[top] - lengths[i] + lengths[j] <= rooms[kinds[top]]
                    and used[other] - lengths[j] + lengths[i] <= rooms[kinds[other]]
                ):
                    best, first, second, to = then, i, j, other
        if first < 0:
            break
        loads[top] -= times[first, kinds[top]]
        used[top] -= lengths[first]
        loads[to] += times[first, kinds[to]]
        used[to] += lengths[first]
        chosen[first] = to
        if second >= 0:
            loads[to] -= times[second, kinds[to]]
            used[to] -= lengths[second]
            loads[top] += times[second, kinds[top]]
            used[top] += lengths[second]
            chosen[second] = top
    return loads.max()


fill = compiled(_fill)
enumerate_partitions = compiled(_enumerate)
improve = compiled(_improve)
