"""AWQ-style scaling (Lin et al. 2024, arXiv 2306.00978): channels that see large inputs are scaled up before rounding.

Where a scale can be folded into the module before (`folds`), s = magnitude**alpha is searched over alpha for the smallest
output error of the readers with rounded weights, then folded; the weights are stored as in `rtn`. Clipping, the paper's
second search, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from broadsheet.core.models import folds
from broadsheet.core.models.observers import Keep
from broadsheet.core.models.walker import Block
from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.perf.storage import WeightFormat

from .base import Shape, WeightMethod
from .rtn import RTN, GroupLinear


@dataclass(frozen=True)
class AWQ(WeightMethod):
    """``grid``: alphas tried between 0 and 1; ``tokens``: how many inputs the search looks at."""

    bits: int = 4
    group_size: int = 128
    grid: int = 20
    tokens: int = 512

    def __post_init__(self) -> None:
        RTN(self.bits, self.group_size)
        if self.grid < 1 or self.tokens < 1:
            raise ValueError("grid and tokens must be at least 1")

    def compress_block(self, block: Block) -> None:
        for fold in [*folds.linear_folds(block), *folds.norm_folds(block)]:
            kept = Keep()
            block.observe({fold.readers[0]: kept})
            x = torch.cat([part.flatten(0, -2) for part in kept.inputs]).float()
            magnitude = x.abs().mean(0)
            x = x[:: max(1, len(x) // self.tokens)][: self.tokens]
            folds.scale(block, fold, self.search(x, magnitude, [block.get(name).weight for name in fold.readers]))
        for name, linear in block.linears.items():
            block.replace(name, GroupLinear.of(linear, quantise_groups(linear.weight.float(), self.bits, self.group_size)))

    def search(self, x: torch.Tensor, magnitude: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The scale [channels] of least squared output error on inputs ``x`` [tokens, channels]."""
        best, least = torch.ones_like(magnitude), float("inf")
        for step in range(self.grid):
            scale = magnitude.clamp(min=1e-4) ** (step / self.grid)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = 0.0
            for weight in weights:
                rounded = quantise_groups(weight.float() * scale, self.bits, self.group_size).dequantise() / scale
                error += float(((rounded - weight.float()) @ x.T).square().sum())
            if error < least:
                best, least = scale, error
        return best

    def format(self) -> WeightFormat:
        return RTN(self.bits, self.group_size).format()

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """Stored as round-to-nearest is, so with its bits and groups."""
        nearest = RTN().at_budget(bits, layers)
        return replace(self, bits=nearest.bits, group_size=nearest.group_size)
