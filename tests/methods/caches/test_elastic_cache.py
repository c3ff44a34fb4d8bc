"""Elastic Cache: the acceptance checks of its specification, parity with the official code, and the family's
contract.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import positions, random_ids, tiny
from transformers import DynamicCache

from broadsheet.core.models.rotary import rotate
from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.ledger import nbytes
from broadsheet.methods.caches import attention as shared
from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.elastic_cache import (
    ElasticCache,
    ElasticLayer,
    assign_buckets,
    choose_anchors,
    importance,
    official_selection,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "elastic_cache_official.safetensors"


def build(kind="gqa"):
    return tiny(kind, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def model():
    return build()


def prompt_ids(tokens, rows=1, seed=1):
    return random_ids(rows, tokens, seed)


@torch.no_grad()
def feed(model, cache, ids, mask=None):
    extra = {}
    if mask is not None:
        extra = {"attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
    return model(ids, past_key_values=cache, use_cache=True, **extra).logits


def tokens(keys, values, queries=None, valid=None, positions=None):
    """`Tokens` of hand-made states, with a real rotation of their positions."""
    batch, _, count, dim = keys.shape
    if positions is None:
        positions = torch.arange(count).expand(batch, count)
    angles = positions[..., None].float() * 0.5 ** torch.arange(dim // 2)
    angles = torch.cat([angles, angles], -1)
    return Tokens(
        queries=torch.randn(keys.shape) if queries is None else queries,
        keys=keys,
        values=values,
        hidden=torch.zeros(batch, count, 4),
        positions=positions,
        valid=torch.ones(batch, count, dtype=torch.bool) if valid is None else valid,
        cos=angles.cos(),
        sin=angles.sin(),
    )


def random_tokens(count, batch=1, kv_heads=2, dim=8, **kwargs):
    keys, values = torch.randn(2, batch, kv_heads, count, dim)
    return tokens(keys, values, **kwargs)


def lone_layer(model, method):
    """One layer of a cache of ``method``, for states that no model made."""
    return method.cache(model).layers[0]


def step(layer, count=1):
    layer.append(random_tokens(count, positions=torch.arange(layer.seen, layer.seen + count)[None]))


# --- acceptance checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "neox"])
def test_acceptance_1_budget_one_changes_no_bit(kind):
    model = build(kind)
    ours, stock = ElasticCache(budget=1.0).cache(model), DynamicCache()
    ids = prompt_ids(20)
    assert torch.equal(feed(model, ours, ids), feed(model, stock, ids))
    for token in prompt_ids(64, seed=2)[0]:
        assert torch.equal(feed(model, ours, token.view(1, 1)), feed(model, stock, token.view(1, 1)))
    assert ours.nbytes == nbytes([(layer.keys, layer.values) for layer in stock.layers])


def test_acceptance_2_bucket_example():
    buckets = assign_buckets(torch.tensor([[[0, 3, 8, 11]]]), 12)
    assert buckets[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    # a filling slot of a shorter row gets no token, however far off the first anchor is
    assert assign_buckets(torch.tensor([[[-1, 20, 25]]]), 30)[0, 0].tolist() == [1] * 23 + [2] * 7


def test_acceptance_2_buckets_partition_around_their_anchors():
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        total = int(torch.randint(2, 60, (1,), generator=generator))
        count = int(torch.randint(2, total + 1, (1,), generator=generator))
        scores = torch.rand(1, 1, total, generator=generator)
        valid = torch.ones(1, total, dtype=torch.bool)
        anchors = choose_anchors(scores, valid, torch.tensor([count]), 1, 1)[0, 0]
        assert anchors.tolist() == sorted(set(anchors.tolist()))
        assert len(anchors) == count
        assert anchors[0] == 0
        assert anchors[-1] == total - 1
        inner = set(anchors[1:-1].tolist())
        assert inner == set((scores[0, 0, 1:-1].topk(count - 2).indices + 1).tolist())
        bucket = assign_buckets(anchors.view(1, 1, -1), total)[0, 0]
        assert torch.equal(bucket[anchors], torch.arange(count))  # each bucket has its own anchor, and so one
        assert (bucket.diff() >= 0).all()
        nearest = (torch.arange(total)[:, None] - anchors).abs().amin(-1)
        assert torch.equal((torch.arange(total) - anchors[bucket]).abs(), nearest)


@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("merge", [True, False])
def test_acceptance_3_slots_are_bucket_means(model, merge, granularity):
    torch.manual_seed(4)
    prompt = random_tokens(40)
    layer = lone_layer(model, ElasticCache(budget=0.3, merge=merge, granularity=granularity))
    layer.prefill(prompt)
    scores = importance(prompt, layer.scaling)[0].mean(1)
    scores = scores.mean(0, keepdim=True).expand_as(scores) if granularity == "layer" else scores
    assert layer.stored == 12
    for head in range(2):
        anchors = sorted([0, 39, *(scores[head, 1:39].topk(10).indices + 1).tolist()])
        nearest = (torch.arange(40)[:, None] - torch.tensor(anchors)).abs().argmin(-1)  # the left one of equals
        for slot, anchor in enumerate(anchors):
            members = (nearest == slot).nonzero().flatten()
            for stored, states in [(layer.stored_keys, prompt.keys), (layer.stored_values, prompt.values)]:
                if merge:
                    mean = states[0, head, members].mean(0)
                    torch.testing.assert_close(stored[0, head, slot], mean, atol=1e-6, rtol=0)
                else:
                    assert torch.equal(stored[0, head, slot], states[0, head, anchor])


@pytest.mark.parametrize("total", [32, 500])
@pytest.mark.parametrize("budget", [0.2, 0.5])
def test_acceptance_4_never_more_than_the_budget(model, total, budget):
    torch.manual_seed(5)
    layer = lone_layer(model, ElasticCache(budget=budget))
    layer.prefill(random_tokens(total))
    compressed = layer.stored
    assert compressed == round(budget * total)
    for generated in range(1, 301):
        step(layer)
        allowed = int(budget * (total + generated) + 1e-9)
        assert layer.stored <= max(compressed, allowed)
        assert layer.stored >= allowed - 1
        # what is held is the slots (2 heads, 8 channels, keys and values) and two integers: nothing hidden
        assert nbytes(layer.state()) == layer.stored * 2 * 8 * 2 * 4 + 16


def test_acceptance_5_the_exit_is_in_the_middle(model):
    torch.manual_seed(6)
    layer = lone_layer(model, ElasticCache(budget=0.5, distance=7))
    layer.prefill(random_tokens(60))
    exit_slot = 30 - 7
    head = layer.stored_keys[:, :, :exit_slot].clone()
    newest = []
    for _ in range(80):
        step(layer)
        newest.append(layer.stored_keys[:, :, -1])
        assert torch.equal(layer.stored_keys[:, :, :exit_slot], head)
        present = layer.stored - exit_slot
        recent = torch.stack(newest[-present:], 2)
        assert torch.equal(layer.stored_keys[:, :, -recent.shape[2] :], recent)
    assert present < 80  # by now everything behind the exit was generated
    assert layer.stored == 70


def hand_made(attention):
    """A prompt [1, 1 KV head, T] whose softmax is ``attention`` [heads, T, T] exactly, with scaling 1."""
    total = attention.shape[-1]
    keys = torch.eye(total).view(1, 1, total, total)
    queries = attention.clamp(min=1e-30).log().unsqueeze(0)
    return tokens(keys, keys, queries=queries, positions=torch.zeros(1, total))


def test_acceptance_6_importance_by_formula():
    torch.manual_seed(7)
    attention = torch.rand(2, 9, 9).tril()
    attention = attention / attention.sum(-1, keepdim=True)
    prompt = hand_made(attention)
    by_sum, by_mean = attention.sum(1), attention.sum(1) / torch.arange(9, 0, -1)
    decay = 0.8
    weights = (1 - decay) * decay ** torch.arange(8, -1, -1).float()
    by_average = (attention * weights[:, None]).sum(1)
    for statistic, expected in [("sum", by_sum), ("mean", by_mean), ("moving_average", by_average)]:
        found = importance(prompt, 1.0, statistic, decay)
        assert found.shape == (1, 1, 2, 9)
        torch.testing.assert_close(found[0, 0], expected, atol=1e-6, rtol=1e-5)


def test_acceptance_6_a_layer_uses_the_statistic_named(model):
    torch.manual_seed(17)
    prompt = random_tokens(20, queries=torch.randn(1, 4, 20, 8))
    for statistic, decay in [("sum", 0.9), ("mean", 0.9), ("moving_average", 0.9), ("moving_average", 0.7)]:
        shared, apart = (
            lone_layer(model, ElasticCache(importance=statistic, decay=decay, granularity=granularity))
            for granularity in ("layer", "head")
        )
        received = importance(prompt, shared.scaling, statistic, decay)
        assert received.shape == (1, 2, 2, 20)
        torch.testing.assert_close(shared.scores(prompt)[0, 0], received[0].mean((0, 1)))
        torch.testing.assert_close(apart.scores(prompt)[0], received[0].mean(1))


def test_acceptance_6_sum_and_mean_choose_different_anchors():
    # Uniform, so early tokens are seen by most queries; but token 9 is seen by few and by much.
    attention = torch.ones(1, 12, 12).tril()
    attention[0, 10:, 9] += 3
    attention = attention / attention.sum(-1, keepdim=True)
    valid, count, chosen = torch.ones(1, 12, dtype=torch.bool), torch.tensor([5]), {}
    for statistic in ("sum", "mean"):
        scores = importance(hand_made(attention), 1.0, statistic).mean((1, 2)).unsqueeze(1)
        chosen[statistic] = choose_anchors(scores, valid, count, 1, 1)[0, 0].tolist()
    assert 9 not in chosen["sum"]
    assert 9 in chosen["mean"]


@pytest.mark.parametrize("kind", ["gqa", "neox"])
def test_acceptance_7_follow_up_equals_token_by_token(kind, monkeypatch):
    model = build(kind)
    context, question = prompt_ids(40), prompt_ids(7, seed=2)
    cache = ElasticCache(budget=0.5, distance=6).cache(model)
    feed(model, cache, context)

    def one_by_one(cache):
        return torch.cat([feed(model, cache, token.view(1, 1)) for token in question[0]], 1)

    # With the evictions held back, to compare the attention alone.
    with monkeypatch.context() as held:
        held.setattr(ElasticLayer, "evict", lambda self: None)
        together, apart = feed(model, cache.fork(), question), one_by_one(cache.fork())
        torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)
    # With them: the pass sees what was stored before it, and ends with the same slots.
    both, single = cache.fork(), cache.fork()
    assert torch.equal(feed(model, both, question), together)
    assert torch.equal(one_by_one(single)[:, 0], apart[:, 0])
    assert [layer.stored for layer in both.layers] == [layer.stored for layer in single.layers] == [23] * 3
    torch.testing.assert_close(both.layers[0].stored_keys, single.layers[0].stored_keys, atol=1e-5, rtol=0)
    assert both.get_seq_length() == 47


@pytest.mark.parametrize("options", [{}, {"discard": "frequency"}, {"merge_keys": "pre_rope", "mass_bias": True}])
def test_acceptance_8_rows_are_independent(options):
    model, method = build(), ElasticCache(budget=0.4, distance=5, **options)
    long, short = prompt_ids(37), prompt_ids(26, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 11, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    new = prompt_ids(20, rows=2, seed=3)
    both = method.cache(model)
    alone = [method.cache(model), method.cache(model)]
    joint = feed(model, both, ids, mask)[:, -1]
    apart = torch.cat([feed(model, cache, row)[:, -1] for cache, row in zip(alone, (long, short), strict=True)])
    torch.testing.assert_close(joint, apart, atol=2e-5, rtol=1e-4)
    for token in new.T:
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        joint = feed(model, both, token.view(2, 1), mask)[:, -1]
        apart = torch.cat([feed(model, cache, token[row].view(1, 1))[:, -1] for row, cache in enumerate(alone)])
        torch.testing.assert_close(joint, apart, atol=5e-5, rtol=1e-3)
        for layer, one, other in zip(both.layers, alone[0].layers, alone[1].layers, strict=True):
            real = torch.ones(2, 1, layer.stored) if layer.valid is None else layer.valid
            assert real.sum(-1)[:, 0].tolist() == [one.stored, other.stored]


# --- parity with the official code -------------------------------------------------------------------------------------

CASES = {
    "t12_r50_s1_d-3": (0.5, 1, -3),
    "t32_r20_s1_d-25": (0.2, 1, -25),
    "t32_r50_s1_d-10": (0.5, 1, -10),
    "t32_r50_s4_d6": (0.5, 4, 6),
    "t48_r70_s1_d-5": (0.7, 1, -5),
    "t48_r20_s1_d-25": (0.2, 1, -25),
}


@pytest.mark.parametrize("case", CASES)
def test_golden_official_quirks(model, case, monkeypatch):
    golden = load_file(GOLDEN)
    ratio, n_sink, distance = CASES[case]
    place = {"exit_slot": distance} if distance > 0 else {"distance": -distance}
    name = case.split("_")[0]
    attention, keys, values = (golden[f"{name}.{part}"].float() for part in ("attention", "k", "v"))
    layers, heads, total, _ = attention.shape
    method = ElasticCache(budget=1 - ratio, n_sink=n_sink, official_quirks=True, **place)
    for index in range(layers):
        # The map itself stands in for the softmax: rounded to float16 its rows miss 1, so no queries give it.
        given = attention[index].view(1, keys.shape[1], -1, total, total)
        monkeypatch.setattr(shared, "attention_rows", lambda queries, *rest, given=given: given)
        k, v = keys[index][None], values[index][None]
        prompt = tokens(k[:, :, :total], v[:, :, :total], queries=torch.zeros(1, heads, total, 2))
        layer = lone_layer(model, method)
        torch.testing.assert_close(layer.scores(prompt)[0, 0], golden[f"{case}.score"][index], atol=1e-6, rtol=1e-6)
        layer.prefill(prompt)
        torch.testing.assert_close(layer.stored_keys[0], golden[f"{case}.k_merged"][index], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.stored_values[0], golden[f"{case}.v_merged"][index], atol=1e-6, rtol=1e-6)
        for i, stored in enumerate(golden[f"{case}.stored_per_step"].tolist()):
            at = slice(total + i, total + i + 1)
            layer.append(tokens(k[:, :, at], v[:, :, at], positions=torch.tensor([[total + i]])))
            assert layer.stored == stored
        torch.testing.assert_close(layer.stored_keys[0], golden[f"{case}.k_final"][index], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_golden_official_selection(case):
    golden = load_file(GOLDEN)
    ratio, n_sink, _ = CASES[case]
    for index, scores in enumerate(golden[f"{case}.score"]):
        forget = int(len(scores) - len(scores) * (1 - ratio))
        kept, merged, targets = official_selection(scores, forget, n_sink)
        assert kept.tolist() == golden[f"{case}.kept"][index].tolist()
        assert merged.tolist() == golden[f"{case}.thrown"][index].tolist()
        assert targets.tolist() == golden[f"{case}.merge_target"][index].tolist()


# --- components --------------------------------------------------------------------------------------------------------


def test_pre_rope_means_turn_to_the_anchor(model):
    torch.manual_seed(8)
    prompt = random_tokens(30)
    layer = lone_layer(model, ElasticCache(budget=0.3, merge_keys="pre_rope"))
    layer.prefill(prompt)
    scores = layer.scores(prompt)
    anchors = choose_anchors(scores, prompt.valid, torch.tensor([9]), 1, 1)
    buckets = assign_buckets(anchors, 30)[0, 0]
    bare = rotate(prompt.keys, prompt.cos, prompt.sin, inverse=True)
    for slot, anchor in enumerate(anchors[0, 0].tolist()):
        mean = bare[:, :, buckets == slot].mean(2, keepdim=True)
        turned = rotate(mean, prompt.cos[:, anchor : anchor + 1], prompt.sin[:, anchor : anchor + 1])
        torch.testing.assert_close(layer.stored_keys[:, :, slot], turned[:, :, 0], atol=1e-5, rtol=1e-4)
        if (buckets == slot).sum() == 1:
            assert torch.equal(layer.stored_keys[:, :, slot], prompt.keys[:, :, anchor])


def test_merge_keys_none_keeps_the_anchors_keys(model):
    torch.manual_seed(9)
    prompt = random_tokens(30)
    values_only, evicted = (
        lone_layer(model, ElasticCache(budget=0.3, **options)) for options in ({"merge_keys": "none"}, {"merge": False})
    )
    values_only.prefill(prompt)
    evicted.prefill(prompt)
    assert torch.equal(values_only.stored_keys, evicted.stored_keys)
    assert not torch.equal(values_only.stored_values, evicted.stored_values)


def test_mass_bias_is_exact_when_keys_coincide(model):
    torch.manual_seed(10)
    prompt = random_tokens(24)
    prompt.keys = prompt.keys[:, :, :1].expand(-1, -1, 24, -1).contiguous()
    outputs = {}
    for bias in (True, False):
        layer = lone_layer(model, ElasticCache(budget=0.25, mass_bias=bias))
        layer.prefill(prompt)
        torch.manual_seed(11)
        new = random_tokens(1, positions=torch.tensor([[24]]))
        new.queries = torch.randn(1, 4, 1, 8)
        outputs[bias] = layer.attend(new, None, layer.scaling)
    keys, values = (
        torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((prompt.keys, new.keys), (prompt.values, new.values))
    )
    weights = (new.queries @ keys.transpose(-1, -2) * layer.scaling).softmax(-1)
    exact = (weights @ values).transpose(1, 2)
    torch.testing.assert_close(outputs[True], exact, atol=1e-5, rtol=1e-5)
    assert (outputs[False] - exact).abs().max() > 1e-3


def test_discard_none_keeps_all_that_is_generated(model):
    torch.manual_seed(18)
    layer = lone_layer(model, ElasticCache(budget=0.5, discard="none"))
    layer.prefill(random_tokens(20))
    before = layer.stored_keys.clone()
    for _ in range(9):
        step(layer)
    assert layer.stored == 10 + 9
    assert torch.equal(layer.stored_keys[:, :, :10], before)


def test_discard_recent_keeps_sinks_and_the_newest(model):
    torch.manual_seed(12)
    layer = lone_layer(model, ElasticCache(budget=0.5, discard="recent", n_sink=2))
    layer.prefill(random_tokens(20))
    before = layer.stored_keys.clone()
    step(layer)  # 11 slots for 21 tokens: one over
    assert torch.equal(layer.stored_keys[:, :, :2], before[:, :, :2])
    assert torch.equal(layer.stored_keys[:, :, 2:9], before[:, :, 3:])


def test_discard_frequency_drops_the_least_attended(model):
    torch.manual_seed(13)
    layer = lone_layer(model, ElasticCache(budget=0.5, discard="frequency"))
    layer.prefill(random_tokens(20))
    torch.testing.assert_close(layer.mass.sum(), torch.tensor(20.0))  # each query hands out 1
    for _ in range(10):
        seen = int(layer.lengths)
        keys, mass, stored = layer.stored_keys.clone(), layer.mass.clone(), layer.stored
        new = random_tokens(1, positions=torch.tensor([[seen]]))
        new.queries = torch.randn(1, 4, 1, 8)
        logits = new.queries @ torch.cat([keys, new.keys], 2).repeat_interleave(2, 1).transpose(-1, -2)
        received = (logits * layer.scaling).softmax(-1).mean(1)[0, 0]
        layer.append(new)
        received[:-1] += mass[0, 0]
        if layer.stored == stored:
            gone = int(received[1:-1].argmin()) + 1
            left = [slot for slot in range(stored + 1) if slot != gone]
            torch.testing.assert_close(layer.mass[0, 0], received[left])
            assert torch.equal(layer.stored_keys, torch.cat([keys, new.keys], 2)[:, :, left])
        assert layer.stored == int(0.5 * (seen + 1))


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_every_model(kind, dtype):
    model = build(kind).to(dtype)
    ids = prompt_ids(30)
    cache = ElasticCache(budget=0.5, distance=4).cache(model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert out.shape == (1, 42)
    assert cache.seen == 41
    assert [layer.stored for layer in cache.layers] == [20] * 3
    beams = ElasticCache(budget=0.5).cache(model)
    assert model.generate(ids, past_key_values=beams, max_new_tokens=5, num_beams=2).shape[1] <= 35


def test_chunked_prompt_and_fork(model):
    ids = prompt_ids(40)
    method = ElasticCache(budget=0.5)
    whole, chunked = method.cache(model), method.cache(model, chunked=True)
    feed(model, whole, ids)
    for part in ids.split(16, 1):
        feed(model, chunked, part)
    next_token = prompt_ids(1, seed=2)
    snapshot = whole.fork()
    expected = feed(model, whole, next_token)
    torch.testing.assert_close(feed(model, chunked, next_token), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(feed(model, snapshot, next_token), expected)
    report = whole.report()
    assert report["merged"] == [20] * 3
    assert report["stored"] == [20] * 3
    assert report["seen"] == 41


@pytest.mark.parametrize(
    "options",
    [{}, {"mass_bias": True}, {"discard": "frequency"}, {"discard": "frequency", "granularity": "head"}],
)
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25, 0.1])
def test_at_budget_counts_real_bytes(model, fraction, options):
    geometry = Geometry.of(model.config)
    cache = ElasticCache(**options).at_budget(fraction, 100, geometry).cache(model, dtype=torch.bfloat16)
    feed(model, cache, prompt_ids(100))
    share = cache.nbytes / geometry.full_bytes(100)
    assert fraction - 0.02 < share <= fraction


def test_at_budget_says_what_it_can(model):
    geometry = Geometry.of(model.config)
    with pytest.raises(Unreachable) as caught:
        ElasticCache().at_budget(0.01, 50, geometry)
    least = ElasticCache().at_budget(caught.value.least + 1e-9, 50, geometry)
    assert round(least.budget * 50) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": 1.2}, "budget"),
        ({"n_sink": -1}, "n_sink"),
        ({"distance": -3}, "distance"),
        ({"exit_slot": 0}, "exit_slot"),
        ({"merge_keys": "rope"}, "merge_keys"),
        ({"importance": "max"}, "importance"),
        ({"discard": "random"}, "discard"),
        ({"decay": 1.0}, "decay"),
        ({"official_quirks": True, "mass_bias": True}, "official_quirks"),
    ],
)
def test_bad_parameters(options, says):
    with pytest.raises(ValueError, match=says):
        ElasticCache(**options)


def test_bad_prompts(model):
    with pytest.raises(ValueError, match="raise the budget"):
        feed(model, ElasticCache(budget=0.2).cache(model), prompt_ids(5))
    quirks = ElasticCache(budget=0.5, official_quirks=True).cache(model)
    with pytest.raises(ValueError, match="one row"):
        feed(model, quirks, prompt_ids(40, rows=2))
    with pytest.raises(ValueError, match="longer"):
        feed(model, ElasticCache(budget=0.5, official_quirks=True).cache(model), prompt_ids(10))
    with pytest.raises(NotImplementedError, match="crop"):
        ElasticCache().cache(model).layers[0].crop(3)
