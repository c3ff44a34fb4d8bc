"""What the YAML files of this folder name: the benchmarks' samples as data sets, and their marks as metrics.

    lm_eval --include_path "$(broadsheet lm-eval)" --tasks broadsheet_ifeval --model hf --model_args pretrained=...

lm-eval writes the answers, Broadsheet marks them: the numbers are those of `broadsheet run`. Multiple choice (the zero-shot
tasks of FinGPT-Benchmark, whose prompts name their options) is scored by likelihood, which only lm-eval does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from broadsheet.core.chat import Choice
from broadsheet.methods.evals.base import Benchmark, Sample
from broadsheet.methods.evals.bench import benchmarks


@lru_cache
def _asked(slug: str) -> tuple[Benchmark, dict[str, Sample]]:
    benchmark = benchmarks()[slug]()
    return benchmark, {sample.id: sample for sample in benchmark.samples() if len(sample.messages) == 1}


def _dataset(slug: str) -> Callable[..., dict[str, Any]]:
    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        samples = _asked(slug)[1].values()
        rows = [{"id": sample.id, "prompt": str(sample.messages[0]["content"])} for sample in samples]
        return {"test": Dataset.from_list(rows)}

    return load


def _marks(slug: str) -> Callable[[dict[str, Any], list[str]], dict[str, float]]:
    def mark(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        benchmark, samples = _asked(slug)
        found = benchmark.marked(samples[doc["id"]], Choice(results[0]))
        return {"score": found.values.get(benchmark.primary, 0.0), "unparsed": float(found.outcome == "unparsed")}

    return mark


ifeval, ifeval_marks = _dataset("ifeval"), _marks("ifeval")
muldimif, muldimif_marks = _dataset("muldimif"), _marks("muldimif")
followrag, followrag_marks = _dataset("vif-rag"), _marks("vif-rag")
longproc, longproc_marks = _dataset("longproc"), _marks("longproc")
fingpt, fingpt_marks = _dataset("fingpt-benchmark"), _marks("fingpt-benchmark")
monitor, monitor_marks = _dataset("sequential-monitors"), _marks("sequential-monitors")


def sentiment_options(**_: Any) -> dict[str, Any]:
    """FinGPT-Benchmark's sentiment questions with their options, to be scored by likelihood."""
    from datasets import Dataset

    from broadsheet.methods.evals.fingpt_benchmark import FinTask

    options = ("negative", "positive")
    rows = [
        {"prompt": row.prompt.rstrip(), "choices": list(options), "label": options.index(row.output)}
        for row in FinTask("sentiment-cls").load().test
    ]
    return {"test": Dataset.from_list(rows)}
