"""Public kernel timings: projection products of microsoft/vidur's profiles (data/profiling/compute/DEVICE/MODEL/mlp.csv)."""

from __future__ import annotations

import csv
from pathlib import Path

from broadsheet.core.perf.calibration import Sample


def read_vidur(path: str | Path, dtype: str = "fp16") -> list[Sample]:
    """One sample a row and projection (queries, keys and values in one; attention's output; gate and up in one; down), of a
    rank: operations, bytes of weights and of activations, the median of the profiled times. Raises ValueError."""
    samples = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                ranks, tokens, hidden = (int(row[name]) for name in ("num_tensor_parallel_workers", "num_tokens", "n_embd"))
                heads, kv_heads, inner = (int(row[name]) for name in ("n_head", "n_kv_head", "n_expanded_embd"))
                size = hidden // heads
                columns = inner * (2 if row["use_gated_mlp"] == "True" else 1)
                products = {
                    "attn_pre_proj": (hidden, (heads + 2 * kv_heads) * size // ranks),
                    "attn_post_proj": (heads * size // ranks, hidden),
                    "mlp_up_proj": (hidden, columns // ranks),
                    "mlp_down_proj": (inner // ranks, hidden),
                }
                for name, (width, out) in products.items():
                    nbytes = 2 * (width * out + tokens * (width + out))
                    milliseconds = float(row[f"time_stats.{name}.median"])
                    samples.append(Sample.one(2 * width * out * tokens, nbytes, dtype, milliseconds / 1e3))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no mlp.csv of vidur's profiles: {error}") from None
    return samples
