"""GEAR: low-bit codes, exact outliers, a low-rank matrix for the error (Kang et al. 2024, arXiv 2403.05527).

X = D + S + L for the keys and the values of a block of tokens. S keeps the most extreme entries exactly; D is
a backbone quantiser on X with those entries replaced by their vector's mean; L is a rank-r matrix a head that
takes the coherent part of the remaining error. The prompt is one block of rank ``rank_prefill``; later tokens
wait in an exact buffer and are compressed ``buffer`` at a time, as blocks of rank ``rank_decode``. No block
is ever compressed again, and nothing but the buffer stays exact.

Backbones: ``kivi`` (keys per channel in groups of tokens, values per token in groups of channels) and
``kcvt`` (the same with one group: a channel's whole block, all of a token's channels). With ``sparsity=0`` it
is the paper's GEAR-L; with both ranks 0 as well, the bare backbone.

A padded batch: every row is compressed from its own first real token on, so that it gets the codes that it
gets alone (see `blocks`).

Deviations: a prompt that is no multiple of the group leaves its tail in the buffer (``kivi``; the official
code raises); the power iteration runs in float64; outlier counts follow the paper's rule along the axis at
hand (the official code counts key outliers along the other one); a constant group is exact (there: NaN).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from os import PathLike
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.groups import GroupQuantised, quantise_groups
from broadsheet.core.numerics.ledger import nbytes, tensors, tree_map
from broadsheet.core.perf.storage import CacheFormat, outlier_count, place_size, sparse_low_rank_cache

from .attention import Slots
from .base import CacheLayer, CacheMethod, Geometry, Unreachable
from .blocks import (
    GROUP_SIZES,
    QuantisedLayer,
    Rows,
    Size,
    best_within,
    by_head,
    longest,
    mask,
    quantisation_error,
    total,
)

Kind = Literal["key", "value"]


@dataclass
class GearBlock:
    """A block of keys or values, compressed: n tokens, ``heads`` heads, C = heads * head_dim channels.

    ``codes``: D, groups along tokens for keys and along channels for values. ``indices`` (uint8, int16 or
    int32) and ``outliers``: S, places and exact values within every vector: [batch, C, count], places among
    the tokens (keys), or [batch, n, count], places among the channels (values). ``a`` [batch, heads, n, rank]
    and ``b`` [batch, heads, head_dim, rank]: L = a b^T.
    """

    kind: Kind
    heads: int
    codes: GroupQuantised
    indices: torch.Tensor
    outliers: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.a.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes really held."""
        return nbytes(self)

    def backbone(self) -> torch.Tensor:
        """D + S: the dequantised codes, overwritten by the outliers; float32 [batch, heads, n, head_dim]."""
        vectors = _vectors(self.codes.dequantise(), self.kind)
        vectors = vectors.scatter(-1, self.indices.long(), self.outliers.float())
        return by_head(_vectors(vectors, self.kind), self.heads)

    def decompress(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """D + S + L, [batch, heads, n, head_dim]."""
        return (self.backbone() + self.a.float() @ self.b.float().mT).to(dtype)

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """q (D + S)^T + (q b) a^T, never forming L.

        ``queries`` [batch, query heads, m, head_dim]; returns float32 [batch, query heads, m, n].
        """
        q = _grouped(queries.float(), self.heads)
        product = q @ self.backbone().mT + (q @ self.b.float()) @ self.a.float().mT
        return product.reshape(*queries.shape[:3], -1)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """p (D + S) + (p a) b^T, never forming L.

        ``weights`` [batch, query heads, m, n]; returns float32 [batch, query heads, m, head_dim].
        """
        p = _grouped(weights.float(), self.heads)
        product = p @ self.backbone() + (p @ self.a.float()) @ self.b.float().mT
        return product.reshape(*weights.shape[:3], -1)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file; sizes stand in its JSON header."""
        codes = self.codes
        sizes = {
            "kind": self.kind,
            "heads": self.heads,
            "bits": codes.bits,
            "group_size": codes.group_size,
            "width": codes.width,
            "transposed": codes.transposed,
        }
        parts = {name: getattr(self, name).contiguous() for name in ("indices", "outliers", "a", "b")}
        parts |= {name: getattr(codes, name).contiguous() for name in ("codes", "scale", "zero")}
        save_file(parts, path, metadata={"gear_block": json.dumps(sizes)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> GearBlock:
        """Reads what `save` wrote; raises ValueError on any other file."""
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("gear_block")
            if header is None:
                raise ValueError(f"{path} holds no GEAR block; pass a file that GearBlock.save wrote")
            # Copied, so that no part is a view of the file's mapping.
            parts = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
        sizes = json.loads(header)
        kind, heads = sizes.pop("kind"), sizes.pop("heads")
        codes = GroupQuantised(*(parts.pop(name) for name in ("codes", "scale", "zero")), **sizes)
        return cls(kind, heads, codes, **parts)

    @staticmethod
    def stack(rows: list[GearBlock | None]) -> GearBlock:
        """Single rows' blocks as one batch; shorter ones, and None (an empty row), are padded: mask that."""
        longest = max((row for row in rows if row is not None), key=lambda row: row.tokens)
        # An unused place for a key outlier must hit padding: a row with fewer outliers has fewer tokens.
        spare = longest.tokens - 1 if longest.kind == "key" else 0
        columns = []
        for which, like in enumerate(tensors(longest)):
            parts = {place: list(tensors(row))[which][0] for place, row in enumerate(rows) if row is not None}
            shape = [max(sizes) for sizes in zip(*(part.shape for part in parts.values()))]
            column = like.new_full((len(rows), *shape), spare if like is longest.indices else 0)
            for place, part in parts.items():
                column[place][tuple(slice(size) for size in part.shape)] = part
            columns.append(column)
        stacked = iter(columns)
        return tree_map(lambda _: next(stacked), longest)


def compress_block(
    states: torch.Tensor | np.ndarray,
    kind: Kind,
    bits: int = 2,
    group_size: int | None = 64,
    sparsity: float = 0.02,
    rank: int = 4,
    loops: int = 3,
    seed: int | Sequence[int] = 0,
    start: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> GearBlock:
    """Compresses a block of ``states`` [batch, heads, tokens, head_dim] (paper, section 3).

    ``group_size`` None makes one group of a whole vector (KCVT). ``sparsity`` s: the floor(s/2 * length)
    largest and as many smallest entries of every vector stay exact; 1 keeps all. ``start`` [.., heads,
    head_dim, rank] replaces the random start drawn by ``seed``. ``dtype``: how scales, outliers and factors
    are stored; float32 is for comparisons.

    Raises ValueError for a kind, bits, sparsity or rank out of range.
    """
    states = torch.as_tensor(states).float()
    if states.ndim != 4 or not states.numel():
        shape = list(states.shape)
        raise ValueError(f"states must be [batch, heads, tokens, head_dim] and not empty, got {shape}")
    if kind not in ("key", "value"):
        raise ValueError(f"kind must be 'key' or 'value', got {kind!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be 0 to 1, got {sparsity}")
    batch, heads, tokens, head_dim = states.shape
    if not 0 <= rank <= min(tokens, head_dim):
        raise ValueError(f"rank must be 0 to min(tokens, head_dim) = {min(tokens, head_dim)}, got {rank}")

    # 1. Outliers: along each channel for keys, along each token's channels, over all heads, for values.
    vectors = _vectors(states.transpose(1, 2).flatten(2), kind)
    length = vectors.shape[-1]
    count = outlier_count(sparsity, length) // 2
    largest = vectors.topk(count, -1).indices
    smallest = vectors.scatter(-1, largest, math.inf).topk(count, -1, largest=False).indices
    places = torch.cat([smallest, largest], -1)
    outliers = vectors.gather(-1, places)
    # 2. Their vector's mean instead, so that they do not stretch the range.
    filled = vectors.scatter(-1, places, vectors.mean(-1, keepdim=True).expand_as(outliers).contiguous())
    # 3. The backbone.
    codes = quantise_groups(_vectors(filled, kind), bits, group_size or length, kind == "key", dtype)
    nothing = states.new_empty(batch, heads, tokens, 0), states.new_empty(batch, heads, head_dim, 0)
    block = GearBlock(kind, heads, codes, places.to(_index_dtype(length)), outliers.to(dtype), *nothing)
    # 4. A low-rank matrix for each head's error.
    if rank:
        if start is None:
            draw = np.random.default_rng(seed).random((heads, head_dim, rank))
            start = torch.from_numpy(draw).to(states.device)
        a, b = power_iteration(states - block.backbone(), start, loops)
        block.a, block.b = a.to(dtype), b.to(dtype)
    return block


def power_iteration(residual: torch.Tensor, start: torch.Tensor, loops: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """a [.., n, r], orthonormal, and b [.., d, r]: a b^T is close to the best rank-r matrix for the residual.

    ``residual`` [.., n, d], ``start`` [.., d, r]. In float64: b is not normalised before the last loop and
    turns towards the top direction, which costs float32 about three digits.
    """
    residual = residual.double()
    b = start.double().expand(*residual.shape[:-2], -1, -1)
    for loop in range(loops):
        last = loop == loops - 1
        b = torch.linalg.qr(b).Q if last else b
        a = residual @ b
        a = torch.linalg.qr(a).Q if last else a
        b = residual.mT @ a
    return a, b


def _index_dtype(length: int) -> torch.dtype:
    """The smallest type for places in a vector."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[place_size(length)]


def _vectors(flat: torch.Tensor, kind: Kind) -> torch.Tensor:
    """[batch, tokens, channels], with the axis of outliers and groups last; its own inverse."""
    return flat.transpose(1, 2) if kind == "key" else flat


def _grouped(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, query heads, m, x] as [batch, heads, query heads / heads * m, x]."""
    return states.unflatten(1, (heads, -1)).flatten(2, 3)


@dataclass
class Pair:
    """A block's keys and values. ``lengths``: tokens by row, int64 [batch]; None while all rows fill it."""

    keys: GearBlock
    values: GearBlock
    lengths: torch.Tensor | None = None

    @property
    def size(self) -> Size:
        return self.keys.tokens if self.lengths is None else self.lengths

    def row(self, place: int) -> Pair | None:
        """One row alone; None when it is empty."""
        if self.lengths is not None and not self.lengths[place]:
            return None
        keys, values = tree_map(lambda tensor: tensor[place : place + 1], [self.keys, self.values])
        return Pair(keys, values)

    @staticmethod
    def stack(rows: list[Pair | None]) -> Pair:
        """Single rows as one batch; None is an empty row."""
        keys = GearBlock.stack([None if row is None else row.keys for row in rows])
        values = GearBlock.stack([None if row is None else row.values for row in rows])
        lengths = [0 if row is None else row.keys.tokens for row in rows]
        even = min(lengths) == max(lengths)
        return Pair(keys, values, None if even else torch.tensor(lengths, device=keys.a.device))


class GEARLayer(QuantisedLayer):
    """``prompt_block``, then ``blocks`` in order, then the exact ``buffer``, keys and values side by side.

    Rows of unequal length (a padded batch) are compressed one by one, each when its own buffer is full.
    """

    method: GEAR
    prompt_block: Pair | None = None
    blocks: tuple[Pair, ...] = ()
    buffer: Rows | None = None

    def prefill(self, prompt: Tokens) -> None:
        method = self.method
        self.kv_heads = prompt.keys.shape[1]
        rows = _side_by_side(prompt)
        group = method.group_size if method.backend == "kivi" else 1
        whole, self.buffer = rows.split(rows.size // group * group)
        rank = method.rank_prefill
        if whole.lengths is not None:
            states = zip(whole.states.split(1), whole.lengths.tolist())
            rows_alone = [self.compress(row[:, :count], rank, 0) if count else None for row, count in states]
            self.prompt_block = Pair.stack(rows_alone)
        elif whole.states.shape[1]:
            self.prompt_block = self.compress(whole.states, rank, 0)

    def append(self, new: Tokens) -> None:
        buffer = _side_by_side(new) if self.buffer is None else self.buffer.append(_side_by_side(new))
        step = self.method.buffer
        while True:
            full = (buffer.size >= step) * step  # one number, or one for each row
            if not (full if isinstance(full, int) else bool(full.any())):
                break
            block, buffer = buffer.split(full)
            self.add(block)
        self.buffer = buffer

    def add(self, block: Rows) -> None:
        """Stores a full block; of every row, or (``block.lengths``) of those whose buffer was full."""
        rank = self.method.rank_decode
        uneven = [pair.lengths for pair in self.blocks if pair.lengths is not None]
        if block.lengths is None and not uneven:
            self.blocks = (*self.blocks, self.compress(block.states, rank, len(self.blocks) + 1))
            return
        # Rows at different points: each row's block goes to that row's next free place.
        batch = block.states.shape[0]
        taken = [len(self.blocks) - sum(not lengths[row] for lengths in uneven) for row in range(batch)]
        ready = [row for row in range(batch) if block.lengths is None or block.lengths[row]]
        blocks = list(self.blocks)
        for place in sorted({taken[row] for row in ready}):
            there = blocks[place] if place < len(blocks) else None
            rows = [None if there is None else there.row(row) for row in range(batch)]
            for row in ready:
                if taken[row] == place:
                    rows[row] = self.compress(block.states[row : row + 1], rank, place + 1)
            blocks[place : place + 1] = [Pair.stack(rows)]
        self.blocks = tuple(blocks)

    def compress(self, states: torch.Tensor, rank: int, number: int) -> Pair:
        """``states`` [batch, tokens, 2 * channels] as block ``number`` (0: the prompt)."""
        method = self.method
        group = method.group_size if method.backend == "kivi" else None
        rank = min(rank, states.shape[1])

        def block(half: torch.Tensor, kind: Kind) -> GearBlock:
            seed = (method.seed, self.index, number, 0 if kind == "key" else 1)
            half = by_head(half, self.kv_heads)
            return compress_block(half, kind, method.bits, group, method.sparsity, rank, method.loops, seed)

        keys, values = states.chunk(2, -1)
        return Pair(block(keys, "key"), block(values, "value"))

    @property
    def pairs(self) -> list[Pair]:
        """The blocks in order."""
        return [*([self.prompt_block] if self.prompt_block else []), *self.blocks]

    def slots(self) -> Slots | None:
        if self.buffer is None or self.dtype is None:
            return None
        keys, values = self.exact(self.buffer)
        keys = torch.cat([*(pair.keys.decompress(self.dtype) for pair in self.pairs), keys], 2)
        values = torch.cat([*(pair.values.decompress(self.dtype) for pair in self.pairs), values], 2)
        return Slots(keys, values, self.valid(self.buffer))

    def exact(self, buffer: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the buffer, [batch, kv_heads, tokens, head_dim]."""
        keys, values = buffer.states.to(self.dtype).chunk(2, -1)
        return by_head(keys, self.kv_heads), by_head(values, self.kv_heads)

    def valid(self, buffer: Rows) -> torch.Tensor | None:
        """Which slots hold a token, bool [batch, 1, slots]; None when all do."""
        parts = [(pair.size, pair.keys.tokens) for pair in self.pairs]
        parts.append((buffer.size, buffer.states.shape[1]))
        masks = [mask(size, width) for size, width in parts]
        if all(part is None for part in masks):
            return None
        ones = buffer.states.new_ones(len(buffer.states), 1, dtype=torch.bool)
        full = [ones.expand(-1, width) if m is None else m for m, (_, width) in zip(masks, parts)]
        return torch.cat(full, -1).unsqueeze(1)

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        if not self.method.factored or self.buffer is None:
            return super().attend(new, mask, scaling)
        pairs, q, count = self.pairs, new.queries.float(), new.count
        keys, values = self.exact(self.buffer)
        keys, values = torch.cat([keys, new.keys], 2).float(), torch.cat([values, new.values], 2).float()
        near = (_grouped(q, self.kv_heads) @ keys.mT).reshape(*q.shape[:3], -1)
        logits = torch.cat([*(pair.keys.scores(q) for pair in pairs), near], -1)
        logits = logits * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        stored, valid = logits.shape[-1] - count, self.valid(self.buffer)
        allowed = logits.new_ones(q.shape[0], 1, count, stored + count, dtype=torch.bool).tril(stored)
        allowed[..., stored:] &= new.valid[:, None, None, :]
        if valid is not None:
            allowed[..., :stored] &= valid.unsqueeze(2)
        weights = logits.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(-1)
        *far, near = weights.split([*(pair.keys.tokens for pair in pairs), keys.shape[2]], -1)
        output = (_grouped(near, self.kv_heads) @ values).reshape(q.shape)
        for pair, part in zip(pairs, far):
            output = output + pair.values.mix(part)
        return output.transpose(1, 2).to(new.queries.dtype)

    @property
    def size(self) -> Size:
        """Tokens stored, of all rows or by row."""
        size: Size = 0 if self.buffer is None else self.buffer.size
        for pair in self.pairs:
            size = size + pair.size
        return size

    @property
    def stored(self) -> int:
        return longest(self.size)

    @property
    def elements(self) -> int:
        if self.buffer is None:
            return 0
        batch, _, channels = self.buffer.states.shape  # of keys and values together
        return channels * total(self.size, batch)

    def roles(self) -> dict[str, Any]:
        blocks = [block for pair in self.pairs for block in (pair.keys, pair.values)]
        buffer = [] if self.buffer is None else [self.buffer]
        return {
            "codes": [block.codes.codes for block in blocks],
            "scales": [(block.codes.scale, block.codes.zero) for block in blocks],
            "sparse": [(block.indices, block.outliers) for block in blocks],
            "low_rank": [(block.a, block.b) for block in blocks],
            "buffer": [rows.states for rows in buffer],
            "lengths": [*(pair.lengths for pair in self.pairs), *(rows.lengths for rows in buffer)],
        }


def _side_by_side(new: Tokens) -> Rows:
    return Rows.of(torch.cat([new.keys, new.values], 1), new.valid)


@dataclass(frozen=True)
class GEAR(CacheMethod):
    """Codes of a backbone quantiser, exact outliers and a low-rank matrix for the error.

    Parameters: ``backend`` "kivi" or "kcvt"; ``bits`` 2, 3, 4 or 8; ``group_size`` (64; "kivi" alone);
    ``sparsity`` s in [0, 0.5): share of entries kept exactly (2 %), half of them the largest;
    ``rank_prefill`` and ``rank_decode`` of L in the prompt's block and in later ones (4, 2); ``buffer``:
    tokens that wait exact (64), a multiple of ``group_size``; ``loops`` of the power iteration (3); ``seed``
    of its starts. ``factored``: attention from the parts, never forming L.
    """

    backend: Literal["kivi", "kcvt"] = "kivi"
    bits: int = 2
    group_size: int = 64
    sparsity: float = 0.02
    rank_prefill: int = 4
    rank_decode: int = 2
    buffer: int = 64
    loops: int = 3
    seed: int = 0
    factored: bool = False

    Layer: ClassVar[type[CacheLayer]] = GEARLayer

    def __post_init__(self) -> None:
        if self.backend not in ("kivi", "kcvt"):
            raise ValueError(f"backend must be 'kivi' or 'kcvt', got {self.backend!r}")
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits}")
        if not 0 <= self.sparsity < 0.5:
            raise ValueError(f"sparsity must be at least 0 and below 0.5, got {self.sparsity}")
        least = {"group_size": 1, "rank_prefill": 0, "rank_decode": 0, "buffer": 1, "loops": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.backend == "kivi" and self.buffer % self.group_size:
            raise ValueError(f"buffer must be a multiple of group_size {self.group_size}, got {self.buffer}")
        if self.rank_decode > self.buffer:
            raise ValueError(f"rank_decode {self.rank_decode} exceeds a block's {self.buffer} tokens; lower it")

    def check(self, geometry: Geometry) -> None:
        channels = geometry.kv_heads * geometry.head_dim
        if self.backend == "kivi" and channels % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide the {channels} channels of a token's values; choose a divisor"
            )
        if max(self.rank_prefill, self.rank_decode) > geometry.head_dim:
            raise ValueError(f"rank_prefill and rank_decode must be at most head_dim, {geometry.head_dim} here")

    def format(self, geometry: Geometry) -> CacheFormat:
        group = self.group_size if self.backend == "kivi" else None
        return sparse_low_rank_cache(self.bits, group, self.sparsity, self.rank_prefill)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """Bits, group size and rank with the least expected error within the budget.

        Expected squared error of normal data, where the best rank-r matrix takes about r (sqrt n + sqrt d)^2
        / (n d) of a white residual. Normal data lacks what ``sparsity`` is good for, so that stays; it is
        halved (at most twice) only where nothing would fit, and grows (up to 4 times) with what is left. A
        part that is off stays off.
        """
        least = 1.0
        for sparsity in (self.sparsity, self.sparsity / 2, self.sparsity / 4):
            try:
                best = best_within(self._choices(sparsity, tokens, geometry), fraction, tokens, geometry)
                break
            except Unreachable as unreachable:
                least = min(least, unreachable.least)
        else:
            raise Unreachable(least)
        more = [replace(best, sparsity=min(times * best.sparsity, 0.499)) for times in (4, 3, 2, 1.5)]
        room = fraction * geometry.full_bytes(tokens)
        return next((one for one in more if one.expected_bytes(tokens, geometry) <= room), best)

    def _choices(self, sparsity: float, tokens: int, geometry: Geometry) -> Iterator[tuple[Self, int, float]]:
        """Settings of one ``sparsity``, with their bytes and expected errors."""
        channels, dim = geometry.kv_heads * geometry.head_dim, geometry.head_dim
        kivi = self.backend == "kivi"
        groups = [size for size in GROUP_SIZES if channels % size == 0] if kivi else [self.group_size]
        ranks = range(1, dim // 2 + 1) if self.rank_prefill else range(1)
        for group, bits, rank in product(groups, (8, 4, 3, 2), ranks):
            one = replace(
                self,
                bits=bits,
                group_size=group,
                sparsity=sparsity,
                buffer=-(-self.buffer // group) * group if kivi else self.buffer,
                rank_prefill=rank,
                rank_decode=min(rank, self.rank_decode),
            )
            n = tokens // group * group if kivi else tokens
            along = (group, group) if kivi else (tokens, channels)
            error = n * sum(quantisation_error(bits, size) for size in along)
            if n:
                error *= 1 - min(1, rank * (n**0.5 + dim**0.5) ** 2 / (n * dim))
            yield one, one.expected_bytes(tokens, geometry), error
