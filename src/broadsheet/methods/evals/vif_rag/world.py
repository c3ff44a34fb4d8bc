"""An instrument for VIF-RAG: a supervision model whose functions and labels are right at known rates. SIMULATED.

Its instructions come with a true function, four wrong ones (which agree with the truth on about 0, 50, 75 and 90 % of its
texts) and a stock of texts of which half obey. Every function is there as source, which is what the method gets, and as a
Python function of ours beside it, so that large worlds need no sandbox: `Library.run` looks up the one for the other.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw
from broadsheet.core.constraints.texts import WORDS

Function = Callable[[str], bool]
_STEMS = ("lantern", "harvest", "copper", "silence", "window", "compass", "bridge", "morning")
KEYS = tuple(stem + end for end in ("", "ish", "let", "like", "less", "wise", "dom", "ward") for stem in _STEMS)


@dataclass(frozen=True)
class Atom:
    """One instruction. ``functions``: (source, the same in Python), the true one first. ``texts``: half of them obey."""

    text: str
    functions: tuple[tuple[str, Function], ...]
    texts: tuple[str, ...]

    @property
    def true(self) -> Function:
        return self.functions[0][1]


_VARIANT = re.compile(r"\n    # version \d+")


def _source(expression: str) -> str:
    return f"import re\n\ndef evaluate(response):\n    return bool({expression})"


def _written(source: str, version: int) -> str:
    """The same function as another text: models write one thing in many ways, and only exact copies are one function."""
    return source.replace("evaluate(response):", f"evaluate(response):\n    # version {version}")


def _prose(roll: random.Random, words: int) -> list[str]:
    return [roll.choice(WORDS) for _ in range(words)]


def _words(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    return (
        f"Use at most {n} words",
        [
            (f"len(response.split()) <= {n}", lambda t: len(t.split()) <= n),
            (f"len(response.split()) > {n}", lambda t: len(t.split()) > n),
            ("True", lambda t: True),
            (f"len(response.split()) <= {n + 3}", lambda t: len(t.split()) <= n + 3),
            (f"len(response.split()) < {n}", lambda t: len(t.split()) < n),
        ],
        lambda r: " ".join(_prose(r, r.choice((n - 6, n - 3, n - 2, n - 1, n, n + 1, n + 2, n + 5, n + 7, n + 9)))),
    )


def _least(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    return (
        f"Write at least {n} words",
        [
            (f"len(response.split()) >= {n}", lambda t: len(t.split()) >= n),
            (f"len(response.split()) < {n}", lambda t: len(t.split()) < n),
            ("len(response) > 0", lambda t: len(t) > 0),
            (f"len(response.split()) >= {n - 3}", lambda t: len(t.split()) >= n - 3),
            (f"len(response.split()) > {n}", lambda t: len(t.split()) > n),
        ],
        lambda r: " ".join(_prose(r, r.choice((n - 6, n - 5, n - 4, n - 2, n - 1, n, n + 1, n + 2, n + 5, n + 7)))),
    )


def _has(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    key = KEYS[n % len(KEYS)]
    part = key[:-1]

    def text(r: random.Random) -> str:
        words = _prose(r, 9)
        words[r.randrange(9)] = r.choice(
            (key, key, key, key.upper(), key.capitalize(), part, part, "stone", "stone", "stone")
        )
        return " ".join(words)

    return (
        f"Include the word {key}, in any case",
        [
            (f"re.search(r'\\b{key}\\b', response, re.I)", lambda t: bool(re.search(rf"\b{key}\b", t, re.I))),
            (f"not re.search(r'\\b{key}\\b', response, re.I)", lambda t: not re.search(rf"\b{key}\b", t, re.I)),
            ("'stone' not in response or True", lambda t: True),
            (f"'{key}' in response", lambda t: key in t),
            (f"re.search(r'\\b{key}?\\b', response, re.I)", lambda t: bool(re.search(rf"\b{key}?\b", t, re.I))),
        ],
        text,
    )


def _commas(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    def text(r: random.Random) -> str:
        words, commas = _prose(r, n + 6), r.choice((0, 0, 0, n - 1, n, n, n + 1, n + 2, n + 3, n + 4))
        for place in r.sample(range(len(words)), min(commas, len(words))):
            words[place] += ","
        return " ".join(words)

    return (
        f"Use fewer than {n + 1} commas",
        [
            (f"response.count(',') <= {n}", lambda t: t.count(",") <= n),
            (f"response.count(',') > {n}", lambda t: t.count(",") > n),
            ("isinstance(response, str)", lambda t: True),
            ("',' not in response", lambda t: "," not in t),
            (f"response.count(',') <= {n + 1}", lambda t: t.count(",") <= n + 1),
        ],
        text,
    )


def _bullets(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    def text(r: random.Random) -> str:
        count = r.choice((n, n, n, n, n, n - 1, n + 1, n + 1, n + 2, 0))
        return "\n".join([" ".join(_prose(r, 5)), *["* " + r.choice(WORDS) for _ in range(count)]])

    return (
        f"Use exactly {n} bullet points that start with an asterisk",
        [
            (f"len(re.findall(r'^\\* ', response, re.M)) == {n}", lambda t: len(re.findall(r"^\* ", t, re.M)) == n),
            (f"len(re.findall(r'^\\* ', response, re.M)) != {n}", lambda t: len(re.findall(r"^\* ", t, re.M)) != n),
            ("response.strip() != ''", lambda t: t.strip() != ""),
            (f"response.count('*') >= {n}", lambda t: t.count("*") >= n),
            (f"0 <= response.count('*') - {n} <= 1", lambda t: 0 <= t.count("*") - n <= 1),
        ],
        text,
    )


def _ending(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    key = KEYS[n % len(KEYS)]
    ends = (*[f" {key}."] * 4, f" {key}. ", f" {key.upper()}.", f" {key}", f" {key} so.", " so.", " here.")
    return (
        f"End with the word {key} and a full stop",
        [
            (f"response.rstrip().endswith('{key}.')", lambda t: t.rstrip().endswith(f"{key}.")),
            (f"not response.rstrip().endswith('{key}.')", lambda t: not t.rstrip().endswith(f"{key}.")),
            ("len(response.split()) > 1", lambda t: len(t.split()) > 1),
            (f"'{key}' in response", lambda t: key in t),
            (f"response.rstrip().lower().endswith('{key}.')", lambda t: t.rstrip().lower().endswith(f"{key}.")),
        ],
        lambda r: " ".join(_prose(r, 6)) + r.choice(ends),
    )


def _capitals(roll: random.Random, n: int) -> tuple[str, list[tuple[str, Function]], Callable[[random.Random], str]]:
    def text(r: random.Random) -> str:
        words, count = _prose(r, n + 5), r.choice((n, n, n + 1, n + 2, n + 3, n - 1, n - 1, n - 2, 0, 0))
        for place in r.sample(range(len(words)), max(0, count)):
            words[place] = words[place].upper()
        return " ".join(words)

    return (
        f"Write at least {n} words in capital letters",
        [
            (f"sum(w.isupper() for w in response.split()) >= {n}", lambda t: sum(w.isupper() for w in t.split()) >= n),
            (f"sum(w.isupper() for w in response.split()) < {n}", lambda t: sum(w.isupper() for w in t.split()) < n),
            ("response is not None", lambda t: True),
            ("any(w.isupper() for w in response.split())", lambda t: any(w.isupper() for w in t.split())),
            (f"sum(w.isupper() for w in response.split()) > {n}", lambda t: sum(w.isupper() for w in t.split()) > n),
        ],
        text,
    )


_FAMILIES = (_words, _least, _has, _commas, _bullets, _ending, _capitals)


@dataclass(frozen=True)
class Library:
    """``count`` instructions in turn over the families, with ``texts`` texts each."""

    count: int = 56
    texts: int = 60
    seed: int = 0

    @cached_property
    def atoms(self) -> dict[str, Atom]:
        found: dict[str, Atom] = {}
        for number in range(self.count):
            make, n = _FAMILIES[number % len(_FAMILIES)], number // len(_FAMILIES)
            roll = random.Random(f"library/{self.seed}/{number}")
            text, functions, write = make(roll, (3 if make in (_commas, _bullets, _capitals) else 12) + n)
            pairs = tuple((_source(source), function) for source, function in functions)
            stock = self._stock(write, pairs[0][1], roll)
            found[text] = Atom(text, pairs, stock)
        return found

    def _stock(self, write: Callable[[random.Random], str], true: Function, roll: random.Random) -> tuple[str, ...]:
        """Different texts, half of which obey."""
        halves: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for _ in range(200 * self.texts):
            text = write(roll)
            half = halves[bool(true(text))]
            if len(half) < self.texts // 2:
                half[text] = None
            elif all(len(one) == self.texts // 2 for one in halves.values()):
                break
        return tuple(text for pair in zip(halves[True], halves[False], strict=False) for text in pair)

    @cached_property
    def _known(self) -> dict[str, Function]:
        return {source: function for atom in self.atoms.values() for source, function in atom.functions}

    def run(self, function: str, texts: Sequence[str]) -> list[bool | None]:
        """An executor for this world's functions alone: looks them up, runs no text. Raises KeyError for others."""
        return [bool(self._function(function)(text)) for text in texts]

    def _function(self, source: str) -> Function:
        return self._known[_VARIANT.sub("", source)]

    def told(self, function: str) -> str:
        """What a function checks, in words: the instruction of a true one, other words for a wrong one."""
        source = _VARIANT.sub("", function)
        for atom in self.atoms.values():
            for place, (known, _) in enumerate(atom.functions):
                if known == source:
                    return f"{atom.text}, in wrong reading {place}" if place else atom.text
        raise KeyError(function)

    def right(self, instruction: str, function: str) -> bool:
        """Whether a function agrees with the true one on all of the instruction's texts."""
        atom = self.atoms[instruction]
        return all(self._function(function)(text) == atom.true(text) for text in atom.texts)


@dataclass(frozen=True)
class SimSupervisor:
    """Answers the synthesis's prompts.

    ``p_function``: how often its function is right, else one of the wrong ones (always the same one, of its instruction,
    where ``correlated``: models repeat their mistakes). ``p_label``: how often a case's label is right. ``p_nli``: how often
    it tells rightly whether a function that was put back into words contradicts its instruction. ``p_response``: how often
    an answer obeys. ``p_consistent``: how often an answer still answers (told by the judge without error).
    """

    library: Library = field(default_factory=Library)
    p_function: float = 0.6
    p_label: float = 0.85
    p_response: float = 0.5
    p_consistent: float = 1.0
    correlated: bool = False
    p_nli: float = 0.9

    def reply(self, request: Request, draw: Draw) -> str:
        text = request.messages[-1]["content"]  # type: ignore[index]  # a chat, never a string
        if "INSTRUCTION\n" in text:
            return self._verifier(self.library.atoms[text.rsplit("INSTRUCTION\n", 1)[1]], draw)
        if text.startswith("Which instruction"):
            return self.library.told(text.rsplit("FUNCTION\n", 1)[1])
        if text.startswith("Two instructions"):
            first, second = text.rsplit("FIRST\n", 1)[1].split("\n\nSECOND\n")
            contradicts = (first != second) == draw.chance("nli", self.p_nli)
            return f"So it seems.\nLabel: {'contradiction' if contradicts else 'entailment'}"
        if text.startswith("Answer the query"):
            return self._answer([atom for atom in self.library.atoms.values() if atom.text in text], draw)
        if text.startswith("Does the response"):
            return f"It is on the point.\nScore: {9 if draw.chance('consistent', self.p_consistent) else 5}"
        if text.startswith("Can one answer"):
            return f"Yes.\nScore: {draw.pick('score', (3, 6, 8, 9))}"
        return "\n".join(f"{place}. {said}" for place, said in enumerate(self.library.atoms, 1))

    def _verifier(self, atom: Atom, draw: Draw) -> str:
        wrong = random.Random(atom.text).randrange(1, 5) if self.correlated else draw.pick("mutant", (1, 2, 3, 4))
        source = atom.functions[0 if draw.chance("function", self.p_function) else wrong][0]
        source = _written(source, int(1000 * draw.uniform("version")))
        cases = []
        for place in range(3):
            case = draw.pick(f"case {place}", atom.texts)
            label = atom.true(case) if draw.chance(f"label {place}", self.p_label) else not atom.true(case)
            cases.append({"input": case, "output": label})
        return f"Here it is.\n```json\n{json.dumps({'func': source, 'cases': cases})}\n```"

    def _answer(self, atoms: Sequence[Atom], draw: Draw) -> str:
        """A text that obeys the first instruction, or not."""
        obeys = draw.chance("obeys", self.p_response)
        texts = [text for text in atoms[0].texts if atoms[0].true(text) == obeys]
        return draw.pick("answer", texts)
