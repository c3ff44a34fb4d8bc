"""Programs as tokens (paper: "ops only" and "ops and operands").

- ``ops``: of every operation in program order its name and its result types; operands are dropped.
- ``operands``: also the names of results and operands, and operand types where they differ from the result's, as the text
  prints them, so that the flow of data is visible. Names are canonical: %0, %1, ... by first appearance. Beside a name
  stands nothing that the text does not say.

A whole tensor type is one token where it is frequent; a rare one is its dtype and a token for the size of each dimension
(log2, in halves). Regions stand between ``begin`` and ``end``. What does not affect cost (locations, names, layouts of
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
from functools import lru_cache
from typing import Literal, NamedTuple

from .stablehlo import Block, Function, Operation, TensorType

Scheme = Literal["ops", "operands"]
PAD, UNK = "<pad>", "<unk>"
#: attribute words that are kept: what a reduction applies, which comparison, which dimensions
_KEPT = re.compile(r"stablehlo\.\w+|LT|LE|GT|GE|EQ|NE|stride|contracting_dims|batching_dims|dims|dimensions|dim")


@dataclass(frozen=True)
class Tokens:
    """``words``: tokens before any vocabulary, types as one token each; ``types``: what the words for types stand for."""

    words: tuple[str, ...]
    types: dict[str, TensorType]


def tokenise(function: Function, scheme: Scheme = "operands") -> Tokens:
    """Raises ValueError for an unknown scheme."""
    if scheme not in ("ops", "operands"):
        raise ValueError(f"the scheme is ops or operands, not {scheme!r}")
    words: list[str] = []
    types: dict[str, TensorType] = {}
    names: dict[str, str] = {}
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
        words.append(one.opcode)
        if full:
            words.extend(name(value) for value in one.operands)
            words.extend(attribute_words(one.attributes))
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
    return Tokens(tuple(words), types)


@lru_cache(maxsize=4096)
def attribute_words(attributes: str) -> tuple[str, ...]:
    """Kept words of the attributes, each with the numbers that follow it as one token: "dims[0,1]"."""
    found: list[str] = []
    open_word = False
    for word in attributes.split(" "):
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
    return tuple(found)


def frequent(seen: Sequence[set[str]], groups: Sequence[Hashable] = (), least: int = 8) -> tuple[str, ...]:
    """Padding, the unknown word, and the words that ``least`` programs have (of pieces of types, "<...>", two). With
    ``groups`` (one a program) a word must occur in two: what only one kind of program has would be its name."""
    number = Counter(word for words in seen for word in words)
    where: dict[str, set[Hashable]] = {}
    for words, group in zip(seen, groups or range(len(seen)), strict=True):
        for word in words:
            where.setdefault(word, set()).add(group)
    return (PAD, UNK, *sorted(w for w, n in number.items() if n >= (2 if w[0] == "<" else least) and len(where[w]) > 1))


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


class Encoded(NamedTuple):
    """``numbers``: of each token; ``unknown``: share of tokens without a number of their own; ``cut``: how
    many tokens did not fit."""

    numbers: list[int]
    unknown: float
    cut: int

    @property
    def length(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Vocabulary:
    """Token -> number; padding is 0, the unknown 1. ``limit``: programs are cut after so many tokens."""

    words: tuple[str, ...]
    limit: int

    @classmethod
    def build(cls, split: Sequence[Tokens], groups: Sequence[Hashable] = (), least: int = 8) -> Vocabulary:
        """Of the training programs alone: their `frequent` words (types too); ``limit`` is the 99th percentile of their
        lengths."""
        seen = [
            set(tokens.words) | {piece for kind in tokens.types.values() for piece in decomposed(kind)} for tokens in split
        ]
        built = cls(frequent(seen, groups, least), 10**9)
        lengths = sorted(len(built.encode(tokens).numbers) for tokens in split)
        return cls(built.words, lengths[min(len(lengths) - 1, math.ceil(0.99 * len(lengths)))] if lengths else 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_numbers", {word: number for number, word in enumerate(self.words)})

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Tokens) -> Encoded:
        known: dict[str, int] = self._numbers  # type: ignore[attr-defined]  # set in __post_init__
        parts = {word: [word] if word in known else decomposed(kind) for word, kind in tokens.types.items()}
        numbers = [known.get(part, 1) for word in tokens.words for part in parts.get(word, (word,))]
        unknown = numbers.count(1) / max(len(numbers), 1)
        return Encoded(numbers[: self.limit], unknown, max(0, len(numbers) - self.limit))
