"""Decoding a unit; and two decoders to read (section 2.3.3, algorithm 1).

`decode_scalar` takes one weight after the other, `decode_lanes` all threads in step, on any device. They follow the official
CUDA kernel: every thread decodes its 8 bytes twice. First it counts the codes that start in them; the exclusive sum of the
counts over the block, added to the block's position, tells it where its weights go; then it decodes again and writes. Both
take the tables and gaps as they stand in the unit, and raise `Damaged` where these lead nowhere, which the official kernel
does not notice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .codec import BLOCK_BYTES, BLOCK_THREADS, THREAD_BITS, THREAD_BYTES, Damaged, Unit, unpack_gaps
from .huffman import EXPONENTS, LONGEST, TABLES

#: thread blocks that `decode_lanes` keeps in step
TOGETHER = 128
#: bytes that a thread reads: its own and what a code may reach into
READ_BYTES = THREAD_BYTES + LONGEST // 8


def decode(unit: Unit, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16, by the fastest decoder there is for the device that its tensors are on.

    ``out``: where to write, contiguous bfloat16 [weights] on that device. Raises `Damaged`; ``out`` then holds anything.
    """
    if unit.luts.device.type != "cpu":
        return decode_lanes(unit, out)
    from .kernel import decode  # numba takes its time to import

    return decode(unit, out)


def decode_scalar(unit: Unit) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16: thread after thread, code after code, in plain Python."""
    unit.check()
    positions, gaps = unit.positions().tolist(), unpack_gaps(unit.gaps.numpy()).tolist()
    luts, sign_mantissa = unit.luts.tolist(), unit.sign_mantissa.tolist()
    stream = bytes(unit.encoded_exponent.numpy()) + bytes(READ_BYTES)
    weights, used = [0] * unit.weights, 0
    for block in range(unit.blocks):
        position, last = positions[block], positions[block + 1]
        for thread in range(block * BLOCK_THREADS, (block + 1) * BLOCK_THREADS):
            own = stream[thread * THREAD_BYTES :][:READ_BYTES]
            count = sum(1 for _ in _codes(luts, own, gaps[thread], last - position))
            for index, (exponent, end) in enumerate(_codes(luts, own, gaps[thread], count), position):
                rest = sign_mantissa[index]
                weights[index] = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
                used = thread * THREAD_BITS + end
            position += count
        if position != last:
            raise Damaged(f"block {block} holds fewer weights than its positions say; copy or compress the model again")
    _check_end(unit, used)
    return torch.from_numpy(np.array(weights, np.uint16).view(np.int16)).view(torch.bfloat16)


def _codes(luts: list[list[int]], own: bytes, gap: int, most: int) -> Iterator[tuple[int, int]]:
    """At most ``most`` codes that start in the first 8 of the bytes ``own``, from bit ``gap`` on: exponent and next bit."""
    bits, start = int.from_bytes(own.ljust(READ_BYTES, b"\0"), "big"), gap
    while start < THREAD_BITS and most:
        window = bits >> (8 * READ_BYTES - start - LONGEST)
        table, exponent = 0, 0
        for shift in range(LONGEST - 8, -1, -8):
            exponent = luts[table][window >> shift & 255]
            if exponent < EXPONENTS:
                break
            table = 256 - exponent
            if table >= len(luts) - 1:
                raise Damaged("a table links to one that is not there; copy or compress the model again")
        length = luts[-1][exponent]
        if exponent >= EXPONENTS or not 1 <= length <= LONGEST:
            raise Damaged("the stream holds a code that the tables do not know; copy or compress the model again")
        start, most = start + length, most - 1
        yield exponent, start


def _check_end(unit: Unit, used: int) -> None:
    """Raises `Damaged` unless the stream has just the bytes that its codes used, given as bits."""
    if -(-used // 8) != unit.encoded_exponent.numel():
        raise Damaged("the stream does not end where its last code does; copy or compress the model again")


def decode_lanes(unit: Unit, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16: every thread a lane of tensors, all of one block range in step.

    Runs on the device of the unit's tensors. ``out``: where to write, contiguous bfloat16 [weights] on that device.
    """
    unit.check()
    device = unit.luts.device
    positions = torch.from_numpy(unit.positions().astype(np.int64)).to(device)
    gaps = torch.from_numpy(unpack_gaps(unit.gaps.cpu().numpy())).to(device, torch.int64)
    tables = _Tables(unit.luts)
    out = torch.empty(unit.weights, dtype=torch.bfloat16, device=device) if out is None else out
    for first in range(0, unit.blocks, TOGETHER):
        last = min(first + TOGETHER, unit.blocks)
        begin, limits = positions[first], positions[first + 1 : last + 1]
        lanes = _Lanes(unit, tables, first, last, gaps[first * BLOCK_THREADS : last * BLOCK_THREADS])
        counts = lanes.count()
        starts = positions[first:last, None] + counts.cumsum(1) - counts
        surplus = starts[:, -1] + counts[:, -1] - limits
        if (surplus < 0).any() or surplus[: unit.blocks - 1 - first].any():  # what follows the last code counts as codes
            raise Damaged("a block does not hold the weights that its positions say; copy or compress the model again")
        counts = torch.minimum(counts, limits[:, None] - starts).clamp(min=0)
        own = slice(int(begin), int(limits[-1]))
        used = lanes.write((starts - begin).flatten(), counts.flatten(), unit.sign_mantissa[own], out.view(torch.int16)[own])
        if limits[-1] == unit.weights and used:
            _check_end(unit, first * BLOCK_BYTES * 8 + used)
    return out


class _Tables:
    """The tables of a unit as ``length * 256 + exponent``, or 0 for bits that are no code."""

    def __init__(self, luts: torch.Tensor):
        lengths = torch.where(luts[-1] > LONGEST, 0, luts[-1]).to(torch.int64)
        lengths[EXPONENTS:] = 0
        # Links to tables that are not there lead to zeros.
        entries = torch.nn.functional.pad(luts[:-1].flatten().to(torch.int64), (0, TABLES * 256), value=-1)
        self.links = torch.where(entries >= EXPONENTS, (256 - entries) * 256, 0)
        self.codes = torch.where((entries < 0) | (lengths[entries] == 0), 0, lengths[entries] << 8 | entries)
        two_bytes = torch.arange(1 << 16, device=luts.device)
        self.short = self._next(self.links[two_bytes >> 8], self.codes[two_bytes >> 8], two_bytes & 255)[1]

    def _next(self, links: torch.Tensor, codes: torch.Tensor, byte: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the ``byte`` that follows tells."""
        deeper = links + byte
        return torch.where(links > 0, self.links[deeper], 0), torch.where(links > 0, self.codes[deeper], codes)

    def long(self, window: torch.Tensor) -> torch.Tensor:
        """The code at the top of each 32-bit ``window``, byte by byte."""
        links, codes = self.links[window >> 24 & 255], self.codes[window >> 24 & 255]
        for shift in (16, 8, 0):
            links, codes = self._next(links, codes, window >> shift & 255)
        return codes


class _Lanes:
    """The threads of the blocks ``first`` to ``last``, each at its own bit of the stream."""

    def __init__(self, unit: Unit, tables: _Tables, first: int, last: int, gaps: torch.Tensor):
        stream = unit.encoded_exponent[first * BLOCK_BYTES : last * BLOCK_BYTES + LONGEST // 8]
        missing = (last - first) * BLOCK_BYTES + LONGEST // 8 - stream.numel()
        words = torch.nn.functional.pad(stream, (0, missing)).view(-1, 4).to(torch.int64)
        words = words[:, 0] << 24 | words[:, 1] << 16 | words[:, 2] << 8 | words[:, 3]
        self.pairs = words[:-1] << 32 | words[1:]  # 64 bits from every fourth byte on
        self.tables, self.blocks = tables, last - first
        self.begin = torch.arange(gaps.numel(), device=gaps.device) * THREAD_BITS
        self.start = self.begin + gaps

    def count(self) -> torch.Tensor:
        """Codes that start in each thread's bytes, int64 [blocks, threads]."""
        at, last = self.start.clone(), self.begin + (THREAD_BITS - 1)
        counts = torch.zeros_like(at)
        for _ in range(THREAD_BITS):
            lengths = (self._next(torch.minimum(at, last)) >> 8) * (at <= last)
            if not lengths.max():
                break
            counts += lengths > 0
            at += lengths
        return counts.view(self.blocks, -1)

    def write(self, positions: torch.Tensor, counts: torch.Tensor, rest: torch.Tensor, out: torch.Tensor) -> int:
        """Decodes every thread's weights, ``counts`` from ``positions`` on, into ``out``, as their bits.

        Returns the bit after the last code, 0 when there was none.
        """
        counts, order = counts.sort(descending=True)  # threads that go on are always the first ones
        at, positions = self.start[order], positions[order]
        busy = len(counts) - torch.bincount(counts).cumsum(0)
        for threads in busy[:-1].tolist():
            codes = self._next(at[:threads])
            if not codes.min():
                raise Damaged("the stream holds a code that the tables do not know; copy or compress the model again")
            out.scatter_(0, positions[:threads], (codes & 255).to(torch.int16))
            at[:threads] += codes >> 8
            positions[:threads] += 1
        sign_mantissa = rest.to(torch.int16)
        torch.bitwise_or(out << 7, (sign_mantissa & 0x80) << 8 | sign_mantissa & 0x7F, out=out)
        return int(at[counts > 0].max()) if counts[0] else 0

    def _next(self, at: torch.Tensor) -> torch.Tensor:
        """Lengths * 256 + exponents of the codes at the bits ``at``."""
        pair, offset = self.pairs.index_select(0, at >> 5), at & 31
        codes = self.tables.short.index_select(0, pair >> (48 - offset) & 0xFFFF)
        if not codes.min():
            long = (codes == 0).nonzero().flatten()
            codes[long] = self.tables.long(pair[long] >> (32 - offset[long]))
        return codes
