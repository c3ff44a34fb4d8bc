"""Training a pocket: batches are functions of the seed, runs go on where they stopped, the loss falls."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from broadsheet.core.microworld.encoding import encode_session
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.microworld.tokenizer import train_tokenizer
from broadsheet.core.microworld.train import (
    IGNORE,
    RECIPES,
    Recipe,
    Stage,
    make_batch,
    train,
)
from broadsheet.core.models import load

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
        Stage("short", 6, 512, 64, 96, focus=True, rates=(1.0, 0.0)),
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
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)
    assert bool((one.labels != IGNORE).any(1).all())  # every sequence teaches something


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tokens", [256, 4_600])
@torch.no_grad()
def test_the_first_heads_look_one_and_two_tokens_back(tokens, trained, tokenizer):
    torch.manual_seed(0)
    model = load("pocket-2m")[0] if trained else replace(RECIPES["pocket-2m"], layers=1).model(tokenizer)
    ids = torch.tensor([[random.Random(0).randrange(5, 2048) for _ in range(tokens)]])
    cache = model(ids[:, :-1], logits_to_keep=1).past_key_values
    model.set_attn_implementation("eager")
    last = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions[0][0, :, 0]
    assert last[0, -2].item() > 0.95
    assert last[1, -3].item() > 0.95


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
