"""Where BitStack's blocks lose less of a matrix than codes in groups do, at equal bits, and where more.

    python benchmarks/bitstack_regions.py [--sizes 256,512,1024] [--seeds 3]

Small models hide it: their matrices are so narrow that a block's factors cost a good part of a bit. So here are square
matrices alone, of Gaussian weights and of Student's t with four degrees of freedom (long tails, as in trained models). The
error is the Frobenius norm of what is lost over that of the matrix. Rivals have groups of 128 with a scale and a zero in 16
bits, so 2.25, 3.25 and 4.25 bits; BitStack has the most blocks that fit into as many bits, of the rank (1, 4 or 16) that is
best then, no calibration on either side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.weights.bitstack.decompose import Layout, decompose
from broadsheet.methods.weights.hqq import HQQ

RANKS = (1, 4, 16)
BITS = (2, 3, 4)


def matrix(kind: str, size: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(size, size) if kind == "gaussian" else torch.distributions.StudentT(4.0).sample((size, size))


def stacks(weight: torch.Tensor, most: float) -> list[tuple[float, float, int]]:
    """(bits, relative error, rank) of every number of blocks, of every rank."""
    whole, found = float(weight.square().sum()), []
    for rank in RANKS:
        layout = Layout(*weight.shape, rank)
        _, errors = decompose(weight, layout, int(most / layout.bits))
        found += [(number * layout.bits, (error / whole) ** 0.5, rank) for number, error in enumerate(errors)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    records = []
    for kind in ("gaussian", "student-t"):
        for size in map(int, arguments.sizes.split(",")):
            values: dict[tuple[str, int], list[float]] = {}
            rank_of: dict[int, int] = {}
            for seed in range(arguments.seeds):
                weight = matrix(kind, size, seed)
                curve = stacks(weight, max(BITS) + 0.25)
                for bits in BITS:
                    for name, stored in (
                        ("rtn", quantise_groups(weight, bits, 128)),
                        ("hqq", HQQ(bits, 128).quantise(weight)),
                    ):
                        lost = (weight - stored.dequantise(torch.float32)).norm() / weight.norm()
                        values.setdefault((name, bits), []).append(float(lost))
                    error, rank_of[bits] = min((error, rank) for cost, error, rank in curve if cost <= bits + 0.25)
                    values.setdefault(("bitstack", bits), []).append(error)
            for (name, bits), errors in values.items():
                setting = {"matrix": kind, "size": size, "bits": bits + 0.25}
                parameters = {"k": rank_of[bits]} if name == "bitstack" else {"bits": bits, "group_size": 128}
                records.append(
                    Record(
                        paper="bitstack", method=name, bench="bitstack-regions", metric="relative_error",
                        value=sum(errors) / len(errors), ci=bootstrap_ci(errors), n=len(errors), parameters=parameters,
                        setting=setting, time=now(), **provenance(),
                    )
                )  # fmt: skip
                print(
                    f"{kind:<10} {size:>5} {bits + 0.25:.2f} bits {name:<9} {records[-1].value:.4f} {parameters}", flush=True
                )
    write_results(records, Path(__file__).parent / "results" / "bitstack_regions.records.json")


if __name__ == "__main__":
    main()
