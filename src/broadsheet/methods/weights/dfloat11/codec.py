"""bfloat16 weights as a Huffman stream of exponents beside raw sign-and-mantissa bytes, and back (sections 2.2 and 2.3).

The bits of a bfloat16 are seeeeeee emmmmmmm. The exponents of a unit's weights are coded into one stream, most
significant bits first; sign and mantissa stand in a byte each. So that many threads can decode at once, the stream is cut
into the 8 bytes of a *thread* and the 4,096 bytes of a *block* of 512 threads, with

- for every thread the *gap*: bits from its first to the first code that starts in it, 0 to 31, in 5 bits;
- for every block the number of weights before the first one that starts in it, and the number of all at the end.

A unit is what is decoded together: the linear layers of a transformer block, or one linear or embedding. Its tensors and
their names are those of the official format (LeanModels/DFloat11, version 0.5.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from .huffman import END, TABLES, Code, code_of

THREAD_BYTES, BLOCK_THREADS = 8, 512
THREAD_BITS = 8 * THREAD_BYTES
BLOCK_BYTES = BLOCK_THREADS * THREAD_BYTES
#: bytes of the gaps of a block
GAP_BYTES = BLOCK_THREADS * 5 // 8
#: weights of a unit; the official decoder counts them in 32 signed bits
MOST_WEIGHTS = 2**31 - 1
#: weights encoded at a time: few enough that the intermediate arrays stay in a processor's cache
CHUNK = 1 << 16


MISPLACED = "output_positions do not lead through the unit; copy or compress the model again"


class Damaged(ValueError):
    """The tensors of a unit contradict each other; they were changed after they were written."""


@dataclass(frozen=True)
class Unit:
    """The weights of one unit, compressed.

    ``luts`` uint8 [tables + 1, 256]: see `huffman.Code.luts`; ``encoded_exponent`` uint8 [bytes]; ``sign_mantissa`` uint8
    [weights]; ``output_positions`` uint8 [4 * (blocks + 1)]: little-endian uint32; ``gaps`` uint8 [320 * blocks];
    ``split_positions`` int64 [tensors - 1]: where the second, third ... tensor of the unit begins.
    """

    luts: torch.Tensor
    encoded_exponent: torch.Tensor
    sign_mantissa: torch.Tensor
    output_positions: torch.Tensor
    gaps: torch.Tensor
    split_positions: torch.Tensor

    @property
    def weights(self) -> int:
        return self.sign_mantissa.numel()

    @property
    def blocks(self) -> int:
        return -(-self.encoded_exponent.numel() // BLOCK_BYTES)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    def sizes(self) -> list[int]:
        """How many weights each tensor of the unit has. Raises `Damaged`."""
        ends = [*self.split_positions.tolist(), self.weights]
        sizes = [end - start for start, end in zip([0, *ends], ends)]
        if self.split_positions.dtype != torch.int64 or self.split_positions.ndim != 1 or min(sizes) < 0:
            raise Damaged("split_positions do not divide the unit; copy or compress the model again")
        return sizes

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def check(self) -> None:
        """Raises `Damaged` unless shapes and dtypes fit each other; does not look at what the tensors hold."""
        rows = (self.encoded_exponent, self.sign_mantissa, self.output_positions, self.gaps)
        if any(tensor.dtype != torch.uint8 or tensor.ndim != 1 for tensor in rows):
            raise Damaged("the tensors of a unit are rows of uint8; copy or compress the model again")
        if self.luts.dtype != torch.uint8 or self.luts.ndim != 2 or self.luts.shape[1] != 256:
            raise Damaged("luts are no tables of 256 bytes; copy or compress the model again")
        if not 2 <= self.luts.shape[0] <= TABLES + 2:
            raise Damaged("luts must be 1 to 17 tables and the row of lengths; copy or compress the model again")
        blocks = self.blocks
        if not 0 < self.weights <= MOST_WEIGHTS or not blocks:
            raise Damaged("the unit is empty or too large; copy or compress the model again")
        if self.output_positions.numel() not in (4 * blocks, 4 * blocks + 4) or self.gaps.numel() != GAP_BYTES * blocks:
            raise Damaged("the stream is truncated, or gaps or output_positions are; copy or compress the model again")

    def positions(self) -> np.ndarray:
        """``output_positions`` as uint32 [blocks + 1], checked. Raises `Damaged`.

        The official encoder writes no position for a last block in which no code starts (the last code reaches into it and
        ends on a byte); it is added here.
        """
        positions = np.frombuffer(self.output_positions.cpu().numpy().tobytes(), "<u4")
        if positions.size == self.blocks:
            positions = np.append(positions, positions[-1:])
        # In uint32 a step back is a long one.
        if positions[0] or positions[-1] != self.weights or (positions[1:] - positions[:-1] > 8 * BLOCK_BYTES).any():
            raise Damaged(MISPLACED)
        return positions


def split(weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Exponents and sign-and-mantissa bytes, both uint8 [weights], of a flat bfloat16 tensor."""
    bits = weights.view(torch.int16).numpy().view(np.uint16)
    return (bits >> 7).astype(np.uint8), ((bits >> 8) & 0x80 | bits & 0x7F).astype(np.uint8)


def merge(exponents: np.ndarray, sign_mantissa: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16, uint16 [weights]: the inverse of `split`."""
    rest = sign_mantissa.astype(np.uint16)
    return (rest & 0x80) << 8 | exponents.astype(np.uint16) << 7 | rest & 0x7F


def exponent_counts(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """How often each exponent occurs in flat bfloat16 ``tensors``, int64 [256]."""
    counts = np.zeros(256, np.int64)
    for tensor in tensors:
        for chunk in tensor.split(CHUNK):
            counts += np.bincount(split(chunk)[0], minlength=256)
    return counts


def encode(tensors: Sequence[torch.Tensor], code: Code | None = None) -> Unit:
    """Compresses bfloat16 ``tensors`` of any shape into one unit, in this order.

    ``code``: the prefix code; the best one for these weights when None. Raises ValueError for another dtype and for weights
    that cannot be stored.
    """
    if reason := not_storable(tensors):
        raise ValueError(reason)
    if not 0 < sum(tensor.numel() for tensor in tensors) <= MOST_WEIGHTS:
        raise ValueError("a unit must have 1 to 2^31 - 1 weights; name its linear layers as units of their own")
    parts = [tensor.detach().cpu().reshape(-1) for tensor in tensors]
    counts = exponent_counts(parts)
    code = code or code_of(counts)
    if (counts[code.lengths[:END] == 0] > 0).any():
        raise ValueError("the code lacks exponents of these weights; leave the code out to have it made")
    stream = Stream(code, int(counts @ code.lengths[:END].astype(np.int64)))
    sign_mantissa = np.empty(int(counts.sum()), np.uint8)
    for part in parts:
        for chunk in part.split(CHUNK):
            exponents, rest = split(chunk)
            sign_mantissa[stream.written : stream.written + rest.size] = rest
            stream.write(exponents)
    encoded, gaps, positions = stream.finish()
    sizes = torch.tensor([part.numel() for part in parts])
    return Unit(
        torch.from_numpy(code.luts()),
        torch.from_numpy(encoded),
        torch.from_numpy(sign_mantissa),
        torch.from_numpy(positions.astype("<u4").view(np.uint8)),
        torch.from_numpy(gaps),
        sizes.cumsum(0)[:-1].clone(),
    )


def not_storable(tensors: Sequence[torch.Tensor]) -> str:
    """Why tensors of this dtype cannot be compressed, or ''."""
    for tensor in tensors:
        if tensor.dtype == torch.float16:
            return "float16 has 5 exponent bits, which hardly compress, and is not covered; give a bfloat16 model"
        if tensor.dtype != torch.bfloat16:
            name = str(tensor.dtype).removeprefix("torch.")
            return f"only bfloat16 is stored without loss, not {name}; convert the model yourself if that is meant"
    return ""


class Stream:
    """Codes written one after the other into 64-bit words, a word being what a thread decodes.

    ``bits``: of all codes. ``gaps`` uint8: where in a word its first code starts; ``before`` int64: the number of weights
    before that one, -1 as long as none starts there.
    """

    def __init__(self, code: Code, bits: int):
        self.code, self.bits = code, bits
        words = bits // THREAD_BITS + 2  # the last is written to only with nothing
        self.words, self.before = np.zeros(words, np.uint64), np.full(words, -1, np.int64)
        blocks = -(-bits // (8 * BLOCK_BYTES))
        self.gaps = np.zeros(max(blocks * BLOCK_THREADS, words), np.uint8)
        self.blocks, self.used, self.written = blocks, 0, 0

    def write(self, exponents: np.ndarray) -> None:
        from .kernel import write  # numba takes its time to import

        lengths, values = self.code.lengths, self.code.values
        self.used = write(exponents, lengths, values, self.used, self.written, self.words, self.gaps, self.before)
        self.written += exponents.size

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The stream, the packed gaps and the positions (as they stand in a `Unit`)."""
        word, offset = divmod(self.bits, THREAD_BITS)
        if missing := -offset % 8:  # bits of the last byte, which the leading bits of the end symbol fill
            length, value = int(self.code.lengths[END]), int(self.code.values[END])
            leading = (value << missing) >> length
            self.words[word] |= np.uint64(leading << (THREAD_BITS - offset - missing))
            if self.before[word] < 0:
                self.gaps[word], self.before[word] = offset, self.written
        encoded = self.words.astype(">u8").view(np.uint8)[: -(-self.bits // 8)].copy()
        positions = self.before[: self.blocks * BLOCK_THREADS : BLOCK_THREADS]
        # The last code may reach into a block in which none starts.
        positions = np.append(np.where(positions < 0, self.written, positions), self.written)
        return encoded, pack_gaps(self.gaps[: self.blocks * BLOCK_THREADS]), positions


def pack_gaps(gaps: np.ndarray) -> np.ndarray:
    """Numbers of 5 bits (uint8) one after the other, most significant bits first."""
    return np.packbits(np.unpackbits(gaps[:, None], axis=1)[:, 3:])


def unpack_gaps(packed: np.ndarray) -> np.ndarray:
    """The inverse of `pack_gaps` for a multiple of 8 numbers."""
    return np.packbits(np.unpackbits(packed).reshape(-1, 5), axis=1)[:, 0] >> 3
