"""Round to nearest: the baseline that every method of weight quantisation must beat.

Groups of ``group_size`` weights along a row share a scale and a zero in 16 bits; `GroupLinear` is also what GPTQ, AWQ and
HQQ store, which only choose other codes, scales and zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn

from broadsheet.core.models.walker import Block
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.packed import Form, PackedLinear, bias_of
from broadsheet.core.numerics.packing import packed_size

from .base import Shape, Unreachable, WeightMethod


class GroupLinear(PackedLinear):
    """A linear layer in groups of codes along its rows: weight = zero + scale * code.

    ``codes`` uint8 [out_features, groups, ceil(group_size * bits / 8)]; ``scale``, ``zero`` float16 [out_features, groups].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, linear: nn.Linear, quantised: GroupQuantised) -> Self:
        """The layer whose weight [out_features, in_features] was quantised."""
        return cls(
            {"codes": quantised.codes, "scale": quantised.scale, "zero": quantised.zero, **bias_of(linear)},
            in_features=linear.in_features,
            out_features=linear.out_features,
            bits=quantised.bits,
            group_size=quantised.group_size,
        )

    def form(self) -> dict[str, Form]:
        if not (1 <= self.bits <= 8 and 1 <= self.group_size <= self.in_features):
            raise ValueError(f"{self.bits} bits in groups of {self.group_size} do not fit {self.in_features} inputs")
        rows, groups = self.out_features, -(-self.in_features // self.group_size)
        grid = (torch.float16, (rows, groups))
        codes = (torch.uint8, (rows, groups, packed_size(self.group_size, self.bits)))
        return {**super().form(), "codes": codes, "scale": grid, "zero": grid}

    @property
    def stored(self) -> GroupQuantised:
        return GroupQuantised(self.codes, self.scale, self.zero, self.bits, self.group_size, self.in_features)

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.stored.dequantise(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]; on a CPU multiplied with the codes, in float32."""
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        from broadsheet.core.numerics.group_matmul import matmul  # numba takes its time to import

        y = matmul(x.detach().reshape(-1, self.in_features).float(), self.stored)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class RTN(WeightMethod):
    """Asymmetric round-to-nearest in groups along the input. Raises ValueError for bits outside 1 .. 8."""

    bits: int = 4
    group_size: int = 128

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    def compress_block(self, block: Block) -> None:
        for name, linear in block.linears.items():
            block.replace(name, GroupLinear.of(linear, quantise_groups(linear.weight.float(), self.bits, self.group_size)))

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """The most bits a code, then the smallest group, that fit."""
        for codes in range(8, 0, -1):
            for group in (32, 64, 128, 256, 512, 1024):
                if group_bits(codes, group, layers) <= bits:
                    return replace(self, bits=codes, group_size=group)
        raise Unreachable(group_bits(1, 1024, layers))


def group_bits(bits: int, group_size: int, layers: Sequence[Shape]) -> float:
    """Bits a weight of layers in such groups, with a 16-bit scale and zero a group and the last group padded."""
    held = weights = 0
    for rows, columns in layers:
        group = min(group_size, columns)
        groups = -(-columns // group)
        held += rows * groups * (8 * -(-group * bits // 8) + 32)
        weights += rows * columns
    return held / weights
