"""Decoding DFloat11 on the CPU against general and checkpoint compressors; what each stores; a model before and after.

    python benchmarks/dfloat11_decode.py [--weights 16000000] [--threads 1,2] [--repeats 21] [--model pocket-2m]

``--weights`` Gaussian bfloat16 weights of deviation 0.02 are one unit, as are (second) all linear weights of the model's
decoder blocks. In every repeat all contenders decode the same weights one after the other, and a ratio is of two times of
one repeat. Every contender ends with bfloat16 weights in memory; "new" ones allocate it, as the interfaces of the others
force them to. With one thread the CPU time of the process is used (what else runs on the machine counts less), else wall
time. zipnn and zstandard take part when they are installed.

- ``zstd bytes``: the low and the high bytes of the weights, compressed apart (level 1, the fastest to decode).
- ``zstd exponents``: the exponents, beside raw sign-and-mantissa bytes that are merged by DFloat11's own loop.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import clock_name, show
from _timing import record as any_record

from broadsheet.core.models import load
from broadsheet.core.models.walker import blocks
from broadsheet.core.perf.timing import alternately
from broadsheet.core.records import Record, write_json
from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.dfloat11 import DFloat11, UnitReport, encode, split
from broadsheet.methods.weights.dfloat11 import kernel as df11
from broadsheet.methods.weights.dfloat11.codec import exponent_counts

Contenders = dict[str, Callable[[], object]]
record = partial(any_record, "dfloat11", "dfloat11-decode")


def installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def halves(planes: list[np.ndarray], threads: int) -> list[list[bytes]]:
    """Each plane in as many pieces as there are threads."""
    return [[piece.tobytes() for piece in np.array_split(plane, threads)] for plane in planes]


def decoders(weights: torch.Tensor, threads: int) -> tuple[Contenders, dict[str, int]]:
    """What decodes ``weights`` with so many threads, by name; and the bytes that each stores."""
    bits = weights.view(torch.int16).numpy().view(np.uint16)
    unit, buffer = encode([weights]), torch.empty_like(weights)
    contenders: Contenders = {
        "DFloat11": lambda: df11.decode(unit, buffer),
        "DFloat11 new": lambda: df11.decode(unit),
    }
    stored = {"DFloat11": unit.nbytes}
    if zipnn := installed("zipnn"):
        codec = zipnn.ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=threads)
        packed = codec.compress(bytearray(bits.tobytes()))
        assert bytes(codec.decompress(packed)) == bits.tobytes()
        contenders["zipnn new"] = lambda: codec.decompress(packed)
        stored["zipnn"] = len(packed)
    if zstandard := installed("zstandard"):
        pool = ThreadPoolExecutor(threads)

        def compressed(planes: list[np.ndarray]) -> list[list[bytes]]:
            return [[zstandard.compress(piece, 1) for piece in pieces] for pieces in halves(planes, threads)]

        def pieces_of(plane: list[bytes]) -> list[np.ndarray]:
            return [np.frombuffer(piece, np.uint8) for piece in pool.map(zstandard.decompress, plane)]

        out, bounds = np.empty_like(bits), np.cumsum([0, *map(len, np.array_split(bits, threads))])
        low_high = compressed([bits.astype(np.uint8), (bits >> 8).astype(np.uint8)])

        def by_bytes() -> None:
            view = out.view(np.uint8).reshape(-1, 2)
            for column, plane in enumerate(low_high):
                for start, piece in zip(bounds, pieces_of(plane)):
                    view[start : start + piece.size, column] = piece

        exponents, rest = split(weights)
        planes = compressed([exponents])

        def by_exponents() -> None:
            starts = zip(bounds.tolist(), pieces_of(planes[0]))
            list(pool.map(lambda part: df11._merge(part[1], 0, part[1].size, rest, out, part[0]), starts))

        for name, run, size in (
            ("zstd bytes", by_bytes, sum(len(piece) for plane in low_high for piece in plane)),
            ("zstd exponents", by_exponents, rest.nbytes + sum(map(len, planes[0]))),
        ):
            run()
            assert np.array_equal(out, bits)
            contenders[name], stored[name] = run, size
    return contenders, stored


def baselines(weights: torch.Tensor) -> dict[str, int]:
    """Bytes that general compressors make of a sample of the weights, scaled to all of them."""
    sample = weights[: min(weights.numel(), 1_000_000)]
    bits = sample.view(torch.int16).numpy().view(np.uint16)
    exponents, rest = split(sample)
    planes = {"": [bits], " bytes": [bits.astype(np.uint8), (bits >> 8).astype(np.uint8)], " exponents": [exponents]}
    coders: dict[str, Callable[[bytes], bytes]] = {"zlib": lambda data: zlib.compress(data, 9), "lzma": lzma.compress}
    if zstandard := installed("zstandard"):
        coders["zstd 19"] = lambda data: zstandard.compress(data, 19)
    sizes = {}
    for coder, compress in coders.items():
        for kind, parts in planes.items():
            size = sum(len(compress(part.tobytes())) for part in parts) + (rest.nbytes if kind == " exponents" else 0)
            sizes[coder + kind] = size * weights.numel() // sample.numel()
    return sizes


def measure(weights: torch.Tensor, threads: int, repeats: int, model: str) -> list[Record]:
    """Throughput of every contender, and of DFloat11's against each of the others'."""
    torch.set_num_threads(threads)
    contenders, _ = decoders(weights, threads)
    seconds = alternately(contenders, repeats)
    setting = {"weights": weights.numel(), "threads": threads, "clock": clock_name()}
    records = [
        record("decode", [weights.nbytes / second / 1e9 for second in times], "GB/s of bfloat16", name, setting, model)
        for name, times in seconds.items()
    ]
    for name, times in seconds.items():
        for ours in ("DFloat11", "DFloat11 new"):
            if not name.startswith("DFloat11"):
                ratios = [theirs / mine for theirs, mine in zip(times, seconds[ours])]
                records.append(record("speedup", ratios, "times", ours, {**setting, "against": name}, model))
    return records


def sizes(weights: torch.Tensor, model: str) -> list[Record]:
    stored = decoders(weights, 1)[1] | baselines(weights)
    setting = {"weights": weights.numel()}
    return [record("ratio", [size / weights.nbytes], "of bfloat16", name, setting, model) for name, size in stored.items()]


@torch.inference_mode()
def lossless(name: str) -> list[Record]:
    """How many logits of 1,024 tokens, and how many weights, are not the same bits after compressing."""
    plain, _ = load(name, dtype=torch.bfloat16)
    small, _ = load(name, dtype=torch.bfloat16)
    DFloat11().compress(small)
    ids = torch.randint(0, plain.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    ours, theirs = (model(ids).logits.view(torch.int16) for model in (small, plain))
    held = size(small).bytes / size(plain).bytes  # beside the weights it holds the buffer that blocks are decoded into
    return [
        record("differing_logits", [int((ours != theirs).sum())], f"of {ours.numel()}", "DFloat11", {"tokens": 1024}, name),
        record("held", [held], "of bfloat16", "DFloat11", {}, name),
    ]


def units(name: str) -> list[Record]:
    """Exponents and codes of the model's blocks, and of 4M weights of three distributions."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(4_000_000, generator=draw)
    uniform = torch.rand(4_000_000, generator=draw) * 2 - 1
    laplace = torch.empty(4_000_000).exponential_(generator=draw) * uniform.sign()
    drawn = {"gaussian": normal * 0.02, "uniform": uniform * 0.02, "laplace": laplace * 0.02}
    model, _ = load(name, dtype=torch.bfloat16)
    found = {kind: ("", [weights.bfloat16()]) for kind, weights in drawn.items()}
    for block in blocks(model):
        found[block.name] = (name, [linear.weight.detach().flatten() for linear in block.linears.values()])
    records = []
    for unit, (where, weights) in found.items():
        made, counts = encode(weights), exponent_counts(weights)
        report = UnitReport.of(unit, counts, made.luts[-1].numpy(), made.luts.shape[0] - 1, made.nbytes)
        numbers = {
            "entropy": report.entropy, "mean_code": report.mean_length, "longest_code": report.longest,
            "exponents": report.exponents, "bits": report.bits,
        }  # fmt: skip
        for metric, value in numbers.items():
            records.append(
                record(metric, [value], "bits" if metric != "exponents" else "", "DFloat11", {"unit": unit}, where)
            )
    return records


@torch.inference_mode()
def tokens(name: str, repeats: int) -> list[Record]:
    """Time of a decode step of a model, compressed against not, by batch."""
    torch.set_num_threads(1)
    records = []
    plain, _ = load(name, dtype=torch.bfloat16)
    small, _ = load(name, dtype=torch.bfloat16)
    DFloat11().compress(small)
    for batch in (1, 8, 64):
        ids = torch.randint(3, 100, (batch, 1), generator=torch.Generator().manual_seed(0))
        runs: Contenders = {"bfloat16": lambda ids=ids: plain(ids), "DFloat11": lambda ids=ids: small(ids)}
        seconds = alternately(runs, repeats)
        setting = {"batch": batch, "threads": 1, "clock": clock_name()}
        for method, times in seconds.items():
            records.append(record("tokens", [batch / second for second in times], "tokens/s", method, setting, name))
        slower = [ours / theirs for ours, theirs in zip(seconds["DFloat11"], seconds["bfloat16"])]
        records.append(record("slowdown", slower, "times", "DFloat11", {**setting, "against": "bfloat16"}, name))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=16_000_000)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--model", default="pocket-2m", help="a bfloat16 model: built-in name, folder or hub name")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "dfloat11_decode.records.json"))
    arguments = parser.parse_args()
    normal = torch.randn(arguments.weights, generator=torch.Generator().manual_seed(0))
    model, _ = load(arguments.model, dtype=torch.bfloat16)
    linear = [layer.weight.detach().flatten() for block in blocks(model) for layer in block.linears.values()]
    records: list[Record] = []
    for name, weights in (("", (normal * 0.02).bfloat16()), (arguments.model, torch.cat(linear))):
        records += sizes(weights, name)
        for threads in map(int, arguments.threads.split(",")):
            records += measure(weights, threads, arguments.repeats, name)
            write_json(records, arguments.out)  # a kill loses at most the cell under way
    records += units(arguments.model)
    records += lossless(arguments.model)
    records += tokens(arguments.model, arguments.repeats)
    show(records)
    write_json(records, arguments.out)


if __name__ == "__main__":
    main()
