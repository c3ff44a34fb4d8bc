"""The checks behind DeCRIM's claims, see `core.verdicts`. All numbers are SIMULATED: writer and critic of known rates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded, mean, percent

#: share of requests with all four constraints met by one answer
_BASE = 0.85**4


def _pooled(
    records: Sequence[Record], method: str, metric: str = "instruction_level", **setting: object
) -> tuple[float, int]:
    """Mean over seeds and the number of items behind it; (nan, 0) where nothing was measured."""
    found = [record for record in find(records, bench="decrim-study", method=method, metric=metric, **setting) if record.ci]
    total = sum(record.n for record in found)
    return (sum(record.value * record.n for record in found) / total, total) if total else (float("nan"), 0)


def _exact(records: Sequence[Record], method: str, metric: str = "instruction_level", **setting: object) -> float | None:
    found = find(records, bench="decrim-study", method=method, metric=metric, **setting)
    return mean([record.value for record in found if record.ci is None])


def _error(share: float, n: int) -> float:
    return (max(share * (1 - share), 1e-9) / n) ** 0.5


def weak_feedback(records: Sequence[Record]) -> Verdict:
    """The gain with a weak critic, every cell of the table of critics within 3 standard errors of the exact chain (counting
    one item for the discreteness of shares near 1), best of 11 beside it."""
    cells = []
    for critic in ("oracle", "strong", "weak", "coin", "inverted"):
        for rounds in (1, 3, 10):
            setting: dict[str, Any] = {"part": "critics", "critic": critic, "rounds": rounds}
            found, n = _pooled(records, "decrim", **setting)
            expected = _exact(records, "decrim", **setting)
            if expected is None or not n:
                return None
            cells.append(abs(found - expected) <= 3 * _error(expected, n) + 1 / n)
    ours, n = _pooled(records, "decrim", part="rivals", critic="weak", constraints=4)
    rival, _ = _pooled(records, "best-of-11", part="rivals", critic="weak", constraints=4)
    text = (
        f"{100 * (ours - _BASE):+.1f} points ({percent(_BASE)} to {percent(ours)}); best of 11 with the same critic "
        f"{percent(rival)}; {sum(cells)} of {len(cells)} cells within 3 standard errors of the exact chain "
        f"(simulated, n={n})"
    )
    return graded([all(cells), ours - _BASE > 3 * _error(_BASE, n)], [ours > _BASE]), text


def feedback_quality(records: Sequence[Record]) -> Verdict:
    """The gain rises with the critic's recall at every step, and a coin harms after ten rounds."""
    recalls = (0.1, 0.3, 0.5, 0.7, 0.9)
    gains = [_pooled(records, "decrim", part="recall", recall=recall) for recall in recalls]
    coin, n = _pooled(records, "decrim", part="critics", critic="coin", rounds=10)
    even = find(records, bench="decrim-study", metric="break_even_accuracy", constraints=4)
    if not n or not even or not all(count for _, count in gains):
        return None
    values = [value - _BASE for value, _ in gains]
    rises = all(a < b for a, b in pairwise(values))
    apart = all(b - a > 2 * _error(0.5, m) for (a, b), (_, m) in zip(pairwise(values), gains, strict=False))
    shown = ", ".join(f"{100 * value:+.1f}" for value in values)
    text = (
        f"gain by recall {shown} points at {recalls} and 10 % false alarms; coin {100 * (coin - _BASE):+.1f}; nothing "
        f"gained where {percent(even[0].value)} of verdicts are right (simulated)"
    )
    return graded([rises, apart, coin < _BASE - 3 * _error(_BASE, n)], [rises, coin < _BASE]), text
