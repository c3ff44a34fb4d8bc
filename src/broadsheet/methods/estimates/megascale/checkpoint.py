"""Two-stage checkpoints (MegaScale section 4.4): a copy in memory while training waits, then a write in the background.

Stage 1 copies this rank's part of the state (pinned memory for CUDA tensors); training goes on when it returns. Stage
2 writes the copy in a thread: temporary file, fsync, rename, fsync of the folder. The shard's name holds its SHA-256,
so a shard is whole or it does not count, and one rename commits it: there is no manifest to go stale. It holds the
attempt too (how often the run was restarted), because shards of two attempts may differ in the last bit and must not
be mixed.

    folder/step-000120/shard-0-of-4.attempt-0.<sha256>.safetensors

A checkpoint is good when all shards of one attempt are there and match their names. Older ones are removed only once
``keep`` newer ones are complete. To restore, one rank of the group reads the newest good checkpoint and broadcasts
it, so shared storage is read once a group instead of once a rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

_SHARD = re.compile(r"shard-(\d+)-of-(\d+)\.attempt-(\d+)\.([0-9a-f]{64})\.safetensors")
_STEP = re.compile(r"step-(\d+)")


def partition(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which part each tensor belongs to: the largest first, always to the part that has least. The same on all ranks."""
    loads, owner = [0] * parts, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner


def steps_of(folder: str | Path) -> list[int]:
    """Steps that have a checkpoint, good or not; the newest first."""
    if not Path(folder).is_dir():
        return []
    return sorted((int(m[1]) for p in os.listdir(folder) if (m := _STEP.fullmatch(p))), reverse=True)


def shards_of(folder: str | Path, step: int) -> dict[int, Path] | None:
    """The shards of a step by number, of the newest attempt that has all; None without one. Contents are not looked at."""
    attempts: dict[int, dict[int, Path]] = {}
    count = 0
    for path in Path(folder, f"step-{step:06d}").glob("shard-*.safetensors"):
        if match := _SHARD.fullmatch(path.name):
            count = int(match[2])
            attempts.setdefault(int(match[3]), {})[int(match[1])] = path
    whole = [attempt for attempt, shards in attempts.items() if len(shards) == count]
    return attempts[max(whole)] if whole else None


def damage(folder: str | Path, step: int) -> str:
    """What is wrong with a step's checkpoint; empty when it is good."""
    shards = shards_of(folder, step)
    if shards is None:
        return "shards are missing"
    for number, path in sorted(shards.items()):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name.split(".")[2]:
            return f"shard {number} does not match its checksum"
    return ""


def last_good(folder: str | Path) -> tuple[int | None, list[str]]:
    """The newest good step (None: there is none) and what was wrong with newer ones."""
    reasons: list[str] = []
    for step in steps_of(folder):
        reason = damage(folder, step)
        if not reason:
            return step, reasons
        reasons.append(f"checkpoint {step}: {reason}")
    return None, reasons


def _write(path: Path, data: bytes, midway: Callable[[], None] | None = None) -> None:
    """All or nothing: a reader sees the whole file under its name, or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            if midway:
                midway()
            file.write(data[len(data) // 2 :])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class Checkpointer:
    """Saves and restores the state that the ranks of a data-parallel ``group`` share, and each rank's own.

    ``keep``: good checkpoints that stay. ``background=False`` is the synchronous save that the two stages are compared with.
    ``midway``: called with the step when half of a shard's bytes are written, to try what happens then.

    Raises ValueError for ``keep`` below 1; a failed write is in `error` (and raised by a synchronous save), and what
    was good before stays.
    """

    folder: Path
    rank: int = 0
    world: int = 1
    attempt: int = 0
    keep: int = 2
    background: bool = True
    midway: Callable[[int], None] | None = None
    group: Any = None
    error: Exception | None = field(default=None, init=False)
    _jobs: queue.Queue[tuple[int, dict[str, Tensor], dict[str, str]]] = field(default_factory=queue.Queue, init=False)
    _copies: dict[str, Tensor] = field(default_factory=dict, init=False)  # used again by the next save
    _thread: threading.Thread | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep={self.keep}: at least one checkpoint must stay")
        self.folder = Path(self.folder)

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(self, step: int, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], facts: Mapping[str, Any]) -> float:
        """Checkpoints ``step``; returns the seconds that training waited.

        ``shared``: tensors equal on all ranks, of which this rank writes its part; ``own``: this rank's alone (random
        states); ``facts``: JSON-able, for example the data position. If the write before is still under way, it is
        waited for: two would race for the same memory and disk.
        """
        start = time.perf_counter()
        self.wait()
        owner = partition({name: t.numel() * t.element_size() for name, t in shared.items()}, self.world)
        mine = {f"shared/{name}": tensor for name, tensor in shared.items() if owner[name] == self.rank}
        for name, tensor in (mine | {f"own/{name}": tensor for name, tensor in own.items()}).items():
            kept = self._copies.get(name)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            kept.copy_(tensor.detach(), non_blocking=False)
        meta = {"facts": json.dumps(dict(facts)), "step": str(step)}
        if self.background:
            # One thread for all saves: starting a new one hands it the interpreter's lock, and training waits for it.
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="checkpoint")
                self._thread.start()
            self._jobs.put((step, dict(self._copies), meta))
        else:
            self._store(step, dict(self._copies), meta)
            if self.error:
                raise self.error
        return time.perf_counter() - start

    def _serve(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                self._store(*job)
            except Exception as error:  # the thread must live on: whoever waits for it would wait for ever
                self.error = error
            finally:
                self._jobs.task_done()

    def _store(self, step: int, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
        try:
            folder = self.folder / f"step-{step:06d}"
            folder.mkdir(parents=True, exist_ok=True)
            data = save(tensors, meta)
            digest = hashlib.sha256(data).hexdigest()
            name = f"shard-{self.rank}-of-{self.world}.attempt-{self.attempt}.{digest}.safetensors"
            _write(folder / name, data, functools.partial(self.midway, step) if self.midway else None)
            for old in folder.glob(f"shard-{self.rank}-of-*"):  # of an attempt that came to this step before
                if old.name != name:
                    old.unlink()
            self.error = None
            if self.rank == 0:
                self._prune()
        except OSError as error:
            self.error = error

    def _prune(self) -> None:
        complete = [step for step in steps_of(self.folder) if shards_of(self.folder, step)]
        for step in steps_of(self.folder):
            if len(complete) > self.keep and step < complete[self.keep - 1]:
                shutil.rmtree(self.folder / f"step-{step:06d}", ignore_errors=True)

    def wait(self) -> None:
        """Until stage 2 is done. Call it before the process ends."""
        self._jobs.join()

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(self) -> Restored | None:
        """The newest good checkpoint, or None where there is none. All ranks of the group must call it.

        Rank 0 of the group alone reads; tensors that belong to a rank come back to that rank only.
        """
        found: list[Any] = [None]
        if self.rank == 0:
            step, reasons = last_good(self.folder)
            shards = shards_of(self.folder, step) if step is not None else None
            found = [(step, reasons, [shards[number].read_bytes() for number in sorted(shards)] if shards else [])]
        if self.world > 1:
            self._broadcast_objects(found)
        step, reasons, blobs = found[0]
        if step is None:
            return None
        if len(blobs) != self.world:
            raise ValueError(f"checkpoint {step} is of {len(blobs)} ranks, this run has {self.world}: use as many")
        shared, own = {}, {}
        for number, blob in enumerate(blobs):
            for name, tensor in load(blob).items():
                kind, _, key = name.partition("/")
                if kind == "shared":
                    shared[key] = tensor
                elif number == self.rank:
                    own[key] = tensor
        length = int.from_bytes(blobs[self.rank][:8], "little")
        facts = json.loads(json.loads(blobs[self.rank][8 : 8 + length])["__metadata__"]["facts"])
        return Restored(step, shared, own, facts, tuple(reasons))

    def _broadcast_objects(self, found: list[Any]) -> None:
        """Bytes, not pickles: a header of JSON, then the shards as they are on disk."""
        if self.rank == 0:
            step, reasons, blobs = found[0]
            head = json.dumps({"step": step, "reasons": reasons, "sizes": [len(blob) for blob in blobs]}).encode()
            payload = len(head).to_bytes(8, "little") + head + b"".join(blobs)
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        size = torch.tensor([len(payload) if self.rank == 0 else 0])
        dist.broadcast(size, source, group=self.group)
        buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if self.rank == 0 else torch.empty(
            int(size), dtype=torch.uint8
        )  # fmt: skip
        dist.broadcast(buffer, source, group=self.group)
        if self.rank:
            raw = buffer.numpy().tobytes()
            length = int.from_bytes(raw[:8], "little")
            head, place = json.loads(raw[8 : 8 + length]), 8 + length
            blobs = []
            for count in head["sizes"]:
                blobs.append(raw[place : place + count])
                place += count
            found[0] = (head["step"], head["reasons"], blobs)


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was read: the first step that is still to do, the tensors, the facts, and what was wrong with newer
    ones."""

    step: int
    shared: dict[str, Tensor]
    own: dict[str, Tensor]
    facts: dict[str, Any]
    skipped: tuple[str, ...]
