"""All ranks on one clock (MegaScale section 5.1): a Chrome trace with arrows from those who send to those who wait.

Ranks of different machines have different clocks. A collective ends for all its members at nearly the same moment, so
the offset of two ranks is the median, over the collectives they share, of the difference of their ends. Pipeline stages
share none; there messages go both ways, and the offset is half the difference of the shortest times each way, as in NTP.
Ranks that share neither are joined through others. The residual spread is the error that remains, and is reported.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .timer import Event, Trace

_Call = tuple[str, int]


@dataclass(frozen=True)
class Alignment:
    """``offsets``: rank -> ns to take from its times; ``residual``: median absolute ns that is left between ends of a
    call."""

    offsets: Mapping[int, int]
    residual: float


def _collectives(trace: Trace) -> dict[_Call, Event]:
    """Calls that end together: not those of one sender and one receiver."""
    return {(e.channel, e.sequence): e for e in trace.events if e.channel and e.name not in ("send", "recv")}


def _messages(traces: Sequence[Trace]) -> dict[tuple[int, int], int]:
    """(sender, receiver) -> the shortest ns from a send's start to its receive's end, each on its own clock."""
    sends = {(e.channel, e.sequence): (t.rank, e.start) for t in traces for e in t.events if e.name == "send"}
    shortest: dict[tuple[int, int], int] = {}
    for trace in traces:
        for event in trace.events:
            if event.name == "recv" and (sent := sends.get((event.channel, event.sequence))):
                pair, taken = (sent[0], trace.rank), event.end - sent[1]
                shortest[pair] = min(taken, shortest.get(pair, taken))
    return shortest


def align(traces: Sequence[Trace]) -> Alignment:
    """Offsets to the lowest rank's clock. Raises ValueError when ranks are joined by no communication."""
    if not traces:
        raise ValueError("there are no traces to align")
    ends = {trace.rank: {call: event.end for call, event in _collectives(trace).items()} for trace in traces}
    messages = _messages(traces)
    first = min(ends)
    offsets, waiting = {first: 0}, deque([first])
    while waiting:
        known = waiting.popleft()
        for other in sorted(set(ends) - set(offsets)):
            shared = ends[known].keys() & ends[other].keys()
            if shared:
                offsets[other] = offsets[known] + int(statistics.median(ends[other][c] - ends[known][c] for c in shared))
                waiting.append(other)
            elif (known, other) in messages and (other, known) in messages:
                offsets[other] = offsets[known] + (messages[known, other] - messages[other, known]) // 2
                waiting.append(other)
    if lost := sorted(set(ends) - set(offsets)):
        raise ValueError(f"clocks cannot be joined: no communication links rank {', '.join(map(str, lost))} to the others")
    calls: dict[_Call, list[int]] = {}
    for rank, found in ends.items():
        for call, end in found.items():
            calls.setdefault(call, []).append(end - offsets[rank])
    left = [abs(end - statistics.median(group)) for group in calls.values() if len(group) > 1 for end in group]
    return Alignment(offsets, statistics.median(left) if left else 0.0)


def late(traces: Sequence[Trace], alignment: Alignment | None = None) -> dict[int, float]:
    """rank -> mean ms that the other members of its collectives waited for it: what the last to enter costs."""
    offsets = (alignment or align(traces)).offsets
    entered: dict[_Call, dict[int, int]] = {}
    for trace in traces:
        for call, event in _collectives(trace).items():
            entered.setdefault(call, {})[trace.rank] = event.start - offsets[trace.rank]
    cost = {trace.rank: 0.0 for trace in traces}
    whole = [starts for starts in entered.values() if len(starts) > 1]
    for starts in whole:
        last = max(starts, key=lambda rank: starts[rank])
        cost[last] += (starts[last] - sorted(starts.values())[-2]) / 1e6
    return {rank: total / max(len(whole), 1) for rank, total in cost.items()}


def chrome_trace(traces: Sequence[Trace], alignment: Alignment | None = None) -> str:
    """JSON for chrome://tracing or Perfetto: a row a rank, times in microseconds from the first event; an arrow leads
    from a send to its receive, and from the last rank that entered a collective to those that waited for it."""
    offsets = (alignment or align(traces)).offsets
    origin = min((e.start - offsets[t.rank] for t in traces for e in t.events), default=0)
    rows: list[dict[str, Any]] = []
    calls: dict[_Call, list[tuple[int, Event]]] = {}

    def at(rank: int, time: int) -> float:
        return (time - offsets[rank] - origin) / 1e3

    for trace in traces:
        name = f"rank {trace.rank}" + (f" ({trace.node})" if trace.node else "")
        rows.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": trace.rank, "args": {"name": name}})
        for event in trace.events:
            args: dict[str, Any] = {"step": event.step, "cpu_ms": event.cpu / 1e6}
            if event.channel:
                args |= {"channel": event.channel, "call": event.sequence, "bytes": event.bytes}
                calls.setdefault((event.channel, event.sequence), []).append((trace.rank, event))
            rows.append(
                {
                    "ph": "X", "name": event.name, "cat": "communication" if event.channel else "compute", "pid": 0,
                    "tid": trace.rank, "ts": at(trace.rank, event.start), "dur": (event.end - event.start) / 1e3,
                    "args": args,
                }
            )  # fmt: skip
    arrow = 0
    for members in calls.values():
        if len(members) < 2:
            continue
        sends = [one for one in members if one[1].name == "send"]
        source = sends[0] if sends else max(members, key=lambda one: at(one[0], one[1].start))
        for rank, event in members:
            if rank == source[0]:
                continue
            arrow += 1
            start, end = at(source[0], source[1].start), at(rank, event.end)
            common = {"name": "waits for", "cat": "arrow", "pid": 0, "id": arrow}
            rows.append(common | {"ph": "s", "tid": source[0], "ts": start})
            rows.append(common | {"ph": "f", "bp": "e", "tid": rank, "ts": max(start, end)})
    return json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"})
