"""A small language of function completion, and a general text beside it: what the pocket code model is made of.

A task is a Python function of one line over ints and lists, asked for by a docstring:

    def total(xs):
        \"\"\"Return the sum of the elements of xs that are greater than 7, each multiplied by 3.\"\"\"
        return sum(x * 3 for x in xs if x > 7)

Functions are composed from templates with constants drawn at random; wording and names vary. Every task carries inputs with
what the reference returns for them, so that a completion is judged by running it. What trains and what evaluates never
share a function: a hash of the function's body, names apart, decides which of the two it belongs to, and bodies without a
constant (there are few) only ever train.

The general text is of made-up stories without a line of code. Calibration is then `documents` of ``code``, ``random``
(general text) or ``mixed`` (half and half), the three kinds of arXiv 2503.07103, section 3.3.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from broadsheet.core.codetasks import CodeTask

from .encoding import IGNORE
from .lexicon import ADJECTIVES, CATEGORIES, NOUNS, TIMES, VERBS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Split = Literal["train", "evaluation"]
Domain = Literal["code", "text"]
Seed = int | str

#: What may stand in the place of a constant.
_SMALL, _LARGE = range(2, 13), range(2, 60)
#: Where a completion has gone past its function.
STOP = ("\ndef", "\n#", "\nprint", "\nassert")
#: One function in so many belongs to the evaluation.
_HELD_OUT = 8


# --- pieces of functions: English and Python side by side -------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """A phrase and its expression; ``tight``: it can be an operand as it is; ``constants`` that it mentions."""

    english: str
    python: str
    constants: tuple[int, ...] = ()
    tight: bool = False

    @property
    def operand(self) -> str:
        return self.python if self.tight else f"({self.python})"


def _condition(rng: random.Random, v: str) -> _Piece:
    """What an element ``v`` is asked to be, to be read after "are" or "is"."""
    k, low, high, m = rng.choice(_LARGE), *sorted(rng.sample(_LARGE, 2)), rng.choice(_SMALL)
    pick = rng.choice
    return pick(
        [
            _Piece(f"{pick(('greater than', 'above', 'larger than'))} {k}", f"{v} > {k}", (k,)),
            _Piece(f"{pick(('less than', 'below', 'smaller than'))} {k}", f"{v} < {k}", (k,)),
            _Piece(f"at least {k}", f"{v} >= {k}", (k,)),
            _Piece(f"at most {k}", f"{v} <= {k}", (k,)),
            _Piece(f"{pick(('divisible by', 'a multiple of'))} {m}", f"{v} % {m} == 0", (m,)),
            _Piece(f"not divisible by {m}", f"{v} % {m} != 0", (m,)),
            _Piece(f"{pick(('not equal to', 'different from'))} {k}", f"{v} != {k}", (k,)),
            _Piece(f"between {low} and {high}", f"{low} <= {v} <= {high}", (low, high)),
            _Piece("even", f"{v} % 2 == 0"),
            _Piece("odd", f"{v} % 2 == 1"),
            _Piece("positive", f"{v} > 0"),
            _Piece("negative", f"{v} < 0"),
        ]
    )


def _conditions(rng: random.Random, v: str) -> _Piece:
    """One condition, or two or three joined by the same word."""
    some = list({one.python: one for one in (_condition(rng, v) for _ in range(rng.choice((1, 1, 2, 2, 3))))}.values())
    word = f" {rng.choice(('and', 'or'))} "
    constants = tuple(k for one in some for k in one.constants)
    return _Piece(word.join(one.english for one in some), word.join(one.python for one in some), constants)


def _step(rng: random.Random, of: _Piece, first: bool) -> _Piece:
    """One more operation on an expression; its phrase is a participle."""
    k, far, pick = rng.choice(_SMALL), rng.choice(_LARGE), rng.choice
    kind = pick(("times", "plus", "minus", "square", "modulo", "divide", "negate", "absolute"))
    if kind == "times":
        new = _Piece(f"multiplied by {k}", f"{of.operand} * {k}", (k,), tight=False)
    elif kind == "plus":
        new = _Piece(f"{pick(('increased by', 'raised by'))} {far}", f"{of.python} + {far}", (far,))
    elif kind == "minus":
        new = _Piece(f"{pick(('decreased by', 'lowered by'))} {far}", f"{of.python} - {far}", (far,))
    elif kind == "square":
        new = _Piece("squared", f"{of.operand} ** 2")
    elif kind == "modulo":
        new = _Piece(f"taken modulo {far}", f"{of.operand} % {far}", (far,))
    elif kind == "divide":
        new = _Piece(f"divided by {k} and rounded down", f"{of.operand} // {k}", (k,))
    elif kind == "negate":
        new = _Piece("negated", f"-{of.operand}")
    else:
        new = _Piece("made absolute", f"abs({of.python})", tight=True)
    english = new.english if first else f"{of.english}, then {new.english}"
    return _Piece(english, new.python, of.constants + new.constants, new.tight)


def _steps(rng: random.Random, v: str, most: int = 4) -> _Piece:
    """``v`` after one to ``most`` operations."""
    made = _Piece("", v, tight=True)
    for index in range(min(most, rng.choice((1, 2, 2, 3, 3, 4)))):
        made = _step(rng, made, index == 0)
    return made


@dataclass(frozen=True)
class Function:
    """A function of the language: its name and argument names, docstring, body, and the constants in it."""

    name: str
    arguments: tuple[str, ...]
    doc: str
    body: str
    constants: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f'def {self.name}({", ".join(self.arguments)}):\n    """{self.doc}"""\n'

    @property
    def source(self) -> str:
        return f"{self.prompt}    return {self.body}\n"

    @property
    def split(self) -> Split:
        """Which side of the evaluation the function is on, whatever its words and names."""
        if not self.constants:
            return "train"
        body = self.body
        for index, name in enumerate(self.arguments):
            element = {_element(name): "e"} if name in _LISTS else {}
            body = _rename(body, {name: f"a{index}", **element})
        return "evaluation" if hashlib.sha256(body.encode()).digest()[0] % _HELD_OUT == 0 else "train"

    def value(self, *arguments: Any) -> Any:
        """What the function returns."""
        return eval(self.body, dict(zip(self.arguments, arguments, strict=True)))


def _rename(body: str, names: dict[str, str]) -> str:
    return re.sub(r"[a-z_]+\d*", lambda word: names.get(word[0], word[0]), body)


_LISTS = ("xs", "nums", "values", "items", "data", "points")
_INTS = ("n", "k", "m", "size", "count")
_NAMES = tuple(
    "solve total compute answer pick collect build find measure convert scan gather work derive reduce make".split()
)


def _element(name: str) -> str:
    """What one element of a list of this name is called."""
    return name[0]


def _over_list(rng: random.Random, name: str, xs: str) -> Function:
    """A list filtered, mapped and reduced."""
    v, pick = _element(xs), rng.choice
    where = _conditions(rng, v) if rng.random() < 0.7 else None
    each = _steps(rng, v) if where is None or rng.random() < 0.6 else None
    python = f"{each.python if each else v} for {v} in {xs}" + (f" if {where.python}" if where else "")
    things = f"{pick(('elements', 'numbers'))} of {xs}" + (f" that are {where.english}" if where else "")
    after = f", each {each.english}" if each else ""
    constants = (where.constants if where else ()) + (each.constants if each else ())
    k = rng.choice(range(2, 6))
    words, body, more = pick(
        [
            (f"{pick(('the sum of', 'the total of'))} the {things}{after}", f"sum({python})", ()),
            (f"the largest of the {things}{after}, or 0 if there are none", f"max(({python}), default=0)", ()),
            (f"the smallest of the {things}{after}, or 0 if there are none", f"min(({python}), default=0)", ()),
            (f"the number of distinct values among the {things}{after}", f"len(set({python}))", ()),
            (f"{pick(('a list of', 'the list of'))} the {things}{after}", f"[{python}]", ()),
            (f"the {things}{after}, in ascending order", f"sorted({python})", ()),
            (f"the {things}{after}, in descending order", f"sorted(({python}), reverse=True)", ()),
            (f"the {things}{after}, in reverse order", f"[{python}][::-1]", ()),
            (f"the first {k} of the {things}{after}", f"[{python}][:{k}]", (k,)),
            (f"the last {k} of the {things}{after}", f"[{python}][-{k}:]", (k,)),
            (f"all but the first {k} of the {things}{after}", f"[{python}][{k}:]", (k,)),
            (f"every second of the {things}{after}", f"[{python}][::2]", ()),
        ]
    )
    return Function(name, (xs,), f"Return {words}.", body, constants + more)


def _of_list(rng: random.Random, name: str, xs: str) -> Function:
    """A question about a whole list."""
    v, pick = _element(xs), rng.choice
    where = _conditions(rng, v)
    words, body = pick(
        [
            (f"how many elements of {xs} are {where.english}", f"sum(1 for {v} in {xs} if {where.python})"),
            (f"whether all elements of {xs} are {where.english}", f"all({where.python} for {v} in {xs})"),
            (f"whether any element of {xs} is {where.english}", f"any({where.python} for {v} in {xs})"),
            (f"the positions in {xs} of elements that are {where.english}",
             f"[j for j, {v} in enumerate({xs}) if {where.python}]"),
        ]
    )  # fmt: skip
    return Function(name, (xs,), f"Return {words}.", body, where.constants)


def _of_int(rng: random.Random, name: str, n: str) -> Function:
    """Arithmetic on an int, with or without a choice, or a range up to it."""
    kind = rng.choice(("steps", "whether", "choice", "range", "range"))
    one = _steps(rng, n)
    if kind == "steps":
        return Function(name, (n,), f"Return {n} {one.english}.", one.python, one.constants)
    where = _conditions(rng, n)
    if kind == "whether":
        return Function(name, (n,), f"Return whether {n} is {where.english}.", where.python, where.constants)
    if kind == "choice":
        two = _steps(rng, n, most=2)
        doc = f"Return {n} {one.english} if it is {where.english}, otherwise {n} {two.english}."
        body = f"{one.python} if {where.python} else {two.python}"
        return Function(name, (n,), doc, body, one.constants + where.constants + two.constants)
    v = "i"
    where, each = _conditions(rng, v), _steps(rng, v, most=2)
    words, call = rng.choice((("the sum of", "sum({})"), ("a list of", "[{}]")))
    doc = f"Return {words} the numbers below {n} that are {where.english}, each {each.english}."
    body = call.format(f"{each.python} for {v} in range({n}) if {where.python}")
    return Function(name, (n,), doc, body, where.constants + each.constants)


def _of_two(rng: random.Random, name: str, a: str, b: str) -> Function:
    """Two ints, one after an operation, put together and taken further."""
    one, two = _steps(rng, a, most=2), _steps(rng, b, most=2)
    words, call = rng.choice(
        (("larger", "max({}, {})"), ("smaller", "min({}, {})"), ("sum", "{} + {}"), ("difference", "{} - {}"))
    )
    second = two.python if "(" in call else two.operand
    doc = f"Return the {words} of {a} {one.english} and {b} {two.english}."
    return Function(name, (a, b), doc, call.format(one.python, second), one.constants + two.constants)


def draw_function(rng: random.Random, split: Split) -> Function:
    """A random function of one side of the split."""
    kinds = ("list",) * 5 + ("question",) * 2 + ("int",) * 3 + ("two",)
    while True:
        name, xs, (a, b) = rng.choice(_NAMES), rng.choice(_LISTS), rng.sample(_INTS, 2)
        kind = rng.choice(kinds)
        if kind == "list":
            function = _over_list(rng, name, xs)
        elif kind == "question":
            function = _of_list(rng, name, xs)
        else:
            function = _of_int(rng, name, a) if kind == "int" else _of_two(rng, name, a, b)
        # "Even" and "divisible by 2" are one body, with and without a constant of its own: it trains.
        if function.split == split and (split == "train" or set(function.constants) - {2}):
            return function


# --- tasks ------------------------------------------------------------------------------------------------------------


def _inputs(rng: random.Random, function: Function, count: int = 12) -> list[tuple[Any, ...]]:
    """Arguments that tell functions apart: around every constant and its multiples, and at random."""
    near = [value + d for k in function.constants for value in (k, 2 * k, 3 * k) for d in (-1, 0, 1)]

    def number() -> int:
        return rng.choice(near) if near and rng.random() < 0.5 else rng.randint(-30, 80)

    def one(name: str, index: int) -> Any:
        if name in _LISTS:
            return [number() for _ in range(0 if index == 0 else rng.randint(4, 14))]
        return number()

    edges = (
        [(value,) for value in dict.fromkeys(near)]
        if len(function.arguments) == 1 and function.arguments[0] in _INTS
        else []
    )
    return [tuple(one(name, index) for name in function.arguments) for index in range(count)] + edges


def make_tasks(count: int, split: Split = "evaluation", seed: Seed = 0) -> list[CodeTask]:
    """``count`` different tasks; the same seed gives the same bytes."""
    rng = random.Random(f"tasks/{split}/{seed}")
    found: dict[str, CodeTask] = {}
    while len(found) < count:
        function = draw_function(rng, split)
        if function.body in found:
            continue
        inputs = _inputs(rng, function)
        lines = [
            f"    assert candidate({', '.join(map(repr, arguments))}) == {function.value(*arguments)!r}"
            for arguments in inputs
        ]
        if len({str(function.value(*arguments)) for arguments in inputs}) < 3 - isinstance(function.value(*inputs[1]), bool):
            continue  # what returns nearly always the same is passed by chance
        found[function.body] = CodeTask(
            name=f"pocket_{split}_{len(found)}_{function.name}",
            language="python",
            prompt=function.prompt,
            tests="\n".join(["def check(candidate):", *lines, "", f"check({function.name})", ""]),
            stop_tokens=STOP,
            solution=f"    return {function.body}\n",
        )
    return list(found.values())


# --- documents --------------------------------------------------------------------------------------------------------

_GIRLS = tuple("Ada Clara Edith Greta Ines Mabel Nora Olga Rosa Vera".split())
_BOYS = tuple("Adam Boris Conrad Emil Hugo Ivan Oscar Paul Simon Victor".split())
_PLACES = tuple("London Paris Vienna Lisbon Oslo Warsaw Dublin Athens Geneva Prague".split())
_DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
_WEATHER = tuple("rain snow fog wind sunshine frost".split())


def _story(rng: random.Random) -> str:
    """A few sentences about one person: who it is comes back, and so does what was bought."""
    pick = rng.choice
    girl = rng.random() < 0.5
    name, he, his = (pick(_GIRLS), "she", "her") if girl else (pick(_BOYS), "he", "his")
    animal, fruit, tool = (pick(CATEGORIES[kind]) for kind in ("animal", "fruit", "tool"))
    garment, colour, vehicle = (pick(CATEGORIES[kind]) for kind in ("garment", "colour", "vehicle"))
    place, other = rng.sample(_PLACES, 2)
    sentences = [
        f"{name} lives in {place} and keeps a {colour} {animal}.",
        f"On {pick(_DAYS)} {he} took the {vehicle} to {other}, because of the {pick(_WEATHER)}.",
        f"At the {pick(NOUNS)} {he} bought a {tool} and some {fruit} for {his} {animal}.",
        f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(TIMES)} {pick(VERBS)} the {pick(NOUNS)}.",
        f"{name} wore a {colour} {garment} that day, as {he} {pick(('often', 'always', 'sometimes', 'never'))} does.",
        f"People in {other} say that the {pick(_WEATHER)} makes every {animal} {pick(ADJECTIVES)}.",
        f"When {name} came home to {place}, the {animal} had eaten the {fruit}.",
    ]
    kept = sorted(rng.sample(range(len(sentences)), rng.randint(3, len(sentences))))
    return " ".join(sentences[index] for index in kept)


def _document(rng: random.Random, domain: Domain, split: Split) -> Iterator[tuple[str, bool]]:
    """A file of one to three functions, or as many stories, in parts, each with whether it answers the one before."""
    for index in range(rng.randint(1, 3)):
        gap = "\n\n" if index else ""
        if domain == "text":
            yield gap + _story(rng), True
        else:
            function = draw_function(rng, split)
            yield gap + function.prompt, False
            yield f"    return {function.body}\n", True


def document(rng: random.Random, domain: Domain, split: Split = "train") -> str:
    """A file of one to three functions, or as many stories."""
    return "".join(text for text, _ in _document(rng, domain, split))


CALIBRATIONS = ("code", "mixed", "random")


def calibration(
    kind: str, samples: int, tokens: int, tokenizer: PreTrainedTokenizerBase, seed: Seed = 0, split: Split = "train"
) -> torch.Tensor:
    """Token ids [samples, tokens] of ``code``, of ``random`` general text, or ``mixed``: a row of each in turn.

    Rows are cut from documents that follow one another, each with the tokenizer's own begin and end tokens if it has them.
    Raises ValueError for another kind.
    """
    import torch

    if kind not in CALIBRATIONS:
        raise ValueError(f"unknown calibration '{kind}'; known: {', '.join(CALIBRATIONS)}")
    rng = random.Random(f"calibration/{kind}/{split}/{seed}")
    rows: list[list[int]] = []
    streams: dict[str, list[int]] = {"code": [], "text": []}
    for index in range(samples):
        domain: Domain = "code" if kind == "code" or (kind == "mixed" and index % 2) else "text"
        stream = streams[domain]
        while len(stream) < tokens:
            stream += encode_document(document(rng, domain, split=split), tokenizer)
        rows.append(stream[:tokens])
        del stream[:tokens]
    return torch.tensor(rows)


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids with the tokenizer's begin and end tokens, those that it has."""
    begin, end = ([] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    return [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], *end]


def training_row(
    rng: random.Random, length: int, text: float, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[int], list[int]]:
    """A row of documents of one domain: its name, ``length`` token ids, and labels as in `encoding.encode_session`.

    ``text``: how often it is general text. Of every fourth row of code all is learned, prompts too; of the others only what
    answers a prompt.
    """
    domain: Domain = "text" if rng.random() < text else "code"
    whole = rng.random() < 0.25
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < length:
        parts = list(_document(rng, domain, "train"))
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE)
        for (_, answers), piece in zip(parts, tokenizer([part for part, _ in parts], add_special_tokens=False)["input_ids"]):
            ids += piece
            labels += piece if answers or whole else [IGNORE] * len(piece)
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return domain, ids[:length], labels[:length]


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 640 tokens, trained on both kinds of document; digits stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    pieces = r"\n| {2,}| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [document(rng, domain) for domain in ("code", "code", "code", "text") for _ in range(3000)]
    tokenizer.train_from_iterator(corpus, trainer)
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
