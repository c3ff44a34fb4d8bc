"""x W^T of sparse codes on the CPU, without ever holding all of W.

A tile of rows is read from codes and places as they are packed and multiplied while it is in the processor's cache; the next
tile takes its memory. `SparseLinear.weight` is the reference. Compiled by numba at the first use and cached on disk.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from broadsheet.core.numerics.jit import compiled, split

from .clipping import Grid
from .sparsity import Sparsity, patterns

#: rows of W read at a time
TILE = 64


def forward(x: torch.Tensor, codes: torch.Tensor, places: torch.Tensor | None, grid: Grid, layout: Sparsity) -> torch.Tensor:
    """``x`` float32 [tokens, columns] times the transposed weight: [tokens, rows].

    ``codes``, ``places``: as `Grid.encode` and `Sparsity.encode` pack them.
    """
    rows, columns = codes.shape[0], x.shape[1]
    y = x.new_empty(len(x), rows)
    form = (grid.group, grid.bits, layout.bits, _table(layout), layout.n, layout.m)
    packed, where = codes.numpy(), (codes[:, :0] if places is None else places).numpy()
    scale, zero = grid.scale.float().numpy(), grid.zero.float().numpy()

    def work(first: int, last: int) -> None:
        tile = x.new_empty(min(TILE, last - first), columns)
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            _read(tile.numpy(), packed, where, scale, zero, *form, start, count)
            y[:, start : start + count] = x @ tile[:count].T

    split(work, rows, TILE)
    return y


@cache
def _table(layout: Sparsity) -> np.ndarray:
    """The places that a stored number stands for, uint64 [2**bits, places of one].

    Numbers that `Sparsity.encode` never writes, which a damaged file may hold, stand for the first places: no write ends
    up beside the row.
    """
    found = patterns(layout.n, layout.m) if layout.places == "patterns" else [(place,) for place in range(layout.m)]
    return np.array([*found, *[found[0]] * (2**layout.bits - len(found))], dtype=np.uint64)


def _unpack_row(packed: Any, bits: int, out: Any) -> None:
    """Numbers of ``bits`` bits, least significant first, into all of ``out`` uint8."""
    whole = packed.shape[0] // bits
    mask, width = np.uint64((1 << bits) - 1), np.uint64(bits)
    for chunk in range(whole):  # eight numbers are ``bits`` bytes
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[chunk * bits + byte]) << np.uint64(8 * byte)
        for number in range(8):
            out[chunk * 8 + number] = word & mask
            word >>= width
    for number in range(whole * 8, out.shape[0]):  # what does not fill these
        word = np.uint64(0)
        for bit in range(bits):
            place = number * bits + bit
            word |= np.uint64((packed[place >> 3] >> (place & 7)) & 1) << np.uint64(bit)
        out[number] = word


_unpack = compiled(_unpack_row, inline="always")


def _read_rows(
    tile: Any, codes: Any, places: Any, scale: Any, zero: Any, group: int, bits: int, place_bits: int, table: Any,
    n: int, m: int, start: int, count: int,
) -> None:  # fmt: skip
    """Writes rows ``start`` and on of the weight into ``tile`` [rows, columns]."""
    columns, of_number = tile.shape[1], table.shape[1]
    numbers, kept = n // of_number, columns // m * n
    code, value = np.empty(kept, np.uint8), np.empty(kept, np.float32)
    where = np.empty(columns // m * numbers, np.uint8)
    for row in range(start, start + count):
        target = tile[row - start]
        _unpack(codes[row], bits, code)
        for share in range(scale.shape[1]):
            step, low = scale[row, share], zero[row, share]
            for index in range(share * group, min(share * group + group, kept)):
                value[index] = low + step * np.float32(code[index])
        if n == m:
            target[:] = value
            continue
        target[:] = 0
        _unpack(places[row], place_bits, where)
        source = np.uint64(0)
        for block in range(columns // m):
            for number in range(numbers):
                entry = np.uint64(where[block * numbers + number])
                for place in range(of_number):
                    target[np.uint64(block * m) + table[entry, np.uint64(place)]] = value[source]
                    source += np.uint64(1)


_read = compiled(_read_rows)
