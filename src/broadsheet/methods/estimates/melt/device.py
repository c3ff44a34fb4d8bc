"""A device as a model: roofline, power, heat, throttling, battery. Stands in for phones that are not here.

- A step of ``flops`` and ``bytes`` takes max(flops / (peak x compute), bytes / (bandwidth x memory)) + overhead, where the
  two factors are the shares of the datasheet's peaks that a real runtime reaches; a throttled device has a share of both.
- Power is P = idle + e_flop x FLOP/s + e_byte x byte/s.
- One thermal node: C dT/dt = P - (T - T_ambient) / R, solved exactly between two times of constant power.
- Above ``throttle_at`` the device steps down in its table of frequencies, ``hysteresis`` below it up again.
- The battery is a store of energy, of constant voltage.

Every parameter of a device is in a data file with its provenance: measured, datasheet or assumed. **Every number that comes
out of this module is simulated.**
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .meters import Meter
from .metrics import HOUR, PowerTrace
from .records import Run

Provenance = Literal["measured", "datasheet", "assumed"]
FOLDER = Path(__file__).parent / "devices"


@dataclass(frozen=True)
class Device:
    """``peak``: FLOP/s, ``bandwidth``: byte/s, and the shares of both that are reached; ``overhead``: seconds a step.
    ``idle``: W; ``e_flop``, ``e_byte``: J. ``capacity``: J/K, ``resistance``: K/W, temperatures: °C.
    ``levels``: the shares of the peaks, from full speed down. ``battery_mah`` (0: none) at ``battery_v``.
    ``provenance``: of every parameter."""

    name: str
    peak: float
    bandwidth: float
    compute_share: float
    memory_share: float
    overhead: float
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
    provenance: Mapping[str, Provenance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = ("peak", "bandwidth", "compute_share", "memory_share", "capacity", "resistance", "battery_v")
        if bad := [name for name in positive if not getattr(self, name) > 0]:
            raise ValueError(f"device {self.name}: {', '.join(bad)} must be above 0")
        if min(self.idle, self.e_flop, self.e_byte, self.overhead, self.hysteresis, self.battery_mah) < 0:
            raise ValueError(f"device {self.name}: powers, energies, overhead, hysteresis and battery are at least 0")
        if not self.levels or self.levels[0] != 1 or any(b >= a or b <= 0 for a, b in zip(self.levels, self.levels[1:])):
            raise ValueError(f"device {self.name}: levels begin with 1 and fall, all above 0")

    def seconds(self, flops: float, nbytes: float, level: int = 0) -> float:
        """Of one step."""
        speed = self.levels[level]
        compute = flops / (self.peak * self.compute_share * speed)
        return max(compute, nbytes / (self.bandwidth * self.memory_share * speed)) + self.overhead

    def watts(self, flops_rate: float, bytes_rate: float) -> float:
        return self.idle + self.e_flop * flops_rate + self.e_byte * bytes_rate


def device(name: str) -> Device:
    """By the name of a data file, or the path of one of your own. Raises ValueError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no device '{name}'; there are {', '.join(devices())}, or give the path of a JSON file like theirs"
        )
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        values = {key: row[key]["value"] for key in (f.name for f in fields(Device)) if key not in ("name", "provenance")}
        provenance = {key: row[key]["provenance"] for key in values}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no device ({error!r}): every parameter is a value with its provenance") from None
    if wrong := sorted(set(provenance.values()) - {"measured", "datasheet", "assumed"}):
        raise ValueError(f"{path}: provenance is measured, datasheet or assumed, not {', '.join(wrong)}")
    return Device(row.get("name", path.stem), **{**values, "levels": tuple(values["levels"])}, provenance=provenance)


def devices() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


# --- what a model asks of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What a language model takes: ``flops`` of the linear layers a token (2 a weight), ``weight_bytes`` read a pass,
    ``cache_bytes`` and ``cache_flops`` of attention for every token that the cache holds."""

    flops: float
    weight_bytes: float
    cache_bytes: float
    cache_flops: float

    @classmethod
    def of(cls, config: Any, weight_bytes: float, cache_element: int = 2) -> Load:
        """Of a transformers config with dense decoder blocks; ``cache_element``: bytes of a cached number."""
        c = config.get_text_config()
        heads, hidden = c.num_attention_heads, c.hidden_size
        dim = getattr(c, "head_dim", None) or hidden // heads
        kv = getattr(c, "num_key_value_heads", heads)
        block = hidden * dim * (2 * heads + 2 * kv) + 3 * hidden * c.intermediate_size
        weights = c.num_hidden_layers * block + hidden * c.vocab_size
        return cls(
            2.0 * weights, float(weight_bytes), 2.0 * c.num_hidden_layers * kv * dim * cache_element,
            4.0 * c.num_hidden_layers * heads * dim,
        )  # fmt: skip

    def prefill(self, tokens: int, held: int = 0) -> tuple[float, float]:
        """FLOPs and bytes of one pass over new tokens behind those that the cache holds."""
        seen = tokens * held + tokens * (tokens + 1) / 2
        return tokens * self.flops + seen * self.cache_flops, self.weight_bytes + (held + 2 * tokens) * self.cache_bytes

    def decode(self, held: int) -> tuple[float, float]:
        """Of one token."""
        return self.prefill(1, held)


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
        last = self.points[-1].time
        return _mean_rate([point for point in self.points if point.time >= 2 * last / 3])

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


def sustain(of: Device, load: Load, held: int = 1024, seconds: float = 1800.0, step: float = 1.0) -> Sustained:
    """Decodes behind ``held`` cached tokens without a pause. Raises ValueError for times that are not above 0."""
    if not (seconds > 0 and step > 0 and held >= 0):
        raise ValueError("seconds and step are above 0, held at least 0")
    node = Thermal(of.capacity, of.resistance, of.ambient, of.ambient)
    store = of.battery_mah * of.battery_v / 1000 * HOUR  # J
    level, used, tokens, points = 0, 0.0, 0.0, list[Point]()
    flops, nbytes = load.decode(held)
    time, emptied = 0.0, False
    while time < seconds and not emptied:
        rate = 1 / of.seconds(flops, nbytes, level)
        watts = of.watts(flops * rate, nbytes * rate)
        span = min(step, seconds - time)
        if store and used + watts * span >= store:
            span, emptied = (store - used) / watts, True
        points.append(Point(time, rate, watts, node.temperature, level, 1 - used / store if store else math.nan))
        node.step(watts, span)
        used, tokens, time = used + watts * span, tokens + rate * span, time + span
        if node.temperature > of.throttle_at:
            level = min(level + 1, len(of.levels) - 1)
        elif node.temperature < of.throttle_at - of.hysteresis:
            level = max(level - 1, 0)
    return Sustained(of.name, tuple(points), tokens, node.heat_in, node.heat_out, used / 3.6, emptied)


# --- a run that was measured here, as another device might have powered it --------------------------------------------


@dataclass
class ModelMeter(Meter):
    """The power that a device is thought to draw for the work of a run, at the times at which it was done *here*."""

    of: Device

    simulated = True

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"model:{self.of.name}"

    def of_run(self, run: Run) -> PowerTrace:
        """Simulated: idle power, and in each prefill and decode the energy of its FLOPs and bytes, spread evenly."""
        from broadsheet.core.models import load_config

        load = Load.of(load_config(str(run.configuration["model"])), float(run.configuration["pass_bytes"]), 4)
        edges: list[tuple[float, float]] = []
        for turn in run.turns:
            flops, nbytes = load.prefill(turn.input_tokens, turn.session_tokens)
            edges += self._busy(turn.prefill.start, turn.prefill.end, flops, nbytes)
            held = turn.session_tokens + turn.input_tokens
            steps = [load.decode(held + place) for place in range(turn.output_tokens)]
            edges += self._busy(turn.decode.start, turn.decode.end, sum(s[0] for s in steps), sum(s[1] for s in steps))
        edges.sort()
        first = min([stage.window.start for stage in run.stages] + [edges[0][0]]) - 1e-3
        last = max([stage.window.end for stage in run.stages] + [edges[-1][0]]) + 1e-3
        # a step in power is two samples a microsecond apart
        times, watts, level = [first], [self.of.idle], 0.0
        for time, change in edges:
            times += [time - 1e-6, time]
            watts += [self.of.idle + level, self.of.idle + level + change]
            level += change
        times.append(last)
        watts.append(self.of.idle)
        array = np.maximum.accumulate(np.array(times))
        kept = np.concatenate([[True], np.diff(array) > 0])
        current = np.array(watts)[kept] / self.of.battery_v * 1000
        voltage = np.full(int(kept.sum()), self.of.battery_v)
        return PowerTrace.of_samples(array[kept], current, voltage, self.source, True)

    def _busy(self, start: float, end: float, flops: float, nbytes: float) -> list[tuple[float, float]]:
        if end <= start:
            return []
        extra = (self.of.e_flop * flops + self.of.e_byte * nbytes) / (end - start)
        return [(start, extra), (end, -extra)]
