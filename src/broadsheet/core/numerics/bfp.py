"""Block floating point: n mantissas with one shared exponent (the formats of d-Matrix's BFP12/14/16).

BFP[p|8]{n}: E = floor(log2(max |x|)) of the block, step = 2**(E - (p - 2)), code = round-half-even(x / step) clamped to
+-(2**(p-1) - 1). A value that would round past the top is clipped; the exponent is not bumped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .packing import pack, unpack


@dataclass
class BFPTensor:
    """``codes``: packed uint8 [..., blocks, ceil(n*p/8)] (offset binary); ``exponents``: int8 [..., blocks].

    ``width`` is the length of the last axis. With ``transposed`` the last two axes of the original were swapped.
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


def bfp_quantise(x: torch.Tensor, mantissa_bits: int = 4, block: int = 32, dim: int = -1) -> BFPTensor:
    """Quantises ``x`` along ``dim`` (the last or the one before it) in blocks of ``block``.

    ``mantissa_bits`` counts the sign (2 to 16; above 8 the codes take 16 bits each). Blocks of zeros give zeros.
    Raises ValueError when the block does not divide the axis.
    """
    if not 2 <= mantissa_bits <= 16:
        raise ValueError(f"mantissa_bits must be 2 to 16, got {mantissa_bits}")
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
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1, -126).clamp(-126, 127).to(torch.int32)
    scaled = torch.ldexp(blocks, (mantissa_bits - 2) - exponent.unsqueeze(-1))
    top = 2 ** (mantissa_bits - 1) - 1
    codes = scaled.round().clamp(-top, top)  # torch rounds half to even
    if mantissa_bits > 8:
        packed = codes.to(torch.int16).view(torch.uint8)
    else:
        packed = pack((codes + 2 ** (mantissa_bits - 1)).to(torch.uint8), mantissa_bits)
    return BFPTensor(packed, exponent.to(torch.int8), mantissa_bits, block, width, transposed)


@dataclass(frozen=True)
class Format:
    """A block floating point format: mantissa bits (with sign) and block length."""

    mantissa_bits: int
    block: int

    @property
    def bits_per_element(self) -> float:
        """p + 8 / n."""
        return self.mantissa_bits + 8 / self.block

    @classmethod
    def parse(cls, text: str) -> Format:
        """Reads ``BFP[4|8]{32}(SN)`` (d-Matrix shorthand) or ``BFP12_32`` (BFP12 = 4, BFP14 = 6, BFP16 = 8 mantissa bits)."""
        if found := re.fullmatch(r"BFP\[(\d+)\|8\]\{(\d+)\}(?:\(\w*\))?", text):
            return cls(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"BFP(\d+)_(\d+)", text):
            return cls(int(found[1]) - 8, int(found[2]))
        raise ValueError(f"'{text}' is no block floating point format; write BFP[4|8]{{32}} or BFP12_32")
