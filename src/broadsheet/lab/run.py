"""`broadsheet run`: one method with its own parameters, beside the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from broadsheet import catalogue
from broadsheet.core.records import Record

from .compare import Cell, bench, has_bench, key_of, store_of, taken

#: Papers that have a command of their own.
COMMANDS = {"crash": "crash", "instinct": "instinct", "quantizing-code-llms": "study code"}


def family_of(slug: str) -> str:
    """The family in which a paper, a variant or a baseline runs; raises ValueError when none does."""
    if slug in catalogue.papers():
        paper = catalogue.paper(slug)
        if not paper.method:
            raise ValueError(f"'{slug}' does not run yet; 'broadsheet papers' marks with ● those that do")
        if slug in COMMANDS:
            raise ValueError(f"'{slug}' has a command of its own: broadsheet {COMMANDS[slug]} --help")
        return paper.family
    for family in sorted(catalogue.FAMILIES, key="evals".__ne__):  # whose bench imports no torch
        if has_bench(family) and slug in bench(family).methods():
            return family
    return catalogue.paper(slug).family  # raises, naming the nearest


def run_method(
    family: str,
    slug: str,
    options: dict[str, Any],
    device: str = "cpu",
    progress: Callable[[Cell, int, int, bool], None] | None = None,
    out: str | None = None,
    tick: Callable[[int, int], None] | None = None,
    since: str | None = None,
) -> list[Record]:
    """Measures ``slug`` as ``options`` configure it, and the family's reference (but for benchmarks), on one workload.

    Finished cells go where `compare` keeps its own, so that each finds what the other measured. ``since``: cells that were
    measured at this time (``2026-11-29T06:30:00Z``) or later are taken from there, "" takes all; None measures everything.

    Options that name a field of the workload go there, the others to the method. ``method=NAME`` runs another method
    of the family on a benchmark paper (``run scbench -o method=snapkv``). Where a method makes another model,
    ``size=BYTES`` fits that into so many bytes and ``out`` is the folder that it is written to.
    """
    module = bench(family)
    if out and not taken(module, out=out):
        raise ValueError(f"--out is for methods that make something to keep; {family} work on a model as it runs")
    known = module.methods()
    options = dict(options)
    name = str(options.pop("method", slug))
    budget = options.pop("budget", None) if name != slug else None
    of_workload = {field.name for field in fields(module.Workload)}
    workload = make_workload(module, {"device": device, **{k: v for k, v in options.items() if k in of_workload}})
    fits = hasattr(module, "at_size")
    room = _bytes(options.pop("size")) if fits and "size" in options else None
    parameters = {k: v for k, v in options.items() if k not in of_workload}
    if name in known:
        method = configured(slug, known[name], parameters)
        known[name] = method if room is None else module.at_size(method, workload, room)
    reference = module.VIEW.reference
    names = [name] if name in known else list(known)
    records: list[Record] = []
    cells = [Cell(n, budget, workload.seed) for n in names if n != reference]
    if any(getattr(known[n], "compared", True) for n in names):
        cells.insert(0, Cell(reference, None, workload.seed))
    store = store_of(family)
    done = {} if since is None or out else store.cells()
    for number, cell in enumerate(cells):
        key = key_of(family, cell, known[cell.method], workload)
        found = [record for record in done.get(key, []) if record.time >= (since or "")]
        if progress:
            progress(cell, number, len(cells), bool(found))
        if not found:
            kept = taken(module, out=out if cell.method == name else None, tick=tick)
            found = module.measure(cell.method, known[cell.method], workload, cell.budget, **kept)
            store.add(key, found)
        records += found
    return records


def _bytes(text: Any) -> int:
    """``120MB``, ``1.5GiB``, ``4000000``: bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9.]+) *([kmg]i?)?b?", str(text).strip().lower())
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if not value > 0 or not found:
        raise ValueError(f"size is bytes, such as 120MB, 1.5GiB or 4000000; got '{text}'")
    prefix = found[2] or ""
    return int(value * (1024 if prefix.endswith("i") else 1000) ** " kmg".index(prefix[:1] or " "))


def make_workload(module: ModuleType, options: dict[str, Any]) -> Any:
    """A family's workload with these fields. Raises ValueError for one that it does not have."""
    allowed = {field.name for field in fields(module.Workload)}
    for unknown in sorted(set(options) - allowed):
        raise ValueError(f"{module.BENCH} have no option '{unknown}'; they have {', '.join(sorted(allowed))}")
    return module.Workload(**options)


def configured(slug: str, method: Any, parameters: dict[str, Any]) -> Any:
    """``method`` with these parameters. Raises ValueError for a name it does not have or a value it refuses."""
    allowed = {field.name for field in fields(method)}
    for unknown in sorted(set(parameters) - allowed):
        raise ValueError(f"{slug} has no parameter '{unknown}'; it has {', '.join(sorted(allowed))}")
    return replace(method, **parameters)
