"""What a device can do: bytes and operations a second, bytes it holds, what links it; each number with its origin.

A description is a JSON file (``devices/*.json`` ships with the package, ``broadsheet measure-hardware`` writes one of this
machine into BROADSHEET_HOME/devices, anybody can write one)::

    {"title": "NVIDIA A100 SXM 80 GB",
     "bandwidth": {"value": 2.039e12, "origin": "datasheet", "source": "..."},
     "memory": {...}, "onchip": {...}, "peaks": {"bf16": {...}, "int8": {...}},
     "link": {...}, "host_link": {...},
     "efficiency": {"compute": 0.71, "memory": 0.83, "overhead": 7.6e-6, "origin": "measured", "source": "..."}}

Units are bytes, bytes a second, operations a second (a multiply-add is two; dense, never the sparse peak) and seconds, all
decimal: 80 GB is 80e9 bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from broadsheet.core.records import home

Origin = Literal["datasheet", "measured", "published", "assumed", "simulated"]
ORIGINS = get_args(Origin)
FOLDER = Path(__file__).parent / "devices"
#: other names that people use
ALIASES = {
    "a100": "a100-80g",
    "a100-sxm": "a100-80g",
    "h100-sxm": "h100",
    "v100-sxm2": "v100",
    "rtx-a6000": "a6000",
    "4090": "rtx4090",
    "13900k": "i9-13900k",
}
#: a dtype that a device does not name runs at the rate of the first of these that it does
FALLBACK = {"bf16": ("fp16",), "fp16": ("bf16",), "fp8": ("int8",), "int8": (), "tf32": ("fp32",), "fp32": ()}


@dataclass(frozen=True)
class Efficiency:
    """What is reached of the rated numbers: ``t = max(F / (compute·peak), Q / (memory·bandwidth)) + overhead`` an operator.

    ``compute`` and ``memory`` are fractions (a rated number that is too low makes one above 1), ``overhead`` is seconds.
    """

    compute: float = 1.0
    memory: float = 1.0
    overhead: float = 0.0
    origin: Origin = "assumed"
    source: str = "the rated numbers are reached: a lower bound"

    def __post_init__(self) -> None:
        if not (self.compute > 0 and self.memory > 0 and self.overhead >= 0):
            raise ValueError(f"efficiencies are above 0 and the overhead is not negative; got {self}")


@dataclass(frozen=True)
class Device:
    """A device.

    bandwidth: bytes a second between its memory and its units. peaks: dtype ("fp32", "bf16", "fp16", "fp8", "int8") ->
    dense operations a second. memory: bytes it holds. onchip: bytes of its caches. link: bytes a second, one way, to a peer
    device; host_link: to the host's memory (both 0 where unknown). origins: name of a number -> (origin, source).
    """

    name: str
    title: str
    bandwidth: float
    peaks: Mapping[str, float]
    memory: float = math.inf
    onchip: float = 0.0
    link: float = 0.0
    host_link: float = 0.0
    efficiency: Efficiency = Efficiency()
    origins: Mapping[str, tuple[Origin, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.peaks:
            raise ValueError(f"{self.name}: 'peaks' names at least one dtype, such as bf16")
        for name, value in {"bandwidth": self.bandwidth, "memory": self.memory, **self.peaks}.items():
            if not value > 0:
                raise ValueError(f"{self.name}: {name} is above 0; got {value}")

    def peak(self, dtype: str) -> float:
        """Dense operations a second in ``dtype``; raises ValueError where the device has no such rate."""
        for name in (dtype, *FALLBACK.get(dtype, ())):
            if name in self.peaks:
                return self.peaks[name]
        raise ValueError(
            f"{self.name} has no {dtype} rate; it has {', '.join(self.peaks)}: choose other bits or another device"
        )

    def turning_point(self, dtype: str) -> float:
        """Operations a byte above which ``dtype`` is bound by compute (the roofline's ridge)."""
        return self.peak(dtype) / self.bandwidth

    def seconds(self, operations: float, nbytes: float, dtype: str) -> float:
        """Time of one operator: the roofline with this device's efficiency; no operations and no bytes take no time."""
        if not operations and not nbytes:
            return 0.0
        e = self.efficiency
        compute = operations / (e.compute * self.peak(dtype)) if operations else 0.0
        return max(compute, nbytes / (e.memory * self.bandwidth)) + e.overhead

    def rated(self) -> Device:
        """This device as its rated numbers promise: no losses, no overhead."""
        return replace(self, efficiency=Efficiency())

    def to_json(self) -> dict[str, Any]:
        """What `read_device` reads."""

        def quantity(name: str, value: float) -> dict[str, Any]:
            origin, source = self.origins.get(name, ("assumed", ""))
            return {"value": value, "origin": origin, "source": source}

        out: dict[str, Any] = {"title": self.title}
        for name in ("bandwidth", "memory", "onchip", "link", "host_link"):
            value = getattr(self, name)
            if value and math.isfinite(value):
                out[name] = quantity(name, value)
        out["peaks"] = {dtype: quantity(f"peaks.{dtype}", value) for dtype, value in self.peaks.items()}
        if self.efficiency != Efficiency():
            e = self.efficiency
            out["efficiency"] = {name: getattr(e, name) for name in ("compute", "memory", "overhead", "origin", "source")}
        return out


def devices() -> list[str]:
    """Names of the devices that `device` knows: those that ship and those measured on this machine."""
    folders = [FOLDER, home() / "devices"]
    return sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.json")})


def device(name: str | Device) -> Device:
    """A device by name ("h100"), or from a JSON file of one's own. Raises ValueError, naming those that there are."""
    if isinstance(name, Device):
        return name
    if name.endswith(".json"):
        return read_device(Path(name))
    plain = name.lower().replace("_", "-").removeprefix("nvidia-")
    plain = ALIASES.get(plain, plain)
    for folder in (home() / "devices", FOLDER):
        if (folder / f"{plain}.json").is_file():
            return read_device(folder / f"{plain}.json")
    extra = "; 'broadsheet measure-hardware' adds this machine" if plain in {"cpu", "local", "here"} else ""
    raise ValueError(f"no device '{name}'; known: {', '.join(devices())}, or a JSON file of your own{extra}")


def read_device(path: Path) -> Device:
    """A device from its file; raises ValueError that says what is wrong with it."""
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(text, dict) or not isinstance(text.get("peaks"), dict) or "bandwidth" not in text:
        raise ValueError(f'{path} describes no device: it needs "bandwidth" and "peaks", as core/perf/hardware.py shows')
    origins: dict[str, tuple[Origin, str]] = {}

    def number(name: str, entry: Any) -> float:
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), int | float):
            raise ValueError(f'{path}: {name} is {{"value": NUMBER, "origin": ..., "source": ...}}')
        if entry.get("origin") not in ORIGINS:
            raise ValueError(f"{path}: the origin of {name} is one of {', '.join(ORIGINS)}; got {entry.get('origin')!r}")
        origins[name] = (entry["origin"], str(entry.get("source", "")))
        return float(entry["value"])

    numbers = {n: number(n, text[n]) for n in ("bandwidth", "memory", "onchip", "link", "host_link") if n in text}
    peaks = {str(dtype): number(f"peaks.{dtype}", entry) for dtype, entry in text["peaks"].items()}
    try:
        efficiency = Efficiency(**text.get("efficiency", {}))
    except TypeError:
        raise ValueError(f"{path}: efficiency has compute, memory, overhead, origin and source") from None
    return Device(
        path.stem, str(text.get("title", path.stem)), peaks=peaks, efficiency=efficiency, origins=origins, **numbers
    )
