"""A run's folder, in the authors' layout.

    configuration.json                                    how it was run, with the versions of everything
    measurements_power.csv                                timestamp (s), current (mA), voltage (V); or energy (mWh)
    measurements_ts.csv                                   stages: idle, run, tail
    melt_measurements/measurements_iter{i}.json           a conversation a row: modelLoadTime, questionRecords
    melt_measurements/measurements_iter{i}_conv{j}.csv    events: prefill.p.start ..., nanoseconds
    output.txt                                            what was said

Times are of the host's clock, since the epoch. `read_run` reads the authors' own folders too: a Monsoon's file without a
header, whose times begin at ``.t_monsoon``, and starts that are written as dates. A record's ``broadsheet`` field holds what
their format has no place for.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import Energy, PowerTrace, Turn, Window

FOLDER = "melt_measurements"
_ITERATION = re.compile(r"measurements_iter(\d+)\.json")


@dataclass(frozen=True)
class Stage:
    """A named stretch of a run: idle, run, tail."""

    name: str
    window: Window


@dataclass(frozen=True)
class Load:
    """Loading a model: when, and whether the files were in the page cache (``warm``; None where unknown)."""

    iteration: int
    conversation: int
    window: Window
    warm: bool | None = None


@dataclass(frozen=True)
class Reply:
    """What was asked and answered in a turn."""

    question: str
    answer: str


@dataclass(frozen=True)
class Run:
    """What a folder holds."""

    folder: Path
    configuration: dict[str, Any]
    turns: tuple[Turn, ...]
    loads: tuple[Load, ...]
    stages: tuple[Stage, ...]
    trace: PowerTrace | None

    @property
    def label(self) -> str:
        """Model (or its file), format and runtime, for a row of a table."""
        model = self.configuration.get("file") or self.configuration.get("model") or ""
        parts = [Path(str(model)).name, *(str(self.configuration.get(name, "")) for name in ("format", "runtime"))]
        return " ".join(part for part in parts if part) or self.folder.name

    @property
    def idle_power(self) -> float | None:
        """mW in the idle stage; None without one or without a meter."""
        idle = [stage.window for stage in self.stages if stage.name == "idle" and stage.window.seconds > 0]
        if self.trace is None or not idle:
            return None
        return sum(self.trace.energy(w.start, w.end) for w in idle) * 3600 / sum(w.seconds for w in idle)

    def energies(self) -> list[Energy | None]:
        """A turn's energy each; None without a meter. Raises ValueError when the power file does not cover them."""
        if self.trace is None:
            return [None] * len(self.turns)
        idle = self.idle_power
        return [Energy.of(turn, self.trace, idle) for turn in self.turns]


# --- writing --------------------------------------------------------------------------------------------------------


def write_iteration(
    folder: Path, iteration: int, loads: Sequence[Load], turns: Sequence[Turn], replies: Sequence[Reply]
) -> None:
    """One iteration's files; the JSON is written last, and stands for a finished iteration."""
    where = folder / FOLDER
    where.mkdir(parents=True, exist_ok=True)
    rows = []
    for load in loads:
        mine = [(turn, reply) for turn, reply in zip(turns, replies) if turn.conversation == load.conversation]
        events = [("load_model.start", load.window.start), ("load_model.end", load.window.end)]
        for turn, _ in mine:
            for name, window in (("prefill", turn.prefill), ("generate", turn.decode)):
                events += [(f"{name}.{turn.prompt}.start", window.start), (f"{name}.{turn.prompt}.end", window.end)]
        text = "".join(f"{name},{_nanoseconds(time)}\n" for name, time in events)
        _write(where / f"measurements_iter{iteration}_conv{load.conversation}.csv", text)
        start = {"start": load.window.start, "duration": load.window.seconds}
        rows.append({"modelLoadTime": start, "warm": load.warm, "questionRecords": [_record(*one) for one in mine]})
    _write(where / f"measurements_iter{iteration}.json", json.dumps(rows, indent=1, ensure_ascii=False))


def _record(turn: Turn, reply: Reply) -> dict[str, Any]:
    return {
        "time": {"start": turn.whole.start, "duration": turn.whole.seconds},
        "question": reply.question, "answer": reply.answer,
        "input_tokens": turn.input_tokens, "output_tokens": turn.output_tokens,
        "original_session_tokens": turn.session_tokens,
        "runtimeStats": "",  # the rates follow from the events
        "broadsheet": {
            "overhead": turn.overhead, "first_token": turn.first_token,
            "cpu_seconds": turn.cpu_seconds and list(turn.cpu_seconds),
        },
    }  # fmt: skip


def write_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Traffic, which a phone counts, is 0."""
    lines = ["stage,time_start,time_end,duration,rx,tx"]
    lines += [f"{s.name},{s.window.start:.7f},{s.window.end:.7f},{s.window.seconds:.6f},0,0" for s in stages]
    _write(folder / "measurements_ts.csv", "\n".join(lines) + "\n")


def write_power(folder: Path, trace: PowerTrace) -> None:
    """A meter without current and voltage is written as a counter of energy."""
    if trace.current is not None and trace.power is not None:
        voltage = np.divide(trace.power, trace.current, out=np.zeros_like(trace.power), where=trace.current != 0)
        rows, names = np.stack([trace.time, trace.current, voltage], 1), "timestamp,current,voltage"
    elif trace.counter is not None:
        rows, names = np.stack([trace.time, trace.counter], 1), "timestamp,energy"
    else:
        assert trace.power is not None
        rows, names = np.stack([trace.time, trace.power], 1), "timestamp,power"
    lines = [",".join(f"{value:.9g}" if place else f"{value:.7f}" for place, value in enumerate(row)) for row in rows]
    _write(folder / "measurements_power.csv", "\n".join([names, *lines]) + "\n")


def write_configuration(folder: Path, configuration: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "configuration.json", json.dumps(configuration, indent=1, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a kill leaves no half-written file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _nanoseconds(time: float) -> int:
    return round(time * 1e9)


# --- reading --------------------------------------------------------------------------------------------------------


def finished(folder: Path) -> list[int]:
    """The iterations that a folder already holds."""
    found = (_ITERATION.fullmatch(path.name) for path in (folder / FOLDER).glob("measurements_iter*.json"))
    return sorted(int(match[1]) for match in found if match)


def read_run(folder: str | Path) -> Run:
    """Raises ValueError, naming the file, for a folder that holds no run or a damaged one."""
    folder = Path(folder)
    if not (folder / "configuration.json").is_file():
        raise ValueError(f"{folder} holds no run: there is no configuration.json")
    configuration = _json(folder / "configuration.json")
    turns, loads = list[Turn](), list[Load]()
    files = [path for path in folder.rglob("measurements_iter*.json") if _ITERATION.fullmatch(path.name)]
    for path in sorted(files, key=_iteration):
        try:
            _read_iteration(path, _iteration(path), turns, loads)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is no file of measurements ({error!r})") from None
    if not turns:
        raise ValueError(f"{folder} holds no finished iteration; run it again, it goes on where it stopped")
    meter = configuration.get("meter")
    meter = meter if isinstance(meter, dict) else {}
    return Run(folder, configuration, tuple(turns), tuple(loads), tuple(stages_of(folder)), read_power(folder, meter))


def _iteration(path: Path) -> int:
    found = _ITERATION.fullmatch(path.name)
    assert found
    return int(found[1])


def _read_iteration(path: Path, iteration: int, turns: list[Turn], loads: list[Load]) -> None:
    for number, row in enumerate(_json(path)):
        load = row["modelLoadTime"]
        start = _time(load["start"])
        loads.append(Load(iteration, number, Window(start, start + load["duration"]), row.get("warm")))
        events = _events(path.with_name(f"measurements_iter{iteration}_conv{number}.csv"))
        for prompt, record in enumerate(row["questionRecords"] if "questionRecords" in row else row["chatRecords"]):
            start = _time(record["time"]["start"])
            whole = Window(start, start + record["time"]["duration"])
            prefill = _window(events, f"prefill.{prompt}", path)
            decode = _window(events, f"generate.{prompt}", path)
            more = record.get("broadsheet") or {}
            cpu = more.get("cpu_seconds")
            turns.append(
                Turn(
                    iteration, number, prompt, whole, prefill, decode,
                    more.get("overhead", whole.seconds - prefill.seconds - decode.seconds),
                    record["input_tokens"], record["output_tokens"], record["original_session_tokens"],
                    more.get("first_token"), (cpu[0], cpu[1]) if cpu else None,
                )
            )  # fmt: skip


def _events(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: without its events a turn has no prefill and decode times")
    with open(path, encoding="utf-8") as file:
        return {row[0]: int(row[1]) / 1e9 for row in csv.reader(file) if len(row) == 2}


def _window(events: Mapping[str, float], name: str, path: Path) -> Window:
    try:
        return Window(events[f"{name}.start"], events[f"{name}.end"])
    except KeyError:
        raise ValueError(f"{path}: the events have no {name}; the turn was not finished") from None


def _time(value: Any) -> float:
    """Seconds since the epoch, from a number or a date such as 2024-02-05T15:09:18.386Z."""
    if isinstance(value, str):
        return datetime.fromisoformat(value.replace("Z", "+00:00")).astimezone(UTC).timestamp()
    return float(value)


def stages_of(folder: Path) -> list[Stage]:
    path = folder / "measurements_ts.csv"
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Stage(row["stage"], Window(float(row["time_start"]), float(row["time_end"]))) for row in rows]


def read_power(folder: Path, meter: Mapping[str, Any] | None = None) -> PowerTrace | None:
    """The power file of a folder: ours, or a Monsoon's as the authors' tool keeps it. None where there is neither."""
    from .meters import read_csv

    meter = meter or {}
    ours, monsoon, began = (folder / n for n in ("measurements_power.csv", "measurements_monsoon.csv", ".t_monsoon"))
    source, simulated = str(meter.get("source") or "meter"), bool(meter.get("simulated"))
    if ours.is_file():
        return read_csv(ours, source=source, simulated=simulated)
    if monsoon.is_file():
        if not began.is_file():
            raise ValueError(f"{monsoon} needs {began.name} beside it: the second at which it began")
        return read_csv(monsoon, began=float(began.read_text().strip()), source="monsoon")
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
