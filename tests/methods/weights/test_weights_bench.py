"""The bench and the baselines: equal work, real sizes, an order of methods that every paper on them agrees on."""

import pytest
import torch
from tiny import random_ids, tiny

from broadsheet.core.models import load
from broadsheet.core.models.observers import Gram
from broadsheet.core.models.walker import walk
from broadsheet.methods.weights.awq import AWQ
from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.bench import Workload, calibration, evaluation, measure
from broadsheet.methods.weights.gptq import GPTQ, gptq
from broadsheet.methods.weights.hqq import HQQ
from broadsheet.methods.weights.rtn import RTN
from broadsheet.methods.weights.uncompressed import Uncompressed

SMALL = Workload(tasks=("kv", "facts"), sessions=2, turns=2, context_tokens=96, samples=8, tokens=64, timing=False)


def values(records):
    return {r.metric: r.value for r in records if set(r.setting) <= {"budget"}}


def test_the_reference_is_itself():
    found = values(measure("bf16", Uncompressed(), SMALL))
    assert found["bits"] == 16
    assert found["kl"] == 0
    assert found["bytes_ratio"] == 1


def test_a_cell_reports_what_is_stored_and_what_it_cost():
    found = values(measure("rtn", RTN(), SMALL, 2.0))
    assert found["bits"] == 2.25
    assert found["kl"] > 0.01
    assert found["disk_bytes"] == pytest.approx(found["held_bytes"], rel=0.03)


def test_timing_and_peak_are_measured_when_asked_for():
    workload = Workload(tasks=("facts",), sessions=1, turns=1, samples=2, tokens=64)
    found = values(measure("rtn", RTN(), workload, 4.0))
    assert {"prefill_time_ratio", "decode_time_ratio", "tokens_per_s"} <= found.keys()
    assert found["peak_bytes"] > found["held_bytes"]


def test_a_budget_out_of_reach_says_how_far():
    (record,) = measure("rtn", RTN(), SMALL, 0.5)
    assert record.metric == "reachable"
    assert record.value == 0
    assert record.setting["least"] > 0.75


def test_calibration_is_seeded_and_never_evaluated(tmp_path):
    _, tokenizer = load("pocket-2m")
    first, again = calibration(SMALL, tokenizer), calibration(SMALL, tokenizer)
    assert torch.equal(first, again)
    assert first.shape == (8, 64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(number) for number in range(20_000)))
    workload = Workload(text=str(text), tasks=("kv",), sessions=5, samples=9, tokens=32)
    scored = {tuple(row.tolist()) for _, ids, _ in evaluation(workload, tokenizer) for row in ids}
    assert len(scored) == 5
    for seed in range(3):
        seeded = Workload(text=str(text), tasks=("kv",), sessions=5, samples=9, tokens=32, seed=seed)
        assert not scored & {tuple(row.tolist()) for row in calibration(seeded, tokenizer)}


def test_outliers_leave_the_reference_what_it_is_and_hurt_round_to_nearest():
    plain = values(measure("bf16", Uncompressed(), SMALL))
    spiked = Workload(**{**SMALL.__dict__, "outliers": 32.0})
    assert values(measure("bf16", Uncompressed(), spiked))["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-3)
    assert values(measure("rtn", RTN(), spiked, 4.0))["kl"] > 2 * values(measure("rtn", RTN(), SMALL, 4.0))["kl"]


def test_gptq_beats_rounding_on_the_layer_output():
    block = next(iter(walk(tiny("gqa"), random_ids(32, 40))))
    name = "model.layers.0.mlp.down_proj"
    gram = Gram()
    block.observe({name: gram})
    weight = block.linears[name].weight.detach()
    nearest = RTN(bits=3, group_size=32)

    def error(stored):
        difference = stored.dequantise() - weight
        return float((difference @ gram.matrix * difference).sum())

    from broadsheet.core.numerics.groups import quantise_groups

    rounded = error(quantise_groups(weight, nearest.bits, nearest.group_size))
    assert error(gptq(weight, gram.matrix, 3, 32)) < 0.8 * rounded
    assert error(gptq(weight, gram.matrix, 3, 32, act_order=False)) < 0.8 * rounded


@pytest.mark.parametrize("method", [GPTQ(bits=8, group_size=32), AWQ(bits=8, group_size=32), HQQ(bits=8, group_size=32)])
@pytest.mark.parametrize("kind", ["gqa", "opt", "neox"])
def test_at_eight_bits_every_baseline_is_the_model(method, kind):
    model, ids = tiny(kind), random_ids(6, 16)
    before = model(ids).logits
    method.compress(model, ids)
    assert (model(ids).logits - before).abs().mean() < 0.05 * before.abs().mean()
    assert size(model).bits == pytest.approx(9, abs=0.01)


def test_a_method_that_needs_calibration_says_so():
    with pytest.raises(ValueError, match="GPTQ needs calibration"):
        GPTQ(group_size=32).compress(tiny("gqa"))
