"""Work of compiled kernels, which hold no lock, spread over as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def split(work: Callable[[int, int], None], count: int, step: int) -> None:
    """Runs ``work(first, last)`` over 0 .. count in as many pieces, of whole ``step``s, as torch has threads."""
    threads = torch.get_num_threads()
    share = -(-count // (threads * step)) * step
    bounds = [(first, min(first + share, count)) for first in range(0, count, share)]
    if len(bounds) < 2:
        work(0, count)
        return
    list(_pool(os.getpid(), threads).map(lambda bound: work(*bound), bounds))


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process (a forked one has none of its parent's)."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")
