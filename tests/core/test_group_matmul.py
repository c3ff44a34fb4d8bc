"""Products with codes agree with products with the weight that the codes stand for."""

from __future__ import annotations

from dataclasses import replace

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


def bound(x: torch.Tensor, weight: GroupQuantised, most: int) -> torch.Tensor:
    """What rounding x to whole numbers up to ``most`` can change [n, rows], and the rounding of float32 sums."""
    groups, missing = weight.codes.shape[1], weight.codes.shape[1] * weight.group_size - weight.width
    largest = F.pad(x.double(), (0, missing)).unflatten(1, (groups, -1)).abs().amax(-1)
    codes = F.pad(replace(weight, zero=torch.zeros_like(weight.zero)).dequantise().double(), (0, missing))
    rounding = largest / most / 2 @ codes.unflatten(1, (groups, -1)).sum(-1).T
    return rounding + 1e-6 * x.abs().double() @ (codes[:, : weight.width] + weight.dequantise().abs()).T


def agrees(shapes: list[tuple[int, int, int]], bits: int) -> None:
    for rows, columns, group in shapes:
        weight = made(rows, columns, group, bits)
        for count in (1, 2, 5, group_matmul.FEW + 1):
            x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count))
            off = (group_matmul.matmul(x, weight) - x.double() @ weight.dequantise().double().T).abs()
            assert (off <= bound(x, weight, 2**15 - 1)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_the_dequantised_weight(bits):
    agrees(SHAPES, bits)


@pytest.mark.slow  # compiles two more kernels
@pytest.mark.parametrize("bits", [1, 2])
def test_groups_that_fill_vectors_of_words(bits):
    agrees([(5, 600, 512)], bits)


def test_sums_of_long_groups_do_not_overflow():
    weight = made(3, 16384, 16384, 8)
    weight.codes.fill_(255)
    x = torch.ones(1, 16384)
    off = (group_matmul.matmul(x, weight) - x.double() @ weight.dequantise().double().T).abs()
    assert (off <= bound(x, weight, (2**31 - 1) // (16384 // 16 * 255))).all()


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_is_not_lost(value):
    weight, x = made(9, 128, 64, 4), torch.ones(2, 128)
    x[0, 3] = value
    y = group_matmul.matmul(x, weight)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_zeros_are_zero():
    assert (group_matmul.matmul(torch.zeros(1, 64), made(9, 64, 64, 4)) == 0).all()


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
