"""Round to nearest: the baseline that every method of weight quantisation must beat.

Groups of ``group_size`` weights along a row share a scale and a zero in 16 bits; `GroupLinear` is also what GPTQ, AWQ and
HQQ store, which only choose other codes, scales and zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, Self

from broadsheet.core.models.walker import Block
from broadsheet.core.numerics import group_linear
from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.perf.storage import WeightFormat, grouped_weight

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

    def format(self) -> WeightFormat:
        return grouped_weight(self.bits, self.group_size)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """The most bits a code, then the smallest group, that fit."""
        for codes, group in product(range(8, 0, -1), (32, 64, 128, 256, 512, 1024)):
            one = replace(self, bits=codes, group_size=group)
            if one.stored_bits(layers) <= bits:
                return one
        raise Unreachable(one.stored_bits(layers))
