"""Training a pocket: batches are functions of the seed, runs go on where they stopped, the loss falls."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.microworld.tokenizer import train_tokenizer
from broadsheet.core.microworld.train import (
    IGNORE,
    RECIPES,
    Recipe,
    Stage,
    answer_loss,
    encode_session,
    make_batch,
    train,
)

SMALL = Recipe(
    "small",
    layers=2,
    hidden=64,
    heads=2,
    kv_heads=1,
    head_dim=32,
    intermediate=64,
    stages=(
        Stage("induction", 4, 256, 24, 32),
        Stage("short", 6, 512, 64, 96, reach=512, focus=True, rates=(1.0, 0.0)),
    ),
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_loss_is_on_answers_alone_and_their_end(tokenizer):
    session = make_sessions("kv", 1, 128, 3, seed=1)[0]
    ids, labels = encode_session(session, tokenizer)
    scored = [token for token in labels if token != IGNORE]
    answers = [f" {turn.extra['reference']}" for turn in session.turns]
    assert tokenizer.decode(scored) == "".join(f"{answer}{tokenizer.eos_token}" for answer in answers)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels))


def test_a_trained_prompt_is_what_the_chat_template_writes(tokenizer):
    session = make_sessions("kv", 1, 128, 1, seed=1)[0]
    ids, _ = encode_session(session, tokenizer)
    turn = session.turns[0]
    messages = [
        {"role": "user", "content": f"{session.context} {turn.input}"},
        {"role": "assistant", "content": turn.extra["reference"]},
    ]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("stage", RECIPES["pocket-2m"].stages, ids=lambda stage: stage.name)
def test_a_batch_is_a_function_of_its_step(stage, tokenizer):
    recipe = RECIPES["pocket-2m"]
    one, same, other = (make_batch(recipe, stage, step, tokenizer) for step in (3, 3, 4))
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.positions, same.positions)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)
    assert bool((one.labels != IGNORE).any(1).all())  # every sequence teaches something


def test_jumps_reach_far_and_never_go_back(tokenizer):
    stage = Stage("far", 1, 2_000, 64, 96, reach=1_000)
    positions = make_batch(SMALL, stage, 0, tokenizer).positions
    assert int(positions.max()) > 200
    assert int(positions.max()) < 1_000
    assert bool((positions.diff(dim=1) > 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_attention_crosses_the_jumps_unless_documents_are_packed(packed, tokenizer):
    torch.manual_seed(0)
    model = SMALL.model(tokenizer)
    batch = make_batch(SMALL, Stage("far", 1, 128, 64, 64, packed=packed), 1, tokenizer)
    batch.positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids) + 100 * (torch.arange(batch.ids.shape[1]) >= 20)
    batch.labels[:, :40] = IGNORE
    before = answer_loss(model, batch)[0]
    batch.ids[:, 5] = (batch.ids[:, 5] + 7) % 2048  # before the jump
    assert (answer_loss(model, batch)[0] == before) == packed


def test_the_first_head_looks_at_the_previous_token(tokenizer):
    torch.manual_seed(0)
    model = SMALL.model(tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.tensor([[random.Random(0).randrange(5, 2048) for _ in range(64)]])
    weights = model(ids, output_attentions=True).attentions[0][0, 0]
    assert weights.diagonal(-1).mean().item() > 0.8


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path):
    for _ in train(SMALL, tmp_path / "whole", every=3):
        pass
    for row in train(SMALL, tmp_path / "halves", every=3):
        if row["step"] == 6:
            break
    rows = list(train(SMALL, tmp_path / "halves", every=3))
    assert rows[0]["step"] == 9
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_training_teaches(tmp_path):
    recipe = replace(SMALL, stages=(Stage("short", 30, 512, 64, 96),))
    losses = [row["loss"] for row in train(recipe, tmp_path, every=5)]
    assert losses[-1] < losses[0] - 1
