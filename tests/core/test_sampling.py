"""Paired sampling: from the model's distribution, the same for a model whatever stands beside it in the batch."""

import torch

from broadsheet.core.microworld.code import make_tasks
from broadsheet.core.models import load
from broadsheet.core.sampling import Noise, sample


def prompts(count):
    return [(task.name, task.prompt) for task in make_tasks(count)]


def test_greedy_is_what_transformers_generates():
    model, tokenizer = load("pocket-code")
    asked = prompts(3)
    ours = sample(model, tokenizer, asked, 1, 0.0, 40)
    for (_, prompt), (text,) in zip(asked, ours, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        theirs = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(theirs, skip_special_tokens=True)


def test_samples_do_not_depend_on_the_batch_but_on_the_seed():
    model, tokenizer = load("pocket-code")
    asked = prompts(4)
    together = sample(model, tokenizer, asked, 3, 1.0, 24, seed=5)
    alone = [sample(model, tokenizer, [one], 3, 1.0, 24, seed=5)[0] for one in asked]
    assert together == alone
    assert together != sample(model, tokenizer, asked, 3, 1.0, 24, seed=6)
    assert any(len(set(texts)) > 1 for texts in together)


def test_noise_draws_from_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = Noise("key", 20_000)
    drawn = (logits + noise.next(3)).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares, logits.softmax(-1), atol=0.015)
    assert not torch.equal(drawn, (logits + noise.next(3)).argmax(-1))


def test_stops_and_ends_cut():
    model, tokenizer = load("pocket-code")
    asked = prompts(2)
    whole = sample(model, tokenizer, asked, 2, 0.0, 200)
    cut = sample(model, tokenizer, asked, 2, 0.0, 200, stops=[("turn", "\n"), ()])
    assert cut[0] == [text.partition("turn")[0] for text in whole[0]]
    assert cut[1] == whole[1]
    assert not any("<|" in text for texts in whole for text in texts)
