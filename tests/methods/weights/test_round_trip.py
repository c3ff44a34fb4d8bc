"""Compress, save, load in a new process, generate: the same numbers as in the process that compressed, for every method."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

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
    return here, load_file(folder / "there"), sizes


@pytest.mark.parametrize("name", list(methods()))
def test_a_stranger_generates_what_the_compressor_did(strangers, name):
    here, there, sizes = strangers
    assert torch.equal(here[f"{name}.logits"], there[f"{name}.logits"])
    assert torch.equal(here[f"{name}.tokens"], there[f"{name}.tokens"])
    assert sizes[name][0] == sizes[name][1]
