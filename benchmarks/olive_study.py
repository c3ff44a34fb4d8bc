"""Outlier-victim pairs against clipped int4, weights and activations both in 4 bits, with outliers put in and without.

    python benchmarks/olive_study.py [--model pocket-2m] [--sessions 8] [--seeds 3]

``alone``: two channels of every norm's output are made 20 times as large, and what reads them smaller, so that the function
stays. ``beside``: eight channels, in neighbours, 60 times as large: where the pairing of the paper must fail, and a pairing
of the largest channels with the smallest may not. Also counted: pairs in the weights, and in Gaussian values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from _weights import Study, command

from broadsheet.core.models.walker import blocks
from broadsheet.methods.weights.bench import base_model
from broadsheet.methods.weights.olive import Olive, OVPTensor

#: int4 with a searched clipping point, and nothing else
CLIPPED = Olive(outliers=False, mode="int", w_low=5, w_up=102, a_low=1, a_up=102)
METHODS = {"olive": Olive(), "clipped int4": CLIPPED, "olive spread": Olive(pairing="spread")}


def pairs(study: Study, kind: str, x: torch.Tensor) -> None:
    """The share of pairs with an outlier, and with two."""
    packed = OVPTensor.pack(x)
    found = packed.stats()
    count = found["nn"] + found["on"] + found["oo"]
    for metric, share in (("outlier_pairs", (found["on"] + found["oo"]) / count), ("lost_pairs", found["oo"] / count)):
        study.record("olive", metric, share, 0, count, tensor=kind)


def main() -> None:
    arguments = command(__doc__, sessions=8).parse_args()
    study = Study("olive-study", "olive", arguments)
    model, *_ = base_model(study.work)
    pairs(study, "gaussian", torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)))
    weights = [linear.weight.detach().float() for block in blocks(model) for linear in block.linears.values()]
    for number, weight in enumerate(weights):
        pairs(study, f"weight {number}", weight)
    work = {
        "none": study.work,
        "alone": replace(study.work, outliers=20.0, outlier_channels=2),
        "beside": replace(study.work, outliers=60.0, outlier_channels=8, outliers_adjacent=True),
    }
    for seed in range(arguments.seeds):
        for outliers, some in work.items():
            full = base_model(some)[0]
            study.add("bf16", seed, full, study.scored(full, some), outliers=outliers)
            for name, method in METHODS.items():
                small = study.compressed(method, seed, some)
                study.add(name, seed, small, study.scored(small, some), outliers=outliers)
        study.finish()


if __name__ == "__main__":
    main()
