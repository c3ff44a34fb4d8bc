"""Chains of methods across families."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from broadsheet.methods.caches.base import MethodCache
from broadsheet.methods.caches.lambda_kv4 import LambdaKV4
from broadsheet.methods.weights.accllm import AccLLM
from broadsheet.methods.weights.base import Progress


@dataclass(frozen=True)
class AccLLMConfig:
    """All of AccLLM: what is done to the model, and its cache. The defaults are the paper's 2:4, W2A8KV4, Lambda shape."""

    weights: AccLLM = field(default_factory=AccLLM)
    cache: LambdaKV4 = field(default_factory=LambdaKV4)


class Compressed(NamedTuple):
    """``model`` is generated with as ``model.generate(..., cache=compressed.cache())``."""

    model: PreTrainedModel
    cache_method: LambdaKV4

    def cache(self, chunked: bool = False, dtype: torch.dtype | None = None) -> MethodCache:
        """A fresh cache of this recipe for this model."""
        return self.cache_method.cache(self.model, chunked, dtype)


def accllm(
    model: PreTrainedModel,
    calibration: torch.Tensor | None = None,
    config: AccLLMConfig | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """AccLLM (arXiv 2505.03745): compresses ``model`` in place and gives it a bounded cache in few bits.

    ``calibration``: token ids [samples, tokens]; ``progress(done, total)`` is called after every block. Saved by
    ``save_pretrained`` are the weights; the cache's parameters are the caller's to keep. Raises ValueError, before anything
    is changed, when the parameters do not fit the model.
    """
    config = config or AccLLMConfig()
    config.cache.cache(model)
    return Compressed(config.weights.compress(model, calibration, progress), config.cache)
