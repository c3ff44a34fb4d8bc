"""Formats: their sums by hand, and what a user may write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.perf.storage import (
    CacheFormat,
    Groups,
    Sparsity,
    Stream,
    bits_a_weight,
    cache_format,
    groups,
    packed_size,
    weight_format,
)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 5), st.integers(1, 70))
def test_groups_are_what_quantised_tensors_hold(bits: int, size: int, rows: int, columns: int) -> None:
    held = quantise_groups(torch.rand(rows, columns), bits, size)
    assert Groups(bits, size).nbytes(rows, columns) == held.codes.nbytes + held.scale.nbytes + held.zero.nbytes


def test_a_residual_waits_exactly_and_then_is_coded() -> None:
    """Keys 128 at a time, values one by one behind the newest 128 (KIVI's own setting), one head of 64 channels."""
    stored = cache_format("kivi:bits=2,group_size=32,residual=128")
    exact = 2 * 64
    assert stored.layer_bytes(100, 1, 64) == 2 * 100 * exact
    key_run = 64 * 4 * (8 + 4)  # 64 channels x 4 groups of 32 tokens in 2 bits, with scale and zero
    assert stored.layer_bytes(128, 1, 64) == key_run + 128 * exact
    value = 2 * (8 + 4)  # two groups of 32 channels
    assert stored.layer_bytes(300, 1, 64) == 2 * key_run + 44 * exact + 172 * value + 128 * exact


def test_slots_of_shares_and_windows() -> None:
    assert [CacheFormat(share=0.25).slots(n) for n in (0, 1, 3, 100)] == [0, 1, 1, 25]
    stream = Stream(groups(4, 8), "tokens", 8)
    window = CacheFormat(stream, stream, sinks=4, window=16)
    assert [window.slots(n) for n in (3, 19, 26, 27, 35)] == [3, 19, 26, 19, 19]  # what is out of sight goes by eights


@given(st.integers(1, 300), st.floats(0, 1.2), st.sampled_from(["h2o", "snapkv", "16"]))
def test_the_most_slots_fit_and_one_more_does_not(tokens: int, part: float, text: str) -> None:
    stored, sides = cache_format(text), (3, 2, 16)
    room = part * CacheFormat().nbytes(tokens, *sides)
    most = stored.most_slots(room, tokens, *sides)
    slot, layers = 3 * 2 * (4 * 16 + stored.slot), 3 * stored.layer
    assert most == 0 or most * slot + layers <= room
    assert most == tokens or (most + 1) * slot + layers > room


def test_weights_by_hand() -> None:
    assert weight_format("gptq:bits=3,group_size=64").nbytes(10, 100) == 10 * 2 * (24 + 4)
    assert weight_format("olive").nbytes(3, 5) == 3 * 3 + 3 * 4 + 4  # an odd row is filled up to a pair
    assert weight_format("accllm:bits=4,group_size=32").nbytes(2, 64) == 2 * (16 + 2 * 4 + packed_size(16, 3))
    assert weight_format("aqlm:books=2,in_group=4").nbytes(8, 64) == 8 * (32 + 2) + 2 * 256 * 4 * 2
    assert weight_format("bitstack:rank=2,blocks=3").nbytes(8, 9) == 3 * (2 * 2 * 17 + 9)
    assert bits_a_weight(weight_format(4).nbytes, [(8, 64), (16, 8)]) == 4
    assert Sparsity().row_bytes(4096) == 4096 // 4 * 3 // 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int4", "no format 'int4' for a cache: give bits from 1 to 32, or one of kivi, gear"),
        ("kivi:width=3", "kivi has no 'width'; it takes bits, group_size, residual, value_bits"),
        ("bfp:key_bits=two", "bits is between 1 and 32; got 'two'"),
        ("kivi:group_size=0", "a group size is a whole number of at least 1; got 0"),
        ("snapkv:share=0", "above 0 and at most 1; got 0"),
        ("kivi:bits=two", "'kivi:bits=two' is no format"),
        (0, "bits is between 1 and 32; got 0"),
        ("nan", "bits is between 1 and 32; got nan"),
    ],
)
def test_mistakes_say_what_there_is(text: float | str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        cache_format(text).layer_bytes(100, 2, 16)
