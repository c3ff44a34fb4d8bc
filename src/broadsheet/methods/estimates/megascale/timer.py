"""What a training process tells about itself (MegaScale section 5, items 12 and 16): its current event, and how long
each took.

Three channels, none of which waits for anybody:

- a `Beacon`, a few bytes of shared memory that the node's executor reads with every heartbeat: step, current event,
  bytes sent, loss. A stopped process keeps its sockets open, so a heartbeat without the step counter would prove
  nothing.
- a `Timer` file, one line a step: every event's start, end and CPU time. On a CPU an event ends when its code does;
  nothing is synchronised for the sake of the clock.
- an `Answerer`, a thread that says on request where the main thread is. A process that cannot run its threads does
  not answer, which names it.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: pid, first step, step, steps done, sequence, bytes, loss, wall time, name of the current event (padded with zeros)
_LAYOUT = struct.Struct("<qqqqqqdd48s")


@dataclass(frozen=True)
class Status:
    """What a beacon holds. ``first``: the step that this attempt began with; ``step``: the one under way; ``done``:
    steps that ended in this attempt; ``bytes``: sent to other ranks since the start; ``loss``: of the last step that
    ended; ``time``: seconds since the epoch of the last change."""

    pid: int
    first: int
    step: int
    done: int
    sequence: int
    bytes: int
    loss: float
    time: float
    event: str


def read_status(path: str | Path) -> Status | None:
    """The status that a beacon's file holds; None before it has written one."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    if len(raw) < _LAYOUT.size:
        return None
    pid, first, step, done, sequence, sent, loss, when, name = _LAYOUT.unpack(raw[: _LAYOUT.size])
    event = name.rstrip(b"\0").decode()
    return Status(pid, first, step, done, sequence, sent, loss, when, event) if pid else None


class Beacon:
    """The writer of a status. A file in memory (tmpfs) when the folder is; its bytes outlive the process that wrote them."""

    def __init__(self, path: str | Path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w+b") as file:
            file.truncate(_LAYOUT.size)
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.first, self.step, self.done, self.sequence, self.bytes, self.loss = -1, -1, 0, 0, 0, math.nan

    def show(self, event: str) -> None:
        self.sequence += 1
        self._map[:] = _LAYOUT.pack(
            os.getpid(), self.first, self.step, self.done, self.sequence, self.bytes, self.loss, time.time(),
            event.encode()[:48] )  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One timed event. Times in ns of `time.perf_counter_ns`; ``cpu``: ns that the thread really ran; ``channel`` (a
    communicator's name) and ``sequence`` (its n-th call there) for communication; ``bytes`` sent by this rank."""

    name: str
    step: int
    start: int
    end: int
    cpu: int
    channel: str = ""
    sequence: int = 0
    bytes: int = 0


@dataclass
class Timer:
    """Times a rank's events, shows them in its beacon, and writes them to ``folder/timers-<attempt>-<rank>.jsonl``.

    ``channels``: communicator -> its ranks. ``attempt``: number of the restart, so that no file is overwritten.
    """

    folder: Path
    rank: int
    node: str = ""
    attempt: int = 0
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    beacon: Beacon | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step = 0
        self.current: tuple[str, str, int] = ("start", "", 0)  # event, channel, sequence
        self.entered: dict[str, int] = dict.fromkeys(self.channels, 0)
        self._events: list[Event] = []
        self._file = open(self.folder / f"timers-{self.attempt}-{self.rank}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        head = {
            "rank": self.rank, "node": self.node, "attempt": self.attempt, "wall": time.time_ns(),
            "clock": time.perf_counter_ns(), "channels": {name: list(ranks) for name, ranks in self.channels.items()},
        }  # fmt: skip
        self._file.write(json.dumps(head) + "\n")
        self._file.flush()  # a rank that is killed in its first step has a file that can be read

    @contextlib.contextmanager
    def event(self, name: str, channel: str = "", size: int = 0) -> Iterator[None]:
        """Times what is inside; with a ``channel`` it is communication of ``size`` bytes from this rank."""
        if channel:
            self.entered[channel] += 1
        sequence, outer = self.entered.get(channel, 0), self.current
        self.current = (name, channel, sequence)
        if self.beacon:
            self.beacon.bytes += size
            self.beacon.show(name)
        start, cpu = time.perf_counter_ns(), time.thread_time_ns()
        try:
            yield
        finally:
            end = time.perf_counter_ns()
            self._events.append(Event(name, self.step, start, end, time.thread_time_ns() - cpu, channel, sequence, size))
            self.current = outer
            if self.beacon:
                self.beacon.show(outer[0])

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step = step
        if self.beacon:
            self.beacon.step = step
            self.beacon.first = step if self.beacon.first < 0 else self.beacon.first
            self.beacon.show("step")
        self.current = ("step", "", 0)

    def finish(self, loss: float = math.nan) -> None:
        """A step is done: its events go to the file, the loss to the beacon."""
        rows = [[e.name, e.start, e.end, e.cpu, e.channel, e.sequence, e.bytes] for e in self._events]
        self._file.write(json.dumps({"step": self.step, "events": rows}) + "\n")
        self._file.flush()
        self._events.clear()
        if self.beacon:
            self.beacon.loss = loss
            self.beacon.done += 1
            self.beacon.show("step")

    def answer(self) -> dict[str, Any]:
        """Where this rank is: its event, and how often it has entered each of its channels."""
        event, channel, sequence = self.current
        return {
            "rank": self.rank, "step": self.step, "event": event, "channel": channel, "sequence": sequence,
            "entered": dict(self.entered), "channels": {name: list(ranks) for name, ranks in self.channels.items()},
        }  # fmt: skip

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Trace:
    """A timer file: of which rank, its channels, and its events in order of their ends. ``clock``: seconds since the
    epoch when the events' clock was 0, by this rank's own clock."""

    rank: int
    node: str
    attempt: int
    channels: dict[str, tuple[int, ...]]
    events: tuple[Event, ...]
    clock: float = 0.0


def read_trace(path: str | Path) -> Trace:
    """Raises ValueError for what is no timer file; a last line torn by a kill is left out."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    events = []
    try:
        head = json.loads(lines[0])
        channels = {name: tuple(ranks) for name, ranks in head["channels"].items()}
        for line in lines[1:]:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            events += [
                Event(name, row["step"], start, end, cpu, channel, sequence, size)
                for name, start, end, cpu, channel, sequence, size in row["events"]
            ]
        clock = (head["wall"] - head["clock"]) / 1e9
        return Trace(head["rank"], head["node"], head["attempt"], channels, tuple(events), clock)
    except (IndexError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} is no timer file: give a folder that robust-run or a Timer wrote") from None


def read_traces(folder: str | Path, attempt: int | None = None) -> list[Trace]:
    """The traces of one attempt (the last by default) in order of rank. Raises ValueError where there are none."""
    files: dict[int, list[Path]] = {}
    for path in sorted(Path(folder).rglob("timers-*-*.jsonl")):
        if path.stat().st_size:  # else killed before it could say who it is
            files.setdefault(int(path.stem.split("-")[1]), []).append(path)
    if not files:
        raise ValueError(f"{folder} holds no timers-*.jsonl: give the folder of a run")
    wanted = max(files) if attempt is None else attempt
    if wanted not in files:
        raise ValueError(f"{folder} has no attempt {wanted}: it has 0 to {max(files)}")
    return sorted((read_trace(path) for path in files[wanted]), key=lambda trace: trace.rank)


class Answerer:
    """A thread that answers datagrams at ``path`` with the timer's `answer` and the main thread's stack."""

    def __init__(self, path: str | Path, timer: Timer):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._socket.bind(str(path))
        self._timer, self._main = timer, threading.get_ident()
        threading.Thread(target=self._serve, daemon=True, name="answerer").start()

    def _serve(self) -> None:
        while True:
            _, sender = self._socket.recvfrom(64)
            frame = sys._current_frames().get(self._main)
            stack = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)[-6:]] if frame else []
            with contextlib.suppress(OSError):  # whoever asked may be gone
                self._socket.sendto(json.dumps(self._timer.answer() | {"stack": stack}).encode(), sender)


def ask(paths: dict[int, str | Path], reply: str | Path, timeout: float = 1.0) -> dict[int, dict[str, Any]]:
    """Asks the answerers of ranks where they are; those that say nothing within ``timeout`` seconds are missing from
    the result.

    ``reply``: a free path for the socket that gets the answers.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(reply)
    found: dict[int, dict[str, Any]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(reply))
        sock.setblocking(False)
        for path in paths.values():
            with contextlib.suppress(OSError):  # dead, or its queue is full: it stays silent
                sock.sendto(b"?", str(path))
        end = time.monotonic() + timeout
        while len(found) < len(paths) and (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                answer = json.loads(sock.recv(65536))
            except (TimeoutError, BlockingIOError):
                break
            found[answer["rank"]] = answer
    os.unlink(reply)
    return found
