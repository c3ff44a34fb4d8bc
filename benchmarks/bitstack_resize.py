"""BitStack on the CPU: how fast a model changes its size, and what a layer's forward pass costs.

    python benchmarks/bitstack_resize.py [--layers 12] [--n-iter 16] [--threads 1] [--repeats 7]

The model is a random Llama of about 110 million parameters (width 768, 12 layers), compressed and saved. A change of size
is timed on the wall clock, from the folder it was loaded from (which the operating system has in memory: so it is the
program that is timed, and not the disk).

The forward pass of one layer is timed in CPU time for one token and for 64, all contenders in every repeat one after the
other:

- ``kernel``: what `BitStackLinear` does, see `broadsheet.methods.weights.bitstack.kernel`
- ``rebuild``: the reference, W in torch and a matrix product
- ``signs first``: sum over ranks of a_k * (S (b_k * x)), which never forms W; tried and not kept
- ``dense``: the uncompressed layer
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _timing import clock_name, show
from _timing import record as any_record
from numba import njit
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record, write_json
from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.bitstack import BitStack, set_size, size_table
from broadsheet.methods.weights.bitstack.decompose import compose, layout_of
from broadsheet.methods.weights.bitstack.kernel import forward

SHAPES = ((768, 768, "auto"), (2048, 768, "auto"), (768, 2048, "auto"), (2048, 2048, 16))
BLOCKS = 4
record = partial(any_record, "bitstack", "bitstack-resize")


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12, vocab_size=32_000,
            tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def resizing(layers: int, n_iter: int, repeats: int) -> list[Record]:
    """Seconds to compress, and to move between sizes."""
    model = llama(layers)
    parameters = model.num_parameters()
    start = time.perf_counter()
    BitStack(n_iter=n_iter, k="auto", scale=False, sort="none").compress(model)
    records = [record("compress_seconds", [time.perf_counter() - start], "s", "BitStack", {"parameters": parameters})]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        model = AutoModelForCausalLM.from_pretrained(folder)
        table = [step.bytes for step in size_table(model)]
        last, draw = len(table) - 1, random.Random(0)
        for name, paths in {
            "smallest to largest": [(0, last)] * repeats,
            "largest to smallest": [(last, 0)] * repeats,
            "one bit a weight up": [(last // 4, last // 4 + last // (n_iter - 1))] * repeats,
            "one block up": [(place, place + 1) for place in draw.sample(range(last), repeats)],
            "one block down": [(place + 1, place) for place in draw.sample(range(last), repeats)],
        }.items():
            seconds, moved = [], []
            for before, after in paths:
                set_size(model, table[before])
                start = time.perf_counter()
                moved.append(set_size(model, table[after])["moved_bytes"])
                seconds.append(time.perf_counter() - start)
                assert size(model).bytes == table[after]
            setting = {"change": name, "parameters": parameters, "n_iter": n_iter, "moved_bytes": statistics.median(moved)}
            records.append(record("resize_seconds", seconds, "s", "BitStack", setting))
    return records


@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _signs_first(x, a, b, packed, table, y):
    rows, rank = a.shape
    columns = b.shape[1]
    scaled, sums = np.empty((rank, columns), np.float32), np.empty(8, np.float32)
    for k in range(rank):
        for column in range(columns):
            scaled[k, column] = b[k, column] * x[column]
    for row in range(rows):
        for k in range(rank):
            sums[:] = 0
            for byte in range(columns // 8):
                signs = table[packed[row, byte]]
                for bit in range(8):
                    sums[bit] += signs[bit] * scaled[k, byte * 8 + bit]
            y[row] += a[row, k] * sums.sum()


def forwards(threads: int, repeats: int) -> list[Record]:
    """Seconds of one layer's forward pass."""
    torch.set_num_threads(threads)
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).astype(np.float32) * 2 - 1
    records = []
    for rows, columns, k in SHAPES:
        layout, draw = layout_of(rows, columns, k), torch.Generator().manual_seed(0)
        blocks = [
            layout.join(
                torch.randn(rows, layout.rank, generator=draw).half(),
                torch.randn(layout.rank, columns, generator=draw).half(),
                torch.randint(0, 256, (rows * columns // 8,), generator=draw, dtype=torch.uint8),
            )
            for _ in range(BLOCKS)
        ]
        weight = compose(blocks, layout)

        def signs_first(x, blocks=blocks, layout=layout):
            y = np.zeros((len(x), layout.rows), np.float32)
            for a, b, signs in map(layout.split, blocks):
                parts = a.float().numpy(), b.float().numpy(), signs.view(layout.rows, -1).numpy()
                for token in range(len(x)):
                    _signs_first(x[token].numpy(), *parts, bits, y[token])
            return torch.from_numpy(y)

        for tokens in (1, 64):
            x = torch.randn(tokens, columns, generator=draw)
            contenders: dict[str, Callable[[], torch.Tensor]] = {
                "kernel": lambda x=x, blocks=blocks, layout=layout: forward(x, blocks, layout),
                "rebuild": lambda x=x, blocks=blocks, layout=layout: F.linear(x, compose(blocks, layout)),
                "dense": lambda x=x, weight=weight: F.linear(x, weight),
            }
            if tokens == 1:
                contenders["signs first"] = lambda x=x, run=signs_first: run(x)
            wanted = contenders["dense"]()
            for run in contenders.values():
                assert torch.allclose(run(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
            seconds = alternately(contenders, repeats)
            setting = {"rows": rows, "columns": columns, "rank": layout.rank, "blocks": BLOCKS, "tokens": tokens}
            setting |= {"threads": threads, "clock": clock_name()}
            for name, times in seconds.items():
                records.append(record("forward_seconds", times, "s", name, setting))
                if name != "kernel":
                    ratios = [theirs / ours for theirs, ours in zip(times, seconds["kernel"])]
                    records.append(record("time_ratio", ratios, "times ours", "kernel", {**setting, "against": name}))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--n-iter", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "bitstack_resize.records.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        records = forwards(arguments.threads, arguments.repeats)
    write_json(records, arguments.out)  # a kill loses at most the part under way
    records += resizing(arguments.layers, arguments.n_iter, arguments.repeats)
    write_json(records, arguments.out)
    show(records)


if __name__ == "__main__":
    main()
