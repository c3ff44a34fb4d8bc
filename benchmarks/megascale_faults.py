"""MegaScale's driver under injected faults: what it finds, how fast, and whether the run ends in the same bits.

    nice python benchmarks/megascale_faults.py [--work DIR] [--only KIND ...]

Four gloo ranks (one thread each) on two nodes of this machine, with two spare nodes, train the tiny Llama for 100
steps with a checkpoint every 10. Each fault is a run of its own with a random rank, step and phase; "clean" runs have
none. Finished runs are kept in DIR, so ctrl-C loses the one under way. Executors and ranks are forked from this
process, which has torch loaded: starting interpreters would measure imports. Link faults run in network namespaces
with veth links on a bridge (`ip link set eth0 down`).

``detect_s``: from the injection to the alarm; ``recover_s``: from the alarm to the end of the first step of the next
attempt; ``steps_lost``: steps done twice; ``named``: the rank (the node for heartbeat and link) was named, and nobody
else; ``identical``: the losses of all ranks at all steps and the final parameters equal the unbroken run's, to the
bit; ``automatic``: the run ended without a person. "silent" faults are expected to go unseen: they say where the
method ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from broadsheet.core.records import JsonLines, Record, home, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.megascale import job as jobs
from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes, Outcome
from broadsheet.methods.estimates.megascale.inject import Fault, plan
from broadsheet.methods.estimates.megascale.network import available, namespaces
from broadsheet.methods.estimates.megascale.rules import Rules
from broadsheet.methods.estimates.megascale.timer import read_traces

COUNTS = {
    "kill": 10, "exit": 6, "stop": 10, "hang": 10, "heartbeat": 6, "checkpoint": 6, "write": 6, "gradient": 5, "replica": 5,
    "silent": 3, "nan": 6, "disk": 5, "slow": 10, "link": 6, "two": 5, "clean": 20,
}  # fmt: skip
STEPS, EVERY, NODES, PER_NODE, SPARES = 100, 10, 2, 2, 2
RULES = Rules(heartbeat=0.3, missing=4, patience=3.0, evict=True)


def faults_of(kind: str, number: int) -> list[Fault]:
    """The faults of a run; the same for the same number."""
    draw = random.Random(f"{kind}-{number}")
    rank, step = draw.randrange(NODES * PER_NODE), draw.randrange(12, 46)
    node = f"node{rank // PER_NODE}"
    phase = draw.choice(("data", "forward", "backward"))
    if kind == "clean":
        return []
    if kind == "two":
        other = draw.randrange(NODES * PER_NODE)
        return [Fault("kill", rank, step, phase), Fault("stop", other, step + 30, phase)]
    if kind == "slow":  # early enough that fifty more steps fit
        step = 12 + (step - 12) // 2
        return [Fault(kind, rank, step, amount=0.1, node=node)]
    if kind == "disk":  # above a log file's size, below a shard's
        return [Fault(kind, rank, step, amount=100_000, node=node)]
    if kind == "link":  # every other one stays down for longer than the driver's patience
        return [Fault(kind, rank, step, amount=0.15 if number % 2 else 8.0)]
    if kind == "write":  # fires in the save after this step
        return [Fault(kind, rank, step // EVERY * EVERY + EVERY - 1)]
    return [Fault(kind, rank, step, phase)]


def drive(folder: Path, job: jobs.Job, faults: Sequence[Fault], network: bool = False, rules: Rules = RULES) -> Outcome:
    """One run under the driver."""
    shutil.rmtree(folder, ignore_errors=True)
    plan(folder, list(faults))
    (folder / "job.json").write_text(json.dumps(job.to_json()), encoding="utf-8")
    command = ["python", "-m", jobs.__name__, str(folder / "job.json")]
    total = NODES + SPARES
    if network:
        with namespaces(total) as (nodes, addresses):
            manager = LocalNodes(total, warm=True, namespaces=nodes, addresses=addresses)
            return Driver(command, folder, manager, NODES, PER_NODE, rules).run()
    return Driver(command, folder, LocalNodes(total, warm=True), NODES, PER_NODE, rules).run()


def first_step_end(folder: Path, attempt: int) -> float | None:
    """When the first step of an attempt had ended on all ranks, in seconds since the epoch."""
    ends = []
    for path in (folder / "timers").glob(f"timers-{attempt}-*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) < 2:
            return None
        head, row = json.loads(lines[0]), json.loads(lines[1])
        ends.append((head["wall"] + max(event[2] for event in row["events"]) - head["clock"]) / 1e9)
    return max(ends, default=None)


def named(kind: str, faults: Sequence[Fault], outcome: Outcome) -> bool:
    """Whether the incidents name what was injected and nothing else."""
    if len(outcome.incidents) != len(faults):
        return False
    for fault, incident in zip(faults, outcome.incidents):
        node = f"node{fault.rank // PER_NODE}"
        if kind == "heartbeat" and incident.nodes != (node,):
            return False
        if kind == "link" and incident.blocked != (node,):
            return False
        if kind not in ("heartbeat", "link") and incident.ranks != (fault.rank,):
            return False
    return True


def trial(kind: str, number: int, folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Runs one fault; everything that the records need."""
    faults = faults_of(kind, number)
    outcome = drive(folder, jobs.Job(str(folder), STEPS, checkpoint_every=EVERY), faults, kind == "link")
    injected = [json.loads(line) for line in _lines(folder / "injected.jsonl")]
    losses = {str(rank): {str(s): v for s, v in one.items()} for rank, one in jobs.losses_of(folder).items()}
    row: dict[str, Any] = {
        "kind": kind, "number": number, "faults": [[f.rank, f.step, f.phase] for f in faults], "fired": len(injected),
        "finished": outcome.finished, "reason": outcome.reason, "seconds": outcome.seconds,
        "named": named(kind, faults, outcome), "incidents": len(outcome.incidents),
        "identical": outcome.finished and losses == reference["losses"] and _parameters(folder) == reference["parameters"],
        "rules": [i.rule for i in outcome.incidents], "evidence": [i.evidence for i in outcome.incidents],
        "named_ranks": [list(i.ranks) for i in outcome.incidents], "blocked": [list(i.blocked) for i in outcome.incidents],
        "stragglers": [list(a.ranks) for a in outcome.warnings if a.rule == "straggler"],
        "detect": [], "recover": [], "lost": [], "detect_steps": [], "load": os.getloadavg()[0],
    }  # fmt: skip
    for fault, incident in zip(injected, outcome.incidents):
        row["detect"].append(incident.detected - fault["time"])
        row["detect_steps"].append(incident.step - fault["step"])
        ended = first_step_end(folder, incident.attempt + 1)
        row["recover"].append(ended - incident.detected if ended else None)
        row["lost"].append(incident.step - incident.resumed_step if incident.resumed_step is not None else None)
    return row


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _parameters(folder: Path) -> list[str]:
    return [
        json.loads(path.read_text(encoding="utf-8"))["parameters"] if path.exists() else ""
        for path in (folder / f"result-{rank}.json" for rank in range(NODES * PER_NODE))
    ]


def reference_run(folder: Path) -> dict[str, Any]:
    """The unbroken run: losses, parameters, and a usual step's seconds."""
    outcome = drive(folder, jobs.Job(str(folder), STEPS, checkpoint_every=EVERY), [])
    if not outcome.finished or outcome.incidents:
        raise SystemExit(f"the unbroken run was broken: {outcome}")
    starts = [e.start for e in read_traces(folder / "timers")[0].events if e.name == "data"]
    step = statistics.median(b - a for a, b in pairwise(starts)) / 1e9
    losses = {str(rank): {str(s): v for s, v in one.items()} for rank, one in jobs.losses_of(folder).items()}
    return {"losses": losses, "parameters": _parameters(folder), "step_s": step}


def records_of(rows: Sequence[dict[str, Any]], step_s: float) -> list[Record]:
    """Per kind and overall."""
    found: list[Record] = []

    def add(kind: str, metric: str, values: Sequence[float], unit: str = "", **setting: Any) -> None:
        if not values:
            return
        interval = bootstrap_ci(values) if len(values) > 1 else None
        found.append(
            Record(
                paper="megascale", method="robust-run", bench="megascale-faults", metric=metric, unit=unit,
                value=statistics.fmean(values), ci=interval, n=len(values), model="tiny-llama",
                parameters={
                    "heartbeat": RULES.heartbeat, "missing": RULES.missing, "patience": RULES.patience, "ranks": 4,
                    "nodes": 2, "steps": STEPS, "checkpoint_every": EVERY, "link": "network namespaces, veth, bridge",
                },
                setting={"kind": kind, **setting}, time=now(), **provenance(),
            )
        )  # fmt: skip

    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        for metric in ("named", "identical") if kind != "clean" else ("identical",):
            add(kind, metric, [float(row[metric]) for row in some])
        add(kind, "automatic", [float(row["finished"]) for row in some])
        add(kind, "incidents", [float(row["incidents"]) for row in some], "a run")
        if kind == "clean":
            add(kind, "stragglers", [float(len(row["stragglers"])) for row in some], "a run")
        for metric, unit in (("detect", "s"), ("recover", "s"), ("lost", "steps"), ("detect_steps", "steps")):
            values = [value for row in some for value in row[metric] if value is not None]
            name = {"detect": "detect_s", "recover": "recover_s", "lost": "steps_lost"}.get(metric, metric)
            add(kind, name, values, unit, **({"most": max(values)} if values else {}))
    healthy = [row for row in rows if row["kind"] != "slow"]
    add("all but slow", "stragglers", [float(len(row["stragglers"])) for row in healthy], "a run")
    real = [row for row in rows if row["kind"] not in ("clean", "silent")]
    add("all but silent", "named", [float(row["named"]) for row in real])
    add("all but silent", "identical", [float(row["identical"]) for row in real])
    add("all but silent", "automatic", [float(row["finished"]) for row in real])
    add("clean", "step_s", [step_s], "s")
    add("clean", "load", [row["load"] for row in rows], "processes")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default=str(home() / "megascale_faults"))
    parser.add_argument("--only", nargs="*", default=list(COUNTS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "megascale_faults.records.json"))
    arguments = parser.parse_args()
    work = Path(arguments.work)
    lines = JsonLines(work / "trials.jsonl")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    scratch = Path(tempfile.mkdtemp(prefix="megascale-", dir=memory))
    try:
        kept = {(row["kind"], row.get("number")): row for row in lines}
        reference = kept.get(("reference", None))
        if reference is None:
            reference = {"kind": "reference", **reference_run(scratch / "reference")}
            lines.add(reference)
        for kind in arguments.only:
            if kind == "link" and (reason := available()):
                print(f"link faults are left out: {reason}", flush=True)
                continue
            for number in range(COUNTS[kind]):
                if (kind, number) in kept:
                    continue
                start = time.time()
                row = trial(kind, number, scratch / "run", reference)
                lines.add(row)
                kept[kind, number] = row
                print(
                    f"{kind:<10} {number:>2}  {time.time() - start:5.1f} s  named {row['named']!s:<5} identical "
                    f"{row['identical']!s:<5} detect {row['detect']} {row['evidence']} {row['reason']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    order = list(COUNTS)
    rows = sorted((row for key, row in kept.items() if key[0] in order), key=lambda r: (order.index(r["kind"]), r["number"]))
    write_results(records_of(rows, reference["step_s"]), arguments.out)
    print(f"{len(rows)} runs; wrote {arguments.out}")


if __name__ == "__main__":
    main()
