"""Products with a weight in groups of codes, on the CPU, without unpacking it.

Row o of the weight is zero[o, g] + scale[o, g] * code in group g. So with the sums of x over the groups

    y[o] = sum_g scale[o, g] * (sum of code * x in the group) + sum_g zero[o, g] * (sum of x in the group)

and the codes, of 1 to 8 bits, are all that is read in bulk. Eight codes stand in as many bytes as a code has bits: these
are loaded into all lanes of a vector, every lane shifts its code down, and the lanes are multiplied with eight values of x.
A few rows are multiplied at once, so that no sum waits for itself. For many inputs it pays to dequantise a run of rows
first and to leave the product to torch.

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

from .groups import GroupQuantised
from .jit import compiled, split

#: codes in a vector
LANES = 8
#: bytes that may be read behind a row: a vector is loaded as two words of four bytes
BEHIND = 8
#: inputs up to which codes are multiplied as they are; and rows that are dequantised together beyond
FEW, RUN = 96, 256
_intrinsic: Any = intrinsic  # untyped: its first parameter is not the caller's
_BYTE, _INT, _FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
#: sums may be reordered and fused; infinities and NaN keep their meaning
_FLAGS = ("reassoc", "contract", "nsz")


def matmul(x: torch.Tensor, weight: GroupQuantised) -> torch.Tensor:
    """x Wᵀ, float32 [n, rows], of ``x`` float32 [n, width] and a weight in groups of codes [rows, groups, bytes]."""
    rows, groups, _ = weight.codes.shape
    if len(x) > FEW:
        parts = (replace(weight, codes=c, scale=s, zero=z) for c, s, z in zip(*(t.split(RUN) for t in _tensors(weight))))
        return torch.cat([F.linear(x, dequantise(part)) for part in parts], 1)
    x = F.pad(x, (0, groups * weight.group_size - x.shape[1])).unflatten(1, (groups, weight.group_size))
    out = F.linear(x.sum(-1), weight.zero.float())
    x = F.pad(x, (0, -weight.group_size % LANES)).contiguous()
    codes, scale, _ = _tensors(weight)
    arrays = [tensor.numpy() for tensor in (x, codes, scale, out)]
    kernel = _multiplier(weight.bits, *((4, 1) if len(x) == 1 else (2, 4)))
    split(lambda first, last: kernel(*arrays, first, last), rows, 4)
    return out


def dequantise(weight: GroupQuantised) -> torch.Tensor:
    """The weight, float32 [rows, width], the same bits as `GroupQuantised.dequantise` gives."""
    rows, groups, _ = weight.codes.shape
    if weight.group_size % LANES or weight.width != groups * weight.group_size:
        return weight.dequantise()
    out = torch.empty(rows, weight.width)
    arrays = [tensor.numpy() for tensor in (*_tensors(weight), out)]
    split(lambda first, last: _decoder(weight.bits)(*arrays, weight.group_size, first, last), rows, 4)
    return out


def _tensors(weight: GroupQuantised) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes; scale and zero in float32, which numba needs."""
    return weight.codes.contiguous(), weight.scale.float(), weight.zero.float()


# --- vector code ------------------------------------------------------------------------------------------------------


def _constant(values: list[int]) -> Any:
    return ir.Constant(_INTS, values)


def _codes(builder: Any, data: Any, first: Any, bits: int) -> Any:
    """The eight codes, as floats, that begin at byte ``first``."""
    second = 4 * bits // 8 if bits > 4 else 0  # where a word holds the last four codes whole
    words = []
    for offset in (0, second) if second else (0,):
        place = builder.gep(data, [builder.add(first, ir.Constant(first.type, offset))])
        word = builder.load(builder.bitcast(place, _INT.as_pointer()), align=1)
        vector = builder.insert_element(ir.Constant(_INTS, ir.Undefined), word, _INT(0))
        words.append(builder.shuffle_vector(vector, vector, _constant([0] * LANES)))
    if second:
        words = [builder.shuffle_vector(*words, _constant([0] * 4 + [LANES] * 4))]
    shifts = [bits * lane - (8 * second if lane >= 4 else 0) for lane in range(LANES)]
    shifted = builder.lshr(words[0], _constant(shifts))
    return builder.sitofp(builder.and_(shifted, _constant([2**bits - 1] * LANES)), _FLOATS)


def _load(builder: Any, data: Any, place: Any) -> Any:
    return builder.load(builder.bitcast(builder.gep(data, [place]), _FLOATS.as_pointer()), align=4)


def _everywhere(builder: Any, value: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(vector, vector, _constant([0] * LANES))


def _data(context: Any, builder: Any, signature: Any, args: Any, index: int) -> Any:
    return context.make_array(signature.args[index])(context, builder, args[index]).data


@_intrinsic
def _dots(typing: Any, sums: Any, codes: Any, starts: Any, x: Any, places: Any, scale: Any, size: Any, blocks: Any,
          groups: Any, bits: Any, rows: Any, inputs: Any) -> Any:  # fmt: skip
    """``sums[row * inputs + i]`` of ``rows`` rows, whose codes begin at the bytes ``starts[row]`` and scales at
    ``starts[rows + row]``, with ``inputs`` rows of ``x``, which begin at ``places``.

    A row has ``groups`` groups of ``size`` bytes, in which ``blocks`` vectors are read. The last three are constants.
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (bits, rows, inputs)):
        return None  # numba asks again with the constants
    count = types.intp
    signature = types.void(sums, codes, starts, x, places, scale, count, count, count, bits, rows, inputs)
    pairs = [(row, i) for row in range(rows.literal_value) for i in range(inputs.literal_value)]

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, codes, starts, x, places, scale = (_data(context, builder, signature, args, i) for i in range(6))
        size, blocks, groups = args[6:9]
        word = size.type

        def entry(data: Any, index: int) -> Any:
            return builder.load(builder.gep(data, [ir.Constant(word, index)]))

        first = [entry(starts, row) for row in range(rows.literal_value)]
        scales = [entry(starts, rows.literal_value + row) for row in range(rows.literal_value)]
        x_first = [entry(places, i) for i in range(inputs.literal_value)]
        nothing = ir.Constant(_FLOATS, None)
        totals = {pair: cgutils.alloca_once_value(builder, nothing) for pair in pairs}
        parts = {pair: cgutils.alloca_once_value(builder, nothing) for pair in pairs}
        with cgutils.for_range(builder, groups, intp=word) as group:
            for part in parts.values():
                builder.store(nothing, part)
            before = builder.mul(group.index, size)
            x_before = builder.mul(group.index, builder.mul(blocks, ir.Constant(word, LANES)))
            with cgutils.for_range(builder, blocks, intp=word) as block:
                at = builder.add(before, builder.mul(block.index, ir.Constant(word, bits.literal_value)))
                x_at = builder.add(x_before, builder.mul(block.index, ir.Constant(word, LANES)))
                weights = [_codes(builder, codes, builder.add(start, at), bits.literal_value) for start in first]
                values = [_load(builder, x, builder.add(start, x_at)) for start in x_first]
                for row, i in pairs:
                    product = builder.fmul(weights[row], values[i], flags=_FLAGS)
                    grown = builder.fadd(builder.load(parts[row, i]), product, flags=_FLAGS)
                    builder.store(grown, parts[row, i])
            steps = [
                _everywhere(builder, builder.load(builder.gep(scale, [builder.add(start, group.index)]))) for start in scales
            ]
            for row, i in pairs:
                product = builder.fmul(steps[row], builder.load(parts[row, i]), flags=_FLAGS)
                builder.store(builder.fadd(builder.load(totals[row, i]), product, flags=_FLAGS), totals[row, i])
        for number, pair in enumerate(pairs):
            vector, width = builder.load(totals[pair]), LANES
            while width > 1:
                width //= 2
                lanes = [ir.Constant(ir.VectorType(_INT, width), [start + k for k in range(width)]) for start in (0, width)]
                low, high = (builder.shuffle_vector(vector, vector, half) for half in lanes)
                vector = builder.fadd(low, high, flags=_FLAGS)
            total = builder.extract_element(vector, _INT(0))
            builder.store(total, builder.gep(sums, [ir.Constant(word, number)]))
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
        step, base = (_everywhere(builder, value) for value in args[5:7])
        with cgutils.for_range(builder, args[4], intp=word) as block:
            at = builder.add(args[3], builder.mul(block.index, ir.Constant(word, bits.literal_value)))
            values = builder.fadd(builder.fmul(_codes(builder, codes, at, bits.literal_value), step), base)
            target = builder.gep(out, [builder.add(args[1], builder.mul(block.index, ir.Constant(word, LANES)))])
            builder.store(values, builder.bitcast(target, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, build


# --- the kernels ------------------------------------------------------------------------------------------------------
# The codes of the last row are copied to where it is safe to read behind them.


@cache
def _multiplier(bits: int, together: int, inputs: int) -> Callable[..., None]:
    """Multiplies ``together`` rows with ``inputs`` inputs at a time; what is left over is done with the last ones again."""

    def multiply(x, codes, scale, out, first, last):
        rows, groups, size = codes.shape
        blocks, flat, xs, scales = x.shape[2] // LANES, codes.reshape(-1), x.reshape(-1), scale.reshape(-1)
        sums = np.empty(together * inputs, np.float32)
        starts, places = np.empty(2 * together, np.intp), np.empty(inputs, np.intp)
        end = np.zeros(groups * size + BEHIND, np.uint8)
        row = first
        while row < last:
            at_end = row == rows - 1
            until = last if at_end else min(row + together, last, rows - 1)
            for r in range(together):
                here = min(row + r, until - 1)
                starts[r] = 0 if at_end else here * groups * size
                starts[together + r] = here * groups
            if at_end:
                end[: groups * size] = flat[(rows - 1) * groups * size :]
            for some in range(0, x.shape[0], inputs):
                for i in range(inputs):
                    places[i] = min(some + i, x.shape[0] - 1) * groups * blocks * LANES
                if at_end:
                    _dots(sums, end, starts, xs, places, scales, size, blocks, groups, bits, together, inputs)
                else:
                    _dots(sums, flat, starts, xs, places, scales, size, blocks, groups, bits, together, inputs)
                for i in range(min(inputs, x.shape[0] - some)):
                    for r in range(until - row):
                        out[some + i, row + r] += sums[r * inputs + i]
            row = until

    return compiled(multiply)


@cache
def _decoder(bits: int) -> Callable[..., None]:
    def decode(codes, scale, zero, out, group_size, first, last):
        rows, groups, size = codes.shape
        flat, values, blocks = codes.reshape(-1), out.reshape(-1), group_size // LANES
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
