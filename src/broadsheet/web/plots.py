"""Draws the papers' plots: quality against price in the family's committed comparison, each with one paper set off.

python -m broadsheet.web.plots FOLDER

A process of its own: how a family's records are to be read stands in its bench, which imports torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from broadsheet.catalogue import papers
from broadsheet.core.records import read_json, results_folder
from broadsheet.lab import plots
from broadsheet.lab.table import Row, quality_of, rows, view

from .facts import COMPARED, drawn_papers

_SOFT = "#b9b4aa"
_ACCENT = "#8f1d1d"


def set_off(figure: Any, names: set[str]) -> None:
    """Gives the methods of these names the accent, and all others less ink."""
    (axes,) = figure.axes
    shades = iter((_ACCENT, "#c4633f", "#d59a5b", "#6b2d5c"))
    for container in axes.containers:
        ours = container.get_label() in names
        line, caps, bars = container.lines
        colour = next(shades) if ours else _SOFT
        for artist in (line, *caps, *bars):
            artist.set_color(colour)
            artist.set_zorder(3 if ours else 1)
        line.set_linewidth(2.4 if ours else 1.0)
        line.set_markersize(6 if ours else 3.5)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in names)
    axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], fontsize=7, frameon=False, loc="center left",
        bbox_to_anchor=(1, 0.5),
    )  # fmt: skip


def draw(folder: Path) -> list[str]:
    """Writes ``folder/<slug>.svg`` for every paper that there is a comparison of; returns the slugs."""
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    for family, name in COMPARED.items():
        path = results_folder() / f"{name}.records.json"
        if not path.is_file():
            continue
        records = list(read_json(path))
        table = rows(records)
        for slug in sorted(s for s in drawn_papers() if papers()[s].family == family):
            figure = plots.quality_against_price(table, quality_of(records), view(records))
            set_off(figure, _names(table, slug))
            part = folder / f"{slug}.{os.getpid()}"
            part.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + plots.svg(figure), encoding="utf-8")
            part.replace(folder / f"{slug}.svg")
            done.append(slug)
    return done


def _names(table: list[Row], slug: str) -> set[str]:
    return {row.method for row in table if row.paper == slug}


if __name__ == "__main__":
    print("\n".join(draw(Path(sys.argv[1]))))
