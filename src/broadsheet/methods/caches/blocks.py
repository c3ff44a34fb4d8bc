"""What the quantising caches share: rows without padding, and the order of merit of their settings.

A group that runs along tokens must hold the same tokens whether a row comes alone or padded in a batch. So
each row is stored without its padding, from its own first real token on, and is quantised on its own clock:
rows of one batch may have different numbers of quantised and of exact tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar, cast

import torch

from broadsheet.core.numerics.ledger import nbytes

from .base import CacheLayer, Geometry, MethodCache, Unreachable

#: tokens of every row: one number for all, or int64 [batch]
Size = int | torch.Tensor


@dataclass
class Rows:
    """Token vectors of every row of a batch, padding left out.

    ``states``: [batch, tokens, channels], the heads' channels side by side; row i's tokens are the first
    ``lengths[i]``, the rest is to be ignored. ``lengths``: int64 [batch], or None while every row has as
    many.
    """

    states: torch.Tensor
    lengths: torch.Tensor | None = None

    @classmethod
    def of(cls, states: torch.Tensor, valid: torch.Tensor) -> Rows:
        """The ``valid`` [batch, tokens] ones of ``states`` [batch, heads, tokens, head_dim], copied."""
        flat = states.transpose(1, 2).flatten(2)
        if bool(valid.all()):
            return cls(flat.clone(memory_format=torch.contiguous_format))
        lengths = valid.sum(-1)
        order = (~valid).long().argsort(dim=-1, stable=True)[:, : int(lengths.max())]
        return cls(take(flat, order), _ragged(lengths, order.shape[1]))

    @property
    def size(self) -> Size:
        return self.states.shape[1] if self.lengths is None else self.lengths

    def append(self, new: Rows) -> Rows:
        """Every row's tokens followed by its new ones."""
        states, lengths = join(self.states, self.size, new.states, new.size)
        return Rows(states, lengths)

    def split(self, counts: Size) -> tuple[Rows, Rows]:
        """The first ``counts`` tokens of every row, and a copy of the others."""
        if isinstance(counts, int) and self.lengths is None:
            if counts == 0:
                return Rows(self.states[:, :0]), self
            return Rows(self.states[:, :counts]), Rows(self.states[:, counts:].clone())
        counts, sizes = (by_row(size, self.states) for size in (counts, self.size))
        first, rest = int(counts.max()), int((sizes - counts).max())
        order = counts[:, None] + torch.arange(rest, device=counts.device)
        tail = take(self.states, order.clamp(max=self.states.shape[1] - 1))
        return Rows(self.states[:, :first], _ragged(counts, first)), Rows(tail, _ragged(sizes - counts, rest))


def join(
    first: torch.Tensor, size: Size, second: torch.Tensor, second_size: Size, dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Concatenates row by row along ``dim``: row i of ``second`` follows ``size[i]`` entries of ``first``.

    Returns the tensor and its rows' lengths (None when all fill it).
    """
    joined = torch.cat([first, second], dim)
    if isinstance(size, int) and isinstance(second_size, int):
        return joined, None
    size, lengths = by_row(size, first), size + second_size
    width = int(lengths.max())
    place = torch.arange(width, device=first.device)
    place = torch.where(place < size[:, None], place, place + first.shape[dim] - size[:, None])
    moved = joined.movedim(dim, 1)
    moved = take(moved, place.clamp(max=joined.shape[dim] - 1))
    return moved.movedim(1, dim).contiguous(), _ragged(lengths, width)


def smaller(a: Size, b: Size) -> Size:
    """The lesser of two sizes, row by row."""
    if isinstance(a, int):
        return min(a, b) if isinstance(b, int) else b.clamp(max=a)
    return a.clamp(max=b) if isinstance(b, int) else torch.minimum(a, b)


def longest(size: Size) -> int:
    """Tokens of the longest row."""
    return size if isinstance(size, int) else int(size.max())


def total(size: Size, batch: int) -> int:
    """Tokens of all ``batch`` rows."""
    return size * batch if isinstance(size, int) else int(size.sum())


def mask(size: Size, width: int) -> torch.Tensor | None:
    """Which of ``width`` slots hold a token: bool [batch, width], or None when all do."""
    if isinstance(size, int):
        return None
    return torch.arange(width, device=size.device) < size[:, None]


def by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, tokens, heads * head_dim] as [batch, heads, tokens, head_dim]."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def take(states: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Row i of the result is row i of ``states`` at ``order[i]`` (axis 1)."""
    return states[torch.arange(len(order), device=order.device)[:, None], order]


def by_row(size: Size, like: torch.Tensor) -> torch.Tensor:
    """A size as int64 [batch], for the rows of ``like``."""
    return torch.full((like.shape[0],), size, device=like.device) if isinstance(size, int) else size


def _ragged(lengths: torch.Tensor, width: int) -> torch.Tensor | None:
    return None if bool((lengths == width).all()) else lengths


class QuantisedLayer(CacheLayer):
    """A layer that can say which part its bytes go to."""

    def roles(self) -> dict[str, Any]:
        """The tensors held, by part."""
        raise NotImplementedError

    def parts(self) -> dict[str, int]:
        sizes = {name: nbytes(value) for name, value in self.roles().items()}
        return {name: size for name, size in sizes.items() if size}

    @property
    def elements(self) -> int:
        """Numbers that a cache without compression would hold for the tokens of all rows."""
        raise NotImplementedError


def bits_per_element(cache: MethodCache) -> dict[str, float]:
    """Bits really held for each key or value number, by part, and their ``total``."""
    elements = sum(layer.elements for layer in cast(list[QuantisedLayer], cache.layers))
    if not elements:
        raise ValueError("the cache is empty; run the model with it first")
    bits = {name: 8 * size / elements for name, size in cache.report()["parts"].items()}
    return bits | {"total": 8 * cache.nbytes / elements}


# --- choosing settings for a budget ---------------------------------------------------------------------


#: tried for a budget
GROUP_SIZES = (8, 16, 32, 64, 128, 256)


def quantisation_error(bits: int, group_size: int) -> float:
    """Expected squared error of standard normal data in groups: (E[range] / (2**bits - 1))**2 / 12.

    E[range] of n samples by Blom's approximation. No data is looked at, so a budget picks the same settings
    for every model of a geometry.
    """
    span = 2 * NormalDist().inv_cdf((group_size - 0.375) / (group_size + 0.25))
    return (span / (2**bits - 1)) ** 2 / 12


Choice = TypeVar("Choice")


def best_within(choices: Iterable[tuple[Choice, int, float]], fraction: float, tokens: int, geometry: Geometry) -> Choice:
    """Of (choice, bytes, error), the one of least error whose bytes fit; among equals the smaller.

    Raises `Unreachable` when none fits ``fraction`` of a 16-bit cache of ``tokens`` tokens.
    """
    full = geometry.full_bytes(tokens)
    found = list(choices)
    fitting = [one for one in found if one[1] <= fraction * full]
    if not fitting:
        raise Unreachable(min(size for _, size, _ in found) / full)
    return min(fitting, key=lambda one: (one[2], one[1]))[0]
