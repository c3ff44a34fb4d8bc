"""KIVI: keys quantised per channel, values per token (Liu et al. 2024, arXiv 2402.02750).

Keys have a few channels of large magnitude, so their groups run along tokens within a channel; values have
none, so theirs run along channels within a token. Keys can be quantised only once a group is full, and the
newest tokens matter most, so both keep an exact residual: keys collect ``residual`` tokens and quantise them
together, in whole groups; values quantise their oldest exact token whenever there are more than ``residual``
(section 3.3, algorithm 1).

Decoding on the CPU reads the codes as they are stored (see `packed_attention`): a single query token over a
long enough cache is answered without decompressing it. Everything else, and ``kernel=False``, decompresses
and calls SDPA.

A padded batch: every row is quantised from its own first real token on, so that it gets the codes that it
gets alone (see `blocks`).

Deviations: scale and minimum are stored in 16 bits, and the codes are computed against them as stored; a
value group may span heads (with a group size that divides head_dim, as the paper has it, none does); bits
from 1 to 8, which may differ for values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import product
from typing import Any, ClassVar, Self

import torch

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.packing import pack, unpack
from broadsheet.core.perf.storage import CacheFormat, grouped_cache

from .attention import Slots
from .base import CacheLayer, CacheMethod, Geometry
from .blocks import (
    GROUP_SIZES,
    QuantisedLayer,
    Rows,
    Size,
    best_within,
    by_head,
    join,
    longest,
    mask,
    quantisation_error,
    smaller,
    total,
)


@dataclass
class KeyCodes:
    """Keys in groups of ``group_size`` tokens, one scale and zero for each channel of a group.

    ``codes``: uint8 [batch, groups, bytes, channels], a group's tokens packed into the bytes, so that a group
    lies in one piece and neighbouring channels side by side; ``scale``, ``zero``: float16 [batch, groups,
    channels].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, states: torch.Tensor, bits: int, group_size: int) -> KeyCodes:
        """Quantises ``states`` [batch, tokens, channels], tokens a multiple of ``group_size``."""
        grouped = states.unflatten(1, (-1, group_size)).float()
        low, high = grouped.amin(2), grouped.amax(2)
        scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
        step = scale.float().unsqueeze(2)
        codes = (grouped - zero.float().unsqueeze(2)).div_(torch.where(step > 0, step, 1.0))
        codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return cls(_packed_along_tokens(codes, bits), scale, zero, bits, group_size)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """zero + scale * code, [batch, tokens, channels]."""
        codes = unpack(self.codes.transpose(-1, -2), self.bits, self.group_size).transpose(-1, -2)
        states = codes * self.scale.float().unsqueeze(2) + self.zero.float().unsqueeze(2)
        return states.flatten(1, 2).to(dtype)


def _packed_along_tokens(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack` along the tokens of ``codes`` [batch, groups, tokens, channels], without turning them round."""
    tokens, per = codes.shape[2], 8 // bits
    if 8 % bits or tokens % per:
        return pack(codes.transpose(-1, -2), bits).transpose(-1, -2).contiguous()
    packed = codes[:, :, ::per].clone()
    for place in range(1, per):
        packed |= codes[:, :, place::per] << (bits * place)
    return packed


#: numbers quantised at a time: as many as stay in a processor's cache from one pass to the next
BLOCK = 1 << 18


def _in_blocks(quantise: Callable[[torch.Tensor, int, int], Any], states: torch.Tensor, bits: int, group_size: int) -> Any:
    """``quantise(states, bits, group_size)`` for ``states`` [batch, tokens, channels], some tokens at a time."""
    batch, _, channels = states.shape
    tokens = -(-BLOCK // (batch * channels * group_size)) * group_size
    parts = [quantise(part, bits, group_size) for part in states.split(tokens, 1)]
    if len(parts) == 1:
        return parts[0]
    joined = {name: torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scale", "zero")}
    return replace(parts[0], **joined)


@dataclass
class Stream:
    """The keys or the values of one layer: old tokens in few bits, then exact ones.

    ``packed``: `KeyCodes`, or values with codes [batch, tokens, groups, bytes]. ``counts``: quantised tokens
    by row, int64 [batch]; None while all rows have as many.
    """

    recent: Rows
    packed: GroupQuantised | KeyCodes | None = None
    counts: torch.Tensor | None = None

    @property
    def quantised(self) -> Size:
        if self.packed is None:
            return 0
        if self.counts is not None:
            return self.counts
        return self.packed.codes.shape[1] * (self.packed.group_size if isinstance(self.packed, KeyCodes) else 1)

    @property
    def size(self) -> Size:
        return self.quantised + self.recent.size

    def flush(self, counts: Size, bits: int, group_size: int, per_channel: bool) -> Stream:
        """The stream after the oldest ``counts`` exact tokens were quantised (per channel: whole groups)."""
        old, recent = self.recent.split(counts)
        if not old.states.shape[1]:
            return Stream(recent, self.packed, self.counts)
        quantise = KeyCodes.of if per_channel else quantise_groups
        fresh = _in_blocks(quantise, old.states, bits, group_size)
        if self.packed is None:
            return Stream(recent, fresh, old.lengths)
        unit = group_size if per_channel else 1
        have, more = self.quantised // unit, old.size // unit
        codes, lengths = join(self.packed.codes, have, fresh.codes, more)
        scale, _ = join(self.packed.scale, have, fresh.scale, more)
        zero, _ = join(self.packed.zero, have, fresh.zero, more)
        packed = replace(fresh, codes=codes, scale=scale, zero=zero)
        return Stream(recent, packed, None if lengths is None else lengths * unit)

    def drop(self, counts: Size) -> Stream:
        """The stream without its oldest ``counts`` tokens, whose memory is freed (of keys in codes: whole groups)."""
        if self.packed is None:
            return Stream(self.recent.split(counts)[1])
        quantised, packed = self.quantised, self.packed
        coded = smaller(counts, quantised)
        unit = packed.group_size if isinstance(packed, KeyCodes) else 1
        lengths = None if isinstance(quantised, int) else quantised // unit
        left = {name: Rows(getattr(packed, name), lengths).split(coded // unit)[1] for name in ("codes", "scale", "zero")}
        after = left["codes"].lengths
        parts: dict[str, Any] = {name: rows.states for name, rows in left.items()}
        packed = replace(packed, **parts)
        return Stream(self.recent.split(counts - coded)[1], packed, None if after is None else after * unit)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All tokens in order, [batch, tokens, channels]."""
        exact = self.recent.states.to(dtype)
        if self.packed is None:
            return exact
        return join(self.packed.dequantise(dtype), self.quantised, exact, self.recent.size)[0]

    def row(self, index: int) -> tuple[Any, torch.Tensor]:
        """The codes of one row, without the batch axis and padding, and its exact tokens [tokens, channels]."""
        count, recent = (size if isinstance(size, int) else int(size[index]) for size in (self.quantised, self.recent.size))
        assert self.packed is not None
        if isinstance(self.packed, KeyCodes):
            count //= self.packed.group_size
        parts = {name: getattr(self.packed, name)[index, :count] for name in ("codes", "scale", "zero")}
        return replace(self.packed, **parts), self.recent.states[index, :recent]


class KIVILayer(QuantisedLayer):
    """``key_stream``, ``value_stream``: what is stored; every row's tokens in order, without padding."""

    method: KIVI
    key_stream: Stream | None = None
    value_stream: Stream | None = None

    def prefill(self, prompt: Tokens) -> None:
        self.append(prompt)

    def append(self, new: Tokens) -> None:
        method = self.method
        self.kv_heads = new.keys.shape[1]
        keys = _grow(self.key_stream, Rows.of(new.keys, new.valid))
        values = _grow(self.value_stream, Rows.of(new.values, new.valid))
        full = keys.recent.size // method.period * method.period
        self.key_stream = keys.flush(full, method.bits, method.group_size, per_channel=True)
        exact = values.recent.size
        over = (exact > method.residual) * (exact - method.residual)  # one number, or one for each row
        self.value_stream = values.flush(over, method.bits_of_values, method.group_size, per_channel=False)

    def slots(self) -> Slots | None:
        if self.key_stream is None or self.value_stream is None or self.dtype is None:
            return None
        keys = by_head(self.key_stream.dense(self.dtype), self.kv_heads)
        values = by_head(self.value_stream.dense(self.dtype), self.kv_heads)
        valid = mask(self.key_stream.size, keys.shape[2])
        return Slots(keys, values, None if valid is None else valid.unsqueeze(1))

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        keys, values = self.key_stream, self.value_stream
        if keys is None or values is None or not self.reads_codes(new):
            return super().attend(new, mask, scaling)
        rows = range(new.queries.shape[0])
        rows_alone = [self.attend_row(keys.row(row), values.row(row), row, new, scaling) for row in rows]
        return torch.stack(rows_alone).to(new.queries.dtype)

    def reads_codes(self, new: Tokens) -> bool:
        """Whether the kernels answer this query; the reference is `slots` and SDPA."""
        if not self.method.kernel or new.count != 1 or new.queries.requires_grad:
            return False
        if new.queries.device.type != "cpu" or self.stored < KERNEL_FROM:
            return False
        streams = (self.key_stream, self.value_stream)
        if any(stream is None or stream.packed is None for stream in streams):
            return False
        method, head_dim = self.method, new.queries.shape[-1]
        kernels = _kernels()
        return kernels is not None and all(
            kernels.supports(bits, method.group_size, head_dim, kind)
            for kind, bits in (("key", method.bits), ("value", method.bits_of_values))
        )

    def attend_row(
        self,
        keys_of_row: tuple[Any, torch.Tensor],
        values_of_row: tuple[Any, torch.Tensor],
        row: int,
        new: Tokens,
        scaling: float | None,
    ) -> torch.Tensor:
        """One row's attention over its codes, its exact tokens and the new one; float32 [1, heads, head_dim].

        A row with nothing to attend to gets zeros.
        """
        kernels = _kernels()
        _, heads, _, dim = new.queries.shape
        queries = new.queries[row].reshape(self.kv_heads, heads // self.kv_heads, dim).float()
        queries = queries * (dim**-0.5 if scaling is None else scaling)
        (keys, near_keys), (values, near_values) = keys_of_row, values_of_row
        fresh = new.valid[row]  # a row that is padding here brings no token
        near_keys, near_values = (
            torch.cat([near.unflatten(-1, (self.kv_heads, dim)).transpose(0, 1).float(), one.float()], 1)
            for near, one in ((near_keys, new.keys[row][:, fresh]), (near_values, new.values[row][:, fresh]))
        )  # [kv_heads, tokens, head_dim]
        old = keys.codes.shape[0] * keys.group_size
        weights = queries.new_empty(*queries.shape[:2], old + near_keys.shape[1])
        if not weights.shape[-1]:
            return queries.new_zeros(1, heads, dim)
        if old:
            kernels.packed_scores(queries, keys.codes, keys.scale, keys.zero, keys.bits, weights)
        weights[..., old:] = queries @ near_keys.mT
        weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        old = values.codes.shape[0]
        output = weights[..., old:] @ near_values
        if old:
            output += kernels.packed_mix(weights, values.codes, values.scale, values.zero, values.bits)
        return (output / weights.sum(-1, keepdim=True)).reshape(1, heads, dim)

    @property
    def stored(self) -> int:
        size = 0 if self.key_stream is None else self.key_stream.size
        return longest(size)

    @property
    def elements(self) -> int:
        if self.key_stream is None:
            return 0
        batch, _, channels = self.key_stream.recent.states.shape
        return 2 * channels * total(self.key_stream.size, batch)

    def roles(self) -> dict[str, Any]:
        streams = [stream for stream in (self.key_stream, self.value_stream) if stream is not None]
        packed = [stream.packed for stream in streams if stream.packed is not None]
        return {
            "codes": [part.codes for part in packed],
            "scales": [(part.scale, part.zero) for part in packed],
            "buffer": [stream.recent.states for stream in streams],
            "lengths": [(stream.counts, stream.recent.lengths) for stream in streams],
        }


def _grow(stream: Stream | None, new: Rows) -> Stream:
    if stream is None:
        return Stream(new)
    return Stream(stream.recent.append(new), stream.packed, stream.counts)


#: stored tokens from which on the kernels answer: below, compiling them would cost more than they save
KERNEL_FROM = 2048


@cache
def _kernels() -> Any:
    """The kernels; None where numba does not run. Imported at the first use, since numba is heavy."""
    try:
        return import_module("broadsheet.core.numerics.packed_attention")
    except ImportError:
        return None


#: a residual that no context outgrows: nothing is ever quantised
EVERYTHING = 1 << 24


@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Keys per channel and values per token in ``bits`` bits, the newest tokens exact.

    Parameters: ``bits`` 1 to 8 (paper: 2 and 4), ``value_bits`` for the values where they differ;
    ``group_size`` (32): tokens of a key group, channels of a value group; ``residual`` (the paper's R; 128 or
    32): a multiple of ``group_size``. 0 leaves no value exact, and keys only until their group is full.
    ``kernel``: on a CPU, long caches are read as stored where the layout allows (codes that fill bytes).
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 32
    value_bits: int | None = None
    kernel: bool = True

    Layer: ClassVar[type[CacheLayer]] = KIVILayer

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("value_bits", self.bits_of_values)):
            if not 1 <= bits <= 8:
                raise ValueError(f"{name} must be 1 to 8, got {bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.residual < 0 or self.residual % self.group_size:
            raise ValueError(f"residual must be a multiple of group_size {self.group_size}, not {self.residual}")

    @property
    def bits_of_values(self) -> int:
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def period(self) -> int:
        """How many exact keys are quantised together."""
        return self.residual or self.group_size

    def check(self, geometry: Geometry) -> None:
        channels = geometry.kv_heads * geometry.head_dim
        if channels % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide the {channels} channels of a token's values; choose a divisor"
            )

    def format(self, geometry: Geometry) -> CacheFormat:
        return grouped_cache(self.bits, self.group_size, self.residual, self.bits_of_values)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """Bits, group size and residual of the least error on normal data within the budget."""
        channels = geometry.kv_heads * geometry.head_dim
        choices = []
        for group in (size for size in GROUP_SIZES if channels % size == 0):
            some = [group * 2**i for i in range(10) if group * 2**i < tokens]
            for residual, bits in product([0, *some, EVERYTHING], range(8, 0, -1)):
                for value_bits in range(bits, 0, -1):
                    one = replace(self, bits=bits, value_bits=value_bits, group_size=group, residual=residual)
                    keys = tokens // one.period * one.period * quantisation_error(bits, group)
                    values = max(tokens - residual, 0) * quantisation_error(value_bits, group)
                    choices.append((one, one.expected_bytes(tokens, geometry), keys + values))
        return best_within(choices, fraction, tokens, geometry)
