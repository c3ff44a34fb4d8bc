"""From rated to reached: three scalars that turn a roofline into a prediction, fitted on what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, hstack, vstack

from .hardware import Device, Efficiency, Origin
from .ops import Op


@dataclass(frozen=True)
class Sample:
    """Something measured: its operators, (operations, bytes, dtype, how often), and the seconds of all together."""

    operators: tuple[tuple[float, float, str, float], ...]
    seconds: float

    @classmethod
    def one(cls, operations: float, nbytes: float, dtype: str, seconds: float) -> Sample:
        """A single operator."""
        return cls(((operations, nbytes, dtype, 1.0),), seconds)

    @classmethod
    def of(cls, table: Iterable[Op], seconds: float) -> Sample:
        """A whole pass of a model on one rank."""
        return cls(tuple((op.operations, op.nbytes, op.dtype, float(op.count)) for op in table), seconds)

    @property
    def operations(self) -> float:
        return sum(operations * count for operations, _, _, count in self.operators)

    @property
    def nbytes(self) -> float:
        return sum(nbytes * count for _, nbytes, _, count in self.operators)

    def rated(self, device: Device) -> float:
        """Seconds that ``device`` takes, by its roofline and efficiency."""
        return sum(device.seconds(operations, nbytes, dtype) * count for operations, nbytes, dtype, count in self.operators)


def fit(device: Device, samples: Sequence[Sample], origin: Origin = "measured", source: str = "") -> Efficiency:
    """``t = Σ (max(F / (eF·peak), Q / (eB·bandwidth)) + t0)`` with the smallest mean absolute relative error on ``samples``.

    Errors are relative, so that a decode step's microseconds weigh as much as a prefill's seconds. Which side of the maximum
    an operator is on depends on its intensity and on eF / eB alone: between two neighbouring intensities the times are
    linear in (1 / eF, 1 / eB, t0), and a linear program finds the best three scalars. The best of all intervals is the best
    there is; above 64 intensities a coarse pass picks the neighbourhood in which all are tried. A scalar that binds nothing
    measured stays at the rated 1. Raises ValueError for fewer than six samples.
    """
    if len(samples) < 6:
        raise ValueError(f"three scalars want at least six measured operators or passes; got {len(samples)}")
    rows = [(at, *operator) for at, sample in enumerate(samples) for operator in sample.operators]
    starts_at = np.unique([row[0] for row in rows], return_index=True)[1]
    count = np.array([row[4] for row in rows])
    measured, n = np.array([sample.seconds for sample in samples]), len(samples)

    def relative(each: np.ndarray) -> np.ndarray:
        return np.add.reduceat(each * count, starts_at) / measured

    compute = np.array([operations / device.peak(dtype) for _, operations, _, dtype, _ in rows])
    memory = np.array([nbytes / device.bandwidth for _, _, nbytes, _, _ in rows])
    overhead = relative(np.ones(len(rows)))
    unit = 1 / float(np.median(overhead))  # of t0, so that the program's three unknowns are of one size
    turns = np.divide(compute, memory, out=np.zeros(len(rows)), where=memory > 0)
    turns = np.unique(turns[turns > 0].round(12))
    edges = np.concatenate(([turns[0] / 1e3], turns, [turns[-1] * 1e3])) if len(turns) else np.array([1e-3, 1e3])

    @cache
    def best(at: int) -> tuple[float, tuple[float, float, float]]:
        """The smallest error with eF / eB between two neighbouring edges, and the scalars that reach it."""
        low, high = edges[at], edges[at + 1]
        waits = memory * np.sqrt(low * high) > compute
        of_compute, of_memory = relative(np.where(waits, 0, compute)), relative(np.where(waits, memory, 0))
        # two rows more than samples: what nothing binds is drawn to 1, by less than what any sample could lose
        terms = np.vstack((np.column_stack((of_compute, of_memory, overhead * unit)), 1e-7 * np.eye(2, 3)))
        wanted = np.concatenate((np.ones(n), [1e-7, 1e-7]))
        between = np.array([[low, -1.0, 0.0], [-high, 1.0, 0.0]])
        above = csr_array(np.vstack((terms, -terms, between)))
        slack = vstack((-eye_array(n + 2), -eye_array(n + 2), csr_array((2, n + 2))))
        found = linprog(
            np.concatenate((np.zeros(3), np.ones(n + 2))),
            A_ub=hstack((above, slack)),
            b_ub=np.concatenate((wanted, -wanted, [0.0, 0.0])),
            bounds=[(1e-3, None), (1e-3, None), *[(0, None)] * (n + 3)],
        )
        return float(found.fun), (float(found.x[0]), float(found.x[1]), float(found.x[2]) * unit)

    last, step = len(edges) - 2, 1 + len(edges) // 64
    coarse = min(range(0, last + 1, step), key=lambda at: best(at)[0])
    nearby = range(max(0, coarse - step), min(last, coarse + step) + 1)
    slowness, wait, overhead_s = best(min(nearby, key=lambda at: best(at)[0]))[1]
    return Efficiency(1 / slowness, 1 / wait, overhead_s, origin, source)


def errors(device: Device, samples: Sequence[Sample]) -> np.ndarray:
    """Relative errors (predicted / measured - 1) of ``device`` on ``samples``."""
    return np.array([sample.rated(device) / sample.seconds - 1 for sample in samples])
