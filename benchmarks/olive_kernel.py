"""A linear layer in outlier-victim pairs on the CPU against F.linear on the uncompressed one.

    python benchmarks/olive_kernel.py [--width 4096] [--batches 1,8,64] [--threads 1,2] [--repeats 15]

One square layer whose weights and inputs have 0.5 % of outliers. In every repeat all contenders answer the same input one
after the other, and a ratio is of two times of one repeat. Ours are whole layers: a bf16 input is quantised and paired,
multiplied with the codes of the weight and scaled; ``W4`` leaves the input as it is. The path that dequantises the weight
(``reference``) is timed apart, three times. With one thread the CPU time is used (what else runs on the machine does not
count), else wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _timing import against, clock_name, layer_benchmark, record
from torch import nn

from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record
from broadsheet.methods.weights.olive import Olive, OVPLinear

METHODS = {
    "W4A4 int": Olive(mode="int"),
    "W4A4 flint": Olive(mode="flint"),
    "W4": Olive(a_bits=None),
    "W8A8": Olive(w_bits=8, a_bits=8),
}


Layers = tuple[nn.Linear, dict[str, OVPLinear]]
made = partial(record, "olive", "olive-kernel")


def planted(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal values, 0.5 % of them six times as large."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw)
    return torch.where(torch.rand(rows, columns, generator=draw) < 0.005, 6 * x, x)


def layers(width: int) -> Layers:
    linear = nn.Linear(width, width, bias=False)
    linear.weight.data = planted(width, width, 0) * 0.02
    calibration = planted(256, width, 1)
    return linear, {name: method.pack(linear, calibration) for name, method in METHODS.items()}


@torch.inference_mode()
def measure(layers: Layers, batch: int, threads: int, repeats: int) -> list[Record]:
    linear, packed = layers
    wide = planted(batch, linear.in_features, 2)
    x, weight = wide.bfloat16(), linear.weight.bfloat16()
    contenders: dict[str, Callable[[], object]] = {
        "F.linear bf16": lambda: F.linear(x, weight),
        "F.linear fp32": lambda: F.linear(wide, linear.weight),
    }
    contenders |= {name: lambda layer=layer: layer(x) for name, layer in packed.items()}
    seconds = alternately(contenders, repeats)
    slow = {"W4 reference": lambda: PackedLinear.forward(packed["W4"], x)}
    seconds |= alternately(slow, 3)

    setting = {"width": linear.in_features, "batch": batch, "threads": threads, "clock": clock_name()}
    pairs = [(name, rival) for name in packed for rival in ("F.linear bf16", "F.linear fp32", "W4 reference")]
    return against(made, seconds, pairs, setting, {name: layer.nbytes for name, layer in packed.items()})


if __name__ == "__main__":
    layer_benchmark(__doc__, __file__, layers, measure)
