"""A device as a model: roofline, power, heat, throttling, battery. Stands in for phones that are not here.

- Time and traffic of a pass come from the core's operator tables and roofline (`core.perf`).
- Power is P = idle + e_flop x FLOP/s + e_byte x byte/s.
- One thermal node: C dT/dt = P - (T - T_ambient) / R, solved exactly between two times of constant power.
- Above ``throttle_at`` the device steps down in its table of levels (shares of its peaks), ``hysteresis`` below it up again.
- The battery is a store of energy, of constant voltage.

Every parameter is in a data file (``devices/*.json``, the core's format with a ``power`` part) with its origin: measured,
datasheet or assumed. **Every number that comes out of this module is simulated.**
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from broadsheet.core.perf import hardware
from broadsheet.core.perf.architecture import Architecture, architecture
from broadsheet.core.perf.hardware import ORIGINS, Origin
from broadsheet.core.perf.ops import Setting, operators
from broadsheet.core.perf.storage import GroupedWeight, Groups, plain
from broadsheet.methods.estimates.base import Table

from .meters import Meter
from .metrics import HOUR, PowerTrace
from .records import Run

FOLDER = Path(__file__).parent / "devices"
#: bits a weight and the weights that share a 16-bit scale, by format
FORMATS: dict[str, Groups] = {
    **{name: plain(bits) for name, bits in (("fp32", 32), ("fp16", 16), ("bf16", 16), ("f32", 32), ("f16", 16))},
    **{f"int{bits}": Groups(bits, 128) for bits in (8, 4, 3, 2)},
    **{f"q{bits}_0": Groups(bits, 32, zero=0) for bits in (8, 5, 4)},
    **{f"q{bits}_1": Groups(bits, 32) for bits in (5, 4)},
    # super-blocks, their scales included
    **{f"q{name}_k": plain(bits) for name, bits in ((6, 6.5625), (5, 5.5), (4, 4.5), (3, 3.4375), (2, 2.625))},
}


@dataclass(frozen=True)
class Power:
    """``idle``: W; ``e_flop``, ``e_byte``: J. ``capacity``: J/K, ``resistance``: K/W, temperatures: °C. ``levels``: shares
    of the peaks, from 1 down. ``battery_mah`` (0: none) at ``battery_v``. ``origins``: of every number, with its source.

    Raises ValueError for numbers that no device has.
    """

    idle: float
    e_flop: float
    e_byte: float
    capacity: float
    resistance: float
    ambient: float
    throttle_at: float
    hysteresis: float
    levels: tuple[float, ...]
    battery_mah: float
    battery_v: float
    origins: Mapping[str, tuple[Origin, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bad := [name for name in ("capacity", "resistance", "battery_v") if not getattr(self, name) > 0]:
            raise ValueError(f"power: {', '.join(bad)} must be above 0")
        if min(self.idle, self.e_flop, self.e_byte, self.hysteresis, self.battery_mah) < 0:
            raise ValueError("power: idle, energies, hysteresis and battery are at least 0")
        if not self.levels or self.levels[0] != 1 or any(not 0 < b < a for a, b in zip(self.levels, self.levels[1:])):
            raise ValueError("power: levels begin with 1 and fall, all above 0")

    def watts(self, flops_rate: float, bytes_rate: float) -> float:
        return self.idle + self.e_flop * flops_rate + self.e_byte * bytes_rate


@dataclass(frozen=True)
class Device:
    """A device of the core, with its power."""

    chip: hardware.Device
    power: Power

    @property
    def name(self) -> str:
        return self.chip.name

    def at(self, level: int) -> hardware.Device:
        """The chip at a level of its table."""
        share = self.power.levels[level]
        peaks = {dtype: peak * share for dtype, peak in self.chip.peaks.items()}
        return replace(self.chip, peaks=peaks, bandwidth=self.chip.bandwidth * share)


def device(name: str | Device) -> Device:
    """By the name of a data file, or the path of one of your own. Raises ValueError."""
    if isinstance(name, Device):
        return name
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no device '{name}' with a power model; there are {', '.join(devices())}, or give a JSON file like them"
        )
    chip = hardware.read_device(path)
    part = json.loads(path.read_text(encoding="utf-8")).get("power")
    names = [one.name for one in fields(Power) if one.name != "origins"]
    values, origins = {}, {}
    for name in names:
        entry = part.get(name) if isinstance(part, dict) else None
        if not isinstance(entry, dict) or "value" not in entry or entry.get("origin") not in ORIGINS:
            raise ValueError(f'{path}: power.{name} is {{"value": ..., "origin": {" or ".join(ORIGINS)}, "source": ...}}')
        values[name], origins[name] = entry["value"], (entry["origin"], str(entry.get("source", "")))
    return Device(chip, Power(**{**values, "levels": tuple(values["levels"])}, origins=origins))


def devices() -> list[str]:
    """Those that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


# --- what a model asks of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Operations, bytes and, on a chip, seconds of a pass."""

    operations: float
    nbytes: float
    seconds: float = 0.0


def work(arch: Architecture, form: str, held: int, new: int = 1, chip: hardware.Device | None = None) -> Work:
    """One pass of ``new`` tokens behind ``held`` cached ones. Raises ValueError for an unknown format."""
    if form.lower() not in FORMATS:
        raise ValueError(f"unknown quantisation '{form}'; known: {', '.join(FORMATS)}")
    weights = GroupedWeight(FORMATS[form.lower()])
    head = 16 if weights.bits <= 16 else 32
    setting = Setting(1, held + new, new, weights, head, head)
    table = operators(arch, setting)
    return Work(
        sum(op.operations * op.count for op in table), sum(op.nbytes * op.count for op in table),
        sum(op.seconds(chip) * op.count for op in table) if chip else 0.0,
    )  # fmt: skip


# --- heat ---------------------------------------------------------------------------------------------------------------


@dataclass
class Thermal:
    """The node's temperature (°C) and what went in and out (J)."""

    capacity: float
    resistance: float
    ambient: float
    temperature: float
    heat_in: float = 0.0
    heat_out: float = 0.0

    def step(self, watts: float, seconds: float) -> float:
        """The temperature after so many seconds of constant power."""
        above = self.temperature - self.ambient - watts * self.resistance  # of what it would settle at
        decay = -math.expm1(-seconds / (self.resistance * self.capacity))
        self.temperature -= above * decay
        self.heat_in += watts * seconds
        self.heat_out += watts * seconds + above * self.capacity * decay  # the integral of (T - T_ambient) / R
        return self.temperature


# --- sustained runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A moment of a simulated run: seconds since its start, decode rate, W, °C, level, share of the battery that is left."""

    time: float
    rate: float
    watts: float
    temperature: float
    level: int
    battery: float


@dataclass(frozen=True)
class Sustained:
    """A simulated run until the battery is empty or the time is over. ``heat_in``, ``heat_out`` in J; all is simulated."""

    device: str
    points: tuple[Point, ...]
    tokens: float
    seconds: float
    heat_in: float
    heat_out: float
    energy_mwh: float
    emptied: bool

    @property
    def first_minute(self) -> float:
        """Mean decode rate of the first minute."""
        return _mean_rate([point for point in self.points if point.time < 60])

    @property
    def steady(self) -> float:
        """Of the last third."""
        return _mean_rate([point for point in self.points if point.time >= 2 * self.seconds / 3])

    @property
    def throttled_after(self) -> float | None:
        """Seconds until it was slowed down first."""
        return next((point.time for point in self.points if point.level), None)

    @property
    def hottest(self) -> float:
        return max(point.temperature for point in self.points)

    @property
    def energy_per_token(self) -> float:
        """mWh, idle power included."""
        return self.energy_mwh / self.tokens


def _mean_rate(points: Sequence[Point]) -> float:
    return float(np.mean([point.rate for point in points])) if points else math.nan


def sustain(of: Device, model: Any, form: str, held: int = 1024, seconds: float = 1800.0, step: float = 1.0) -> Sustained:
    """Decodes behind ``held`` cached tokens without a pause. Raises ValueError for times that are not above 0."""
    if not (seconds > 0 and step > 0 and held >= 0):
        raise ValueError("seconds and step are above 0, held at least 0")
    arch, power = architecture(model), of.power
    passes = [work(arch, form, held, 1, of.at(level)) for level in range(len(power.levels))]
    node = Thermal(power.capacity, power.resistance, power.ambient, power.ambient)
    store = power.battery_mah * power.battery_v / 1000 * HOUR  # J
    level, used, tokens, points = 0, 0.0, 0.0, list[Point]()
    time, emptied = 0.0, False
    while time < seconds and not emptied:
        one = passes[level]
        rate = 1 / one.seconds
        watts = power.watts(one.operations * rate, one.nbytes * rate)
        span = min(step, seconds - time)
        if store and used + watts * span >= store:
            span, emptied = (store - used) / watts, True
        points.append(Point(time, rate, watts, node.temperature, level, 1 - used / store if store else math.nan))
        node.step(watts, span)
        used, tokens, time = used + watts * span, tokens + rate * span, time + span
        if node.temperature > power.throttle_at:
            level = min(level + 1, len(power.levels) - 1)
        elif node.temperature < power.throttle_at - power.hysteresis:
            level = max(level - 1, 0)
    return Sustained(of.name, tuple(points), tokens, time, node.heat_in, node.heat_out, used / 3.6, emptied)


def sustained_table(runs: Sequence[tuple[str, Sustained]]) -> Table:
    """``runs``: (format, run). Every number is tagged."""

    def tagged(value: float | None, unit: str) -> str | None:
        return None if value is None else f"{value:.4g} {unit} simulated"

    rows = [
        (
            run.device, form, tagged(run.first_minute, "tokens/s"), tagged(run.steady, "tokens/s"),
            tagged(run.throttled_after, "s"), tagged(run.hottest, "°C"), tagged(run.energy_per_token, "mWh"),
            tagged(run.seconds, "s") if run.emptied else None,
        )
        for form, run in runs
    ]  # fmt: skip
    columns = (
        "device",
        "format",
        "first minute",
        "steady",
        "throttled after",
        "hottest",
        "energy a token",
        "battery empty after",
    )
    note = "A model of a device, no measurement: bandwidth and battery from datasheets, the rest assumed (devices/*.json)."
    return Table("Sustained decoding", columns, tuple(rows), note)


# --- a run that was measured here, as another device might have powered it --------------------------------------------


@dataclass
class ModelMeter(Meter):
    """The power that a device is thought to draw for the work of a run, at the times at which it was done *here*."""

    of: Device

    simulated = True

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"model:{self.of.name}"

    def check(self, model: str, form: str) -> None:
        """Raises ValueError before a run whose work could not be counted after it."""
        work(architecture(model), form, 1)

    def of_run(self, run: Run, model: Any = None) -> PowerTrace:
        """Simulated: idle power, and in each prefill and decode the energy of its operations and bytes, spread evenly.

        ``model``: whose operators are counted, where the run's own name is none that `architecture` takes.
        """
        arch, form = architecture(model or run.configuration["model"]), str(run.configuration["format"])
        edges: list[tuple[float, float]] = []
        for turn in run.turns:
            once = work(arch, form, turn.session_tokens, turn.input_tokens)
            edges += self._busy(turn.prefill.start, turn.prefill.end, once, 1)
            # work grows linearly with what is held, so the middle token stands for all
            middle = turn.session_tokens + turn.input_tokens + turn.output_tokens // 2
            edges += self._busy(turn.decode.start, turn.decode.end, work(arch, form, middle), turn.output_tokens)
        edges.sort()
        first = min([stage.window.start for stage in run.stages] + [edges[0][0]]) - 1e-3
        last = max([stage.window.end for stage in run.stages] + [edges[-1][0]]) + 1e-3
        # a step in power is two samples that lie close
        times, watts, extra = [first], [self.of.power.idle], 0.0
        for time, change in edges:
            times += [time - 1e-5, time]
            watts += [self.of.power.idle + extra, self.of.power.idle + extra + change]
            extra += change
        array = np.maximum.accumulate(np.array([*times, last]))
        kept = np.concatenate([[True], np.diff(array) > 0])
        power, volts = np.array([*watts, self.of.power.idle])[kept], self.of.power.battery_v
        return PowerTrace.of_samples(array[kept], power / volts * 1000, np.full(len(power), volts), self.source, True)

    def _busy(self, start: float, end: float, each: Work, times: int) -> list[tuple[float, float]]:
        if end <= start:
            return []
        power = self.of.power
        extra = times * (power.e_flop * each.operations + power.e_byte * each.nbytes) / (end - start)
        return [(start, extra), (end, -extra)]
