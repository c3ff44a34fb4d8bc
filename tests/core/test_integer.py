"""Quantised activations; integer products against 64-bit integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.numerics.integer import (
    FEW,
    integer_product,
    largest,
    pack_codes,
    quantise,
    quantise_per_tensor,
    quantise_per_token,
    round_to_codes,
    scale_of,
    unpack_codes,
)
from broadsheet.core.numerics.packing import packed_size


def drawn(seed: int, bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest(bits) - 1, largest(bits) + 1, shape, generator=generator, dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 600), st.integers(1, 8), st.integers(2, 8), st.integers(0, 99)
)
def test_products_are_exact(tokens, columns, rows, bits, x_bits, seed):
    bits = max(bits, 2)
    x, weight = drawn(seed, x_bits, tokens, columns), drawn(seed + 1, bits, rows, columns)
    product = integer_product(x, pack_codes(weight, bits), bits, x_bits)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), x.long() @ weight.long().T)


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, 64])
@pytest.mark.parametrize("bits", [8, 6])
def test_products_are_exact_where_sums_are_largest(tokens, bits):
    """All of one sign: 9,000 columns of 128 * 128 are far above what float32 counts in ones."""
    x = torch.full((tokens, 9000), -128, dtype=torch.int8)
    weight = torch.full((5, 9000), -largest(bits) - 1, dtype=torch.int8)
    weight[1] = largest(bits)
    product = integer_product(x, pack_codes(weight, bits), bits)
    assert torch.equal(product.long(), x.long() @ weight.long().T)


def test_codes_may_come_as_whole_numbers_of_any_dtype_and_shape():
    x, weight = drawn(0, 8, 3, 7, 50), drawn(1, 8, 20, 50)
    true = integer_product(x, weight)
    assert true.shape == (3, 7, 20)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.equal(integer_product(x.to(dtype), weight), true)


def test_sums_that_could_overflow_are_refused():
    columns = 2**17
    x, weight = torch.full((1, columns), -128, dtype=torch.int8), torch.full((1, columns), -128, dtype=torch.int8)
    with pytest.raises(ValueError, match="can leave 32 bits"):
        integer_product(x, weight)
    assert int(integer_product(x[:, 1:], weight[:, 1:])) == (columns - 1) * 2**14


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_stored_in_their_bits(bits):
    codes = drawn(bits, bits, 11, 53)
    stored = pack_codes(codes, bits)
    assert stored.nbytes == 11 * packed_size(53, bits)
    assert torch.equal(unpack_codes(stored, bits, 53), codes)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_activations_are_rounded_to_the_nearest_code(bits):
    x = torch.randn(4, 9, 33, generator=torch.Generator().manual_seed(0)) * 5
    codes, scale = quantise_per_token(x, bits)
    assert scale.shape == (4, 9, 1)
    assert bool(((codes * scale - x).abs() <= scale / 2 * 1.0001).all())
    assert int(codes.abs().amax(-1).min()) == largest(bits)
    codes, scale = quantise_per_tensor(x, bits)
    assert scale.shape == ()
    assert int(codes.abs().max()) == largest(bits)
    channels = scale_of(x.abs().amax((0, 1)), bits)
    codes = quantise(x, channels, bits)
    assert bool(((codes * channels - x).abs() <= channels / 2 * 1.0001).all())
    assert torch.equal(round_to_codes(x / channels, bits), codes.float())
    assert int(quantise(x, channels / 2, bits).min()) == -largest(bits) - 1  # what is beyond the range is clipped


def test_tokens_of_zeros_stay_zeros_and_nan_is_not_hidden():
    codes, scale = quantise_per_token(torch.zeros(2, 5), 8)
    assert not codes.any()
    assert bool((scale > 0).all())
    assert bool(quantise_per_token(torch.tensor([[1.0, float("nan")]]), 8)[1].isnan())


def test_a_token_is_quantised_alike_alone_and_in_a_batch():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = quantise_per_token(x, 8)
    alone, its = quantise_per_token(x[2, 3], 8)
    assert torch.equal(codes[2, 3], alone)
    assert torch.equal(scale[2, 3], its)
    assert scale.dtype == torch.float32
