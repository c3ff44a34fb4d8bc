"""The design: arms, and how one is measured."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from broadsheet import resolve
from broadsheet.core.codetasks import CodeTask, truncate
from broadsheet.core.microworld import code
from broadsheet.core.models import fingerprint, identity, load
from broadsheet.core.records import JsonLines, cell_key, home, source_digest
from broadsheet.core.sampling import sample
from broadsheet.core.sandbox import check_language, run
from broadsheet.core.texts import documents, pieces

from ..base import Unreachable, WeightMethod, shapes, size
from ..bench import ROOM, methods
from ..quantiser import save
from .results import BASELINE, FACTORS, Arm, ArmResult, Results

#: ``progress(arm, tasks done, tasks in all, arms done, arms in all)``
Progress = Callable[[Arm, int, int, int, int], None]
#: How the program of (task, completion) ended.
Verdicts = dict[tuple[str, str], Future[str]]


@dataclass(frozen=True)
class Study:
    """``factors``: "model" (names or folders), "method" (names of the family's methods, ``module:Class``, `WeightMethod`
    instances, or a mapping of names to instances), "precision" (bits a weight; as everywhere in the family a quarter of a
    bit more is allowed for scales; None takes a method as it is configured) and "calibration" (``code``, ``mixed``,
    ``random``, or a name of ``texts``). The uncompressed model is an arm of its own; methods that need no calibration have
    one arm a precision, those that know no budgets one arm.

    ``tasks``: what is completed, see `broadsheet.core.codetasks`. ``texts``: name -> a file of text to calibrate on.
    ``samples`` pieces of ``tokens`` tokens calibrate. ``perplexity``: name -> a file of text; general text and functions of
    the microworld when empty; ``scored`` pieces of each count. ``seed`` draws the calibration set and the samples.
    ``seconds`` and ``memory`` bound a program. ``rows``: how many samples are generated at a time.
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
    scored: int = 32
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
        self.arms()  # unknown methods are told before anything runs

    @cached_property
    def methods(self) -> dict[str, WeightMethod]:
        """The methods by name."""
        given = self.factors["method"]
        found = given.items() if isinstance(given, Mapping) else map(named, given)
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
        verdicts: Verdicts = {}
        for row in () if fresh else store:
            if "arm" in row:
                stored.setdefault(row["arm"], {}).update({row["task"]: row} if "task" in row else {"facts": row["facts"]})
        arms, done = self.arms(), []
        for index, arm in enumerate(arms):

            def report(count: int, arm: Arm = arm, index: int = index) -> None:
                if progress:
                    progress(arm, count, len(self.tasks), index, len(arms))

            done.append(self._arm(arm, store, stored.get(self._key(arm), {}), verdicts, report))
        return Results(tuple(self.tasks), tuple(done), self.n_samples, self.temperature, self.seed)

    def _key(self, arm: Arm) -> str:
        """What identifies an arm's results, the tasks apart."""
        return cell_key(
            arm={**asdict(arm), "method": None},
            method=repr(self.methods.get(arm.method, BASELINE)),
            model=identity(arm.model),
            text=[self.texts.get(arm.calibration), self.samples, self.tokens] if arm.calibration else None,
            perplexity=[dict(self.perplexity), self.scored, self.tokens],
            drawn=[self.n_samples, self.temperature, self.seed, self.max_new_tokens],
            bounds=[self.seconds, self.memory],
            source=source_digest("weights"),
        )

    def _arm(
        self, arm: Arm, store: JsonLines, stored: dict[str, Any], verdicts: Verdicts, report: Callable[[int], None]
    ) -> ArmResult:
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
                before = len(self.tasks) - len(missing)
                for row in self._completed(model, tokenizer, missing, verdicts, lambda n: report(before + n)):
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
            return {name: pieces(path, tokenizer, self.tokens)[: self.scored] for name, path in self.perplexity.items()}
        return _microworld_texts(tokenizer, self.scored, self.tokens)

    def _completed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[CodeTask],
        verdicts: Verdicts,
        report: Callable[[int], None],
    ) -> Iterator[dict[str, Any]]:
        """A row a task: its different completions, how each ended, and which of them every sample is.

        A program that another arm wrote too is run once: that saves most runs, and the same program never gets two verdicts.
        """
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
                cut = [
                    [truncate(task.prompt, text, task.language) for text in texts]
                    for task, texts in zip(some, drawn, strict=True)
                ]
                for task, texts in zip(some, cut, strict=True):
                    for text in texts:
                        if (task.name, text) not in verdicts:
                            verdicts[task.name, text] = pool.submit(self._execute, task, text)
                for count, (task, texts) in enumerate(zip(some, cut, strict=True)):
                    different = list(dict.fromkeys(texts))
                    yield {
                        "task": _digest(task),
                        "name": task.name,
                        "completions": different,
                        "statuses": [verdicts[task.name, text].result() for text in different],
                        "drawn": [different.index(text) for text in texts],
                    }
                    report(first + count + 1)

    def _execute(self, task: CodeTask, completion: str) -> str:
        return run(task.source(completion), task.tests, task.language, self.seconds, self.memory).status


@lru_cache(maxsize=1)
def _original(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The 16-bit model."""
    return load(name, dtype=torch.bfloat16, device=device)


@lru_cache(maxsize=1)
def _microworld_texts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int) -> dict[str, torch.Tensor]:
    """Functions that nothing was trained on, and general text: token ids [count, tokens]."""
    kinds = {"code": "code", "text": "random"}
    return {
        name: code.calibration(kind, count, tokens, tokenizer, "perplexity", "evaluation") for name, kind in kinds.items()
    }


def named(given: Any) -> tuple[str, WeightMethod]:
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
    family = str(__package__).rpartition(".")[0]
    if given.isidentifier() and find_spec(f"{family}.{given}"):
        module = import_module(f"{family}.{given}")
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
