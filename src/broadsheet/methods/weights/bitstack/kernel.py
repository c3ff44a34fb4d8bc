"""x W^T of a stack of blocks on the CPU, without ever holding all of W.

A tile of rows of W is rebuilt in float32: A_i B_i of these rows by a matrix product, then added with the signs, which are
read as they are packed. The tile is multiplied with x while it is in the processor's cache, and the next one takes its
memory. Adding with the signs is the part that torch has no operation for (unpacking them costs it most of the time); it is
compiled by numba at its first use and cached on disk.

`compose` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from .decompose import Layout

#: rows of W rebuilt at a time
TILE = 128


def covers(x: torch.Tensor, layout: Layout) -> bool:
    """Whether `forward` can answer: on a CPU, without gradients, with rows of signs that begin at a byte."""
    learns = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and layout.signed and layout.columns % 8 == 0 and not learns and _runs()


def forward(x: torch.Tensor, blocks: Sequence[torch.Tensor], layout: Layout) -> torch.Tensor:
    """``x`` [..., columns] times the transposed sum of ``blocks``: [..., rows], computed in float32."""
    rows, columns = layout.rows, layout.columns
    parts = []
    for block in blocks:
        a, b, packed = layout.split(block)
        assert packed is not None
        parts.append((a.float(), b.float(), packed.view(rows, columns // 8).numpy()))
    add_signed = _kernel()
    flat = x.reshape(-1, columns).float()
    y = flat.new_empty(flat.shape[0], rows)
    tile, product = (flat.new_empty(min(TILE, rows), columns) for _ in range(2))
    for first in range(0, rows, TILE):
        count = min(TILE, rows - first)
        tile.zero_()
        for a, b, signs in parts:
            torch.mm(a[first : first + count], b, out=product[:count])
            add_signed(tile.numpy(), product.numpy(), signs, first, count)
        y[:, first : first + count] = flat @ tile[:count].T
    return y.view(*x.shape[:-1], rows).to(x.dtype)


def _add_signed(total: Any, product: Any, signs: Any, first: int, count: int) -> None:
    """total += product, negated where the bit of ``signs`` [rows, columns / 8], from row ``first`` on, is clear."""
    for row in range(count):
        packed, source, target = signs[first + row], product[row], total[row]
        for column in range(packed.shape[0]):
            factors = _SIGNS[packed[column]]
            for bit in range(8):
                target[column * 8 + bit] += factors[bit] * source[column * 8 + bit]


#: the eight signs of every byte, float32 [256, 8]: the top bit first
_SIGNS = (np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * np.float32(2) - 1).astype(np.float32)


@cache
def _runs() -> bool:
    """Whether numba is there and compiles."""
    try:
        _kernel()
    except ImportError:
        return False
    return True


@cache
def _kernel() -> Callable[..., None]:
    """Imported at the first use, since numba is heavy."""
    from broadsheet.core.numerics.jit import compiled

    return compiled(_add_signed, ("reassoc", "contract", "nsz"))
