"""Attention taps: what a cache method may see of a forward pass, through transformers' own attention interface.

`attach(model)` registers Broadsheet's attention function and puts a pre-hook on every attention module. When the model runs
with a cache whose layers have a ``receive`` method, each of them gets, once a forward pass, a `Tokens`: the queries, keys
and values of the new tokens after rotation, the layer input before the projections (post-norm X), positions, which tokens
are padding, and the rotation itself. The layer answers with what the new queries attend to. No model code is copied or
replaced: with any other cache, or none, the function is transformers' SDPA.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "broadsheet"
#: What attention modules have called their cache: since transformers 5.24, before it, and GPT-NeoX before it.
_CACHE_NAMES = ("cache", "past_key_values", "layer_past")


@dataclass
class Tokens:
    """What one forward pass brings to one layer. Every tensor has the batch first."""

    queries: torch.Tensor  #: [batch, heads, tokens, head_dim], after rotation
    keys: torch.Tensor  #: [batch, kv_heads, tokens, head_dim], after rotation
    values: torch.Tensor  #: [batch, kv_heads, tokens, head_dim]
    hidden: torch.Tensor  #: [batch, tokens, hidden_size], the layer input after the norm (X)
    positions: torch.Tensor  #: [batch, tokens]
    valid: torch.Tensor  #: bool [batch, tokens]; False marks padding
    cos: torch.Tensor  #: [batch, tokens, rotary_dim]
    sin: torch.Tensor  #: [batch, tokens, rotary_dim]

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @staticmethod
    def join(parts: list[Tokens]) -> Tokens:
        """Concatenates consecutive passes along the token axis."""
        if len(parts) == 1:
            return parts[0]
        axis = {"queries": 2, "keys": 2, "values": 2}
        names = [field.name for field in fields(Tokens)]
        return Tokens(*(torch.cat([getattr(part, name) for part in parts], axis.get(name, 1)) for name in names))


def broadsheet_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: a tapped cache layer answers, or plain SDPA does."""
    tap = module.__dict__.pop("_broadsheet_tap", None)
    if tap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    layer, hidden, positions, (cos, sin) = tap
    batch, _, count, _ = query.shape
    if attention_mask is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=query.device)
    else:  # a real token attends to itself, padding to nothing or (where a row is all masked) is never read
        valid = attention_mask[:, 0, :, -count:].diagonal(dim1=-2, dim2=-1).expand(batch, count)
        if attention_mask.dtype != torch.bool:
            valid = valid == 0
    if positions is None:
        positions = torch.arange(layer.seen, layer.seen + count, device=query.device)
    tokens = Tokens(
        queries=query,
        keys=key,
        values=value,
        hidden=hidden,
        positions=positions.expand(batch, count),
        valid=valid,
        cos=cos.expand(batch, count, -1),
        sin=sin.expand(batch, count, -1),
    )
    return layer.receive(module, tokens, attention_mask, scaling), None


def sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """transformers' SDPA: the same call, and so the same bits, as a stock cache gets. [batch, tokens, heads, head_dim]."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)[0]


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = next((kwargs[name] for name in _CACHE_NAMES if kwargs.get(name) is not None), None)
    layers = getattr(cache, "layers", None)
    module.__dict__.pop("_broadsheet_tap", None)
    index = getattr(module, "layer_idx", None)
    if layers is None or index is None or index >= len(layers) or not hasattr(layers[index], "receive"):
        return
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    rotation = kwargs.get("position_embeddings")
    if rotation is None:
        raise ValueError(f"{type(module).__name__} gets no rotary embedding; Broadsheet's caches need a RoPE model")
    layers[index].tapped = True
    module.__dict__["_broadsheet_tap"] = (layers[index], hidden, kwargs.get("position_ids"), rotation)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's self-attention modules in layer order; raises ValueError when none are found."""
    found = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if index is not None and name.rsplit(".", 1)[-1] in {"self_attn", "attention", "attn"}:
            found[index] = module
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if not found or sorted(found) != list(range(layers)):
        raise ValueError(
            f"{type(model).__name__}: {len(found)} of {layers} layers have ordinary attention; "
            "Broadsheet's caches need full attention in every layer"
        )
    return [found[index] for index in range(layers)]


def attach(model: PreTrainedModel) -> None:
    """Makes ``model`` serve taps. Idempotent; outputs with ordinary caches stay what they were.

    Raises ValueError for models without full softmax attention in every layer (sliding window, linear, MLA).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window:
        named = ", ".join(sorted(kinds - {"full_attention"})) or f"a sliding window of {window}"
        raise ValueError(f"{type(model).__name__} uses {named}; Broadsheet's caches need full attention in every layer")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{type(model).__name__} uses multi-head latent attention, which these caches do not cover")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"{type(model).__name__} caps attention logits, which SDPA does not do")
    modules = attention_modules(model)
    AttentionInterface.register(IMPLEMENTATION, broadsheet_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    if config._attn_implementation != IMPLEMENTATION:
        model.set_attn_implementation(IMPLEMENTATION)
    for module in modules:  # looked for on the module itself: a deep copy of a model brings its hooks along
        if _before_attention not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_attention, with_kwargs=True)
