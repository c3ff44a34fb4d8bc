"""Programs as graphs: one node an argument or operation, in program order, and an edge from every reader to what it reads.

What `tokens` spells out as names is an edge here, and a program is five to seven times shorter. Beside the paper; the
networks on tokens are its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from .features import Counts
from .stablehlo import Block
from .tokens import UNK, attribute_words, frequent

Array = np.ndarray[Any, Any]
#: of a node: FLOPs, result bytes, operand bytes, last and other dimensions of the result, last of the operand, readers
SIZES = 7
_CENTRE, _SPREAD = np.array([12, 12, 12, 5, 5, 5, 1.0]), np.array([3, 3, 3, 2, 2, 2, 1.0])


class Nodes(NamedTuple):
    """``words``: of each node; ``sizes`` [nodes, SIZES]: see `SIZES`, before any logarithm; ``edges``: (reader, read);
    ``last``: the last node that needs what a node makes; the function's arguments are held to its end."""

    words: list[tuple[str, ...]]
    sizes: list[tuple[int, ...]]
    edges: list[tuple[int, int]]
    last: list[int]


def nodes(program: Counts) -> Nodes:
    function = program.function
    types = function.types
    place_of: dict[str, int] = {}
    words: list[tuple[str, ...]] = []
    shapes: list[tuple[int, int, int, int, int, int]] = []
    edges: list[tuple[int, int]] = []
    work = iter(program.flops)

    def arguments(block: Block, parent: str) -> None:
        for name in block.arguments:
            kind = types[name]
            place_of[name] = len(words)
            words.append(_words("argument", "", kind.dtype, len(kind.shape), parent))
            last = kind.shape[-1] if kind.shape else 1
            shapes.append((0, kind.nbytes, 0, last, kind.elements // max(last, 1), 0))

    def walk(block: Block, parent: str) -> None:
        arguments(block, parent)
        for one in block.operations:
            place = len(words)
            made = read = 0
            for kind in one.types:
                made += kind.nbytes
            for name in one.operands:
                read += types[name].nbytes
                edges.append((place, place_of[name]))
            shape = one.types[0].shape if one.types else ()
            first = types[one.operands[0]].shape if one.operands else ()
            dtype = one.types[0].dtype if one.types else ""
            words.append(_words(one.opcode, one.attributes, dtype, len(shape), parent))
            last = shape[-1] if shape else 1
            elements = one.types[0].elements if one.types else 1
            shapes.append((next(work), made, read, last, elements // max(last, 1), first[-1] if first else 1))
            for name in one.results:
                place_of[name] = place
            for region in one.regions:
                walk(region, one.opcode)

    walk(function.body, "")
    readers, last = [0] * len(words), list(range(len(words)))
    for reader, read in edges:  # readers come in order
        readers[read] += 1
        last[read] = reader
    held = len(function.arguments)
    last[:held] = [len(words) - 1] * held
    return Nodes(words, [(*shape, count) for shape, count in zip(shapes, readers, strict=True)], edges, last)


@lru_cache(maxsize=65536)
def _words(opcode: str, attributes: str, dtype: str, rank: int, parent: str) -> tuple[str, ...]:
    inside = (f"in {parent}",) if parent else ()
    return (opcode, *attribute_words(attributes), f"{dtype}[{rank}]", *inside)


@dataclass(frozen=True)
class EncodedGraph:
    """``words`` [nodes, most words a node]: numbers, 0 where there are fewer; ``sizes`` [nodes, SIZES]: about standardised
    logarithms; ``edges`` [edges, 2]; ``last`` [nodes]; ``totals``: see `NodeVocabulary.encode`; ``unknown``: share of
    unknown words; ``cut``: nodes that the model's limit left out."""

    words: Array
    sizes: Array
    edges: Array
    last: Array
    totals: Array
    unknown: float
    cut: int

    @property
    def length(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class NodeVocabulary:
    """Word -> number, as `tokens.Vocabulary`; ``limit``: graphs are cut after so many nodes."""

    words: tuple[str, ...]
    limit: int

    @classmethod
    def build(cls, programs: Sequence[Counts], groups: Sequence[Hashable] = (), least: int = 8) -> NodeVocabulary:
        """See `tokens.frequent`; ``limit``: the longest training program."""
        split = [nodes(program) for program in programs]
        seen = [Counter(word for words in one.words for word in words) for one in split]
        return cls(frequent([set(one) for one in seen], groups, least), max(len(one.words) for one in split))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, program: Counts, totals: Array) -> EncodedGraph:
        """``totals``: what `TotalScale` makes of the program's."""
        known, found = self._numbers, nodes(program)
        unknown = self.words.index(UNK)
        numbers = [[known.get(word, unknown) for word in words] for words in found.words[: self.limit]]
        width, count = max(map(len, numbers), default=1), len(numbers)
        padded = np.array([row + [0] * (width - len(row)) for row in numbers], np.int64).reshape(count, width)
        sizes = (np.log2(1 + np.array(found.sizes[:count], np.float64).reshape(count, SIZES)) - _CENTRE) / _SPREAD
        edges = np.array(found.edges, np.int64).reshape(-1, 2)
        share = float((padded == unknown).sum() / max((padded > 0).sum(), 1))
        cut = len(found.words) - count
        if cut:
            edges = edges[(edges < count).all(1)]
        last = np.minimum(np.array(found.last[:count], np.int64), count - 1)
        return EncodedGraph(padded, sizes.astype(np.float32), edges, last, totals.astype(np.float32), share, cut)
