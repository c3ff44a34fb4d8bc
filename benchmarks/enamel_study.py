"""ENAMEL: the canonical solutions on the official problems, two clocks, a simulated coder, and the estimator.

    python benchmarks/enamel_study.py [--data ../shared/data/enamel] [--parts estimator,coder,official,clocks] [--limit N]

``official`` scores the two canonical sets by the CPU clock (deaf to other load), and the references beside them; ``clocks``
scores one of them by executed instructions too and gives the rank correlation over the problems that pass by both; ``coder``
is SIMULATED. Each part's records replace those that it wrote before. A case's runs share a process, as they do officially.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from scipy.stats import spearmanr

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.enamel import (
    ENAMEL,
    Efficiency,
    builtin_problems,
    eff_at_k,
    read_problems,
    read_samples,
)
from broadsheet.methods.evals.enamel.world import SimCoder, expected_best

#: Problems at once: CPU time and counts do not mind.
WORKERS = 6
RESULTS = Path(__file__).parent / "results" / "enamel_study.records.json"
DATA = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "enamel"


def record(part: str, metric: str, value: float, **more) -> Record:
    setting = {"part": part, **more.pop("setting", {})}
    if more.get("ci") is not None:
        more["ci"] = tuple(map(float, more["ci"]))
    return Record(
        "enamel", "enamel", "enamel-study", metric, float(value), setting=setting, time=now(), **provenance(), **more
    )


def estimator() -> list[Record]:
    """Scores u^3 of which 40 % are zeros; n=100, k=10, 4,000 draws: bias, and deviations of three estimators."""
    rng, n, k, draws = np.random.default_rng(0), 100, 10, 4000
    scores = rng.random((draws, n)) ** 3 * (rng.random((draws, n)) >= 0.4)
    ours = [eff_at_k(row.tolist(), k) for row in scores]
    disjoint = scores.reshape(draws, k, n // k).max(2).mean(1)
    # E max of 10 with cdf F(x) = 0.4 + 0.6 x^(1/3), by the substitution x = y^3: 1 - int F^10 3 y^2 dy
    y = np.linspace(0, 1, 200_001)
    truth = 1 - np.trapezoid((0.4 + 0.6 * y) ** k * 3 * y**2, y)
    error = stdev(ours) / draws**0.5
    return [
        record(
            "estimator",
            "bias",
            fmean(ours) - truth,
            ci=(fmean(ours) - truth - 1.96 * error, fmean(ours) - truth + 1.96 * error),
            n=draws,
        ),
        record("estimator", "bias_in_standard_errors", (fmean(ours) - truth) / error, n=draws),
        record("estimator", "deviation", stdev(ours), n=draws, setting={"of": "ours"}),
        record("estimator", "deviation", float(scores[:, :k].max(1).std(ddof=1)), n=draws, setting={"of": "one subset"}),
        record("estimator", "deviation", float(disjoint.std(ddof=1)), n=draws, setting={"of": "ten disjoint subsets"}),
    ]


def coder(seeds: int = 20, samples: int = 40) -> list[Record]:
    """SIMULATED: asking for speed moves mass from slow and ok to best; the same known solutions by the instruction clock."""
    problems = builtin_problems()
    counted = Efficiency(clock="instructions")
    tiers = {}
    for problem in problems:
        scores, _ = counted.measure(problem, [code for _, code in problem.tiers])
        tiers[problem.id] = {name: score for (name, _), score in zip(problem.tiers, scores, strict=True)}
    world = SimCoder(problems)
    values = [{name: score.value for name, score in some.items()} for some in tiers.values()]
    found = []
    for k in (1, 10):
        truth = [fmean(expected_best(one, chances, k) for one in values) for chances in (world.plain, world.asked)]
        found.append(record("coder", f"eff@{k}_shift_expected", truth[1] - truth[0], model="sim:coder"))
    moved: dict[str, list[float]] = {}
    for seed in range(seeds):
        reports = []
        for ask in (False, True):
            chat = Chat(SimulatedChat(SimCoder(problems), "sim:coder", seed))
            bench = ENAMEL(epochs=samples, ks=(1, 10), ask_for_speed=ask, efficiency=counted)
            reports.append(bench.evaluate(chat))
        for name in ("eff@1", "eff@10", "pass@1"):
            moved.setdefault(name, []).append(reports[1].get(name).value - reports[0].get(name).value)
            for ask, report in zip((False, True), reports, strict=True):
                metric = report.get(name)
                found.append(
                    record(
                        "coder",
                        name,
                        metric.value,
                        ci=metric.ci,
                        n=metric.n,
                        seed=seed,
                        model="sim:coder",
                        setting={"asked": ask},
                    )
                )
    for name, some in moved.items():
        found.append(record("coder", f"{name}_shift", fmean(some), ci=bootstrap_ci(some), n=seeds, model="sim:coder"))
        found.append(record("coder", f"{name}_shift_se", stdev(some) / seeds**0.5, n=seeds, model="sim:coder"))
    return found


def _progress(what: str):
    begin = time.time()

    def done(count: int, total: int) -> None:
        if count % 20 == 0 or count == total:
            print(f"{what}: {count} of {total}, {time.time() - begin:.0f} s", flush=True)

    return done


def official(data: Path, limit: int | None) -> list[Record]:
    """The canonical rows, all samples of a problem beside each other: [HumanEval, HumanEval+]."""
    problems = read_problems(data / "enamel.csv")[:limit]
    names = ("humaneval-canonical", "humanevalplus-canonical")
    sets = {name: read_samples_of(data / f"{name}.json", problems) for name in names}
    together = {problem.id: [sets[name][problem.id][0] for name in names] for problem in problems}
    found = []
    evaluation = Efficiency(clock="cpu", isolate=False).evaluate(together, problems, _progress("official"), WORKERS)
    for number, name in enumerate(names):
        one = type(evaluation)({p: (s[number],) for p, s in evaluation.scores.items()}, evaluation.references, "cpu")
        for metric in one.metrics((1,), allow_noise=True):
            found.append(
                record(
                    "official", metric.name, metric.value, ci=metric.ci, n=metric.n, setting={"set": name, "clock": "cpu"}
                )
            )
        found.append(
            record("official", "offenders", len(one.offenders), n=len(problems), setting={"set": name, "clock": "cpu"})
        )
    return found


def read_samples_of(path: Path, problems) -> dict[str, list[str]]:
    """The samples of these problems alone, where a set was cut short."""
    every = read_samples(path, read_problems(path.parent / "enamel.csv"))
    return {problem.id: every[problem.id] for problem in problems}


def clocks(data: Path, limit: int | None) -> list[Record]:
    """HumanEval+'s canonical solutions by CPU time and by executed instructions, where they pass by both."""
    problems = read_problems(data / "enamel.csv")[:limit]
    samples = read_samples_of(data / "humanevalplus-canonical.json", problems)
    values: dict[str, dict[str, float]] = {}
    for clock in ("instructions", "cpu"):
        scoring = Efficiency(clock=clock, isolate=False)
        evaluation = scoring.evaluate(samples, problems, _progress(f"clocks, {clock}"), WORKERS)
        values[clock] = {name: some[0].value for name, some in evaluation.scores.items() if some[0].passed}
    both = [name for name in values["cpu"] if name in values["instructions"]]
    pairs = [(values["instructions"][name], values["cpu"][name]) for name in both]
    rank = spearmanr(*zip(*pairs, strict=True)).statistic
    found = [record("clocks", "spearman", rank, n=len(pairs), setting={"set": "humanevalplus-canonical"})]
    for name, some in zip(("instructions", "cpu"), zip(*pairs, strict=True), strict=True):
        found.append(
            record(
                "clocks",
                "mean_score_of_passed",
                fmean(some),
                n=len(pairs),
                ci=bootstrap_ci(some),
                setting={"clock": name},
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--parts", default="estimator,coder,official,clocks")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    for part in parts:
        if part in ("official", "clocks") and not (arguments.data / "enamel.csv").exists():
            print(f"{part} needs the official files: --data {arguments.data} has no enamel.csv")
            continue
        made = {"estimator": estimator, "coder": coder}.get(part) or (
            lambda part=part: {"official": official, "clocks": clocks}[part](arguments.data, arguments.limit)
        )
        found = made()
        for one in found:
            print(one.setting, one.metric, round(one.value, 4), one.ci, f"seed {one.seed}")
        if not arguments.dry:
            kept = [one for one in read_json(RESULTS) if one.setting["part"] != part] if RESULTS.exists() else []
            write_results([*kept, *found], RESULTS)


if __name__ == "__main__":
    main()
