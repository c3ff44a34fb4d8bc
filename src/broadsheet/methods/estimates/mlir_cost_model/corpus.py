"""Rows to learn from: {id, template, number, dialect, text, labels, machine, compiler}, one JSON object a line.

``id`` is a hash of the canonical tokens: programs that differ only in names, white space or locations have the same.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from broadsheet.core.records import JsonLines

from .capture import capture
from .generate import generate
from .labels import compiler_version, label, machine, pin
from .stablehlo import parse
from .tokens import program_id

Row = dict[str, Any]


def build(
    path: str | Path, count: int, seed: int = 0, tick: Callable[[int, int], None] | None = None, together: int = 32
) -> list[Row]:
    """Programs 0 to ``count`` of `generate`, compiled, read and timed ``together`` at a time, about four a second on one
    core.

    Rows are added to ``path``; what is there already is kept, so that a run that was stopped goes on. Programs that occur
    twice are kept once (a row with a number and no text says so). Returns the rows with a text.
    """
    lines = JsonLines(path)
    rows = list(lines)
    seen = {row["id"] for row in rows}
    start = max((row["number"] for row in rows), default=-1) + 1
    pin()
    stream = itertools.takewhile(lambda one: one[0] < count, generate(seed, start))
    while some := list(itertools.islice(stream, together)):
        fresh: list[Row] = []
        for number, graph in some:
            text = capture(graph.function(), *graph.arguments())
            row: Row = {"id": program_id(parse(text)), "number": number, "template": graph.template}
            if row["id"] not in seen:
                seen.add(row["id"])
                row |= {"dialect": "stablehlo", "text": text, "machine": machine(), "compiler": compiler_version()}
            fresh.append(row)
        new = [row for row in fresh if "text" in row]
        for row, labels in zip(new, label([row["text"] for row in new]), strict=True):
            row["labels"] = labels
        for row in fresh:
            lines.add(row)
        rows += fresh
        if tick:
            tick(some[-1][0] + 1, count)
    return [row for row in rows if "text" in row]


def read(path: str | Path) -> list[Row]:
    """Rows of a JSON-lines file, plain or gzipped. Raises ValueError with the line that is no row."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; make a corpus with benchmarks/mlir_cost_study.py corpus")
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if "text" in row or row.keys() == {"id", "number", "template"}:
                    rows.append(row)
                    continue
            except (json.JSONDecodeError, TypeError, AttributeError):
                pass
            raise ValueError(f"{path}, line {number}: no row with id, template, text and labels")
    return [row for row in rows if "text" in row]


def write(rows: Sequence[Row], path: str | Path) -> None:
    """Gzipped JSON lines, the same bytes for the same rows."""
    with open(path, "wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def folds(names: Sequence[str], count: int, seed: int = 0) -> Iterator[tuple[str, ...]]:
    """Template names in ``count`` disjoint parts, shuffled."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(sorted(set(names)))
    for part in np.array_split(order, count):
        yield tuple(str(name) for name in part)
