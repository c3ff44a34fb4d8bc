"""The levers as modules: parallel block, sliding window, LAMB."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from broadsheet.methods.estimates.megascale.model import Corpus, Lamb, TinyModel


def test_the_parallel_block_is_one_norm_and_two_branches():
    torch.manual_seed(0)
    model = TinyModel(parallel_block=True, dropout=0.0).build().eval()
    layer = model.model.layers[0]
    x = torch.randn(2, 8, 64)
    place = model.model.rotary_emb(x, torch.arange(8)[None])
    normed = layer.input_layernorm(x)
    expected = x + layer.mlp(normed) + layer.self_attn(normed, place, None)[0]
    assert torch.allclose(layer(x, position_embeddings=place, attention_mask=None), expected)
    assert not hasattr(layer, "post_attention_layernorm")


def test_the_mask_is_causal_and_as_wide_as_the_window():
    seen = TinyModel(tokens=6, window=3).mask()[0, 0] == 0
    assert seen.sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    assert not torch.triu(seen, 1).any()
    assert (TinyModel(tokens=6).mask()[0, 0] == 0).sum(1).tolist() == [1, 2, 3, 4, 5, 6]


def test_a_window_hides_what_is_far_away():
    torch.manual_seed(0)
    shape = TinyModel(layers=1, window=4, dropout=0.0)
    model, mask = shape.build().eval(), shape.mask()
    batch = Corpus(shape.vocabulary, shape.tokens).batch(0, 0, 1)
    changed = batch.clone()
    changed[0, 3] = (changed[0, 3] + 1) % shape.vocabulary
    with torch.no_grad():
        a, b = (model(input_ids=one, attention_mask=mask).logits[0] for one in (batch, changed))
    moved = (a - b).abs().amax(1) > 1e-6
    assert moved[3:7].all()
    assert not moved[7:].any()
    assert not moved[:3].any()


def test_lamb_is_its_definition():
    torch.manual_seed(1)
    weight = torch.randn(4, 3)
    gradients = [torch.randn(4, 3) for _ in range(3)]
    parameter = weight.clone().requires_grad_()
    optimizer = Lamb([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.02)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    w, m, v = weight.double().numpy(), np.zeros((4, 3)), np.zeros((4, 3))
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        d = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6) + 0.02 * w
        w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(d) * d
    np.testing.assert_allclose(parameter.detach().numpy(), w, rtol=1e-5)


def test_lamb_moves_a_zero_tensor():
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = Lamb([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert (parameter < 0).all()  # the trust ratio is 1 there, not 0


@pytest.mark.parametrize(
    ("shape", "optimizer"), [(TinyModel(), "adamw"), (TinyModel(parallel_block=True, window=8), "lamb")]
)
def test_all_variants_learn(shape, optimizer):
    torch.manual_seed(0)
    model, mask, corpus = shape.build(), shape.mask(), Corpus(shape.vocabulary, shape.tokens)
    make = torch.optim.AdamW(model.parameters(), 3e-3) if optimizer == "adamw" else Lamb(model.parameters(), 2e-2)
    losses = []
    for step in range(30):
        loss = shape.loss(model, corpus.batch(step, 0, 4), mask)
        loss.backward()
        make.step()
        make.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < losses[0] - 0.7


def test_batches_depend_on_step_and_rank_alone():
    corpus = Corpus(64, 16)
    assert torch.equal(corpus.batch(3, 1, 4), Corpus(64, 16).batch(3, 1, 4))
    assert not torch.equal(corpus.batch(3, 1, 4), corpus.batch(3, 2, 4))
    assert not torch.equal(corpus.batch(3, 1, 4), corpus.batch(4, 1, 4))
    follows = {(a, b) for row in corpus.batch(0, 0, 200).tolist() for a, b in pairwise(row)}
    assert all(b in corpus.next[a].tolist() for a, b in follows)


def test_bad_shapes():
    for wrong, message in (({"heads": 5}, "divisible"), ({"window": 99}, "window"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(ValueError, match=message):
            TinyModel(**wrong)
    with pytest.raises(ValueError, match="vocabulary"):
        Corpus(5, 8)
    with pytest.raises(ValueError, match="lr"):
        Lamb([torch.zeros(1, requires_grad=True)], lr=0)
