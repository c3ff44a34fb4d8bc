"""Products with a weight of additive codes, on the CPU, without holding the weight.

With few inputs every product of a group of x with every codebook vector is made first; an output is then a sum of M entries
a group, looked up by the codes. With many inputs, or when codebooks have so many entries that the table would cost more than
it saves, a run of rows is rebuilt and multiplied while it is in the processor's cache, and the next one takes its place.

Codes are read from their bits as they are packed. Compiled by numba at the first use, for each number of bits, and cached on
disk; this module is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from broadsheet.core.numerics.jit import compiled, split

#: bytes that may be read behind a row's codes
BEHIND = 2
#: numbers of a tile of rebuilt rows; inputs up to which sums are looked up, where that is cheaper at all
TILE, FEW = 2**16, 4


def matmul(x: torch.Tensor, codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """x W^T, float32 [n, rows], of ``x`` float32 [n, columns], ``codes`` uint8 [rows / out_group, bytes], float32 ``books``
    [M, entries, out_group, in_group] and ``scales`` [rows / out_group]."""
    count, entries, out_group, in_group = books.shape
    n, rows, groups = len(x), len(codes) * out_group, x.shape[1] // in_group
    if out_group == 1 and n <= FEW and lookup_pays(rows, count, entries):
        table = x.reshape(n * groups, in_group) @ books.flatten(0, 1).flatten(1).T
        out = x.new_empty(n, rows)
        arrays = [t.numpy() for t in (table.view(n, groups * count, entries), codes, scales, out)]
        split(lambda first, last: _lookup(bits)(*arrays, first, last), rows, 1)
        return out
    step = max(1, TILE // (x.shape[1] * out_group))
    parts = []
    for first in range(0, len(codes), step):
        last = min(first + step, len(codes))
        parts.append(x @ decode(codes[first:last], books, scales[first:last], bits, groups).T)
    return torch.cat(parts, 1)


def lookup_pays(rows: int, books: int, entries: int) -> bool:
    """Whether making the table of products costs less than rebuilding the rows."""
    return books * entries <= 2 * rows


def decode(codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The weight, float32 [rows, columns]."""
    _, _, out_group, in_group = books.shape
    out = torch.empty(len(codes) * out_group, groups * in_group)
    arrays = [tensor.numpy() for tensor in (codes, books, scales, out)]
    split(lambda first, last: _decoder(bits)(*arrays, first, last), len(codes), 1)
    return out


@cache
def _lookup(bits: int) -> Callable[..., None]:
    mask = 2**bits - 1

    def lookup(table: Any, codes: Any, scales: Any, out: Any, first: int, last: int) -> None:
        inputs, count = table.shape[:2]
        size = codes.shape[1]
        behind = np.zeros(size + BEHIND, np.uint8)
        found = np.empty(count, np.int32)
        for row in range(first, last):
            behind[:size] = codes[row]
            for place in range(count):
                byte, shift = place * bits >> 3, place * bits & 7
                word = np.int32(behind[byte]) | np.int32(behind[byte + 1]) << 8 | np.int32(behind[byte + 2]) << 16
                found[place] = word >> shift & mask
            for x in range(inputs):
                total = np.float32(0)
                for place in range(count):
                    total += table[x, place, found[place]]
                out[x, row] = total * scales[row]

    return compiled(lookup, ("reassoc", "contract", "nsz"))


@cache
def _decoder(bits: int) -> Callable[..., None]:
    mask = 2**bits - 1

    def decode(codes: Any, books: Any, scales: Any, out: Any, first: int, last: int) -> None:
        count, _, out_group, in_group = books.shape
        size, groups = codes.shape[1], out.shape[1] // in_group
        behind = np.zeros(size + BEHIND, np.uint8)
        for row in range(first, last):
            behind[:size] = codes[row]
            for group in range(groups):
                for book in range(count):
                    place = group * count + book
                    byte, shift = place * bits >> 3, place * bits & 7
                    word = np.int32(behind[byte]) | np.int32(behind[byte + 1]) << 8 | np.int32(behind[byte + 2]) << 16
                    code = word >> shift & mask
                    for r in range(out_group):
                        line = row * out_group + r
                        for column in range(in_group):
                            value = books[book, code, r, column] * scales[row]
                            if book:
                                out[line, group * in_group + column] += value
                            else:
                                out[line, group * in_group + column] = value

    return compiled(decode)
