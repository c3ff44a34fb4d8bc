"""INSTINCT beside its rivals and its own variants, on a simulated black box at 165 evaluations.

    python benchmarks/instinct_study.py [--seeds 10] [--steps 300]

SIMULATED: the black box and the space are instruments (`methods.evals.instinct.world`): "easy" has 10 dimensions and a
smooth map to features, "hard" 40 and a rough one. ``mean_reward`` is over the 125 rounds after the initial points,
``true_score`` of the instruction that was chosen, ``regret`` what the best of the space has above it, ``optimism`` what the
search believed above a fresh score. ``ratio`` is to random search on the same seeds. Then: where it stops helping, by
``nu`` and by the number of samples behind a score.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.instinct import INSTINCT, Row
from broadsheet.methods.evals.instinct.world import BlackBox, easy, hard

WORLDS: dict[str, Callable[[int], BlackBox]] = {"easy": easy, "hard": hard}
RIVALS = ("random", "gp", "gp_z", "evolution", "neural_unit", "neural_z", "neural_unique")
NUS = (0.01, 1.0, 10.0, 100.0)
SAMPLES = (5, 1)
POINTS = (40, 80, 120, 165)


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.records = arguments, list[Record]()
        self.method = INSTINCT(n_domain=4000, steps=arguments.steps, nu=0.1)

    def add(self, method: str, metric: str, values: Sequence[float], world: str, **setting: Any) -> None:
        interval = bootstrap_ci(values) if len(values) > 1 else None
        self.record(method, metric, statistics.fmean(values), interval, len(values), world, **setting)

    def record(
        self, method: str, metric: str, value: float, ci: tuple[float, float] | None, n: int, world: str, **setting: Any
    ) -> None:
        parameters = {"budget": 165, "steps": self.arguments.steps, "nu": self.method.nu}
        self.records.append(
            Record(
                paper="instinct", method=method, bench="instinct-study", metric=metric, value=value, ci=ci, n=n,
                model="sim:black-box", parameters=parameters, setting={"world": world, **setting}, time=now(),
                **provenance(),
            )
        )  # fmt: skip
        shown = f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else ""
        print(f"SIMULATED {world:<5} {method:<12} {metric:<14} {value:8.4f}{shown} {setting or ''}", flush=True)

    def rows(self, rows: dict[str, list[tuple[BlackBox, Row]]], world: str) -> None:
        for name, found in rows.items():
            self.add(name, "mean_reward", [row.mean_reward for _, row in found], world)
            self.add(name, "true_score", [box.truth(row.best) for box, row in found], world)
            self.add(name, "regret", [box.best - box.truth(row.best) for box, row in found], world)
            self.add(name, "searched", [row.searched for _, row in found], world)
            self.add(name, "optimism", [row.optimism for _, row in found], world)
            self.add(name, "paid", [float(row.paid) for _, row in found], world)
            self.add(name, "hits", [float(row.hits) for _, row in found], world)
            for point in POINTS:
                self.add(name, "best_so_far", [row.curve[point - 1] for _, row in found], world, round=point)
        base = [row.mean_reward for _, row in rows["random"]]
        for name, found in rows.items():
            if name != "random":
                self.ratio(name, [row.mean_reward for _, row in found], base, world)
        for name, against in (("gp", "gp_z"), ("instinct", "neural_z"), ("instinct", "gp"), ("instinct", "evolution")):
            if not {name, against} <= rows.keys():
                continue
            ours, theirs = ([row.mean_reward for _, row in rows[one]] for one in (name, against))
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            self.add(name, "gain", gains, world, against=against)

    def ratio(self, name: str, ours: Sequence[float], base: Sequence[float], world: str, **setting: Any) -> None:
        """Mean over mean, with the interval over seeds, and Wilcoxon's p of a difference."""
        a, b = np.array(ours), np.array(base)
        picks = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
        low, high = np.quantile(a[picks].mean(1) / b[picks].mean(1), [0.025, 0.975])
        p = float(wilcoxon(a, b).pvalue) if (a != b).any() else 1.0
        self.record(name, "ratio", a.mean() / b.mean(), (float(low), float(high)), len(a), world, p=round(p, 5), **setting)


def methods(study: Study, boxes: Sequence[BlackBox], world: str, rivals: Sequence[str]) -> None:
    """INSTINCT and its rivals on every seed."""
    rows: dict[str, list[tuple[BlackBox, Row]]] = {}
    for seed, box in enumerate(boxes):
        for row in study.method.optimise(box.space, box, seed, rivals).table:
            rows.setdefault(row.method, []).append((box, row))
    study.rows(rows, world)


def sweeps(study: Study, boxes: Sequence[BlackBox], world: str) -> None:
    """By nu, beside random search; and by samples behind a score, both."""
    table = [
        replace(study.method, steps=0).optimise(box.space, box, seed, ("random",)).table for seed, box in enumerate(boxes)
    ]
    base = [rows[1].mean_reward for rows in table]
    for nu in NUS:
        run = replace(study.method, nu=nu).optimise
        found = [run(box.space, box, seed).table[0] for seed, box in enumerate(boxes)]
        study.ratio("instinct", [row.mean_reward for row in found], base, world, nu=nu)
        study.add("instinct", "mean_reward", [row.mean_reward for row in found], world, nu=nu)
        study.add("instinct", "true_score", [b.truth(r.best) for b, r in zip(boxes, found, strict=True)], world, nu=nu)
    for samples in SAMPLES:
        noisy = [replace(box, samples=samples) for box in boxes]
        both = [study.method.optimise(box.space, box, seed, ("random",)).table for seed, box in enumerate(noisy)]
        ours, theirs = ([table[place].mean_reward for table in both] for place in (0, 1))
        study.ratio("instinct", ours, theirs, world, samples=samples)
        for place, name in enumerate(("instinct", "random")):
            chosen = [b.truth(t[place].best) for b, t in zip(noisy, both, strict=True)]
            study.add(name, "true_score", chosen, world, samples=samples)
            study.add(name, "optimism", [t[place].optimism for t in both], world, samples=samples)


def merged(records: Sequence[Record], path: str) -> list[Record]:
    """What the file holds already, with these in place of those that measure the same."""

    def key(record: Record) -> str:
        setting = {name: value for name, value in record.setting.items() if name != "p"}
        return f"{record.method} {record.metric} {sorted(setting.items())}"

    old = {key(record): record for record in read_json(path)} if Path(path).exists() else {}
    return list((old | {key(record): record for record in records}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sweep-seeds", type=int, default=5, help="of nu and of samples (default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=300, help="Adam steps a round; the authors take 1000 (default %(default)s)"
    )
    parser.add_argument("--rivals", nargs="*", default=RIVALS, help="with random always among them")
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "instinct_study.records.json"))
    study = Study(arguments := parser.parse_args())
    for world in arguments.worlds:
        boxes = [WORLDS[world](seed) for seed in range(arguments.seeds)]
        methods(study, boxes, world, ("random", *(name for name in arguments.rivals if name != "random")))
        if arguments.sweep_seeds:
            sweeps(study, boxes[: arguments.sweep_seeds], world)
    write_results(merged(study.records, arguments.out), arguments.out)


if __name__ == "__main__":
    main()
