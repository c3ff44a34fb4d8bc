"""A job in three dimensions, for diagnosis: an MLP that is really split over tensor, pipeline and data parallelism on gloo.

Every stage is a residual block y = x + gelu(x W1) W2. Tensor parallelism splits W1 by columns and W2 by rows, with
one all-reduce in the forward and one in the backward pass (Megatron-LM's f and g); stages send activations forward
and gradients backward for each microbatch (GPipe order); replicas average gradients. Losses equal those of one
process to rounding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .hang import Grid
from .inject import Injector
from .timer import Answerer, Beacon, Timer


@dataclass(frozen=True)
class GridJob:
    """``batch``: rows a microbatch and replica."""

    folder: str
    tp: int = 2
    pp: int = 2
    dp: int = 2
    steps: int = 30
    microbatches: int = 2
    batch: int = 8
    hidden: int = 32
    feedforward: int = 64
    lr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.feedforward % self.tp:
            raise ValueError(f"feedforward={self.feedforward} is not divisible by tp={self.tp}")
        if min(self.steps, self.microbatches, self.batch) < 1:
            raise ValueError("steps, microbatches and batch must be at least 1")

    @property
    def grid(self) -> Grid:
        return Grid(self.tp, self.pp, self.dp)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Enter(torch.autograd.Function):
    """Megatron's f: identity forward, sum over tensor-parallel ranks backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.reduce = reduce
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.reduce(gradient.clone()), None


class _Leave(torch.autograd.Function):
    """Megatron's g: sum over tensor-parallel ranks forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class GridWorker:
    """One rank. Without torch.distributed (``world`` 1) nothing is sent."""

    def __init__(self, job: GridJob, rank: int, attempt: int = 0, node: str = "node0"):
        self.job, self.rank, self.grid = job, rank, job.grid
        self.tp, self.pp, self.dp = self.grid.place(rank)
        channels = self.grid.channels()
        mine = {name: ranks for name, ranks in channels.items() if rank in ranks}
        folder = Path(job.folder)
        live = Path(os.environ.get("BROADSHEET_LIVE", folder / "live"))
        self.timer = Timer(folder / "timers", rank, node, attempt, mine, Beacon(live / f"status-{rank}"))
        self.answerer = Answerer(live / f"ask-{rank}", self.timer)
        self.injector = Injector.read(folder, rank, node)
        self.groups: dict[str, Any] = {}
        if self.grid.world > 1:
            for name, ranks in channels.items():  # all ranks make all groups in the same order
                if not name.startswith("pp"):
                    group = dist.new_group(list(ranks))
                    if rank in ranks:
                        self.groups[name] = group
        make = torch.Generator().manual_seed(job.seed + 100 * self.pp)  # of a stage: each rank cuts its part
        wide = torch.randn(job.hidden, job.feedforward, generator=make) / job.hidden**0.5
        narrow = torch.randn(job.feedforward, job.hidden, generator=make) / job.feedforward**0.5
        self.wide = wide.chunk(job.tp, 1)[self.tp].clone().requires_grad_()
        self.narrow = narrow.chunk(job.tp, 0)[self.tp].clone().requires_grad_()

    def _sum(self, kind: str, channel: str, tensor: Tensor) -> Tensor:
        size = len(self.timer.channels[channel])
        if size > 1:
            with self.timer.event(f"{kind} all-reduce", channel, 2 * tensor.nbytes * (size - 1) // size):
                dist.all_reduce(tensor, group=self.groups[channel])
        return tensor

    def _tp(self, tensor: Tensor) -> Tensor:
        return self._sum("tp", f"tp.{self.pp}.{self.dp}", tensor)

    def _move(self, tensor: Tensor, direction: str, link: int, send: bool) -> Tensor:
        """Over the pipeline's link between stages ``link`` and ``link`` + 1."""
        name = f"pp.{self.tp}.{self.dp}.{link}.{direction}"
        other = self.grid.rank(self.tp, link + (send == (direction == "forward")), self.dp)
        with self.timer.event("send" if send else "recv", name, tensor.nbytes if send else 0):
            if send:
                dist.send(tensor.contiguous(), other)
            else:
                dist.recv(tensor, other)
        return tensor

    def block(self, x: Tensor) -> Tensor:
        """This stage's layer on [rows, hidden]."""
        inside = torch.nn.functional.gelu(_Enter.apply(x, self._tp) @ self.wide) @ self.narrow
        return x + _Leave.apply(inside, self._tp)

    def _data(self, step: int, microbatch: int) -> tuple[Tensor, Tensor]:
        job = self.job
        make = torch.Generator().manual_seed(((job.seed * 9973 + step) * 97 + microbatch) * 89 + self.dp)
        x = torch.randn(job.batch, job.hidden, generator=make)
        return x, torch.roll(x, 1, dims=1)

    def step(self, step: int) -> float:
        """One step; the mean loss of this replica on the last stage, 0 on the others."""
        job, timer, held, total = self.job, self.timer, [], 0.0
        last = self.pp == job.pp - 1
        for microbatch in range(job.microbatches):
            with timer.event("data"):
                self.injector.phase(step, "data")
                x, target = self._data(step, microbatch)
            if self.pp:
                x = self._move(torch.empty_like(x), "forward", self.pp - 1, send=False).requires_grad_()
            with timer.event("forward"):
                y = self.block(x)
                self.injector.phase(step, "forward")
            if last:
                loss = (y - target).pow(2).mean() / job.microbatches
                total += float(loss.detach())
                held.append((x, loss))
            else:
                self._move(y.detach(), "forward", self.pp, send=True)
                held.append((x, y))
        for x, out in held:
            gradient = None if last else self._move(torch.empty_like(out), "backward", self.pp, send=False)
            with timer.event("backward"):
                out.backward(gradient)
                self.injector.phase(step, "backward")
            if self.pp and x.grad is not None:
                self._move(x.grad, "backward", self.pp - 1, send=True)
        with timer.event("optimizer"), torch.no_grad():
            for weight in (self.wide, self.narrow):
                assert weight.grad is not None
                weight -= job.lr / job.dp * self._sum("dp", f"dp.{self.tp}.{self.pp}", weight.grad)
                weight.grad = None
        return total

    def train(self) -> list[float]:
        losses = []
        for step in range(self.job.steps):
            self.timer.begin(step)
            losses.append(self.step(step))
            self.timer.finish(losses[-1])
        self.timer.close()
        return losses


def run(path: str | Path) -> None:
    """The rank that the environment names, of the job in the JSON file ``path``."""
    torch.set_num_threads(1)
    job = GridJob(**json.loads(Path(path).read_text(encoding="utf-8")))
    dist.init_process_group("gloo")
    if dist.get_world_size() != job.grid.world:
        raise ValueError(
            f"tp={job.tp} x pp={job.pp} x dp={job.dp} needs {job.grid.world} ranks, got {dist.get_world_size()}"
        )
    worker = GridWorker(
        job, dist.get_rank(), int(os.environ.get("BROADSHEET_ATTEMPT", 0)), os.environ.get("BROADSHEET_NODE", "")
    )
    losses = worker.train()
    Path(job.folder, f"losses-{worker.rank}.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()  # a rank that leaves early would break the others' last step
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1])
