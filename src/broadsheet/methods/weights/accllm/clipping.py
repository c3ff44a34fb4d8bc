"""Asymmetric rounding in groups of a row, over the weights that stay, with a range that is learned.

low = beta min, high = gamma max over the weights of a group that stay, scale = (high - low) / (2^bits - 1), code =
round((w - low) / scale): OmniQuant's learnable weight clipping (Shao et al. 2024, arXiv 2308.13137, equation 2), with beta
and gamma in (0, 1) and one of each a group. What is stored is low itself in 16 bits, not a zero point of ``bits`` bits.
Pruned weights have no code at all, so no zero point can shift them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from broadsheet.core.numerics.packing import pack, unpack

#: sigmoid(4) = 0.982: where OmniQuant begins
START = 4.0


@dataclass(frozen=True)
class Grid:
    """``scale``, ``zero`` float16 [rows, groups]: a group's step and its least value; ``bits`` a code."""

    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group: int  #: weights that stay in a full group

    def spread(self, stored: torch.Tensor, kept: int) -> torch.Tensor:
        """A number a group as one a weight: float32 [rows, kept]."""
        return stored.float().repeat_interleave(self.group, -1)[:, :kept]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of ``values`` [rows, kept], packed row by row, against scale and zero as stored."""
        kept = values.shape[-1]
        step = self.spread(self.scale, kept)
        codes = (values - self.spread(self.zero, kept)) / torch.where(step > 0, step, 1.0)
        return pack(codes.round().clamp(0, 2**self.bits - 1).to(torch.uint8), self.bits)

    def decode(self, packed: torch.Tensor, kept: int) -> torch.Tensor:
        """zero + scale * code, float32 [rows, kept]."""
        codes = unpack(packed, self.bits, kept)
        return self.spread(self.zero, kept) + self.spread(self.scale, kept) * codes


class Clip:
    """The learnable range of one weight: ``gamma`` and ``beta`` logits [rows, groups].

    ``values``: the weights that stay, [rows, kept]; ``group``: how many of them share a range (the last group of a row may
    have fewer). ``grouped``, these weights by group, can be learned too.
    """

    def __init__(self, values: torch.Tensor, bits: int, group: int, start: float = START):
        self.bits, self.group = bits, min(group, values.shape[-1])
        self.grouped = self._in_groups(values.float())
        self.low, self.high = self.grouped.amin(-1), self.grouped.amax(-1)
        self.gamma, self.beta = (torch.full_like(self.low, start, requires_grad=True) for _ in range(2))
        self.kept = values.shape[-1]

    def _in_groups(self, values: torch.Tensor) -> torch.Tensor:
        if missing := -values.shape[-1] % self.group:
            values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
        return values.unflatten(-1, (-1, self.group))

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and least value of every group, [rows, groups]."""
        low = self.low * self.beta.sigmoid()
        return (self.high * self.gamma.sigmoid() - low) / (2**self.bits - 1), low

    def rounded(self) -> torch.Tensor:
        """The weights as they would be read back, [rows, kept], with gradients to the range (straight through rounding)."""
        scale, low = (part.unsqueeze(-1) for part in self.range())
        codes = (self.grouped - low) / torch.where(scale > 0, scale, 1.0)
        codes = (codes + (codes.round() - codes).detach()).clamp(0, 2**self.bits - 1)
        return (low + scale * codes).flatten(-2)[..., : self.kept]

    @property
    def values(self) -> torch.Tensor:
        """The weights that stay, as they are now, [rows, kept]."""
        return self.grouped.detach().flatten(-2)[..., : self.kept]

    @torch.no_grad()
    def grid(self) -> Grid:
        """The range in 16 bits."""
        scale, low = self.range()
        return Grid(scale.half(), low.half(), self.bits, self.group)


def plain_grid(values: torch.Tensor, bits: int, group: int) -> Grid:
    """The range of round to nearest: from the least to the largest weight that stays."""
    return Clip(values, bits, group, start=float("inf")).grid()
