"""Slow machines (MegaScale section 5.1): the heat map of ranks and phases, and who is an outlier for long.

The signal is CPU time, not wall time: here ranks share cores, so wall time says who had to wait for a core. On
machines of their own the two agree (``signal="wall"``). Time inside communication is left out: there the fast wait
for the slow, and the slow rank is the one that waits least.

In each window of steps a rank's value is its mean over the window, as in the paper. Its robust z is (value - median
over ranks) over max(1.4826 MAD, floor x median): with few ranks the MAD is close to zero by chance, and the floor is
what a healthy rank may differ by. A rank is flagged when z > threshold in ``sustained`` windows in a row. Window and
floor were chosen on 24 runs of four ranks that shared two busy cores, 12 of them with a rank 10 % slow; the
campaign's runs are others.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from .timer import Event, Trace

Phase = str


@dataclass(frozen=True)
class HeatMap:
    """``z`` [windows, ranks, phases] and ``values`` (ms) of the same shape; ``flagged``: rank -> phases in which it
    is slow for long; ``found``: rank -> the last step of the window that completed the proof."""

    ranks: tuple[int, ...]
    phases: tuple[Phase, ...]
    steps: tuple[int, ...]  #: the first step of each window
    values: np.ndarray
    z: np.ndarray
    flagged: Mapping[int, tuple[Phase, ...]]
    found: Mapping[int, int]

    def svg(self) -> str:
        """Ranks by phases: mean ms over windows, coloured by mean z."""
        cell, left, top = (84, 30), 70, 40
        rows = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + cell[0] * len(self.phases) + 10}" '
            f'height="{top + cell[1] * len(self.ranks) + 10}" font-family="sans-serif" font-size="12">'
        ]
        for column, phase in enumerate(self.phases):
            rows.append(f'<text x="{left + cell[0] * column + 4}" y="{top - 8}">{phase}</text>')
        for row, rank in enumerate(self.ranks):
            y = top + cell[1] * row
            mark = ' font-weight="bold"' if rank in self.flagged else ""
            rows.append(f'<text x="4" y="{y + 20}"{mark}>rank {rank}</text>')
            for column in range(len(self.phases)):
                heat, value = float(self.z[:, row, column].mean()), float(self.values[:, row, column].mean())
                x, fill = left + cell[0] * column, colour(heat)
                rows.append(f'<rect x="{x}" y="{y}" width="{cell[0] - 2}" height="{cell[1] - 2}" fill="{fill}"/>')
                rows.append(f'<text x="{x + 6}" y="{y + 19}">{value:.2f} ms</text>')
        return "\n".join([*rows, "</svg>"])


def colour(z: float) -> str:
    """White at the median, red at z of 5 and above, blue below."""
    share = min(abs(z) / 5, 1.0)
    fade = int(255 * (1 - 0.7 * share))
    return f"rgb(255,{fade},{fade})" if z > 0 else f"rgb({fade},{fade},255)"


@dataclass(frozen=True)
class Stragglers:
    """Thresholds. ``window``: steps; ``skip``: first steps of an attempt, which warm up; ``floor``: share of the median."""

    window: int = 15
    sustained: int = 2
    threshold: float = 3.0
    floor: float = 0.02
    skip: int = 2
    signal: Literal["cpu", "wall"] = "cpu"

    def __post_init__(self) -> None:
        if self.window < 1 or self.sustained < 1:
            raise ValueError("window and sustained must be at least 1")
        if self.floor <= 0 or self.threshold <= 0:
            raise ValueError("floor and threshold must be positive")

    def times(self, events: Sequence[Event]) -> dict[int, dict[Phase, float]]:
        """step -> phase -> ms of own work; nested communication is taken out, and "compute" is the sum."""
        found: dict[int, dict[Phase, float]] = {}
        inner: dict[int, list[Event]] = {}
        for event in events:  # in order of their ends: what is nested comes before what holds it
            if event.channel:
                inner.setdefault(event.step, []).append(event)
                continue
            nested = [one for one in inner.get(event.step, []) if one.start >= event.start and one.end <= event.end]
            inner[event.step] = [one for one in inner.get(event.step, []) if one not in nested]
            total = self._length(event) - sum(map(self._length, nested))
            if event.name not in ("checkpoint", "collect", "data"):
                row = found.setdefault(event.step, {})
                row[event.name] = row.get(event.name, 0.0) + total
        for row in found.values():
            row["compute"] = sum(row.values())
        return found

    def _length(self, event: Event) -> float:
        return (event.cpu if self.signal == "cpu" else event.end - event.start) / 1e6

    def heat_map(self, traces: Sequence[Trace]) -> HeatMap:
        """The map of one attempt's traces. Raises ValueError when there is no whole window of steps that all ranks
        finished."""
        times = {trace.rank: self.times(trace.events) for trace in traces}
        return self.judge(times)

    def judge(self, times: Mapping[int, Mapping[int, Mapping[Phase, float]]]) -> HeatMap:
        """`heat_map` of rank -> step -> phase -> ms."""
        ranks = tuple(sorted(times))
        if len(ranks) < 3:
            raise ValueError(f"a median over {len(ranks)} ranks proves nothing: at least 3 are needed")
        common = sorted(set.intersection(*(set(times[rank]) for rank in ranks)))[self.skip :]
        count = len(common) // self.window
        if not count:
            raise ValueError(f"{len(common)} steps after the first {self.skip} make no window of {self.window}: run longer")
        phases = tuple(sorted(set.intersection(*(set(times[r][s]) for r in ranks for s in common))))
        raw = np.array([[[times[rank][step][phase] for phase in phases] for rank in ranks] for step in common])
        windows = raw[: count * self.window].reshape(count, self.window, len(ranks), len(phases))
        values = windows.mean(axis=1)
        middle = np.median(values, axis=1, keepdims=True)
        spread = 1.4826 * np.median(np.abs(values - middle), axis=1, keepdims=True)
        z = (values - middle) / np.maximum(spread, self.floor * np.maximum(middle, 1e-9))
        flagged: dict[int, tuple[Phase, ...]] = {}
        found: dict[int, int] = {}
        slow = z[:, :, phases.index("compute")] > self.threshold
        for place, rank in enumerate(ranks):
            run = 0
            for window in range(count):
                run = run + 1 if slow[window, place] else 0
                if run == self.sustained:
                    last = z[window - run + 1 : window + 1, place].min(axis=0) > self.threshold
                    flagged[rank] = tuple(phase for phase, bad in zip(phases, last) if bad)
                    found[rank] = common[(window + 1) * self.window - 1]
                    break
        steps = tuple(common[window * self.window] for window in range(count))
        return HeatMap(ranks, phases, steps, values, z, flagged, found)


@dataclass
class Tail:
    """Follows the timer files of a running attempt: `read` takes in what is new."""

    folder: Path
    attempt: int
    rules: Stragglers
    times: dict[int, dict[int, dict[Phase, float]]] = field(default_factory=dict)
    _places: dict[Path, int] = field(default_factory=dict)

    def read(self) -> HeatMap | None:
        """The map as it stands; None while there are too few ranks or steps."""
        for path in sorted(self.folder.glob(f"timers-{self.attempt}-*.jsonl")):
            rank = int(path.stem.split("-")[2])
            with open(path, encoding="utf-8") as file:
                file.seek(self._places.get(path, 0))
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            self._places[path] = self._places.get(path, 0) + len(whole.encode())
            for line in whole.splitlines():
                row = json.loads(line)
                if "events" in row:
                    events = [Event(e[0], row["step"], *e[1:]) for e in row["events"]]
                    self.times.setdefault(rank, {}).update(self.rules.times(events))
        try:
            return self.rules.judge(self.times)
        except ValueError:
            return None


def slowdown(found: HeatMap, rank: int) -> float:
    """By how much a rank's compute is above the median of the others, as a share."""
    column = found.values[:, :, found.phases.index("compute")]
    place = found.ranks.index(rank)
    others = np.delete(column, place, axis=1)
    return float(statistics.median(column[:, place] / np.median(others, axis=1)) - 1)
