"""Slow machines: one makes its stage slow, the stage its pipeline, the pipeline the step (MegaScale, section 6.3).
SIMULATED.

The paper: about 0.5 % of machines take about 10 % longer for the same forward computations, and without them MFU rose by
about 0.7 points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .plan import Execution, Model, System
from .schedule import of_costs, run_pipeline
from .simulator import Calibration, Levers, calibrated, costs, simulate, slowed


@dataclass(frozen=True)
class Slowdown:
    """MFU as shares of the peak. ``any_slow``: how likely a job has at least one slow machine; ``expected``: mean over
    jobs."""

    machines: int
    any_slow: float
    clean: float
    with_one: float
    expected: float


def slowdown(
    model: Model, system: System, execution: Execution, levers: Levers | None = None, calibration: Calibration | None = None
) -> Slowdown:
    """What slow machines cost a plan on average; `simulate` with and without them."""
    c = calibration or calibrated()
    machines = max(1, execution.num_procs // system.machine_size)

    def mfu(slow_share: float) -> float:
        return simulate(model, system, execution, levers, replace(c, slow_share=slow_share), check=False).mfu

    return Slowdown(machines, 1 - (1 - c.slow_share) ** machines, mfu(0.0), mfu(1.0), mfu(c.slow_share))


def played(
    model: Model, system: System, execution: Execution, slow: dict[int, float], levers: Levers | None = None,
    calibration: Calibration | None = None,
) -> float:  # fmt: skip
    """Seconds of one pipeline's step, event by event, with the given stages' forward passes slow (``{stage: 0.1}``)."""
    levers, c = levers or Levers(), calibration or calibrated()
    execution.fits(model)
    cost = costs(model, system, execution, levers, c)
    p, v, m = execution.pipeline_par, execution.pipeline_interleaving, execution.microbatches
    return run_pipeline(
        p, v, m, of_costs(execution, cost.forward, cost.backward, cost.output, slow), cost.hop, levers.pp_overlap
    ).seconds


def jobs(
    model: Model, system: System, execution: Execution, levers: Levers | None = None, calibration: Calibration | None = None,
    spread: float = 0.0, runs: int = 200, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """MFU of ``runs`` jobs, each placed on machines at random: why runs of the same job differ (the paper's Figure 6).

    Every machine's forward passes take longer by a factor: 1, or 1 + slow_forward for the slow share, times a log-normal of
    width ``spread`` (a share, about). A pipeline is as slow as its slowest stage, a step as its slowest pipeline. A machine
    is taken to hold one stage of one replica. Raises ValueError.
    """
    levers, c = levers or Levers(), calibration or calibrated()
    if spread < 0 or runs < 1:
        raise ValueError("spread must not be negative, and runs at least 1")
    rng = np.random.default_rng(seed)
    clean = simulate(model, system, execution, levers, c, stragglers=False, check=False)
    cost = costs(model, system, execution, levers, c)
    p, v, m = execution.pipeline_par, execution.pipeline_interleaving, execution.microbatches
    result = np.empty(runs)
    for run in range(runs):
        factors = 1 + c.slow_forward * (rng.random((execution.data_par, p)) < c.slow_share)
        if spread:
            factors = factors * rng.lognormal(0.0, spread, factors.shape)
        by_stage = np.maximum(factors.max(0) - 1, 0.0)
        delay = max(
            slowed(cost, v, m, levers.pp_overlap, float(by_stage[-1]), last=True),
            slowed(cost, v, m, levers.pp_overlap, float(by_stage[:-1].max(initial=0.0)), last=False),
        )
        result[run] = clean.mfu * clean.seconds / (clean.seconds + delay)
    return result
