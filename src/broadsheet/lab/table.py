"""From records to a ranked table: one row a (method, budget), means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from broadsheet.core.records import Record
from broadsheet.core.view import Quality, View

from .compare import bench


@dataclass
class Row:
    """One line of the table.

    ``values[metric]`` is the mean over seeds of the metric without further setting; ``slices`` maps (metric, setting as a
    sorted tuple) to it. ``least`` is set when the budget could not be reached.
    """

    method: str
    paper: str
    budget: float | None
    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    slices: dict[tuple[str, tuple[tuple[str, Any], ...]], float] = field(default_factory=dict)
    least: float | None = None

    def get(self, metric: str, **setting: Any) -> float | None:
        if not setting:
            return self.values.get(metric)
        return self.slices.get((metric, tuple(sorted(setting.items()))))


def view(records: Sequence[Record]) -> View:
    """How the family of these records wants them read."""
    return bench(records[0].bench).VIEW


def quality_of(records: Iterable[Record]) -> Quality:
    """What ranks these records."""
    records = list(records)
    return view(records).quality({record.metric for record in records})


def rows(records: Sequence[Record]) -> list[Row]:
    """Ranked rows: by budget (those without one first), then by quality; unreachable ones last in their budget."""
    table: dict[tuple[str, float | None], Row] = {}
    gathered: dict[tuple[str, float | None], dict[tuple[str, tuple[tuple[str, Any], ...]], list[Record]]] = {}
    for record in records:
        budget = record.setting.get("budget")
        key = (record.method, budget)
        table.setdefault(key, Row(record.method, record.paper, budget))
        if record.metric == "reachable":
            if record.value == 0:
                table[key].least = record.setting["least"]
            continue
        rest = tuple(sorted((k, v) for k, v in record.setting.items() if k != "budget"))
        gathered.setdefault(key, {}).setdefault((record.metric, rest), []).append(record)
    for key, metrics in gathered.items():
        row = table[key]
        for (metric, rest), found in metrics.items():
            mean = statistics.mean(record.value for record in found)
            if rest:
                row.slices[(metric, rest)] = mean
                continue
            row.values[metric] = mean
            bounds = [record.ci for record in found if record.ci]
            if bounds:
                # Seeds are independent: half-widths of the mean shrink with the root of their number.
                low = mean - sum((r.value - r.ci[0]) ** 2 for r in found if r.ci) ** 0.5 / len(bounds)
                high = mean + sum((r.ci[1] - r.value) ** 2 for r in found if r.ci) ** 0.5 / len(bounds)
                row.intervals[metric] = (low, high)
    ranking = quality_of(records)
    reference = view(records).reference

    def order(row: Row) -> tuple[float, bool, bool, float]:
        quality = row.values.get(ranking.metric)
        rank = 0.0 if quality is None else (-quality if ranking.more_is_better else quality)
        return (-math.inf if row.budget is None else -row.budget, row.method != reference, row.least is not None, rank)

    return sorted(table.values(), key=order)
