"""Sequential monitors: what reading along gains, what it costs, and where it stops helping.

    python benchmarks/sequential_monitors_study.py [--seeds 5]

SIMULATED: parts "table" to "prompts" ask an instrument (`methods.evals.sequential_monitors.world`). "table": single,
cumulative and final-check monitors, threshold by F1 on 1,000 tasks, then 2,000 others; as many benign requests mixed in;
and a monitor that weighs requests by relevance. "noise": reading noise of the cumulative monitor alone (``noise``), or
growing with the list (``fatigue``), beside a single-request monitor whose noise stays .3. "prompts": six prompts of known
noise, the best must be picked. "trained": classifiers on the office world, no model. "tokens": exact counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.sequential_monitors import SequentialMonitor, Task, inject, leak
from broadsheet.methods.evals.sequential_monitors.office import FAMILIES, make_tasks
from broadsheet.methods.evals.sequential_monitors.scoring import Peaks, Trace, counts, first_flags, recall_at, token_costs
from broadsheet.methods.evals.sequential_monitors.trained import TrainedMonitor
from broadsheet.methods.evals.sequential_monitors.world import SimMonitor, make_world

LEVELS = (0.01, 0.05, 0.2)
NOISES = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)
FATIGUES = (0.1, 0.2, 0.4, 0.8)
#: reading noise of six prompts: the best stands out, or hardly
PROMPTS = {"clear": (0.3, 1.0, 1.3, 1.6, 2.0, 2.5), "close": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}


class Study:
    def __init__(self, seeds: int):
        self.seeds, self.records = range(seeds), list[Record]()

    def add(self, method: str, metric: str, values: Sequence[float], model: str = "sim:monitor", **setting: Any) -> None:
        """One value a seed: their mean and its interval over seeds."""
        ci = bootstrap_ci(values) if len(values) > 1 else None
        value = statistics.fmean(values)
        self.records.append(
            Record(
                paper="sequential-monitors", method=method, bench="sequential-monitors-study", metric=metric, value=value,
                ci=ci, n=len(values), model=model, setting=setting, time=now(), **provenance(),
            )
        )  # fmt: skip
        shown = f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else ""
        label = "SIMULATED " if model.startswith("sim:") else ""
        print(f"{label}{method:<12} {metric:<14} {value:.4f}{shown} {setting}", flush=True)

    def rates(self, method: str, found: Sequence[dict[str, float]], **setting: Any) -> None:
        for metric in found[0]:
            self.add(method, metric, [one[metric] for one in found], **setting)


def read(tasks: Sequence[Task], world: SimMonitor, mode: str) -> list[Trace]:
    """Scores of every step: what a monitor over a chat is told (the tests compare the two), without the chat."""
    return world.scores(SequentialMonitor(Chat(SimulatedChat(world)), mode=mode), tasks)  # type: ignore[arg-type]


def rates(traces: Sequence[Trace], threshold: float) -> dict[str, float]:
    """F1, DSR, false alarms, first flag; recall at fixed false alarms."""
    made = counts(traces, threshold)
    flags = first_flags(traces, threshold)
    found = {"f1": made.f1, "dsr": made.recall, "fpr": made.fpr, "first_flag": statistics.fmean(flags) if flags else 1.0}
    return {**found, **{f"recall@fpr={level:g}": recall_at(traces, level) for level in LEVELS}}


def table(study: Study) -> None:
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in study.seeds:
        tasks, secrets = make_world(3000, seed)
        validation, test = tasks[:1000], tasks[1000:]
        crowded = [inject(task, test, 1.0, seed) for task in test]
        for mode in ("single", "cumulative", "final"):
            world = SimMonitor(secrets, seed=seed)
            tau = Peaks.of(read(validation, world, mode)).best_f1_threshold()
            rows.setdefault((mode, "plain"), []).append(rates(read(test, world, mode), tau))
            if mode != "final":
                rows.setdefault((mode, "injected"), []).append(rates(read(crowded, world, mode), tau))
        world = SimMonitor(secrets, focus=2.0, seed=seed)
        tau = Peaks.of(read(validation, world, "cumulative")).best_f1_threshold()
        rows.setdefault(("relevance", "plain"), []).append(rates(read(test, world, "cumulative"), tau))
        rows.setdefault(("relevance", "injected"), []).append(rates(read(crowded, world, "cumulative"), tau))
    for (method, kind), found in rows.items():
        study.rates(method, found, part="table", tasks=kind)
    single, cumulative = rows["single", "plain"], rows["cumulative", "plain"]
    for metric in ("f1", "recall@fpr=0.05"):
        gains = [b[metric] - a[metric] for a, b in zip(single, cumulative, strict=True)]
        study.add("cumulative", f"{metric}_gain", gains, part="table", against="single")
        study.add("cumulative", f"{metric}_wins", [float(sum(gain > 0 for gain in gains))], part="table", against="single")
    for method in ("single", "cumulative", "relevance"):
        pairs = zip(rows[method, "plain"], rows[method, "injected"], strict=True)
        study.add(method, "injection_fall", [a["f1"] - b["f1"] for a, b in pairs], part="table")
    pairs = zip(rows["relevance", "injected"], rows["cumulative", "injected"], strict=True)
    study.add("relevance", "injection_repair", [a["f1"] - b["f1"] for a, b in pairs], part="table", against="cumulative")


def noise(study: Study) -> None:
    """At which reading noise a cumulative monitor is no better than a single-request one with noise .3."""
    baseline: list[dict[str, float]] = []
    found: dict[tuple[str, float], list[dict[str, float]]] = {}

    def measured(tasks: Sequence[Task], world: SimMonitor, mode: str) -> dict[str, float]:
        traces = read(tasks, world, mode)
        return rates(traces[400:], Peaks.of(traces[:400]).best_f1_threshold())

    for seed in study.seeds:
        tasks, secrets = make_world(1000, 100 + seed)
        baseline.append(measured(tasks, SimMonitor(secrets, seed=seed), "single"))
        for level in NOISES:
            found.setdefault(("noise", level), []).append(
                measured(tasks, SimMonitor(secrets, level, seed=seed), "cumulative")
            )
        for level in FATIGUES:
            world = SimMonitor(secrets, fatigue=level, seed=seed)
            found.setdefault(("fatigue", level), []).append(measured(tasks, world, "cumulative"))
    study.rates("single", baseline, part="noise", noise=0.3)
    for (kind, level), some in found.items():
        for metric in ("f1", "recall@fpr=0.05"):
            gains = [one[metric] - other[metric] for one, other in zip(some, baseline, strict=True)]
            study.add("cumulative", f"{metric}_gain", gains, part="noise", against="single", **{kind: level})
    for kind, levels in (("noise", NOISES), ("fatigue", (0.0, *FATIGUES))):
        for metric in ("f1", "recall@fpr=0.05"):
            base = statistics.fmean(one[metric] for one in baseline)
            start = ("noise", 0.3)
            means = [statistics.fmean(one[metric] for one in found[(kind, x) if x else start]) for x in levels]
            study.add(
                "cumulative", f"{metric}_equal_at", [crossing(levels, [m - base for m in means])], part="noise", sweep=kind
            )


def crossing(levels: Sequence[float], gains: Sequence[float]) -> float:
    """Where the gain falls to 0, between two levels; infinite when it does not."""
    for (a, b), (x, y) in zip(pairwise(levels), pairwise(gains), strict=True):
        if x > 0 >= y:
            return a + (b - a) * x / (x - y)
    return float("inf") if gains[-1] > 0 else levels[0]


def prompts(study: Study, trials: int) -> None:
    """Which of six is picked by F1 at 400 validation tasks, and what its validation F1 promises above the test's."""
    for kind, levels in PROMPTS.items():
        right, optimism, gain, lost = [], [], [], []
        for trial in range(trials):
            tasks, secrets = make_world(1200, 1000 + trial)
            values, scores = [], []
            for number, level in enumerate(levels):
                traces = read(tasks, SimMonitor(secrets, level, seed=number), "cumulative")
                validation = Peaks.of(traces[:400])
                tau = validation.best_f1_threshold()
                values.append(validation.counts(tau).f1)
                scores.append(counts(traces[400:], tau).f1)
            picked = int(np.argmax(values))
            right.append(float(picked == 0))
            optimism.append(values[picked] - scores[picked])
            gain.append(scores[picked] - statistics.fmean(scores))
            lost.append(scores[0] - scores[picked])
        study.add("selection", "picked_best", right, part="prompts", six=kind, validation=400)
        study.add("selection", "optimism", optimism, part="prompts", six=kind, validation=400)
        study.add("selection", "f1_gain", gain, part="prompts", six=kind, against="mean of six")
        study.add("selection", "f1_lost", lost, part="prompts", six=kind, against="best of six")


def trained(study: Study) -> None:
    """Classifiers on the office: by mode and label; from one family to another; and the leak check."""
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    leaks: dict[str, list[float]] = {"first request": [], "all requests": []}
    for seed in study.seeds:
        train, validation, test = (make_tasks(count, seed=1000 * k + seed) for k, count in ((1, 600), (2, 200), (3, 400)))
        leaks["first request"].append(leak(test + train, lambda task: task.subtasks[:1]))
        leaks["all requests"].append(leak(test + train, lambda task: task.subtasks))
        for mode in ("single", "windowed", "cusum", "final", "cumulative"):
            for label in ("task", "goal"):
                monitor = TrainedMonitor(mode, pairs=True, label=label).fit(train)  # type: ignore[arg-type]
                tau = Peaks.of(monitor.traces(validation)).best_f1_threshold()
                found.setdefault((mode, label, "all"), []).append(rates(monitor.traces(test), tau))
        for source in FAMILIES:
            own = make_tasks(600, source.name, seed=4000 + seed)
            monitor = TrainedMonitor(pairs=True, label="goal").fit(own[:450])
            tau = Peaks.of(monitor.traces(own[450:])).best_f1_threshold()
            for target in FAMILIES:
                kind = "same" if source == target else "other"
                some = monitor.traces(make_tasks(200, target.name, seed=5000 + seed))
                found.setdefault(("cumulative", "goal", f"{kind} family"), []).append(rates(some, tau))
    for (mode, label, kind), some in found.items():
        for metric in some[0]:
            values = [one[metric] for one in some]
            study.add(mode, metric, values, model="bag of words", part="trained", label=label, tasks=kind)
    for kind, aucs in leaks.items():
        study.add("leak", "auc", aucs, model="bag of words", part="trained", requests=kind)


def tokens(study: Study) -> None:
    """Requests of 25 tokens, a head of 150, a question of 40, an answer of 3."""
    for length in (5, 10, 19):
        cost = token_costs([25] * length, answer=3, head=150, question=40, start=2)
        study.add("cumulative", "tokens", [float(cost.cumulative)], model="counted", part="tokens", length=length)
        study.add("incremental", "tokens", [float(cost.incremental)], model="counted", part="tokens", length=length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=20, help="of prompt selection (default %(default)s)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "sequential_monitors_study.records.json"))
    arguments = parser.parse_args()
    study = Study(arguments.seeds)
    tokens(study)
    trained(study)
    table(study)
    noise(study)
    prompts(study, arguments.trials)
    write_results(study.records, arguments.out)


if __name__ == "__main__":
    main()
