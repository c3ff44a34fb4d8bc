"""What can be counted in a program: FLOPs, bytes, operations by kind and size. Inputs of the trees, the line and the
roofline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log2, prod
from typing import Any

import numpy as np
from scipy.optimize import nnls

from .stablehlo import Function, Operation

Array = np.ndarray[Any, Any]
#: operations that move or name data; they count as bytes and not as FLOPs
_MOVES = frozenset(
    "broadcast_in_dim reshape transpose concatenate slice constant iota gather scatter pad convert reverse dynamic_slice "
    "dynamic_update_slice optimization_barrier bitcast_convert func.return return".split()
)


def operation_flops(one: Operation, function: Function) -> int:
    """Multiplications and additions: of contractions 2 x result x contracted size; of a reduction its input; of other
    arithmetic one for each element. A loop's body counts once: the text does not say how often it runs."""
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
    axes = _contracted_axes(one.attributes)
    if axes is not None:
        return prod(left[axis] for axis in axes)
    return left[-1] if left else 1


@lru_cache(maxsize=4096)
def _contracted_axes(attributes: str) -> tuple[int, ...] | None:
    """Of the left operand; None where the text does not say."""
    axes = re.search(r"contracting_dims \[ ((?:\d+ )*)\]", attributes) or re.search(
        r"lhs_contracting_dimensions = \[([\d, ]*)\]", attributes
    )
    return tuple(int(axis) for axis in re.findall(r"\d+", axes[1])) if axes else None


#: what takes many instructions an element
_TRANSCENDENTAL = frozenset(
    "exponential tanh logistic log log_plus_one exponential_minus_one sine cosine power rsqrt sqrt divide chlo.erf".split()
)
_CONTRACTIONS = frozenset(("dot_general", "dot", "convolution"))
_REDUCTIONS = frozenset(("reduce", "reduce_window"))
_FREE = frozenset(("constant", "func.return", "return"))
TOTALS = 8


@dataclass(frozen=True)
class Counts:
    """What one pass over a program counts; every model starts from it.

    ``flops``: of each of ``operations``; ``number`` and ``size``: by opcode, how many and their result bytes; ``totals``:
    the program in `TOTALS` numbers: FLOPs of contractions, of transcendental functions and divisions, inputs of reductions,
    FLOPs of the rest; bytes of all operands and results (as if nothing were fused), of the interface, of the largest
    value; operations.
    """

    function: Function
    operations: tuple[Operation, ...]
    flops: tuple[int, ...]
    number: dict[str, int]
    size: dict[str, int]
    totals: tuple[float, ...]


def count(function: Function) -> Counts:
    types, operations = function.types, tuple(function.walk())
    work = tuple(operation_flops(one, function) for one in operations)
    number: dict[str, int] = {}
    size: dict[str, int] = {}
    contractions = transcendental = reduced = rest = moved = 0
    for one, flops in zip(operations, work, strict=True):
        opcode = one.opcode
        made = 0
        for kind in one.types:
            made += kind.nbytes
        number[opcode] = number.get(opcode, 0) + 1
        size[opcode] = size.get(opcode, 0) + made
        if opcode not in _FREE:
            moved += made
            for name in one.operands:
                moved += types[name].nbytes
        if opcode in _CONTRACTIONS:
            contractions += flops
        elif opcode in _REDUCTIONS:
            reduced += flops
        elif opcode in _TRANSCENDENTAL:
            transcendental += flops
        else:
            rest += flops
    largest = max((kind.nbytes for kind in types.values()), default=0)
    found = (contractions, transcendental, reduced, rest, moved, interface(function), largest, len(operations))
    return Counts(function, operations, work, number, size, tuple(float(value) for value in found))


def flops(function: Function) -> float:
    """See `operation_flops`."""
    return float(sum(count(function).flops))


def interface(function: Function) -> float:
    """Bytes of arguments and results: what must be moved whatever is fused."""
    returned = function.operations[-1].operands if function.operations else ()
    return float(sum(function.types[name].nbytes for name in (*function.arguments, *returned)))


@dataclass(frozen=True)
class TotalScale:
    """Totals as inputs: their logarithms, about standardised, and for every target the logarithm of their weighted sum.

    Cost adds up, and a logarithm of parts cannot add them: the weights (not negative; the last is a constant) fit each
    target by least squares of relative errors.
    """

    weights: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, raw: Array, values: Array) -> TotalScale:
        """``raw`` [programs, TOTALS] and ``values`` [programs, targets], NaN where not known."""
        rows = []
        for column in values.T:
            known = ~np.isnan(column)
            scale = 1 / (1 + column[known, None])
            rows.append(tuple(nnls(_with_one(raw[known]) * scale, np.ones(known.sum()))[0].tolist()))
        return cls(tuple(rows))

    @property
    def width(self) -> int:
        return TOTALS + len(self.weights)

    def sums(self, raw: Array) -> Array:
        """log2 of the weighted sums, [programs, targets]."""
        return np.log2(np.maximum(_with_one(raw) @ np.array(self.weights).T, 1e-3))

    def __call__(self, raw: Array) -> Array:
        """[programs, width]."""
        logs = np.log2(1 + raw)
        return np.concatenate([(logs[:, :-1] - 16) / 3, logs[:, -1:] - 5, (self.sums(raw) - 5) / 4], 1)


def _with_one(raw: Array) -> Array:
    return np.concatenate([raw, np.ones((len(raw), 1))], 1)


@dataclass(frozen=True)
class Features:
    """Numbers of a program, for trees: for every known opcode its count and the log2 of its result bytes, and totals.

    ``sized`` False leaves the counts alone.
    """

    opcodes: tuple[str, ...]
    sized: bool = True

    @classmethod
    def build(cls, programs: Iterable[Counts], sized: bool = True) -> Features:
        """Opcodes of the training programs."""
        return cls(tuple(sorted({opcode for program in programs for opcode in program.number})), sized)

    def __call__(self, programs: Sequence[Counts]) -> Array:
        """[programs, features]."""
        return np.array([self.row(program) for program in programs], dtype=np.float64)

    def row(self, program: Counts) -> list[float]:
        number, size = program.number, program.size
        row = [float(number.get(name, 0)) for name in self.opcodes]
        if self.sized:
            row += [log2(1 + size.get(name, 0)) for name in self.opcodes]
            row += [log2(1 + value) for value in program.totals]
        return [*row, float(len(program.operations)), float(len(program.function.arguments))]
