"""Requests whose constraints can be read off a text, and a writer that meets exactly those it is told to.

What the simulated worlds of this family's loops are made of (instruments, see `core.chat.simulated`): an answer carries its
state as real features (words, endings, marks), which `Feature.met` reads back, so that a loop's code runs unchanged on
models. Sixteen kinds, which can be met or missed independently of each other in one text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

from broadsheet.core import replies
from broadsheet.core.chat import Request as ChatRequest
from broadsheet.core.chat.simulated import Draw

_NOUNS = (
    "harbour lantern orchard meadow compass kettle ribbon saddle anchor willow basket copper drift ember fable garden "
    "hollow island jacket kernel ladder marble needle oyster pepper quarry raven silver timber umber velvet walnut"
).split()
_VERBS = "finds keeps turns lifts holds paints carries follows guards mends seeks trades visits warms weighs".split()
_PLACES = "at dawn,in the rain,by the road,under the bridge,near the mill,after the fair,on the hill,before supper".split(
    ","
)
_FORMS = (
    "The {0} {1} the {2} {3}.",
    "A {0} {1} one {2} {3}.",
    "My {2} is where some {0} {1} it {3}.",
    "{0} and {2} are {3}.",
)
_KEYWORDS = "bicycle telescope volcano trumpet cinnamon glacier notebook penguin".split()
_RARE = "orchestra pyramid tornado blanket magnet harvest".split()
_FORBIDDEN = "very really quite rather simply".split()
_CLOSINGS = ("That is all.", "Thank you for reading.", "More will follow soon.")
_OPENINGS = ("Listen", "Imagine", "Today", "Recently")
_TOPICS = "a walk,an old boat,the market,a letter,winter,a garden,a train,the sea,bread,a clock".split(",")

#: at least so many words where length is asked for; texts without it stay well below
_LONG = 160


@dataclass(frozen=True)
class Feature:
    """A constraint whose truth can be read off a text. ``type`` as on real requests: content, format, quantity or style."""

    kind: str
    statement: str
    type: str
    value: str = ""

    def met(self, text: str) -> bool:
        return _CHECKS[self.kind](text, self.value)


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9'@.]+", text)


#: kind -> (statement, type, values)
_KINDS: Mapping[str, tuple[str, str, Sequence[str]]] = {
    "keyword": ("Use the word '{}'.", "content", _KEYWORDS),
    "twice": ("Use the word '{}' at least twice.", "content", _RARE),
    "without": ("Do not use the word '{}'.", "content", _FORBIDDEN),
    "ending": ("End with the sentence '{}'", "format", _CLOSINGS),
    "opening": ("Begin with the word '{}'.", "format", _OPENINGS),
    "length": ("Write at least {} words.", "quantity", (str(_LONG),)),
    "bullets": ("Include exactly {} bullet points that begin with '- '.", "quantity", ("2", "3", "4")),
    "title": ("Give it a title in double angle brackets, such as <<title>>.", "format", ("",)),
    "commas": ("Do not use any commas.", "style", ("",)),
    "question": ("Ask the reader a question.", "style", ("",)),
    "exclaim": ("Use no exclamation marks.", "style", ("",)),
    "blank": ("Leave a placeholder in square brackets, such as [name].", "format", ("",)),
    "postscript": ("Add a postscript that begins with 'P.S.'", "format", ("",)),
    "year": ("Mention a year in four digits.", "content", ("",)),
    "capitals": ("Write at least one word in capital letters only.", "style", ("",)),
    "divider": ("Separate two parts with a line of three equals signs.", "format", ("",)),
}

_CHECKS: Mapping[str, Callable[[str, str], bool]] = {
    "keyword": lambda text, value: re.search(rf"\b{value}\b", text, re.I) is not None,
    "twice": lambda text, value: len(re.findall(rf"\b{value}\b", text, re.I)) >= 2,
    "without": lambda text, value: re.search(rf"\b{value}\b", text, re.I) is None,
    "ending": lambda text, value: text.rstrip().endswith(value),
    "opening": lambda text, value: re.match(rf"{value}\b", text.lstrip()) is not None,
    "length": lambda text, value: len(_words(text)) >= int(value),
    "bullets": lambda text, value: len(re.findall(r"^- ", text, re.M)) == int(value),
    "title": lambda text, value: re.search(r"<<[^\n<>]+>>", text) is not None,
    "commas": lambda text, value: "," not in text,
    "question": lambda text, value: "?" in text,
    "exclaim": lambda text, value: "!" not in text,
    "blank": lambda text, value: re.search(r"\[[^\n\[\]]+\]", text) is not None,
    "postscript": lambda text, value: re.search(r"^P\.S\.", text, re.M) is not None,
    "year": lambda text, value: re.search(r"\b\d{4}\b", text) is not None,
    "capitals": lambda text, value: re.search(r"\b[A-Z]{2,}\b", text) is not None,
    "divider": lambda text, value: re.search(r"^===$", text, re.M) is not None,
}


@dataclass(frozen=True)
class Request:
    """A request with its true constraints. ``number`` stands in the prompt, so that no two are the same."""

    number: int
    task: str
    features: tuple[Feature, ...]

    @property
    def prompt(self) -> str:
        return f"Request {self.number}. {self.task} " + " ".join(feature.statement for feature in self.features)

    def state(self, text: str) -> tuple[bool, ...]:
        """Which constraints the text meets."""
        return _state(self.features, text)

    def write(self, state: Sequence[bool], draw: Draw, sheet: str = "", notes: Sequence[str] = ()) -> str:
        """See `write`."""
        return write(self, state, draw, sheet, notes)


class Stated(Protocol):
    """A constraint in words."""

    @property
    def statement(self) -> str: ...


class Checkable(Protocol):
    """What a simulated world needs of a request: `Request`, or a prompt of IFEval (`ifeval_world`)."""

    @property
    def prompt(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def features(self) -> Sequence[Stated]: ...

    def state(self, text: str) -> tuple[bool, ...]:
        """Which constraints the text meets."""
        ...

    def write(self, state: Sequence[bool], draw: Draw, sheet: str = "", notes: Sequence[str] = ()) -> str:
        """A text that meets exactly those."""
        ...


@dataclass(frozen=True)
class SimWorld:
    """Base of the worlds: finds the request that a prompt is about."""

    requests: Sequence[Checkable]

    @cached_property
    def _by_prompt(self) -> dict[str, Checkable]:
        return {request.prompt.strip(): request for request in self.requests}

    def about(self, prompt: str) -> Checkable:
        """Raises ValueError for a request of others."""
        asked = replies.tag(prompt, "request") or replies.tag(prompt, "prompt") or prompt.strip()
        if asked not in self._by_prompt:
            raise ValueError("this world knows only its own requests")
        return self._by_prompt[asked]


def content(request: ChatRequest, place: int = -1) -> str:
    """The text of one message of a chat."""
    assert not isinstance(request.messages, str)
    text: Any = request.messages[place]["content"]
    return str(text)


@lru_cache(maxsize=200_000)
def _state(features: tuple[Feature, ...], text: str) -> tuple[bool, ...]:
    return tuple(feature.met(text) for feature in features)


def make_requests(count: int, constraints: int, seed: int = 0) -> list[Request]:
    """Requests with ``constraints`` constraints each (1 to 16), all of different kinds."""
    if not 1 <= constraints <= len(_KINDS):
        raise ValueError(f"a request has 1 to {len(_KINDS)} constraints, got {constraints}")
    made = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        features = []
        for kind in rng.sample(list(_KINDS), constraints):
            statement, type_, values = _KINDS[kind]
            value = rng.choice(values)
            features.append(Feature(kind, statement.format(value), type_, value))
        made.append(Request(number, f"Write a note about {rng.choice(_TOPICS)}.", tuple(features)))
    return made


def write(request: Request, state: Sequence[bool], draw: Draw, sheet: str = "", notes: Sequence[str] = ()) -> str:
    """A text that meets exactly the constraints whose ``state`` is true.

    Its other words are those of ``sheet`` (see `sheet_of`), or new ones: a rewriting on the same sheet changes little
    but what it must. Every text says which draft it is, so that no two are equal. ``notes`` are sentences added as they are.
    """
    sheet = sheet or f"{int(draw.uniform('sheet') * 2**32):08x}"
    words = Draw(sheet)
    want = {feature.kind: (met, feature.value) for feature, met in zip(request.features, state, strict=True)}

    def met(kind: str) -> bool:
        return kind in want and want[kind][0]

    def missed(kind: str) -> bool:
        return kind in want and not want[kind][0]

    def value(kind: str) -> str:
        return want[kind][1]

    def sentence(name: str) -> str:
        one, verb, two, place = (words.pick(f"{name} {n}", some) for n, some in enumerate((_NOUNS, _VERBS, _NOUNS, _PLACES)))
        return words.pick(f"{name} form", _FORMS).format(one, verb, two, place)

    draft = f"{int(draw.uniform('draft') * 2**32):08x}"
    lines = [
        f"{value('opening')} to this." if met("opening") else "Here is the note.",
        f"Sheet {sheet} draft {draft}.",
        *notes,
    ]
    lines += [sentence(f"body {n}") for n in range(8)]
    if met("keyword"):
        lines.append(f"A {value('keyword')} is part of it.")
    if "twice" in want:
        lines.append(f"One {value('twice')} is here.")
        if met("twice"):
            lines.append(f"Another {value('twice')} is there.")
    if missed("without"):
        lines.append(f"It is {value('without')} good.")
    if missed("commas"):
        lines.append("It is small, old and grey.")
    if met("question"):
        lines.append("Would you go there?")
    if missed("exclaim"):
        lines.append("What a day!")
    if met("blank"):
        lines.append("It was told by [name].")
    if met("year"):
        lines.append("It began in 1987.")
    if met("capitals"):
        lines.append("It was GREAT.")
    if met("length"):
        lines += [sentence(f"more {n}") for n in range(_LONG // 6 - 4)]
    blocks = [" ".join(lines)]
    if met("title"):
        blocks.append("<<A short note>>")
    if "bullets" in want:
        points = int(value("bullets")) + (0 if met("bullets") else draw.pick("points", (-1, 1)))
        blocks.append("\n".join(f"- {words.pick(f'point {n}', _NOUNS)}" for n in range(points)))
    if met("divider"):
        blocks.append("===")
    if met("postscript"):
        blocks.append(f"P.S. {sentence('postscript')}")
    blocks.append(value("ending") if met("ending") else sentence("end"))
    return "\n\n".join(blocks)


def sheet_of(text: str) -> str:
    """The sheet that a text is written on; "" for texts of others."""
    found = re.search(r"\bSheet ([0-9a-f]{8}) draft\b", text)
    return found[1] if found else ""
