"""From a constraint's free text to a typed `Demand`, or to the reason why there is none.

Everything that code could not tell for sure is `Unverifiable` and counted, never a pass: limits of parts of an answer whose
borders nobody marks ("each entry"), words without a number, keywords without quotation marks. What compiles has a witness
and a violation.
"""

from __future__ import annotations

import re
from functools import lru_cache

from broadsheet.core.constraints import Constraint, Range, Unverifiable, verified
from broadsheet.core.constraints.demands import ONE_OR_MORE, Demand, converter

from .taxonomy import category

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_SMALL = {word: value for value, word in enumerate(_UNITS)} | _TENS
_WORD = "|".join(sorted(_SMALL, key=len, reverse=True))
_CHINESE_DIGITS = dict(zip("一二三四五六七八九十两", [*range(1, 11), 2], strict=True))


class _Unclear(ValueError):
    """Why a text is no demand that code can check."""


def _digits(text: str) -> str:
    """Number words as digits: "twenty-five" is 25, "two hundred" 200, "one" stays where it is no number."""

    def value(match: re.Match[str]) -> str:
        total = 0
        for part in re.split(r"[\s-]+", match[0].lower()):
            total = max(total, 1) * 100 if part == "hundred" else total + _SMALL.get(part, 0)  # "a hundred" is one hundred
        return str(total)

    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    tens, single = "|".join(_TENS), "|".join(_UNITS)
    number = rf"\b(?:(?:{tens})-(?:{single})|(?:{_WORD}|a)[\s-]hundred|{_WORD})\b"
    text = re.sub(number, value, text, flags=re.I)
    return re.sub(r"[一二三四五六七八九十两](?=[个句段字到])", lambda m: str(_CHINESE_DIGITS[m[0]]), text)


_LOW = r"at least|minimum(?: length)? of|minimum|no (?:fewer|less) than|not (?:fewer|less) than|至少|最少"
_HIGH = (
    r"at most|no (?:more|longer) than|not (?:have |contain |include |be )?(?:more|longer) than|not (?:to )?exceed(?:ing)?|"
    r"maximum(?: length)?(?: of)?|limited to|limit(?: it| the \w+)? to|limit of|not surpass(?:ing)?|up to|within|至多|最多"
)
_EXACT = r"exactly|precisely"
_BETWEEN = r"[:]?\s*(?:a total of |a maximum of |only |about |包含)?"


def _limits(rule: str, noun: str) -> Range:
    """The numbers of ``noun`` (a pattern) that a rule allows. Raises `_Unclear`."""
    unit = rf"[\s-]*(?:[a-z]+ )?(?:{noun})"
    patterns = (
        (rf"between\s+(\d+)(?:\s+\w+)?\s+(?:and|to)\s+(\d+){unit}", "range"),
        (rf"(\d+)\s*(?:to|[-–]|到)\s*(\d+){unit}", "range"),
        (rf"(?:{_EXACT}){_BETWEEN}\s*(\d+){unit}", "exact"),
        (rf"(?:{_LOW}){_BETWEEN}\s*(\d+){unit}", "low"),
        (rf"(?:{_HIGH}){_BETWEEN}\s*(\d+){unit}", "high"),
        (rf"more than\s+(\d+){unit}", "above"),
        (rf"(?:less|fewer) than\s+(\d+){unit}|under\s+(\d+){unit}", "below"),
        (rf"(\d+){unit}\s+or (?:more|longer)", "low"),
        (rf"(\d+){unit}\s+or (?:less|fewer|shorter)|在(\d+){unit}以内", "high"),
        (rf"(?:{noun})\s+(?:limit|count) (?:of|is|must be|should be)\s+(?:{_HIGH})?\s*(\d+)", "high"),
        (rf"(?:number of (?:{noun})|(?:{noun})).*?(?:{_LOW})\s+(\d+)", "low"),
        (rf"(?:number of (?:{noun})|(?:{noun})).*?(?:{_HIGH})\s+(\d+)", "high"),
        (rf"(?:a|one|only 1|in a) single {noun}", "single"),
        (
            rf"(?:be|contain|contains|containing|include|includes|have|has|of|into|in|using|use|with|only)\s+(\d+){unit}",
            "exact",
        ),
    )
    for pattern, kind in patterns:
        if match := re.search(pattern, rule):
            if kind == "single":
                return Range(1, 1)
            values = [int(group) for group in match.groups() if group]
            low, high = min(values), max(values)
            return {
                "range": Range(low, high), "exact": Range(low, low), "low": Range(low), "high": Range(0, high),
                "above": Range(low + 1), "below": Range(0, max(0, high - 1)),
            }[kind]  # fmt: skip
    raise _Unclear("no limit is understood")


_EACH = re.compile(r"\b(?:each|every|per)\b(?:\s+\w+)?", re.I)
_PART = re.compile(
    r"\b(titles?|subtitles?|headings?|headers?|headlines?|cells?|columns?|bullet points?|bullets?|slides?|rows?|entry|"
    r"entries|captions?|labels?|names?|keys|options|items|footers?|taglines?|first \w+|last \w+|opening|introductions?)\b"
)


def _whole(rule: str) -> None:
    """Raises `_Unclear` where a rule speaks of parts of the answer."""
    if match := _EACH.search(rule):
        raise _Unclear(f"it limits parts of an answer ('{match[0]}') whose borders are not marked")
    if match := _PART.search(rule):
        raise _Unclear(f"it limits a part of the answer ('{match[0]}')")


def _words(rule: str, text: str) -> Demand:
    if re.search(r"\d+ (?:characters|letters)", rule):
        raise _Unclear("it limits characters, not words")
    _whole(re.split(r"\d", rule)[0])
    _whole(re.sub(r"(bullet points?|titles?|headings?|names?|rows?|columns?|first \w+|last \w+)", "", rule))
    return Demand("words", _limits(rule, r"words?\b|字"))


def _sentences(rule: str, text: str) -> Demand:
    _whole(re.sub(r"(bullet points?|titles?|headings?|names?)", "", rule) if re.search(r"\d", rule) else rule)
    _whole(re.split(r"\d", rule)[0])
    return Demand("sentences", _limits(rule, r"sentences?|句"))


def _paragraphs(rule: str, text: str) -> Demand:
    _whole(re.split(r"\d", rule)[0])
    return Demand("paragraphs", _limits(rule, r"paragraphs?|段落?|个段落"))


_QUOTED = re.compile(r"(?<![\w])[\"'“‘「`]+(\S.*?\S|\S)[\"'”’」`]+(?!\w)")


def _quoted(text: str, strip: str = ".,;:") -> tuple[str, ...]:
    """What stands in quotation marks, without the punctuation that American usage puts inside (``strip``)."""
    text = text.strip()
    while len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    found = [match[1].strip("\"'“”‘’「」`").rstrip(strip) for match in _QUOTED.finditer(text)]
    return tuple(dict.fromkeys(word for word in found if word))


def _keywords(rule: str, text: str) -> Demand:
    _whole(re.sub(_PART, "", rule))
    if re.search(r"\b(?:if|when)\b.*\b(?:discuss|mention|relevant|applicable)", rule):
        raise _Unclear("it holds under a condition only")
    where = re.search(r"\bin (?:the|its) (\w+ )?(title|heading|headings|introduction|conclusion|first|last|opening)\b", rule)
    if where:
        raise _Unclear(f"it asks for words in a part of the answer ('{where[2]}')")
    words = _quoted(text)
    if not words:
        raise _Unclear("it names no keyword in quotation marks")
    avoid = re.search(r"\b(?:avoid|exclude|not (?:include|use|contain|mention)|without|never|refrain)\b", rule)
    include = re.search(r"\b(?:includ|contain|incorporat|featur|mention|appear|add|integrat|present|us(?:e|ing)\b)", rule)
    if avoid and include and len(words) > 1 and not re.search(r"not (?:include|use|contain|mention)", rule):
        raise _Unclear("it asks for some keywords and against others")
    if avoid:
        return Demand("avoid", names=words)
    if times := re.search(r"(at least|exactly) (?:(\d+) times?|(once|twice))|multiple times", rule):
        count = int(times[2] or {"once": 1, "twice": 2}.get(times[3], 2))
        return Demand("include", Range(count, count if times[1] == "exactly" else None), words)
    if len(words) > 1 and re.search(r"['\"’”] or ['\"‘“]|at least 1 of|either", rule):
        return Demand("include_any", names=words)
    return Demand("include", ONE_OR_MORE, words)


_MARKS = {
    "period": ".", "full stop": ".", "question mark": "?", "exclamation mark": "!", "exclamation point": "!",
    "semicolon": ";", "colon": ":", "comma": ",", "ellipsis": "…",
}  # fmt: skip


def _punctuation(rule: str, text: str) -> Demand:
    named = re.findall(rf"\b({'|'.join(_MARKS)})s?\b", rule)
    marks = tuple(dict.fromkeys(_MARKS[name] for name in named))
    if "punctuation mark" in rule and not marks:
        raise _Unclear("any punctuation mark will do, and it does not say which count")
    if not marks:
        raise _Unclear("it names no punctuation mark")
    if "followed by" in rule:
        raise _Unclear("it asks for more after the mark")
    avoid = re.search(r"\b(?:avoid|exclude|not (?:use|contain|include)|without|no)\b", rule)
    negative = re.search(r"\bnot (?:end|conclude|finish)", rule)
    if match := re.search(r"\b(?:each|every|all|any)\b\s+(?:of the |the )?(\w+)", rule):
        if match[1] in ("sentence", "sentences") and not (avoid or negative):
            return Demand("sentence_marks", names=marks)
        raise _Unclear(f"it is about parts of the answer ('{match[0]}')")
    if avoid:
        return Demand("no_mark", names=marks)
    if match := _PART.search(rule):
        raise _Unclear(f"it is about a part of the answer ('{match[0]}')")
    if not re.search(r"\bend|\bconclud|\bfinish|\bclos|\bterminat", rule):
        raise _Unclear("it does not say where the mark belongs")
    return Demand("no_end_mark" if negative else "end_mark", names=marks)


def _identifiers(rule: str, text: str) -> Demand:
    words = _quoted(text, strip="")
    if "bullet points" in rule and re.search(r"\bno\b|\bnot\b|\bavoid", rule):
        return Demand("bullets", Range(0, 0))
    if "bullet points" in rule:
        return Demand("bullets")
    if words and re.search(r"\b(?:start|begin)", rule) and not re.search(r"\b(?:each|every|name|letter)\b", rule):
        return Demand("starts", names=words[:1])
    raise _Unclear("it names no words at the start of the answer")


def _english(rule: str, text: str) -> Demand:
    rest = re.sub(r"\b(?:each|every|all)(?: of the)? (?:words?|letters?)\b|\b1st|first letters?|first words?", "", rule)
    rest = re.sub(r"first letter", "", rest)
    if re.search(r"\bkeywords?\b|\bterms?\b", rest):
        raise _Unclear("it is about some of the words")
    _whole(re.sub(r"all (?:upper|lower|caps)", "", rest))
    if re.search(r"\bjson\b|\btables?\b", rest):
        raise _Unclear("it is about a part of the answer")
    if re.search(r"upper ?-?case|all[- ]caps|in capitalized form|all capital letters|entirely in capital", rule):
        return Demand("upper")
    if re.search(r"lower ?-?case", rule):
        return Demand("lower")
    if "capital" in rule:
        return Demand("title")
    raise _Unclear("it names no letter case")


def _chinese(rule: str, text: str) -> Demand:
    if converter() is None:
        raise _Unclear("Chinese characters need zhconv: pip install zhconv")
    if words := _quoted(text):
        return Demand("include", ONE_OR_MORE, words)
    if re.search(r"some |terms|names|examples|conjugations", rule):
        raise _Unclear("it is about a part of the answer")
    if re.search(r"traditional|繁體|繁体", rule):
        return Demand("traditional")
    if re.search(r"simplified|简体|簡體", rule):
        return Demand("simplified")
    raise _Unclear("it names neither simplified nor traditional characters")


def _markdown(rule: str, text: str) -> Demand:
    if match := re.search(r"\b(?:each|every|any|all)\b\s+\w+", rule):
        raise _Unclear(f"it is about parts of the answer ('{match[0]}')")
    if "quote" in rule:
        return Demand("quotes", _limits(rule, r"block ?-?quotes?") if re.search(r"\d", rule) else ONE_OR_MORE)
    number = r"(?:heading |headings? of )?levels?(?: of)?\s*(?:of )?(?:#|h)?\s*(\d)\b|\bh(\d)\b|(#{1,6})(?![#\w])"
    if re.search(r"(?:exactly 1|a single|only 1) level \d heading", rule):
        level = re.search(r"level (\d)", rule)
        return Demand("one_level", Range(1, 1), (level[1],) if level else ())
    if match := re.search(r"(?:not exceed|limited to|no deeper than|up to|maximum of)\s+(?:heading )?level\s+(\d)", rule):
        return Demand("deepest", Range(0, int(match[1])))
    counted = r"(?:different |distinct )?(?:markdown )?(?:heading levels?|levels? of (?:markdown )?headings?|levels?)(?! \d)"
    try:
        return Demand("heading_levels", _limits(rule, counted))
    except _Unclear:
        pass
    levels = [match[1] or match[2] or str(len(match[3])) for match in re.finditer(number, rule)]
    levels += [digit for pair in re.findall(r"levels? (\d)(?:,? (?:and|to|,) (\d))", rule) for digit in pair if digit]
    names = _quoted(text)
    levels = sorted({level for level in levels if level in "123456"})
    names = tuple(name for name in names if not set(name) <= set("# "))
    if levels and not names:
        return Demand("levels", names=tuple(levels))
    if names and "heading" in rule and not levels:
        return Demand("heading_names", names=names)
    if len(levels) == len(names) == 1:
        return Demand("titled", names=(*levels, *names))
    if levels and names:
        raise _Unclear("it asks for headings of given names and levels")
    if re.search(r"main (?:heading|topic|section|point).*sub|headings? and sub ?-?headings?", rule):
        return Demand("heading_levels", Range(2))
    if re.search(
        r"\b(?:include|use|using|with|contain|organi[sz]ed|structured|separate|incorporate)\w*\b.*\bheadings?\b", rule
    ):
        return Demand("headings")
    if "bold" in rule:
        return Demand("bold")
    if "bullet" in rule:
        return Demand("bullets")
    raise _Unclear("no demand on headings is understood")


def _table(rule: str, text: str) -> Demand:
    optional = bool(re.search(r"\b(?:if|any|when|should you)\b[^.]*\btab", rule))
    if re.search(r"\b(?:per|each) (?:slide|section|page)", rule):
        raise _Unclear("it limits parts of the answer")
    found = {}
    for kind, noun in (("rows", r"rows?\b"), ("columns", r"columns?\b")):
        try:
            found[kind] = _limits(rule, noun)
        except _Unclear:
            continue
    if len(found) != 1:
        raise _Unclear("it limits rows and columns at once" if found else "it limits neither rows nor columns")
    kind, allowed = next(iter(found.items()))
    if "tab" not in rule:
        if kind == "rows":
            return Demand("rows_or_items", allowed)
        raise _Unclear("it limits columns of something other than a table")
    return Demand(kind, allowed, optional=optional)


def _json(rule: str, text: str) -> Demand:
    optional = bool(re.search(r"\bif\b|\bany\b", rule))
    rule = re.sub(r"object nesting|nesting|nested", " ", rule)
    levels = [int(value) for value in re.findall(r"levels? (?:of|must be|is) (\d+)", re.sub(r"\s+", " ", rule))]
    if levels:
        return Demand("json_depth", Range(levels[0], levels[0]), optional=optional)
    try:
        return Demand("json_depth", _limits(re.sub(r"\s+", " ", rule), r"levels?"), optional=optional)
    except _Unclear:
        high = re.search(rf"(?:{_HIGH})\s+(\d+)", re.sub(r"\s+", " ", rule))
        if not high:
            raise
        return Demand("json_depth", Range(0, int(high[1])), optional=optional)


def _xml(rule: str, text: str) -> Demand:
    limits = re.search(r"number of attributes must be (?:exactly )?(\d+)", rule)
    allowed = Range(int(limits[1]), int(limits[1])) if limits else _limits(rule, r"attributes?")
    return Demand("xml_attributes", allowed, optional=bool(re.search(r"\bif\b|\bany\b", rule)))


_READERS = {
    "Keywords": _keywords, "Identifiers": _identifiers, "Punctuation": _punctuation, "Markdown": _markdown, "Json": _json,
    "XML": _xml, "Table": _table, "English": _english, "Chinese": _chinese, "Words": _words, "Sentences": _sentences,
    "Paragraphs": _paragraphs,
}  # fmt: skip


@lru_cache(maxsize=16384)
def demand_of(main: str, sub: str, text: str) -> Demand | Unverifiable:
    """The typed demand behind a constraint. Raises ValueError for an unknown category."""
    second = category(main, sub)[1]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a constraint of '{main}' / '{sub}' has no text")
    rule = re.sub(r"\s+", " ", _digits(text.lower())).strip()
    try:
        return _READERS[second](rule, text)
    except _Unclear as why:
        return Unverifiable(str(why), second)


@lru_cache(maxsize=16384)
def compile_constraint(main: str, sub: str, text: str) -> Constraint | Unverifiable:
    """The checker of a constraint, tried on its own witness and violation. Raises ValueError for an unknown category."""
    demand = demand_of(main, sub, text)
    if isinstance(demand, Unverifiable):
        return demand
    return verified(demand.constraint(text))
