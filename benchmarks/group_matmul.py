"""A linear layer in groups of codes on the CPU against F.linear on the uncompressed one and torch's own 4-bit product.

    python benchmarks/group_matmul.py [--width 4096] [--batches 1,8,64] [--threads 1,2] [--repeats 15]

One square layer in groups of 128. In every repeat all contenders answer the same bfloat16 input one after the other, and a
ratio is of two times of one repeat. Ours are whole layers, as RTN, GPTQ, AWQ and HQQ store them. ``torch int4`` is
``torch._weight_int4pack_mm_for_cpu`` on the same codes, packed for this processor beforehand. The path that dequantises the
weight (``reference``) is timed apart, three times. With one thread CPU time is used, else wall time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from _timing import against, clock_name, layer_benchmark, record
from torch import nn

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.numerics.packing import unpack
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record
from broadsheet.methods.weights.rtn import GroupLinear

GROUP = 128
Layers = tuple[nn.Linear, dict[str, GroupLinear]]
made = partial(record, "", "group-matmul")


def torch_int4(layer: GroupLinear) -> Callable[[torch.Tensor], torch.Tensor]:
    codes = unpack(layer.codes, 4, GROUP).flatten(1).to(torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale, zero = layer.scale.float(), layer.zero.float()
    both = torch.stack([scale, zero + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)


def layers(width: int) -> Layers:
    linear = nn.Linear(width, width, bias=False)
    weight = linear.weight.detach()
    return linear, {f"{bits} bits": GroupLinear.of(linear, quantise_groups(weight, bits, GROUP)) for bits in (2, 3, 4, 8)}


@torch.inference_mode()
def measure(layers: Layers, batch: int, threads: int, repeats: int) -> list[Record]:
    linear, packed = layers
    wide = torch.randn(batch, linear.in_features, generator=torch.Generator().manual_seed(1))
    x, weight, four = wide.bfloat16(), linear.weight.bfloat16(), packed["4 bits"]
    peer = torch_int4(four)
    wanted = four(x).float()
    assert (peer(x).float() - wanted).norm() < 0.02 * wanted.norm()  # the same product
    contenders: dict[str, Callable[[], object]] = {
        "F.linear bf16": lambda: F.linear(x, weight),
        "F.linear fp32": lambda: F.linear(wide, linear.weight),
        "torch int4": lambda: peer(x),
    }
    rivals = list(contenders)
    contenders |= {name: lambda layer=layer: layer(x) for name, layer in packed.items()}
    seconds = alternately(contenders, repeats)
    seconds |= alternately({"reference": lambda: PackedLinear.forward(four, x)}, 3)

    setting = {"width": linear.in_features, "batch": batch, "threads": threads, "clock": clock_name()}
    pairs = [(name, rival) for name in packed for rival in rivals]
    return against(made, seconds, pairs, setting, {name: layer.nbytes for name, layer in packed.items()})


if __name__ == "__main__":
    layer_benchmark(__doc__, __file__, layers, measure)
