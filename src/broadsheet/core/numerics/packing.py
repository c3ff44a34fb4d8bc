"""Unsigned codes of 1 to 16 bits, packed without gaps.

The packed row of n codes of b bits takes ceil(n*b/8) bytes; code i occupies bits i*b .. i*b+b-1 of the row, least
significant first. For 1, 2, 4 and 8 bits that is the usual several-codes-a-byte layout; 3, 5, 6 and 7 bits straddle bytes.
"""

from __future__ import annotations

import torch

from broadsheet.core.perf.storage import packed_size


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integer ``codes`` [..., n] below 2**bits (uint8; wider ones above 8 bits) into uint8 [..., ceil(n*bits/8)]."""
    _check(bits)
    count = codes.shape[-1]
    if bits > 8:  # bit by bit
        ones = (codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
        return pack(ones.to(torch.uint8).flatten(-2), 1)
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:  # whole codes a byte
        per = 8 // bits
        codes = torch.nn.functional.pad(codes, (0, -count % per)).unflatten(-1, (-1, per))
        packed = codes[..., 0].clone()
        for index in range(1, per):
            packed |= codes[..., index] << (bits * index)
        return packed
    # Eight codes fill exactly ``bits`` bytes: assemble them in one int64 and cut it into bytes.
    wide = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8)).to(torch.int64)
    shifts = torch.arange(8, device=codes.device) * bits
    word = (wide << shifts).sum(-1, keepdim=True)
    bytes_ = (word >> (8 * torch.arange(bits, device=codes.device))) & 255
    return bytes_.flatten(-2).to(torch.uint8)[..., : packed_size(count, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [..., count]; int32 above 8 bits."""
    _check(bits)
    if bits > 8:
        ones = unpack(packed, 1, count * bits).unflatten(-1, (count, bits)).to(torch.int32)
        return (ones << torch.arange(bits, device=packed.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    if bits == 8:
        return packed
    if 8 % bits == 0:
        per = 8 // bits
        codes = torch.stack([(packed >> (bits * index)) & (2**bits - 1) for index in range(per)], -1)
        return codes.flatten(-2)[..., :count]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).to(torch.int64)
    word = (padded << (8 * torch.arange(bits, device=packed.device))).sum(-1, keepdim=True)
    codes = (word >> (bits * torch.arange(8, device=packed.device))) & (2**bits - 1)
    return codes.flatten(-2)[..., :count].to(torch.uint8)


def _check(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
