"""How few bits can a code model have? A study of quantisers on executable tasks (Giagnorio et al. 2025, arXiv 2503.07103).

`Study` crosses models, methods, precisions and calibration texts. Every arm completes the same tasks with the same random
numbers (`broadsheet.core.sampling`), completions are cut at the end of their function and run in a sandbox, and arms are
compared by pass or fail of the same sample of the same task. So the paper's questions are calls on its result:

    results = Study({"model": ["pocket-code"], "method": ["rtn", "gptq"], "precision": [8, 4, 3, 2],
                     "calibration": ["code", "mixed", "random"]}, tasks).run()
    results.compare("bf16")                          # RQ1: each precision against the 16-bit model
    results.compare({"calibration": "random"})       # RQ2: does calibrating on code help?
    results.compare({"method": "rtn"})               # which quantiser?
    results.compare({"model": "small"})              # RQ3: size

Deviations from the paper: any `WeightMethod` is a method, not AQLM alone; precisions are budgets and arms are labelled by
the bits a weight that they really store; samples share their noise between arms (the paper draws them independently, which
is as valid and less sharp); and because the samples of one task are no independent witnesses, a task-level test stands
beside McNemar's (section 3.6), and it is said where the two disagree.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from broadsheet import resolve
from broadsheet.core.codetasks import CodeTask, truncate
from broadsheet.core.microworld import code
from broadsheet.core.models import fingerprint, identity, load
from broadsheet.core.records import JsonLines, Record, cell_key, home, now, provenance, source_digest
from broadsheet.core.sampling import sample
from broadsheet.core.sandbox import check_language, run
from broadsheet.core.stats import (
    benjamini_hochberg,
    bootstrap_ci,
    discordant,
    grouped_wilcoxon,
    mcnemar,
    paired_difference,
    paired_odds_ratio,
)
from broadsheet.core.texts import documents, pieces

from .base import Unreachable, WeightMethod, shapes, size
from .bench import ROOM, methods
from .quantiser import save

SLUG = "quantizing-code-llms"
BENCH = "code-study"
BASELINE = "bf16"
FACTORS = ("model", "method", "precision", "calibration")
#: ``progress(arm, tasks done, tasks in all, arms done, arms in all)``
Progress = Callable[["Arm", int, int, int, int], None]


@dataclass(frozen=True)
class Arm:
    """One cell of the design. ``precision``: the budget in bits a weight, None for the model as it is. ``calibration``: a
    text's name, empty where the method needs none."""

    model: str
    method: str = BASELINE
    precision: float | None = None
    calibration: str = ""

    @property
    def label(self) -> str:
        bits = "" if self.precision is None else f" {self.precision:g} bits"
        return f"{self.method}{bits}" + (f", {self.calibration}" if self.calibration else "")


@dataclass(frozen=True)
class Study:
    """``factors``: "model" (names or folders), "method" (names of the family's methods, ``module:Class``, `WeightMethod`
    instances, or a mapping of names to instances), "precision" (bits a weight; as everywhere in the family a quarter of a
    bit more is allowed for scales; None takes a method as it is configured) and "calibration" (``code``, ``mixed``,
    ``random``, or a name of ``texts``). The uncompressed model is an arm of its own; methods that need no calibration have
    one arm a precision, those that know no budgets one arm.

    ``tasks``: what is completed, see `broadsheet.core.codetasks`. ``texts``: name -> a file of text to calibrate on.
    ``samples`` pieces of ``tokens`` tokens calibrate. ``perplexity``: name -> a file of text; general text and functions of
    the microworld when empty. ``seed`` draws the calibration set and the samples. ``seconds`` and ``memory`` bound a
    program. ``rows``: how many samples are generated at a time.
    """

    factors: Mapping[str, Any]
    tasks: Sequence[CodeTask]
    n_samples: int = 20
    temperature: float = 0.2
    seed: int = 0
    max_new_tokens: int = 1024
    samples: int = 128
    tokens: int = 256
    texts: Mapping[str, str] = field(default_factory=dict)
    perplexity: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 2.0
    memory: int = 512 << 20
    device: str = "cpu"
    rows: int = 320

    def __post_init__(self) -> None:
        for name in self.factors:
            if name not in FACTORS:
                raise ValueError(f"unknown factor '{name}'; factors are {', '.join(FACTORS)}")
        for name in ("model", "method", "precision"):
            if not self.factors.get(name):
                raise ValueError(f"the study needs at least one {name} in its factors")
        for bits in self.factors["precision"]:
            if bits is not None and not 0 < bits <= 16:
                raise ValueError(f"a precision is bits a weight, above 0 and at most 16; got {bits}")
        for name in self.factors.get("calibration", ()):
            if name not in self.texts and name not in code.CALIBRATIONS:
                raise ValueError(
                    f"no calibration '{name}': it is one of {', '.join(code.CALIBRATIONS)}, or give it a text file"
                )
        if not self.tasks:
            raise ValueError("the study has no tasks")
        if len({task.name for task in self.tasks}) < len(self.tasks):
            raise ValueError("two tasks have the same name; results could not be paired")
        if self.n_samples < 1 or self.temperature < 0 or self.max_new_tokens < 1:
            raise ValueError("n_samples and max_new_tokens must be at least 1, the temperature at least 0")
        for language in {task.language for task in self.tasks}:
            check_language(language)

    @cached_property
    def methods(self) -> dict[str, WeightMethod]:
        """The methods by name."""
        given = self.factors["method"]
        found = given.items() if isinstance(given, Mapping) else map(_named, given)
        return {name: method for name, method in found if name != BASELINE}

    def arms(self) -> list[Arm]:
        """All arms; a model's baseline stands before its others."""
        texts = tuple(self.factors.get("calibration") or code.CALIBRATIONS[:1])
        found = []
        for model in self.factors["model"]:
            found.append(Arm(model))
            for name, method in self.methods.items():
                for bits in self.factors["precision"] if method.budgeted else (None,):
                    found += [Arm(model, name, bits, text) for text in (texts if method.calibrated else ("",))]
        return found

    def run(self, path: str | Path | None = None, progress: Progress | None = None, fresh: bool = False) -> Results:
        """Everything that is not in the file ``path`` yet (default: under BROADSHEET_HOME), and what is.

        Results are stored after every batch of tasks: a kill loses one batch. Raises ValueError for models and methods that
        do not go together.
        """
        store = JsonLines(path or home() / "studies" / "code.jsonl")
        stored: dict[str, dict[str, Any]] = {}
        for row in () if fresh else store:
            if "arm" in row:
                stored.setdefault(row["arm"], {}).update({row["task"]: row} if "task" in row else {"facts": row["facts"]})
        arms, done = self.arms(), []
        for index, arm in enumerate(arms):

            def report(count: int, arm: Arm = arm, index: int = index) -> None:
                if progress:
                    progress(arm, count, len(self.tasks), index, len(arms))

            done.append(self._arm(arm, store, stored.get(self._key(arm), {}), report))
        return Results(tuple(self.tasks), tuple(done), self.n_samples, self.temperature, self.seed)

    def _key(self, arm: Arm) -> str:
        """What identifies an arm's results, the tasks apart."""
        return cell_key(
            arm={**asdict(arm), "method": None},
            method=repr(self.methods.get(arm.method, BASELINE)),
            model=identity(arm.model),
            text=[self.texts.get(arm.calibration), self.samples, self.tokens] if arm.calibration else None,
            perplexity=dict(self.perplexity),
            drawn=[self.n_samples, self.temperature, self.seed, self.max_new_tokens],
            bounds=[self.seconds, self.memory],
            source=source_digest("weights"),
        )

    def _arm(self, arm: Arm, store: JsonLines, stored: dict[str, Any], report: Callable[[int], None]) -> ArmResult:
        """One arm: what is stored, and the rest."""
        key, digests = self._key(arm), [_digest(task) for task in self.tasks]
        missing = [task for task, digest in zip(self.tasks, digests, strict=True) if digest not in stored]
        report(len(self.tasks) - len(missing))
        facts = stored.get("facts")
        if facts is None or (missing and "least" not in facts):
            model, tokenizer, found = self._compressed(arm)
            if facts is None:
                facts = stored["facts"] = found
                store.add({"arm": key, **asdict(arm), "facts": facts})
            if model is not None:
                for row in self._completed(model, tokenizer, missing, lambda n: report(len(self.tasks) - len(missing) + n)):
                    stored[row["task"]] = row
                    store.add({"arm": key, **row})
        if "least" in facts:
            return ArmResult(arm, facts, (), ())
        rows = [stored[digest] for digest in digests]
        statuses = tuple(tuple(row["statuses"][index] for index in row["drawn"]) for row in rows)
        completions = tuple(tuple(row["completions"][index] for index in row["drawn"]) for row in rows)
        return ArmResult(arm, facts, statuses, completions)

    def _compressed(self, arm: Arm) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase, dict[str, Any]]:
        """The arm's model as it loads from its saved folder, the tokenizer, and what is known of the model.

        The model is None when the method cannot get down to the precision.
        """
        original, tokenizer = _original(arm.model, self.device)
        made, facts = original, {}
        if arm.method != BASELINE:
            method = self.methods[arm.method]
            try:
                if arm.precision is not None:
                    method = method.at_budget(arm.precision + ROOM, shapes(original))
            except Unreachable as error:
                return None, tokenizer, {"least": error.least}
            start = time.perf_counter()
            made = method.compress(copy.deepcopy(original), self._calibration(arm, tokenizer) if method.calibrated else None)
            facts = {"parameters": _plain(method.parameters), "compress_seconds": round(time.perf_counter() - start, 2)}
        held = size(made)
        with tempfile.TemporaryDirectory() as folder:
            save(made, Path(folder) / "model")
            disk = sum(file.stat().st_size for file in (Path(folder) / "model").iterdir() if file.suffix != ".json")
            # On a CPU computed in float32 with the weights as stored: bfloat16 is slow there.
            dtype = torch.float32 if self.device == "cpu" else "auto"
            model: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
            model.to(self.device).eval()
        facts |= {
            "model": f"{Path(arm.model).name}@{fingerprint(original)}",
            "bits": round(held.bits, 4),
            "bytes": held.bytes,
            "disk_bytes": disk,
            "perplexity": {name: _perplexity(model, ids) for name, ids in self._perplexity_texts(tokenizer).items()},
        }
        return model, tokenizer, facts

    def _calibration(self, arm: Arm, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
        """Token ids [samples, tokens]. None of the microworld's are evaluated: its splits share no function."""
        if arm.calibration in self.texts:
            return documents(self.texts[arm.calibration], tokenizer, self.tokens, self.samples, self.seed)
        return code.calibration(arm.calibration, self.samples, self.tokens, tokenizer, self.seed)

    def _perplexity_texts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Token ids [pieces, tokens] by name, the same for every arm and seed."""
        if self.perplexity:
            return {name: pieces(path, tokenizer, self.tokens)[:64] for name, path in self.perplexity.items()}
        kinds = {"code": "code", "text": "random"}
        return {
            name: code.calibration(kind, 32, self.tokens, tokenizer, "perplexity", "evaluation")
            for name, kind in kinds.items()
        }

    def _completed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[CodeTask],
        report: Callable[[int], None],
    ) -> Iterator[dict[str, Any]]:
        """A row a task: its different completions, how each ended, and which of them every sample is."""
        at_once = max(1, self.rows // self.n_samples)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for first in range(0, len(tasks), at_once):
                some = tasks[first : first + at_once]
                drawn = sample(
                    model,
                    tokenizer,
                    [(task.name, task.prompt) for task in some],
                    self.n_samples,
                    self.temperature,
                    self.max_new_tokens,
                    self.seed,
                    [task.stop_tokens for task in some],
                )
                jobs = []
                for task, texts in zip(some, drawn, strict=True):
                    cut = [truncate(task.prompt, text, task.language) for text in texts]
                    different = list(dict.fromkeys(cut))
                    ends = [pool.submit(self._execute, task, text) for text in different]
                    jobs.append((task, cut, different, ends))
                for count, (task, cut, different, ends) in enumerate(jobs):
                    yield {
                        "task": _digest(task),
                        "name": task.name,
                        "completions": different,
                        "statuses": [end.result() for end in ends],
                        "drawn": [different.index(text) for text in cut],
                    }
                    report(first + count + 1)

    def _execute(self, task: CodeTask, completion: str) -> str:
        return run(task.source(completion), task.tests, task.language, self.seconds, self.memory).status


@lru_cache(maxsize=1)
def _original(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The 16-bit model."""
    return load(name, dtype=torch.bfloat16, device=device)


def _named(given: Any) -> tuple[str, WeightMethod]:
    """A method by its name in the family, by ``module:Class``, by the module in this package that defines it, or as it
    is."""
    if isinstance(given, WeightMethod):
        return type(given).__name__.lower(), given
    known = methods()
    if given in known:
        return given, known[given]
    if ":" in given:
        made = resolve(given)()
        return type(made).__name__.lower(), made
    if given.isidentifier() and find_spec(f"{__package__}.{given}"):
        module = import_module(f"{__package__}.{given}")
        for made in vars(module).values():
            if isinstance(made, type) and issubclass(made, WeightMethod) and made.__module__.startswith(module.__name__):
                return given, made()
    raise ValueError(f"unknown method '{given}' in weights; known: {', '.join(known)}, or give module:Class")


def _digest(task: CodeTask) -> str:
    """Identifies a task by what it asks and how it is judged."""
    text = json.dumps([task.name, task.language, task.prompt, task.tests, task.stop_tokens])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(parameters), default=str))


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Of all tokens but each piece's first."""
    losses = []
    for some in ids.split(8):
        some = some.to(model.device)
        logits = model(some, use_cache=False).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none"))
    mean = float(torch.cat(losses).mean())
    return math.exp(mean) if mean < 50 else math.inf


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArmResult:
    """``statuses`` and ``completions``: for every task, for every sample. ``facts``: true ``bits`` a weight, ``bytes``,
    ``disk_bytes``, ``perplexity`` by text, ``parameters``; or ``least`` alone, when the method cannot go down to the
    precision.
    """

    arm: Arm
    facts: dict[str, Any]
    statuses: tuple[tuple[str, ...], ...]
    completions: tuple[tuple[str, ...], ...]

    @property
    def reached(self) -> bool:
        return "least" not in self.facts

    def passed(self, tasks: Sequence[int]) -> tuple[list[bool], list[int]]:
        """Every sample of these tasks, and which task it is of. A missing completion has not passed."""
        flags = [status == "passed" for index in tasks for status in self.statuses[index]]
        return flags, [index for index in tasks for _ in self.statuses[index]]


@dataclass(frozen=True)
class Comparison:
    """An arm against its baseline on the same samples of the same tasks.

    ``only_baseline`` and ``only_arm``: samples that one of the two alone passes; ``odds_ratio``: the first over the second,
    with its exact interval; ``p``: McNemar's exact test over samples; ``p_tasks``: Wilcoxon's signed-rank test over tasks;
    both also adjusted within the model and language. ``difference`` of pass@1 with a 95 % bootstrap interval over tasks.
    """

    arm: Arm
    baseline: Arm
    language: str
    bits: float
    baseline_bits: float
    pass_at_1: float
    baseline_pass_at_1: float
    difference: float
    interval: tuple[float, float]
    samples: int
    tasks: int
    only_baseline: int
    only_arm: int
    odds_ratio: float
    odds_interval: tuple[float, float]
    p: float
    p_adjusted: float
    p_tasks: float
    p_tasks_adjusted: float
    alpha: float

    @property
    def significant(self) -> bool:
        return self.p_adjusted < self.alpha

    @property
    def significant_by_task(self) -> bool:
        return self.p_tasks_adjusted < self.alpha

    @property
    def disagree(self) -> bool:
        """Whether the two levels come to different verdicts; the task level is to be believed."""
        return self.significant != self.significant_by_task


@dataclass(frozen=True)
class Results:
    """What a study found. ``arms`` are in the order of the design."""

    tasks: tuple[CodeTask, ...]
    arms: tuple[ArmResult, ...]
    n_samples: int
    temperature: float
    seed: int

    @property
    def languages(self) -> list[str]:
        return list(dict.fromkeys(task.language for task in self.tasks))

    def of_language(self, language: str) -> list[int]:
        """The places of a language's tasks."""
        return [index for index, task in enumerate(self.tasks) if task.language == language]

    def pass_at_1(self, arm: ArmResult, language: str) -> tuple[float, tuple[float, float]]:
        """The mean share of samples that pass, with a 95 % bootstrap interval over tasks."""
        flags, groups = arm.passed(self.of_language(language))
        values = [float(flag) for flag in flags]
        return float(np.mean(values)), bootstrap_ci(values, groups)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The tidy table: a row a sample."""
        for result in self.arms:
            for task, statuses, completions in zip(
                self.tasks, result.statuses, result.completions, strict=bool(result.statuses)
            ):
                for index, (status, completion) in enumerate(zip(statuses, completions, strict=True)):
                    yield {
                        **asdict(result.arm),
                        "bits": result.facts["bits"],
                        "language": task.language,
                        "task": task.name,
                        "sample": index,
                        "passed": status == "passed",
                        "status": status,
                        "completion": completion,
                        "seed": self.seed,
                        "temperature": self.temperature,
                    }

    def write(self, path: str | Path) -> None:
        """Writes the tidy table as ``.csv`` or ``.parquet``. Raises ValueError for another ending, or without pyarrow."""
        path, rows = Path(path), list(self.rows())
        if path.suffix == ".csv":
            with open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".parquet":
            if not find_spec("pyarrow"):
                raise ValueError("a Parquet table needs pyarrow: pip install 'broadsheet[data]', or write a .csv")
            from pyarrow import Table, parquet

            parquet.write_table(Table.from_pylist(rows), path)
        else:
            raise ValueError(f"a table is written as .csv or .parquet, not '{path.name}'")

    def compare(
        self,
        baseline: str | Mapping[str, Any] = BASELINE,
        test: Literal["mcnemar-exact"] = "mcnemar-exact",
        correction: Literal["bh", "none"] = "bh",
        alpha: float = 0.05,
    ) -> list[Comparison]:
        """Every arm against its baseline: the arm with the same factors but for those that ``baseline`` names.

        ``baseline``: a method's name, or factors such as ``{"calibration": "random"}``. P-values are adjusted by Benjamini
        and Hochberg within a model and language. Raises ValueError when no arm has a baseline, or their samples are not
        paired.
        """
        wanted = {"method": baseline} if isinstance(baseline, str) else dict(baseline)
        if wanted == {"method": BASELINE}:
            wanted |= {"precision": None, "calibration": ""}
        found = self._compared(
            [(result, other) for result in self.arms for other in self._like(result, wanted)], test, correction, alpha
        )
        if not found:
            raise ValueError(f"unpaired results: no arm has a baseline with {wanted} and is another; add it to the factors")
        return found

    def pairwise(
        self,
        factor: str,
        test: Literal["mcnemar-exact"] = "mcnemar-exact",
        correction: Literal["bh", "none"] = "bh",
        alpha: float = 0.05,
    ) -> list[Comparison]:
        """Every two levels of a factor, all else equal, the later against the earlier; adjusted together. May be empty."""
        levels = list(dict.fromkeys(asdict(result.arm).get(factor) for result in self.arms if result.arm.method != BASELINE))
        pairs = [
            (result, other)
            for result in self.arms
            if result.arm.method != BASELINE and (own := asdict(result.arm).get(factor)) is not None
            for level in levels[: levels.index(own)]
            for other in self._like(result, {factor: level})
        ]
        return self._compared(pairs, test, correction, alpha)

    def _like(self, result: ArmResult, wanted: Mapping[str, Any]) -> list[ArmResult]:
        """The other arms with these factors and the rest as in ``result``; one without calibration goes with any."""
        for name in wanted:
            if name not in FACTORS:
                raise ValueError(f"unknown factor '{name}'; factors are {', '.join(FACTORS)}")
        aim = {**asdict(result.arm), **wanted}

        def fits(arm: Arm) -> bool:
            facts = asdict(arm)
            free = {"calibration"} - set(wanted) if "" in (facts["calibration"], aim["calibration"]) else set()
            return all(facts[name] == aim[name] for name in aim if name not in free)

        return [other for other in self.arms if other is not result and fits(other.arm)]

    def _compared(
        self, pairs: Sequence[tuple[ArmResult, ArmResult]], test: str, correction: str, alpha: float
    ) -> list[Comparison]:
        """These pairs, those of a model and language together."""
        if test != "mcnemar-exact":
            raise ValueError(f"unknown test '{test}'; there is mcnemar-exact, with a task-level test beside it")
        if correction not in ("bh", "none"):
            raise ValueError(f"unknown correction '{correction}'; there are bh and none")
        reached = [pair for pair in pairs if pair[0].reached and pair[1].reached]
        return [
            one
            for language in self.languages
            for model in dict.fromkeys(result.arm.model for result, _ in reached)
            for one in self._family([pair for pair in reached if pair[0].arm.model == model], language, correction, alpha)
        ]

    def _family(
        self, pairs: Sequence[tuple[ArmResult, ArmResult]], language: str, correction: str, alpha: float
    ) -> Iterator[Comparison]:
        """Comparisons whose p-values are adjusted together."""
        places, tests = self.of_language(language), []
        for result, other in pairs:
            if [len(row) for row in result.statuses] != [len(row) for row in other.statuses]:
                raise ValueError(
                    f"unpaired results: {result.arm.label} and {other.arm.label} have other samples; run both again"
                )
            ours, groups = result.passed(places)
            theirs, _ = other.passed(places)
            tests.append((ours, theirs, groups, mcnemar(ours, theirs), grouped_wilcoxon(ours, theirs, groups)))
        raw = [[one[3] for one in tests], [one[4] for one in tests]]
        adjusted = [benjamini_hochberg(some) if correction == "bh" else some for some in raw]
        for index, (result, other) in enumerate(pairs):
            ours, theirs, groups, p, p_tasks = tests[index]
            difference, interval = paired_difference([float(x) for x in ours], [float(x) for x in theirs], groups)
            only_baseline, only_arm = discordant(theirs, ours)
            ratio, odds_interval = paired_odds_ratio(theirs, ours)
            yield Comparison(
                arm=result.arm,
                baseline=other.arm,
                language=language,
                bits=result.facts["bits"],
                baseline_bits=other.facts["bits"],
                pass_at_1=float(np.mean(ours)),
                baseline_pass_at_1=float(np.mean(theirs)),
                difference=difference,
                interval=interval,
                samples=len(ours),
                tasks=len(places),
                only_baseline=only_baseline,
                only_arm=only_arm,
                odds_ratio=ratio,
                odds_interval=odds_interval,
                p=p,
                p_adjusted=adjusted[0][index],
                p_tasks=p_tasks,
                p_tasks_adjusted=adjusted[1][index],
                alpha=alpha,
            )

    def records(self) -> list[Record]:
        """The arms as records: pass@1 by language, bits, bytes, perplexities."""
        made: list[Record] = []
        for result in self.arms:
            setting: dict[str, Any] = {} if result.arm.precision is None else {"budget": result.arm.precision}
            setting |= {"calibration": result.arm.calibration} if result.arm.calibration else {}
            shared: dict[str, Any] = {
                "paper": SLUG,
                "method": result.arm.method,
                "bench": BENCH,
                "seed": self.seed,
                "model": result.facts.get("model", result.arm.model),
                "parameters": result.facts.get("parameters", {}),
                "time": now(),
                **provenance(),
            }
            if not result.reached:
                least = {"least": round(result.facts["least"], 4)}
                made.append(Record(metric="reachable", value=0.0, setting={**setting, **least}, **shared))
                continue
            for language in self.languages:
                value, interval = self.pass_at_1(result, language)
                count = len(self.of_language(language)) * self.n_samples
                place = {**setting, "language": language, "temperature": self.temperature}
                made.append(Record(metric="pass@1", value=value, ci=interval, n=count, setting=place, **shared))
            for metric, unit in (
                ("bits", "bits per weight"),
                ("bytes", "bytes held"),
                ("disk_bytes", "bytes of weights' files"),
            ):
                made.append(Record(metric=metric, value=result.facts[metric], unit=unit, setting=setting, **shared))
            for text, value in result.facts["perplexity"].items():
                made.append(Record(metric="perplexity", value=value, setting={**setting, "text": text}, **shared))
        return made
