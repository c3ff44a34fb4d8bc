"""Attention on packed codes against float64 and against the path that decompresses.

Bounds are those of float32 arithmetic: a sum of n products, in any order, is off by at most gamma(n) times the
sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny
from torch import nn

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics import jit
from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.packed_attention import TILE, packed_mix, packed_scores, supports
from broadsheet.methods.caches import kivi
from broadsheet.methods.caches.base import CacheLayer
from broadsheet.methods.caches.kivi import KIVI, KeyCodes, KIVILayer


def gamma(n: int) -> float:
    """Relative error of n rounded operations in float32."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


@pytest.fixture(autouse=True)
def _from_the_first_token(monkeypatch):
    monkeypatch.setattr(kivi, "KERNEL_FROM", 0)


@st.composite
def layouts(draw):
    bits = draw(st.sampled_from([1, 2, 4, 8]))
    head_dim = draw(st.sampled_from([64, 128]))
    value_group = draw(st.sampled_from([n for n in (8, 16, 32, 64, 128) if n * bits % 64 == 0 and head_dim % n == 0]))
    key_group = draw(st.sampled_from([8, 24, 32]))
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 4), (1, 8)]))
    tokens = key_group * draw(st.integers(1, 14))
    return bits, head_dim, key_group, value_group, heads, group, tokens, draw(st.integers(0, 1 << 30))


@given(layouts())
@settings(max_examples=30, deadline=None)
def test_kernels_agree_with_float64_within_the_rounding_of_float32(layout):
    bits, head_dim, key_group, value_group, heads, group, tokens, seed = layout
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(1, tokens, heads * head_dim, generator=draw) * 3 + 1
    queries = torch.randn(heads, group, head_dim, generator=draw)
    weights = torch.rand(heads, group, tokens + 5, generator=draw)
    assert supports(bits, key_group, head_dim, "key")
    assert supports(bits, value_group, head_dim, "value")

    def parts(zero: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """|scale * code| + |zero| of every entry, [heads, tokens, head_dim]."""
        sizes = (dense.double() - zero).abs() + zero.abs()
        return sizes.reshape(tokens, heads, head_dim).transpose(0, 1)

    keys = KeyCodes.of(states, bits, key_group)
    out = torch.full((heads, group, tokens + 5), torch.nan)
    packed_scores(queries, keys.codes[0], keys.scale[0], keys.zero[0], bits, out)
    assert out[..., tokens:].isnan().all()  # nothing is written beyond the tokens
    zero = keys.zero[0].double().repeat_interleave(key_group, 0)
    codes = keys.dequantise(torch.float32)[0].double()
    scale = keys.scale[0].double().repeat_interleave(key_group, 0)
    codes = torch.where(scale > 0, ((codes - zero) / scale).round(), 0.0)
    dense = (zero + scale * codes).reshape(tokens, heads, head_dim).transpose(0, 1)
    wanted = queries.double() @ dense.mT
    bound = gamma(head_dim + 4) * (queries.double().abs() @ parts(zero, zero + scale * codes).mT)
    assert ((out[..., :tokens] - wanted).abs() <= bound).all()

    values = quantise_groups(states, bits, value_group)
    got = packed_mix(weights, values.codes[0], values.scale[0], values.zero[0], bits)
    zero = values.zero[0].double().repeat_interleave(value_group, 1)
    scale = values.scale[0].double().repeat_interleave(value_group, 1)
    codes = torch.where(scale > 0, ((values.dequantise()[0].double() - zero) / scale).round(), 0.0)
    dense = (zero + scale * codes).reshape(tokens, heads, head_dim).transpose(0, 1)
    used = weights[..., :tokens].double()
    tiles = -(-tokens // TILE)
    roundings = TILE + 2 * tiles + torch.get_num_threads() + 4  # within a tile, of tiles, of threads
    bound = gamma(roundings) * (used @ parts(zero, zero + scale * codes))
    assert ((got - used @ dense).abs() <= bound).all()


def filled(method: KIVI, heads: int, group: int, head_dim: int, prompts: list[int], steps: int) -> tuple:
    """A layer that stores left-padded prompts of these lengths and then ``steps`` single tokens; the next one."""
    draw = torch.Generator().manual_seed(sum(prompts) + steps)
    batch, width = len(prompts), max(prompts)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = group, True
    layer = KIVILayer(method, 0, module, None)
    layer.dtype = torch.float32

    def tokens(count: int, valid: torch.Tensor) -> Tokens:
        nothing = torch.empty(batch, count, 0)
        outlier = torch.ones(heads, 1, head_dim)
        outlier[:, :, 3] = 8  # keys have channels of large magnitude
        return Tokens(
            queries=torch.randn(batch, heads * group, count, head_dim, generator=draw),
            keys=torch.randn(batch, heads, count, head_dim, generator=draw) * outlier,
            values=torch.randn(batch, heads, count, head_dim, generator=draw),
            hidden=nothing, positions=nothing, valid=valid, cos=nothing, sin=nothing,
        )  # fmt: skip

    padding = width - torch.tensor(prompts)
    layer.append(tokens(width, torch.arange(width) >= padding[:, None]))
    one = torch.ones(batch, 1, dtype=torch.bool)
    for _ in range(steps):
        layer.append(tokens(1, one))
    return layer, tokens(1, one)


SHAPES = {"MHA": (4, 1), "GQA": (2, 4), "GQA of 3": (2, 3), "MQA": (1, 8)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("method", "prompts", "steps"),
    [
        (KIVI(2, 32, 32), [300], 0),
        (KIVI(4, 32, 32), [300], 0),
        (KIVI(4, 64, 128), [131, 131], 7),  # residual tail, batch
        (KIVI(2, 32, 0), [77], 3),  # no value exact
        (KIVI(4, 32, 64, value_bits=2), [211, 90, 3], 5),  # left padding; a row with no codes at all
        (KIVI(2, 32, 32), [64, 65, 63], 33),
    ],
)
def test_a_layer_answers_as_the_reference_does(shape, head_dim, method, prompts, steps):
    (heads, group), scaling = shape, head_dim**-0.5
    layer, new = filled(method, heads, group, head_dim, prompts, steps)
    assert layer.reads_codes(new)
    got = layer.attend(new, None, scaling)
    reference = CacheLayer.attend(layer, new, None, scaling)
    assert got.shape == reference.shape

    slots = layer.slots()
    keys, values = torch.cat([slots.keys, new.keys], 2).double(), torch.cat([slots.values, new.values], 2).double()
    valid = torch.ones(len(prompts), 1, 1, keys.shape[2], dtype=torch.bool)
    if slots.valid is not None:
        valid[..., :-1] = slots.valid.unsqueeze(2)
    queries = new.queries.double().reshape(len(prompts), heads, group, head_dim)
    logits = (queries @ keys.mT * scaling).masked_fill(~valid, -torch.inf)
    weights = logits.softmax(-1)
    exact = (weights @ values).reshape(len(prompts), 1, heads * group, head_dim)
    # Within a group |scale * code| + |zero| <= 3 max |x|, as codes span at most max - min.
    reach = 3 * (queries.abs() @ keys.abs().amax(2).unsqueeze(-1))
    shift = scaling * gamma(head_dim + 8) * reach  # of a logit, [batch, heads, group, 1]
    shift += gamma(3) * logits.masked_fill(~valid, 0).abs().amax(-1, keepdim=True)  # scaled, less the maximum
    # A weight is off by its logit's shift and the maximum's, and by what exp, the sum and the division round.
    count = keys.shape[2]
    bound = (2 * shift + gamma(count + 8)) * (weights @ values.abs())
    bound = bound + gamma(count + TILE + 8) * 3 * values.abs().amax(2).unsqueeze(2)
    bound = bound.reshape(exact.shape)
    assert bound.max() < 1e-2 * exact.abs().max()  # else the test would say nothing
    assert ((got - exact).abs() <= bound).all()
    assert ((got - reference).abs() <= 2 * bound).all()


def test_threads_share_the_work_and_the_rows_of_padding_bring_no_token():
    layer, new = filled(KIVI(4, 32, 32), 2, 4, 64, [1000, 400], 0)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(layer.attend(new, None, None))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert (answer - answers[0]).abs().max() <= 2 * gamma(TILE + 20) * 3 * new.values.abs().max().clamp(min=5)
    new.valid = torch.tensor([[True], [False]])
    got, reference = layer.attend(new, None, None), CacheLayer.attend(layer, new, None, None)
    assert torch.allclose(got, reference, atol=1e-5)
    assert not torch.allclose(got[1], answers[0][1], atol=1e-5)


@pytest.mark.parametrize("method", [KIVI(2, 32, 32), KIVI(4, 32, 32)])
@torch.no_grad()
def test_generate_gives_the_same_greedy_tokens_with_and_without_kernels(method, monkeypatch):
    model = tiny(head_dim=64)
    calls = []
    monkeypatch.setattr(KIVILayer, "attend_row", _counted(KIVILayer.attend_row, calls))
    ids = torch.randint(1, model.config.vocab_size, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :40], mask[2, :117] = 0, 0
    answers = []
    for kernel in (True, False):
        cache = replace(method, kernel=kernel).cache(model)
        answers.append(
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, do_sample=False, pad_token_id=0
            )
        )
        if kernel:
            assert calls
            calls.clear()
    assert not calls
    assert torch.equal(*answers)


def _counted(function, calls):
    def wrapped(*arguments):
        calls.append(1)
        return function(*arguments)

    return wrapped


@pytest.mark.parametrize("method", [KIVI(3, 32, 32), KIVI(2, 16, 32), KIVI(4, 32, 32, kernel=False)])
def test_other_layouts_are_decompressed(method):
    layer, new = filled(method, 2, 2, 64, [100], 2)
    assert not layer.reads_codes(new)
    assert torch.equal(layer.attend(new, None, None), CacheLayer.attend(layer, new, None, None))


def test_short_caches_are_decompressed(monkeypatch):
    layer, new = filled(KIVI(4, 32, 32), 2, 2, 64, [100], 0)
    monkeypatch.setattr(kivi, "KERNEL_FROM", 101)
    assert not layer.reads_codes(new)
    monkeypatch.setattr(kivi, "KERNEL_FROM", 100)
    assert layer.reads_codes(new)


def test_without_numba_the_reference_answers(monkeypatch):
    layer, new = filled(KIVI(4, 32, 32), 2, 2, 64, [100], 0)
    monkeypatch.setattr(kivi, "_kernels", lambda: None)
    assert not layer.reads_codes(new)


def test_a_place_that_cannot_be_written_gives_kernels_without_a_disk_cache(monkeypatch):
    def refuse(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function, options)

    monkeypatch.setattr(jit, "njit", refuse)
    assert jit.compiled(print)[:2] == ("compiled", print)


def test_importing_the_method_does_not_import_numba():
    code = "import sys, broadsheet.methods.caches.kivi; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
