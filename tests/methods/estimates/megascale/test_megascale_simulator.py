"""The step simulator and the schedule: acceptance checks 1 and 4, and that formula and events agree."""

import json
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from broadsheet.core.perf.events import Trace
from broadsheet.methods.estimates.megascale.plan import Execution, Model, System, read, split
from broadsheet.methods.estimates.megascale.schedule import of_costs, run_pipeline, slots
from broadsheet.methods.estimates.megascale.simulator import (
    Calibration,
    Costs,
    Levers,
    calibrated,
    closed_form,
    costs,
    exposed,
    simulate,
    slowed,
)
from broadsheet.methods.estimates.megascale.stragglers import jobs, played, slowdown

MODEL, SYSTEM = replace(read(Model, "gpt-175b"), window=1228), read(System, "a100-200g")
PLAN = split(256, 8, 8, 256, 6)
PIPELINES = [(8, 6, 64), (8, 6, 8), (4, 2, 12), (2, 3, 4), (3, 2, 6), (4, 1, 8), (8, 1, 64), (4, 1, 3), (1, 1, 5)]


# --- the schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "v", "m"), PIPELINES)
@pytest.mark.parametrize("overlap", [True, False])
def test_the_bubble_of_uniform_stages(p, v, m, overlap):
    """(p - 1) / (v m) of the ideal time, with free messages; passes of unequal length forward and backward."""
    run = run_pipeline(p, v, m, of_costs(split(p, 1, p, m, v), 1.0, 2.0), 0.0, overlap)
    assert run.bubble == pytest.approx((p - 1) / (v * m))
    assert run.busy == pytest.approx([3.0 * m * v] * p)


@pytest.mark.parametrize(("p", "v", "m"), PIPELINES)
def test_every_pass_is_done_once_and_backward_after_forward(p, v, m):
    for stage in range(p):
        passes = [one for slot in slots(stage, p, v, m) for one in slot]
        assert len(passes) == len(set(passes)) == 2 * m * v
        for one in passes:
            if one.backward:
                assert passes.index(replace(one, backward=False)) < passes.index(one)


def test_microbatches_that_cannot_be_interleaved_are_refused():
    with pytest.raises(ValueError, match="multiple of p = 4 microbatches, not 6"):
        run_pipeline(4, 2, 6, lambda stage, one: 1.0)


@pytest.mark.parametrize("seed", range(12))
def test_formula_and_events_agree(seed):
    """Random pipelines whose messages are short beside the output layer, as they are in all of the paper's plans: exact with
    three stages and two chunks or more, else close."""
    rng = np.random.default_rng(seed)
    p, v = int(rng.integers(2, 9)), int(rng.integers(1, 5))
    m = p * int(rng.integers(1, 6))
    hop = float(rng.uniform(0, 0.1))
    output = hop / 3 + float(rng.uniform(0, 0.1))
    cost = Costs(1.0, 2.0, (output, 2 * output), hop, 0, 0, 0, 0)
    plan = split(p, 1, p, m, v)
    for overlap in (True, False):
        run = run_pipeline(p, v, m, of_costs(plan, 1.0, 2.0, cost.output), hop, overlap)
        exact = p > 2 and v > 1
        assert sum(closed_form(cost, p, v, m, overlap).values()) == pytest.approx(run.seconds, rel=1e-9 if exact else 0.02)


@pytest.mark.parametrize("seed", range(12))
def test_overlap_never_slows_the_events_down(seed):
    rng = np.random.default_rng(100 + seed)
    p, v = int(rng.integers(2, 6)), int(rng.integers(1, 4))
    m = p * int(rng.integers(1, 5))
    factors, hop = rng.uniform(0.8, 1.5, p), float(rng.uniform(0, 0.4))
    overlapped, coupled = (
        run_pipeline(p, v, m, lambda stage, one: factors[stage] * (1 + one.backward), hop, overlap).seconds
        for overlap in (True, False)
    )
    assert overlapped <= coupled


def test_the_trace_shows_every_pass_and_what_it_waited_for():
    trace = Trace()
    run = run_pipeline(2, 2, 4, of_costs(split(2, 1, 2, 4, 2), 1.0, 2.0), 0.1, True, trace)
    assert len(trace.spans) == 2 * 2 * 4 * 2
    assert max(span.end for span in trace.spans) == run.seconds
    # three hops forward (stage 0 to 1, back to 0, to 1) and three backward for each of 4 microbatches
    assert len(trace.arrows) == 6 * 4
    assert all(source.end < target.start for source, target in trace.arrows)


# --- the step -----------------------------------------------------------------------------------------------------------


def test_levers_by_name():
    assert Levers.named("all") == Levers.all()
    assert Levers.named("none") == Levers.named("") == Levers()
    assert Levers.named("tp_overlap, lamb=3") == Levers(tp_overlap=True, lamb=3)
    assert list(Levers.ladder()) == ["baseline", *(f.name for f in fields(Levers))]
    for bad in ("speed", "lamb", "lamb=x", "misc=1"):
        with pytest.raises(ValueError, match="unknown lever"):
            Levers.named(bad)
    with pytest.raises(ValueError, match="whole number from 1"):
        Levers(lamb=0)


def test_communication_in_chunks():
    assert exposed(2.0, 10.0, 4) == 0.5
    assert exposed(10.0, 2.0, 4) == 8.5
    assert exposed(2.0, 10.0, 1) == 2.0


def _random_case(seed):
    rng = np.random.default_rng(seed)
    heads = 8 * int(rng.integers(1, 9))
    model = Model(heads * 64, heads * 256, int(rng.choice([512, 2048, 8192])), heads, 64, 24, 32_000, 256)
    tp, pp = int(rng.choice([1, 2, 4, 8])), int(rng.choice([1, 2, 4]))
    interleaving = int(rng.choice([1, 2, 3])) if pp > 1 else 1
    dp = int(rng.choice([1, 2, 16]))
    batch = dp * pp * int(rng.integers(1, 9))
    c = Calibration(*rng.uniform([0.3, 0.1, 0.1, 0, 0, 0], [1, 1, 1, 2e-3, 0.1, 1]), tp_chunks=int(rng.integers(1, 9)))
    return model, split(tp * pp * dp, tp, pp, batch, interleaving), c


@pytest.mark.parametrize("seed", range(40))
def test_no_lever_ever_makes_a_step_slower(seed):
    """Each alone, and one after the other; lamb by the token."""
    model, plan, c = _random_case(seed)

    def seconds(levers):
        return simulate(model, SYSTEM, plan, levers, c, check=False).seconds / levers.lamb

    base = seconds(Levers())
    for field in fields(Levers):
        one = Levers(**{field.name: 3 if field.name == "lamb" else True})
        assert seconds(one) <= base * (1 + 1e-12), field.name
    rungs = [seconds(levers) for levers in Levers.ladder().values()]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(rungs))


def test_no_lever_is_the_baseline_and_parts_sum_up():
    step = simulate(MODEL, SYSTEM, PLAN)
    assert step == simulate(MODEL, SYSTEM, PLAN, Levers.named("none"))
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.bubble == 7 / (6 * 64)
    assert step.mfu == pytest.approx(MODEL.flops(256 * 2048) / (step.seconds * 256 * 312e12))
    json.dumps(step.to_json())


def test_a_perfect_machine_reaches_its_peak():
    """Without communication, elementwise work, output layer and pipeline all time is matrix products."""
    plan = Execution(1, 1, 1, 1, 4)
    model = Model(1024, 4096, 128, 8, 128, 4, 1)
    system = replace(SYSTEM, memory_gbps=1e12)
    c = Calibration(1.0, 1.0, 1.0, 0.0, 0.0, 0.0, attention_efficiency=1.0, operator_slowdown=1.0)
    assert simulate(model, system, plan, calibration=c, stragglers=False).mfu == pytest.approx(1.0, rel=0.005)


def test_recomputation_costs_a_forward_pass_at_most():
    c = calibrated()
    none, attention, full = (
        costs(MODEL, SYSTEM, replace(PLAN, activation_recompute=way), Levers(), c) for way in ("none", "attn_only", "full")
    )
    assert full.backward - none.backward == pytest.approx(full.forward)
    assert none.backward < attention.backward < full.backward
    assert none.forward == attention.forward == full.forward


def test_lamb_trains_the_larger_batch():
    assert simulate(MODEL, SYSTEM, PLAN, Levers(lamb=3)) == simulate(MODEL, SYSTEM, replace(PLAN, batch_size=768))


def test_bad_calibrations_are_refused():
    for change, message in (
        ({"matrix_efficiency": 1.2}, "share from 0 to 1"),
        ({"step_seconds": -1}, "not be negative"),
        ({"tp_chunks": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(calibrated(), **change)


# --- slow machines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levers", [Levers(), Levers.all()], ids=["coupled", "overlapped"])
@pytest.mark.parametrize("stage", [0, 3, 7])
def test_one_slow_stage_costs_what_the_events_say(levers, stage):
    c, m = calibrated(), 32
    plan = split(128, 8, 8, 64, 6)
    cost = costs(MODEL, SYSTEM, plan, levers, c)
    formula = sum(closed_form(cost, 8, 6, m, levers.pp_overlap).values())
    formula += slowed(cost, 6, m, levers.pp_overlap, 0.1, stage == 7)
    assert formula == pytest.approx(played(MODEL, SYSTEM, plan, {stage: 0.1}, levers, c), rel=0.01)


def test_expectation_and_sampling_agree():
    plan, levers = split(1024, 8, 8, 768, 6), Levers.all()
    found = slowdown(MODEL, SYSTEM, plan, levers)
    sampled = jobs(MODEL, SYSTEM, plan, levers, runs=2000)
    assert sampled.mean() == pytest.approx(found.expected, abs=4 * sampled.std() / 2000**0.5)
    assert found.with_one < found.expected < found.clean
    assert sampled.max() == pytest.approx(found.clean)
    assert np.mean(jobs(MODEL, SYSTEM, plan, levers, spread=0.05, runs=50)) < found.expected
    with pytest.raises(ValueError, match="spread"):
        jobs(MODEL, SYSTEM, plan, spread=-1)
