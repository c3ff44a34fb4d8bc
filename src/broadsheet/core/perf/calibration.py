"""From rated to reached: three scalars that turn a roofline into a prediction, fitted on what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

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

    Errors are relative, so that a decode step's microseconds weigh as much as a prefill's seconds. Nelder-Mead from several
    starts in the logarithms of the scalars: three parameters, a function with kinks. Raises ValueError for fewer than six
    samples.
    """
    if len(samples) < 6:
        raise ValueError(f"three scalars want at least six measured operators or passes; got {len(samples)}")
    rows = [(at, *operator) for at, sample in enumerate(samples) for operator in sample.operators]
    starts_at = np.unique([row[0] for row in rows], return_index=True)[1]
    compute = np.array([operations / device.peak(dtype) for _, operations, _, dtype, _ in rows])
    memory = np.array([nbytes / device.bandwidth for _, _, nbytes, _, _ in rows])
    count = np.array([row[4] for row in rows])
    measured = np.array([sample.seconds for sample in samples])

    def error(x: np.ndarray) -> float:
        each = np.maximum(compute / np.exp(x[0]), memory / np.exp(x[1])) + np.exp(x[2])
        predicted = np.add.reduceat(each * count, starts_at)
        return float(np.abs(predicted / measured - 1).mean())

    least = float(np.log((measured / np.add.reduceat(count, starts_at)).min()))
    starts = [(np.log(e), np.log(e), least - back) for e in (0.9, 0.6, 0.3) for back in (0.3, 2.0)]
    options = {"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10}
    found = [minimize(error, start, method="Nelder-Mead", options=options) for start in starts]
    scalars = np.exp(min(found, key=lambda result: result.fun).x)
    return Efficiency(float(scalars[0]), float(scalars[1]), float(scalars[2]), origin, source)


def errors(device: Device, samples: Sequence[Sample]) -> np.ndarray:
    """Relative errors (predicted / measured - 1) of ``device`` on ``samples``."""
    return np.array([sample.rated(device) / sample.seconds - 1 for sample in samples])
