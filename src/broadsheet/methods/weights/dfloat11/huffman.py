"""Prefix codes for exponents, and the lookup tables that decode them (section 2.3.1 of the paper).

The code is Huffman's over the counts of the 8-bit exponents and one *end symbol* of count 1, whose leading bits fill the
last byte of a stream. Ties are broken as dahuffman 0.4.2 does, which the official encoder stands on, so that equal counts
give equal codes: of nodes of one count, the one whose first symbol is smaller comes first, the end symbol first of all; the
first of two nodes that are joined gets the bit 0.

Two limits come from the tables. A code has at most 32 bits: as long as it has more, the counts of the 2, 3, 4 ... rarest
exponents are set to 1 and the code is built again. A table entry that is no exponent names one of at most 16 further
tables: hence exponents from 240 on cannot be stored (magnitudes from 2^113, infinities, NaN), and a code that needs more
tables is replaced, first by the canonical code of the same lengths, whose long codes share their first bytes, then by the
best code of at most 8 bits, which needs one table. No trained weights that we know of need that.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

#: exponents below this can be stored; larger table entries are links to further tables
EXPONENTS = 240
UNREPRESENTABLE = "has an infinity, NaN or magnitude of 2^113 or more, which DFloat11 cannot store"
#: bits of the longest code, and tables that links can reach
LONGEST, TABLES = 32, 16
#: the end symbol among the 257 symbols of a code
END = 256


@dataclass(frozen=True)
class Code:
    """A prefix code over 256 exponents and the end symbol.

    ``lengths``: uint8 [257], 0 for symbols without a code; ``values``: int64 [257], the code as a number.
    """

    lengths: np.ndarray
    values: np.ndarray

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    def in_order(self) -> list[int]:
        """The symbols by their codes, from 000... to 111..."""
        coded = np.flatnonzero(self.lengths)
        starts = self.values[coded] << (64 - 1 - self.lengths[coded].astype(np.int64))
        return coded[np.argsort(starts)].tolist()

    def prefixes(self) -> list[tuple[int, int]]:
        """(bytes, value) of all that precedes the last byte of a code: one lookup table each, the empty one first."""
        found: dict[tuple[int, int], None] = {(0, 0): None}
        for symbol in self.in_order():
            if symbol != END:
                length, value = int(self.lengths[symbol]), int(self.values[symbol])
                for whole in range(1, (length - 1) // 8 + 1):
                    found[whole, value >> (length - 8 * whole)] = None
        return sorted(found, key=lambda prefix: prefix[0])  # stable: by length, then by value

    def luts(self) -> np.ndarray:
        """The tables, uint8 [tables + 1, 256]; the last row holds the length of every exponent's code.

        Table 0 is indexed by a code's first byte. An entry below 240 is the exponent; an entry v from 240 on sends the
        next byte to table 256 - v. Between the entries of two codes stands the earlier one again, so that all
        completions of a code hit it; what no code claims copies what stands before it too.
        """
        prefixes = self.prefixes()
        numbers = {prefix: number for number, prefix in enumerate(prefixes)}
        entries = np.full((len(prefixes), 256), -1)
        for symbol in np.flatnonzero(self.lengths[:END]).tolist():
            length, value = int(self.lengths[symbol]), int(self.values[symbol])
            whole = (length - 1) // 8
            for depth in range(whole):
                table = numbers[depth, value >> (length - 8 * depth)]
                byte = value >> (length - 8 * depth - 8)
                entries[table, byte & 255] = 256 - numbers[depth + 1, byte]
            rest = length - 8 * whole
            entries[numbers[whole, value >> rest], (value << (8 - rest)) & 255] = symbol
        flat = entries.reshape(-1)
        filled = np.flatnonzero(flat >= 0)
        last = np.searchsorted(filled, np.arange(flat.size), side="right") - 1
        tables = flat[filled[last.clip(min=0)]].reshape(entries.shape)
        return np.concatenate([tables, self.lengths[None, :END]]).astype(np.uint8)


def code_of(counts: np.ndarray) -> Code:
    """The code for ``counts`` of exponents (int64 [256]). Raises ValueError for what cannot be stored."""
    if not counts.any():
        raise ValueError("there is nothing to encode")
    if counts[EXPONENTS:].any():
        raise ValueError(f"a tensor {UNREPRESENTABLE}")
    code = huffman(counts)
    rarest = np.argsort(np.where(counts > 0, counts, np.iinfo(np.int64).max), kind="stable")
    flattened = 2
    while code.longest > LONGEST:
        level = counts.copy()
        level[rarest[:flattened]] = 1
        code = huffman(level)
        flattened += 1
    if len(code.prefixes()) > TABLES:
        code = canonical(code.lengths)
    if len(code.prefixes()) > TABLES:
        code = canonical(limited_lengths(counts, 8))
    return code


def huffman(counts: np.ndarray) -> Code:
    """Huffman's code of ``counts`` (int64 [256]) and the end symbol, without limits."""
    # A node is (count, its first symbol, symbols); the end symbol goes before all others.
    heap = [(int(counts[symbol]), symbol, [symbol]) for symbol in np.flatnonzero(counts).tolist()]
    heap.append((1, -1, [END]))
    heapify(heap)
    lengths, values = [0] * 257, [0] * 257
    while len(heap) > 1:
        zero, one = heappop(heap), heappop(heap)
        for symbol in one[2]:
            values[symbol] |= 1 << lengths[symbol]
        for symbol in zero[2] + one[2]:
            lengths[symbol] += 1
        heappush(heap, (zero[0] + one[0], zero[1], zero[2] + one[2]))
    lengths_ = np.array(lengths, np.uint8)
    # A code before flattening may be longer than 63 bits; it is rebuilt, so that its values are never used.
    fits = lengths_.max() < 64
    return Code(lengths_, np.array(values if fits else [0] * 257, np.int64))


def canonical(lengths: np.ndarray) -> Code:
    """The code of these ``lengths`` in which codes of one length are consecutive and shorter ones come first."""
    values = np.zeros(257, np.int64)
    value = previous = 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda symbol: (lengths[symbol], symbol)):
        value <<= int(lengths[symbol]) - previous
        previous = int(lengths[symbol])
        values[symbol] = value
        value += 1
    return Code(lengths, values)


def limited_lengths(counts: np.ndarray, longest: int) -> np.ndarray:
    """Lengths of the best prefix code of ``counts`` and the end symbol with no code over ``longest`` bits: package-merge.

    Larmore and Hirschberg 1990: the cheapest 2(n - 1) of the coins and packages; a symbol's length is how often it is in
    them. Returns uint8 [257].
    """
    coins = [(int(counts[symbol]), [symbol]) for symbol in np.flatnonzero(counts).tolist()]
    coins = sorted([(1, [END]), *coins], key=lambda coin: coin[0])
    row = coins
    for _ in range(longest - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(row[::2], row[1::2])]
        row = sorted(coins + pairs, key=lambda coin: coin[0])
    lengths = np.zeros(257, np.uint8)
    for _, symbols in row[: 2 * (len(coins) - 1)]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths
