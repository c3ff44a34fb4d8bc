"""The foundation of the caches: exactness at full budget, no leaks, true positions, real bytes."""

import copy

import pytest
import torch
from tiny import positions, random_ids, shared_tiny, tiny
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, GemmaConfig, MistralConfig

from broadsheet.core.models.taps import attention_modules
from broadsheet.core.numerics.ledger import nbytes
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.h2o import H2O
from broadsheet.methods.caches.snapkv import SnapKV
from broadsheet.methods.caches.streaming_llm import StreamingLLM

KINDS = ["gqa", "mha", "mqa", "qwen2", "qwen3", "neox"]
WHOLE = [Full(), StreamingLLM(1.0), H2O(1.0), SnapKV(1.0)]
HALF = [StreamingLLM(0.5), H2O(0.5), SnapKV(0.5, window=8)]


def name(method):
    return type(method).__name__


def padded(rows=2, tokens=50, pad=13):
    ids = random_ids(rows, tokens)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", WHOLE, ids=name)
def test_full_budget_equals_dynamic_cache_bit_for_bit(kind, method):
    """Prefill with left padding, a multi-token follow-up, then single tokens: the same bits as the stock cache."""
    model = shared_tiny(kind)
    ids, mask = padded()
    more = random_ids(2, 7, seed=1)
    grown = torch.cat([mask, torch.ones_like(more)], 1)

    def play(cache):
        first = model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache).logits
        where = positions(grown)[:, -7:]
        second = model(more, attention_mask=grown, position_ids=where, past_key_values=cache).logits
        last = torch.cat([grown, grown[:, -1:]], 1)
        third = model(more[:, :1], attention_mask=last, position_ids=where[:, -1:] + 1, past_key_values=cache).logits
        return first[1], first[0, 13:], second, third

    with torch.no_grad():
        ours = play(method.cache(model))
        stock = play(DynamicCache(config=model.config))
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*WHOLE, *HALF], ids=name)
def test_generate_runs_with_padding_in_both_dtypes(method, dtype):
    model = tiny("gqa").to(dtype)
    ids, mask = padded()
    cache = method.cache(model)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache, min_new_tokens=5
    )
    assert out.shape == (2, 55)
    assert cache.seen == 54
    if method in WHOLE:
        stock = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, min_new_tokens=5)
        assert torch.equal(out, stock)


@pytest.mark.parametrize("method", HALF, ids=name)
def test_no_future_token_leaks_into_a_follow_up(method):
    """Changing the last token of a seven-token follow-up changes no logits before it."""
    model = shared_tiny("gqa")
    ids, more = random_ids(1, 60), random_ids(1, 7, seed=3)
    with torch.no_grad():
        cache = method.cache(model)
        model(ids, past_key_values=cache)
        twin = cache.fork()
        one = model(more, past_key_values=cache).logits
        changed = more.clone()
        changed[0, -1] = (changed[0, -1] + 1) % 90 + 3
        other = model(changed, past_key_values=twin).logits
    assert torch.equal(one[:, :-1], other[:, :-1])
    assert not torch.equal(one[:, -1], other[:, -1])


def test_follow_up_in_one_pass_equals_token_by_token():
    """The mask contract: several new tokens over evicted slots give what feeding them singly gives."""
    model = shared_tiny("gqa")
    ids, more = random_ids(2, 60), random_ids(2, 7, seed=3)
    method = SnapKV(0.25, window=8)
    with torch.no_grad():
        cache = method.cache(model)
        model(ids, past_key_values=cache)
        twin = cache.fork()
        together = model(more, past_key_values=cache).logits
        singly = torch.cat([model(more[:, i : i + 1], past_key_values=twin).logits for i in range(7)], 1)
    assert torch.allclose(together, singly, atol=2e-5)


@pytest.mark.parametrize("method", HALF, ids=name)
def test_rows_are_independent_and_chunks_do_not_matter(method):
    model = shared_tiny("gqa")
    ids, mask = padded()
    more = random_ids(2, 5, seed=4)
    grown = torch.cat([mask, torch.ones_like(more)], 1)
    where = positions(grown)

    def follow(cache, rows=slice(None), skip=0):
        return model(
            more[rows], attention_mask=grown[rows, skip:], position_ids=where[rows, 50:], past_key_values=cache
        ).logits

    with torch.no_grad():
        together = method.cache(model)
        model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=together)
        expected = follow(together)
        alone = method.cache(model)
        model(ids[:1, 13:], past_key_values=alone)
        assert torch.allclose(expected[:1], follow(alone, slice(0, 1), 13), atol=2e-5)
        chunked = method.cache(model, chunked=True)
        for first in (0, 20, 40):
            part = slice(first, min(first + 20, 50))
            model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions(mask)[:, part],
                past_key_values=chunked,
            )
        chunked.end_prefill()
        assert torch.allclose(expected, follow(chunked), atol=2e-5)


@pytest.mark.parametrize("method", [Full(), *HALF], ids=name)
def test_evicted_means_freed_and_nbytes_is_what_is_held(method):
    model = shared_tiny("gqa")
    with torch.no_grad():
        cache = method.cache(model)
        model(random_ids(2, 200), past_key_values=cache)
    report = cache.report()
    assert sum(report["parts"].values()) == report["nbytes"] == cache.nbytes
    full = 2 * 3 * 2 * 2 * 16 * 200 * 4  # K and V, layers, batch, heads, head_dim, tokens, float32
    assert nbytes([layer.state() for layer in cache.layers]) == cache.nbytes
    if isinstance(method, Full):
        assert cache.nbytes == full
    else:
        assert cache.nbytes < 0.55 * full
        assert cache.layers[0].stored == 100
    assert cache.get_seq_length() == 200


def test_fork_shares_memory_and_leaves_the_other_alone():
    model = shared_tiny("gqa")
    with torch.no_grad():
        cache = H2O(0.5).cache(model)
        model(random_ids(1, 40), past_key_values=cache)
        before = [t.clone() for t in cache.layers[0].state().values() if isinstance(t, torch.Tensor)]
        twin = cache.fork()
        assert twin.layers[0].stored_keys.data_ptr() == cache.layers[0].stored_keys.data_ptr()
        model(random_ids(1, 6, seed=5), past_key_values=twin)
    after = [t for t in cache.layers[0].state().values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (cache.seen, twin.seen) == (40, 46)


def test_beam_search_works():
    model = shared_tiny("gqa")
    ids = random_ids(2, 30)
    ours = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False, past_key_values=Full().cache(model))
    stock = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, stock)


def test_reset_and_crop():
    model = shared_tiny("gqa")
    cache = SnapKV(0.5).cache(model)
    with torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache)
        cache.reset()
        assert (cache.nbytes, cache.seen) == (0, 0)
        model(random_ids(1, 40), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="fork"):
        cache.layers[0].crop(-1)


def test_a_cache_refuses_a_model_that_no_longer_taps():
    model = tiny("gqa")
    cache = Full().cache(model)
    model.set_attn_implementation("sdpa")
    other = tiny("gqa", seed=1)
    with pytest.raises(RuntimeError, match=r"call Full\(...\).cache\(model\) again"):
        other(random_ids(1, 4), past_key_values=cache)


def test_a_deep_copy_is_tapped_once():
    model = tiny("gqa")
    Full().cache(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        Full().cache(one)
        assert [len(module._forward_pre_hooks) for module in attention_modules(one)] == [1, 1, 1]
    ids = random_ids(1, 20)
    with torch.no_grad():
        first, second = (one(ids, past_key_values=H2O(0.5).cache(one)).logits for one in (model, twin))
    assert torch.equal(first, second)


def test_a_new_cache_taps_a_model_whose_attention_was_changed():
    model = tiny("gqa")
    Full().cache(model)
    model.set_attn_implementation("sdpa")
    cache = SnapKV(0.5).cache(model)
    with torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache)
    assert cache.layers[0].stored == 20
    assert all(len(module._forward_pre_hooks) == 1 for module in attention_modules(model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Gemma2Config(**{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 50}),
            "full attention",
        ),
        (
            MistralConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=32, vocab_size=50, sliding_window=8),
            "sliding window",
        ),
    ],
    ids=["gemma2", "mistral-sliding"],
)
def test_unsupported_attention_is_refused_in_one_line(config, message):
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message) as caught:
        Full().cache(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=32,
            vocab_size=50,
            head_dim=8,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        MistralConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=32,
            vocab_size=50,
            sliding_window=None,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ],
    ids=["gemma", "mistral"],
)
def test_other_families_run(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = SnapKV(0.5, window=4).cache(model)
    with torch.no_grad():
        model(random_ids(1, 30, vocabulary=50), past_key_values=cache)
    assert cache.layers[1].stored == 15


@pytest.mark.parametrize("make", [StreamingLLM, H2O, SnapKV])
@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5])
def test_bad_budgets(make, budget):
    with pytest.raises(ValueError, match="budget must be above 0 and at most 1"):
        make(budget)
