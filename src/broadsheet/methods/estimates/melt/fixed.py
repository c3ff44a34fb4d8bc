"""Runs of fixed length, as llama-bench's: a prompt (pp), tokens one by one (tg), both behind what is cached already."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from broadsheet.core.records import now, provenance

from . import machine
from .report import bench_row
from .runtimes import StepRuntime


@dataclass(frozen=True)
class Fixed:
    """One test: seconds of every repetition, by the wall clock and of CPU time of this process (all threads)."""

    n_prompt: int
    n_gen: int
    n_depth: int
    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def name(self) -> str:
        """As llama-bench prints it: pp512, tg128, tg128 @ d1024."""
        name = f"pp{self.n_prompt}+tg{self.n_gen}" if self.n_prompt and self.n_gen else ""
        name = name or (f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}")
        return name + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def tokens(self) -> int:
        return self.n_prompt + self.n_gen

    def rates(self, clock: str = "wall") -> list[float]:
        """Tokens a second, a repetition each."""
        return [self.tokens / seconds for seconds in getattr(self, clock)]

    def median(self, clock: str = "wall") -> float:
        return statistics.median(self.rates(clock))


def run_fixed(
    runtime: StepRuntime, n_prompt: int = 0, n_gen: int = 0, n_depth: int = 0, repetitions: int = 5, warmup: int = 1
) -> Fixed:
    """Random tokens through a loaded runtime; nothing is sampled or decoded to text. Raises ValueError for lengths that the
    context does not hold."""
    total = n_prompt + n_gen + n_depth
    if n_prompt + n_gen < 1 or min(n_prompt, n_gen, n_depth) < 0 or repetitions < 1:
        raise ValueError("a test has at least one token of a prompt or a reply, and one repetition")
    if total > runtime.settings.context:
        raise ValueError(f"{total} tokens do not fit a context of {runtime.settings.context}; set it higher")
    rng = random.Random(runtime.settings.seed)
    wall, cpu = list[float](), list[float]()
    for repetition in range(-warmup, repetitions):
        ids = [rng.randrange(runtime.vocabulary) for _ in range(total)]
        runtime.clear()
        if n_depth:
            runtime.prefill(ids[:n_depth])
        started, began = time.perf_counter(), time.process_time()
        if n_prompt:
            runtime.prefill(ids[n_depth : n_depth + n_prompt])
        for token in ids[n_depth + n_prompt :]:
            runtime.run([token])
        if repetition >= 0:
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - began)
    return Fixed(n_prompt, n_gen, n_depth, tuple(wall), tuple(cpu))


def rows(runtime: StepRuntime, tests: Sequence[Fixed]) -> list[dict[str, Any]]:
    """What ``llama-bench -o json`` would print."""
    configuration = {
        "runtime": runtime.name, "model": runtime.model, "format": runtime.format, "nbytes": runtime.nbytes,
        "settings": asdict(runtime.settings), "config": runtime.config.to_json(), "machine": machine.describe(),
        "time": now(), **provenance(),
    }  # fmt: skip
    return [bench_row(configuration, t.n_prompt, t.n_gen, t.n_depth, t.wall, t.rates()) for t in tests]
