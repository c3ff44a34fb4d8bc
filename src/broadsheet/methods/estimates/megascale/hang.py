"""The three-dimensional hang view (MegaScale section 5.2): who keeps everybody waiting.

When a run stands still every rank is asked for its current event. A rank inside a communication waits for those
members of the communicator that have not entered the same call; following these edges through the tp, pp and dp
communicators ends at the culprits: ranks that did not answer at all, or that are in code of their own. If all members
have entered and still wait, no rank is to blame but what lies between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any


@dataclass(frozen=True)
class HangView:
    """``culprits``: ranks, none when nothing hangs or nobody can be blamed; ``waits``: rank -> ranks it waits for;
    ``events``: rank -> what it is in, "silent" when it did not answer."""

    culprits: tuple[int, ...]
    reason: str
    waits: Mapping[int, tuple[int, ...]]
    events: Mapping[int, str]


def hang_view(answers: Sequence[Mapping[str, Any]], world: int, before: Sequence[Mapping[str, Any]] = ()) -> HangView:
    """The view of one round of `Timer.answer`s; ``before``: an earlier round, so that what still moves is not called
    hung."""
    told = {answer["rank"]: answer for answer in answers}
    events = {rank: _label(told[rank]) if rank in told else "silent" for rank in range(world)}
    then = {answer["rank"]: answer for answer in before}
    moved = [rank for rank, answer in told.items() if rank in then and _place(then[rank]) != _place(answer)]
    if moved:
        return HangView((), f"nothing hangs: {len(moved)} of {world} ranks moved between two looks", {}, events)
    silent = tuple(rank for rank in range(world) if rank not in told)
    waits = {rank: found for rank, answer in told.items() if (found := _waits(rank, answer, told))}
    blamed = set().union(*waits.values()) if waits else set()
    own = tuple(sorted(rank for rank in blamed if rank in told and not told[rank]["channel"]))
    if silent:
        # A silent rank that nobody waits for yet is still the one that does not run.
        return HangView(silent, f"rank {_names(silent)} did not answer", waits, events)
    if own:
        where = ", ".join(sorted({told[rank]["event"] for rank in own}))
        return HangView(own, f"rank {_names(own)} is in {where}, the others wait", waits, events)
    if waits:
        return HangView((), f"deadlock: {_names(tuple(waits))} wait for each other", waits, events)
    stuck = {answer["channel"] for answer in told.values() if answer["channel"]}
    if stuck:
        return HangView((), f"all ranks entered {', '.join(sorted(stuck))} and wait: the network", waits, events)
    return HangView((), "no rank waits for another", waits, events)


def _waits(rank: int, answer: Mapping[str, Any], told: Mapping[int, Mapping[str, Any]]) -> tuple[int, ...]:
    channel = answer["channel"]
    if not channel:
        return ()
    others = (other for other in answer["channels"][channel] if other != rank)
    return tuple(o for o in others if o not in told or told[o]["entered"].get(channel, 0) < answer["sequence"])


def _label(answer: Mapping[str, Any]) -> str:
    call = f" {answer['channel']}#{answer['sequence']}" if answer["channel"] else ""
    return f"step {answer['step']} {answer['event']}{call}"


def _place(answer: Mapping[str, Any]) -> tuple[Any, ...]:
    return answer["step"], answer["event"], answer["sequence"], tuple(sorted(answer["entered"].items()))


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


@dataclass(frozen=True)
class Grid:
    """Ranks in three dimensions, tensor-parallel fastest: rank = tp + TP * (dp + DP * pp), as Megatron-LM orders them."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise ValueError(f"tp={self.tp}, pp={self.pp} and dp={self.dp} must be at least 1")

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    def rank(self, tp: int, pp: int, dp: int) -> int:
        return tp + self.tp * (dp + self.dp * pp)

    def place(self, rank: int) -> tuple[int, int, int]:
        """(tp, pp, dp) of a rank."""
        return rank % self.tp, rank // (self.tp * self.dp), rank // self.tp % self.dp

    def channels(self) -> dict[str, tuple[int, ...]]:
        """Every communicator with its ranks: tp and dp groups, and each pipeline link in each direction."""
        found = {}
        for pp, dp in product(range(self.pp), range(self.dp)):
            found[f"tp.{pp}.{dp}"] = tuple(self.rank(tp, pp, dp) for tp in range(self.tp))
        for tp, pp in product(range(self.tp), range(self.pp)):
            found[f"dp.{tp}.{pp}"] = tuple(self.rank(tp, pp, dp) for dp in range(self.dp))
        for tp, dp, pp in product(range(self.tp), range(self.dp), range(self.pp - 1)):
            ends = self.rank(tp, pp, dp), self.rank(tp, pp + 1, dp)
            found[f"pp.{tp}.{dp}.{pp}.forward"] = found[f"pp.{tp}.{dp}.{pp}.backward"] = ends
        return found
