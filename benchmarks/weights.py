"""The weights family at equal stored bits: a built-in model without and with outliers, a real model on text.

    python benchmarks/weights.py [sessions] [outliers] [text] [--methods rtn,gptq] [--workers 2]

Finished cells are kept under BROADSHEET_HOME, so a run that was stopped goes on. The text part needs the shared models and
data (see README) and is left as it is without them. Every cell times itself against the 16-bit model, alternately, with one
thread; have no more workers than cores.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from broadsheet.core.records import Record, write_results
from broadsheet.lab.compare import compare
from broadsheet.methods.weights.bench import Workload, methods

RESULTS = Path(__file__).parent / "results"
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[2] / "shared"))
BUDGETS = (2.0, 3.0, 4.0, 8.0)
SEEDS = 3
#: Fitting additive codes of 8 bits takes a hundred times what any group quantiser takes to lose as little.
LOWER = {"aqlm": (2.0, 3.0, 4.0)}

SESSIONS = Workload(model="pocket-2m")
WORK = {
    "sessions": SESSIONS,
    "outliers": replace(SESSIONS, outliers=20.0),
    "text": Workload(
        model=str(SHARED / "models" / "stories260K"),
        text=str(SHARED / "data" / "tinystories_wikitext_1000" / "tinystories_1000.json"),
    ),
}


def _one(workload: Workload, name: str) -> list[Record]:
    """All budgets and seeds of one method."""
    torch.set_num_threads(1)
    disable_progress_bar()
    seeds = SEEDS if methods()[name].calibrated else 1  # without a calibration set all seeds are the same
    return compare("weights", workload, [name], LOWER.get(name, BUDGETS), seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(WORK)}; default all")
    parser.add_argument("--methods", default="", help="comma-separated; default all (only then are results written)")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name] or list(methods())
    for part in arguments.parts or list(WORK):
        workload = WORK[part]
        if workload.text and not Path(workload.text).is_file():
            print(f"no {workload.text}: {part} is left as it is")
            continue
        with ProcessPoolExecutor(arguments.workers) as pool:
            found = list(pool.map(_one, [workload] * len(names), names))
        records = [record for some in found for record in some]
        if arguments.methods:
            print(f"{part}: {len(records)} records are stored; without --methods they are written to the results")
            continue
        write_results(records, RESULTS / f"weights_{part}.records.json")
        print(f"weights_{part}: {len(records)} records")


if __name__ == "__main__":
    main()
