"""OutlierTune, without its parts, and its rivals on a trained model whose norms make outliers of different kinds.

    python benchmarks/outliertune_study.py [--model pocket-2m] [--sessions 4] [--seeds 2]

Outliers are put into 6 channels of what every norm makes, in a way that leaves the function as it is: "none"; "scaled", 30
times as large; "shifted", 3 times as large and 40 up or down (the norms get a bias for it, as those of OPT have one). All
are quantised to 8 (fewer variants) and to 6 bits, weights and activations. Clip rates are of static scales, on text of the
calibration's kind (another seed) and on random tokens. ``kl`` is of the sessions' answers, ``text_kl`` of every token of
that text.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from dataclasses import replace

import torch
from _weights import Study, command
from transformers import PreTrainedModel

from broadsheet.core.models import folds
from broadsheet.core.models.walker import decoder_blocks, walk, widened
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.weights.base import WeightMethod, size
from broadsheet.methods.weights.bench import base_model, calibration
from broadsheet.methods.weights.integer import clip_rates, widen
from broadsheet.methods.weights.outliertune import OutlierTune
from broadsheet.methods.weights.smoothquant import SmoothQuant

OUTLIERS = {"none": (1.0, 0.0), "scaled": (30.0, 0.0), "shifted": (3.0, 40.0)}
METHODS: dict[str, WeightMethod] = {
    "outliertune": OutlierTune(),
    "no symmetrisation": OutlierTune(symmetrize="off"),
    "midpoint (OS+)": OutlierTune(center="midpoint"),
    "gptq": OutlierTune(weight_method="gptq"),
    "clip search": OutlierTune(clip_search=True),
    "float attention": OutlierTune(quantize_bmm=False),
    "smoothquant": SmoothQuant(),
    "smoothquant with zeros": SmoothQuant(symmetric=False),
    "per token": SmoothQuant(smooth=False),
    "per tensor": SmoothQuant(smooth=False, activations="static"),
}
#: what is also measured at 8 bits
AT_EIGHT = ("outliertune", "no symmetrisation", "smoothquant", "per token", "per tensor")


@torch.no_grad()
def planted(model: PreTrainedModel, factor: float, offset: float, channels: int = 6) -> PreTrainedModel:
    """``model`` in float32 with these outliers."""
    model, draw = copy.deepcopy(model).float(), torch.Generator().manual_seed(0)
    for block in walk(model, torch.zeros(1, 2, dtype=torch.long)) if factor > 1 else ():
        for fold in folds.norm_folds(block):
            widen(block, fold, biased=offset > 0)
            width = block.get(fold.readers[0]).in_features
            chosen = torch.randperm(width, generator=draw)[:channels]
            divisor, moved = torch.ones(width), torch.zeros(width)
            divisor[chosen] = 1 / factor
            moved[chosen] = offset * (torch.randint(0, 2, (channels,), generator=draw) * 2.0 - 1)
            folds.scale(block, fold, divisor)
            if offset:
                folds.shift(block, fold, moved)
    return model


def held(model: PreTrainedModel) -> int:
    """Bytes of all tensors of the decoder blocks."""
    return sum(t.nbytes for b in decoder_blocks(model).values() for t in [*b.parameters(), *b.buffers()])


@torch.inference_mode()
def divergence(model: PreTrainedModel, source: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """KL to ``source`` over all tokens of each sequence, nats a token: answers alone are few, their KL has a tail."""
    with widened(model):
        ours, true = (which(ids, use_cache=False).logits.float().log_softmax(-1) for which in (model, source))
    return (true.exp() * (true - ours)).sum(-1).mean(-1).tolist()


def run(study: Study, seed: int) -> None:
    model, tokenizer, _ = base_model(study.work)
    ids = calibration(replace(study.work, seed=seed), tokenizer)
    later = calibration(replace(study.work, seed=seed + 1000, samples=16), tokenizer)
    random = torch.randint(3, model.config.vocab_size, later.shape, generator=torch.Generator().manual_seed(seed))
    study.add("bf16", seed, model, study.scored(model), outliers="none")
    for outliers, (factor, offset) in OUTLIERS.items():
        source = planted(model, factor, offset)
        study.add("planted", seed, source, study.scored(source), outliers=outliers)
        for bits in (8, 6):
            ours = None
            for name, method in METHODS.items():
                if bits == 8 and name not in AT_EIGHT:
                    continue
                small = replace(method, bits=bits).compress(copy.deepcopy(source), ids)
                where = {"outliers": outliers, "codes": bits}
                results = study.scored(small)
                study.add(name, seed, small, results, **where)
                values = divergence(small, source, later)
                study.record(name, "text_kl", statistics.fmean(values), seed, len(values), bootstrap_ci(values), **where)
                if name == "outliertune":
                    ours = results
                    share = held(small) / held(model)
                    study.record(name, "block_bytes", share, seed, 1, of="bf16", stored=size(small).bits / 16, **where)
                    for text, tokens in (("held out", later), ("random tokens", random)):
                        rates = clip_rates(small, tokens).values()
                        study.record(name, "clipped", sum(rates) / len(rates), seed, len(rates), (min(rates), max(rates)),
                                     text=text, **where)  # fmt: skip
                elif ours is not None:
                    study.saved("outliertune", seed, ours, results, against=name, **where)


def main() -> None:
    parser: argparse.ArgumentParser = command(__doc__, sessions=4)
    parser.set_defaults(seeds=2)
    arguments = parser.parse_args()
    study = Study("outliertune-study", "outliertune", arguments)
    for seed in range(arguments.seeds):
        run(study, seed)
        study.finish()


if __name__ == "__main__":
    main()
