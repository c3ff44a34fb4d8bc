"""Lambda-shaped attention over a bounded 4-bit cache (AccLLM: Liang et al. 2026, arXiv 2505.03745).

A token attends to the first ``sink`` tokens and to the ``window`` newest ones, itself included, and to nothing else (LM-
Infinite, arXiv 2308.16137; StreamingLLM, arXiv 2309.17453). What lies between is freed, so memory and time a token do not
grow with the context. Distances stay true, but a first token is never seen as farther than ``window`` (LM-Infinite's bound;
not StreamingLLM's numbering of slots). Keys are therefore kept before rotation and rotated when they are read.

Keys are quantised per channel, in groups of ``group_size`` neighbouring tokens, values per token in groups of channels
(KIVI); the first tokens and the newest keys, whose group is not full, stay in 16 bits. A group of keys goes when all of its
tokens are out of every later token's sight, so up to ``group_size`` - 1 tokens more than the window are held. Tokens of one
pass attend to each other exactly and to the stored ones as stored; a prompt in chunks is stored chunk by chunk.

Positions within the cache are counted from the window's edge, so they never outgrow the trained range; a stream may be of
any length. A pass works on some queries at a time: time is O(tokens * window), not O(tokens^2).

The paper names a Lambda shape and 4 bits; numbers of sinks, distances and the layout of groups are those of the works
above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from transformers import PreTrainedModel

from broadsheet.core.models.rotary import rotate
from broadsheet.core.models.taps import Tokens, sdpa
from broadsheet.core.perf.storage import CacheFormat, window_cache

from .attention import Slots
from .base import CacheLayer, CacheMethod, Geometry, MethodCache, Unreachable
from .blocks import QuantisedLayer, Rows, Size, by_head, by_row, join, longest, mask, smaller, take, total
from .kivi import Stream

#: queries answered together: their logits over the window are what a pass needs at a time
QUERIES = 128

Rotation = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Near:
    """Tokens in a row's order, keys before rotation: ``keys``, ``values`` float32 [batch, tokens, channels]; row i has
    ``size[i]``, of which the first is its ``start[i]``-th token."""

    keys: torch.Tensor
    values: torch.Tensor
    size: Size
    start: Size


def lambda_attention(
    queries: torch.Tensor, first: Size, sinks: Near, near: Near, window: int, heads: int, scaling: float, rotation: Rotation
) -> torch.Tensor:
    """Lambda-shaped attention, float32 [batch, heads, tokens, head_dim].

    ``queries`` float32 [batch, heads, tokens, head_dim] before rotation, row i's being its tokens ``first[i]`` and on.
    ``sinks`` are attended to whatever the distance, which is taken as ``window`` at most; ``near`` holds tokens after them,
    of which the ``window`` newest up to a query are attended to. ``heads``: of keys. ``rotation``: cosines and sines of
    positions [batch, tokens].
    """
    batch, _, count, dim = queries.shape
    begin = by_row(first, queries)
    outputs = []
    for start in range(0, count, QUERIES):
        some = queries[:, :, start : start + QUERIES]
        here = some.shape[2]
        span = window - 1 + here  # of the first query's oldest token to the last query
        ordinals = begin[:, None] + start + torch.arange(here, device=queries.device)
        # The tokens in sight, the same number for every row, with positions counted from the first.
        index = ordinals[:, :1] - (window - 1) - by_row(near.start, queries)[:, None]
        index = index + torch.arange(span, device=queries.device)
        exists = (index >= 0) & (index < by_row(near.size, queries)[:, None])
        index = index.clamp(0, max(near.keys.shape[1] - 1, 0))
        place = torch.arange(span, device=queries.device)
        ahead = place[window - 1 :, None] - place  # how far a token is behind a query
        allowed = ((ahead >= 0) & (ahead < window)) & exists[:, None]
        if near.keys.shape[1]:
            keys, values = (by_head(take(part, index), heads) for part in (near.keys, near.values))
        else:
            keys = values = queries.new_zeros(batch, heads, span, dim)
        cos, sin = rotation(place[None])
        keys, turned = rotate(keys, cos, sin), rotate(some, cos[:, window - 1 :], sin[:, window - 1 :])
        logits = torch.einsum("bhgqd,bhkd->bhgqk", turned.unflatten(1, (heads, -1)), keys)
        parts = [logits.masked_fill(~allowed[:, None, None], float("-inf"))]
        parts.append(_sink_logits(some, ordinals, sinks, window, heads, rotation))
        weights = torch.nan_to_num((torch.cat(parts, -1) * scaling).softmax(-1))  # nothing to see: zeros
        output = torch.einsum("bhgqk,bhkd->bhgqd", weights[..., :span], values)
        output += torch.einsum("bhgqk,bhkd->bhgqd", weights[..., span:], by_head(sinks.values, heads))
        outputs.append(output.flatten(1, 2))
    return torch.cat(outputs, 2)


def _sink_logits(
    queries: torch.Tensor, ordinals: torch.Tensor, sinks: Near, window: int, heads: int, rotation: Rotation
) -> torch.Tensor:
    """Products with the first tokens, at distance min(distance, ``window``): [batch, heads, group, queries, sinks]."""
    batch, _, count, _ = queries.shape
    keys = by_head(sinks.keys, heads)
    held = by_row(sinks.size, queries)[:, None]
    if isinstance(sinks.size, int) and int(ordinals.min()) >= window + sinks.size - 1:  # all as far as they are ever seen
        turned = rotate(queries, *rotation(torch.full_like(ordinals[:1, :1], window)))
        return torch.einsum("bhgqd,bhkd->bhgqk", turned.unflatten(1, (heads, -1)), keys)
    columns = []
    for number in range(keys.shape[2]):
        turned = rotate(queries, *rotation(ordinals.clamp(max=window + number))).unflatten(1, (heads, -1))
        key = rotate(keys[:, :, number : number + 1], *rotation(torch.full_like(ordinals[:1, :1], number)))
        seen = (ordinals >= number) & (number < held)
        columns.append((turned * key.unsqueeze(2)).sum(-1).masked_fill(~seen[:, None, None], float("-inf")))
    if not columns:
        return queries.new_zeros(batch, heads, queries.shape[1] // heads, count, 0)
    return torch.stack(columns, -1)


class LambdaLayer(QuantisedLayer):
    """``sink_keys``, ``sink_values``: the first tokens of every row; ``key_stream``, ``value_stream``: the newest, in order.
    All keys are before rotation. ``tokens``: seen by row."""

    method: LambdaKV4
    sink_keys: Rows | None = None
    sink_values: Rows | None = None
    key_stream: Stream | None = None
    value_stream: Stream | None = None
    tokens: Size = 0

    def receive(self, module: Any, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        self.tapped = self.filling = False  # a prompt is not waited for: its tokens attend as all others do
        self.kv_heads = new.keys.shape[1]
        if self.sink_keys is not None and len(self.sink_keys.states) != len(new.keys):
            held = len(self.sink_keys.states)
            raise ValueError(
                f"this cache holds a batch of {held}, and {len(new.keys)} rows came; reset() it or make a new one"
            )
        if self.sink_keys is None and new.count <= self.method.reach:  # everything is in sight, at its true distance
            output = sdpa(module, new.queries, new.keys, new.values, mask, scaling)
            self.seen += new.count
            self.append(self._stored_dtype(self._unturned(new)))
            return output
        new = self._unturned(new)
        output = self.attend(new, mask, scaling)
        self.seen += new.count
        self.append(self._stored_dtype(new))
        return output

    @staticmethod
    def _unturned(new: Tokens) -> Tokens:
        """The tokens with queries and keys before rotation, in float32; values as they are."""
        queries, keys = (rotate(x.float(), new.cos.float(), new.sin.float(), inverse=True) for x in (new.queries, new.keys))
        return replace(new, queries=queries, keys=keys)

    def _stored_dtype(self, new: Tokens) -> Tokens:
        self.dtype = new.values.dtype
        dtype = self.cache.dtype or new.values.dtype
        return replace(new, keys=new.keys.to(dtype), values=new.values.to(dtype))

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """``new`` is before rotation. [batch, tokens, heads, head_dim]."""
        queries = Rows.of(new.queries, new.valid)
        sinks, near = self._with(Rows.of(new.keys, new.valid), Rows.of(new.values, new.valid), torch.float32)
        scaling = new.queries.shape[-1] ** -0.5 if scaling is None else scaling
        output = lambda_attention(
            by_head(queries.states, new.queries.shape[1]), self.tokens, sinks, near, self.method.reach, self.kv_heads,
            scaling, self._rotation,
        ).transpose(1, 2)  # fmt: skip
        if queries.lengths is not None or output.shape[1] < new.count:  # back to the columns they came from
            output = take(output, (new.valid.cumsum(-1) - 1).clamp(min=0))
        return output.to(new.values.dtype)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        return self.rotary(like, positions)  # type: ignore[misc]  # every model with taps has one

    def _with(self, keys: Rows, values: Rows, dtype: torch.dtype) -> tuple[Near, Near]:
        """First and newest tokens, stored ones as stored, followed by new ``keys`` and ``values``."""
        sinks, (new_keys, new_values) = self._sinks_with(keys, values)
        near = []
        for stream, new in ((self.key_stream, new_keys), (self.value_stream, new_values)):
            if stream is None:
                near.append((new.states.to(dtype), new.size))
            else:
                joined, lengths = join(stream.dense(dtype), stream.size, new.states.to(dtype), new.size)
                near.append((joined, joined.shape[1] if lengths is None else lengths))
        size = near[0][1]
        after = self.tokens + keys.size
        first, last = (part.states.to(dtype) for part in sinks)
        return Near(first, last, sinks[0].size, 0), Near(near[0][0], near[1][0], size, after - size)

    def _sinks_with(self, keys: Rows, values: Rows) -> tuple[tuple[Rows, Rows], tuple[Rows, Rows]]:
        """The first tokens with what new ones add to them, and the new ones that are none of the first."""
        room = self.method.sink if self.sink_keys is None else self.method.sink - self.sink_keys.size
        count = smaller(keys.size, room)
        (first_keys, keys), (first_values, values) = keys.split(count), values.split(count)
        if self.sink_keys is not None and self.sink_values is not None:
            first_keys, first_values = self.sink_keys.append(first_keys), self.sink_values.append(first_values)
        return (first_keys, first_values), (keys, values)

    def prefill(self, prompt: Tokens) -> None:
        self.append(prompt)

    def append(self, new: Tokens) -> None:
        """Stores tokens whose keys are before rotation."""
        method, keys = self.method, Rows.of(new.keys, new.valid)
        self.tokens = self.tokens + keys.size
        (sink_keys, sink_values), (keys, values) = self._sinks_with(keys, Rows.of(new.values, new.valid))
        self.sink_keys, self.sink_values = (_own(rows) for rows in (sink_keys, sink_values))
        key_stream, value_stream = _grow(self.key_stream, keys), _grow(self.value_stream, values)
        over = method.over(key_stream.size)
        key_stream, value_stream = key_stream.drop(over), value_stream.drop(over)
        if method.key_bits < 16:
            full = key_stream.recent.size // method.group_size * method.group_size
            key_stream = key_stream.flush(full, method.key_bits, method.group_size, per_channel=True)
        if method.value_bits < 16:
            group = method.value_group(values.states.shape[-1])
            value_stream = value_stream.flush(value_stream.recent.size, method.value_bits, group, per_channel=False)
        self.key_stream, self.value_stream = key_stream, value_stream

    def slots(self) -> Slots | None:
        """What is stored, keys rotated to the tokens' own positions: the first ones, then the newest."""
        if self.sink_keys is None or self.sink_values is None or self.dtype is None:
            return None
        nothing = Rows(self.sink_keys.states[:, :0].float())
        sinks, near = self._with(nothing, nothing, torch.float32)
        batch, device = len(nothing.states), nothing.states.device
        keys, values, valid = [], [], []
        for part in (sinks, near):
            width = part.keys.shape[1]
            places = by_row(part.start, part.keys)[:, None] + torch.arange(width, device=device)
            keys.append(rotate(by_head(part.keys, self.kv_heads), *self._rotation(places)))
            values.append(by_head(part.values, self.kv_heads))
            held = mask(part.size, width)
            valid.append(torch.ones(batch, width, dtype=torch.bool, device=device) if held is None else held)
        joined = torch.cat(valid, 1)
        return Slots(
            torch.cat(keys, 2).to(self.dtype),
            torch.cat(values, 2).to(self.dtype),
            None if bool(joined.all()) else joined.unsqueeze(1),
        )

    @property
    def stored(self) -> int:
        if self.sink_keys is None or self.key_stream is None:
            return 0
        return longest(self.sink_keys.size) + longest(self.key_stream.size)

    @property
    def elements(self) -> int:
        if self.sink_keys is None or self.key_stream is None:
            return 0
        batch, _, channels = self.sink_keys.states.shape
        return 2 * channels * (total(self.sink_keys.size, batch) + total(self.key_stream.size, batch))

    def roles(self) -> dict[str, Any]:
        streams = [stream for stream in (self.key_stream, self.value_stream) if stream is not None]
        sinks = [rows for rows in (self.sink_keys, self.sink_values) if rows is not None]
        packed = [stream.packed for stream in streams if stream.packed is not None]
        return {
            "codes": [part.codes for part in packed],
            "scales": [(part.scale, part.zero) for part in packed],
            "buffer": [stream.recent.states for stream in streams],
            "sinks": [rows.states for rows in sinks],
            "lengths": [self.tokens, *(rows.lengths for rows in sinks)]
            + [(stream.counts, stream.recent.lengths) for stream in streams],
        }


def _grow(stream: Stream | None, new: Rows) -> Stream:
    return Stream(new) if stream is None else Stream(stream.recent.append(new), stream.packed, stream.counts)


def _own(rows: Rows) -> Rows:
    """In memory of its own: a slice of a prompt would keep all of it."""
    return Rows(rows.states.clone(memory_format=torch.contiguous_format), rows.lengths)


@dataclass(frozen=True)
class LambdaKV4(CacheMethod):
    """Sinks and a window, in few bits.

    Parameters: ``sink`` first tokens (paper of StreamingLLM: 4; 0: a sliding window alone) and ``window`` newest ones, by
    default as many as the model was trained for less the sinks; ``key_bits``, ``value_bits`` 1 to 8, or 16 for none;
    ``group_size``: tokens of a key group, channels of a value group (a token with fewer channels is one group).

    Raises ValueError for values outside these, when sinks and window are more than the positions that the model was trained
    for, and for rotations that change with the length of the context.
    """

    sink: int = 4
    window: int | None = None
    key_bits: int = 4
    value_bits: int = 4
    group_size: int = 64

    Layer: ClassVar[type[CacheLayer]] = LambdaLayer

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if not (1 <= bits <= 8 or bits == 16):
                raise ValueError(f"{name} must be 1 to 8, or 16 for none, got {bits}")
        if self.sink < 0 or (self.window is not None and self.window < 1):
            raise ValueError(f"sink must be at least 0 and window at least 1, got {self.sink} and {self.window}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")

    @property
    def reach(self) -> int:
        """The window; `cache` has put it in where it was left out."""
        if self.window is None:
            raise ValueError("window is not set; give it, or make the cache with cache(model)")
        return self.window

    def value_group(self, channels: int) -> int:
        return min(self.group_size, channels)

    def over(self, held: Size) -> Size:
        """Of ``held`` newest tokens, how many the next token cannot see and whose codes can go: whole groups."""
        unit = self.group_size if self.key_bits < 16 else 1
        more = held - (self.reach - 1)
        more = max(more, 0) if isinstance(more, int) else more.clamp(min=0)
        return more // unit * unit

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> MethodCache:
        config = model.config.get_text_config()
        trained = getattr(config, "max_position_embeddings", None)
        if self.window is None:
            if trained is None:
                raise ValueError("this model does not say how many positions it was trained for; give window")
            return replace(self, window=trained - self.sink).cache(model, chunked, dtype)
        if trained is not None and self.sink + self.window > trained:
            raise ValueError(
                f"sink {self.sink} and window {self.window} are more than the {trained} positions the model was trained for"
            )
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"rotations of type '{kind}' change with the context's length; a bounded window needs fixed ones"
            )
        return super().cache(model, chunked, dtype)

    def check(self, geometry: Geometry) -> None:
        channels = geometry.kv_heads * geometry.head_dim
        if self.value_bits < 16 and channels % self.value_group(channels):
            raise ValueError(
                f"group_size {self.group_size} does not divide the {channels} channels of a token's values; choose a divisor"
            )

    def format(self, geometry: Geometry) -> CacheFormat:
        return window_cache(self.sink, self.reach, self.key_bits, self.value_bits, self.group_size)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """Everything in as many bits as fit (16, 8, then these), else these bits and the longest window that fits."""
        room = fraction * geometry.full_bytes(tokens)
        for bits in (16, 8):
            whole = replace(self, key_bits=bits, value_bits=bits, window=tokens)
            if whole.expected_bytes(tokens, geometry) <= room:
                return whole
        for window in range(tokens, 0, -1):
            found = replace(self, window=window)
            if found.expected_bytes(tokens, geometry) <= room:
                return found
        least = replace(self, window=1).expected_bytes(tokens, geometry)
        raise Unreachable(least / geometry.full_bytes(tokens))
