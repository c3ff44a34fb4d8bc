"""KVMerger: the acceptance checks of its specification, and the family's contract."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import positions, random_ids, tiny
from transformers import DynamicCache

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.ledger import nbytes
from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.kvmerger import (
    KVMerger,
    MergeProfile,
    find_merging_sets,
    gaussian_merge,
    profile_model,
    protect,
    similarity,
)


def build(kind="gqa", layers=3):
    return tiny(kind, hidden_size=32, intermediate_size=48, num_hidden_layers=layers)


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


def tokens(keys, values, queries=None, valid=None):
    batch, _, count, _ = keys.shape
    blank = torch.zeros(batch, count, 4)
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool)
    queries = torch.randn(batch, 4, count, keys.shape[-1]) if queries is None else queries
    return Tokens(queries, keys, values, blank, valid.cumsum(-1) - 1, valid, blank, blank)


def drifting(count, batch=1, kv_heads=2, dim=8, pull=0.8):
    """Keys that wander, so that neighbours are alike; values that do not."""
    keys = torch.randn(batch, kv_heads, count, dim)
    for index in range(1, count):
        keys[:, :, index] = pull * keys[:, :, index - 1] + (1 - pull**2) ** 0.5 * keys[:, :, index]
    return tokens(keys, torch.randn(batch, kv_heads, count, dim))


def lone_layer(model, method):
    """One merging layer of a cache of ``method``, for states that no model made."""
    return method.cache(model).layers[0]


def every_layer(**options):
    return KVMerger(**({"skip_layers": ()} | options))


# --- acceptance checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "neox"])
@pytest.mark.parametrize("options", [{"skip_layers": "all"}, {"epsilon": 1.0, "skip_layers": ()}])
def test_acceptance_1_nothing_merged_changes_no_bit(kind, options):
    model = build(kind)
    ours, stock = KVMerger(**options).cache(model), DynamicCache()
    ids = prompt_ids(20)
    assert torch.equal(feed(model, ours, ids), feed(model, stock, ids))
    for token in prompt_ids(8, seed=2)[0]:
        assert torch.equal(feed(model, ours, token.view(1, 1)), feed(model, stock, token.view(1, 1)))
    for layer, other in zip(ours.layers, stock.layers, strict=True):
        assert torch.equal(layer.slots().keys, other.keys)
        assert torch.equal(layer.slots().values, other.values)
    assert ours.nbytes == nbytes([(layer.keys, layer.values) for layer in stock.layers])


def scanned(keys, protected, epsilon):
    """The backward scan as printed, for one head: list of sets."""
    cosine = torch.nn.functional.cosine_similarity(keys[:-1], keys[1:], dim=-1)
    sets, current = [], [len(keys) - 1]
    for j in range(len(keys) - 2, -1, -1):
        if not protected[j] and not protected[j + 1] and cosine[j] >= epsilon:
            current.append(j)
        else:
            sets.append(sorted(current))
            current = [j]
    return [sorted(current), *reversed(sets)]


def test_acceptance_2_sets_equal_the_backward_scan():
    generator = torch.Generator().manual_seed(1)
    merged = 0
    for _ in range(250):  # of 2 rows and 2 heads: 1,000 cases
        count = int(torch.randint(4, 40, (1,), generator=generator))
        keys = torch.randn(2, 2, count, 3, generator=generator)
        protected = torch.rand(2, 2, count, generator=generator) < 0.2
        epsilon = float(torch.rand(1, generator=generator)) * 1.4 - 0.7
        sets = find_merging_sets(keys, protected, epsilon)
        for row in range(2):
            for head in range(2):
                expected = scanned(keys[row, head], protected[row, head], epsilon)
                ids = sets[row, head]
                found = [(ids == index).nonzero().flatten().tolist() for index in range(int(ids.max()) + 1)]
                assert found == expected
                assert [j for members in found for j in members] == list(range(count))  # contiguous, disjoint, all
                for members in found:
                    merged += len(members) > 1
                    assert len(members) == 1 or not protected[row, head, members].any()
    assert merged > 1000


def test_acceptance_3_hand_case():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(1, 1, 3, 2)
    sets = find_merging_sets(keys, torch.zeros(1, 1, 3, dtype=torch.bool), 0.5)
    assert sets[0, 0].tolist() == [0, 0, 1]
    values = torch.tensor([[2.0, 0.0], [4.0, 2.0], [7.0, 7.0]]).view(1, 1, 3, 2)
    merged, mixed, sizes = gaussian_merge(keys, values, sets, torch.tensor([[[0.1, 0.9, 0.5]]]))
    assert torch.equal(merged[0, 0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert torch.equal(mixed[0, 0], torch.tensor([[3.0, 1.0], [7.0, 7.0]]))
    assert sizes[0, 0].tolist() == [2, 1]


def reference_merge(keys, values, members, scores, sigma, paper):
    """The formulas, for one set, in float64."""
    k, v, a = keys[members].double(), values[members].double(), scores[members]
    pivot = k[int(a.argmax())]
    g = (-(k - pivot).square().sum(-1) / (2 * sigma**2)).exp()
    w = (g / g.sum())[:, None]
    return (w * k).sum(0), (w * v).sum(0) * (len(members) if paper else 1)


@pytest.mark.parametrize("value_mass", ["mean", "paper"])
def test_merge_by_formula(value_mass):
    torch.manual_seed(2)
    prompt, scores = drifting(50), torch.rand(1, 2, 50)
    sets = find_merging_sets(prompt.keys, torch.rand(1, 2, 50) < 0.1, 0.5)
    keys, values, sizes = gaussian_merge(prompt.keys, prompt.values, sets, scores, 1.3, value_mass)
    for head in range(2):
        for index in range(int(sets[0, head].max()) + 1):
            members = (sets[0, head] == index).nonzero().flatten()
            k, v = reference_merge(
                prompt.keys[0, head],
                prompt.values[0, head],
                members,
                scores[0, head],
                1.3,
                value_mass == "paper",
            )
            torch.testing.assert_close(keys[0, head, index].double(), k, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(values[0, head, index].double(), v, atol=1e-5, rtol=1e-5)
            assert sizes[0, head, index] == len(members)
            if len(members) == 1:
                assert torch.equal(keys[0, head, index], prompt.keys[0, head, members[0]])


def test_acceptance_4_identical_keys(model):
    torch.manual_seed(3)
    runs = torch.randn(1, 2, 6, 8).repeat_interleave(torch.tensor([1, 5, 3, 7, 2, 2]), 2)
    values = torch.randn(1, 2, 20, 8)
    queries = torch.randn(1, 4, 20, 8)
    new = tokens(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    outputs = {}
    for value_mass in ("bias", "mean", "paper"):
        method = every_layer(epsilon=0.9999, recent=0, heavy=0, value_mass=value_mass)
        layer = lone_layer(model, method)
        layer.prefill(tokens(runs, values, queries))
        assert layer.stored == 6
        outputs[value_mass] = layer.attend(new, None, layer.scaling)
        slots = layer.slots()
    keys, states = (torch.cat(pair, 2).repeat_interleave(2, 1) for pair in ((runs, new.keys), (values, new.values)))
    scaling = layer.scaling
    exact = ((new.queries @ keys.mT * scaling).softmax(-1) @ states).transpose(1, 2)
    torch.testing.assert_close(outputs["bias"], exact, atol=1e-6, rtol=1e-5)
    assert (outputs["mean"] - exact).abs().max() > 1e-2
    # "paper": the numerator carries |S|, the denominator counts one slot.
    sizes = torch.tensor([1.0, 5, 3, 7, 2, 2, 1])
    means = torch.cat([run.mean(2, keepdim=True) for run in values.split([1, 5, 3, 7, 2, 2], 2)], 2)
    short = torch.cat([slots.keys, new.keys], 2).repeat_interleave(2, 1)
    weights = (new.queries @ short.mT * scaling).softmax(-1) * sizes
    direct = (weights @ torch.cat([means, new.values], 2).repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(outputs["paper"], direct, atol=1e-5, rtol=1e-5)
    assert (outputs["paper"] - exact).abs().max() > 1e-2


def test_acceptance_5_limits_of_sigma():
    torch.manual_seed(4)
    prompt, scores = drifting(60), torch.rand(1, 2, 60)
    sets = find_merging_sets(prompt.keys, torch.zeros(1, 2, 60, dtype=torch.bool), 0.5)
    wide = gaussian_merge(prompt.keys, prompt.values, sets, scores, 1e6)
    narrow = gaussian_merge(prompt.keys, prompt.values, sets, scores, 1e-6)
    for head in range(2):
        for index in range(int(sets[0, head].max()) + 1):
            members = (sets[0, head] == index).nonzero().flatten()
            pivot = members[scores[0, head, members].argmax()]
            for part, states in enumerate((prompt.keys, prompt.values)):
                plain = states[0, head, members].mean(0)
                torch.testing.assert_close(wide[part][0, head, index], plain, atol=1e-5, rtol=0)
                torch.testing.assert_close(narrow[part][0, head, index], states[0, head, pivot], atol=1e-5, rtol=0)


def test_sigma_fixed_point_solves_the_printed_definition():
    torch.manual_seed(5)
    prompt = drifting(12, pull=0.99)
    scores = torch.rand(1, 2, 12)
    sets = torch.zeros(1, 2, 12, dtype=torch.long)
    found, _, _ = gaussian_merge(prompt.keys, prompt.values, sets, scores, "fixed_point")
    for head in range(2):
        k = prompt.keys[0, head].double()
        distance = (k - k[scores[0, head].argmax()]).square().sum(-1)
        sigma = distance.mean().sqrt()
        for _ in range(10):
            sigma = ((-distance / (2 * sigma**2)).exp().sum() / (math.sqrt(2) * 12)).clamp(min=1e-3)
        assert sigma <= math.sqrt(0.5)  # whatever the keys
        w = (-distance / (2 * sigma**2)).exp()
        expected = (w / w.sum()) @ k
        torch.testing.assert_close(found[0, head, 0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("total", [64, 1000])
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_acceptance_6_budget_is_met(model, budget, total, layout):
    recent, heavy = (0.17, 0.12) if budget > 0.3 else (0.08, 0.02)
    method = every_layer(budget=budget, recent=recent, heavy=heavy, layout=layout)
    torch.manual_seed(6)
    layer = lone_layer(model, method)
    layer.prefill(drifting(total))
    assert layer.real_slots().tolist() == [[math.ceil(budget * total)] * 2]
    if total == 64:  # and in every layer of a model
        cache = method.cache(model)
        feed(model, cache, prompt_ids(64))
        assert cache.report()["slots"] == [math.ceil(budget * 64)] * 3
        assert cache.report()["padded_bytes"] == 0


def test_acceptance_6_skipped_layers_count():
    model = build(layers=8)
    cache = KVMerger(budget=0.7).cache(model)
    feed(model, cache, prompt_ids(100))
    slots = cache.report()["slots"]
    assert [slots[index] for index in (0, 1, 7)] == [100] * 3
    assert abs(sum(slots) - 0.7 * 800) <= 8
    with pytest.raises(ValueError, match=r"skip_layers=\(\)"):
        KVMerger(budget=0.35).cache(model)
    with pytest.raises(ValueError, match=r"recent \+ heavy"):
        KVMerger(budget=0.5).cache(model)  # leaves the other layers 0.2


def test_acceptance_7_slots_grow_with_epsilon():
    torch.manual_seed(7)
    prompt = drifting(200, batch=2)
    protected = torch.rand(2, 2, 200) < 0.1
    counts = [
        find_merging_sets(prompt.keys, protected, epsilon).amax(-1) + 1 for epsilon in torch.linspace(-1, 1, 41).tolist()
    ]
    assert all((more >= fewer).all() for fewer, more in pairwise(counts))
    assert (counts[-1] == 200).all()
    assert (counts[0] < 100).all()


def test_acceptance_8_rows_heads_and_dtypes():
    torch.manual_seed(8)
    prompt, scores = drifting(80, batch=3, dim=64), torch.rand(3, 2, 80)
    protected = protect(scores, prompt.valid, torch.full((3,), 10), torch.full((3,), 8))
    assert (protected.sum(-1) >= 10).all()
    sets = find_merging_sets(prompt.keys, protected, 0.75)
    merged = gaussian_merge(prompt.keys, prompt.values, sets, scores)
    order = torch.tensor([2, 0, 1])
    shuffled_sets = find_merging_sets(prompt.keys[order], protected[order], 0.75)
    assert torch.equal(shuffled_sets, sets[order])
    shuffled = gaussian_merge(prompt.keys[order], prompt.values[order], shuffled_sets, scores[order])
    assert all(torch.equal(one, other[order]) for one, other in zip(shuffled, merged, strict=True))
    for head in range(2):
        part = slice(head, head + 1)
        alone = find_merging_sets(prompt.keys[:, part], protected[:, part], 0.75)
        assert torch.equal(alone, sets[:, part])
        single = gaussian_merge(prompt.keys[:, part], prompt.values[:, part], alone, scores[:, part])
        width = single[0].shape[2]
        assert all(torch.equal(one, other[:, part, :width]) for one, other in zip(single, merged, strict=True))
    joined = sets.diff(dim=-1) == 0
    rounded = find_merging_sets(prompt.keys.bfloat16(), protected, 0.75).diff(dim=-1) == 0
    close = (similarity(prompt.keys) - 0.75).abs() < 2e-3
    assert torch.equal(joined[~close], rounded[~close])
    assert joined.any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "ragged"},
        {"value_mass": "paper"},
        {"epsilon": 0.2, "budget": None},
        {"pivot": "random", "sets": "random"},
    ],
)
def test_acceptance_8_rows_are_independent_in_a_model(options):
    model = build()
    method = every_layer(**({"budget": 0.5, "every": 6, "recent": 0.1, "heavy": 0.1} | options))
    long, short = prompt_ids(37), prompt_ids(26, seed=2)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 11, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    both, alone = method.cache(model), [method.cache(model), method.cache(model)]
    joint = feed(model, both, ids, mask)[:, -1]
    apart = torch.cat([feed(model, cache, row)[:, -1] for cache, row in zip(alone, (long, short), strict=True)])
    torch.testing.assert_close(joint, apart, atol=2e-5, rtol=1e-4)
    for token in prompt_ids(14, rows=2, seed=3).T:
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        joint = feed(model, both, token.view(2, 1), mask)[:, -1]
        apart = torch.cat([feed(model, cache, token[row].view(1, 1))[:, -1] for row, cache in enumerate(alone)])
        torch.testing.assert_close(joint, apart, atol=5e-5, rtol=1e-3)
    for layer, *single in zip(both.layers, *(cache.layers for cache in alone), strict=True):
        assert torch.equal(layer.real_slots(), torch.cat([one.real_slots() for one in single]))


def test_acceptance_9_two_questions_from_one_cache(model):
    """The mechanics: both questions are answered by the cache as compressed, neither sees the other."""
    context, questions = prompt_ids(50), [prompt_ids(5, seed=2), prompt_ids(8, seed=3)]
    method = every_layer(budget=0.5)
    cache = method.cache(model)
    feed(model, cache, context)
    size = cache.nbytes
    for question in questions:
        fresh = method.cache(model)
        feed(model, fresh, context)
        assert torch.equal(feed(model, cache.fork(), question), feed(model, fresh, question))
    assert cache.nbytes == size
    # token by token gives what the pass gives: the slots do not move
    together, single = feed(model, cache.fork(), questions[1]), cache.fork()
    apart = torch.cat([feed(model, single, token.view(1, 1)) for token in questions[1][0]], 1)
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)


# --- components --------------------------------------------------------------------------------------------------------


def test_protected_tokens_are_the_most_attended_and_the_last(model):
    torch.manual_seed(9)
    scores = torch.rand(1, 2, 30)
    found = protect(scores, torch.ones(1, 30, dtype=torch.bool), torch.tensor([4]), torch.tensor([5]))
    for head in range(2):
        expected = set(scores[0, head].topk(5).indices.tolist()) | {26, 27, 28, 29}
        assert set(found[0, head].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("merge", [True, False])
def test_protected_tokens_are_kept_bit_for_bit(model, merge):
    torch.manual_seed(10)
    prompt = drifting(100)
    layer = lone_layer(model, every_layer(budget=0.5, merge=merge))
    layer.prefill(prompt)
    slots = layer.slots()
    assert torch.equal(slots.keys[:, :, -17:], prompt.keys[:, :, -17:])
    kept = (slots.keys[:, :, :, None] == prompt.keys[:, :, None]).all(-1)  # [1, 2, slots, tokens]
    assert slots.keys.shape[2] == 50
    if merge:
        assert slots.bias.exp().sum(-1).round().tolist() == [[100, 100]]  # every token is somewhere
    else:
        assert kept.any(-1).all()  # eviction: each slot is a token as it was
        assert slots.bias is None


def test_controls_change_what_they_name(model):
    torch.manual_seed(11)
    prompt = drifting(100)
    stored = {}
    for name, options in {
        "default": {},
        "random pivot": {"pivot": "random"},
        "random sets": {"sets": "random"},
        "fixed point": {"sigma": "fixed_point"},
        "evict": {"merge": False},
        "norms": {"max_norm_ratio": 1.05},
    }.items():
        layer = lone_layer(model, every_layer(budget=0.5, **options))
        layer.prefill(prompt)
        stored[name] = layer.slots()
        assert layer.real_slots().tolist() == [[50, 50]]
    for name, slots in stored.items():
        assert name == "default" or not torch.equal(slots.keys, stored["default"].keys)
    assert torch.equal(stored["random pivot"].bias, stored["default"].bias)  # same sets, other centres


def test_max_norm_ratio_splits_sets():
    keys = torch.tensor([1.0, 1.1, 2.0, 2.1]).view(1, 1, 4, 1).expand(-1, -1, -1, 2)
    free = torch.zeros(1, 1, 4, dtype=torch.bool)
    assert find_merging_sets(keys, free, 0.9)[0, 0].tolist() == [0, 0, 0, 0]
    assert find_merging_sets(keys, free, 0.9, max_norm_ratio=1.5)[0, 0].tolist() == [0, 0, 1, 1]


def test_layouts_hold_the_same_and_ragged_holds_less(model):
    torch.manual_seed(12)
    prompt = drifting(80)
    prompt.keys[:, 1] = torch.randn(1, 80, 8)  # one head merges, the other hardly
    caches = {}
    for layout in ("padded", "ragged"):
        cache = every_layer(epsilon=0.6, layout=layout).cache(model)
        for layer in cache.layers:
            layer.prefill(prompt)
        caches[layout] = cache
    one, other = (cache.layers[0].slots() for cache in caches.values())
    assert torch.equal(one.valid, other.valid)
    assert torch.equal(one.keys[one.valid], other.keys[other.valid])
    assert torch.equal(one.values[one.valid], other.values[other.valid])
    assert torch.equal(one.bias[one.valid], other.bias[other.valid])
    real = int(caches["padded"].layers[0].real_slots().sum())
    report = caches["padded"].report()
    assert report["padded_bytes"] == 3 * 2 * 8 * 4 * (2 * one.keys.shape[2] - real) > 0
    assert caches["ragged"].report()["padded_bytes"] == 0
    assert caches["ragged"].nbytes == 3 * (real * (2 * 8 * 4 + 2) + 2 * 4)  # states and sizes, counts
    assert caches["padded"].report()["slots"] == caches["ragged"].report()["slots"] == [real / 2] * 3


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_every_merges_what_is_generated(model, layout):
    torch.manual_seed(13)
    method = every_layer(budget=0.5, every=10, layout=layout)
    layer = lone_layer(model, method)
    layer.prefill(drifting(40))
    later = drifting(23)
    heat = torch.zeros(1, 2, 0)
    for index in range(23):
        one = slice(index, index + 1)
        new = tokens(later.keys[:, :, one], later.values[:, :, one])
        before = layer.slots()
        keys = torch.cat([before.keys, new.keys], 2).repeat_interleave(2, 1)
        bias = torch.nn.functional.pad(before.bias, (0, 1)).repeat_interleave(2, 1).unsqueeze(2)
        received = (new.queries @ keys.mT * layer.scaling + bias).softmax(-1)[:, :, 0].unflatten(1, (2, 2)).sum(2)
        heat = torch.nn.functional.pad(heat, (0, 1)) + received[..., received.shape[-1] - index % 10 - 1 :]
        layer.append(new)
        if index % 10 == 9:
            heat = torch.zeros(1, 2, 0)
            assert layer.heat is None
        else:
            torch.testing.assert_close(layer.heat, heat, atol=1e-5, rtol=1e-4)
    assert layer.real_slots().tolist() == [[20 + 5 + 5 + 3] * 2]
    assert layer.slots().bias.exp().sum(-1).round().tolist() == [[63, 63]]
    assert layer.stored == 33


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_with_every_model(kind, dtype):
    model = build(kind).to(dtype)
    ids = prompt_ids(30)
    cache = every_layer(budget=0.5, every=6).cache(model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert out.shape == (1, 42)
    assert cache.seen == 41
    assert cache.report()["slots"] == [15 + 3 + 5] * 3
    beams = every_layer(budget=0.5, layout="ragged").cache(model)
    assert model.generate(ids, past_key_values=beams, max_new_tokens=5, num_beams=2).shape[1] <= 35


def test_chunked_prompt_and_fork(model):
    ids = prompt_ids(40)
    method = every_layer(epsilon=0.1)
    whole, chunked = method.cache(model), method.cache(model, chunked=True)
    feed(model, whole, ids)
    for part in ids.split(16, 1):
        feed(model, chunked, part)
    next_token = prompt_ids(1, seed=2)
    snapshot = whole.fork()
    expected = feed(model, whole, next_token)
    torch.testing.assert_close(feed(model, chunked, next_token), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(feed(model, snapshot, next_token), expected)
    assert max(whole.report()["slots"]) < 41


@pytest.mark.parametrize("options", [{}, {"value_mass": "paper"}, {"layout": "ragged"}])
@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.25, 0.1, 0.05])
def test_at_budget_counts_real_bytes(model, fraction, options):
    geometry = Geometry.of(model.config)
    method = KVMerger(**options).at_budget(fraction, 100, geometry)
    cache = method.cache(model, dtype=torch.bfloat16)
    feed(model, cache, prompt_ids(100))
    share = cache.nbytes / geometry.full_bytes(100)
    assert fraction - 0.012 < share <= fraction


def test_at_budget_takes_ragged_counts_into_account(model):
    """53 slots and their sizes fill this budget to the byte: nothing is left for the counts."""
    geometry = Geometry.of(model.config)
    for layout, slots in (("padded", 53), ("ragged", 52)):
        fraction = 53 * (4 * 8 + 2) / (4 * 8 * 100) + 1e-9
        method = KVMerger(layout=layout).at_budget(fraction, 100, geometry)
        cache = method.cache(model, dtype=torch.bfloat16)
        feed(model, cache, prompt_ids(100))
        assert cache.report()["slots"] == [slots] * 3
        assert cache.nbytes <= fraction * geometry.full_bytes(100)


def test_at_budget_keeps_the_papers_layers_in_deep_models():
    model = build(layers=8)
    geometry = Geometry.of(model.config)
    method = KVMerger().at_budget(0.6, 100, geometry)
    assert method.skip_layers == (0, 1, -1)
    cache = method.cache(model, dtype=torch.bfloat16)
    feed(model, cache, prompt_ids(100))
    assert 0.59 < cache.nbytes / geometry.full_bytes(100) <= 0.6
    with pytest.raises(Unreachable) as caught:
        KVMerger().at_budget(0.25, 100, geometry)
    assert 0.375 < caught.value.least < 0.39
    assert KVMerger(skip_layers=()).at_budget(0.25, 100, geometry).budget < 0.25
    with pytest.raises(Unreachable):
        KVMerger(skip_layers="all").at_budget(0.9, 100, geometry)


def test_at_budget_takes_the_papers_protection(model):
    geometry = replace(Geometry.of(model.config), head_dim=4096)  # so that sizes weigh nothing
    half, third = (KVMerger().at_budget(share, 10_000, geometry) for share in (0.501, 0.35))
    assert (round(half.recent, 3), round(half.heavy, 3)) == (0.17, 0.12)
    assert (round(third.recent, 3), round(third.heavy, 3)) == (0.08, 0.02)
    assert KVMerger(heavy=0.0).at_budget(0.35, 10_000, geometry).heavy == 0


def test_profile(model, tmp_path):
    prompts = [prompt_ids(24 + seed % 3, seed=seed)[0] for seed in range(12)]
    method = KVMerger(epsilon=0.3)
    profile = profile_model(model, prompts, method)
    assert profile.prompts == 12
    assert [len(row) for row in profile.mean] == [2] * 3
    ratios = []
    for prompt in prompts:
        cache = replace(method, skip_layers=()).cache(model)
        feed(model, cache, prompt[None])
        ratios.append(torch.stack([layer.real_slots()[0] / len(prompt) for layer in cache.layers]))
    ratios = torch.stack(ratios)
    torch.testing.assert_close(torch.tensor(profile.mean), ratios.mean(0))
    torch.testing.assert_close(torch.tensor(profile.std), ratios.std(0))
    torch.testing.assert_close(torch.tensor(profile.layer_std), ratios.mean(2).std(0))
    assert all(ratio >= 1 for ratio in profile.norm_ratio)
    assert profile.share(()) == pytest.approx(float(ratios.mean()), rel=1e-5)
    assert profile.share((0, 1, 2)) == 1
    profile.save(tmp_path / "profile.json")
    assert MergeProfile.load(tmp_path / "profile.json") == profile
    assert json.loads((tmp_path / "profile.json").read_text())["epsilon"] == 0.3
    with pytest.raises(ValueError, match="two prompts"):
        profile_model(model, prompts[:1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": 1.5}, "epsilon"),
        ({"budget": 0.2}, "recent"),
        ({"budget": 0.0}, "budget"),
        ({"budget": 0.5, "compression_ratio": 0.5}, "not both"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": "adaptive"}, "sigma"),
        ({"pivot": "first"}, "pivot"),
        ({"value_mass": "sum"}, "value_mass"),
        ({"layout": "flat"}, "layout"),
        ({"skip_layers": "none"}, "skip_layers"),
        ({"every": 2}, "every"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio"),
        ({"sets": "random"}, "budget"),
        ({"recent": -0.1}, "recent"),
    ],
)
def test_bad_parameters(options, says):
    with pytest.raises(ValueError, match=says):
        KVMerger(**options)


def test_compression_ratio_is_the_rest_of_the_budget():
    assert KVMerger(compression_ratio=0.5) == KVMerger(budget=0.5)
    assert replace(KVMerger(compression_ratio=0.4), sigma=3.0).budget == 0.6


def test_bad_use(model):
    with pytest.raises(ValueError, match="4 tokens"):
        feed(model, every_layer().cache(model), prompt_ids(3))
    with pytest.raises(ValueError, match="layer 5"):
        KVMerger(skip_layers=(5,)).cache(model)
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    with pytest.raises(ValueError, match="sliding"):
        KVMerger().cache(tiny("qwen3", **sliding))
