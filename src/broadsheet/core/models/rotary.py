"""Rotary position embedding by hand: for methods that keep keys before the rotation, or undo it."""

from __future__ import annotations

import torch
from torch import nn


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Applies (or undoes) the half-split rotation to ``x`` [batch, heads, tokens, head_dim].

    ``cos`` and ``sin``: [batch, tokens, rotary_dim] as the model's rotary module returns them, its attention scaling
    included. With rotary_dim < head_dim the other channels pass through (partial rotary).
    """
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = width // 2
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    turned = (turned * cos - swapped * sin) / (cos * cos + sin * sin) if inverse else turned * cos + swapped * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def find_rotary(model: nn.Module) -> nn.Module | None:
    """The model's rotary embedding module (called as ``rotary(x, position_ids) -> cos, sin``), or None."""
    for name, module in model.named_modules():
        if name.endswith("rotary_emb") and hasattr(module, "inv_freq"):
            return module
    return None
