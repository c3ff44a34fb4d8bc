"""MegaScale (Jiang et al., NSDI 2024, arXiv 2402.15627): training a language model on more than 10,000 GPUs.

    report = MegaScale(model="gpt-175b", gpus=12_288, batch=6144).estimate()
    for table in report.tables(): ...
    report.save("out")        # the pipeline as a Chrome trace, the simulated failures as CSV

From a model, a cluster and a parallel plan: the time of a step by what takes it, MFU with every lever of the paper on
its own rung, memory, what slow machines and failures cost, how long communication groups take to start. All of it is
SIMULATED: six constants were fitted to the paper's runs at 256-1,024 GPUs (`calibration`), and say nothing of other
clusters until they are fitted there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from broadsheet.core.perf.events import Trace
from broadsheet.methods.estimates.base import Cell, Report, Table

from .fabric import remedies
from .faults import DAY, FaultModel, FaultReport, read_csv, report_of, to_csv
from .groups import Topology, messages, store_seconds
from .plan import GIB, Execution, Model, System, check_memory, folder, positive, read, split, whole
from .schedule import of_costs, run_pipeline
from .simulator import Calibration, Levers, StepReport, calibrated, costs, simulate
from .stragglers import Slowdown, slowdown

__all__ = [
    "Calibration", "Execution", "FaultModel", "Levers", "MegaScale", "MegaScaleReport", "Model", "StepReport", "System",
    "calibrated", "simulate",
]  # fmt: skip

SIMULATED = "SIMULATED, with constants fitted to the paper's runs at 256-1,024 A100"
#: what is shown for each kind of time in a step
WORDS = {
    "compute": "forward and backward passes", "output": "output layer (last stage)", "bubble": "pipeline bubble",
    "pipeline_parallel": "waiting for pipeline messages", "stragglers": "waiting for slow machines",
    "data_parallel": "exposed data-parallel traffic", "optimizer": "optimiser", "late": "waiting for late ranks",
    "fixed": "what no part explains (fitted)",
}  # fmt: skip


@dataclass(frozen=True)
class MegaScale:
    """A training job. ``model``, ``system``, ``execution``: a built-in name or a JSON file (see `plan`).

    Without ``execution``, the plan is ``gpus`` split into ``tensor_par`` x ``pipeline_par`` and what is left for data,
    with a ``batch`` of sequences and ``interleaving`` chunks a stage. ``levers``: "all", "none", or names such as
    "tp_overlap,pp_overlap,lamb=3". ``window`` of sliding attention in tokens; 0: the share of the sequence that the
    paper's own MFU column counts. ``node_mtbf_days``: mean time between failures of a machine; the default makes 100
    restarts in four weeks of 12,288 GPUs (the paper: over 100 in several weeks). Raises ValueError.
    """

    model: str = "gpt-175b"
    system: str = "a100-200g"
    execution: str = ""
    gpus: int = 12_288
    batch: int = 6144
    tensor_par: int = 8
    pipeline_par: int = 8
    interleaving: int = 6
    levers: str = "all"
    window: int = 0
    node_mtbf_days: float = 430.0

    def __post_init__(self) -> None:
        whole(
            "megascale", gpus=self.gpus, batch=self.batch, tensor_par=self.tensor_par, pipeline_par=self.pipeline_par,
            interleaving=self.interleaving,
        )  # fmt: skip
        positive("megascale", node_mtbf_days=self.node_mtbf_days)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"megascale: window is a number of tokens, or 0 for the paper's share, not {self.window!r}")
        Levers.named(self.levers)

    def plan(self) -> tuple[Model, System, Execution]:
        """What the names mean. Raises ValueError."""
        model, system = read(Model, self.model), read(System, self.system)
        window = self.window or model.window or round(published_window() * model.seq_size)
        if self.execution:
            plan: Execution = read(Execution, self.execution)
        else:
            plan = split(self.gpus, self.tensor_par, self.pipeline_par, self.batch, self.interleaving)
        plan.fits(model)
        return replace(model, window=window), system, plan

    def estimate(
        self, days: float = 28.0, interval: float = 0.0, faults: str = "", wall_seconds: float = 0.0, save: float = 10.0,
        seed: int = 0, check: bool = True,
    ) -> MegaScaleReport:  # fmt: skip
        """Simulates a step, and ``days`` of failures with a checkpoint every ``interval`` seconds (0: the best), each
        stalling training for ``save`` seconds.

        ``faults``: a fault trace (CSV) of a real run of ``wall_seconds``, reported instead of simulated failures. ``check``:
        memory that does not suffice is an error. Raises ValueError.
        """
        for name, value in (("days", days), ("interval", interval), ("wall_seconds", wall_seconds), ("save", save)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} must be a number from 0, not {value!r}")
        model, system, execution = self.plan()
        levers = Levers.named(self.levers)
        step = simulate(model, system, execution, levers, check=False)
        if check:
            check_memory(step.memory, system)
        machines = max(1, -(-execution.num_procs // system.machine_size))
        job = FaultModel(machines, self.node_mtbf_days * DAY, step.seconds, interval, save=save)
        if faults:
            incidents = read_csv(faults)
            run = report_of(incidents, wall_seconds or max((one.resumed_at for one in incidents), default=0.0), step.seconds)
        else:
            run = job.run(days * DAY, seed)
        rungs = {
            name: simulate(model, system, execution, rung, check=False)
            for name, rung in Levers.ladder(max(levers.lamb, 1)).items()
        }
        if levers.lamb == 1:
            del rungs["lamb"]
        slow = slowdown(model, system, execution, levers)
        return MegaScaleReport(self, model, system, execution, levers, step, rungs, slow, job, run, bool(faults))


@dataclass(frozen=True)
class MegaScaleReport(Report):
    """What `MegaScale.estimate` found. ``run``: failures, simulated or (``traced``) from a trace."""

    job: MegaScale
    model: Model
    system: System
    execution: Execution
    levers: Levers
    step: StepReport
    rungs: Mapping[str, StepReport]
    slow: Slowdown
    faults: FaultModel
    run: FaultReport
    traced: bool

    def tables(self) -> list[Table]:
        return [
            self._step(),
            self._ladder(),
            self._memory(),
            self._stragglers(),
            self._faults(),
            self._start(),
            self._network(),
        ]

    def _step(self) -> Table:
        step, plan = self.step, self.execution
        rows = [(WORDS[name], value, 100 * value / step.seconds) for name, value in step.parts.items()]
        rows.append(("step", step.seconds, 100.0))
        note = (
            f"{SIMULATED}. {self.model.name} on {plan.num_procs} processors (TP {plan.tensor_par}, PP {plan.pipeline_par}, "
            f"DP {plan.data_par}), batch {plan.batch_size * self.levers.lamb}: MFU {100 * step.mfu:.1f} %, "
            f"{step.tokens_per_second:,.0f} tokens/s."
        )
        return Table("One step", ("part", "seconds", "%"), tuple(rows), note)

    def _ladder(self) -> Table:
        mfu = [100 * rung.mfu for rung in self.rungs.values()]
        added = [None, *(b - a for a, b in pairwise(mfu))]
        rows = [(name, self.rungs[name].seconds, *of) for name, *of in zip(self.rungs, mfu, added)]
        note = f"{SIMULATED}. Each rung keeps those above."
        if self.levers.lamb > 1:
            note += f" With lamb the batch is {self.levers.lamb} times as large."
        return Table("Levers, one after the other", ("lever", "seconds", "MFU %", "+"), tuple(rows), note)

    def _memory(self) -> Table:
        rows = [(name, value / GIB) for name, value in self.step.memory.items()]
        rows.append(("in all", sum(value for _, value in rows)))
        return Table(
            "Memory of the fullest GPU", ("part", "GiB"), tuple(rows), f"Of {self.system.memory_gib:g} GiB. By formula."
        )

    def _stragglers(self) -> Table:
        slow = self.slow
        rows = (
            ("no slow machine", 1 - slow.any_slow, 100 * slow.clean),
            ("on average", None, 100 * slow.expected),
            ("slow in every stage", None, 100 * slow.with_one),
        )
        note = f"{SIMULATED}. {slow.machines} machines, of which 0.5 % are slow: 10 % longer forward passes (the paper's)."
        return Table("Slow machines", ("case", "probability", "MFU %"), rows, note)

    def _faults(self) -> Table:
        run, job = self.run, self.faults
        rows: list[tuple[str, float | int | None, str]] = [
            ("restarts", len(run.incidents), ""),
            ("effective training time", 100 * run.effective, "%"),
            ("handled without a person", _known(100 * run.automatic), "%"),
            ("until a failure is seen, mean", _known(run.detect_seconds / 60), "min"),
            ("until training goes on, mean", _known(run.down_seconds / 60), "min"),
            ("until lost work is caught up, mean", _known(run.catch_up_seconds / 60), "min"),
        ]
        if self.traced:
            note = f"From a fault trace of {run.seconds / DAY:.2f} days; a step is taken as {run.step_seconds:.2f} s."
        else:
            rows += [
                ("checkpoint every", (job.interval or job.best_interval()) / 60, "min"),
                ("best interval", job.best_interval() / 60, "min"),
                ("sqrt(2 C MTBF)", job.young_interval / 60, "min"),
            ]
            note = (
                f"SIMULATED: {run.seconds / DAY:g} days, a failure every {job.mtbf / 3600:.1f} h on average "
                f"(assumed: {job.node_mtbf / DAY:g} days a machine); a save stalls {job.save:g} s."
            )
        return Table("Failures", ("what", "value", "unit"), tuple(rows), note)

    def _start(self) -> Table:
        plan = self.execution
        topology = Topology(plan.tensor_par, plan.pipeline_par, plan.data_par)
        ways = {"a global barrier after every group": False, "one after each dimension": True}
        stores = store_seconds()
        rows: list[tuple[Cell, ...]] = []
        for name, ordered in ways.items():
            count = messages(topology, ordered)
            rows.append((name, count, *(count * seconds for seconds in stores.values())))
        note = (
            "Requests are counted by the protocol; seconds are SIMULATED: one request after the other, at the speed "
            "with which the paper's stores answered 2,048 processes."
        )
        columns = ("way", "requests", *(f"{name} store, s" for name in stores))
        return Table("Starting communication groups", columns, tuple(rows), note)

    def _network(self) -> Table:
        rows = tuple((name, 100 * one.none, 100 * one.mean, 100 * one.slowest) for name, one in remedies().items())
        note = (
            "SIMULATED: flows hashed to the 32 uplinks of a switch, 400G each. A ring is as fast as its slowest "
            "flow. Not part of the step's time: the fitted efficiency of the network has it."
        )
        return Table("Flows that meet on an uplink", ("flows", "none meet, %", "mean rate, %", "slowest, %"), rows, note)

    def to_json(self) -> dict[str, Any]:
        return {
            "simulated": True, "model": self.model.to_json(), "system": self.system.to_json(),
            "execution": self.execution.to_json(), "levers": self.job.levers, "step": self.step.to_json(),
            "ladder": {name: {"seconds": rung.seconds, "mfu": rung.mfu} for name, rung in self.rungs.items()},
            "faults": self.run.to_json(), "tables": {table.title: table.records() for table in self.tables()},
        }  # fmt: skip

    def files(self) -> dict[str, str]:
        """``pipeline.trace.json`` for chrome://tracing (one replica's step, simulated), ``faults.csv``."""
        trace = Trace()
        cost = costs(self.model, self.system, self.execution, self.levers, calibrated())
        plan = self.execution
        run_pipeline(
            plan.pipeline_par, plan.pipeline_interleaving, plan.microbatches,
            of_costs(plan, cost.forward, cost.backward, cost.output), cost.hop, self.levers.pp_overlap, trace,
        )  # fmt: skip
        return {"pipeline.trace.json": trace.to_json(), "faults.csv": to_csv(self.run.incidents)}


def published_window() -> float:
    """The attention window as a share of the sequence that fits the MFU column of the paper best."""
    return float(json.loads((folder() / "fitted.json").read_text(encoding="utf-8"))["window"])


def _known(value: float) -> float | None:
    return value if value == value else None
