"""Bytes of what is stored: codes and their scales, caches, weights. One formula for every budget, plan and estimate.

A *format* says how numbers lie in memory, and its ``nbytes`` how many bytes the tensors that are really made then take. The
methods of the families make theirs (`CacheMethod.format`, `WeightMethod.format`) and choose settings for a budget by it; the
operator tables (`core.perf.ops`) take the same objects, so that "what if the cache were KIVI's with 2 bits" has the answer
that KIVI itself gives. `cache_format` and `weight_format` read them from text. Exact numbers have 16 bits unless said
otherwise, and sequences are counted one by one.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Literal

Shape = tuple[int, int]


def packed_size(count: int, bits: float) -> int:
    """Bytes of a packed row of ``count`` codes (`core.numerics.packing`)."""
    return math.ceil(count * bits / 8)


@dataclass(frozen=True)
class Groups:
    """Rows of numbers in codes of ``bits`` bits, of which ``size`` neighbours share a scale and a zero.

    size: None for one group a row; a last group that is shorter is filled up, unless ``by_row``. scale, zero: bytes of each
    (0: there is none). by_row: the codes of a row are packed without gaps; else those of every group begin a byte.
    """

    bits: float = 16
    size: int | None = None
    scale: float = 2
    zero: float = 2
    by_row: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int | float) and 1 <= self.bits <= 32):
            raise ValueError(f"bits is between 1 and 32; got {self.bits!r}")
        if self.size is not None and not (isinstance(self.size, int) and self.size >= 1):
            raise ValueError(f"a group size is a whole number of at least 1; got {self.size!r}")

    def nbytes(self, rows: int, columns: int) -> float:
        """Bytes of ``rows`` rows of ``columns`` numbers."""
        if not columns:
            return 0
        size = min(self.size or columns, columns)
        groups = -(-columns // size)
        codes = packed_size(columns, self.bits) if self.by_row else groups * packed_size(size, self.bits)
        return rows * (codes + groups * (self.scale + self.zero))


EXACT = Groups(16, scale=0, zero=0)


def groups(bits: float, size: int | None) -> Groups:
    """Codes with a 16-bit scale and zero a group; with 16 bits and more the numbers as they are."""
    return Groups(bits, size) if bits < 16 else EXACT


def plain(bits: float) -> Groups:
    """Codes without scales: what is left when nobody says what they need besides."""
    return Groups(bits, scale=0, zero=0, by_row=True)


# --- caches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """What a layer keeps of every token: its keys, its values, or a latent, ``heads`` times ``dim`` channels.

    groups: of codes; along: whether a group's numbers are of one channel and neighbouring tokens, or of one token. step:
    tokens are coded in runs of so many; exact: so many of the newest are not coded yet. sparsity: the share of every vector
    (along the groups) whose entries are kept exactly too, half of them the largest, with their places; rank: of a low-rank
    matrix a head beside it.
    """

    groups: Groups = EXACT
    along: Literal["tokens", "channels"] = "channels"
    step: int = 1
    exact: int = 0
    sparsity: float = 0.0
    rank: int = 0

    def coded(self, tokens: int) -> int:
        """Of ``tokens``, those in codes."""
        return max(tokens - self.exact, 0) // self.step * self.step

    def nbytes(self, tokens: int, heads: int, dim: int) -> float:
        """Bytes of ``tokens`` tokens of one layer and sequence."""
        coded, channels = self.coded(tokens), heads * dim
        rows, columns = (channels, coded) if self.along == "tokens" else (coded, channels)
        size = EXACT.nbytes(tokens - coded, channels) + self.groups.nbytes(rows, columns)
        size += rows * outlier_count(self.sparsity, columns) * (2 + place_size(columns))
        return size + 2 * heads * min(self.rank, coded) * (coded + dim)


def outlier_count(sparsity: float, length: int) -> int:
    """Entries of a vector that are kept exactly: half of them the largest, half the smallest."""
    return 2 * math.floor(sparsity / 2 * length + 1e-9)  # the last term: 0.29 * 100 is 28.999999999999996


def place_size(length: int) -> int:
    """Bytes of a place in a vector: the smallest whole type."""
    return 1 if length <= 2**8 else 2 if length <= 2**15 else 4


@dataclass(frozen=True)
class CacheFormat:
    """How the layers of a cache store one sequence.

    keys, values: `Stream`s; a latent cache has the first alone. sinks: first tokens that stay, exact; window: so many of the
    newest are in sight, the next one included, and what is not goes in steps of the keys (None: all stay). share: of the
    tokens, those that have a slot. slot: bytes that a slot and kv head has besides; shared: that a slot of all heads has.
    summaries: for each, slots come in runs of so many, which have an exact vector of a key's size. layer: bytes a layer.
    """

    keys: Stream = Stream()
    values: Stream = Stream()
    sinks: int = 0
    window: int | None = None
    share: float = 1.0
    slot: float = 0
    shared: float = 0
    summaries: tuple[int, ...] = ()
    layer: float = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"the share of the tokens that is kept is above 0 and at most 1; got {self.share}")

    @property
    def bits(self) -> float:
        """Of the widest codes: what attention computes with."""
        return max(self.keys.groups.bits, self.values.groups.bits)

    def slots(self, tokens: int) -> int:
        """Slots of one layer after ``tokens`` tokens."""
        if self.share < 1:
            tokens = min(tokens, max(1, round(self.share * tokens)))
        if self.window is None:
            return tokens
        over = max(tokens - min(self.sinks, tokens) - (self.window - 1), 0)
        return tokens - over // self.keys.step * self.keys.step

    def layer_bytes(self, tokens: int, heads: int, dim: int, value_dim: int | None = None) -> float:
        """Bytes of one layer after ``tokens`` tokens. ``value_dim``: 0 for a latent cache; None: as ``dim``."""
        return self._held(self.slots(tokens), heads, dim, dim if value_dim is None else value_dim)

    def _held(self, slots: int, heads: int, dim: int, value_dim: int) -> float:
        sinks = min(self.sinks, slots)
        size = 2 * heads * (dim + value_dim) * sinks + self.keys.nbytes(slots - sinks, heads, dim)
        size += self.values.nbytes(slots - sinks, heads, value_dim) if value_dim else 0
        size += 2 * heads * dim * sum(slots // run for run in self.summaries)
        return size + (self.slot * heads + self.shared) * slots + self.layer

    def nbytes(self, tokens: int, layers: int, heads: int, dim: int) -> float:
        """Bytes of a cache of equal layers after ``tokens`` tokens."""
        return layers * self.layer_bytes(tokens, heads, dim)

    def most_slots(self, room: float, tokens: int, layers: int, heads: int, dim: int) -> int:
        """The most slots a layer, at most ``tokens``, that all layers have in ``room`` bytes; 0 where one is too many."""
        return bisect_right(range(1, tokens + 1), room, key=lambda slots: layers * self._held(slots, heads, dim, dim))


FULL = CacheFormat()


def grouped_cache(
    bits: float = 2, group_size: int = 32, residual: int = 128, value_bits: float | None = None
) -> CacheFormat:
    """Keys in groups along tokens, ``residual`` of them (or a group) at a time, and values along channels, the newest
    ``residual`` exact (KIVI, arXiv 2402.02750)."""
    keys = Stream(groups(bits, group_size), "tokens", residual or group_size)
    return CacheFormat(keys, Stream(groups(bits if value_bits is None else value_bits, group_size), exact=residual))


def sparse_low_rank_cache(
    bits: float = 2, group_size: int | None = 64, sparsity: float = 0.02, rank: int = 4
) -> CacheFormat:
    """Grouped codes with exact outliers and a low-rank matrix of the error (GEAR, arXiv 2403.05527), as after a prompt.
    ``group_size`` None: one group a channel of keys and a token of values (its KCVT backbone)."""
    keys = Stream(groups(bits, group_size), "tokens", group_size or 1, sparsity=sparsity, rank=rank)
    return CacheFormat(keys, replace(keys, along="channels"))


def window_cache(
    sink: int = 4, window: int = 2048, key_bits: float = 4, value_bits: float = 4, group_size: int = 64
) -> CacheFormat:
    """First tokens and a window of the newest, keys in groups along tokens and values along channels (Λ-KV4)."""
    keys = Stream(groups(key_bits, group_size), "tokens", group_size if key_bits < 16 else 1)
    return CacheFormat(keys, Stream(groups(value_bits, group_size)), sinks=sink, window=window)


def token_cache(bits: float = 4, group_size: int = 64) -> CacheFormat:
    """Every token coded at once, in groups along its channels (transformers' `QuantizedCache`, as after a prompt)."""
    stream = Stream(groups(bits, group_size))
    return CacheFormat(stream, stream)


def block_float_cache(
    key_bits: float | None = 4, block: int = 32, value_bits: float | None = None, layer: float = 0
) -> CacheFormat:
    """Block floating point: ``block`` channels share an exponent of 8 bits. None: as they are."""
    keys, values = (Stream(EXACT if bits is None else Groups(bits, block, 1, 0)) for bits in (key_bits, value_bits))
    return CacheFormat(keys, values, layer=layer)


def evicting_cache(share: float = 0.25, slot: float = 0, layer: float = 0) -> CacheFormat:
    """Exact slots for a ``share`` of the tokens; ``slot`` bytes a slot and head besides (scores), and ``layer`` a layer (how
    many tokens it has seen, where it goes on evicting)."""
    return CacheFormat(share=share, slot=slot, layer=layer)


#: what a what-if may name; the methods of the caches family make theirs by the same functions
CACHES: Mapping[str, Callable[..., CacheFormat]] = {
    "kivi": grouped_cache,
    "gear": sparse_low_rank_cache,
    "lambda-kv4": window_cache,
    "quantized": token_cache,
    "bfp": block_float_cache,
    "snapkv": evicting_cache,
    "streaming-llm": partial(evicting_cache, layer=8),
    "h2o": partial(evicting_cache, slot=4, layer=8),
}


# --- weights ------------------------------------------------------------------------------------------------------------


class WeightFormat(ABC):
    """How a linear layer's weight is stored; ``bits``: of its codes, which decide at what rate it can be multiplied."""

    bits: float

    @abstractmethod
    def nbytes(self, rows: int, columns: int) -> float:
        """Bytes of a weight [rows, columns] (outputs, inputs)."""


def bits_a_weight(held: Callable[[int, int], float], layers: Iterable[Shape]) -> float:
    """Bits a weight of layers of these shapes [rows, columns], of which each takes ``held(rows, columns)`` bytes."""
    layers = list(layers)
    return 8 * sum(held(*shape) for shape in layers) / sum(rows * columns for rows, columns in layers)


@dataclass(frozen=True)
class GroupedWeight(WeightFormat):
    """Codes in groups along the inputs, rows filled up to a multiple of ``fill``; ``column`` and ``layer``: bytes that an
    input and a layer have besides."""

    groups: Groups = EXACT
    fill: int = 1
    column: float = 0
    layer: float = 0

    @property
    def bits(self) -> float:  # type: ignore[override]  # read-only here
        return self.groups.bits

    def nbytes(self, rows: int, columns: int) -> float:
        """Bytes of a weight [rows, columns]."""
        filled = -(-columns // self.fill) * self.fill
        return self.groups.nbytes(rows, filled) + self.column * columns + self.layer


#: 16 bits a weight
EXACT_WEIGHT = GroupedWeight()
#: how n:m sparsity may store the places of what it keeps
PLACES = ("patterns", "indices")


@dataclass(frozen=True)
class Sparsity:
    """``n`` of every ``m`` weights stay. Their places are stored as ``places``: "patterns", a number for the set of them
    (2:4 has six sets: 3 bits for four weights), or "indices", a place for each (2:4: 2 + 2 bits). n = m is dense."""

    n: int = 2
    m: int = 4
    places: str = "patterns"

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m <= 8:
            raise ValueError(f"sparsity must be n:m with 1 <= n <= m <= 8, got {self.n}:{self.m}")
        if self.places not in PLACES:
            raise ValueError(f"places must be one of {', '.join(PLACES)}, got '{self.places}'")

    @property
    def dense(self) -> bool:
        return self.n == self.m

    @property
    def bits(self) -> int:
        """Bits of one stored number."""
        return (math.comb(self.m, self.n) - 1 if self.places == "patterns" else self.m - 1).bit_length()

    @property
    def numbers(self) -> int:
        """Numbers stored for m weights."""
        return 1 if self.places == "patterns" else self.n

    def kept(self, columns: int) -> int:
        """Weights of a row that stay. Raises ValueError when m does not divide ``columns``."""
        if columns % self.m:
            raise ValueError(f"{columns} input features are no multiple of {self.m}, so {self.n}:{self.m} does not fit")
        return columns // self.m * self.n

    def row_bytes(self, columns: int) -> int:
        """Bytes that the places of a row take."""
        return 0 if self.dense else packed_size(columns // self.m * self.numbers, self.bits)


@dataclass(frozen=True)
class SparseWeight(WeightFormat):
    """What n:m sparsity leaves of every row, in ``groups``, and its places."""

    groups: Groups = EXACT
    sparsity: Sparsity = Sparsity()

    @property
    def bits(self) -> float:  # type: ignore[override]  # read-only here
        return self.groups.bits

    def nbytes(self, rows: int, columns: int) -> float:
        return self.groups.nbytes(rows, self.sparsity.kept(columns)) + rows * self.sparsity.row_bytes(columns)


@dataclass(frozen=True)
class AdditiveWeight(WeightFormat):
    """Groups of ``out_group`` x ``in_group`` weights as sums of an entry each of ``books`` codebooks of 2^``entry_bits``
    entries, and a scale a row of groups; codebooks and scales in 16 bits (AQLM, arXiv 2401.06118)."""

    books: int = 1
    entry_bits: int = 8
    in_group: int = 8
    out_group: int = 1
    bits: float = 16  #: entries are added up in 16 bits

    def code_bytes(self, rows: int, columns: int) -> float:
        """Codes, rows filled up to bytes, and scales: without the codebooks, which layers may share."""
        return rows // self.out_group * (packed_size(columns // self.in_group * self.books, self.entry_bits) + 2)

    @property
    def codebook_bytes(self) -> int:
        return 2 * self.books * 2**self.entry_bits * self.in_group * self.out_group

    def nbytes(self, rows: int, columns: int) -> float:
        return self.code_bytes(rows, columns) + self.codebook_bytes


@dataclass(frozen=True)
class SignedFactors(WeightFormat):
    """``blocks`` times a low-rank product in 16 bits and, if ``signed``, a sign a weight (BitStack, arXiv 2410.23918)."""

    rank: int = 16
    blocks: int = 1
    signed: bool = True
    bits: float = 16  #: factors are multiplied out in 16 bits

    def nbytes(self, rows: int, columns: int) -> int:
        signs = packed_size(rows * columns, 1) if self.signed else 0
        return self.blocks * (2 * self.rank * (rows + columns) + signs)


def grouped_weight(bits: float = 4, group_size: int | None = 128) -> GroupedWeight:
    """A 16-bit scale and zero a group: round to nearest, GPTQ, AWQ, HQQ."""
    return GroupedWeight(groups(bits, group_size))


def integer_weight(bits: float = 8, zeros: bool = True, channels: bool = False) -> GroupedWeight:
    """A row's codes with a scale in 32 bits and a zero in 8 (SmoothQuant, OutlierTune). ``channels``: norms keep a float32
    scale a channel for all the layers that they feed. Which those are cannot be told from shapes: half of it is charged to
    every layer, which covers two norms in a block of four layers or more."""
    return GroupedWeight(Groups(bits, None, 4, int(zeros), by_row=True), column=2 * channels)


def pair_weight(bits: float = 4, activations: bool = True, spread: bool = False) -> GroupedWeight:
    """OliVe's outlier-victim pairs: a float32 scale a row, with ``activations`` one for the inputs, and where channels were
    ``spread`` the place of each."""
    return GroupedWeight(Groups(bits, None, 4, 0, by_row=True), fill=2, column=4 * spread, layer=4 * activations)


def sparse_weight(bits: float = 2, group_size: int = 32, n: int = 2, m: int = 4, places: str = "patterns") -> SparseWeight:
    """n:m sparsity; ``group_size`` inputs, kept or not, share a scale and a zero (AccLLM)."""
    kept = replace(groups(bits, group_size // m * n), by_row=True)
    return SparseWeight(kept, Sparsity(n, m, places))


#: what a what-if may name; the methods of the weights family make theirs by the same functions
WEIGHTS: Mapping[str, Callable[..., WeightFormat]] = {
    "rtn": grouped_weight,
    "gptq": grouped_weight,
    "awq": grouped_weight,
    "hqq": grouped_weight,
    "integer": integer_weight,
    "olive": pair_weight,
    "accllm": sparse_weight,
    "aqlm": AdditiveWeight,
    "bitstack": SignedFactors,
}


# --- from text ----------------------------------------------------------------------------------------------------------


def cache_format(text: float | str | CacheFormat) -> CacheFormat:
    """A format from how many bits a number has ("4": codes alone), or from a name of `CACHES` and what its function takes:
    "kivi:bits=2,group_size=32,residual=128". Raises ValueError that says what there is."""
    if isinstance(text, CacheFormat):
        return text
    bits = _bits(text)
    if bits is None:
        return _named("a cache", str(text), CACHES)
    return CacheFormat(Stream(plain(bits)), Stream(plain(bits)))


def weight_format(text: float | str | WeightFormat) -> WeightFormat:
    """As `cache_format`, of `WEIGHTS`: "4", "gptq:bits=3,group_size=64"."""
    if isinstance(text, WeightFormat):
        return text
    bits = _bits(text)
    return _named("weights", str(text), WEIGHTS) if bits is None else GroupedWeight(plain(bits))


def _bits(text: float | str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _named(what: str, text: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    name, _, given = text.partition(":")
    if name not in known:
        raise ValueError(f"no format '{name}' for {what}: give bits from 1 to 32, or one of {', '.join(known)}")
    takes = signature(known[name]).parameters
    options = {}
    for pair in filter(None, given.split(",")):
        key, _, value = (part.strip() for part in pair.partition("="))
        if key not in takes:
            raise ValueError(f"{name} has no '{key}'; it takes {', '.join(takes)}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    try:
        return known[name](**options)
    except TypeError as error:
        raise ValueError(f"'{text}' is no format: {error}") from None
