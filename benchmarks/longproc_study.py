"""LongProc: what the instrument's error a line does to every task, beside the closed forms; official scores beside ours.

    python benchmarks/longproc_study.py [--official FOLDER]

Writes `benchmarks/results/longproc_study.records.json`. SIMULATED: a writer that goes wrong with probability e a line (and
gets back with q) answers generated items; accuracy, right prefix and rows must meet their closed forms within 3 standard
errors (field ``z``). ``--official``: the repository's data folder, whose own references must score 1.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from broadsheet.core.chat.simulated import Draw
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.longproc import (
    LEVELS,
    TASKS,
    Item,
    Score,
    load_longproc,
    make_countdown,
    make_html,
    make_path_traversal,
    make_tom,
    make_travel,
    score,
)
from broadsheet.methods.evals.longproc.common import lines_of
from broadsheet.methods.evals.longproc.world import LineByLine, accuracy, line_share, prefix_share

ERROR, SEEDS, ITEMS, ANSWERS = 0.01, 3, 20, 200
MAKE: dict[str, Callable[[int, int], Item]] = {
    "path_traversal": lambda steps, seed: make_path_traversal(steps, steps, seed),
    "tom_tracking": lambda steps, seed: make_tom(steps - 1, seed=seed),  # and the initial state
    "countdown": make_countdown,
    "travel_planning": make_travel,
    "html_to_tsv": lambda steps, seed: make_html(steps, seed, filtered=False),
}
STEPS = {
    "path_traversal": (24, 96, 384),
    "tom_tracking": (24, 96, 384),
    "countdown": (24, 96, 384),
    "travel_planning": (48, 96, 384),
    "html_to_tsv": (24, 96),
}


def answered(task: str, steps: int, recovery: float, seed: int) -> tuple[list[Score], list[Score], list[int]]:
    """(our scores, official scores, lines of the trace) of simulated answers."""
    world, module = LineByLine((), ERROR, recovery), TASKS[task]
    items = [MAKE[task](steps, 1000 * seed + number) for number in range(ITEMS)]
    lines = [len(lines_of("\n".join(module.parts(item)[1]))) for item in items]
    ours, official = [], []
    for number in range(ANSWERS):
        item = items[number % ITEMS]
        text = world.answer(module, item, Draw(f"study {task} {seed} {steps} {recovery} {number}"))
        ours.append(score(task, item, text))
        official.append(score(task, item, text, compat=True))
    return ours, official, [lines[number % ITEMS] for number in range(ANSWERS)]


def record(task: str, metric: str, values: Sequence[float], seed: int, expected: float | None = None, **setting) -> Record:
    value, spread = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if expected is not None:
        setting |= {"expected": expected, "z": (value - expected) / spread if spread else 0.0}
    return Record(
        "longproc",
        task,
        "longproc-study",
        metric,
        value,
        ci=bootstrap_ci(values),
        n=len(values),
        seed=seed,
        model="sim:lines",
        setting=setting,
        time=now(),
        **provenance(),
    )


def simulated() -> list[Record]:
    found = []
    for task, lengths in STEPS.items():
        for steps in lengths:
            for recovery in (0.0, 0.2) if task in ("path_traversal", "html_to_tsv") else (0.0,):
                for seed in range(SEEDS):
                    ours, official, lines = answered(task, steps, recovery, seed)
                    mean = statistics.fmean
                    right = mean(
                        line_share(ERROR, recovery, n) if task == "html_to_tsv" else accuracy(ERROR, n) for n in lines
                    )
                    cell = {"part": "closed form", "steps": steps, "error": ERROR, "recovery": recovery}
                    found.append(record(task, "accuracy", [one.accuracy for one in ours], seed, right, **cell))
                    prefix = mean(prefix_share(ERROR, n) for n in lines)
                    found.append(record(task, "prefix", [one.prefix / one.lines for one in ours], seed, prefix, **cell))
                    found.append(record(task, "partial", [one.partial for one in ours], seed, **cell))
                    found.append(record(task, "partial_official", [one.partial for one in official], seed, **cell))
                    found.append(record(task, "accuracy_official", [one.accuracy for one in official], seed, **cell))
                    print(f"SIMULATED {task:16} {steps:4} steps, q {recovery}: " + ", ".join(
                        f"{r.metric} {r.value:.3f}" + (f" ({r.setting['expected']:.3f})" if "expected" in r.setting else "")
                        for r in found[-5:]))  # fmt: skip
    return found


def references(folder: Path) -> list[Record]:
    """The official references as answers, by both scores."""
    found = []
    for task, levels in LEVELS.items():
        for level in levels:
            try:
                items = [Item.of(row) for row in load_longproc(f"{task}_{level}", folder)]
            except ValueError:
                continue  # not all files are small enough to be everywhere
            if task == "pseudo_to_code":
                continue  # a compiler, not a study
            for compat in (False, True):
                values = []
                for item in items:
                    head, lines, tail = TASKS[task].parts(item)
                    values.append(score(task, item, head + "\n".join(lines) + tail, compat).accuracy)
                found.append(record(task, "accuracy", values, 0, part="official references", level=level, compat=compat))
                print(f"official references of {task}_{level}, compat={compat}: {found[-1].value:.4f} of {len(values)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--official", type=Path, help="the data folder of princeton-pli/LongProc")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "longproc_study.records.json"))
    arguments = parser.parse_args()
    records = simulated()
    if arguments.official:
        records += references(arguments.official)
    write_results(records, arguments.out)


if __name__ == "__main__":
    main()
