"""KIVI against its algorithm written out token by token."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.kivi import KIVI


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=48,
        vocab_size=61,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def quantised(x: torch.Tensor, bits: int) -> torch.Tensor:
    """One group [n], minimum and scale in float16 (arXiv 2402.02750, section 3.1)."""
    zero, scale = x.min().half().float(), ((x.max() - x.min()) / (2**bits - 1)).half().float()
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


def expected(keys: torch.Tensor, values: torch.Tensor, method: KIVI) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1, one token at a time, on [kv_heads, tokens, head_dim]."""
    heads, tokens, dim = keys.shape
    keys, values, group = keys.clone(), values.clone(), method.group_size
    key_start = 0
    for token in range(tokens):
        if token + 1 - key_start == method.residual:  # the residual is full: quantise all of it
            for first in range(key_start, token + 1, group):
                for head in range(heads):
                    for channel in range(dim):
                        part = keys[head, first : first + group, channel]
                        keys[head, first : first + group, channel] = quantised(part, method.bits)
            key_start = token + 1
        old = token - method.residual
        if old >= 0:
            for head in range(heads):
                for first in range(0, dim, group):
                    part = values[head, old, first : first + group]
                    values[head, old, first : first + group] = quantised(part, method.bits_of_values)
    return keys, values


@pytest.mark.parametrize("method", [KIVI(2, 8, 8), KIVI(4, 16, 32), KIVI(3, 8, 24, value_bits=2)])
@pytest.mark.parametrize("parts", [[61], [30, 1, 1, 20, 9], [1] * 61], ids=["prompt", "turns", "steps"])
@torch.no_grad()
def test_follows_algorithm_1_however_the_tokens_come(model, method, parts):
    ids = torch.randint(0, 61, (1, 61), generator=torch.Generator().manual_seed(3))
    cache, full = method.cache(model), Full().cache(model)
    for part in ids.split(parts, 1):  # a single layer: its keys and values depend on no cache
        model(part, past_key_values=cache)
    model(ids, past_key_values=full)
    ours, exact = cache.layers[0].slots(), full.layers[0].slots()
    keys, values = expected(exact.keys[0], exact.values[0], method)
    # In one place or two, a state that differs in its last bit may fall to the other side of a tie.
    for mine, wanted in ((ours.keys[0], keys), (ours.values[0], values)):
        assert (mine - wanted).abs().gt(1e-5).float().mean() < 2e-3
    recent = method.residual
    assert torch.allclose(ours.values[0, :, -recent:], exact.values[0, :, -recent:], atol=1e-5)


@torch.no_grad()
def test_identity_and_full_budget_are_the_full_cache_bit_for_bit(model):
    ids = torch.randint(0, 61, (2, 80), generator=torch.Generator().manual_seed(4))
    geometry = Geometry.of(model.config)
    for method in (KIVI(residual=96), KIVI().at_budget(1.0, 50, geometry)):
        cache, full = method.cache(model), Full().cache(model)
        for part in ids.split([50, 1, 20, 1, 8], 1):
            ours, theirs = (model(part, past_key_values=c).logits for c in (cache, full))
            assert torch.equal(ours, theirs)
        assert cache.nbytes == full.nbytes


def test_more_bits_are_spent_where_a_budget_allows(model):
    geometry = Geometry(layers=4, heads=4, kv_heads=2, head_dim=64, hidden_size=192)
    sizes = []
    for fraction in (0.1, 0.15, 0.25, 0.5):
        method = KIVI().at_budget(fraction, 512, geometry)
        sizes.append(method.bits + method.bits_of_values)
        assert 0.9 * fraction <= method.expected_bytes(512, geometry) / geometry.full_bytes(512) <= fraction
    assert sizes == sorted(set(sizes))
    with pytest.raises(Unreachable) as error:
        KIVI().at_budget(0.05, 512, geometry)
    assert 0.05 < error.value.least < 0.1


def test_bad_parameters_are_named(model):
    for wrong, word in (
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"value_bits": 16}, "value_bits"),
        ({"group_size": 0}, "group_size"),
        ({"residual": 33}, "residual"),
        ({"residual": -32}, "residual"),
    ):
        with pytest.raises(ValueError, match=f"^{word} must be"):
            KIVI(**wrong)
    with pytest.raises(ValueError, match="group_size 64 does not divide the 32 channels"):
        KIVI(group_size=64, residual=64).cache(model)
