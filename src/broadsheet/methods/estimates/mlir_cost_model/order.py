"""Programs that differ in nothing but who reads what and when, for the proof that operands matter.

Counts of operations carry no order. Here two programs of a pair have the same operations on the same shapes, yet
different peaks of live bytes: ``operands`` pairs also have them in the same order and differ in their operands alone;
``order`` pairs compute the same values in another order. What looks at names of operations alone cannot tell the first
kind apart, a bag neither kind.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .labels import peak_live_bytes
from .stablehlo import parse

UNARY = ("tanh", "exponential", "negate", "logistic", "sine", "abs")
BINARY = ("add", "multiply", "subtract", "maximum")
SHAPES = ((16, 32), (32, 64), (64, 64), (8, 256), (128, 128))
PairKind = Literal["operands", "order"]

Reads = list[tuple[int, ...]]  #: of every operation the values it reads; value 0 is the argument, value i + 1 operation i's


def text(ops: list[str], reads: Reads, shape: tuple[int, int]) -> str:
    """The StableHLO of a program; it returns its last value."""
    kind = f"tensor<{shape[0]}x{shape[1]}xf32>"
    lines = [
        f"  %{place + 1} = stablehlo.{op} {', '.join(f'%{value}' for value in values)} : {kind}"
        for place, (op, values) in enumerate(zip(ops, reads, strict=True))
    ]
    return "\n".join([f"func.func @main(%0: {kind}) -> {kind} {{", *lines, f"  return %{len(ops)} : {kind}", "}"])


def program(rng: np.random.Generator) -> str:
    """8 to 24 operations; each reads the newest value, a binary one also an earlier one from a window of random width."""
    ops = _ops(rng)
    reads = _reads(rng, ops)
    if rng.random() < 0.5:
        ops, reads = _reordered(rng, ops, reads)
    return text(ops, reads, SHAPES[rng.integers(len(SHAPES))])


def _ops(rng: np.random.Generator) -> list[str]:
    count = int(rng.integers(8, 25))
    return [str(rng.choice(BINARY if rng.random() < 0.6 else UNARY)) for _ in range(count)]


def _reads(rng: np.random.Generator, ops: list[str]) -> Reads:
    window = int(rng.integers(1, len(ops) + 1))
    return [
        (place, int(rng.integers(max(0, place - window), place + 1))) if op in BINARY else (place,)
        for place, op in enumerate(ops)
    ]


def _wide(rng: np.random.Generator, ops: list[str]) -> Reads:
    """Operations that leave room for orders: the values form several chains, which the last operations join."""
    ends: list[int] = [0]
    reads: Reads = []
    for place, op in enumerate(ops):
        left = len(ops) - place  # every end but one must still be read
        if op in BINARY and len(ends) > 1 and (rng.random() < 0.4 or len(ends) >= left):
            pair = sorted(rng.choice(len(ends), 2, replace=False).tolist())
            reads.append((ends[pair[0]], ends[pair[1]]))
            ends = [end for at, end in enumerate(ends) if at not in pair]
        else:
            first = 0 if rng.random() < 0.5 and len(ends) + 1 < left // 2 else ends[int(rng.integers(len(ends)))]
            reads.append((first, 0) if op in BINARY else (first,))
            ends = [end for end in ends if end != first]
        ends.append(place + 1)
    return reads


def _reordered(rng: np.random.Generator, ops: list[str], reads: Reads) -> tuple[list[str], Reads]:
    """The same values in a random order that keeps operands before their readers; the last operation stays last."""
    deep = rng.random() < 0.5  # follow a chain to its end, or jump between chains
    names = {0: 0}
    new_ops: list[str] = []
    new_reads: Reads = []
    waiting = list(range(len(ops)))
    while waiting:
        ready = [
            p for p in waiting if all(value in names for value in reads[p]) and (p != len(ops) - 1 or len(waiting) == 1)
        ]
        fresh = [p for p in ready if any(value and names[value] == len(new_ops) for value in reads[p])]
        place = int(rng.choice(fresh if deep and fresh else ready))
        waiting.remove(place)
        new_ops.append(ops[place])
        new_reads.append(tuple(names[value] for value in reads[place]))
        names[place + 1] = len(new_ops)
    return new_ops, new_reads


def pair(rng: np.random.Generator, kind: PairKind = "operands", apart: int = 2) -> tuple[str, str]:
    """Two programs, (the one with the larger peak, the other); the peaks differ by at least ``apart`` tensors."""
    while True:
        shape, ops = SHAPES[rng.integers(len(SHAPES))], _ops(rng)
        if kind == "operands":
            both = [text(ops, _reads(rng, ops), shape) for _ in range(2)]
        else:
            reads = _wide(rng, ops)
            both = [text(*_reordered(rng, ops, reads), shape) for _ in range(2)]
        peaks = [peak_live_bytes(parse(one)) for one in both]
        if abs(peaks[0] - peaks[1]) >= apart * 4 * shape[0] * shape[1]:
            return (both[0], both[1]) if peaks[0] > peaks[1] else (both[1], both[0])


def programs(rng: np.random.Generator, count: int) -> list[str]:
    """Single programs of all kinds, to learn from."""
    found = []
    for _ in range(count):
        if rng.random() < 0.5:
            found.append(program(rng))
        else:
            ops = _ops(rng)
            found.append(text(*_reordered(rng, ops, _wide(rng, ops)), SHAPES[rng.integers(len(SHAPES))]))
    return found
