"""The daemon of a node (MegaScale section 4.1): starts the node's training processes, and tells the driver how they are.

One process, one thread, one loop: a daemon that can be starved by its own threads is no witness. It speaks JSON lines
with the driver over a local socket. Every ``heartbeat`` seconds, and at once when a process ends, it sends

    {"type": "heartbeat", "node", "host", "attempt", "ranks": [{"rank", "pid", "code", "first", "step", "event",
    "bytes", "loss", ...}], "lines": [[rank, text], ...], "links": changes of a network link's carrier since the
    start}

``lines`` are what the ranks print, filtered by the driver's keyword lists. It obeys start, stop, ask (where are your
ranks?), check (`selfcheck`) and quit. If the driver is silent for ``lease`` seconds the ranks are killed: a node that
was cut off must not go on writing checkpoints beside its replacement. The ranks die with the executor, whatever kills
it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .timer import ask, read_status

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class NodeSpec:
    """What an executor has to know. ``live``: a folder for sockets and beacons, in memory if possible; ``warm``: fork
    Python commands from this process, which has their libraries loaded, instead of starting an interpreter;
    ``namespace``: a network namespace to live in."""

    name: str
    driver: str
    live: str
    heartbeat: float = 0.5
    lease: float = 10.0
    warm: bool = False
    namespace: str = ""


@dataclass
class _Rank:
    rank: int
    pid: int
    pipe: int
    log: Any
    code: int | None = None  # exit code; -n: killed by signal n
    rest: bytes = b""
    lines: int = 0


@dataclass
class Executor:
    """The loop. `run` returns when the driver says quit or is gone."""

    spec: NodeSpec
    ranks: dict[int, _Rank] = field(default_factory=dict)
    attempt: int = 0
    keywords: tuple[str, ...] = ()
    lines: list[tuple[int, str]] = field(default_factory=list)
    links: int = 0

    def run(self) -> None:
        self._driver = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._driver.connect(self.spec.driver)
        self._rest, self._heard = b"", time.monotonic()
        self._loop = selectors.DefaultSelector()
        self._loop.register(self._driver, selectors.EVENT_READ, self._command)
        with contextlib.suppress(OSError):  # needs no rights, but a container may forbid it
            self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
            self._netlink.bind((0, 1))  # RTMGRP_LINK
            self._loop.register(self._netlink, selectors.EVENT_READ, self._link)
        # A child's end interrupts the loop's wait, so the driver hears of it at once.
        self._wake = os.pipe()
        os.set_blocking(self._wake[1], False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        self._loop.register(self._wake[0], selectors.EVENT_READ, lambda: os.read(self._wake[0], 4096))
        self._children: dict[int, Callable[[], None]] = {}  # checks under way: pid -> what to do with the end
        self.open, due = True, 0.0
        while self.open:
            for key, _ in self._loop.select(max(0.0, min(due - time.monotonic(), self.spec.heartbeat))):
                key.data()
            ended = self._reap()
            now = time.monotonic()
            if ended or now >= due:
                self._heartbeat()
                due = now + self.spec.heartbeat
            if self.ranks and now - self._heard > self.spec.lease:
                self.stop()
        self.stop()

    # --- talking ----------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._driver.sendall(json.dumps(message | {"node": self.spec.name}).encode() + b"\n")
        except OSError:
            self.open = False

    def _command(self) -> None:
        try:
            data = self._driver.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self.open = False
            return
        self._heard = time.monotonic()
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            message = json.loads(line)
            kind = message.pop("type")
            if kind == "start":
                self.start(**message)
            elif kind == "stop":
                self.stop()
                self._send({"type": "stopped", "attempt": self.attempt})
            elif kind == "ask":
                paths = {rank: Path(self.spec.live, f"ask-{rank}") for rank, one in self.ranks.items() if one.code is None}
                found = ask(dict(paths), Path(self.spec.live, f"reply-{self.spec.name}"), message["timeout"])
                self._send({"type": "answers", "answers": list(found.values())})
            elif kind == "check":
                self.check(**message)
            elif kind == "quit":
                self.open = False

    def _link(self) -> None:
        """Each message is a change of a link; loopback's are not ours (messages carry the interface's index at byte 20)."""
        message = self._netlink.recv(65536)
        if int.from_bytes(message[20:24], sys.byteorder) != 1:
            self.links += 1

    def _heartbeat(self) -> None:
        rows = []
        for rank, one in self.ranks.items():
            row: dict[str, Any] = {"rank": rank, "pid": one.pid, "code": one.code, "lines": one.lines}
            status = read_status(Path(self.spec.live, f"status-{rank}"))
            if status and status.step >= 0:
                row |= {"first": status.first, "step": status.step, "event": status.event, "bytes": status.bytes}
                # JSON has no nan: an answer of its own. None before the attempt's first loss.
                row["loss"] = None if not status.done else status.loss if math.isfinite(status.loss) else "nan"
            rows.append(row)
        lines, self.lines = self.lines, []
        self._send(
            {
                "type": "heartbeat", "host": platform.node(), "pid": os.getpid(), "attempt": self.attempt, "ranks": rows,
                "lines": lines, "links": self.links, "load": os.getloadavg()[0], "time": time.time(),
            }
        )  # fmt: skip

    # --- processes --------------------------------------------------------------------------------------------------

    def start(
        self, ranks: Sequence[int], command: Sequence[str], env: dict[str, str], attempt: int, logs: str, keywords:
        Sequence[str] ) -> None:  # fmt: skip
        """Starts the ranks' processes; a command that does not exist shows as an exit with code 127."""
        self.attempt, self.keywords = attempt, tuple(word.lower() for word in keywords)
        for rank in ranks:
            for name in ("status", "ask"):  # of the attempt before
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(Path(self.spec.live, f"{name}-{rank}"))
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank - ranks[0]), "BROADSHEET_NODE": self.spec.name}
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                _become(command, mine, write, self.spec.warm)
            os.close(write)
            os.set_blocking(read, False)
            Path(logs).mkdir(parents=True, exist_ok=True)
            log = open(Path(logs, f"{attempt}-{rank}.log"), "ab")  # noqa: SIM115
            one = self.ranks[rank] = _Rank(rank, pid, read, log)
            self._loop.register(read, selectors.EVENT_READ, lambda one=one: self._read(one))

    def _read(self, one: _Rank) -> None:
        try:
            data = os.read(one.pipe, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._loop.unregister(one.pipe)
            os.close(one.pipe)
            one.pipe = -1
            return
        with contextlib.suppress(OSError):  # a full disk must not silence the daemon
            one.log.write(data)
            one.log.flush()
        *whole, one.rest = (one.rest + data).split(b"\n")
        for line in whole:
            text = line.decode(errors="replace")
            one.lines += 1
            if any(word in text.lower() for word in self.keywords):
                self.lines.append((one.rank, text[:500]))

    def _reap(self) -> bool:
        ended = False
        for one in self.ranks.values():
            if one.code is None:
                pid, status = os.waitpid(one.pid, os.WNOHANG)
                if pid:
                    while one.pipe >= 0:  # its last words come with the news
                        before = one.pipe, one.lines, one.rest
                        self._read(one)
                        if before == (one.pipe, one.lines, one.rest):
                            break
                    one.code, ended = os.waitstatus_to_exitcode(status), True
        for pid, done in list(self._children.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del self._children[pid]
                done()
        return ended

    def stop(self) -> None:
        """Kills the ranks with all their children, also those that are stopped."""
        for one in self.ranks.values():
            if one.code is None:
                try:
                    os.killpg(one.pid, signal.SIGKILL)
                except ProcessLookupError:  # it was born a moment ago and leads no group yet
                    os.kill(one.pid, signal.SIGKILL)
                os.waitpid(one.pid, 0)
            if one.pipe >= 0:
                self._loop.unregister(one.pipe)
                os.close(one.pipe)
            one.log.close()
        self.ranks.clear()
        self.lines.clear()

    # --- self-check -------------------------------------------------------------------------------------------------

    def check(self, processes: int, folder: str, neighbour: tuple[str, int]) -> None:
        """Runs the self-check in a child, so that a sick disk or network cannot take the daemon with it."""
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _detach(write)
            from .selfcheck import examine

            os.write(write, json.dumps(examine(processes, folder, neighbour)).encode())
            os._exit(0)
        os.close(write)

        def done() -> None:
            data = b""
            while piece := os.read(read, 1 << 16):
                data += piece
            os.close(read)
            self._send({"type": "checked", "check": json.loads(data) if data else {"error": "the check died"}})

        self._children[pid] = done


def _detach(keep: int) -> None:
    """What every child does first: default signals, no descriptors of the daemon's but ``keep``, death with the parent."""
    signal.set_wakeup_fd(-1)
    for name in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.closerange(3, keep)
    os.closerange(keep + 1, 4096)


def _become(command: Sequence[str], env: dict[str, str], out: int, warm: bool) -> None:
    """In a fresh child: become the training process. Never returns."""
    code = 1
    try:
        _detach(out)
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(env)
        if not warm or Path(command[0]).name not in ("python", "python3", Path(sys.executable).name):
            try:
                os.execvp(command[0], list(command))
            except OSError as error:
                os.write(2, f"ERROR cannot start {command[0]}: {error.strerror}\n".encode())
                os._exit(127)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        # The module may be loaded already, in the process that this one was forked from; running it again is meant.
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        if command[1] == "-m":
            sys.argv = [command[2], *command[3:]]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command[1:])
            runpy.run_path(command[1], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(spec: NodeSpec) -> None:
    """The executor of a node, to its end, in this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the driver's business
    if spec.namespace:
        with open(f"/run/netns/{spec.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), f"cannot enter network namespace {spec.namespace}")
    Executor(spec).run()


if __name__ == "__main__":
    serve(NodeSpec(**json.loads(sys.argv[1])))
