"""Energy of a window, and what one turn costs (section 4.1 and the authors' report scripts).

Times are seconds since the epoch, current mA, voltage V, power mW, energy mWh, discharge mAh.

Where the authors' scripts are wrong or narrow, this is not:

- They add up I V Δt over the samples strictly inside a window, the first of which counts nothing. Here power is linear
  between samples and is interpolated at both ends, so that windows add up to the whole.
- ``energy_pt`` is theirs, all of a turn's energy to its output tokens. Prefill and decode, and both above idle, stand
  beside it. (Their notebook divides the discharge a token by the tokens a second time.)
- A rate that was not measured is None, never -1 and never a turn's tokens over its whole duration.
- Their ADB reader divides µA by 10⁶ and calls it mA; see `adb`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

HOUR = 3600.0


@dataclass(frozen=True)
class PowerTrace:
    """What a meter saw: samples of current and voltage, or a counter of energy; ``source`` says which meter.

    ``time`` [n] in seconds, increasing. Either ``power`` [n] in mW with ``current`` [n] in mA where it is known, or
    ``counter`` [n] in mWh, which only ever grows. ``simulated``: no meter, but a model of a device.
    """

    time: NDArray[np.float64]
    power: NDArray[np.float64] | None = None
    current: NDArray[np.float64] | None = None
    counter: NDArray[np.float64] | None = None
    source: str = "meter"
    simulated: bool = False

    def __post_init__(self) -> None:
        if len(self.time) < 2:
            raise ValueError(f"{self.source}: {len(self.time)} power samples; a window needs at least 2")
        if not bool((np.diff(self.time) > 0).all()):
            raise ValueError(f"{self.source}: times of power samples must increase; sort the file and drop repeated rows")
        for values in (self.power, self.current, self.counter):
            if values is not None and (len(values) != len(self.time) or not bool(np.isfinite(values).all())):
                raise ValueError(f"{self.source}: every power sample needs a finite value; drop the rows without one")
        if (self.power is None) == (self.counter is None):
            raise ValueError(f"{self.source}: give either samples of power or a counter of energy")

    @classmethod
    def of_samples(
        cls, time: ArrayLike, current: ArrayLike, voltage: ArrayLike, source: str = "meter", simulated: bool = False
    ) -> PowerTrace:
        """From seconds, mA and V."""
        milliamperes = np.asarray(current, float)
        power = milliamperes * np.asarray(voltage, float)
        return cls(np.asarray(time, float), power, milliamperes, None, source, simulated)

    @classmethod
    def of_joules(cls, time: ArrayLike, joules: ArrayLike, source: str = "meter") -> PowerTrace:
        """From seconds and a counter in J."""
        return cls(np.asarray(time, float), None, None, np.asarray(joules, float) / 3.6, source)

    def joined(self, later: PowerTrace) -> PowerTrace:
        """This and what the same meter saw later; what lies between was not measured."""

        def both(mine: NDArray[np.float64] | None, theirs: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
            if mine is None or theirs is None:
                return None
            return np.concatenate([mine, theirs])

        counter = (
            None if later.counter is None or self.counter is None else later.counter - later.counter[0] + self.counter[-1]
        )
        times = both(self.time, later.time)
        assert times is not None
        parts = (both(self.power, later.power), both(self.current, later.current), both(self.counter, counter))
        return PowerTrace(times, *parts, self.source, self.simulated)

    def energy(self, start: float, end: float) -> float:
        """mWh between two times. Raises ValueError when the samples do not cover them."""
        if self.counter is not None:
            self._covers(start, end)
            low, high = np.interp([start, end], self.time, self.counter)
            return float(high - low)
        assert self.power is not None
        return self._integral(self.power, start, end)

    def discharge(self, start: float, end: float) -> float | None:
        """mAh between two times; None where no current was measured."""
        return None if self.current is None else self._integral(self.current, start, end)

    def mean_power(self, start: float, end: float) -> float:
        """mW."""
        return self.energy(start, end) * HOUR / (end - start)

    def _covers(self, start: float, end: float) -> None:
        if not start <= end:
            raise ValueError(f"a window ends at {end:.3f}, before it starts at {start:.3f}")
        first, last = float(self.time[0]), float(self.time[-1])
        if start < first or end > last:
            raise ValueError(
                f"{self.source} covers {first:.3f} to {last:.3f} s, and a window goes from {start:.3f} to {end:.3f} s; "
                "measure from before the load until after the last reply, with both clocks set"
            )

    def _integral(self, values: NDArray[np.float64], start: float, end: float) -> float:
        self._covers(start, end)
        inside = (self.time > start) & (self.time < end)
        times = np.concatenate([[start], self.time[inside], [end]])
        return float(np.trapezoid(np.interp(times, self.time, values), times)) / HOUR


@dataclass(frozen=True)
class Window:
    """From and to, in seconds since the epoch."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Turn:
    """One prompt and its reply.

    ``whole`` is the user's wait, from the prompt's arrival to the last character; in it lie ``prefill`` and ``decode``, and
    the rest is ``overhead`` seconds (template, tokeniser, text of the reply), measured by itself. ``input_tokens`` are those
    that were prefilled in this turn, ``session_tokens`` those that the cache held before it. In ``decode`` every output
    token is drawn and then run through the model, the last one too, so that the next turn finds it in the cache: a rate over
    it counts as many passes as tokens. ``cpu_seconds``: of prefill and of decode, all threads; None where unknown.
    """

    iteration: int
    conversation: int
    prompt: int
    whole: Window
    prefill: Window
    decode: Window
    overhead: float
    input_tokens: int
    output_tokens: int
    session_tokens: int
    first_token: float | None = None  #: time at which the first token was there
    cpu_seconds: tuple[float, float] | None = None

    @property
    def prefill_tps(self) -> float | None:
        return _rate(self.input_tokens, self.prefill.seconds)

    @property
    def decode_tps(self) -> float | None:
        return _rate(self.output_tokens, self.decode.seconds)

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from the prompt's arrival."""
        return None if self.first_token is None else self.first_token - self.whole.start

    @property
    def unaccounted(self) -> float:
        """Share of the turn that is neither prefill, decode nor measured overhead."""
        known = self.prefill.seconds + self.decode.seconds + self.overhead
        return abs(self.whole.seconds - known) / self.whole.seconds if self.whole.seconds else 0.0


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


@dataclass(frozen=True)
class Energy:
    """What a turn took, in mWh and mAh. ``prefill`` and ``decode`` are parts of ``total``; ``net``: above idle power.

    ``per_token`` is the authors' ``energy_pt``: all of the turn's energy over its output tokens. ``decode_per_token``
    charges the decoding alone. None where there is no output token or no current.
    """

    total: float
    prefill: float
    decode: float
    discharge: float | None
    per_token: float | None
    decode_per_token: float | None
    discharge_per_token: float | None
    net: float | None = None

    @classmethod
    def of(cls, turn: Turn, trace: PowerTrace, idle_power: float | None = None) -> Energy:
        """``idle_power`` in mW, measured before the run. Raises ValueError when the trace does not cover the turn."""
        parts = [trace.energy(window.start, window.end) for window in (turn.whole, turn.prefill, turn.decode)]
        discharge, tokens = trace.discharge(turn.whole.start, turn.whole.end), turn.output_tokens

        def each(value: float | None) -> float | None:
            return value / tokens if tokens and value is not None else None

        net = None if idle_power is None else parts[0] - idle_power * turn.whole.seconds / HOUR
        return cls(parts[0], parts[1], parts[2], discharge, each(parts[0]), each(parts[2]), each(discharge), net)


def tokens_per_battery(capacity_mah: float, voltage: float, energy_per_token: float) -> float:
    """How many output tokens a full battery pays for: capacity x voltage / energy a token (mWh)."""
    if min(capacity_mah, voltage, energy_per_token) <= 0:
        raise ValueError("capacity, voltage and energy a token must be above 0")
    return capacity_mah * voltage / energy_per_token


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of what was measured; ``missing`` were not measured and count nowhere."""

    median: float
    low: float
    high: float
    n: int
    missing: int = 0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        low, median, high = np.quantile(known, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high), len(known), len(values) - len(known))

    def __str__(self) -> str:
        return f"{self.median:.4g}" + (f" [{self.low:.4g}, {self.high:.4g}]" if self.n > 1 else "")


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean; nan for fewer than two values."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else math.nan


#: above this share of variation between repetitions a run is called unstable
STABLE = 0.05


def stability(turns: Sequence[Turn]) -> tuple[float, bool]:
    """Variation of the decode rate over repetitions (all tokens over all seconds of each), and whether it is below 5 %."""
    rates = []
    for iteration in sorted({turn.iteration for turn in turns}):
        mine = [turn for turn in turns if turn.iteration == iteration and turn.decode_tps is not None]
        seconds = sum(turn.decode.seconds for turn in mine)
        if seconds:
            rates.append(sum(turn.output_tokens for turn in mine) / seconds)
    spread = variation(rates)
    return spread, spread < STABLE


@dataclass(frozen=True)
class Span:
    """A stretch of a sustained run: seconds since its first turn, decode rate (tokens over seconds of decoding), turns."""

    start: float
    rate: float
    turns: int


def over_time(turns: Sequence[Turn], width: float = 60.0) -> list[Span]:
    """The decode rate by ``width`` seconds of a run; stretches without a decoded token are left out."""
    if width <= 0:
        raise ValueError(f"stretches are longer than 0 seconds, got {width}")
    first = min(turn.whole.start for turn in turns)
    groups: dict[int, list[Turn]] = {}
    for turn in turns:
        if turn.decode_tps is not None:
            groups.setdefault(int((turn.whole.start - first) // width), []).append(turn)
    return [
        Span(number * width, sum(t.output_tokens for t in some) / sum(t.decode.seconds for t in some), len(some))
        for number, some in sorted(groups.items())
    ]


def row(turn: Turn, energy: Energy | None = None) -> dict[str, Any]:
    """A turn as the authors' report writes it (``results_model_inference_measurements.csv``), with what we add."""
    return {
        "iteration": turn.iteration, "conversation": turn.conversation, "prompt": turn.prompt,
        "duration (sec)": turn.whole.seconds, "original_session_tokens": turn.session_tokens,
        "input_tokens": turn.input_tokens, "output_tokens": turn.output_tokens,
        "prefill_tps": turn.prefill_tps, "tps": turn.decode_tps, "ttft (sec)": turn.ttft,
        "energy_pt (mWh)": energy and energy.per_token, "discharge_pt (mAh)": energy and energy.discharge_per_token,
        "energy (mWh)": energy and energy.total, "prefill_energy (mWh)": energy and energy.prefill,
        "decode_energy (mWh)": energy and energy.decode, "decode_energy_pt (mWh)": energy and energy.decode_per_token,
        "net_energy (mWh)": energy and energy.net,
    }  # fmt: skip
