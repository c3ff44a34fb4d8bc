"""XQuant and XQuant-CL: caching quantised layer inputs (Tomar et al. 2025, arXiv 2508.10395).

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

import warnings
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.rotary import find_rotary, rotate
from broadsheet.core.models.taps import Tokens, attention_modules
from broadsheet.core.perf.hardware import Device
from broadsheet.core.perf.storage import Stream, groups

from ..attention import Slots, attend_slots
from ..base import CacheLayer, CacheMethod, Geometry, MethodCache
from ..blocks import GROUP_SIZES, best_within, quantisation_error
from . import cost
from .factors import CROSS_FACTOR, PLAIN_FACTORS, Factors, loaded, prepared, projection_of
from .streams import (
    ChannelStream,
    Items,
    TokenStream,
    decode,
    encode,
    extended,
    fit_group,
    joined,
    left_aligned,
    sliced,
    stored_size,
)

BITS = (2, 3, 4, 8, 16)
#: tokens rebuilt at a time: bounds unpacked codes and float32 X beside one layer's keys and values
TILE = 4096


class XQuantCache(MethodCache):
    """A `MethodCache` with its model's factors and, during a forward pass only, cross-layer accumulators.

    ``walk``: by purpose ("read", "append" or "prefill") the last layer done and its accumulator; empty
    between passes. Replaced rather than changed in place, so that a fork has its own.
    """

    method: XQuant
    layers: list[Any]

    def __init__(self, method: XQuant, layers: list[Any], chunked: bool, dtype: torch.dtype | None, factors: Factors):
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
            raise RuntimeError("XQuant-CL's layers work in order; run the whole model, one forward pass at a time")
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
            "accumulator_bytes": self.layers[-1].accumulator_bytes,
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
            below = torch.zeros_like(x)
            if self.is_delta:
                below = decode(self.cache.from_below(purpose, self.index))
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
        size = stored_size(width, bits, self.method.group_size, self.storage_dtype.itemsize)
        return size * self.stored * len(self.lengths)

    def rounded(self, x: torch.Tensor, dtype: torch.dtype) -> Items:
        """The accumulator as it is written back for the next layer."""
        return encode(x, self.method.accumulator_bits, self.method.group_size, dtype)

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
                latents = {name: kept.read(start, stop, self.lengths) for name, kept in self.streams.items()}
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
        """X of stored tokens in a cross-layer layer, float32 [batch, stop - start, hidden_size].

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

    def heads(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Head norm (where the model has one) and rotation; [batch, kv_heads, tokens, head_dim] each."""
        width = self.module.head_dim
        norm = getattr(self.module, "k_norm", None) or nn.Identity()
        gain = getattr(norm, "weight", None)
        by_head = gain is None or gain.shape[-1] == width  # OLMo 2 norms all heads together
        keys = keys if by_head else norm(keys)
        keys, values = (x.unflatten(-1, (-1, width)) for x in (keys, values))
        keys = norm(keys) if by_head else keys
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
            # Far above the rounding of bfloat16 (1 %), far below a missing norm or another rotation (100 %).
            if (ours.float() - true).norm() > 0.05 * true.norm():
                raise ValueError(
                    f"{type(self.module).__name__} does not make keys and values by projection, bias, head "
                    "norm and half-split rotation; XQuant cannot rebuild them"
                )


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
                raise ValueError(f"{name} must be one of 2, 3, 4, 8, 16, got {getattr(self, name)}")
        for name in ("group_size", "residual", "base_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.latent not in ("auto", "none", "svd"):
            raise ValueError(f"latent must be auto, none or svd, got '{self.latent}'")

    def check(self, geometry: Geometry) -> None:
        if self.cross_layer and geometry.layers < self.base_layers + 1:
            raise ValueError(
                f"cross_layer needs at least base_layers + 1 = {self.base_layers + 1} layers, "
                f"this model has {geometry.layers}"
            )
        kv = 2 * geometry.kv_heads * geometry.head_dim
        if not self.uses_latent(geometry) and geometry.hidden_size > kv:
            warnings.warn(
                f"latent='none' stores X of width {geometry.hidden_size} where keys and values take {kv}: "
                f"{geometry.hidden_size / kv:g} times the memory of a KV cache at equal bits; "
                "latent='auto' avoids that",
                stacklevel=3,
            )

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> XQuantCache:
        plain = super().cache(model, chunked, dtype)
        return XQuantCache(self, plain.layers, chunked, dtype, self.prepare(model))

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        for module in attention_modules(model):
            projection_of(module, "k_proj"), projection_of(module, "v_proj")
        rotary = find_rotary(model)
        if rotary is None:
            raise ValueError(f"{type(model).__name__} has no rotary embedding to rebuild keys with")
        kind = getattr(rotary, "rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(f"rope type '{kind}' rotates by the length of the pass, so old keys cannot be rebuilt exactly")
        return super().layers(model)

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

    def is_blocked(self, index: int, number: int, geometry: Geometry) -> bool:
        """Whether stream ``number`` of layer ``index`` is quantised per channel, in blocks of tokens."""
        sizes = self.stream_sizes(index, geometry)
        return self.per_channel_keys and len(sizes) == 2 and number == 0 and sizes[number][1] < 16

    def paper_size(self, geometry: Geometry) -> float:
        """The paper's size formula, as a fraction of a 16-bit KV cache.

        It leaves out exact tails, the accumulator, positions and factors; `expected_bytes` has what a cache holds.
        """
        bits = sum(
            width * (bits + (0 if bits == 16 else 32 / self.group_size))
            for index in range(geometry.layers)
            for width, bits in self.stream_sizes(index, geometry)
        )
        return bits / (8 * geometry.full_bytes(1))

    def stream(self, index: int, number: int, geometry: Geometry) -> Stream:
        """How stream ``number`` of layer ``index`` is stored."""
        width, bits = self.stream_sizes(index, geometry)[number]
        if self.is_blocked(index, number, geometry):
            return Stream(groups(bits, fit_group(self.residual, self.group_size)), "tokens", self.residual)
        return Stream(groups(bits, fit_group(width, self.group_size)))

    def expected_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes that a cache really holds for one row of ``tokens`` tokens, exact parts at 16 bits."""
        total = 4 * tokens + 8 * geometry.layers  # positions, lengths
        for index in range(geometry.layers):
            for number, (width, _) in enumerate(self.stream_sizes(index, geometry)):
                total += int(self.stream(index, number, geometry).nbytes(tokens, 1, width))
        return total

    def expected_error(self, tokens: int, geometry: Geometry) -> float:
        """Squared error that a row of standard normal data would take, summed over what is quantised."""
        total = 0.0
        for index in range(geometry.layers):
            for number, (width, bits) in enumerate(self.stream_sizes(index, geometry)):
                along, count = width, tokens
                if self.is_blocked(index, number, geometry):
                    along, count = self.residual, tokens // self.residual * self.residual
                if bits < 16:
                    total += width * count * quantisation_error(bits, fit_group(along, self.group_size))
        return total

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """Bits (of base layers too), group and block size of the least expected error within the budget.

        Groups and blocks are at most the method's own, base layers and accumulator at least as fine as the
        deltas. Raises `Unreachable`.
        """
        if fraction >= 1:  # nothing has to be saved; positions go on top
            return replace(self, bits=16, base_bits=16, accumulator_bits=16)
        groups, blocks = ({size, *(one for one in GROUP_SIZES if one <= size)} for size in (self.group_size, self.residual))
        choices = []
        for bits, base, group, block in product(BITS, BITS, sorted(groups), sorted(blocks)):
            if base < bits or (base != self.base_bits and not self.cross_layer):
                continue
            one = replace(self, bits=bits, group_size=group, residual=block, base_bits=base)
            one = replace(one, accumulator_bits=max(bits, self.accumulator_bits))
            choices.append((one, one.expected_bytes(tokens, geometry), one.expected_error(tokens, geometry)))
        return best_within(choices, fraction, tokens, geometry)

    def prepare(self, model: PreTrainedModel) -> Factors:
        """The SVD factors that this method needs of ``model``; none when X itself is stored.

        Computed once a model, and anew when its weights have changed. `cache` calls this by itself; call it
        to `Factors.save` them.
        """
        return prepared(model, self.factor_names(Geometry.of(model.config)))

    def load(self, path: str | Path, model: PreTrainedModel) -> Factors:
        """Reads factors that `Factors.save` wrote; caches of ``model`` use them from then on.

        Raises ValueError when the file was made for another model or another variant of the method.
        """
        return loaded(path, model, self.factor_names(Geometry.of(model.config)))

    def factor_names(self, geometry: Geometry) -> list[str]:
        """The factors that this method needs, as the file names them."""
        if not self.uses_latent(geometry):
            return []
        return [
            f"layers.{index}.{name}"
            for index in range(geometry.layers)
            for name in ((CROSS_FACTOR,) if self.crosses(index) else PLAIN_FACTORS)
        ]

    def cost_model(self, config: Any, seq_len: int, batch: int = 1, hardware: str | Device = "h100-pcie") -> cost.Cost:
        """FLOP, bytes, bound and break-even length of a decode step over ``seq_len`` stored tokens a row."""
        return cost.decode_cost(self, config, seq_len, batch, hardware)
