"""Products with a weight of additive codes, on the CPU, without holding the weight.

With few inputs every product of a group of x with every codebook vector is made first; an output is then a sum of M entries
a group, looked up by the codes. That is done for as many groups at a time as have a table that stays in the cache. With
many inputs, or when codebooks have so many entries that the table would cost more than it saves, a run of rows is rebuilt
and multiplied, and the next one takes its place.

Codes are read from their bits as they are packed. Compiled by numba at the first use, for each shape of codebooks, and
cached on disk; this module is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

from broadsheet.core.numerics.jit import compiled, split

#: bytes that may be read behind the codes
BEHIND = 2
#: numbers of a tile of rebuilt rows, of a table of products; inputs up to which sums are looked up
TILE, TABLE, FEW = 2**17, 2**15, 4
_FLAGS = ("reassoc", "contract", "nsz")


def matmul(x: torch.Tensor, codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """x W^T, float32 [n, rows], of ``x`` float32 [n, columns], ``codes`` uint8 [rows / out_group, bytes], float32 ``books``
    [M, entries, out_group, in_group] and ``scales`` [rows / out_group]."""
    if looks_up(len(x), len(codes), books):
        return _by_table(x, codes, books, scales, bits)
    groups = x.shape[1] // books.shape[3]
    step = max(1, TILE // (x.shape[1] * books.shape[2]))
    tiles = zip(codes.split(step), scales.split(step))
    return torch.cat([x @ decode(some, books, scale, bits, groups).T for some, scale in tiles], 1)


def looks_up(inputs: int, rows: int, books: torch.Tensor) -> bool:
    """Whether a table of products is made: for few inputs, where that costs less than rebuilding the rows."""
    count, entries, out_group, _ = books.shape
    return out_group == 1 and inputs <= FEW and inputs * count * entries <= 2 * rows


def _by_table(x: torch.Tensor, codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    count, entries, _, in_group = books.shape
    vectors, out = books.flatten(0, 1).flatten(1).T, x.new_zeros(len(codes), len(x))
    some = max(1, TABLE // (len(x) * count * entries))  # groups of a table
    places = 0
    for part in x.unflatten(1, (-1, in_group)).split(some, 1):
        table = (part @ vectors).reshape(len(x), part.shape[1] * count, entries)
        arrays = [tensor.numpy() for tensor in (table, codes, out)]
        kernel, start = _adder(bits), places
        split(lambda first, last: kernel(*arrays, start, first, last), len(codes), 1)  # noqa: B023  # called at once
        places += part.shape[1] * count
    return (out * scales[:, None]).T


def decode(codes: torch.Tensor, books: torch.Tensor, scales: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The weight, float32 [rows, columns]."""
    count, _, out_group, in_group = books.shape
    vectors = books.flatten(0, 1).flatten(1).contiguous()
    out = torch.empty(len(codes), groups, out_group * in_group)
    arrays = [tensor.numpy() for tensor in (codes, vectors, scales, out)]
    kernel = _decoder(bits, count, out_group * in_group)
    split(lambda first, last: kernel(*arrays, first, last), len(codes), 1)
    return out.unflatten(2, (out_group, in_group)).transpose(1, 2).flatten(2).flatten(0, 1)


@cache
def _adder(bits: int) -> Callable[..., None]:
    mask = 2**bits - 1

    def add(table: Any, codes: Any, out: Any, start: int, first: int, last: int) -> None:
        """Adds the table's entries for the codes from place ``start`` on."""
        inputs, count, entries = table.shape
        flat, packed = table.reshape(-1), codes.reshape(-1)
        found, size = np.empty(count, np.int64), codes.shape[1]
        end = np.zeros(size + BEHIND, np.uint8)
        end[:size] = codes[-1]
        for row in range(first, last):
            source, begin = (end, 0) if row == codes.shape[0] - 1 else (packed, row * size)
            for place in range(count):
                at = (start + place) * bits
                byte = begin + (at >> 3)
                word = np.uint32(source[byte]) | np.uint32(source[byte + 1]) << 8 | np.uint32(source[byte + 2]) << 16
                found[place] = (word >> np.uint32(at & 7) & mask) + place * entries
            for x in range(inputs):
                total, base = np.float32(0), x * count * entries
                for place in range(count):
                    total += flat[base + found[place]]
                out[row, x] += total

    return compiled(add, _FLAGS)


@cache
def _decoder(bits: int, count: int, width: int) -> Callable[..., None]:
    mask = 2**bits - 1

    def decode(codes: Any, vectors: Any, scales: Any, out: Any, first: int, last: int) -> None:
        groups, size, entries = out.shape[1], codes.shape[1], vectors.shape[0] // count
        packed, values, target = codes.reshape(-1), vectors.reshape(-1), out.reshape(-1)
        found = np.empty(count, np.int64)
        end = np.zeros(size + BEHIND, np.uint8)
        end[:size] = codes[-1]
        for row in range(first, last):
            source, begin = (end, 0) if row == codes.shape[0] - 1 else (packed, row * size)
            scale = scales[row]
            for group in range(groups):
                for book in range(count):
                    at = (group * count + book) * bits
                    byte = begin + (at >> 3)
                    word = np.uint32(source[byte]) | np.uint32(source[byte + 1]) << 8 | np.uint32(source[byte + 2]) << 16
                    found[book] = ((word >> np.uint32(at & 7) & mask) + book * entries) * width
                line = (row * groups + group) * width
                for column in range(width):
                    total = np.float32(0)
                    for book in range(count):
                        total += values[found[book] + column]
                    target[line + column] = total * scale

    return compiled(decode, _FLAGS)
