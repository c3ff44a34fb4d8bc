"""The training job that the driver keeps alive: a tiny Llama under DistributedDataParallel on gloo, fp32, one thread a rank.

It is started like any torchrun script (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and does all that MegaScale asks
of a job: events are timed (`timer`), checkpoints have two stages (`checkpoint`), batches are a function of (seed,
step, rank), random states are in the checkpoint. A run that was restarted any number of times ends in the same bits
as one that never was.

For that the gradient's sum must not depend on how it was cut: DDP moves parameters between buckets after its first
step, so after a restart the buckets differ, and a ring sums the elements of a bucket in an order that depends on
where they stand. `ordered_mean` exchanges pieces and adds them in order of rank, which costs the bytes of a ring and
no order.
"""

# Annotations are not postponed here: DistributedDataParallel compares those of a communication hook.
import gc
import hashlib
import json
import math
import os
import statistics
import sys
import time
import warnings
import zlib
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import Checkpointer
from .inject import Injector
from .model import Corpus, Lamb, TinyModel
from .timer import Answerer, Beacon, Timer


@dataclass(frozen=True)
class Job:
    """What is trained and how. ``batch``: rows a rank; ``checkpoint_every``: steps, 0 for never; ``checkpoint``:
    "two-stage" or "sync"; ``storage_delay``: seconds that a write takes on top, for a slow shared filesystem;
    ``collector``: "auto" leaves Python's garbage collector alone, "frozen" freezes what is there after the first step
    and switches it off, collecting by hand with each checkpoint."""

    folder: str
    steps: int = 60
    batch: int = 4
    lr: float = 3e-3
    optimizer: str = "adamw"
    seed: int = 0
    checkpoint_every: int = 10
    checkpoint: str = "two-stage"
    storage_delay: float = 0.0
    collector: str = "auto"
    model: TinyModel = field(default_factory=TinyModel)

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", ("adamw", "lamb")), ("checkpoint", ("two-stage", "sync")), ("collector", ("auto", "frozen")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.steps < 1 or self.batch < 1 or self.checkpoint_every < 0:
            raise ValueError("steps and batch must be at least 1, checkpoint_every at least 0")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(**{**row, "model": TinyModel(**row["model"])})


class BadGradient(RuntimeError):
    """A rank's own gradient is not what a gradient of this run looks like; raised before it reaches the other ranks."""


@dataclass
class GradientGuard:
    """Refuses a gradient that is not finite or whose norm is above ``factor`` times the median of the last ``window``."""

    factor: float = 100.0
    window: int = 16
    norms: deque[float] = field(default_factory=deque)

    def check(self, gradient: Tensor) -> None:
        norm = float(gradient.norm())
        usual = statistics.median(self.norms) if len(self.norms) >= 4 else math.inf
        if not math.isfinite(norm) or norm > self.factor * usual:
            raise BadGradient(f"gradient norm {norm:.3g}, usual {usual:.3g}: corrupt gradient")
        self.norms.append(norm)
        if len(self.norms) > self.window:
            self.norms.popleft()


def ordered_mean(piece: Tensor, world: int) -> Tensor:
    """The mean of a flat tensor over ranks, each element summed in order of rank: equal bits however the tensor was cut."""
    width = -(-piece.numel() // world)
    padded = torch.nn.functional.pad(piece, (0, width * world - piece.numel()))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    total = received[:width].clone()
    for other in range(1, world):
        total += received[other * width : (other + 1) * width]
    dist.all_gather(list(padded.split(width)), total / world)
    return padded[: piece.numel()]


class Worker:
    """One rank of the job."""

    def __init__(self, job: Job, rank: int, world: int, attempt: int = 0, node: str = "node0"):
        self.job, self.rank, self.world = job, rank, world
        self.folder = Path(job.folder)
        live = Path(os.environ.get("BROADSHEET_LIVE", self.folder / "live"))
        self.timer = Timer(
            self.folder / "timers", rank, node, attempt, {"dp": tuple(range(world))}, Beacon(live / f"status-{rank}")
        )
        self.answerer = Answerer(live / f"ask-{rank}", self.timer)
        self.injector = Injector.read(self.folder, rank, node)
        self.guard = GradientGuard()
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints",
            rank,
            world,
            attempt,
            background=job.checkpoint == "two-stage",
            midway=self._midway,
        )
        torch.manual_seed(job.seed)
        self.module = job.model.build()
        # Buffers are constants here; a broadcast of them would be communication inside the forward pass that no event shows.
        with warnings.catch_warnings(
            action="ignore", category=FutureWarning
        ):  # the new name does not exist in older versions
            self.model = DistributedDataParallel(self.module, broadcast_buffers=False)
        self.model.register_comm_hook(None, self._reduce)
        make = {"adamw": torch.optim.AdamW, "lamb": Lamb}[job.optimizer]
        self.optimizer = make(self.module.parameters(), lr=job.lr)
        torch.manual_seed(job.seed * 1009 + rank + 1)  # dropout differs between ranks
        self.corpus, self.mask = Corpus(job.model.vocabulary, job.model.tokens, job.seed), job.model.mask()
        self._losses = open(self.folder / f"losses-{attempt}-{rank}.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def _midway(self, step: int) -> None:
        """Half of a shard is written."""
        time.sleep(self.job.storage_delay)
        self.injector.writing(step)

    def _reduce(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradient = bucket.buffer()
        self.injector.gradient(self.timer.step, gradient)
        self.guard.check(gradient)
        with self.timer.event(
            "all-reduce", "dp", 2 * gradient.numel() * gradient.element_size() * (self.world - 1) // self.world
        ):
            mean = ordered_mean(gradient, self.world)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(mean)
        return done

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name: what all ranks share."""
        found = dict(self.module.state_dict())
        for number, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        return found

    def digest(self) -> int:
        """CRC-32 of the parameters' bytes, to compare replicas with."""
        crc = 0
        for value in self.module.state_dict().values():
            crc = zlib.crc32(value.detach().numpy().tobytes(), crc)
        return crc

    def save(self, step: int) -> None:
        """Checkpoints after making sure that all replicas are equal: a bad copy must never become the last good one."""
        mine = self.digest()
        with self.timer.event("compare", "dp", 8):
            digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(digests, torch.tensor([mine]))
        values = [int(value) for value in digests]
        usual = statistics.mode(values)
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if self.rank in odd:
            raise BadGradient(f"parameters of rank {self.rank} differ from the other ranks: corrupt replica")
        if odd:
            raise ConnectionError(f"another rank is corrupt: {odd}")  # secondary: the rank itself says so
        with self.timer.event("checkpoint"):
            self.checkpointer.save(step, self.state(), {"random": torch.get_rng_state()}, {"step": step})
        if self.checkpointer.error:
            print(f"WARNING checkpoint not written: {self.checkpointer.error}", flush=True)

    def restore(self) -> int:
        """The step to go on with."""
        found = self.checkpointer.restore()
        if found is None:
            return 0
        self.module.load_state_dict({k: v for k, v in found.shared.items() if not k.startswith("optimizer.")})
        loaded = self.optimizer.state_dict()
        loaded["state"] = {}
        for name, value in found.shared.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                loaded["state"].setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(loaded)
        torch.set_rng_state(found.own["random"])
        if self.rank == 0:
            for reason in found.skipped:
                print(f"WARNING {reason}; going on from {found.step}", flush=True)
        return found.step

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """To the last step."""
        job, timer = self.job, self.timer
        first = self.restore()
        for step in range(first, job.steps):
            timer.begin(step)
            self.injector.step(step)
            with timer.event("data"):
                self.injector.phase(step, "data")
                batch = self.corpus.batch(step, self.rank, job.batch)
            with timer.event("forward"):
                loss = job.model.loss(self.model, batch, self.mask)
                self.injector.phase(step, "forward")
            value = self.injector.loss(step, float(loss.detach()))
            self._losses.write(json.dumps([step, value]) + "\n")
            self._losses.flush()
            if not math.isfinite(value):
                timer.finish(value)
                raise FloatingPointError(f"loss is {value} at step {step}")
            with timer.event("backward"):
                loss.backward()
                self.injector.phase(step, "backward")
            with timer.event("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.injector.weights(step, self.module)
                self.injector.phase(step, "optimizer")
            if step == first and job.collector == "frozen":
                gc.collect()
                gc.freeze()
                gc.disable()
            done = step + 1
            if job.checkpoint_every and (done % job.checkpoint_every == 0 or done == job.steps):
                self.save(done)
                if job.collector == "frozen":
                    with timer.event("collect"):
                        gc.collect()
            timer.finish(value)
        self.checkpointer.wait()
        result = {"parameters": self._sha(), "steps": job.steps}
        (self.folder / f"result-{self.rank}.json").write_text(json.dumps(result), encoding="utf-8")
        timer.close()

    def _sha(self) -> str:
        total = hashlib.sha256()
        for value in self.module.state_dict().values():
            total.update(value.detach().numpy().tobytes())
        return total.hexdigest()


def losses_of(folder: str | Path) -> dict[int, dict[int, float]]:
    """rank -> step -> loss as it counts: what the last attempt that came to a step wrote."""
    found: dict[int, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("losses-*.jsonl"), key=lambda p: int(p.name.split("-")[1])):
        rank = int(path.stem.split("-")[2])
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                step, value = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill
                break
            found.setdefault(rank, {})[step] = value
    return found


def run(path: str | Path) -> None:
    """The rank that the environment names, of the job in the JSON file ``path``. Raises ValueError."""
    torch.set_num_threads(1)
    try:
        job = Job.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no job: {error}") from None
    dist.init_process_group("gloo")
    try:
        env = os.environ
        attempt = int(env.get("BROADSHEET_ATTEMPT", env.get("TORCHELASTIC_RESTART_COUNT", 0)))
        worker = Worker(job, dist.get_rank(), dist.get_world_size(), attempt, env.get("BROADSHEET_NODE", "node0"))
        worker.train()
    finally:
        # A destroy that waits for dead ranks would hide the exception for minutes.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1])
