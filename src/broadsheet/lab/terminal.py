"""The ranked table in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from broadsheet.core.records import Record

from .report import budget_of, cell, columns, describe, price
from .table import Row, rows, view


def terminal_table(records: Sequence[Record]) -> Table:
    """One line a (method, budget), ranked within each budget; ``by turn`` shows accuracy at turns 1, 2, ... as bars."""
    heads, how = columns(records), view(records)
    table = Table(title=describe(records), title_justify="left", header_style="bold", box=None, padding=(0, 1))
    table.add_column("method")
    ranked = rows(records)
    turns = any(_by_turn(row) for row in ranked)
    for name in ("budget", how.price_head, *(name for name, _, _ in heads), *(["by turn"] if turns else [])):
        table.add_column(name, justify="right", no_wrap=True)
    last: float | None = None
    for row in ranked:
        if row.budget != last and table.row_count:
            table.add_section()
        last = row.budget
        budget = budget_of(row, how)
        if row.least is not None:
            table.add_row(row.method, budget, f"≥ {row.least:.{how.price_digits}f}", style="dim")
            continue
        cells = [cell(row, metric, setting) for _, metric, setting in heads]
        cells += [_by_turn(row)] if turns else []
        table.add_row(row.method, budget, price(row, how), *cells)
    return table


def _by_turn(row: Row) -> str:
    points = sorted(
        (dict(key)["turn"], value)
        for (metric, key), value in row.slices.items()
        if metric == "accuracy" and set(dict(key)) == {"mode", "turn"} and dict(key)["mode"] == "multi-turn"
    )
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * value))] for _, value in points)
