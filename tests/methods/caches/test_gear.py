"""GEAR: its acceptance checks, and parity with numbers that the authors' code gave."""

import hashlib
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SHARED, random_ids, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from broadsheet.core.numerics.packing import unpack
from broadsheet.methods.caches.base import Geometry
from broadsheet.methods.caches.blocks import bits_per_element
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.gear import GEAR, GearBlock, compress_block, power_iteration
from broadsheet.methods.caches.kivi import KIVI

ROOT = Path(__file__).parents[3]
EXACT = torch.float32  # store scales, outliers and factors unrounded


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """Vectors of opengear-project/GEAR; tests/golden/README.md says how they were made."""
    return load_file(ROOT / "tests/golden/gear_official.safetensors")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("gqa", num_hidden_layers=2)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(approximate: torch.Tensor, true: torch.Tensor) -> float:
    return float((approximate - true).norm() / true.norm())


def truncated_svd(residual: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(residual.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


# --- acceptance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "errors"),
    [
        (2, (0.568, 0.521, 0.349, 0.317)),
        (3, (0.232, 0.215, 0.149, 0.135)),
        (4, (0.108, 0.100, 0.070, 0.064)),
    ],
)
def test_acceptance_1_each_part_takes_its_share_of_the_error(bits, errors):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((512, 6)) @ rng.standard_normal((6, 64)) + 0.3 * rng.standard_normal((512, 64))
    x = x + (rng.random((512, 64)) < 0.01) * 12 * rng.standard_normal((512, 64))
    x = x[None, None]
    true, measured = torch.from_numpy(x), []
    for sparsity in (0, 0.02):
        backbone = compress_block(x, "key", bits, 64, sparsity, rank=0).decompress().double()
        low_rank = truncated_svd(true - backbone, 4)
        measured += [relative(backbone, true), relative(backbone + low_rank, true)]
    # /+S and /+L are listed the other way round: quantised, +L, +S, both.
    assert measured == pytest.approx(errors, rel=0.02)
    both = compress_block(x, "key", bits, 64).decompress().double()
    assert measured[3] < relative(both, true) < measured[2]


@pytest.mark.parametrize("kind", ["key", "value"])
def test_acceptance_2_the_limits_are_exact(model, kind):
    x = draw(2, 2, 64, 16).half().float()
    bare = compress_block(x, kind, 3, 32, sparsity=0, rank=0, dtype=EXACT)
    full_rank = compress_block(x, kind, 3, 32, sparsity=0, rank=16, dtype=EXACT)
    assert torch.equal(bare.backbone(), full_rank.backbone())
    assert torch.equal(bare.decompress(), bare.backbone())
    residual = x - bare.decompress()
    assert relative(full_rank.decompress() - bare.decompress(), residual) < 1e-5
    assert torch.equal(compress_block(x, kind, 2, 32, sparsity=1.0, rank=0).decompress(), x)


@torch.no_grad()
def test_acceptance_2_without_its_parts_gear_is_its_backbone(model):
    ids = random_ids(2, 64, 1)
    gear = GEAR(bits=2, group_size=16, sparsity=0, rank_prefill=0, rank_decode=0, buffer=16).cache(model)
    kivi = KIVI(bits=2, group_size=16, residual=0).cache(model)
    for cache in (gear, kivi):
        model(ids, past_key_values=cache)
    for ours, theirs in zip(gear.layers, kivi.layers):
        assert torch.equal(ours.slots().keys, theirs.slots().keys)
        assert torch.equal(ours.slots().values, theirs.slots().values)
    assert gear.nbytes == kivi.nbytes


@pytest.fixture(scope="module")
def real_states() -> list[tuple[str, torch.Tensor]]:
    """Keys and values [1, 4, 192, 8] of the five layers of a pretrained model on its own text."""
    folder = SHARED / "models" / "stories260K" / "fp32"
    if not folder.is_dir():
        pytest.skip("shared models are not here; set BROADSHEET_SHARED")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = Full().cache(model)
    model.generate(torch.tensor([[1]]), past_key_values=cache, max_new_tokens=192, do_sample=False, pad_token_id=0)
    slots = [layer.slots() for layer in cache.layers]
    return [("key", one.keys) for one in slots] + [("value", one.values) for one in slots]


@pytest.mark.parametrize("sparsity", [0, 0.02])
@pytest.mark.parametrize(("rank", "tokens"), [(4, 128), (2, 64)])
def test_acceptance_3_power_iteration_is_near_the_svd(golden, rank, tokens, sparsity):
    for source, kind in (("k", "key"), ("v", "value")):
        x = golden[source].float()[:, :, :tokens]
        block = compress_block(x, kind, 2, 64, sparsity, rank, dtype=EXACT)
        residual = x - block.backbone()
        ours = (x - block.decompress()).norm(dim=(-2, -1))
        best = (residual - truncated_svd(residual, rank)).norm(dim=(-2, -1))
        assert (ours <= 1.05 * best).all()  # every head


@pytest.mark.parametrize(("rank", "tokens"), [(4, 128), (2, 64)])
def test_acceptance_3_low_rank_never_hurts(real_states, rank, tokens):
    for kind, x in real_states:
        for loops in (1, 3):
            block = compress_block(x[:, :, :tokens], kind, 2, 32, 0.0625, rank, loops)
            before = (x[:, :, :tokens] - block.backbone()).norm(dim=(-2, -1))
            assert ((x[:, :, :tokens] - block.decompress()).norm(dim=(-2, -1)) < before).all()


@pytest.mark.xfail(
    strict=True,
    reason="head_dim 8 leaves a flat spectrum: after three loops single blocks are up to 10 % from the SVD",
)
def test_acceptance_3_within_5_percent_for_every_block_of_a_model_with_tiny_heads(real_states):
    for kind, x in real_states:
        block = compress_block(x[:, :, :128], kind, 2, 32, 0, rank=4, dtype=EXACT)
        residual = x[:, :, :128] - block.backbone()
        assert (x[:, :, :128] - block.decompress()).norm() <= 1.05 * (residual - truncated_svd(residual, 4)).norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_acceptance_4_codes_and_bytes(kind, bits):
    block = compress_block(draw(1, 2, 128, 32), kind, bits, 32, sparsity=0.0625, rank=3)
    codes = unpack(block.codes.codes, bits, 32)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    assert block.codes.codes.nbytes == math.ceil(128 * 64 * bits / 8)
    length, vectors = (128, 64) if kind == "key" else (64, 128)
    assert block.outliers.shape == (1, vectors, 2 * int(0.0625 / 2 * length))
    held = (
        block.codes.codes,
        block.codes.scale,
        block.codes.zero,
        block.indices,
        block.outliers,
        block.a,
        block.b,
    )
    assert block.nbytes == sum(tensor.nbytes for tensor in held)


@torch.no_grad()
def test_acceptance_4_bits_per_element_follow_the_formula(model):
    n, d, s, r = 128, 16, 0.0625, 2
    method = GEAR(bits=2, group_size=32, sparsity=s, rank_prefill=r)
    cache = method.cache(model, dtype=torch.bfloat16)
    ids = random_ids(1, n + 5, 1)
    model(ids[:, :n], past_key_values=cache)
    bits = bits_per_element(cache)
    assert bits["codes"] == 2
    assert bits["scales"] == 32 / 32
    assert bits["sparse"] == s * (16 + 8)  # 128 tokens, 32 channels: an index fits one byte
    assert bits["low_rank"] == 16 * r * (n + d) / (n * d)
    assert bits["total"] == sum(value for name, value in bits.items() if name != "total")
    model(ids[:, n:], past_key_values=cache)
    assert cache.report()["parts"]["buffer"] == 2 * 5 * 2 * 32 * 2  # layers, tokens, K and V, channels, bytes


@torch.no_grad()
def test_acceptance_5_blocks_never_change_and_seeds_decide(model):
    method = GEAR(bits=2, group_size=8, sparsity=0.1, buffer=8)
    ids = random_ids(2, 120, 2)

    def digest(layer) -> str:
        parts = [layer.prompt_block, *layer.blocks[:1]]
        blocks = [block for pair in parts for block in (pair.keys, pair.values)]
        held = [t for b in blocks for t in (b.codes.codes, b.codes.scale, b.indices, b.outliers, b.a, b.b)]
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in held)).hexdigest()

    cache, again, other = (
        method.cache(model),
        method.cache(model),
        GEAR(**{**method.parameters, "seed": 1}).cache(model),
    )
    for one in (cache, again, other):
        model(ids[:, :20], past_key_values=one)
        model(ids[:, 20:28], past_key_values=one)
    before = [digest(layer) for layer in cache.layers]
    assert before == [digest(layer) for layer in again.layers]
    assert before != [digest(layer) for layer in other.layers]
    for part in ids[:, 28:].split(4, 1):
        model(part, past_key_values=cache)
    assert len(cache.layers[0].blocks) == 13
    assert before == [digest(layer) for layer in cache.layers]
    starts = [pair.keys.b for pair in cache.layers[0].blocks[:2]]
    assert not torch.equal(*starts)


@pytest.mark.parametrize("group", [16, None], ids=["kivi", "kcvt"])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 8), (2, 2, 5, 8), (1, 2, 37, 8), (1, 1, 64, 16)])
def test_acceptance_6_odd_blocks(shape, kind, group):
    for x in (torch.full(shape, 3.25), torch.zeros(shape), draw(*shape), draw(*shape) * 1e4):
        x = x.clone()
        x[..., 0] = draw(*shape[:3], seed=5) * 1000  # a channel that is all outliers
        for sparsity in (0, 0.02, 0.3):
            block = compress_block(x, kind, 2, group, sparsity, rank=min(2, shape[2]))
            for dtype in (torch.float32, torch.bfloat16):
                back = block.decompress(dtype)
                assert back.shape == shape
                assert back.dtype == dtype
                assert back.isfinite().all()
    constant = torch.full(shape, 3.25)
    assert torch.equal(compress_block(constant, kind, 2, group, rank=1).decompress(), constant)


@pytest.mark.parametrize("sparsity", [0, 0.1])
def test_acceptance_7_factored_products(sparsity):
    keys, values, queries = draw(2, 2, 96, 16), draw(2, 2, 96, 16, seed=1), draw(2, 6, 5, 16, seed=2)
    k = compress_block(keys, "key", 2, 32, sparsity)
    v = compress_block(values, "value", 2, 32, sparsity)
    wide = [block.decompress().repeat_interleave(3, 1) for block in (k, v)]
    weights = (queries @ wide[0].mT / 4).softmax(-1)
    torch.testing.assert_close((k.scores(queries) / 4).softmax(-1), weights, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(v.mix(weights), weights @ wide[1], atol=1e-4, rtol=1e-4)
    # The three terms one by one: D with its filtered places empty, S, and L by its factors.
    places = k.indices.long()
    dense = k.codes.dequantise().mT
    d_hat = dense.scatter(-1, places, 0.0).mT.unflatten(-1, (2, 16)).transpose(1, 2)
    s = torch.zeros_like(dense).scatter(-1, places, k.outliers.float()).mT.unflatten(-1, (2, 16)).transpose(1, 2)
    q = queries[:, :3]
    head = [part[:, :1].float() for part in (d_hat, s, k.a, k.b)]
    product = q @ head[0].mT + q @ head[1].mT + (q @ head[3]) @ head[2].mT
    torch.testing.assert_close(k.scores(queries)[:, :3], product, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "source", "kind", "bits", "group"),
    [
        ("kivi2_k", "k", "key", 2, 64),
        ("kivi2_v", "v", "value", 2, 64),
        ("kivi4_k", "k", "key", 4, 64),
        ("kivi4_v", "v", "value", 4, 64),
        ("kcvt4_k", "k", "key", 4, None),
        ("kcvt4_v", "v", "value", 4, None),
    ],
)
def test_acceptance_8_backbone_equals_the_official_one_bit_for_bit(golden, name, source, kind, bits, group):
    block = compress_block(golden[source], kind, bits, group, sparsity=0, rank=0, dtype=EXACT)
    codes = unpack(golden[f"{name}.codes"], bits, 128).float()
    scale, low = golden[f"{name}.scale"], golden[f"{name}.min"]
    axis, times = (0, len(codes) // len(scale)) if kind == "key" else (1, 128 // scale.shape[1])
    wide = [part.repeat_interleave(times, axis) for part in (scale, low)]
    official = (codes * wide[0] + wide[1]).unflatten(-1, (2, 64)).transpose(0, 1)[None]
    assert torch.equal(block.decompress()[:, :, : len(codes)], official)


# --- parity beyond the backbone ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "count"), [("02", 1), ("10", 6)])
@pytest.mark.parametrize(("source", "kind", "length"), [("k", "key", 256), ("v", "value", 128)])
def test_outliers_are_the_official_ones(golden, source, kind, length, sparsity, count):
    # The official code counts both from the token vector; this share gives our rule the same count.
    block = compress_block(golden[source], kind, 2, 64, 2 * count / length, rank=0)
    smallest, largest = block.indices[0].long().split(count, -1)
    for ours, name in ((smallest, "smallest"), (largest, "largest")):
        assert torch.equal(ours.sort(-1).values, golden[f"filter{sparsity}_{source}.{name}"].long())


@pytest.mark.parametrize(
    ("source", "kind", "sparsity", "error"),
    [("k", "key", 2 / 256, 0.19759273529), ("v", "value", 2 / 128, 0.33113676310)],
)
def test_whole_pipeline_equals_the_official_one(golden, source, kind, sparsity, error):
    x, start = golden[source].float(), golden[f"gear2_{source}.start"]
    block = compress_block(x, kind, 2, 64, sparsity, rank=4, start=start, dtype=EXACT)
    assert torch.equal(block.backbone()[:, :, :8].half(), golden[f"dplus_s2_{source}"])
    ours, official = block.decompress()[:, :, :8], golden[f"gear2_{source}"].float()
    # The official D + S is rounded to float16 before L is fitted, and the sum again: one unit at |x| <= 30.
    assert (ours.half().float() - official).abs().max() <= 2**-6
    assert relative(block.decompress(), x) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("name", "rows"), [("lowrank_k_r4", 256), ("lowrank_k_block0_r2", 64)])
def test_power_iteration_equals_the_official_one(golden, name, rows):
    x = golden["k"].float()
    residual = (x - compress_block(x, "key", 2, 64, 0, 0, dtype=EXACT).decompress())[:, :, :rows]
    a, b = power_iteration(residual, golden[f"{name}.start"])
    ours, official = a @ b.mT, (golden[f"{name}.a"] @ golden[f"{name}.b"].mT).double()
    # The official float32 loses cond(b) * 2^-23 before its last QR; cond(b) is up to 6.6e3 here.
    assert relative(ours, official) < 6.6e3 * 2**-23
    errors = [float((residual - low_rank).norm()) for low_rank in (ours, official)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


# --- the method -------------------------------------------------------------------------------------------


def test_parts_lower_the_error_on_real_states(real_states):
    """At 2 bits on a pretrained model's own keys and values, every part helps."""
    for kind, x in real_states:
        errors = [
            relative(compress_block(x, kind, 2, 32, sparsity, rank).decompress(), x)
            for sparsity, rank in ((0, 0), (0, 2), (0.0625, 2))
        ]
        assert all(better < worse for worse, better in pairwise(errors))


@pytest.mark.parametrize("kind", ["key", "value"])
def test_blocks_go_to_disk_and_back(tmp_path, kind):
    path = tmp_path / "block.safetensors"
    for settings in ({}, {"sparsity": 0, "rank": 0}, {"group_size": None, "bits": 3}):
        block = compress_block(draw(2, 2, 96, 64), kind, **settings)
        block.save(path)
        again = GearBlock.load(path)
        assert torch.equal(again.decompress(), block.decompress())
        assert again.nbytes == block.nbytes
        assert again.indices.dtype == block.indices.dtype
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no GEAR block"):
        GearBlock.load(path)


def test_stacked_rows_keep_their_own_states():
    rows = [draw(1, 2, n, 16, seed=n) for n in (48, 400, 16)]
    for group in (16, None):
        for kind in ("key", "value"):
            blocks = [compress_block(x, kind, 3, group, sparsity=0.1, rank=3) for x in rows]
            stacked = GearBlock.stack([blocks[0], None, blocks[1], blocks[2]])
            assert stacked.tokens == 400
            for place, block in ((0, blocks[0]), (2, blocks[1]), (3, blocks[2])):
                ours = stacked.decompress()[place, :, : block.tokens]
                torch.testing.assert_close(ours, block.decompress()[0], atol=1e-5, rtol=1e-5)
            assert stacked.decompress().isfinite().all()


@torch.no_grad()
def test_nothing_but_the_buffer_stays_exact(model):
    ids = random_ids(1, 100, 3)
    for method, prompt, buffered in (
        (GEAR(group_size=16, buffer=32), [100], 4),
        (GEAR(group_size=16, buffer=32), [40, 60], 8 + 60 - 64),
        (GEAR("kcvt", buffer=20), [100], 0),
        (GEAR("kcvt", buffer=20), [75, 25], 5),
    ):
        cache = method.cache(model)
        for part in ids.split(prompt, 1):
            model(part, past_key_values=cache)
        assert cache.layers[0].buffer.states.shape[1] == buffered
        assert cache.layers[0].stored == 100


@pytest.mark.parametrize("fields", [{}, {"sparsity": 0.0}, {"backend": "kcvt"}])
@pytest.mark.parametrize(("fraction", "filled"), [(0.5, 0.49), (0.25, 0.23)])
def test_at_budget_fills_the_budget_with_its_own_parts(fields, fraction, filled):
    geometry = Geometry(layers=4, heads=4, kv_heads=2, head_dim=64, hidden_size=256)
    method = GEAR(**fields).at_budget(fraction, 512, geometry)
    assert filled < method.expected_bytes(512, geometry) / geometry.full_bytes(512) <= fraction
    assert (method.sparsity > 0) == ("sparsity" not in fields)
    assert GEAR(rank_prefill=0, rank_decode=0).at_budget(fraction, 512, geometry).rank_prefill == 0


@torch.no_grad()
def test_eight_bits_are_close_to_the_full_cache(model):
    ids = random_ids(2, 120, 4)
    method = GEAR().at_budget(1.0, 100, Geometry.of(model.config))
    assert method.bits == 8
    cache, full = method.cache(model), Full().cache(model)
    for part in ids.split([100, 20], 1):
        ours, theirs = (model(part, past_key_values=c).logits.log_softmax(-1) for c in (cache, full))
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 1e-4


def test_bad_input_is_named(model):
    for wrong, word in (
        ({"backend": "quanto"}, "backend"),
        ({"bits": 5}, "bits"),
        ({"sparsity": 0.5}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"group_size": 0}, "group_size"),
        ({"buffer": 100}, "buffer must be a multiple of group_size 64"),
        ({"rank_prefill": -1}, "rank_prefill"),
        ({"rank_decode": 65}, "rank_decode 65 exceeds"),
        ({"loops": 0}, "loops"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=f"^{word}"):
            GEAR(**wrong)
    with pytest.raises(ValueError, match="group_size 64 does not divide the 32 channels"):
        GEAR().cache(model)
    with pytest.raises(ValueError, match="at most head_dim, 16 here"):
        GEAR("kcvt", rank_prefill=17).cache(model)
    for wrong, word in (
        ({"kind": "query"}, "kind"),
        ({"bits": 0}, "bits"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"rank": 9}, "rank"),
        ({"states": draw(2, 8, 8)}, "states"),
        ({"states": draw(2, 8, 0, 8)}, "states"),
    ):
        with pytest.raises(ValueError, match=f"^{word} must be"):
            compress_block(**{"states": draw(1, 2, 8, 16), "kind": "key", "group_size": 8, **wrong})
