"""What LLM-Viewer says: tables, JSON, CSV, a roofline plot, a layer as a graph coloured by what bounds it, an HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from broadsheet.core.perf.architecture import Architecture
from broadsheet.core.perf.hardware import Device
from broadsheet.core.perf.ops import Op

from ..base import Report, Table

if TYPE_CHECKING:
    from . import LLMViewer

#: what an operator is bound by -> its colour (Okabe-Ito)
COLOURS = {"memory": "#0072B2", "compute": "#D55E00", "link": "#009E73", "overhead": "#7F7F7F"}
#: columns of an operator's row in JSON and CSV: bytes, operations, seconds; all its layers together
COLUMNS = (
    "stage", "operator", "layers", "count", "kind", "operations", "load_weight", "load_act", "store_act", "load_kv",
    "store_kv", "link_bytes", "bytes", "intensity", "attainable", "bound", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A pass, or several: its operators, and ``tokens`` that come out of it (prefill: that go in)."""

    name: str
    ops: tuple[Op, ...]
    tokens: float
    device: Device

    @property
    def seconds(self) -> float:
        return sum(op.count * op.seconds(self.device) for op in self.ops)

    @property
    def operations(self) -> float:
        return sum(op.count * op.operations for op in self.ops)

    @property
    def nbytes(self) -> float:
        return sum(op.count * op.nbytes for op in self.ops)

    def shares(self) -> dict[str, float]:
        """What bounds it -> the part of its time."""
        parts = dict.fromkeys(COLOURS, 0.0)
        for op in self.ops:
            parts[op.bound(self.device)] += op.count * op.seconds(self.device)
        whole = sum(parts.values()) or 1.0
        return {bound: part / whole for bound, part in parts.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict (`COLUMNS`) an operator and run of layers; steps of different lengths are summed."""
        summed: dict[tuple[str, str], list[Op]] = {}
        for op in self.ops:
            summed.setdefault((op.name, op.layers), []).append(op)
        return [self._row(equal) for equal in summed.values()]

    def _row(self, equal: Sequence[Op]) -> dict[str, Any]:
        first = equal[0]
        names = ("operations", "load_weight", "load_act", "store_act", "load_kv", "store_kv", "link_bytes")
        row: dict[str, Any] = {name: sum(op.count * getattr(op, name) for op in equal) for name in names}
        nbytes = sum(op.count * op.nbytes for op in equal)
        seconds = sum(op.count * op.seconds(self.device) for op in equal)
        longest = max(equal, key=lambda op: op.count * op.seconds(self.device))
        row |= {
            "stage": self.name, "operator": first.name, "layers": first.layers, "count": sum(op.count for op in equal),
            "kind": first.kind, "bytes": nbytes, "intensity": row["operations"] / nbytes if nbytes else 0.0,
            "attainable": row["operations"] / seconds if seconds else 0.0, "bound": longest.bound(self.device),
            "seconds": seconds,
        }  # fmt: skip
        return {name: row[name] for name in COLUMNS}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: weights, cache, activations that live at once, and what the device holds."""

    weights: float
    cache: float
    activations: float
    device: float
    parameters: int

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.device


@dataclass(frozen=True)
class RooflineReport(Report):
    """Stages of a model on a device; ``official``: seconds as the official code counts them, where it knows the device."""

    viewer: LLMViewer
    architecture: Architecture
    device: Device
    batch: int
    context: int
    stages: tuple[Stage, ...]
    memory: Memory
    official: dict[str, float] | None

    def stage(self, name: str) -> Stage:
        """Raises KeyError."""
        return {stage.name: stage for stage in self.stages}[name]

    @property
    def ops(self) -> list[dict[str, Any]]:
        """One dict a stage and operator: what a DataFrame is made of."""
        return [row for stage in self.stages for row in stage.rows()]

    def tables(self) -> list[Table]:
        return [self._totals(), self._memory(), *(self._operators(stage) for stage in self.stages[:2])]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.architecture.name, "hardware": self.device.name, "batch": self.batch, "context": self.context,
            "parameters": self.memory.parameters, "options": asdict(self.viewer),
            "totals": {
                stage.name: {
                    "seconds": stage.seconds, "operations": stage.operations, "bytes": stage.nbytes, "tokens": stage.tokens,
                    "tokens_per_second": stage.tokens / stage.seconds, "bound": stage.shares(),
                }
                for stage in self.stages
            },
            "official_code": self.official and {name: {"seconds": seconds} for name, seconds in self.official.items()},
            "memory": {**asdict(self.memory), "total": self.memory.total, "fits": self.memory.fits},
            "device": {**self.device.to_json(), "efficiency": asdict(self.device.efficiency)},
            "operators": self.ops,
        }  # fmt: skip

    def to_csv(self) -> str:
        """All operators, one row each (`COLUMNS`); bytes, operations, seconds."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.ops)
        return out.getvalue()

    def graph(self) -> dict[str, tuple[str, ...]]:
        """A layer's operator -> those whose output it takes."""
        last = self.stages[0].ops[-1]
        inner = [op for op in self.stages[0].ops if op.layers and op.layers == self.stages[0].ops[1].layers]
        return {op.name: op.inputs for op in inner or [last]}

    def files(self) -> dict[str, str]:
        pictures = {
            f"roofline-{stage.name.replace(' ', '-')}.svg": self.roofline_plot(stage.name) for stage in self.stages[:2]
        }
        return {
            "operators.csv": self.to_csv(),
            "layer.svg": self.graph_svg("decode"),
            **pictures,
            "report.html": self._page(),
        }

    # --- tables ---------------------------------------------------------------------------------------------------

    def _totals(self) -> Table:
        rows = []
        for stage in self.stages:
            shares = stage.shares()
            bound = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.005)
            theirs = (self.official or {}).get(stage.name)
            rows.append(
                (
                    stage.name, _significant(stage.seconds * 1e3), _significant(stage.operations / 1e9),
                    _significant(stage.nbytes / 1e9), _significant(stage.tokens / stage.seconds), bound,
                    None if theirs is None else _significant(theirs * 1e3),
                )
            )  # fmt: skip
        heads = ("stage", "ms", "Gop", "GB", "tokens/s", "time is bound by", "ms, official code")
        return Table(f"{self._subject()}, batch {self.batch}, context {self.context}", heads, tuple(rows), self._origin())

    def _subject(self) -> str:
        return f"{self.architecture.name} on {self.device.title}"

    def _origin(self) -> str:
        e = self.device.efficiency
        made = "counted by the official code's formulas, faults included" if self.viewer.compat else "GB are 1e9 bytes"
        if e.compute == e.memory == 1 and not e.overhead:
            return f"Rated roofline, a lower bound: nothing runs at its data sheet's numbers. {made}."
        fitted = f"{e.compute:.0%} of the peaks, {e.memory:.0%} of the bandwidth, {e.overhead * 1e6:.1f} µs an operator"
        return f"Calibrated: {fitted} ({e.origin}: {e.source}). {made}."

    def _memory(self) -> Table:
        m = self.memory
        parts = (("weights", m.weights), ("cache", m.cache), ("activations", m.activations), ("together", m.total))
        rows = [(name, _significant(size / 1e9)) for name, size in parts]
        note = ""
        if not m.fits:
            ranks = self.viewer.tensor_parallel
            need = next((t for t in (2, 4, 8, 16, 32, 64) if t > ranks and m.total * ranks / t <= m.device), None)
            way = f"tensor_parallel={need} would do" if need else "no 64 ranks hold it"
            note = f"Does not fit: {m.device / 1e9:.0f} GB are there; fewer bits, a shorter context, or {way}."
        else:
            rows.append(("of the device", _significant(m.device / 1e9)))
        return Table("memory of a rank, GB", ("part", "GB"), tuple(rows), note)

    def _operators(self, stage: Stage) -> Table:
        rows = []
        for row in sorted(stage.rows(), key=lambda row: -row["seconds"])[:14]:
            where = row["layers"] or "once"
            name = row["operator"] if len(self.architecture.blocks) == 1 else f"{row['operator']} ({where})"
            rows.append(
                (
                    name, _significant(row["seconds"] * 1e3), f"{row['seconds'] / stage.seconds:.0%}",
                    _significant(row["operations"] / 1e9), _significant(row["bytes"] / 1e9), _significant(row["intensity"]),
                    row["bound"],
                )
            )  # fmt: skip
        heads = ("operator", "ms", "of the time", "Gop", "GB", "op/byte", "bound")
        return Table(f"{stage.name}: operators, all layers together", heads, tuple(rows))

    # --- pictures -------------------------------------------------------------------------------------------------

    def roofline_plot(self, stage: str) -> str:
        """SVG: attainable operations a second against operations a byte; a point an operator, its area the time."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        found = self.stage(stage)
        rows = [row for row in found.rows() if row["operations"] and row["bytes"]]
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        least = min(row["intensity"] for row in rows) / 3
        most = max(*(row["intensity"] for row in rows), *(4 * self.device.turning_point(op.dtype) for op in found.ops))
        for dtype in sorted({op.dtype for op in found.ops}):
            peak, turn = self.device.peak(dtype), self.device.turning_point(dtype)
            axes.plot([least, turn, most], [least * self.device.bandwidth, peak, peak], color="black", linewidth=1)
            axes.annotate(f"{dtype} peak {peak / 1e12:.4g} T/s", (most, peak), ha="right", va="bottom", fontsize=8)
        whole = found.seconds
        for row in rows:
            size = 12 + 900 * row["seconds"] / whole
            axes.scatter(row["intensity"], row["attainable"], s=size, color=COLOURS[row["bound"]], alpha=0.55, linewidths=0)
        for row in sorted(rows, key=lambda row: -row["seconds"])[:6]:
            axes.annotate(
                row["operator"],
                (row["intensity"], row["attainable"]),
                fontsize=7,
                xytext=(4, -9),
                textcoords="offset points",
            )
        axes.set_title(f"{self._subject()}: {stage}, {whole * 1e3:.4g} ms", fontsize=9, loc="left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()

    def graph_svg(self, stage: str) -> str:
        """SVG of a layer: operators below those they wait for, coloured by what bounds them."""
        ops = {op.name: op for op in self.stage(stage).ops if op.layers == self.stages[0].ops[1].layers}
        graph = {name: [i for i in op.inputs if i in ops] for name, op in ops.items()}
        depth: dict[str, int] = {}
        for name, inputs in graph.items():  # in the order they run, so inputs come first
            depth[name] = 1 + max((depth[i] for i in inputs), default=-1)
        levels: dict[int, list[str]] = {}
        for name, level in depth.items():
            levels.setdefault(level, []).append(name)
        width, at = 150 * max(map(len, levels.values())) + 20, {}
        for level, names in levels.items():
            for place, name in enumerate(names):
                at[name] = (width * (place + 0.5) / len(names), 30 + 56 * level)
        parts = []
        for name, inputs in graph.items():
            x, y = at[name]
            parts += [
                f'<path d="M{at[i][0]:.0f} {at[i][1] + 14:.0f}L{x:.0f} {y - 14:.0f}" stroke="#999" fill="none"/>'
                for i in inputs
            ]
        for name, op in ops.items():
            x, y = at[name]
            seconds, colour = op.count * op.seconds(self.device), COLOURS[op.bound(self.device)]
            parts.append(
                f'<rect x="{x - 66:.0f}" y="{y - 14:.0f}" width="132" height="28" rx="5" fill="{colour}" opacity="0.9"/>'
            )
            text = f"{escape(name)} {seconds * 1e3:.3g} ms"
            parts.append(f'<text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" fill="white">{text}</text>')
        height = 56 * len(levels) + 20
        style = 'font-family="sans-serif" font-size="11"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>{"".join(parts)}</svg>'

    def _page(self) -> str:
        """One file that needs nothing else."""
        parts = [
            f"<h1>{escape(self._subject())}</h1><p>batch {self.batch}, context {self.context}. {escape(self._origin())}</p>"
        ]
        for table in self.tables():
            heads = "".join(f"<th>{escape(head)}</th>" for head in table.columns)
            rows = ("".join(f"<td>{escape('–' if c is None else str(c))}</td>" for c in row) for row in table.rows)
            body = "".join(f"<tr>{cells}</tr>" for cells in rows)
            note = f"<p>{escape(table.note)}</p>"
            parts.append(f"<h2>{escape(table.title)}</h2><table><tr>{heads}</tr>{body}</table>{note}")
        key = " ".join(f'<b style="color:{colour}">{name}</b>' for name, colour in COLOURS.items())
        pictures = [_inner(self.roofline_plot(stage.name)) for stage in self.stages[:2]]
        parts.append(
            f"<h2>Rooflines</h2><p>bound by {key}</p>{''.join(pictures)}<h2>A layer, decode</h2>{self.graph_svg('decode')}"
        )
        style = (
            "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
            "td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
            "td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}"
        )
        head = f'<meta charset="utf-8"><title>{escape(self._subject())}</title><style>{style}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'


def _inner(svg: str) -> str:
    """An SVG file's element, for use inside a page."""
    return svg[svg.index("<svg") :]


def _significant(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
