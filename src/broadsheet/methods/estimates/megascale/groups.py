"""Starting communication groups: how many messages to the store, naive and ordered (MegaScale, section 3.5).

Groups are agreed on through a key-value store. With a barrier of all n processes after each of the O(n) groups, the store
answers O(n^2) requests; groups of one dimension are disjoint, so that all of them can start together, and one barrier a
dimension is enough: O(n). `start` is the protocol of one process as a generator of requests, which the same way counts
(`messages`), runs against a real store (`run_on_store`), and is simulated in front of a store that serves one at a time
(`simulate_start`).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from broadsheet.core.perf.events import Event, Resource, Simulation, Steps

from .plan import folder

#: what a process asks of the store: add 1 to a key (and get the sum), or wait until a key is there
Request = tuple[Literal["add", "wait"], str]
Start = Generator[Request, int | None, None]


class Store(Protocol):
    """What of torch.distributed's stores is used."""

    def add(self, key: str, amount: int, /) -> int: ...
    def wait(self, keys: list[str], /) -> Any: ...


@dataclass(frozen=True)
class Topology:
    """n = tp * pp * dp processes; rank = (pp_rank * dp + dp_rank) * tp + tp_rank."""

    tp: int
    pp: int
    dp: int

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise ValueError(f"sizes of groups are at least 1, not {self.tp} x {self.pp} x {self.dp}")

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) rank."""
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return tp, dp, pp

    def groups(self) -> dict[str, list[tuple[int, ...]]]:
        """All groups of each dimension, in the order in which every process goes through them."""
        found: dict[str, dict[tuple[int, int], list[int]]] = {"tp": {}, "dp": {}, "pp": {}}
        for rank in range(self.size):
            tp, dp, pp = self.place(rank)
            for name, key in (("tp", (dp, pp)), ("dp", (tp, pp)), ("pp", (tp, dp))):
                found[name].setdefault(key, []).append(rank)
        return {name: [tuple(ranks) for ranks in groups.values()] for name, groups in found.items()}


def barrier(name: str, count: int) -> Start:
    """Two requests a process: it announces itself, and waits for the last, who says so."""
    arrived = yield "add", f"{name}/arrived"
    if arrived == count:
        yield "add", f"{name}/done"
    yield "wait", f"{name}/done"


def start(rank: int, topology: Topology, groups: dict[str, list[tuple[int, ...]]], ordered: bool) -> Start:
    """What one process does until all groups are there. ``groups``: `Topology.groups`, made once for all."""
    for dimension, all_groups in groups.items():
        for number, ranks in enumerate(all_groups):
            name = f"{dimension}{number}"
            if rank in ranks:
                yield from barrier(name, len(ranks))
            if not ordered:
                yield from barrier(f"{name}/all", topology.size)
        if ordered:
            yield from barrier(f"{dimension}/all", topology.size)


def messages(topology: Topology, ordered: bool) -> int:
    """Requests to the store in all: 2 a member and 1 more for each barrier."""
    groups = topology.groups()
    count = sum(len(all_groups) for all_groups in groups.values())
    inside = sum(2 * len(ranks) + 1 for all_groups in groups.values() for ranks in all_groups)
    return inside + (len(groups) if ordered else count) * (2 * topology.size + 1)


def store_seconds() -> dict[str, float]:
    """Seconds a request: what the paper's start of 2,048 GPUs took with each store, over the requests that it makes."""
    seen = json.loads((folder() / "published.json").read_text(encoding="utf-8"))["group_start"]
    count = messages(Topology(8, 8, seen["gpus"] // 64), ordered=False)
    return {name: seen[f"{name}_seconds"] / count for name in ("blocking", "asynchronous")}


def run_on_store(rank: int, topology: Topology, store: Store, ordered: bool) -> int:
    """Runs one process's part against a real store; returns how many requests it made."""
    steps, answer, count = start(rank, topology, topology.groups(), ordered), None, 0
    while True:
        try:
            what, key = steps.send(answer)
        except StopIteration:
            return count
        count += 1
        answer = store.add(key, 1) if what == "add" else store.wait([key])


def simulate_start(topology: Topology, ordered: bool, service: float) -> tuple[float, int]:
    """(seconds, requests) with a store that serves one request at a time, ``service`` seconds each. SIMULATED."""
    simulation = Simulation()
    server, groups = Resource(simulation), topology.groups()
    counts: dict[str, int] = {}
    present: dict[str, Event] = {}
    asked = 0

    def process(rank: int) -> Steps:
        nonlocal asked
        steps, answer = start(rank, topology, groups, ordered), None
        while True:
            try:
                what, key = steps.send(answer)
            except StopIteration:
                return
            asked += 1
            yield from server.use(service)
            there = present.setdefault(key, simulation.event())
            if what == "wait":
                yield there
                answer = None
                continue
            counts[key] = answer = counts.get(key, 0) + 1
            if not there.fired:
                there.fire()

    simulation.run(until=simulation.all_of([simulation.process(process(rank)) for rank in range(topology.size)]))
    return simulation.now, asked


def topologies(sizes: Iterator[int] | list[int], tp: int = 8, pp: int = 8) -> list[Topology]:
    """The same TP and PP at growing numbers of processes. Raises ValueError."""
    found = []
    for size in sizes:
        if size % (tp * pp):
            raise ValueError(f"{size} processes are no multiple of {tp} x {pp}")
        found.append(Topology(tp, pp, size // (tp * pp)))
    return found
