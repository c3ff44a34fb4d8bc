"""Packed storage of rows that differ in length.

Items are numbers in storage, batch and then tokens (or blocks of tokens) first. Of each row the first
``lengths[b]`` count, left-aligned; what stands behind them is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.ledger import tree_map
from broadsheet.core.perf.storage import groups

#: GroupQuantised, or an exact tensor
Items: TypeAlias = Any


def fit_group(width: int, group_size: int) -> int:
    """The largest equal part of ``width`` that is at most ``group_size``."""
    parts = -(-width // group_size)
    while width % parts:
        parts += 1
    return width // parts


def stored_size(width: int, bits: int, group_size: int, itemsize: int = 2) -> int:
    """Bytes of ``width`` entries with their scales and zeros; exact ones (16 bits) take ``itemsize`` each."""
    return width * itemsize if bits == 16 else int(groups(bits, fit_group(width, group_size)).nbytes(1, width))


def encode(x: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype, per_channel: bool = False) -> Items:
    """``x`` [..., tokens, channels] in ``bits``, in groups along channels or (``per_channel``) along tokens.

    With 16 bits nothing is quantised: a copy in ``dtype``.
    """
    if bits == 16:
        return x.to(dtype, copy=True)
    return quantise_groups(x, bits, fit_group(x.shape[-2 if per_channel else -1], group_size), per_channel)


def decode(items: Items) -> torch.Tensor:
    """What was encoded, float32."""
    return items.dequantise() if isinstance(items, GroupQuantised) else items.float()


def joined(parts: list[Items]) -> Items:
    """Concatenates along axis 1."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(parts, 1)
    fields = ("codes", "scale", "zero")
    cat: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in fields}
    return replace(first, **cat)


def sliced(items: Items, start: int, stop: int) -> Items:
    """Entries ``start`` to ``stop`` of axis 1."""
    return tree_map(lambda tensor: tensor[:, start:stop], items)


def left_aligned(items: Items, real: torch.Tensor) -> Items:
    """The entries where ``real`` [batch, width] holds, first in each row; as wide as the longest row."""
    if bool(real.all()):
        return items
    order = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return tree_map(lambda tensor: tensor[rows, order], items)


def extended(old: Items, before: torch.Tensor, new: Items, counts: torch.Tensor) -> Items:
    """Each row's first ``before`` [batch] entries of ``old``, then its first ``counts`` of ``new``."""
    if old is None:
        return new
    real = [
        torch.arange(_width(items), device=lengths.device) < lengths[:, None]
        for items, lengths in ((old, before), (new, counts))
    ]
    return left_aligned(joined([old, new]), torch.cat(real, 1))


def picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of ``x`` [batch, width, channels] at ``index`` [batch, n]; outside it, any entry or zeros."""
    if not x.shape[1]:
        return x.new_zeros(*index.shape, x.shape[-1])
    rows = torch.arange(len(index), device=index.device)[:, None]
    return x[rows, index.clamp(0, x.shape[1] - 1)]


def _width(items: Items) -> int:
    return (items if isinstance(items, torch.Tensor) else items.codes).shape[1]


@dataclass(frozen=True)
class TokenStream:
    """One vector a token, quantised on its own (groups along channels)."""

    bits: int
    group_size: int
    dtype: torch.dtype
    items: Items = None

    def extend(self, x: torch.Tensor, before: torch.Tensor, counts: torch.Tensor) -> TokenStream:
        """Stores each row's first ``counts`` of ``x`` [batch, tokens, channels] behind its ``before`` ones."""
        new = replace(self, items=encode(x, self.bits, self.group_size, self.dtype))
        return self.join(new, before, counts)

    def join(self, new: TokenStream, before: torch.Tensor, counts: torch.Tensor) -> TokenStream:
        """Appends what ``new`` holds."""
        return replace(self, items=extended(self.items, before, new.items, counts))

    def read(self, start: int, stop: int, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens ``start`` to ``stop`` of every row, float32 [batch, stop - start, channels]."""
        return decode(sliced(self.items, start, stop))


@dataclass(frozen=True)
class ChannelStream:
    """One vector a token, quantised in blocks of ``block`` tokens with groups along the tokens.

    ``blocks``: each row's full blocks [batch, blocks, ...]; ``tail``: its newest tokens, fewer than
    ``block``, exact. A row closes its blocks when its own count of real tokens does.
    """

    bits: int
    group_size: int
    dtype: torch.dtype
    block: int
    blocks: Items = None
    tail: Items = None

    def extend(self, x: torch.Tensor, before: torch.Tensor, counts: torch.Tensor) -> ChannelStream:
        """Stores each row's first ``counts`` of ``x`` [batch, tokens, channels] behind its ``before`` ones."""
        size = self.block
        tail = extended(self.tail, before % size, x.to(self.dtype, copy=True), counts)
        held = before % size + counts
        full, blocks = held // size, self.blocks
        if most := int(full.max()):
            closing = tail[:, : most * size].unflatten(1, (most, size))
            fresh = encode(closing, self.bits, self.group_size, self.dtype, per_channel=True)
            blocks = extended(blocks, before // size, fresh, full)
            left = torch.arange(int((held % size).max()), device=full.device)
            tail = picked(tail, (full * size)[:, None] + left)
        return replace(self, blocks=blocks, tail=tail)

    def read(self, start: int, stop: int, lengths: torch.Tensor) -> torch.Tensor:
        """As `TokenStream.read`; rows have ``lengths`` [batch] tokens."""
        packed = (lengths // self.block * self.block)[:, None]
        token = torch.arange(start, stop, device=lengths.device)
        x = picked(self.tail, token - packed).float()
        if self.blocks is not None:
            first = start // self.block
            last = -(-stop // self.block)
            closed = decode(sliced(self.blocks, first, last)).flatten(1, 2)
            offsets = (token - first * self.block).expand(len(lengths), -1)
            x = torch.where((token < packed).unsqueeze(-1), picked(closed, offsets), x)
        return x
