"""The checks behind LongProc's claims, see `core.verdicts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from broadsheet.core.records import Record
from broadsheet.core.verdicts import Verdict, find, graded

_GENERATED = ("path_traversal", "tom_tracking", "countdown", "travel_planning")


def task_collapse(records: Sequence[Record]) -> Verdict:
    """Accuracy and right prefix of the four generated tasks meet the closed forms of a fixed error a line within 3 standard
    errors of all seeds together, and accuracy falls with the length."""
    found = find(records, bench="longproc-study", part="closed form", recovery=0.0)
    found = [record for record in found if record.method in _GENERATED and "z" in record.setting]
    if not found:
        return None
    cells: dict[tuple[str, str, int], list[Record]] = {}
    for record in found:
        cells.setdefault((record.method, record.metric, record.setting["steps"]), []).append(record)
    # The seeds' deviations are independent and of unit variance: their sum over the root of their number is again.
    worst = max(abs(sum(r.setting["z"] for r in some)) / math.sqrt(len(some)) for some in cells.values())
    falling, parts = [], []
    for task in _GENERATED:
        by_length = sorted(
            (steps, some) for (name, metric, steps), some in cells.items() if (name, metric) == (task, "accuracy")
        )
        means = [sum(r.value for r in some) / len(some) for _, some in by_length]
        falling.append(all(a > b for a, b in pairwise(means)))
        lengths = "/".join(str(steps) for steps, _ in by_length)
        parts.append(f"{task} {' / '.join(f'{100 * mean:.1f}' for mean in means)} at {lengths} lines")
    error = found[0].setting["error"]
    text = f"SIMULATED, {error:g} errors a line: {'; '.join(parts)}"
    text += f"; largest deviation from the closed forms {worst:.1f} standard errors"
    return graded([worst <= 3, *falling], falling), text
