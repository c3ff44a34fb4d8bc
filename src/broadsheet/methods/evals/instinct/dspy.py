"""INSTINCT as an optimiser of DSPy programs (needs dspy): a ``Teleprompter`` that chooses the instructions of predictors.

tuned = InstinctPrompter(metric, model, tokenizer).compile(program, trainset=train, valset=validation)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspy import Example, Module, Parallel
from dspy.teleprompt import Teleprompter

from . import INSTINCT, Result


class InstinctPrompter(Teleprompter):
    """Chooses the instruction of every predictor of a program, one predictor after the other.

    ``metric``: (example, prediction) -> number or bool, as DSPy's. ``model``, ``tokenizer``: the white box that writes the
    candidates, a transformers model; the program's own language model is the black box. ``samples``: examples that one
    instruction is tried on. ``threads``: how many of them at once.
    """

    def __init__(
        self,
        metric: Callable[[Example, Any], float | bool],
        model: Any,
        tokenizer: Any,
        method: INSTINCT | None = None,
        samples: int = 20,
        threads: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.metric, self.model, self.tokenizer = metric, model, tokenizer
        self.method = method or INSTINCT()
        self.samples, self.threads, self.seed = samples, threads, seed

    def compile(
        self,
        student: Module,
        *,
        trainset: Sequence[Example],
        teacher: Module | None = None,
        valset: Sequence[Example] | None = None,
        **_: Any,
    ) -> Module:
        """A copy of ``student`` with the instructions that were found; its ``instinct`` holds a `Result` a predictor.

        Candidates are written from five examples of ``trainset`` and scored on ``valset`` (default: the examples that were
        not shown). Raises ValueError for fewer than two examples.
        """
        if len(trainset) < 2:
            raise ValueError(f"a training set has at least 2 examples, got {len(trainset)}")
        shown = list(trainset)[: min(5, len(trainset) // 2)]
        scored = list(valset or list(trainset)[len(shown) :])
        program, found = student.deepcopy(), dict[str, Result]()
        space = self.method.space(self.model, self.tokenizer, [_as_texts(example) for example in shown])
        for name, predictor in program.named_predictors():
            scorer = _Scorer(self, program, predictor, scored)
            found[name] = self.method.optimise(space, scorer, self.seed)
            scorer.set(found[name].best)
        program.instinct = found
        return program


def _as_texts(example: Example) -> tuple[str, str]:
    """An example's inputs and labels, one field a line."""

    def joined(fields: Any) -> str:
        return "\n".join(str(value) for value in fields.toDict().values())

    return joined(example.inputs()), joined(example.labels())


@dataclass
class _Scorer:
    """The program's mean metric with an instruction in one of its predictors, on examples drawn afresh for every text."""

    prompter: InstinctPrompter
    program: Module
    predictor: Any
    examples: Sequence[Example]

    def set(self, instruction: str) -> None:
        self.predictor.signature = self.predictor.signature.with_instructions(instruction)

    def __call__(self, instruction: str) -> float:
        return self.fresh(instruction, 0)

    def fresh(self, instruction: str, number: int) -> float:
        self.set(instruction)
        key = hashlib.blake2b(f"{self.prompter.seed}\0{number}\0{instruction}".encode(), digest_size=8).hexdigest()
        count = min(self.prompter.samples, len(self.examples))
        chosen = random.Random(key).sample(list(self.examples), count)
        # A program that fails on an example is worth nothing there, and ends no search.
        many = Parallel(num_threads=self.prompter.threads, max_errors=count + 1, disable_progress_bar=True)
        answers = many([(self.program, example.inputs()) for example in chosen])
        scores = [
            0.0 if answer is None else float(self.prompter.metric(example, answer))
            for example, answer in zip(chosen, answers, strict=True)
        ]
        return sum(scores) / count
