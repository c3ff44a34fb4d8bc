import pytest
import torch
from tiny import random_ids, tiny
from torch import nn

from broadsheet.core.models import folds
from broadsheet.core.models.observers import Gram, Norms, Range
from broadsheet.core.models.walker import Block, Pass, blocks, decoder_blocks, walk

KINDS = ("gqa", "mha", "qwen2", "qwen3", "neox", "opt")


@pytest.mark.parametrize("kind", KINDS)
def test_walking_an_unchanged_model_is_running_it(kind):
    model, ids = tiny(kind), random_ids(5, 12)
    last = [block.run() for block in walk(model, ids, batch=2)][-1]
    inputs = []
    norm = next(m for n, m in model.named_modules() if n.endswith(("model.norm", "final_layer_norm")) and "layers" not in n)
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for first in range(0, 5, 2):
            model(ids[first : first + 2])
    for ours, true in zip(last, inputs, strict=True):
        assert torch.equal(ours, true)


def test_a_block_gets_what_the_changed_blocks_before_it_give():
    model, ids = tiny("gqa"), random_ids(4, 9)
    seen = {}
    for block in walk(model, ids):
        name = next(iter(block.linears))
        block.observe({name: lambda x, index=block.index: seen.setdefault(index, x.clone())})
        if block.index == 0:
            linear = block.linears["model.layers.0.mlp.down_proj"]
            half = nn.Linear(linear.in_features, linear.out_features, bias=False)
            half.weight.data = linear.weight.data / 2
            block.replace("model.layers.0.mlp.down_proj", half)
    true = {}
    q = model.model.layers[1].self_attn.q_proj
    q.register_forward_pre_hook(lambda module, args: true.setdefault(1, args[0]))
    with torch.no_grad():
        model(ids)
    assert torch.equal(seen[1], true[1])


def test_observers_agree_with_the_inputs_they_saw():
    model, ids = tiny("gqa"), random_ids(6, 10)
    block = next(iter(walk(model, ids, batch=4)))
    name = "model.layers.0.mlp.down_proj"
    kept = []
    block.observe({name: kept.append})
    gram, span, norms = Gram(), Range(), Norms()
    for observer in (gram, span, norms):
        block.observe({name: observer})
    x = torch.cat(kept)
    rows = x.flatten(0, 1)
    assert torch.allclose(gram.matrix, rows.T @ rows / len(rows), atol=1e-5)
    assert torch.equal(span.low, rows.amin(0))
    assert torch.equal(span.high, rows.amax(0))
    assert torch.allclose(span.midpoint, ((x.amax(1) + x.amin(1)) / 2).mean(0), atol=1e-6)
    assert torch.allclose(norms.mean, x.norm(dim=1).mean(0), atol=1e-5)
    assert torch.allclose(norms.norm, rows.norm(dim=0), rtol=1e-5)
    assert torch.allclose(norms.magnitude, rows.abs().mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_observers_get_samples_and_tokens_apart(kind):
    """OPT flattens them before ``fc1``."""
    block = next(iter(walk(tiny(kind), random_ids(5, 12), batch=3)))
    seen = {name: [] for name in block.linears}
    block.observe({name: (lambda x, name=name: seen[name].append(x.shape)) for name in seen})
    for name, linear in block.linears.items():
        assert seen[name] == [(3, 12, linear.in_features), (2, 12, linear.in_features)]


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_every_fold_preserves_the_function(kind):
    model, ids = tiny(kind), random_ids(4, 12)
    before = model(ids).logits
    generator = torch.Generator().manual_seed(0)
    count = 0
    for block in walk(model, ids):
        for fold in [*folds.norm_folds(block), *folds.linear_folds(block)]:
            channels = block.get(fold.readers[0]).in_features
            folds.scale(block, fold, torch.rand(channels, generator=generator) * 5 + 0.1)
            count += 1
    wanted = {"gqa": 3, "mha": 4, "qwen2": 3, "qwen3": 3, "neox": 2, "opt": 4}[kind]
    assert count == 3 * wanted
    assert (model(ids).logits - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("kind", ["opt", "neox"])
def test_shifting_a_norm_with_a_bias_preserves_the_function(kind):
    model, ids = tiny(kind), random_ids(4, 12)
    before = model(ids).logits
    for block in walk(model, ids):
        for fold in folds.norm_folds(block):
            folds.shift(block, fold, torch.randn(block.get(fold.readers[0]).in_features))
    assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()


def test_a_norm_without_a_bias_takes_no_shift():
    block = next(iter(walk(tiny("gqa"), random_ids(2, 5))))
    with pytest.raises(ValueError, match="has no bias"):
        folds.shift(block, folds.norm_folds(block)[0], torch.ones(64))


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_scales_that_break_the_function_are_refused(factor):
    block = next(iter(walk(tiny("gqa"), random_ids(2, 5))))
    with pytest.raises(ValueError, match="positive and finite"):
        folds.scale(block, folds.norm_folds(block)[0], torch.full((64,), factor))


def test_a_model_without_decoder_blocks_and_an_empty_calibration_are_refused():
    model = tiny("gqa")
    with pytest.raises(ValueError, match="at least one of each"):
        next(iter(walk(model, torch.zeros(0, 8, dtype=torch.long))))
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no list of 7 decoder blocks"):
        decoder_blocks(model)


def test_folds_need_a_walked_block():
    with pytest.raises(ValueError, match="calibration tokens"):
        folds.norm_folds(next(iter(blocks(tiny("gqa")))))


@pytest.mark.parametrize("residual", [False, True])
def test_a_norm_that_feeds_more_than_linear_layers_is_no_fold(residual):
    """As where blocks are normalised at their end, and the residual stream is what the norm makes."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.gate = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden):
            normed = self.norm(hidden)
            return (normed if residual else hidden) + self.up(normed) * self.gate(normed).sigmoid()

    block = Block(0, "layers.0", Layer(), [Pass(torch.randn(2, 5, 8))])
    found = [] if residual else [folds.Fold("layers.0.norm", ("layers.0.up", "layers.0.gate"))]
    assert folds.norm_folds(block) == found
