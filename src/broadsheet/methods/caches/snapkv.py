"""SnapKV: what the end of the prompt looks at (Li et al. 2024, arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import CacheFormat, evicting_cache

from .attention import attention_mass
from .base import CacheLayer, CacheMethod, Geometry, check_fraction
from .full import SlotLayer, top_slots


class SnapKVLayer(SlotLayer):
    def prefill(self, prompt: Tokens) -> None:
        super().prefill(prompt)
        lengths = prompt.valid.sum(-1)
        counts = (self.method.budget * lengths).round().long().clamp(min=1)
        if self.method.budget == 1 or int(counts.max()) >= self.stored:
            return
        total, window = prompt.count, min(self.method.window, prompt.count)
        votes = attention_mass(prompt, self.module.scaling, slice(total - window, total)).mean(2)
        kernel = self.method.kernel_size
        real = prompt.valid.unsqueeze(1).to(votes.dtype)
        # The mean over the real neighbours, so that a row's left padding changes nothing.
        votes, share = (F.avg_pool1d(x, kernel, stride=1, padding=kernel // 2) for x in (votes * real, real))
        votes = votes / share.clamp(min=1e-9)
        votes[..., total - window :] = float("inf")  # the window itself always stays
        votes = votes.masked_fill(~prompt.valid.unsqueeze(1), float("-inf"))
        self.keep(*top_slots(votes, counts))


@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Compresses the prompt once, per KV head, by the pooled attention of its last queries; later tokens all stay.

    Parameters: ``budget`` in (0, 1], of the prompt; ``window`` last queries that vote and stay (paper section 4.2; 16 to
    64 there, 32 in SCBench); ``kernel_size`` of the average pooling (odd; 5).
    """

    budget: float = 0.25
    window: int = 32
    kernel_size: int = 5

    Layer: ClassVar[type[CacheLayer]] = SnapKVLayer

    def __post_init__(self) -> None:
        check_fraction("budget", self.budget)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")

    def format(self, geometry: Geometry) -> CacheFormat:
        return evicting_cache(self.budget)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        return replace(self, budget=fraction)
