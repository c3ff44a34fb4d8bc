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

from .folds import norm_folds, scale, shift
from .taps import attention_modules
from .walker import walk


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
def inject_input_outliers(
    model: PreTrainedModel,
    factor: float,
    channels: int = 2,
    seed: int = 0,
    offset: float = 0.0,
    same: bool = False,
    adjacent: bool = False,
) -> PreTrainedModel:
    """Multiplies ``channels`` channels of what every norm feeds to linear layers by ``factor``, in place.

    The norm's gain (and bias) is scaled and the matching columns of its readers are divided. ``offset``: a constant of
    this size and either sign is added to them, which the readers' biases take back; only norms with a bias can. ``same``:
    the same channels everywhere, as large models have them. ``adjacent``: chosen in neighbouring pairs (2j, 2j + 1).
    """
    generator = torch.Generator().manual_seed(seed)
    for block in walk(model, torch.zeros(1, 2, dtype=torch.long)):
        for fold in norm_folds(block):
            width = block.get(fold.readers[0]).in_features
            if same:
                generator.manual_seed(seed)
            if adjacent:
                pairs = torch.randperm(width // 2, generator=generator)[: max(1, channels // 2)]
                chosen = torch.cat([2 * pairs, 2 * pairs + 1])
            else:
                chosen = torch.randperm(width, generator=generator)[:channels]
            divisor = torch.ones(width)
            divisor[chosen] = 1 / factor
            scale(block, fold, divisor)
            if offset:
                signs = torch.randint(0, 2, (len(chosen),), generator=generator) * 2 - 1
                constant = torch.zeros(width)
                constant[chosen] = -float(offset) * signs
                shift(block, fold, constant)
    return model


def _projections(module: Any) -> tuple[nn.Linear, nn.Linear]:
    if not hasattr(module, "q_proj") or not hasattr(module, "k_proj"):
        raise ValueError(
            f"{type(module).__name__} has fused projections; outliers can be injected into q_proj/k_proj models"
        )
    if hasattr(module, "q_norm"):
        raise ValueError(f"{type(module).__name__} normalises its keys, which would undo the outliers")
    return module.q_proj, module.k_proj
