"""Runs a family's bench over methods, budgets and seeds; finished cells are kept and never run twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import broadsheet
from broadsheet.catalogue import FAMILIES
from broadsheet.core.models import identity
from broadsheet.core.records import Record, RecordStore, cell_key, home, source_digest


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


def taken(module: ModuleType, **optional: Any) -> dict[str, Any]:
    """Those of the optional arguments that the family's ``measure`` takes."""
    return {name: value for name, value in optional.items() if value and name in signature(module.measure).parameters}


def plan(methods: Mapping[str, bool], budgets: Sequence[float], seeds: int) -> list[Cell]:
    """Cells in an order that fills the table evenly. ``methods``: name -> whether it has budgets; those that have none (the
    reference, for one) run once a seed, before the others."""
    cells = []
    for seed in range(seeds):
        cells += [Cell(name, None, seed) for name, budgeted in methods.items() if not budgeted]
        for budget in budgets:
            cells += [Cell(name, budget, seed) for name, budgeted in methods.items() if budgeted]
    return cells


def store_of(family: str) -> RecordStore:
    """Where a family's finished cells are kept, whoever measured them."""
    return RecordStore(home() / "records" / f"{family}.jsonl")


def key_of(family: str, cell: Cell, method: Any, workload: Any) -> str:
    """The key of a cell in its store: changes with everything that its numbers depend on."""
    return cell_key(
        family=family,
        method=cell.method,
        parameters=method.parameters,
        budget=cell.budget,
        workload=bench(family).workload_key(workload),
        model=identity(workload.model),
        source=source_digest(family),
    )


def compare(
    family: str,
    workload: Any,
    methods: Sequence[str] | None = None,
    budgets: Sequence[float] | None = None,
    seeds: int = 1,
    store: RecordStore | None = None,
    fresh: bool = False,
    progress: Callable[[Cell, int, int, bool], None] | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """All records of the comparison, in plan order.

    ``progress(cell, number, total, stored)`` is called before each cell, ``tick(done, total)`` within one where the family
    says how far it is. Ctrl-C between or within cells loses only the
    cell under way. Raises ValueError for unknown methods and budgets that cannot be meant.
    """
    module = bench(family)
    known = module.methods()
    names = list(methods) if methods else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method '{name}' in {family}; known: {', '.join(known)}")
    budgets = module.VIEW.budgets if budgets is None else budgets
    for budget in budgets:
        module.VIEW.check_budget(budget)
    if seeds < 1:
        raise ValueError("seeds must be at least 1")
    store = store or store_of(family)
    done = {} if fresh else store.cells()
    cells = plan({name: known[name].budgeted for name in names}, budgets, seeds)
    records: list[Record] = []
    for number, cell in enumerate(cells):
        seeded = replace(workload, seed=cell.seed)
        key = key_of(family, cell, known[cell.method], seeded)
        if progress:
            progress(cell, number, len(cells), key in done)
        if key not in done:
            done[key] = module.measure(cell.method, known[cell.method], seeded, cell.budget, **taken(module, tick=tick))
            store.add(key, done[key])
        records += done[key]
    return records
