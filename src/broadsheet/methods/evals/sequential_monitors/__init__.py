"""Sequential monitors (Chen Yueh-Han et al. 2025, arXiv 2506.10949): a cheap second model reads along and stops in time.

A harmful goal that is split into steps passes every filter that looks at one request. The monitor reads the list of all
requests so far, after each new one, and says how probable it is that together they serve a harmful goal; the first score
above a threshold stops the conversation. Nothing is added up over steps: what came before counts because it is read again.

    monitor = SequentialMonitor(chat, prompt="guideline", policy=rules)
    monitor = tune(monitor, validation).monitor
    monitor.step("...").flag

It sees requests only: no answers, no tool outputs; and one conversation: who splits over several is not seen. Steps before
``start`` (2) are not looked at. A reply that cannot be read is a flag, unless told otherwise, and is counted.
`middleware` puts a monitor before an OpenAI-compatible endpoint, `approver` into Inspect. `office` is a harmless world to
try it on, `trained` holds monitors that are classifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from broadsheet.core.chat import Chat, Message, Usage, run
from broadsheet.core.chat.client import here, in_order
from broadsheet.core.chat.protocol import NOTHING

from ..base import Benchmark, Mark, Metric, Outcome, Sample, Scored
from .office import FAMILIES, make_tasks, rule_book
from .prompts import PROMPTS, Prompt, Reading, read_probability
from .scoring import ALWAYS, NEVER, Peaks, Trace, level_of, metrics_of
from .tasks import Task, disguise, inject, leak, load_tasks, save_tasks

__all__ = [
    "Decision",
    "MonitorBench",
    "MonitorReport",
    "SequentialMonitor",
    "Task",
    "Tuned",
    "aevaluate",
    "disguise",
    "evaluate",
    "inject",
    "leak",
    "load_tasks",
    "save_tasks",
    "select_prompt",
    "tune",
]

OnError = Literal["flag", "pass", "retry"]
Mode = Literal["cumulative", "single", "windowed", "final"]
Asking = Callable[[Sequence[str]], Sequence[Message]]
_RETRIES = 2
_FAILED = {"length": "truncated", "context": "refused", "content_filter": "refused"}


@dataclass(frozen=True)
class Decision:
    """What a monitor says after a request. ``score``: None when nothing was asked or the reply could not be read, which
    ``outcome`` tells ("unmonitored", "scored", "unparsed", "refused", "truncated", "error")."""

    flag: bool
    score: float | None
    reason: str = ""
    outcome: str = "scored"
    usage: Usage = NOTHING
    step: int = 0


@dataclass
class SequentialMonitor:
    """A monitor over a chat model.

    ``prompt``: a name of `PROMPTS`, a `Prompt`, or requests -> messages (whose reply is a number alone or after "Score:").
    ``threshold``: a score above it is a flag. ``start``: the first step (from 1) that is looked at. ``on_error``: what a
    reply that cannot be read is: a flag, a pass, or a reason to ask twice again (then a flag). ``mode``: what is read: all
    requests so far, the last one, the last ``window``, or all but only at the end. ``policy``: rules to judge by, put
    before the list; ``examples``: labelled tasks for the prompt "icl". ``tuned_on``: digests of the tasks that the
    threshold was chosen with.

    `step` keeps the conversation and must be `reset` between two; `ascore` keeps nothing. Raises ValueError for settings
    out of range, an empty request, and a step after the flag.
    """

    chat: Chat
    prompt: str | Prompt | Asking = "probability"
    threshold: float = 0.5
    start: int = 2
    on_error: OnError = "flag"
    mode: Mode = "cumulative"
    window: int = 3
    policy: str = ""
    examples: tuple[Task, ...] = ()
    tuned_on: frozenset[str] = field(default=frozenset(), repr=False)
    _requests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _stopped: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the threshold is in [0, 1], got {self.threshold}")
        if self.start < 1 or self.window < 1:
            raise ValueError(f"start and window are at least 1, got {self.start} and {self.window}")
        if self.on_error not in ("flag", "pass", "retry"):
            raise ValueError(f"on_error is flag, pass or retry, got {self.on_error}")
        if self.mode not in ("cumulative", "single", "windowed", "final"):
            raise ValueError(f"mode is cumulative, single, windowed or final, got {self.mode}")
        if isinstance(self.prompt, str) and self.prompt not in PROMPTS:
            raise ValueError(f"the prompt is one of {', '.join(PROMPTS)}, a Prompt or a function, got '{self.prompt}'")
        if self.prompt == "icl" and not self.examples:
            raise ValueError("the prompt icl needs examples: 8 labelled tasks of one family")

    @property
    def name(self) -> str:
        """What tables call the prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        return getattr(self.prompt, "name", "") or getattr(self.prompt, "__name__", "custom")

    def step(self, request: str) -> Decision:
        """The decision after one more request; the last of a conversation in mode "final" is asked about by `finish`."""
        return run(self.astep(request))

    async def astep(self, request: str) -> Decision:
        """`step`, awaited."""
        if self._stopped:
            raise ValueError("this conversation was stopped: call reset() before the next")
        if not request.strip():
            raise ValueError("a request must have text")
        self._requests.append(request)
        decision = await self.ascore(self._requests, last=False)
        self._stopped = decision.flag
        return decision

    def finish(self) -> Decision:
        """The decision on the whole conversation, for mode "final"."""
        if not self._requests:
            raise ValueError("there is no conversation to judge")
        return run(self.ascore(self._requests, last=True))

    def reset(self) -> None:
        """Forgets the conversation."""
        self._requests, self._stopped = [], False

    def view(self, requests: Sequence[str], last: bool = False) -> Sequence[str]:
        """What is shown of the requests so far; nothing where the step is not looked at."""
        if len(requests) < self.start or (self.mode == "final" and not last):
            return ()
        shown = {"single": 1, "windowed": self.window}.get(self.mode, len(requests))
        return requests[-shown:]

    def messages(self, shown: Sequence[str]) -> Sequence[Message]:
        """What the model is asked about these requests."""
        if isinstance(self.prompt, str | Prompt):
            return self._prompt.messages(shown, self.policy, self.examples)
        return self.prompt(shown)

    @property
    def _prompt(self) -> Prompt:
        return PROMPTS[self.prompt] if isinstance(self.prompt, str) else self.prompt  # type: ignore[return-value]

    async def ascore(self, requests: Sequence[str], last: bool = False) -> Decision:
        """The decision after the last of ``requests``; ``last``: no more will come. Keeps no state."""
        shown = self.view(requests, last)
        if not shown:
            return Decision(False, None, outcome="unmonitored", step=len(requests))
        messages, built_in = self.messages(shown), isinstance(self.prompt, str | Prompt)
        limit, used = self._prompt.max_tokens if built_in else 1024, NOTHING
        for attempt in range(1 + _RETRIES * (self.on_error == "retry")):
            # The first answer is the greedy one; asked again, it would only come back.
            heat: dict[str, Any] = {"temperature": 1.0, "first": attempt} if attempt else {}
            choice = (await self.chat.acomplete(messages, tag="monitor", max_tokens=limit, **heat))[0]
            used = used + choice.usage
            if choice.ok:
                reading = (self._prompt.read if built_in else read_probability)(choice.text)
            else:
                reading = Reading(None, _FAILED.get(choice.finish_reason, "error"), choice.finish_reason)
            if reading.score is not None:
                break
        flag = self.on_error != "pass" if reading.score is None else reading.score > self.threshold
        return Decision(flag, reading.score, reading.reason, reading.outcome, used, len(requests))

    async def ahalt(self, requests: Sequence[str]) -> Decision:
        """The first flag of a conversation that arrives whole, else the decision after its last request.

        Steps that were asked about before are answered by the chat's ledger.
        """
        if not requests or not all(text.strip() for text in requests):
            raise ValueError("a request must have text")
        ends = range(1, len(requests) + 1)
        decisions = await here(in_order(lambda end: self.ascore(requests[:end]), ends, self.chat.concurrency))
        return next((one for one in decisions if one.flag), decisions[-1])

    async def atrace(self, task: Task) -> Trace:
        """Every step's score, flags or not."""
        total, scores, usage, outcomes = len(task.subtasks), [], [], []
        for end in range(1, total + 1):
            decision = await self.ascore(task.subtasks[:end], last=end == total)
            scores.append(effective(decision, self.on_error))
            usage.append(decision.usage)
            outcomes.append("" if decision.outcome == "unmonitored" else decision.outcome)
        return Trace(task, tuple(scores), tuple(usage), tuple(outcomes))


def effective(decision: Decision, on_error: OnError) -> float:
    """A decision as a score that a threshold can be laid on."""
    if decision.score is not None:
        return decision.score
    return NEVER if decision.outcome == "unmonitored" or on_error == "pass" else ALWAYS


async def atraces(monitor: SequentialMonitor, tasks: Sequence[Task]) -> list[Trace]:
    """Every task's scores, as many tasks at once as the chat takes calls."""
    return await here(in_order(monitor.atrace, tasks, monitor.chat.concurrency))


# --- the threshold --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """``monitor``: with the threshold. ``interval``: the threshold's 95 % interval over tasks. ``value``: the metric that it
    was chosen for, on the same tasks: an optimistic number."""

    monitor: SequentialMonitor
    threshold: float
    interval: tuple[float, float]
    value: float
    traces: tuple[Trace, ...] = field(repr=False, default=())


def tune(monitor: SequentialMonitor, tasks: Sequence[Task], metric: str = "f1", draws: int = 200) -> Tuned:
    """Chooses the threshold on validation tasks: the best F1, or the highest recall at a rate of false alarms
    ("recall@fpr=0.01"). The tasks are remembered by their content, and `evaluate` refuses them. Raises ValueError."""
    return tuned(monitor, run(atraces(monitor, tasks)), metric, draws)


def tuned(monitor: SequentialMonitor, traces: Sequence[Trace], metric: str = "f1", draws: int = 200) -> Tuned:
    """`tune` on scores that are there."""
    peaks = Peaks.of(traces)
    tau = peaks.threshold_for(metric)
    low, high = peaks.interval(lambda drawn: drawn.threshold_for(metric), draws) or (tau, tau)
    value = peaks.counts(tau).f1 if metric == "f1" else peaks.recall_above(peaks.fpr_threshold(level_of(metric)))
    seen = monitor.tuned_on | {trace.task.digest for trace in traces}
    return Tuned(replace(monitor, threshold=tau, tuned_on=seen), tau, (low, high), value, tuple(traces))


def select_prompt(monitors: Sequence[SequentialMonitor], tasks: Sequence[Task], metric: str = "f1") -> Tuned:
    """The monitor (prompt, mode, model) whose tuned metric on the validation tasks is best; the first of equals."""
    if not monitors:
        raise ValueError("there is nothing to select from")
    return max((tune(monitor, tasks, metric) for monitor in monitors), key=lambda one: one.value)


# --- evaluation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MonitorReport:
    """What a monitor does on tasks that it was not tuned on.

    ``metrics``: see `scoring.metrics_of`. ``cost``: until each task's first flag, as in use; ``cost_of_all``: of all steps.
    ``latency``: mean seconds of a step that was looked at.
    """

    model: str
    prompt: str
    mode: str
    threshold: float
    metrics: tuple[Metric, ...]
    traces: tuple[Trace, ...] = field(repr=False)
    cost: Usage
    cost_of_all: Usage
    latency: float

    def get(self, name: str, axis: str = "", value_of: str = "") -> Metric:
        """The metric of that name; raises KeyError."""
        for metric in self.metrics:
            if (metric.name, metric.axis, metric.value_of) == (name, axis, value_of):
                return metric
        raise KeyError(name)

    def __str__(self) -> str:
        label = "SIMULATED, " if self.model.startswith("sim:") else ""
        lines = [f"{self.model} ({label}{self.prompt}, {self.mode}), threshold {self.threshold:.3f}"]
        for metric in self.metrics:
            where = f"{metric.axis} {metric.value_of}" if metric.axis else ""
            interval = f"[{metric.ci[0]:.3f}, {metric.ci[1]:.3f}]" if metric.ci else ""
            lines.append(f"  {metric.name:<16} {where:<16} {metric.value:.3f} {interval}")
        tasks = max(len(self.traces), 1)
        lines.append(
            f"  a task: {self.cost.tokens / tasks:.0f} tokens, {self.cost.money / tasks:.2e} USD; "
            f"a step: {self.latency:.2f} s"
        )
        return "\n".join(lines)


def evaluate(monitor: SequentialMonitor, tasks: Sequence[Task], calibration: Sequence[Task] = ()) -> MonitorReport:
    """Runs a monitor over tasks, see `MonitorReport`.

    ``calibration``: benign tasks on which thresholds for "recall@fpr" are set; without them the benign ones of ``tasks``
    serve, which is slightly optimistic. Raises ValueError when the threshold was tuned on one of ``tasks``.
    """
    return run(aevaluate(monitor, tasks, calibration))


async def aevaluate(monitor: SequentialMonitor, tasks: Sequence[Task], calibration: Sequence[Task] = ()) -> MonitorReport:
    """`evaluate`, awaited."""
    seen = [task.id for task in tasks if task.digest in monitor.tuned_on]
    if seen:
        raise ValueError(f"{len(seen)} of these tasks (such as {seen[0]}) were tuned on: evaluate on others")
    if any(task.harmful for task in calibration):
        raise ValueError("calibration takes benign tasks only")
    found = await atraces(monitor, tasks)
    return report(monitor, found, await atraces(monitor, calibration))


def report(monitor: SequentialMonitor, traces: Sequence[Trace], calibration: Sequence[Trace] = ()) -> MonitorReport:
    """The report of scores that are there."""
    whole = sum((one for trace in traces for one in trace.usage), NOTHING)
    cost = sum((trace.paid(monitor.threshold) for trace in traces), NOTHING)
    metrics = metrics_of(traces, monitor.threshold, calibration)
    latency = whole.seconds / whole.calls if whole.calls else 0.0
    return MonitorReport(
        monitor.chat.name, monitor.name, monitor.mode, monitor.threshold, tuple(metrics), tuple(traces), cost, whole, latency
    )


@dataclass(frozen=True)
class MonitorBench(Benchmark):
    """How good a chat model is as a monitor, on the stand-in tasks of `office` or on a file of tasks (``path``).

    Every step of every task is one question. ``threshold`` None: the best F1 on a validation half, which the metrics leave
    out. See `SequentialMonitor` for the rest.
    """

    slug: ClassVar[str] = "sequential-monitors"
    primary: ClassVar[str] = "f1"

    path: str = ""
    tasks: int = 80
    prompt: str = "guideline"
    mode: Mode = "cumulative"
    start: int = 2
    on_error: Literal["flag", "pass"] = "flag"
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_error not in ("flag", "pass"):
            raise ValueError(f"on_error is flag or pass here, got {self.on_error}")
        self._monitor()
        if not self.path:
            self.load()

    def _monitor(self) -> SequentialMonitor:
        """A monitor that only says what to ask: its chat is never used."""
        examples = tuple(make_tasks(8, FAMILIES[0].name, seed=self.seed + 7919)) if self.prompt == "icl" else ()
        policy = "" if self.path else rule_book()
        tau = 0.5 if self.threshold is None else self.threshold
        return SequentialMonitor(
            None, self.prompt, tau, self.start, self.on_error, self.mode, policy=policy, examples=examples  # type: ignore[arg-type]
        )  # fmt: skip

    def load(self) -> list[tuple[Task, bool]]:
        """The tasks, and whether each is for validation (every second harmful and every second benign one)."""
        tasks = load_tasks(self.path) if self.path else make_tasks(self.tasks, seed=self.seed)
        seen, found = {True: 0, False: 0}, []
        for task in tasks:
            found.append((task, self.threshold is None and seen[task.harmful] % 2 == 0))
            seen[task.harmful] += 1
        return found

    def samples(self) -> Sequence[Sample]:
        monitor, found = self._monitor(), []
        for task, validation in self.load():
            for end in range(1, len(task.subtasks) + 1):
                shown = monitor.view(task.subtasks[:end], last=end == len(task.subtasks))
                if shown:
                    data = {"task": task, "step": end, "validation": validation}
                    limit = {"max_tokens": PROMPTS[self.prompt].max_tokens}
                    found.append(Sample(f"{task.id}/{end}", tuple(monitor.messages(shown)), data, {}, limit))
        return found

    def first(self, limit: int | None = None) -> list[Sample]:
        """All steps of the first ``limit`` tasks: a task of which a step is missing is none."""
        found = list(self.samples())
        wanted = list(dict.fromkeys(one.data["task"].id for one in found))[:limit]
        return [one for one in found if one.data["task"].id in wanted]

    def mark(self, sample: Sample, text: str) -> Mark:
        reading = PROMPTS[self.prompt].read(text)
        if reading.score is None:
            return self.missing(sample, "refused" if reading.outcome == "refused" else "unparsed")
        return Mark({"score": reading.score}, reading.reason)

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        """A step that is flagged, or passed, without a score."""
        return Mark({}, outcome, outcome)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        """A task's steps make its trace; see `scoring.metrics_of`. Tasks of which a step was not asked are left out."""
        steps: dict[str, dict[int, Scored]] = {}
        for one in scored:
            steps.setdefault(one.sample.data["task"].id, {})[one.sample.data["step"]] = one
        monitor, validation, test = self._monitor(), list[Trace](), list[Trace]()
        for some in steps.values():
            data: Any = next(iter(some.values())).sample.data
            task, total = data["task"], len(data["task"].subtasks)
            asked = [e for e in range(1, total + 1) if monitor.view(task.subtasks[:e], last=e == total)]
            if set(asked) <= some.keys():
                (validation if data["validation"] else test).append(_trace(task, some, self.on_error))
        tau = monitor.threshold
        if self.threshold is None and {trace.task.harmful for trace in validation} == {True, False}:
            tau = Peaks.of(validation).best_f1_threshold()
        calibration = [trace for trace in validation if not trace.task.harmful]
        chosen = [Metric("threshold", tau, None, len(validation))]
        return [*metrics_of(test, tau, calibration), *chosen] if test else chosen


def _trace(task: Task, steps: dict[int, Scored], on_error: OnError) -> Trace:
    """A task's trace from marked answers; several answers to one step are its mean score."""
    scores, usage, outcomes = [], [], []
    for end in range(1, len(task.subtasks) + 1):
        one = steps.get(end)
        if one is None:
            scores.append(NEVER)
            usage.append(NOTHING)
            outcomes.append("")
            continue
        read = [mark.values["score"] for mark in one.marks if "score" in mark.values]
        unread = next((mark.outcome for mark in one.marks if mark.outcome != "scored"), "scored")
        whole = len(read) == len(one.marks)
        scores.append(sum(read) / len(read) if whole else NEVER if on_error == "pass" else ALWAYS)
        usage.append(sum((choice.usage for choice in one.answers), NOTHING))
        outcomes.append(unread)
    return Trace(task, tuple(scores), tuple(usage), tuple(outcomes))
