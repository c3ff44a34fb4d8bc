"""The third decision of a cost model: what to store and what to compute again, under a budget of bytes.

A graph is cut into two segments that run one after the other. Values that live across the cut may be stored, or dropped and
computed again by the second segment from the graph's parameters and what is stored. The budget bounds the bytes that are
stored; of all sets that fit, the cheapest is wanted: first segment and second together. (Within one function XLA merges what
is computed twice, so that there is nothing to decide.)

Who decides: ``default`` drops the largest values until the rest fits, the usual rule; ``flops`` takes the set that computes
the fewest FLOPs again; ``random`` is the mean over all sets that fit; a model; ``oracle`` measures all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from .capture import capture
from .generate import Graph

Array = np.ndarray[Any, Any]
Stored = tuple[int, ...]


@dataclass(frozen=True)
class Recompute:
    """``cut``: the second segment starts at this node; ``budget``: bytes that may be stored, as a share of all values that
    may also be dropped. Raises ValueError where fewer than two sets fit, and nothing is to be decided."""

    graph: Graph
    cut: int
    budget: float = 0.5
    most: int = 4  #: values that may be dropped; the largest, where there are more

    def __post_init__(self) -> None:
        if not 0 < self.cut < len(self.graph.nodes):
            raise ValueError(f"the cut is between 1 and {len(self.graph.nodes) - 1}, not {self.cut}")
        if len(self.sets) < 2:
            raise ValueError(f"a cut at node {self.cut} leaves one way to keep the budget; cut elsewhere or give more bytes")

    def nbytes(self, values: Sequence[int]) -> int:
        return sum(4 * prod(self.graph.shape(value)) for value in values)

    @cached_property
    def crossing(self) -> tuple[int, ...]:
        return self.graph.live(self.cut - 1)

    @cached_property
    def free(self) -> tuple[int, ...]:
        """Crossing values that may be dropped, the largest first; outputs of the graph may not."""
        values = [value for value in self.crossing if value not in self.graph.outputs]
        return tuple(sorted(values, key=lambda value: (-self.nbytes([value]), value))[: self.most])

    @cached_property
    def sets(self) -> tuple[Stored, ...]:
        """Stored sets that fit, the default first."""
        limit = self.budget * self.nbytes(self.free)
        kept = list(self.free)
        while self.nbytes(kept) > limit:
            kept.pop(0)
        fixed = [value for value in self.crossing if value not in self.free]
        fit = [
            some
            for count in range(len(self.free) + 1)
            for some in itertools.combinations(self.free, count)
            if self.nbytes(some) <= limit
        ]
        # To store less than fits is never better where the first segment computes it anyhow; keep what cannot be extended.
        fit = [some for some in fit if not any(set(some) < set(other) for other in fit)]
        default = next(some for some in fit if set(kept) <= set(some))
        return tuple(tuple(sorted([*fixed, *some])) for some in (default, *[one for one in fit if one != default]))

    def segments(self, stored: Stored) -> tuple[Graph, Graph]:
        graph, first = self.graph, len(self.graph.parameters)
        later = [value for value in graph.outputs if value >= first + self.cut]
        again = [place for place in graph.makers(later, stored) if place < self.cut]
        before = graph.part(graph.makers(stored), stored)
        return before, graph.part([*again, *range(self.cut, len(graph.nodes))], later)

    def texts(self) -> dict[tuple[Stored, int], str]:
        """StableHLO of both segments of every set; a segment without nodes (nothing is stored) has none."""
        found = {}
        for stored in self.sets:
            for place, segment in enumerate(self.segments(stored)):
                if segment.nodes:
                    found[stored, place] = capture(segment.function(), *segment.arguments())
        return found

    def costs(self, times: dict[tuple[Stored, int], Any], call: float) -> Array:
        """Of every set: microseconds of its segments, each with a call."""
        return np.array([sum(times[stored, n] + call for n in (0, 1) if (stored, n) in times) for stored in self.sets])

    def flops(self) -> Array:
        """Of every set: of both segments."""
        return np.array([sum(one.flops for one in self.segments(stored)) for stored in self.sets])
