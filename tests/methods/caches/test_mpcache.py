"""MPCache: acceptance checks, parity with the released code's recorded numbers, and the caches' contract."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SHARED, needs_stories
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from broadsheet.core.models import load
from broadsheet.core.models.taps import Tokens, attention_modules
from broadsheet.methods.caches import mpcache
from broadsheet.methods.caches.attention import attention_rows
from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.mpcache import (
    MPCache,
    Store,
    attend_clusters,
    commonality,
    model_recall,
    pick,
    recall,
)
from broadsheet.methods.caches.observe import observe

GOLDEN = Path(__file__).parents[2] / "golden" / "mpcache_official.safetensors"
SMALL = MPCache(static_keep=0.6, clusters=(8, 4), ratios=(0.5, 0.25))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def llama(kv_heads: int = 2, layers: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        initializer_range=0.3,  # attention that looks somewhere
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        initializer_range=0.3,
        eos_token_id=None,
    )
    return GPTNeoXForCausalLM(config).eval()


def ids(count: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, cache, *passes, mask=None) -> torch.Tensor:
    """Logits of consecutive passes, concatenated. ``mask`` covers all tokens; positions follow it."""
    outputs, seen = [], 0
    for part in passes:
        extra = {}
        if mask is not None:
            until = mask[:, : seen + part.shape[1]]
            positions = (until.cumsum(1) - 1).clamp(0)[:, seen:]
            extra = {"attention_mask": until, "position_ids": positions}
        outputs.append(model(part, past_key_values=cache, **extra).logits)
        seen += part.shape[1]
    return torch.cat(outputs, 1)


def random_keys(tokens: int, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, kv_heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def store_of(method: MPCache, keys: torch.Tensor, values: torch.Tensor | None = None) -> Store:
    values = keys if values is None else values
    return Store.of(keys, values, method)


def tokens_of(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Tokens:
    batch, _, count, _ = keys.shape
    blank = torch.zeros(batch, count, 1)
    valid = torch.ones(batch, count, dtype=torch.bool)
    return Tokens(queries, keys, values, blank, blank[..., 0].long(), valid, blank, blank)


# --- acceptance checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, lambda: llama(4), qwen3, neox])
def test_acceptance_1_everything_kept_and_chosen_is_the_full_cache(make):
    model = make()
    passes = [ids(90), ids(1, seed=2), ids(7, seed=3), ids(1, seed=4)]
    full = run(model, DynamicCache(), *passes)
    ours = run(model, MPCache(static_keep=1, ratios=(1, 1), share_span=1).cache(model), *passes)
    assert torch.equal(ours, full)


def test_acceptance_1_through_the_gathers_too():
    # All clusters by the gathering path: equal to plain softmax attention.
    method = MPCache(static_keep=1, clusters=(8, 4))
    for stored, new in [(40, 1), (41, 1), (47, 5)]:
        states = random_keys(stored + new, dim=8)
        values = random_keys(stored + new, dim=8, seed=1)
        queries = random_keys(new, kv_heads=4, dim=8, seed=2)
        store = store_of(method, states[:, :, :stored], values[:, :, :stored])
        middle = torch.arange(1, stored // 4).expand(1, 2, 2, new, -1)
        fresh = tokens_of(queries, states[:, :, stored:], values[:, :, stored:])
        output = attend_clusters(store, 4, middle, fresh, 0.3)
        weights = attention_rows(queries, states, 0.3, stored, None)
        expected = torch.einsum("bhgnt,bhtd->bhgnd", weights, values).flatten(1, 2).transpose(1, 2)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("similarity", ["linear", "max", "mean"])
def test_acceptance_2_incremental_summaries_equal_recomputed_ones(similarity):
    method = MPCache(clusters=(8, 4), similarity=similarity)
    keys = random_keys(70)
    for start in (5, 8, 11):
        store = Store.of(keys[:, :, :start], keys[:, :, :start], method)
        for step in (1, 1, 2, 3, 9, 1, 4, 16, 1, 1, 5):
            fresh = keys[:, :, store.count : store.count + step]
            store = store.extend(tokens_of(fresh, fresh, fresh), method)
            assert torch.equal(store.keys, keys[:, :, : store.count])
            for size, summary in ((8, store.coarse), (4, store.fine)):
                runs = keys[:, :, : store.count // size * size].unflatten(2, (-1, size))
                high, low = runs.amax(3), runs.amin(3)
                wanted = {"linear": 0.6 * high + (1 - 0.6) * low, "max": torch.cat([high, low], -1)}
                assert torch.equal(summary, wanted.get(similarity, runs.mean(3)))


def test_acceptance_2_max_form_bounds_the_best_token():
    method = MPCache(clusters=(16, 8), similarity="max")
    keys = random_keys(8 * 10_000, kv_heads=1, dim=4)
    summary = method.summarise(keys, 8)
    queries = random_keys(10_000, kv_heads=1, dim=4, seed=1)
    split = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
    bound = (split * summary).sum(-1)
    best = torch.einsum("bhnd,bhntd->bhnt", queries, keys.unflatten(2, (-1, 8))).amax(-1)
    assert (bound >= best - 1e-5).all()
    elementwise = torch.maximum(queries * summary[..., :4], queries * summary[..., 4:]).sum(-1)
    torch.testing.assert_close(bound, elementwise)
    scores = method.similarities(queries[:, :, :5], summary[:, :, :5])
    torch.testing.assert_close(scores[0, 0].diagonal(), bound[0, 0, :5])


def test_acceptance_3_linear_similarity_closed_form_and_as_a_product():
    keys, queries = random_keys(64), random_keys(3, seed=1)
    runs = keys.unflatten(2, (-1, 8))
    ends = torch.stack([runs.amax(3), runs.amin(3)])
    for alpha in (0.0, 0.5, 0.6, 1.0):
        method = MPCache(clusters=(8, 8), alpha=alpha)
        scores = method.similarities(queries, method.summarise(keys, 8))
        at_high, at_low = torch.einsum("bhnd,ebhcd->ebhnc", queries, ends)
        torch.testing.assert_close(scores, alpha * at_high + (1 - alpha) * at_low, atol=1e-6, rtol=1e-6)
        elementwise = (queries.unsqueeze(3) * (alpha * ends[0] + (1 - alpha) * ends[1]).unsqueeze(2)).sum(-1)
        torch.testing.assert_close(scores, elementwise, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("clusters", "ratios"), [((32, 16), (0.5, 0.2)), ((8, 4), (0.3, 0.6)), ((6, 2), (1, 0.5))])
def test_acceptance_4_first_and_newest_always_and_public_counts(clusters, ratios):
    method = MPCache(clusters=clusters, ratios=ratios)
    large, small = clusters
    for stored in range(2 * large - 1, 6 * large):
        counts = method.counts(stored)
        store = store_of(method, random_keys(stored, seed=stored))
        picked = pick(method, store, random_keys(2, kv_heads=4, seed=stored + 1))
        assert picked.shape == (1, 2, 2, 2, counts.picked)  # one count for all heads and queries
        if counts.picked:
            assert (picked.diff(dim=-1) > 0).all()  # distinct
            assert int(picked.min()) >= 1  # the first is not counted among them
            assert int(picked.max()) <= counts.fine - 2  # nor is the newest
        attended = small + counts.picked * small + counts.tail + 1
        assert attended <= (int((stored // small + 1) * ratios[1] + 1e-9) + 2) * small
        assert counts.fine == -(-(stored + 1) // small)
        assert counts.coarse == -(-(stored + 1) // large)


def test_acceptance_4_attention_is_exactly_over_those_tokens(monkeypatch):
    model = llama()
    method = MPCache(static_keep=1, clusters=(8, 4), ratios=(0.5, 0.25), share_span=1)
    cache = method.cache(model)
    chosen, outputs = [], []
    real_pick, real_attend = mpcache.pick, mpcache.attend_clusters

    def spy_pick(*args):
        chosen.append(real_pick(*args))
        return chosen[-1]

    def spy_attend(store, size, picked, new, scaling):
        outputs.append((store, picked, new, scaling, real_attend(store, size, picked, new, scaling)))
        return outputs[-1][-1]

    monkeypatch.setattr(mpcache, "pick", spy_pick)
    monkeypatch.setattr(mpcache, "attend_clusters", spy_attend)
    run(model, cache, ids(61), ids(1), ids(6, seed=3))
    assert len(chosen) == len(outputs) == 2 * 4
    for store, picked, new, scaling, output in outputs:
        stored, count = store.count, new.count
        tail = stored // 4 * 4
        allowed = torch.zeros(1, 2, 2, count, stored + count, dtype=torch.bool)
        allowed[..., :4] = True
        allowed[..., tail:stored] = True
        for place in range(4):
            allowed.scatter_(-1, picked * 4 + place, True)
        allowed[..., stored:] = torch.ones(count, count).tril().bool()
        keys = torch.cat([store.keys, new.keys], 2)
        values = torch.cat([store.values, new.values], 2)
        logits = torch.einsum("bhgnd,bhtd->bhgnt", new.queries.unflatten(1, (2, 2)), keys) * scaling
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(-1)
        expected = torch.einsum("bhgnt,bhtd->bhgnd", weights, values).flatten(1, 2).transpose(1, 2)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        reported = allowed.sum(-1)[..., -1]
        assert (reported == int(reported.flatten()[0])).all()
    assert cache.layers[-1].attended == int(reported.flatten()[0])


def test_acceptance_5_shared_layers_use_the_same_indices(monkeypatch):
    model = llama(layers=7)
    seen: dict[int, list] = {}
    real = mpcache.attend_clusters

    def spy(store, size, picked, new, scaling):
        seen.setdefault(len(seen), []).append(picked)
        return real(store, size, picked, new, scaling)

    grouped = [(2, 2, [[0], [1], [2, 3], [4, 5], [6]]), (3, 1, [[0], [1, 2, 3], [4, 5, 6]])]
    for span, start, groups in grouped:
        seen.clear()
        monkeypatch.setattr(mpcache, "attend_clusters", spy)
        sharing = {"share_span": span, "share_from": start}
        method = MPCache(static_keep=0.7, clusters=(8, 4), ratios=(0.5, 0.4), **sharing)
        cache = method.cache(model)
        positions = {}
        real_store = mpcache.MPCacheLayer._store

        def note(layer, prompt, kept, positions=positions, real_store=real_store):
            positions[layer.index] = kept
            return real_store(layer, prompt, kept)

        with monkeypatch.context() as patch:
            patch.setattr(mpcache.MPCacheLayer, "_store", note)
            run(model, cache, ids(120))
        run(model, cache, ids(1, seed=9))
        picked = [seen[index][0] for index in range(7)]
        for group in groups:
            for other in group[1:]:
                assert picked[other] is picked[group[0]]
                assert positions[other] is positions[group[0]]
        for first, second in pairwise(groups):
            assert picked[first[0]] is not picked[second[0]]
            assert not torch.equal(picked[first[0]], picked[second[0]])
        # What was passed on is gone after the pass.
        assert all(layer.kept is None and layer.picked is None for layer in cache.layers)


def test_acceptance_6_recall_where_neighbours_are_alike():
    # A stand-in for a trained model: keys that drift slowly along the tokens, as in text.
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(1, 4, 1024, 32, generator=generator)
    keys = torch.zeros_like(steps)
    for token in range(1024):
        keys[:, :, token] = 0.9 * keys[:, :, token - 1] + steps[:, :, token]
    queries = torch.randn(1, 4, 64, 32, generator=generator)
    shares = {}
    for similarity in ("linear", "max", "mean"):
        method = MPCache(static_keep=1, ratios=(0.5, 0.07), similarity=similarity)
        shares[similarity], opened = recall(method, queries, keys)
        assert opened <= 0.1
        assert shares[similarity] >= 3 * opened, similarity
    assert shares["linear"] > 0.4


@needs_stories
def test_acceptance_6_recall_on_a_trained_model():
    """stories260K on its own kind of text, a tenth of the tokens opened: well above chance and the max form, but not above
    mean-pooled clusters, which the check asks for; they recall a little more here."""
    model, tokenizer = load(str(SHARED / "models" / "stories260K"))
    text = (SHARED / "data" / "tinystories_wikitext_1000" / "tinystories_1000.json").read_text()
    ids = tokenizer(" ".join(json.loads(text)[:20]), add_special_tokens=False)["input_ids"]
    states = [observe(model, torch.tensor([ids[start : start + 448]])) for start in (0, 448, 896)]

    def measured(similarity: str) -> tuple[float, float]:
        method = MPCache(static_keep=1.0, clusters=(8, 4), similarity=similarity).reading(0.1, 432)
        pairs = [model_recall(method, state) for state in states]
        return sum(found for found, _ in pairs) / 3, sum(opened for _, opened in pairs) / 3

    (linear, opened), (bound, _), (mean, _) = map(measured, ("linear", "max", "mean"))
    assert opened <= 0.1
    assert linear >= 3 * opened
    assert linear > bound
    assert linear < mean < linear + 0.05


def test_commonality_of_layers_with_the_same_keys_is_whole():
    method = MPCache(static_keep=1.0, clusters=(8, 4))
    states = [tokens_of(random_keys(100, 4, seed=2), random_keys(100), random_keys(100)) for _ in range(2)]
    other = tokens_of(random_keys(100, 4, seed=3), random_keys(100, seed=4), random_keys(100))
    same, different = commonality(method, [*states, other])
    assert same == 1
    assert different < 0.7


# --- parity with the released code ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


CASES = (64, 80, 96, 101, 120, 128, 150)


@pytest.mark.parametrize("total", [64, 101])
def test_parity_bounds(golden, total):
    keys = golden["k"].float()[:, :, :total]
    method = MPCache(similarity="max")
    for size in (32, 16):
        high, low = golden[f"t{total}.max{size}"], golden[f"t{total}.min{size}"]
        full = total // size
        summary = method.summarise(keys, size)[0]
        assert torch.equal(summary, torch.cat([high, low], -1)[:, :full])
        if total % size:  # there the last cluster reaches back to a whole one, over the last tokens
            last = method.summarise(keys[:, :, total - size :], size)[0]
            assert torch.equal(last, torch.cat([high, low], -1)[:, full:])


@pytest.mark.parametrize("total", CASES)
def test_parity_similarity_and_the_released_selection(golden, total):
    """The released rule, applied to our similarities, opens the released code's tokens."""
    keys = golden["k"].float()[:, :, :total]
    queries = golden[f"t{total}.q"].float()[None, :, None]
    method = MPCache()
    scores = {}
    for size in (32, 16):
        summary = method.summarise(keys, size)
        if total % size:
            summary = torch.cat([summary, method.summarise(keys[:, :, total - size :], size)], 2)
        scores[size] = method.similarities(queries, summary)[0, :, 0]
        torch.testing.assert_close(scores[size], golden[f"t{total}.sim{size}"], atol=1e-5, rtol=1e-5)
    coarse, fine = scores[32].shape[1], scores[16].shape[1]
    for head in range(2):
        top = scores[32][head].topk(coarse // 2).indices
        assert set(top.tolist()) == set(golden[f"t{total}.top32"][head].tolist())
        opened = {0, *top.tolist()} | ({coarse - 1} if total % 32 else set())
        children = sorted({min(2 * c + i, fine - 1) for c in opened for i in (0, 1)})
        assert golden[f"t{total}.open16"][head].nonzero()[:, 0].tolist() == children
        best = scores[16][head, children].topk(int(fine * 0.2)).indices
        top = {children[index] for index in best.tolist()}
        assert top == set(golden[f"t{total}.top16"][head].tolist())
        chosen = top | {0} | ({fine - 1} if total % 32 else set())
        padding = fine * 16 - total
        attended = {t if t < total else t - padding for c in chosen for t in range(16 * c, 16 * c + 16)}
        assert golden[f"t{total}.attended"][head].nonzero()[:, 0].tolist() == sorted(attended)


@pytest.mark.parametrize("total", CASES)
def test_parity_our_selection_from_the_released_similarities(golden, total):
    """`pick` follows our rule, worked out here from the recorded similarities; T - 1 tokens are stored."""
    method = MPCache()
    counts = method.counts(total - 1)
    keys = golden["k"].float()[:, :, : total - 1]
    picked = pick(method, store_of(method, keys), golden[f"t{total}.q"].float()[None, :, None])[0, :, 0, 0]
    coarse, fine = -(-total // 32), -(-total // 16)
    for head in range(2):
        scores = golden[f"t{total}.sim32"][head]
        middle = sorted(range(1, coarse - 1), key=lambda c: -float(scores[c]))
        opened = {0, coarse - 1, *middle[: min(coarse // 2, coarse - 2)]}
        children = [c for c in range(1, fine - 1) if c // 2 in opened]
        scores = golden[f"t{total}.sim16"][head]
        best = sorted(children, key=lambda c: -float(scores[c]))[: min(int(fine * 0.2), len(children))]
        assert picked[head].tolist() == sorted(best)
        assert len(best) == counts.picked


@pytest.mark.parametrize("total", [80, 120])
def test_parity_output(golden, total):
    """Attention over the released code's clusters, where those are whole and the newest is among them."""
    method = MPCache()
    keys, values = (golden[name].float()[:, :, :total] for name in ("k", "v"))
    fine = -(-total // 16)
    for head in range(2):
        one = slice(head, head + 1)
        chosen = sorted(set(golden[f"t{total}.top16"][head].tolist()) - {0, fine - 1})
        store = store_of(method, keys[:, one, :-1], values[:, one, :-1])
        queries = golden[f"t{total}.q"].float()[None, one, None]
        new = tokens_of(queries, keys[:, one, -1:], values[:, one, -1:])
        picked = torch.tensor(chosen, dtype=torch.long).reshape(1, 1, 1, 1, -1)
        output = attend_clusters(store, 16, picked, new, 8**-0.5)[0, 0, 0]
        torch.testing.assert_close(output, golden[f"t{total}.output"][head], atol=1e-6, rtol=1e-5)


def test_parity_static_step(golden):
    """Its map is our rows without scale and causal mask; its thresholds keep the same tokens."""
    queries = golden["static.q"].float()[:, :, :24]
    keys = golden["static.k"].float()[:, :, :120]
    mean = attention_rows(queries, keys, 1.0, 120, None).mean((1, 2))[0]
    torch.testing.assert_close(mean, golden["static.head_mean"], atol=1e-6, rtol=1e-4)
    for name, threshold in [("narrativeqa", 1e-3), ("triviaqa", 1e-4), ("hotpotqa", 1e-8)]:
        kept = (mean >= threshold).any(0).nonzero()[:, 0]
        assert torch.equal(kept, golden[f"static.{name}.keep"].long())
    # The paper's rule, with as many tokens, keeps other ones: a difference stated so that it stays known.
    votes = attention_rows(queries, keys, 8**-0.5, 96, None).mean((1, 2)).sum(1)[0]
    for name, count, common in [("narrativeqa", 82, 73), ("triviaqa", 100, 94)]:
        ours = set(votes.topk(count).indices.tolist())
        assert len(ours & set(golden[f"static.{name}.keep"].tolist())) == common


# --- the method itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recent", [0, 10, 16])
def test_static_step_keeps_what_the_window_looks_at_and_frees_the_rest(recent):
    model = llama(layers=2)
    method = MPCache(static_keep=0.3, ratios=(1, 1), recent=recent)
    prompt = ids(100)
    full, ours = Full().cache(model), method.cache(model)
    full_layers: list[Tokens] = []
    real = type(full.layers[0]).prefill

    def note(layer, tokens):
        full_layers.append(tokens)
        real(layer, tokens)

    for layer in full.layers:
        layer.prefill = note.__get__(layer)
    run(model, full, prompt)
    run(model, ours, prompt)
    scaling = attention_modules(model)[0].scaling
    for tokens, layer in zip(full_layers, ours.layers, strict=True):
        votes = attention_rows(tokens.queries[:, :, 80:], tokens.keys, scaling, 80, None).mean((1, 2)).sum(1)
        votes[:, 100 - recent :] = float("inf")
        best = votes.topk(30).indices.sort().values[0]
        assert torch.equal(layer.stored_keys, tokens.keys[:, :, best])
        assert torch.equal(layer.stored_values, tokens.values[:, :, best])
        assert layer.stored == 30
    assert ours.nbytes == pytest.approx(0.3 * 2 * Geometry.of(model.config).full_bytes(100), rel=1e-6)
    assert MPCache().voters(24_000) == 4_800
    assert MPCache().voters(30_000) == 3_000


def test_more_recent_tokens_than_kept():
    model = llama(layers=1)
    cache = MPCache(static_keep=0.1, ratios=(1, 1), recent=50).cache(model)
    run(model, cache, ids(100))
    full = Full().cache(model)
    run(model, full, ids(100))
    assert torch.equal(cache.layers[0].stored_keys, full.layers[0].stored_keys[:, :, 90:])


def test_a_group_may_choose_together():
    keys, queries = random_keys(200), random_keys(3, kv_heads=6, seed=1)
    store = store_of(MPCache(), keys)
    each = pick(MPCache(), store, queries)
    together = pick(MPCache(share_group=True), store, queries)
    assert each.shape == together.shape == (1, 2, 3, 3, MPCache().counts(200).picked)
    assert (together == together[:, :, :1]).all()
    assert not (each == each[:, :, :1]).all()
    # Similarity is linear: a group's choice is that of its summed query.
    summed = queries.unflatten(1, (2, 3)).sum(2)
    assert torch.equal(together[:, :, :1], pick(MPCache(), store, summed))
    model = llama()
    passes = [ids(90), ids(1, seed=2), ids(7, seed=3)]
    cache = MPCache(clusters=(8, 4), share_group=True).cache(model)
    run(model, cache, *passes)
    mha = llama(4)
    first = run(mha, MPCache(clusters=(8, 4), share_group=True).cache(mha), *passes)
    assert torch.equal(first, run(mha, MPCache(clusters=(8, 4)).cache(mha), *passes))


def test_bytes_are_those_of_slots_and_summaries():
    model = llama()
    method = MPCache(static_keep=1)
    cache = method.cache(model)
    run(model, cache, ids(100))
    vectors = 2 * 100 + 100 // 16 + 100 // 32  # keys and values, summaries by level
    assert cache.nbytes == 4 * 2 * 8 * 4 * vectors  # float32, kv heads, head_dim, layers
    assert set(cache.report()["parts"]) == {"stored_keys", "stored_values", "coarse", "fine"}
    assert cache.layers[0].attended == 0
    run(model, cache, ids(1))
    # The first cluster, one picked, the tail, itself.
    assert [layer.attended for layer in cache.layers] == [16 + 16 + 4 + 1] * 4


@pytest.mark.parametrize("similarity", ["linear", "max", "mean"])
@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.5, 0.9])
def test_at_budget_is_filled_and_never_exceeded(similarity, fraction):
    model = llama(dtype=torch.bfloat16)
    geometry = Geometry.of(model.config)
    method = MPCache(similarity=similarity).at_budget(fraction, 300, geometry)
    assert method.ratios == (0.5, 0.2)
    cache = method.cache(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model, cache, ids(300))
    share = cache.nbytes / geometry.full_bytes(300)
    assert fraction - 0.012 <= share <= fraction


def test_at_budget_ends():
    geometry = Geometry.of(llama().config)
    whole = MPCache().at_budget(1.0, 100, geometry)
    assert whole.static_keep == 1
    assert whole.ratios == (1, 1)
    with pytest.raises(Unreachable) as caught:
        MPCache().at_budget(0.009, 100, geometry)
    assert caught.value.least == 0.01
    MPCache().at_budget(caught.value.least, 100, geometry)


def test_chunked_prompt_multi_turn_and_one_by_one_agree():
    model = llama()
    prompt, turn = ids(90), ids(9, seed=2)
    whole = SMALL.cache(model)
    run(model, whole, prompt)
    chunked = SMALL.cache(model, chunked=True)
    run(model, chunked, prompt[:, :50], prompt[:, 50:])
    chunked.end_prefill()
    after = run(model, whole, turn, ids(1, seed=3))
    torch.testing.assert_close(run(model, chunked, turn, ids(1, seed=3)), after, atol=1e-5, rtol=1e-4)
    # The first single token ends the prompt as well, leader by follower.
    single = SMALL.cache(model, chunked=True)
    other = SMALL.cache(model)
    run(model, single, prompt[:, :50], prompt[:, 50:])
    run(model, other, prompt)
    tail = [ids(1, seed=4), ids(1, seed=5)]
    torch.testing.assert_close(run(model, single, *tail), run(model, other, *tail), atol=1e-5, rtol=1e-4)
    for layer, twin in zip(single.layers, other.layers, strict=True):
        torch.testing.assert_close(layer.stored_keys, twin.stored_keys, atol=1e-5, rtol=1e-4)


def test_follow_ups_do_not_depend_on_the_tile(monkeypatch):
    model = llama()
    passes = [ids(90), ids(23, seed=2)]
    whole = run(model, SMALL.cache(model), *passes)
    monkeypatch.setattr(mpcache, "TILE", 1)
    torch.testing.assert_close(run(model, SMALL.cache(model), *passes), whole)


@pytest.mark.parametrize("similarity", ["linear", "max", "mean"])
@pytest.mark.parametrize("make", [llama, qwen3])
def test_rows_are_independent(make, similarity):
    model = make()
    method = MPCache(static_keep=0.6, clusters=(8, 4), ratios=(0.5, 0.25), similarity=similarity)
    long, short = ids(80), ids(53, seed=2)
    tails = [ids(1, rows=2, seed=3), ids(6, rows=2, seed=4), ids(1, rows=2, seed=5), ids(1, rows=2, seed=6)]
    pad = 80 - 53
    batch = torch.cat([long, torch.cat([torch.zeros(1, pad, dtype=torch.long), short], 1)])
    mask = torch.ones(2, 80 + 9, dtype=torch.long)
    mask[1, :pad] = 0
    together = run(model, method.cache(model), batch, *tails, mask=mask)
    for row, prompt in enumerate((long, short)):
        alone = run(model, method.cache(model), prompt, *(tail[row : row + 1] for tail in tails))
        torch.testing.assert_close(together[row, 80:], alone[0, prompt.shape[1] :], atol=1e-4, rtol=1e-4)


def test_padding_in_a_follow_up():
    model = llama()
    prompt = ids(70, rows=2)
    turn = ids(6, rows=2, seed=4)
    last = ids(1, rows=2, seed=5)
    mask = torch.ones(2, 77, dtype=torch.long)
    mask[0, 70:73] = 0  # the first row's turn is three tokens shorter
    together = run(model, SMALL.cache(model), prompt, turn, last, mask=mask)
    alone = run(model, SMALL.cache(model), prompt[:1], turn[:1, 3:], last[:1])
    torch.testing.assert_close(together[0, 73:], alone[0, 70:], atol=1e-4, rtol=1e-4)
    alone = run(model, SMALL.cache(model), prompt[1:], turn[1:], last[1:])
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [llama, lambda: llama(dtype=torch.bfloat16), qwen3, neox])
def test_generate_fork_and_reuse(make):
    model = make()
    cache = SMALL.cache(model)
    prompt = ids(70)
    text = model.generate(prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert text.shape == (1, 82)
    assert cache.seen == 81
    assert cache.layers[0].stored == 42 + 11
    twin = cache.fork()
    before = [layer.stored_keys.clone() for layer in cache.layers]
    question = torch.cat([text, ids(5, seed=7)], 1)
    first = model.generate(question, past_key_values=twin, max_new_tokens=6, do_sample=False)
    assert all(torch.equal(layer.stored_keys, old) for layer, old in zip(cache.layers, before, strict=True))
    again = model.generate(question, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(first, again)


def test_beams_and_reset():
    model = llama()
    cache = SMALL.cache(model)
    model.generate(ids(60, rows=2), past_key_values=cache, max_new_tokens=5, num_beams=2, do_sample=False)
    cache.reset()
    assert cache.nbytes == 0
    passes = [ids(60), ids(1)]
    assert torch.equal(run(model, cache, *passes), run(model, SMALL.cache(model), *passes))


def test_storage_dtype():
    model = llama()
    cache = MPCache(static_keep=1, clusters=(8, 4)).cache(model, dtype=torch.bfloat16)
    run(model, cache, ids(60), ids(1))
    assert cache.layers[0].stored_keys.dtype == torch.bfloat16
    assert cache.layers[0].fine.dtype == torch.bfloat16


def test_too_short_a_prompt_is_attended_in_full_with_a_warning():
    model = llama()
    method = MPCache(static_keep=0.5, share_span=1)
    with pytest.warns(UserWarning, match="only 30 tokens"):
        ours = run(model, method.cache(model), ids(60), ids(1))
    static = MPCache(static_keep=0.5, ratios=(1, 1), share_span=1)
    assert torch.equal(ours, run(model, static.cache(model), ids(60), ids(1)))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"static_keep": 0}, "static_keep"),
        ({"window": 1.5}, "window"),
        ({"ratios": (0.5, 0)}, "ratios"),
        ({"ratios": (1.2, 0.5)}, "ratios"),
        ({"alpha": -0.1}, "alpha"),
        ({"clusters": (32, 12)}, "nest"),
        ({"clusters": (8, 16)}, "nest"),
        ({"share_span": 0}, "share_span"),
        ({"share_from": -1}, "share_from"),
        ({"recent": -1}, "recent"),
        ({"similarity": "cosine"}, "similarity"),
    ],
)
def test_bad_parameters(parameters, match):
    with pytest.raises(ValueError, match=match):
        MPCache(**parameters)
