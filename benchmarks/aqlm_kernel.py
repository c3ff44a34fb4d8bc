"""A linear layer in additive codes on the CPU against F.linear on the uncompressed one, and the ways to multiply with it.

    python benchmarks/aqlm_kernel.py [--width 2048] [--batches 1,4,64] [--threads 1] [--repeats 15]

One square layer with codes and codebooks drawn at random. In every repeat all contenders answer the same input one after the
other, and a ratio is of two times of one repeat. Ours are whole layers. Beside them, for each: ``rebuilt``, where the rows
are rebuilt even for few inputs, and ``reference``, torch operations alone, timed apart, three times. With one thread the CPU
time is used (what else runs on the machine does not count), else wall time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import alternately, clock_name, record, show

from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.records import Record, write_json
from broadsheet.methods.weights.aqlm import Additive, AQLMLinear, kernel

#: codebooks, bits, group
LAYOUTS = {"1x6g4": (1, 6, 4), "1x8g4": (1, 8, 4), "2x8g8": (2, 8, 8), "1x12g8": (1, 12, 8), "1x15g8": (1, 15, 8)}


def layer_of(width: int, books: int, nbits: int, group: int) -> AQLMLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**nbits, (width, width // group, books), generator=draw)
    vectors = torch.randn(books, 2**nbits, 1, group, generator=draw) / width**0.5
    return AQLMLinear.of(Additive(codes, vectors, 1 + torch.rand(width, generator=draw)))


@torch.inference_mode()
def measure(layers: dict[str, AQLMLinear], batch: int, threads: int, repeats: int) -> list[Record]:
    torch.set_num_threads(threads)
    width = next(iter(layers.values())).in_features
    wide, weight = torch.randn(batch, width), torch.randn(width, width)
    x, narrow = wide.bfloat16(), weight.bfloat16()

    def rebuilt(layer: AQLMLinear) -> torch.Tensor:
        few, kernel.FEW = kernel.FEW, 0
        try:
            return layer(x)
        finally:
            kernel.FEW = few

    contenders: dict[str, Callable[[], object]] = {
        "F.linear bf16": lambda: F.linear(x, narrow),
        "F.linear fp32": lambda: F.linear(wide, weight),
    }
    contenders |= {name: partial(layer, x) for name, layer in layers.items()}
    contenders |= {f"{name} rebuilt": partial(rebuilt, layer) for name, layer in layers.items()}
    seconds = alternately(contenders, repeats)
    slow = {f"{name} reference": partial(PackedLinear.forward, layer, x) for name, layer in layers.items()}
    seconds |= alternately(slow, 3)

    made = partial(record, "aqlm", "aqlm-kernel")
    setting = {"width": width, "batch": batch, "threads": threads, "clock": clock_name()}
    records = []
    for name, times in seconds.items():
        held = {"bytes": layers[name].nbytes} if name in layers else {}
        records.append(made("seconds", times, "s", name, {**setting, **held}))
    for name in layers:
        for rival in ("F.linear bf16", "F.linear fp32", f"{name} rebuilt", f"{name} reference"):
            ratios = [theirs / mine for theirs, mine in zip(seconds[rival], seconds[name])]
            records.append(made("time_ratio", ratios, "times ours", name, {**setting, "against": rival}))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batches", default="1,4,64")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "aqlm_kernel.records.json"))
    arguments = parser.parse_args()
    layers = {name: layer_of(arguments.width, *layout) for name, layout in LAYOUTS.items()}
    records: list[Record] = []
    for threads in map(int, arguments.threads.split(",")):
        for batch in map(int, arguments.batches.split(",")):
            records += measure(layers, batch, threads, arguments.repeats)
            write_json(records, arguments.out)  # a kill loses at most the cell under way
    show(records)


if __name__ == "__main__":
    main()
