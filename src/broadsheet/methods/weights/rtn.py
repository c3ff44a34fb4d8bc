"""Round to nearest: the baseline that every method of weight quantisation must beat.

Groups of ``group_size`` weights along a row share a scale and a zero in 16 bits; `GroupLinear` is also what GPTQ, AWQ and
HQQ store, which only choose other codes, scales and zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from broadsheet.core.models.walker import Block
from broadsheet.core.numerics import group_linear
from broadsheet.core.numerics.groups import quantise_groups

from .base import Shape, Unreachable, WeightMethod


class GroupLinear(group_linear.GroupLinear):
    """The core's layer, by the name that the files of compressed models give it."""


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
