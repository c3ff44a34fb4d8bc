"""Runs a family's bench over methods, budgets and seeds; finished cells are kept and never run twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import broadsheet
from broadsheet.catalogue import FAMILIES
from broadsheet.core.models import identity
from broadsheet.core.records import Record, RecordStore, cell_key, home


@dataclass(frozen=True)
class Cell:
    """One (method, budget, seed) of a comparison."""

    method: str
    budget: float | None
    seed: int


def bench(family: str) -> ModuleType:
    """The family's bench module; raises ValueError when there is none yet."""
    if family not in FAMILIES:
        raise ValueError(f"no family '{family}'; families: {', '.join(FAMILIES)}")
    if not has_bench(family):
        ready = ", ".join(name for name in FAMILIES if has_bench(name))
        raise ValueError(f"the family '{family}' has no bench yet; there is one for {ready}")
    return import_module(f"broadsheet.methods.{family}.bench")


def has_bench(family: str) -> bool:
    """Whether the family's bench module is there."""
    return (Path(broadsheet.__file__).parent / "methods" / family / "bench.py").is_file()


@cache
def source_digest(family: str) -> str:
    """A hash of the code behind a family's numbers: cells measured by other code are measured again."""
    root = Path(broadsheet.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("core/**/*.py"), *root.glob(f"methods/{family}/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def plan(methods: Sequence[str], budgets: Sequence[float | None], seeds: int) -> list[Cell]:
    """Cells in an order that fills the table evenly; a method without a budget (the full cache) runs once a seed."""
    cells = []
    for seed in range(seeds):
        for budget in budgets:
            cells += [Cell(name, budget, seed) for name in methods if name != "full"]
        if "full" in methods:
            cells.insert(len(cells) - len([c for c in cells if c.seed == seed]), Cell("full", None, seed))
    return cells


def compare(
    family: str,
    workload: Any,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] = (0.25,),
    seeds: int = 1,
    store: RecordStore | None = None,
    fresh: bool = False,
    progress: Callable[[Cell, int, int, bool], None] | None = None,
) -> list[Record]:
    """All records of the comparison, in plan order.

    ``progress(cell, number, total, stored)`` is called before each cell. Ctrl-C between or within cells loses only the
    cell under way. Raises ValueError for unknown methods and budgets outside (0, 1].
    """
    module = bench(family)
    known = module.methods()
    names = list(methods) if methods else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method '{name}' in {family}; known: {', '.join(known)}")
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a fraction of the full cache, above 0 and at most 1; got {budget}")
    if seeds < 1:
        raise ValueError("seeds must be at least 1")
    store = store or RecordStore(home() / "records" / f"{family}.jsonl")
    done = {} if fresh else store.cells()
    cells = plan(names, list(budgets), seeds)
    records: list[Record] = []
    for number, cell in enumerate(cells):
        seeded = replace(workload, seed=cell.seed)
        key = cell_key(
            family=family,
            method=cell.method,
            parameters=known[cell.method].parameters,
            budget=cell.budget,
            workload=module.workload_key(seeded),
            model=identity(seeded.model),
            source=source_digest(family),
        )
        if progress:
            progress(cell, number, len(cells), key in done)
        if key not in done:
            done[key] = module.measure(cell.method, known[cell.method], seeded, cell.budget)
            store.add(key, done[key])
        records += done[key]
    return records
