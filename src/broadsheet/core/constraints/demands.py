"""Typed demands on a text, and texts that meet or break any choice of them.

A `Demand` is data: a kind and its parameters. `Demand.constraint` is its checker, `compose` writes a text that meets some
demands and breaks others, and tries it, so every witness and violation comes from one place.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from broadsheet.core.replies import json_of

from . import Constraint, Range, Verdict
from .texts import WORDS, sentences

ONE_OR_MORE = Range(1)


@dataclass(frozen=True)
class Demand:
    """One demand. ``range`` for what is counted; ``names`` for words, marks, levels or headings; ``optional``: what it
    speaks of (a table, JSON, XML) may also be left out."""

    kind: str
    range: Range = ONE_OR_MORE
    names: tuple[str, ...] = ()
    optional: bool = False

    def __post_init__(self) -> None:
        if self.kind not in TESTS:
            raise ValueError(f"no demand '{self.kind}'; there are {', '.join(TESTS)}")

    def check(self, text: str) -> Verdict:
        if not text.strip():
            return Verdict(False, "the text is blank")
        return TESTS[self.kind](self, text)

    def constraint(self, text: str = "") -> Constraint:
        """The checker, with the demand in words."""
        return Constraint(
            self.kind, text or self.kind, self.check, lambda: compose([(self, True)]), lambda: compose([(self, False)])
        )


# --- what is counted ----------------------------------------------------------------------------------------------------

_HAN = re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf]")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])\s+\S")
_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+\S", re.M)
_TAG = re.compile(r"<[A-Za-z_][^<>]*>")
_ATTRIBUTE = re.compile(r"[\w:.-]+\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_HEADING = re.compile(r"^[ \t]*(#{1,6})[ \t]+(.*)$", re.M)


def words(text: str) -> int:
    """White space separates words; of a text with Chinese characters these are counted."""
    return len(_HAN.findall(text)) or len(text.split())


def paragraphs(text: str) -> list[str]:
    """What blank lines separate."""
    return [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def headings(text: str) -> list[tuple[int, str]]:
    """(level, name) of every Markdown heading."""
    return [(len(match[1]), match[2].strip().rstrip("#").strip()) for match in _HEADING.finditer(text)]


def tables(text: str) -> list[list[list[str]]]:
    """Markdown tables as rows of cells, the header first: at least two lines with bars, of which one is the divider."""
    found: list[list[list[str]]] = []
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if "|" in line:
            block.append(line.strip().strip("|"))
            continue
        divider = [place for place, row in enumerate(block) if row.strip() and not row.strip(" |:-")]
        if divider and divider[0] == 1:
            found.append([[cell.strip() for cell in row.split("|")] for at, row in enumerate(block) if at != 1])
        block = []
    return found


def depth(value: Any) -> int:
    """Levels of nested objects and lists: 0 for a plain value, 1 for ``{"a": 1}``."""
    level, layer = 0, [value]
    while layer := [inner for outer in layer if isinstance(outer, dict | list) for inner in (_inside(outer) or [None])]:
        level += 1
    return level


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


@cache
def converter() -> Callable[[str, str], str] | None:
    """Converts Chinese to "zh-cn" (simplified) or "zh-tw" (traditional); None where zhconv is not installed."""
    try:
        from zhconv import convert
    except ImportError:
        return None
    return lambda text, locale: str(convert(text, locale))


# --- tests --------------------------------------------------------------------------------------------------------------

Test = Callable[[Demand, str], Verdict]


def _counted(noun: str, count: Callable[[str], int]) -> Test:
    def test(demand: Demand, text: str) -> Verdict:
        found = count(text)
        return Verdict(found in demand.range, f"{found} {noun}, asked for {demand.range}")

    return test


def keyword(word: str) -> re.Pattern[str]:
    """A keyword as a whole word in any case; a Chinese one anywhere."""
    return re.compile(re.escape(word) if _HAN.search(word) else rf"(?<!\w){re.escape(word)}(?!\w)", re.I)


def _include(demand: Demand, text: str) -> Verdict:
    lacking = [word for word in demand.names if len(keyword(word).findall(text)) not in demand.range]
    return Verdict(not lacking, f"{', '.join(lacking)}: not {demand.range} times" if lacking else "has the words")


def _include_any(demand: Demand, text: str) -> Verdict:
    found = [word for word in demand.names if keyword(word).search(text)]
    return Verdict(bool(found), f"has {', '.join(found) or 'none of the words'}")


def _avoid(demand: Demand, text: str) -> Verdict:
    found = [word for word in demand.names if keyword(word).search(text)]
    return Verdict(not found, f"has {', '.join(found) or 'none of the words'}")


def _starts(demand: Demand, text: str) -> Verdict:
    ok = text.lstrip(" \n#*").lower().startswith(demand.names[0].lower())
    return Verdict(ok, f"starts with {text.lstrip()[:20]!r}")


def _end(text: str) -> str:
    return text.rstrip().rstrip("*_`").rstrip()[-1:]


def _end_mark(demand: Demand, text: str) -> Verdict:
    return Verdict(_end(text) in demand.names, f"ends with {_end(text)!r}")


def _no_end_mark(demand: Demand, text: str) -> Verdict:
    return Verdict(_end(text) not in demand.names, f"ends with {_end(text)!r}")


def _sentence_marks(demand: Demand, text: str) -> Verdict:
    wrong = [one for one in sentences(text) if _end(one.rstrip("\"'”’)")) not in demand.names]
    return Verdict(not wrong, f"{len(wrong)} sentences end otherwise" if wrong else "every sentence ends so")


def _no_mark(demand: Demand, text: str) -> Verdict:
    found = [mark for mark in demand.names if mark in text]
    return Verdict(not found, f"has {' '.join(found) or 'none of the marks'}")


def _case(name: str, word_ok: Callable[[str], bool]) -> Test:
    def test(demand: Demand, text: str) -> Verdict:
        bare = [re.sub(r"^[\W_]+", "", word) for word in text.split()]
        wrong = next((word for word in bare if not word_ok(word)), "")
        return Verdict(not wrong and any(c.isalpha() for c in text), f"not {name}: {wrong!r}" if wrong else f"all {name}")

    return test


def _levels(demand: Demand, text: str) -> Verdict:
    found = {str(level) for level, _ in headings(text)}
    return Verdict(set(demand.names) <= found, f"heading levels {sorted(found)}, asked for {list(demand.names)}")


def _deepest(demand: Demand, text: str) -> Verdict:
    found = [level for level, _ in headings(text)]
    return Verdict(bool(found) and max(found) in demand.range, f"deepest heading {max(found, default=0)}")


def _one_level(demand: Demand, text: str) -> Verdict:
    found = sum(str(level) in demand.names for level, _ in headings(text))
    return Verdict(found in demand.range, f"{found} headings of level {demand.names[0]}, asked for {demand.range}")


def _heading_names(demand: Demand, text: str) -> Verdict:
    found = [name.lower().strip(" *:") for _, name in headings(text)]
    lacking = [name for name in demand.names if name.lower() not in found]
    return Verdict(not lacking, f"no heading {', '.join(lacking)}" if lacking else "has the headings")


def _titled(demand: Demand, text: str) -> Verdict:
    level, name = demand.names
    found = (int(level), name.lower()) in [(at, said.lower().strip(" *:")) for at, said in headings(text)]
    return Verdict(found, f"{'has' if found else 'has no'} heading '{name}' of level {level}")


def _table_size(noun: str, size: Callable[[list[list[str]]], int]) -> Test:
    def test(demand: Demand, text: str) -> Verdict:
        found = [size(one) for one in tables(text)]
        if not found:
            return Verdict(demand.optional, "no table")
        return Verdict(all(one in demand.range for one in found), f"{found} {noun}, asked for {demand.range}")

    return test


def _rows_or_items(demand: Demand, text: str) -> Verdict:
    """Rows of tables, or the items of a list where there is no table."""
    if tables(text):
        return _table_size("rows", lambda table: len(table) - 1)(demand, text)
    found = sum(bool(_LIST_ITEM.match(line)) for line in text.split("\n"))
    return Verdict(found > 0 and found in demand.range, f"{found} items, asked for {demand.range}")


def _json_depth(demand: Demand, text: str) -> Verdict:
    value = json_of(text)
    if not isinstance(value, dict | list):
        return Verdict(demand.optional, "no JSON")
    return Verdict(depth(value) in demand.range, f"JSON of {depth(value)} levels, asked for {demand.range}")


def _attributes(demand: Demand, text: str) -> Verdict:
    found = [len(_ATTRIBUTE.findall(tag)) for tag in _TAG.findall(text)]
    if not found:
        return Verdict(demand.optional, "no XML")
    return Verdict(all(one in demand.range for one in found), f"elements with {found} attributes, asked for {demand.range}")


def _script(locale: str, name: str) -> Test:
    def test(demand: Demand, text: str) -> Verdict:
        convert = converter()
        if convert is None:
            raise ValueError("constraints on Chinese characters need zhconv: pip install zhconv")
        if not _HAN.search(text):
            return Verdict(False, "no Chinese characters")
        return Verdict(convert(text, locale) == text, f"converted to {name} it is {convert(text, locale)[:20]}")

    return test


TESTS: dict[str, Test] = {
    "words": _counted("words", words),
    "sentences": _counted("sentences", lambda text: len(sentences(text))),
    "paragraphs": _counted("paragraphs", lambda text: len(paragraphs(text))),
    "include": _include,
    "include_any": _include_any,
    "avoid": _avoid,
    "starts": _starts,
    "end_mark": _end_mark,
    "no_end_mark": _no_end_mark,
    "sentence_marks": _sentence_marks,
    "no_mark": _no_mark,
    "upper": _case("upper case", lambda word: word == word.upper()),
    "title": _case("capitalised", lambda word: not word[:1].islower()),
    "lower": _case("lower case", lambda word: word == word.lower()),
    "headings": _counted("headings", lambda text: len(headings(text))),
    "heading_levels": _counted("levels of headings", lambda text: len({level for level, _ in headings(text)})),
    "levels": _levels,
    "deepest": _deepest,
    "one_level": _one_level,
    "heading_names": _heading_names,
    "titled": _titled,
    "quotes": _counted("quoted lines", lambda text: len(re.findall(r"^[ \t]*>", text, re.M))),
    "bold": _counted("bold parts", lambda text: len(re.findall(r"\*\*[^*\n]+\*\*", text))),
    "bullets": _counted("bullet points", lambda text: len(_BULLET.findall(text))),
    "rows": _table_size("rows", lambda table: len(table) - 1),
    "columns": _table_size("columns", lambda table: max(map(len, table))),
    "rows_or_items": _rows_or_items,
    "json_depth": _json_depth,
    "xml_attributes": _attributes,
    "simplified": _script("zh-cn", "simplified"),
    "traditional": _script("zh-tw", "traditional"),
}

# --- texts --------------------------------------------------------------------------------------------------------------

_CHINESE = {"simplified": "这条河很宽。", "traditional": "這條河很寬。"}


@dataclass
class _Draft:
    """A text in the making: what stands before the prose, and what the prose is like; None is not asked for."""

    lead: str = ""
    levels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    quotes: int = 0
    bold: int = 0
    bullets: int = 0
    rows: int | None = None
    columns: int | None = None
    json: int | None = None
    attributes: int | None = None
    keywords: tuple[str, ...] = ()
    avoided: frozenset[str] = frozenset()
    words: int | None = None
    sentences: int | None = None
    paragraphs: int | None = None
    mark: str = "."
    last: str | None = None
    case: str = ""

    def text(self) -> str:
        """Everything but the prose goes first, without sentence ends or blank lines, so that it changes no count but that
        of words."""
        lines = [self.lead] if self.lead else []
        lines += [f"{'#' * level} {WORDS[level]}" for level in self.levels]
        lines += [f"## {name}" for name in self.names]
        lines += ["> quoted words"] * self.quotes + ["**bold**"] * self.bold + ["- point"] * self.bullets
        if self.rows is not None or self.columns is not None:
            width = 2 if self.columns is None else self.columns
            row = "|" + " x |" * width
            lines += ["", row, "|" + "---|" * width, *[row] * (1 if self.rows is None else self.rows), ""]
        if self.json is not None:
            lines += ["```json", '{"key":' * self.json + "1" + "}" * self.json, "```"]
        if self.attributes is not None:
            lines += ["<part" + "".join(f' a{place}="1"' for place in range(self.attributes)) + "/>"]
        head = re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip("\n")
        return _cased(f"{head}\n{self._prose(words(head))}" if head else self._prose(0), self.case)

    def _prose(self, before: int) -> str:
        count = self.sentences if self.sentences is not None else max(2, min(self.paragraphs or 2, 40))
        total = (count * 6 if self.words is None else self.words - before) - sum(len(word.split()) for word in self.keywords)
        if self.words is not None and self.sentences is None:
            count = max(1, min(count, total))
        known = [word for word in WORDS if word not in self.avoided]
        made = [known[place % len(known)] for place in range(max(0, total))]
        made[:0] = self.keywords
        cuts = [round((place + 1) * len(made) / count) for place in range(count)] if count else []
        for place, cut in enumerate(cuts):
            if 0 < cut <= len(made):
                made[cut - 1] += self.mark if place < len(cuts) - 1 or self.last is None else self.last
        for cut in [0, *cuts[:-1]]:
            if cut < len(made):
                made[cut] = made[cut][:1].upper() + made[cut][1:]
        wanted = self.paragraphs or 1
        breaks = {round(place * len(made) / wanted) for place in range(1, wanted)} - {0}
        parts = [("\n\n" if place in breaks else " " if place else "") + word for place, word in enumerate(made)]
        return "".join(parts)


def _cased(text: str, case: str) -> str:
    if case == "title":
        return re.sub(r"(^|\s)([\W_]*)(\w)", lambda m: m[1] + m[2] + m[3].upper(), text)
    return text.upper() if case == "upper" else text.lower() if case == "lower" else text


def _some(demand: Demand, want: bool, roll: random.Random) -> int:
    """A number that the demand allows or, unwanted, does not; not always the same."""
    if want:
        low = max(1, demand.range.inside()) if 1 in demand.range or demand.range.low else demand.range.inside()
        high = demand.range.high if demand.range.high is not None else low + 3
        return roll.randint(min(low, high), max(low, min(high, low + 3))) if roll.random() < 0.5 else min(low, high)
    if demand.range.high is not None:
        return demand.range.high + roll.randint(1, 2)
    return max(0, demand.range.outside() - roll.randint(0, 1))


def _apply(draft: _Draft, demand: Demand, want: bool, roll: random.Random) -> None:
    kind, names = demand.kind, demand.names
    if kind in ("words", "sentences", "paragraphs", "quotes", "bold", "bullets", "rows", "columns"):
        setattr(draft, kind, _some(demand, want, roll))
        if kind == "words" and want and demand.range.high is not None and roll.random() < 0.7:
            draft.words = demand.range.high
    elif kind == "rows_or_items":
        draft.rows = _some(demand, want, roll)
    elif kind == "json_depth":
        draft.json = None if not want and roll.random() < 0.3 and not demand.optional else max(1, _some(demand, want, roll))
    elif kind == "xml_attributes":
        draft.attributes = _some(demand, want, roll)
    elif kind in ("include", "include_any"):
        times = _some(demand, want, roll) if kind == "include" else int(want)
        draft.keywords += names * times
    elif kind == "avoid":
        draft.keywords += () if want else names[:1]
        draft.avoided |= {part for name in names if want for part in name.lower().split()}
    elif kind == "starts":
        draft.lead = names[0] if want else ""
    elif kind in ("end_mark", "sentence_marks", "no_end_mark"):
        good = (kind == "no_end_mark") != want
        draft.last = names[0] if good else next(mark for mark in (".", "!", "?", ";", "") if mark not in names)
        if kind == "sentence_marks" and want:
            draft.mark = names[0]
    elif kind == "no_mark":
        if want:
            draft.mark = next((mark for mark in ".!?" if mark not in names), "")
        else:
            draft.keywords += (f"so{names[0]}",)
    elif kind in ("upper", "title", "lower"):
        draft.case = kind if want else {"lower": "title"}.get(kind, "")
    elif kind == "heading_levels":
        draft.levels += tuple(range(1, _some(demand, want, roll) + 1))
    elif kind == "headings":
        draft.levels += (2,) * _some(demand, want, roll)
    elif kind == "one_level":
        draft.levels += (int(names[0]),) * _some(demand, want, roll)
    elif kind == "levels":
        chosen = [int(name) for name in names]
        draft.levels += tuple(chosen if want else chosen[1:])
    elif kind == "deepest":
        draft.levels += (min(6, _some(demand, want, roll)),) if want or roll.random() < 0.5 else ()
    elif kind == "heading_names":
        draft.names += names if want else names[1:]
    elif kind == "titled":
        draft.lead = f"{'#' * int(names[0])} {names[1] if want else 'Other'}"
    elif kind in _CHINESE:
        other = next(name for name in _CHINESE if name != kind)
        draft.lead = _CHINESE[kind if want else other]
        draft.words = words(draft.lead)


def compose(wanted: Sequence[tuple[Demand, bool]], seed: int = 0, tries: int = 60) -> str:
    """A text that meets every demand with True and breaks, without being blank, every one with False.

    Raises ValueError when none was found in ``tries`` drafts: they may contradict each other.
    """
    for attempt in range(tries):
        roll = random.Random(f"{seed}/{attempt}")
        draft = _Draft()
        for demand, want in wanted:
            _apply(draft, demand, want, roll)
        draft.levels = tuple(sorted(draft.levels))
        text = draft.text()
        if text.strip() and all(demand.check(text).ok == want for demand, want in wanted):
            return text
    asked = ", ".join(f"{'' if want else 'not '}{demand.kind}" for demand, want in wanted)
    raise ValueError(f"no text is known that is {asked}")
