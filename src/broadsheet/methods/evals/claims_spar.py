"""The checks behind SPaR's claims, see `core.verdicts`. All numbers are SIMULATED: actor and refiner of known rates."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

#: constraints, lock -> share right of breadth-first search, greedy chain, best of 15 in the prototype
_EXPECTED = {
    (8, 0.0): (0.94, 0.96, 0.84),
    (8, 0.3): (0.77, 0.41, 0.85),
    (12, 0.15): (0.83, 0.57, 0.55),
    (16, 0.2): (0.80, 0.53, 0.28),
}
_POLICIES = ("bfs", "chain", "best-of-15")


def _pooled(records: Sequence[Record], method: str, metric: str, **setting: object) -> tuple[float, int]:
    found = find(records, bench="spar-study", method=method, metric=metric, **setting)
    total = sum(record.n for record in found)
    return (sum(record.value * record.n for record in found) / total, total) if total else (float("nan"), 0)


def search_against_sampling(records: Sequence[Record]) -> Verdict:
    """Tree search ends higher than best of 15, at 15 generations at most, where fresh answers seldom succeed; where they
    often do and refinements go astray, it does not. *Holds* asks for the paper's word in all four worlds."""
    rows, wins, close = [], [], []
    for (constraints, lock), expected in _EXPECTED.items():
        setting = {"part": "worlds", "constraints": constraints, "lock": lock}
        shares = [_pooled(records, policy, "right", **setting) for policy in _POLICIES]
        calls = [_pooled(records, policy, "generations", **setting)[0] for policy in _POLICIES]
        if not all(n for _, n in shares):
            return None
        (tree, n), _, (sampled, _) = shares
        wins.append(tree - sampled > 3 * (0.5 / n) ** 0.5)
        close += [abs(share - value) <= 0.03 for (share, _), value in zip(shares, expected, strict=True)]
        cells = " / ".join(f"{share:.2f} ({call:.1f})" for (share, _), call in zip(shares, calls, strict=True))
        rows.append(f"K={constraints}, lock {lock:g}: {cells}")
    text = f"right (generations) of tree / chain / best of 15: {'; '.join(rows)} (simulated, {sum(close)} of 12 as expected)"
    return graded([all(wins)], [wins[0], wins[2], wins[3]]), text
