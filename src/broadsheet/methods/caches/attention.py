"""Attention over what a cache has stored, and how much of it each slot gets: shared by all cache methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.models.taps import Tokens, sdpa


@dataclass
class Slots:
    """Stored states, ready for attention.

    ``keys``, ``values``: [batch, kv_heads, slots, head_dim]; ``valid``: bool [batch, 1 or kv_heads, slots] or None when all
    are; ``bias``: added to the logits, [batch, kv_heads, slots], or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    valid: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def as_slots(tokens: Tokens) -> Slots:
    """Tokens as if they were stored."""
    valid = None if bool(tokens.valid.all()) else tokens.valid.unsqueeze(1)
    return Slots(tokens.keys, tokens.values, valid)


def attend_slots(
    module: nn.Module, stored: Slots | None, new: Tokens, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """SDPA over ``stored`` then ``new``; only the mask's last columns, new against new, are used.

    With nothing stored, or with all slots valid, no bias and one query, the call is exactly the one that a stock cache
    makes, so a cache that kept everything gives equal bits.
    """
    if stored is None:
        return sdpa(module, new.queries, new.keys, new.values, mask, scaling)
    dtype = new.keys.dtype
    keys = torch.cat([stored.keys.to(dtype), new.keys], 2)
    values = torch.cat([stored.values.to(dtype), new.values], 2)
    count = new.count
    plain = stored.valid is None and stored.bias is None
    if plain and count == 1 and (mask is None or bool(new.valid.all())):
        return sdpa(module, new.queries, keys, values, None, scaling)
    batch, kv_heads, slots = stored.keys.shape[:3]
    allowed = torch.ones(batch, 1, count, slots, dtype=torch.bool, device=keys.device)
    if stored.valid is not None:
        allowed = stored.valid.unsqueeze(2).expand(-1, -1, count, -1)
    causal = torch.ones(count, count, dtype=torch.bool, device=keys.device).tril()
    recent = causal & new.valid[:, None, None, :]
    joint = torch.cat([allowed, recent.expand(batch, allowed.shape[1], count, count)], -1)
    if stored.bias is not None:
        logits = torch.zeros(batch, kv_heads, count, slots + count, dtype=dtype, device=keys.device)
        logits[..., :slots] = stored.bias.unsqueeze(2).to(dtype)
        joint = logits.masked_fill(~joint, torch.finfo(dtype).min)
    if joint.shape[1] > 1:  # per KV head -> per query head
        joint = joint.repeat_interleave(new.queries.shape[1] // joint.shape[1], 1)
    return sdpa(module, new.queries, keys, values, joint, scaling)


def attention_rows(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, offset: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """Softmax of ``queries`` [batch, heads, n, head_dim] over ``keys`` [batch, kv_heads, T, head_dim], float32.

    Query i sits at column ``offset + i`` and sees the columns up to it. ``valid``: bool [batch, 1 or kv_heads, T].
    Returns [batch, kv_heads, heads // kv_heads, n, T].
    """
    batch, heads, count, dim = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    grouped = queries.float().reshape(batch, kv_heads, heads // kv_heads, count, dim)
    logits = torch.einsum("bhgnd,bhtd->bhgnt", grouped, keys.float()) * scaling
    rows = torch.arange(offset, offset + count, device=keys.device)[:, None]
    allowed = torch.arange(total, device=keys.device)[None, :] <= rows
    if valid is not None:
        allowed = allowed & valid[:, :, None, None, :]
    return torch.nan_to_num(logits.masked_fill(~allowed, float("-inf")).softmax(-1))


def attention_mass(prompt: Tokens, scaling: float, rows: slice = slice(None), block: int = 256) -> torch.Tensor:
    """How much attention each prompt token receives from the queries of ``rows``, summed: [batch, kv_heads, group, T].

    A second pass in blocks of queries (O(T^2) work, O(T * block) memory); queries that are padding count nothing.
    """
    batch, heads, total, _ = prompt.queries.shape
    kv_heads = prompt.keys.shape[1]
    start, stop, _ = rows.indices(total)
    mass = torch.zeros(batch, kv_heads, heads // kv_heads, total, device=prompt.keys.device)
    valid = prompt.valid.unsqueeze(1)
    for first in range(start, stop, block):
        last = min(first + block, stop)
        weights = attention_rows(prompt.queries[:, :, first:last], prompt.keys, scaling, first, valid)
        mass += (weights * prompt.valid[:, None, None, first:last, None]).sum(3)
    return mass


def attention_received(stored: Slots | None, new: Tokens, scaling: float) -> torch.Tensor:
    """What the new queries look at, summed over them: float32 [batch, kv_heads, group, slots + tokens]."""
    if stored is None:
        return attention_mass(new, scaling)
    queries, keys = new.queries.float(), torch.cat([stored.keys.float(), new.keys.float()], 2)
    slots = stored.keys.shape[2]
    if stored.bias is not None:  # rides along as one more channel: q.k * scaling + bias
        bias = F.pad(stored.bias.float(), (0, new.count)) / scaling
        queries, keys = F.pad(queries, (0, 1), value=1.0), torch.cat([keys, bias.unsqueeze(-1)], -1)
    old, fresh = stored.valid, new.valid.unsqueeze(1)
    if old is None:
        old = fresh.new_ones(keys.shape[0], 1, slots)
    valid = torch.cat([old, fresh.expand(-1, old.shape[1], -1)], -1)
    rows = attention_rows(queries, keys, scaling, slots, valid)
    return (rows * new.valid[:, None, None, :, None]).sum(3)
