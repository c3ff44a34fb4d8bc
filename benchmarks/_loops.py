"""What the studies of loops share: the command line, records with intervals, IFEval's prompts."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broadsheet.core.constraints.ifeval import load_ifeval
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.ifeval_world import Prompt, prompts

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("BROADSHEET_SHARED", ROOT.parent / "shared"))


@dataclass
class Study:
    """One run: records of a paper's study in the SIMULATED world, one a cell and seed."""

    name: str
    paper: str
    arguments: argparse.Namespace
    records: list[Record] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, paper: str, description: str | None, items: int) -> Study:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--items", type=int, default=items, help="items a cell and seed (default %(default)s)")
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument(
            "--ifeval", default=str(SHARED / "data" / "ifeval"), help="IFEval's prompts; left out if missing"
        )
        parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / f"{name.replace('-', '_')}.records.json"))
        print("SIMULATED: writer and critic are instruments with known rates")
        return cls(name, paper, parser.parse_args())

    def ifeval(self) -> list[Prompt]:
        """The prompts of IFEval that the world can answer; none where the file is missing."""
        return prompts(load_ifeval(self.arguments.ifeval)) if Path(self.arguments.ifeval).exists() else []

    def add(
        self, method: str, metric: str, values: Sequence[float], seed: int, parameters: Any = None, **setting: Any
    ) -> None:
        """One record: the mean of ``values`` with a bootstrap interval."""
        self._add(method, metric, statistics.fmean(values), bootstrap_ci(values), len(values), seed, parameters, setting)

    def exact(self, method: str, metric: str, value: float, **setting: Any) -> None:
        """One record of a number that is computed."""
        self._add(method, metric, value, None, 1, 0, None, setting)

    def _add(
        self, method: str, metric: str, value: float, ci: tuple[float, float] | None, n: int, seed: int, parameters: Any,
        setting: dict[str, Any],
    ) -> None:  # fmt: skip
        self.records.append(
            Record(
                paper=self.paper, method=method, bench=self.name, metric=metric, value=value, ci=ci, n=n, seed=seed,
                model="sim:exact" if ci is None else "sim:world", parameters=parameters or {}, setting=setting, time=now(),
                **provenance(),
            )
        )  # fmt: skip
        where = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"{metric:<22} {method:<18} {where:<58} seed {seed}: {value:.4g}", flush=True)

    def write(self) -> None:
        """All records so far; called after every seed, so that a kill costs one seed at most."""
        write_results(self.records, self.arguments.out)
