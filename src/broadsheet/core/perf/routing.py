"""Which experts tokens took, and what that costs on ranks that share the experts: traces, bytes, operations, links.

What every study of mixtures of experts stands on (survey: Liu et al. 2024, arXiv 2412.14219, sections 3 and 4): a trace is
recorded once and replayed under other placements, caches and devices. Expert parallelism: experts are spread over ranks, a
token goes to the ranks of its experts (dispatch), is worked on there, and comes back (combine); both are all-to-alls whose
time is that of the busiest rank, so skew is what they cost.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .architecture import Architecture, Mlp
from .hardware import Device
from .ops import Setting, expert_op

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What a router chose.

    ``ids`` [layers, tokens, active]: experts of every token, from 0; ``experts`` itself says "none" (skipped). ``weights``,
    the same shape: what their outputs count. ``sequence``, ``position`` [tokens]: whose token it is, and where. Padding is
    left out: it would be counted as use. Raises ValueError for arrays that do not fit together.
    """

    experts: int
    ids: Ints
    weights: Floats
    sequence: Ints
    position: Ints

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.weights.shape != self.ids.shape:
            raise ValueError("ids and weights are of one shape, [layers, tokens, active]")
        if self.sequence.shape != self.ids.shape[1:2] or self.position.shape != self.ids.shape[1:2]:
            raise ValueError(f"sequence and position have one entry for each of {self.ids.shape[1]} tokens")
        if self.ids.size and not (self.ids.min() >= 0 and self.ids.max() <= self.experts):
            raise ValueError(f"ids are 0 to {self.experts - 1}, or {self.experts} for none")

    @property
    def layers(self) -> int:
        return self.ids.shape[0]

    def loads(self) -> Ints:
        """Tokens of every expert, [layers, experts]."""
        return np.stack([np.bincount(layer.ravel(), minlength=self.experts + 1)[: self.experts] for layer in self.ids])

    def distinct(self, batch: int) -> float:
        """Experts of a layer that ``batch`` tokens in a row meet together, on average: what a step of so many reads.
        (`ops.distinct_experts` is this under even routing.) Raises ValueError where there are fewer tokens."""
        steps = self.ids.shape[1] // batch if batch > 0 else 0
        if not steps:
            raise ValueError(f"a batch of {batch} tokens, of a trace of {self.ids.shape[1]}")
        whole = self.ids[:, : steps * batch].reshape(self.layers * steps, -1)
        met = np.zeros((len(whole), self.experts + 1), bool)
        met[np.arange(len(whole))[:, None], whole] = True
        return float(met[:, : self.experts].sum(1).mean())

    def save(self, path: str | Path) -> None:
        """A NumPy archive of plain arrays."""
        arrays = {name: getattr(self, name) for name in ("ids", "weights", "sequence", "position")}
        with open(path, "wb") as file:
            np.savez_compressed(file, experts=np.array(self.experts), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """What `save` wrote; raises ValueError for anything else. Nothing in a file is run."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(int(file["experts"]), *(file[name] for name in ("ids", "weights", "sequence", "position")))
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no routing trace: {error}") from None


def contiguous(experts: int, ranks: int) -> Ints:
    """The rank of every expert, [experts]: neighbours together. Raises ValueError unless ranks divide experts."""
    if ranks < 1 or experts % ranks:
        raise ValueError(f"{experts} experts cannot be shared by {ranks} ranks: take a divisor")
    return np.arange(experts) // (experts // ranks)


def imbalance(load: Sequence[float] | Ints | Floats) -> float:
    """Most over mean of what ranks (or experts) have to do: how much longer all wait than they would if it were even."""
    load = np.asarray(load, float)
    return float(load.max() / load.mean()) if load.any() else 1.0


def dispatch(ids: Ints, source: Ints, placement: Ints, ranks: int) -> Ints:
    """Tokens that each rank sends to each, [from, to], of one layer.

    ``ids`` [tokens, active] of a `RoutingTrace`; ``source`` [tokens]: where a token is; ``placement`` [experts]: where an
    expert is. A token whose experts share a rank goes there once; what stays at home is on the diagonal.
    """
    goes = np.zeros((len(ids), ranks + 1), bool)
    goes[np.arange(len(ids))[:, None], np.append(placement, ranks)[ids]] = True
    sent = np.zeros((ranks, ranks), np.int64)
    np.add.at(sent, source, goes[:, :ranks])
    return sent


@dataclass(frozen=True)
class Links:
    """How ranks are joined: ``node`` neighbours reach each other at ``inside`` bytes a second one way, others at
    ``between``; a message waits ``latency`` seconds first. Raises ValueError for rates that are not above 0."""

    inside: float
    between: float
    node: int = 8
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.inside > 0 and self.between > 0 and self.node >= 1 and self.latency >= 0):
            raise ValueError(f"rates are above 0, a node has at least one rank, latency is not negative; got {self}")

    def all_to_all_s(self, nbytes: Ints | Floats) -> float:
        """Seconds of an all-to-all of ``nbytes`` [from, to]: of the busiest way out of or into a rank, within its node or
        beyond, both of which go on at once. What stays on a rank is not sent."""
        sent = np.asarray(nbytes, float) * (1 - np.eye(len(nbytes)))
        nodes = np.arange(len(sent)) // self.node
        near = nodes[:, None] == nodes[None, :]
        longest = 0.0
        for part, rate in ((sent * near, self.inside), (sent * ~near, self.between)):
            busiest = max(part.sum(0).max(), part.sum(1).max())
            longest = max(longest, self.latency + busiest / rate if busiest else 0.0)
        return longest


@dataclass(frozen=True)
class ExpertParallel:
    """What one layer takes: seconds of dispatch, of the slowest rank's experts, and of combine; ``skew``: of the tokens that
    ranks work on, and of the bytes that they send."""

    dispatch_s: float
    compute_s: float
    combine_s: float
    token_skew: float
    byte_skew: float

    @property
    def seconds(self) -> float:
        """One after the other: nothing overlaps."""
        return self.dispatch_s + self.compute_s + self.combine_s


def expert_parallel(
    arch: Architecture, mlp: Mlp, ids: Ints, source: Ints, placement: Ints, links: Links, device: Device, setting: Setting
) -> ExpertParallel:
    """One layer of one step: tokens ``ids`` [tokens, active] at ``source`` [tokens], experts at ``placement`` [experts], on
    equal devices."""
    ranks = int(max(placement.max(), source.max())) + 1
    sent = dispatch(ids, source, placement, ranks) * (arch.hidden * setting.activation_bytes)
    load = np.bincount(ids.ravel(), minlength=len(placement) + 1)[: len(placement)]
    compute = [expert_op(arch, mlp, load[placement == rank], setting).seconds(device) for rank in range(ranks)]
    by_rank = np.bincount(placement, load, ranks)
    away = sent * (1 - np.eye(ranks))
    return ExpertParallel(
        links.all_to_all_s(sent), max(compute), links.all_to_all_s(sent.T), imbalance(by_rank), imbalance(away.sum(0))
    )
