"""Matrix products straight from the codes of outlier-victim pairs, on the CPU.

A code stands for an integer i << e. `integer_matmul` multiplies packed codes with packed codes: values are decoded into
16-bit integers, a few rows of a thousand at a time, which never leave the processor's first cache, multiplied, and summed in
int32; sums of so many columns that int32 could overflow are continued in int64. `float_matmul` does the same for inputs
that are no codes, in float32. Weights are never held as anything but codes.

Four-bit codes are decoded by table lookups of sixteen entries, which are byte shuffles: every code of a vector is looked up
as a normal and as an outlier, and its neighbour decides which it is. Of 8-bit codes only vectors with an identifier in them
are treated as more than integers. Decoded values stand in the order that costs least (`_order`); inputs are brought into
the same. It is written in LLVM's vector types, with the shuffle instruction of x86 or ARM, and selects elsewhere.

Compiled by numba at the first use, for each type, and cached on disk; this module is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core import config as _config
from numba.extending import intrinsic

from broadsheet.core.numerics.jit import compiled, split

from .grids import EXPONENT_BITS, NAMES, PairType, tables

#: bytes decoded together, and the values that rows are padded to a multiple of
WIDTH, BLOCK = 32, 64
#: columns of a decoded tile; its rows; inputs that are multiplied with it before the next one
TILE, ROWS, BATCH = 2048, 4, 32
#: numbers of a vector that sums are kept in
LANES = 8
#: bytes of codes that are asked for before they are needed: reading is uneven, and the processor does not guess it
AHEAD = 2048
KINDS = tuple(PairType(name, signed) for name in NAMES for signed in (True, False))


def integer_matmul(a: torch.Tensor, a_kind: PairType, w: torch.Tensor, w_kind: PairType) -> torch.Tensor:
    """Products of values, int64 [n, m], of codes ``a`` uint8 [n, bytes] and ``w`` uint8 [m, bytes] of equal padded width."""
    values = _decoded(a, a_kind)
    if a_kind.bits != w_kind.bits:
        values = _reorder(values, _order(a_kind).argsort()[_order(w_kind)])
    # at most one large value a pair: two normals are less than one outlier
    most = (2**31 - 1) // (a_kind.reach * w_kind.reach) * 2
    return _products(values, w, w_kind, min(TILE, most // BLOCK * BLOCK))


def float_matmul(x: torch.Tensor, w: torch.Tensor, w_kind: PairType) -> torch.Tensor:
    """x valuesᵀ, float32 [n, m], of ``x`` float32 [n, padded width] and codes ``w`` uint8 [m, bytes]."""
    return _products(_reorder(torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)), _order(w_kind)), w, w_kind, TILE)


def encode(x: torch.Tensor, scale: torch.Tensor, kind: PairType, larger: bool) -> tuple[torch.Tensor, int, int]:
    """As `pairs.encode` says, for rows of even length."""
    _, _, nearest, codes = tables(kind)
    out = torch.empty(x.shape[0], x.shape[1] * kind.bits // 8, dtype=torch.uint8)
    counts: list[tuple[int, int]] = []
    arrays = (x.contiguous().numpy(), scale.contiguous().numpy(), nearest.numpy(), codes.numpy(), out.numpy())

    def piece(first: int, last: int) -> None:
        fixed = (kind.top, kind.reach, kind.signed, kind.identifier, kind.bits)
        counts.append(_encoder()(*arrays, *fixed, larger, first, last))

    split(piece, x.shape[0], 1)
    return out, sum(lost for lost, _ in counts), sum(beyond for _, beyond in counts)


def _number(kind: PairType) -> int:
    """Its place in `KINDS`; codes are the same with outliers and without."""
    return KINDS.index(replace(kind, outliers=True))


def victims(pairs: torch.Tensor, scales: torch.Tensor, kind: PairType, larger: bool) -> torch.Tensor:
    """As `pairs.victims` says, for ``pairs`` [rows, 2 * pairs]."""
    out = torch.zeros(scales.shape, dtype=torch.float64)
    arrays = [tensor.contiguous().numpy() for tensor in (pairs, scales, tables(kind)[2], out)]
    split(lambda first, last: _victims()(*arrays, kind.top, kind.reach, larger, first, last), len(pairs), 1)
    return out


def _products(a: torch.Tensor, w: torch.Tensor, kind: PairType, tile: int) -> torch.Tensor:
    whole = a.dtype == torch.int16
    out = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int64 if whole else torch.float32)
    kernel, arrays = _multiplier(_number(kind)), (a.contiguous().numpy(), w.contiguous().numpy(), out.numpy())
    sums = np.int32 if whole else np.float32

    def piece(first: int, last: int) -> None:
        kernel(*arrays, np.empty(ROWS * tile, np.int16), np.empty(LANES, sums), tile, first, last)

    split(piece, w.shape[0], ROWS)
    return out


@cache
def _order(kind: PairType) -> torch.Tensor:
    """Which value of a block stands at each place once decoded."""
    if kind.bits == 4:
        return torch.tensor([2 * byte + odd for odd in (0, 1) for part in (0, 1) for byte in _quarters(part)])
    return torch.arange(BLOCK).reshape(2, WIDTH // 2, 2).transpose(1, 2).flatten()


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.unflatten(1, (-1, BLOCK))[..., order].flatten(1)


def _decoded(codes: torch.Tensor, kind: PairType) -> torch.Tensor:
    """Values int16 [n, width], padded with zeros to whole blocks, in the blocks in the order of `_order`."""
    width = codes.shape[1] * 8 // kind.bits
    out = torch.empty(codes.shape[0], width + -width % BLOCK, dtype=torch.int16)
    _decoder(_number(kind))(codes.contiguous().numpy(), out.numpy())
    return out


# --- vector code ------------------------------------------------------------------------------------------------------

_intrinsic: Any = intrinsic  # untyped: its first parameter is not the caller's
config: Any = _config  # untyped: its names are made when it is imported
_BYTE, _SHORT, _INT, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
#: sums may be reordered and fused; infinities and NaN keep their meaning
_FLAGS = ("reassoc", "contract", "nsz")


def _constant(kind: Any, values: Sequence[int]) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), list(values))


def _splat(kind: Any, value: int, count: int = WIDTH) -> Any:
    return _constant(kind, [value] * count)


def _has(feature: str) -> bool:
    """Whether the code that numba makes may use this extension of the processor."""
    if config.CPU_NAME or config.CPU_FEATURES is not None:
        return f"+{feature}" in (config.CPU_FEATURES or "").split(",")
    return bool(llvm.get_host_cpu_features().get(feature, False))


def _shuffle_instruction() -> tuple[str, int]:
    """LLVM's name of the instruction that looks bytes up in a table of sixteen, and how many at once; ("", 0): none."""
    if llvm.get_default_triple().startswith(("x86", "i686")):
        if _has("avx2"):
            return "llvm.x86.avx2.pshuf.b", 32
        return ("llvm.x86.ssse3.pshuf.b.128", 16) if _has("ssse3") else ("", 0)
    return ("llvm.aarch64.neon.tbl1.v16i8", 16) if llvm.get_default_triple().startswith(("aarch64", "arm64")) else ("", 0)


def _look_up(builder: Any, table: Sequence[int], index: Any) -> Any:
    """The bytes ``table[index]`` for a vector of indices below sixteen."""
    name, width = _shuffle_instruction()
    if not name:
        found = [_splat(_BYTE, entry) for entry in table]
        for bit in range(4):
            on = builder.icmp_unsigned("!=", builder.and_(index, _splat(_BYTE, 1 << bit)), _splat(_BYTE, 0))
            found = [builder.select(on, high, low) for low, high in zip(found[::2], found[1::2])]
        return found[0]
    vector = ir.VectorType(_BYTE, width)
    shuffle = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector, vector]), name)
    entries = _constant(_BYTE, list(table) * (width // 16))
    parts = []
    for first in range(0, WIDTH, width):
        part = builder.shuffle_vector(index, index, _constant(_INT, range(first, first + width)))
        parts.append(builder.call(shuffle, [entries, part]))
    return parts[0] if len(parts) == 1 else builder.shuffle_vector(*parts, _constant(_INT, range(WIDTH)))


def _prefetch(builder: Any, pointer: Any) -> Any:
    signature = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
    return cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")


def _quarters(part: int) -> list[int]:
    """Bytes of a vector that one instruction can mix with those of another, where registers have lanes of sixteen."""
    return [lane + 8 * part + i for lane in range(0, WIDTH, 16) for i in range(8)]


def _four_bits(builder: Any, packed: Any, kind: PairType) -> list[Any]:
    """The 64 values of a vector of bytes: four vectors of int16."""
    even, odd = builder.and_(packed, _splat(_BYTE, 15)), builder.lshr(packed, _splat(_BYTE, 4))
    found = []
    for codes, beside in ((even, odd), (odd, even)):
        outlier = builder.icmp_unsigned("==", beside, _splat(_BYTE, kind.identifier))
        low, high = (
            builder.select(
                outlier,
                _look_up(builder, [value >> shift & 255 for value in kind.outlier_values], codes),
                _look_up(builder, [value >> shift & 255 for value in kind.normal_values], codes),
            )
            for shift in (0, 8)
        )
        for part in (0, 1):
            places = [place for byte in _quarters(part) for place in (byte, byte + WIDTH)]
            mixed = builder.shuffle_vector(low, high, _constant(_INT, places))
            found.append(builder.bitcast(mixed, ir.VectorType(_SHORT, WIDTH // 2)))
    return found


def _eight_bits(builder: Any, packed: Any, kind: PairType) -> list[Any]:
    """The 32 values of a vector of bytes: two vectors of int16. Vectors without an outlier, nearly all, cost little."""
    half = WIDTH // 2
    shorts = ir.VectorType(_SHORT, half)

    def all_of(value: int) -> Any:
        return _splat(_SHORT, value, half)

    words, eight = builder.bitcast(packed, shorts), all_of(8)
    shift = builder.ashr if kind.signed else builder.lshr
    even, odd = shift(builder.shl(words, eight), eight), shift(words, eight)
    identifier = all_of(kind.identifier - 256 * kind.signed)
    marked = builder.icmp_unsigned("==", packed, _splat(_BYTE, kind.identifier))
    some = builder.icmp_unsigned("!=", builder.bitcast(marked, ir.IntType(WIDTH)), ir.Constant(ir.IntType(WIDTH), 0))
    plain = builder.block
    with builder.if_then(some, likely=False):
        mixed = []
        for codes, beside in ((even, odd), (odd, even)):
            magnitude_bits = 8 - kind.signed
            one = 1 << magnitude_bits - EXPONENT_BITS  # of the mantissa
            flipped = codes if kind.signed else builder.xor(codes, identifier)
            magnitude = builder.and_(flipped, all_of(2**magnitude_bits - 1))
            large = builder.or_(builder.and_(magnitude, all_of(one - 1)), all_of(one))
            large = builder.shl(large, all_of(kind.bias))
            for bit in range(EXPONENT_BITS):
                on = builder.icmp_unsigned("!=", builder.and_(magnitude, all_of(one << bit)), all_of(0))
                large = builder.select(on, builder.shl(large, all_of(1 << bit)), large)
            large = builder.select(builder.icmp_signed("<", codes, all_of(0)), builder.neg(large), large)
            large = builder.select(builder.icmp_signed("==", magnitude, all_of(0)), all_of(0), large)
            normal = builder.select(builder.icmp_signed("==", codes, identifier), all_of(0), codes)
            mixed.append(builder.select(builder.icmp_signed("==", beside, identifier), large, normal))
        outlying = builder.block
    found = []
    for codes, other in zip((even, odd), mixed):
        value = builder.phi(shorts)
        value.add_incoming(codes, plain)
        value.add_incoming(other, outlying)
        found.append(value)
    return found


@_intrinsic
def _decode(typing: Any, out: Any, place: Any, codes: Any, start: Any, count: Any, kind: Any) -> Any:
    """Writes the values of ``count`` vectors of codes from ``codes[start:]`` to ``out[place:]``; ``kind`` is a constant."""
    if not isinstance(kind, types.IntegerLiteral):
        return None  # numba asks again with the constant
    number = KINDS[kind.literal_value]
    size = types.intp
    signature = types.void(out, size, codes, size, size, kind)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source = (context.make_array(signature.args[index])(context, builder, args[index]).data for index in (0, 2))
        word = args[1].type
        with cgutils.for_range(builder, args[4], intp=word) as loop:
            first = builder.add(args[3], builder.mul(loop.index, ir.Constant(word, WIDTH)))
            packed = ir.VectorType(_BYTE, WIDTH)
            packed = builder.load(builder.bitcast(builder.gep(source, [first]), packed.as_pointer()), align=1)
            ahead = builder.gep(source, [builder.add(first, ir.Constant(word, AHEAD))])
            builder.call(_prefetch(builder, ahead.type), [ahead, _INT(0), _INT(3), _INT(1)])  # to read, to keep, data
            here = builder.add(args[1], builder.mul(loop.index, ir.Constant(word, WIDTH * 8 // number.bits)))
            for values in (_four_bits if number.bits == 4 else _eight_bits)(builder, packed, number):
                builder.store(values, builder.bitcast(builder.gep(target, [here]), values.type.as_pointer()), align=2)
                here = builder.add(here, ir.Constant(word, values.type.count))
        return context.get_dummy_value()

    return signature, build


@_intrinsic
def _dots(
    typing: Any, out: Any, w: Any, w_step: Any, a: Any, start: Any, a_step: Any, count: Any, rows: Any, inputs: Any
) -> Any:
    """Products of ``rows`` rows of ``w``, ``w_step`` apart, and ``inputs`` of ``a`` from ``start`` on, ``a_step`` apart.

    ``out[:LANES]`` becomes the sums over ``count`` columns, [inputs, rows], repeated to fill it. ``rows`` and ``inputs`` are
    constants. ``w`` holds int16; ``a`` int16, summed in int32, or float32.
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (rows, inputs)):
        return None
    size = types.intp
    signature = types.void(out, w, size, a, size, size, size, rows, inputs)
    whole = a.dtype == types.int16
    step = 2 * LANES if whole else LANES
    sum_type = ir.VectorType(_INT if whole else _FLOAT, LANES)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, left, right = (
            context.make_array(signature.args[index])(context, builder, args[index]).data for index in (0, 1, 3)
        )
        word = args[2].type
        keys = [(x, row) for x in range(inputs.literal_value) for row in range(rows.literal_value)]

        def load(base: Any, first: Any, stride: Any, number: int, index: Any, kind: Any) -> Any:
            offset = builder.add(first, builder.mul(stride, ir.Constant(word, number)))
            place = builder.gep(base, [builder.add(offset, index)])
            vector = ir.VectorType(kind, step)
            return builder.load(builder.bitcast(place, vector.as_pointer()), align=kind.width // 8 if whole else 2)

        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(word)
        index.add_incoming(ir.Constant(word, 0), before)
        held = {key: builder.phi(sum_type) for key in keys}
        zero = ir.Constant(word, 0)
        weights = [load(left, zero, args[2], row, index, _SHORT) for row in range(rows.literal_value)]
        xs = [load(right, args[4], args[5], x, index, _SHORT if whole else _FLOAT) for x in range(inputs.literal_value)]
        even, odd = (_constant(_INT, range(first, step, 2)) for first in (0, 1))
        grown = {}
        if whole:
            wide = ir.VectorType(_INT, step)
            nothing = ir.Constant(wide, ir.Undefined)
            for x, row in keys:  # in this shape LLVM knows the instruction that multiplies and adds neighbours
                product = builder.mul(builder.sext(xs[x], wide), builder.sext(weights[row], wide))
                pair = builder.add(*(builder.shuffle_vector(product, nothing, part) for part in (even, odd)))
                grown[x, row] = builder.add(held[x, row], pair)
        else:
            floats = [builder.sitofp(weight, sum_type) for weight in weights]
            for x, row in keys:
                product = builder.fmul(xs[x], floats[row], flags=_FLAGS)
                grown[x, row] = builder.fadd(held[x, row], product, flags=_FLAGS)
        for key in keys:
            held[key].add_incoming(ir.Constant(sum_type, None), before)
            held[key].add_incoming(grown[key], loop)
        following = builder.add(index, ir.Constant(word, step))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[6]), loop, after)

        builder.position_at_end(after)
        totals = [grown[keys[number % len(keys)]] for number in range(LANES)]
        even, odd = (_constant(_INT, range(first, 2 * LANES, 2)) for first in (0, 1))
        add = builder.add if whole else builder.fadd
        while len(totals) > 1:  # neighbours are added until each of eight vectors is one lane
            pairs = zip(totals[::2], totals[1::2])
            totals = [add(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)) for a, b in pairs]
        builder.store(totals[0], builder.bitcast(target, sum_type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


# --- the kernels ------------------------------------------------------------------------------------------------------


@cache
def _decoder(kind: int) -> Callable[..., None]:
    bytes_, vectors = BLOCK * KINDS[kind].bits // 8, BLOCK * KINDS[kind].bits // 8 // WIDTH  # of a block

    def decode(codes, out):
        size, padded = codes.shape[1], out.shape[1]
        flat, target, end = codes.reshape(-1), out.reshape(-1), np.zeros(bytes_, np.uint8)
        blocks = size // bytes_
        for row in range(codes.shape[0]):
            _decode(target, row * padded, flat, row * size, blocks * vectors, kind)
            if blocks * bytes_ < size:
                end[: size - blocks * bytes_] = codes[row, blocks * bytes_ :]
                _decode(target, row * padded + blocks * BLOCK, end, 0, vectors, kind)

    return compiled(decode)


@cache
def _multiplier(kind: int) -> Callable[..., None]:
    bytes_, vectors = BLOCK * KINDS[kind].bits // 8, BLOCK * KINDS[kind].bits // 8 // WIDTH  # of a block

    def multiply(a, codes, out, scratch, sums, tile, first, last):
        inputs, padded, size = a.shape[0], a.shape[1], codes.shape[1]
        xs, flat, end = a.reshape(-1), codes.reshape(-1), np.zeros(bytes_, np.uint8)
        for some in range(0, inputs, BATCH):
            until = min(inputs, some + BATCH)
            for row in range(first, last, ROWS):
                rows = min(ROWS, last - row)
                for column in range(0, padded, tile):
                    columns = min(tile, padded - column)
                    start = column // BLOCK * bytes_
                    blocks = min(columns // BLOCK, (size - start) // bytes_)
                    left = min(columns // BLOCK * bytes_, size - start) - blocks * bytes_  # bytes that fill no block
                    for r in range(rows):
                        here = (row + r) * size + start
                        _decode(scratch, r * tile, flat, here, blocks * vectors, kind)
                        if left:
                            here += blocks * bytes_
                            end[:left] = flat[here : here + left]
                            _decode(scratch, r * tile + blocks * BLOCK, end, 0, vectors, kind)
                    for x in range(some, until - 1, 2):
                        _dots(sums, scratch, tile, xs, x * padded + column, padded, columns, ROWS, 2)
                        for r in range(rows):
                            out[x, row + r] += sums[r]
                            out[x + 1, row + r] += sums[ROWS + r]
                    if (until - some) % 2:
                        _dots(sums, scratch, tile, xs, (until - 1) * padded + column, padded, columns, ROWS, 1)
                        for r in range(rows):
                            out[until - 1, row + r] += sums[r]

    return compiled(multiply)


@cache
def _victims() -> Callable[..., None]:
    def victims(pairs, scales, nearest, out, top, reach, larger, first, last):
        limit = np.float32(reach)
        for row in range(first, last):
            for candidate in range(scales.shape[1]):
                step, total = scales[row, candidate], 0.0
                for pair in range(pairs.shape[1] // 2 if step > 0 else 0):
                    y0, y1 = pairs[row, 2 * pair] / step, pairs[row, 2 * pair + 1] / step
                    c0, c1 = 2 * min(y0, limit), 2 * min(y1, limit)
                    q0 = nearest[int(np.floor(c0)) + int(np.ceil(c0)) + 4 * reach]
                    q1 = nearest[int(np.floor(c1)) + int(np.ceil(c1)) + 4 * reach]
                    if q0 <= top and q1 <= top:
                        break  # nor has any pair that follows an outlier
                    second = q0 > top and not (q1 > top and larger and y1 > y0)
                    y, q = (y1, q1) if second else (y0, q0)
                    total += np.float64(y) * np.float64(y) - np.float64(q - y) * np.float64(q - y)
                out[row, candidate] = total

    return compiled(victims)


@cache
def _encoder() -> Callable[..., tuple[int, int]]:
    def encode(x, scale, nearest, code_of, out, top, reach, signed, identifier, bits, larger, first, last):
        limit, lowest = np.float32(reach), np.float32(-reach if signed else -0.5)
        lost, beyond = 0, 0
        for row in range(first, last):
            step = scale[row]
            for pair in range(x.shape[1] // 2):
                y0, y1 = np.float32(0), np.float32(0)
                if step > 0:
                    y0, y1 = x[row, 2 * pair] / step, x[row, 2 * pair + 1] / step
                beyond += int(y0 > limit or y0 < lowest) + int(y1 > limit or y1 < lowest)
                c0, c1 = 2 * min(max(y0, -limit), limit), 2 * min(max(y1, -limit), limit)
                q0 = nearest[int(np.floor(c0)) + int(np.ceil(c0)) + 4 * reach]
                q1 = nearest[int(np.floor(c1)) + int(np.ceil(c1)) + 4 * reach]
                code0, code1 = code_of[q0 + reach], code_of[q1 + reach]
                outlier0, outlier1 = abs(q0) > top, abs(q1) > top
                if outlier0 and outlier1:
                    lost += 1
                    outlier0 = not (larger and abs(y1) > abs(y0))
                if outlier0:
                    code1 = np.uint8(identifier)
                elif outlier1:
                    code0 = np.uint8(identifier)
                if bits == 4:
                    out[row, pair] = code0 | code1 << 4
                else:
                    out[row, 2 * pair], out[row, 2 * pair + 1] = code0, code1
        return lost, beyond

    return compiled(encode)
