"""An Android phone over ``adb``: it runs ``llama-server``, we run the protocol, its battery says what that takes.

The model and the server's binary are pushed, the server is started on the phone and its port forwarded; the session is then
that of `LlamaServerRuntime`. The phone is prepared as in the authors' scripts (no notifications, fixed brightness, other
apps stopped), over WiFi where its own battery is measured: a USB cable powers it, and a run over one is refused with this
meter.

The fuel gauge's units differ between makers. Android says µA and µV, some report mA; and charge flows out with either sign.
`read_uevent` takes a current beyond 20,000 for µA, else for mA, and its size. (The authors divide by 10⁶ and call it mA.)
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .clock import Clock, check_clocks
from .config import ModelConfig, RunSettings
from .conversations import Conversation
from .llamacpp import LlamaServerRuntime, wait_for_server
from .meters import Meter
from .metrics import PowerTrace
from .records import Run
from .session import run_session

#: where everybody may write and run things
REMOTE = "/data/local/tmp/broadsheet"
PORT = 8377
#: a larger number cannot be mA
_MICRO = 20_000


class AdbError(ValueError):
    """adb is missing, the device is, or a command on it failed; one line."""


@dataclass(frozen=True)
class Adb:
    """A device by its serial (empty: the only one). ``program``: the adb to run."""

    serial: str = ""
    program: str = "adb"
    timeout: float = 60.0

    def call(self, *arguments: str) -> str:
        """Standard output of ``adb -s SERIAL ...``. Raises `AdbError`."""
        command = [self.program, *(["-s", self.serial] if self.serial else []), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout)
        except FileNotFoundError:
            raise AdbError(f"'{self.program}' is not installed; it comes with Android's platform-tools") from None
        except subprocess.TimeoutExpired:
            raise AdbError(f"the device did not answer '{' '.join(arguments)}' in {self.timeout:.0f} s") from None
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise AdbError(f"adb {' '.join(arguments)}: {reason[-1] if reason else f'status {done.returncode}'}")
        return done.stdout

    def shell(self, command: str) -> str:
        return self.call("shell", command).strip()

    def push(self, source: Path, target: str) -> None:
        if not source.is_file():
            raise AdbError(f"no file {source} to push")
        self.call("push", str(source), target)

    def properties(self) -> dict[str, str]:
        """Maker, model, Android's version and the system on chip."""
        names = {"maker": "manufacturer", "model": "model"}
        found = {key: self.shell(f"getprop ro.product.{name}") for key, name in names.items()}
        return {
            **found,
            "android": self.shell("getprop ro.build.version.release"),
            "chip": self.shell("getprop ro.soc.model"),
        }

    def clock_offset(self, tries: int = 5) -> float:
        """Seconds by which the device's clock is ahead, of the try with the shortest round trip."""
        found = []
        for _ in range(tries):
            before = time.time()
            text = self.shell("date +%s.%N")
            after = time.time()
            try:
                found.append((after - before, float(text) - (before + after) / 2))
            except ValueError:
                raise AdbError(f"the device's date says '{text}', not seconds with a fraction") from None
        return min(found)[1]


def read_uevent(text: str) -> tuple[float, float]:
    """mA and V of a power supply's uevent file. Raises `AdbError` where it has none."""
    values = {name: float(number) for name, number in re.findall(r"POWER_SUPPLY_(CURRENT_NOW|VOLTAGE_NOW)=(-?\d+)", text)}
    if len(values) < 2:
        raise AdbError("the battery reports no CURRENT_NOW and VOLTAGE_NOW; measure with a power meter and --meter csv:PATH")
    current, voltage = abs(values["CURRENT_NOW"]), values["VOLTAGE_NOW"]
    milliamperes = current / 1000 if current > _MICRO else current
    return milliamperes, voltage / (1e6 if voltage > _MICRO else 1e3)


def read_temperature(text: str) -> float | None:
    """°C of ``dumpsys battery``, which counts tenths; None where it says nothing."""
    found = re.search(r"^\s*temperature:\s*(-?\d+)", text, re.M)
    return int(found[1]) / 10 if found else None


def powered(text: str) -> list[str]:
    """What powers the device, of ``dumpsys battery``: AC, USB, Wireless."""
    return re.findall(r"^\s*(\w+) powered: true", text, re.M)


@dataclass
class AdbMeter(Meter):
    """The phone's own fuel gauge, some times a second (it is slow and coarse: seconds, not milliseconds).

    Times are the host's, at the middle of a query. Raises `AdbError` on a device that a cable powers.
    """

    adb: Adb
    rate: float = 4.0
    _rows: list[tuple[float, float, float]] = field(default_factory=list, repr=False)
    _failed: AdbError | None = field(default=None, repr=False)

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"adb:{self.adb.serial or 'device'}"

    def start(self, clock: Clock) -> None:
        if by := powered(self.adb.shell("dumpsys battery")):
            raise AdbError(
                f"the device is powered by {', '.join(by)}: unplug it (adb over WiFi), or measure with a power meter"
            )
        self._clock, self._end = clock, threading.Event()
        self._sample()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        if self._failed:
            raise AdbError(f"the meter stopped in the middle of the run: {self._failed}")
        self._sample()

    def trace(self) -> PowerTrace:
        times, current, voltage = zip(*self._rows, strict=True)
        return PowerTrace.of_samples(times, current, voltage, self.source)

    def _loop(self) -> None:
        while not self._end.wait(1 / self.rate):
            try:
                self._sample()
            except AdbError as error:
                self._failed = error
                return

    def _sample(self) -> None:
        before = self._clock.now()
        current, voltage = read_uevent(self.adb.shell("cat /sys/class/power_supply/battery/uevent"))
        middle = (before + self._clock.now()) / 2
        if not self._rows or middle > self._rows[-1][0]:
            self._rows.append((middle, current, voltage))


#: what is set for a run, and read before to be set back: (namespace, name, value)
QUIET = (
    ("global", "heads_up_notifications_enabled", "0"),
    ("system", "screen_off_timeout", "2147483647"),
    ("system", "screen_brightness_mode", "0"),
    ("system", "screen_brightness", "0"),
)


@contextmanager
def quiet(adb: Adb, stop: Sequence[str] = ()) -> Iterator[None]:
    """Notifications off, screen at its darkest, the packages of ``stop`` stopped; everything is set back afterwards."""
    before = [(space, name, adb.shell(f"settings get {space} {name}")) for space, name, _ in QUIET]
    try:
        for space, name, value in QUIET:
            adb.shell(f"settings put {space} {name} {value}")
        for package in stop:
            adb.shell(f"am force-stop {shlex.quote(package)}")
        yield
    finally:
        for space, name, value in before:
            verb = f"delete {space} {name}" if value in ("", "null") else f"put {space} {name} {value}"
            adb.shell(f"settings {verb}")


@contextmanager
def served(
    adb: Adb, server: Path, model: Path, threads: int = 4, context: int = 2048, port: int = PORT, wait: float = 300.0
) -> Iterator[str]:
    """Pushes and starts a ``llama-server`` (a build for the phone) with a GGUF file; yields its address on this machine.

    Stopped afterwards; the pushed files stay, for the next run. Raises `AdbError`, also for a clock that differs by more
    than 100 ms from this machine's.
    """
    check_clocks(adb.clock_offset(), "the device")
    adb.shell(f"mkdir -p {REMOTE}")
    for path in (server, model):
        target = f"{REMOTE}/{path.name}"
        if path.is_file() and adb.shell(f"stat -c %s {shlex.quote(target)} 2>/dev/null || true") == str(path.stat().st_size):
            continue  # there since the last run
        adb.push(path, target)
    adb.shell(f"chmod 755 {REMOTE}/{shlex.quote(server.name)}")
    flags = f"-m {shlex.quote(model.name)} -t {threads} -c {context} --port {port} --host 127.0.0.1 -np 1"
    started = adb.shell(f"cd {REMOTE} && (nohup ./{shlex.quote(server.name)} {flags} >server.log 2>&1 & echo $!)")
    if not started.isdigit():
        raise AdbError(f"the server did not start: '{started}'; look at {REMOTE}/server.log on the device")
    try:
        adb.call("forward", f"tcp:{port}", f"tcp:{port}")
        wait_for_server(f"http://127.0.0.1:{port}", wait)
        yield f"http://127.0.0.1:{port}"
    finally:
        adb.shell(f"kill {started} 2>/dev/null || true")
        adb.call("forward", "--remove", f"tcp:{port}")


def run_phone(
    adb: Adb,
    server: Path,
    model: Path,
    config: ModelConfig,
    settings: RunSettings,
    conversations: Sequence[Conversation],
    folder: str | Path,
    meter: Meter | None = None,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    port: int = PORT,
) -> Run:
    """The session on a phone. ``meter``: the phone's own gauge when None. Raises ValueError as `run_session` does."""
    about = {
        "device": adb.properties(), "file": model.name, "format": model.stem.rsplit("-", 1)[-1],
        "battery_c": read_temperature(adb.shell("dumpsys battery")),
    }  # fmt: skip
    with quiet(adb, stop), served(adb, server, model, settings.threads, settings.context, port) as address:
        # what this machine does besides does not slow the phone down
        runtime = LlamaServerRuntime(address, "server", config, replace(settings, max_busy=1.0), Clock())
        return run_session(runtime, conversations, meter or AdbMeter(adb), folder, progress, about)
