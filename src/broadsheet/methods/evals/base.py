"""What the evals family stands on: a *benchmark* asks and marks, a *loop* makes answers better.

A benchmark is a small dataclass with three parts: the `Sample` list, how one answer is marked, and (where a mean will not
do) how marks become numbers. Asking, retries, resume, failures, intervals, transcripts, Inspect and lm-eval tasks are the
same for all. A loop takes a chat and a prompt and returns an `Answer` with every step and its cost.

A failure to answer (cut off, refused, no answer after all tries) and an answer that cannot be read are outcomes of their
own: they score 0, are counted, and are never dropped.
"""

from __future__ import annotations

import json
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from broadsheet.core.chat import Chat, Choice, Message, Usage, run
from broadsheet.core.chat.client import here, in_order
from broadsheet.core.chat.protocol import NOTHING
from broadsheet.core.loops import Answer as Answer
from broadsheet.core.loops import Step as Step
from broadsheet.core.records import Record, StorageError, now, provenance
from broadsheet.core.stats import bootstrap_ci

Outcome = Literal["scored", "unparsed", "truncated", "refused", "error"]
#: what a choice that is no whole answer counts as
_FAILED: dict[str, Outcome] = {"length": "truncated", "context": "refused", "content_filter": "refused", "error": "error"}


@dataclass(frozen=True)
class Sample:
    """One thing to ask. ``data`` is what marking needs and is never shown to the model; ``axes`` are what results are cut by
    (level, task, ...); ``parameters`` of the request (max_tokens, stop, ...) override the benchmark's."""

    id: str
    messages: tuple[Message, ...]
    data: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """What one answer is worth. ``values``: metric -> value in [0, 1] (or any number); a metric that does not apply to the
    sample is left out. ``evidence``: why, for the transcript."""

    values: Mapping[str, float]
    evidence: str = ""
    outcome: Outcome = "scored"


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval over samples and how many it is the mean of; ``axis`` and ``value_of`` where it is a
    cut of the whole ("level" = "2")."""

    name: str
    value: float
    ci: tuple[float, float] | None
    n: int
    axis: str = ""
    value_of: str = ""


@dataclass(frozen=True)
class Scored:
    """A sample with its answers and marks (one each)."""

    sample: Sample
    answers: tuple[Choice, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    benchmark: str
    model: str
    metrics: tuple[Metric, ...]
    scored: tuple[Scored, ...]
    used: Usage  #: what was paid for now
    cost: Usage  #: what all its answers cost, those from the ledger too
    answers: tuple[Answer, ...] = ()  #: of a loop: how it came to its answers

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(mark.outcome for one in self.scored for mark in one.marks)

    def get(self, name: str, axis: str = "", value_of: str = "") -> Metric:
        """The metric of that name; raises ValueError where too little was asked for it."""
        for metric in self.metrics:
            if (metric.name, metric.axis, metric.value_of) == (name, axis, value_of):
                return metric
        raise ValueError(f"{self.benchmark} has no {name} of {len(self.scored)} samples: ask more of them (-o limit=0: all)")

    def transcript(self) -> list[dict[str, Any]]:
        """A JSON-able row an answer: what was asked, what came back, what it was worth and why; a loop's steps too."""
        steps = [[asdict(step) for step in answer.steps] for answer in self.answers]
        return [
            {
                "id": one.sample.id, "messages": [dict(m) for m in one.sample.messages], "axes": dict(one.sample.axes),
                "answer": choice.text, "finish_reason": choice.finish_reason, "outcome": mark.outcome,
                "values": dict(mark.values), "evidence": mark.evidence, "usage": asdict(choice.usage),
                **({"steps": steps[place]} if steps else {}),
            }
            for place, one in enumerate(self.scored)
            for choice, mark in zip(one.answers, one.marks, strict=True)
        ]  # fmt: skip

    def write_transcript(self, path: str | Path) -> None:
        """JSON lines. Raises `StorageError`."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                for row in self.transcript():
                    file.write(json.dumps(row, ensure_ascii=True) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from None


class Benchmark(ABC):
    """Base of all benchmarks: dataclasses whose fields are their settings.

    ``primary``: the metric that stands for the whole.
    """

    slug: ClassVar[str]
    primary: ClassVar[str]
    budgeted: ClassVar[bool] = False
    compared: ClassVar[bool] = False  #: no reference belongs beside it
    #: parameters of every request, unless a sample has its own
    request: ClassVar[Mapping[str, Any]] = {}
    #: answers asked for a sample
    epochs: int = 1

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """What is asked, in order; the same for the same settings. Raises ValueError for data that cannot be read."""

    def first(self, limit: int | None = None) -> list[Sample]:
        """The first ``limit`` samples; all without one."""
        return list(self.samples())[:limit]

    @abstractmethod
    def mark(self, sample: Sample, text: str) -> Mark:
        """What a whole answer is worth."""

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        """What an answer that is not whole is worth: nothing."""
        return Mark({self.primary: 0.0}, outcome, outcome)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """The mean of every value over samples, whole and by axis; intervals by bootstrap over samples."""
        return means(scored)

    def marked(self, sample: Sample, choice: Choice) -> Mark:
        """The mark of any choice: a failure is counted as such."""
        if not choice.ok:
            return self.missing(sample, _FAILED.get(choice.finish_reason, "error"))
        return self.mark(sample, choice.text)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings, JSON-able."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses

    def evaluate(self, chat: Chat, limit: int | None = None, done: Callable[[int, int], None] | None = None) -> Report:
        """Asks and marks every sample (the first ``limit``); ``done(count, total)`` after each. Raises `ChatError`."""
        return run(self.aevaluate(chat, limit, done))

    async def aevaluate(
        self, chat: Chat, limit: int | None = None, done: Callable[[int, int], None] | None = None
    ) -> Report:
        """`evaluate`, awaited."""
        chosen = self.first(limit)
        before = chat.spent

        async def one(sample: Sample) -> Scored:
            asked = {**self.request, **sample.parameters}
            answers = await chat.acomplete(sample.messages, n=self.epochs, tag=self.slug, **asked)
            return Scored(sample, tuple(answers), tuple(self.marked(sample, choice) for choice in answers))

        tell = (lambda count: done(count, len(chosen))) if done else None
        scored = await here(in_order(one, chosen, 2 * chat.concurrency, tell))
        return self.report(chat, scored, before)

    def score(self, responses: Mapping[str, str] | Sequence[str], model: str = "responses") -> Report:
        """A report on answers that were made elsewhere, by sample id or in the samples' order. Raises ValueError."""
        samples = self.samples()
        if isinstance(responses, Mapping):
            unknown = sorted(set(responses) ^ {sample.id for sample in samples})
            if unknown:
                raise ValueError(f"the ids of responses and samples differ, for example in {', '.join(unknown[:3])}")
            responses = [responses[sample.id] for sample in samples]
        if len(responses) != len(samples):
            raise ValueError(f"{len(responses)} responses to {len(samples)} samples")
        for sample, text in zip(samples, responses, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"the response to {sample.id} is {type(text).__name__}, not a string")
        scored = tuple(
            Scored(sample, (Choice(text),), (self.mark(sample, text),))
            for sample, text in zip(samples, responses, strict=True)
        )
        return Report(self.slug, model, tuple(self.metrics(scored)), scored, NOTHING, NOTHING)

    def report(self, chat: Chat, scored: Sequence[Scored], before: Usage = NOTHING) -> Report:
        """A report of marked answers; ``before``: what the chat had spent when this began."""
        cost = sum((choice.usage for one in scored for choice in one.answers), NOTHING)
        return Report(self.slug, chat.name, tuple(self.metrics(scored)), tuple(scored), chat.spent - before, cost)


def means(scored: Sequence[Scored], names: Sequence[str] | None = None) -> list[Metric]:
    """Means over samples of every value (or of ``names``), for the whole and for every value of every axis."""
    names = names or list(dict.fromkeys(name for one in scored for mark in one.marks for name in mark.values))
    cuts: list[tuple[str, str]] = [("", "")]
    cuts += sorted({(axis, value) for one in scored for axis, value in one.sample.axes.items()})
    found = []
    for name in names:
        for axis, value in cuts:
            chosen = [one for one in scored if not axis or one.sample.axes.get(axis) == value]
            # Answers to one sample are not independent: their mean is one value.
            values = [
                statistics.fmean(mark.values[name] for mark in one.marks if name in mark.values)
                for one in chosen
                if any(name in mark.values for mark in one.marks)
            ]
            if values:
                found.append(Metric(name, statistics.fmean(values), bootstrap_ci(values), len(values), axis, value))
    return found


# --- loops --------------------------------------------------------------------------------------------------------------


class Solver(ABC):
    """Base of what makes answers better (a loop over a chat): dataclasses whose fields are their settings.

    A solver sees the prompt and what it asks a model; it never sees how its answer will be marked, unless its critic is said
    to be the oracle.
    """

    slug: ClassVar[str]
    budgeted: ClassVar[bool] = True

    @abstractmethod
    async def asolve(self, chat: Chat, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """The `Answer` to a chat or a prompt, with every step and its cost; what else it takes is the solver's."""

    @abstractmethod
    def at_budget(self, answers: int) -> Self:
        """This solver with at most so many answers written for a prompt. Raises ValueError below what it needs."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings, JSON-able."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses

    def evaluate(
        self, chat: Chat, work: Benchmark, limit: int | None = None, done: Callable[[int, int], None] | None = None
    ) -> Report:
        """Its answers to a benchmark's samples, marked by the benchmark."""
        chosen, before = work.first(limit), chat.spent

        async def one(sample: Sample) -> tuple[Scored, Answer]:
            answer = await self.asolve(chat, sample.messages)
            reason = "error" if answer.stopped == "error" and not answer.text else "stop"
            choice = Choice(answer.text, reason, answer.usage)
            return Scored(sample, (choice,), (work.marked(sample, choice),)), answer

        tell = (lambda count: done(count, len(chosen))) if done else None
        found = run(in_order(one, chosen, chat.concurrency, tell))
        scored, answers = [some for some, _ in found], tuple(answer for _, answer in found)
        report = work.report(chat, scored, before)
        written, content = [float(a.generations) for a in answers], [float(a.accepted) for a in answers]
        extra = (
            Metric("answers", statistics.fmean(written), bootstrap_ci(written), len(written)),
            Metric("accepted", statistics.fmean(content), bootstrap_ci(content), len(content)),
        )
        return replace(report, benchmark=self.slug, metrics=(*report.metrics, *extra), answers=answers)


def records_of(
    report: Report, primary: str, paper: str, method: str, parameters: Mapping[str, Any], seed: int = 0, **setting: Any
) -> list[Record]:
    """A report as records: every metric (``primary`` is "score" too), the outcomes and the cost."""
    shared: dict[str, Any] = {
        "paper": paper, "method": method, "bench": "evals", "model": report.model, "parameters": dict(parameters),
        "seed": seed, "time": now(), **provenance(),
    }  # fmt: skip
    found = []
    for metric in (replace(report.get(primary), name="score"), *report.metrics):
        cut = {metric.axis: metric.value_of} if metric.axis else {}
        found.append(
            Record(metric=metric.name, value=metric.value, ci=metric.ci, n=metric.n, setting={**setting, **cut}, **shared)
        )
    total = sum(report.outcomes.values())
    for outcome in ("unparsed", "truncated", "refused", "error"):
        share = report.outcomes[outcome] / total if total else 0.0
        found.append(Record(metric=f"{outcome}_share", value=share, n=total, setting=setting, **shared))
    cost = report.cost
    for name, value, unit in (
        ("calls", cost.calls, "calls"),
        ("tokens", cost.tokens, "tokens"),
        ("money", cost.money, "USD"),
        ("seconds", cost.seconds, "s"),
    ):
        found.append(Record(metric=name, value=float(value), unit=unit, n=len(report.scored), setting=setting, **shared))
    return found
