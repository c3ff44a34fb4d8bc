"""K-sort BFP: outlier strength x block x channel order, for 4-bit mantissas (BFP12).

    python benchmarks/bfp_study.py [--model NAME_OR_FOLDER] [--text FILE]

Writes `benchmarks/results/bfp_study.records.json`. Small models have tame keys, so channel pairs of every key head are
made larger by alpha and the queries smaller: the same function, larger outliers (alpha 1: the model as it is). By
(alpha, block, order): relative error of the scores |QK' - QK^'| / |QK'|, loss and its paired difference to the unsorted
order (acceptance check 8), KL to the full cache, exact answers, bits an element. Blocks as long as the head must show
no difference. Beside that: the sorted model's logits and time against the original's, and Spearman's correlation of
weight norms with measured ones: whether data is needed to sort.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict

import torch
from _study import Study, play, reference
from transformers import PreTrainedModel

from broadsheet.core.models.outliers import inject_key_outliers
from broadsheet.core.numerics.bfp import Format
from broadsheet.methods.caches.base import Geometry
from broadsheet.methods.caches.block_quant_outliers import KSortBFP, ksort, rank_agreement, score_error
from broadsheet.methods.caches.observe import observe

ALPHAS = (1.0, 4.0, 8.0, 16.0)
ORDERS = ("none", "weight", "weight_gain", "calibration", "random", "interleaved")
DRAWS = 3  # random orders a seed


def with_outliers(model: PreTrainedModel, alpha: float, seed: int) -> PreTrainedModel:
    """A copy of ``model`` with two outlier pairs of strength ``alpha`` in every key head; the same function."""
    return model if alpha == 1 else inject_key_outliers(copy.deepcopy(model), alpha, pairs=2, seed=seed)


def blocks_of(head_dim: int) -> list[int]:
    """The head and three halvings of it."""
    return [head_dim // divisor for divisor in (8, 4, 2, 1) if head_dim % divisor == 0 and head_dim // divisor > 1]


def order_study(study: Study) -> None:
    head_dim = Geometry.of(study.model.config).head_dim
    found: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(study.arguments.seeds):
        items = reference(study, seed)
        for alpha in ALPHAS:
            model = with_outliers(study.model, alpha, seed)
            states = [observe(model, item.prefix) for item in items]
            for block in blocks_of(head_dim):
                for order in ORDERS:
                    # The mean over several random orders, item by item, so that it is paired with the others.
                    draws = range(DRAWS if order == "random" and block < head_dim else 1)
                    methods = [KSortBFP(block=block, rank=order, seed=DRAWS * seed + draw) for draw in draws]
                    played = [play(model, items, method) for method in methods]
                    cell = found[alpha, block, order]
                    for metric in ("loss", "kl", "exact"):
                        rows = zip(*(getattr(outcome, metric) for outcome in played), strict=True)
                        cell[metric] += [sum(row) / len(row) for row in rows]
                    errors = [[score_error(model, method, state) for method in methods] for state in states]
                    cell["score_error"] += [sum(row) / len(row) for row in errors]
    for (alpha, block, order), cell in found.items():
        method = KSortBFP(block=block, rank=order)
        setting = {"alpha": alpha, "block": block}
        study.add(method, order, "score_error", cell["score_error"], "relative", **setting)
        study.add(method, order, "loss", cell["loss"], "nats per token", **setting)
        study.add(method, order, "kl", cell["kl"], "nats per token", **setting)
        study.add(method, order, "exact", cell["exact"], "of items", **setting)
        if order != "none":
            plain = found[alpha, block, "none"]
            for metric in ("loss", "score_error"):
                study.compare(method, order, f"{metric}_minus_unsorted", cell[metric], plain[metric], **setting)
        if order == "none" and alpha == 1:
            study.exact(f"BFP12_{block}", "bits_per_element", Format(4, block).bits_per_element, "bits", block=block)


def agreement_study(study: Study) -> None:
    prompts = [item.prefix for item in study.items(0)]
    for alpha in ALPHAS:
        model = with_outliers(study.model, alpha, 0)
        for rank in ("weight", "weight_gain"):
            heads = rank_agreement(model, prompts, rank).flatten().tolist()
            study.add(None, rank, "spearman_with_measured", heads, "over heads", alpha=alpha)


def exactness_study(study: Study) -> None:
    """The sorted model against the original, nothing quantised: logits in double precision, and time, run alternately."""
    plain = copy.deepcopy(study.model).double()
    twin, _ = ksort(plain)
    prompts = [item.prefix for item in study.items(0)]
    differences = [float((plain(ids).logits - twin(ids).logits).abs().max()) for ids in prompts]
    study.exact("ksort", "logit_difference", max(differences), "largest absolute, float64")
    twin, _ = ksort(study.model)
    pairs = []
    for ids in prompts * 5:
        times = []
        for model in (study.model, twin):
            start = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - start)
        pairs.append(times[1] / times[0])
    study.add(None, "ksort", "time_ratio", pairs, "of the original's time")


def main() -> None:
    study = Study.start("bfp_study", "block-quant-outliers", __doc__ or "", tokens=256, items=3)
    with torch.inference_mode():
        exactness_study(study)
        agreement_study(study)
        order_study(study)
    study.finish()


if __name__ == "__main__":
    main()
