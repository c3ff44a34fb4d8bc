"""Scoring an instruction on a black box: instruction-induction tasks, their metrics, and what is asked."""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from broadsheet.core.chat import Chat, run
from broadsheet.core.chat.client import in_order

Metric = Literal["em", "f1", "set", "contains"]
METRICS = {
    "common_concept": "f1", "informal_to_formal": "f1", "orthography_starts_with": "set", "taxonomy_animal": "set",
    "synonyms": "contains",
}  # fmt: skip
#: where the instruction goes: before the input, or (chain of thought) as the beginning of the answer
PLAIN = "Instruction: {instruction}\n\nInput: {input}\n\nOutput:"
THOUGHT = "Q: {input}\n\nA: {instruction}"
ONE_SHOT = "Instruction: {instruction}\n\nInput: {demo_input}\n\nOutput: {demo_output}\n\nInput: {input}\n\nOutput:"
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Example:
    """An input with every output that is right."""

    input: str
    outputs: tuple[str, ...]


def normalised(text: str) -> str:
    """The first line's first sentence in lower case without punctuation, "and" between words and "Sentence 1:"."""
    for dropped in (" and ", "Sentence 1:", "Sentence 2:"):
        text = text.replace(dropped, " ")
    text = text.strip().split("\n")[0].split(".")[0].lower()
    return text.replace("-", " ").translate(_PUNCTUATION)


def _exact(said: str, wanted: str) -> float:
    return float(said == wanted)


def _f1(said: str, wanted: str) -> float:
    a, b = said.split(), wanted.split()
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0


def _same_set(said: str, wanted: str) -> float:
    return float(set(said.split()) == set(wanted.split()))


def _contains(said: str, wanted: str) -> float:
    return float(bool(re.search(rf"\b{re.escape(wanted)}\b", said)))


_MARKS: dict[str, Callable[[str, str], float]] = {"em": _exact, "f1": _f1, "set": _same_set, "contains": _contains}


def score_of(text: str, outputs: Sequence[str], metric: Metric) -> float:
    """The best score of an answer over all outputs that are right; an empty answer is worth nothing."""
    said, wanted = normalised(text), [right for right in map(normalised, outputs) if right.strip()]
    return max((_MARKS[metric](said, right) for right in wanted), default=0.0) if said.strip() else 0.0


@dataclass(frozen=True)
class Task:
    """Examples to find an instruction with, and others to judge it on."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    metric: Metric


def load_task(path: str | Path, name: str, seed: int = 0) -> Task:
    """A task of the instruction-induction data (the folder that holds ``raw/execute`` and ``raw/induce``).

    Where there is no file to induce from, the first half of the other's examples serves. Raises ValueError.
    """
    test = _examples(Path(path) / "raw" / "execute" / f"{name}.json", name, seed)
    induce = Path(path) / "raw" / "induce" / f"{name}.json"
    train = _examples(induce, name, seed) if induce.exists() else test[: len(test) // 2]
    if not induce.exists():
        test = test[len(test) // 2 :]
    return Task(name, tuple(train), tuple(test), METRICS.get(name, "em"))  # type: ignore[arg-type]


def own_task(path: str | Path, metric: Metric = "em") -> Task:
    """A task of one's own: JSON lines with ``input`` and ``output`` (a text, or a list of those that are right). The last
    third is what the result is tested on. Raises ValueError that names the line."""
    if metric not in _MARKS:
        raise ValueError(f"the metric is one of {', '.join(_MARKS)}, got {metric}")
    found = list[Example]()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the examples at {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            outputs = [row["output"]] if isinstance(row["output"], str) else list(row["output"])
        except (ValueError, KeyError, TypeError):
            outputs = []
        if not outputs or not all(isinstance(text, str) for text in (row["input"], *outputs)):
            raise ValueError(
                f'{path}, line {number}: an example is {{"input": "…", "output": "…"}} or has a list of outputs'
            )
        found.append(Example(row["input"], tuple(outputs)))
    if len(found) < 6:
        raise ValueError(f"{path} has {len(found)} examples; 6 are needed: to show, to score on and to test on")
    cut = len(found) - len(found) // 3
    return Task(Path(path).stem, tuple(found[:cut]), tuple(found[cut:]), metric)


def _examples(path: Path, name: str, seed: int) -> list[Example]:
    try:
        rows = list(json.loads(path.read_text(encoding="utf-8"))["examples"].values())
        return [_example(row, name, random.Random(f"{seed} {number}")) for number, row in enumerate(rows)]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot read {path} ({error}): give the folder of orhonovich/instruction-induction's data"
        ) from None


def _example(row: dict[str, Any], name: str, draw: random.Random) -> Example:
    if name == "cause_and_effect":
        both = [row["cause"], row["effect"]]
        draw.shuffle(both)
        return Example(f"Sentence 1: {both[0]} Sentence 2: {both[1]}", (row["cause"],))
    if name == "common_concept":
        return Example(", ".join(row["items"][:-1]), tuple(row["all_common_concepts"]))
    for several in ("other_rhymes", "possible_translations"):
        if several in row:
            # The data list empty translations, which the authors' metrics give an empty answer full marks for.
            return Example(row["input"], tuple(output for output in row[several] if output.strip()))
    return Example(row["input"], (row["output"],))


@dataclass(frozen=True)
class Scorer:
    """An instruction's mean score on ``samples`` of the ``examples``, which are drawn afresh for every instruction and draw.

    ``chat``: the black box. ``template``: `PLAIN` or `THOUGHT`. ``demo``: one example shown in the query as well (the
    one-shot variant). Answers that are not whole score 0. The draw depends on the seed, the text and the draw's number
    alone, so a run that was killed asks the same again, and its ledger answers.
    """

    chat: Chat
    examples: tuple[Example, ...]
    metric: Metric = "em"
    samples: int = 20
    seed: int = 0
    template: str = PLAIN
    demo: Example | None = None
    max_tokens: int = 200

    def __post_init__(self) -> None:
        if not self.examples or self.samples < 1:
            raise ValueError("scoring needs examples and at least one sample")
        if self.metric not in _MARKS:
            raise ValueError(f"the metric is one of {', '.join(_MARKS)}, got {self.metric}")

    def __call__(self, text: str) -> float:
        return self.fresh(text, 0)

    def fresh(self, text: str, number: int) -> float:
        """The score on draw ``number``; 0 is the search's."""
        key = hashlib.blake2b(f"{self.seed}\0{number}\0{text}".encode(), digest_size=8).hexdigest()
        chosen = random.Random(key).sample(self.examples, min(self.samples, len(self.examples)))
        return self.on(text, chosen)

    def on(self, text: str, examples: Sequence[Example]) -> float:
        """The score on these examples."""

        async def one(example: Example) -> float:
            message = {"role": "user", "content": self._asked(text, example)}
            choice = (await self.chat.acomplete([message], tag="score", max_tokens=self.max_tokens))[0]
            return score_of(choice.text, example.outputs, self.metric) if choice.ok else 0.0

        scores = run(in_order(one, examples, self.chat.concurrency))
        return sum(scores) / len(scores)

    def _asked(self, text: str, example: Example) -> str:
        if self.demo is None:
            return _filled(self.template, instruction=text, input=example.input)
        return _filled(
            ONE_SHOT, instruction=text, input=example.input, demo_input=self.demo.input, demo_output=self.demo.outputs[0]
        )


def _filled(template: str, **parts: str) -> str:
    """Every {name} replaced at once, so that braces in what is put in mean nothing."""
    return re.sub(r"\{(\w+)\}", lambda match: parts[match[1]], template)
