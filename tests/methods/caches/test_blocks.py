"""What every quantising cache owes: exact prompts, rows that do not see each other, bytes really held."""

from dataclasses import replace

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedModel, Qwen3Config, set_seed
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.ledger import nbytes
from broadsheet.methods.caches.base import CacheMethod, Geometry, MethodCache, Unreachable
from broadsheet.methods.caches.blocks import Rows, bits_per_element, quantisation_error
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.gear import GEAR
from broadsheet.methods.caches.kivi import KIVI

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
CONFIGS = {
    "mha": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=4, max_position_embeddings=512),
    "gqa": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16, max_position_embeddings=512),
    "one-head": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, head_dim=16, max_position_embeddings=512),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=16),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=48, rotary_pct=0.5, max_position_embeddings=512),
}
METHODS: dict[str, CacheMethod] = {
    "kivi": KIVI(bits=2, group_size=8, residual=16),
    "kivi-3-5": KIVI(bits=5, value_bits=3, group_size=16, residual=0),
    "gear": GEAR(bits=2, group_size=8, sparsity=0.1, buffer=16),
    "gear-l": GEAR(bits=4, group_size=8, sparsity=0, buffer=8),
    "gear-kcvt": GEAR("kcvt", bits=4, sparsity=0.1, buffer=20, rank_prefill=3),
    "gear-factored": GEAR(bits=3, group_size=8, sparsity=0.1, buffer=16, factored=True),
}
#: every method on one family, two of them on all
PAIRS = [("gqa", name) for name in METHODS]
PAIRS += [(family, name) for family in CONFIGS if family != "gqa" for name in ("kivi", "gear")]


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    set_seed(0)
    config = CONFIGS[name]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():  # states of ordinary size, so that a quantiser's error shows
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: make(name) for name in CONFIGS}


def draw(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: MethodCache, *parts: torch.Tensor) -> torch.Tensor:
    """Logits of all ``parts``, fed one after another."""
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_prompt_is_exact_and_follow_ups_work(models, family, name):
    model, method = models[family], METHODS[name]
    ids = draw(2, 90)
    cache, full = method.cache(model), Full().cache(model)
    parts = ids[:, :43], ids[:, 43:44], ids[:, 44:80], *ids[:, 80:].split(1, 1)
    ours, theirs = feed(model, cache, *parts), feed(model, full, *parts)
    assert torch.equal(ours[:, :43], theirs[:, :43])
    assert ours.isfinite().all()
    assert cache.get_seq_length() == 90 == cache.seen
    assert [layer.stored for layer in cache.layers] == [90, 90]
    slots, exact = cache.layers[0].slots(), full.layers[0].slots()
    assert slots.valid is None
    assert slots.keys.shape == exact.keys.shape
    # Close, not equal: it was compressed, and it is the same tokens in the same order.
    for mine, true in ((slots.keys, exact.keys), (slots.values, exact.values)):
        error = (mine - true).norm() / true.norm()
        assert 0 < error < 0.5


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gear-factored"])
def test_rows_do_not_see_each_other(name):
    """A row padded in a batch, with padded follow-ups, gets what it gets alone.

    In float64: in float32 the model's own states differ in the last bit between the two, and now and then one
    of them lies so near a tie that its code differs. (Factored attention, float32 by design, is held to the
    other one below.)
    """
    model, method = make("gqa", torch.float64), METHODS[name]
    turns = [[37, 1, 20, 1, 9], [5, 1, 3, 1, 14], [64, 1, 40, 1, 2]]
    rows = [[draw(1, count, 10 * row + turn) for turn, count in enumerate(turns[row])] for row in range(3)]
    rows = [row + [draw(1, 1, 100 + step) for step in range(8)] for row in rows]
    alone = []
    for row in rows:
        cache = method.cache(model)
        alone.append([feed(model, cache, part)[0] for part in row])
    cache, mask = method.cache(model), torch.zeros(3, 0, dtype=torch.long)
    for turn in range(len(rows[0])):
        width = max(row[turn].shape[1] for row in rows)
        ids, new = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        for index, row in enumerate(rows):
            count = row[turn].shape[1]
            ids[index, width - count :], new[index, width - count :] = row[turn][0], 1
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        for index in range(3):
            expected = alone[index][turn]
            torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=1e-6, rtol=1e-6)
    lengths = [sum(part.shape[1] for part in row) for row in rows]
    assert cache.layers[0].stored == max(lengths)
    assert cache.layers[0].elements == 2 * 32 * sum(lengths)


@torch.no_grad()
def test_factored_attention_is_attention(models):
    """Acceptance check 7 in a padded batch, over prompt, blocks, buffer and new tokens."""
    model, method = models["gqa"], METHODS["gear-factored"]
    plain, factored = replace(method, factored=False).cache(model), method.cache(model)
    ids, mask = draw(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :17], mask[0, 50:53] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for first, last in ((0, 50), (50, 90), (90, 91), (91, 120)):
        step = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
        a, b = (model(ids[:, first:last], past_key_values=cache, **step).logits for cache in (plain, factored))
        real = mask[:, first:last].bool()
        torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-4)
    assert len(factored.layers[0].blocks) > 3


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_bytes_are_those_foretold_and_held(models, family, name):
    model, method = models[family], METHODS[name]
    geometry = Geometry.of(model.config)
    for tokens in (3, 16, 17, 70):
        cache = method.cache(model, dtype=torch.bfloat16)
        feed(model, cache, draw(2, tokens))
        assert cache.nbytes == 2 * method.expected_bytes(tokens, geometry)
        assert sum(cache.report()["parts"].values()) == cache.nbytes
    bits = bits_per_element(cache)
    assert bits["total"] == pytest.approx(16 * cache.nbytes / 2 / geometry.full_bytes(70))
    assert sum(bits.values()) == pytest.approx(2 * bits["total"])
    feed(model, cache, *draw(2, 40, 2).split(8, 1))
    assert sum(cache.report()["parts"].values()) == cache.nbytes == nbytes([one.state() for one in cache.layers])


@pytest.mark.parametrize("name", METHODS)
def test_chunked_prefill_compresses_once(models, name):
    model, method = models["gqa"], METHODS[name]
    ids = draw(2, 50)
    whole, chunked = method.cache(model), method.cache(model, chunked=True)
    a, b = feed(model, whole, ids), feed(model, chunked, *ids.split([20, 7, 23], 1))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    chunked.end_prefill()
    assert chunked.nbytes == whole.nbytes
    assert chunked.layers[0].parts() == whole.layers[0].parts()


@pytest.mark.parametrize("name", METHODS)
def test_generate_fork_and_beams_in_bfloat16(name):
    model, method = make("gqa", torch.bfloat16), METHODS[name]
    ids = draw(2, 30)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    cache = method.cache(model)
    out = model.generate(ids, past_key_values=cache, **options)
    assert out.shape == (2, 42)
    twin, held = cache.fork(), cache.nbytes
    before = cache.layers[0].slots().keys.clone()
    more = model.generate(torch.cat([out, draw(2, 25, 3)], 1), past_key_values=twin, **options)
    assert more.shape == (2, 79)
    assert cache.nbytes == held
    assert torch.equal(cache.layers[0].slots().keys, before)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    beams = model.generate(ids, attention_mask=mask, past_key_values=method.cache(model), num_beams=2, **options)
    assert beams.shape == (2, 42)


@pytest.mark.parametrize("name", METHODS)
def test_rows_can_be_selected(models, name):
    model, method = models["gqa"], METHODS[name]
    ids, mask = draw(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :25], mask[1, :3] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = method.cache(model)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        step = {"attention_mask": torch.cat([mask[:1], torch.ones(1, 30, dtype=torch.long)], 1)}
        positions = torch.arange(15, 45)[None]
        new = draw(1, 30, 4)
        a = model(new, position_ids=positions, past_key_values=cache, **step).logits
    alone = method.cache(model)
    b = feed(model, alone, ids[:1, 25:], new)[:, 15:]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert cache.layers[0].stored == 45


@pytest.mark.parametrize("base", [KIVI(), GEAR(), GEAR("kcvt"), GEAR(sparsity=0)])
def test_budgets_are_kept_in_real_bytes(models, base):
    model, tokens = models["gqa"], 203
    geometry = Geometry.of(model.config)
    full = geometry.full_bytes(tokens)
    with pytest.raises(Unreachable) as error:
        base.at_budget(0.01, tokens, geometry)
    least = error.value.least
    with pytest.raises(Unreachable):
        base.at_budget(least - 1 / full, tokens, geometry)
    for fraction in (1.0, 0.6, 0.45, least):
        method = base.at_budget(fraction, tokens, geometry)
        cache = method.cache(model, dtype=torch.bfloat16)
        feed(model, cache, draw(1, tokens))
        assert 0.55 * fraction * full < cache.nbytes <= fraction * full
    assert cache.nbytes == round(least * full)


def test_error_of_normal_data_is_near_the_measured():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4, 8):
        measured = (x - quantise_groups(x, bits, 32).dequantise()).square().mean().item()
        assert quantisation_error(bits, 32) == pytest.approx(measured, rel=0.12)


def test_rows_leave_padding_out():
    states = torch.arange(24.0).reshape(2, 1, 6, 2)
    valid = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    rows = Rows.of(states, valid)
    assert rows.lengths.tolist() == [3, 6]
    assert torch.equal(rows.states[0, :3], states[0, 0, [2, 3, 5]])
    head, tail = rows.split(torch.tensor([2, 5]))
    assert torch.equal(head.states[0, :2], states[0, 0, [2, 3]])
    assert torch.equal(tail.states[:, 0], torch.stack([states[0, 0, 5], states[1, 0, 5]]))
    assert tail.lengths is None
    again = head.append(tail)
    assert again.lengths.tolist() == [3, 6]
    assert torch.equal(again.states[0, :3], states[0, 0, [2, 3, 5]])
    assert torch.equal(again.states[1], states[1, 0])
