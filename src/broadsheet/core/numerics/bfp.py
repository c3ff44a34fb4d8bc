"""Block floating point: n mantissas with one shared exponent (the formats of d-Matrix's BFP12/14/16).

BFP[p|8]{n}: E = floor(log2(max |x|)) of the block, step = 2**(E - (p - 2)), code = round-half-even(x / step)
clamped to +-(2**(p-1) - 1). A value that would round past the top is clipped; the exponent is not bumped. A
block of one is a float with p - 2 stored mantissa bits, which does round up to the next power of two.
Asymmetric variants allow the code -2**(p-1).

Rounding is exact. The reference kernel (dmx-compressor) first adds 6 * 2**E in float32, which rounds x to a
multiple of 2**(E-21); at p <= 8 that shows only in float32 input within 2**(E-22) of a tie, never in 16-bit
input.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .packing import pack, unpack


@dataclass
class BFPTensor:
    """``codes``: packed uint8 [..., blocks, ceil(n*p/8)] (offset binary); ``exponents``: int8 [..., blocks].

    ``width`` is the length of the last axis. With ``transposed`` the last two axes of the original were
    swapped.
    """

    codes: torch.Tensor
    exponents: torch.Tensor
    mantissa_bits: int
    block: int
    width: int
    transposed: bool = False

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """codes * 2**(E - (p - 2)), in the original's shape."""
        p = self.mantissa_bits
        if p > 8:
            codes = self.codes.view(torch.int16).to(torch.float32)
        else:
            codes = unpack(self.codes, p, self.block).to(torch.float32) - 2 ** (p - 1)
        value = torch.ldexp(codes, self.exponents.to(torch.int32).unsqueeze(-1) - (p - 2))
        value = value.flatten(-2)[..., : self.width].to(dtype)
        return value.transpose(-1, -2) if self.transposed else value

    @property
    def nbytes(self) -> int:
        """Bytes of codes and exponents."""
        return self.codes.nbytes + self.exponents.nbytes


def bfp_quantise(
    x: torch.Tensor, mantissa_bits: int = 4, block: int = 32, dim: int = -1, symmetric: bool = True
) -> BFPTensor:
    """Quantises ``x`` along ``dim`` (the last or the one before it) in blocks of ``block``.

    ``mantissa_bits`` counts the sign (2 to 16; above 8 the codes take 16 bits each). Blocks of zeros give
    zeros. ``x`` must be finite. Raises ValueError when the block does not divide the axis.
    """
    _check(mantissa_bits, block)
    transposed = dim % x.ndim == x.ndim - 2
    if transposed:
        x = x.transpose(-1, -2)
    elif dim % x.ndim != x.ndim - 1:
        raise ValueError("dim must be the last axis or the one before it")
    width = x.shape[-1]
    if width % block:
        raise ValueError(f"block {block} does not divide {width}; choose a divisor")
    blocks = x.float().unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1)
    # frexp gives largest = m * 2**e with 0.5 <= m < 1, so floor(log2) = e - 1, exactly.
    exponent = (torch.frexp(largest).exponent - 1).clamp(-126, 127).masked_fill(largest == 0, 0)
    # Division by the step is exact and cannot overflow, unlike its inverse where E is near -126.
    step = torch.ldexp(torch.ones_like(largest), exponent - (mantissa_bits - 2))
    codes = (blocks / step.unsqueeze(-1)).round()  # torch rounds half to even
    top = 2 ** (mantissa_bits - 1) - 1
    if block == 1:
        up = (codes.abs() > top) & (exponent < 127).unsqueeze(-1)
        codes = torch.where(up, codes / 2, codes)
        exponent = exponent + up.squeeze(-1)
    codes = codes.clamp(-top if symmetric else -top - 1, top)
    if mantissa_bits > 8:
        packed = codes.to(torch.int16).contiguous().view(torch.uint8)
    else:
        packed = pack((codes + 2 ** (mantissa_bits - 1)).to(torch.uint8), mantissa_bits)
    return BFPTensor(packed, exponent.to(torch.int8), mantissa_bits, block, width, transposed)


@dataclass(frozen=True)
class Format:
    """A block floating point format: mantissa bits (with sign), block length, symmetric codes or not."""

    mantissa_bits: int
    block: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check(self.mantissa_bits, self.block)

    @property
    def bits_per_element(self) -> float:
        """p + 8 / n."""
        return self.mantissa_bits + 8 / self.block

    @classmethod
    def parse(cls, text: str) -> Format:
        """Reads ``BFP[4|8]{32}(SN)`` (d-Matrix shorthand) or ``BFP12_32`` (BFP12 = 4, BFP16 = 8 mantissa
        bits).

        In the shorthand ``(SN)`` is symmetric and nearest, ``(_N)`` asymmetric; other roundings are refused.
        """
        if found := re.fullmatch(r"BFP\[(\d+)\|8\]\{(\d+)\}(?:\(([S_])N\))?", text):
            return cls(int(found[1]), int(found[2]), found[3] != "_")
        if found := re.fullmatch(r"BFP(\d+)_(\d+)", text):
            return cls(int(found[1]) - 8, int(found[2]))
        raise ValueError(f"'{text}' is no known format; write BFP[4|8]{{32}}, BFP[4|8]{{32}}(SN) or BFP12_32")

    def quantise(self, x: torch.Tensor, dim: int = -1) -> BFPTensor:
        """`bfp_quantise` in this format."""
        return bfp_quantise(x, self.mantissa_bits, self.block, dim, self.symmetric)


def _check(mantissa_bits: int, block: int) -> None:
    if not 2 <= mantissa_bits <= 16:
        raise ValueError(f"mantissa_bits must be 2 to 16, got {mantissa_bits}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
