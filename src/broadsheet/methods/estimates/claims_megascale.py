"""The checks behind MegaScale's claims that its simulator can judge, see `core.verdicts`. SIMULATED unless said otherwise."""

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
    ours, line = (_values(records, "held_out_error", fit=name) for name in (FIT, "line"))
    if len(ours) < 2 or len(line) < 2:
        return None
    parts = [f"{name}: {record.value:.1f} % off (a line: {line[name].value:.1f} %)" for name, record in ours.items()]
    certain = [record.value <= 5.5 and record.value <= line[name].value for name, record in ours.items()]
    return graded(certain, [record.value <= 5.5 for record in ours.values()]), "SIMULATED, held-out mean: " + "; ".join(
        parts
    )


def lever_ablation(records: Sequence[Record]) -> Verdict:
    """Every lever within 1.5 points; shown to the fit, so this is how well one model with six constants can follow."""
    rungs = find(records, bench=BENCH, metric="mfu", source="simulated", fit=FIT)
    off = find(records, bench=BENCH, metric="largest_step_error", fit=FIT)
    rank = find(records, bench=BENCH, metric="rank_correlation", fit=FIT)
    if not rungs or not off or not rank:
        return None
    values = [record.value for record in rungs]
    steps = ", ".join(f"{value:.1f}" for value in values)
    text = (
        f"SIMULATED: {steps} %; a lever's step is off by at most {off[0].value:.1f} points (fitted), "
        f"rank correlation of the steps {rank[0].value:.2f}"
    )
    return graded([off[0].value <= 1.5, values == sorted(values)], [values == sorted(values), rank[0].value > 0.5]), text


def group_start(records: Sequence[Record]) -> Verdict:
    """Requests to the store: counted at the paper's scale and on a real store; seconds from the paper's own naive times."""
    counted, real = (_values(records, "exponent", source=source) for source in ("simulated", "measured"))
    seconds = find(records, bench=BENCH, metric="start_seconds")
    if len(counted) < 2 or len(real) < 2 or len(seconds) < 2:
        return None
    text = (
        f"requests grow as n^{counted['naive'].value:.2f} naively and n^{counted['ordered'].value:.2f} in order (1,024-12,288 "
        f"processes, counted), n^{real['naive'].value:.2f} and n^{real['ordered'].value:.2f} on a real store (16-128); SIMULATED: "
        + ", ".join(f"{one.value:.1f} s at {one.setting['processes']:,}" for one in seconds)
    )
    certain = [one.value < one.setting["below"] for one in seconds]
    for found in (counted, real):
        certain += [found["naive"].value >= 1.8, found["ordered"].value <= 1.2]
    return graded(certain, [found["ordered"].value < found["naive"].value for found in (counted, real)]), text


def stragglers(records: Sequence[Record]) -> Verdict:
    """What removing 0.5 % of machines that are 10 % slower in forward passes gains, at the largest run."""
    found = find(records, bench=BENCH, metric="mfu_gain", gpus=12288)
    if not found:
        return None
    gain = found[0].value
    text = f"SIMULATED at 12,288 GPUs: +{gain:.1f} points of MFU without them"
    return graded([0.35 <= gain <= 1.4], [gain > 0]), text


def effective_time(records: Sequence[Record]) -> Verdict:
    """Share of time that trains, over weeks with as many restarts as the paper's."""
    found = {metric: find(records, bench=BENCH, metric=metric, method="robust") for metric in ("effective", "restarts")}
    if not all(found.values()):
        return None
    effective, restarts = found["effective"][0], found["restarts"][0]
    days = effective.setting["days"]
    text = f"SIMULATED: {effective.value:.1f} % effective time over {days:g} days with {restarts.value:.0f} restarts"
    return graded([effective.value > 90], [effective.value > 80]), text
