"""Planning: programs beside enumeration, bounds below every plan, cuts and buckets beside brute force."""

import itertools

import numpy as np
import pytest

from broadsheet.core.perf.planning import (
    Program,
    bucket_bounds,
    contiguous_partition,
    exhaustive_makespan,
    longest_first,
    makespan_bound,
    power_of_two_partitions,
)


def test_a_program_finds_the_best_knapsack():
    program = Program()
    values, weights = [60, 100, 120, 40], [10, 20, 30, 9]
    taken = [program.variable(upper=1, whole=True, cost=-value) for value in values]
    program.row(dict(zip(taken, weights, strict=True)), upper=50)
    found = program.solve()
    assert found.status == "optimal"
    assert found.gap == 0
    assert found.objective == pytest.approx(-220)
    assert found.values.round().tolist() == [0, 1, 1, 0]


def test_an_infeasible_program_says_so():
    program = Program()
    one = program.variable(upper=1, whole=True)
    program.row({one: 1.0}, lower=2)
    found = program.solve()
    assert (found.status, found.found, found.gap) == ("infeasible", False, float("inf"))


def _programmed_makespan(times, sizes, rooms):
    jobs, machines = times.shape
    program = Program()
    most = program.variable(cost=1.0)
    x = [[program.variable(upper=1, whole=True) for _ in range(machines)] for _ in range(jobs)]
    for row in x:
        program.row(dict.fromkeys(row, 1.0), 1, 1)
    for m in range(machines):
        program.row({x[j][m]: times[j, m] for j in range(jobs)} | {most: -1.0}, upper=0)
        program.row({x[j][m]: sizes[j] for j in range(jobs)}, upper=rooms[m])
    return program.solve()


@pytest.mark.parametrize("seed", range(8))
def test_enumeration_is_the_programs_optimum(seed):
    rng = np.random.default_rng(seed)
    times, sizes = rng.uniform(1, 10, (6, 3)), rng.uniform(1, 5, 6)
    rooms = np.full(3, sizes.sum() / 2)
    best, chosen = exhaustive_makespan(times, sizes, rooms)
    assert best == pytest.approx(_programmed_makespan(times, sizes, rooms).objective, rel=1e-6)
    loads, used = np.zeros(3), np.zeros(3)
    for job, machine in enumerate(chosen):
        loads[machine] += times[job, machine]
        used[machine] += sizes[job]
    assert loads.max() == pytest.approx(best)
    assert (used <= rooms).all()


def test_enumeration_where_nothing_fits():
    assert exhaustive_makespan(np.ones((2, 1)), [2.0, 2.0], [3.0]) == (float("inf"), [])


@pytest.mark.parametrize("seed", range(5))
def test_longest_first_keeps_grahams_guarantee(seed):
    times = np.random.default_rng(seed).uniform(1, 10, 8)
    machines = 3
    loads = np.bincount(longest_first(times, machines), times, machines)
    best, _ = exhaustive_makespan(np.repeat(times[:, None], machines, 1), np.zeros(8), np.ones(machines))
    assert best <= loads.max() <= best * (4 / 3 - 1 / (3 * machines)) + 1e-9


def _every_plan(times, widths, devices):
    """The shortest plan of jobs on groups, over every set of groups."""
    best = np.inf
    for groups in power_of_two_partitions(devices):
        columns = [widths.index(width) for width in groups]
        best = min(best, exhaustive_makespan(times[:, columns], np.zeros(len(times)), np.ones(len(groups)))[0])
    return best


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_is_below_every_plan(seed):
    rng = np.random.default_rng(seed)
    widths = [1, 2, 4]
    # wider is faster, but never by as much as it is wide; a job in four must not run on one device
    times = rng.lognormal(1, 1, (5, 1)) / np.array([1, 1.7, 2.6]) ** rng.uniform(0.5, 1, (5, 3))
    times[rng.random(5) < 0.25, 0] = np.inf
    bound, best = makespan_bound(times, widths, 4), _every_plan(times, widths, 4)
    assert bound <= best + 1e-9
    assert bound >= times.min(1).max() - 1e-9
    assert bound >= (times * widths).min(1).sum() / 4 - 1e-9


def test_the_bound_is_met_where_work_divides():
    assert makespan_bound(np.array([[4.0, 2.5], [4.0, 2.5]]), [1, 2], 2) == 4.0
    # one job of 8 s on one device or 5 s on two: with two devices nothing beats 5
    assert makespan_bound(np.array([[8.0, 5.0]]), [1, 2], 2) == 5.0
    with pytest.raises(ValueError, match="more devices"):
        makespan_bound(np.array([[np.inf]]), [1], 1)


def test_partitions_into_powers_of_two():
    assert list(power_of_two_partitions(4)) == [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]
    assert sum(1 for _ in power_of_two_partitions(64, 2)) == 202  # as many as binary partitions of 32
    assert sum(1 for _ in power_of_two_partitions(64)) == 1828
    assert list(power_of_two_partitions(6, 4)) == []
    assert all(sum(parts) == 12 for parts in power_of_two_partitions(12))


@pytest.mark.parametrize("seed", range(10))
def test_runs_have_the_smallest_largest_sum(seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 50, rng.integers(1, 13)).tolist()
    for parts in range(1, len(weights) + 1):
        runs = contiguous_partition(weights, parts)
        assert [place for start, end in runs for place in range(start, end)] == list(range(len(weights)))
        assert len(runs) == parts
        assert all(start < end for start, end in runs)
        cuts = itertools.combinations(range(1, len(weights)), parts - 1)
        brute = min(max(sum(weights[a:b]) for a, b in itertools.pairwise((0, *cut, len(weights)))) for cut in cuts)
        assert max(sum(weights[start:end]) for start, end in runs) == brute
    with pytest.raises(ValueError, match="cannot be cut"):
        contiguous_partition(weights, len(weights) + 1)


@pytest.mark.parametrize("seed", range(10))
def test_buckets_round_up_by_the_least(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 40, rng.integers(1, 11)).tolist()

    def growth(bounds):
        return sum(min(bound for bound in bounds if bound >= value) - value for value in values)

    for buckets in range(1, 5):
        bounds = bucket_bounds(values, buckets)
        assert bounds == sorted(set(bounds))
        assert len(bounds) <= buckets
        others = sorted(set(values) - {max(values)})
        brute = min(growth([*some, max(values)]) for size in range(buckets) for some in itertools.combinations(others, size))
        assert growth(bounds) == brute
    assert growth(bucket_bounds(values, len(set(values)))) == 0
