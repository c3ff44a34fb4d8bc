"""One decode step over a packed KIVI cache on the CPU, against SDPA on uncompressed caches; compression speed.

    python benchmarks/decode_kernel.py [--lengths 2048,8192,32768] [--threads 1,2] [--repeats 15]

One layer of 32 query heads, 8 KV heads and head_dim 128. In every repeat all contenders answer the same query one
after the other, and a ratio is of two times of one repeat. Two forms of SDPA are timed: ``gqa`` is transformers' call
(``enable_gqa``); ``folded`` hands the query heads of a KV head over as query tokens, which gives the same answer in one
pass over the cache. The path that decompresses (``reference``) is slow and timed apart, three times. With one thread
the CPU time is used (what else runs on the machine does not count), else wall time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import clock_name, show
from _timing import record as any_record
from torch import nn

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record, write_json
from broadsheet.methods.caches.base import CacheLayer
from broadsheet.methods.caches.kivi import KIVI, KIVILayer

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
METHODS = {4: KIVI(4, 32, 32), 2: KIVI(2, 32, 32)}
record = partial(any_record, "", "decode-kernel")


def tokens(count: int, seed: int) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    nothing = torch.empty(1, count, 0)

    def states(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(1, heads, rows, HEAD_DIM, generator=draw).bfloat16()

    return Tokens(
        queries=states(HEADS, 1), keys=states(KV_HEADS, count), values=states(KV_HEADS, count),
        hidden=nothing, positions=nothing, valid=torch.ones(1, count, dtype=torch.bool), cos=nothing, sin=nothing,
    )  # fmt: skip


def layer_of(method: KIVI) -> KIVILayer:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KV_HEADS, True
    layer = KIVILayer(method, 0, module, None)
    layer.dtype = torch.bfloat16
    return layer


def folded(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(queries.reshape(1, KV_HEADS, -1, HEAD_DIM), keys, values)


def gqa(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)


@torch.inference_mode()
def measure(length: int, threads: int, repeats: int) -> list[Record]:
    torch.set_num_threads(threads)
    prompt, new = tokens(length, 0), tokens(1, 1)
    caches = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        caches[name] = (new.queries.to(dtype), prompt.keys.to(dtype), prompt.values.to(dtype))
    contenders: dict[str, Callable[[], object]] = {}
    for name, states in caches.items():
        contenders[f"SDPA {name} gqa"] = lambda states=states: gqa(*states)
        contenders[f"SDPA {name} folded"] = lambda states=states: folded(*states)
    slow: dict[str, Callable[[], object]] = {}
    for bits, method in METHODS.items():
        layer = layer_of(method)
        layer.append(prompt)
        assert layer.reads_codes(new)
        ours = f"KIVI-{bits} kernel"
        contenders[ours] = lambda layer=layer: layer.attend(new, None, None)
        slow[f"KIVI-{bits} reference"] = lambda layer=layer: CacheLayer.attend(layer, new, None, None)
    seconds = alternately(contenders, repeats)
    seconds |= alternately(slow, 3)

    setting = {"tokens": length, "threads": threads, "clock": clock_name()}
    records = [record("seconds", times, "s", name, setting) for name, times in seconds.items()]
    for bits in METHODS:
        ours = seconds[f"KIVI-{bits} kernel"]
        for name in [*(n for n in contenders if n.startswith("SDPA")), f"KIVI-{bits} reference"]:
            ratios = [theirs / mine for theirs, mine in zip(seconds[name], ours)]
            against = {**setting, "against": name}
            records.append(record("time_ratio", ratios, "times ours", f"KIVI-{bits} kernel", against))
    return records


@torch.inference_mode()
def compression(length: int, threads: int, repeats: int) -> list[Record]:
    torch.set_num_threads(threads)
    prompt = tokens(length, 0)
    size = 2 * (prompt.keys.numel() + prompt.values.numel())  # of 16-bit states
    work = {f"KIVI-{bits}": lambda method=method: layer_of(method).append(prompt) for bits, method in METHODS.items()}
    seconds = alternately(work, repeats)
    setting = {"tokens": length, "threads": threads, "clock": clock_name()}
    return [
        record("compress_throughput", [size / second / 1e9 for second in times], "GB/s of 16-bit input", name, setting)
        for name, times in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "decode_kernel.records.json"))
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    records: list[Record] = []
    for threads in map(int, arguments.threads.split(",")):
        for length in lengths:
            records += measure(length, threads, arguments.repeats)
            write_json(records, arguments.out)  # a kill loses at most the cell under way
        records += compression(max(lengths), threads, max(3, arguments.repeats // 3))
    show(records)
    write_json(records, arguments.out)


if __name__ == "__main__":
    main()
