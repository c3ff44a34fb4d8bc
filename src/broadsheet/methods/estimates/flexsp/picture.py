"""A plan as a picture: devices upwards, time to the right, a box a group."""

from __future__ import annotations

import io
from collections.abc import Sequence

from .plans import Plan


def picture(plans: Sequence[Plan]) -> str:
    """SVG of plans of one batch, one below the other on the same axis of time; what is white is idle."""
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    problem = plans[0].problem
    paint = colormaps["viridis"]
    colours = {d: paint(place / max(1, len(problem.degrees) - 1)) for place, d in enumerate(problem.degrees)}
    figure = Figure(figsize=(8, 0.8 + 2.0 * len(plans)), layout="constrained")
    FigureCanvasSVG(figure)
    rows = figure.subplots(len(plans), 1, sharex=True, squeeze=False)[:, 0]
    seen = set()
    for axis, plan in zip(rows, plans, strict=True):
        start = 0.0
        for number, ms in enumerate(plan.times):
            for devices, group in plan.ranks(number):
                seen.add(group.degree)
                box = (start / 1000, devices.start), plan.group_time(group) / 1000, len(devices)
                axis.add_patch(Rectangle(*box, facecolor=colours[group.degree], edgecolor="white", linewidth=0.4))
            start += ms
            axis.axvline(start / 1000, color="0.3", linewidth=0.8)
        axis.axvline(plan.bound / 1000, color="tab:red", linestyle=":", linewidth=1)
        axis.set(ylim=(0, problem.devices), ylabel="devices", title=f"{plan.planner}: {plan.time / 1000:.2f} s")
    rows[0].set_xlim(0, 1.02 * max(plan.time for plan in plans) / 1000)
    rows[-1].set_xlabel("predicted seconds (simulated); dotted: lower bound")
    legend = [Patch(color=colours[degree], label=f"groups of {degree}") for degree in sorted(seen)]
    figure.legend(handles=legend, loc="outside right upper", fontsize="small", frameon=False)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "plan"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
