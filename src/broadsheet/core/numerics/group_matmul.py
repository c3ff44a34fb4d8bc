"""Products with a weight in groups of codes, on the CPU, without unpacking it.

Row o of the weight is zero[o, g] + scale[o, g] * code in group g. So with the sums of x over the groups

    y[o] = sum_g scale[o, g] * (sum of code * x in the group) + sum_g zero[o, g] * (sum of x in the group)

and the codes, of 1 to 8 bits, are all that is read in bulk. To keep up with the memory, sums of code * x are of whole
numbers: x is rounded to a 16-bit multiple of a step of its own in every group, the largest |x| over 32767, and a
product and its sum are one instruction where a float's would be three. With the step of group g, y[o] is off by at most

    sum_g step[g] / 2 * scale[o, g] * (sum of codes in the group)

which is 1/65534 of the largest |x| an input, less than bfloat16's rounding of x by two hundred times. Scales, zeros and all
other sums are float32.

Where a group fills vectors of 16-bit words with whole codes (4 bits in groups of 128), a vector of words, shifted down k
codes and masked, has code k of every word, and x is put in that order beforehand. Elsewhere the bytes are shuffled so that
every lane of 16 bits has the two that its code begins in. Rows are read one after the other, as they lie in memory: several
at once are several streams, and the processor fetches those ahead only half as fast. A few inputs share the codes of a row;
for many it pays to dequantise a run of rows first and to leave the product to torch.

Compiled by numba at the first use, for each number of bits, and cached on disk; this module is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .groups import GroupQuantised
from .jit import compiled, split

#: words of 16 bits in a vector, and sums: of products of neighbours; values that are dequantised at once
LANES, SUMS, EIGHT = 32, 16, 8
#: bytes that may be read behind a row
BEHIND = 2 * LANES
#: bytes that are fetched ahead: a page, behind whose end a processor fetches nothing by itself
AHEAD = 4096
#: inputs up to which codes are multiplied as they are; and rows that are dequantised together beyond
FEW, RUN = 96, 256
#: inputs that share a row's codes
TOGETHER = 4
#: what is smaller counts as 0: its step has no inverse in float32
LEAST = 1e-30
_intrinsic: Any = intrinsic  # untyped: its first parameter is not the caller's
_BYTE, _SHORT, _INT, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_SHORTS, _INTS, _FLOATS = ir.VectorType(_SHORT, LANES), ir.VectorType(_INT, SUMS), ir.VectorType(_FLOAT, SUMS)
#: sums may be reordered and fused; NaN keeps its meaning
_FLAGS = ("reassoc", "contract", "nsz")


def matmul(x: torch.Tensor, weight: GroupQuantised) -> torch.Tensor:
    """x Wᵀ, float32 [n, rows], of ``x`` float32 [n, width] and a weight in groups of codes [rows, groups, bytes].

    Scale and zero of the weight are float16. A value that is not finite makes its row NaN."""
    rows, groups, _ = weight.codes.shape
    if len(x) > FEW:
        parts = zip(*(tensor.split(RUN) for tensor in (weight.codes, weight.scale, weight.zero)))
        some = (replace(weight, codes=codes, scale=scale, zero=zero) for codes, scale, zero in parts)
        return torch.cat([F.linear(x, dequantise(part)) for part in some], 1)
    together = 1 if len(x) == 1 else TOGETHER
    each = _each(weight.bits, weight.group_size)
    order = _order(each, weight.group_size)
    size, count = len(order), len(x) + -len(x) % together
    short, (step, sums) = np.zeros((count, groups, size), np.int16), np.zeros((2, count, groups), np.float32)
    # as many of 16 bits as a lane's sum of ``size`` / SUMS products has room for
    most = min(2**15 - 1, (2**31 - 1) // (size // SUMS * (2**weight.bits - 1)))
    _rounder()(x.contiguous().numpy(), order, weight.group_size, most, short, step, sums)
    out, codes = torch.empty(len(x), rows), weight.codes.contiguous().numpy()
    halves = [tensor.contiguous().view(torch.int16).numpy() for tensor in (weight.scale, weight.zero)]
    kernel = _multiplier(weight.bits, each, together)
    split(lambda first, last: kernel(short, step, sums, codes, *halves, out.numpy(), first, last), rows, 4)
    return out


def dequantise(weight: GroupQuantised) -> torch.Tensor:
    """The weight, float32 [rows, width], the same bits as `GroupQuantised.dequantise` gives."""
    rows, groups, _ = weight.codes.shape
    if weight.group_size % EIGHT or weight.width != groups * weight.group_size:
        return weight.dequantise()
    out = torch.empty(rows, weight.width)
    tensors = (weight.codes.contiguous(), weight.scale.float(), weight.zero.float(), out)  # numba has no 16-bit floats
    arrays = [tensor.numpy() for tensor in tensors]
    split(lambda first, last: _decoder(weight.bits)(*arrays, weight.group_size, first, last), rows, 4)
    return out


def _each(bits: int, group_size: int) -> int:
    """Codes that are taken from a word of 16 bits; 1: they are not taken from words."""
    each = 16 // bits
    return each if 16 % bits == 0 and group_size % (each * LANES) == 0 else 1


@cache
def _order(each: int, group_size: int) -> NDArray[np.intp]:
    """Where the kernel wants value k of a group, of as many as its vectors hold."""
    values = np.arange(group_size + -group_size % (each * LANES))
    block, inside = np.divmod(values, each * LANES)
    word, code = np.divmod(inside, each)
    return block * each * LANES + code * LANES + word


# --- vector code ------------------------------------------------------------------------------------------------------


def _vector(kind: Any, values: list[int]) -> Any:
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def _vectors(builder: Any, data: Any, first: Any, bits: int, each: int) -> list[Any]:
    """Vectors of codes, of 16 bits each, from byte ``first`` on, in the order of `_order`."""
    if each == 1:
        return [_in_order(builder, data, first, bits, LANES)]
    words = builder.load(builder.bitcast(builder.gep(data, [first]), _SHORTS.as_pointer()), align=1)
    mask = _vector(_SHORT, [2**bits - 1] * LANES)
    return [builder.and_(builder.lshr(words, _vector(_SHORT, [shift] * LANES)), mask) for shift in range(0, 16, bits)]


def _in_order(builder: Any, data: Any, first: Any, bits: int, lanes: int) -> Any:
    """``lanes`` codes, of 16 bits each, that begin at byte ``first``."""
    size = lanes * bits // 8
    loaded = builder.load(builder.bitcast(builder.gep(data, [first]), ir.VectorType(_BYTE, size).as_pointer()), align=1)
    if bits == 8:
        return builder.zext(loaded, ir.VectorType(_SHORT, lanes))
    places = [lane * bits // 8 + byte for lane in range(lanes) for byte in range(2)]
    spread = builder.shuffle_vector(loaded, loaded, _vector(_INT, [min(place, size - 1) for place in places]))
    pairs = builder.bitcast(spread, ir.VectorType(_SHORT, lanes))
    shifted = builder.lshr(pairs, _vector(_SHORT, [lane * bits % 8 for lane in range(lanes)]))
    return builder.and_(shifted, _vector(_SHORT, [2**bits - 1] * lanes))


def _products(builder: Any, codes: Any, x: Any) -> Any:
    """Sums of the products of neighbours, 32 bits each: one instruction on most processors."""
    wide = ir.VectorType(_INT, LANES)
    products = builder.mul(builder.sext(codes, wide), builder.sext(x, wide))
    return builder.add(
        *(builder.shuffle_vector(products, products, _vector(_INT, list(range(first, LANES, 2)))) for first in (0, 1))
    )


def _fetch(builder: Any, place: Any) -> None:
    """Has the processor read a place of memory that is wanted soon; nothing happens where there is none."""
    kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(prefetch, [place, _INT(0), _INT(3), _INT(1)])  # to read, keep, data


def _everywhere(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(_FLOAT, lanes)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(vector, vector, _vector(_INT, [0] * lanes))


def _data(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    return context.make_array(signature.args[index])(context, builder, args[index]).data


@_intrinsic
def _half(typing: Any, word: Any) -> Any:
    """The float of 16 bits that stands in an integer; numba has none of its own."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _FLOAT)

    return types.float32(types.int16), build


@_intrinsic
def _dots(typing: Any, out: Any, x: Any, factors: Any, codes: Any, place: Any, first: Any, size: Any, blocks: Any,
          groups: Any, bits: Any, each: Any, inputs: Any) -> Any:  # fmt: skip
    """``out[i]`` = sum over groups of ``factors[i, group]`` * (sum of code * x), of a row and of ``inputs`` inputs.

    The row begins at byte ``place``, the inputs at number ``first`` of x. A row has ``groups`` groups of ``size`` bytes, in
    which ``blocks`` blocks are read, of ``each`` vectors. ``bits``, ``each`` and ``inputs`` are constants.
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (bits, each, inputs)):
        return None  # numba asks again with the constants
    count = types.intp
    signature = types.void(out, x, factors, codes, count, count, count, count, count, bits, each, inputs)
    numbers, taken = range(inputs.literal_value), each.literal_value

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, x, factors, codes = (_data(context, builder, signature, args, i) for i in range(4))
        start, first, size, blocks, groups = args[4:9]
        word = size.type

        def whole(value: int) -> Any:
            return ir.Constant(word, value)

        group_width = builder.mul(blocks, whole(taken * LANES))
        totals = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, None)) for _ in numbers]
        parts = [cgutils.alloca_once_value(builder, ir.Constant(_INTS, None)) for _ in numbers]
        with cgutils.for_range(builder, groups, intp=word) as group:
            for part in parts:
                builder.store(ir.Constant(_INTS, None), part)
            codes_at = builder.add(start, builder.mul(group.index, size))
            x_at = [
                builder.mul(builder.add(builder.mul(builder.add(first, whole(i)), groups), group.index), group_width)
                for i in numbers
            ]
            with cgutils.for_range(builder, blocks, intp=word) as block:
                place = builder.add(codes_at, builder.mul(block.index, whole(taken * LANES * bits.literal_value // 8)))
                _fetch(builder, builder.gep(codes, [builder.add(place, whole(AHEAD))]))
                for number, weights in enumerate(_vectors(builder, codes, place, bits.literal_value, taken)):
                    inside = builder.add(builder.mul(block.index, whole(taken * LANES)), whole(number * LANES))
                    for part, at in zip(parts, x_at, strict=True):
                        place = builder.gep(x, [builder.add(at, inside)])
                        values = builder.load(builder.bitcast(place, _SHORTS.as_pointer()), align=2)
                        builder.store(builder.add(builder.load(part), _products(builder, weights, values)), part)
            for i in numbers:
                place = builder.gep(factors, [builder.add(builder.mul(whole(i), groups), group.index)])
                factor = _everywhere(builder, builder.load(place), SUMS)
                product = builder.fmul(builder.sitofp(builder.load(parts[i]), _FLOATS), factor, flags=_FLAGS)
                builder.store(builder.fadd(builder.load(totals[i]), product, flags=_FLAGS), totals[i])
        for i in numbers:
            vector, width = builder.load(totals[i]), SUMS
            while width > 1:
                width //= 2
                low, high = (_vector(_INT, list(range(start, start + width))) for start in (0, width))
                halves = (builder.shuffle_vector(vector, vector, half) for half in (low, high))
                vector = builder.fadd(*halves, flags=_FLAGS)
            builder.store(builder.extract_element(vector, _INT(0)), builder.gep(out, [whole(i)]))
        return context.get_dummy_value()

    return signature, build


@_intrinsic
def _values(typing: Any, out: Any, place: Any, codes: Any, start: Any, blocks: Any, scale: Any, zero: Any, bits: Any) -> Any:
    """Writes zero + scale * code for ``blocks`` vectors of codes from byte ``start`` on to ``out[place:]``."""
    if not isinstance(bits, types.IntegerLiteral):
        return None
    count = types.intp
    signature = types.void(out, count, codes, count, count, types.float32, types.float32, bits)

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, codes = (_data(context, builder, signature, args, i) for i in (0, 2))
        word = args[1].type
        step, base = (_everywhere(builder, value, EIGHT) for value in args[5:7])
        floats = ir.VectorType(_FLOAT, EIGHT)
        with cgutils.for_range(builder, args[4], intp=word) as block:
            at = builder.add(args[3], builder.mul(block.index, ir.Constant(word, bits.literal_value)))
            whole = builder.uitofp(_in_order(builder, codes, at, bits.literal_value, EIGHT), floats)
            values = builder.fadd(builder.fmul(whole, step), base)
            target = builder.gep(out, [builder.add(args[1], builder.mul(block.index, ir.Constant(word, EIGHT)))])
            builder.store(values, builder.bitcast(target, floats.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


# --- the kernels ------------------------------------------------------------------------------------------------------
# The codes of the last rows are copied to where it is safe to read behind them.


@cache
def _rounder() -> Callable[..., None]:
    """Rounds ``x`` [n, width] to ``short`` [n, groups, size], up to ``most``; and its ``step`` and ``sums`` [n, groups]."""

    def rounder(x, order, group_size, most, short, step, sums):
        for i in range(x.shape[0]):
            for group in range(short.shape[1]):
                first, last = group * group_size, min((group + 1) * group_size, x.shape[1])
                largest, total = np.float32(0), np.float32(0)
                for k in range(first, last):
                    largest, total = max(largest, abs(x[i, k])), total + x[i, k]
                inverse = np.float32(most) / largest if largest > LEAST else np.float32(0)
                for k in range(first, last):
                    short[i, group, order[k - first]] = np.int16(np.rint(x[i, k] * inverse))
                sums[i, group] = total
                step[i, group] = largest / np.float32(most) if np.isfinite(total) else np.float32(np.nan)

    return compiled(rounder)


@cache
def _multiplier(bits: int, each: int, together: int) -> Callable[..., None]:
    """Multiplies a row at a time with ``together`` inputs."""

    def multiply(x, step, sums, codes, scale, zero, out, first, last):
        _, groups, size = codes.shape
        flat, xs, blocks = codes.reshape(-1), x.reshape(-1), x.shape[2] // (each * LANES)
        factors, shifts = np.empty((together, groups), np.float32), np.empty(together, np.float32)
        found, end = np.empty(together, np.float32), np.zeros(groups * size + BEHIND, np.uint8)
        for row in range(first, last):
            data, place = flat, row * groups * size
            if place + groups * size + BEHIND > len(flat):
                end[: groups * size] = flat[place : place + groups * size]
                data, place = end, 0
            for some in range(0, x.shape[0], together):
                for i in range(together):
                    shift = np.float32(0)
                    for group in range(groups):
                        factors[i, group] = _half(scale[row, group]) * step[some + i, group]
                        shift += _half(zero[row, group]) * sums[some + i, group]
                    shifts[i] = shift
                _dots(found, xs, factors, data, place, some, size, blocks, groups, bits, each, together)
                for i in range(some, min(some + together, out.shape[0])):
                    out[i, row] = found[i - some] + shifts[i - some]

    return compiled(multiply, _FLAGS)


@cache
def _decoder(bits: int) -> Callable[..., None]:
    def decode(codes, scale, zero, out, group_size, first, last):
        rows, groups, size = codes.shape
        flat, values, blocks = codes.reshape(-1), out.reshape(-1), group_size // EIGHT
        end = np.zeros(size + BEHIND, np.uint8)
        for row in range(first, last):
            for group in range(groups):
                number = row * groups + group
                step, base, place = scale[row, group], zero[row, group], number * group_size
                if number == rows * groups - 1:
                    end[:size] = flat[number * size :]
                    _values(values, place, end, 0, blocks, step, base, bits)
                else:
                    _values(values, place, flat, number * size, blocks, step, base, bits)

    return compiled(decode)
