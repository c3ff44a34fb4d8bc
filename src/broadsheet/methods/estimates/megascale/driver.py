"""The robust training driver (MegaScale section 4): keeps a job running on nodes that fail.

It asks a resource manager for nodes, has their executors start the job, and watches heartbeats (`rules`). On an alarm
it asks the ranks where they are, suspends all of them, checks every node (`selfcheck`), blocks those that fail or
that the alarm proves bad, takes spare ones, and starts the job again, which goes on from its last good checkpoint.
Every incident is on disk before recovery begins, so ctrl-C loses nothing: the same command goes on.

A command is any torchrun-style script: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set. Progress is
watched if it shows it through a `timer.Beacon`; without one the driver still sees exits, log lines and lost nodes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from broadsheet.core.records import JsonLines

from .diagnosis import Stragglers, Tail, slowdown
from .executor import NodeSpec, serve
from .hang import hang_view
from .rules import Alarm, Rules, Watch
from .selfcheck import failures

Say = Callable[[str], None]


class Manager(Protocol):
    """Who gives and takes nodes: a scheduler's adapter has these two methods."""

    def allocate(self, driver: str, live: str, rules: Rules) -> str | None:
        """Starts an executor that connects to ``driver``; returns the node's name, None when there is none left."""

    def destroy(self, node: str) -> None:
        """Takes a node away with all that runs on it, even when it does not answer."""

    def address(self, node: str) -> str:
        """Where other nodes reach it; of "" the driver itself, on the network that the nodes use."""


@dataclass
class LocalNodes:
    """Nodes that are processes of this machine. ``warm``: executors are forked from this process, which has loaded
    the modules of ``preload``, and Python commands from them; a restart then takes milliseconds instead of an import
    of torch a rank."""

    count: int
    warm: bool = False
    preload: tuple[str, ...] = ()
    namespaces: dict[str, str] = field(default_factory=dict)  #: node -> its network namespace
    addresses: dict[str, str] = field(default_factory=dict)
    _pids: dict[str, int] = field(default_factory=dict)
    _given: int = 0

    def __post_init__(self) -> None:
        if sys.platform != "linux":
            raise ValueError(f"nodes of this machine need Linux (process death signals), this is {sys.platform}")
        if self.warm:
            for name in self.preload:
                importlib.import_module(name)

    def allocate(self, driver: str, live: str, rules: Rules) -> str | None:
        if self._given == self.count:
            return None
        name = f"node{self._given}"
        self._given += 1
        spec = NodeSpec(name, driver, live, rules.heartbeat, warm=self.warm, namespace=self.namespaces.get(name, ""))
        if not self.warm:
            command = [sys.executable, "-m", "broadsheet.methods.estimates.megascale.executor", json.dumps(asdict(spec))]
            self._pids[name] = subprocess.Popen(command, start_new_session=True).pid
            return name
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                os.closerange(3, 4096)
                serve(spec)
                code = 0
            finally:
                os._exit(code)
        self._pids[name] = pid
        return name

    def destroy(self, node: str) -> None:
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(self._pids[node], signal.SIGKILL)  # its ranks die with it
            os.waitpid(self._pids.pop(node), 0)

    def address(self, node: str) -> str:
        return self.addresses.get(node, "127.0.0.1")


@dataclass
class Incident:
    """An alarm and what came of it. Times in seconds since the epoch; ``step``: the highest under way when it fired;
    ``resumed_step``: the first one of the next attempt; ``blocked``: nodes that were replaced; ``recovered``: when training
    moved again; ``caught_up``: when it was where it had been."""

    attempt: int
    rule: str
    evidence: str
    ranks: tuple[int, ...]
    nodes: tuple[str, ...]
    step: int
    detected: float
    suspended: float = 0.0
    checked: float = 0.0
    blocked: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    restarted: float = 0.0
    resumed_step: int | None = None
    recovered: float = 0.0
    caught_up: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished``, or the reason why the driver gave up."""

    finished: bool
    reason: str
    seconds: float
    incidents: tuple[Incident, ...]
    warnings: tuple[Alarm, ...]

    @property
    def attempts(self) -> int:
        return len(self.incidents) + self.finished


class _Node:
    """A node's executor as the driver sees it."""

    def __init__(self, name: str, sock: socket.socket):
        self.name, self.socket, self.rest = name, sock, b""
        self.inbox: list[dict[str, Any]] = []
        self.gone = False

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass
class Driver:
    """``nodes`` x ``ranks_per_node`` ranks run ``command``; at most ``max_restarts`` times again. A node that is
    named twice is blocked even if its self-check finds nothing (``strikes``). A job that fails ``hopeless`` times in
    a row at the same step for the same reason is not restarted: that is a bug, not a node.

    Raises ValueError for a geometry that cannot be; an alarm that cannot be recovered from is in the `Outcome`.
    """

    command: Sequence[str]
    folder: Path
    manager: Manager
    nodes: int = 2
    ranks_per_node: int = 2
    rules: Rules = field(default_factory=Rules)
    stragglers: Stragglers = field(default_factory=Stragglers)
    max_restarts: int = 10
    strikes: int = 2
    hopeless: int = 3
    env: dict[str, str] = field(default_factory=dict)
    say: Say = lambda text: None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise ValueError("nodes and ranks_per_node must be at least 1")
        if not self.command:
            raise ValueError("there is no command to run: put it after --")
        self.folder = Path(self.folder)
        self.incidents: list[Incident] = []
        self.warnings: list[Alarm] = []
        self._named: dict[str, int] = {}

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    def run(self) -> Outcome:
        """To the job's end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = JsonLines(self.folder / "incidents.jsonl")
        # A folder is used again by the run that goes on in it: its attempts are counted on, so no file is overwritten.
        self._base = max((row["attempt"] + 1 for row in JsonLines(self.folder / "attempts.jsonl")), default=0)
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.live = Path(tempfile.mkdtemp(prefix="broadsheet-", dir=memory))
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(self.live / "driver"))
        self._server.listen(64)
        self._loop = selectors.DefaultSelector()
        self._gate = socket.create_server((self.manager.address(""), 0))
        self._loop.register(self._server, selectors.EVENT_READ, None)
        self._loop.register(self._gate, selectors.EVENT_READ, self._gate)
        self._all: dict[str, _Node] = {}
        began = time.time()
        try:
            reason = self._run()
        finally:
            for node in list(self._all.values()):
                node.send(type="quit")
                self.manager.destroy(node.name)
            self._loop.close()
            self._server.close()
            self._gate.close()
            for node in self._all.values():
                node.socket.close()
            shutil.rmtree(self.live, ignore_errors=True)
        return Outcome(not reason, reason, time.time() - began, tuple(self.incidents), tuple(self.warnings))

    def _run(self) -> str:
        for _ in range(self.nodes):
            if not self._take():
                return "there are fewer nodes than the run needs"
        self.baseline = self._check()
        attempt = self._base
        while True:
            watch = self._start(attempt)
            alarm = self._watch(watch, attempt)
            self.warnings += watch.warnings
            if alarm is None:
                return ""
            incident = self._diagnose(watch, alarm, attempt)
            self._log.add(asdict(incident))
            self.incidents.append(incident)
            self.say(f"ALARM {incident.rule}: {incident.evidence} {self._names(incident)} at step {incident.step}")
            if attempt - self._base >= self.max_restarts:
                return f"{self.max_restarts} restarts were not enough: {incident.evidence}"
            last = self.incidents[-self.hopeless :]
            if len(last) == self.hopeless and len({(one.rule, one.evidence, one.step) for one in last}) == 1:
                return f"it failed {self.hopeless} times in the same way, which no other node will mend: {incident.evidence}"
            if reason := self._repair(incident):
                return reason
            attempt += 1

    @staticmethod
    def _names(incident: Incident) -> str:
        ranks = f"rank {', '.join(map(str, incident.ranks))}" if incident.ranks else "no rank"
        return f"[{ranks}; {', '.join(incident.nodes) or 'no node'}]"

    # --- nodes ------------------------------------------------------------------------------------------------------

    def _take(self) -> str | None:
        """A fresh node, connected; None when there is none. One that does not connect within 60 s is given back."""
        while name := self.manager.allocate(str(self.live / "driver"), str(self.live), self.rules):
            end = time.monotonic() + 60
            while time.monotonic() < end:
                self._poll(0.1)
                if name in self._all:
                    return name
            self.manager.destroy(name)
        return None

    def _poll(self, timeout: float) -> None:
        """Takes in what executors say; messages wait in their inboxes."""
        for key, _ in self._loop.select(timeout):
            if key.data is None:
                sock, _ = self._server.accept()
                self._loop.register(sock, selectors.EVENT_READ, _Node("", sock))
                continue
            if key.data is self._gate:  # a node's check that it can be reached
                self._gate.accept()[0].close()
                continue
            node: _Node = key.data
            try:
                data = node.socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self._loop.unregister(node.socket)
                node.gone = True
                continue
            *whole, node.rest = (node.rest + data).split(b"\n")
            for line in whole:
                message = json.loads(line)
                if not node.name:
                    node.name = message["node"]
                    self._all[node.name] = node
                node.inbox.append(message)

    def _collect(self, kind: str, nodes: Sequence[str], timeout: float) -> dict[str, dict[str, Any]]:
        """The next message of a kind from each node; those that send none in time are missing."""
        found: dict[str, dict[str, Any]] = {}
        end = time.monotonic() + timeout
        while len(found) < len(nodes) and (left := end - time.monotonic()) > 0:
            self._poll(min(left, 0.05))
            for name in nodes:
                for message in self._all[name].inbox:
                    if message["type"] == kind:
                        found[name] = message
                self._all[name].inbox.clear()
            if all(name in found or self._all[name].gone for name in nodes):
                break
        return found

    def _check(self, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """The self-check of these nodes (of all); one that does not end within 20 s counts as failed."""
        names = names or sorted(self._all)
        for name in names:
            self._all[name].send(
                type="check", processes=self.ranks_per_node, folder=str(self.folder / "checkpoints"),
                neighbour=self._gate.getsockname(),
            )  # fmt: skip
        found = self._collect("checked", names, 20)
        return {name: found[name]["check"] if name in found else {"error": "no answer"} for name in names}

    def _broken(self) -> dict[str, str]:
        """Nodes that fail the self-check three times in a row, with the reasons."""
        broken = dict.fromkeys(self._all, "")
        for _ in range(3):
            checks = self._check()
            broken = {
                name: "; ".join(reasons)
                for name in broken
                if (reasons := failures(checks[name], self.baseline.get(name, {})))
            }
            # What cannot be done is no matter of noise; a low bandwidth, or a check that did not end, may be.
            if all(reason.startswith(("disk", "network")) for reason in broken.values()):
                break
        return broken

    # --- an attempt -------------------------------------------------------------------------------------------------

    def _start(self, attempt: int) -> Watch:
        names = list(self._all)  # in the order in which they were taken
        address = self.manager.address(names[0])
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        env = {
            "WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.ranks_per_node), "MASTER_ADDR": address,
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "BROADSHEET_ATTEMPT": str(attempt), "BROADSHEET_LIVE": str(self.live), "BROADSHEET_RUN": str(self.folder),
        }  # fmt: skip
        if address != "127.0.0.1":
            env["GLOO_SOCKET_IFNAME"] = "eth0"
        for place, name in enumerate(names):
            ranks = list(range(place * self.ranks_per_node, (place + 1) * self.ranks_per_node))
            self._all[name].inbox.clear()
            self._all[name].send(
                type="start", ranks=ranks, command=list(self.command), env=env | self.env, attempt=attempt,
                logs=str(self.folder / "logs"), keywords=self.rules.keywords,
            )  # fmt: skip
        now = time.time()
        JsonLines(self.folder / "attempts.jsonl").add({"attempt": attempt, "time": now, "nodes": names})
        self.say(f"attempt {attempt}: {self.world} ranks on {', '.join(names)}")
        if self.incidents:
            self.incidents[-1].restarted = now
        return Watch(self.rules, tuple(names), now)

    def _watch(self, watch: Watch, attempt: int) -> Alarm | None:
        """Until the job ends (None) or an alarm calls for recovery."""
        pinged = looked = 0.0
        tail = Tail(self.folder / "timers", attempt, self.stragglers)
        while True:
            self._poll(min(0.05, self.rules.heartbeat / 4))
            now = time.time()
            if now - pinged > self.rules.heartbeat:
                for node in self._all.values():
                    node.send(type="ping")
                pinged = now
            for node in self._all.values():
                for message in node.inbox:
                    if message["type"] == "heartbeat" and message["attempt"] == attempt:
                        watch.update(message, now)
                node.inbox.clear()
            if self.incidents and (last := self.incidents[-1]).caught_up == 0 and watch.first_step is not None:
                last.resumed_step = watch.first_step
                if watch.step > watch.first_step and not last.recovered:
                    last.recovered = now
                if watch.step >= last.step:
                    last.caught_up = now
                    self.say(f"caught up at step {watch.step}, {now - last.detected:.1f} s after the alarm")
            if len(watch.ranks) == self.world and watch.finished:
                return None
            if now - looked > 2 * self.rules.heartbeat:
                looked = now
                if heat := tail.read():
                    for rank in heat.flagged:
                        watch.slow(rank, slowdown(heat, rank), now)
            if alarm := watch.error(now, self.world):
                return alarm

    # --- recovery ---------------------------------------------------------------------------------------------------

    def _diagnose(self, watch: Watch, alarm: Alarm, attempt: int) -> Incident:
        """Names who is to blame; a run without progress is asked where its ranks are."""
        ranks, nodes, evidence = alarm.ranks, alarm.nodes, alarm.evidence
        if alarm.rule == "progress" and watch.step >= 0:  # before that ranks meet, and nobody can answer
            rounds = [self._ask(), self._ask()]
            (self.folder / f"hang-{attempt}.json").write_text(json.dumps({"world": self.world, "rounds": rounds}))
            view = hang_view(rounds[1], self.world, rounds[0])
            ranks, evidence = view.culprits, f"{evidence}; {view.reason}"
            nodes = tuple(sorted({watch.ranks[rank].node for rank in ranks if rank in watch.ranks}))
        step = max((one.step for one in watch.ranks.values()), default=-1)
        return Incident(attempt, alarm.rule, evidence, ranks, nodes, step, alarm.time)

    def _ask(self) -> list[dict[str, Any]]:
        """What the ranks say where they are; ranks that say nothing within a second are missing."""
        names = sorted(self._all)
        for name in names:
            self._all[name].send(type="ask", timeout=1.0)
        told = self._collect("answers", names, 2.5)
        return [answer for message in told.values() for answer in message["answers"]]

    def _repair(self, incident: Incident) -> str:
        """Suspends, checks, blocks, replenishes. Returns why it cannot go on, or nothing."""
        bad = dict.fromkeys(incident.nodes, "no heartbeat") if incident.rule == "heartbeat" else {}
        for name in bad:
            self._drop(name)  # it would not obey, and its ranks must not go on
        for node in self._all.values():
            node.send(type="stop")
        names = sorted(self._all)
        stopped = self._collect("stopped", names, 5)
        incident.suspended = time.time()
        for name in names:
            if name not in stopped:
                bad[name] = "does not obey"
                self._drop(name)
        broken = self._broken()
        if broken and set(broken) == set(self._all) and all("disk" in reason for reason in broken.values()):
            return f"no node can write checkpoints ({next(iter(broken.values()))}): free space in {self.folder}"
        bad |= broken
        for name in incident.nodes if len(incident.nodes) < self.nodes else ():  # what befalls all of them is the job's
            self._named[name] = self._named.get(name, 0) + 1
            if incident.rule in ("links", "straggler") or self._named[name] >= self.strikes:
                bad.setdefault(name, f"named by {incident.rule}")
        incident.checked = time.time()
        for name in bad:
            if name in self._all:
                self._drop(name)
        incident.blocked, incident.reasons = tuple(sorted(bad)), tuple(bad[name] for name in sorted(bad))
        while len(self._all) < self.nodes:
            if not self._enlist():
                return f"no spare node is left to replace {', '.join(incident.blocked)} ({'; '.join(incident.reasons)})"
        return ""

    def _enlist(self) -> bool:
        """Takes the next spare that passes a self-check beside what nodes could do when the run began."""
        while fresh := self._take():
            check = self._check([fresh])[fresh]
            if not failures(check, self._usual()):
                self.baseline[fresh] = check
                return True
            self._drop(fresh)
        return False

    def _usual(self) -> dict[str, float]:
        """The median of each measure over the nodes that the run began with."""
        values: dict[str, list[float]] = {}
        for check in self.baseline.values():
            for name, value in check.items():
                if isinstance(value, int | float):
                    values.setdefault(name, []).append(value)
        return {name: statistics.median(some) for name, some in values.items()}

    def _drop(self, name: str) -> None:
        node = self._all.pop(name)
        with contextlib.suppress(KeyError, ValueError):
            self._loop.unregister(node.socket)
        node.socket.close()
        self.manager.destroy(name)
        self.say(f"blocked {name}")
