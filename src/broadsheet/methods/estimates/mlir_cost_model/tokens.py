"""Programs as tokens (paper: "ops only" and "ops and operands").

- ``ops``: of every operation in program order its name and its result types; operands are dropped.
- ``operands``: also the names of results and operands, and operand types where they differ from the result's, as the text
  prints them, so that the flow of data is visible. Names are canonical: %0, %1, ... by first appearance. Beside a name
  stands nothing that the text does not say.

A whole tensor type is one token where it is frequent; a rare one is its dtype and a token for the size of each dimension
(log2, in halves). Beside its number a token has two sizes, 0 where there are none: log2 of the operation's FLOPs or the
type's bytes, and of the type's last dimension (our addition: numbers that a network can calculate with, where tokens can
only be looked up). Regions stand between ``begin`` and ``end``. What does not affect cost (locations, names, layouts of
the printer) leaves no token; the attributes that do are numbers of contracted, reduced or batch dimensions (``dims`` and
so on) and the operation a reduction applies.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from .features import operation_flops, totals
from .stablehlo import Block, Function, Operation, TensorType

Scheme = Literal["ops", "operands"]
PAD, UNK = "<pad>", "<unk>"
#: attribute words that are kept: what a reduction applies, which comparison, which dimensions
_KEPT = re.compile(r"stablehlo\.\w+|LT|LE|GT|GE|EQ|NE|stride|contracting_dims|batching_dims|dims|dimensions|dim")


@dataclass(frozen=True)
class Tokens:
    """``words``: tokens before any vocabulary, types as one token each; ``flops``: of operations, 0 of other words;
    ``totals``: see `features.totals`; ``types``: what the words for types stand for."""

    words: tuple[str, ...]
    flops: dict[int, int]
    totals: tuple[float, ...]
    types: dict[str, TensorType]


def tokenise(function: Function, scheme: Scheme = "operands") -> Tokens:
    """Raises ValueError for an unknown scheme."""
    if scheme not in ("ops", "operands"):
        raise ValueError(f"the scheme is ops or operands, not {scheme!r}")
    words: list[str] = []
    types: dict[str, TensorType] = {}
    names: dict[str, str] = {}
    work: dict[int, int] = {}
    full = scheme == "operands"

    def kind(one: TensorType) -> None:
        words.append(one.text)
        types[one.text] = one

    def name(value: str) -> str:
        return names.setdefault(value, f"%{len(names)}")

    def values(given: Sequence[str]) -> None:
        for value in given:
            if full:
                words.append(name(value))
            kind(function.types[value])

    def operation(one: Operation) -> None:
        if count := operation_flops(one, function):
            work[len(words)] = count
        words.append(one.opcode)
        if full:
            words.extend(name(value) for value in one.operands)
            words.extend(_attributes(one))
            shown = one.types[0] if one.types else None
            for value in one.operands:
                if one.types and function.types[value] != shown:
                    kind(function.types[value])
        for place, result in enumerate(one.results):
            if full:
                words.append(name(result))
            kind(one.types[place])
        for region in one.regions:
            block(region)

    def block(one: Block) -> None:
        words.append("begin")
        values(one.arguments)
        for inner in one.operations:
            operation(inner)
        words.append("end")

    block(function.body)
    return Tokens(tuple(words), work, totals(function), types)


def _attributes(one: Operation) -> list[str]:
    """Kept words of the attributes, each with the numbers that follow it as one token: "dims[0,1]"."""
    found: list[str] = []
    open_word = False
    for word in one.attributes.split(" "):
        if _KEPT.fullmatch(word):
            found.append(word.removeprefix("stablehlo."))
            open_word = True
        elif word in ("[", "]"):
            if open_word:
                found[-1] += word
        elif open_word and word.isdigit() and found[-1][-1] in "[0123456789":
            found[-1] += ("," if found[-1][-1] != "[" else "") + word
        else:
            open_word = False
    return found


def program_id(function: Function) -> str:
    """A hash of the tokens with operands: equal for programs that differ in names, white space or locations alone."""
    return hashlib.sha256(" ".join(tokenise(function).words).encode()).hexdigest()[:16]


def detokenise(words: Sequence[str]) -> list[str]:
    """One line an operation, for a reader and for the test that nothing but names is lost: words joined, with indents."""
    lines, depth = list[str](), 0
    for word in words:
        if word == "end":
            depth -= 1
        if word in ("begin", "end") or not lines or lines[-1].strip() in ("begin", "end"):
            lines.append("  " * depth + word)
        else:
            lines[-1] += " " + word
        if word == "begin":
            depth += 1
    return lines


def decomposed(kind: TensorType) -> list[str]:
    """What stands for a type outside of the vocabulary."""
    return [f"<{kind.dtype}>", *(f"<{_half(size)}>" for size in kind.shape)]


def _half(size: int) -> str:
    return f"{round(2 * math.log2(size)) / 2:g}" if size > 0 else "0"


_NOTHING = (0.0, 0.0)


def _size(number: int) -> float:
    """FLOPs or bytes on a log scale, about standardised over programs that run for microseconds to milliseconds."""
    return (math.log2(1 + number) - 12) / 3


class Encoded(NamedTuple):
    """``numbers`` and ``sizes``: of each token; ``unknown``: share of tokens without a number of their own; ``cut``: how
    many
    tokens did not fit."""

    numbers: list[int]
    sizes: list[tuple[float, float]]
    totals: tuple[float, ...]
    unknown: float
    cut: int


@dataclass(frozen=True)
class Vocabulary:
    """Token -> number; padding is 0, the unknown 1. ``limit``: programs are cut after so many tokens."""

    scheme: Scheme
    words: tuple[str, ...]
    limit: int

    @classmethod
    def build(
        cls, programs: Sequence[Function], scheme: Scheme = "operands", groups: Sequence[Hashable] = (), least: int = 8
    ) -> Vocabulary:
        """Of the training programs alone: words (types too) that occur in ``least`` of them, and all decomposed pieces;
        ``limit`` is the 99th percentile of their lengths. With ``groups`` (one a program) a word must occur in two: a
        shape that only one kind of program has would be its name and not its size."""
        seen: Counter[str] = Counter()
        where: dict[str, set[Hashable]] = {}
        split = [tokenise(program, scheme) for program in programs]
        for tokens, group in zip(split, groups or range(len(split)), strict=True):
            pieces = {piece for kind in tokens.types.values() for piece in decomposed(kind)}
            found = set(tokens.words) | pieces
            seen.update(found)
            for word in found:
                where.setdefault(word, set()).add(group)
        words = sorted(w for w, n in seen.items() if n >= (2 if w[0] == "<" else least) and len(where[w]) > 1)
        built = cls(scheme, (PAD, UNK, *words), 10**9)
        lengths = sorted(len(built.encode(tokens).numbers) for tokens in split)
        return cls(scheme, built.words, lengths[min(len(lengths) - 1, math.ceil(0.99 * len(lengths)))] if lengths else 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words)})

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Tokens) -> Encoded:
        known: dict[str, int] = self._numbers  # type: ignore[attr-defined]  # set in __post_init__
        numbers: list[int] = []
        sizes: list[tuple[float, float]] = []
        types: dict[str, tuple[list[int], list[tuple[float, float]]]] = {}
        for place, word in enumerate(tokens.words):
            if word in tokens.types:
                if word not in types:
                    types[word] = self._type(tokens.types[word], known)
                numbers += types[word][0]
                sizes += types[word][1]
            else:
                numbers.append(known.get(word, 1))
                sizes.append((_size(tokens.flops[place]), 0.0) if place in tokens.flops else _NOTHING)
        unknown = numbers.count(1) / max(len(numbers), 1)
        return Encoded(numbers[: self.limit], sizes[: self.limit], tokens.totals, unknown, max(0, len(numbers) - self.limit))

    @staticmethod
    def _type(kind: TensorType, known: dict[str, int]) -> tuple[list[int], list[tuple[float, float]]]:
        parts = [kind.text] if kind.text in known else decomposed(kind)
        last = (math.log2(1 + kind.shape[-1]) - 5) / 2 if kind.shape else 0.0
        sizes = [(_size(kind.nbytes), last), *[_NOTHING] * (len(parts) - 1)]
        return [known.get(part, 1) for part in parts], sizes

    def to_json(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "words": list(self.words), "limit": self.limit}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Vocabulary:
        return cls(row["scheme"], tuple(row["words"]), row["limit"])
