"""The HTML report of a comparison: one self-contained page, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from broadsheet.core.records import Record, StorageError, now
from broadsheet.core.view import View
from broadsheet.methods.estimates.base import Table

from . import plots
from .table import Row, quality_of, rows, view

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --paper: #fdfcf9; --card: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e6e1; --soft: #a8a49c; --line: #444; --paper: #1b1b1a } }
body { font: 16px/1.5 Georgia, serif; color: var(--ink); background: var(--paper); max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.7rem; border-bottom: 3px double var(--ink); padding-bottom: .4rem }
table { border-collapse: collapse; font: 14px/1.4 system-ui, sans-serif; width: 100% }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tr.best td { font-weight: bold } tr.out td { color: var(--soft) }
figure { margin: 1.5rem 0; background: var(--card); padding: .5rem } figure svg { width: 100%; height: auto }
figcaption, .soft { color: var(--soft); font-size: .9rem } .wide { overflow-x: auto }
"""


def columns(records: Sequence[Record]) -> list[tuple[str, str, dict[str, Any]]]:
    """(heading, metric, setting) of the table's columns, by what was measured."""
    names = {record.metric for record in records}
    found: list[tuple[str, str, dict[str, Any]]] = []
    if quality_of(records).metric == "accuracy":
        found = [("accuracy", "accuracy", {})]
        modes = dict.fromkeys(r.setting["mode"] for r in records if "mode" in r.setting)
        found += [(mode, "accuracy", {"mode": mode}) for mode in modes]
        groups = dict.fromkeys(r.setting["group"] for r in records if "group" in r.setting)
        found += [(group, "accuracy", {"group": group}) for group in groups]
    return found + [(heading, metric, {}) for heading, metric in view(records).columns if metric in names]


def cell(row: Row, metric: str, setting: dict[str, Any]) -> str:
    """One table cell; the ranking column carries its interval."""
    value = row.get(metric, **setting)
    if value is None:
        return ""
    if metric.endswith("_share"):
        return f"{100 * value:.1f} %"
    if metric in ("accuracy", "score"):
        text = f"{100 * value:.1f} %"
        if not setting and metric in row.intervals:
            low, high = row.intervals[metric]
            text += f" [{100 * low:.0f}–{100 * high:.0f}]"
        return text
    if metric.endswith("bytes"):
        return f"{value / 1e6:.2f}"
    if value >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def price(row: Row, how: View) -> str:
    """What the row paid."""
    paid = row.values.get(how.price)
    return "–" if paid is None else f"{paid:.{how.price_digits}f}"


def budget_of(row: Row, how: View) -> str:
    """What the row was allowed."""
    return how.unbudgeted if row.budget is None else f"{row.budget:g}"


def describe(records: Sequence[Record]) -> str:
    """One line on what was run."""
    models = ", ".join(sorted({record.model.partition("@")[0] for record in records}))
    seeds = len({record.seed for record in records})
    device = ", ".join(sorted({record.device for record in records}))
    return f"model {models}; {seeds} seed{'s' if seeds > 1 else ''}; {device}"


@dataclass(frozen=True)
class Sheet:
    """The ranked table as text: ``rows`` of (kind, cells). Of kind "best" are those that win their budget; those of kind
    "out" could not reach it and have three cells, the last of which says so."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str
    about: str


def sheet_of(table: Table) -> Sheet:
    """An estimate's table."""
    return Sheet(table.columns, tuple(("", cells) for cells in table.texts()), table.note, table.title)


def sheet(records: Sequence[Record]) -> Sheet:
    """One row a (method, budget), ranked within each budget."""
    how, heads = view(records), columns(records)
    found: list[tuple[str, tuple[str, ...]]] = []
    best: set[float | None] = set()
    for row in rows(records):
        budget = budget_of(row, how)
        if row.least is not None:
            found.append(("out", (row.method, budget, how.least.format(f"{row.least:.{how.price_digits}f}"))))
            continue
        winner = row.budget is not None and row.budget not in best
        best.add(row.budget)
        cells = (cell(row, metric, setting) for _, metric, setting in heads)
        found.append(("best" if winner else "", (row.method, budget, price(row, how), *cells)))
    names = ("method", "budget", how.price_head, *(name for name, _, _ in heads))
    return Sheet(names, tuple(found), how.note, describe(records))


def html(records: Sequence[Record], title: str) -> str:
    """The page."""
    table, how, shown = rows(records), view(records), sheet(records)
    lines = [f"<h1>{escape(title)}</h1>", f"<p class='soft'>{escape(shown.about)}; written {now()}.</p>"]
    head = "".join(f"<th>{escape(name)}</th>" for name in shown.heads)
    lines.append(f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>")
    for kind, texts in shown.rows:
        wide = f" colspan='{len(shown.heads) - 2}' style='text-align:left'" if kind == "out" else ""
        cells = "".join(f"<td>{escape(text)}</td>" for text in texts[:-1]) + f"<td{wide}>{escape(texts[-1])}</td>"
        lines.append(f"<tr{f' class={kind}' if kind else ''}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    lines.append(f"<p class='soft'>{escape(shown.note)}</p>")
    figures = [(plots.quality_against_price(table, quality_of(records), how), "Quality against what is paid for it.")]
    for mode in dict.fromkeys(r.setting["mode"] for r in records if "mode" in r.setting):
        turns = plots.quality_by_turn(table, mode, how.reference)
        figures.append((turns, f"Accuracy by turn, {mode}, at the smallest budget."))
    figures.append((plots.time_bars(table, how), "Prefill and decode time at the smallest budget."))
    for figure, caption in figures:
        if figure is not None:
            lines.append(f"<figure>{plots.svg(figure)}<figcaption>{escape(caption)}</figcaption></figure>")
    body = "\n".join(lines)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        f"content='width=device-width,initial-scale=1'><title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def write_html(records: Sequence[Record], path: str, title: str) -> None:
    """Writes the page; raises `StorageError` when the file cannot be written."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(html(records, title), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
