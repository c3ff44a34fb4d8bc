"""KIVI: keys quantised per channel, values per token (Liu et al. 2024, arXiv 2402.02750).

Keys have a few channels of large magnitude, so their groups run along tokens within a channel; values have
none, so theirs run along channels within a token. Keys can be quantised only once a group is full, and the
newest tokens matter most, so both keep an exact residual: keys collect ``residual`` tokens and quantise them
together, in whole groups; values quantise their oldest exact token whenever there are more than ``residual``
(section 3.3, algorithm 1).

Deviations: scale and minimum are stored in 16 bits, and the codes are computed against them as stored; a
value group may span heads (with a group size that divides head_dim, as the paper has it, none does); bits
from 1 to 8, which may differ for values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Self

import torch

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.packing import packed_size

from .base import CacheLayer, CacheMethod, Geometry, Slots
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
    total,
)


@dataclass
class Stream:
    """The keys or the values of one layer: old tokens in few bits, then exact ones.

    ``packed`` holds [batch, tokens, channels] with groups along tokens (keys: codes [batch, channels, groups,
    bytes]) or along channels (values: codes [batch, tokens, groups, bytes]). ``counts``: quantised tokens by
    row, int64 [batch]; None while all rows have as many.
    """

    recent: Rows
    packed: GroupQuantised | None = None
    counts: torch.Tensor | None = None

    @property
    def quantised(self) -> Size:
        if self.packed is None:
            return 0
        return self.counts if self.counts is not None else _tokens(self.packed)

    @property
    def size(self) -> Size:
        return self.quantised + self.recent.size

    def flush(self, counts: Size, bits: int, group_size: int, per_channel: bool) -> Stream:
        """The stream after the oldest ``counts`` exact tokens were quantised (per channel: whole groups)."""
        old, recent = self.recent.split(counts)
        if not old.states.shape[1]:
            return Stream(recent, self.packed, self.counts)
        fresh = quantise_groups(old.states, bits, group_size, per_channel)
        if self.packed is None:
            return Stream(recent, fresh, old.lengths)
        unit, dim = (group_size, 2) if per_channel else (1, 1)
        have, more = self.quantised // unit, old.size // unit
        codes, lengths = join(self.packed.codes, have, fresh.codes, more, dim)
        scale, _ = join(self.packed.scale, have, fresh.scale, more, dim)
        zero, _ = join(self.packed.zero, have, fresh.zero, more, dim)
        width = codes.shape[2] * group_size if per_channel else fresh.width
        packed = GroupQuantised(codes, scale, zero, bits, fresh.group_size, width, per_channel)
        return Stream(recent, packed, None if lengths is None else lengths * unit)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All tokens in order, [batch, tokens, channels]."""
        exact = self.recent.states.to(dtype)
        if self.packed is None:
            return exact
        return join(self.packed.dequantise(dtype), self.quantised, exact, self.recent.size)[0]


def _tokens(packed: GroupQuantised) -> int:
    return packed.width if packed.transposed else packed.codes.shape[1]


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


#: a residual that no context outgrows: nothing is ever quantised
EVERYTHING = 1 << 24


@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Keys per channel and values per token in ``bits`` bits, the newest tokens exact.

    Parameters: ``bits`` 1 to 8 (paper: 2 and 4), ``value_bits`` for the values where they differ;
    ``group_size`` (32): tokens of a key group, channels of a value group; ``residual`` (the paper's R; 128 or
    32): a multiple of ``group_size``. 0 leaves no value exact, and keys only until their group is full.
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 32
    value_bits: int | None = None

    Layer: ClassVar[type[CacheLayer]] = KIVILayer

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("value_bits", self.bits_of_values)):
            if not 1 <= bits <= 8:
                raise ValueError(f"{name} must be 1 to 8, got {bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        if self.residual < 0 or self.residual % self.group_size:
            raise ValueError(
                f"residual must be a multiple of group_size {self.group_size}, not {self.residual}"
            )

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
                f"group_size {self.group_size} does not divide the {channels} channels of a token's values; "
                "choose a divisor"
            )

    def expected_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes of one row after ``tokens`` tokens, exact parts in 16 bits: what ``nbytes`` will say."""
        channels, group = geometry.kv_heads * geometry.head_dim, self.group_size
        keys = tokens // self.period * self.period
        values = max(tokens - self.residual, 0)
        packed = keys // group * channels * (packed_size(group, self.bits) + 4)
        packed += values * (channels // group) * (packed_size(group, self.bits_of_values) + 4)
        return geometry.layers * (packed + 2 * channels * (2 * tokens - keys - values))

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
