"""The decoder for CPUs, and the encoder's loop. Compiled by numba at the first use and cached on disk.

What makes it fast:

- `WINDOW` bits of the stream are looked up at a time and give up to `MOST` exponents at once: 3.8 on average at 2.6 bits a
  weight. The table (16 KiB, beside 4 KiB of counts and lengths) is derived from the unit's own byte-wise tables; codes that
  are longer than the window, one in 2,000, are decoded with those.
- A lookup waits for the one before it. So four runs of blocks, whose beginnings are known, are decoded alternately, and the
  processor always has something to do.
- Exponents go to a small buffer that is merged with signs and mantissas in vector registers. The memory that the merge
  will touch is asked for while the exponents are decoded.

Nothing is read or written out of bounds, whatever the unit holds: iterations without checks are counted beforehand from
the weights and bits that are left, and the rest of a run is decoded with checks. A run must end where the next one starts,
and the last one with the stream; that notices most damage, and `files.verify` more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from broadsheet.core.numerics.jit import compiled, split

from .codec import BLOCK_BYTES, GAP_BYTES, MISPLACED, Damaged, Unit
from .huffman import EXPONENTS, LONGEST

#: bits of the stream looked up at a time, and exponents that come out of it at most
WINDOW, MOST = 11, 6
#: lookups between two refills of the 57 bits or more that a register holds
LOOKUPS = 57 // WINDOW
#: runs of thread blocks decoded alternately
LANES = 4
#: weights that a lane decodes between two merges, and the bytes of its buffer: the last lookup writes more than it keeps
CHUNK = 8192
LANE = CHUNK + 64


def decode(unit: Unit, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16, decoded by as many threads as torch has.

    ``out``: where to write, contiguous bfloat16 [weights]. Raises `Damaged`; ``out`` then holds anything.
    """
    unit.check()
    out = torch.empty(unit.weights, dtype=torch.bfloat16) if out is None else out
    if out.dtype != torch.bfloat16 or out.numel() != unit.weights or not out.is_contiguous():
        raise ValueError(f"decode into a contiguous bfloat16 tensor of {unit.weights} weights")
    parts = (unit.luts, unit.encoded_exponent, unit.sign_mantissa, unit.gaps, unit.output_positions)
    luts, stream, rest, gaps, positions = (part.contiguous().numpy() for part in parts)
    symbols, steps, leads_through = _prepare(luts, positions, unit.blocks, unit.weights)
    if not leads_through:
        raise Damaged(MISPLACED)
    bits = out.view(torch.int16).view(-1).numpy()

    def work(first: int, last: int) -> None:
        wrong = _decode(luts, symbols, steps, stream, rest, gaps, positions, bits, first, last)
        if wrong >= 0:
            raise Damaged(f"the stream is damaged in block {wrong} or after; copy or compress the model again")

    split(work, unit.blocks, 4 * LANES)  # for less another thread is not worth its start
    return out


# --- machine instructions that numba does not have ------------------------------------------------------

_intrinsic: Any = intrinsic  # untyped: its first parameter is not the caller's
_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _address(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Of the byte that the first two arguments name, an array and a number of bytes."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(builder.bitcast(array.data, _BYTE.as_pointer()), [arguments[1]])


@_intrinsic
def _load(context: Any, array: Any, offset: Any) -> Any:
    """The 64 bits from byte ``offset`` on, the first byte on top."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.bitcast(_address(context, builder, signature, arguments), _LONG.as_pointer())
        return builder.bswap(builder.load(address, align=1))

    return types.uint64(array, types.int64), build


@_intrinsic
def _store(context: Any, array: Any, offset: Any, value: Any) -> Any:
    """Writes 64 bits from byte ``offset`` on, the lowest first."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.bitcast(_address(context, builder, signature, arguments), _LONG.as_pointer())
        builder.store(arguments[2], address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.uint64), build


def _prefetch(for_writing: int) -> Any:
    @_intrinsic
    def prefetch(context: Any, array: Any, offset: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = _address(context, builder, signature, arguments)
            kind = ir.FunctionType(ir.VoidType(), [address.type, _INT, _INT, _INT])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            near, data = _INT(3), _INT(1)
            builder.call(function, [address, _INT(for_writing), near, data])
            return context.get_dummy_value()

        return types.void(array, types.int64), build

    return prefetch


#: asks for the cache line of byte ``offset`` of an array; never faults
_will_read, _will_write = _prefetch(0), _prefetch(1)


@_intrinsic
def _trailing_zeros(context: Any, value: Any) -> Any:
    """Of a number that is not 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), build


# --- the kernels ----------------------------------------------------------------------------------------


_inlined = partial(compiled, inline="always")


@compiled
def write(exponents, lengths, values, bit, written, words, gaps, before):
    """Writes the codes of ``exponents`` from ``bit`` on, and returns where they end; see `codec.Stream`."""
    for index in range(exponents.size):
        length, value = np.int64(lengths[exponents[index]]), np.uint64(values[exponents[index]])
        word, offset = bit >> 6, bit & 63
        if before[word] < 0:
            before[word], gaps[word] = written + index, offset
        room = 64 - offset - length
        if room >= 0:
            words[word] |= value << np.uint64(room)
        else:
            words[word] |= value >> np.uint64(-room)
            words[word + 1] |= value << np.uint64(64 + room)
        bit += length
    return bit


@_inlined
def _position(positions, block, weights):
    """Weights before a block; `Unit.positions` says when the last one is missing."""
    if 4 * block == positions.size:
        return np.int64(weights)
    position = np.int64(0)
    for byte in range(3, -1, -1):
        position = position << 8 | np.int64(positions[4 * block + byte])
    return position


@compiled
def _code(luts, window):
    """Exponent and length of the code at the top of a 32-bit ``window``; length 0 when there is none."""
    last = luts.shape[0] - 1
    table, shift = np.int64(0), 24
    while shift >= 0 and table < last:
        exponent = np.int64(luts[table, (window >> shift) & 255])
        if exponent < EXPONENTS:
            length = np.int64(luts[last, exponent])
            return exponent, length if length <= LONGEST else 0
        table, shift = 256 - exponent, shift - 8
    return 0, 0


@compiled
def _window(stream, bit):
    """The 32 bits from ``bit`` on, zeros behind the end."""
    if bit <= 8 * stream.size - 64:
        return np.int64(_load(stream, bit >> 3) << np.uint64(bit & 7) >> np.uint64(32))
    window = np.int64(0)
    for byte in range(bit >> 3, (bit >> 3) + 5):
        window = window << 8 | (np.int64(stream[byte]) if byte < stream.size else 0)
    return window >> (8 - (bit & 7)) & 0xFFFFFFFF


@compiled
def _prepare(luts, positions, blocks, weights):
    """`_lookup`, and whether the positions rise from 0 to the number of weights in steps that a block can make."""
    fits, before = _position(positions, 0, weights) == 0, 0
    for block in range(1, blocks + 1):
        position = _position(positions, block, weights)
        fits &= 0 <= position - before <= 8 * BLOCK_BYTES
        before = position
    symbols, steps = _lookup(luts)
    return symbols, steps, fits and before == weights


@compiled
def _lookup(luts):
    """What every window of bits holds: exponents (uint64, the first in the lowest byte) and count * 256 + bits (uint16).

    Only codes that end within the window: what its bits decode to must not depend on those behind them. It is looked up
    with zeros and with ones there, because the end symbol's code, which is in no table, looks like the code before it.
    """
    windows = 1 << WINDOW
    exponents, lengths = np.zeros(windows, np.int64), np.zeros(windows, np.int64)
    for window in range(windows):
        low = window << (LONGEST - WINDOW)
        exponent, length = _code(luts, low)
        other, _ = _code(luts, low | ((1 << (LONGEST - WINDOW)) - 1))
        if exponent == other:
            exponents[window], lengths[window] = exponent, length
    symbols, steps = np.zeros(windows, np.uint64), np.zeros(windows, np.uint16)
    for window in range(windows):
        bits = 0
        for count in range(MOST):
            low = (window << bits) & (windows - 1)
            exponent, length = exponents[low], lengths[low]
            if length == 0 or bits + length > WINDOW or exponents[low | ((1 << bits) - 1)] != exponent:
                break
            bits += length
            symbols[window] |= np.uint64(exponent) << np.uint64(8 * count)
            steps[window] = (count + 1) << 8 | bits
    return symbols, steps


@_inlined
def _refill(stream, bit):
    """57 bits or more from ``bit`` on, and a 1 at the very end, whose place tells later how many were used."""
    return (_load(stream, bit >> 3) << np.uint64(bit & 7)) | np.uint64(1)


@_inlined
def _step(bits, at, symbols, steps, buffer):
    """One lookup: writes its exponents to ``buffer`` from ``at`` on; a step of 0 says that a long code is next."""
    window = bits >> np.uint64(64 - WINDOW)
    step = np.uint64(steps[window])
    _store(buffer, at, symbols[window])
    return bits << (step & np.uint64(63)), at + np.int64(step >> np.uint64(8)), step


@compiled
def _long(luts, stream, bit, at, buffer):
    """The same for one code of any length; the third number is 1 when there is none."""
    exponent, length = _code(luts, _window(stream, bit))
    buffer[at] = exponent
    return bit + length, at + 1, np.int64(length == 0)


@_inlined
def _soon(rest, out, index):
    """Weight number ``index`` will be merged."""
    _will_read(rest, index)
    _will_write(out, 2 * index)


@compiled
def _merge(buffer, first, last, rest, out, done):
    """Writes the weights from number ``done`` on, of the exponents ``first`` to ``last`` of ``buffer``; returns the next."""
    count = last - first
    exponents, source, target = buffer[first:last], rest[done : done + count], out[done : done + count]
    for index in range(count):
        # Extended, the sign bit stands in bits 7 to 15, of which 7 to 14 make room for the exponent.
        sign_and_mantissa = np.int16(np.int8(source[index])) & np.int16(-0x7F81)
        target[index] = sign_and_mantissa | np.int16(exponents[index]) << np.int16(7)
    return done + count


@_inlined
def _start(gaps, block):
    """The bit where the first code starts that starts in a block; the gap is the first 5 bits of the block's."""
    return block * 8 * BLOCK_BYTES + np.int64(gaps[block * GAP_BYTES] >> 3)


@_inlined
def _rounds(bit, done, limit, size):
    """Rounds that surely neither decode more weights than are left nor read beyond the stream.

    A round is `LOOKUPS` and one long code where they meet one.
    """
    weights, bits = LOOKUPS * MOST + 1, LOOKUPS * WINDOW + LONGEST
    return min(min(limit - done, CHUNK) // weights, (8 * size - 72 - bit) // bits)


@compiled
def _alone(luts, symbols, steps, stream, rest, bit, done, limit, out, buffer):
    """Decodes one lane to its ``limit``; returns the bit after its last code, -1 when it met something that is no code."""
    while done < limit:
        at, most = 0, min(limit - done, CHUNK)
        while at < most:
            if at + MOST <= most and bit <= 8 * stream.size - 64:
                _, at, step = _step(_refill(stream, bit), at, symbols, steps, buffer)
                bit += np.int64(step & np.uint64(63))
                if step != 0:
                    continue
            exponent, length = _code(luts, _window(stream, bit))
            if length == 0:
                return -1
            buffer[at] = exponent
            bit, at = bit + length, at + 1
        done = _merge(buffer, 0, at, rest, out, done)
    return bit


@compiled
def _decode(luts, symbols, steps, stream, rest, gaps, positions, out, first, last):
    """Decodes the blocks ``first`` to ``last``; returns the first of a run of blocks that is damaged, or -1."""
    buffer, size = np.empty(LANES * LANE, np.uint8), stream.size
    base0, base1, base2, base3 = 0, LANE, 2 * LANE, 3 * LANE
    # A lane is a quarter of the blocks: as many bits, so that all get to their ends in about as many lookups.
    run, start, done = np.empty(LANES + 1, np.int64), np.zeros(LANES, np.int64), np.empty(LANES + 1, np.int64)
    for lane in range(LANES + 1):
        run[lane] = first + (last - first) * lane // LANES
        done[lane] = _position(positions, run[lane], rest.size)
        if lane < LANES and run[lane] < last:
            start[lane] = _start(gaps, run[lane])
    bit0, bit1, bit2, bit3 = start[0], start[1], start[2], start[3]
    done0, done1, done2, done3 = done[0], done[1], done[2], done[3]
    limit0, limit1, limit2, limit3 = done[1], done[2], done[3], done[4]
    wrong = 0
    while True:
        rounds = min(
            min(_rounds(bit0, done0, limit0, size), _rounds(bit1, done1, limit1, size)),
            min(_rounds(bit2, done2, limit2, size), _rounds(bit3, done3, limit3, size)),
        )
        if rounds <= 0:
            break
        at0, at1, at2, at3 = base0, base1, base2, base3
        to0, to1, to2, to3 = done0 - base0, done1 - base1, done2 - base2, done3 - base3
        for _ in range(rounds):
            _soon(rest, out, to0 + at0)
            _soon(rest, out, to1 + at1)
            _soon(rest, out, to2 + at2)
            _soon(rest, out, to3 + at3)
            bits0, bits1 = _refill(stream, bit0), _refill(stream, bit1)
            bits2, bits3 = _refill(stream, bit2), _refill(stream, bit3)
            step0 = step1 = step2 = step3 = np.uint64(0)
            for _ in range(LOOKUPS):
                bits0, at0, step0 = _step(bits0, at0, symbols, steps, buffer)
                bits1, at1, step1 = _step(bits1, at1, symbols, steps, buffer)
                bits2, at2, step2 = _step(bits2, at2, symbols, steps, buffer)
                bits3, at3, step3 = _step(bits3, at3, symbols, steps, buffer)
            bit0 += _trailing_zeros(bits0)
            bit1 += _trailing_zeros(bits1)
            bit2 += _trailing_zeros(bits2)
            bit3 += _trailing_zeros(bits3)
            if step0 == 0:
                bit0, at0, bad = _long(luts, stream, bit0, at0, buffer)
                wrong |= bad
            if step1 == 0:
                bit1, at1, bad = _long(luts, stream, bit1, at1, buffer)
                wrong |= bad
            if step2 == 0:
                bit2, at2, bad = _long(luts, stream, bit2, at2, buffer)
                wrong |= bad
            if step3 == 0:
                bit3, at3, bad = _long(luts, stream, bit3, at3, buffer)
                wrong |= bad
        done0 = _merge(buffer, base0, at0, rest, out, done0)
        done1 = _merge(buffer, base1, at1, rest, out, done1)
        done2 = _merge(buffer, base2, at2, rest, out, done2)
        done3 = _merge(buffer, base3, at3, rest, out, done3)
    if wrong:
        return first
    bits, so_far = (bit0, bit1, bit2, bit3), (done0, done1, done2, done3)
    for lane in range(LANES):
        limit = done[lane + 1]
        if limit > done[lane]:  # a code starts in this run of blocks
            bit = _alone(luts, symbols, steps, stream, rest, bits[lane], so_far[lane], limit, out, buffer)
            ends_well = (bit + 7) >> 3 == size if limit == rest.size else bit == _start(gaps, run[lane + 1])
            if not ends_well:
                return run[lane]
    return -1
