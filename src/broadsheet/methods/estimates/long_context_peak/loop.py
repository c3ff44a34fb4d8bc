"""The same users, for real: a model on this machine, caches that are held within a budget, swapped to files and back.

What `simulate` predicts is done here with real work: prefill and decode steps of a transformers model, real key and value
tensors, an allocator that refuses what does not fit, copies into memory-mapped files. One user decodes at a time, copies
stop compute, and reading times are waited for, so the simulation beside it has ``batch=1`` and ``overlap=False``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from broadsheet.core.models import with_cache

from .simulate import Service, Session, SimReport


class WallClock:
    """The time of the day: reading times are slept away."""

    def now(self) -> float:
        return time.perf_counter()

    def wait(self, until: float) -> None:
        time.sleep(max(0.0, until - self.now()))


class OwnClock:
    """The CPU time of this process, to which waiting adds without being waited for: what a machine would show that does
    nothing else. For torch with one thread."""

    def __init__(self) -> None:
        self.waited = 0.0

    def now(self) -> float:
        return time.process_time() + self.waited

    def wait(self, until: float) -> None:
        self.waited += max(0.0, until - self.now())


class NoRoom(Exception):
    """A cache more than the budget holds."""


@dataclass
class CacheBudget:
    """Counts the bytes of caches that are held; refuses (`NoRoom`) what goes beyond ``limit``."""

    limit: int
    held: int = 0

    def take(self, nbytes: int) -> None:
        if self.held + nbytes > self.limit:
            raise NoRoom(f"{self.held + nbytes} bytes of caches, {self.limit} are allowed")
        self.held += nbytes

    def give(self, nbytes: int) -> None:
        self.held -= nbytes


@dataclass(eq=False)
class Visitor:
    """A user with a document: its cache while that is held, its file while it is not."""

    ids: torch.Tensor
    file: Path
    cache: DynamicCache | None = None
    swapped: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    rounds: int = 0
    served: bool = False
    left: int = 0
    due: float = 0.0
    asked: float = 0.0
    begun: float = 0.0


class RealMachine:
    """A model and its users' caches. ``keep``: the part of a document's tokens whose keys and values are kept after prefill
    (the oldest go: for the bytes and the time; what that does to answers is measured by the caches family). ``clock``: by
    which all is timed."""

    def __init__(self, model: PreTrainedModel, folder: Path, keep: float = 1.0, clock: WallClock | OwnClock | None = None):
        self.model, self.folder, self.keep, self.clock = model, folder, keep, clock or WallClock()

    @torch.inference_mode()
    def prefill(self, visitor: Visitor) -> None:
        cache = DynamicCache(config=self.model.config)
        self.model(visitor.ids, **with_cache(cache), use_cache=True, logits_to_keep=1)
        if self.keep < 1:
            kept = max(1, round(visitor.ids.shape[1] * self.keep))
            for layer in _layers(cache):
                layer.keys = layer.keys[:, :, -kept:].clone()
                layer.values = layer.values[:, :, -kept:].clone()
        visitor.cache = cache

    @torch.inference_mode()
    def step(self, visitor: Visitor) -> None:
        """One token; the cache is cut back at the round's end, so that every round costs the same."""
        assert visitor.cache is not None
        position = torch.tensor([[visitor.ids.shape[1]]])
        self.model(visitor.ids[:, -1:], **with_cache(visitor.cache), use_cache=True, position_ids=position)

    def trim(self, visitor: Visitor) -> None:
        """Forgets the answer."""
        assert visitor.cache is not None
        kept = max(1, round(visitor.ids.shape[1] * self.keep))
        for layer in _layers(visitor.cache):
            layer.keys = layer.keys[:, :, :kept]
            layer.values = layer.values[:, :, :kept]

    def swap_out(self, visitor: Visitor) -> None:
        """Copies keys and values into the visitor's memory-mapped file and lets go of them."""
        assert visitor.cache is not None
        if not visitor.swapped:
            sizes = [(layer.keys, layer.values) for layer in _layers(visitor.cache)]
            total = sum(k.numel() + v.numel() for k, v in sizes)
            mapped, at = torch.from_file(str(visitor.file), shared=True, size=total, dtype=sizes[0][0].dtype), 0
            for pair in sizes:
                made = []
                for tensor in pair:
                    made.append(mapped[at : at + tensor.numel()].view(tensor.shape))
                    at += tensor.numel()
                visitor.swapped.append((made[0], made[1]))
        for (keys, values), layer in zip(visitor.swapped, _layers(visitor.cache), strict=True):
            keys.copy_(layer.keys)
            values.copy_(layer.values)
        visitor.cache = None

    def swap_in(self, visitor: Visitor) -> None:
        """A cache of new tensors, read from the file."""
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(visitor.swapped):
            cache.update(keys.clone(), values.clone(), index)
        visitor.cache = cache

    def size(self, tokens: int) -> int:
        """Bytes of a cache of a document of ``tokens``, from a real one."""
        visitor = self.visitor(tokens, 0)
        self.prefill(visitor)
        assert visitor.cache is not None
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in _layers(visitor.cache))

    def timed(self, run: Callable[[Visitor], None], visitor: Visitor) -> float:
        """Seconds of one call."""
        start = self.clock.now()
        run(visitor)
        return self.clock.now() - start

    def visitor(self, tokens: int, number: int) -> Visitor:
        """Who comes with a document of random tokens, the same for the same number."""
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(1, self.model.config.vocab_size, (1, tokens), generator=generator)
        return Visitor(ids, self.folder / f"user-{number}.kv")

    def service(self, tokens: int, room: float, rounds: int = 3) -> Service:
        """What the simulation needs, as it costs among others: as many caches as fit ``room`` take turns, so that none is
        left in the processor's caches from its last turn, then one more than fit, each out to its own file and back.

        Means, since users pay for slow ones too, over ``rounds`` turns of every cache, after one that is not counted (it
        makes the files). No loop of users is run.
        """
        size = self.size(tokens)
        held = deque(self.visitor(tokens, 1_000_000 + number) for number in range(max(1, int(room // size))))
        prefill = statistics.median([self.timed(self.prefill, visitor) for visitor in held])
        steps, switches = [], []
        for _ in range((rounds + 1) * len(held)):
            steps.append(self.timed(self.step, held[0]))
            self.trim(held[0])
            held.rotate(-1)
        away = self.visitor(tokens, 2_000_000)
        self.prefill(away)
        self.swap_out(away)
        for _ in range((rounds + 1) * (len(held) + 1)):
            held.append(away)
            away = held.popleft()
            switches.append((self.timed(self.swap_out, away) + self.timed(self.swap_in, held[-1])) / 2)
            self.step(held[-1])
            self.trim(held[-1])
        step, switch = statistics.mean(steps[len(held) :]), statistics.mean(switches[len(held) + 1 :])
        return Service(lambda _: prefill, lambda held: step * len(held), lambda _: switch, lambda _: size, room, batch=1)


def _layers(cache: DynamicCache) -> list[Any]:
    """Of a plain cache: each has keys and values [1, kv_heads, tokens, head_dim]."""
    return list(cache.layers)


def run_loop(machine: RealMachine, session: Session, users: int, budget: CacheBudget, seconds: float) -> SimReport:
    """``users`` repeat ``session`` for ``seconds`` of the machine's clock; what happened, as the simulation reports it.

    Prefills and returns come first, then decode steps turn by turn; the longest reader's cache makes room.
    """
    size = machine.size(session.tokens)
    report = SimReport(0.0, 0, 0, busy={"prefill": 0.0, "decode": 0.0, "switch": 0.0})
    clock = machine.clock
    start = clock.now()
    visitors = [machine.visitor(session.tokens, number) for number in range(users)]
    for visitor in visitors:
        visitor.due = visitor.asked = start
    reading, decoding, coming = list(visitors), deque[Visitor](), deque[Visitor]()

    def timed(what: str, run: Callable[[Visitor], None], visitor: Visitor) -> None:
        report.busy[what] += machine.timed(run, visitor)

    def make_room() -> bool:
        """Whether a cache more can be taken, after the longest readers' went."""
        while True:
            try:
                budget.take(size)
                return True
            except NoRoom:
                held = [one for one in reading if one.cache is not None]
                if not held:
                    return False
                timed("switch", machine.swap_out, min(held, key=lambda one: one.due))
                report.swaps += 1
                budget.give(size)

    while (now := clock.now()) < start + seconds:
        for visitor in [one for one in reading if one.due <= now]:
            reading.remove(visitor)
            visitor.asked, visitor.left = visitor.due, session.answer
            (decoding if visitor.cache is not None else coming).append(visitor)
        if coming and make_room():
            visitor = coming.popleft()
            fresh = not visitor.swapped or visitor.rounds == 0
            timed("prefill" if fresh else "switch", machine.prefill if fresh else machine.swap_in, visitor)
            decoding.append(visitor)
        elif decoding:
            visitor = decoding.popleft()
            if visitor.left == session.answer:
                visitor.begun = clock.now()
            timed("decode", machine.step, visitor)
            visitor.left -= 1
            if visitor.left:
                decoding.append(visitor)
                continue
            machine.trim(visitor)
            now = clock.now()
            each = (now - visitor.begun) / session.answer
            report.per_token.append(each)
            report.first_token.append(visitor.begun + each - visitor.asked)
            report.responses.append(now - visitor.asked)
            report.answered(users, not visitor.served, now - start)
            visitor.served = True
            visitor.rounds += 1
            visitor.due = now + session.think_s
            if visitor.rounds == session.rounds:
                report.sessions += 1
                visitor.rounds, visitor.cache = 0, None
                budget.give(size)
            reading.append(visitor)
        else:
            clock.wait(min(one.due for one in reading))
    report.seconds = clock.now() - start
    for visitor in visitors:
        if visitor.cache is not None:
            budget.give(size)
    return report


def temporary_machine(
    model: PreTrainedModel, keep: float = 1.0, clock: WallClock | OwnClock | None = None
) -> tuple[RealMachine, tempfile.TemporaryDirectory[str]]:
    """A machine whose files go with the folder that comes with it."""
    folder = tempfile.TemporaryDirectory()
    return RealMachine(model, Path(folder.name), keep, clock), folder
