"""Products with codes agree with products with the weight that the codes stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.numerics import group_matmul
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.methods.weights.rtn import GroupLinear

#: rows, columns, group: groups that fill no vector, a padded last one, fewer rows than are multiplied together
SHAPES = [(7, 40, 12), (33, 300, 128), (1, 8, 8), (2, 5, 64), (130, 256, 64)]


def made(rows: int, columns: int, group: int, bits: int) -> GroupQuantised:
    return quantise_groups(torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits)), bits, group)


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_the_dequantised_weight(bits):
    for rows, columns, group in SHAPES:
        weight = made(rows, columns, group, bits)
        for count in (1, 2, 5, group_matmul.FEW + 1):
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
            wanted = x.double() @ weight.dequantise().double().T
            off = (group_matmul.matmul(x, weight) - wanted).abs().max()
            assert off <= 1e-5 * x.abs().sum(1).max() * weight.dequantise().abs().max()


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantising_gives_the_same_bits(bits):
    for rows, columns, group in SHAPES:
        weight = made(rows, columns, group, bits)
        assert torch.equal(group_matmul.dequantise(weight), weight.dequantise())


def test_threads_share_the_rows():
    weight, x = made(130, 256, 64, 4), torch.randn(3, 256)
    alone, threads = group_matmul.matmul(x, weight), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(group_matmul.matmul(x, weight), alone)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_are_not_lost():
    weight, x = made(9, 64, 64, 4), torch.ones(1, 64)
    x[0, 3] = torch.nan
    assert group_matmul.matmul(x, weight).isnan().all()


def test_the_layer_multiplies_codes_and_keeps_dtype_shape_and_gradient():
    linear = nn.Linear(40, 7).bfloat16()
    layer = GroupLinear.of(linear, quantise_groups(linear.weight.detach().float(), 4, 32))
    x = torch.randn(2, 3, 40, dtype=torch.bfloat16)
    y = layer(x)
    assert y.shape == (2, 3, 7)
    assert y.dtype == torch.bfloat16
    wanted = F.linear(x.float(), layer.weight(), linear.bias.float())
    assert (y.float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
