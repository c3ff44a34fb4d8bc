"""The checks behind MegaScale's claims that its simulator can judge, see `core.verdicts`. SIMULATED but for a real store."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

BENCH = "megascale-tables"
FIT = "rows+ablation"


def _values(records: Sequence[Record], metric: str, **wanted: object) -> dict[str, Record]:
    """By method."""
    return {record.method: record for record in find(records, bench=BENCH, metric=metric, **wanted)}


def utilisation(records: Sequence[Record]) -> Verdict:
    """The paper's MFU column follows from its own iteration times; the headline is predicted from runs of 1,024 GPUs."""
    rows = find(records, bench=BENCH, metric="mfu_recomputed")
    headline = _values(records, "seconds", source="simulated", fit=FIT, gpus=12288)
    if not rows or len(headline) < 2:
        return None
    limits = {"megatron": 0.3, "megascale": 0.5}
    off = {name: max(abs(r.setting["difference"]) for r in rows if r.method == name) for name in limits}
    speedup = headline["megatron"].value / headline["megascale"].value
    text = (
        f"recomputed from the printed times: off by at most {off['megatron']:.2f} points (Megatron-LM) and "
        f"{off['megascale']:.2f} (MegaScale, one window); SIMULATED at 12,288 GPUs: {headline['megascale'].value:.2f} "
        f"against {headline['megatron'].value:.2f} s, {speedup:.2f}×"
    )
    consistent = [off[name] <= limit for name, limit in limits.items()]
    return graded([*consistent, abs(speedup / 1.34 - 1) < 0.05], [*consistent, speedup > 1.2]), text


def strong_scaling(records: Sequence[Record]) -> Verdict:
    """Runs of 3,072-12,288 GPUs predicted from 256-1,024, beside a line through the same runs."""
    ours, alone, line = (_values(records, "held_out_error", fit=name) for name in (FIT, "rows", "line"))
    if min(len(ours), len(alone), len(line)) < 2:
        return None
    text = "SIMULATED, mean error of four runs that no fit saw: " + "; ".join(
        f"{name} {record.value:.1f} % ({alone[name].value:.1f} % without the ablation, a line {line[name].value:.1f} %)"
        for name, record in ours.items()
    )
    likely = [record.value <= 5.5 for found in (ours, alone) for record in found.values()]
    certain = [record.value <= line[name].value for found in (ours, alone) for name, record in found.items()]
    return graded([*certain, *likely], likely), text


def lever_ablation(records: Sequence[Record]) -> Verdict:
    """Every lever within 1.5 points. The fit that ships has seen these numbers; one that has not must reach them as well for
    the claim to hold."""
    rungs = find(records, bench=BENCH, metric="mfu", source="simulated", fit=FIT)
    off = find(records, bench=BENCH, metric="largest_step_error", fit=FIT)
    unseen = find(records, bench=BENCH, metric="largest_step_error", fit="rows")
    rank = find(records, bench=BENCH, metric="rank_correlation", fit=FIT)
    if not rungs or not off or not unseen or not rank:
        return None
    values = [record.value for record in rungs]
    steps = ", ".join(f"{value:.1f}" for value in values)
    text = (
        f"SIMULATED: {steps} %; at most {off[0].value:.1f} points off a step where the fit saw the ablation, "
        f"{unseen[0].value:.1f} where it did not; rank correlation of the steps {rank[0].value:.2f}"
    )
    certain = [one[0].value <= 1.5 for one in (off, unseen)]
    return graded([*certain, values == sorted(values)], [certain[0], values == sorted(values), rank[0].value > 0.5]), text


def group_start(records: Sequence[Record]) -> Verdict:
    """Requests to the store: counted at the paper's scale and on a real store; seconds from the paper's own naive times."""
    counted, real = (_values(records, "exponent", source=source) for source in ("simulated", "measured"))
    seconds = find(records, bench=BENCH, metric="start_seconds")
    if len(counted) < 2 or len(real) < 2 or len(seconds) < 2:
        return None
    text = (
        f"requests grow as n^{counted['naive'].value:.2f} naively and n^{counted['ordered'].value:.2f} in order (counted, "
        f"1,024-12,288 processes), n^{real['naive'].value:.2f} and n^{real['ordered'].value:.2f} on a real store (16-128); "
        "SIMULATED: " + ", ".join(f"{one.value:.1f} s at {one.setting['processes']:,}" for one in seconds)
    )
    certain = [one.value < one.setting["below"] for one in seconds]
    for found in (counted, real):
        certain += [found["naive"].value >= 1.8, found["ordered"].value <= 1.2]
    return graded(certain, [found["ordered"].value < found["naive"].value for found in (counted, real)]), text


def straggler_gain(records: Sequence[Record]) -> Verdict:
    """What removing 0.5 % of machines that are 10 % slower in forward passes gains, at the largest run."""
    found = find(records, bench=BENCH, metric="mfu_gain", gpus=12288)
    if not found:
        return None
    gain = found[0].value
    text = f"SIMULATED at 12,288 GPUs: +{gain:.1f} points of MFU without them"
    return graded([0.35 <= gain <= 1.4], [gain > 0]), text
