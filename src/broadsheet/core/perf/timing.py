"""Timing on a machine that does something else besides: contenders take turns, and the spread is told with the median."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


def own_clock() -> Callable[[], float]:
    """The process's CPU time where torch has one thread (what else runs on the machine does not count), else the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def alternately(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every repeat, after one that is not counted, by ``clock`` (`own_clock`)."""
    now = clock or own_clock()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            start = now()
            run()
            if repeat:
                seconds[name].append(now() - start)
        if tick:
            tick(repeat, repeats)
    return seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, repeated."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """What the thing takes when nothing is in its way; whatever else a machine does only slows it down."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        return spread(self.seconds)


def repeated(run: Callable[[], object], seconds: float = 0.3, least: int = 5) -> Timing:
    """At least ``least`` runs, as many as ``seconds`` allow, after one that is not counted; by `own_clock`."""
    now = own_clock()
    run()
    times: list[float] = []
    until = now() + seconds
    while len(times) < least or now() < until:
        start = now()
        run()
        times.append(now() - start)
    return Timing(tuple(times))


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range over the median: what a reader must know before believing a small difference."""
    if len(seconds) < 4:
        return (max(seconds) - min(seconds)) / statistics.median(seconds)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


@contextmanager
def pinned(threads: int = 1) -> Iterator[list[int]]:
    """Keeps this process and torch on its first ``threads`` cores; yields their numbers. All is as before afterwards."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch_before = torch.get_num_threads()
    cores = sorted(before)[:threads]
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    try:
        yield cores
    finally:
        torch.set_num_threads(torch_before)
        if before:
            os.sched_setaffinity(0, before)
