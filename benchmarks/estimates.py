"""What the estimates say of published examples, and predicted against measured passes on this machine.

python benchmarks/estimates.py [--parts published,passes] [--repeats 5]

published: the rows of LLM-Viewer's paper and official code (Llama-2 on an A6000) and the numbers that follow from the
long-context essay's formulas (a 34 B model on A100s), each beside what it should be.
passes: `broadsheet compare estimates`; its records are those of the family's bench.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from broadsheet.core.perf.hardware import device
from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.lab.compare import compare
from broadsheet.lab.terminal import terminal_table
from broadsheet.methods.estimates import bench
from broadsheet.methods.estimates.llm_viewer import LLMViewer
from broadsheet.methods.estimates.long_context_peak import SessionModel

OUT = Path(__file__).parent / "results" / "estimates.records.json"


def llm_viewer() -> list[tuple[str, dict[str, Any], float, float]]:
    """(metric, setting, published, ours in compatibility mode)."""

    def official(**options: Any) -> LLMViewer:
        return LLMViewer("a6000", compat=True, fused=False, **options)

    seven = official().estimate("llama-2-7b", 1, 2048)
    rows = {(row["stage"], row["operator"]): row for row in seven.ops}
    found: list[tuple[str, dict[str, Any], float, float]] = []
    published = {"prefill": (6.872e10, 6.711e7, 1024.0, 154.8e12), "decode": (3.355e7, 3.357e7, 0.9995, 0.768e12)}
    for stage, numbers in published.items():
        row = rows[stage, "q_proj"]
        ours = (row["operations"] / row["count"], row["bytes"] / row["count"], row["intensity"], row["attainable"])
        for name, theirs, one in zip(("operations", "bytes", "intensity", "attainable"), numbers, ours, strict=True):
            found.append((f"q_proj_{name}", {"stage": stage}, theirs, one))
    step, quantised = seven.stage("decode"), official(weights=4).estimate("llama-2-7b", 1, 2048).stage("decode")
    for bits, stage, numbers in ((16, step, (14.17e9, 14.31e9, 18.64e-3)), (4, quantised, (14.17e9, 4.40e9, 5.73e-3))):
        ours = (stage.operations, stage.nbytes, stage.seconds)
        for name, theirs, one in zip(("operations", "bytes", "seconds"), numbers, ours, strict=True):
            found.append((f"step_{name}", {"weight_bits": bits}, theirs, one))
    for batch, times in {1: (34.6, 17.9, 9.5, 5.3), 32: (69.5, 52.8, 44.4, 41.0)}.items():
        for bits, milliseconds in zip((16, 8, 4, 2), times, strict=True):
            stage = official(weights=bits).estimate("llama-2-13b", batch, 1024).stage("decode")
            found.append(
                (
                    "step_seconds",
                    {"weight_bits": bits, "batch": batch, "model": "llama-2-13b"},
                    milliseconds / 1e3,
                    stage.seconds,
                )
            )
    return found


def long_context() -> list[tuple[str, dict[str, Any], float, float]]:
    """(metric, setting, derived from its formulas, ours): 312 T/s, 2 TB/s, 80 GB, 20 GB/s to the host, 34 B parameters."""
    on = replace(device("a100-80g").rated(), bandwidth=2e12)

    def yi(**options: Any) -> SessionModel:
        return SessionModel("yi-34b-200k", on, weights=34e9, **options)

    one, two, linear = yi(), yi(tp=2), yi(attention="none")
    return [
        ("concurrency", {"tokens": 4096, "devices": 1}, 11.9, one.room() / one.cache_bytes(4096)),
        ("concurrency", {"tokens": 50_000, "devices": 1}, 0.98, one.room() / one.cache_bytes(50_000)),
        ("concurrency", {"tokens": 4096, "devices": 2}, 91, two.room() / two.cache_bytes(4096)),
        ("concurrency", {"tokens": 100_000, "devices": 2}, 3.7, two.room() / two.cache_bytes(100_000)),
        ("prefill_s", {"tokens": 4096, "attention": "none"}, 0.89, linear.prefill_s(4096)),
        ("prefill_s", {"tokens": 50_000, "attention": "none"}, 10.9, linear.prefill_s(50_000)),
        ("prefill_s", {"tokens": 50_000, "attention": "causal"}, 17.8, one.prefill_s(50_000)),
        ("decode_s", {"tokens": 4096}, 8.6, one.decode_s(4096, 1, 250)),
        ("decode_s", {"tokens": 50_000}, 10.0, one.decode_s(50_000, 1, 250)),
        ("switch_s", {"tokens": 50_000}, 0.61, one.switch_s(50_000)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="published,passes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    parts = given.parts.split(",")
    measured = [record for record in read_json(given.out) if record.bench == bench.BENCH] if given.out.exists() else []
    shared = {"bench": "estimates-published", "device": "cpu", "time": now(), **provenance()}
    records = []
    for paper, rows in (("llm-viewer", llm_viewer()), ("long-context-peak", long_context())):
        for metric, setting, theirs, ours in rows:
            setting = {**setting, "published": theirs}
            records.append(Record(paper=paper, method=paper, metric=metric, value=ours, setting=setting, **shared))
            print(f"{paper:<18} {metric:<18} published {theirs:<10.5g} ours {ours:<10.5g} {ours / theirs - 1:+.2%}")
    if "passes" in parts:
        measured = compare("estimates", bench.Workload(repeats=given.repeats), fresh=True)
        Console(width=140).print(terminal_table(measured))
    write_results([*records, *measured], given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
