"""The checks behind the long-context peak's claims, see `core.verdicts`. The formulas' numbers are theory; the laws and the
users are measured on a CPU with a random model."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

LAWS, LOOP, RATE = "long-context-peak-laws", "long-context-peak-loop", "rounds_per_hour"


def _derived(records: Sequence[Record], metric: str) -> list[Record]:
    return find(records, bench="estimates-published", paper="long-context-peak", metric=metric)


def _close(rows: Sequence[Record]) -> list[bool]:
    return [abs(r.value / r.setting["published"] - 1) <= 0.02 for r in rows]


def _law(records: Sequence[Record], metric: str, **setting: int) -> float | None:
    found = find(records, bench=LAWS, metric=metric, **setting)
    return found[0].value if found else None


def _simulated(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Simulated over measured answers an hour, where all caches fit and where they do not."""
    rates: dict[str, dict[tuple[float, int], Record]] = {
        method: {(r.setting["keep"], r.setting["users"]): r for r in find(records, bench=LOOP, method=method, metric=RATE)}
        for method in ("measured", "simulated")
    }
    ratios: tuple[list[float], list[float]] = ([], [])
    for key, real in rates["measured"].items():
        ratios[real.setting["users"] > real.setting["fit"]].append(rates["simulated"][key].value / real.value)
    return ratios


def _knees(records: Sequence[Record]) -> list[Record]:
    return find(records, bench=LOOP, method="measured", metric="knee")


def cost(records: Sequence[Record]) -> Verdict:
    """A quarter of the cache moves the knee as far as it lets more caches fit, time grows with the cache's bytes, and sizes,
    rates and swaps are all that a simulation needs: it is within a fifth of real users."""
    knees, slope = _knees(records), _law(records, "decode_slope_ratio")
    fitting, swapping = _simulated(records)
    if not knees or slope is None or not fitting or not swapping:
        return None
    moved = [abs(r.value - r.setting["fit"]) <= 1 for r in knees]
    near = [abs(ratio - 1) <= 0.2 for ratio in (*fitting, *swapping)]
    text = "; ".join(f"{r.setting['fit']} caches fit: knee at {r.value:.0f} users" for r in knees)
    text += f"; simulated over measured answers an hour {min(fitting):.2f} to {max(fitting):.2f} where caches fit, "
    text += f"{min(swapping):.2f} to {max(swapping):.2f} where they are swapped ({sum(near)} of {len(near)} within 20 %)"
    text += f"; a decode step's slope is {slope:.1f} times bytes over bandwidth"
    return graded([*moved, slope <= 1.5, *near], moved), text


def concurrency(records: Sequence[Record]) -> Verdict:
    rows, knees = _derived(records, "concurrency"), _knees(records)
    if not rows or not knees:
        return None
    near = [abs(r.value - r.setting["fit"]) <= 1 for r in knees]
    text = ", ".join(f"{r.value:.3g}" for r in rows[:2]) + " by the formula"
    shown = ", ".join(f"{r.value:.0f} where {r.setting['fit']} fit" for r in knees)
    return graded([*_close(rows), *near], _close(rows)), f"{text}; real users' knee at {shown}"


def prefill(records: Sequence[Record]) -> Verdict:
    rows, fitted = _derived(records, "prefill_s"), _law(records, "prefill_r2", head_dim=64)
    ratios = [_law(records, "quadratic_ratio", head_dim=size) for size in (64, 128)]
    softmax = [_law(records, "softmax_ratio", head_dim=size) for size in (64, 128)]
    if not rows or fitted is None or None in (*ratios, *softmax):
        return None
    shown = ", ".join(f"{r.value:.3g} s ({r.setting['attention']} attention, {r.setting['tokens']:,})" for r in rows)
    text = (
        f"{shown}; linear and quadratic law on a CPU: R² {fitted:.4f}, quadratic term {ratios[0]:.2f} times 2LHdn² at the "
        f"peak with heads of 64 and {ratios[1]:.2f} with heads of 128, {softmax[0]:.2f} and {softmax[1]:.2f} of it softmax"
    )
    near = [ratio is not None and ratio <= 1.3 for ratio in ratios]
    return graded([*_close(rows), fitted >= 0.99, *near], _close(rows)), text


def decode(records: Sequence[Record]) -> Verdict:
    rows, slope = _derived(records, "decode_s"), _law(records, "decode_slope_ratio")
    read, products = _law(records, "decode_read_ratio"), _law(records, "decode_products_ratio")
    if not rows or slope is None:
        return None
    text = ", ".join(f"{r.value:.3g} s" for r in rows) + f"; slope on a CPU {slope:.2f} times bytes over bandwidth"
    text += f" (reading alone {read:.2f}, products of one query {products:.2f})" if read and products else ""
    return graded([*_close(rows), 1 / 1.5 <= slope <= 1.5], _close(rows)), text


def switch(records: Sequence[Record]) -> Verdict:
    rows, rate = _derived(records, "switch_s"), _law(records, "switch_bytes_per_second")
    if not rows or rate is None:
        return None
    text = f"{rows[0].value:.3g} s one way, {2 * rows[0].value:.3g} s both; real copies to a file at {rate / 1e9:.1f} GB/s"
    return graded(_close(rows), _close(rows)), text
