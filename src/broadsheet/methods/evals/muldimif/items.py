"""The benchmark's items, its file format, and items of our own in the same form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from broadsheet.core.constraints import Constraint, Range, Unverifiable
from broadsheet.core.constraints.demands import Demand, compose

from .compiling import compile_constraint, demand_of
from .taxonomy import TAXONOMY, category

Triple = tuple[str, str, str]  #: main category, second level (and what follows a colon), the constraint's text
PATTERNS = ("Example", "Listing", "Incorporation")
LEVELS = ("Level 1", "Level 2", "Level 3", "Level 4")
RULES = "The output must follow the following rules:"


@dataclass(frozen=True)
class Item:
    """One instruction with its constraints. ``question`` is the bare question where it is known, else ""."""

    id: str
    prompt: str
    constraints: tuple[Triple, ...]
    pattern: str = "Listing"
    level: str = "Level 1"
    question: str = ""

    def __post_init__(self) -> None:
        if not self.constraints:
            raise ValueError(f"item {self.id} has no constraints")
        for main, sub, _ in self.constraints:
            category(main, sub)

    @property
    def checkers(self) -> tuple[Constraint | Unverifiable, ...]:
        return tuple(compile_constraint(*triple) for triple in self.constraints)

    @property
    def categories(self) -> tuple[tuple[str, str], ...]:
        return tuple(category(main, sub) for main, sub, _ in self.constraints)

    def to_json(self) -> dict[str, Any]:
        """A row of the benchmark's file."""
        return {
            "id": self.id, "conversations": [{"role": "user", "content": self.prompt}],
            "constraints": [list(triple) for triple in self.constraints],
            "constraint_pattern": self.pattern, "difficulty": self.level,
        }  # fmt: skip


def load_muldimif(path: str | Path) -> list[Item]:
    """Items of the official file (JSON list or JSON lines; or a folder with ``test.json``). Raises ValueError."""
    path = Path(path)
    path = path / "test.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read MulDimIF's items at {path}: {error.strerror}") from None
    try:
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
        )
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    items = [_item(row, f"{path}, item {number}") for number, row in enumerate(rows)]
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path}: two items have one id")
    return items


def _item(row: Any, where: str) -> Item:
    try:
        prompt = next(turn["content"] for turn in row["conversations"] if turn["role"] == "user")
        triples = tuple((str(main), str(sub), str(text)) for main, sub, text in row["constraints"])
        pattern, level = row["constraint_pattern"], row["difficulty"]
    except (KeyError, TypeError, ValueError, StopIteration):
        raise ValueError(f"{where}: id, conversations, constraints, constraint_pattern and difficulty are needed") from None
    if pattern not in PATTERNS or level not in LEVELS:
        raise ValueError(f"{where}: pattern '{pattern}' or level '{level}' is unknown")
    try:
        return Item(str(row["id"]), prompt, triples, pattern, level)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# --- patterns -----------------------------------------------------------------------------------------------------------


def listed(question: str, texts: Sequence[str]) -> str:
    """The question and a numbered list of its constraints."""
    return f"{question} {RULES}\n" + "\n".join(f"{number}. {text}." for number, text in enumerate(texts, 1))


def woven(question: str, texts: Sequence[str]) -> str:
    """The question and its constraints in prose."""
    links = ("Please note that ", "In addition, ", "At the same time, ", "Moreover, ", "Also, ", "Besides, ", "Finally, ")
    said = [f"{links[place % len(links)]}{text[:1].lower()}{text[1:]}." for place, text in enumerate(texts)]
    return f"{question} {' '.join(said)}"


def shown(shots: Sequence[tuple[str, str]], prompt: str) -> str:
    """Solved examples before the prompt."""
    parts = [f"Example {number}\nQuestion: {asked}\nAnswer: {given}" for number, (asked, given) in enumerate(shots, 1)]
    return "\n\n".join([*parts, f"Question: {prompt}\nAnswer:"])


# --- items of our own ---------------------------------------------------------------------------------------------------

TOPICS = (
    "how tides come about", "why bread rises", "what a library is for", "how bridges carry weight",
    "why leaves turn red", "how to plan a week of meals", "what makes a good map", "how bees find flowers",
    "why glass is clear", "how to mend a shirt", "what a thermometer measures", "how to learn a song",
    "why the sea is salty", "how a kite stays up", "what soil is made of", "how to store apples", "why cats purr",
    "how clocks keep time", "what rivers carry", "how to greet a new neighbour", "why metals feel cold",
    "how paper is made", "what a compass shows", "how to pack for a hike",
)  # fmt: skip
_ASKS = ("Explain {topic}.", "Write a short note about {topic}.", "Tell a child {topic}.", "Describe {topic}.")
_KEYWORDS = (
    "lantern",
    "harvest",
    "compass",
    "morning",
    "blue stone",
    "market day",
    "copper",
    "silence",
    "window",
    "north wind",
)
_AVOIDED = ("banana", "obviously", "mountain", "very nice", "purple", "machine")
_STARTS = ("Note:", "Answer:", "Dear reader", "To begin")

Maker = Callable[[random.Random], tuple[str, Demand, str]]  #: second level's name, demand, wording


def _number(low: int, high: int, step: int = 1) -> Callable[[random.Random], int]:
    return lambda roll: roll.randrange(low, high + 1, step)


#: how limits of a noun may be worded
_LIMITS = {
    "At most": ("The answer must be at most {n} {noun}", "Use no more than {n} {noun}",
                "The response should not exceed {n} {noun}", "Keep it to a maximum of {n} {noun}"),
    "At least": ("The answer must contain at least {n} {noun}", "Write a minimum of {n} {noun}",
                 "The response should have at least {n} {noun}", "Use no fewer than {n} {noun}"),
    "Range": ("The answer must have between {n} and {m} {noun}", "Write {n} to {m} {noun}",
              "The response should contain between {n} and {m} {noun}", "Use between {n} and {m} {noun}"),
}  # fmt: skip


def _limit(noun: str, kind: str, numbers: Callable[[random.Random], int], width: int) -> Maker:
    def make(roll: random.Random) -> tuple[str, Demand, str]:
        how, n = roll.choice(list(_LIMITS)), numbers(roll)
        m = n + width
        allowed = {"At most": Range(0, m), "At least": Range(n), "Range": Range(n, m)}[how]
        text = roll.choice(_LIMITS[how]).format(n=m if how == "At most" else n, m=m, noun=noun)
        return f"{noun.capitalize()}: {how}", Demand(kind, allowed), text

    return make


def _plain(sub: str, kind: str, choices: Sequence[tuple[str, ...]], wordings: Sequence[str], **more: Any) -> Maker:
    def make(roll: random.Random) -> tuple[str, Demand, str]:
        names = roll.choice(choices) if choices else ()
        text = roll.choice(wordings).format(*names)
        kept = {".": "period", "?": "question mark", "!": "exclamation mark"}
        marks = tuple(mark for mark, name in kept.items() if name in names)
        return sub, Demand(kind, names=marks or names, **more), text

    return make


def _counted(sub: str, kind: str, low: int, high: int, wordings: dict[str, Sequence[str]]) -> Maker:
    def make(roll: random.Random) -> tuple[str, Demand, str]:
        how, n = roll.choice(list(wordings)), roll.randint(low, high)
        allowed = {"most": Range(0, n), "least": Range(n), "exact": Range(n, n)}[how]
        return sub, Demand(kind, allowed), roll.choice(wordings[how]).format(n)

    return make


_WORDS_ = ("The answer must include the keyword '{}'", "Make sure to mention the keyword '{}'", "Include the keyword '{}'")
_MAKERS: dict[str, dict[str, Maker]] = {
    "Content": {
        "include": _plain("Keywords: Must include", "include", [(word,) for word in _KEYWORDS], _WORDS_),
        "avoid": _plain("Keywords: Avoid", "avoid", [(word,) for word in _AVOIDED],
                        ("Avoid the word '{}'", "Do not use the word '{}'", "The answer must not mention '{}'")),
        "end": _plain("Punctuation: Ending punctuation", "end_mark",
                      [("period",), ("question mark",), ("exclamation mark",)],
                      ("The answer must end with a {}", "Ending punctuation must be a {}", "Conclude with a {}")),
        "start": _plain("Identifiers: Start identifier", "starts", [(word,) for word in _STARTS],
                        ("The answer must start with the identifier '{}'", "Begin with the words '{}'")),
    },
    "Format": {
        "levels": _counted("Markdown: Heading levels", "heading_levels", 1, 3, {
            "least": ("The answer must use at least {} heading levels in Markdown", "Use at least {} levels of headings"),
            "exact": ("Use exactly {} heading levels", "The answer must have exactly {} levels of headings")}),
        "rows": _counted("Table: Row limit", "rows", 2, 5, {
            "most": ("Include a table with no more than {} rows", "The answer must contain a table of at most {} rows"),
            "exact": ("The answer must include a table with exactly {} rows",)}),
        "columns": _counted("Table: Column limit", "columns", 2, 4, {
            "most": ("Include a table with no more than {} columns",
                     "The answer must contain a table of at most {} columns"),
            "exact": ("The answer must include a table with exactly {} columns",)}),
        "quotes": _plain("Markdown: Block quotes", "quotes", (),
                         ("Use block quotes to highlight a key point", "The answer must include a block quote in Markdown")),
        "json": _counted("Json: Object nesting levels", "json_depth", 2, 3, {
            "least": ("The answer must include a JSON object with at least {} levels of nesting",),
            "most": ("Include a JSON object that does not exceed {} levels of nesting",)}),
        "xml": _counted("XML: Number of attributes", "xml_attributes", 1, 3, {
            "most": ("Include an XML element with no more than {} attributes",),
            "exact": ("The answer must include an XML element with exactly {} attributes",)}),
    },
    "Language": {
        "upper": _plain("English: All Uppercase", "upper", (),
                        ("The answer must be in all uppercase letters", "Write the response in all uppercase letters")),
        "title": _plain("English: Capitalized", "title", (),
                        ("The answer must use capitalized letters for each word",
                         "Each word in the response must begin with a capital letter")),
        "lower": _plain("English: Lowercase", "lower", (),
                        ("The answer must be in all lowercase letters", "Write everything in lowercase")),
    },
    "Length": {
        "words": _limit("words", "words", _number(60, 120, 10), 30),
        "sentences": _limit("sentences", "sentences", _number(3, 6), 3),
        "paragraphs": _limit("paragraphs", "paragraphs", _number(2, 3), 1),
    },
}  # fmt: skip
#: two of these in one item would contradict each other or say one thing twice
_EXCLUSIVE = (frozenset({"rows", "columns"}),)


@dataclass
class Grammar:
    """Items of our own: every constraint compiles to the demand it was made from, and a text for every item is known."""

    seed: int = 0
    prefix: str = "own"
    _shots: dict[str, list[Item]] = field(default_factory=dict, repr=False)

    def items(self, count: int) -> list[Item]:
        """``count`` items, patterns and levels in turn. The same for the same seed."""
        cells = [(pattern, level) for level in range(1, 5) for pattern in PATTERNS]
        return [self._item(number, *cells[number % len(cells)]) for number in range(count)]

    def _item(self, number: int, pattern: str, level: int) -> Item:
        for attempt in range(100):
            roll = random.Random(f"{self.seed}/{number}/{attempt}")
            triples = self._triples(roll, level)
            demands = [demand_of(*triple) for triple in triples]
            known = [demand for demand in demands if isinstance(demand, Demand)]
            try:
                compose([(demand, True) for demand in known])
                compose([(demand, False) for demand in known])
            except ValueError:
                continue
            question = roll.choice(_ASKS).format(topic=roll.choice(TOPICS))
            prompt = self._prompt(question, triples, pattern, known, roll)
            return Item(f"{self.prefix}-{self.seed}-{number}", prompt, triples, pattern, f"Level {level}", question)
        raise ValueError("no item could be made; this is a fault of the grammar")

    def _triples(self, roll: random.Random, level: int) -> tuple[Triple, ...]:
        found: list[Triple] = []
        for main in roll.sample(list(TAXONOMY), level):
            count = 1 if main == "Language" else roll.randint(1, 2)
            pairs = [set(pair) for pair in combinations(_MAKERS[main], count)] if count == 2 else []
            allowed = [pair for pair in pairs if not any(both <= pair for both in _EXCLUSIVE)]
            names = sorted(roll.choice(allowed)) if allowed else [roll.choice(list(_MAKERS[main]))]
            for name in names:
                sub, _, text = _MAKERS[main][name](roll)
                found.append((main, sub, text))
        return tuple(found)

    def _prompt(
        self, question: str, triples: Sequence[Triple], pattern: str, demands: list[Demand], roll: random.Random
    ) -> str:
        texts = [text for *_, text in triples]
        if pattern == "Incorporation":
            return woven(question, texts)
        if pattern == "Listing":
            return listed(question, texts)
        others = roll.sample([topic for topic in TOPICS if topic not in question], 3)
        asked = [roll.choice(_ASKS).format(topic=topic) for topic in others]
        given = [compose([(demand, True) for demand in demands], seed=place) for place in range(3)]
        return shown([(listed(a, texts), g) for a, g in zip(asked, given, strict=True)], listed(question, texts))


def makers() -> list[Maker]:
    """Every kind of constraint that the grammar can make."""
    return [maker for some in _MAKERS.values() for maker in some.values()]
