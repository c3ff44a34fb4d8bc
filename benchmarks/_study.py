"""What the studies of single methods share: the work, its losses under a cache, records with intervals."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import fingerprint, load, with_cache
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.caches.base import CacheMethod
from broadsheet.methods.caches.bench import documents
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.scbench import encode

TASKS = ("kv", "vt", "many_shot")


@dataclass
class Item:
    """``prefix`` [1, n] is cached; then ``rest`` is fed in one pass, and its last ``scored`` tokens are scored."""

    prefix: torch.Tensor
    rest: torch.Tensor
    scored: int
    reference: torch.Tensor | None = None  #: log-probabilities under the full cache


@dataclass
class Outcome:
    """One value an item: loss and KL to the full cache in nats per scored token, whether all argmaxes are right, bytes."""

    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    exact: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)


@torch.inference_mode()
def play(model: PreTrainedModel, items: Sequence[Item], method: CacheMethod) -> Outcome:
    """Every item under ``method``; the first call on an item fixes its reference, so call it with `Full` first."""
    outcome = Outcome()
    for item in items:
        cache = method.cache(model, dtype=torch.bfloat16)
        model(item.prefix, **with_cache(cache), logits_to_keep=1)
        outcome.nbytes.append(cache.nbytes)
        logits = model(item.rest[:, :-1], **with_cache(cache)).logits[0, -item.scored :].float()
        log_probs, gold = logits.log_softmax(-1), item.rest[0, -item.scored :]
        if item.reference is None:
            item.reference = log_probs
        outcome.loss.append(-float(log_probs.gather(1, gold[:, None]).mean()))
        outcome.kl.append(float((item.reference.exp() * (item.reference - log_probs)).sum(-1).mean()))
        outcome.exact.append(float((logits.argmax(-1) == gold).all()))
    return outcome


def make_items(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, count: int, seed: int, continuation: int = 64
) -> list[Item]:
    """``count`` items: windows of the file ``text``, or, without one, the first question of microworld sessions."""
    if text:
        windows = documents(text, tokenizer, tokens + continuation, count, seed)
        return [Item(row[None, :tokens], row[None, tokens:], continuation - 1) for row in windows]
    items = []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        session = make_sessions(task, number // len(TASKS) + 1, tokens, 1, seed)[-1]
        prompt = encode(session, tokenizer)
        answer = prompt.answers[0]
        rest = torch.tensor([[*prompt.questions[0], *answer]])
        items.append(Item(torch.tensor([prompt.context]), rest, len(answer)))
    return items


@dataclass
class Study:
    """One run of a study on one model: command line, records, summaries."""

    name: str
    paper: str
    arguments: argparse.Namespace
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    records: list[Record] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, paper: str, description: str, tokens: int, items: int) -> Study:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--model", default="pocket-2m", help="built-in name, folder or hub name")
        parser.add_argument("--text", default="", help="a text file; without it microworld sessions are used")
        parser.add_argument("--tokens", type=int, default=tokens, help="tokens cached (default %(default)s)")
        parser.add_argument("--items", type=int, default=items, help="items a seed (default %(default)s)")
        parser.add_argument("--seeds", type=int, default=3)
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--out", default=str(Path(__file__).parent / "results" / f"{name}.records.json"))
        arguments = parser.parse_args()
        torch.set_num_threads(arguments.threads)
        model, tokenizer = load(arguments.model)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20)
        arguments.tokens = min(arguments.tokens, room - 128)
        return cls(name, paper, arguments, model, tokenizer)

    def items(self, seed: int) -> list[Item]:
        a = self.arguments
        return make_items(self.tokenizer, a.text, a.tokens, a.items, seed)

    def add(
        self, method: CacheMethod | None, label: str, metric: str, values: Sequence[float], unit: str = "", **setting: Any
    ) -> None:
        """One record: the mean of ``values`` with a bootstrap interval over them."""
        self._record(method, label, metric, statistics.fmean(values), bootstrap_ci(values), len(values), unit, setting)

    def compare(
        self,
        method: CacheMethod,
        label: str,
        metric: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        unit: str = "",
        **setting: Any,
    ) -> None:
        """One record: the mean paired difference ours - theirs with its interval."""
        value, interval = paired_difference(ours, theirs)
        self._record(method, label, metric, value, interval, len(ours), unit, setting)

    def exact(self, label: str, metric: str, value: float, unit: str = "", **setting: Any) -> None:
        """One record of a number that is computed, not sampled."""
        self._record(None, label, metric, value, None, 1, unit, setting)

    def _record(
        self,
        method: CacheMethod | None,
        label: str,
        metric: str,
        value: float,
        interval: tuple[float, float] | None,
        n: int,
        unit: str,
        setting: dict[str, Any],
    ) -> None:
        a = self.arguments
        work = {"text": Path(a.text).name if a.text else "microworld", "tokens": a.tokens, "seeds": a.seeds}
        self.records.append(
            Record(
                paper=self.paper,
                method=label,
                bench=self.name,
                metric=metric,
                value=value,
                unit=unit,
                ci=interval,
                n=n,
                model=f"{Path(a.model).name}@{fingerprint(self.model)}",
                parameters=method.parameters if method else {},
                setting={**work, **setting},
                time=now(),
                **provenance(),
            )
        )
        shown = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
        where = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"{metric:<24} {label:<28} {where:<34} {value:.4g}{shown}", flush=True)

    def finish(self) -> None:
        write_results(self.records, self.arguments.out)


def reference(study: Study, seed: int) -> list[Item]:
    """The items of a seed, with the full cache's predictions noted."""
    items = study.items(seed)
    play(study.model, items, Full())
    return items
