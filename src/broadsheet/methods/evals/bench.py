"""The bench of the evals family: benchmarks score one chat model, loops are held to one another at equal calls.

A benchmark has no budget: its row is the model's score with its interval, what could not be read or was cut off, and what it
cost. A loop's budget is how many answers it may write for one prompt; its row is the share of prompts all of whose
constraints hold, judged by programs that the loop itself never sees. The model is any OpenAI-compatible endpoint or a local
one. Every answer goes through the ledger under BROADSHEET_HOME, so the same command goes on where it was stopped and pays
for nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from broadsheet import resolve
from broadsheet.catalogue import papers
from broadsheet.core.chat import Budget, Chat, Price, connect
from broadsheet.core.records import Record
from broadsheet.core.view import Quality, View

from .base import Benchmark, Report, Solver, records_of
from .decrim.requests import RealRequests
from .ifeval import IFEval

BENCH = "evals"

VIEW = View(
    reference="plain",
    reference_name="one answer",
    qualities=(Quality("score", "score"),),
    columns=(
        ("score", "score"),
        ("unparsed", "unparsed_share"),
        ("truncated", "truncated_share"),
        ("refused", "refused_share"),
        ("failed", "error_share"),
        ("calls", "calls"),
        ("tokens", "tokens"),
        ("USD", "money"),
        ("s in calls", "seconds"),
    ),
    price="answers",
    price_head="answers",
    price_label="answers written for a prompt",
    price_digits=1,
    ticks=tuple((count, f"{count:g}") for count in (1, 2, 4, 8, 16)),
    least="needs at least {} answers",
    budgets=(4.0,),
    top=1000.0,
    budget_name="answers that may be written for a prompt",
    unbudgeted="–",
    note="Benchmarks (no budget) score the model; each has a scale of its own, so ranks between them mean nothing. "
    "Loops are ranked within a budget of answers written for a prompt, by the share of prompts all of whose constraints "
    "hold, judged by programs. Answers that could not be read, were cut off, refused or failed score 0 and are counted. "
    "Intervals are 95 % bootstrap intervals over samples.",
)

#: What the papers' loops are compared with, and a benchmark that everybody knows: name -> (class, parameters).
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("broadsheet.methods.evals.decrim:Plain", {}),
    "repeat-constraints": ("broadsheet.methods.evals.decrim:RepeatConstraints", {}),
    "best-of-n": ("broadsheet.methods.evals.decrim:BestOf", {}),
    "self-refine": ("broadsheet.methods.evals.decrim:SelfRefine", {}),
    "ifeval": ("broadsheet.methods.evals.ifeval:IFEval", {}),
    "sequential-monitors": ("broadsheet.methods.evals.sequential_monitors:MonitorBench", {}),  # the monitor, as a benchmark
}

Method = Benchmark | Solver


def methods() -> dict[str, Method]:
    """Every benchmark and loop of the family by name: baselines, then running papers."""
    found: dict[str, Method] = {name: resolve(target)(**parameters) for name, (target, parameters) in BASELINES.items()}
    for slug, paper in papers().items():
        if paper.family == BENCH and paper.method:
            made = resolve(paper.method)
            if isinstance(made, type) and issubclass(made, Benchmark | Solver):
                found[slug] = made()
    return found


def benchmarks() -> dict[str, type[Benchmark]]:
    """The benchmarks' classes by name."""
    return {name: type(method) for name, method in methods().items() if isinstance(method, Benchmark)}


@dataclass(frozen=True)
class Workload:
    """Which model is asked, how much, and within which limits.

    ``model``: the URL of an OpenAI-compatible endpoint, or a local model (built-in name, folder, hub name); ``name``: which
    of an endpoint's models. ``limit``: samples of each benchmark, or prompts of each loop; 0 is all of them. ``prompts``:
    what loops are run on: a file of IFEval's form or of our own, or the built-in ones. ``calls``, ``tokens`` and ``money``
    (US dollars) are hard limits of one run; money needs the prices of a million tokens.
    """

    model: str = "pocket-2m"
    name: str = ""
    seed: int = 0
    limit: int = 50
    prompts: str = ""
    concurrency: int = 16
    calls: int | None = None
    tokens: int | None = None
    money: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.limit < 0 or self.concurrency < 1:
            raise ValueError("limit must be at least 0 (all), concurrency at least 1")
        if self.name and not re.match(r"https?://", self.model):
            raise ValueError("--model-name goes with --chat URL: it is one of the endpoint's models")


def workload_key(workload: Workload) -> dict[str, Any]:
    """What identifies a workload in stored cells: not how fast or within which limits it runs."""
    without = ("concurrency", "calls", "tokens", "money", "prompt_price", "completion_price")
    return {name: value for name, value in asdict(workload).items() if name not in without}


def _prompts(path: str) -> Benchmark:
    """What loops are run on: a file of IFEval's form or of `RealRequests`'s, else the built-in requests."""
    if path:
        try:
            with open(path, encoding="utf-8") as file:
                first = file.readline()
        except OSError as error:
            raise ValueError(f"cannot read the prompts at {path}: {error.strerror}") from None
        if "instruction_id_list" in first:
            return IFEval(path=path)
    return RealRequests(path=path)


@lru_cache(maxsize=2)
def _chat(workload: Workload) -> Chat:
    price = Price(workload.prompt_price, workload.completion_price)
    local = {} if workload.model.startswith("http") else {"device": workload.device}
    return connect(
        workload.model,
        workload.name,
        concurrency=workload.concurrency,
        price=price if any(asdict(price).values()) else None,
        budget=Budget(workload.calls, workload.tokens, workload.money),
        **local,
    )


def measure(
    name: str,
    method: Method,
    workload: Workload,
    budget: float | None = None,
    out: str | Path | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Scores the model by one benchmark, or improves its answers by one loop, and returns what was measured.

    ``budget``: answers that a loop may write for a prompt; None takes it as it is. ``out``: a folder for the transcript and,
    where Inspect is installed, a log for its viewer. ``tick(done, total)`` is called after each sample.
    """
    chat, limit = _chat(workload), workload.limit or None
    if isinstance(method, Solver):
        if budget is not None:
            method = method.at_budget(int(budget))
        work = _prompts(workload.prompts)
        report = method.evaluate(chat, work, limit, tick)
    else:
        work = method
        report = method.evaluate(chat, limit, tick)
    if out is not None:
        keep(report, work, name, Path(out))
    paper = name if name in papers() else ""
    setting = {} if budget is None else {"budget": budget}
    return records_of(report, work.primary, paper, name, method.parameters, workload.seed, **setting)


def keep(report: Report, work: Benchmark, name: str, folder: Path) -> None:
    """Writes the transcript and, where inspect-ai is installed, a log that `inspect view` opens."""
    report.write_transcript(folder / f"{name}.jsonl")
    try:
        from .inspect_tasks import write_log
    except ImportError:
        return
    write_log(report, work, folder / f"{name}.eval")
