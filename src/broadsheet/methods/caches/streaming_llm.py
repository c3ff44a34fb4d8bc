"""StreamingLLM: attention sinks and a recent window (Xiao et al. 2023, arXiv 2309.17453).

The first ``n_sink`` tokens and the newest ones stay, everything between is freed. Deviation: the paper rotates keys by their
place in the window so that a stream may outrun the trained length; here, as in kvpress, keys keep their true positions,
since contexts are within the trained length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import CacheFormat, evicting_cache

from .base import CacheLayer, CacheMethod, Geometry, check_fraction
from .full import SlotLayer, top_slots


class EvictingLayer(SlotLayer):
    """Keeps ``round(budget * tokens seen)`` slots a row, by the scores of `score`, after every pass."""

    #: tokens seen by row, [batch]
    lengths: torch.Tensor | None = None

    def score(self, counts: torch.Tensor) -> torch.Tensor:
        """Scores [batch, kv_heads, slots] of the slots stored; -inf for padding. ``counts`` [batch]: how many stay."""
        raise NotImplementedError

    def append(self, new: Tokens) -> None:
        super().append(new)
        real = new.valid.sum(-1)
        self.lengths = real if self.lengths is None else self.lengths + real
        self.evict()

    def evict(self) -> None:
        """Frees what is over the budget."""
        counts = (self.method.budget * self.lengths).round().long().clamp(min=1)
        if self.method.budget == 1 or int(counts.max()) >= self.stored:
            return
        indices, valid = top_slots(self.score(counts), counts)
        self.keep(indices, valid)

    def age(self) -> torch.Tensor:
        """For every slot its number among the real slots of its row and head, newest 0: [batch, 1 or kv_heads, slots]."""
        valid = self.valid
        if valid is None:
            assert self.stored_keys is not None
            valid = torch.ones(*self.stored_keys.shape[:1], 1, self.stored, dtype=torch.bool, device=self.stored_keys.device)
        return valid.long().flip(-1).cumsum(-1).flip(-1) - 1

    def mask_padding(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.valid is None else scores.masked_fill(~self.valid, float("-inf"))


class StreamingLayer(EvictingLayer):
    def score(self, counts: torch.Tensor) -> torch.Tensor:
        assert self.stored_keys is not None
        age = self.age()
        newest_first = -age.float()
        oldest = age.amax(-1, keepdim=True)
        sinks = age > oldest - self.method.n_sink
        scores = newest_first.masked_fill(sinks, float("inf"))
        return self.mask_padding(scores).expand(-1, self.stored_keys.shape[1], -1)


@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """Sinks and recent tokens, ``budget`` of the tokens seen in all.

    Parameters: ``budget`` in (0, 1]; ``n_sink`` first tokens that always stay (paper section 3.2: 4).
    """

    budget: float = 0.25
    n_sink: int = 4

    Layer: ClassVar[type[CacheLayer]] = StreamingLayer

    def __post_init__(self) -> None:
        check_fraction("budget", self.budget)

    def format(self, geometry: Geometry) -> CacheFormat:
        return evicting_cache(self.budget, layer=8)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        return replace(self, budget=fraction)
