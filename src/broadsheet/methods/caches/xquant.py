"""XQuant and XQuant-CL: caching the quantised layer input instead of keys and values (Tomar et al. 2025,
arXiv 2508.10395).

The layer input X (post-norm, what the projections read) is kept in few bits; K = X W_k and V = X W_v, bias,
head norm and rotation are made anew at every attention call and never kept. With one KV head a query head
that halves the memory at equal bits. Where X is wider than K and V together (grouped-query attention), an SVD
of the projections, W_k = U_k (S_k B_k^T) = U_k M_k, lets the latents X U_k and X U_v be kept instead.
XQuant-CL keeps, above a base layer, only the quantised change of X from the layer before, against the
reconstruction (closed loop), so errors do not pile up.

Choices where the paper leaves room, and deviations:

- New tokens attend to each other exactly; only stored tokens are rebuilt.
- ``base_layers`` = 3 means the layers 0, 1, 2; the last of them (index 2) is the base that the recursion
  starts from. They take ``base_bits`` each. In grouped-query models the base layer keeps X U_kv like the
  deltas above it, as the paper's sizes imply; what lies outside that subspace reaches the next layers with
  their deltas.
- Deltas are quantised per token. The accumulator is rounded to ``accumulator_bits`` as it is handed to the
  next layer, and the writer uses the same rounded accumulator as the reader, so a layer's error is one
  quantisation of its own delta. (With U_kv the two are matrix products of different shapes: their last
  float32 bit, and rarely a code at a tie, can differ.)
- Between forward passes no accumulator exists; within one it lives on the cache object and is not counted as
  state.
- Groups are equal parts of the axis, at most ``group_size`` long, so nothing is padded.
- Rows keep their real tokens only, left-aligned: groups along tokens start at a row's own first token,
  whatever the padding.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.rotary import find_rotary, rotate
from broadsheet.core.models.taps import Tokens, attention_modules
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.ledger import nbytes, tree_map
from broadsheet.core.numerics.packing import packed_size

from . import xquant_cost
from .base import CacheLayer, CacheMethod, Geometry, MethodCache, Slots, Unreachable, attend_slots

BITS = (2, 3, 4, 8, 16)
#: stored tokens rebuilt at a time: bounds the unpacked codes and the float32 X beside one layer's keys and values
TILE = 4096

PLAIN_FACTORS = ("U_k", "M_k", "U_v", "M_v")
CROSS_FACTOR = "U_kv"

#: rows of numbers in storage, batch and then tokens (or blocks of tokens) first: GroupQuantised, or an exact tensor
Items: TypeAlias = Any


# --- ragged rows: [batch, width, ...] of which the first lengths[b] count -------------------------------------------


def fit_group(width: int, group_size: int) -> int:
    """The largest equal part of ``width`` that is at most ``group_size``."""
    parts = -(-width // group_size)
    while width % parts:
        parts += 1
    return width // parts


def encode(
    x: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype, per_channel: bool = False
) -> Items:
    """``x`` [..., tokens, channels] in ``bits``, groups along channels or (``per_channel``) tokens; 16 bits:
    as ``dtype``."""
    if bits == 16:
        return x.to(dtype, copy=True)
    return quantise_groups(x, bits, fit_group(x.shape[-2 if per_channel else -1], group_size), per_channel)


def decode(items: Items) -> torch.Tensor:
    """What was encoded, float32."""
    return items.dequantise() if isinstance(items, GroupQuantised) else items.float()


def joined(parts: list[Items]) -> Items:
    """Concatenates along axis 1."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(parts, 1)
    fields = ("codes", "scale", "zero")
    cat: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in fields}
    return replace(first, **cat)


def sliced(items: Items, start: int, stop: int) -> Items:
    """Entries ``start`` to ``stop`` of axis 1."""
    return tree_map(lambda tensor: tensor[:, start:stop], items)


def left_aligned(items: Items, real: torch.Tensor) -> Items:
    """The entries where ``real`` [batch, width] holds, moved to the front of each row; as wide as the longest
    row."""
    if bool(real.all()):
        return items
    order = (~real).long().argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return tree_map(lambda tensor: tensor[rows, order], items)


def extended(old: Items, before: torch.Tensor, new: Items, counts: torch.Tensor) -> Items:
    """Appends each row's first ``counts`` [batch] entries of ``new`` to its first ``before`` [batch] entries
    of ``old``."""
    if old is None:
        return new
    real = [
        torch.arange(_width(items), device=lengths.device) < lengths[:, None]
        for items, lengths in ((old, before), (new, counts))
    ]
    return left_aligned(joined([old, new]), torch.cat(real, 1))


def picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of ``x`` [batch, width, channels] at ``index`` [batch, n]; indices outside give any entry, or
    zeros."""
    if not x.shape[1]:
        return x.new_zeros(*index.shape, x.shape[-1])
    rows = torch.arange(len(index), device=index.device)[:, None]
    return x[rows, index.clamp(0, x.shape[1] - 1)]


def _width(items: Items) -> int:
    return (items if isinstance(items, torch.Tensor) else items.codes).shape[1]


@dataclass(frozen=True)
class TokenStream:
    """One vector a token, quantised on its own (groups along channels)."""

    bits: int
    group_size: int
    dtype: torch.dtype
    items: Items = None

    def extend(self, x: torch.Tensor, before: torch.Tensor, counts: torch.Tensor) -> TokenStream:
        """Stores each row's first ``counts`` vectors of ``x`` [batch, tokens, channels] behind its first
        ``before``."""
        return self.join(
            replace(self, items=encode(x, self.bits, self.group_size, self.dtype)), before, counts
        )

    def join(self, new: TokenStream, before: torch.Tensor, counts: torch.Tensor) -> TokenStream:
        """Appends what ``new`` holds."""
        return replace(self, items=extended(self.items, before, new.items, counts))

    def read(self, start: int, stop: int, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens ``start`` to ``stop`` of every row, float32 [batch, stop - start, channels]."""
        return decode(sliced(self.items, start, stop))


@dataclass(frozen=True)
class ChannelStream:
    """One vector a token, quantised in blocks of ``block`` tokens with groups along the tokens.

    ``blocks``: each row's full blocks [batch, blocks, ...]; ``tail``: its newest tokens, fewer than
    ``block``, exact. A row closes its blocks when its own count of real tokens does.
    """

    bits: int
    group_size: int
    dtype: torch.dtype
    block: int
    blocks: Items = None
    tail: Items = None

    def extend(self, x: torch.Tensor, before: torch.Tensor, counts: torch.Tensor) -> ChannelStream:
        """Stores each row's first ``counts`` vectors of ``x`` [batch, tokens, channels] behind its first
        ``before``."""
        size = self.block
        tail = extended(self.tail, before % size, x.to(self.dtype, copy=True), counts)
        held = before % size + counts
        full, blocks = held // size, self.blocks
        if most := int(full.max()):
            closing = tail[:, : most * size].unflatten(1, (most, size))
            fresh = encode(closing, self.bits, self.group_size, self.dtype, per_channel=True)
            blocks = extended(blocks, before // size, fresh, full)
            left = torch.arange(int((held % size).max()), device=full.device)
            tail = picked(tail, (full * size)[:, None] + left)
        return replace(self, blocks=blocks, tail=tail)

    def read(self, start: int, stop: int, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens ``start`` to ``stop`` of rows of ``lengths`` [batch] tokens, float32 [batch, stop - start,
        channels]."""
        packed = (lengths // self.block * self.block)[:, None]
        token = torch.arange(start, stop, device=lengths.device)
        x = picked(self.tail, token - packed).float()
        if self.blocks is not None:
            first = start // self.block
            last = -(-stop // self.block)
            closed = decode(sliced(self.blocks, first, last)).flatten(1, 2)
            offsets = (token - first * self.block).expand(len(lengths), -1)
            x = torch.where((token < packed).unsqueeze(-1), picked(closed, offsets), x)
        return x


# --- factors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """SVD factors of a model's key and value projections: weights, not cache state.

    ``tensors``, by the names of the file: ``layers.{i}.U_k``, ``U_v`` [hidden_size, rank], ``M_k``, ``M_v``
    [rank, kv_heads * head_dim], with U M = W^T for nn.Linear's W; ``U_kv`` [hidden_size, rank], a basis of
    what keys and values read together. ``fingerprint``: of the projection weights they were made from.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def nbytes(self) -> int:
        return nbytes(self.tensors)

    def of(self, index: int) -> dict[str, torch.Tensor]:
        """The factors of layer ``index``, by their short names."""
        names = {name: f"layers.{index}.{name}" for name in (*PLAIN_FACTORS, CROSS_FACTOR)}
        return {name: self.tensors[full] for name, full in names.items() if full in self.tensors}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; its header names the model by its fingerprint."""
        about = {"kind": "xquant factors", "model": self.fingerprint}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors.items()}
        save_file(tensors, path, metadata={"broadsheet": json.dumps(about)})


#: factors made or loaded, by model, each with a stamp of the weights that they belong to
_prepared: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Factors]] = WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the key and value projection weights of every layer."""
    digest = hashlib.sha256()
    for weight in _weights(model):
        digest.update(f"{tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    for module in attention_modules(model):
        for name in ("k_proj", "v_proj"):
            weight = getattr(_projection(module, name), "weight", None)
            if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
                raise ValueError(
                    f"{name} of {type(module).__name__} has no floating-point weight to factor; use latent='none'"
                )
            yield weight


def _projection(module: nn.Module, name: str) -> nn.Module:
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"{type(module).__name__} has no separate {name} (fused projections, as in Phi-3 and GPT-NeoX, are not covered); "
            "XQuant rebuilds keys and values with k_proj and v_proj"
        )
    return found


def _svd(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [in, rank] and M = S B^T [rank, out] with U M = W^T, float64; of each column of U the largest entry
    is positive."""
    u, s, bt = torch.linalg.svd(weight.detach().double().T, full_matrices=False)
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, (s[:, None] * bt) * signs.T


# --- the layer ------------------------------------------------------------------------------------------------------


class XQuantCache(MethodCache):
    """A `MethodCache` with the factors of its model and, during a forward pass only, the cross-layer
    accumulators.

    ``walk``: by purpose ("read", "append" or "prefill") the last layer done and its accumulator; empty
    between passes. Replaced rather than changed in place, so that a fork has its own.
    """

    method: XQuant
    layers: list[Any]

    def __init__(
        self, method: XQuant, layers: list[Any], chunked: bool, dtype: torch.dtype | None, factors: Factors
    ):
        super().__init__(method, layers, chunked, dtype)
        self.factors = factors
        self.walk: dict[str, tuple[int, Items]] = {}

    def hand_up(self, purpose: str, index: int, accumulator: Items) -> None:
        """Layer ``index`` gives the accumulator to the next layer; behind the last layer it is dropped."""
        rest = {name: held for name, held in self.walk.items() if name != purpose}
        last = index == len(self.layers) - 1
        self.walk = rest if last else rest | {purpose: (index, accumulator)}

    def from_below(self, purpose: str, index: int) -> Items:
        """The accumulator that layer ``index`` - 1 gave in this pass."""
        below, accumulator = self.walk.get(purpose, (None, None))
        if accumulator is None or below != index - 1:
            raise RuntimeError(
                "XQuant-CL's layers work in order; run the whole model, one forward pass at a time"
            )
        return accumulator

    def report(self) -> dict[str, Any]:
        """As every cache's, and what ``nbytes`` leaves out.

        ``factor_bytes``: SVD factors, which are weights; ``accumulator_bytes``: the cross-layer accumulator
        that one forward pass holds at a time; ``paper_size``: the paper's size formula, beside the real
        bytes.
        """
        geometry = Geometry.of(self.layers[0].module.config)
        return super().report() | {
            "factor_bytes": self.factors.nbytes,
            "accumulator_bytes": sum(layer.accumulator_bytes for layer in self.layers[-1:]),
            "paper_size": self.method.paper_size(geometry),
        }


class XQuantLayer(CacheLayer):
    """What is kept of X, in one or two streams.

    ``streams``: ``x`` (X, or its delta, or either times U_kv), or ``k`` and ``v`` (X U_k and X U_v).
    ``lengths`` [batch]: real tokens of each row; rows are left-aligned. ``positions``: int32 [batch, tokens],
    kept by layer 0 for all layers.
    """

    method: Any  # XQuant
    cache: Any  # XQuantCache
    module: Any
    rotary: Any

    def __init__(self, method: XQuant, index: int, module: nn.Module, rotary: nn.Module | None):
        super().__init__(method, index, module, rotary)
        self.streams: dict[str, Any] = {}
        self.lengths: Any = None
        self.positions: torch.Tensor | None = None

    @property
    def stored(self) -> int:
        return 0 if self.lengths is None else int(self.lengths.max())

    @property
    def crosses(self) -> bool:
        """Whether this layer takes part in the cross-layer recursion, as its base or above."""
        return self.method.crosses(self.index)

    @property
    def is_delta(self) -> bool:
        return self.crosses and self.index >= self.method.base_layers

    @property
    def factors(self) -> dict[str, torch.Tensor]:
        """This layer's SVD factors by name; empty where X itself is stored."""
        return self.cache.factors.of(self.index)

    # --- writing ----------------------------------------------------------------------------------------------------

    def prefill(self, prompt: Tokens) -> None:
        self.check_projections(prompt)
        self.store(prompt, "prefill")

    def append(self, new: Tokens) -> None:
        self.store(new, "append")

    def store(self, new: Tokens, purpose: str) -> None:
        """Quantises X of the real tokens of ``new``."""
        counts = new.valid.sum(1)
        before = torch.zeros_like(counts) if self.lengths is None else self.lengths
        x = left_aligned(new.hidden.detach(), new.valid).float()
        # What padding left behind in shorter rows must not reach a sum, not even times zero.
        x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= counts[:, None]).unsqueeze(-1), 0)
        if self.index == 0:
            positions = left_aligned(new.positions.to(torch.int32, copy=True), new.valid)
            self.positions = extended(self.positions, before, positions, counts)
        dtype = new.keys.dtype
        if self.crosses:
            stream = self.streams.get("x") or self.token_stream(dtype)
            below = (
                decode(self.cache.from_below(purpose, self.index)) if self.is_delta else torch.zeros_like(x)
            )
            fresh = replace(stream, items=None).extend(self.lowered(x - below), before, counts)
            self.streams = {"x": stream.join(fresh, before, counts)}
            rebuilt = self.lifted(fresh.read(0, x.shape[1], counts)) + below
            self.cache.hand_up(purpose, self.index, self.rounded(rebuilt, dtype))
        elif self.factors:
            streams = self.streams or {"k": self.key_stream(dtype), "v": self.token_stream(dtype)}
            latents = self.folded(x)
            self.streams = {name: streams[name].extend(latents[name], before, counts) for name in latents}
        else:
            stream = self.streams.get("x") or self.token_stream(dtype)
            self.streams = {"x": stream.extend(x, before, counts)}
        self.lengths = before + counts

    def token_stream(self, dtype: torch.dtype) -> TokenStream:
        return TokenStream(self.method.bits_of(self.index), self.method.group_size, dtype)

    def key_stream(self, dtype: torch.dtype) -> TokenStream | ChannelStream:
        bits = self.method.bits_of(self.index)
        if bits == 16 or not self.method.per_channel_keys:
            return self.token_stream(dtype)
        return ChannelStream(bits, self.method.group_size, dtype, self.method.residual)

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the accumulator that a forward pass holds while it is between two layers."""
        if not self.crosses or self.lengths is None:
            return 0
        bits, width = self.method.accumulator_bits, self.module.config.hidden_size
        size = (
            width * self.storage_dtype.itemsize
            if bits == 16
            else _row_size(width, bits, self.method.group_size)
        )
        return size * self.stored * len(self.lengths)

    def rounded(self, x: torch.Tensor, dtype: torch.dtype) -> Items:
        """The accumulator as it is written back for the next layer."""
        return encode(x, self.method.accumulator_bits, self.method.group_size, dtype)

    # --- reading ----------------------------------------------------------------------------------------------------

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        return attend_slots(self.module, self.rematerialised(walking=True), new, mask, scaling)

    def slots(self) -> Slots | None:
        return self.rematerialised(walking=False)

    def rematerialised(self, walking: bool) -> Slots | None:
        """Keys and values of every stored token, made from X tile by tile; the caller must not keep them.

        ``walking``: within a forward pass a layer takes the accumulator of the layer below and hands its own
        up; outside one (False) a cross-layer layer goes through all layers from the base.
        """
        count = self.stored
        if not count:
            return None
        all_positions = self.cache.layers[0].positions
        below = self.cache.from_below("read", self.index) if walking and self.is_delta else None
        tiles, above = [], []
        for start in range(0, count, TILE):
            stop = min(start + TILE, count)
            positions = all_positions[:, start:stop].to(self.lengths.device)
            if self.crosses:
                x = self.reconstruct(start, stop, None if below is None else sliced(below, start, stop))
                if walking:
                    above.append(self.rounded(x, self.storage_dtype))
                keys, values = self.projected(x)
            elif self.factors:
                latents = {
                    name: stream.read(start, stop, self.lengths) for name, stream in self.streams.items()
                }
                keys, values = self.unfolded(latents)
            else:
                keys, values = self.projected(self.streams["x"].read(start, stop, self.lengths))
            tiles.append(self.heads(keys, values, positions))
        if above:
            self.cache.hand_up("read", self.index, joined(above))
        keys, values = tiles[0] if len(tiles) == 1 else (torch.cat(parts, 2) for parts in zip(*tiles))
        real = torch.arange(count, device=keys.device) < self.lengths[:, None]
        return Slots(keys, values, None if bool(real.all()) else real.unsqueeze(1))

    def reconstruct(self, start: int, stop: int, below: Items | None = None) -> torch.Tensor:
        """X of this cross-layer layer for stored tokens ``start`` to ``stop``, float32 [batch, tokens,
        hidden_size].

        ``below``: the rounded accumulator of the layer below for the same tokens; made from the base up when
        not given.
        """
        x = self.lifted(self.streams["x"].read(start, stop, self.lengths))
        if not self.is_delta:
            return x
        if below is None:
            lower = self.cache.layers[self.index - 1]
            below = lower.rounded(lower.reconstruct(start, stop), lower.storage_dtype)
        return x + decode(below)

    @property
    def storage_dtype(self) -> Any:
        """What exact parts are stored in."""
        return self.cache.dtype or self.dtype

    def lowered(self, x: torch.Tensor) -> torch.Tensor:
        """From the width of X to what a cross-layer layer stores: X, or X U_kv."""
        return x @ self.factors[CROSS_FACTOR].float() if self.factors else x

    def lifted(self, x: torch.Tensor) -> torch.Tensor:
        """The way back, times the transpose of U_kv."""
        return x @ self.factors[CROSS_FACTOR].float().T if self.factors else x

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X W_k and X W_v with bias, [batch, tokens, kv_heads * head_dim]."""
        x = x.to(self.dtype)
        return self.module.k_proj(x), self.module.v_proj(x)

    def folded(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Latents X U_k and X U_v, float32 [batch, tokens, rank]."""
        x = x.float()
        return {"k": x @ self.factors["U_k"].float(), "v": x @ self.factors["U_v"].float()}

    def unfolded(self, latents: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents times M_k and M_v, with bias, [batch, tokens, kv_heads * head_dim]."""
        keys, values = latents["k"].to(self.dtype), latents["v"].to(self.dtype)
        keys = F.linear(keys, self.factors["M_k"].T, self.module.k_proj.bias)
        return keys, F.linear(values, self.factors["M_v"].T, self.module.v_proj.bias)

    def heads(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Head norm (where the model has one) and rotation; [batch, kv_heads, tokens, head_dim] each."""
        width = self.module.head_dim
        norm = getattr(self.module, "k_norm", None)
        whole = norm is not None and getattr(norm, "weight", keys[..., :width]).shape[-1] != width
        if norm is not None and whole:  # OLMo 2 norms all heads together
            keys = norm(keys)
        keys, values = (x.unflatten(-1, (-1, width)) for x in (keys, values))
        if norm is not None and not whole:
            keys = norm(keys)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        cos, sin = self.rotary(values, positions)
        return rotate(keys, cos, sin), values

    def check_projections(self, prompt: Tokens) -> None:
        """Raises ValueError when this attention makes keys or values in a way that is not rebuilt here."""
        row = int(prompt.valid.sum(1).argmax())
        real = prompt.valid[row].nonzero()
        if not len(real):
            return
        last = int(real[-1])
        one = slice(row, row + 1), slice(last, last + 1)
        x = prompt.hidden[one].detach()
        plain = self.factors and not self.crosses
        keys, values = self.unfolded(self.folded(x)) if plain else self.projected(x)
        rebuilt = self.heads(keys, values, prompt.positions[one])
        for ours, theirs in zip(rebuilt, (prompt.keys, prompt.values)):
            true = theirs[row : row + 1, :, last : last + 1].float()
            # Far above the rounding of bfloat16 (under 1 %), far below a missing norm or another rotation (about 100 %).
            if (ours.float() - true).norm() > 0.05 * true.norm():
                raise ValueError(
                    f"{type(self.module).__name__} does not make its keys and values as projection, bias, head norm and "
                    "half-split rotation; XQuant cannot rebuild them"
                )


# --- the method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class XQuant(CacheMethod):
    """Quantised layer inputs, from which keys and values are rebuilt at every attention call.

    Parameters: ``bits`` 2, 3, 4, 8 or 16 (exact); ``group_size`` entries at most that share a 16-bit scale
    and zero; ``cross_layer`` XQuant-CL, with the layers below ``base_layers`` at ``base_bits`` and the
    accumulator rounded to ``accumulator_bits`` (16: not rounded); ``latent`` "svd" stores X U_k and X U_v,
    "none" stores X, "auto" takes the latents where they are no wider than X; ``residual`` newest tokens, at
    most, that stay exact until their block is full, for latents quantised per channel; ``per_channel_keys``
    False quantises X U_k per token, as X U_v.
    """

    bits: int = 4
    group_size: int = 128
    cross_layer: bool = False
    base_layers: int = 3
    base_bits: int = 4
    accumulator_bits: int = 4
    latent: str = "auto"
    residual: int = 128
    per_channel_keys: bool = True

    Layer: ClassVar[type[CacheLayer]] = XQuantLayer

    def __post_init__(self) -> None:
        for name in ("bits", "base_bits", "accumulator_bits"):
            if getattr(self, name) not in BITS:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, BITS))}, got {getattr(self, name)}"
                )
        for name in ("group_size", "residual", "base_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.latent not in ("auto", "none", "svd"):
            raise ValueError(f"latent must be auto, none or svd, got '{self.latent}'")

    def check(self, geometry: Geometry) -> None:
        if self.cross_layer and geometry.layers < self.base_layers + 1:
            raise ValueError(
                f"cross_layer needs at least base_layers + 1 = {self.base_layers + 1} layers, this model has {geometry.layers}"
            )
        kv = 2 * geometry.kv_heads * geometry.head_dim
        if not self.uses_latent(geometry) and geometry.hidden_size > kv:
            warnings.warn(
                f"latent='none' stores X of width {geometry.hidden_size} where keys and values take {kv}: "
                f"{geometry.hidden_size / kv:g} times the memory of a KV cache at equal bits; latent='auto' avoids that",
                stacklevel=3,
            )

    def cache(
        self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None
    ) -> XQuantCache:
        plain = super().cache(model, chunked, dtype)
        return XQuantCache(self, plain.layers, chunked, dtype, self.prepare(model))

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        for module in attention_modules(model):
            _projection(module, "k_proj"), _projection(module, "v_proj")
        rotary = find_rotary(model)
        if rotary is None:
            raise ValueError(
                f"{type(model).__name__} has no rotary embedding; XQuant needs one to rebuild keys"
            )
        kind = getattr(rotary, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"rope type '{kind}' rotates by the length of the pass, so old keys cannot be rebuilt exactly"
            )
        return super().layers(model)

    # --- which layer holds what -------------------------------------------------------------------------------------

    def uses_latent(self, geometry: Geometry) -> bool:
        """Whether latents are stored instead of X (or, cross-layer, of its delta)."""
        kv = geometry.kv_heads * geometry.head_dim
        return self.latent == "svd" or (self.latent == "auto" and 2 * kv <= geometry.hidden_size)

    def crosses(self, index: int) -> bool:
        """Whether layer ``index`` is the base of the cross-layer recursion or above it."""
        return self.cross_layer and index >= self.base_layers - 1

    def bits_of(self, index: int) -> int:
        return self.base_bits if self.cross_layer and index < self.base_layers else self.bits

    def stream_sizes(self, index: int, geometry: Geometry) -> list[tuple[int, int]]:
        """(width, bits) of each stream of layer ``index``."""
        hidden, kv = geometry.hidden_size, geometry.kv_heads * geometry.head_dim
        bits = self.bits_of(index)
        if not self.uses_latent(geometry):
            return [(hidden, bits)]
        if self.crosses(index):
            return [(min(hidden, 2 * kv), bits)]
        return [(min(hidden, kv), bits)] * 2

    def overhead_bits(self, bits: int, width: int) -> float:
        """Bits of scale and zero an entry."""
        return 0.0 if bits == 16 else 32 / fit_group(width, self.group_size)

    def paper_size(self, geometry: Geometry) -> float:
        """The paper's size formula, as a fraction of a 16-bit KV cache: no residual, accumulator, positions
        or factors."""
        bits = sum(
            width * (bits + (0 if bits == 16 else 32 / self.group_size))
            for index in range(geometry.layers)
            for width, bits in self.stream_sizes(index, geometry)
        )
        return bits / (16 * geometry.full_bytes(1, bytes_per_element=1))

    def row_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes that a cache really holds for one row of ``tokens`` tokens, exact parts at 16 bits."""
        total = 4 * tokens + 8 * geometry.layers  # positions, lengths
        for index in range(geometry.layers):
            for number, (width, bits) in enumerate(sizes := self.stream_sizes(index, geometry)):
                if bits == 16:
                    total += 2 * width * tokens
                elif number == 0 and len(sizes) == 2 and self.per_channel_keys:
                    blocks, tail = divmod(tokens, self.residual)
                    total += (
                        blocks * width * _row_size(self.residual, bits, self.group_size) + 2 * width * tail
                    )
                else:
                    total += tokens * _row_size(width, bits, self.group_size)
        return total

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """The most bits that fit, then the finest groups and the longest exact tail that still do.

        Base layers and accumulator get at least those bits. Raises `Unreachable`.
        """
        if fraction >= 1:  # nothing has to be saved; positions go on top
            return replace(self, bits=16, base_bits=16, accumulator_bits=16)
        candidates = [
            replace(
                self,
                bits=bits,
                group_size=group_size,
                residual=residual,
                base_bits=max(bits, self.base_bits),
                accumulator_bits=max(bits, self.accumulator_bits),
            )
            for bits, group_size, residual in product(
                BITS, _halvings(self.group_size), _halvings(self.residual)
            )
        ]
        sizes = {
            method: method.row_bytes(tokens, geometry) / geometry.full_bytes(tokens) for method in candidates
        }
        fitting = [method for method, size in sizes.items() if size <= fraction]
        if not fitting:
            raise Unreachable(min(sizes.values()))
        return max(fitting, key=lambda method: (method.bits, sizes[method]))

    # --- factors ----------------------------------------------------------------------------------------------------

    def prepare(self, model: PreTrainedModel) -> Factors:
        """The SVD factors that this method needs of ``model`` (none when X itself is stored), computed once a
        model.

        Computed in float64, kept in the weights' dtype. They are made anew when the weights have changed.
        """
        names = self._factor_names(Geometry.of(model.config))
        if not names:
            return Factors()
        weights = list(_weights(model))
        stamp = _stamp(weights)
        known = _prepared.get(model)
        held = known[1] if known and known[0] == stamp else Factors(fingerprint=fingerprint(model))
        missing = [name for name in names if name not in held.tensors]
        if missing:
            made = dict(held.tensors)
            for name in missing:
                if name not in made:
                    made |= _factors_of(name, weights)
            held = replace(held, tensors=made)
            _prepared[model] = (stamp, held)
        return replace(held, tensors={name: held.tensors[name] for name in names})

    def load(self, path: str | Path, model: PreTrainedModel) -> Factors:
        """Reads factors that `Factors.save` wrote; caches of ``model`` use them from then on.

        Raises ValueError when the file was made for another model or for another variant of the method.
        """
        names = self._factor_names(Geometry.of(model.config))
        weights = list(_weights(model))
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("broadsheet", "{}"))
                stored = set(file.keys())
                found = {name: file.get_tensor(name) for name in names if name in stored}
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no file of XQuant factors: {error}") from None
        if about.get("kind") != "xquant factors":
            raise ValueError(
                f"{path} is no file of XQuant factors; make one with XQuant.prepare(model).save(path)"
            )
        if about.get("model") != fingerprint(model):
            raise ValueError(
                f"{path} belongs to a model with other weights; make its factors with XQuant.prepare(model)"
            )
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"{path} lacks {missing[0]}: it was made for another latent or cross_layer; prepare again"
            )
        tensors = {name: tensor.to(weights[2 * _layer_of(name)].device) for name, tensor in found.items()}
        factors = Factors(tensors, about["model"])
        _prepared[model] = (_stamp(weights), factors)
        return factors

    def _factor_names(self, geometry: Geometry) -> list[str]:
        if not self.uses_latent(geometry):
            return []
        return [
            f"layers.{index}.{name}"
            for index in range(geometry.layers)
            for name in ((CROSS_FACTOR,) if self.crosses(index) else PLAIN_FACTORS)
        ]

    # --- cost -------------------------------------------------------------------------------------------------------

    def cost_model(
        self, config: Any, seq_len: int, batch: int = 1, hardware: str | xquant_cost.Hardware = "h100"
    ) -> xquant_cost.Cost:
        """FLOP, bytes, bound and break-even length of one decode step over ``seq_len`` stored tokens a
        row."""
        return xquant_cost.cost_model(self, config, seq_len, batch, hardware)


def _row_size(width: int, bits: int, group_size: int) -> int:
    """Bytes of ``width`` entries with their scales and zeros."""
    group = fit_group(width, group_size)
    return width // group * (packed_size(group, bits) + 4)


def _halvings(size: int) -> list[int]:
    return [size >> shift for shift in range(4) if not shift or size >> shift >= 16]


def _stamp(weights: list[torch.Tensor]) -> tuple[Any, ...]:
    return tuple((weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights)


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])


def _factors_of(name: str, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The factor ``name`` and those that come with it."""
    layer, kind = name.rsplit(".", 1)
    number = _layer_of(name)
    keys, values = weights[2 * number : 2 * number + 2]
    if kind == CROSS_FACTOR:
        return {name: _svd(torch.cat([keys, values]))[0].to(keys.dtype)}
    which, weight = ("k", keys) if kind.endswith("_k") else ("v", values)
    u, m = _svd(weight)
    return {f"{layer}.U_{which}": u.to(weight.dtype), f"{layer}.M_{which}": m.to(weight.dtype)}
