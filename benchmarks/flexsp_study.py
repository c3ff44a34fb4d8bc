"""FlexSP's planners on the same batches, by predicted time, with a lower bound and what planning takes.

    python benchmarks/flexsp_study.py --lengths wikipedia.txt [--batches 25] [--parts planners milp ...]

SIMULATED: times of steps are the cost model's (the authors' profiles of A100s). ``--lengths``: the authors' file of lengths
(PKU-DAIR/Hetu-Galvatron, branch flexsp, galvatron/datasets/wikipedia.txt); without it lengths are drawn like those. Records
are merged into those of parts that ran before.

``planners``: GPT-7B, 64 devices of 30 GB, 512 sequences a batch, context 192K. ``static`` is the smallest degree that holds
the context, ``best static`` the best single degree for the whole run. ``milp``: the mixed-integer program, groups of two or
more devices as the authors have, beside ours under the same rule. ``models``: other cost models and contexts. ``uniform``:
lengths without a tail, where nothing should be gained. ``small``: greedy and the program beside enumeration on 8 devices.
Planning is in seconds of a processor.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.flexsp import FlexSP, Plan, Problem, SPCostModel, planned, warm_up
from broadsheet.methods.estimates.flexsp.picture import picture
from broadsheet.methods.estimates.flexsp.planners import in_chunks, static
from broadsheet.methods.estimates.flexsp.program import Milp

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "flexsp_plans.svg"
PLANNERS = ("static", "adaptive", "balanced", "greedy", "search")
OURS = ("balanced", "greedy", "search", "milp")  #: those whose speedups are recorded


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.records = arguments, list[Record]()
        self.source = "public file" if arguments.lengths else "drawn"

    def record(
        self, method: str, metric: str, values: Sequence[float], part: str, unit: str = "", how: str = "mean", **setting: Any
    ) -> None:
        """The mean over batches with its interval, or their median, smallest or largest."""
        found = {"mean": statistics.fmean, "median": statistics.median, "min": min, "max": max}[how](values)
        interval = bootstrap_ci(values) if how == "mean" and len(values) > 1 else None
        model, lengths = "sim:" + setting.pop("model", "gpt-7b-a100"), setting.pop("lengths", self.source)
        parameters = {"devices": 64, "memory_gb": 30, "batch": 512} if part != "small" else {"devices": 8, "memory_gb": 80}
        self.records.append(
            Record(
                paper="flexsp", method=method, bench="flexsp-study", metric=metric, value=float(found), unit=unit,
                ci=interval, n=len(values), model=model, parameters=parameters,
                setting={"part": part, "lengths": lengths, **setting}, time=now(), **provenance(),
            )
        )  # fmt: skip
        shown = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        print(f"SIMULATED {part:<9} {method:<12} {metric:<20} {found:9.4f}{shown} {setting or ''}", flush=True)

    def batches(self, count: int, context: int = 192_000) -> list[list[int]]:
        groups, _, _ = FlexSP(context=context).batches(self.arguments.lengths or "wikipedia", 512, count)
        return groups

    def plans(self, plans: dict[str, list[Plan]], part: str, **setting: Any) -> None:
        """What is recorded of planners on the same batches."""
        bounds = [plan.bound / 1000 for plan in next(iter(plans.values()))]
        self.record("lower bound", "step_seconds", bounds, part, "s", **setting)
        for name, found in plans.items():
            self.record(name, "step_seconds", [plan.time / 1000 for plan in found], part, "s", **setting)
            self.record(name, "gap", [plan.gap for plan in found], part, **setting)
            self.record(name, "all_to_all", [plan.all_to_all for plan in found], part, **setting)
            self.record(name, "idle", [plan.idle for plan in found], part, **setting)
            self.record(name, "planning_seconds", [plan.seconds for plan in found], part, "s", "median", **setting)
            self.record(name, "longest_planning", [plan.seconds for plan in found], part, "s", "max", **setting)
            for over in ("static", "best static", "adaptive", "balanced", "milp"):
                if name in OURS and over in plans and over != name:
                    ratios = [theirs.time / ours.time for theirs, ours in zip(plans[over], found, strict=True)]
                    self.record(name, "speedup", ratios, part, over=over, **setting)
                    self.record(name, "worst_speedup", ratios, part, how="min", over=over, **setting)


def problems(groups: Sequence[Sequence[int]], model: str, context: int, smallest: int = 1) -> list[Problem]:
    cost = SPCostModel.from_preset(model)
    return [Problem.of(group, 64, 30, cost, context, smallest) for group in groups]


def best_static(some: Sequence[Problem]) -> list[Plan]:
    """The plans of the one degree that is the best over all batches and holds their longest sequences."""
    longest = max(max(problem.lengths) for problem in some)
    fits = [degree for degree in some[0].degrees if longest <= some[0].capacity * degree]
    return min(([static(problem, d) for problem in some] for d in fits), key=lambda plans: sum(p.time for p in plans))


def run(some: Sequence[Problem], names: Sequence[str], context: int) -> dict[str, list[Plan]]:
    plans: dict[str, list[Plan]] = {}
    for name in names:
        plans[name] = [planned(problem, name, context=context) for problem in some]
        for plan in plans[name]:
            plan.check()
    return {"best static": best_static(some), **plans} if "static" in names else plans


def planners(study: Study) -> None:
    some = problems(study.batches(study.arguments.batches), "gpt-7b-a100", 192_000)
    plans = run(some, PLANNERS, 192_000)
    study.plans(plans, "planners", smallest=1)
    PICTURE.write_text(picture([plans[name][0] for name in PLANNERS]), encoding="utf-8")


def milp(study: Study) -> None:
    """The program in HiGHS, 5 s a micro-batch, beside the planners under its rule of two devices a group or more."""
    limit = study.arguments.time_limit
    some = problems(study.batches(study.arguments.milp_batches), "gpt-7b-a100", 192_000, 2)
    plans = run(some, ("adaptive", "balanced", "greedy", "search"), 192_000)
    plans["milp"] = []
    for number, problem in enumerate(some):
        plan = in_chunks(problem, "auto", "sorted", "milp", Milp(problem, limit))
        plan.check()
        plans["milp"].append(plan)
        seconds = sum(plan.detail["program_seconds"])
        print(
            f"  batch {number}: {plan.time:.0f} ms, {plan.detail['from']}, {plan.detail['status']}, {seconds:.0f} s",
            flush=True,
        )
    study.plans(plans, "milp", smallest=2, time_limit=limit)
    every = [(gap, seconds, source) for p in plans["milp"] for gap, seconds, source in _programs(p)]
    found = [gap for gap, _, _ in every if np.isfinite(gap)]
    study.record("milp", "program_gap", found, "milp", smallest=2, time_limit=limit)
    study.record("milp", "program_seconds", [s for _, s, _ in every], "milp", "s", smallest=2, time_limit=limit)
    used = [float(source == "program") for _, _, source in every]
    study.record("milp", "found_by_program", used, "milp", smallest=2, time_limit=limit)


def _programs(plan: Plan) -> list[tuple[float, float, str]]:
    return list(zip(plan.detail["program_gap"], plan.detail["program_seconds"], plan.detail["from"], strict=True))


def models(study: Study) -> None:
    for model in ("gpt-7b-a100", "gpt-13b-a100", "gpt-30b-a100"):
        for context in (192_000, 384_000):
            if (model, context) == ("gpt-7b-a100", 192_000):
                continue  # that is `planners`
            some = problems(study.batches(study.arguments.batches, context), model, context)
            study.plans(run(some, PLANNERS, context), "models", model=model, context=context, smallest=1)


def uniform(study: Study) -> None:
    for low, high in ((1000, 3000), (1000, 6000)):
        rng = np.random.default_rng(0)
        groups = [rng.integers(low, high, 512).tolist() for _ in range(5)]
        some = problems(groups, "gpt-7b-a100", high)
        study.plans(run(some, PLANNERS, high), "uniform", lengths=f"uniform {low}-{high}", smallest=1)


def small(study: Study) -> None:
    """Random batches of 4 to 9 sequences on 8 devices, in one micro-batch, where everything can be tried."""
    ratios: dict[str, list[float]] = {"greedy": [], "search": [], "milp": []}
    cost, rng = SPCostModel.from_preset("gpt-7b-a100"), np.random.default_rng(0)
    while len(ratios["greedy"]) < study.arguments.cases:
        lengths = np.exp(rng.normal(8.2, 1.3, rng.integers(4, 10))).astype(int).clip(100, 40_000).tolist()
        problem = Problem.of(lengths, 8, 80, cost)
        if problem.tokens > 0.8 * problem.room:
            continue
        best = planned(problem, "exhaustive", 1).time
        for name in ("greedy", "search"):
            ratios[name].append(planned(problem, name, 1).time / best)
        if len(ratios["milp"]) < study.arguments.cases // 5:  # the program takes a second each
            exact = in_chunks(problem, 1, "sorted", "milp", Milp(problem, 60.0, buckets=0))
            ratios["milp"].append(exact.time / best)
    for name, found in ratios.items():
        study.record(name, "over_optimum", found, "small", lengths="lognormal")
        study.record(name, "worst_over_optimum", found, "small", how="max", lengths="lognormal")
        within = [float(ratio <= 1.02) for ratio in found]
        study.record(name, "within_2_percent", within, "small", lengths="lognormal")


PARTS: dict[str, Callable[[Study], None]] = {
    "planners": planners, "milp": milp, "models": models, "uniform": uniform, "small": small,
}  # fmt: skip


def merged(records: Sequence[Record], path: str) -> list[Record]:
    """What the file holds already, with these in place of those that measure the same."""

    def key(record: Record) -> str:
        return f"{record.method} {record.metric} {record.model} {sorted(record.setting.items())}"

    old = {key(record): record for record in read_json(path)} if Path(path).exists() else {}
    return list((old | {key(record): record for record in records}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="", help="a file with one length a line; default: drawn like Wikipedia's")
    parser.add_argument("--batches", type=int, default=25)
    parser.add_argument("--milp-batches", type=int, default=25)
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds of the program a micro-batch")
    parser.add_argument("--cases", type=int, default=200, help="random small cases")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "flexsp_study.records.json"))
    study = Study(arguments := parser.parse_args())
    print(f"compiled in {warm_up():.1f} s")
    for part in arguments.parts:
        PARTS[part](study)
        write_results(merged(study.records, arguments.out), arguments.out)


if __name__ == "__main__":
    main()
