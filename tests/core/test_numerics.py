"""Packing, group quantisation, block floating point, ledger."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.ledger import nbytes, tree_map
from broadsheet.core.numerics.packing import pack, packed_size, unpack


@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pack_round_trips_and_takes_exactly_the_bytes(bits, count, seed):
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_size(count, bits)) == (3, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_pack_refuses_other_widths():
    with pytest.raises(ValueError, match="1 to 16"):
        pack(torch.zeros(4, dtype=torch.int32), 17)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group_error_is_at_most_half_a_step(bits, per_channel):
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(bits))
    q = quantise_groups(x, bits, 8, per_channel)
    error = (q.dequantise() - x).abs()
    step = q.scale.float().repeat_interleave(8, -1)
    step = step.transpose(-1, -2) if per_channel else step
    # Half a step, and what rounding scale and zero to 16 bits can add at the ends of the range.
    assert bool((error <= step * 0.5 + 2**bits * step * 2**-10 + 4e-3).all())
    assert q.dequantise().shape == x.shape


def test_constant_groups_are_exact_and_short_groups_work():
    x = torch.full((1, 1, 5, 7), 1.5)
    assert torch.equal(quantise_groups(x, 2, 4).dequantise(), x)
    y = torch.randn(1, 1, 5, 7)
    assert quantise_groups(y, 8, 4).dequantise().shape == y.shape


def test_ledger_charges_storages_not_views():
    big = torch.zeros(1000)
    assert nbytes([big[:4]]) == 4000
    assert nbytes({"a": big, "b": [big[:10], big.view(10, 100)]}) == 4000
    assert nbytes([big[:4].clone()]) == 16


def test_tree_map_makes_new_containers():
    state = {"a": [torch.ones(2)], "b": 3}
    twin = tree_map(lambda t: t + 1, state)
    twin["a"].append(torch.zeros(1))
    assert len(state["a"]) == 1
    assert torch.equal(twin["a"][0], torch.full((2,), 2.0))
