"""Predicted against profiled times of projection products on real GPUs; writes results/llm_viewer_traces.records.json.

python benchmarks/llm_viewer_traces.py --vidur DIR [--write-devices]

``DIR`` is a checkout of github.com/microsoft/vidur (MIT); its tables hold A100, H100 and A40 times of six models. The three
scalars are fitted on every other row of Llama-2-7B; the other rows and the other models are held out. Beside them: the rated
roofline (a lower bound), operations over the peak alone, and the time of the nearest profiled product (in the logarithms of
operations and bytes), scaled to its operations. ``--write-devices`` puts the fits into the devices that ship.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from scipy.spatial import KDTree
from scipy.stats import spearmanr

from broadsheet.core.perf.calibration import Sample, errors, fit
from broadsheet.core.perf.hardware import FOLDER, Device, device
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.methods.estimates.llm_viewer.traces import read_vidur

OUT = Path(__file__).parent / "results" / "llm_viewer_traces.records.json"
DEVICES = {"a100": "a100-80g", "h100": "h100", "a40": "a40"}
FITTED = "meta-llama/Llama-2-7b-hf"


def nearest(known: Sequence[Sample], asked: Sequence[Sample]) -> np.ndarray:
    """Relative errors of the profiled time of the nearest known product, scaled to the asked operations."""

    def place(samples: Sequence[Sample]) -> np.ndarray:
        return np.log([(sample.operations, sample.nbytes) for sample in samples])

    _, at = KDTree(place(known)).query(place(asked))
    found = np.array([known[i].seconds for i in at])
    return found / np.array([sample.seconds for sample in asked]) - 1


def only_operations(on: Device, asked: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.operations / on.peak("fp16") / sample.seconds - 1 for sample in asked])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vidur", type=Path, required=True, help="a checkout of microsoft/vidur")
    parser.add_argument("--write-devices", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    records: list[Record] = []
    shared = {"paper": "llm-viewer", "bench": "llm-viewer-traces", "device": "cpu", "time": now(), **provenance()}
    for folder, name in DEVICES.items():
        root = given.vidur / "data" / "profiling" / "compute" / folder
        tables = {str(path.parent.relative_to(root)): read_vidur(path) for path in sorted(root.glob("*/*/mlp.csv"))}
        if FITTED not in tables:
            raise SystemExit(f"{root} has no {FITTED}/mlp.csv: give a checkout of microsoft/vidur")
        rated, known = device(name).rated(), tables[FITTED][::2]
        source = f"projection products of {FITTED} in microsoft/vidur's profiles, every other row"
        efficiency = fit(rated, known, "measured", source)
        fitted = replace(rated, efficiency=efficiency)
        for scalar in ("compute", "memory", "overhead"):
            setting, unit = {"hardware": name}, "s" if scalar == "overhead" else ""
            one = {"metric": f"fitted_{scalar}", "value": getattr(efficiency, scalar), "unit": unit, "n": len(known)}
            records.append(Record(method="llm-viewer", setting=setting, **one, **shared))
        for model, samples in tables.items():
            asked = samples[1::2] if model == FITTED else samples
            ways = {
                "llm-viewer": errors(fitted, asked),
                "rated roofline": errors(rated, asked),
                "operations / peak": only_operations(rated, asked),
                "nearest profile": nearest(known, asked),
            }
            measured = np.array([sample.seconds for sample in asked])
            for method, wrong in ways.items():
                setting = {"hardware": name, "shape": model, "fitted": model == FITTED}
                rank = spearmanr((wrong + 1) * measured, measured).statistic
                values = {
                    "mean_error": np.abs(wrong).mean(),
                    "median_error": np.median(np.abs(wrong)),
                    "worst_error": np.abs(wrong).max(),
                    "above_measured": int((wrong > 0).sum()),
                    "spearman": rank,
                }
                for metric, value in values.items():
                    one = {"metric": metric, "value": float(value), "n": len(asked)}
                    records.append(Record(method=method, setting=setting, **one, **shared))
                told = "  ".join(f"{metric} {value:.3f}" for metric, value in values.items())
                print(f"{name:<10} {model:<34} {method:<18} {told}")
        if given.write_devices:
            path = FOLDER / f"{name}.json"
            text = json.loads(path.read_text(encoding="utf-8")) | {"efficiency": asdict(efficiency)}
            path.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    write_results(records, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
