"""What the studies of single weight methods share: the bench's work, models compressed in memory, their records."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from broadsheet.core.models.walker import widened
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.weights.base import WeightMethod, size
from broadsheet.methods.weights.bench import Scored, Workload, base_model, calibration, evaluation, reference_of, score


def command(description: str | None, sessions: int, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all studies have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-2m", help="built-in name, folder or hub name")
    parser.add_argument("--text", default="", help="a text file; without it microworld sessions are used")
    parser.add_argument("--sessions", type=int, default=sessions, help="sessions a task, or pieces of the text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser


@dataclass
class Study:
    """One run of a study on one model."""

    name: str
    paper: str
    arguments: argparse.Namespace
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.set_num_threads(self.arguments.threads)
        disable_progress_bar()
        a = self.arguments
        work = Workload(model=a.model, text=a.text, sessions=a.sessions, timing=False)
        self.work = replace(work, tasks=work.tasks[:1]) if a.text else work

    def compressed(self, method: WeightMethod, seed: int, work: Workload | None = None) -> PreTrainedModel:
        work = work or self.work
        model, tokenizer, _ = base_model(work)
        ids = calibration(replace(work, seed=seed), tokenizer) if method.calibrated else None
        return method.compress(copy.deepcopy(model), ids)

    @torch.inference_mode()
    def scored(self, model: PreTrainedModel, work: Workload | None = None) -> list[Scored]:
        work = work or self.work
        with widened(model):
            return score(model, reference_of(work), evaluation(work, base_model(work)[1]))

    def add(self, method: str, seed: int, model: PreTrainedModel, results: Sequence[Scored], **setting: Any) -> None:
        """Perplexity, KL and (on sessions) accuracy of one model, with its bits and bytes in the setting."""
        held = size(model)
        setting = {"bytes": held.bytes, "bits": round(held.bits, 4), **setting}
        losses, divergences = [r.nll for r in results], [r.kl for r in results]
        low, high = bootstrap_ci(losses)
        self.record(
            method,
            "perplexity",
            math.exp(statistics.fmean(losses)),
            seed,
            len(results),
            (math.exp(low), math.exp(high)),
            **setting,
        )
        self.record(method, "kl", statistics.fmean(divergences), seed, len(results), bootstrap_ci(divergences), **setting)
        right = [float(answer) for r in results for answer in r.answers]
        if right:
            groups = [index for index, r in enumerate(results) for _ in r.answers]
            self.record(
                method, "accuracy", statistics.fmean(right), seed, len(right), bootstrap_ci(right, groups), **setting
            )

    def saved(self, method: str, seed: int, ours: Sequence[Scored], theirs: Sequence[Scored], **setting: Any) -> None:
        """By how much less ``ours`` loses on the same sequences, in nats a token."""
        value, interval = paired_difference([r.nll for r in theirs], [r.nll for r in ours])
        self.record(method, "loss_saved", value, seed, len(ours), interval, **setting)

    def record(
        self,
        method: str,
        metric: str,
        value: float,
        seed: int,
        n: int,
        ci: tuple[float, float] | None = None,
        **setting: Any,
    ) -> None:
        a, (_, _, mark) = self.arguments, base_model(self.work)
        self.records.append(
            Record(
                paper=self.paper, method=method, bench=self.name, metric=metric, value=value, ci=ci, n=n, seed=seed,
                model=f"{Path(a.model).name}@{mark}", setting=setting, time=now(), **provenance(),
            )  # type: ignore[arg-type]
        )  # fmt: skip
        where = " ".join(f"{key}={value}" for key, value in setting.items())
        shown = "" if ci is None else f" [{ci[0]:.4g}, {ci[1]:.4g}]"
        print(f"seed {seed} {metric:<11} {method:<12} {where:<50} {value:.4g}{shown}", flush=True)

    def finish(self) -> None:
        """Writes what there is; called after every seed, so that a kill loses at most the one under way."""
        name = f"{self.name.replace('-', '_')}.{Path(self.arguments.model).name}.records.json"
        write_results(self.records, Path(__file__).parent / "results" / name)
