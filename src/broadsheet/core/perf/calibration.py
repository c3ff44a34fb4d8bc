"""From rated to reached: three scalars that turn a roofline into a prediction, fitted on measured operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from .hardware import Device, Efficiency, Origin


@dataclass(frozen=True)
class Sample:
    """A measured operator: operations, bytes, the rate it runs at, seconds."""

    operations: float
    nbytes: float
    dtype: str
    seconds: float


def _arrays(device: Device, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rated seconds of computing and of moving, and measured seconds."""
    compute = np.array([s.operations / device.peak(s.dtype) for s in samples])
    memory = np.array([s.nbytes / device.bandwidth for s in samples])
    return compute, memory, np.array([s.seconds for s in samples])


def fit(device: Device, samples: Sequence[Sample], origin: Origin = "measured", source: str = "") -> Efficiency:
    """``t = max(F / (eF·peak), Q / (eB·bandwidth)) + t0`` with the smallest mean absolute relative error on ``samples``.

    The scale of errors is relative, so that a decode step's microseconds weigh as much as a prefill's seconds. Nelder-Mead
    from several starts in the logarithms of the scalars: three parameters, a function with kinks. Raises ValueError for
    fewer than six samples.
    """
    if len(samples) < 6:
        raise ValueError(f"three scalars want at least six measured operators; got {len(samples)}")
    compute, memory, measured = _arrays(device, samples)

    def predicted(x: np.ndarray) -> np.ndarray:
        return np.maximum(compute / np.exp(x[0]), memory / np.exp(x[1])) + np.exp(x[2])

    def error(x: np.ndarray) -> float:
        return float(np.abs(predicted(x) / measured - 1).mean())

    least = float(np.log(measured.min()))
    starts = [(np.log(e), np.log(e), least - back) for e in (0.9, 0.6, 0.3) for back in (0.3, 2.0)]
    found = min(
        (
            minimize(error, start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10})
            for start in starts
        ),
        key=lambda result: result.fun,
    )
    scalars = np.exp(found.x)
    return Efficiency(float(scalars[0]), float(scalars[1]), float(scalars[2]), origin, source)


def errors(device: Device, samples: Sequence[Sample]) -> np.ndarray:
    """Relative errors (predicted / measured - 1) of ``device``'s roofline on measured operators."""
    return np.array([device.seconds(s.operations, s.nbytes, s.dtype) / s.seconds - 1 for s in samples])
