"""Quantised activations and exact integer products.

Activations are quantised symmetrically: b-bit codes are whole numbers from -2**(b-1) to 2**(b-1) - 1 and x is close to
scale * code. The scale is one for a whole tensor, one a token or one a channel, given (static) or taken from the tensor
(dynamic). A product of codes is a sum of whole numbers; `integer_product` gives that sum exactly, whatever computes it:

- On a CPU, few rows go through a compiled kernel that reads the weight as it is stored; more go through float32 matrix
  products of pieces so short that no partial sum leaves the whole numbers that float32 holds (2**24). That is much faster
  than torch's own integer product, which most CPUs have no instructions for.
- On a GPU, `torch._int_mm` where it takes the shape, and the same pieces elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from .packing import pack, unpack

#: the least |x| that a scale is made for: channels and tokens of zeros get a scale that divides
LEAST = 1e-5
#: rows of activations up to which the compiled kernel is the faster one
FEW = 16
#: rows of the weight that are unpacked together
TILE = 256


def largest(bits: int) -> int:
    """The largest code of ``bits`` bits, 2**(bits-1) - 1; the least is one further from zero."""
    return 2 ** (bits - 1) - 1


def scale_of(magnitude: torch.Tensor, bits: int) -> torch.Tensor:
    """The scale that maps ``magnitude``, the largest |x| to be represented, to the largest code. float32 (or float64)."""
    return magnitude.to(torch.promote_types(magnitude.dtype, torch.float32)).clamp(min=LEAST) / largest(bits)


def quantise(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of ``x`` [..., channels], int8 of its shape: clamp(round(x / scale)).

    ``scale`` is anything that broadcasts: a scalar, [..., 1] for tokens, [channels].
    """
    return round_to_codes(x / scale, bits).to(torch.int8)


def quantise_per_token(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic: codes int8 [..., channels] and a scale float32 [..., 1] from the largest |x| of each token."""
    scale = scale_of(x.abs().amax(-1, keepdim=True), bits)
    return quantise(x, scale, bits), scale


def quantise_per_tensor(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic: codes int8 and one scale float32 [] from the largest |x| of all.

    What becomes of a token depends on its batch.
    """
    scale = scale_of(x.abs().amax(), bits)
    return quantise(x, scale, bits), scale


def round_to_codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of what is scaled already, as whole numbers in the dtype of ``x`` (16-bit floats hold those of 8 bits)."""
    return x.round().clamp(-largest(bits) - 1, largest(bits))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed weight codes, int8 [rows, columns], as they are stored.

    8 bits: themselves. Fewer: packed without gaps, uint8 [rows, ceil(columns * bits / 8)], 2**(bits-1) added.
    """
    return codes if bits == 8 else pack((codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8), bits)


def unpack_codes(stored: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int8 [rows, columns]."""
    if bits == 8:
        return stored
    return (unpack(stored, bits, columns).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def integer_product(x: torch.Tensor, stored: torch.Tensor, bits: int = 8, x_bits: int = 8) -> torch.Tensor:
    """x Wᵀ in whole numbers: int32 [..., rows], exact.

    ``x``: codes [..., columns] of at most ``x_bits`` bits, int8 or whole numbers in a float dtype. ``stored``: W [rows,
    columns] as `pack_codes` stores ``bits`` bits. Raises ValueError when there are so many columns that a sum could leave
    int32.
    """
    columns = x.shape[-1]
    if columns > 2**31 // 2 ** (bits + x_bits - 2) - 1:
        raise ValueError(f"sums of {columns} products of {x_bits} and {bits} bits can leave 32 bits; split the columns")
    flat = x.reshape(-1, columns)
    if x.device.type == "cpu" and stored.device.type == "cpu":
        product = _few(flat, stored, bits) if len(flat) <= FEW else _many(flat, stored, bits, x_bits)
    else:
        product = _elsewhere(flat, unpack_codes(stored, bits, columns), bits, x_bits)
    return product.view(*x.shape[:-1], stored.shape[0])


def _piece(bits: int, x_bits: int) -> int:
    """Columns over which sums of products stay within 2**24."""
    return 2**24 // 2 ** (bits + x_bits - 2)


def _few(x: torch.Tensor, stored: torch.Tensor, bits: int) -> torch.Tensor:
    from .jit import split  # numba is heavy

    product = torch.empty(x.shape[0], stored.shape[0], dtype=torch.int32)
    codes, weight, out = x.to(torch.int16).contiguous().numpy(), stored.numpy(), product.numpy()
    dot, unpack_rows = _dot(), _unpack(bits) if bits < 8 else None

    def work(first: int, last: int) -> None:
        if unpack_rows is None:
            dot(codes, weight[first:last], out[:, first:last])
            return
        tile = torch.empty(min(TILE, last - first), x.shape[1], dtype=torch.int8).numpy()
        for row in range(first, last, TILE):
            end = min(row + TILE, last)
            unpack_rows(weight[row:end], tile)
            dot(codes, tile[: end - row], out[:, row:end])

    split(work, stored.shape[0], 16)
    return product


def _many(x: torch.Tensor, stored: torch.Tensor, bits: int, x_bits: int) -> torch.Tensor:
    (count, columns), rows = x.shape, stored.shape[0]
    x, piece = x.float(), _piece(bits, x_bits)
    product = torch.empty(count, rows, dtype=torch.int32)
    wide = torch.empty(min(TILE, rows), columns)
    for first in range(0, rows, TILE):
        tile, codes = wide[: min(TILE, rows - first)], stored[first : first + TILE]
        if bits == 8:
            tile.copy_(codes)
        else:
            _unpack(bits)(codes.numpy(), tile.numpy())
        product[:, first : first + TILE] = _pieces(x, tile, piece)
    return product


def _elsewhere(x: torch.Tensor, weight: torch.Tensor, bits: int, x_bits: int) -> torch.Tensor:
    (count, columns), rows = x.shape, weight.shape[0]
    if x.device.type == "cuda" and count > 16 and columns % 8 == 0 and rows % 8 == 0:
        return torch._int_mm(x.to(torch.int8), weight.T)
    return _pieces(x.float(), weight.float(), _piece(bits, x_bits))


def _pieces(x: torch.Tensor, weight: torch.Tensor, piece: int) -> torch.Tensor:
    """x Wᵀ of float32 whole numbers as int32, from exact products of ``piece`` columns."""
    total = (x[:, :piece] @ weight[:, :piece].T).to(torch.int32)
    for first in range(piece, x.shape[1], piece):
        total += (x[:, first : first + piece] @ weight[:, first : first + piece].T).to(torch.int32)
    return total


@cache
def _dot() -> Callable[..., None]:
    from .jit import compiled

    def dot(x: Any, weight: Any, out: Any) -> None:
        """out [tokens, rows] = x int16 [tokens, columns] times weight int8 [rows, columns] transposed."""
        for row in range(weight.shape[0]):
            for token in range(x.shape[0]):
                total = np.int32(0)
                for column in range(x.shape[1]):
                    total += np.int32(x[token, column]) * np.int32(weight[row, column])
                out[token, row] = total

    return compiled(dot)


@cache
def _unpack(bits: int) -> Callable[..., None]:
    """The compiled `unpack_codes` of so many bits, into a tensor of any dtype."""
    from .jit import compiled

    middle, mask = 2 ** (bits - 1), np.uint64(2**bits - 1)

    def unpack_rows(packed: Any, out: Any) -> None:
        """``packed`` [rows, bytes] into ``out`` [rows, columns]; eight codes lie in ``bits`` bytes."""
        whole = out.shape[1] // 8
        for row in range(packed.shape[0]):
            for group in range(whole):
                word = np.uint64(0)
                for byte in range(bits):
                    word |= np.uint64(packed[row, group * bits + byte]) << np.uint64(8 * byte)
                for place in range(8):
                    out[row, group * 8 + place] = np.int32((word >> np.uint64(place * bits)) & mask) - middle
            for column in range(whole * 8, out.shape[1]):
                byte, shift = column * bits // 8, column * bits % 8
                word = np.uint64(packed[row, byte])
                if shift + bits > 8:
                    word |= np.uint64(packed[row, byte + 1]) << np.uint64(8)
                out[row, column] = np.int32((word >> np.uint64(shift)) & mask) - middle

    return compiled(unpack_rows)
