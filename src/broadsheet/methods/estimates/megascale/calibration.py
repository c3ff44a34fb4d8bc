"""The paper's tables: what was published, the fit of six constants to the small runs, and the large runs predicted.

Two fits, both honest about what they were shown:

* "rows": the eight runs at 256-1,024 GPUs alone. They say what all levers do together, and cannot tell them apart.
* "rows+ablation": those eight and the eight steps of the ablation, which is at 256 GPUs too. This one ships.

The eight runs at 3,072-12,288 GPUs, the 530B model and the runs of Korthikanti et al. are shown to neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from .plan import Execution, Model, System, folder, read, split
from .simulator import Calibration, Levers, simulate

Shown = Literal["rows", "rows+ablation"]
SYSTEM = "a100-200g"
#: (start, least, most) of each fitted constant
RANGES = {
    "matrix_efficiency": (0.75, 0.5, 0.95),
    "tp_efficiency": (0.6, 0.2, 1.0),
    "network_efficiency": (0.7, 0.1, 1.0),
    "p2p_seconds": (3e-4, 0.0, 3e-3),
    "late_seconds": (0.1, 0.0, 0.5),
    "step_seconds": (0.3, 0.0, 3.0),
}


@dataclass(frozen=True)
class Run:
    """A published run of the 175B model. ``system``: megatron (no lever) or megascale (all)."""

    system: str
    gpus: int
    batch: int
    seconds: float
    mfu: float  #: percent

    @property
    def levers(self) -> Levers:
        return Levers.all() if self.system == "megascale" else Levers()

    @property
    def execution(self) -> Execution:
        """TP 8, PP 8, six chunks a stage (section 6.1)."""
        return split(self.gpus, 8, 8, self.batch, 6)

    @property
    def small(self) -> bool:
        return self.gpus <= 1024


@cache
def published() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder() / "published.json").read_text(encoding="utf-8"))
    return data


def runs() -> list[Run]:
    return [Run(**row) for row in published()["strong_scaling"]]


def recomputed_mfu(model: Model, run: Run, peak_tflops: float, window: float = 0) -> float:
    """Percent, from a published iteration time."""
    return 100 * model.flops(run.batch * model.seq_size, window) / (run.seconds * run.gpus * peak_tflops * 1e12)


@cache
def subject() -> tuple[Model, System]:
    """The 175B model, with the window that MegaScale's own MFU column counts, and its cluster.

    The paper does not name the window; the one that fits its eight rows best (least squares) is taken, for all of them.
    """
    model, system = read(Model, "gpt-175b"), read(System, SYSTEM)
    rows = [run for run in runs() if run.system == "megascale"]

    def error(window: float) -> float:
        return sum((recomputed_mfu(model, run, system.tflops, window) - run.mfu) ** 2 for run in rows)

    window = minimize_scalar(error, bounds=(1, model.seq_size), method="bounded").x
    return replace(model, window=round(window)), system


def predicted(run: Run, c: Calibration, stragglers: bool = True) -> float:
    """Seconds of an iteration."""
    model, system = subject()
    return simulate(model, system, run.execution, run.levers, c, stragglers).seconds


def ablation(c: Calibration, stragglers: bool = True) -> dict[str, float]:
    """MFU (percent) of each rung: 256 GPUs, batch 256, at last three times that."""
    model, system = subject()
    plan = split(256, 8, 8, 256, 6)
    return {
        name: 100 * simulate(model, system, plan, levers, c, stragglers).mfu for name, levers in Levers.ladder(3).items()
    }


def published_ablation() -> dict[str, float]:
    return {row["lever"]: row["mfu"] for row in published()["ablation"]}


def steps(rungs: Mapping[str, float]) -> dict[str, float]:
    """What each lever adds."""
    return {after: rungs[after] - rungs[before] for before, after in pairwise(rungs)}


def fit(shown: Shown = "rows+ablation", stragglers: bool = True, **assumed: float) -> Calibration:
    """Least squares, all in points of MFU: the rows' and, with the ablation, what each of its steps adds.

    ``assumed`` replaces constants that are not fitted, to see how much hangs on them.
    """
    names = Calibration.fitted
    rows = [run for run in runs() if run.small]
    wanted = np.array(list(steps(published_ablation()).values()))

    def errors(values: Sequence[float]) -> np.ndarray:
        c = Calibration(**dict(zip(names, values)), **assumed)  # type: ignore[arg-type]  # tp_chunks is whole
        # at equal work MFU goes as 1 / seconds
        found = [run.mfu * (run.seconds / predicted(run, c, stragglers) - 1) for run in rows]
        if shown == "rows":
            return np.array(found)
        return np.concatenate([found, np.array(list(steps(ablation(c, stragglers)).values())) - wanted])

    start, least, most = (np.array([RANGES[name][place] for name in names]) for place in range(3))
    found = least_squares(errors, start, bounds=(least, most), x_scale=most)
    return Calibration(**{name: float(value) for name, value in zip(names, found.x)}, **assumed)  # type: ignore[arg-type]


def line(system: str) -> tuple[float, float]:
    """The rival without a model: seconds = slope * microbatches + intercept through the system's four small runs."""
    rows = [run for run in runs() if run.small and run.system == system]
    slope, intercept = np.polyfit([run.execution.microbatches for run in rows], [run.seconds for run in rows], 1)
    return float(slope), float(intercept)


def on_line(run: Run) -> float:
    slope, intercept = line(run.system)
    return slope * run.execution.microbatches + intercept


def held_out(seconds: Mapping[Run, float], system: str) -> tuple[float, float]:
    """Mean and largest absolute error (percent) on the system's four large runs."""
    errors = [100 * abs(value / run.seconds - 1) for run, value in seconds.items() if not run.small and run.system == system]
    return sum(errors) / len(errors), max(errors)
