"""Failures over weeks: how much of the time trains, and how often to save (MegaScale sections 4 and 6.3). SIMULATED.

Every node fails independently at an exponential rate; one failure stops all. What follows is detection, diagnosis,
restart, and the work since the last checkpoint that had reached stable storage, once more. Effective training time rate,
or goodput, is the paper's: iterations times iteration time, over all time.

With failures at a mean of M seconds, segments of T seconds of training and a save that stalls for C, a segment takes on
average exp(R / M) M (exp((T + C) / M) - 1) seconds, R being what a failure costs before training goes on (Daly 2006, with
failures during recovery as well). T is best near sqrt(2 C M) (Young 1974).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from broadsheet.core.perf.events import Interrupted, Simulation, Steps

DAY = 86_400.0


@dataclass(frozen=True)
class Incident:
    """One failure; times in seconds from the start of the run, ``lost_steps`` had to be trained again."""

    failed_at: float
    detected_at: float
    resumed_at: float
    lost_steps: float
    cause: str = "node"
    automatic: bool = True


@dataclass(frozen=True)
class FaultReport:
    """What became of a run's time. ``effective``: iterations times iteration time over all time."""

    seconds: float
    steps: float
    step_seconds: float
    incidents: tuple[Incident, ...]
    saving_seconds: float = 0.0

    @property
    def effective(self) -> float:
        return self.steps * self.step_seconds / self.seconds

    @property
    def automatic(self) -> float:
        """Share of failures that nobody was called for; nan without any."""
        return _mean([float(one.automatic) for one in self.incidents])

    @property
    def detect_seconds(self) -> float:
        """Mean time until a failure was seen."""
        return _mean([one.detected_at - one.failed_at for one in self.incidents])

    @property
    def down_seconds(self) -> float:
        """Mean time from a failure until training went on."""
        return _mean([one.resumed_at - one.failed_at for one in self.incidents])

    @property
    def catch_up_seconds(self) -> float:
        """Mean time of training what was lost once more."""
        return _mean([one.lost_steps * self.step_seconds for one in self.incidents])

    def to_json(self) -> dict[str, Any]:
        names = ("effective", "automatic", "detect_seconds", "down_seconds", "catch_up_seconds")
        return {
            "seconds": self.seconds, "steps": self.steps, "step_seconds": self.step_seconds, "restarts": len(self.incidents),
            **{name: getattr(self, name) for name in names}, "incidents": [asdict(one) for one in self.incidents],
        }  # fmt: skip


@dataclass(frozen=True)
class FaultModel:
    """A job of ``nodes`` machines. Times in seconds.

    ``node_mtbf``: mean time between failures of one. ``interval``: training between saves (0: the best). ``save``: what a
    save stalls training (stage 1, to host memory); ``write``: until it is on stable storage, in the background (stage 2).
    ``detect``, ``diagnose``, ``restart``: from failure to training; ``manual``: what comes on top where nobody but a person
    finds the cause, in a share of 1 - ``automatic`` of failures.
    """

    nodes: int
    node_mtbf: float
    step_seconds: float
    interval: float = 0.0
    save: float = 10.0
    write: float = 120.0
    detect: float = 60.0
    diagnose: float = 300.0
    restart: float = 300.0
    automatic: float = 0.9
    manual: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("nodes", "node_mtbf", "step_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"faults: {name} must be above 0, not {getattr(self, name)}")
        for name in ("interval", "save", "write", "detect", "diagnose", "restart", "manual"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"faults: {name} must not be negative: {getattr(self, name)}")
        if not 0 <= self.automatic <= 1:
            raise ValueError(f"faults: automatic is a share from 0 to 1, not {self.automatic}")

    @property
    def mtbf(self) -> float:
        """Mean time between failures of the job."""
        return self.node_mtbf / self.nodes

    @property
    def recovery(self) -> float:
        """From failure to training, on average."""
        return self.detect + self.diagnose + self.restart + (1 - self.automatic) * self.manual

    @property
    def young_interval(self) -> float:
        return math.sqrt(2 * self.save * self.mtbf)

    def expected(self, interval: float) -> float:
        """Goodput at a checkpoint interval, without `write` (see the module) and with recovery at its mean.

        A write that takes W makes a failure cost W more, of which the first order is in: W / M.
        """
        m = self.mtbf
        segment = math.exp(self.recovery / m) * m * math.expm1((interval + self.save) / m)
        return interval / (segment * (1 + self.write / m))

    def best_interval(self) -> float:
        """The interval with the best `expected` goodput."""
        guess = max(self.young_interval, self.step_seconds)
        found = minimize_scalar(lambda x: -self.expected(math.exp(x)), bounds=(math.log(guess / 30), math.log(guess * 30)),
                                method="bounded")  # fmt: skip
        return float(math.exp(found.x))

    def run(self, seconds: float, seed: int = 0, failures: Sequence[float] | None = None) -> FaultReport:
        """Plays so many seconds: whole steps, saves every ``interval``, failures whenever they come.

        ``failures``: their times, where they are known: a real run's, to see what other settings would have made of it.
        Raises ValueError.
        """
        if not seconds > 0:
            raise ValueError(f"faults: a run needs a length above 0, not {seconds}")
        if failures is not None and any(not time >= 0 for time in failures):
            raise ValueError("faults: a failure cannot come before the run begins")
        job = replace(self, interval=self.interval or self.best_interval())
        return _Run(job, seconds, seed, failures).report()

    def curve(self, intervals: Iterable[float], seconds: float, seeds: int = 5) -> list[tuple[float, float, float]]:
        """(interval, simulated goodput over ``seeds`` runs, expected goodput)."""
        rows = []
        for interval in intervals:
            job = replace(self, interval=interval)
            rows.append(
                (interval, _mean([job.run(seconds, seed).effective for seed in range(seeds)]), job.expected(interval))
            )
        return rows


class _Run:
    """One run as two processes: a trainer, and failures that interrupt it, even while it recovers."""

    def __init__(self, job: FaultModel, seconds: float, seed: int, failures: Sequence[float] | None):
        self.job, self.seconds, self.failures = job, seconds, failures
        self.rng = np.random.default_rng(seed)
        self.simulation = Simulation()
        self.done = 0.0  #: steps that count, up to the segment under way
        self.training_since: float | None = None
        self.saved: list[tuple[float, float]] = [(0.0, 0.0)]  #: (when on stable storage, steps), oldest first
        self.incidents: list[Incident] = []
        self.saving = 0.0

    def report(self) -> FaultReport:
        trainer = self.simulation.process(self.train(), "trainer")
        self.simulation.process(self.fail(trainer), "failures")
        self.simulation.run(until=self.seconds)
        self.stop()
        return FaultReport(self.seconds, self.done, self.job.step_seconds, tuple(self.incidents), self.saving)

    def stop(self) -> None:
        """Counts the whole steps of the segment under way."""
        if self.training_since is not None:
            self.done += math.floor((self.simulation.now - self.training_since) / self.job.step_seconds + 1e-9)
            self.training_since = None

    def fail(self, trainer: Any) -> Steps:
        for gap in self.gaps():
            yield gap
            trainer.interrupt("node")

    def gaps(self) -> Iterator[float]:
        """From one failure to the next."""
        if self.failures is not None:
            yield from np.diff(sorted(self.failures), prepend=0.0).tolist()
            return
        while True:
            yield float(self.rng.exponential(self.job.mtbf))

    def train(self) -> Steps:
        """Segment after segment; a failure throws it back."""
        job = self.job
        per_segment = max(1, round(job.interval / job.step_seconds))
        while True:
            try:
                self.training_since = self.simulation.now
                yield per_segment * job.step_seconds
                self.stop()
                yield job.save
                self.saving += job.save
                self.saved.append((self.simulation.now + job.write, self.done))
            except Interrupted as interrupt:
                self.stop()
                yield from self.recover(str(interrupt.cause))

    def recover(self, cause: str) -> Steps:
        job, failed = self.job, self.simulation.now
        kept = [one for one in self.saved if one[0] <= failed]  # a save still under way is lost with the host's memory
        self.saved = [kept[-1]]
        lost, self.done = self.done - kept[-1][1], kept[-1][1]
        automatic = bool(self.rng.random() < job.automatic)
        while True:
            try:
                yield job.detect
                detected = self.simulation.now
                yield job.diagnose + (0.0 if automatic else job.manual)
                yield job.restart
                break
            except Interrupted:  # another node, while all stand still: begin again
                continue
        self.incidents.append(Incident(failed, detected, self.simulation.now, lost, cause, automatic))


# --- traces of real runs ------------------------------------------------------------------------------------------------


def to_csv(incidents: Sequence[Incident]) -> str:
    """A fault trace: a header and a line an incident."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(Incident)], lineterminator="\n")
    writer.writeheader()
    for one in incidents:
        writer.writerow(asdict(one))
    return out.getvalue()


def read_csv(path: str | Path) -> list[Incident]:
    """What `to_csv` wrote, or any CSV with its first four columns (seconds, seconds, seconds, steps). Raises ValueError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the fault trace {path}: {error}") from None
    rows = csv.DictReader(io.StringIO(text))
    needed = [f.name for f in fields(Incident)][:4]
    if missing := [name for name in needed if name not in (rows.fieldnames or [])]:
        raise ValueError(
            f"{path} has no column '{missing[0]}'; a fault trace has {', '.join(needed)}, and may have cause, automatic"
        )
    found = []
    for row in rows:
        try:
            times = [float(row[name]) for name in needed]
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {rows.line_num}: {', '.join(needed)} must be numbers") from None
        if not times[0] <= times[1] <= times[2] or times[3] < 0:
            raise ValueError(
                f"{path}, line {rows.line_num}: wanted failed_at <= detected_at <= resumed_at, and lost_steps >= 0"
            )
        word = (row.get("automatic") or "true").strip().lower()
        failed, detected, resumed, lost = times
        automatic = word in ("true", "1", "yes")
        found.append(Incident(failed, detected, resumed, lost, row.get("cause") or "unknown", automatic))
    return sorted(found, key=lambda one: one.failed_at)


def report_of(incidents: Sequence[Incident], seconds: float, step_seconds: float, save_share: float = 0.0) -> FaultReport:
    """The same report for a trace of a real run of so many seconds.

    Steps are inferred: what time was neither down nor (``save_share``) saving trained, less what was lost. Raises ValueError
    where incidents overlap or do not fit into the run.
    """
    if not seconds > 0 or not step_seconds > 0:
        raise ValueError("a fault report needs the run's seconds and the step's seconds, both above 0")
    down, at = 0.0, 0.0
    for one in incidents:
        if one.failed_at < at or one.resumed_at > seconds:
            raise ValueError(f"the incident at {one.failed_at:g} s overlaps the one before it, or ends after {seconds:g} s")
        down += one.resumed_at - one.failed_at
        at = one.resumed_at
    trained = (seconds - down) * (1 - save_share) / step_seconds
    lost = sum(one.lost_steps for one in incidents)
    if lost > trained:
        raise ValueError(f"{lost:g} steps were lost, but there was time for {trained:.0f} only: check the step's seconds")
    return FaultReport(seconds, trained - lost, step_seconds, tuple(incidents), (seconds - down) * save_share)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
