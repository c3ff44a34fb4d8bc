"""What a cost model is for: which of several ways to run a graph is the cheapest, decided without compiling them.

A graph compiler that may put at most ``limit`` nodes into one compiled segment (as accelerators and their compilers bound
it) must cut the graph somewhere. The default is greedy: fill every segment from the start. The candidates are all cut
sets with as few cuts as the limit needs, or one more. A plan costs the sum over its segments, each with the price of a
call. (Without a limit one segment is mostly the best on XLA's CPU backend, which fuses and dispatches by itself; the
study says how often it is not.)

Who decides: ``default``; ``random`` (the mean over all candidates); ``bytes``, the static rule that lets the fewest bytes
cross a cut; a model; ``oracle``, which measures all. Measured twice: the oracle chooses by the first time and is judged,
as all are, by the second, else it would be paid for noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil, prod

import numpy as np

from .capture import capture
from .generate import Graph

Span = tuple[int, int]
#: what "cautious" models must promise
CAUTION = 0.1
Plan = tuple[Span, ...]


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

    def choose(self, cost: Callable[[Plan], float], caution: float = 0.0) -> Plan:
        """The cheapest; of equals the first, so that a model without an opinion keeps the default. With ``caution`` only
        where it promises to be cheaper than the default by more than that part."""
        best = min(self.plans, key=cost)
        return best if cost(best) < (1 - caution) * cost(self.plans[0]) else self.plans[0]

    def decide(
        self, first: dict[Span, float], second: dict[Span, float], predicted: dict[str, dict[Span, float]], call: float
    ) -> Choice:
        """``first`` and ``second``: measured microseconds of every segment, without what a call costs (``call``).
        ``predicted``: the same by each model; each also decides with caution ("name_cautious")."""

        def cost(times: dict[Span, float], plan: Plan) -> float:
            return sum(times[span] + call for span in plan)

        judged = {plan: cost(second, plan) for plan in self.plans}
        models = {name: judged[self.choose(partial(cost, times))] for name, times in predicted.items()}
        models |= {
            f"{name}_cautious": judged[self.choose(partial(cost, times), CAUTION)] for name, times in predicted.items()
        }
        return Choice(
            self.graph.template, len(self.plans), judged[self.plans[0]], float(np.mean(list(judged.values()))),
            judged[self.choose(self.crossing)], judged[self.choose(partial(cost, first))], models,
        )  # fmt: skip


def _spans(places: Sequence[int], count: int) -> Plan:
    bounds = (0, *places, count)
    return tuple(itertools.pairwise(bounds))


def recovered(choices: Sequence[Choice], name: str) -> float:
    """The part of the oracle's whole gain over the default that a way gets."""
    best = sum(one.default - one.oracle for one in choices)
    won = sum(one.default - (one.models[name] if name in one.models else getattr(one, name)) for one in choices)
    return won / best if best > 0 else float("nan")
