"""Asymmetric uniform group quantisation, stored packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .packing import pack, unpack


@dataclass
class GroupQuantised:
    """A tensor quantised in groups along its last axis.

    ``codes``: packed uint8 [..., groups, ceil(group*bits/8)]; ``scale`` and ``zero``: [..., groups] in float16 (or
    bfloat16). ``width`` is the length of the last axis of the original. With ``transposed`` the last two axes of the
    original were swapped first, so that groups run along tokens (per-channel quantisation).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    width: int
    transposed: bool = False

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """zero + scale * code, in the original's shape."""
        codes = unpack(self.codes, self.bits, self.group_size)
        value = codes.to(torch.float32) * self.scale.float().unsqueeze(-1) + self.zero.float().unsqueeze(-1)
        value = value.flatten(-2)[..., : self.width].to(dtype)
        return value.transpose(-1, -2) if self.transposed else value


def quantise_groups(
    x: torch.Tensor,
    bits: int,
    group_size: int,
    per_channel: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> GroupQuantised:
    """Quantises ``x`` [..., tokens, channels] with one scale and zero a group (KIVI, arXiv 2402.02750, eq. 1).

    Groups run along channels (per-token) or, with ``per_channel``, along tokens. scale = (max - min) / (2**bits - 1),
    zero = min, code = round((x - zero) / scale). The codes are computed against the scale and zero *as stored*, so that
    rounding them to 16 bits adds no error of its own. A last group that is shorter than ``group_size`` is padded with
    its last entry. A constant group has scale 0 and is exact.
    """
    if per_channel:
        x = x.transpose(-1, -2)
    width = x.shape[-1]
    if width == 0:
        raise ValueError("cannot quantise an empty axis")
    group_size = min(group_size, width)
    if missing := -width % group_size:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
    grouped = x.float().unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / (2**bits - 1)).to(scale_dtype)
    zero = low.to(scale_dtype)
    step = scale.float().unsqueeze(-1)
    codes = (grouped - zero.float().unsqueeze(-1)) / torch.where(step > 0, step, 1.0)
    codes = codes.round().clamp(0, 2**bits - 1).to(torch.uint8)
    return GroupQuantised(pack(codes, bits), scale, zero, bits, group_size, width, per_channel)
