"""HQQ (Badri and Shaji 2023): the zero of every group is fitted to the weights alone, under a norm that forgives outliers.

Half-quadratic splitting of |W - dequantised|_p with p < 1: errors are shrunk, the zero follows them, and so on while the
mean error falls. The scale stays that of the group's range. No data is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from broadsheet.core.models.walker import Block
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.packing import pack
from broadsheet.core.perf.storage import WeightFormat

from .base import Shape, WeightMethod
from .rtn import RTN, GroupLinear


@dataclass(frozen=True)
class HQQ(WeightMethod):
    """The reference implementation's defaults."""

    bits: int = 4
    group_size: int = 64
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    iterations: int = 20

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        RTN(self.bits, self.group_size)

    def compress_block(self, block: Block) -> None:
        for name, linear in block.linears.items():
            block.replace(name, GroupLinear.of(linear, self.quantise(linear.weight.float())))

    def quantise(self, weight: torch.Tensor) -> GroupQuantised:
        """``weight`` [rows, columns] in groups along the columns."""
        plain = quantise_groups(weight, self.bits, self.group_size)
        group, missing = plain.group_size, -weight.shape[1] % plain.group_size
        grouped = torch.nn.functional.pad(weight, (0, missing), mode="replicate") if missing else weight
        grouped = grouped.unflatten(1, (-1, group))
        top = 2**self.bits - 1
        step = plain.scale.float().unsqueeze(-1)
        step = torch.where(step > 0, step, 1.0)
        zero = -plain.zero.float().unsqueeze(-1) / step  # HQQ's own: weight = (code - zero) * step
        beta, best = self.beta, float("inf")
        for _ in range(self.iterations):
            codes = (grouped / step + zero).round().clamp(0, top)
            error = grouped - (codes - zero) * step
            shrunk = error.sign() * (error.abs() - error.abs().clamp(min=1e-12) ** (self.norm - 1) / beta).clamp(min=0)
            zero = (codes - (grouped - shrunk) / step).mean(-1, keepdim=True)
            beta *= self.growth
            now = float(error.abs().mean())
            if now >= best:  # the last step is kept all the same, as in the reference
                break
            best = now
        low = (-zero * step).squeeze(-1).to(torch.float16)
        codes = ((grouped - low.float().unsqueeze(-1)) / step).round().clamp(0, top).to(torch.uint8)
        return GroupQuantised(pack(codes, self.bits), plain.scale, low, self.bits, group, weight.shape[1])

    def format(self) -> WeightFormat:
        return RTN(self.bits, self.group_size).format()

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """Stored as round-to-nearest is, so with its bits and groups."""
        nearest = RTN().at_budget(bits, layers)
        return replace(self, bits=nearest.bits, group_size=nearest.group_size)
