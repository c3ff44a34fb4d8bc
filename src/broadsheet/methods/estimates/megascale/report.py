"""What `broadsheet diagnose` says about a run's folder: slow ranks, who waits for whom, hangs, incidents; tables and
pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broadsheet.core.records import JsonLines
from broadsheet.methods.estimates.base import Cell, Report, Table

from .diagnosis import HeatMap, Stragglers, colour, slowdown
from .hang import Grid, HangView, hang_view
from .timeline import Alignment, align, chrome_trace, late
from .timer import Trace, read_traces


@dataclass(frozen=True)
class Diagnosis(Report):
    """One attempt's traces and what they show; ``heat`` is None when the run was too short for a window of steps."""

    traces: tuple[Trace, ...]
    heat: HeatMap | None
    why: str  #: why there is no heat map
    alignment: Alignment | None
    waits: Mapping[int, float]
    hangs: tuple[HangView, ...]
    incidents: tuple[Mapping[str, Any], ...]
    grid: Grid

    @property
    def slow(self) -> dict[int, float]:
        """Flagged ranks, and by how much their compute is above the others'."""
        return {rank: slowdown(self.heat, rank) for rank in self.heat.flagged} if self.heat else {}

    def tables(self) -> list[Table]:
        found = []
        rows: tuple[tuple[Cell, ...], ...]
        nodes = {trace.rank: trace.node for trace in self.traces}
        if self.heat:
            heat = self.heat
            note = "CPU ms a step (median over windows of their means); z: robust, mean over windows. " + (
                "; ".join(f"SLOW: rank {rank} on {nodes[rank]}, {share:+.1%}" for rank, share in self.slow.items())
                or "No rank is slow for long."
            )
            rows = tuple(
                (
                    rank, nodes[rank],
                    *(round(float(statistics.median(heat.values[:, place, i])), 3) for i in range(len(heat.phases))),
                    round(float(heat.z[:, place, heat.phases.index("compute")].mean()), 2),
                    round(self.waits.get(rank, math.nan), 3),
                )
                for place, rank in enumerate(heat.ranks)
            )  # fmt: skip
            columns = ("rank", "node", *heat.phases, "z", "others wait ms")
            found.append(Table("Ranks by phase", columns, rows, note))
        else:
            found.append(Table("Ranks by phase", ("rank", "node"), tuple(nodes.items()), self.why))
        if self.hangs:
            rows = tuple(
                (number, ", ".join(map(str, view.culprits)) or "nobody", view.reason)
                for number, view in enumerate(self.hangs)
            )
            found.append(Table("Hangs", ("hang", "rank", "why"), rows))
        if self.incidents:
            rows = tuple(
                (
                    one["attempt"], one["rule"], ", ".join(map(str, one["ranks"])) or None, ", ".join(one["nodes"]) or None,
                    one["step"], one["evidence"],
                )
                for one in self.incidents
            )  # fmt: skip
            found.append(Table("Incidents", ("attempt", "rule", "ranks", "nodes", "step", "evidence"), rows))
        return found

    def to_json(self) -> dict[str, Any]:
        heat = self.heat
        return {
            "slow": [{"rank": rank, "share": share} for rank, share in self.slow.items()],
            "heat": None
            if heat is None
            else {"ranks": heat.ranks, "phases": heat.phases, "ms": heat.values.tolist(), "z": heat.z.tolist()},
            "waits_ms": {str(rank): value for rank, value in self.waits.items()},
            "clock_offsets_ns": {str(r): o for r, o in self.alignment.offsets.items()} if self.alignment else {},
            "clock_residual_ns": self.alignment.residual if self.alignment else None,
            "hangs": [{"ranks": view.culprits, "why": view.reason} for view in self.hangs],
            "incidents": [dict(one) for one in self.incidents],
        }

    def files(self) -> dict[str, str]:
        found = {}
        if self.alignment:
            found["trace.json"] = chrome_trace(self.traces, self.alignment)
        if self.heat:
            found["heat.svg"] = self.heat.svg()
            found["ring.svg"] = ring(self.heat, self.waits)
        for number, view in enumerate(self.hangs):
            found[f"hang-{number}.svg"] = hang_svg(view, self.grid)
        return found


def diagnose(
    folder: str | Path, attempt: int | None = None, stragglers: Stragglers | None = None, grid: Grid | None = None
) -> Diagnosis:
    """The diagnosis of a run's folder: of ``attempt``, by default the last that has traces. Raises ValueError.

    ``grid``: how ranks are laid out in a hang's picture; by default all in one data-parallel row.
    """
    folder = Path(folder)
    traces = tuple(read_traces(folder, attempt))
    heat, why = None, ""
    try:
        heat = (stragglers or Stragglers()).heat_map(traces)
    except ValueError as error:
        why = str(error)
    alignment: Alignment | None = None
    waits: dict[int, float] = {}
    try:
        alignment = align(traces)
        waits = late(traces, alignment)
    except ValueError as error:
        why = why or str(error)
    hangs = []
    for path in sorted(folder.glob("hang-*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        hangs.append(hang_view(row["rounds"][-1], row["world"], row["rounds"][0]))
    world = len(hangs[0].events) if hangs else len(traces)
    if grid and grid.world != world:
        raise ValueError(f"tp={grid.tp} x pp={grid.pp} x dp={grid.dp} is {grid.world} ranks, the run has {world}")
    incidents = tuple(JsonLines(folder / "incidents.jsonl"))
    return Diagnosis(traces, heat, why, alignment, waits, tuple(hangs), incidents, grid or Grid(dp=world))


# --- pictures -----------------------------------------------------------------------------------------------------------


def _svg(width: int, height: int, rows: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, *rows, "</svg>"])


def ring(heat: HeatMap, waits: Mapping[int, float]) -> str:
    """The ranks on a ring, as an all-reduce goes round: colour is how slow a rank computes (z), its size what others
    wait for it."""
    count, radius, middle = len(heat.ranks), 130, 190
    column = heat.phases.index("compute")
    longest = max([*waits.values(), 1e-9])
    places = [
        (middle + radius * math.sin(2 * math.pi * i / count), middle - radius * math.cos(2 * math.pi * i / count))
        for i in range(count)
    ]
    rows = [
        f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{u:.0f}" y2="{v:.0f}" stroke="#999"/>'
        for (x, y), (u, v) in zip(places, [*places[1:], places[0]])
    ]
    for place, (rank, (x, y)) in enumerate(zip(heat.ranks, places)):
        size = 12 + 18 * waits.get(rank, 0.0) / longest
        fill, edge = colour(float(heat.z[:, place, column].mean())), "#c00" if rank in heat.flagged else "#333"
        rows.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{size:.0f}" fill="{fill}" stroke="{edge}"/>')
        rows.append(f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle">{rank}</text>')
    rows.append(f'<text x="10" y="{2 * middle - 8}">red: slow (z), large: others wait for it</text>')
    return _svg(2 * middle, 2 * middle, rows)


def hang_svg(view: HangView, grid: Grid) -> str:
    """Pipeline stages across, replicas down, tensor-parallel ranks shifted within a cell; culprits red, arrows to
    whom a rank waits for."""
    wide, high, left, top = 260, 46 * grid.tp + 24, 20, 40
    spot = {}
    rows = [
        '<defs><marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
    ]
    for rank in range(grid.world):
        tp, pp, dp = grid.place(rank)
        spot[rank] = (left + wide * pp + 14 * tp, top + high * dp + 40 * tp)
    for rank, (x, y) in spot.items():
        fill = "#f66" if rank in view.culprits else "#ddd" if view.events.get(rank) == "silent" else "#eef"
        rows.append(f'<rect x="{x}" y="{y}" width="{wide - 44}" height="34" fill="{fill}" stroke="#555"/>')
        rows.append(f'<text x="{x + 4}" y="{y + 14}">rank {rank}</text>')
        rows.append(f'<text x="{x + 4}" y="{y + 28}" font-size="9">{view.events.get(rank, "")}</text>')
    for rank, others in view.waits.items():
        for other in others:
            (x, y), (u, v) = spot[rank], spot[other]
            rows.append(
                f'<line x1="{x + 190}" y1="{y + 17}" x2="{u + 190}" y2="{v + 17}" stroke="#555" marker-end="url(#a)"/>'
            )
    for pp in range(grid.pp):
        rows.append(f'<text x="{left + wide * pp}" y="20">stage {pp}</text>')
    return _svg(left + wide * grid.pp + 14 * grid.tp, top + high * grid.dp + 10, rows)
