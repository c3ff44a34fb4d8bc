"""H2O: heavy hitters by accumulated attention, and recent tokens (Zhang et al. 2023, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import CacheFormat, evicting_cache

from .attention import attention_mass, attention_received
from .base import CacheLayer, CacheMethod, Geometry, check_fraction
from .streaming_llm import EvictingLayer


class H2OLayer(EvictingLayer):
    #: attention received so far, float32 [batch, kv_heads, slots]
    mass: torch.Tensor | None = None

    def prefill(self, prompt: Tokens) -> None:
        self.mass = attention_mass(prompt, self.module.scaling).sum(2)
        super().append(prompt)

    def append(self, new: Tokens) -> None:
        assert self.mass is not None
        received = attention_received(self.slots(), new, self.module.scaling).sum(2)
        received[..., : self.stored] += self.mass
        self.mass = received
        super().append(new)

    def score(self, counts: torch.Tensor) -> torch.Tensor:
        assert self.mass is not None
        recent = (self.method.recent * counts).round().long()[:, None, None]
        scores = self.mass.masked_fill(self.age() < recent, float("inf"))
        return self.mask_padding(scores)

    def keep(self, indices: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        assert self.mass is not None
        super().keep(indices, valid)
        self.mass = self.mass.gather(-1, indices)


@dataclass(frozen=True)
class H2O(CacheMethod):
    """The slots that received most attention so far, per KV head, and the newest ones.

    Parameters: ``budget`` in (0, 1], of the tokens seen; ``recent`` share of the budget for the newest tokens (paper
    section 5: half). Scores go on accumulating while generating and are counted in the bytes.
    """

    budget: float = 0.25
    recent: float = 0.5

    Layer: ClassVar[type[CacheLayer]] = H2OLayer

    def __post_init__(self) -> None:
        check_fraction("budget", self.budget)
        check_fraction("recent", self.recent)

    def format(self, geometry: Geometry) -> CacheFormat:
        return evicting_cache(self.budget, slot=4, layer=8)  # a float32 of score a slot and head, and the length

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        if fraction >= 1:
            return replace(self, budget=1.0)
        return replace(self, budget=max(1, self.most_slots(fraction, tokens, geometry)) / tokens)
