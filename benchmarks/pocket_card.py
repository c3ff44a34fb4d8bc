"""Measures the built-in models (dense cache) by task and length, and writes each one's model card.

python benchmarks/pocket_card.py [--model NAME_OR_FOLDER] [--sessions 40]
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from broadsheet.core.microworld.code import make_tasks
from broadsheet.core.microworld.tasks import SCBENCH_MINI, SHORT, TASKS, arithmetic
from broadsheet.core.microworld.train import RECIPES
from broadsheet.core.models import POCKET_FOLDER, load, pockets
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.scbench import SessionRunner
from broadsheet.methods.weights.quantizing_code_llms import Study

LENGTHS = (512, 1024, 2048, 4096)
STEPS = (5, 10, 20, 40, 80)


def sessions_of(task: str, size: int, count: int):
    """Held-out sessions: their seeds are never used in training."""
    rngs = [random.Random(f"card/{task}/{size}/{index}") for index in range(count)]
    if task == "arithmetic":
        return [arithmetic(rng, 0, 1, steps=size) for rng in rngs]
    return [TASKS[task](rng, size, 5 if task in SCBENCH_MINI else 1) for rng in rngs]


def measure_code(name: str, sessions: int) -> list[Record]:
    """pass@1 on functions that it was not trained on: 5 tasks a session, 20 samples a task."""
    factors = {"model": [name], "method": ["bf16"], "precision": [16]}
    records = Study(factors, make_tasks(5 * sessions), max_new_tokens=96).run().records()
    return [replace(record, paper="", bench="pocket-card") for record in records]


def code_card(name: str, records: list[Record]) -> str:
    passed = next(record for record in records if record.metric == "pass@1")
    perplexity = {record.setting["text"]: record.value for record in records if record.metric == "perplexity"}
    return "\n".join(
        [
            f"{opening(name)} It completes functions of one line over ints and lists (`core/microworld/code.py`), has read "
            "some made-up stories, and knows nothing else.",
            "",
            f"Measured by `benchmarks/pocket_card.py` on {now()[:10]}, on functions that are not in its training:",
            "",
            "| pass@1 at T = 0.2 | samples | perplexity of code | of general text |",
            "|---|---|---|---|",
            f"| {100 * passed.value:.1f} % [{100 * passed.ci[0]:.1f}–{100 * passed.ci[1]:.1f}] | {passed.n:,} | "
            f"{perplexity['code']:.3f} | {perplexity['text']:.3f} |",
            "",
        ]
    )


def opening(name: str) -> str:
    """What every card begins with."""
    model, _ = load(name)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"# {Path(name).name}\n\n"
        f"A Llama of {parameters:,} parameters ({config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
        f"{config.head_dim} channels, a vocabulary of {config.vocab_size:,}, {config.max_position_embeddings:,} positions), "
        f"trained from scratch on the microworld by `broadsheet train-pocket FOLDER --recipe {Path(name).name}`."
    )


def measure(name: str, sessions: int, lengths: tuple[int, ...]) -> list[Record]:
    model, tokenizer = load(name)
    runner = SessionRunner(model, tokenizer, Full(), dtype=None)
    records = []

    def add(task: str, size: int, label: str) -> None:
        batch = sessions_of(task, size, sessions if task in SCBENCH_MINI else 5 * sessions)  # as many answers everywhere
        room = max(1, 8192 // max(size, 256))
        results = []
        for first in range(0, len(batch), room):
            results += runner.run(batch[first : first + room], "multi-request")
        scores = [result.score for result in results]
        records.append(
            Record(
                paper="",
                method="full",
                bench="pocket-card",
                metric="accuracy",
                value=statistics.mean(scores),
                ci=bootstrap_ci(scores, [result.session for result in results]),
                n=len(scores),
                model=Path(name).name,
                setting={"task": task, label: size},
                time=now(),
                **provenance(),
            )
        )
        print(f"{task:<14} {label} {size:<5} {records[-1].value:.3f}", flush=True)

    for task in SCBENCH_MINI:
        for size in lengths:
            add(task, size, "context_tokens")
    for steps in STEPS:
        add("arithmetic", steps, "steps")
    for task in SHORT:
        if task != "arithmetic":
            add(task, 0, "context_tokens")
    return records


def card(name: str, records: list[Record], lengths: tuple[int, ...]) -> str:
    found = {(r.setting["task"], r.setting.get("context_tokens", r.setting.get("steps"))): r for r in records}

    def cell(task: str, size: int) -> str:
        record = found.get((task, size))
        return "" if record is None else f"{100 * record.value:.0f} % [{100 * record.ci[0]:.0f}–{100 * record.ci[1]:.0f}]"

    lines = [
        f"{opening(name)} It follows the microworld's instructions and knows nothing else.",
        "",
        f"Accuracy with the full cache on held-out sessions, measured by `benchmarks/pocket_card.py` on {now()[:10]}; "
        f"{records[0].n} answers a cell, 95 % bootstrap intervals over sessions.",
        "",
        "| task | " + " | ".join(f"{size} tokens" for size in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    lines += [f"| {task} | " + " | ".join(cell(task, size) for size in lengths) + " |" for task in SCBENCH_MINI]
    lines += ["", "| arithmetic, steps written out | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 1) + "|"]
    lines += ["| last step right | " + " | ".join(cell("arithmetic", steps) for steps in STEPS) + " |", ""]
    short = [task for task in SHORT if task != "arithmetic"]
    lines += ["| instruction | " + " | ".join(short) + " |", "|---" * (len(short) + 1) + "|"]
    lines += ["| accuracy | " + " | ".join(cell(task, 0) for task in short) + " |", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: every built-in model")
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    lengths = tuple(map(int, arguments.lengths.split(",")))
    for name in [arguments.model] if arguments.model else pockets():
        recipe = RECIPES.get(Path(name).name)
        code = recipe is not None and recipe.code
        records = measure_code(name, arguments.sessions) if code else measure(name, arguments.sessions, lengths)
        if arguments.dry:
            continue
        folder = POCKET_FOLDER / name if name in pockets() else Path(name)
        (folder / "README.md").write_text(
            code_card(name, records) if code else card(name, records, lengths), encoding="utf-8"
        )
        results = Path(__file__).parent / "results" / f"pocket_card_{folder.name}.records.json"
        write_results(records, results)


if __name__ == "__main__":
    main()
