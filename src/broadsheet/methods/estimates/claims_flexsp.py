"""The checks behind FlexSP's claims, see `core.verdicts`. Times of steps are the cost model's: SIMULATED."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

BENCH = "flexsp-study"


def _speedup(records: Sequence[Record], method: str, over: str, metric: str = "speedup", **wanted: object) -> Record | None:
    """On the authors' public lengths where those were measured, else on drawn ones; at the longest time limit."""
    wanted = {"part": "planners"} | wanted
    found = find(records, bench=BENCH, method=method, metric=metric, over=over, **wanted)
    found.sort(key=lambda r: (r.setting["lengths"] != "public file", -r.setting.get("time_limit", 0)))
    return found[0] if found else None


def _shown(record: Record) -> str:
    low, high = record.ci or (record.value, record.value)
    return f"{record.value:.2f}x [{low:.2f}, {high:.2f}]"


def over_static(records: Sequence[Record]) -> Verdict:
    """Against the smallest degree that holds the context, and against the best single degree of the whole run."""
    ours, best = _speedup(records, "greedy", "static"), _speedup(records, "greedy", "best static")
    worst = _speedup(records, "greedy", "best static", "worst_speedup")
    if not ours or not ours.ci or not best or not best.ci or not worst:
        return None
    text = (
        f"SIMULATED: {_shown(ours)} over the smallest degree that holds the context, {_shown(best)} over the best single "
        f"degree ({worst.value:.2f}x in the worst of {ours.n} batches)"
    )
    return graded([ours.ci[0] >= 1.7, worst.value >= 1], [best.ci[0] > 1]), text


def over_adaptive(records: Sequence[Record]) -> Verdict:
    """Against the authors' best single degree for each batch: our planner and their program; what balance alone gains, and
    what is left where lengths have no tail."""
    ours, worst = _speedup(records, "greedy", "adaptive"), _speedup(records, "greedy", "adaptive", "worst_speedup")
    balance = _speedup(records, "balanced", "adaptive")
    flat = _speedup(records, "greedy", "adaptive", part="uniform", lengths="uniform 1000-3000")
    milp = _speedup(records, "milp", "adaptive", part="milp")
    if not ours or not ours.ci or not worst or not balance or not flat:
        return None
    program = f"; the mixed-integer program in HiGHS, {milp.setting['time_limit']:g} s: {_shown(milp)}" if milp else ""
    text = (
        f"SIMULATED: {_shown(ours)} by trying every set of groups, {worst.value:.2f}x in the worst of {ours.n} batches"
        f"{program}. Good balance with one degree in each micro-batch has {balance.value:.2f}x already; on uniform short "
        f"lengths {flat.value:.2f}x"
    )
    certain = [ours.ci[0] >= 1.35, worst.value >= 1, flat.value < 1.05]
    return graded(certain, [ours.ci[0] > 1]), text
