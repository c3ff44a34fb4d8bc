"""Every benchmark as an Inspect task, and every report as an Inspect log.

    inspect eval broadsheet/muldimif --model openai/gpt-4o-mini -T limit=100
    inspect view --log-dir logs

Inspect finds the tasks through the package's entry point; nothing here is imported otherwise. Settings of a benchmark are
given with ``-T name=value``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset
from inspect_ai.dataset import Sample as InspectSample
from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSample, EvalSpec, EvalStats, write_eval_log
from inspect_ai.log import EvalMetric as LogMetric
from inspect_ai.log import EvalScore as LogScore
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelOutput,
    ModelUsage,
)
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from broadsheet.core.chat import Choice, Message
from broadsheet.core.records import now

from .base import Benchmark, Mark, Report, Sample
from .bench import benchmarks

_ROLES = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
#: Inspect's names of why a model stopped -> ours
_REASONS = {"stop": "stop", "tool_calls": "tool_calls", "max_tokens": "length", "model_length": "context"}


def inspect_task(benchmark: Benchmark, limit: int | None = None) -> Task:
    """A benchmark as a task: the same samples, request parameters and marks."""
    chosen = benchmark.first(limit)
    dataset = MemoryDataset([_sample(sample) for sample in chosen], name=benchmark.slug)
    shared = {**benchmark.request, **(chosen[0].parameters if chosen else {})}
    stop = shared.get("stop")
    config = GenerateConfig(
        temperature=shared.get("temperature", 0.0),
        top_p=shared.get("top_p"),
        max_tokens=max([s.parameters.get("max_tokens", shared.get("max_tokens", 1024)) for s in chosen], default=1024),
        stop_seqs=[stop] if isinstance(stop, str) else list(stop) if stop else None,
    )
    return Task(
        dataset=dataset,
        solver=[generate()],
        scorer=marks(benchmark, {sample.id: sample for sample in chosen}),
        config=config,
        epochs=benchmark.epochs,
        name=benchmark.slug,
    )


def _sample(sample: Sample) -> InspectSample:
    return InspectSample(id=sample.id, input=_messages(sample.messages), target="", metadata=dict(sample.axes))


def _messages(messages: tuple[Message, ...]) -> list[ChatMessage]:
    return [_ROLES[message["role"]](content=message["content"]) for message in messages]


def marks(benchmark: Benchmark, samples: dict[str, Sample]) -> Scorer:
    """The benchmark's marks as a scorer: every value is a score of its own, and how the answer ended."""

    @scorer(metrics={"*": [mean(), stderr()]}, name=benchmark.slug)
    def score_marks() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            reason = _REASONS.get(str(state.output.stop_reason), "content_filter")
            mark = benchmark.marked(samples[str(state.sample_id)], Choice(state.output.completion, reason))
            return _score(mark, state.output.completion)

        return score

    return score_marks()


def _score(mark: Mark, answer: str) -> Score:
    return Score(
        value={name: float(value) for name, value in mark.values.items()},
        answer=answer,
        explanation=mark.evidence,
        metadata={"outcome": mark.outcome},
    )


def write_log(report: Report, benchmark: Benchmark, path: str | Path) -> Path:
    """Writes a report as a log that Inspect View opens; ``path`` ends in .eval or .json."""
    scores = LogScore(
        name=benchmark.slug,
        scorer=benchmark.slug,
        metrics={
            _name(m.name, m.axis, m.value_of): LogMetric(name=_name(m.name, m.axis, m.value_of), value=m.value)
            for m in report.metrics
        },
    )
    samples = [
        EvalSample(
            id=one.sample.id,
            epoch=epoch + 1,
            input=_messages(one.sample.messages),
            target="",
            messages=[*_messages(one.sample.messages), ChatMessageAssistant(content=choice.text)],
            output=ModelOutput.from_content(report.model, choice.text),
            scores={benchmark.slug: _score(mark, choice.text)},
            metadata={**one.sample.axes, "outcome": mark.outcome},
            model_usage={report.model: _usage(choice)},
        )
        for one in report.scored
        for epoch, (choice, mark) in enumerate(zip(one.answers, one.marks, strict=True))
    ]
    spec = EvalSpec(
        created=now(),
        task=benchmark.slug,
        dataset=EvalDataset(name=benchmark.slug, samples=len(report.scored)),
        model=report.model,
        config=EvalConfig(epochs=benchmark.epochs),
        task_args={name: str(value) for name, value in benchmark.parameters.items()},
    )
    log = EvalLog(
        status="success",
        eval=spec,
        results=EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=[scores]),
        stats=EvalStats(started_at=spec.created, completed_at=now()),
        samples=samples,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_eval_log(log, str(target))
    return target


def _name(metric: str, axis: str, value: str) -> str:
    return f"{metric} ({axis}={value})" if axis else metric


def _usage(choice: Choice) -> ModelUsage:
    used = choice.usage
    return ModelUsage(input_tokens=used.prompt_tokens, output_tokens=used.completion_tokens, total_tokens=used.tokens)


def _register(slug: str, kind: type[Benchmark]) -> Callable[..., Task]:
    def make(limit: int | None = None, **settings: Any) -> Task:
        return inspect_task(kind(**settings), limit)

    make.__name__ = make.__qualname__ = slug.replace("-", "_")
    make.__doc__ = kind.__doc__
    return task(name=slug)(make)


for _slug, _kind in benchmarks().items():
    globals()[_slug.replace("-", "_")] = _register(_slug, _kind)
