"""MegaScale's tables: published, predicted by the simulator, and by a straight line.

    python benchmarks/megascale_tables.py [--days 28] [--seeds 5]

Fits six constants to the runs at 256-1,024 GPUs and to the ablation (at 256), writes them to
``methods/estimates/megascale/data/fitted.json``, and predicts what the fit was not shown: the runs at 3,072-12,288 GPUs, the
530B model, and the runs of Korthikanti et al. (arXiv 2205.05198, Table 5). ``source`` of a record: published, simulated,
line (seconds = a m + b through a system's four small runs), calculon (its own prediction, which fits nothing, from
tests/golden), measured. Everything but the start of groups on a real
store and the speed of the event core is SIMULATED or published.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from broadsheet.core.perf.events import Simulation
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.core.verdicts import find
from broadsheet.methods.estimates.megascale import calibration as cal
from broadsheet.methods.estimates.megascale.fabric import remedies
from broadsheet.methods.estimates.megascale.faults import DAY, FaultModel
from broadsheet.methods.estimates.megascale.groups import Topology, messages, run_on_store, store_seconds, topologies
from broadsheet.methods.estimates.megascale.plan import GIB, Execution, Model, folder, read, split
from broadsheet.methods.estimates.megascale.schedule import of_costs, run_pipeline
from broadsheet.methods.estimates.megascale.simulator import (
    Calibration,
    Levers,
    closed_form,
    costs,
    memory,
    simulate,
    slowed,
)
from broadsheet.methods.estimates.megascale.stragglers import played, slowdown

#: Korthikanti et al., Table 5: seconds of an iteration with full and with selective recomputation; Figure 1: GiB
TRANSFER = {
    "megatron-22b": (Execution(8, 8, 1, 1, 4, 4), 1.42, 1.10),
    "gpt3-175b": (Execution(64, 8, 8, 1, 64, 1, 3), 18.13, 13.75),
    "turing-530b": (Execution(280, 8, 35, 1, 280, 1, 3), 49.05, 37.83),
    "megatron-1t": (Execution(512, 8, 64, 1, 512, 1), 94.42, 71.49),
}
#: what calculon's own code gave
CALCULON = Path(__file__).parent.parent / "tests" / "golden" / "calculon_official.json"


class Tables:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.records = arguments, list[Record]()

    def add(self, method: str, metric: str, value: float, unit: str = "", **setting: Any) -> None:
        n, ci, model = setting.pop("n", 1), setting.pop("ci", None), setting.pop("model", "gpt-175b")
        device = "cpu" if setting.get("source") == "measured" else "simulated"
        self.records.append(
            Record(
                paper="megascale", method=method, bench="megascale-tables", metric=metric, value=float(value), unit=unit,
                ci=ci, n=n, model=model, setting=setting, device=device, time=now(), **provenance(),
            )
        )  # fmt: skip
        tag = setting.get("source", "simulated").upper()
        shown = " ".join(f"{name}={one}" for name, one in setting.items() if name != "source")
        print(f"{tag:<10} {method:<18} {metric:<22} {value:10.4f} {unit:<8} {shown}", flush=True)


def utilisation(tables: Tables) -> None:
    """MFU recomputed from the published iteration times."""
    model, system = cal.subject()
    tables.add("megascale", "window", model.window, "tokens", source="simulated")
    for run in cal.runs():
        window = model.window if run.system == "megascale" else 0
        mfu = cal.recomputed_mfu(model, run, system.tflops, window)
        where = {"gpus": run.gpus, "batch": run.batch}
        tables.add(run.system, "mfu_recomputed", mfu, "%", source="published", difference=round(mfu - run.mfu, 3), **where)
        full = cal.recomputed_mfu(model, run, system.tflops)
        tables.add(
            run.system, "mfu_full_attention", full, "%", source="published", difference=round(full - run.mfu, 3), **where
        )


def scaling(tables: Tables, fits: dict[str, Calibration]) -> None:
    """Every published row, predicted by each fit, by the line and by calculon; the mean over the runs that no fit saw."""
    peer = {(row["system"], row["gpus"]): row["seconds"] for row in json.loads(CALCULON.read_text())["megascale"]}
    for run in cal.runs():
        where = {"gpus": run.gpus, "batch": run.batch, "shown": run.small}
        tables.add(run.system, "seconds", run.seconds, "s", source="published", **where)
        predictions = {name: cal.predicted(run, c, name != "no-stragglers") for name, c in fits.items()}
        predictions |= {"line": cal.on_line(run), "calculon": peer[run.system, run.gpus]}
        for name, seconds in predictions.items():
            source = name if name in ("line", "calculon") else "simulated"
            error = round(100 * (seconds / run.seconds - 1), 2)
            tables.add(run.system, "seconds", seconds, "s", source=source, fit=name, error=error, **where)
    for name in (*fits, "line", "calculon"):
        found = {run: cal.on_line(run) if name == "line" else peer[run.system, run.gpus] for run in cal.runs()}
        if name in fits:
            found = {run: cal.predicted(run, fits[name], name != "no-stragglers") for run in cal.runs()}
        for system in ("megatron", "megascale"):
            mean, worst = cal.held_out(found, system)
            source = "simulated" if name in fits else name
            tables.add(system, "held_out_error", mean, "%", source=source, fit=name, worst=round(worst, 2), n=4)


def ladder(tables: Tables, fits: dict[str, Calibration]) -> None:
    wanted = cal.published_ablation()
    for lever, mfu in wanted.items():
        tables.add("ladder", "mfu", mfu, "%", source="published", lever=lever)
    for name, c in fits.items():
        found = cal.ablation(c, name != "no-stragglers")
        ours, theirs = cal.steps(found), cal.steps(wanted)
        for lever, mfu in found.items():
            step = {"step": round(ours[lever], 2), "off": round(ours[lever] - theirs[lever], 2)} if lever in ours else {}
            tables.add("ladder", "mfu", mfu, "%", source="simulated", fit=name, lever=lever, **step)
        off = max(abs(ours[lever] - theirs[lever]) for lever in ours)
        tables.add("ladder", "largest_step_error", off, "points", source="simulated", fit=name, n=len(ours))
        rank = spearmanr(list(ours.values()), list(theirs.values())).statistic
        tables.add("ladder", "rank_correlation", rank, source="simulated", fit=name, n=len(ours))


def sensitivity(tables: Tables) -> None:
    """What hangs on the constants that are assumed: each moved, the six fitted anew."""
    for name, values in {
        "tp_chunks": (2, 8), "attention_efficiency": (0.45, 0.7), "operator_slowdown": (1.5, 2.5),
        "memory_efficiency": (0.6, 0.9), "slow_share": (0.0, 0.01), "slow_forward": (0.05, 0.2),
    }.items():  # fmt: skip
        for value in values:
            c = cal.fit("rows+ablation", **{name: value})
            ours, theirs = cal.steps(cal.ablation(c)), cal.steps(cal.published_ablation())
            setting = {"source": "simulated", "assumed": name, "at": value}
            for system in ("megatron", "megascale"):
                mean, _ = cal.held_out({run: cal.predicted(run, c) for run in cal.runs()}, system)
                tables.add(system, "held_out_error_if", mean, "%", **setting)
            tables.add("ladder", "largest_step_error_if", max(abs(ours[k] - theirs[k]) for k in ours), "points", **setting)


def transfer(tables: Tables, c: Calibration) -> None:
    """Other models and another paper's runs, with nothing fitted anew."""
    small, system = cal.subject()
    model = replace(read(Model, "gpt-530b"), window=small.window)
    for row in cal.published()["weak_scaling_530b"]:
        levers = Levers.all() if row["system"] == "megascale" else Levers()
        plan = split(row["gpus"], 8, 35, row["gpus"], 3)
        if not levers.operators:  # without fused attention its scores would not fit into 80 GiB
            plan = replace(plan, activation_recompute="attn_only")
        mfu = 100 * simulate(model, system, plan, levers, c).mfu
        where = {"gpus": row["gpus"], "published": row["mfu"], "difference": round(mfu - row["mfu"], 2)}
        tables.add(row["system"], "mfu_530b", mfu, "%", source="simulated", model="gpt-530b", **where)
    for name, (plan, full, selective) in TRANSFER.items():
        for recompute, seconds in (("full", full), ("attn_only", selective)):
            execution = replace(plan, activation_recompute=recompute, optimizer_sharding=False)
            found = simulate(read(Model, name), system, execution, Levers(), c, stragglers=False, check=False).seconds
            where = {"recompute": recompute, "published": seconds, "error": round(100 * (found / seconds - 1), 2)}
            tables.add("korthikanti", "seconds", found, "s", source="simulated", model=name, gpus=plan.num_procs, **where)
        need = memory(read(Model, name), replace(plan, activation_recompute="attn_only", optimizer_sharding=False))
        tables.add("korthikanti", "activations", need["activations"] / GIB, "GiB", source="simulated", model=name)


def agreement(tables: Tables, c: Calibration) -> None:
    """The closed form beside the events, clean and with one slow stage; the bubble; how fast events are."""
    model, system = cal.subject()
    worst = {"clean": 0.0, "slow stage": 0.0}
    for run in cal.runs():
        plan, levers = run.execution, run.levers
        cost = costs(model, system, plan, levers, c)
        p, v, m = plan.pipeline_par, plan.pipeline_interleaving, plan.microbatches
        formula = sum(closed_form(cost, p, v, m, levers.pp_overlap).values())
        worst["clean"] = max(worst["clean"], abs(formula / played(model, system, plan, {}, levers, c) - 1))
        if m <= 64:
            for stage in range(p):
                ours = formula + slowed(cost, v, m, levers.pp_overlap, c.slow_forward, stage == p - 1)
                theirs = played(model, system, plan, {stage: c.slow_forward}, levers, c)
                worst["slow stage"] = max(worst["slow stage"], abs(ours / theirs - 1))
    for case, value in worst.items():
        tables.add("closed-form", "largest_difference", 100 * value, "%", source="simulated", case=case)
    for p, v, m in ((8, 6, 192), (8, 6, 32), (35, 3, 280), (8, 1, 64)):
        found = run_pipeline(p, v, m, of_costs(split(p, 1, p, m, v), 1.0, 2.0))
        tables.add("events", "bubble", found.bubble, source="simulated", formula=(p - 1) / (v * m), p=p, v=v, m=m)
    simulation = Simulation()

    def waiting() -> Any:
        for _ in range(10_000):
            yield 1.0

    for _ in range(100):
        simulation.process(waiting())
    begun = time.process_time()  # not of other programs
    simulation.run()
    seconds = time.process_time() - begun
    tables.add(
        "events", "events_per_second", simulation.happened / seconds, "1/s", source="measured", events=simulation.happened
    )


def stragglers(tables: Tables, c: Calibration) -> None:
    model, system = cal.subject()
    for gpus, batch in ((256, 768), (1024, 768), (3072, 6144), (12288, 6144)):
        found = slowdown(model, system, split(gpus, 8, 8, batch, 6), Levers.all(), c)
        gain = 100 * (found.clean - found.expected)
        probability = round(found.any_slow, 4)
        tables.add("stragglers", "mfu_gain", gain, "points", source="simulated", gpus=gpus, any_slow=probability)


def goodput(tables: Tables, c: Calibration) -> None:
    """Four weeks at 12,288 GPUs, by checkpoint interval; failures as often as the paper's restarts."""
    model, system = cal.subject()
    step = simulate(model, system, split(12288, 8, 8, 6144, 6), Levers.all(), c).seconds
    days, seeds = tables.arguments.days, tables.arguments.seeds
    job = FaultModel(1536, 430 * DAY, step)
    for name, save in (("two-stage", 10.0), ("synchronous", 120.0)):
        # saved at once or in the background, it is the same 130 s until it is safe
        one = replace(job, save=save, write=130.0 - save)
        best, guess = one.best_interval(), one.young_interval
        tables.add(
            name, "best_interval", best, "s", source="simulated", young=round(guess, 1), mtbf_hours=round(one.mtbf / 3600, 2)
        )
        for factor in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
            runs = [replace(one, interval=guess * factor).run(days * DAY, seed) for seed in range(seeds)]
            found = [100 * run.effective for run in runs]
            setting = {"source": "simulated", "interval": round(guess * factor, 1), "factor": factor}
            setting |= {"expected": round(100 * one.expected(guess * factor), 2), "ci": bootstrap_ci(found), "n": seeds}
            tables.add(name, "goodput", statistics.fmean(found), "%", **setting)
    runs = [job.run(days * DAY, seed) for seed in range(seeds)]
    for metric, value in {
        "restarts": [float(len(run.incidents)) for run in runs],
        "effective": [100 * run.effective for run in runs],
        "automatic": [100 * run.automatic for run in runs],
        "catch_up_minutes": [run.catch_up_seconds / 60 for run in runs],
    }.items():
        tables.add("robust", metric, statistics.fmean(value), source="simulated", gpus=12288, days=days, n=seeds)


def start_of_groups(tables: Tables) -> None:
    """Requests counted by the protocol at the paper's scale; on a real store with threads as processes; in seconds."""
    sizes = [1024, 2048, 4096, 8192, 12288]
    counts: dict[str, list[int]] = {}
    for name, ordered in (("naive", False), ("ordered", True)):
        counts[name] = [messages(one, ordered) for one in topologies(sizes)]
        for size, count in zip(sizes, counts[name], strict=True):
            tables.add(name, "requests", count, source="simulated", processes=size, tp=8, pp=8)
        exponent = np.polyfit(np.log(sizes), np.log(counts[name]), 1)[0]
        tables.add(name, "exponent", exponent, source="simulated", least=sizes[0], most=sizes[-1], n=len(sizes))
    seen = cal.published()["group_start"]
    small, large = counts["ordered"][1], counts["ordered"][-1]
    for store, service in store_seconds().items():
        tables.add(store, "seconds_per_request", service, "s", source="published", processes=2048)
    tables.add(
        "ordered",
        "start_seconds",
        service * small,
        "s",
        source="simulated",
        processes=2048,
        below=seen["ordered_seconds_below"],
    )
    tables.add(
        "ordered",
        "start_seconds",
        service * large,
        "s",
        source="simulated",
        processes=12288,
        below=seen["many_seconds_below"],
    )
    real = [16, 32, 64, 128]
    for name, ordered in (("naive", False), ("ordered", True)):
        asked = []
        for size in real:
            count, seconds = on_real_store(Topology(2, 2, size // 4), ordered)
            asked.append(count)
            tables.add(name, "requests", count, source="measured", processes=size, tp=2, pp=2, seconds=round(seconds, 3))
        exponent = np.polyfit(np.log(real), np.log(asked), 1)[0]
        tables.add(name, "exponent", exponent, source="measured", least=real[0], most=real[-1], n=len(real))


def on_real_store(topology: Topology, ordered: bool) -> tuple[int, float]:
    """(requests, seconds) with torch's TCPStore, and a thread with a connection of its own for every process."""
    from torch.distributed import TCPStore

    limit = timedelta(seconds=120)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
    clients = [TCPStore("localhost", server.port, is_master=False, timeout=limit) for _ in range(topology.size)]
    counts = [0] * topology.size

    def work(rank: int) -> None:
        counts[rank] = run_on_store(rank, topology, clients[rank], ordered)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(topology.size)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts), time.perf_counter() - begun


#: what the script writes into the documentation, between these
MARKS = "<!-- megascale: written by benchmarks/megascale_tables.py -->\n", "<!-- end -->"


def document(records: list[Record]) -> None:
    """Rewrites the tables of the page that has the marks."""

    def values(metric: str, **setting: Any) -> dict[Any, float]:
        found = find(records, metric=metric, **setting)
        return {(r.method, r.setting.get("gpus"), r.setting.get("lever")): r.value for r in found}

    columns = [{"source": "published"}, {"fit": "rows+ablation"}, {"fit": "line"}, {"fit": "calculon"}]
    seconds = [values("seconds", model="gpt-175b", **column) for column in columns]
    lines = [
        "| system | GPUs | fit saw it | paper, s | simulated, s | line, s | calculon, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in cal.runs():
        paper, *rest = (column[run.system, run.gpus, None] for column in seconds)
        cells = [f"{value:.2f} ({100 * (value / paper - 1):+.1f} %)" for value in rest]
        seen = "yes" if run.small else "no"
        lines.append(f"| {run.system} | {run.gpus:,} | {seen} | {paper:.2f} | {' | '.join(cells)} |")
    for system in ("megatron", "megascale"):
        mean = [values("held_out_error", **column)[system, None, None] for column in columns[1:]]
        cells = [f"**{value:.1f} %**" for value in mean]
        lines.append(f"| {system} | mean of 3,072 and more | no | | {' | '.join(cells)} |")
    fits = {"paper": {"source": "published"}, "simulated": {"fit": "rows+ablation"}, "without the ablation": {"fit": "rows"}}
    rungs = [values("mfu", **setting) for setting in fits.values()]
    lines += ["", f"| lever, 256 GPUs | {' | '.join(f'{name}, MFU %' for name in fits)} |", "|---" * (1 + len(fits)) + "|"]
    for key in rungs[0]:
        lines.append(f"| {key[2]} | {' | '.join(f'{column[key]:.1f}' for column in rungs)} |")
    for path in (Path(__file__).parent.parent / "docs").glob("*.md"):
        before, mark, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
        if mark:
            _, end, after = rest.partition(MARKS[1])
            path.write_text(before + mark + "\n" + "\n".join(lines) + "\n\n" + end + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--days", type=float, default=28.0, help="of simulated failures (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "megascale_tables.records.json"))
    tables = Tables(parser.parse_args())
    model, _ = cal.subject()
    fits = {
        "rows+ablation": cal.fit("rows+ablation"),
        "rows": cal.fit("rows"),
        "no-stragglers": cal.fit("rows+ablation", stragglers=False),
    }
    best = fits["rows+ablation"]
    constants = {name: float(f"{getattr(best, name):.6g}") for name in Calibration.fitted}
    fitted = {
        "origin": "written by benchmarks/megascale_tables.py: least squares on published.json's runs at 256-1,024 GPUs and "
        "its ablation; window: the share of the sequence that its MFU column counts",
        "constants": constants,
        "window": model.window / model.seq_size,
    }
    Path(str(folder() / "fitted.json")).write_text(json.dumps(fitted, indent=1) + "\n", encoding="utf-8")
    for name, value in asdict(best).items():
        tables.add("calibration", "constant", value, source="simulated", name=name, fitted=name in Calibration.fitted)
    utilisation(tables)
    scaling(tables, fits)
    ladder(tables, fits)
    sensitivity(tables)
    transfer(tables, best)
    agreement(tables, best)
    stragglers(tables, best)
    goodput(tables, best)
    start_of_groups(tables)
    for name, found in remedies().items():
        for metric, value in asdict(found).items():
            tables.add(name, f"flows_{metric}", value, source="simulated", n=2000)
    write_results(tables.records, tables.arguments.out)
    document(tables.records)


if __name__ == "__main__":
    main()
