"""Anomaly rules (MegaScale section 4.2): what heartbeats must look like, and who is named when they do not.

The rules see only what executors send. They are functions of the heartbeats and of the time, so a recorded run can be judged
again with other thresholds.

    heartbeat   none from a node for ``missing`` heartbeats                                     error
    exit        a rank ended with a code other than 0                                           error
    log         a line holds a word of ``error_words`` / ``warning_words``                      error / warning
    nan         the loss is not a number                                                        error
    progress    the step has not changed for ``stall`` usual steps (at least ``patience`` s)    error
    traffic     bytes a step fell below ``drop`` or rose above 1/``drop`` of the usual          warning
    links       a node's network link changed its carrier more than ``flaps`` times             error
    disk        a rank could not write ``unwritten`` checkpoints                                error
    straggler   a rank is slow for long (`diagnosis.Stragglers`)                   warning; error with ``evict``
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

#: what a rank prints when another one has failed: never the cause
SECONDARY = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "timed out waiting",
    "another rank is corrupt", "socket closed",
)  # fmt: skip
ERROR_WORDS = ("cuda error", "out of memory", "nccl error", "uncorrectable ecc", "xid", "segmentation fault", "corrupt")
WARNING_WORDS = ("warning", "retry", "not written")


@dataclass(frozen=True)
class Alarm:
    """``time``: when the rule fired (s since the epoch); ``ranks`` and ``nodes``: who is named, which may be nobody yet."""

    rule: str
    severity: Literal["warning", "error"]
    time: float
    evidence: str
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """Thresholds. ``heartbeat``: seconds between two; ``startup``: seconds that an attempt may take to its first
    step, and that first step may take."""

    heartbeat: float = 0.5
    missing: float = 4.0
    stall: float = 20.0
    patience: float = 3.0
    startup: float = 60.0
    drop: float = 0.5
    flaps: int = 3
    unwritten: int = 2
    evict: bool = False
    grace: float = 0.25
    error_words: tuple[str, ...] = ERROR_WORDS
    warning_words: tuple[str, ...] = WARNING_WORDS

    def __post_init__(self) -> None:
        for name in ("heartbeat", "missing", "stall", "patience", "startup"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.drop < 1:
            raise ValueError(f"drop={self.drop} must lie between 0 and 1")

    @property
    def keywords(self) -> tuple[str, ...]:
        """What executors let through: the lists, and words by which a cause is told from its consequences."""
        return (*self.error_words, *self.warning_words, *SECONDARY, "error", "exception")


@dataclass
class _Seen:
    """What is known of a rank in this attempt."""

    node: str
    step: int = -1
    since: float = 0.0  # when the step became what it is, on the driver's clock
    code: int | None = None
    ended: float = 0.0
    bytes: int = 0
    loss: float | str | None = None
    lines: list[str] = field(default_factory=list)


@dataclass
class Watch:
    """The rules over one attempt. Feed it every heartbeat; `error` is the first alarm that calls for recovery."""

    rules: Rules
    nodes: tuple[str, ...]
    began: float
    ranks: dict[int, _Seen] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    warnings: list[Alarm] = field(default_factory=list)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    per_step: dict[int, deque[float]] = field(default_factory=dict)
    first_step: int | None = None
    _found: Alarm | None = None

    def update(self, beat: dict[str, Any], now: float) -> None:
        """One heartbeat, which came at ``now``."""
        node = beat["node"]
        self.heard[node] = now
        first = self.links.setdefault(node, beat["links"])
        if beat["links"] - first > self.rules.flaps:
            self._alarm("links", now, f"the link changed {beat['links'] - first} times", (), (node,))
        for row in beat["ranks"]:
            one = self.ranks.setdefault(row["rank"], _Seen(node, since=now))
            if row["code"] is not None and one.code is None:
                one.code, one.ended = row["code"], now
            if row.get("step") is None:
                continue
            one.loss = row["loss"]
            if row["step"] != one.step:
                self._stepped(row, one, now)
        for rank, text in beat["lines"]:
            if rank in self.ranks:
                self.ranks[rank].lines.append(text)
                self._line(rank, text, now)

    def _stepped(self, row: dict[str, Any], one: _Seen, now: float) -> None:
        if one.step >= 0 and row["step"] > one.step:
            steps = row["step"] - one.step
            self.durations.append((now - one.since) / steps)
            share = (row["bytes"] - one.bytes) / steps
            usual = self.per_step.setdefault(row["rank"], deque(maxlen=20))
            # Three steps at least: a heartbeat cuts steps in two, and one cut step says nothing.
            if steps >= 3 and len(usual) >= 4 and (middle := statistics.median(usual)) > 0:
                ratio = share / middle
                if not self.rules.drop <= ratio <= 1 / self.rules.drop:
                    text = f"{share:.0f} bytes a step, usually {middle:.0f}"
                    self.warnings.append(Alarm("traffic", "warning", now, text, (row["rank"],), (one.node,)))
            if steps >= 3:
                usual.append(share)
        self.first_step = row["first"]
        one.step, one.since, one.bytes = row["step"], now, row["bytes"]

    def _line(self, rank: int, text: str, now: float) -> None:
        lower = text.lower()
        if any(word in lower for word in SECONDARY):
            return
        if any(word in lower for word in self.rules.warning_words):
            self.warnings.append(Alarm("log", "warning", now, text, (rank,), (self.ranks[rank].node,)))
            if sum("not written" in line.lower() for line in self.ranks[rank].lines) >= self.rules.unwritten:
                self._alarm("disk", now, text, (rank,), (self.ranks[rank].node,))
        elif any(word in lower for word in self.rules.error_words):
            self._alarm("log", now, text, (rank,), (self.ranks[rank].node,))

    def slow(self, rank: int, share: float, now: float) -> None:
        """A rank was found to be slower than the others by ``share``."""
        if any(alarm.rule == "straggler" and alarm.ranks == (rank,) for alarm in self.warnings):
            return
        text, node = f"rank {rank} computes {share:.1%} slower than the others", (self.ranks[rank].node,)
        self.warnings.append(Alarm("straggler", "warning", now, text, (rank,), node))
        if self.rules.evict:
            self._alarm("straggler", now, text, (rank,), node)

    def _alarm(self, rule: str, now: float, text: str, ranks: tuple[int, ...], nodes: tuple[str, ...]) -> None:
        if self._found is None:
            self._found = Alarm(rule, "error", now, text, ranks, nodes)

    # --- judging ----------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The lowest step under way; -1 before all ranks have begun."""
        return min((one.step for one in self.ranks.values()), default=-1)

    @property
    def usual(self) -> float:
        """Seconds of a usual step."""
        return statistics.median(self.durations) if self.durations else 0.0

    @property
    def finished(self) -> bool:
        """All ranks ended well."""
        return bool(self.ranks) and all(one.code == 0 for one in self.ranks.values())

    def error(self, now: float, world: int) -> Alarm | None:
        """What calls for recovery now; exits win over what follows from them, and wait ``grace`` seconds for their cause."""
        failed = {rank: one for rank, one in self.ranks.items() if one.code}
        if failed:
            first = min(one.ended for one in failed.values())
            if now - first < self.rules.grace and len(failed) < world:
                return None
            return self._exit(failed, first)
        if self._found:
            return self._found
        for rank, one in self.ranks.items():
            if one.loss == "nan":
                return Alarm("nan", "error", now, f"loss of rank {rank} is nan at step {one.step}", (rank,), (one.node,))
        limit = self.rules.missing * self.rules.heartbeat
        silent = tuple(node for node in self.nodes if now - self.heard.get(node, self.began) > limit)
        if silent:
            ranks = tuple(sorted(rank for rank, one in self.ranks.items() if one.node in silent))
            return Alarm("heartbeat", "error", now, f"no heartbeat for {limit:g} s", ranks, silent)
        running = [one for one in self.ranks.values() if one.code is None]
        if len(self.ranks) < world or any(one.step < 0 for one in self.ranks.values()):
            if now - self.began > self.rules.startup:
                late = tuple(rank for rank in range(world) if rank not in self.ranks or self.ranks[rank].step < 0)
                text = f"no first step within {self.rules.startup:g} s"
                return Alarm("progress", "error", now, text, late if len(late) < world else ())
            return None
        # A first step loads libraries and compiles: it is given the time of a start.
        limit = max(self.rules.patience, self.rules.stall * self.usual) if self.durations else self.rules.startup
        # All ranks of a step that is done may wait for one that does not begin the next: the newest change counts.
        if running and now - max(one.since for one in running) > limit:
            return Alarm("progress", "error", now, f"step {self.step} has not ended for {limit:.1f} s; no traffic")
        return None

    def _exit(self, failed: dict[int, _Seen], first: float) -> Alarm:
        """Who failed first in cause, not in time: a signal, then an error that is not about other ranks, then the
        earliest."""

        def secondary(one: _Seen) -> bool:
            return any(word in text.lower() for text in one.lines[-3:] for word in SECONDARY)

        signalled = [rank for rank, one in failed.items() if one.code and one.code < 0]
        own = [rank for rank, one in failed.items() if not secondary(one)]
        named = sorted(signalled or own or [min(failed, key=lambda rank: failed[rank].ended)])
        one = failed[named[0]]
        code = one.code or 0
        last = next((text for text in reversed(one.lines) if not any(word in text.lower() for word in SECONDARY)), "")
        text = f"killed by signal {-code}" if code < 0 else f"exit code {code}: {last}".rstrip(": ")
        nodes = tuple(sorted({failed[rank].node for rank in named}))
        return Alarm("exit", "error", first, text, tuple(named), nodes)
