"""What a model hands to its attention: for methods that look at a model before they compress, and for studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from transformers import PreTrainedModel

from broadsheet.core.models import with_cache
from broadsheet.core.models.taps import Tokens

from .base import CacheLayer
from .full import Full, SlotLayer


class _ObserveLayer(SlotLayer):
    def prefill(self, prompt: Tokens) -> None:
        self.prompt = prompt


@dataclass(frozen=True)
class _Observe(Full):
    Layer: ClassVar[type[CacheLayer]] = _ObserveLayer


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: torch.Tensor) -> list[Tokens]:
    """What every layer's attention gets for ``tokens`` [batch, n]: rotated queries and keys, values, the rotation."""
    if training := model.training:
        model.eval()
    cache = _Observe().cache(model)
    model(input_ids=tokens.to(model.device), **with_cache(cache), use_cache=True)
    if training:
        model.train()
    return [cast(_ObserveLayer, layer).prompt for layer in cache.layers]
