"""What holds for every weight method: sizes are real, folders load as what they were saved as."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM

from broadsheet.methods.weights.base import shapes, size
from broadsheet.methods.weights.quantiser import save
from broadsheet.methods.weights.rtn import RTN


def test_sizes_are_those_of_the_tensors():
    model = tiny("gqa").bfloat16()
    before = size(model)
    assert before.bits == 16
    assert before.bytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    RTN(bits=4, group_size=32).compress(model)
    after = size(model)
    assert after.bits == 5
    assert before.bytes - after.bytes == after.weights * 11 / 8
    assert after.weights == before.weights == sum(rows * columns for rows, columns in shapes(model))


@pytest.mark.parametrize("bits", [2.25, 3.25, 4.25, 8.25])
def test_a_budget_is_met_by_what_is_stored(bits):
    model = tiny("gqa", hidden_size=128, intermediate_size=256).bfloat16()
    method = RTN().at_budget(bits, shapes(model))
    predicted = method.stored_bits(shapes(model))
    method.compress(model)
    assert size(model).bits == pytest.approx(predicted)
    assert predicted <= bits


def test_a_folder_loads_in_a_new_process_as_what_was_saved(tmp_path):
    tiny("gqa").save_pretrained(tmp_path / "original")  # .bfloat16() would round the rotary frequencies too
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    model, ids = RTN(bits=3, group_size=32).compress(original), random_ids(2, 9)
    save(model, tmp_path / "small")
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    code = (
        "import broadsheet, torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/small')\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "assert torch.equal(model(ids).logits, torch.load(sys.argv[1] + '/logits.pt', weights_only=True))\n"
        "model.generate(ids, max_new_tokens=3, do_sample=False)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ids.tolist()), str(torch.get_num_threads())], check=True)


def test_packed_tensors_keep_their_dtypes_when_a_folder_is_loaded_in_another(tmp_path):
    model, ids = RTN(bits=4, group_size=32).compress(tiny("gqa").bfloat16()), random_ids(2, 9)
    save(model, tmp_path / "small")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    layer = wide.model.layers[0].mlp.up_proj
    assert layer.scale.dtype == torch.float16
    assert torch.equal(layer.codes, model.model.layers[0].mlp.up_proj.codes)
    assert wide(ids).logits.dtype == torch.float32
    save(wide, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, wide(ids).logits)


def test_biases_survive(tmp_path):
    model, ids = RTN(bits=8, group_size=32).compress(tiny("qwen2")), random_ids(2, 9)
    save(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[0].self_attn.q_proj.bias is not None


@pytest.mark.parametrize("kind", ["gqa", "qwen3", "neox", "opt"])
def test_every_family_round_trips(kind, tmp_path):
    model, ids = RTN(bits=4, group_size=16).compress(tiny(kind)), random_ids(2, 9)
    save(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "kind", ["os:system", "broadsheet.methods.weights.base:size", "broadsheet.methods.weights.none:None", "torch.nn:Linear"]
)
def test_a_config_cannot_name_just_anything(kind, tmp_path):
    save(RTN(bits=4, group_size=32).compress(tiny("gqa")), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"][0]["kind"] = kind
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no packed module"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_what_cannot_be_compressed_is_refused_with_a_reason():
    model = tiny("gqa")
    RTN(group_size=32).compress(model)
    with pytest.raises(ValueError, match="compressed already"):
        RTN().compress(model)
    broken = tiny("gqa")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has weights that are inf or nan"):
        RTN().compress(broken)
    shared = tiny("gqa")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares its weight"):
        RTN().compress(shared)


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model, ids = RTN(bits=4, group_size=32).compress(tiny("gqa")), random_ids(2, 9)
    save(model, tmp_path / "small")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ValueError, match="No space left on device; free space"):
        save(model, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_importing_broadsheet_alone_imports_no_torch():
    code = "import broadsheet, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module", ["core.models.walker", "core.models", "methods.weights.base", "methods.weights.quantiser"]
)
def test_any_module_can_be_imported_first(module):
    """Registration waits for transformers, which the module may be the first to import."""
    code = f"import broadsheet.{module}, transformers; transformers.PreTrainedModel"
    subprocess.run([sys.executable, "-c", code], check=True)
