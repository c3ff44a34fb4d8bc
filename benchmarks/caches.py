"""The caches family at equal real bytes, on the built-in model's sessions and on a real model's text.

    python benchmarks/caches.py [sessions] [text] [--workers 2]

Finished cells are kept under BROADSHEET_HOME, so a run that was stopped goes on. The text part needs the shared models and
data (see README) and is left as it is without them.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from broadsheet.core.records import Record, write_results
from broadsheet.lab.compare import compare
from broadsheet.methods.caches.bench import Workload, methods

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[2] / "shared"))
BUDGETS = (0.5, 0.25, 0.125)
SEEDS = 3

SESSIONS = Workload(
    model="pocket-2m",
    tasks=("kv", "vt", "repoqa", "many_shot", "copy", "kv_and_rules"),
    sessions=4,
    context_tokens=512,
    timing=False,
)
TEXT = Workload(
    model=str(SHARED / "models" / "stories260K"),
    text=str(SHARED / "data" / "tinystories_wikitext_1000" / "tinystories_1000.json"),
    sessions=24,
    prefix=320,
    continuation=128,
    timing=False,
)


def _one(workload: Workload, name: str) -> list[Record]:
    """All budgets and seeds of one method. Nothing is timed here: several processes run side by side."""
    torch.set_num_threads(1)
    return compare("caches", workload, [name], BUDGETS, SEEDS)


def run(workload: Workload, target: str, workers: int) -> None:
    names = list(methods())
    with ProcessPoolExecutor(workers) as pool:
        found = list(pool.map(_one, [workload] * len(names), names))
    kept = [record for records in found for record in records if _wanted(record)]
    write_results(kept, RESULTS / target)
    print(f"{target}: {len(kept)} records")


def _wanted(record: Record) -> bool:
    """Everything but the slices by task and turn; of those, key-value recall, which a claim is about."""
    return "turn" not in record.setting or record.setting.get("task", "kv") == "kv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="sessions, text; default both")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    parts = arguments.parts or ["sessions", "text"]
    if "sessions" in parts:
        run(SESSIONS, "caches_sessions.records.json", arguments.workers)
    if "text" in parts:
        if not Path(TEXT.text).is_file():
            print(f"no {TEXT.text}: the text part is left as it is")
            return
        run(TEXT, "caches_text.records.json", arguments.workers)


if __name__ == "__main__":
    main()
