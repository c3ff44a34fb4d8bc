"""x W^T of sparse codes on the CPU, without ever holding all of W.

A tile of rows is read from codes and places as they are packed and multiplied while it is in the processor's cache; the next
tile takes its memory. `SparseLinear.weight` is the reference. Compiled by numba at the first use of a format and cached on
disk.
"""

from __future__ import annotations

from collections.abc import Callable
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
    read = _kernel(layout, grid.bits)
    packed, where = codes.numpy(), (codes[:, :0] if places is None else places).numpy()
    scale, zero = grid.scale.float().numpy(), grid.zero.float().numpy()

    def work(first: int, last: int) -> None:
        tile = x.new_empty(min(TILE, last - first), columns)
        for start in range(first, last, TILE):
            count = min(TILE, last - start)
            read(tile.numpy(), packed, where, scale, zero, grid.group, start, count)
            y[:, start : start + count] = x @ tile[:count].T

    split(work, rows, TILE)
    return y


def _unpack(packed: Any, bits: int, out: Any) -> None:
    """Numbers of ``bits`` bits, least significant first, into all of ``out`` uint8."""
    whole = packed.shape[0] // bits
    for chunk in range(whole):  # eight numbers are ``bits`` bytes
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(packed[chunk * bits + byte]) << np.uint64(8 * byte)
        for number in range(8):
            out[chunk * 8 + number] = (word >> np.uint64(number * bits)) & np.uint64((1 << bits) - 1)
    for number in range(whole * 8, out.shape[0]):  # what does not fill these
        word = np.uint64(0)
        for bit in range(bits):
            place = number * bits + bit
            word |= np.uint64((packed[place >> 3] >> (place & 7)) & 1) << np.uint64(bit)
        out[number] = word


@cache
def _kernel(layout: Sparsity, bits: int) -> Callable[..., None]:
    """Reads rows of this format: ``read(tile, codes, places, scale, zero, group, start, count)``."""
    n, m, dense, place_bits, numbers = layout.n, layout.m, layout.dense, layout.bits, layout.numbers
    found = patterns(n, m) if layout.places == "patterns" else [(place,) for place in range(m)]
    table, of_number = np.array(found, dtype=np.uint64).reshape(-1), len(found[0])
    unpack = compiled(_unpack, inline="always")  # so that the widths are constants

    def read(tile, codes, places, scale, zero, group, start, count):
        columns = tile.shape[1]
        blocks, kept = columns // m, columns // m * n
        code = np.empty(kept, np.uint8)
        where = np.empty(blocks * numbers, np.uint8)
        value = np.empty(kept, np.float32)
        for row in range(start, start + count):
            target = tile[row - start]
            unpack(codes[row], bits, code)
            for share in range(scale.shape[1]):
                step, low = scale[row, share], zero[row, share]
                for index in range(share * group, min(share * group + group, kept)):
                    value[index] = low + step * np.float32(code[index])
            if dense:
                target[:] = value
                continue
            target[:] = 0
            unpack(places[row], place_bits, where)
            for block in range(blocks):
                for number in range(numbers):
                    entry = np.uint64(where[block * numbers + number])
                    for place in range(of_number):
                        column = np.uint64(block * m) + table[entry * np.uint64(of_number) + np.uint64(place)]
                        target[column] = value[block * n + number * of_number + place]

    return compiled(read)
