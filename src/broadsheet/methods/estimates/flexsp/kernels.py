"""Compiled loops of the planners: sequences, longest first, into groups; and the search from there.

A *partition* is how many groups of each degree there are. All arrays: ``times`` [sequences, degrees] in ms (inf where memory
forbids it) and ``lengths`` [sequences], both longest first; ``rooms`` [degrees] tokens that a group holds.
"""

from __future__ import annotations

import numpy as np

from broadsheet.core.numerics.jit import compiled


def _fill(times, lengths, rooms, counts, limit, loads, used, chosen):
    """Each sequence to the group whose time is the smallest with it in. Returns the longest group's time, or inf as soon as
    that passes ``limit`` or a sequence fits nowhere. Groups are numbered degree by degree, in the order of ``counts``."""
    kinds = counts.size
    first, idlest = np.zeros(kinds + 1, np.int64), np.zeros(kinds, np.int64)
    for kind in range(kinds):
        first[kind + 1] = first[kind] + counts[kind]
        idlest[kind] = first[kind]
    for group in range(first[kinds]):
        loads[group] = 0.0
        used[group] = 0
    makespan = 0.0
    for i in range(lengths.size):
        best, where, of = np.inf, -1, -1
        for kind in range(kinds):
            if counts[kind] == 0 or loads[idlest[kind]] + times[i, kind] >= best:
                continue
            group = idlest[kind]
            if used[group] + lengths[i] > rooms[kind]:  # full: the idlest that has room
                group = -1
                for other in range(first[kind], first[kind + 1]):
                    if used[other] + lengths[i] <= rooms[kind] and (group < 0 or loads[other] < loads[group]):
                        group = other
                if group < 0 or loads[group] + times[i, kind] >= best:
                    continue
            best, where, of = loads[group] + times[i, kind], group, kind
        if where < 0 or best > limit:
            return np.inf
        loads[where] = best
        used[where] += lengths[i]
        chosen[i] = where
        makespan = max(makespan, best)
        if where == idlest[of]:
            for other in range(first[of], first[of + 1]):
                if loads[other] < loads[idlest[of]]:
                    idlest[of] = other
    return makespan


def _least_work(times, degrees, counts):
    """Time x devices if every sequence ran in the groups of the partition in which it costs the least."""
    work = 0.0
    for i in range(times.shape[0]):
        least = np.inf
        for kind in range(degrees.size):
            if counts[kind] > 0:
                least = min(least, times[i, kind] * degrees[kind])
        work += least
    return work


def _enumerate(times, lengths, rooms, degrees, partitions, most):
    """The partition that `fill` is done with the soonest (-1: none), and when."""
    loads, used = np.empty(most), np.empty(most, np.int64)
    chosen, winner, best = np.empty(lengths.size, np.int64), -1, np.inf
    devices = (partitions[0] * degrees).sum()
    for p in range(partitions.shape[0]):
        if least_work(times, degrees, partitions[p]) < best * devices:
            span = fill(times, lengths, rooms, partitions[p], best, loads, used, chosen)
            if span < best:
                best, winner = span, p
    return winner, best


def _pack(times, lengths, rooms, counts, limit, loads, used, chosen):
    """Whether all sequences can be done by ``limit``, each in the smallest group (there it costs the least) that can still
    take it, the fullest of those. Groups are numbered as in `fill`."""
    kinds = counts.size
    first = np.zeros(kinds + 1, np.int64)
    for kind in range(kinds):
        first[kind + 1] = first[kind] + counts[kind]
    for group in range(first[kinds]):
        loads[group] = 0.0
        used[group] = 0
    for i in range(lengths.size):
        where = -1
        for kind in range(kinds):
            if times[i, kind] > limit:
                continue
            for group in range(first[kind], first[kind + 1]):
                if (
                    loads[group] + times[i, kind] <= limit
                    and used[group] + lengths[i] <= rooms[kind]
                    and (where < 0 or loads[group] > loads[where])
                ):
                    where = group
                if used[group] == 0:  # so are those behind it
                    break
            if where >= 0:
                loads[where] += times[i, kind]
                used[where] += lengths[i]
                chosen[i] = where
                break
        if where < 0:
            return False
    return True


def _tighten(times, lengths, rooms, degrees, partitions, most, best, bound, steps):
    """The partition in which `pack` does everything the soonest, if sooner than ``best`` (-1: none is), and when."""
    loads, used = np.empty(most), np.empty(most, np.int64)
    chosen, winner = np.empty(lengths.size, np.int64), -1
    devices = (partitions[0] * degrees).sum()
    for p in range(partitions.shape[0]):
        low, high = max(bound, least_work(times, degrees, partitions[p]) / devices), best * (1 - 1e-4)
        if low > high or not pack(times, lengths, rooms, partitions[p], high, loads, used, chosen):
            continue
        for _ in range(steps):
            middle = (low + high) / 2
            if pack(times, lengths, rooms, partitions[p], middle, loads, used, chosen):
                high = middle
            else:
                low = middle
        best, winner = high, p
    return winner, best


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
least_work = compiled(_least_work)
enumerate_partitions = compiled(_enumerate)
pack = compiled(_pack)
tighten = compiled(_tighten)
improve = compiled(_improve)
