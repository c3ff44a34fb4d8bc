"""A run's own process on a bench that costs nothing; all else is the real thing.

``gear`` and its reference take ``steps`` steps of ``pause`` seconds each. ``count`` is a file that gets a line for every
cell that was measured, ``fault`` what goes wrong in ``gear``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from broadsheet.core.records import Record, now
from broadsheet.core.view import Quality, View
from broadsheet.lab import compare, run, table

VIEW = View(
    reference="full",
    reference_name="full cache",
    qualities=(Quality("accuracy", "accuracy"),),
    columns=(),
    price="bytes_ratio",
    price_head="bytes",
    price_label="bytes",
    price_digits=2,
    ticks=((1.0, "1"),),
    least="cannot go below {}",
    budgets=(0.5,),
    top=1.0,
    budget_name="a fraction",
    unbudgeted="–",
    note="Made for a test.",
)


@dataclass(frozen=True)
class Workload:
    model: str = "pocket-2m"
    seed: int = 0
    device: str = "cpu"
    steps: int = 2
    pause: float = 0.01
    count: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Method:
    bits: int = 2
    budgeted = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise ValueError(f"bits must be 2 or 4, got {self.bits}")

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)


def methods() -> dict[str, Method]:
    return {"full": Method(), "gear": Method()}


def measure(name: str, method: Method, workload: Workload, budget: float | None, tick: Any = None) -> list[Record]:
    for step in range(workload.steps):
        time.sleep(workload.pause)
        if tick:
            tick(step + 1, workload.steps)
    if name == "gear":
        _go_wrong(workload.fault)
    if workload.count:
        with open(workload.count, "a") as file:
            file.write(f"{name}\n")
    made = {"paper": "gear", "method": name, "bench": "caches", "model": workload.model, "time": now()}
    return [Record(metric="accuracy", value=0.5, **made)]


def _go_wrong(fault: str) -> None:
    if fault == "value":
        raise ValueError("no such data:\n  give a file")
    if fault == "crash":
        raise RuntimeError("boom\n\x1b[31mmore of it")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        bytearray(1 << 30)
    if fault == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(300)


bench = ModuleType("bench")
vars(bench).update(
    BENCH="caches", VIEW=VIEW, Workload=Workload, methods=methods, measure=measure, workload_key=lambda w: asdict(w)
)
for module in (compare, run, table):
    vars(module)["bench"] = lambda family: bench
run.source_digest = compare.source_digest = lambda family: "test"

if __name__ == "__main__":
    from broadsheet.web.worker import main

    sys.exit(main())
