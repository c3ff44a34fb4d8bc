"""Two decoders to read: one weight after the other, and all threads in step (section 2.3.3, algorithm 1).

Both follow the official CUDA kernel: every thread decodes its 8 bytes twice. First it counts the codes that start in them;
the exclusive sum of the counts over the block, added to the block's position, tells it where its weights go; then it decodes
again and writes. Both take the tables and gaps as they stand in the unit, and raise `Damaged` where these lead nowhere,
which the official kernel does not notice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from .codec import BLOCK_BYTES, BLOCK_THREADS, THREAD_BITS, THREAD_BYTES, Damaged, Unit, unpack_gaps
from .huffman import EXPONENTS, LONGEST, TABLES

#: thread blocks that `decode_lanes` keeps in step
TOGETHER = 256
#: bytes that a thread reads: its own and what a code may reach into
READ_BYTES = THREAD_BYTES + LONGEST // 8


def decode_scalar(unit: Unit) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16: thread after thread, code after code, in plain Python."""
    unit.check()
    positions, gaps = unit.positions().tolist(), unpack_gaps(unit.gaps.numpy()).tolist()
    luts, sign_mantissa = unit.luts.tolist(), unit.sign_mantissa.tolist()
    stream = bytes(unit.encoded_exponent.numpy()) + bytes(READ_BYTES)
    weights = [0] * unit.weights
    for block in range(unit.blocks):
        threads = range(block * BLOCK_THREADS, (block + 1) * BLOCK_THREADS)
        own = [stream[thread * THREAD_BYTES :][:READ_BYTES] for thread in threads]
        position, last = positions[block], positions[block + 1]
        for thread, bytes_ in zip(threads, own):
            count = sum(1 for _ in _codes(luts, bytes_, gaps[thread], last - position))
            end = min(position + count, last)
            for index, exponent in zip(range(position, end), _codes(luts, bytes_, gaps[thread], end - position)):
                rest = sign_mantissa[index]
                weights[index] = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
            position = end
        if position != last:
            raise Damaged(f"block {block} holds fewer weights than its positions say; copy or compress the model again")
    return torch.from_numpy(np.array(weights, np.uint16).view(np.int16)).view(torch.bfloat16)


def _codes(luts: list[list[int]], own: bytes, gap: int, most: int) -> Iterator[int]:
    """At most ``most`` exponents of the codes that start in the first 8 of the bytes ``own``, from bit ``gap`` on."""
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
        yield exponent
        start, most = start + length, most - 1


def decode_lanes(unit: Unit, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights of ``unit``, flat bfloat16: every thread a lane of tensors, all of one block range in step.

    Runs on the device of the unit's tensors. ``out``: where to write, bfloat16 [weights] on that device.
    """
    unit.check()
    device = unit.luts.device
    positions = torch.from_numpy(unit.positions()).to(device)
    gaps = torch.from_numpy(unpack_gaps(unit.gaps.cpu().numpy())).to(device, torch.int64)
    out = torch.empty(unit.weights, dtype=torch.bfloat16, device=device) if out is None else out
    bits = out.view(torch.int16)
    for first in range(0, unit.blocks, TOGETHER):
        last = min(first + TOGETHER, unit.blocks)
        lanes = _Lanes(unit, first, last, gaps[first * BLOCK_THREADS : last * BLOCK_THREADS])
        counts = lanes.count()
        starts = positions[first:last, None] + counts.cumsum(1) - counts
        limits = positions[first + 1 : last + 1]
        surplus = starts[:, -1] + counts[:, -1] - limits
        if (surplus < 0).any() or surplus[: unit.blocks - 1 - first].any():  # what follows the last code counts as codes
            raise Damaged("a block does not hold the weights that its positions say; copy or compress the model again")
        lanes.write(starts.flatten(), torch.minimum(starts + counts, limits[:, None]).flatten(), bits)
    return out


class _Lanes:
    """The threads of the blocks ``first`` to ``last``, each at its own bit of the stream."""

    def __init__(self, unit: Unit, first: int, last: int, gaps: torch.Tensor):
        self.unit = unit
        stream = unit.encoded_exponent[first * BLOCK_BYTES : last * BLOCK_BYTES + LONGEST // 8]
        missing = (last - first) * BLOCK_BYTES + LONGEST // 8 - stream.numel()
        words = torch.nn.functional.pad(stream, (0, missing)).view(-1, 4).to(torch.int64)
        words = words[:, 0] << 24 | words[:, 1] << 16 | words[:, 2] << 8 | words[:, 3]
        self.pairs = words[:-1] << 32 | words[1:]  # 64 bits from every fourth byte on
        # Links to tables that are not there end in -1, which as an index means 255: it and all from 240 on have no code.
        self.tables = torch.nn.functional.pad(unit.luts[:-1].flatten().to(torch.int64), (0, TABLES * 256), value=-1)
        self.lengths = torch.where(unit.luts[-1] > LONGEST, 0, unit.luts[-1]).to(torch.int64)
        self.lengths[EXPONENTS:] = 0
        self.blocks = last - first
        self.begin = torch.arange(gaps.numel(), device=gaps.device) * THREAD_BITS
        self.start = self.begin + gaps

    def count(self) -> torch.Tensor:
        """Codes that start in each thread's bytes, int64 [blocks, threads]."""
        counts = torch.zeros_like(self.start)
        lanes, at = torch.arange(len(counts), device=counts.device), self.start
        while lanes.numel():
            _, lengths = self._next(at)
            counts[lanes] += lengths > 0
            at = at + lengths
            inside = (lengths > 0) & (at < self.begin[lanes] + THREAD_BITS)
            lanes, at = lanes[inside], at[inside]
        return counts.view(self.blocks, -1)

    def write(self, positions: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
        """Decodes the weights from ``positions`` to ``ends`` (a number for every thread) into ``out``, as their bits."""
        some = positions < ends
        at, positions, ends = self.start[some], positions[some], ends[some]
        while at.numel():
            exponents, lengths = self._next(at)
            if not lengths.all():
                raise Damaged("the stream holds a code that the tables do not know; copy or compress the model again")
            rest = self.unit.sign_mantissa[positions].to(torch.int64)
            out[positions] = ((rest & 0x80) << 8 | exponents << 7 | rest & 0x7F).to(torch.int16)
            at, positions = at + lengths, positions + 1
            more = positions < ends
            at, positions, ends = at[more], positions[more], ends[more]

    def _next(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exponents and lengths of the codes at the bits ``at``; length 0 for bits that are no code."""
        window = self.pairs[at >> 5] >> (32 - (at & 31))
        exponents = self.tables[window >> 24 & 255]
        for shift in (16, 8, 0):
            deeper = (exponents >= EXPONENTS).nonzero().flatten()
            if not deeper.numel():
                break
            entries = (256 - exponents[deeper]) * 256 + (window[deeper] >> shift & 255)
            exponents[deeper] = self.tables[entries]
        return exponents, self.lengths[exponents]
