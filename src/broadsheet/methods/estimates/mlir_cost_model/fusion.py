"""What a cost model is for: which of several ways to run a graph is the cheapest, decided without compiling them.

A graph compiler that may put at most ``limit`` nodes into one compiled segment (as accelerators and their compilers bound
it) must cut the graph somewhere. The default is greedy: fill every segment from the start. The candidates are all cut
sets with as few cuts as the limit needs, or one more. A plan costs the sum over its segments, each with the price of a
call. (Without a limit one segment is mostly the best on XLA's CPU backend, which fuses and dispatches by itself; the
study says how often it is not.)

Who decides: ``default``; ``random`` (the mean over all candidates); ``bytes``, the static rule that lets the fewest bytes
cross a cut; a model; ``oracle``, which measures all. Measured twice by turns: the oracle chooses by the first time and is
judged, as all are, by the second, else it would be paid for noise.

A model leaves the default only for a plan whose promised gain, less the spread of what its members promise, exceeds a
margin; else it abstains. The margin is chosen on other graphs (`best_margin`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any

import numpy as np

from .capture import capture
from .generate import Graph

Array = np.ndarray[Any, Any]
Span = tuple[int, int]
Plan = tuple[Span, ...]
MARGINS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 1.0)


@dataclass(frozen=True)
class Choice:
    """Microseconds of the plan that each way chooses, judged by the second measurement."""

    graph: str
    candidates: int
    default: float
    random: float
    bytes: float
    oracle: float
    models: dict[str, float]

    def gain(self, name: str) -> float:
        """By what part of the default's time a way is faster."""
        value = self.models[name] if name in self.models else getattr(self, name)
        return 1 - value / self.default

    def worse(self, name: str, margin: float = 0.02) -> bool:
        """Is it slower than the default by more than ``margin`` (the clock's noise)?"""
        return self.gain(name) < -margin


@dataclass(frozen=True)
class Decision:
    """The cut sets of a graph. Raises ValueError for a limit that leaves no choice."""

    graph: Graph
    limit: int
    most: int = 40

    def __post_init__(self) -> None:
        if self.limit < 1 or self.limit >= len(self.graph.nodes):
            raise ValueError(f"the limit is at least 1 and below the {len(self.graph.nodes)} nodes; got {self.limit}")

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """The greedy plan first; at most ``most`` others, evenly drawn from all."""
        count, fewest = len(self.graph.nodes), ceil(len(self.graph.nodes) / self.limit) - 1
        drawn = (
            _spans(places, count)
            for cuts in (fewest, fewest + 1)
            for places in itertools.combinations(range(1, count), cuts)
        )
        found = [plan for plan in drawn if all(stop - start <= self.limit for start, stop in plan)]
        greedy = _spans(tuple(range(self.limit, count, self.limit)), count)
        others = [plan for plan in found if plan != greedy]
        if len(others) > self.most:
            others = [others[place] for place in np.linspace(0, len(others) - 1, self.most).astype(int)]
        return (greedy, *others)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return tuple(sorted({span for plan in self.plans for span in plan}))

    def texts(self) -> dict[Span, str]:
        """The StableHLO of every segment that a plan has."""
        pieces = {span: self.graph.piece(*span) for span in self.spans}
        return {span: capture(piece.function(), *piece.arguments()) for span, piece in pieces.items()}

    def crossing(self, plan: Plan) -> int:
        """Bytes of the values that live across its cuts."""
        return sum(4 * prod(self.graph.shape(v)) for _, stop in plan[:-1] for v in self.graph.live(stop - 1))

    def costs(self, times: dict[Span, Any], call: float) -> Array:
        """Of every plan: microseconds of its segments (numbers, or one for each member), each with a call."""
        return np.array([sum(np.asarray(times[span]) + call for span in plan) for plan in self.plans])

    def choose(self, promised: Array, margin: float = 0.0) -> int:
        """Place of the plan: the one with the largest gain over the default that the members [plans, members] agree on, if
        that exceeds the margin; else the default."""
        gains = np.log(promised[0] / promised)
        agreed = gains.mean(1) - gains.std(1)
        best = int(np.argmax(agreed))
        return best if 1 - np.exp(-agreed[best]) > margin else 0

    def decide(
        self, first: dict[Span, float], second: dict[Span, float], predicted: dict[str, dict[Span, Any]], call: float,
        margins: dict[str, float],
    ) -> Choice:  # fmt: skip
        """``first`` and ``second``: measured microseconds of every segment, without what a call costs (``call``).
        ``predicted``: the same by each model, a number or one for each of its members; ``margins``: of each model."""
        judged = self.costs(second, call)
        models = {}
        for name, times in predicted.items():
            promised = self.costs(times, call)
            models[name] = float(judged[self.choose(promised.reshape(len(judged), -1), margins[name])])
        crossing = [self.crossing(plan) for plan in self.plans]
        return Choice(
            self.graph.template, len(self.plans), float(judged[0]), float(judged.mean()),
            float(judged[int(np.argmin(crossing))]), float(judged[int(np.argmin(self.costs(first, call)))]), models,
        )  # fmt: skip


def best_margin(decisions: Sequence[tuple[Decision, Array, Array]]) -> float:
    """The margin that would have gained most: of (decision, promised [plans, members], measured costs [plans]) of graphs
    that are not those to be decided. 1 (never leave the default) where none gains."""

    def gained(margin: float) -> float:
        return float(np.mean([np.log(cost[0] / cost[one.choose(said, margin)]) for one, said, cost in decisions]))

    return max(reversed(MARGINS), key=gained)


def _spans(places: Sequence[int], count: int) -> Plan:
    bounds = (0, *places, count)
    return tuple(itertools.pairwise(bounds))


def recovered(choices: Sequence[Choice], name: str) -> float:
    """The part of the oracle's whole gain over the default that a way gets."""
    best = sum(one.default - one.oracle for one in choices)
    won = sum(one.default - (one.models[name] if name in one.models else getattr(one, name)) for one in choices)
    return won / best if best > 0 else float("nan")
