"""Attention of one query token over packed low-bit keys and values on the CPU, without decompressing them.

Two kernels, with the softmax between them in torch:

- `packed_scores`: q · (zero + scale * code), as (q * scale) · code + q · zero. q * scale is formed once for
  a group of tokens; then every byte is read and unpacked once for all query heads of its KV head.
- `packed_mix`: the sum over tokens of p * (zero + scale * code), as (p * scale) * code + p * zero.

Both are one inner loop, `_accumulate`: eight bytes are widened, each code is cut out by a mask where it
stands (which leaves it times a power of two, taken out at the end, exactly) and multiplied into
accumulators that stay in registers. It is written in LLVM's vector types, since no auto-vectoriser keeps
that many sums in registers; LLVM lowers it to what the machine has. Everything is summed in float32.

Compiled by numba at the first use, for each (bits, query heads together), and cached on disk; this module
is imported only then. `supports` says which layouts are covered: codes that fill bytes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import compiled, split

#: bytes of codes unpacked together, and floats of a vector register (LLVM splits it where they are shorter)
LANES = 8
#: tokens whose weights are prepared together in `packed_mix`
TILE = 128


def supports(bits: int, group_size: int, head_dim: int, kind: str) -> bool:
    """Whether codes of this layout can be read: of ``kind`` "key" (groups of tokens) or "value" (of channels)."""
    if bits not in (1, 2, 4, 8) or head_dim % LANES or not _converts_half():
        return False
    if kind == "key":
        return group_size * bits % 8 == 0
    return head_dim % group_size == 0 and group_size * bits % (8 * LANES) == 0


def packed_scores(
    queries: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    out: torch.Tensor,
) -> None:
    """Writes queries · keys into the first columns of ``out``.

    ``queries`` float32 [kv_heads, query heads of each, head_dim]; ``codes`` uint8 [groups, bytes, channels]:
    byte i of a channel holds the tokens i * 8 / bits and on, lowest bits first; ``scale``, ``zero`` float16
    [groups, channels]; ``out`` float32 [kv_heads, query heads, tokens or more].
    """
    heads, _ = _kernels(bits, _together(bits, queries.shape[1]))
    arrays = [_array(part) for part in (queries, codes, scale, zero)]
    target = out.numpy()
    split(lambda first, last: heads(*arrays, target, first, last), codes.shape[0], 4)


def packed_mix(
    weights: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """weights @ values over the first columns of ``weights``; float32 [kv_heads, query heads, head_dim].

    ``weights`` float32 [kv_heads, query heads, tokens or more]; ``codes`` uint8 [tokens, groups, bytes], groups
    of channels, none over two heads; ``scale``, ``zero`` float16 [tokens, groups].
    """
    kv_heads, query_heads, _ = weights.shape
    together, per = _together(bits, query_heads), 8 // bits
    _, values = _kernels(bits, together)
    arrays = [_array(part) for part in (weights, codes.flatten(1), scale, zero)]
    columns = arrays[1].shape[1] // kv_heads // LANES
    shape = (kv_heads, query_heads // together, columns, together, per, LANES)
    parts: list[np.ndarray] = []

    def piece(first: int, last: int) -> None:
        total = np.zeros(shape, np.float32)
        parts.append(total)
        values(*arrays, total, first, last)

    split(piece, codes.shape[0], TILE)
    mixed = torch.from_numpy(sum(parts[1:], start=parts[0]))
    # [.., columns, heads together, places in a byte, bytes]: channels are columns, bytes, places.
    return mixed.permute(0, 1, 3, 2, 5, 4).reshape(kv_heads, query_heads, -1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A view for numba, which knows no float16: that goes as its bits."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor).numpy()


def _together(bits: int, query_heads: int) -> int:
    """Query heads in one pass over the codes: as many as leave their sums in eight registers."""
    return next(n for n in (4, 2, 1) if query_heads % n == 0 and n * (8 // bits) <= 8)


@cache
def _converts_half() -> bool:
    """Float16 is read by the machine's own instruction; without one, LLVM would call a missing function."""
    return not llvm.get_default_triple().startswith(("x86", "i686")) or llvm.get_host_cpu_features().get("f16c", False)


# --- the kernels ----------------------------------------------------------------------------------------

_intrinsic: Any = intrinsic  # untyped: its first parameter is not the caller's
_FLOAT, _INT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLOATS, _INTS, _BYTES = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _BYTE))
#: sums may be reordered and fused; infinities and NaN keep their meaning
_FAST = {"reassoc", "contract", "nsz"}
_FLAGS = tuple(_FAST)


@_intrinsic
def _half(context: Any, bits: Any) -> Any:
    """The float32 of a float16 given as its bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)

    return types.float32(types.int16), build


@_intrinsic
def _accumulate(
    typing: Any, out: Any, place: Any, codes: Any, start: Any, step: Any, weights: Any, origin: Any, hop: Any,
    stride: Any, count: Any, bits: Any, heads: Any, across: Any,
) -> Any:  # fmt: skip
    """Sums weight * code over ``count`` vectors of eight bytes.

    The i-th are ``codes[start + i * step :][:8]``; the weights of head r stand at ``weights[origin + r * stride
    + i * hop]``. ``bits``, ``heads`` and ``across`` are compile-time constants. ``across`` 1: one weight for a
    vector; the sums [heads, 8 / bits, 8] are added to ``out[place:]``. ``across`` 0: a weight for each lane; each
    vector is summed up and ``out[place:][:8]`` becomes the sums [heads, 8 / bits] (repeated to fill it).
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (bits, heads, across)):
        return None  # numba asks again with the constants
    width, together, spread = bits.literal_value, heads.literal_value, across.literal_value
    size = types.intp
    signature = types.void(out, size, codes, size, size, weights, size, size, size, size, bits, heads, across)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(index: int) -> Any:
            return context.make_array(signature.args[index])(context, builder, args[index]).data

        def vector_at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(base, [offset]), kind.as_pointer())

        def load(base: Any, offset: Any, kind: Any) -> Any:
            return builder.load(vector_at(base, offset, kind), align=1)

        target, source, factors = pointer(0), pointer(2), pointer(5)
        place, start, step, origin, hop, stride, count = (args[i] for i in (1, 3, 4, 6, 7, 8, 9))
        word = start.type
        sums = [(head, part) for head in range(together) for part in range(8 // width)]

        before = builder.block
        loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(word)
        index.add_incoming(ir.Constant(word, 0), before)
        held = {key: builder.phi(_FLOATS) for key in sums}
        wide = builder.zext(load(source, builder.add(start, builder.mul(index, step)), _BYTES), _INTS)
        parts = []
        for part in range(8 // width):
            mask = ((1 << width) - 1) << (width * part)
            parts.append(builder.sitofp(builder.and_(wide, ir.Constant(_INTS, [mask] * LANES)), _FLOATS))
        grown = {}
        for head in range(together):
            offset = builder.add(origin, builder.mul(stride, ir.Constant(word, head)))
            offset = builder.add(offset, builder.mul(index, hop))
            if spread:
                nothing = ir.Constant(_FLOATS, ir.Undefined)
                one = builder.insert_element(nothing, builder.load(builder.gep(factors, [offset])), _INT(0))
                weight = builder.shuffle_vector(one, nothing, ir.Constant(_INTS, [0] * LANES))
            else:
                weight = load(factors, offset, _FLOATS)
            for part, code in enumerate(parts):
                product = builder.fmul(weight, code, flags=_FLAGS)
                grown[head, part] = builder.fadd(held[head, part], product, flags=_FLAGS)
        for key in sums:
            held[key].add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            held[key].add_incoming(grown[key], loop)
        following = builder.add(index, ir.Constant(word, 1))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)

        builder.position_at_end(after)
        totals = []
        for head, part in sums:
            factor = ir.Constant(_FLOATS, [2.0 ** (-width * part)] * LANES)
            totals.append(builder.fmul(grown[head, part], factor))
        if spread:
            for number, total in enumerate(totals):
                offset = builder.add(place, ir.Constant(word, number * LANES))
                total = builder.fadd(load(target, offset, _FLOATS), total)
                builder.store(total, vector_at(target, offset, _FLOATS), align=4)
        else:  # neighbours are added until each of eight vectors is one lane
            totals = [totals[number % len(totals)] for number in range(LANES)]
            even, odd = (ir.Constant(_INTS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
            while len(totals) > 1:
                pairs = zip(totals[::2], totals[1::2])
                totals = [
                    builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs
                ]
            builder.store(totals[0], vector_at(target, place, _FLOATS), align=4)
        return context.get_dummy_value()

    return signature, build


@cache
def _kernels(bits: int, together: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """The kernels of keys and of values for these compile-time constants."""
    per = 8 // bits

    def keys(queries, codes, scale, zero, out, first, last):
        kv_heads, query_heads, dim = queries.shape
        size, channels = codes.shape[1], codes.shape[2]
        flat, scales, zeros = codes.reshape(-1), scale.reshape(-1), zero.reshape(-1)
        step, low = np.empty(dim, np.float32), np.empty(dim, np.float32)
        weights, offset = np.empty(query_heads * dim, np.float32), np.empty(query_heads, np.float32)
        sums = np.empty((size + 1) * 8, np.float32)
        for group in range(first, last):
            for head in range(kv_heads):
                place = group * channels + head * dim
                for channel in range(dim):
                    step[channel] = _half(scales[place + channel])
                    low[channel] = _half(zeros[place + channel])
                for r in range(query_heads):
                    q, total = queries[head, r], np.float32(0)
                    for channel in range(dim):
                        weights[r * dim + channel] = q[channel] * step[channel]
                        total += q[channel] * low[channel]
                    offset[r] = total
                start = group * size * channels + head * dim
                for r in range(0, query_heads, together):
                    for i in range(size):
                        _accumulate(
                            sums, i * 8, flat, start + i * channels, 8, weights, r * dim, 8, dim, dim // 8,
                            bits, together, 0,
                        )  # fmt: skip
                    for k in range(together):
                        row = out[head, r + k, group * size * per : (group + 1) * size * per]
                        for i in range(size):
                            for part in range(per):
                                row[i * per + part] = sums[i * 8 + k * per + part] + offset[r + k]

    def values(weights, codes, scale, zero, out, first, last):
        kv_heads, query_heads, _ = weights.shape
        width, groups = codes.shape[1], scale.shape[1]
        of_head, columns = groups // kv_heads, width // groups // 8
        block = together * per * 8
        flat, total = codes.reshape(-1), out.reshape(-1)
        step, low = np.empty((groups, TILE), np.float32), np.empty((groups, TILE), np.float32)
        scaled = np.empty(query_heads * TILE, np.float32)
        for tile in range(first, last, TILE):
            count = min(TILE, last - tile)
            for token in range(count):
                for group in range(groups):
                    step[group, token] = _half(scale[tile + token, group])
                    low[group, token] = _half(zero[tile + token, group])
            for group in range(groups):
                head, place = group // of_head, group % of_head * columns
                for r in range(query_heads):
                    p, offset = weights[head, r, tile : tile + count], np.float32(0)
                    for token in range(count):
                        scaled[r * TILE + token] = p[token] * step[group, token]
                        offset += p[token] * low[group, token]
                    pass_ = (head * query_heads + r) // together
                    base = (pass_ * of_head * columns + place) * block + r % together * per * 8
                    for column in range(columns):
                        for lane in range(per * 8):
                            total[base + column * block + lane] += offset
                for r in range(0, query_heads, together):
                    pass_ = (head * query_heads + r) // together
                    for column in range(columns):
                        _accumulate(
                            total, (pass_ * of_head * columns + place + column) * block, flat,
                            tile * width + (group * columns + column) * 8, width, scaled, r * TILE, 1, TILE,
                            count, bits, together, 1,
                        )  # fmt: skip

    return compiled(keys, _FAST), compiled(values, _FAST)
