"""Timing on a machine that does something else besides: contenders take turns, and the spread is told with the median."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


def alternately(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every contender in every repeat, after one that is not counted.

    ``clock``: by default the process's CPU time where torch has one thread (what else runs on the machine does not count),
    else the wall clock.
    """
    now = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
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
