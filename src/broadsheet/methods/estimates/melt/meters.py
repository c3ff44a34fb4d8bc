"""Meters: what tells how much power a run takes.

``rapl`` reads the CPU packages' energy counters (Linux powercap; usually not readable in virtual machines), ``nvml`` those
of an NVIDIA GPU. ``csv:PATH`` reads what any other instrument wrote: Monsoon, INA219, ``powermetrics``, ``dumpsys``.
``model:DEVICE`` is no meter: it computes what DEVICE is thought to draw for the work that was done, and everything
that comes of it is tagged "simulated". ``none`` measures nothing, which is said so.
"""

from __future__ import annotations

import csv
import ctypes
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .clock import Clock
from .metrics import PowerTrace

POWERCAP = Path("/sys/class/powercap")
#: how a column's unit becomes mA, V, mW, mWh or s
_UNITS = {
    "current": {"a": 1e3, "ma": 1.0, "ua": 1e-3, "µa": 1e-3},
    "voltage": {"v": 1.0, "mv": 1e-3, "uv": 1e-6, "µv": 1e-6},
    "power": {"w": 1e3, "mw": 1.0, "uw": 1e-3},
    "energy": {"mwh": 1.0, "wh": 1e3, "j": 1 / 3.6, "mj": 1 / 3600},
    "timestamp": {"s": 1.0, "sec": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
}
_DEFAULT = {"current": "ma", "voltage": "v", "power": "mw", "energy": "mwh", "timestamp": "s"}
_COLUMN = re.compile(r"\s*(timestamp|time|current|voltage|power|energy)\s*(?:[(\[]\s*(\S+?)\s*[)\]])?\s*", re.I)


class Meter:
    """No meter, and the base of all: started before the idle stage, stopped after the tail."""

    source: str = "none"
    simulated: bool = False

    def start(self, clock: Clock) -> None:
        """Begins to sample. Raises ValueError where it cannot."""

    def stop(self) -> None:
        """Ends it."""

    def trace(self) -> PowerTrace | None:
        """What was seen; None for a meter that sees nothing."""
        return None

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "simulated": self.simulated}


@dataclass
class CounterMeter(Meter):
    """Samples a counter of energy in a thread, ``rate`` times a second. ``read`` gives joules that only ever grow."""

    read: Callable[[], float]
    source: str = "counter"
    rate: float = 100.0
    _times: list[float] = field(default_factory=list, repr=False)
    _joules: list[float] = field(default_factory=list, repr=False)

    def start(self, clock: Clock) -> None:
        self._clock, self._end = clock, threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._loop, name=self.source, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._sample()

    def trace(self) -> PowerTrace:
        return PowerTrace.of_joules(self._times, self._joules, self.source)

    def _loop(self) -> None:
        while not self._end.wait(1 / self.rate):
            self._sample()

    def _sample(self) -> None:
        now, joules = self._clock.now(), self.read()
        if not self._times or now > self._times[-1]:
            self._times.append(now)
            self._joules.append(joules)


def rapl(root: Path = POWERCAP, rate: float = 100.0) -> CounterMeter:
    """All CPU packages (``intel-rapl:0``, ``:1``, ...; AMD's are named so too). A counter that turns over is unrolled.

    Raises ValueError where there are none or they cannot be read.
    """
    packages = sorted(path for path in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", path.name))
    if not packages:
        raise ValueError(f"no RAPL counters under {root} (virtual machines have none); use --meter csv:PATH or model:DEVICE")

    def number(path: Path) -> int:
        try:
            return int(path.read_text())
        except PermissionError:
            raise ValueError(
                f"{path} may be read by root alone; run 'chmod a+r {path}' as root, or use another meter"
            ) from None

    ranges = [number(path / "max_energy_range_uj") for path in packages]
    last = [number(path / "energy_uj") for path in packages]
    total = 0

    def joules() -> float:
        nonlocal total
        for place, path in enumerate(packages):
            value = number(path / "energy_uj")
            total += value - last[place] + (ranges[place] if value < last[place] else 0)
            last[place] = value
        return total / 1e6

    return CounterMeter(joules, "rapl", rate)


def nvml(index: int = 0, rate: float = 50.0, library: str = "libnvidia-ml.so.1") -> CounterMeter:
    """An NVIDIA GPU's counter of energy (Volta and later). Raises ValueError where there is no GPU or no such counter."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise ValueError("no NVIDIA driver here; use --meter rapl, csv:PATH or model:DEVICE") from None
    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()

    def ask(name: str, *arguments: Any) -> None:
        if status := getattr(driver, name)(*arguments):
            raise ValueError(f"the NVIDIA driver refused {name} (status {status}): GPU {index} has no counter of energy")

    def joules() -> float:
        ask("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(value))
        return value.value / 1e3

    ask("nvmlInit_v2")
    ask("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    joules()
    return CounterMeter(joules, f"nvml:{index}", rate)


@dataclass
class CsvMeter(Meter):
    """A file that another instrument writes; it is read when the run is over."""

    path: Path

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"csv:{self.path.name}"

    def start(self, clock: Clock) -> None:
        if not self.path.parent.is_dir():
            raise ValueError(f"no folder {self.path.parent} for the meter's file; give the file that the instrument writes")

    def trace(self) -> PowerTrace:
        return read_csv(self.path, source=self.source)


def read_csv(path: str | Path, began: float = 0.0, source: str = "", simulated: bool = False) -> PowerTrace:
    """Power samples of a CSV file.

    With a header, its columns are ``timestamp`` and ``current`` with ``voltage``, or ``power``, or ``energy`` (a counter);
    a unit may follow in brackets: ``current (uA)``, ``timestamp [ms]``. Without one they are s, mA, V, mW, mWh. A file
    without a header is a Monsoon's: seconds since ``began``, mA, V. Rows that lack a value, or whose value is -1 in both
    current and voltage (which marks a missing one), are dropped. Raises ValueError.
    """
    path = Path(path)
    source = source or f"csv:{path.name}"
    if not path.is_file():
        raise ValueError(f"no power file at {path}; give what the instrument wrote")
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError(f"{path} is empty")
    names = [_COLUMN.fullmatch(name) for name in rows[0]]
    columns: dict[str, tuple[int, float]] = {}
    if any(names):
        for place, found in enumerate(names):
            if found:
                kind = "timestamp" if found[1].lower() == "time" else found[1].lower()
                unit = (found[2] or _DEFAULT[kind]).lower()
                if unit not in _UNITS[kind]:
                    raise ValueError(f"{path}: {kind} in {found[2]} is unknown; it is one of {', '.join(_UNITS[kind])}")
                columns[kind] = (place, _UNITS[kind][unit])
        rows = rows[1:]
    else:
        columns = {"timestamp": (0, 1.0), "current": (1, 1.0), "voltage": (2, 1.0)}
    wanted = next((c for c in (("current", "voltage"), ("power",), ("energy",)) if set(c) <= columns.keys()), None)
    if "timestamp" not in columns or wanted is None:
        raise ValueError(f"{path} needs columns timestamp and current, voltage (or power, or energy); it has {rows[0]}")
    table = []
    for row in rows:
        try:
            values = [float(row[columns[name][0]]) for name in ("timestamp", *wanted)]
        except (ValueError, IndexError):
            continue
        if np.isfinite(values).all() and values[1:] != [-1.0] * len(wanted):
            table.append(values)
    if len(table) < 2:
        raise ValueError(f"{path} has {len(table)} rows with all of timestamp, {', '.join(wanted)}; a window needs 2")
    array = np.array(table) * [columns[name][1] for name in ("timestamp", *wanted)]
    time = array[:, 0] + began
    if wanted == ("energy",):
        return PowerTrace(time, counter=array[:, 1], source=source, simulated=simulated)
    if wanted == ("power",):
        return PowerTrace(time, power=array[:, 1], source=source, simulated=simulated)
    current = array[:, 1]
    if np.median(current) < 0:  # batteries count what flows out as negative
        current = -current
    return PowerTrace.of_samples(time, current, array[:, 2], source, simulated)


def meter(text: str) -> Meter:
    """By name: none, rapl, nvml, nvml:INDEX, csv:PATH, adb:SERIAL, model:DEVICE. Raises ValueError."""
    kind, _, rest = text.partition(":")
    if kind == "none":
        return Meter()
    if kind == "rapl":
        return rapl()
    if kind == "nvml" and (not rest or rest.isdigit()):
        return nvml(int(rest or 0))
    if kind == "csv" and rest:
        return CsvMeter(Path(rest))
    if kind == "adb":
        from .adb import Adb, AdbMeter

        return AdbMeter(Adb(rest))
    if kind == "model" and rest:
        from .device import ModelMeter, device

        return ModelMeter(device(rest))
    raise ValueError(f"no meter '{text}'; there are none, rapl, nvml, nvml:INDEX, csv:PATH, adb:SERIAL and model:DEVICE")
