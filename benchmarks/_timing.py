"""What the timings of kernels share: records of medians, a table."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from broadsheet.core.perf.timing import spread
from broadsheet.core.records import Record, now, provenance, write_json


def record(
    paper: str, bench: str, metric: str, values: Sequence[float], unit: str, method: str, setting: dict, model: str = ""
) -> Record:
    """The median of ``values``, with their least, most and spread in its setting."""
    noise = {"least": min(values), "most": max(values), "spread": spread(values)}
    return Record(
        paper=paper, method=method, bench=bench, metric=metric, value=statistics.median(values), unit=unit,
        n=len(values), model=model, setting={**setting, **noise}, time=now(), **provenance(),
    )  # fmt: skip


def against(
    made: Callable[..., Record],
    seconds: dict[str, list[float]],
    pairs: Iterable[tuple[str, str]],
    setting: dict,
    held: Mapping[str, int] | None = None,
) -> list[Record]:
    """Records of all seconds, with the bytes ``held`` by some, and of how many times longer rivals took: (ours, rival)."""
    records = []
    for name, times in seconds.items():
        more = {"bytes": held[name]} if held and name in held else {}
        records.append(made("seconds", times, "s", name, {**setting, **more}))
    for name, rival in pairs:
        ratios = [theirs / mine for theirs, mine in zip(seconds[rival], seconds[name])]
        records.append(made("time_ratio", ratios, "times ours", name, {**setting, "against": rival}))
    return records


def layer_benchmark(
    description: str | None,
    file: str,
    layers: Callable[[int], Any],
    measure: Callable[[Any, int, int, int], list[Record]],
    batches: str = "1,8,64",
    repeats: int = 15,
) -> None:
    """The command line of a benchmark of one square layer: ``measure(layers(width), batch, threads, repeats)`` for all."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batches", default=batches)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", default=str(Path(file).parent / "results" / f"{Path(file).stem}.records.json"))
    arguments = parser.parse_args()
    made, records = layers(arguments.width), list[Record]()
    for threads in map(int, arguments.threads.split(",")):
        torch.set_num_threads(threads)
        for batch in map(int, arguments.batches.split(",")):
            records += measure(made, batch, threads, arguments.repeats)
            write_json(records, arguments.out)  # a kill loses at most the cell under way
    show(records)


def clock_name() -> str:
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def show(records: list[Record]) -> None:
    table = Table("method", "metric", "setting", "median", "range", "spread", "unit")
    for one in records:
        setting = dict(one.setting)
        least, most, noise = (setting.pop(name) for name in ("least", "most", "spread"))
        what = ", ".join(f"{name}={value}" for name, value in setting.items())
        what = f"{one.model}: {what}" if one.model else what
        table.add_row(
            one.method, one.metric, what, f"{one.value:.4g}", f"{least:.4g} to {most:.4g}", f"{noise:.1%}", one.unit
        )
    Console(width=180).print(table)
