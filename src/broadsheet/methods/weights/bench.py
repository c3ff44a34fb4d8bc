"""The bench of the weights family: one calibration set, one evaluation, quality against what is really stored.

A budget is bits a weight of the decoder blocks' linear layers. By custom "4 bits" leaves room for scales: a method may store
up to a quarter of a bit more than the budget says, which is what groups of 128 with a 16-bit scale and zero cost. What is
reported is what the tensors take. Every compressed model is saved, and what is evaluated is what loads from the folder.

Quality is computed in float32 with the weights as stored, so that the reference's own rounding does not hide small losses;
time and memory are those of the 16-bit model.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from broadsheet import resolve
from broadsheet.catalogue import papers
from broadsheet.core.microworld.encoding import IGNORE, encode_session, padded
from broadsheet.core.microworld.tasks import TASKS, make_sessions
from broadsheet.core.models import cache_of, fingerprint, load, with_cache
from broadsheet.core.models.outliers import inject_input_outliers
from broadsheet.core.numerics.ledger import PeakBytes
from broadsheet.core.records import Record, now, provenance
from broadsheet.core.stats import bootstrap_ci
from broadsheet.core.texts import pieces
from broadsheet.core.view import Quality, View

from .base import Unreachable, WeightMethod, shapes, size
from .quantiser import check_target, save

BENCH = "weights"
#: bits a weight that a budget leaves for scales, zeros and the like
ROOM = 0.25
#: bytes that the reference's predictions may take, else they are computed again for every method
REMEMBERED = 2**29

VIEW = View(
    reference="bf16",
    reference_name="the bf16 model",
    qualities=(Quality("kl", "KL to the bf16 model (nats per token)", False),),
    columns=(
        ("KL", "kl"),
        ("accuracy", "accuracy"),
        ("perplexity", "perplexity"),
        ("disk MB", "disk_bytes"),
        ("held MB", "held_bytes"),
        ("peak MB", "peak_bytes"),
        ("tokens/s", "tokens_per_s"),
        ("prefill ×", "prefill_time_ratio"),
        ("decode ×", "decode_time_ratio"),
    ),
    price="bits",
    price_head="bits",
    price_label="bits a weight of the linear layers, everything stored counted",
    price_digits=2,
    ticks=tuple((bits, f"{bits:g}") for bits in (1, 2, 3, 4, 6, 8, 16)),
    least="cannot go below {} bits here",
    budgets=(2.0, 3.0, 4.0, 8.0),
    top=16.0,
    budget_name="bits a weight (a quarter of a bit more is allowed for scales)",
    unbudgeted="–",
    note="Ranked by KL to the bf16 model within a budget. Bits count all that is stored for the linear layers of the "
    "decoder blocks; a budget leaves a quarter of a bit for scales. MB are of the whole model: on disk, held in memory, and "
    "held at the peak of a decode step. Intervals are 95 % bootstrap intervals over sequences; times are medians of "
    "alternated runs.",
)

#: What every paper is compared with: name -> (class, its parameters).
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("broadsheet.methods.weights.uncompressed:Uncompressed", {}),
    "rtn": ("broadsheet.methods.weights.rtn:RTN", {}),
    "gptq": ("broadsheet.methods.weights.gptq:GPTQ", {}),
    "awq": ("broadsheet.methods.weights.awq:AWQ", {}),
    "hqq": ("broadsheet.methods.weights.hqq:HQQ", {}),
    "aqlm": ("broadsheet.methods.weights.aqlm:AQLM", {}),
    "smoothquant": ("broadsheet.methods.weights.smoothquant:SmoothQuant", {}),
}
#: What people use already, run as it is: name -> (class, parameters, the package it needs).
PEERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "torchao": ("broadsheet.methods.weights.peers:TorchAO", {}, "torchao"),
}


def methods() -> dict[str, WeightMethod]:
    """Every method of the family by name: baselines, the peers that are installed, running papers."""
    found = {name: resolve(target)(**parameters) for name, (target, parameters) in BASELINES.items()}
    for name, (target, parameters, package) in PEERS.items():
        if find_spec(package):
            found[name] = resolve(target)(**parameters)
    for slug, paper in papers().items():
        if paper.family == BENCH and paper.method:
            made = resolve(paper.method)
            if isinstance(made, type) and issubclass(made, WeightMethod):
                found[slug] = made()
    return found


@dataclass(frozen=True)
class Workload:
    """One seeded piece of work; equal workloads are equal work.

    ``seed`` draws the calibration set: ``samples`` of ``tokens`` tokens. The evaluation never changes: ``sessions`` of every
    task, of ``context_tokens`` tokens and ``turns`` questions, of which the answers are scored; or, with ``text`` (a text
    file or a JSON list of texts), as many pieces of ``tokens`` tokens as ``sessions`` times the number of tasks, scored in
    full. Calibration pieces and evaluated ones are never the same. ``outliers``: multiply ``outlier_channels`` channels of
    every norm's output by this factor first, in a way that leaves the function as it is; ``outliers_adjacent``: in pairs of
    neighbours.
    """

    model: str = "pocket-2m"
    seed: int = 0
    samples: int = 64
    tokens: int = 256
    text: str = ""
    tasks: tuple[str, ...] = ("kv", "vt", "many_shot", "arithmetic", "facts", "functions")
    sessions: int = 12
    context_tokens: int = 256
    turns: int = 5
    outliers: float = 1.0
    outlier_channels: int = 4
    outliers_adjacent: bool = False
    device: str = "cpu"
    timing: bool = True

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"unknown task '{task}'; known: {', '.join(TASKS)}")
        if min(self.samples, self.sessions, self.turns) < 1 or self.tokens < 2:
            raise ValueError("samples, sessions and turns must be at least 1, tokens at least 2")
        if not self.outliers >= 1:
            raise ValueError(f"outliers is the factor by which channels are scaled up, at least 1; got {self.outliers}")


def workload_key(workload: Workload) -> dict[str, Any]:
    """What identifies a workload in stored cells."""
    return asdict(workload)


# --- the model, what it is calibrated on, what it is scored on ----------------------------------------------------


def base_model(workload: Workload) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The 16-bit model that a workload compresses, its tokenizer, its fingerprint before outliers were put in."""
    planted = (workload.outliers, workload.outlier_channels, workload.outliers_adjacent)
    return _base_model(workload.model, workload.device, *planted)


@lru_cache(maxsize=1)
def _base_model(
    name: str, device: str, outliers: float, channels: int, adjacent: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    model, tokenizer = load(name, dtype=torch.bfloat16, device=device)
    mark = fingerprint(model)
    if outliers > 1:
        inject_input_outliers(model, outliers, channels, same=True, adjacent=adjacent)
    return model, tokenizer, mark


def calibration(workload: Workload, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [samples, tokens] of the workload's seed."""
    if workload.text:
        found = _text(workload, tokenizer)[_evaluated(workload) :]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(workload.seed))
        return found[order[: workload.samples]]
    stream: list[int] = []
    number = 0
    while len(stream) < workload.samples * workload.tokens:
        for task in TASKS:  # all of them: what will be asked is not known when a model is calibrated
            session = make_sessions(
                task, 1, workload.context_tokens, workload.turns, f"calibration/{workload.seed}/{number}"
            )
            stream += encode_session(session[0], tokenizer)[0]
        number += 1
    return torch.tensor(stream[: workload.samples * workload.tokens]).reshape(workload.samples, workload.tokens)


def _evaluated(workload: Workload) -> int:
    return workload.sessions * len(workload.tasks)


def _text(workload: Workload, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All pieces of the text, the first of which are for evaluation."""
    found = pieces(workload.text, tokenizer, workload.tokens)
    wanted = _evaluated(workload) + workload.samples
    if len(found) < wanted:
        raise ValueError(
            f"{workload.text} holds {len(found)} pieces of {workload.tokens} tokens, {wanted} are needed: lower --sessions, "
            "-o samples or -o tokens"
        )
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


#: task, token ids and labels, both [rows, tokens]
Batch = tuple[str, torch.Tensor, torch.Tensor]
#: by the number of a batch the log-probabilities [scored tokens, vocabulary] of each of its rows
Reference = Callable[[int], list[torch.Tensor]]


def evaluation(workload: Workload, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """What is scored, in batches; the same for every seed."""
    batches: list[Batch] = []
    if workload.text:
        ids = _text(workload, tokenizer)[: _evaluated(workload)]
        labels = ids.clone()
        labels[:, 0] = IGNORE
        return [("text", some, marks) for some, marks in zip(ids.split(8), labels.split(8), strict=True)]
    for task in workload.tasks:
        sessions = make_sessions(task, workload.sessions, workload.context_tokens, workload.turns, "evaluation")
        rows = sorted((encode_session(session, tokenizer) for session in sessions), key=lambda row: len(row[0]))
        for first in range(0, len(rows), 8):
            batches.append((task, *padded(rows[first : first + 8], tokenizer.pad_token_id)))
    return batches


@dataclass(frozen=True)
class Scored:
    """One sequence: its mean negative log-likelihood and KL to the reference over the ``scored`` tokens, and which answers
    were right in full, each token being the likeliest (so that greedy decoding would have given them)."""

    task: str
    nll: float
    kl: float
    scored: int
    answers: tuple[bool, ...]


@torch.inference_mode()
def score(model: PreTrainedModel, reference: Reference, batches: list[Batch]) -> list[Scored]:
    """Every sequence of ``batches`` under ``model``, beside ``reference``."""
    results = []
    for number, (task, _, labels) in enumerate(batches):
        theirs = iter(reference(number))
        for some, wanted in zip(_predictions(model, batches[number]), labels[:, 1:]):
            places = (wanted != IGNORE).nonzero().flatten()
            true, target = next(theirs), wanted[places].to(some.device)
            kl = (true.exp() * (true - some)).sum(-1).mean()
            hit = (some.argmax(-1) == target).tolist()
            answers = _runs(places.tolist(), hit) if task != "text" else ()
            results.append(Scored(task, float(F.nll_loss(some, target)), float(kl), len(places), answers))
    return results


def _predictions(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """Log-probabilities [scored tokens, vocabulary] before each scored token, of every row."""
    _, ids, labels = batch
    logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]
    marked = (labels[:, 1:] != IGNORE).to(model.device)
    return [row[scored].float().log_softmax(-1) for row, scored in zip(logits, marked)]


def reference_of(workload: Workload) -> Reference:
    """What the 16-bit model predicts, computed in float32: remembered where it is small, since every method needs it."""
    return _reference(replace(workload, seed=0, samples=1, timing=False))


@lru_cache(maxsize=1)
def _reference(workload: Workload) -> Reference:
    model, tokenizer, _ = base_model(workload)
    model, batches = copy.deepcopy(model).float(), evaluation(workload, tokenizer)
    predictions = torch.inference_mode()(lambda number: _predictions(model, batches[number]))
    scored = sum(int((labels != IGNORE).sum()) for _, _, labels in batches)
    if scored * model.config.get_text_config().vocab_size * 4 > REMEMBERED:
        return predictions
    return [predictions(number) for number in range(len(batches))].__getitem__


def _runs(places: list[int], hit: list[bool]) -> tuple[bool, ...]:
    """For every run of consecutive places whether all of it was hit."""
    runs: list[bool] = []
    for index, place in enumerate(places):
        if index and place == places[index - 1] + 1:
            runs[-1] = runs[-1] and hit[index]
        else:
            runs.append(hit[index])
    return tuple(runs)


# --- measuring --------------------------------------------------------------------------------------------------------


def at_size(method: WeightMethod, workload: Workload, nbytes: int) -> WeightMethod:
    """The method's best within ``nbytes`` for all tensors of the workload's model. Raises ValueError with the least."""
    model, *_ = base_model(workload)
    held, layers = size(model), shapes(model)
    rest = held.bytes - round(held.bits * held.weights / 8)  # embeddings, norms: what no method touches
    try:
        return method.at_budget(max(0.0, 8 * (nbytes - rest) / held.weights), layers)
    except Unreachable as error:
        least = rest + error.least * held.weights / 8
        raise ValueError(
            f"size must be at least {least / 1e6:.2f} MB with this method ({rest / 1e6:.2f} MB are embeddings, norms and "
            f"what else it leaves alone), got {nbytes / 1e6:.2f} MB"
        ) from None


def measure(
    name: str, method: WeightMethod, workload: Workload, budget: float | None = None, out: str | Path | None = None
) -> list[Record]:
    """Compresses the model by one method and returns what was measured.

    ``budget``: bits a weight; None takes the method as it is. A budget that the method cannot reach gives a single record
    ``reachable`` = 0 with the least bits in its setting. ``out``: a folder that keeps the compressed model with its
    tokenizer.
    """
    if out is not None:
        check_target(Path(out))
    model, tokenizer, mark = base_model(workload)
    make = _Maker(name, method, workload, budget, mark)
    try:
        fitted = method if budget is None else method.at_budget(budget + ROOM, shapes(model))
    except Unreachable as error:
        return [make("reachable", 0.0, setting={"least": round(error.least, 4)})]
    make.method = fitted
    return list(_measured(make, fitted, workload, model, tokenizer, out))


def _measured(
    make: _Maker,
    method: WeightMethod,
    workload: Workload,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path | None,
) -> Iterator[Record]:
    start = time.perf_counter()
    small = method.compress(copy.deepcopy(model), calibration(workload, tokenizer) if method.calibrated else None)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        small(torch.zeros(1, 1, dtype=torch.long, device=small.device))  # what a method holds between steps is there now
    held = size(small)
    yield make("reachable", 1.0)
    yield make("bits", held.bits, unit="bits per weight", n=held.weights)
    yield make("held_bytes", held.bytes, unit="bytes of the whole model in memory")
    yield make("bytes_ratio", held.bytes / size(model).bytes, unit="of the bf16 model")
    yield make("compress", seconds, unit="s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(small, out or Path(temporary) / "model", tokenizer if out else None)
        names = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
        yield make("disk_bytes", sum(file.stat().st_size for file in names), unit="bytes of the weights' files")
        wide: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wide.to(workload.device)
        results = score(wide.eval(), reference_of(workload), evaluation(workload, tokenizer))
        del wide
    yield from _quality(make, results)
    if workload.timing:
        yield from _cost(make, small, model)


def _quality(make: _Maker, results: list[Scored]) -> Iterator[Record]:
    losses, divergences = [r.nll for r in results], [r.kl for r in results]
    mean, (low, high) = statistics.mean(losses), bootstrap_ci(losses)
    interval = (math.exp(low), math.exp(high))
    yield make("perplexity", math.exp(mean), ci=interval, n=len(results), unit="per scored token")
    yield make("kl", statistics.mean(divergences), ci=bootstrap_ci(divergences), n=len(results), unit="nats per token")
    for task in (None, *dict.fromkeys(r.task for r in results)):
        some = [r for r in results if task in (None, r.task)]
        right = [float(answer) for r in some for answer in r.answers]
        if right:
            groups = [index for index, r in enumerate(some) for _ in r.answers]
            setting = {} if task is None else {"task": task}
            yield make("accuracy", statistics.mean(right), ci=bootstrap_ci(right, groups), n=len(right), setting=setting)


@torch.inference_mode()
def _cost(make: _Maker, small: PreTrainedModel, model: PreTrainedModel) -> Iterator[Record]:
    """Bytes at the peak of a decode step, and time over the bf16 model's, measured alternately on the same tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, 128), generator=torch.Generator().manual_seed(0)).to(model.device)

    def once(which: PreTrainedModel) -> tuple[float, float]:
        start = time.perf_counter()
        cache = cache_of(which(ids, use_cache=True, logits_to_keep=1))
        middle = time.perf_counter()
        for _ in range(8):
            which(ids[:, :1], **with_cache(cache))
        return middle - start, (time.perf_counter() - middle) / 8

    once(model), once(small)
    pairs = [(once(model), once(small)) for _ in range(5)]
    for index, metric in enumerate(("prefill_time_ratio", "decode_time_ratio")):
        ratios = sorted(ours[index] / reference[index] for reference, ours in pairs)
        yield make(
            metric, statistics.median(ratios), ci=(ratios[0], ratios[-1]), unit="of the bf16 model's time", n=len(ratios)
        )
    yield make("tokens_per_s", 1 / statistics.median(ours[1] for _, ours in pairs), unit="tokens/s, batch 1")
    cache = cache_of(small(ids[:, :8], use_cache=True))
    with PeakBytes() as meter:
        small(ids[:, :1], **with_cache(cache))
    yield make("peak_bytes", size(small).bytes + meter.peak, unit="bytes held at the peak of a decode step")


@dataclass
class _Maker:
    """Fills in what all records of a cell share."""

    name: str
    method: WeightMethod
    workload: Workload
    budget: float | None
    mark: str

    def __call__(self, metric: str, value: float, **fields: Any) -> Record:
        budget = {} if self.budget is None else {"budget": self.budget}
        outliers = {"outliers": self.workload.outliers} if self.workload.outliers > 1 else {}
        model = self.workload.model
        return Record(
            paper=self.name if self.name in papers() else "",
            method=self.name,
            bench=BENCH,
            metric=metric,
            value=value,
            seed=self.workload.seed,
            model=f"{Path(model).name if Path(model).is_dir() else model}@{self.mark}",
            parameters={**self.method.parameters, **outliers},
            setting={**budget, **fields.pop("setting", {})},
            device=self.workload.device,
            time=now(),
            **provenance(),
            **fields,
        )
