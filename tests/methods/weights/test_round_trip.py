"""What holds for the saved folder of every method.

A new process loads it and generates what the process that compressed did; a damaged one is an error or another model,
never a crash; models that cannot be compressed are refused.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.bench import methods
from broadsheet.methods.weights.quantiser import save

#: what a stranger writes: no word of how the model was made
STRANGER = """
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import broadsheet

torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.arange(2, 18)[None]
    with torch.inference_mode():
        found[f"{folder.name}.logits"] = model(ids).logits.float()
        found[f"{folder.name}.tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
save_file(found, sys.argv[1])
"""
#: less work for those that train
QUICK = {
    "aqlm": {"max_epochs": 1, "init_max_iter": 5, "finetune_max_epochs": 1},
    "bitstack": {"n_iter": 2, "sort": "error"},
    "accllm": {"epochs": 1},
}


def original(folder: Path) -> PreTrainedModel:
    """A tiny model in bfloat16, from a folder: casting one in memory would round the rotary frequencies too."""
    if not folder.exists():
        tiny("gqa", hidden_size=128, intermediate_size=256, num_hidden_layers=2).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What every method's model gives here, and what it gives in another process."""
    folder = tmp_path_factory.mktemp("round-trip")
    here, sizes = {}, {}
    ids = torch.arange(2, 18)[None]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, method in methods().items():
            small = replace(method, **QUICK.get(name, {})).compress(original(folder / "original"), random_ids(8, 32))
            with torch.inference_mode():
                here[f"{name}.logits"] = small(ids).logits.float()
                here[f"{name}.tokens"] = small.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
            save(small, folder / "saved" / name)
            again = AutoModelForCausalLM.from_pretrained(folder / "saved" / name, dtype="auto")
            again(ids)  # DFloat11 makes the room that it decodes into when it is needed
            sizes[name] = (size(small), size(again))
    finally:
        torch.set_num_threads(threads)
    saved = sorted(map(str, (folder / "saved").iterdir()))
    subprocess.run([sys.executable, "-c", STRANGER, str(folder / "there"), *saved], check=True, timeout=240)
    return here, load_file(folder / "there"), sizes, folder / "saved"


@pytest.mark.parametrize("name", list(methods()))
def test_a_stranger_generates_what_the_compressor_did(strangers, name):
    here, there, sizes, _ = strangers
    assert torch.equal(here[f"{name}.logits"], there[f"{name}.logits"])
    assert torch.equal(here[f"{name}.tokens"], there[f"{name}.tokens"])
    assert sizes[name][0] == sizes[name][1]


#: flips a bit of a file of each folder, loads it and computes, so many times; then changes the fields of its config
VANDAL = """
import json, random, shutil, sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import broadsheet

torch.set_num_threads(1)
disable_progress_bar()
set_verbosity_error()
draw, copy, times = random.Random(0), Path(sys.argv[1]), int(sys.argv[2])


def attempt():
    try:
        with torch.inference_mode():
            AutoModelForCausalLM.from_pretrained(copy, dtype="auto")(torch.arange(2, 10)[None])
    except Exception as error:
        return str(error) or repr(error)
    return ""


errors = 0
for folder in map(Path, sys.argv[3:]):
    files = [file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin")]
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for _ in range(times):
        file = copy / draw.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        header = min(len(whole), 2000)  # where shapes and fields are: as likely to be hit as all the rest
        damaged[draw.randrange(draw.choice((header, len(whole))))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged[: draw.choice((None, None, None, len(whole) // 2))])
        errors += bool(attempt())
        file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for entry in config.get("quantization_config", {}).get("modules", [])[:1]:
        for name, value in list(entry["plain"].items()):
            for other in (0, 2 * value, value + 1, 10**9) if type(value) is int else ():
                entry["plain"][name] = other
                (copy / "config.json").write_text(json.dumps(config))
                found_out = attempt()
                if name in ("in_features", "out_features", "bits", "group_size", "nbits", "n", "m", "rank"):
                    assert found_out, (folder.name, name, value, other)
            entry["plain"][name] = value
    shutil.rmtree(copy)
print(errors)
"""


@pytest.mark.parametrize("flips", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_flipped_bits_are_errors_or_other_models(strangers, tmp_path, flips):
    """In a process of its own, so that a crash would be seen. Fields that say how long tensors are must be found out."""
    folders = sorted(map(str, strangers[3].iterdir()))
    times = -(-flips // len(folders))
    run = [sys.executable, "-c", VANDAL, str(tmp_path / "copy"), str(times), *folders]
    result = subprocess.run(run, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    errors = int(result.stdout.split()[-1])
    assert times < errors < times * len(folders)  # neither all nor none


@pytest.mark.parametrize("name", [name for name in methods() if name != "bf16"])
def test_models_that_cannot_be_compressed_are_refused(name):
    method, ids = methods()[name], random_ids(8, 32)

    def refused(model: PreTrainedModel, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            method.compress(model, ids)

    def model() -> PreTrainedModel:
        return tiny("gqa", hidden_size=128, intermediate_size=256, num_hidden_layers=2).bfloat16()

    for value in (float("nan"), float("inf")):
        broken = model()
        with torch.no_grad():
            broken.model.layers[1].mlp.up_proj.weight[3, 5] = value
        refused(broken, r"layers\.1\.mlp\.up_proj has weights that are inf or nan")
    tied = model()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    refused(tied, "shares its weight with")
    codes = model()
    codes.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(256, 128, dtype=torch.int8), requires_grad=False)
    refused(codes, "holds torch.int8 codes, not weights")
    refused(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4)), "has no nn.Linear in its decoder blocks")
