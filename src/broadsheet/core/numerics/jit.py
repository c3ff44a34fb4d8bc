"""What compiled kernels share: compilation with a disk cache, and the work of a call split over threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from numba import njit


def compiled(function: Callable[..., Any], fastmath: Collection[str] = (), inline: str = "never") -> Callable[..., Any]:
    """``function`` compiled at its first call and, where there is a place for it, cached on disk. It releases the GIL."""
    options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy", "inline": inline}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write the cache
        return njit(**options)(function)


def split(work: Callable[[int, int], None], count: int, step: int) -> None:
    """Runs ``work(first, last)`` over 0 .. count in as many pieces, of whole ``step``s, as torch has threads."""
    threads = torch.get_num_threads()
    share = -(-count // (threads * step)) * step
    bounds = [(first, min(first + share, count)) for first in range(0, count, share)]
    if len(bounds) < 2:
        work(0, count)
        return
    others = [_pool(os.getpid(), threads).submit(work, *bound) for bound in bounds[1:]]
    work(*bounds[0])  # here, where nothing has to be woken
    for one in others:
        one.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process (a forked one has none of its parent's)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="broadsheet")
