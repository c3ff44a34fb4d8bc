"""The do-nothing baseline: every key and value, as transformers' DynamicCache keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import FULL, CacheFormat

from .attention import Slots
from .base import CacheLayer, CacheMethod, Geometry, Unreachable


class SlotLayer(CacheLayer):
    """Dense storage of one slot a token; the base of every method that drops or merges.

    ``stored_keys``, ``stored_values``: [batch, kv_heads, slots, head_dim]; ``valid``: bool [batch, 1 or kv_heads, slots], or
    None while every slot is; ``bias``: [batch, kv_heads, slots] or None.
    """

    stored_keys: torch.Tensor | None = None
    stored_values: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def prefill(self, prompt: Tokens) -> None:
        self.append(prompt)

    def append(self, new: Tokens) -> None:
        keys, values = new.keys, new.values
        stored = self.stored
        padded = not bool(new.valid.all())
        if padded or self.valid is not None:
            before = self.valid
            if before is None:
                before = new.valid.new_ones(keys.shape[0], 1, stored)
            fresh = new.valid.unsqueeze(1).expand(-1, before.shape[1], -1)
            self.valid = torch.cat([before, fresh], -1)
        if self.bias is not None:
            self.bias = torch.cat([self.bias, self.bias.new_zeros(*keys.shape[:3])], -1)
        if stored:
            assert self.stored_keys is not None
            assert self.stored_values is not None
            keys = torch.cat([self.stored_keys, keys], 2)
            values = torch.cat([self.stored_values, values], 2)
        self.stored_keys, self.stored_values = keys.contiguous(), values.contiguous()

    def slots(self) -> Slots | None:
        if not self.stored:
            return None
        assert self.stored_keys is not None
        assert self.stored_values is not None
        return Slots(self.stored_keys, self.stored_values, self.valid, self.bias)

    @property
    def stored(self) -> int:
        return 0 if self.stored_keys is None else self.stored_keys.shape[2]

    def keep(self, indices: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Keeps the slots at ``indices`` [batch, kv_heads, kept] (ascending) and frees the others.

        ``valid`` [batch, kv_heads, kept] marks places that are padding because another row or head keeps more.
        """
        assert self.stored_keys is not None
        assert self.stored_values is not None
        if self.valid is not None:
            old = self.valid.expand(-1, indices.shape[1], -1).gather(-1, indices)
            valid = old if valid is None else old & valid
        self.valid = None if valid is None or bool(valid.all()) else valid
        if self.bias is not None:
            self.bias = self.bias.gather(-1, indices)
        wide = indices.unsqueeze(-1).expand(-1, -1, -1, self.stored_keys.shape[-1])
        self.stored_keys = self.stored_keys.gather(2, wide)
        self.stored_values = self.stored_values.gather(2, wide)


def top_slots(scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices of the highest scores, ascending, and which of them count.

    ``scores`` [batch, kv_heads, T], -inf where a slot must not be kept; ``counts`` [batch]: how many each row keeps. Rows
    that keep fewer than the longest are filled with their lowest slots, marked invalid; None when no row is.
    """
    width = int(counts.max())
    ranked = scores.topk(width, dim=-1).indices
    valid = torch.arange(width, device=scores.device) < counts[:, None, None]
    indices, order = ranked.sort(-1)
    valid = valid.expand_as(indices).gather(-1, order)
    return indices, None if bool(valid.all()) else valid


@dataclass(frozen=True)
class Full(CacheMethod):
    """The uncompressed cache: what every method is compared with."""

    Layer: ClassVar[type[CacheLayer]] = SlotLayer
    budgeted: ClassVar[bool] = False

    def format(self, geometry: Geometry) -> CacheFormat:
        return FULL

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        if fraction < 1:
            raise Unreachable(1.0)
        return self
