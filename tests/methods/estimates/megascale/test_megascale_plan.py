"""Plans: what is read, and what is refused in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from broadsheet.methods.estimates.megascale.plan import Execution, Model, System, read, split
from broadsheet.methods.estimates.megascale.simulator import Calibration, Levers, costs, memory, simulate

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "calculon_official.json").read_text())
PLAN = {"num_procs": 256, "tensor_par": 8, "pipeline_par": 8, "data_par": 4, "batch_size": 768, "pipeline_interleaving": 6}
PLAIN = Calibration(1.0, 1.0, 1.0, 0.0, 0.0, 0.0, attention_efficiency=1.0, operator_slowdown=1.0)


def test_built_in_plans_load():
    model = read(Model, "gpt-175b")
    assert model.parameters == pytest.approx(175e9, rel=0.002)
    assert read(Model, "gpt-530b").parameters == pytest.approx(530e9, rel=0.002)
    assert read(System, "a100-200g").tflops == 312
    assert read(Execution, "megascale-12288").microbatches == 32


@pytest.mark.parametrize("profile", GOLDEN["profiles"], ids=lambda p: f"{p['profile']}-{p['model']}")
def test_calculons_files_load_and_agree(profile):
    """Sizes that need no model of the hardware: FLOPs, messages, weights; its attention is not causal either."""
    model, plan = Model.from_json(profile["application"]), Execution.from_json(profile["execution"])
    system = System.from_json(GOLDEN["system"])
    cost = costs(model, system, plan, Levers(), PLAIN)
    flops = (cost.parts["linear"] + cost.parts["attention"]) / 3 * system.tflops * 1e12
    assert flops == pytest.approx(profile["block_fw_flops"], rel=0.01)  # it counts elementwise operations too
    assert 2 * model.block_parameters / plan.tensor_par == pytest.approx(profile["block_weight_space"], rel=1e-3)
    if plan.pipeline_par > 1:
        sent = cost.hop * system.networks[1].bandwidth * 1e9
        assert sent == pytest.approx(profile["block_fw_pp_size"])


@pytest.mark.parametrize("profile", [p for p in GOLDEN["profiles"] if p["profile"] == "fig1"], ids=lambda p: p["model"])
def test_activation_memory_is_what_was_published(profile):
    """Korthikanti et al., Figure 1, to 1 %; calculon is within 9 % of it."""
    model, plan = Model.from_json(profile["application"]), Execution.from_json(profile["execution"])
    assert memory(model, plan)["activations"] / 2**30 == pytest.approx(profile["published"], rel=0.01)


def test_json_goes_round(tmp_path):
    for kind, value in ((Model, "gpt-175b"), (System, "h100-400g"), (Execution, "megascale-256")):
        thing = read(kind, value)
        path = tmp_path / f"{kind.__name__}.json"
        path.write_text(json.dumps(thing.to_json()))
        assert read(kind, path) == thing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_par": 5}, "8 x 8 x 5 = 320, but num_procs is 256"),
        ({"batch_size": 770}, "batch_size 770 is no multiple .* the nearest are 768 and 772"),
        ({"batch_size": 772}, "multiple of pipeline_par = 8 microbatches, not 193"),
        ({"tensor_par": 0}, "tensor_par must be a number above 0"),
        ({"microbatch_size": 1.5}, "microbatch_size must be a whole number"),
        ({"activation_recompute": "some"}, "none, attn_only or full"),
        ({"weight_offload": True}, "weight_offload = True is not modelled"),
        ({"attention_type": "multiquery"}, "attention_type = 'multiquery' is not modelled"),
        ({"colour": 1}, "unknown field 'colour'"),
    ],
)
def test_bad_executions_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Execution.from_json({**PLAN, **change})


def test_missing_fields_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model: missing .*'num_blocks'"):
        Model.from_json({"hidden": 8, "feedforward": 32, "seq_size": 8, "attn_heads": 2, "attn_size": 4})
    with pytest.raises(ValueError, match="system: missing 'matrix'"):
        System.from_json({"mem1": {"GiB": 80, "GBps": 2000}, "networks": []})
    with pytest.raises(ValueError, match="two networks"):
        System.from_json({**GOLDEN["system"], "networks": GOLDEN["system"]["networks"][:1]})
    with pytest.raises(ValueError, match=r"cannot read .*none.json: No such file"):
        read(Model, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json is no JSON: line 1"):
        read(Model, tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"unknown model 'gpt-9'.*gpt-175b"):
        read(Model, "gpt-9")
    with pytest.raises(ValueError, match="JSON object"):
        Model.from_json([1])
    with pytest.raises(ValueError, match="window"):
        replace(read(Model, "gpt-175b"), window=4096)


def test_models_that_cannot_be_split_are_refused():
    model = read(Model, "gpt-175b")
    with pytest.raises(ValueError, match="128 attention heads cannot be split over tensor_par = 3"):
        split(48, 3, 8, 768).fits(model)
    with pytest.raises(ValueError, match=r"96 layers cannot be split .* = 40 chunks"):
        split(256, 8, 8, 768, 5).fits(model)
    with pytest.raises(ValueError, match="100 processors"):
        split(100, 8, 8, 768)


def test_memory_that_does_not_suffice_is_told_by_how_much():
    model, system = read(Model, "gpt-530b"), read(System, "a100-200g")
    plan = split(2240, 8, 35, 2240, 3)
    need = sum(memory(model, plan).values()) / 2**30
    with pytest.raises(ValueError, match=rf"{need:.1f} GiB a processor, {need - 80:.1f} more than the 80"):
        simulate(model, system, plan, calibration=PLAIN)
    simulate(model, system, replace(plan, activation_recompute="attn_only"), calibration=PLAIN)
