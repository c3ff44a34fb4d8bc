"""This machine's rooflines: what memory, arithmetic, a call and a link really reach; `broadsheet measure-hardware` keeps it.

Bandwidth is a triad (``c = a + s·b``) or a dot product, far beyond the caches; a dtype's peak is the fastest of square
linear layers; the host link is a copy into a memory-mapped file; the link between peers is an all-reduce of two gloo
processes. All are the best of many repeats: a roofline is what can be reached, and whatever else the machine does only slows
it down. The three efficiencies are then fitted on operators as models use them: on weights that no cache holds from one use
to the next.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch

from .calibration import Sample, fit
from .hardware import Device, Origin
from .timing import Timing, pinned, repeated, spread

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: widths of square layers in the sweep for a peak
WIDTHS = (256, 512, 1024, 2048)
#: rows x (inner, outer) of the linear layers that the efficiencies are fitted on: a step of few tokens to a prefill
ROWS, SHAPES = (1, 4, 16, 64, 256), ((256, 1024), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 1024))

#: bytes of copies of a weight that take turns, so that each has left the caches when its turn comes again
FLUSHED = 256_000_000

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rate:
    """Units a second of the best repeat; ``spread``: of the repeats' seconds, see `timing.spread`."""

    value: float
    spread: float

    @classmethod
    def of(cls, units: float, timing: Timing) -> Rate:
        return cls(units / timing.best, timing.spread)


def bandwidth(megabytes: int = 192) -> Rate:
    """Bytes a second over arrays of ``megabytes``: the better of a triad and of a dot product, which only reads, as decode
    steps mostly do (a store also reads the line that it writes)."""
    count = megabytes * 250_000
    a, b, c = (torch.ones(count) for _ in range(3))
    triad = Rate.of(12 * count, repeated(lambda: torch.add(a, b, alpha=2.0, out=c), 0.7))
    return max(triad, Rate.of(8 * count, repeated(lambda: torch.dot(a, b), 0.7)), key=lambda rate: rate.value)


def peak(dtype: torch.dtype) -> Rate:
    """Operations a second of the fastest square layer."""
    found = []
    for width in WIDTHS:
        x, weight = torch.rand(width, width).to(dtype), torch.rand(width, width).to(dtype)
        timing = repeated(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))  # type: ignore[misc]
        found.append(Rate.of(2 * width**3, timing))
        if timing.best > 1.0:  # no fast kernel for this dtype here: larger ones only take longer
            break
    return max(found, key=lambda rate: rate.value)


def samples(dtype: str, tick: Tick | None = None) -> Iterator[Sample]:
    """Linear layers and elementwise operators of many sizes, as a model runs them."""
    kind, size = DTYPES[dtype], DTYPES[dtype].itemsize
    for number, (inner, outer) in enumerate(SHAPES):
        copies = max(2, FLUSHED // (inner * outer * size))
        weights = cycle(torch.rand(copies, outer, inner).to(kind))
        for rows in ROWS:
            x = torch.rand(rows, inner).to(kind)
            seconds = repeated(lambda x=x, w=weights: torch.nn.functional.linear(x, next(w)), 0.05).best  # type: ignore[misc]
            nbytes = size * (inner * outer + rows * (inner + outer))
            yield Sample.one(2 * rows * inner * outer, nbytes, dtype, seconds)
        if tick:
            tick(f"{dtype} layers", number + 1, len(SHAPES))
    for count in (1_000, 100_000, 4_000_000):
        a = torch.rand(count).to(kind)
        seconds = repeated(lambda a=a: a + a, 0.05).best  # type: ignore[misc]
        yield Sample.one(count, 3 * size * count, dtype, seconds)


def host_link(megabytes: int = 64) -> Rate:
    """Bytes a second of a tensor's way into a memory-mapped file."""
    source = torch.ones(megabytes * 250_000)
    with tempfile.NamedTemporaryFile() as file:
        mapped = torch.from_file(file.name, shared=True, size=source.numel())
        return Rate.of(source.nbytes, repeated(lambda: mapped.copy_(source), 0.5))


def _peer(rank: int, address: str, out: Queue | None, sizes: tuple[int, ...]) -> None:
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = []
    for size in sizes:
        x = torch.ones(size // 4)
        distributed.all_reduce(x)
        times = []
        for _ in range(12):
            distributed.barrier()
            start = time.perf_counter()
            distributed.all_reduce(x)
            times.append(time.perf_counter() - start)
        found.append(times)
    if out is not None:
        out.put(found)
    distributed.destroy_process_group()


def link(megabytes: int = 16) -> tuple[Rate, float]:
    """Bytes a second that each of two gloo processes sends in an all-reduce (a ring of two sends each byte once), and the
    seconds of an all-reduce of almost nothing. Raises RuntimeError where processes cannot meet."""
    context = get_context("spawn")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        address = (Path(folder) / "meet").as_uri()
        sizes = (64, megabytes * 1_000_000)
        peers = [context.Process(target=_peer, args=(rank, address, out if rank == 0 else None, sizes)) for rank in range(2)]
        for peer in peers:
            peer.start()
        try:
            small, large = out.get(timeout=120)
        except Exception as error:
            raise RuntimeError("two gloo processes did not meet within two minutes") from error
        finally:
            for peer in peers:
                peer.join(10)
                peer.kill()
    return Rate(sizes[1] / max(min(large) - min(small), 1e-9), spread(large)), min(small)


def measure_hardware(name: str = "here", threads: int = 1, tick: Tick | None = None) -> Device:
    """This machine with ``threads`` threads as a `Device`, every number measured."""
    told = tick or (lambda *_: None)
    with pinned(threads):
        told("bandwidth", 0, 1)
        rates = {"bandwidth": bandwidth(), "host_link": host_link(), "link": link()[0]}
        for place, (dtype, kind) in enumerate(DTYPES.items()):
            told(f"{dtype} products", place, len(DTYPES))
            rates[f"peaks.{dtype}"] = peak(kind)
        how = f"{threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
        origins: dict[str, tuple[Origin, str]] = {
            name: ("measured", f"best of repeats, whose interquartile range is {rate.spread:.1%} of their median, {how}")
            for name, rate in rates.items()
        }
        numbers: dict[str, Any] = {name: rates[name].value for name in ("bandwidth", "host_link", "link")}
        if hasattr(os, "sysconf"):
            numbers["memory"] = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
            origins["memory"] = ("measured", "what the system says")
        peaks = {dtype: rates[f"peaks.{dtype}"].value for dtype in DTYPES}
        plain = Device(name, _title(), peaks=peaks, origins=origins, **numbers)
        timed = [one for dtype in DTYPES for one in samples(dtype, told)]
    reached = fit(plain, timed, "measured", f"linear layers and additions in {', '.join(DTYPES)}, {how}")
    return replace(plain, efficiency=reached)


def _title() -> str:
    """The processor's name."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
