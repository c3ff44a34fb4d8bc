"""The checks behind the family's claims, see `core.verdicts`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from broadsheet.core.records import Record
from broadsheet.core.verdicts import FAILS, HOLDS, Verdict, find, graded, mean, percent

#: Methods that drop what they judge unneeded, and those that keep everything at lower precision.
DROPPING = ("streaming-llm", "h2o", "snapkv")
QUANTISING = ("kivi", "gear", "gear-l", "xquant", "xquant-cl")


def _find(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """As `find`; but of the comparison only what has no other setting than is named."""
    setting = {name: value for name, value in wanted.items() if name not in Record.__dataclass_fields__}
    return [record for record in find(records, **wanted) if record.bench != "caches" or record.setting == setting]


def _compared(records: Sequence[Record], text: bool, method: str, metric: str, **setting: Any) -> list[float]:
    """The values of the family's comparison, one a seed: on the pocket model's sessions or on a real model's text."""
    found = _find(records, bench="caches", method=method, metric=metric, **setting)
    return [record.value for record in found if record.model.startswith("pocket") != text]


def _ablated(
    records: Sequence[Record], paper: str, variant: str, metric: str, model: str = "pocket-2m", **setting: Any
) -> Record | None:
    found = [
        record
        for record in _find(records, bench="caches-ablations", paper=paper, method=variant, metric=metric, **setting)
        if record.model == model
    ]
    return found[-1] if found else None


def _saved(records: Sequence[Record], paper: str, variant: str, against: Sequence[str], **setting: Any) -> Verdict:
    """How much divergence from the full cache ``variant`` saves over each of ``against``, paired by prompt."""
    found = [_ablated(records, paper, variant, "kl_saved", against=name, **setting) for name in against]
    known = [record for record in found if record is not None]
    if not known:
        return None
    text = ", ".join(
        f"{record.value:+.3f} [{record.ci[0]:+.3f}, {record.ci[1]:+.3f}] over {record.setting['against']}"
        for record in known
        if record.ci
    )
    return graded([record.ci[0] > 0 for record in known if record.ci], [r.value > 0 for r in known]), f"KL saved: {text}"


# --- GEAR ---------------------------------------------------------------------------------------------------------


def gear_synergy(records: Sequence[Record]) -> Verdict:
    """KL at 2 bits falls with each part added, and is least with both."""
    names = ("backbone", "+ low rank", "+ sparse", "GEAR")
    found = [_ablated(records, "gear", name, "kl", outliers=1) for name in names]
    known = [record.value for record in found if record is not None]
    if len(known) < len(names):
        return None
    text = "KL " + ", ".join(f"{value:.3f} {name}" for name, value in zip(names, known, strict=True))
    plain, low_rank, sparse, both = known
    saved = _saved(records, "gear", "GEAR", ("+ low rank", "+ sparse"), outliers=1)
    certain = saved is not None and saved[0] == HOLDS
    return graded([certain], [both < min(low_rank, sparse), max(low_rank, sparse) < plain]), text


def gear_four_bits(records: Sequence[Record]) -> Verdict:
    """Accuracy on sessions at half the bytes, where the method has 4 bits to spend."""
    ours = mean(_compared(records, False, "gear", "accuracy", budget=0.5))
    full = mean(_compared(records, False, "full", "accuracy"))
    if ours is None or full is None:
        return None
    loss = full - ours
    return graded([loss <= 0.01], [loss <= 0.03]), f"{percent(ours)} against {percent(full)} (full cache)"


def gear_two_bits(records: Sequence[Record]) -> Verdict:
    """GEAR below its low-rank-only form, that below the backbone, and somewhere below KIVI at equal bytes."""
    parts = _saved(records, "gear", "GEAR", ("+ low rank",), outliers=1)
    rest = _saved(records, "gear", "+ low rank", ("backbone",), outliers=1)
    rival = [_ablated(records, "gear", "GEAR", "kl_saved", against="KIVI for GEAR", outliers=f) for f in (1, 10)]
    known = [record for record in rival if record is not None]
    if parts is None or rest is None or not known:
        return None
    wins = any(record.value > 0 for record in known)
    text = f"{parts[1]}; {rest[1].removeprefix('KL saved: ')}; over KIVI " + ", ".join(
        f"{record.value:+.3f} {_bytes(record)} (outliers ×{record.setting['outliers']})" for record in known
    )
    return graded([parts[0] == HOLDS, rest[0] == HOLDS, wins], [parts[0] != FAILS, rest[0] != FAILS]), text


def gear_memory(records: Sequence[Record]) -> Verdict:
    """Bytes of the 16-bit cache over those of 4-bit GEAR, everything included."""
    found = _find(records, bench="caches", method="gear", metric="bytes_ratio", budget=0.5)
    ratios = [record.value for record in found if record.parameters.get("bits") == 4]
    if not ratios:
        return None
    factor = 1 / statistics.mean(ratios)
    return graded([factor >= 2.29], [factor > 1]), f"{factor:.2f}× smaller"


# --- XQuant -------------------------------------------------------------------------------------------------------


def xquant_four_bits(records: Sequence[Record]) -> Verdict:
    """Added nats per token at 4 bits on the multi-head model."""
    return _added_nats(records, "XQuant 4", "pocket-2m-mha")


def xquant_same_memory(records: Sequence[Record]) -> Verdict:
    """4-bit XQuant against KIVI on the multi-head model: at the same bytes, or at the fewest that KIVI can do."""
    return _against_kivi(records, "pocket-2m-mha")


def xquant_grouped_query(records: Sequence[Record]) -> Verdict:
    """The factorised form against KIVI at the same bytes, on a model whose X is no narrower than its keys and values.

    pocket-2m is not one: its X (192) is narrower than its keys and values (256), so XQuant stores X itself there.
    """
    return _against_kivi(records, "stories260K")


def _against_kivi(records: Sequence[Record], model: str) -> Verdict:
    found = _ablated(records, "xquant", "XQuant 4", "kl_saved", model, against="KIVI for XQuant 4", outliers="none")
    if found is None or found.ci is None:
        return None
    text = f"KL saved {found.value:+.4f} [{found.ci[0]:+.4f}, {found.ci[1]:+.4f}] over KIVI, {_bytes(found)}"
    fair = found.setting["bytes_ratio_against"] >= 0.98 * found.setting["bytes_ratio"]
    return graded([found.ci[0] > 0, fair], [found.value > 0]), text


def _bytes(record: Record) -> str:
    ours, theirs = record.setting["bytes_ratio"], record.setting["bytes_ratio_against"]
    return f"at {ours:.3f} against {theirs:.3f} of the full bytes"


def xquant_cross_layer(records: Sequence[Record]) -> Verdict:
    """Added nats per token of the cross-layer form at 3 bits on the eight-layer model."""
    return _added_nats(records, "XQuant-CL 3", "pocket-2m-mha")


def xquant_cross_layer_needed(records: Sequence[Record]) -> Verdict:
    """The cross-layer form against the plain one at 3 and 2 bits."""
    found = [
        _ablated(
            records, "xquant", f"XQuant-CL {bits}", "kl_saved", "pocket-2m-mha", against=f"XQuant {bits}", outliers="none"
        )
        for bits in (3, 2)
    ]
    known = [record for record in found if record is not None and record.ci]
    if not known:
        return None
    text = ", ".join(f"{r.value:+.3f} nats of KL saved at {bits} bits" for r, bits in zip(known, (3, 2), strict=False))
    return graded([r.ci[0] > 0 for r in known if r.ci], [r.value > 0 for r in known]), text


def _added_nats(records: Sequence[Record], variant: str, model: str) -> Verdict:
    """The paper adds 1.3 % of perplexity at 4 bits: up to 0.013 nats holds, up to 0.05 is the direction."""
    found = _ablated(records, "xquant", variant, "kl", model, outliers="none")
    if found is None:
        return None
    ratio = found.setting["bytes_ratio"]
    return graded([found.value <= 0.013], [found.value <= 0.05]), f"KL {found.value:.4f} nats at {ratio:.3f} of the bytes"


# --- KVMerger -----------------------------------------------------------------------------------------------------


def kvmerger_half(records: Sequence[Record]) -> Verdict:
    """Session accuracy at half the bytes against H2O, seed by seed."""
    ours = _compared(records, False, "kvmerger", "accuracy", budget=0.5)
    theirs = _compared(records, False, "h2o", "accuracy", budget=0.5)
    if not ours or len(ours) != len(theirs):
        return None
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    text = f"{percent(statistics.mean(ours))} against {percent(statistics.mean(theirs))} (H2O), 3 seeds"
    return graded([min(gains) > 0.01], [statistics.mean(gains) > 0]), text


def kvmerger_pivot(records: Sequence[Record]) -> Verdict:
    """The attention pivot against a random one at both budgets."""
    parts = [_saved(records, "kvmerger", "KVMerger", ("random pivot",), budget=budget) for budget in (0.5, 0.2)]
    known = [part for part in parts if part is not None]
    if not known:
        return None
    verdicts = [part[0] for part in known]
    text = f"{known[0][1]} at 1/2; " + "; ".join(part[1].removeprefix("KL saved: ") + " at 1/5" for part in known[1:])
    return graded([v == HOLDS for v in verdicts], [v != FAILS for v in verdicts]), text


def kvmerger_bandwidth(records: Sequence[Record]) -> Verdict:
    """Where in a sweep of the kernel's bandwidth the divergence is least."""
    names = {"0.1": "sigma 0.1", "1": "sigma 1", "5": "KVMerger", "20": "sigma 20", "fixed point": "sigma fixed point"}
    found = {name: _ablated(records, "kvmerger", variant, "kl", budget=0.5) for name, variant in names.items()}
    values = {name: record.value for name, record in found.items() if record is not None}
    if len(values) < len(names):
        return None
    best = min(values, key=lambda name: values[name])
    text = "KL " + ", ".join(f"{value:.3f} at σ {name}" for name, value in values.items())
    return graded([best in ("5", "fixed point")], [values["5"] <= 1.05 * values[best]]), text


def kvmerger_persistence(records: Sequence[Record]) -> Verdict:
    """Variation of a layer's merging ratio over prompts against its variation over layers."""
    prompts = _ablated(records, "kvmerger", "sets", "variation_over_prompts", epsilon=0.75)
    layers = _ablated(records, "kvmerger", "sets", "variation_over_layers", epsilon=0.75)
    if prompts is None or layers is None:
        return None
    text = f"variation {prompts.value:.2f} over prompts, {layers.value:.2f} over layers (std / mean)"
    return graded([prompts.value < layers.value / 2], [prompts.value < layers.value]), text


def kvmerger_similarity(records: Sequence[Record]) -> Verdict:
    """Cosine of adjacent keys and of adjacent values."""
    keys = _ablated(records, "kvmerger", "keys", "cosine", distance=1)
    values = _ablated(records, "kvmerger", "values", "cosine", distance=1)
    if keys is None or values is None:
        return None
    text = f"{keys.value:.2f} of keys, {values.value:.2f} of values"
    return graded([keys.value > 0.9 and values.value < 0.7], [keys.value > values.value]), text


# --- Elastic Cache ------------------------------------------------------------------------------------------------


def elastic_quality(records: Sequence[Record]) -> Verdict:
    """Perplexity on a real model's text at half the bytes; the image part is not measured."""
    ours, h2o, window = (
        mean(_compared(records, True, name, "perplexity", budget=0.5)) for name in ("elastic-cache", "h2o", "streaming-llm")
    )
    if ours is None or h2o is None or window is None:
        return None
    text = f"text only: perplexity {ours:.3f} against {h2o:.3f} (H2O) and {window:.3f} (local window)"
    return graded([ours < 0.99 * min(h2o, window)], [ours <= min(h2o, window)]), text


def elastic_merge(records: Sequence[Record]) -> Verdict:
    """Merging against evicting the same tokens at half the bytes, over ten seeds."""
    found = _ablated(records, "elastic-cache", "Elastic", "kl_saved", against="evict", budget=0.5)
    if found is None:
        return None
    won, seeds = found.setting["lower_in_seeds"], found.setting["seeds"]
    return graded([won >= 0.8 * seeds], [won > seeds / 2]), f"KL saved {found.value:+.3f}, lower in {won} of {seeds} seeds"


def elastic_discard(records: Sequence[Record]) -> Verdict:
    """The fixed point against discarding the most recent and the least frequent slot."""
    return _saved(records, "elastic-cache", "Elastic", ("discard frequency", "discard recent"), budget=0.5)


def elastic_importance(records: Sequence[Record]) -> Verdict:
    """The sum of attention against its moving average and its mean over queries."""
    against = ("importance moving average", "importance mean")
    return _saved(records, "elastic-cache", "Elastic", against, budget=0.5)


# --- MPCache ------------------------------------------------------------------------------------------------------


def _mpc(records: Sequence[Record], rung: str, metric: str, **setting: Any) -> float | None:
    """A value of the cost ladder at the reference sizes, 1,024 tokens, three parties (ABY3)."""
    where = {"sizes": "reference", "protocol": "aby3", "seq_len": 1024, **setting}
    return mean([r.value for r in _find(records, bench="mpcache_study", method=rung, metric=metric, **where)])


def mpcache_decode(records: Sequence[Record]) -> Verdict:
    """A decoding step at 5 % of 1,024 tokens: bytes measured with SPU, seconds modelled on a LAN."""
    fewer = _mpc(records, "+ index sharing", "times_fewer_bytes")
    full = _mpc(records, "full", "seconds_per_step", network="LAN")
    ours = _mpc(records, "+ index sharing", "seconds_per_step", network="LAN")
    if fewer is None or full is None or ours is None:
        return None
    text = f"{fewer:.1f}× fewer bytes, {full / ours:.2f}× lower modelled latency"
    return graded([fewer >= 3, full / ours >= 1.8], [fewer >= 3]), text


def mpcache_gather(records: Sequence[Record]) -> Verdict:
    """Choosing clusters instead of single tokens: bytes of the dynamic step."""
    tokens, clusters = (_mpc(records, rung, "bytes_per_step") for rung in ("+ naive dynamic", "+ two levels"))
    static = _mpc(records, "+ static", "bytes_per_step")
    if tokens is None or clusters is None or static is None:
        return None
    text = f"{tokens / clusters:.1f}× fewer bytes a step than by token; {clusters / static:.2f}× of static eviction alone"
    return graded([clusters < static and tokens / clusters >= 10], [clusters < tokens]), text


def mpcache_static(records: Sequence[Record]) -> Verdict:
    """Static eviction alone saves bytes; selecting single tokens on top costs more than it."""
    full, static, naive = (_mpc(records, rung, "bytes_per_step") for rung in ("full", "+ static", "+ naive dynamic"))
    if full is None or static is None or naive is None:
        return None
    text = f"{full / static:.2f}× fewer bytes; choosing single tokens on top costs {naive / static:.1f}× of that"
    return graded([full / static >= 2, naive > static], [full > static]), text


def mpcache_quality(records: Sequence[Record]) -> Verdict:
    """Recall of the 16 largest q.k when a tenth of the tokens is read, over random and over mean-pooled clusters."""
    random, pooled = (
        [r for r in _find(records, bench="mpcache_study", metric=metric, clusters=[8, 4]) if r.model.startswith("pocket")]
        for metric in ("recall_over_random", "recall_minus_mean")
    )
    if not random or not pooled or pooled[-1].ci is None:
        return None
    low, high = pooled[-1].ci
    text = f"recall {random[-1].value:.1f}× random; {pooled[-1].value:+.3f} [{low:+.3f}, {high:+.3f}] over mean pooling"
    return graded([random[-1].value >= 3, low > 0], [random[-1].value >= 3]), text


# --- K-sort block floating point ----------------------------------------------------------------------------------


def _bfp(records: Sequence[Record], order: str, metric: str, **setting: Any) -> list[Record]:
    return _find(records, bench="bfp_study", method=order, metric=metric, **setting)


def bfp_memory(records: Sequence[Record]) -> Verdict:
    """Bits an element of BFP12 keys, and what they cost the model as it is."""
    bits = _find(records, bench="bfp_study", metric="bits_per_element", block=32)
    losses = _bfp(records, "weight_gain", "kl", alpha=1.0, block=32)
    if not bits or not losses:
        return None
    factor = (8 + 8 / 32) / bits[0].value
    text = f"{factor:.2f}× smaller than BFP16, KL {losses[0].value:.4f} nats per token"
    return graded([factor > 1.9, losses[0].value <= 0.01], [losses[0].value <= 0.05]), text


def bfp_block(records: Sequence[Record]) -> Verdict:
    """Error of the scores with sorted against unsorted channels, outliers of strength 16, by block."""
    gains = {
        record.setting["block"]: record for record in _bfp(records, "weight_gain", "score_error_minus_unsorted", alpha=16.0)
    }
    if len(gains) < 2:
        return None
    head = max(gains)
    text = ", ".join(f"{gains[block].value:+.4f} at {block}" for block in sorted(gains))
    smaller = [record for block, record in gains.items() if block < head]
    certain = [r.ci is not None and r.ci[1] < 0 for r in smaller]
    return graded([*certain, gains[head].value == 0], [r.value <= 0 for r in smaller]), f"score error {text}"


def bfp_exactness(records: Sequence[Record]) -> Verdict:
    """Largest difference of the logits after re-ordering, double precision."""
    found = _bfp(records, "ksort", "logit_difference")
    return (graded([found[0].value <= 1e-9], [found[0].value <= 1e-4]), f"{found[0].value:.1e}") if found else None


def bfp_overhead(records: Sequence[Record]) -> Verdict:
    """Time of the sorted model over the original's, run alternately."""
    found = _bfp(records, "ksort", "time_ratio")
    if not found or found[0].ci is None:
        return None
    low, high = found[0].ci
    return graded([low <= 1], [found[0].value <= 1.05]), f"{found[0].value:.3f}× [{low:.3f}, {high:.3f}] of the time"


# --- SCBench ------------------------------------------------------------------------------------------------------


def _turns(records: Sequence[Record], method: str, mode: str, budget: float) -> list[float]:
    """Accuracy of key-value recall by turn, mean over seeds."""
    found = (
        mean(_compared(records, False, method, "accuracy", budget=budget, task="kv", mode=mode, turn=turn))
        for turn in range(1, 6)
    )
    return [value for value in found if value is not None]


def _task(records: Sequence[Record], method: str, mode: str, **setting: Any) -> float | None:
    return mean(_compared(records, False, method, "accuracy", mode=mode, task="kv", **setting))


def scbench_decay(records: Sequence[Record]) -> Verdict:
    """SnapKV at 1/8 falls after the first turn; a 4-bit cache stays with the full one in both modes."""
    turns = _turns(records, "snapkv", "multi-turn", 0.125)
    gaps = []
    for mode in ("multi-turn", "multi-request"):
        full, kivi = _task(records, "full", mode), _task(records, "kivi", mode, budget=0.5)
        if full is not None and kivi is not None:
            gaps.append(full - kivi)
    if len(turns) < 5 or not gaps:
        return None
    fall, gap = turns[0] - statistics.mean(turns[1:]), max(gaps)
    text = f"SnapKV at 1/8 falls by {100 * fall:.0f} points after turn 1; KIVI at 1/2 loses {100 * gap:.1f} points"
    return graded([fall >= 0.2, gap <= 0.03], [fall > 0, gap < fall]), text


def scbench_string_gap(records: Sequence[Record]) -> Verdict:
    """Spread between the methods at 1/8, by group of tasks."""
    spread = {}
    for group in ("string", "semantic", "global", "multi-task"):
        values = [mean(_compared(records, False, m, "accuracy", budget=0.125, group=group)) for m in _methods(records)]
        known = [value for value in values if value is not None]
        if len(known) > 1:
            spread[group] = max(known) - min(known)
    if "string" not in spread or len(spread) < 2:
        return None
    text = ", ".join(f"{100 * value:.0f} points {group}" for group, value in spread.items())
    others = max(value for group, value in spread.items() if group != "string")
    return graded([spread["string"] > others], [spread["string"] > statistics.mean(spread.values())]), text


def scbench_global(records: Sequence[Record]) -> Verdict:
    """Loss on global tasks against the loss on key-value recall, mean over methods that drop, at 1/4."""
    global_loss: list[float] = []
    string_loss: list[float] = []
    for method in DROPPING:
        for group, losses in (("global", global_loss), ("string", string_loss)):
            full = mean(_compared(records, False, "full", "accuracy", group=group))
            ours = mean(_compared(records, False, method, "accuracy", budget=0.25, group=group))
            if full is not None and ours is not None:
                losses.append(full - ours)
    if not global_loss or not string_loss:
        return None
    ours, theirs = statistics.mean(global_loss), statistics.mean(string_loss)
    text = f"at 1/4, dropping loses {100 * ours:.0f} points on global tasks, {100 * theirs:.0f} on string retrieval"
    return graded([ours <= theirs / 3], [ours < theirs]), text


def scbench_query(records: Sequence[Record]) -> Verdict:
    """SnapKV with the question at compression time (turn 1) and without it (multi-request), at 1/8."""
    turns = _turns(records, "snapkv", "multi-turn", 0.125)
    blind = _task(records, "snapkv", "multi-request", budget=0.125)
    if not turns or blind is None:
        return None
    text = f"{percent(turns[0])} with, {percent(blind)} without the question"
    return graded([turns[0] - blind >= 0.3], [turns[0] > blind]), text


def scbench_sweep(records: Sequence[Record]) -> Verdict:
    """Multi-request accuracy at 1/2 and 1/8, for the methods that reach both."""
    falls = {}
    for method in _methods(records):
        high, low = (
            mean(_compared(records, False, method, "accuracy", budget=budget, mode="multi-request"))
            for budget in (0.5, 0.125)
        )
        if high is not None and low is not None:
            falls[method] = high - low
    if not falls:
        return None
    text = ", ".join(f"{method} {-100 * fall:+.0f}" for method, fall in falls.items()) + " points from 1/2 to 1/8"
    return graded([fall > 0 for fall in falls.values()], [statistics.mean(falls.values()) > 0]), text


def _methods(records: Sequence[Record]) -> list[str]:
    return sorted({record.method for record in records if record.bench == "caches" and record.method != "full"})
