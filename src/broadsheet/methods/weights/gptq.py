"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): rounding errors are made good in the columns that follow.

Columns are quantised one after the other; the error of each, weighed by the inverse Hessian of the layer's inputs, is taken
off the columns still to come. Groups have a scale and a zero as in `rtn`, taken from the weights as they are when the group
begins, or with ``act_order`` from the original ones (static groups), because then neighbours are not quantised together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch

from broadsheet.core.models.observers import Gram
from broadsheet.core.models.walker import Block
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.packing import pack
from broadsheet.core.perf.storage import WeightFormat

from .base import Shape, WeightMethod
from .rtn import RTN, GroupLinear


@dataclass(frozen=True)
class GPTQ(WeightMethod):
    """``damping``: this share of the Hessian's mean diagonal is added to it; ``act_order``: largest inputs first."""

    bits: int = 4
    group_size: int = 128
    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        RTN(self.bits, self.group_size)
        if self.damping <= 0:
            raise ValueError(f"damping must be above 0, got {self.damping}")

    def compress_block(self, block: Block) -> None:
        grams = {name: Gram() for name in block.linears}
        block.observe(grams)
        for name, linear in block.linears.items():
            weight = linear.weight.float()
            stored = gptq(weight, grams[name].matrix, self.bits, self.group_size, self.damping, self.act_order)
            block.replace(name, GroupLinear.of(linear, stored))

    def format(self) -> WeightFormat:
        return RTN(self.bits, self.group_size).format()

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """Stored as round-to-nearest is, so with its bits and groups."""
        nearest = RTN().at_budget(bits, layers)
        return replace(self, bits=nearest.bits, group_size=nearest.group_size)


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    bits: int,
    group_size: int,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> GroupQuantised:
    """Quantises ``weight`` [rows, columns] for inputs with Gram matrix ``gram`` [columns, columns].

    Algorithm 1 of the paper, in blocks of ``block`` columns. Inputs that never were anything but zero are given weight zero.
    """
    rows, columns = weight.shape
    group_size = min(group_size, columns)
    weight = weight.masked_fill(gram.diagonal() == 0, 0)
    grid = quantise_groups(weight, bits, group_size)
    scale, zero = grid.scale.clone(), grid.zero.clone()
    codes = torch.zeros(rows, -(-columns // group_size) * group_size, dtype=torch.uint8, device=weight.device)

    def nearest(column: int, values: torch.Tensor, left: Callable[[], torch.Tensor]) -> torch.Tensor:
        group = column // group_size
        if not act_order and column % group_size == 0:  # the group as it is now
            fresh = quantise_groups(left()[:, :group_size], bits, group_size)
            scale[:, group], zero[:, group] = fresh.scale[:, 0], fresh.zero[:, 0]
        step, low = scale[:, group].float(), zero[:, group].float()
        code = ((values - low) / torch.where(step > 0, step, 1.0)).round().clamp(0, 2**bits - 1)
        codes[:, column] = code.to(torch.uint8)
        return low + step * code

    compensate(weight, gram, nearest, damping, act_order, block)
    packed = pack(codes.unflatten(1, (-1, group_size)), bits)
    return GroupQuantised(packed, scale, zero, bits, group_size, columns)


#: ``quantise(column, values, left)`` keeps a column's codes and returns its ``values`` [rows] as they will be read;
#: ``left()`` is what is left to quantise now, from this column on
Quantise = Callable[[int, torch.Tensor, Callable[[], torch.Tensor]], torch.Tensor]


def compensate(
    weight: torch.Tensor,
    gram: torch.Tensor,
    quantise: Quantise,
    damping: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> None:
    """Algorithm 1 with any quantiser: its columns in turn, the error of each taken off the columns still to come."""
    columns = weight.shape[1]
    dead = gram.diagonal() == 0
    hessian = gram + torch.diag(dead.to(gram.dtype))
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=gram.dtype, device=gram.device)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    hessian = hessian[order][:, order]
    # Upper Cholesky factor of the inverse: row i holds what the error of column i does to later ones.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())), upper=True).float()
    left = weight.masked_fill(dead, 0)[:, order]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        part = left[:, first:last].clone()
        errors = torch.zeros_like(part)
        for index in range(last - first):
            values = part[:, index]
            rest = partial(torch.cat, [part[:, index:], left[:, last:]], 1)
            read = quantise(int(order[first + index]), values, rest)
            error = (values - read) / inverse[first + index, first + index]
            part[:, index + 1 :] -= error.unsqueeze(1) * inverse[first + index, first + index + 1 : last]
            errors[:, index] = error
        left[:, last:] -= errors @ inverse[first:last, last:]
