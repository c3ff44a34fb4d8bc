"""Faults for the training job, so that what the driver claims can be tried.

``folder/faults.json`` lists faults; each fires at its step on its rank, and tells ``folder/injected.jsonl`` when it
did. Only the campaign reads that file: the driver never sees either. A fault that belongs to a process fires once,
also across restarts; one that belongs to a node (slow, disk) fires whenever the rank runs there, so it goes away only
with the node.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import struct
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import shards_of, steps_of

#: kind -> what it is
KINDS = {
    "kill": "SIGKILL",
    "exit": "an exception in the training script",
    "stop": "SIGSTOP: the process hangs, its sockets stay open",
    "hang": "the main thread waits for ever, other threads run",
    "slow": "the node computes slower by ``amount``",
    "heartbeat": "the node's executor is stopped, training goes on",
    "checkpoint": "a byte of the newest checkpoint is flipped, then SIGKILL",
    "gradient": "an exponent bit of the rank's gradient is flipped before the sum",
    "replica": "a mantissa bit of the rank's weights is flipped",
    "silent": "a mantissa bit of the rank's gradient is flipped before the sum (its largest element, below 1 %)",
    "nan": "the loss is not a number",
    "disk": "files of the node cannot grow beyond ``amount`` bytes",
    "link": "the node's network link goes down for ``amount`` seconds, five times",
    "write": "SIGKILL while the second stage of a checkpoint has written half its bytes",
}
_OF_NODE = {"slow", "disk"}


@dataclass(frozen=True)
class Fault:
    """``phase`` in which it fires (data, forward, backward) where that matters; ``node`` limits it to a node."""

    kind: str
    rank: int
    step: int
    phase: str = "forward"
    amount: float = 0.1
    node: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault '{self.kind}'; known: {', '.join(KINDS)}")
        if self.phase not in ("data", "forward", "backward"):
            raise ValueError(f"a fault fires in data, forward or backward, not '{self.phase}'")


def plan(folder: str | Path, faults: list[Fault]) -> None:
    """Writes the faults of a run."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]), encoding="utf-8")


class Injector:
    """The faults of one rank; without a plan it does nothing."""

    def __init__(self, folder: Path, faults: list[Fault]):
        self.folder, self.faults = folder, faults
        self._since = time.thread_time()

    @classmethod
    def read(cls, folder: str | Path, rank: int, node: str) -> Injector:
        path = Path(folder, "faults.json")
        rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        faults = [Fault(**row) for row in rows]
        return cls(Path(folder), [f for f in faults if f.rank == rank and f.node in ("", node)])

    def _due(self, step: int, *kinds: str) -> list[Fault]:
        """Faults of these kinds that fire now; each is told once, and one that belongs to a process fires once."""
        due = []
        for fault in self.faults:
            if fault.kind in kinds and (step >= fault.step if fault.kind in _OF_NODE else step == fault.step):
                mark = self.folder / f"fired-{fault.kind}-{fault.rank}-{fault.step}"
                try:
                    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    if fault.kind not in _OF_NODE:
                        continue
                else:
                    with open(self.folder / "injected.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(fault) | {"time": time.time()}) + "\n")
                        file.flush()
                        os.fsync(file.fileno())
                due.append(fault)
        return due

    def step(self, step: int) -> None:
        """Faults that have no phase."""
        for fault in self._due(step, "heartbeat", "disk", "checkpoint", "link"):
            if fault.kind == "heartbeat":
                os.kill(os.getppid(), signal.SIGSTOP)
            elif fault.kind == "disk":
                limit = int(fault.amount)
                for process in (os.getpid(), os.getppid()):  # the node's executor checks its disk with the same limit
                    resource.prlimit(process, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            elif fault.kind == "link":
                down, up = "ip link set eth0 down", "ip link set eth0 up"
                once = f"{down}; sleep {fault.amount}; {up}; sleep {fault.amount}; "
                subprocess.Popen(["sh", "-c", once * 5])
            else:
                self._corrupt(fault)
                os.kill(os.getpid(), signal.SIGKILL)

    def _corrupt(self, fault: Fault) -> None:
        folder = self.folder / "checkpoints"
        for step in steps_of(folder):
            if shards := shards_of(folder, step):
                with open(shards[fault.rank % len(shards)], "r+b") as file:
                    file.seek(-8, os.SEEK_END)
                    byte = file.read(1)
                    file.seek(-8, os.SEEK_END)
                    file.write(bytes([byte[0] ^ 1]))
                return

    def phase(self, step: int, phase: str) -> None:
        """Inside a phase, after its work."""
        for fault in self._due(step, "slow"):
            if phase != "data":  # work, not sleep: a slower clock shows in CPU time as well
                spent = time.thread_time() - self._since
                end = time.thread_time() + fault.amount * spent
                while time.thread_time() < end:
                    pass
        self._since = time.thread_time()
        here = [fault for fault in self.faults if fault.phase == phase and fault.step == step]
        for fault in here:
            for due in self._due(step, fault.kind) if fault.kind in ("kill", "exit", "stop", "hang") else []:
                if due.kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif due.kind == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif due.kind == "exit":
                    raise RuntimeError("injected failure of the training script")
                else:
                    time.sleep(10**6)

    def writing(self, step: int) -> None:
        """In stage 2 of a checkpoint, which names the step that comes next: half the bytes are written."""
        if self._due(step - 1, "write"):
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, step: int, value: float) -> float:
        return math.nan if self._due(step, "nan") else value

    def gradient(self, step: int, gradient: Tensor) -> None:
        """Before the sum over ranks."""
        for fault in self._due(step, "gradient", "silent"):
            place = int(gradient.abs().argmax())
            gradient[place] = flip(float(gradient[place]), 30 if fault.kind == "gradient" else 16)

    @torch.no_grad()
    def weights(self, step: int, module: nn.Module) -> None:
        for _ in self._due(step, "replica"):
            weight = next(iter(module.parameters())).view(-1)
            weight[5] = flip(float(weight[5]), 12)


def flip(value: float, bit: int) -> float:
    """``value`` as fp32 with one bit flipped (31: sign, 30 to 23: exponent, 22 to 0: mantissa)."""
    (raw,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<I", raw ^ (1 << bit)))[0]
