"""What can be counted in a program: FLOPs, bytes, operations by kind and size. Inputs of the trees, the line and the roofline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import numpy as np

from .stablehlo import Function, Operation

#: operations that move or name data; they count as bytes and not as FLOPs
_MOVES = frozenset(
    "broadcast_in_dim reshape transpose concatenate slice constant iota gather scatter pad convert reverse dynamic_slice "
    "dynamic_update_slice optimization_barrier bitcast_convert func.return return".split()
)


def flops(function: Function) -> float:
    """Multiplications and additions: of contractions 2 x result x contracted size; of a reduction its input; of other
    arithmetic one for each element. A loop's body counts once: the text does not say how often it runs."""
    return float(sum(operation_flops(one, function) for one in function.walk()))


def operation_flops(one: Operation, function: Function) -> int:
    """See `flops`."""
    if not one.types or one.opcode in _MOVES:
        return 0
    size = one.types[0].elements
    if one.opcode in ("dot_general", "dot"):
        return 2 * size * _contracted(one, function)
    if one.opcode == "convolution":
        weight = function.types[one.operands[1]]
        order = re.search(r"x \[ ((?:\w+ )+)\]", one.attributes)
        place = order[1].split().index("o") if order and "o" in order[1].split() else 0
        return 2 * size * weight.elements // max(weight.shape[place], 1)
    if one.opcode in ("reduce", "reduce_window"):
        return max(function.types[name].elements for name in one.operands)
    return size


def _contracted(one: Operation, function: Function) -> int:
    left = function.types[one.operands[0]].shape
    axes = re.search(r"contracting_dims \[ ((?:\d+ )*)\]", one.attributes) or re.search(
        r"lhs_contracting_dimensions = \[([\d, ]*)\]", one.attributes
    )
    if axes:
        return prod(left[int(axis)] for axis in re.findall(r"\d+", axes[1]))
    return left[-1] if left else 1


def traffic(function: Function) -> float:
    """Bytes of all operands and results, as if nothing were fused."""
    total = 0
    for one in function.walk():
        if one.opcode not in ("constant", "func.return", "return"):
            total += sum(function.types[name].nbytes for name in one.operands) + sum(kind.nbytes for kind in one.types)
    return float(total)


def interface(function: Function) -> float:
    """Bytes of arguments and results: what must be moved whatever is fused."""
    returned = function.operations[-1].operands if function.operations else ()
    return float(sum(function.types[name].nbytes for name in (*function.arguments, *returned)))


def totals(function: Function) -> tuple[float, float, float, float]:
    """log2 / 16 of FLOPs, traffic, bytes of the interface, and bytes of the largest value."""
    largest = max((kind.nbytes for kind in function.types.values()), default=0)
    numbers = (flops(function), traffic(function), interface(function), largest)
    return tuple(log2(1 + number) / 16 for number in numbers)  # type: ignore[return-value]  # four of them


@dataclass(frozen=True)
class Features:
    """Numbers of a program, for trees: for every known opcode its count and the log2 of its result bytes, and totals.

    ``sized`` False leaves the counts alone.
    """

    opcodes: tuple[str, ...]
    sized: bool = True

    @classmethod
    def build(cls, programs: Iterable[Function], sized: bool = True) -> Features:
        """Opcodes of the training programs."""
        return cls(tuple(sorted({one.opcode for program in programs for one in program.walk()})), sized)

    def __call__(self, programs: Sequence[Function]) -> np.ndarray[Any, Any]:
        """[programs, features]."""
        return np.array([self.row(program) for program in programs], dtype=np.float64)

    def row(self, program: Function) -> list[float]:
        count: Counter[str] = Counter()
        size: Counter[str] = Counter()
        for one in program.walk():
            count[one.opcode] += 1
            size[one.opcode] += sum(kind.nbytes for kind in one.types)
        row = [float(count[name]) for name in self.opcodes]
        if self.sized:
            row += [log2(1 + size[name]) for name in self.opcodes]
            row += totals(program)
        return [*row, float(sum(count.values())), float(len(program.arguments))]
