"""Commands that make, keep and look into compressed models."""

from __future__ import annotations

import json

import pytest
import torch
from command import broadsheet
from transformers import AutoModelForCausalLM, AutoTokenizer

from broadsheet.core.models import load

SMALL = (
    "-o",
    "sessions=1",
    "-o",
    "turns=1",
    "-o",
    'tasks=["kv"]',
    "-o",
    "samples=8",
    "-o",
    "tokens=48",
    "-o",
    "timing=false",
)
IDS = torch.arange(12).unsqueeze(0)


@pytest.fixture(scope="module")
def stacked(folder, tmp_path_factory):
    """What ``run bitstack`` keeps."""
    path = str(tmp_path_factory.mktemp("kept") / "model")
    done = broadsheet(
        "run", "bitstack", "--model", folder, "-o", "n_iter=3", "-o", "k=2", "-o", "sort=error", *SMALL, "--out", path
    )
    assert f"wrote {path}" in done.stdout
    return path


@pytest.mark.parametrize("method", ["rtn", "gptq", "olive", "dfloat11"])
def test_what_run_keeps_loads_and_answers(method, folder, tmp_path):
    out = tmp_path / "kept"
    done = broadsheet("run", method, "--model", folder, *SMALL, "--out", str(out), "--json", str(tmp_path / "records.json"))
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    kept = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(kept(IDS).logits).all()
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(folder))
    records = json.loads((tmp_path / "records.json").read_text())
    held = next(r["value"] for r in records if r["method"] == method and r["metric"] == "disk_bytes")
    plain = next(r["value"] for r in records if r["method"] == "bf16" and r["metric"] == "disk_bytes")
    assert held < plain


def test_a_size_is_met_and_an_impossible_one_says_the_least(folder, tmp_path):
    plain = load(folder, dtype=torch.bfloat16)[0].get_memory_footprint()
    room = int(0.8 * plain)
    done = broadsheet("run", "rtn", "--model", folder, *SMALL, "-o", f"size={room}", "--json", "-")
    held = [r["value"] for r in json.loads(done.stdout) if r["method"] == "rtn" and r["metric"] == "held_bytes"]
    assert 0.7 * room < held[0] <= room
    done = broadsheet("run", "rtn", "--model", folder, *SMALL, "-o", "size=1kB", check=False)
    assert done.returncode == 2
    assert "size must be at least" in done.stderr


def test_a_folder_of_something_else_is_not_overwritten(folder, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    done = broadsheet("run", "rtn", "--model", folder, *SMALL, "--out", str(tmp_path), check=False)
    assert done.returncode == 2
    assert "holds files that are no model" in done.stderr
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "rtn", "-o", "size=lots"), "size is bytes, such as 120MB"),
        (("run", "rtn", "-o", "size=-3MB"), "size is bytes, such as 120MB"),
        (("run", "snapkv", "--out", "x"), "--out is for methods that make something to keep"),
        (("bitstack", "sizes", "."), "holds no bitstack.safetensors"),
        (("dfloat11", "inspect", "no-such-folder"), "no-such-folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, folder):
    arguments = (*arguments, "--model", folder) if arguments[0] == "run" else arguments
    done = broadsheet(*arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1


def test_a_stack_is_listed_and_resized(stacked):
    listed = broadsheet("bitstack", "sizes", stacked, "--every", "1").stdout.splitlines()
    least, most = (float(listed[i].split()[0]) for i in (1, -1))
    assert least < most
    before = AutoModelForCausalLM.from_pretrained(stacked).get_memory_footprint()
    broadsheet("bitstack", "resize", stacked, "--max-memory-mb", str((least + most) / 2 * 1e6 / 2**20))
    after = AutoModelForCausalLM.from_pretrained(stacked).get_memory_footprint()
    assert after < before
    assert after <= (least + most) / 2 * 1e6
    broadsheet("bitstack", "resize", stacked, "--max-memory-mb", "1000")
    assert AutoModelForCausalLM.from_pretrained(stacked).get_memory_footprint() == before


def test_dfloat11_folders_are_inspected_and_verified(folder, tmp_path):
    plain, small = tmp_path / "plain", tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(folder).save_pretrained(plain)
    assert "would hold" in broadsheet("dfloat11", "inspect", str(plain)).stdout
    broadsheet("run", "dfloat11", "--model", str(plain), *SMALL, "--out", str(small))
    assert "holds" in broadsheet("dfloat11", "inspect", str(small)).stdout
    assert (
        "equal to the original bit by bit" in broadsheet("dfloat11", "verify", str(small), "--original", str(plain)).stdout
    )


def test_an_emulator_goes_out_and_its_adapters_come_back(folder, tmp_path):
    from broadsheet.methods.weights.crash import extract_adapters, load_emulator

    out = broadsheet(
        "crash", "emulate", "--model", folder, "--keep", "2", "--adapters", "1", "--samples", "8", "--tokens", "32",
        "--out", str(tmp_path / "out"),
    ).stdout  # fmt: skip
    assert "kept" in out
    assert "tuned" in out
    file = extract_adapters(load_emulator(tmp_path / "out"), tmp_path / "adapters.safetensors")
    broadsheet("crash", "plug-in", str(file), "--model", folder, "--out", str(tmp_path / "full"))
    tuned, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "full", folder))
    assert torch.equal(tuned(IDS).logits, plain(IDS).logits)  # nothing was tuned
    done = broadsheet("crash", "plug-in", str(file), "--model", "pocket-2m", "--out", str(tmp_path / "x"), check=False)
    assert done.returncode == 2
    assert "another model" in done.stderr
    assert "broadsheet crash --help" in broadsheet("run", "crash", "--model", folder, check=False).stderr
