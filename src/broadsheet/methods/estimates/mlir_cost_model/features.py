"""What can be counted in a program: FLOPs, bytes, operations by kind and size. Inputs of the trees, the line and the
roofline."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


#: what takes many instructions an element
_TRANSCENDENTAL = frozenset(
    "exponential tanh logistic log log_plus_one exponential_minus_one sine cosine power rsqrt sqrt divide chlo.erf".split()
)
TOTALS = 8


def totals(function: Function) -> tuple[float, ...]:
    """A program in `TOTALS` numbers: FLOPs of contractions, of transcendental functions and divisions, inputs of reductions,
    FLOPs of the rest; traffic, bytes of the interface, of the largest value; operations."""
    contractions = transcendental = rest = reduced = count = 0
    for one in function.walk():
        work = operation_flops(one, function)
        count += 1
        if one.opcode in ("dot_general", "dot", "convolution"):
            contractions += work
        elif one.opcode in ("reduce", "reduce_window"):
            reduced += work
        elif one.opcode in _TRANSCENDENTAL:
            transcendental += work
        else:
            rest += work
    largest = max((kind.nbytes for kind in function.types.values()), default=0)
    found = (contractions, transcendental, reduced, rest, traffic(function), interface(function), largest, count)
    return tuple(float(number) for number in found)


@dataclass(frozen=True)
class TotalScale:
    """Totals as inputs: their logarithms, about standardised, and one more, the logarithm of their weighted sum.

    Cost adds up, and a logarithm of parts cannot add them: the weights (not negative; the last is a constant) fit the
    first target by least squares of relative errors.
    """

    weights: tuple[float, ...]

    @classmethod
    def fit(cls, raw: Array, values: Array) -> TotalScale:
        """``raw`` [programs, TOTALS] and one target [programs]; NaN where it is not known."""
        known = ~np.isnan(values)
        scale = 1 / (1 + values[known, None])
        return cls(tuple(nnls(_with_one(raw[known]) * scale, np.ones(known.sum()))[0].tolist()))

    def __call__(self, raw: Array) -> Array:
        """[programs, TOTALS + 1]."""
        logs = np.log2(1 + raw)
        added = np.log2(np.maximum(_with_one(raw) @ np.array(self.weights), 1e-3))[:, None]
        return np.concatenate([(logs[:, :-1] - 16) / 3, logs[:, -1:] - 5, (added - 5) / 2], 1)


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
    def build(cls, programs: Iterable[Function], sized: bool = True) -> Features:
        """Opcodes of the training programs."""
        return cls(tuple(sorted({one.opcode for program in programs for one in program.walk()})), sized)

    def __call__(self, programs: Sequence[Function]) -> Array:
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
            row += [log2(1 + number) for number in totals(program)]
        return [*row, float(sum(count.values())), float(len(program.arguments))]
