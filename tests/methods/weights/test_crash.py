"""CRaSh: likeness of layers, emulators with shared layers, the adapters' round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM

from broadsheet.core.models import fingerprint
from broadsheet.core.models.walker import decoder_blocks
from broadsheet.methods.weights.crash import (
    POOLINGS,
    CRaSh,
    EmulatorPlan,
    adapter_tensors,
    barrier,
    cka,
    clusters,
    extract_adapters,
    interpolate,
    load_emulator,
    plug_in,
    representations,
)
from broadsheet.methods.weights.crash.layers import centres, dropped_in_turn, pool

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "crash_official.safetensors")
KINDS = ("gqa", "qwen2", "qwen3", "neox", "opt")


def deep(kind: str = "gqa", layers: int = 8, seed: int = 0):
    return tiny(kind, seed, num_hidden_layers=layers)


def plan_of(model, kept=(0, 2, 5, 7), adapters=(0, 7), **fields) -> EmulatorPlan:
    return EmulatorPlan(len(decoder_blocks(model)), kept, adapters, fingerprint(model), **fields)


# --- likeness and clusters ------------------------------------------------------------------------------------------------


def test_acceptance_1_cka_is_what_it_should_be():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 7, generator=draw), torch.randn(40, 11, generator=draw)
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12)
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    rotation, _ = torch.linalg.qr(torch.randn(11, 11, generator=draw, dtype=torch.float64))
    assert cka(x, (y.double() @ rotation) * 3.7 + 5) == pytest.approx(cka(x, y), abs=1e-12)
    a, b = x.double().numpy(), y.double().numpy()
    centre = np.eye(40) - np.ones((40, 40)) / 40
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    assert cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()), abs=1e-6)
    with pytest.raises(ValueError, match="same representation"):
        cka(torch.ones(4, 3), x[:4])


def merged(similarities: list[float], count: int) -> list[list[int]]:
    """The procedure of the paper, step by step."""
    groups = [[layer] for layer in range(len(similarities) + 1)]
    while len(groups) > count:
        best = max(range(len(groups) - 1), key=lambda i: similarities[groups[i][-1]])
        groups[best : best + 2] = [groups[best] + groups[best + 1]]
    return groups


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([i / 8 for i in range(9)]), min_size=1, max_size=30), st.data())
def test_acceptance_2_merging_is_cutting_at_the_smallest(similarities, data):
    """Few different values, so that ties are common."""
    count = data.draw(st.integers(1, len(similarities) + 1))
    assert clusters(similarities, count) == merged(similarities, count)


def test_likeness_clusters_and_centres_are_the_official_ones():
    hidden, mask = GOLDEN["hidden"], GOLDEN["mask"]
    for pooling in POOLINGS:
        pooled = torch.stack([pool(layer, mask, pooling) for layer in hidden])
        assert torch.allclose(pooled, GOLDEN[f"pooled.{pooling}"], rtol=1e-5, atol=1e-6), pooling
    pooled = GOLDEN["pooled.mean_weighted"]
    found = torch.tensor([[cka(a, b) for b in pooled] for a in pooled])
    assert torch.allclose(found, GOLDEN["cka"], atol=1e-5)
    similarities = [float(found[i, i + 1]) for i in range(8)]
    for count in range(2, 9):
        groups = clusters(similarities, count)
        assert [group[0] for group in groups] == GOLDEN[f"first_of_clusters.{count}"].tolist()
        assert centres(groups) == GOLDEN[f"centres.{count}"].tolist()


@pytest.mark.parametrize("name", ["opt-1.3b", "deep"])
@pytest.mark.parametrize("share", ["nearest", "nearest_frozen"])
def test_acceptance_4_places_are_the_official_ones(name, share):
    kept, adapters = (tuple(GOLDEN[f"map.{name}.{part}"].tolist()) for part in ("kept", "adapters"))
    wanted = GOLDEN[f"map.{name}.{share}"].tolist()
    assert list(EmulatorPlan(len(wanted), kept, adapters, "", share=share).layer_map) == wanted


def test_acceptance_4_places_by_hand():
    """24 layers, kept 0 1 2 3 5 9 12 15 18 20 22 23: layer 4 lies between 3 and 5 (right), 7 between 5 and 9 (right)."""
    plan = EmulatorPlan(24, (0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23), (0, 5, 18, 23), "")
    assert plan.layer_map == (0, 1, 2, 3, 5, 5, 5, 9, 9, 9, 9, 12, 12, 12, 15, 15, 15, 18, 18, 20, 20, 22, 22, 23)
    frozen = EmulatorPlan(24, plan.kept, plan.adapters, "", share="nearest_frozen")
    assert frozen.layer_map == (0, 1, 2, 3, 3, 5, 9, 9, 9, 9, 9, 12, 12, 12, 15, 15, 15, 15, 18, 20, 20, 22, 22, 23)
    ends = EmulatorPlan(6, (2, 3), (2,), "")  # the search ends at both ends of the model
    assert ends.layer_map == (2, 2, 2, 3, 3, 3)


def test_representations_are_the_blocks_own_outputs_and_leave_out_padding():
    model, ids = deep(), random_ids(5, 9)
    found = representations(model, ids, pooling="mean_all")
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(found[:-1], torch.stack(states[1:-1]).mean(2), atol=1e-5)
    assert not torch.allclose(found[-1], states[-1].mean(1), atol=1e-2)  # that one is behind the final norm
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    short = representations(model, ids[:, :6])
    assert torch.allclose(representations(model, ids, mask), short, atol=1e-4)
    left = torch.cat([torch.zeros(5, 3, dtype=torch.long), ids[:, :6]], 1)
    padded = pool(
        torch.cat([torch.zeros(5, 3, 4), torch.ones(5, 6, 4)], 1), (left > 0).long() | (torch.arange(9) > 2), "mean"
    )
    assert torch.equal(padded, torch.ones(5, 4))
    single = representations(model, ids[:1], pooling="last")
    assert single.shape == (8, 1, 64)


def test_padding_on_the_left_does_not_change_the_pooling():
    hidden, mask = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.long)
    shifted, moved = (
        torch.cat([torch.full((2, 4, 3), 7.0), hidden], 1),
        torch.cat([torch.zeros(2, 4, dtype=torch.long), mask], 1),
    )
    for pooling in ("mean_weighted", "mean", "max_nonpad", "last"):
        assert torch.allclose(pool(shifted, moved, pooling), pool(hidden, mask, pooling), atol=1e-6), pooling


def test_dropping_takes_the_right_one_of_the_most_alike():
    rounds = iter([[0.1, 0.9, 0.2, 0.3], [0.1, 0.2, 0.8]])
    assert dropped_in_turn(5, 3, lambda kept: next(rounds)) == [0, 1, 3]


# --- emulators ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_acceptance_3_an_emulator_of_all_layers_is_the_model(kind, tmp_path):
    model, ids = deep(kind, 4), random_ids(2, 11)
    plan = plan_of(model, (0, 1, 2, 3), (0, 3))
    emulator = plan.materialize(model)
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(emulator(ids).logits, wanted)
        file = extract_adapters(emulator, tmp_path / "adapters.safetensors")
        assert torch.equal(plug_in(model, file)(ids).logits, wanted)


def test_acceptance_4_shared_layers_take_no_memory():
    model = deep(layers=24)
    kept = (0, 1, 2, 3, 5, 9, 12, 15, 18, 20, 22, 23)
    plan = plan_of(model, kept, (0, 5, 18, 23))
    block = sum(p.numel() for p in decoder_blocks(model)["model.layers.0"].parameters())
    rest = sum(p.numel() for p in model.parameters()) - 24 * block
    compact, emulator = plan.compact(model), plan.materialize(model)
    assert sum(p.numel() for p in compact.parameters()) == 12 * block + rest
    copied = {layer for index, layer in enumerate(plan.layer_map) if layer in plan.adapters and index != layer}
    assert copied == {5, 18}
    assert sum(p.numel() for p in emulator.parameters()) == (12 + len(copied)) * block + rest
    assert sum(p.numel() for p in emulator.parameters() if p.requires_grad) == 4 * block
    assert [module.self_attn.layer_idx for module in decoder_blocks(emulator).values()] == list(range(24))
    assert [module.self_attn.layer_idx for module in decoder_blocks(model).values()] == list(range(24))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["nearest", "none"])
def test_an_emulator_computes_with_the_layers_of_its_map(kind, share):
    model, ids = deep(kind), random_ids(2, 9)
    emulator = plan_of(model, share=share).materialize(model)
    blocks = decoder_blocks(model)
    name = next(iter(blocks)).rpartition(".")[0]
    by_hand = torch.nn.ModuleList([list(blocks.values())[layer] for layer in emulator.crash_plan.layer_map])
    with torch.no_grad():
        ours = emulator(ids, use_cache=False).logits
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, by_hand)
        model.config.num_hidden_layers = len(by_hand)
        assert torch.equal(ours, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["nearest", "nearest_frozen", "none"])
def test_acceptance_6_generation_is_the_same_with_and_without_cache(kind, share):
    model, ids = deep(kind), random_ids(2, 9)
    emulator = plan_of(model, share=share).materialize(model)
    with_cache, without = (
        emulator.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


def train(emulator, ids, steps=3):
    emulator.train()
    optimiser = torch.optim.AdamW([p for p in emulator.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        emulator(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return emulator.eval()


@pytest.mark.parametrize("share", ["nearest", "none"])
def test_acceptance_5_training_changes_adapters_alone(share):
    model, ids = deep("opt"), random_ids(4, 9)  # OPT has dropout
    emulator = plan_of(model, adapters=(0, 5), share=share).materialize(model)
    before = {name: tensor.clone() for name, tensor in emulator.state_dict().items()}
    frozen = [module for block in decoder_blocks(emulator).values() for module in block.modules()]
    train(emulator, ids).train()
    places = {emulator.crash_plan.place(layer) for layer in (0, 5)}
    assert {m.training for m in frozen} == {True, False}
    for name, tensor in emulator.state_dict().items():
        inside = any(f"layers.{place}." in name for place in places)
        assert torch.equal(tensor, before[name]) != inside or "k_proj.bias" in name, name  # keys' biases have no gradient
    for place, block in enumerate(decoder_blocks(emulator).values()):
        assert all(m.training == (place in places) for m in block.modules())


def test_the_round_trip_of_owner_and_client(tmp_path):
    """The client has the folder alone; what it tuned gives, in the full model, what its tensors say."""
    owner, ids = deep(), random_ids(4, 12)
    owner.save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    plan = CRaSh(n_keep=5, n_adapters=2).plan(model, random_ids(16, 8))
    plan.save(model, tmp_path / "out")
    sent = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    full = sum(file.stat().st_size for file in (tmp_path / "full").glob("*.safetensors"))
    assert sent < 0.8 * full
    assert json.loads((tmp_path / "out" / "crash.json").read_text())["kept"] == list(plan.kept)
    client = f"""
import torch, sys
sys.path[:0] = {[str(Path(__file__).parents[2]), *sys.path]!r}
from tiny import random_ids
from test_crash import train
from broadsheet.methods.weights.crash import extract_adapters, load_emulator
emulator = train(load_emulator({str(tmp_path / "out")!r}), random_ids(4, 12))
extract_adapters(emulator, {str(tmp_path / "adapters.safetensors")!r})
torch.save(emulator(random_ids(4, 12)).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", client], check=True, cwd=Path(__file__).parent, capture_output=True)
    here = load_emulator(tmp_path / "out")
    tuned = load_file(tmp_path / "adapters.safetensors")
    blocks = list(decoder_blocks(here).values())
    with torch.no_grad():
        for name, tensor in tuned.items():
            layer, _, rest = name.partition(".")
            blocks[plan.place(int(layer))].state_dict(keep_vars=True)[rest].copy_(tensor)
        assert torch.equal(here(ids).logits, torch.load(tmp_path / "logits.pt", weights_only=True))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plug_in(model, tmp_path / "adapters.safetensors")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{name}" for name in tuned}
    assert {int(name.split(".")[0]) for name in tuned} == set(plan.adapters)
    assert (tmp_path / "adapters.safetensors").stat().st_size < sent


def test_selections_and_adapters():
    model, ids = deep(), random_ids(16, 8)
    crash = CRaSh(n_keep=4, n_adapters=2).plan(model, ids)
    assert crash.kept == tuple(group[len(group) // 2] for group in crash.clusters)
    assert crash.adapters == (crash.kept[0], crash.kept[-1])
    assert [layer for group in crash.clusters for layer in group] == list(range(8))
    uniform = CRaSh(n_keep=6, n_adapters=4, select="uniform").plan(model)
    assert (uniform.kept, uniform.adapters) == ((0, 1, 2, 5, 6, 7), (0, 1, 6, 7))
    draws = {CRaSh(n_keep=4, n_adapters=2, select="random", seed=seed).plan(model).kept for seed in range(5)}
    assert len(draws) > 1
    assert CRaSh(n_keep=4, n_adapters=2, select="random", seed=3).plan(model).kept in draws
    dropped = CRaSh(n_keep=4, n_adapters=2, select="cka_drop").plan(model, ids)
    assert dropped.kept[0] == 0
    assert len(dropped.kept) == 4
    assert len(decoder_blocks(model)) == 8
    chosen = CRaSh(n_keep=8, n_adapters=4, adapters=(0, 2, 5, 7), select="uniform").plan(model)
    assert chosen.adapters == (0, 2, 5, 7)


def test_the_straight_line_between_two_models():
    a, b, ids = deep(), deep(seed=1), random_ids(1, 5)
    with torch.no_grad():
        logits = {alpha: model(ids).logits for alpha, model in interpolate(a, b, 5)}
        assert list(logits) == [0, 0.25, 0.5, 0.75, 1]
        assert torch.equal(logits[0], a(ids).logits)
        assert torch.allclose(logits[1], b(ids).logits, atol=1e-5)
    assert barrier([1.0, 1.4, 0.9]) == pytest.approx(0.4)
    assert barrier([1.0, 0.7, 0.9]) == 0
    with pytest.raises(ValueError, match="one shape"):
        list(interpolate(a, deep(layers=3)))


# --- bad input ------------------------------------------------------------------------------------------------------------


def test_acceptance_9_adapters_of_another_base_are_refused(tmp_path):
    model = deep()
    file = extract_adapters(plan_of(model).materialize(model), tmp_path / "a.safetensors")
    other = deep(seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match="tuned for another model"):
        plug_in(other, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="made for another model"):
        plan_of(model).materialize(other)


def test_files_that_do_not_fit_are_refused_before_anything_changes(tmp_path):
    model = deep()
    emulator = plan_of(model).materialize(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "broadsheet crash adapters 1", "base": fingerprint(model)}
    good = adapter_tensors(emulator)
    name = next(iter(good))
    file = tmp_path / "x.safetensors"
    for tensors, marks, message in (
        (good, {}, "no file of adapters"),
        ({**good, "99.mlp.up_proj.weight": torch.zeros(1)}, metadata, "which this model has not"),
        ({**good, "__class__": torch.zeros(1)}, metadata, "which this model has not"),
        ({**good, name: good[name][:1].contiguous()}, metadata, "which this model has not"),
        ({key: tensor.bfloat16() for key, tensor in good.items()}, metadata, "cast=True"),
    ):
        save_file(tensors, file, marks)
        with pytest.raises(ValueError, match=message):
            plug_in(model, file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        plug_in(model, file)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    save_file({key: tensor.bfloat16() for key, tensor in good.items()}, file, metadata)
    plug_in(model, file, cast=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: CRaSh(n_keep=9).plan(model, random_ids(4, 4)), "the model has 8 layers"),
        (lambda model: CRaSh(n_keep=4).plan(model), "needs calibration"),
        (lambda model: CRaSh(n_keep=4).plan(model, torch.zeros(0, 4, dtype=torch.long)), "at least one of each"),
        (lambda model: CRaSh(n_keep=4).plan(model, random_ids(4, 4), torch.zeros(4, 4)), "keep a token"),
        (lambda model: CRaSh(n_keep=4, n_adapters=5), "n_adapters"),
        (lambda model: CRaSh(select="best"), "select"),
        (lambda model: CRaSh(pooling="median"), "pooling"),
        (lambda model: CRaSh(n_keep=4, adapters=(3, 99), select="uniform").plan(model), "adapters must be kept layers"),
        (lambda model: plan_of(model, kept=(0, 9), adapters=(0,)), "kept must be"),
        (lambda model: plan_of(model, share="far"), "share"),
        (lambda model: EmulatorPlan.load("no-such-folder"), "cannot be read"),
        (lambda model: extract_adapters(model, "x"), "no emulator"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(deep())
    assert "\n" not in str(caught.value)


def test_folders_that_are_broken_are_refused(tmp_path):
    model = deep()
    plan_of(model).save(model, tmp_path / "out")
    path = tmp_path / "out" / "crash.json"
    plan = json.loads(path.read_text())
    path.write_text(json.dumps({**plan, "kept": [0, 2, 7], "adapters": [0]}))
    with pytest.raises(ValueError, match="holds 4 layers, its plan 3"):
        load_emulator(tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(ValueError, match="no emulator's plan"):
        load_emulator(tmp_path / "out")
