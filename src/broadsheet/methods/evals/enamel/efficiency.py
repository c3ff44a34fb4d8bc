"""Measures samples beside their references and scores them."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from broadsheet.core.sandbox import ExecutorMissing, Sandbox, confine
from broadsheet.core.stats import bootstrap_ci

from ..base import Metric
from .estimators import eff_at_k, hodges_lehmann, level_scores, pass_at_k, sample_score
from .problems import Problem

#: below this score of the references against themselves, the machine is too noisy for its numbers to be published
LEAST_SELF_SCORE = 0.9
#: byte-code instructions that an interpreter executes in a second, about: what ``tol`` is in that clock
_INSTRUCTIONS = 1e7
_SECONDS = 3600.0
_PROCESSES = 24


@dataclass(frozen=True)
class Score:
    """What one sample is worth.

    ``passed``: right wherever it ended in time, and at level 0 everywhere. ``levels``: f_l; ``value``: e, their weighted
    mean. ``outcome``: "done", "timeout", "memory", "overflow" (censored at ``level``), "wrong" or "error", with a
    ``message``. ``times``: the Hodges-Lehmann time of every case that was finished, by level, in the clock's unit.
    """

    passed: bool
    value: float
    levels: tuple[float, ...]
    outcome: str = "done"
    level: int | None = None
    message: str = ""
    times: tuple[tuple[float, ...], ...] = ()


#: Scores by executed instructions, which are the same every time; by setting, problem and code (None: the reference).
_counted: dict[tuple[Any, ...], Score] = {}
_MOST_COUNTED = 4096


@dataclass(frozen=True)
class Evaluation:
    """Scores of every problem's samples, and of the references measured as if they were samples.

    ``self_score``: the mean of the latter: 1 on a machine without noise.
    """

    scores: Mapping[str, tuple[Score, ...]]
    references: Mapping[str, Score]
    clock: str

    @property
    def self_score(self) -> float:
        return fmean(score.value for score in self.references.values())

    @property
    def offenders(self) -> list[tuple[str, int, float]]:
        """(problem, number of the sample, e) where a sample was measured to be better than its reference somewhere."""
        return [
            (name, number, score.value)
            for name, some in self.scores.items()
            for number, score in enumerate(some)
            if max(score.levels) > 1
        ]

    def metrics(self, ks: Sequence[int] = (1,), allow_noise: bool = False) -> list[Metric]:
        """eff@k and pass@k with intervals over problems, and the references' score. Raises ValueError where a problem has
        fewer than k samples, and, unless ``allow_noise``, where the references score below 0.9."""
        if self.self_score < LEAST_SELF_SCORE and not allow_noise:
            raise ValueError(
                f"the references score {self.self_score:.3f} against themselves, below {LEAST_SELF_SCORE}: this machine is "
                "too noisy to publish efficiencies; leave it idle, or take clock='cpu' or clock='instructions'"
            )
        found = []
        for k in ks:
            for name, values in (
                (f"eff@{k}", [eff_at_k([one.value for one in some], k) for some in self.scores.values()]),
                (f"pass@{k}", [pass_at_k(len(some), sum(o.passed for o in some), k) for some in self.scores.values()]),
            ):
                found.append(Metric(name, fmean(values), bootstrap_ci(values), len(values)))
        found.append(Metric("reference_self_score", self.self_score, None, len(self.references)))
        return found


@dataclass(frozen=True)
class Efficiency:
    """How samples are timed and scored; the paper's values.

    ``alpha``: a sample may take so many times the reference's longest time, else it is censored. ``hardness``: the weights
    of the levels; a level of weight 0 tests correctness alone, by one run a case. ``n_tests``: cases a level. ``repeats``:
    runs a case, of which the Hodges-Lehmann estimate is taken. ``tol``: seconds beyond the limit before a run counts as
    late. ``mem_gib``: address space of a run. ``clock``: "wall", "cpu" (of the thread, which then may start no other: deaf
    to other load), or "instructions" (executed byte code, the same on every machine, and blind to what builtins do within
    one instruction; run once). ``isolate``: every run in a fresh process, so that nothing can be remembered between them,
    else every case. ``clip``: level scores at most 1; the paper's are not. ``seed``: of the inputs.

    Differences from the official evaluator, which executes samples in its own process: samples run in the sandbox and never
    together with an answer; the reference is timed between the runs of the samples and not before them; clocks are
    monotonic; a case whose run takes longer than the limit is censored by its time and not by a signal that a bare
    ``except`` swallows. A fresh process touches its memory for the first time, which costs sample and reference the same
    tens of microseconds: where both take little more, scores come out nearer to 1 than officially.
    """

    alpha: float = 2.0
    hardness: tuple[float, ...] = (0.0, 3.0, 3.0, 4.0)
    n_tests: tuple[int, ...] = (8, 4, 4, 4)
    repeats: int = 6
    tol: float = 0.01
    mem_gib: float = 4.0
    clock: Literal["wall", "cpu", "instructions"] = "wall"
    isolate: bool = True
    clip: bool = False
    seed: int = 998244353

    def __post_init__(self) -> None:
        if self.clock not in ("wall", "cpu", "instructions"):
            raise ValueError(f"the clock is wall, cpu or instructions, not '{self.clock}'")
        if self.alpha <= 1 or self.repeats < 1 or self.tol < 0 or self.mem_gib < 0.25:
            raise ValueError("alpha is above 1, repeats at least 1, tol at least 0 and mem_gib at least 0.25")
        if len(self.hardness) != len(self.n_tests) or min(self.hardness) < 0 or not any(self.hardness):
            raise ValueError("hardness and n_tests have a value a level, and at least one level has a positive hardness")
        if min(self.n_tests) < 1:
            raise ValueError("every level needs at least one test")

    # --- measuring

    def measure(self, problem: Problem, codes: Sequence[str]) -> tuple[list[Score], Score]:
        """The scores of a problem's samples, and of the reference as if it were one. The same code is measured once.

        Raises ValueError when the reference fails or is too fast for the clock, `ExecutorMissing` without a sandbox for it.
        """
        if len(problem.levels) != len(self.hardness):
            raise ValueError(f"{problem.id} has {len(problem.levels)} levels and hardness {len(self.hardness)}")
        known = _counted if self.clock == "instructions" else {}
        found: dict[str | None, Score] = {
            code: known[self, problem, code] for code in codes if (self, problem, code) in known
        }
        again = known.get((self, problem, None))
        different = [code for code in dict.fromkeys(codes) if code not in found]
        if not different and again:
            return [found[code] for code in codes], again
        for start in range(0, max(1, len(different)), _PROCESSES):
            some = different[start : start + _PROCESSES]
            told = self._run(problem, some)
            found.update({code: self.score(told["reference"], one) for code, one in zip(some, told["samples"], strict=True)})
            again = again or self.score(told["reference"], told["again"])
        assert again is not None
        if len(known) > _MOST_COUNTED:
            known.clear()
        known.update({(self, problem, code): score for code, score in [*found.items(), (None, again)]})
        return [found[code] for code in codes], again

    def _run(self, problem: Problem, codes: Sequence[str]) -> dict[str, Any]:
        """Times as the harness reports them."""
        box = Sandbox(disk_mb=0, processes=len(codes) + 24)
        machine = box._machine()
        if machine.backend == "seccomp" and confine.landlock_version() < 6:
            raise ExecutorMissing("timing samples needs bubblewrap, user namespaces or a newer kernel: install bubblewrap")
        public = {
            "problem": {
                "prompt": problem.prompt, "entry_point": problem.entry_point, "levels": problem.levels,
                "input_generator": problem.input_generator,
            },
            "number": problem.number, "codes": [code.encode("utf-8", "replace").decode() for code in codes],
            "seed": self.seed, "n_tests": self.n_tests, "hardness": self.hardness, "alpha": self.alpha, "tol": self.tol,
            "repeats": 1 if self.clock == "instructions" else self.repeats, "clock": self.clock, "isolate": self.isolate,
            "instructions_a_second": _INSTRUCTIONS,
        }  # fmt: skip
        secret = marshal.dumps({"reference": problem.reference, "checker": problem.checker})
        files = {"main.py": _source("harness.py"), "confine.py": _confine(), "public": marshal.dumps(public)}
        verdict = box.run(
            files, ["python", "main.py"], timeout=_SECONDS, memory_mb=int(self.mem_gib * 1024), stdin=secret,
            max_output=1 << 28,
        )  # fmt: skip
        if not verdict.passed:
            raise ValueError(f"{problem.id} could not be measured: {verdict.message or verdict.status}")
        told: dict[str, Any] = json.loads(verdict.stdout)
        return told

    # --- scoring

    def score(self, reference: Sequence[Sequence[Sequence[float]]], sample: Mapping[str, Any]) -> Score:
        """What times are worth: ``reference`` by level, case, repeat; ``sample`` {"outcome", "level", "message", "times"}.

        Raises ValueError for negative times and for a reference that the clock cannot see.
        """
        best = [
            max(map(hodges_lehmann, cases)) if weight else 0.0
            for cases, weight in zip(reference, self.hardness, strict=True)
        ]
        limit = self.alpha * max(best) + self.tol * (_INSTRUCTIONS if self.clock == "instructions" else 1.0)
        outcome, ended, message = sample["outcome"], sample["level"], sample["message"]
        longest: list[float | None] = []
        times: list[tuple[float, ...]] = []
        for level, cases in enumerate(sample["times"]):
            if any(time > limit for case in cases for time in case) and (outcome == "done" or level <= ended):
                outcome, ended, message = (
                    ("timeout", level, "") if outcome not in ("wrong", "error") else (outcome, ended, message)
                )
            finished = outcome == "done" or level < ended
            times.append(tuple(hodges_lehmann(case) for case in cases if case))
            longest.append(max(times[-1]) if finished else None)
        nothing = tuple(0.0 for _ in self.hardness)
        if outcome in ("wrong", "error") or (ended == 0 and outcome != "done"):
            return Score(False, 0.0, nothing, outcome, ended, message, tuple(times))
        levels = level_scores(longest, best, self.hardness, self.alpha)
        if self.clip:
            levels = [min(1.0, f) for f in levels]
        at = None if outcome == "done" else ended
        return Score(True, sample_score(levels, self.hardness), tuple(levels), outcome, at, message, tuple(times))

    # --- a whole set

    def evaluate(
        self,
        samples: Mapping[str, Sequence[str]],
        problems: Sequence[Problem],
        done: Callable[[int, int], None] | None = None,
        workers: int = 1,
    ) -> Evaluation:
        """Measures ``samples`` {problem id: codes}; ``done(count, total)`` after each. ``workers``: problems at once,
        which the clock on the wall does not bear: nothing else should run beside it.

        Raises ValueError for unknown ids and problems without samples.
        """
        if workers < 1 or (workers > 1 and self.clock == "wall"):
            raise ValueError("the clock on the wall needs one problem after the other: workers=1")
        known = {problem.id: problem for problem in problems}
        if unknown := [name for name in samples if name not in known]:
            raise ValueError(f"there is no problem '{unknown[0]}' in this set")
        if empty := [name for name, codes in samples.items() if not codes]:
            raise ValueError(f"'{empty[0]}' has no sample; a missing sample is not a zero")
        scores, references = {}, {}
        with ThreadPoolExecutor(workers, thread_name_prefix="enamel") as pool:
            measured = pool.map(lambda item: self.measure(known[item[0]], item[1]), samples.items())
            for count, (name, (some, again)) in enumerate(zip(samples, measured, strict=True), 1):
                scores[name], references[name] = tuple(some), again
                if done:
                    done(count, len(samples))
        return Evaluation(scores, references, self.clock)


@cache
def _source(name: str) -> bytes:
    return (Path(__file__).parent / name).read_bytes()


@cache
def _confine() -> bytes:
    return Path(str(confine.__file__)).read_bytes()
