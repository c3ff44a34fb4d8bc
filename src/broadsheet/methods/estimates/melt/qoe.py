"""Quality of experience: does the machine still answer while a model writes?

A small job is due every ``period`` seconds, in a process of its own; how long after it was due it is done is its latency.
It is measured with and without generation.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .metrics import Turn
from .report import READING

#: the job: about a millisecond of hashing, and when it was due and done
_JOB = """
import hashlib, json, sys, time
period, count, work = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
start, late = time.perf_counter() + period, []
for number in range(count):
    due = start + number * period
    time.sleep(max(0.0, due - time.perf_counter()))
    hashlib.sha256(b"x" * work).hexdigest()
    late.append(time.perf_counter() - due)
print(json.dumps(late))
"""


@dataclass(frozen=True)
class Latency:
    """Of the periodic job, in seconds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p95(self) -> float:
        return float(np.quantile(self.values, 0.95))


def job_latency(
    busy: Callable[[], object] | None = None, period: float = 0.05, count: int = 60, work: int = 1_000_000
) -> Latency:
    """Of ``count`` jobs, while ``busy()`` is called again and again. Raises ValueError for times that are not above 0."""
    if period <= 0 or count < 1 or work < 1:
        raise ValueError("period, count and work are above 0")
    job = subprocess.Popen(
        [sys.executable, "-c", _JOB, str(period), str(count), str(work)], stdout=subprocess.PIPE, text=True
    )
    try:
        while job.poll() is None and busy is not None:
            busy()
        out, _ = job.communicate(timeout=10 * period * count + 60)
    finally:
        job.kill()
    return Latency(tuple(json.loads(out)))


@dataclass(frozen=True)
class Experience:
    """What a user notices: does the text come as fast as it is read, how long is the wait before it begins, and how many
    times longer does another task take meanwhile."""

    reads_along: float  #: share of turns that decode at `READING` tokens a second or faster
    ttft_median: float | None
    ttft_p95: float | None
    slowdown: float | None


def experience(turns: Sequence[Turn], idle: Latency | None = None, generating: Latency | None = None) -> Experience:
    """Raises ValueError when no turn has a rate."""
    rates = [turn.decode_tps for turn in turns if turn.decode_tps is not None]
    if not rates:
        raise ValueError("no turn has an output token: there is no rate to judge")
    waits = [turn.ttft for turn in turns if turn.ttft is not None]
    slowdown = generating.median / idle.median if idle and generating else None
    share = sum(rate >= READING for rate in rates) / len(rates)
    median, late = (statistics.median(waits), float(np.quantile(waits, 0.95))) if waits else (None, None)
    return Experience(share, median, late, slowdown)
