"""Function-preserving outliers: the same model, with channels as uneven as a large one's.

Small models have tame keys and layer inputs, on which every quantiser looks good. These transforms scale chosen channels up
and their readers down, so that logits stay what they were while the cached tensors gain the outlier channels that large
models have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .taps import attention_modules


@torch.no_grad()
def inject_key_outliers(model: PreTrainedModel, factor: float, pairs: int = 2, seed: int = 0) -> PreTrainedModel:
    """Multiplies ``pairs`` rotary channel pairs of every key head by ``factor`` and divides the queries' by it, in place.

    Both partners (c, c + head_dim / 2) of a pair are scaled, so the factor passes through the rotation and q . k is
    unchanged. Raises ValueError for fused or normalised projections.
    """
    generator = torch.Generator().manual_seed(seed)
    modules: list[Any] = attention_modules(model)  # nn.Module does not declare what attention has
    for module in modules:
        q, k = _projections(module)
        dim = module.head_dim
        group = module.num_key_value_groups
        for head in range(k.weight.shape[0] // dim):
            chosen = torch.randperm(dim // 2, generator=generator)[:pairs]
            channels = torch.cat([chosen, chosen + dim // 2])
            for tensor in (k.weight, k.bias):
                if tensor is not None:
                    tensor[head * dim + channels] *= factor
            for query_head in range(head * group, (head + 1) * group):
                for tensor in (q.weight, q.bias):
                    if tensor is not None:
                        tensor[query_head * dim + channels] /= factor
    return model


@torch.no_grad()
def inject_input_outliers(model: PreTrainedModel, factor: float, channels: int = 2, seed: int = 0) -> PreTrainedModel:
    """Multiplies ``channels`` channels of every attention input (post-norm X) by ``factor``, in place.

    The norm's gain is scaled and the matching input columns of the q, k and v projections are divided.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        norm, attention = getattr(layer, "input_layernorm", None), getattr(layer, "self_attn", None)
        if norm is None or attention is None:
            continue
        q, k = _projections(attention)
        if "gemma" in type(norm).__name__.lower():
            raise ValueError(f"{name}: this norm multiplies by 1 + gain, which the transform does not cover")
        chosen = torch.randperm(norm.weight.shape[0], generator=generator)[:channels]
        norm.weight[chosen] *= factor
        for projection in (q, k, attention.v_proj):
            projection.weight[:, chosen] /= factor
    return model


def _projections(module: Any) -> tuple[nn.Linear, nn.Linear]:
    if not hasattr(module, "q_proj") or not hasattr(module, "k_proj"):
        raise ValueError(
            f"{type(module).__name__} has fused projections; outliers can be injected into q_proj/k_proj models"
        )
    if hasattr(module, "q_norm"):
        raise ValueError(f"{type(module).__name__} normalises its keys, which would undo the outliers")
    return module.q_proj, module.k_proj
