"""MegaScale's diagnosis, checkpoints and levers, measured: `python benchmarks/megascale_diagnosis.py [--only PART ...]`.

    hang      20 random hangs (SIGSTOP, or a main thread that waits) among TP2 x PP2 x DP2 = 8 gloo ranks, and 20 clean runs:
              ``named`` by the hang view; ``blamed`` in clean runs, in which all ranks are asked twice while they train
    stall     seconds that training waits for a checkpoint: two stages against a synchronous save, fsync to a real disk
    collector step time with Python's garbage collector as it is, and frozen and switched off, beside a large heap
    parity    final loss on the same tokens: serial and parallel block, sliding window, LAMB with a batch four times larger

    peers     the same job under torchrun (torchelastic) and under this driver, both starting interpreters: a killed
              and a stopped rank; ``recover_s`` from the fault to the next step's end, missing where none came in time

Each part's records replace those of an earlier run; the others stay.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from broadsheet.core.records import Record, home, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.megascale import grid_job, hang
from broadsheet.methods.estimates.megascale import job as jobs
from broadsheet.methods.estimates.megascale.checkpoint import Checkpointer
from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes
from broadsheet.methods.estimates.megascale.inject import Fault, plan
from broadsheet.methods.estimates.megascale.model import Corpus, Lamb, TinyModel
from broadsheet.methods.estimates.megascale.rules import Rules
from broadsheet.methods.estimates.megascale.timer import ask

GRID = hang.Grid(2, 2, 2)
RUNS = 20


def record(metric: str, values: Sequence[float], unit: str = "", ci: bool = True, **setting: Any) -> Record:
    interval = bootstrap_ci(values) if ci and len(values) > 1 else None
    text = " ".join(f"{name}={value}" for name, value in setting.items())
    print(f"{metric:<14} {statistics.fmean(values):.6g} {unit} {interval or ''} n={len(values)} {text}", flush=True)
    return Record(
        paper="megascale", method="diagnosis", bench="megascale-diagnosis", metric=metric, value=statistics.fmean(values),
        ci=interval, unit=unit, n=len(values), model="tiny-llama", setting=setting, time=now(), **provenance(),
    )  # fmt: skip


# --- hangs --------------------------------------------------------------------------------------------------------------


def hangs(scratch: Path) -> list[Record]:
    named, seconds, blamed, alarms = [], [], [], 0
    for number in range(RUNS):
        draw = random.Random(number)
        fault = Fault(
            draw.choice(("stop", "hang")), draw.randrange(GRID.world), draw.randrange(3, 20),
            draw.choice(("data", "forward", "backward")),
        )  # fmt: skip
        found, _ = _grid_run(scratch / "hang", [fault])
        names = found.incidents[0].ranks if found.incidents else ()
        named.append(float(names == (fault.rank,)))
        line = (scratch / "hang" / "injected.jsonl").read_text(encoding="utf-8").splitlines()[0]
        seconds.append(found.incidents[0].detected - json.loads(line)["time"] if found.incidents else float("nan"))
        print(f"hang {number:>2}: {fault.kind} of rank {fault.rank} in {fault.phase}: named {names}", flush=True)
    for number in range(RUNS):
        found, views = _grid_run(scratch / "clean", [])
        blamed += [float(bool(view.culprits)) for view in views]
        alarms += len(found.incidents)
        print(
            f"clean {number:>2}: {len(found.incidents)} alarms, {len(views)} looks, {sum(blamed):g} blamed so far",
            flush=True,
        )
    return [
        record("named", named, part="hang", grid="2x2x2"),
        record("detect_s", seconds, "s", part="hang", grid="2x2x2", patience=3.0),
        record("blamed", blamed, part="hang", grid="2x2x2", what="looks at clean runs"),
        record("alarms", [float(alarms)], "in 20 clean runs", part="hang", grid="2x2x2"),
    ]


def _grid_run(folder: Path, faults: list[Fault]) -> tuple[Any, list[hang.HangView]]:
    """One run; in a run without faults a thread asks the ranks twice, 0.2 s apart, as the driver would on an alarm."""
    shutil.rmtree(folder, ignore_errors=True)
    plan(folder, faults)
    job = grid_job.GridJob(str(folder), steps=40)
    (folder / "job.json").write_text(json.dumps(job.to_json()), encoding="utf-8")
    command = ["python", "-m", grid_job.__name__, str(folder / "job.json")]
    rules = Rules(heartbeat=0.3, patience=3.0)
    driver = Driver(command, folder, LocalNodes(2, warm=True), 2, GRID.world // 2, rules, max_restarts=0)
    views: list[hang.HangView] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.3):
            live = getattr(driver, "live", None)
            if live is None or len(list(live.glob("ask-*"))) < GRID.world:
                continue
            paths: dict[int, str | Path] = {rank: live / f"ask-{rank}" for rank in range(GRID.world)}
            try:
                rounds = []
                for _ in range(2):
                    rounds.append(list(ask(paths, folder / "reply").values()))
                    time.sleep(0.2)
            except OSError:
                return
            if len(rounds[0]) == GRID.world:  # not while they come or go
                views.append(hang.hang_view(rounds[1], GRID.world, rounds[0]) if rounds[1] else views.pop())
                return

    thread = threading.Thread(target=look)
    if not faults:
        thread.start()
    found = driver.run()
    over.set()
    if not faults:
        thread.join()
    return found, views


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def stalls(scratch: Path) -> list[Record]:
    """The tiny model's state and a larger one's, on the disk of BROADSHEET_HOME; saves alternate between the two ways."""
    found = []
    for name, shape in (
        ("tiny", TinyModel()),
        ("larger", TinyModel(hidden=192, layers=4, feedforward=768, vocabulary=1024)),
    ):
        model = shape.build()
        state = dict(model.state_dict())
        for copy in ("exp_avg", "exp_avg_sq"):  # as Adam holds them
            state |= {f"{copy}.{key}": torch.zeros_like(value) for key, value in model.state_dict().items()}
        size = sum(value.nbytes for value in state.values())
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home()) as folder:  # a disk, where the system's folder may be memory
            ways = {
                way: Checkpointer(Path(folder) / way, background=way == "two-stage") for way in ("two-stage", "synchronous")
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for step in range(20):
                for way, one in ways.items():
                    times[way].append(one.save(step, state, {}, {}))
                    one.wait()
        for way, values in times.items():
            found.append(
                record(
                    "stall_ms", [1000 * value for value in values[2:]], "ms", part="stall", way=way, state=name, bytes=size
                )
            )
        share = statistics.median(times["two-stage"][2:]) / statistics.median(times["synchronous"][2:])
        found.append(record("stall_share", [share], part="stall", state=name, bytes=size, what="ratio of medians"))
    return found


# --- garbage collection ---------------------------------------------------------------------------------------------------


def collector(scratch: Path) -> list[Record]:
    """Steps of the tiny model beside a heap of 300,000 nested objects, each keeping 4,000 more (as logs and queues do).

    Blocks of 120 steps alternate between the collector as it is, and frozen and switched off; what a block kept is let go,
    and collected by hand, between blocks and outside the clock. CPU time, which a collection is part of.
    """
    heap = [[{"name": str(i), "value": (i, [i])}] for i in range(300_000)]  # lives as long as this function
    shape = TinyModel()
    model, mask, corpus = shape.build(), shape.mask(), Corpus(shape.vocabulary, shape.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pauses: dict[str, list[float]] = {"auto": [], "frozen": []}
    times: dict[str, list[float]] = {"auto": [], "frozen": []}
    way, inside, began = "auto", False, 0.0

    def watch(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.thread_time()
        elif inside:
            pauses[way].append(time.thread_time() - began)

    gc.callbacks.append(watch)
    for block in range(6):
        way = ("auto", "frozen")[block % 2]
        kept: list[Any] = []
        gc.unfreeze()
        gc.collect()
        if way == "frozen":
            gc.freeze()
            gc.disable()
        else:
            gc.enable()
        inside = True
        for step in range(120):
            cpu = time.thread_time()
            shape.loss(model, corpus.batch(step, 0, 4), mask).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept.append([{"step": step, "part": [part]} for part in range(2000)])
            times[way].append(time.thread_time() - cpu)
        inside = False
    gc.callbacks.remove(watch)
    gc.unfreeze()
    gc.enable()
    found = []
    for name, values in times.items():
        array = 1000 * np.array(values)
        middle = float(np.median(array))
        found.append(
            record("step_ms", [middle], "ms", part="collector", way=name, what="median CPU time", steps=len(values))
        )
        for share in (0.99, 1.0):
            tail = float(np.quantile(array, share))
            found.append(record("tail", [tail / middle], "x median", part="collector", way=name, quantile=share))
        longest = 1000 * max(pauses[name], default=0.0)
        found.append(record("longest_pause_ms", [longest], "ms", part="collector", way=name, heap=len(heap)))
        found.append(record("pause_share", [sum(pauses[name]) / sum(values)], part="collector", way=name, heap=len(heap)))
    return found


# --- parity ---------------------------------------------------------------------------------------------------------------


def parity(scratch: Path) -> list[Record]:
    """Same tokens for all: 240 batches of 8 rows, or 60 of 32 (the four times larger batch). Held-out loss in nats.

    Learning rates are the best of two or three for each optimiser and batch, on another seed. The text is a chain of order
    one: that a window loses nothing on it says that training with one works, not that long contexts survive it.
    """
    base = TinyModel(dropout=0.0)
    rows: dict[str, tuple[TinyModel, str, int, float]] = {
        "serial, AdamW": (base, "adamw", 1, 1e-2),
        "parallel block": (TinyModel(dropout=0.0, parallel_block=True), "adamw", 1, 1e-2),
        "window 8": (TinyModel(dropout=0.0, window=8), "adamw", 1, 1e-2),
        "LAMB": (base, "lamb", 1, 2e-2),
        "AdamW, batch x4": (base, "adamw", 4, 1e-2),
        "LAMB, batch x4": (base, "lamb", 4, 6e-2),
        "all three": (TinyModel(dropout=0.0, parallel_block=True, window=8), "lamb", 4, 6e-2),
    }
    losses: dict[str, list[float]] = {name: [] for name in rows}
    for seed in range(2):
        for name, (shape, optimizer, larger, rate) in rows.items():
            torch.manual_seed(seed)
            model, mask, corpus = shape.build(), shape.mask(), Corpus(shape.vocabulary, shape.tokens, seed)
            make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if optimizer == "adamw" else Lamb
            one = make(model.parameters(), lr=rate)
            steps = 240 // larger
            for step in range(steps):
                for group in one.param_groups:
                    group["lr"] = rate * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
                batch = torch.cat([corpus.batch(step * larger + part, 0, 8) for part in range(larger)])
                shape.loss(model, batch, mask).backward()
                one.step()
                one.zero_grad()
            with torch.no_grad():
                held = torch.cat([corpus.batch(10_000 + part, 0, 32) for part in range(4)])
                losses[name].append(float(shape.loss(model, held, mask)))
            print(f"seed {seed} {name}: {losses[name][-1]:.4f}", flush=True)
    found = [
        record("loss", values, "nats", part="parity", variant=name, tokens=240 * 8 * 32) for name, values in losses.items()
    ]
    reference = losses["serial, AdamW"]
    for name, values in losses.items():
        if name != "serial, AdamW":
            gaps = [value - other for value, other in zip(values, reference)]
            found.append(record("gap", gaps, "nats", part="parity", variant=name, against="serial, AdamW"))
    return found


# --- peers ----------------------------------------------------------------------------------------------------------------


def peers(scratch: Path) -> list[Record]:
    """One kill and one SIGSTOP each; a run is given ``LIMIT`` seconds from the fault."""
    limit, found = 60.0, []
    for kind in ("kill", "stop"):
        for way in ("torchrun", "torchrun, own store", "robust-run"):
            if way == "torchrun" and kind == "stop":
                continue  # the store does not matter for what is not noticed
            folder = scratch / f"{way}-{kind}"
            plan(folder, [Fault(kind, 2, 25)])
            job = jobs.Job(str(folder), steps=60)
            (folder / "job.json").write_text(json.dumps(job.to_json()), encoding="utf-8")
            module = ["-m", jobs.__name__, str(folder / "job.json")]
            env = dict(os.environ)
            if way.startswith("torchrun"):
                # By default ranks share the agent's store, where gloo finds the addresses of the attempt before.
                env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1" if "own" in way else "0"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
                           "--max-restarts=2", *module]  # fmt: skip
            else:
                command = [sys.executable, "-c", "from broadsheet.cli import main; main()", "robust-run", "--folder",
                           str(folder), "-o", "heartbeat=0.3", "--", "python", *module]  # fmt: skip
            seconds = _until_recovered(command, env, folder, limit)
            what = "recovered" if seconds is not None else f"no step within {limit:g} s"
            print(f"{way} {kind}: {what}", flush=True)
            found.append(record("recovered", [float(seconds is not None)], part="peers", way=way, fault=kind, limit_s=limit))
            if seconds is not None:
                found.append(record("recover_s", [seconds], "s", part="peers", way=way, fault=kind))
    return found


def _until_recovered(command: list[str], env: dict[str, str], folder: Path, limit: float) -> float | None:
    """Seconds from the fault to the end of the first step of the second attempt."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=null, stderr=null, start_new_session=True)
    injected, start = folder / "injected.jsonl", time.time()
    try:
        while time.time() - start < 300:
            time.sleep(0.05)
            if not injected.exists() or not injected.read_text(encoding="utf-8"):
                continue
            at = json.loads(injected.read_text(encoding="utf-8").splitlines()[0])["time"]
            files = list((folder / "timers").glob("timers-1-*.jsonl"))
            if len(files) == 4 and all(len(file.read_text(encoding="utf-8").splitlines()) > 1 for file in files):
                return time.time() - at
            if time.time() - at > limit:
                return None
        raise SystemExit(f"{' '.join(command)} did not come to its fault within 300 s")
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


PARTS: dict[str, Callable[[Path], list[Record]]] = {
    "hang": hangs,
    "stall": stalls,
    "peers": peers,
    "collector": collector,
    "parity": parity,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "megascale_diagnosis.records.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:  # hang first: it forks, which is safe only before this process has trained
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        scratch = Path(tempfile.mkdtemp(prefix="megascale-", dir=memory))
        try:
            fresh = PARTS[name](scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        old = [r for r in read_json(arguments.out) if r.setting["part"] != name] if Path(arguments.out).exists() else []
        write_results(old + fresh, arguments.out)


if __name__ == "__main__":
    main()
