"""MPCache: recall of its scores, its parts one by one at equal tokens read, and what a step costs on secret shares.

    python benchmarks/mpcache_study.py [--model NAME_OR_FOLDER] [--text FILE]

Writes `benchmarks/results/mpcache_study.records.json`. Recall (acceptance check 6): of the 16 keys with the largest
q.k, the share that is opened when a tenth of the tokens is; tokens at random would recall the share opened. Quality:
loss, KL to the full cache and exact answers, with 40 % of the prompt kept and 10 % attended to, beside methods that
keep as many tokens. Cost: the ladder of `cost_ladder` (acceptance check 8) for this model and for the reference sizes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import torch
from _study import Study, play, reference

from broadsheet.methods.caches.base import CacheMethod
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.h2o import H2O
from broadsheet.methods.caches.mpc_cost import LAN, WAN, cost_ladder
from broadsheet.methods.caches.mpc_prices import PROTOCOLS
from broadsheet.methods.caches.mpcache import MPCache, commonality, model_recall
from broadsheet.methods.caches.observe import observe
from broadsheet.methods.caches.snapkv import SnapKV
from broadsheet.methods.caches.streaming_llm import StreamingLLM

ALPHAS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
CLUSTERS = ((32, 16), (16, 8), (8, 4))
KEPT, READ = 0.4, 0.1
REFERENCE = {"num_hidden_layers": 32, "num_attention_heads": 8, "hidden_size": 512}


def recall_study(study: Study) -> None:
    """Recall by similarity, alpha and cluster size, and how alike neighbouring layers choose."""
    seen: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    alike: dict[int, list[float]] = defaultdict(list)
    for seed in range(study.arguments.seeds):
        for item in study.items(seed):
            ids = torch.cat([item.prefix, item.rest], 1)
            states = observe(study.model, ids)
            asking = item.rest.shape[1]
            for clusters in CLUSTERS:
                base = MPCache(static_keep=1.0, clusters=clusters)
                try:
                    base = base.reading(READ, item.prefix.shape[1])
                except ValueError:
                    continue  # too few tokens for three clusters
                variants = [("linear", alpha) for alpha in ALPHAS] + [("max", 0.6), ("mean", 0.6)]
                for similarity, alpha in variants:
                    method = replace(base, similarity=similarity, alpha=alpha)
                    seen[clusters, similarity, alpha].append(model_recall(method, states, asking))
                if clusters == CLUSTERS[-1]:
                    for layer, share in enumerate(commonality(base, states, asking), 1):
                        alike[layer].append(share)
    for (clusters, similarity, alpha), pairs in seen.items():
        method = MPCache(static_keep=1.0, clusters=clusters, similarity=similarity, alpha=alpha)
        found, opened = ([pair[index] for pair in pairs] for index in (0, 1))
        setting = {"clusters": list(clusters), "similarity": similarity, "alpha": alpha}
        study.add(method, "mpcache", "recall@16", found, "of the 16 largest q.k", **setting)
        if (similarity, alpha) == ("linear", 0.6):
            study.add(method, "mpcache", "opened", opened, "of tokens", clusters=list(clusters))
            over = [a / b for a, b in pairs]
            study.add(method, "mpcache", "recall_over_random", over, "times", clusters=list(clusters))
            for other in ("mean", "max"):
                theirs = [pair[0] for pair in seen[clusters, other, 0.6]]
                study.compare(method, "mpcache", f"recall_minus_{other}", found, theirs, clusters=list(clusters))
    for layer, shares in alike.items():
        study.add(None, "mpcache", "commonality", shares, "of picked clusters", layers=[layer - 1, layer])


def variants(tokens: int) -> dict[str, CacheMethod]:
    """The method's parts, at the same tokens kept and read; and methods that keep as many."""
    stored = int(KEPT * tokens)
    clusters = (32, 16) if READ * tokens >= 3 * 16 else (8, 4)
    whole = MPCache(static_keep=KEPT, clusters=clusters).reading(READ / KEPT, stored)
    one_level = replace(whole, ratios=(1.0, whole.ratios[1]), share_span=1)
    alone = replace(whole, share_span=1)
    return {
        "static only": replace(alone, ratios=(1.0, 1.0)),
        "paper's votes (recent=0)": replace(alone, ratios=(1.0, 1.0), recent=0),
        "one level, max": replace(one_level, similarity="max"),
        "one level, mean": replace(one_level, similarity="mean"),
        "one level, linear": one_level,
        **{f"two levels, alpha {alpha:g}": replace(alone, alpha=alpha) for alpha in (0.0, 0.6, 1.0)},
        "no eviction": replace(alone, static_keep=1.0).reading(READ, tokens),
        "shared by 2 layers": whole,
        "shared by 4 layers": replace(whole, share_span=4),
        "a group together": replace(alone, share_group=True),
        "snapkv, as many kept": SnapKV(KEPT),
        "h2o, as many kept": H2O(KEPT),
        "streaming-llm, as many kept": StreamingLLM(KEPT),
        "snapkv, as many as read": SnapKV(READ),
        "h2o, as many as read": H2O(READ),
    }


def quality_study(study: Study) -> None:
    """Loss, KL and exact answers of the parts."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    methods = {"full": Full(), **variants(study.arguments.tokens)}
    for seed in range(study.arguments.seeds):
        items = reference(study, seed)
        for label, method in methods.items():
            outcome = play(study.model, items, method)
            for metric in ("loss", "kl", "exact"):
                found[label][metric] += getattr(outcome, metric)
            found[label]["bytes"] += [float(size) for size in outcome.nbytes]
    for label, values in found.items():
        shares = [ours / full for ours, full in zip(values["bytes"], found["full"]["bytes"], strict=True)]
        study.add(methods[label], label, "bytes_ratio", shares, "of the full cache")
        study.add(methods[label], label, "loss", values["loss"], "nats per token")
        study.add(methods[label], label, "exact", values["exact"], "of items")
        if label != "full":
            study.add(methods[label], label, "kl", values["kl"], "nats per token")
            study.compare(methods[label], label, "loss_minus_full", values["loss"], found["full"]["loss"], "nats per token")


def cost_study(study: Study) -> None:
    """The ladder, by protocol and network, as multiples of the full cache."""
    policy = MPCache(ratios=(0.5, 0.125))  # 5 % of the tokens
    for sizes, config, tokens in (
        ("reference", REFERENCE, 1024),
        ("model", study.model.config, 1024),
        ("reference", REFERENCE, 4096),
    ):
        for protocol in PROTOCOLS:
            ladders = {
                name: cost_ladder(policy, config, tokens, protocol, net) for name, net in (("LAN", LAN), ("WAN", WAN))
            }
            for rung, table in ladders["LAN"].items():
                setting = {"sizes": sizes, "protocol": protocol, "seq_len": tokens}
                study.exact(rung, "bytes_per_step", table.bytes, "bytes per party", **setting)
                study.exact(rung, "rounds_per_step", table.rounds, "messages per party", **setting)
                for network, ladder in ladders.items():
                    study.exact(rung, "seconds_per_step", ladder[rung].seconds, "s, modelled", **setting, network=network)
            sent = {rung: table.bytes for rung, table in ladders["LAN"].items()}
            study.exact("+ index sharing", "times_fewer_bytes", sent["full"] / sent["+ index sharing"], "times", **setting)
            for before, after in pairwise(list(sent)[:7]):
                study.exact(after, "bytes_over_rung_before", sent[after] / sent[before], "times", **setting)


def main() -> None:
    study = Study.start("mpcache_study", "mpcache", __doc__ or "", tokens=768, items=6)
    recall_study(study)
    quality_study(study)
    cost_study(study)
    study.finish()


if __name__ == "__main__":
    main()
