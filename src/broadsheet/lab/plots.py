"""Pictures of a comparison: quality against its price, quality by turn, time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from broadsheet.core.view import Quality, View

from .table import Row

#: Fourteen colours, Okabe-Ito first; markers help where colours do not. The reference is black.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"),
    *("#8C564B", "#6A3D9A", "#B2DF8A", "#E31A1C", "#17BECF", "#BCBD22", "#FB9A99"),
)
_MARKERS = "osD^vPX*<>hp"


def new_figure(width: float = 7.2, height: float = 4.2) -> tuple[Any, Any]:
    """A figure and its axes, as all pictures here have them."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def style_of(methods: Sequence[str], reference: str) -> dict[str, dict[str, Any]]:
    """Colour and marker by name."""
    others = [name for name in methods if name != reference]
    styles = {
        name: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]} for i, name in enumerate(others)
    }
    styles[reference] = {"color": "black", "marker": "s"}
    return styles


def _methods(rows: Sequence[Row]) -> list[str]:
    return sorted({row.method for row in rows})


def quality_against_price(rows: Sequence[Row], quality: Quality, view: View) -> Any:
    """A line a method over its budgets; the reference as a level."""
    figure, axes = new_figure()
    metric = quality.metric
    styles = style_of(_methods(rows), view.reference)
    for name in _methods(rows):
        points = sorted(
            (row.values[view.price], row.values[metric], row.intervals.get(metric))
            for row in rows
            if row.method == name and metric in row.values and view.price in row.values
        )
        if metric == "kl":  # zero (the reference's, a lossless method's) has no place on a logarithmic axis
            points = [point for point in points if point[1] > 0 and name != view.reference]
        if not points:
            continue
        if name == view.reference:
            axes.axhline(points[0][1], color="black", linewidth=1, linestyle="--")
            place = (1, points[0][1])
            axes.annotate(
                view.reference_name, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
            )
            continue
        x, y = [p[0] for p in points], [p[1] for p in points]
        error = [[v - (c[0] if c else v) for _, v, c in points], [(c[1] if c else v) - v for _, v, c in points]]
        axes.errorbar(x, y, yerr=error, label=name, linewidth=1.4, markersize=5, elinewidth=0.7, **styles[name])
    axes.set_xscale("log", base=2)
    if metric == "kl":
        axes.set_yscale("log")
    axes.set_xticks([value for value, _ in view.ticks], [text for _, text in view.ticks])
    axes.set_xlabel(view.price_label)
    axes.set_ylabel(quality.name)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def quality_by_turn(rows: Sequence[Row], mode: str, reference: str) -> Any | None:
    """Accuracy at each turn at the smallest budget that was run, a line a method; None when no turns were measured."""
    budgets = [row.budget for row in rows if row.budget is not None]
    least = min(budgets, default=None)
    chosen = [row for row in rows if row.least is None and (row.budget == least or row.method == reference)]
    figure, axes = new_figure()
    styles = style_of(_methods(rows), reference)
    drawn = False
    for row in chosen:
        points = sorted(
            (dict(key)["turn"], value)
            for (metric, key), value in row.slices.items()
            if metric == "accuracy" and set(dict(key)) == {"mode", "turn"} and dict(key)["mode"] == mode
        )
        if points:
            drawn = True
            dashes = {"linestyle": "--"} if row.method == reference else {}
            axes.plot(*zip(*points), label=row.method, linewidth=1.4, markersize=5, **styles[row.method], **dashes)
            axes.set_xticks([turn for turn, _ in points])
    if not drawn:
        return None
    axes.set_xlabel(f"turn ({mode}, budget {least:g})" if least else f"turn ({mode})")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def time_bars(rows: Sequence[Row], view: View) -> Any | None:
    """Decode and prefill time over the reference's; None when it was not measured."""
    least = min((row.budget for row in rows if row.budget is not None), default=None)
    chosen = [r for r in rows if r.budget == least and "decode_time_ratio" in r.values]
    if not chosen:
        return None
    chosen.sort(key=lambda row: row.values["decode_time_ratio"])
    figure, axes = new_figure(height=0.9 + 0.34 * len(chosen))
    places = range(len(chosen))
    for offset, metric, colour in ((-0.2, "prefill_time_ratio", "#56B4E9"), (0.2, "decode_time_ratio", "#0072B2")):
        values = [row.values[metric] for row in chosen]
        axes.barh([p + offset for p in places], values, 0.38, color=colour, label=metric.split("_")[0])
        for place, value in zip(places, values, strict=True):
            axes.annotate(f" {value:.2g}×", (value, place + offset), va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(list(places), [row.method for row in chosen])
    axes.invert_yaxis()
    axes.set_xlabel(f"time / {view.reference_name}'s time, run alternately (shorter is faster)")
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def svg(figure: Any) -> str:
    """The figure as an SVG element, the same bytes for the same data."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "broadsheet", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
