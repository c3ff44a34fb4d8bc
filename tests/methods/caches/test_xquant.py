"""XQuant and XQuant-CL on small random models: exactness, layout, memory, recursion, cost."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from tiny import positions, random_ids, tiny
from transformers import DynamicCache, LlamaConfig, Olmo2Config, Olmo2ForCausalLM, Phi3Config, Phi3ForCausalLM

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.perf.hardware import Device, device
from broadsheet.methods.caches import xquant
from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.xquant import XQuant
from broadsheet.methods.caches.xquant.cost import break_even
from broadsheet.methods.caches.xquant.factors import Factors
from broadsheet.methods.caches.xquant.streams import ChannelStream, fit_group

SIZES = {"num_hidden_layers": 5, "num_attention_heads": 8}
MHA, GQA = 8, 2
PLAIN = {"bits": 16}
CROSS = {"bits": 16, "cross_layer": True, "base_bits": 16, "accumulator_bits": 16}
LLAMA_2_7B = Geometry(layers=32, heads=32, kv_heads=32, head_dim=128, hidden_size=4096)
LLAMA_3_8B = Geometry(layers=32, heads=32, kv_heads=8, head_dim=128, hidden_size=4096)


def build(kind="gqa", kv_heads=MHA, **changes):
    return tiny(kind, **(SIZES | {"num_key_value_heads": kv_heads} | changes))


def olmo2(kv_heads):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.15}
    return Olmo2ForCausalLM(Olmo2Config(**sizes, **SIZES, num_key_value_heads=kv_heads, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def mha():
    return build()


@pytest.fixture(scope="module")
def gqa():
    return build(kv_heads=GQA)


def prompt(rows=2, tokens=40, seed=1):
    return random_ids(rows, tokens, seed)


def padded(ids, pad):
    """A mask that turns the first ``pad[b]`` columns of row b into padding."""
    return (torch.arange(ids.shape[1]) >= torch.tensor(pad)[:, None]).long()


@torch.no_grad()
def run(model, cache, ids, mask=None, sizes=(1,)):
    """Logits of ``ids`` from the first token that ``cache`` has not seen, in passes of ``sizes``; the last
    size repeats."""
    mask = torch.ones_like(ids) if mask is None else mask
    places = positions(mask)
    logits, start, sizes = [], cache.get_seq_length(), list(sizes)
    while start < ids.shape[1]:
        stop = min(start + (sizes.pop(0) if len(sizes) > 1 else sizes[0]), ids.shape[1])
        logits.append(
            model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=places[:, start:stop],
                past_key_values=cache,
            ).logits
        )
        start = stop
    return torch.cat(logits, 1)


def far(a, b, mask=None):
    gap = (a - b).abs().amax(-1)
    return float((gap if mask is None else gap[mask.bool()]).max())


# --- acceptance -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("fields", [PLAIN, CROSS])
@pytest.mark.parametrize("pad", [(0, 0), (13, 0)])
def test_acceptance_1_sixteen_bits_equal_the_full_cache(mha, gqa, kv_heads, fields, pad):
    model = mha if kv_heads == MHA else gqa
    ids = prompt(tokens=80)
    mask = padded(ids, pad)
    cache = XQuant(**fields).cache(model)
    assert (cache.factors.nbytes > 0) == (kv_heads == GQA)
    truth = run(model, DynamicCache(), ids, mask, sizes=(30, 1))
    assert far(run(model, cache, ids, mask, sizes=(30, 1)), truth, mask) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acceptance_2_factors(dtype):
    model = build(kv_heads=GQA).to(dtype)
    plain, cross = XQuant().prepare(model), XQuant(cross_layer=True).prepare(model)
    # float64 factors, kept in the weights' dtype: 1e-6 and 1e-5 need float32.
    tight, loose = (1e-6, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    for index, layer in enumerate(model.model.layers):
        factors = plain.of(index)
        for which, projection in (("k", layer.self_attn.k_proj), ("v", layer.self_attn.v_proj)):
            u, m = factors[f"U_{which}"], factors[f"M_{which}"]
            assert u.dtype == m.dtype == dtype
            u, m, weight = u.float(), m.float(), projection.weight.detach().float()
            assert (u.T @ u - torch.eye(u.shape[1])).abs().max() < tight
            assert (u @ m - weight.T).abs().max() < loose
            assert torch.equal(u.amax(0), u.abs().amax(0))  # signs are fixed: the largest entry is positive
    # With Q = identity a delta through U_kv leaves keys and values exact, although U_kv U_kv^T is not 1.
    attention = model.model.layers[4].self_attn
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach().float()
    basis = cross.of(4)["U_kv"].float()
    x, below = torch.randn(2, 20, 64).unbind()
    lifted = below + (x - below) @ basis @ basis.T
    assert (lifted @ weight.T - x @ weight.T).abs().max() < (1e-4 if dtype == torch.float32 else 0.2)
    assert (lifted - x).norm() > 0.3 * x.norm()
    assert set(cross.of(1)) == {"U_k", "M_k", "U_v", "M_v"}
    assert set(cross.of(2)) == {"U_kv"}


def test_acceptance_3_size_formula():
    for bits, size in ((4, 0.13), (3, 0.10), (2, 0.07)):
        assert XQuant(bits).paper_size(LLAMA_2_7B) == (bits + 0.25) / 32 == pytest.approx(size, abs=0.005)
        assert XQuant(bits).paper_size(LLAMA_3_8B) == 2 * XQuant(bits).paper_size(LLAMA_2_7B)
    for bits, size in ((3, 0.10), (2, 0.08)):  # 3 of 32 layers at 4 bits: 0.1045 and 0.0762
        crossed = XQuant(bits, cross_layer=True)
        assert crossed.paper_size(LLAMA_2_7B) == (3 * 4.25 + 29 * (bits + 0.25)) / 32**2 == pytest.approx(size, abs=0.005)
        assert crossed.paper_size(LLAMA_3_8B) == 2 * crossed.paper_size(LLAMA_2_7B)


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_acceptance_3_bytes_are_those_of_the_stored_tensors(mha, gqa, kv_heads, cross_layer, bits):
    model = mha if kv_heads == MHA else gqa
    method = XQuant(bits, cross_layer=cross_layer, residual=16, group_size=24)
    cache = method.cache(model, dtype=torch.bfloat16)
    run(model, cache, prompt(1, 75), sizes=(70, 1))
    report = cache.report()
    assert report["nbytes"] == cache.nbytes == sum(report["parts"].values())
    assert cache.nbytes == method.expected_bytes(75, Geometry.of(model.config))
    assert (report["factor_bytes"] > 0) == (kv_heads == GQA)
    assert (report["accumulator_bytes"] > 0) == cross_layer


def kept_states(model, tokens):
    """Live tensors shaped as the keys or values of ``tokens`` tokens or more."""
    gc.collect()
    config = model.config
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor)
        and thing.ndim == 4
        and thing.shape[1] == config.num_key_value_heads
        and thing.shape[2] >= tokens
        and thing.shape[3] == config.head_dim
    ]


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("cross_layer", [False, True])
def test_acceptance_4_no_keys_or_values_survive(mha, gqa, kv_heads, cross_layer):
    model = mha if kv_heads == MHA else gqa
    tokens, sizes = 64, []
    method = XQuant(cross_layer=cross_layer, residual=16)
    before = len(kept_states(model, tokens))
    cache = method.cache(model, dtype=torch.bfloat16)
    ids = prompt(1, 4 * tokens)
    for turn in range(2, 5):  # each ends with steps that rebuild everything stored
        run(
            model,
            cache,
            ids[:, : turn * tokens],
            sizes=(2 * tokens - 2, 1, 1, tokens - 2, 1, 1, tokens - 2, 1),
        )
        sizes.append(cache.nbytes)
        assert len(kept_states(model, tokens)) == before
        assert cache.walk == {}
    held = cache.layers[0].slots()
    assert len(kept_states(model, tokens)) == before + 2  # the audit does see what is kept
    del held
    geometry = Geometry.of(model.config)
    assert sizes == [method.expected_bytes(turn * tokens, geometry) for turn in range(2, 5)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]  # whole blocks of 16: linear
    # X of 64 in one group, or key latents in groups of 16 tokens and value latents in one of 16 channels.
    bits = 64 * 4 + 32 if kv_heads == MHA else 2 * (16 * 4 + 32)
    crossing = 32 * 4 + 32 if kv_heads == GQA else bits  # X U_kv
    layers = 2 * bits + 3 * crossing if cross_layer else 5 * bits
    assert sizes[1] - sizes[0] == tokens * (layers / 8 + 4)  # and a position


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("fields", [PLAIN, CROSS])
def test_acceptance_5_keys_are_rotated_to_their_true_positions(mha, gqa, kv_heads, fields):
    model = mha if kv_heads == MHA else gqa
    ids = prompt(1, 60)
    cache, fresh = XQuant(**fields).cache(model), Full().cache(model)
    run(model, cache, ids, sizes=(20, 1))
    run(model, fresh, ids, sizes=(60,))
    for layer, true in zip(cache.layers, fresh.layers):
        rebuilt = layer.slots()
        for position in (0, 19, 20, 30, 59):
            for ours, theirs in ((rebuilt.keys, true.stored_keys), (rebuilt.values, true.stored_values)):
                assert (ours[:, :, position] - theirs[:, :, position]).abs().max() < 1e-4


def recorded(model, cache, ids, sizes):
    """Runs the model and returns X of every layer, [layers, batch, tokens, hidden_size]."""
    seen = [[] for _ in cache.layers]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, __, kwargs, into=into: into.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for module, into in zip((layer.module for layer in cache.layers), seen)
    ]
    run(model, cache, ids, sizes=sizes)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(parts, 1) for parts in seen])


@pytest.mark.parametrize("accumulator_bits", [4, 16])
def test_acceptance_6_the_closed_loop_does_not_drift(accumulator_bits):
    model = build(num_hidden_layers=14)
    cache = XQuant(2, cross_layer=True, accumulator_bits=accumulator_bits).cache(model)
    x = recorded(model, cache, prompt(2, 60), sizes=(40, 1))
    opened = None
    for index in range(2, 14):
        layer = cache.layers[index]
        error = x[index] - layer.reconstruct(0, 60)
        # One quantisation of this layer's delta: half a step, and the float16 of scale and zero.
        items = layer.streams["x"].items
        step = items.scale.float()
        bound = (0.5 * step + 2**-10 * (items.zero.float().abs() + 3 * step)).expand(-1, -1, 64)
        assert (error.abs() <= bound).all()
        assert error.norm() <= bound.norm()
        if index == 2:
            opened = layer.reconstruct(0, 60)
        else:
            opened = opened + quantise_groups(x[index] - x[index - 1], 2, 64).dequantise()
    adrift = x[13] - opened
    assert adrift.norm() > 1.5 * bound.norm()
    assert adrift.norm() > 3 * error.norm()


def test_acceptance_7_only_full_blocks_are_quantised():
    size, rows = 128, torch.zeros(1, dtype=torch.long)
    x = torch.randn(1, 300, 8)
    stream, count, before = ChannelStream(4, 128, torch.float32, size), 0, None
    for take in (127, 1, 100, 27, 1, 44):
        stream = stream.extend(x[:, count : count + take], rows + count, rows + take)
        count += take
        got = stream.read(0, count, rows + count)
        packed = count // size * size
        assert torch.equal(got[:, packed:], x[:, packed:count])
        assert stream.tail.shape[1] == count - packed < size
        if packed:
            block = slice(packed - size, packed)
            assert not torch.equal(got[:, block], x[:, block])
        if before is not None:  # crossing the boundary changes nothing but the block it closes
            settled = (count - take) // size * size
            assert torch.equal(got[:, :settled], before[:, :settled])
        before = got
    assert got.shape[1] == 300
    step = (x[:, :128].amax(1) - x[:, :128].amin(1)) / 15
    assert ((got - x)[:, :128].abs() <= 0.51 * step[:, None]).all()


def test_acceptance_8_break_even_lengths():
    ridge = device("h100-pcie").turning_point("bf16")
    assert break_even(4096, 2, ridge) == pytest.approx(2281, rel=5e-3)
    assert break_even(4096, 2, ridge, group=4, streams=1) == pytest.approx(40_628, rel=5e-3)
    assert break_even(4096, 2, ridge, group=4) == pytest.approx(41_610, rel=5e-3)
    assert break_even(4096, 2, 4 * 4096**2 / (4096 / 4)) == float("inf")


def with_outliers(model, alpha):
    """Scales the norm gain of the channel with the largest |X| of each layer and undoes it in the
    projections."""
    cache = Full().cache(model)
    x = recorded(model, cache, prompt(4, 60), sizes=(60,))
    with torch.no_grad():
        for layer, states in zip(model.model.layers, x):
            channel = int(states.abs().amax((0, 1)).argmax())
            layer.input_layernorm.weight[channel] *= alpha
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight[:, channel] /= alpha
    return x


def pre_rotary_kivi(model, bits):
    """KIVI before the rotation is XQuant's latent layout with U = W and M = 1: keys per channel, values per
    token."""
    cache = XQuant(bits, latent="svd", residual=32, group_size=32).cache(model)
    tensors = {}
    for index, layer in enumerate(cache.layers):
        for which, projection in (("k", layer.module.k_proj), ("v", layer.module.v_proj)):
            tensors[f"layers.{index}.U_{which}"] = projection.weight.detach().T
            tensors[f"layers.{index}.M_{which}"] = torch.eye(len(projection.weight))
    cache.factors = Factors(tensors)
    return cache


def test_acceptance_9_outliers_keep_the_function_and_xquant_beats_pre_rotary_kivi():
    alpha = 4.0
    plain, scaled = build(hidden_size=128), build(hidden_size=128)
    ids = prompt(2, 140)
    before = with_outliers(scaled, alpha)
    after = recorded(scaled, Full().cache(scaled), prompt(4, 60), sizes=(60,))
    truth = run(plain, DynamicCache(), ids, sizes=(128, 1))
    assert far(run(scaled, DynamicCache(), ids, sizes=(128, 1)), truth) < 1e-4
    peaks = [x.abs().amax((1, 2, 3)) / x.abs().flatten(1).median(1).values for x in (before, after)]
    assert (peaks[1] / peaks[0]).numpy() == pytest.approx(alpha, rel=0.02)
    ours, theirs = XQuant(4, group_size=32).cache(scaled), pre_rotary_kivi(scaled, 2)
    errors = [(run(scaled, cache, ids, sizes=(128, 1)) - truth)[:, 128:].norm() for cache in (ours, theirs)]
    assert ours.nbytes <= theirs.nbytes
    assert errors[0] < errors[1]


# --- the contract of a cache ----------------------------------------------------------------------

VARIANTS = [
    pytest.param(MHA, {"bits": 4}, id="mha"),
    pytest.param(GQA, {"bits": 4, "residual": 16}, id="gqa"),
    pytest.param(MHA, {"bits": 3, "cross_layer": True}, id="mha-cl"),
    pytest.param(GQA, {"bits": 3, "cross_layer": True, "residual": 16}, id="gqa-cl"),
]


@pytest.mark.parametrize(("kv_heads", "fields"), VARIANTS)
def test_a_batch_of_two_is_the_two_alone(mha, gqa, kv_heads, fields):
    model = mha if kv_heads == MHA else gqa
    ids = prompt(2, 62)
    mask = padded(ids, (11, 0))
    mask[0, 40:44] = 0  # the second turn of the first row is shorter, too
    cache = XQuant(**fields).cache(model)
    together = run(model, cache, ids, mask, sizes=(40, 8, 1))
    for row, sizes in ((0, (29, 4, 1)), (1, (40, 8, 1))):
        real = mask[row].bool()
        single = XQuant(**fields).cache(model)
        alone = run(model, single, ids[row : row + 1, real], sizes=sizes)
        assert far(together[row : row + 1, real], alone) < 1e-3
        for layer, other in zip(cache.layers, single.layers):
            ours, theirs = layer.slots(), other.slots()
            assert ours.valid[row, 0].sum() == real.sum() == theirs.keys.shape[2]
            assert (ours.keys[row, :, : real.sum()] - theirs.keys[0]).abs().max() < 1e-3


@pytest.mark.parametrize(("kv_heads", "fields"), VARIANTS)
def test_turns_of_many_tokens_chunks_and_forks(mha, gqa, kv_heads, fields):
    model = mha if kv_heads == MHA else gqa
    ids = prompt(2, 70)
    exact = XQuant(**(fields | {"bits": 16, "base_bits": 16, "accumulator_bits": 16})).cache(model)
    truth = run(model, DynamicCache(), ids, sizes=(30, 1, 20, 7, 1))
    assert far(run(model, exact, ids, sizes=(30, 1, 20, 7, 1)), truth) < 1e-4
    # A prompt in chunks is the prompt in one pass.
    whole, chunked = XQuant(**fields).cache(model), XQuant(**fields).cache(model, chunked=True)
    one = run(model, whole, ids[:, :50], sizes=(40, 1))
    assert far(run(model, chunked, ids[:, :50], sizes=(16, 16, 8, 1)), one) < 1e-3
    assert chunked.nbytes == whole.nbytes
    # What a fork goes through leaves the original as it was.
    twin, size = whole.fork(), whole.nbytes
    ahead = run(model, twin, ids, sizes=(12, 1))
    assert whole.nbytes == size
    assert whole.seen == 50
    assert torch.equal(run(model, whole, ids, sizes=(12, 1)), ahead)
    assert whole.seen == twin.seen == 70
    assert whole.nbytes == twin.nbytes > size


@pytest.mark.parametrize(("kv_heads", "fields"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(kv_heads, fields, dtype):
    model = build(kv_heads=kv_heads).to(dtype)
    ids = prompt(2, 30)
    asked = {
        "attention_mask": padded(ids, (5, 0)),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cache = XQuant(**fields).cache(model)
    out = model.generate(ids, past_key_values=cache, **asked)
    assert out.shape == (2, 42)
    assert cache.seen == 41
    assert cache.nbytes < Geometry.of(model.config).full_bytes(2 * 41) * dtype.itemsize / 2
    sixteen = fields | {"bits": 16, "base_bits": 16, "accumulator_bits": 16}
    if dtype == torch.float32:
        same = model.generate(ids, past_key_values=XQuant(**sixteen).cache(model), **asked)
        assert torch.equal(same, model.generate(ids, **asked))
        beams = model.generate(ids, past_key_values=XQuant(**sixteen).cache(model), num_beams=2, **asked)
        assert torch.equal(beams, model.generate(ids, num_beams=2, **asked))


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("fields", [PLAIN, CROSS])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "olmo2"])  # bias, head norm, norm of all heads together
def test_other_attentions(kind, kv_heads, fields):
    model = olmo2(kv_heads) if kind == "olmo2" else build(kind, kv_heads, head_dim=8)
    with torch.no_grad():  # fresh biases and gains are 0 and 1
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "k_norm.weight")):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    ids = prompt(2, 50)
    cache = XQuant(**fields).cache(model)
    assert far(run(model, cache, ids, sizes=(30, 1)), run(model, DynamicCache(), ids, sizes=(30, 1))) < 1e-4


@pytest.mark.parametrize(("kv_heads", "fields"), VARIANTS)
def test_tiles_and_walks_change_nothing(mha, gqa, kv_heads, fields, monkeypatch):
    model = mha if kv_heads == MHA else gqa
    ids = prompt(2, 60)
    mask = padded(ids, (9, 0))
    cache = XQuant(**fields).cache(model)
    run(model, cache, ids, mask, sizes=(50, 1))
    for layer in cache.layers:
        whole = layer.slots()
        monkeypatch.setattr(xquant, "TILE", 7)
        tiled = layer.slots()
        monkeypatch.undo()
        assert (whole.keys - tiled.keys).abs().max() < 1e-4
        assert (whole.values - tiled.values).abs().max() < 1e-4
        walked = layer.rematerialised(walking=True)  # layer after layer, as in a forward pass
        assert torch.equal(walked.keys, whole.keys)
    assert cache.walk == {}


@pytest.mark.parametrize("kv_heads", [MHA, GQA])
@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("fraction", [0.12, 0.25, 0.4, 0.7])
@pytest.mark.parametrize("tokens", [50, 200])
def test_at_budget(kv_heads, cross_layer, fraction, tokens):
    model = build(kv_heads=kv_heads)
    geometry = Geometry.of(model.config)
    family = XQuant(cross_layer=cross_layer)
    try:
        method = family.at_budget(fraction, tokens, geometry)
    except Unreachable as refusal:
        least = refusal.least
        with pytest.raises(Unreachable):
            family.at_budget(0.999 * least, tokens, geometry)
        method, fraction = family.at_budget(least, tokens, geometry), least
    cache = method.cache(model, dtype=torch.bfloat16)
    run(model, cache, prompt(1, tokens), sizes=(tokens,))
    assert cache.nbytes <= fraction * geometry.full_bytes(tokens)
    assert family.at_budget(1.0, tokens, geometry).bits == 16


def test_at_budget_fills_and_takes_the_least_error():
    geometry = Geometry(layers=4, heads=4, kv_heads=2, head_dim=64, hidden_size=256)
    for cross_layer, fraction, filled in ((False, 0.5, 0.43), (False, 0.25, 0.235), (True, 0.5, 0.49), (True, 0.25, 0.24)):
        family = XQuant(cross_layer=cross_layer)
        method = family.at_budget(fraction, 512, geometry)
        assert (
            filled * geometry.full_bytes(512) < method.expected_bytes(512, geometry) <= fraction * geometry.full_bytes(512)
        )
        assert method.bits <= method.accumulator_bits
        coarser = replace(method, group_size=128, bits=2, base_bits=2)
        assert method.expected_error(512, geometry) < coarser.expected_error(512, geometry)
    assert XQuant(cross_layer=True).at_budget(0.5, 512, geometry).base_bits == 8  # what is left goes to the base layers


def test_factors_are_made_once_and_survive_the_disk(tmp_path, monkeypatch):
    model, other = build(kv_heads=GQA), build(kv_heads=GQA)
    with torch.no_grad():
        other.model.layers[3].self_attn.v_proj.weight[0, 0] += 1
    calls = []
    svd = xquant.factors._svd
    monkeypatch.setattr(xquant.factors, "_svd", lambda weight: calls.append(1) or svd(weight))
    made = XQuant().prepare(model)
    XQuant(2).cache(model)
    assert len(calls) == 2 * 5
    XQuant(cross_layer=True).prepare(model)  # adds layers 2 to 4
    XQuant(cross_layer=True).cache(model)
    assert len(calls) == 2 * 5 + 3
    path = tmp_path / "factors.safetensors"
    made.save(path)
    fresh = build(kv_heads=GQA)
    loaded = XQuant().load(path, fresh)
    assert len(calls) == 2 * 5 + 3
    assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in made.tensors.items())
    assert XQuant().cache(fresh).factors.nbytes == made.nbytes > 0
    assert len(calls) == 2 * 5 + 3
    with pytest.raises(ValueError, match="other weights"):
        XQuant().load(path, other)
    with pytest.raises(ValueError, match=r"lacks layers\.2\.U_kv"):
        XQuant(cross_layer=True).load(path, fresh)
    with torch.no_grad():
        fresh.model.layers[0].self_attn.k_proj.weight.mul_(2)
    XQuant().prepare(fresh)  # changed weights, new factors
    assert len(calls) == 4 * 5 + 3
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of XQuant factors"):
        XQuant().load(path, model)
    with pytest.raises(FileNotFoundError):
        XQuant().load(tmp_path / "none", model)


def test_reset_and_reuse(gqa):
    cache = XQuant(residual=16).cache(gqa)
    ids = prompt(2, 40)
    first = run(gqa, cache, ids, sizes=(30, 1))
    cache.reset()
    assert cache.nbytes == 0
    assert torch.equal(run(gqa, cache, ids, sizes=(30, 1)), first)


def test_what_is_refused():
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 97, "pad_token_id": 0}
    phi = Phi3ForCausalLM(Phi3Config(**small, **SIZES, num_key_value_heads=8, sliding_window=None))
    with pytest.raises(ValueError, match="Phi3Attention has no separate k_proj"):
        XQuant().cache(phi)
    with pytest.raises(ValueError, match="GPTNeoXAttention has no separate k_proj"):
        XQuant().cache(tiny("neox"))
    for fields, message in (
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, 16, got 5"),
        ({"accumulator_bits": 1}, "accumulator_bits must be"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"latent": "pca"}, "latent must be auto, none or svd"),
    ):
        with pytest.raises(ValueError, match=message):
            XQuant(**fields)
    with pytest.raises(ValueError, match="needs at least base_layers \\+ 1 = 6 layers, this model has 5"):
        XQuant(cross_layer=True, base_layers=5).cache(build())
    with pytest.warns(UserWarning, match="2 times the memory of a KV cache"):
        XQuant(latent="none").cache(build(kv_heads=GQA))
    scaled = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        XQuant().cache(build(rope_parameters=scaled))
    with pytest.raises(RuntimeError, match="in order"):
        XQuant(cross_layer=True).cache(build()).from_below("read", 4)


def test_an_attention_that_is_not_rebuilt_is_noticed():
    model = build()
    keys = model.model.layers[1].self_attn.k_proj
    keys.register_forward_hook(lambda module, args, out: out + 3 * (args[0].shape[1] > 1))
    with pytest.raises(ValueError, match="does not make keys and values by"):
        run(model, XQuant().cache(model), prompt(1, 8), sizes=(8,))


@pytest.mark.parametrize(("width", "asked", "group"), [(256, 128, 128), (192, 128, 96), (64, 128, 64), (32, 24, 16)])
def test_groups_are_equal_parts(width, asked, group):
    assert fit_group(width, asked) == group


def test_cost_model():
    llama = LlamaConfig(
        hidden_size=4096,
        intermediate_size=32768 // 3,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    cost = XQuant(2, group_size=4096).cost_model(llama, seq_len=1000)
    assert cost.flop == 2 * 4 * 1000 * 4096**2
    assert cost.cache_bytes == pytest.approx(2 * 1000 * 4096 * (2 + 32 / 4096) / 8)
    assert cost.kv_bytes == 2 * 2 * 1000 * 4096 * 2
    assert cost.bound == "memory"
    assert cost.break_even == pytest.approx(2281, rel=5e-3)  # 12 d^2 weights a layer, as in the paper
    assert XQuant(2).cost_model(llama, seq_len=4000).bound == "compute"
    assert XQuant(2).cost_model(llama, seq_len=1000, batch=4).bound == "compute"
    at = XQuant(2).cost_model(llama, seq_len=1000).break_even
    edge = XQuant(2).cost_model(llama, seq_len=round(at))
    assert edge.compute_seconds == pytest.approx(edge.memory_seconds, rel=1e-3)
    grouped = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert XQuant(2, group_size=1024).cost_model(grouped, 1000).break_even == pytest.approx(41_610, rel=5e-3)
    plain, crossed = (XQuant(2, cross_layer=cross).cost_model(grouped, 1000) for cross in (False, True))
    assert plain.accumulator_bytes == 0 < crossed.accumulator_bytes
    assert plain.flop == 8 * 4 * 1000 * 1024**2
    assert crossed.flop == 1000 * (2 * 4 * 1024**2 + 6 * 8 * 1024 * 4096 + 5 * 2 * 4096)
    with pytest.raises(ValueError, match="no device 'abacus'"):
        XQuant().cost_model(llama, 10, hardware="abacus")
    level = Device("level", "level", 1e12, {"bf16": 1e12})
    assert XQuant().cost_model(llama, 10, hardware=level).ridge == 1
