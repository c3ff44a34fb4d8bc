"""The table as the official code (hahnyuan/LLM-Viewer, July 2024) counts it, faults included: for parity, and nothing else.

Where it differs from `core.perf.ops`, which is right:

- fused attention reads keys and values with the query heads instead of the kv heads, and writes s numbers a query and
  head instead of d: with grouped heads its flash attention is slower than none;
- the head (lm_head) counts one operation a multiply-add, and its activations without the batch;
- queries of a prefill are read with the kv heads; nothing is halved under a causal mask;
- a head's size is hidden / heads, whatever ``head_dim`` says; the gated activation has hidden numbers, not intermediate;
- weights of norms and biases, embedding, rotary positions, windows and experts do not exist, and the head is quantised like
  any other layer;
- H100 has 3.07 TB/s (its data sheet: 3.35); 8-bit rates only where weights, activations and cache all have 8 bits.
"""

from __future__ import annotations

import json
import math

from broadsheet.core.perf.architecture import Architecture
from broadsheet.core.perf.hardware import FOLDER, Device
from broadsheet.core.perf.ops import Op, Setting


def compat_device(device: Device) -> Device:
    """The device with the numbers of the official table; raises ValueError where that has none."""
    path = FOLDER / f"{device.name}.json"
    numbers = json.loads(path.read_text(encoding="utf-8")).get("llm_viewer") if path.is_file() else None
    if not numbers:
        raise ValueError(f"LLM-Viewer's own table has no '{device.name}': leave compat=true out")
    peaks = {"bf16": numbers["fp16"], **({"int8": numbers["int8"]} if "int8" in numbers else {})}
    return Device(device.name, device.title, numbers["bandwidth"], peaks, onchip=numbers["onchip"])


def compat_operators(arch: Architecture, setting: Setting, device: Device) -> list[Op]:
    """One pass: prefill where all of the context is new, else a decode step over ``context`` cached tokens."""
    _, block = arch.blocks[0]
    heads, kv_heads = block.attention.heads, block.attention.kv_heads
    d, b, s = arch.hidden // heads, setting.batch, setting.context
    n = s if setting.new == s else 1
    h, f = arch.hidden, block.mlp.intermediate
    bw, ba = setting.weights.bits / 8, setting.activation_bits / 8
    bk = setting.stored.bits / 8
    dtype = "int8" if max(setting.weights.bits, ba * 8, bk * 8) <= 8 else "bf16"

    def op(
        name: str,
        operations: float,
        weight: float = 0.0,
        load: float = 0.0,
        store: float = 0.0,
        kv: float = 0.0,
        kept: float = 0.0,
    ) -> Op:
        return Op(
            name, "linear", operations, weight, load, store, kv, kept, weight_held=weight, dtype=dtype, count=arch.layers
        )

    def linear(name: str, width: int, out: float, cached: bool = False) -> Op:
        stored = out * b * n
        kept = stored * bk if cached else 0.0
        return op(
            name, 2 * width * out * b * n, width * out * bw, width * b * n * ba, 0.0 if cached else stored * ba, 0.0, kept
        )

    kv_width = h * kv_heads / heads
    gated = [linear("gate_proj", h, f)] if block.mlp.gated else []
    rows = [linear("q_proj", h, h), linear("k_proj", h, kv_width, True), linear("v_proj", h, kv_width, True)]
    rows += [linear("out_proj", h, h), *gated, linear("up_proj", h, f), linear("down_proj", f, h)]
    product, scores = 2 * n * s * d * heads * b, n * s * b * heads
    queries = n * d * b * heads * ba
    if setting.fused:
        blocks = math.ceil(n / min(math.ceil(device.onchip / (bk * d)), d))
        row = op(
            "fused_attention", 2 * product + 5 * scores, 0, queries, 2 * scores * ba, blocks * s * d * b * heads * bk * 2
        )
        rows.append(row)
    else:
        keys = s * d * b * kv_heads * bk
        loaded = queries if n == 1 else n * d * b * kv_heads * ba
        rows.append(op("qk_matmul", product, 0, loaded, scores * ba, keys))
        rows.append(op("sv_matmul", product, 0, scores * ba, queries, keys))
        rows.append(op("softmax", 5 * scores, 0, scores * ba, scores * ba))
    width = b * h * n
    rows += [op(name, 7 * width, 0, width * ba, width * ba) for name in ("attn_norm", "mlp_norm")]
    rows += [op(name, width, 0, width * ba, width * ba) for name in ("attn_add", "mlp_add")]
    rows.append(op("mlp_act", 2 * width, 0, 2 * width * ba, width * ba))
    head = Op("lm_head", "linear", b * h * arch.vocab, h * arch.vocab * bw, h * ba, arch.vocab * ba, dtype=dtype)
    return [*rows, head]
