"""The bench of the caches family: the same sessions and the same text for every method, at equal real bytes.

A budget is a fraction of the bytes of an uncompressed 16-bit cache of the same prompt. A method is configured by its
``at_budget``; what is reported as its size is what it then really held. A method that cannot get down to a budget is
listed as such and not compared there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet import resolve
from broadsheet.catalogue import papers
from broadsheet.core.models import fingerprint, load, with_cache
from broadsheet.core.records import Record, now, provenance
from broadsheet.core.stats import bootstrap_ci
from broadsheet.core.texts import documents
from broadsheet.core.view import Quality, View

from .base import CacheMethod, Geometry, Unreachable
from .full import Full
from .peers import BITS, Backend, TransformersQuantized
from .scbench import GROUPS, MODES, SessionRunner, TurnResult, load_sessions

BENCH = "caches"

VIEW = View(
    reference="full",
    reference_name="full cache",
    qualities=(Quality("accuracy", "accuracy"), Quality("kl", "KL to the full cache (nats per token)", False)),
    columns=(
        ("gold NLL", "gold_nll"),
        ("KL", "kl"),
        ("perplexity", "perplexity"),
        ("prefill ×", "prefill_time_ratio"),
        ("decode ×", "decode_time_ratio"),
    ),
    price="bytes_ratio",
    price_head="bytes",
    price_label="bytes really held / bytes of the full 16-bit cache",
    price_digits=3,
    ticks=((1, "1"), (1 / 2, "1/2"), (1 / 4, "1/4"), (1 / 8, "1/8"), (1 / 16, "1/16")),
    least="cannot go below {} of the full cache here",
    budgets=(0.5, 0.25, 0.125),
    top=1.0,
    budget_name="a fraction of the full cache's bytes",
    unbudgeted="full",
    note="Ranked by quality within a budget. Bytes are those really held after the prompt, over those of an uncompressed "
    "16-bit cache; intervals are 95 % bootstrap intervals over sessions; times are medians of alternated runs.",
)

#: What every paper is compared with: name -> (class, its parameters, the reference).
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("broadsheet.methods.caches.full:Full", {}),
    "streaming-llm": ("broadsheet.methods.caches.streaming_llm:StreamingLLM", {}),
    "h2o": ("broadsheet.methods.caches.h2o:H2O", {}),
    "snapkv": ("broadsheet.methods.caches.snapkv:SnapKV", {}),
    "kivi": ("broadsheet.methods.caches.kivi:KIVI", {}),
}
#: What people use already, run as it is: name -> (backend of transformers' `QuantizedCache`, the package it needs).
PEERS: dict[str, tuple[Backend, str]] = {
    "transformers-fp8": ("fp8", ""),
    "transformers-quanto": ("quanto", "optimum"),
    "transformers-hqq": ("hqq", "hqq"),
}
#: Forms of a paper's method that enter the table on their own: name -> (slug, parameters).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gear-l": ("gear", {"sparsity": 0.0}),
    "xquant-cl": ("xquant", {"cross_layer": True}),
}


def methods() -> dict[str, CacheMethod]:
    """Every method of the family by name: baselines, the peers that are installed, running papers, their variants."""
    found = {name: resolve(target)(**parameters) for name, (target, parameters) in BASELINES.items()}
    for name, (backend, package) in PEERS.items():
        if not package or find_spec(package):
            found[name] = TransformersQuantized(backend=backend, bits=min(BITS[backend], key=lambda bits: abs(bits - 4)))
    running = {p.slug: p for p in papers().values() if p.family == "caches" and p.method}
    for slug, paper in running.items():
        made = resolve(paper.method)
        if isinstance(made, type) and issubclass(made, CacheMethod):
            found[slug] = made()
    for name, (slug, parameters) in VARIANTS.items():
        if slug in found:
            found[name] = replace(found[slug], **parameters)
    return found


@dataclass(frozen=True)
class Workload:
    """One seeded piece of work; equal workloads are equal work.

    ``sessions`` per task and mode, of ``context_tokens`` tokens (of the pocket tokenizer) and ``turns`` questions. With
    ``text`` (a text file or a JSON list of texts), documents of it are used instead: ``prefix`` tokens are cached, the next
    ``continuation`` are scored.
    ``data``: official SCBench records (file, folder or hub name) instead of generated sessions. ``kl``: let the full cache
    read along in sessions and record the KL to it on the gold answers (twice the work).
    """

    model: str = "pocket-2m"
    seed: int = 0
    tasks: tuple[str, ...] = ("kv", "vt", "many_shot")
    modes: tuple[str, ...] = MODES
    sessions: int = 6
    context_tokens: int = 512
    turns: int = 5
    golden: bool = True
    data: str = ""
    text: str = ""
    prefix: int = 256
    continuation: int = 128
    device: str = "cpu"
    timing: bool = True
    kl: bool = False

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown mode '{mode}'; choose {' or '.join(MODES)}")
        if self.sessions < 1 or self.turns < 1:
            raise ValueError("sessions and turns must be at least 1")


@lru_cache(maxsize=1)
def _model(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    model, tokenizer = load(name, device=device)
    return model, tokenizer, fingerprint(model)


def measure(name: str, method: CacheMethod, workload: Workload, budget: float | None = None) -> list[Record]:
    """Runs one method on one workload and returns its records.

    ``budget``: fraction of the full cache's 16-bit bytes; None takes the method as it is. A budget that the method cannot
    reach gives a single record ``reachable`` = 0 with the least fraction in its setting.
    """
    model, tokenizer, mark = _model(workload.model, workload.device)
    make = _Maker(name, method, workload, budget, mark)
    geometry = Geometry.of(model.config)
    try:
        runs = _text_runs if workload.text else _session_runs
        return list(runs(make, method, workload, budget, model, tokenizer, geometry))
    except Unreachable as error:
        return [make("reachable", 0.0, setting={"least": round(error.least, 4)})]


def _short(model: str) -> str:
    """A folder by its last name: where it lies on this machine is nobody's business."""
    return Path(model).name if Path(model).is_dir() else model


@dataclass
class _Maker:
    """Fills in what all records of a cell share."""

    name: str
    method: CacheMethod
    workload: Workload
    budget: float | None
    mark: str

    def __call__(self, metric: str, value: float, **fields: Any) -> Record:
        budget = {} if self.budget is None else {"budget": self.budget}
        setting = {**budget, **fields.pop("setting", {})}
        slug = VARIANTS[self.name][0] if self.name in VARIANTS else self.name
        return Record(
            paper=slug if slug in papers() else "",
            method=self.name,
            bench=BENCH,
            metric=metric,
            value=value,
            seed=self.workload.seed,
            model=f"{_short(self.workload.model)}@{self.mark}",
            parameters=fields.pop("parameters", self.method.parameters),
            setting=setting,
            device=self.workload.device,
            time=now(),
            **provenance(),
            **fields,
        )


# --- sessions ---------------------------------------------------------------------------------------------------


def _session_runs(
    make: _Maker,
    method: CacheMethod,
    workload: Workload,
    budget: float | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
) -> Iterator[Record]:
    results: list[TurnResult] = []
    ratios: list[float] = []
    seconds, lost = 0.0, 0
    fitted = method
    for task in workload.tasks:
        sessions = load_sessions(
            task, workload.sessions, workload.context_tokens, workload.turns, workload.seed, workload.data or None
        )
        if budget is not None:
            lengths = [len(tokenizer(session.context)["input_ids"]) for session in sessions]
            fitted = method.at_budget(budget, int(statistics.median(lengths)), geometry)
        for mode in workload.modes:
            runner = SessionRunner(
                model, tokenizer, fitted, golden=workload.golden, reference=Full() if workload.kl else None
            )
            start = time.perf_counter()
            played: list[TurnResult] = []
            for first in range(0, len(sessions), 8):
                played += runner.run(sessions[first : first + 8], mode)
            seconds += time.perf_counter() - start
            lost += runner.unanswerable
            results += played
            held = {result.session: result.cache_bytes for result in played}
            tokens = {result.session: result.prompt_tokens for result in played}
            ratios += [held[key] / geometry.full_bytes(tokens[key]) for key in held]
    if not results:
        raise ValueError(
            f"{workload.model} has too few positions: the answers are cut out of every context; lower --context"
        )
    make.method = fitted
    yield make("reachable", 1.0)
    yield make("bytes_ratio", statistics.mean(ratios), unit="of full 16-bit cache", n=len(ratios))
    yield make("bytes", statistics.mean(r.cache_bytes for r in results), unit="bytes per session", n=len(ratios))
    for setting, chosen in _slices(results, workload):
        groups = [(r.session, r.mode) for r in chosen]
        scores = [r.score for r in chosen]
        yield make("accuracy", statistics.mean(scores), ci=bootstrap_ci(scores, groups), n=len(scores), setting=setting)
    yield make("strict", statistics.mean(r.strict for r in results), n=len(results))
    losses = [r.gold_nll for r in results if r.gold_nll is not None]
    if losses:
        yield make("gold_nll", statistics.mean(losses), unit="nats per token", n=len(losses))
    if workload.kl:
        groups = [(r.session, r.mode) for r in results]
        divergences = [r.kl or 0.0 for r in results]
        interval = bootstrap_ci(divergences, groups)
        yield make("kl", statistics.mean(divergences), ci=interval, n=len(results), unit="nats per token")
    yield make("answer_tokens", statistics.mean(r.new_tokens for r in results), unit="tokens", n=len(results))
    if lost:
        yield make("unanswerable", lost, unit="questions whose answer was cut out of the context; not scored")
    yield make("wall", seconds, unit="s")
    if workload.timing:
        typical = int(statistics.median(r.prompt_tokens for r in results))
        yield from _timing(make, fitted, typical, model)


def _slices(results: list[TurnResult], workload: Workload) -> Iterator[tuple[dict[str, Any], list[TurnResult]]]:
    """All results; by mode; by group; by task, mode and turn."""
    yield {}, results
    for mode in workload.modes:
        of_mode = [r for r in results if r.mode == mode]
        yield {"mode": mode}, of_mode
        for turn in sorted({r.turn for r in of_mode}):
            yield {"mode": mode, "turn": turn}, [r for r in of_mode if r.turn == turn]
        for task in workload.tasks:
            of_task = [r for r in of_mode if r.task == task]
            yield {"mode": mode, "task": task}, of_task
            for turn in sorted({r.turn for r in of_task}):
                yield {"mode": mode, "task": task, "turn": turn}, [r for r in of_task if r.turn == turn]
    for group in dict.fromkeys(GROUPS.get(task, task) for task in workload.tasks):
        yield {"group": group}, [r for r in results if GROUPS.get(r.task, r.task) == group]


# --- text: perplexity and KL to the full cache --------------------------------------------------------------------


@torch.inference_mode()
def likelihood(
    method: CacheMethod, model: PreTrainedModel, ids: torch.Tensor, prefix: int, step: int = 16
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prefills ``prefix`` tokens of ``ids`` [batch, T], then feeds the rest ``step`` tokens at a time.

    Returns the negative log-likelihood of tokens prefix+1 .. T-1 [batch, T - prefix - 1], their log-probabilities
    [batch, T - prefix - 1, vocabulary], and the bytes held when the prefix had been compressed.
    """
    cache = method.cache(model, dtype=torch.bfloat16)
    model(ids[:, :prefix], **with_cache(cache))
    size = cache.nbytes
    parts = []
    for first in range(prefix, ids.shape[1] - 1, step):
        last = min(first + step, ids.shape[1] - 1)
        parts.append(model(ids[:, first:last], **with_cache(cache)).logits.float().log_softmax(-1))
    log_probs = torch.cat(parts, 1)
    nll = F.nll_loss(log_probs.transpose(1, 2), ids[:, prefix + 1 :], reduction="none")
    return nll, log_probs, size


def _text_runs(
    make: _Maker,
    method: CacheMethod,
    workload: Workload,
    budget: float | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    geometry: Geometry,
) -> Iterator[Record]:
    fitted = method if budget is None else method.at_budget(budget, workload.prefix, geometry)
    make.method = fitted
    length = workload.prefix + workload.continuation
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20)
    if length > positions:
        raise ValueError(f"{workload.model} has {positions} positions; lower --prefix or --continuation")
    ids = documents(workload.text, tokenizer, length, workload.sessions, workload.seed).to(model.device)
    losses, divergences, sizes, rows = [], [], 0, 0
    start = time.perf_counter()
    for first in range(0, len(ids), 8):
        batch = ids[first : first + 8]
        nll, log_probs, size = likelihood(fitted, model, batch, workload.prefix)
        _, reference, _ = likelihood(Full(), model, batch, workload.prefix)
        kl = (reference.exp() * (reference - log_probs)).sum(-1)
        losses += nll.mean(1).tolist()
        divergences += kl.mean(1).tolist()
        sizes, rows = sizes + size, rows + len(batch)
    seconds = time.perf_counter() - start
    yield make("reachable", 1.0)
    full = geometry.full_bytes(workload.prefix)
    yield make("bytes_ratio", sizes / rows / full, unit="of full 16-bit cache", n=rows)
    yield make("bytes", sizes / rows, unit="bytes per document", n=rows)
    low, high = bootstrap_ci(losses)
    mean = statistics.mean(losses)
    yield make("perplexity", math.exp(mean), ci=(math.exp(low), math.exp(high)), n=rows, unit="per token")
    yield make("kl", statistics.mean(divergences), ci=bootstrap_ci(divergences), n=rows, unit="nats per token")
    yield make("wall", seconds, unit="s")
    if workload.timing:
        yield from _timing(make, fitted, workload.prefix, model)


# --- time, as ratios of things run alternately --------------------------------------------------------------------


@torch.inference_mode()
def _timing(make: _Maker, method: CacheMethod, tokens: int, model: PreTrainedModel) -> Iterator[Record]:
    """Prefill and decode time over the full cache's, measured alternately on the same tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    ids = ids.to(model.device)

    def once(which: CacheMethod) -> tuple[float, float]:
        cache = which.cache(model, dtype=torch.bfloat16)
        start = time.perf_counter()
        model(ids, **with_cache(cache), logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(4):
            model(ids[:, :1], **with_cache(cache))
        return middle - start, (time.perf_counter() - middle) / 4

    full = Full()
    once(full), once(method)
    pairs = [(once(full), once(method)) for _ in range(5)]
    for index, metric in enumerate(("prefill_time_ratio", "decode_time_ratio")):
        ratios = sorted(ours[index] / reference[index] for reference, ours in pairs)
        yield make(metric, statistics.median(ratios), ci=(ratios[0], ratios[-1]), unit="of full cache's time", n=len(ratios))


def workload_key(workload: Workload) -> dict[str, Any]:
    """What identifies a workload in stored cells."""
    return asdict(workload)
