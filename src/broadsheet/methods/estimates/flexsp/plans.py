"""What a plan is: micro-batches of groups of sequences, its predicted time, its checks, its JSON.

A micro-batch is as slow as its slowest group; micro-batches follow each other, so the times add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from broadsheet.core.perf.planning import contiguous_partition, makespan_bound

from .cost import SPCostModel


@dataclass(frozen=True)
class Problem:
    """One global batch to plan for: ``lengths`` in tokens, ``devices`` (a power of two), ``capacity`` tokens a device, and
    the ``degrees`` that groups may have."""

    lengths: tuple[int, ...]
    devices: int
    capacity: int
    degrees: tuple[int, ...]
    cost: SPCostModel

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        devices: int,
        memory_gb: float,
        cost: SPCostModel,
        context: int | None = None,
        smallest: int = 1,
    ) -> Problem:
        """``context``: the longest sequence of the whole run, by default of this batch; ``smallest``: the smallest group.

        Raises ValueError for an empty batch, for devices that are no power of two, for memory below the model states, for a
        sequence that no group can hold.
        """
        given = tuple(int(length) for length in lengths)
        if not given:
            raise ValueError("the batch is empty: give at least one length")
        for place, length in enumerate(given):
            if length < 1:
                raise ValueError(f"sequence {place} has {length} tokens: lengths are 1 or more")
        longest = max(given)
        if context is not None and longest > context:
            raise ValueError(f"sequence {given.index(longest)} has {longest:,} tokens, more than the context of {context:,}")
        degrees = cost.degrees(devices, smallest)
        capacity = cost.capacity(devices, memory_gb, context or longest)
        if longest > capacity * degrees[-1]:
            reach = f"{degrees[-1]} devices" if degrees[-1] == devices else f"{degrees[-1]} devices (of {cost.heads} heads)"
            raise ValueError(
                f"sequence {given.index(longest)} has {longest:,} tokens; a group of {reach} holds "
                f"{capacity * degrees[-1]:,}: leave it out, or give more memory or devices"
            )
        return cls(given, devices, capacity, degrees, cost)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def room(self) -> int:
        """Tokens that all devices can hold."""
        return self.capacity * self.devices

    @cached_property
    def fewest(self) -> int:
        """No plan has fewer micro-batches."""
        return math.ceil(self.tokens / self.room)

    @cached_property
    def times(self) -> np.ndarray:
        """What each sequence adds to a group of each degree, ms: [sequences, degrees]; inf where memory forbids it."""
        lengths = np.asarray(self.lengths)
        fits = lengths[:, None] <= self.capacity * np.asarray(self.degrees)[None, :]
        return np.where(fits, self.cost.times(lengths, self.degrees), np.inf)

    @cached_property
    def bound(self) -> float:
        """No plan of this batch takes less, in ms, whatever its micro-batches.

        With T what a plan takes beyond a beta1 for each micro-batch: no sequence takes more than T, and the work of all
        (time x devices) is at most devices x T.
        """
        return self.bound_of(self.fewest)

    def bound_of(self, count: int) -> float:
        """`bound` of plans with so many micro-batches."""
        return count * self.cost.beta1 + self._work

    @cached_property
    def _work(self) -> float:
        return makespan_bound(self.times, self.degrees, self.devices)

    def smallest_degree(self, length: int) -> int:
        """The smallest group that holds a sequence."""
        return next(degree for degree in self.degrees if length <= self.capacity * degree)

    def chunks(self, count: int, order: str = "sorted") -> list[list[int]]:
        """The Sequence Blaster (section 4.2): ids in ``count`` micro-batches, the largest of which has the fewest tokens.

        "sorted": longest first, so that those of a micro-batch are alike; "given": in the order of the batch.
        """
        ids = list(range(len(self.lengths)))
        if order == "sorted":
            ids.sort(key=lambda i: -self.lengths[i])
        elif order != "given":
            raise ValueError(f"order is sorted or given, not '{order}'")
        return [ids[a:b] for a, b in contiguous_partition([self.lengths[i] for i in ids], count)]

    def counts(self, micro_batches: int | str, order: str = "sorted", options: int = 5) -> list[int]:
        """The numbers of micro-batches to try; "auto": the fewest whose chunks hold all tokens, and the next ones."""
        most = len(self.lengths)
        if isinstance(micro_batches, int):
            if not 1 <= micro_batches <= most:
                raise ValueError(f"{most} sequences make 1 to {most} micro-batches, not {micro_batches}")
            return [micro_batches]
        if micro_batches != "auto":
            raise ValueError(f"micro_batches is a number or auto, not '{micro_batches}'")
        first = self.fewest
        while first < most and max(sum(self.lengths[i] for i in c) for c in self.chunks(first, order)) > self.room:
            first += 1
        return list(range(first, min(first + options, most + 1)))


@dataclass(frozen=True)
class Group:
    """``degree`` devices and the ids of what they compute together."""

    degree: int
    sequences: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Micro-batches of groups. ``seconds``: processor time of planning; ``detail``: what else the planner tells."""

    problem: Problem
    micro_batches: tuple[tuple[Group, ...], ...]
    planner: str
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)

    def group_time(self, group: Group) -> float:
        """ms."""
        return self.problem.cost.group_time([self.problem.lengths[i] for i in group.sequences], group.degree)

    @cached_property
    def times(self) -> tuple[float, ...]:
        """ms of each micro-batch."""
        return tuple(max(map(self.group_time, groups)) for groups in self.micro_batches)

    @property
    def time(self) -> float:
        """Predicted ms of the step."""
        return sum(self.times)

    @property
    def bound(self) -> float:
        return self.problem.bound

    @property
    def gap(self) -> float:
        """How much of the time the bound does not explain, as a share."""
        return 1 - self.bound / self.time

    @property
    def all_to_all(self) -> float:
        """Device-weighted share of the busy time that goes into all-to-alls."""
        cost, lengths = self.problem.cost, self.problem.lengths
        busy = sum(g.degree * self.group_time(g) for groups in self.micro_batches for g in groups)
        moved = sum(
            g.degree * sum(cost.all_to_all(lengths[i], g.degree) for i in g.sequences)
            for groups in self.micro_batches
            for g in groups
        )
        return moved / busy

    @property
    def idle(self) -> float:
        """Share of devices x time in which devices wait for the slowest group."""
        busy = sum(g.degree * self.group_time(g) for groups in self.micro_batches for g in groups)
        return 1 - busy / (self.problem.devices * self.time)

    def check(self) -> None:
        """Every sequence once, memory and devices respected. Raises ValueError."""
        problem = self.problem
        seen = Counter(i for groups in self.micro_batches for group in groups for i in group.sequences)
        wrong = [i for i in range(len(problem.lengths)) if seen[i] != 1] + [
            i for i in seen if not 0 <= i < len(problem.lengths)
        ]
        if wrong:
            raise ValueError(f"sequence {wrong[0]} is planned {seen[wrong[0]]} times, not once")
        for number, groups in enumerate(self.micro_batches):
            if sum(group.degree for group in groups) > problem.devices:
                raise ValueError(f"micro-batch {number} takes more than {problem.devices} devices")
            for group in groups:
                tokens = sum(problem.lengths[i] for i in group.sequences)
                if group.degree not in problem.degrees:
                    raise ValueError(f"micro-batch {number} has a group of {group.degree}; groups are of {problem.degrees}")
                if tokens > problem.capacity * group.degree:
                    raise ValueError(f"micro-batch {number}: {tokens:,} tokens on {group.degree} devices are too many")

    def ranks(self, number: int) -> list[tuple[range, Group]]:
        """The devices of each group of a micro-batch: the widest first, so that every group starts at a multiple of its size
        and none crosses a node that could hold it."""
        placed, first = [], 0
        for group in sorted(self.micro_batches[number], key=lambda g: -g.degree):
            placed.append((range(first, first + group.degree), group))
            first += group.degree
        return placed

    def to_json(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "planner": self.planner, "time_ms": self.time, "bound_ms": self.bound, "gap": self.gap,
            "planning_seconds": self.seconds, "devices": problem.devices, "capacity": problem.capacity,
            "degrees": list(problem.degrees), "lengths": list(problem.lengths), "cost": problem.cost.to_json(),
            "detail": dict(self.detail),
            "micro_batches": [
                [{"degree": g.degree, "sequences": list(g.sequences), "time_ms": self.group_time(g)} for g in groups]
                for groups in self.micro_batches
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Plan:
        """Reads `to_json`; raises ValueError for a plan that breaks a rule or whose time is not what its costs say."""
        try:
            problem = Problem(
                tuple(row["lengths"]),
                row["devices"],
                row["capacity"],
                tuple(row["degrees"]),
                SPCostModel.from_json(row["cost"]),
            )
            groups = [tuple(Group(g["degree"], tuple(g["sequences"])) for g in groups) for groups in row["micro_batches"]]
            plan = cls(problem, tuple(groups), row["planner"], row["planning_seconds"], row["detail"])
            said = float(row["time_ms"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no plan of sequence parallelism: {error}") from None
        plan.check()
        if not math.isclose(said, plan.time, rel_tol=1e-9):
            raise ValueError(f"the plan says {said:.1f} ms, its cost model {plan.time:.1f} ms")
        return plan
