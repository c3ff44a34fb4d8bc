"""Measures what every operator of a secret-shared decode step sends, for all protocols and sizes.

    BROADSHEET_SPU_PYTHON=/path/to/spu-env/bin/python python benchmarks/mpc/measure.py [--protocol aby3 ...]
    [--op ...]

Writes `benchmarks/results/mpc_costs.json`, after every operator, so that a killed run keeps what it has;
records of the operators measured again are replaced. Sizes marked "held_out" are never used to fit the cost
model (`broadsheet mpc calibrate`).

A record: op, protocol, parties, T, k, H, d, split, repeats, bytes and actions (per party: total over the
ranks divided by their number), cpu_s (CPU seconds per party), bytes_by_rank and actions_by_rank (of the first
repeat), samples (bytes and actions of every repeat), max_abs_error and max_fixed_point_error (see spu_job.py),
versions, date. The mean over the repeats is recorded, except for CHEETAH, where it is the least: a refill of its
oblivious-transfer pool (about 2,200 messages) falls into whichever operator empties the pool, and is left out
everywhere but in top-k.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "mpc_costs.json"
PROTOCOLS = ("aby3", "semi2k", "cheetah")

# (T, k, H, d) for each operator: sizes to fit on, and sizes held out.
TOKENS_FIT = [
    (16, 0, 8, 64),
    (64, 0, 8, 64),
    (128, 0, 8, 64),
    (256, 0, 8, 64),
    (512, 0, 8, 64),
    (1024, 0, 8, 64),
    (256, 0, 1, 64),
    (256, 0, 16, 64),
    (256, 0, 8, 128),
    (256, 0, 8, 32),
    (64, 0, 32, 128),
    (16, 0, 1, 64),
]
TOKENS_HELD_OUT = [
    (51, 0, 8, 64),
    (96, 0, 8, 64),
    (384, 0, 8, 64),
    (768, 0, 8, 64),
    (192, 0, 4, 32),
    (320, 0, 16, 128),
    (2048, 0, 8, 64),
]
TOPK_SIZES_FIT = [
    (16, 3),
    (32, 6),
    (64, 8),
    (128, 16),
    (256, 32),
    (256, 128),
    (512, 64),
    (1024, 51),
    (1024, 128),
]
TOPK_SIZES_HELD_OUT = [(24, 3), (96, 12), (384, 19), (410, 51), (768, 96)]
TOPK_FIT, TOPK_HELD_OUT = (
    [(T, k, H, 0) for T, k in sizes for H in (1, 8)] for sizes in (TOPK_SIZES_FIT, TOPK_SIZES_HELD_OUT)
)
ONE_HOT_FIT = [
    (12, 6, 8, 0),
    (16, 2, 8, 0),
    (64, 8, 8, 0),
    (128, 16, 8, 0),
    (256, 16, 8, 0),
    (512, 8, 8, 0),
    (512, 64, 8, 0),
    (1024, 16, 8, 0),
    (128, 16, 1, 0),
    (128, 16, 16, 0),
]
ONE_HOT_HELD_OUT = [
    (26, 3, 8, 0),
    (96, 12, 8, 0),
    (384, 24, 8, 0),
    (410, 51, 8, 0),
    (1024, 128, 8, 0),
    (128, 4, 4, 0),
    (768, 32, 8, 0),
]
GATHER_FIT = [
    (16, 2, 8, 64),
    (64, 8, 8, 64),
    (256, 32, 8, 64),
    (512, 64, 8, 64),
    (1024, 16, 8, 64),
    (128, 4, 8, 1024),
    (24, 3, 8, 2048),
    (64, 6, 8, 2048),
    (12, 6, 8, 2),
    (26, 3, 8, 16),
    (256, 32, 8, 128),
    (128, 16, 1, 64),
    (128, 16, 16, 64),
    (3, 24, 8, 16),
    (8, 64, 8, 16),
]
GATHER_HELD_OUT = [
    (3, 26, 8, 16),
    (26, 3, 8, 2048),
    (96, 12, 8, 64),
    (410, 51, 8, 128),
    (12, 6, 8, 26),
    (768, 24, 8, 64),
    (1024, 128, 8, 64),
    (64, 8, 4, 32),
]
CLUSTERS_FIT = [
    (8, 0, 8, 64),
    (16, 0, 8, 64),
    (32, 0, 8, 64),
    (64, 0, 8, 64),
    (128, 0, 8, 64),
    (32, 0, 1, 64),
    (32, 0, 16, 128),
    (32, 0, 8, 32),
]
CLUSTERS_HELD_OUT = [(13, 0, 8, 64), (26, 0, 8, 64), (48, 0, 8, 64), (96, 0, 8, 64), (24, 0, 4, 32)]
GRID = {
    "qk": (
        [*TOKENS_FIT, (64, 0, 8, 200), (64, 0, 8, 300), (64, 0, 8, 512), (64, 0, 8, 1024)],
        [*TOKENS_HELD_OUT, (64, 0, 8, 410)],
    ),
    "softmax": (TOKENS_FIT, TOKENS_HELD_OUT),
    "softmax_stock": (TOKENS_FIT, TOKENS_HELD_OUT),
    "attention": ([*TOKENS_FIT, (200, 0, 8, 64), (400, 0, 8, 64)], TOKENS_HELD_OUT),
    "attention_stock": (TOKENS_FIT, TOKENS_HELD_OUT),
    "cosine": (TOKENS_FIT, TOKENS_HELD_OUT),
    "topk": (TOPK_FIT, TOPK_HELD_OUT),
    "one_hot": (ONE_HOT_FIT, ONE_HOT_HELD_OUT),
    "one_hot_arithmetic": (ONE_HOT_FIT, ONE_HOT_HELD_OUT),
    "gather": (GATHER_FIT, GATHER_HELD_OUT),
    "gather_fixed": (GATHER_FIT, GATHER_HELD_OUT),
    "sim_max": (CLUSTERS_FIT, CLUSTERS_HELD_OUT),
    "sim_max_by_sign": (CLUSTERS_FIT, CLUSTERS_HELD_OUT),
    "sim_linear": (CLUSTERS_FIT, CLUSTERS_HELD_OUT),
    "sim_linear_matmul": (CLUSTERS_FIT, CLUSTERS_HELD_OUT),
    "cluster_update": (
        [(0, 0, 1, 64), (0, 0, 8, 64), (0, 0, 8, 128), (0, 0, 32, 128), (0, 0, 4, 32)],
        [(0, 0, 8, 96), (0, 0, 16, 64)],
    ),
}
# CHEETAH works on ciphertexts, minutes for large sizes on one core: fewer operators, sizes and repeats.
CHEETAH_OPS = (
    "qk",
    "softmax",
    "attention",
    "topk",
    "one_hot",
    "one_hot_arithmetic",
    "gather",
    "sim_max",
    "sim_max_by_sign",
    "sim_linear",
    "sim_linear_matmul",
    "cluster_update",
)
CHEETAH_MOST_ENTRIES = 65_536  # H * T * k


def repeats(op: str, protocol: str, heads: int) -> int:
    """Top-k picks random pivots, so it is averaged, one head over more runs than eight."""
    if op == "topk":
        return (8 if heads == 1 else 2) if protocol == "cheetah" else (96 if heads == 1 else 8)
    return 2 if protocol == "cheetah" else 1


def jobs(op: str, protocol: str) -> list[dict]:
    rows = []
    for split, sizes in zip(("fit", "held_out"), GRID[op]):
        for T, k, H, d in sizes:
            if protocol == "cheetah" and (H * T * max(k, 1) > CHEETAH_MOST_ENTRIES or T > 512):
                continue
            row = {"op": op, "T": T, "k": k, "H": H, "d": d, "split": split}
            rows.append({**row, "repeats": repeats(op, protocol, H)})
    return rows


def measure(op: str, protocol: str, python: str) -> list[dict]:
    """The records of one operator under one protocol."""
    rows = jobs(op, protocol)
    job = json.dumps({"protocol": protocol, "ops": rows})
    done = subprocess.run([python, HERE / "spu_job.py"], input=job, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{protocol} {op} failed:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    parties = answer["parties"]
    origin = {
        "versions": answer["versions"],
        "device": f"{platform.machine()} CPU, one core",
        "date": datetime.date.today().isoformat(),
    }
    records = []
    for row, result in zip(rows, answer["results"]):
        samples = result.pop("samples")
        per_party = {key: [sum(s[key]) / parties for s in samples] for key in ("bytes", "actions", "cpu_s")}
        typical = min if protocol == "cheetah" and op != "topk" else statistics.fmean
        records.append(
            {
                "op": op,
                "protocol": protocol,
                "parties": parties,
                **result,
                "split": row["split"],
                "repeats": len(samples),
                **{key: typical(values) for key, values in per_party.items()},
                "bytes_by_rank": samples[0]["bytes"],
                "actions_by_rank": samples[0]["actions"],
                "samples": {key: per_party[key] for key in ("bytes", "actions")} if len(samples) > 1 else {},
                **origin,
            }
        )
    setup = {key: sum(values) / parties for key, values in answer["setup"].items()}
    return [*records, {"op": "setup", "protocol": protocol, "parties": parties, **setup, **origin}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", nargs="+", choices=PROTOCOLS, default=PROTOCOLS)
    parser.add_argument("--op", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    python = os.environ.get("BROADSHEET_SPU_PYTHON")
    if not python:
        raise SystemExit("set BROADSHEET_SPU_PYTHON to the python of the SPU environment (see mpc_prices.py)")
    for protocol in args.protocol:
        for op in args.op if protocol != "cheetah" else [op for op in args.op if op in CHEETAH_OPS]:
            records = json.loads(args.out.read_text()) if args.out.exists() else []
            fresh = measure(op, protocol, python)
            kept = [r for r in records if r["protocol"] != protocol or r["op"] not in (op, "setup")]
            lines = ",\n".join(json.dumps(r) for r in kept + fresh)  # one record a line: diffs can be read
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(f"[\n{lines}\n]\n")
            print(f"{protocol} {op}: {len(fresh) - 1} sizes", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
