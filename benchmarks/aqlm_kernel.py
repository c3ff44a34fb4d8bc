"""A linear layer in additive codes on the CPU against F.linear on the uncompressed one, and the ways to multiply with it.

    python benchmarks/aqlm_kernel.py [--width 4096] [--batches 1,4,64] [--threads 1,2] [--repeats 15]

One square layer with codes and codebooks drawn at random. In every repeat all contenders answer the same input one after the
other, and a ratio is of two times of one repeat. Ours are whole layers. Beside them, for each: ``rebuilt``, where the rows
are rebuilt even for few inputs, and ``reference``, torch operations alone, timed apart, three times. With one thread the CPU
time is used (what else runs on the machine does not count), else wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _timing import against, clock_name, layer_benchmark, record

from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record
from broadsheet.methods.weights.aqlm import Additive, AQLMLinear, kernel

#: codebooks, bits, group
LAYOUTS = {"1x6g4": (1, 6, 4), "1x8g4": (1, 8, 4), "2x8g8": (2, 8, 8), "1x12g8": (1, 12, 8), "1x15g8": (1, 15, 8)}

made = partial(record, "aqlm", "aqlm-kernel")


def layers(width: int) -> dict[str, AQLMLinear]:
    return {name: layer(width, *layout) for name, layout in LAYOUTS.items()}


def layer(width: int, books: int, nbits: int, group: int) -> AQLMLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**nbits, (width, width // group, books), generator=draw)
    vectors = torch.randn(books, 2**nbits, 1, group, generator=draw) / width**0.5
    return AQLMLinear.of(Additive(codes, vectors, 1 + torch.rand(width, generator=draw)))


@torch.inference_mode()
def measure(layers: dict[str, AQLMLinear], batch: int, threads: int, repeats: int) -> list[Record]:
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

    setting = {"width": width, "batch": batch, "threads": threads, "clock": clock_name()}
    rivals = ("F.linear bf16", "F.linear fp32", "{} rebuilt", "{} reference")
    pairs = [(name, rival.format(name)) for name in layers for rival in rivals]
    return against(made, seconds, pairs, setting, {name: layer.nbytes for name, layer in layers.items()})


if __name__ == "__main__":
    layer_benchmark(__doc__, __file__, layers, measure, batches="1,4,64")
