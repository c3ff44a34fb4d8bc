"""What the timings of kernels share: contenders timed alternately, records of medians, a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from broadsheet.core.records import Record, now, provenance


def alternately(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contender in every repeat, after one that is not counted.

    With one thread it is CPU time of the process (what else runs on the machine does not count), else wall time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def record(
    paper: str, bench: str, metric: str, values: Sequence[float], unit: str, method: str, setting: dict, model: str = ""
) -> Record:
    """The median of ``values``, with their least and most in its setting."""
    spread = {"least": min(values), "most": max(values)}
    return Record(
        paper=paper, method=method, bench=bench, metric=metric, value=statistics.median(values), unit=unit,
        n=len(values), model=model, setting={**setting, **spread}, time=now(), **provenance(),
    )  # fmt: skip


def clock_name() -> str:
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def show(records: list[Record]) -> None:
    table = Table("method", "metric", "setting", "median", "range", "unit")
    for one in records:
        setting = dict(one.setting)
        spread = f"{setting.pop('least'):.4g} to {setting.pop('most'):.4g}"
        what = ", ".join(f"{name}={value}" for name, value in setting.items())
        what = f"{one.model}: {what}" if one.model else what
        table.add_row(one.method, one.metric, what, f"{one.value:.4g}", spread, one.unit)
    Console(width=180).print(table)
