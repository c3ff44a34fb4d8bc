"""Linear layers that multiply integers on the CPU against F.linear on 16-bit and 32-bit weights, norm included.

    python benchmarks/integer_linear.py [--width 4096] [--batches 1,64,512] [--threads 1,2] [--repeats 7]

What is timed is an RMS norm and one square layer that it feeds. "static": the norm has taken in a scale for each channel and
makes codes, as OutlierTune leaves it; "explicit": the layer divides by these scales; "token": each token is given its scale,
as SmoothQuant leaves it. ``product``: the integer product alone, against torch's own on int8. In every repeat all contenders
answer one after the other, and a ratio is of two times of one repeat. With one thread the CPU time is used (what else runs
on the machine does not count), else wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _timing import against, clock_name, layer_benchmark, record
from torch import nn

from broadsheet.core.numerics import integer
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record
from broadsheet.methods.weights.integer import FoldedNorm, IntegerLinear, quantise_rows

Layer = tuple[FoldedNorm, IntegerLinear]
Layers = tuple[nn.Linear, dict[str, Layer]]


def layers(width: int) -> Layers:
    """Symmetric and asymmetric weights cost the same but for the zeros; all are asymmetric here."""
    torch.manual_seed(0)
    linear = nn.Linear(width, width)
    scale = torch.rand(width) * 0.05 + 0.01
    plain = FoldedNorm({"weight": torch.ones(width), "bias": torch.zeros(width)}, kind="rms", eps=1e-6, bits=0)
    folded = FoldedNorm({"weight": 1 / scale, "bias": torch.zeros(width)}, kind="rms", eps=1e-6, bits=0)
    made: dict[str, Layer] = {}
    for bits in (8, 6):
        rows, scaled = quantise_rows(linear.weight, bits), quantise_rows(linear.weight * scale, bits)
        made[f"static W{bits}A{bits}"] = folded.rounding(bits, scale), IntegerLinear.of(linear, scaled, "codes", bits)
        made[f"explicit W{bits}A{bits}"] = plain, IntegerLinear.of(linear, scaled, "static", bits, scale)
        made[f"token W{bits}A{bits}"] = plain, IntegerLinear.of(linear, rows, "token", bits)
    return linear, made


@torch.inference_mode()
def measure(layers: Layers, batch: int, threads: int, repeats: int) -> list[Record]:
    linear, packed = layers
    width = linear.in_features
    wide = torch.randn(batch, width, generator=torch.Generator().manual_seed(batch))
    x, ones, weight, bias = wide.bfloat16(), torch.ones(width), linear.weight.bfloat16(), linear.bias.bfloat16()
    contenders: dict[str, Callable[[], object]] = {
        "F.linear bf16": lambda: F.linear(F.rms_norm(x, (width,), ones.bfloat16(), 1e-6), weight, bias),
        "F.linear fp32": lambda: F.linear(F.rms_norm(wide, (width,), ones, 1e-6), linear.weight, linear.bias),
    }
    contenders |= {name: lambda layer=layer: layer[1](layer[0](x)) for name, layer in packed.items()}
    codes, stored = integer.quantise_per_token(wide, 8)[0], packed["token W8A8"][1].codes
    contenders["product"] = lambda: integer.integer_product(codes, stored)
    if batch > 16:  # torch's takes no fewer
        contenders["torch._int_mm"] = lambda: torch._int_mm(codes, stored.T)
    seconds = alternately(contenders, repeats)

    setting = {"width": width, "batch": batch, "threads": threads, "clock": clock_name()}
    pairs = [(name, rival) for name in packed for rival in ("F.linear bf16", "F.linear fp32")]
    pairs += [(f"static W{bits}A{bits}", f"{other} W{bits}A{bits}") for bits in (8, 6) for other in ("explicit", "token")]
    pairs += [("product", "torch._int_mm")] if "torch._int_mm" in seconds else []
    return against(partial(record, "", "integer-linear"), seconds, pairs, setting)


if __name__ == "__main__":
    layer_benchmark(__doc__, __file__, layers, measure, batches="1,64,512", repeats=7)
