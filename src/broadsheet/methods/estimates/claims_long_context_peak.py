"""The checks behind the long-context peak's claims, see `core.verdicts`. The formulas' numbers are theory; the laws and the
users are measured on a CPU with a random model."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

LAWS, LOOP = "long-context-peak-laws", "long-context-peak-loop"


def _derived(records: Sequence[Record], metric: str) -> list[Record]:
    return find(records, bench="estimates-published", paper="long-context-peak", metric=metric)


def _close(rows: Sequence[Record]) -> list[bool]:
    return [abs(r.value / r.setting["published"] - 1) <= 0.02 for r in rows]


def _law(records: Sequence[Record], metric: str) -> float | None:
    found = find(records, bench=LAWS, metric=metric)
    return found[0].value if found else None


def _knees(records: Sequence[Record]) -> list[Record]:
    return find(records, bench=LOOP, method="measured", metric="knee")


def cost(records: Sequence[Record]) -> Verdict:
    """A quarter of the cache moves the knee as far as it lets more caches fit, and time grows with the cache's bytes."""
    knees, slope = _knees(records), _law(records, "decode_slope_ratio")
    if not knees or slope is None:
        return None
    moved = [abs(r.value - r.setting["fit"]) <= 1 for r in knees]
    text = "; ".join(f"{r.setting['fit']} caches fit: knee at {r.value:.0f} users" for r in knees)
    return graded([*moved, slope <= 1.5], moved), f"{text}; a decode step's slope is {slope:.1f} times bytes over bandwidth"


def concurrency(records: Sequence[Record]) -> Verdict:
    rows, knees = _derived(records, "concurrency"), _knees(records)
    if not rows or not knees:
        return None
    near = [abs(r.value - r.setting["fit"]) <= 1 for r in knees]
    text = ", ".join(f"{r.value:.3g}" for r in rows[:2]) + " by the formula"
    shown = ", ".join(f"{r.value:.0f} where {r.setting['fit']} fit" for r in knees)
    return graded([*_close(rows), *near], _close(rows)), f"{text}; real users' knee at {shown}"


def prefill(records: Sequence[Record]) -> Verdict:
    rows, fitted, ratio = _derived(records, "prefill_s"), _law(records, "prefill_r2"), _law(records, "quadratic_ratio")
    if not rows or fitted is None or ratio is None:
        return None
    shown = ", ".join(f"{r.value:.3g} s ({r.setting['attention']} attention, {r.setting['tokens']:,})" for r in rows)
    text = (
        f"{shown}; linear and quadratic law on a CPU: R² {fitted:.3f}, quadratic term {ratio:.1f} times 2LHdn² at the peak"
    )
    return graded([*_close(rows), fitted >= 0.99], _close(rows)), text


def decode(records: Sequence[Record]) -> Verdict:
    rows, slope = _derived(records, "decode_s"), _law(records, "decode_slope_ratio")
    if not rows or slope is None:
        return None
    text = ", ".join(f"{r.value:.3g} s" for r in rows) + f"; slope on a CPU {slope:.2f} times bytes over bandwidth"
    return graded([*_close(rows), 1 / 1.5 <= slope <= 1.5], _close(rows)), text


def switch(records: Sequence[Record]) -> Verdict:
    rows, rate = _derived(records, "switch_s"), _law(records, "switch_bytes_per_second")
    if not rows or rate is None:
        return None
    text = f"{rows[0].value:.3g} s one way, {2 * rows[0].value:.3g} s both; real copies to a file at {rate / 1e9:.1f} GB/s"
    return graded(_close(rows), _close(rows)), text
