"""Goodput of the real driver against the checkpoint interval, and what a simulation of the same failures says.

    nice python benchmarks/megascale_goodput.py [--intervals 4 8 ...] [--work DIR]

Four gloo ranks train; a process kills a random rank at exponential times (memoryless, so also during recovery), the
same for every interval of a seed. Saves are synchronous with a slow storage (``--delay`` seconds on top), so that the
interval matters. Goodput is useful steps times the step time, over the time from the first step's start to the last
one's end.

``goodput``: measured. ``simulated``: `faults.FaultModel` plays the same moments of failure with the step, save and
recovery times of the run; ``replayed``: so does a replay step by step that shares no code with it; ``error``: of the
first. ``expected``: the closed form of `faults.FaultModel` at the mean of the failures. ``young``: sqrt(2 C MTBF) in
steps, with the MTBF that was observed. Finished runs are kept in DIR.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from broadsheet.core.records import JsonLines, Record, home, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.megascale import job as jobs
from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes
from broadsheet.methods.estimates.megascale.faults import FaultModel
from broadsheet.methods.estimates.megascale.rules import Rules
from broadsheet.methods.estimates.megascale.timer import Trace, read_traces

NODES, PER_NODE = 2, 2


def killer(driver: int, mtbf: float, seed: int, log: Path) -> None:
    """Kills a random rank at exponential times, until the driver's process is gone; tells when in ``log``."""
    draw = random.Random(seed)
    parent = psutil.Process(driver)
    while True:
        time.sleep(draw.expovariate(1 / mtbf))
        try:
            executors = [child for child in parent.children() if child.pid != os.getpid()]
            # Ranks lead a session of their own; a node's self-check does not, and is left alone.
            ranks = [rank for one in executors for rank in one.children() if os.getsid(rank.pid) == rank.pid]
            if ranks:
                victim = draw.choice(sorted(ranks, key=lambda rank: rank.pid))
                victim.send_signal(signal.SIGKILL)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{time.time()}\n")
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue


def run(folder: Path, steps: int, interval: int, delay: float, mtbf: float, seed: int) -> dict[str, Any]:
    """One job with failures; what was measured."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = jobs.Job(str(folder), steps, checkpoint_every=interval, checkpoint="sync", storage_delay=delay)
    (folder / "job.json").write_text(json.dumps(job.to_json()), encoding="utf-8")
    command = ["python", "-m", jobs.__name__, str(folder / "job.json")]
    driver = Driver(
        command, folder, LocalNodes(NODES, warm=True), NODES, PER_NODE, Rules(heartbeat=0.3), max_restarts=1000,
        strikes=10**6, hopeless=10**6,
    )  # fmt: skip
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            killer(me, mtbf, seed, folder / "kills")
        finally:
            os._exit(0)
    try:
        found = driver.run()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not found.finished:
        raise SystemExit(f"the run did not end: {found.reason}")
    return measured(folder, len(found.incidents), steps, interval)


def measured(folder: Path, incidents: int, steps: int, interval: int) -> dict[str, Any]:
    """Times of rank 0's traces on the wall clock; a failure counts between the first step's start and the last one's end."""
    attempts = [_wall(trace) for attempt in range(incidents + 1) if (trace := _trace(folder, attempt))]
    begin, end = attempts[0][0][1], attempts[-1][-1][2]
    kills = [float(line) for line in (folder / "kills").read_text().split()] if (folder / "kills").exists() else []
    kills = [at - begin for at in kills if begin < at < end]
    saves = [e - s for rows in attempts for name, s, e in rows if name == "checkpoint"]
    durations = []
    for rows in attempts:
        starts = [(s, i) for i, (name, s, _) in enumerate(rows) if name == "data"]
        for (a, i), (b, k) in pairwise(starts):
            if not any(name == "checkpoint" for name, *_ in rows[i:k]):
                durations.append(b - a)
    # From a failure to the next attempt's first step, for failures that no other one followed before it.
    resumed = [rows[0][1] - begin for rows in attempts[1:] if rows]
    recoveries = []
    for at in kills:
        after = [r for r in resumed if r > at]
        if after and not any(at < other < min(after) for other in kills):
            recoveries.append(min(after) - at)
    step = statistics.fmean(durations)
    return {
        "interval": interval, "steps": steps, "seconds": end - begin, "step": step, "save": statistics.fmean(saves),
        "recovery": statistics.fmean(recoveries) if recoveries else None, "kills": kills,
        "goodput": steps * step / (end - begin), "load": os.getloadavg()[0],
    }  # fmt: skip


def _trace(folder: Path, attempt: int) -> Trace | None:
    try:
        found = read_traces(folder / "timers", attempt)[0]
    except (ValueError, IndexError):
        return None
    return found if found.events and found.rank == 0 else None


def _wall(trace: Trace) -> list[tuple[str, float, float]]:
    """(event, start, end) in seconds since the epoch, in order of the start."""
    rows = ((e.name, trace.clock + e.start / 1e9, trace.clock + e.end / 1e9) for e in trace.events)
    return sorted(rows, key=lambda row: row[1])


def replay(steps: int, interval: int, step: float, save: float, recovery: float, kills: Sequence[float]) -> float:
    """Seconds that the job takes with failures at these moments: a save counts when it has ended."""
    clock, done, saved = 0.0, 0, 0
    left = sorted(kills)
    while done < steps:
        cost = step + (save if (done + 1) % interval == 0 or done + 1 == steps else 0.0)
        if left and left[0] < clock + cost:
            clock, done = left.pop(0) + recovery, saved
            while left and left[0] < clock:  # a failure during recovery begins it again
                clock = left.pop(0) + recovery
            continue
        clock, done = clock + cost, done + 1
        if done % interval == 0:
            saved = done
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--intervals", type=int, nargs="*", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--delay", type=float, default=0.25)
    parser.add_argument("--mtbf", type=float, default=8.0, help="seconds between failures (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", default=str(home() / "megascale_goodput"))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "megascale_goodput.records.json"))
    arguments = parser.parse_args()
    lines = JsonLines(Path(arguments.work) / "runs.jsonl")
    kept = {(row["interval"], row["seed"]): row for row in lines}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="megascale-", dir=memory))
    try:
        for seed in range(arguments.seeds):
            for interval in arguments.intervals:
                if (interval, seed) not in kept:
                    row = run(scratch / "run", arguments.steps, interval, arguments.delay, arguments.mtbf, seed)
                    row |= {"seed": seed}
                    lines.add(row)
                    kept[interval, seed] = row
                    shown = {key: value for key, value in row.items() if key != "kills"}
                    print(f"{len(row['kills'])} kills {shown}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    records: list[Record] = []

    def add(metric: str, values: Sequence[float], unit: str = "", **setting: Any) -> None:
        interval = bootstrap_ci(values) if len(values) > 1 else None
        print(f"{metric:<10} {statistics.fmean(values):8.4f} {unit} {setting}")
        records.append(
            Record(
                paper="megascale", method="robust-run", bench="megascale-goodput", metric=metric, unit=unit, n=len(values),
                value=statistics.fmean(values), ci=interval, model="tiny-llama", setting=setting, time=now(),
                parameters={"steps": arguments.steps, "delay_s": arguments.delay, "mtbf_s": arguments.mtbf, "ranks": 4},
                **provenance(),
            )
        )  # fmt: skip

    rows = [row for (interval, seed), row in sorted(kept.items()) if interval in arguments.intervals]
    recovery = statistics.fmean(row["recovery"] for row in rows if row["recovery"] is not None)
    observed = sum(row["seconds"] for row in rows) / max(sum(len(row["kills"]) for row in rows), 1)
    step, save = (statistics.fmean(row[name] for row in rows) for name in ("step", "save"))
    for interval in arguments.intervals:
        some = [row for row in rows if row["interval"] == interval]
        for row in some:
            own = row["recovery"] or recovery
            row["replayed"] = row["goodput"] * row["seconds"] / replay(
                row["steps"], interval, row["step"], row["save"], own, row["kills"]
            )  # fmt: skip
        add("goodput", [row["goodput"] for row in some], interval=interval)
        add("replayed", [row["replayed"] for row in some], interval=interval)
        for row in some:
            own = FaultModel(
                1, arguments.mtbf, row["step"], interval * row["step"], row["save"], 0.0, row["recovery"] or recovery,
                0.0, 0.0, 1.0,
            )  # fmt: skip
            row["simulated"] = own.run(row["seconds"], failures=row["kills"]).effective
        add("simulated", [row["simulated"] for row in some], interval=interval)
        add("error", [row["simulated"] / row["goodput"] - 1 for row in some], interval=interval)
        model = FaultModel(1, observed, step, interval * step, save, 0.0, recovery, 0.0, 0.0, 1.0)
        add("expected", [model.expected(interval * step)], interval=interval)
        add("kills", [float(len(row["kills"])) for row in some], "a run", interval=interval)
    worst = max(abs(row["simulated"] / row["goodput"] - 1) for row in rows)
    add("worst_error", [worst])
    add("step_s", [step], "s")
    add("save_s", [save], "s")
    add("recovery_s", [recovery], "s")
    add("mtbf_s", [observed], "s")
    add("young", [math.sqrt(2 * save * observed) / step], "steps")
    means = {i: statistics.fmean(row["goodput"] for row in rows if row["interval"] == i) for i in arguments.intervals}
    add("best", [float(max(means, key=lambda i: means[i]))], "steps")
    write_results(records, arguments.out)


if __name__ == "__main__":
    main()
