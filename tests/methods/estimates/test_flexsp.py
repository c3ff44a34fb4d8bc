"""FlexSP: chunks, buckets, planners beside each other and beside enumeration, plans as JSON, lengths, the estimate."""

import itertools
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from broadsheet.methods.estimates.flexsp import (
    PLANNERS,
    FlexSP,
    Group,
    Plan,
    Problem,
    SPCostModel,
    plan,
    plan_batches,
    planned,
)
from broadsheet.methods.estimates.flexsp.lengths import (
    QUANTILES,
    LengthMixture,
    corpora,
    corpus,
    describe,
    padded,
    read_lengths,
)
from broadsheet.methods.estimates.flexsp.planners import Greedy, in_chunks, static
from broadsheet.methods.estimates.flexsp.program import Milp, buckets_of, candidates

COST = SPCostModel.from_preset("gpt-7b-a100")
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared"))
WIKIPEDIA = SHARED / "data" / "flexsp" / "wikipedia.txt"
OURS = ("balanced", "greedy", "search")


def small(seed, most=9, devices=8):
    """A batch of 4 to ``most`` sequences, some of them wide, that fill at most 0.8 of the devices' 80 GiB."""
    rng = np.random.default_rng(seed)
    while True:
        lengths = np.exp(rng.normal(8.2, 1.3, rng.integers(4, most + 1))).astype(int).clip(100, 40_000)
        problem = Problem.of(lengths.tolist(), devices, 80, COST)
        if problem.tokens <= 0.8 * problem.room:
            return problem


def paper_batches(count, source="wikipedia"):
    method = FlexSP()
    groups, _, _ = method.batches(source, 512, count)
    return [Problem.of(group, 64, 30, COST, method.context) for group in groups]


# --- chunks and buckets ---


@pytest.mark.parametrize("seed", range(6))
def test_check2_chunks_have_the_smallest_largest_sum_and_keep_the_order(seed):
    rng = random.Random(seed)
    problem = Problem.of([rng.randint(1, 9000) for _ in range(rng.randint(2, 12))], 64, 30, COST)
    lengths = sorted(problem.lengths, reverse=True)
    for count in range(1, len(lengths) + 1):
        chunks = problem.chunks(count)
        flat = [problem.lengths[i] for chunk in chunks for i in chunk]
        assert flat == lengths
        cuts = itertools.combinations(range(1, len(lengths)), count - 1)
        brute = min(max(sum(lengths[a:b]) for a, b in itertools.pairwise((0, *cut, len(lengths)))) for cut in cuts)
        assert max(sum(problem.lengths[i] for i in chunk) for chunk in chunks) == brute
        assert [i for chunk in problem.chunks(count, "given") for i in chunk] == list(range(len(lengths)))


def test_the_fewest_micro_batches_hold_all_tokens():
    problem = Problem.of([6000] * 200, 64, 30, COST)  # 1.2M tokens, room for 412,736
    assert problem.fewest == 3
    assert problem.counts("auto") == [3, 4, 5, 6, 7]
    tight = replace(problem, lengths=(200_000,) * 6)  # two of them do not fit side by side, although six need only three
    assert tight.fewest == 3
    assert tight.counts("auto")[0] == 3
    assert len(plan(tight.lengths, 64, 30, COST).micro_batches) == 3
    assert problem.counts(4) == [4]


def test_check3_buckets_round_up_and_are_exact_when_there_are_enough():
    problem = small(3)
    ids = list(range(len(problem.lengths)))
    exact = buckets_of(problem, ids, len(ids))
    assert all(problem.lengths[i] == bound for bound, members in exact for i in members)
    for bound, members in buckets_of(problem, ids, 2):
        assert max(problem.lengths[i] for i in members) == bound  # never above what is in it, never below
    assert sorted(i for _, members in buckets_of(problem, ids, 2) for i in members) == ids


def test_buckets_are_added_until_rounding_leaves_half_of_the_room():
    problem = Problem.of([*range(1000, 21_000, 1000)], 64, 30, COST)
    ids = list(range(len(problem.lengths)))
    cramped = replace(problem, capacity=int(problem.tokens / problem.devices * 1.02))
    free, tight = (buckets_of(one, ids, 4) for one in (problem, cramped))
    assert len(free) == 4 < len(tight)
    for one, found in ((problem, free), (cramped, tight)):
        assert sum(bound * len(members) for bound, members in found) <= (one.tokens + one.room) / 2


def test_candidates_leave_out_only_what_cannot_be():
    problem = Problem.of([30_000, 500], 8, 60, COST)
    assert problem.smallest_degree(30_000) == 4
    assert candidates(problem, [0, 1]) == [1, 1, 1, 1, 2, 2, 4, 4, 8]
    # three that need 4 devices each can share 8: no smaller group may be ruled in, the wide one must not be ruled out
    sharing = replace(problem, lengths=(21_000, 21_000, 21_000), capacity=8_000)
    assert 8 in candidates(sharing, [0, 1, 2])
    assert plan_of(sharing, "search").time < np.inf


def plan_of(problem, planner, **options):
    found = planned(problem, planner, **options)
    found.check()
    return found


# --- planners ---


@pytest.mark.parametrize("planner", PLANNERS)
def test_check4_plans_keep_the_rules_and_tell_their_time(planner):
    for seed in range(3):
        problem = small(seed)
        found = plan_of(problem, planner)
        ids = sorted(i for groups in found.micro_batches for group in groups for i in group.sequences)
        assert ids == list(range(len(problem.lengths)))
        total = 0.0
        for groups in found.micro_batches:
            assert sum(group.degree for group in groups) <= problem.devices
            times = []
            for group in groups:
                inside = [problem.lengths[i] for i in group.sequences]
                assert sum(inside) <= problem.capacity * group.degree
                compute = sum((COST.alpha1 * s * s + COST.alpha2 * s) / group.degree for s in inside)
                times.append(COST.beta1 + compute + sum(COST.all_to_all(s, group.degree) for s in inside))
            total += max(times)
        assert found.time == pytest.approx(total)
        assert found.bound <= found.time * (1 + 1e-12)
        assert 0 <= found.gap < 1


def test_check5_the_program_finds_the_optimum():
    for seed in range(10):
        problem = small(seed, most=6, devices=4)
        best = plan_of(problem, "exhaustive", micro_batches=1).time
        found = in_chunks(problem, 1, "sorted", "milp", Milp(problem, None, buckets=0))
        found.check()
        assert found.time == pytest.approx(best, rel=1e-6)


def test_check5_greedy_is_within_2_percent_of_the_optimum():
    ratios = {"greedy": [], "search": []}
    for seed in range(100):
        problem = small(seed)
        best = plan_of(problem, "exhaustive", micro_batches=1).time
        for name, found in ratios.items():
            found.append(plan_of(problem, name, micro_batches=1).time / best)
    for found in ratios.values():
        assert min(found) >= 1 - 1e-9
        assert np.mean(np.array(found) <= 1.02) >= 0.95
    assert all(ours <= theirs + 1e-12 for ours, theirs in zip(ratios["search"], ratios["greedy"], strict=True))


@pytest.mark.parametrize("length", [1024, 16_384])
def test_check6_equal_lengths_need_no_groups_of_different_sizes(length):
    """64 alike on 64 devices: any planner's time is that of the best single degree. The authors' baseline leaves a tenth of
    the memory empty, which costs it 0.2 % where three sequences fill a group."""
    problem = Problem.of([length] * 64, 64, 30, COST)
    homogeneous = min(
        in_chunks(problem, "auto", "sorted", "one", Greedy(replace(problem, degrees=(d,)))).time
        for d in problem.degrees
        if length <= problem.capacity * d
    )
    for name in OURS:
        assert plan_of(problem, name).time == pytest.approx(homogeneous), name
    adaptive = plan_of(problem, "adaptive").time
    assert adaptive == pytest.approx(homogeneous, rel=1e-9 if length == 1024 else 0.002)
    assert adaptive >= homogeneous * (1 - 1e-9)
    assert plan_of(problem, "milp", time_limit=3).time == pytest.approx(homogeneous)


def test_check7_against_the_baselines_at_the_papers_scale():
    """On lengths drawn like Wikipedia's; `benchmarks/flexsp_study.py` has the public file."""
    ratios = []
    for problem in paper_batches(8):
        plans = {name: plan_of(problem, name, context=192_000) for name in ("static", "adaptive", *OURS)}
        assert plans["static"].detail["degree"] == 32
        assert plans["search"].time <= plans["greedy"].time <= plans["balanced"].time
        assert plans["greedy"].time <= plans["adaptive"].time
        ratios.append([plans[name].time / plans["greedy"].time for name in ("static", "adaptive")])
    over_static, over_adaptive = np.mean(ratios, 0)
    assert over_static >= 1.7
    assert over_adaptive >= 1.35


@pytest.mark.skipif(not WIKIPEDIA.exists(), reason=f"needs {WIKIPEDIA} (see DATA.md of the shared folder)")
def test_check7_on_the_public_lengths():
    ratios = []
    for problem in paper_batches(20, str(WIKIPEDIA)):
        plans = {name: plan_of(problem, name, context=192_000) for name in ("static", "adaptive", "greedy")}
        ratios.append([plans[name].time / plans["greedy"].time for name in ("static", "adaptive")])
    assert np.mean(ratios, 0)[0] >= 1.7
    assert np.mean(ratios, 0)[1] >= 1.35
    assert np.min(ratios) >= 1


def test_check8_planning_takes_less_than_half_a_second():
    """Of one core: other processes may steal wall-clock time."""
    problems = paper_batches(6)
    for name in ("greedy", "search"):
        planned(problems[0], name)  # compiles
        taken = []
        for problem in problems:
            begun = time.process_time()
            planned(problem, name)
            taken.append(time.process_time() - begun)
        assert np.median(taken) < 0.5


def test_check10_uniform_short_lengths_gain_next_to_nothing():
    """Where a device holds several of any sequence, groups of different sizes have nothing to win."""
    problem = Problem.of(np.random.default_rng(0).integers(1000, 3000, 512).tolist(), 64, 30, COST)
    plans = {name: plan_of(problem, name) for name in ("adaptive", "balanced", "search")}
    assert 1 <= plans["adaptive"].time / plans["search"].time < 1.03
    assert 1 <= plans["balanced"].time / plans["search"].time < 1.03


def test_ours_is_not_slower_than_adaptive_where_memory_is_tight():
    """512 uniform lengths in which greedy, which fills groups evenly, needs a micro-batch more than packing does."""
    for seed in range(4):
        lengths = np.random.default_rng(seed).integers(100, 6000, 512).tolist()
        problem = Problem.of(lengths, 64, 30, COST)
        assert plan_of(problem, "search").time <= plan_of(problem, "adaptive").time


def test_a_few_sequences_leave_devices_idle():
    found = plan([500, 700], 64, 30, COST)
    assert sum(group.degree for group in found.micro_batches[0]) <= 64
    milp = plan([500, 700], 64, 30, COST, "milp", time_limit=2)
    assert milp.time == pytest.approx(found.time, rel=0.02)


def test_the_program_tells_its_gap_and_falls_back():
    problem = paper_batches(1)[0]
    found = planned(problem, "milp", 2, time_limit=1e-3)
    found.check()
    assert found.detail["from"] == ["one degree"] * 2
    assert all(gap > 0 for gap in found.detail["program_gap"])
    assert found.time == pytest.approx(planned(problem, "balanced", 2).time)


def test_wide_groups_start_at_multiples_of_their_size():
    found = plan([60_000, 20_000, 20_000, 3000, 900, 800, 700], 32, 30, COST)
    for number in range(len(found.micro_batches)):
        placed = found.ranks(number)
        assert all(devices.start % group.degree == 0 for devices, group in placed)
        taken = [device for devices, _ in placed for device in devices]
        assert len(taken) == len(set(taken))
        assert max(taken) < 32


@pytest.mark.parametrize(("devices", "heads"), [(256, 64), (128, 8)])
def test_more_devices_than_can_be_enumerated(devices, heads):
    lengths = corpus("wikipedia").draw(512, longest=30_000)
    problem = Problem.of(lengths, devices, 30, replace(COST, heads=heads))
    found = plan_of(problem, "search")
    assert found.time <= plan_of(problem, "adaptive").time
    assert found.gap < 0.25
    assert max(group.degree for groups in found.micro_batches for group in groups) <= heads


# --- plans ---


def test_plans_round_trip_and_lies_are_found():
    found = plan([30_000, 9000, 2000, 500], 8, 60, COST)
    row = json.loads(json.dumps(found.to_json()))
    again = Plan.from_json(row)
    assert again.micro_batches == found.micro_batches
    assert again.time == found.time
    with pytest.raises(ValueError, match="its cost model"):
        Plan.from_json({**row, "time_ms": 1.0})
    with pytest.raises(ValueError, match="no plan of sequence parallelism"):
        Plan.from_json({"planner": "x"})


def test_broken_plans_are_refused():
    problem = Problem.of([30_000, 500], 8, 60, COST)
    for groups, message in [
        ((Group(8, (0,)),), "sequence 1 is planned 0 times"),
        ((Group(8, (0, 1, 1)),), "sequence 1 is planned 2 times"),
        ((Group(8, (0,)), Group(1, (1,))), "more than 8 devices"),
        ((Group(1, (0, 1)),), "too many"),
        ((Group(3, (0, 1)),), "has a group of 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            Plan(problem, (groups,), "by hand").check()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan([], 64, 30, COST), "the batch is empty"),
        (lambda: plan([100, 0], 64, 30, COST), "sequence 1 has 0 tokens"),
        (lambda: plan([100, 600_000], 64, 30, COST), "sequence 1 has 600,000 tokens; a group of 64 devices holds"),
        (lambda: plan([100], 48, 30, COST), "48 devices are no power of two"),
        (lambda: plan([100], 64, 1, COST), "below the 1.6 GiB"),
        (lambda: plan([99_000], 64, 30, replace(COST, heads=40)), r"a group of 8 devices \(of 40 heads\)"),
        (lambda: plan([100], 64, 30, COST, "best"), "no planner 'best'; there are static"),
        (lambda: plan([100], 64, 30, COST, micro_batches=2), "1 sequences make 1 to 1 micro-batches"),
        (lambda: plan([100], 64, 30, COST, micro_batches="many"), "a number or auto"),
        (lambda: plan([9000], 64, 30, COST, context=8000), "more than the context of 8,000"),
        (lambda: plan([9000] * 60, 64, 30, COST, "exhaustive"), "for 12 sequences"),
        (lambda: plan([6000] * 200, 64, 30, COST, micro_batches=1), "allow more of them"),
        (lambda: static(small(0), 3), "groups are of 1, 2, 4, 8 devices"),
        (lambda: FlexSP(planner="x"), "no planner 'x'"),
        (lambda: FlexSP(devices=63), "no power of two"),
        (lambda: FlexSP(context=100), "padded to multiples of 128 tokens"),
        (lambda: corpus("wikipedia").draw(5, longest=4), "allow longer ones"),
        (lambda: corpus("books"), "no corpus 'books'; there is wikipedia"),
        (lambda: FlexSP().estimate("nowhere.txt"), "cannot read lengths from nowhere.txt"),
        (lambda: FlexSP().estimate([500_000]), "longer than the context of 192,000"),
        (lambda: FlexSP().estimate(batch=0), "batch and batches are 1 or more"),
        (lambda: next(plan_batches([1, 2], 0, 8)), "a batch has 1 or more"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- lengths ---


def test_lengths_are_read_and_bad_lines_named(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("368\n\n99\r\n 1330\n")
    assert read_lengths(path) == [368, 99, 1330]
    for text, message in (("12\nx\n", "line 2: 'x'"), ("12\n-4\n", "line 2"), ("1.5\n", "line 1"), ("", "holds no lengths")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_lengths(path)
    assert padded([1, 128, 129], 64) == [128, 128, 256]


def test_drawn_lengths_are_like_the_corpus():
    known, drawn = corpora()["wikipedia"], np.array(corpus("wikipedia").draw(400_000, seed=1))
    for q in QUANTILES:
        assert np.quantile(drawn, q) == pytest.approx(known["quantiles"][f"{q:g}"], rel=0.05 if q < 0.999 else 0.1)
    assert drawn.mean() == pytest.approx(known["mean"], rel=0.1)
    assert (drawn <= 8192).mean() == pytest.approx(0.984, abs=0.002)
    assert corpus("wikipedia").draw(5, seed=1) == corpus("wikipedia").draw(5, seed=1)
    assert max(corpus("wikipedia").draw(100_000, longest=50_000)) <= 50_000


def test_the_fit_recovers_a_mixture():
    truth = LengthMixture(6.0, 1.0, 0.05, 5000.0, 2.0)
    drawn = truth.draw(400_000)
    fitted = LengthMixture.fit(describe(drawn))
    points = np.quantile(drawn, QUANTILES)
    assert fitted.cdf(points) == pytest.approx(truth.cdf(points), abs=0.01)


@pytest.mark.skipif(not WIKIPEDIA.exists(), reason=f"needs {WIKIPEDIA} (see DATA.md of the shared folder)")
def test_what_is_known_of_wikipedia_is_what_the_file_says():
    assert {k: v for k, v in corpora()["wikipedia"].items() if k != "origin"} == describe(read_lengths(WIKIPEDIA))


# --- the estimate and the batches of a trainer ---


def test_the_estimate_compares_planners_on_the_same_batches(tmp_path):
    report = FlexSP(devices=16, memory_gb=40, context=32_000).estimate(batch=64, batches=3, planners=("static", "adaptive"))
    compared, groups = report.tables()
    assert [row[0] for row in compared.rows] == ["static", "adaptive", "search"]
    assert "simulated" in compared.note
    assert "simulated" in groups.note
    assert compared.records()[1]["speedup"] == 1
    best = compared.records()[2]
    assert best["step s"] == pytest.approx(np.mean([p.time for p in report.row("search").plans]) / 1000, abs=1e-3)
    assert best["worst"] == pytest.approx(min(report.speedups("adaptive", "search")), abs=1e-3)
    assert sum(row["sequences"] for row in groups.records()) == 64
    written = json.loads(json.dumps(report.to_json()))
    assert Plan.from_json(written["planners"]["search"][2]).time == report.row("search").plans[2].time
    with pytest.raises(ValueError, match="was not asked for"):
        report.row("milp")


def test_the_estimate_leaves_out_what_is_too_long_and_says_so(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("100\n70000\n300\n")
    report = FlexSP(devices=8, memory_gb=60, context=32_000).estimate(str(path), batch=2, batches=3)
    assert report.skipped == 1
    assert report.row("search").plans[0].problem.lengths == (112, 304)
    assert "1 longer sequences left out" in report.tables()[0].note


def test_a_trainer_gets_rows_and_plans_of_every_batch():
    rng = np.random.default_rng(0)
    dataset = [{"input_ids": [0] * int(n)} for n in rng.integers(10, 3000, 21)]
    steps = list(plan_batches(dataset, 8, 8, 60))
    assert [len(rows) for rows, _ in steps] == [8, 8, 5]
    assert [row for rows, _ in steps for row in rows] == list(range(21))
    for rows, found in steps:
        found.check()
        assert found.problem.lengths == tuple(len(dataset[row]["input_ids"]) for row in rows)


# --- the authors' code on the same batches ---


def official():
    row = json.loads((Path(__file__).parents[2] / "golden" / "flexsp_official.json").read_text())
    for batch in row["batches"]:
        yield batch, Problem.of([128 * n for n in batch["lengths"]], 64, 30, COST, 192_000, smallest=2)


def test_one_degree_plans_are_the_authors():
    for batch, problem in official():
        for degree, times in batch["one_degree"].items():
            assert static(problem, int(degree)).times == pytest.approx(times), degree
        best = min(sum(times) for times in batch["one_degree"].values())
        assert plan_of(problem, "adaptive").time == pytest.approx(best)
        assert all(static_fails(problem, d) for d in problem.degrees if str(d) not in batch["one_degree"])


def static_fails(problem, degree):
    try:
        static(problem, degree)
    except ValueError:
        return True
    return False


def test_chunks_and_buckets_are_as_good_as_the_authors():
    """Where several cuts are the best, ours and theirs may differ; their largest sums and their padding may not."""
    for batch, problem in official():
        assert problem.counts("auto") == [int(count) for count in batch["chunk_tokens"]]
        for count, tokens in batch["chunk_tokens"].items():
            ours = [sum(problem.lengths[i] for i in chunk) for chunk in problem.chunks(int(count))]
            assert max(ours) == max(tokens)
        first = batch["fewest"]
        same = [sum(problem.lengths[i] for i in chunk) for chunk in problem.chunks(first)]
        if same != batch["chunk_tokens"][str(first)]:
            continue
        for chunk, theirs in zip(problem.chunks(first), batch["buckets"], strict=True):
            found = buckets_of(problem, chunk)
            padding = sum(bound * len(m) - sum(problem.lengths[i] for i in m) for bound, m in found)
            assert padding == theirs["padding"]
            assert len(found) == len(theirs["bounds"])


def test_ours_is_faster_than_what_the_authors_program_found():
    """Their mixed-integer program in SCIP, 5 s a micro-batch, with its first solutions: the best of five chunkings."""
    for batch, problem in official():
        if "scip" in batch:
            theirs = min(sum(times) for times in batch["scip"].values())
            assert plan_of(problem, "greedy").time < theirs
            assert plan_of(problem, "search").time < theirs
