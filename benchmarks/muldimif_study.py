"""MulDimIF's scorer, compiler and pipeline against what is known: writes results/muldimif_study.records.json.

Run ``python benchmarks/muldimif_study.py [--data folder of the official test.json]`` (minutes on one core). Everything from
the responder and the author is SIMULATED: it says that the instrument's truth is found, nothing about a model. Of the
official data only counts are kept.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.methods.evals.muldimif import LEVELS, PATTERNS, TAXONOMY, MulDimIF, Pipeline, audit, load_muldimif
from broadsheet.methods.evals.muldimif.world import SimAuthor, SimResponder, faults

RESULTS = Path(__file__).parent / "results" / "muldimif_study.records.json"
CUTS = [("level", level) for level in LEVELS] + [("pattern", p) for p in PATTERNS] + [("category", c) for c in TAXONOMY]


def record(metric: str, value: float, model: str = "", n: int = 1, seed: int = 0, ci=None, **setting) -> Record:
    return Record(
        paper="muldimif", method="muldimif", bench="muldimif-study", metric=metric, value=float(value), ci=ci, n=n,
        seed=seed, model=model, setting=setting, time=now(), **provenance(),
    )  # fmt: skip


def responder(seed: int) -> list[Record]:
    """Levels, patterns and categories as measured and in closed form, on 1,200 items of our own."""
    bench = MulDimIF(count=1200, seed=seed)
    world = SimResponder(bench.items())
    report = bench.evaluate(Chat(SimulatedChat(world, name="sim:responder", seed=seed)))
    rows = []
    for name in ("verifiable", "accuracy", "macro", "micro"):
        metric = report.get(name)
        rows.append(record(name, metric.value, "sim:responder", metric.n, seed, metric.ci, data="own"))
    for axis, cut in CUTS:
        metric = report.get("accuracy", axis, cut)
        expected, error = world.expected(**{"main" if axis == "category" else axis: cut})
        setting = {axis: cut, "expected": expected, "standard_errors": (metric.value - expected) / error}
        rows.append(record("accuracy", metric.value, "sim:responder", metric.n, seed, metric.ci, **setting))
    theirs = MulDimIF(count=1200, seed=seed, compat="official").score([one.answers[0].text for one in report.scored])
    rows.append(record("accuracy", theirs.get("accuracy").value, "sim:responder", 1200, seed, judged="as the original"))
    for metric in (m for m in theirs.metrics if m.axis == "kind"):
        ours = report.get("satisfied", "kind", metric.value_of).value
        setting = {"kind": metric.value_of, "ours": ours, "judged": "as the original"}
        rows.append(record("satisfied", metric.value, "sim:responder", metric.n, seed, **setting))
    return rows


def author(seed: int, count: int = 2000) -> list[Record]:
    """Bad versions of one expansion without and with the two questions, and their closed forms."""
    world, rows = SimAuthor(), []
    for check, expected in zip((False, True), world.kept_bad(), strict=True):
        pipeline = Pipeline(level=1, tries=1, check=check, seed=seed)
        chat = Chat(SimulatedChat(world, name="sim:author", seed=seed))
        questions = [f"What is thing {number}?" for number in range(count)]
        grown = [one for one in chat.map(lambda q, c=chat, p=pipeline: p.agrow(c, q), questions) if one.complete]
        share = sum(any(faults(one.question, one.constraints)) for one in grown) / len(grown)
        error = 1.96 * math.sqrt(share * (1 - share) / len(grown))
        ci = (share - error, share + error)
        rows.append(record("bad_share", share, "sim:author", len(grown), seed, ci, checked=check, expected=expected))
        rows.append(record("kept", len(grown) / count, "sim:author", count, seed, checked=check))
    return rows


def official(data: str) -> list[Record]:
    """Counts on the official test set."""
    found = audit(load_muldimif(data))
    rows = [record("verifiable", found["verifiable"] / found["constraints"], n=found["constraints"], data="official")]
    for name in ("vacuous", "impossible", "vacuous_items", "impossible_items"):
        counted = "items" if name.endswith("items") else "constraints"
        rows.append(record(name, found[name], n=found[counted], data="official", unit=counted))
    for mode, (constraints, items) in found["empty"].items():
        rows.append(
            record("empty_passes", constraints, n=found["constraints"], data="official", judged=mode, unit="constraints")
        )
        rows.append(record("empty_passes", items, n=found["items"], data="official", judged=mode, unit="items"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the official test.json")
    parser.add_argument("--out", default=str(RESULTS))
    given = parser.parse_args()
    rows = [row for seed in range(3) for row in (*responder(seed), *author(seed))]
    rows += official(given.data) if given.data else []
    write_results(rows, given.out)
    for row in rows:
        print(f"{row.metric:<16} {row.value:>9.4f}  n={row.n:<6} seed {row.seed} {row.model:<14} {row.setting}")


if __name__ == "__main__":
    main()
