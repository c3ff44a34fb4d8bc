"""``compat="official"``: the verdicts of the benchmark's own checkers, faults included, so that published numbers can be
met.

The original reads every constraint anew for every answer, by some hundred phrases a class; what no phrase fits silently
passes (sentences, Markdown, tables, words) or silently fails (English, paragraphs, JSON). These functions decide alike:
`verdict(main, sub, text, answer)`. Their golden vectors say where not. `compiling` is what should be used instead.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from broadsheet.core.constraints.texts import sentences as split_sentences

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen".split()
)
NUMBERS = {word: value for value, word in enumerate([*_UNITS, "eighteen", "nineteen", "twenty"])}
NUMBERS |= {"thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "hundred": 100}
_TEN = "|".join(list(NUMBERS)[1:11])
_UP_TO_TEN = rf"(\d+|{_TEN})"
_CJK = re.compile(r"[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\u3000-\u303f\uff00-\uffef]")


def _number(text: str, known: Sequence[str] = tuple(NUMBERS)) -> int | None:
    """Digits (with commas), or number words added up ("twenty-five"; "two hundred" multiplies)."""
    text = text.strip().lower().replace(",", "")
    if text.isdigit():
        return int(text)
    total = current = 0
    for part in re.split(r"[\s-]+", text):
        if part not in known:
            return None
        value = NUMBERS[part]
        if value >= 100:
            total, current = total + max(current, 1) * value, 0
        else:
            current += value
    return total + current


def _within(count: int, low: int | None, high: int | None) -> bool:
    return (low is None or count >= low) and (high is None or count <= high)


def _keyword(word: str) -> re.Pattern[str]:
    """A keyword is found between other than word characters, in any case; a Chinese one anywhere."""
    if any("\u4e00" <= character <= "\u9fff" for character in word):
        return re.compile(re.escape(word))
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.I)


# --- parts of an answer -------------------------------------------------------------------------------------------------


def _form(text: str) -> str:
    """What an answer looks like."""
    if re.search(r"^\s*[{\[]", text):
        return "json"
    if re.search(r"^\s*\|.+\|", text, re.M):
        return "table"
    if re.search(r"^\s*\d+\.\s+", text):
        return "numbered"
    return "bullets" if re.search(r"^\s*[-*] ", text) else "plain"


def _items(text: str, form: str) -> list[str]:
    mark, cut = (r"\s*\d+\.\s+", ".") if form == "numbered" else (r"\s*[-*] ", " ")
    return [line.split(cut, 1)[1].strip() for line in text.split("\n") if re.match(mark, line)]


# --- length -------------------------------------------------------------------------------------------------------------

_RANGES = (
    r"between\s+([a-z0-9-– ]+?)\s+to\s+([a-z0-9-– ]+?)(?=\s*word|$|\b)",
    r"between\s+([a-z0-9-– ]+?)\s+and\s+([a-z0-9-– ]+?)(?=\s*word|$|\b)",
    r"range:?\s*([a-z0-9-– ]+?)\s+to\s+([a-z0-9-– ]+?)(?=\s*word|$|\b)",
    r"range:?\s*([a-z0-9-– ]+?)\s*[-–]\s*([a-z0-9-– ]+?)(?=\s*word|$|\b)",
    r"(\b[a-z0-9-–]+\b)\s+to\s+(\b[a-z0-9-–]+\b)(?=\s*word|$|\b)",
    r"(\b[a-z0-9-–]+\b)\s*[-–]\s*(\b[a-z0-9-–]+\b)(?=\s*word|$|\b)",
    r"([0-9]+)\s*到\s*([0-9]+)(?=\s*个|字)",
)
_MOST = r"not\s+exceed|at\s+most|no\s+more\s+than|maximum\s+(?:length\s+)?of|no\s+longer\s+than"


def _first(patterns: Sequence[str], text: str) -> int | None:
    """The number that the first pattern that fits holds."""
    for pattern in patterns:
        if match := re.search(pattern, text):
            return _number(match[1])
    return None


def words(constraint: str, answer: str) -> bool:
    if re.search(r"\beach\b", constraint, re.I):
        return _words_each(constraint, answer)
    rule = re.sub(r"\s+", " ", constraint.lower().strip('"').strip()).replace("-word", " word").replace("a total of ", "")
    rule = rule.replace("words", "word").replace("a single", "exactly one").strip()
    count = len(_CJK.findall(answer)) or len(answer.split())
    if (exact := re.search(r"exactly\s+([a-z0-9-, ]+?)\s+(\S+)", rule)) and (wanted := _number(exact[1])) is not None:
        return count == wanted
    low = high = None
    for pattern in _RANGES:
        if match := re.search(pattern, rule):
            low, high = _number(match[1]), _number(match[2])
            if low is not None and high is not None:
                low, high = min(low, high), max(low, high)
                break
    if low is None:
        low = _first([r"(?:at\s+least|minimum\s+(?:length\s+)?of|no\s+less\s+than)\s+(\S+)\s+word"], rule)
    if high is None:
        high = _first([rf"(?:{_MOST}|not\s+exceeding|not\s+surpass|limit\s+of|within)\s+(\S+)\s+word"], rule)
    if high is None:
        high = _first([r"最多([0-9]+)(?:个|字)", r"在([0-9]+)\s*(?:个单词以内|个字以内|字以内|单词以内|词以内|字)"], rule)
    stops = len(re.findall(r"[.!?]+", answer))
    fewest = _first([r"(?:at\s+least|minimum\s+of)\s+(\S+)\s+sentence"], rule)
    most = _first([rf"(?:{_MOST})\s+(\S+)\s+sentence"], rule)
    named = re.findall(r"[\"']([^\']*)[\"']", rule)
    has_all = all(_keyword(word).search(answer) for word in named)
    return has_all and _within(count, low, high) and _within(stops, fewest, most)


_EACH = (
    (r"between (\d+) and (\d+) words", "range"), (r"range: (\d+)-(\d+) words", "range"), (r"at least (\d+) words", "low"),
    (r"a minimum (?:length )?of (\d+) words", "low"), (r"at most (\d+) words", "high"), (r"exactly (\d+) words", "exact"),
    (r"(?:no more than|not exceed|a maximum of|a maximum length of|limit of|not exceeding|less than) (\d+) words", "high"),
)  # fmt: skip


def _words_each(constraint: str, answer: str) -> bool:
    """A limit of each part; an answer without parts fails."""
    rule = re.sub(rf"\b({'|'.join(NUMBERS)})\b", lambda m: str(NUMBERS[m[0].lower()]), constraint, flags=re.I)
    found = next(((m, kind) for pattern, kind in _EACH if (m := re.search(pattern, rule, re.I))), None)
    if found is None:
        return False
    match, kind = found
    low = int(match[1]) if kind != "high" else None
    high = {"range": lambda: int(match[2]), "low": lambda: None}.get(kind, lambda: int(match[1]))()
    subject = re.search(
        r"(?:each entry in the|each|the)\s+(.+?)\s+(?:is|in the table|column|must|consists of|contains?|should|have)",
        rule,
        re.I,
    )
    target = re.sub(r"[\"']", "", subject[1].lower()) if subject else None
    parts = _word_parts(answer, target)
    return bool(parts) and all(_within(len(part.split()), low, high) for part in parts)


def _word_parts(answer: str, target: str | None) -> list[str]:
    form = _form(answer)
    if form == "table":
        return _cells(answer, target or "cells")
    if form == "json":
        try:
            data = json.loads(answer)
            wanted = target or ""
            return [str(value) for value in data.values()] if "entry" in wanted else [str(data.get(wanted.split()[-1], ""))]
        except (ValueError, AttributeError, IndexError, RecursionError):
            return []
    if form == "numbered":
        lines = [line for line in answer.split("\n") if re.match(r"\s*\d+\.\s+", line)]
        return [line.split(":", 1)[-1].split(".", 1)[-1].strip() for line in lines]
    if form == "bullets":
        return _items(answer, form)
    lines = [line.strip() for line in answer.split("\n") if line.strip()]
    lines = [line for line in lines if not line.strip("*#'\"").endswith(":") and not re.match(r"^\|.*\|$", line)]
    return [line.lstrip("#").strip() for line in lines]


def _cells(answer: str, target: str) -> list[str]:
    """Cells of the columns whose name holds ``target``, else all cells (and the divider as one)."""
    cells: list[str] = []
    for line in (line.strip() for line in answer.split("\n")):
        if line.startswith("|"):
            divider = re.match(r"^[\s|*-]+$", line)
            cells += ["<divider>"] if divider else [cell.strip() for cell in line[1:-1].split("|") if cell.strip()]
    split = cells.index("<divider>") if "<divider>" in cells else len(cells)
    headers, data = cells[:split], [cell for cell in cells[split + 1 :] if cell != "<divider>"]
    if not headers:
        return []
    found = []
    for start in range(0, len(data) - len(headers) + 1, len(headers)):
        row = dict(zip(headers, data[start : start + len(headers)], strict=True))
        found += [value for name, value in row.items() if name.lower() != value.lower() and target in name.lower()]
    return found or cells


_SENTENCE_NUMBERS = {
    word: NUMBERS[word] for word in [*list(NUMBERS)[1:13], "fifteen", "twenty", "thirty", "fifty", "hundred"]
}
_SENTENCE_NUMBERS |= {"thousand": 1000} | dict(zip("一二三四五六七八九十", range(1, 11), strict=True)) | {"两": 2}
_N = rf"(\d+|{'|'.join(_SENTENCE_NUMBERS)})"
_S = r" sentences?"
_ZH = r"(?:个句子|句话|句|個句子)"
#: (pattern, what its numbers are), tried in this order
_SENTENCES = (
    (rf"exactly:? {_N} (?:topic )?sentences?", "exact"), (rf"(?:should|must) contain {_N}{_S}", "exact"),
    (r"be a single sentence|consisting of (?:only )?one sentence|in a single sentence", "one"),
    (rf"at least:? {_N}{_S}", "low"), (rf"a minimum of {_N}{_S}", "low"), (rf"no fewer than {_N}{_S}", "low"),
    (rf"(?:至少|最少)(?:包含)?{_N}{_ZH}", "low"), (rf"at most:? {_N}{_S}", "high"), (rf"not exceeding {_N}{_S}", "high"),
    (rf"no (?:more|longer) than {_N}{_S}", "high"), (rf"limited to {_N}{_S}", "high"), (rf" not exceed {_N}{_S}", "high"),
    (rf"a maximum (?:length )?of {_N}{_S}", "high"), (rf"not to exceed {_N}{_S}", "high"),
    (rf"not surpass(?: a total of)? {_N}{_S}", "high"),
    (rf"(?:至多|最多)(?:包含)?{_N}{_ZH}", "high"),
    (rf"range:? {_N}-{_N}{_S}", "range"), (rf"between {_N} (?:and|to) {_N}{_S}", "range"),
    (rf"into {_N} to {_N}{_S}", "range"),
    (rf"a range of {_N} to {_N}{_S}", "range"), (rf"be composed of {_N} to {_N}{_S}", "range"),
    (rf"consists? of {_N} to {_N}{_S}", "range"),
    (rf"consisting of {_N} to {_N}{_S}", "range"), (rf"{_N}到{_N}{_ZH}", "range"),
)  # fmt: skip
_P = r" paragraphs?"
_PARAGRAPHS = (
    (rf"exactly {_UP_TO_TEN}{_P}", "exact"), (rf"(?:should|must) contain {_UP_TO_TEN}{_P}", "exact"),
    (r"be a single paragraph", "one"), (rf"at least {_UP_TO_TEN}{_P}", "low"), (rf"least: {_UP_TO_TEN}{_P}", "low"),
    (rf"a minimum of {_UP_TO_TEN}(?: distinct)?{_P}", "low"),
    (rf"(?:at most|not exceeding|no more than) {_UP_TO_TEN}{_P}", "high"),
    (r"range (\d+)-(\d+) paragraphs?", "range"), (r"range: (\d+)-(\d+)", "range"),
    (r"between (\d+) (?:and|to) (\d+) paragraphs?", "range"), (r"(\d+) to (\d+) paragraphs?", "range"),
)  # fmt: skip


def _limits(rules: Sequence[tuple[str, str]], constraint: str) -> tuple[int | None, int | None]:
    for pattern, kind in rules:
        if match := re.search(pattern, constraint):
            if kind == "one":
                return 1, 1
            value = [int(group) if group.isdigit() else _SENTENCE_NUMBERS[group] for group in match.groups()]
            return {"exact": (value[0], value[0]), "low": (value[0], None), "high": (None, value[0])}.get(
                kind, (value[0], value[-1])
            )
    return None, None


def sentences(constraint: str, answer: str) -> bool:
    count = len([part for part in re.findall(r"[^.!?]*[.!?]", answer) if part.strip()])
    return _within(count, *_limits(_SENTENCES, constraint.lower().strip()))


def paragraphs(constraint: str, answer: str) -> bool:
    low, high = _limits(_PARAGRAPHS, constraint.lower())
    count = len([part for part in answer.split("\n\n") if part.strip()])
    return (low, high) != (None, None) and _within(count, low, high)


# --- keywords, punctuation ----------------------------------------------------------------------------------------------


def keywords(constraint: str, answer: str) -> bool:
    if re.search(r"\b(each|every)\b", constraint, re.I) and "for each word" not in constraint:
        match = re.search(r"\b(?:each|every)\s+(.+?)\s+(?:must|should|needs to|has to)\s+(.*)", constraint, re.I)
        if not match:
            return False
        parts = _keyword_parts(answer, match[1].lower())
        return bool(parts) and all(_keyword_rule(match[2], part) for part in parts)
    include = re.search(r"includes?\s+the\s+keyword\s+[\"']([^\"']+)[\"']", constraint, re.I)
    avoid = re.search(r"avoids?\s+the\s+keyword\s+[\"']([^\"']+)[\"']", constraint, re.I)
    if include and avoid:
        return include[1] in answer and avoid[1] not in answer
    return _keyword_rule(constraint, answer)


def _keyword_rule(rule: str, answer: str) -> bool:
    rule = rule.strip()
    while re.match(r'^"+(.*[^"])"+$', rule):
        rule = re.sub(r'^"+(.*[^"])"+$', r"\1", rule)
    if re.search(r"must\s+use\s+capitalized\s+letters\s+for\s+each\s+word", rule, re.I) and not all(
        word[0].isupper() for word in answer.split()
    ):
        return False
    if re.search(r"must\s+end\s+with\s+(a\s+)?period", rule, re.I) and not answer.strip().endswith("."):
        return False
    known = tuple(NUMBERS)[1:11]
    low, high = None, None
    if match := re.search(r"(?:at\s+least|minimum\s+of)\s+(\S+)\s+word", rule, re.I):
        low = _number(match[1], known)
    if match := re.search(r"(?:not\s+exceed|at\s+most|no\s+more\s+than|maximum\s+of)\s+(\S+)\s+word", rule, re.I):
        high = _number(match[1], known)
    if re.search(r"is\s+a\s+single\s+word", rule, re.I):
        low = high = 1
    if not _within(len(answer.split()), low, high):
        return False
    if re.search(r"(avoid\s+using\s+(the\s+)?term|must\s+be\s+avoided)", rule, re.I):
        named = re.search(r"[\"']([^\"']+)[\"']", rule)
        return not (named and _keyword(named[1]).search(answer))
    times = 1
    if match := re.search(rf"at least (\d+|{_TEN}|once|twice)(?:\s+times?)?\b(?!\s+words\s+long)", rule, re.I):
        word = match[1].lower()
        times = int(word) if word.isdigit() else {"once": 1, "twice": 2, **NUMBERS}[word]
    if re.search(r"must appear multiple times", rule, re.I):
        times = 2
    doubled = re.findall(r'["”]{2}([^"“]+)["“]{2}', rule)
    named_all = doubled or re.findall(r"[\"'「“]([^\"']+)[\"'」”]", rule)
    enough = [len(_keyword(word).findall(answer)) >= times for word in named_all]
    return any(enough) if re.search(r"\bOR\b", rule, re.I) else all(enough)


def _keyword_parts(answer: str, target: str) -> list[str]:
    form = _form(answer)
    if form == "table":
        return _column(answer, target)
    if form == "json":
        try:
            data = json.loads(answer)
        except (ValueError, RecursionError):
            return []
        return [str(value) for value in (data.values() if isinstance(data, dict) else data)]
    if form in ("numbered", "bullets"):
        return _items(answer, form)
    parts: list[list[str]] = [[]]
    for line in answer.split("\n"):
        mark = line.strip()
        if len(mark) >= 3 and mark[0] in "-*=" and set(mark) == {mark[0]}:
            parts.append([])
        else:
            parts[-1].append(line)
    return ["\n".join(part).strip() for part in parts if part] or [answer]


def _column(answer: str, target: str) -> list[str]:
    """The column whose name shares most words with ``target``, else the wordiest one."""
    lines = [line.strip() for line in answer.split("\n")]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|") and line.endswith("|")
    ]
    if len(rows) < 3 or not rows[0]:
        return []
    data = [[re.sub(r"^#+\s*", "", cell).strip() for cell in row] for row in rows[2:] if len(row) == len(rows[0])]
    if not data:
        return []
    wanted = {re.sub(r"\W", "", word).lower() for word in target.split()} - {""}
    shared = [sum(re.sub(r"\W", "", word).lower() in wanted for word in name.split()) for name in rows[0]]
    wordy = [sum(len(row[place].split()) for row in data) for place in range(len(rows[0]))]
    scores = shared if max(shared) > 0 else wordy
    return [row[scores.index(max(scores))] for row in data]


_MARKS = {"period": ".", "question mark": "?", "exclamation mark": "!", "semicolon": ";"}


def punctuation(constraint: str, answer: str) -> bool:
    rule, text = constraint.strip().lower().rstrip("."), answer.strip()
    if "paragraph" in rule or "section" in rule:
        parts = [part.strip() for part in text.split("\n") if part.strip()]
    elif "each" in rule or "any" in rule or "all" in rule:
        parts = split_sentences(text)
    else:
        parts = [text]
    if "table" in rule or "cell" in rule:
        rows = text.split("\n")
        rows = rows[2:] if len(rows) > 1 else rows
        parts = [cell.strip() for row in rows for cell in re.split(r"\s*\|\s*", row.strip("|")) if cell.strip()]
        parts = [part for part in parts if part.strip("-")]
    if "bullet point" in rule:
        mark = next((value for name, value in _MARKS.items() if name in rule), None)
        points = [part for point in re.findall(r"^[-*•]\s.*$", text, re.M) for part in split_sentences(point)]
        return all(part.endswith(mark) if mark else part[-1] in string.punctuation for part in points)
    negative = bool(re.search(r"\b(must not|avoid|exclude|not end with|do not use)\b", rule))
    if not all(parts):
        return negative
    if special := re.search(r"(period|question mark|exclamation mark|semicolon)\s+followed by a `([^`]+)`", rule):
        return all(part.endswith(_MARKS[special[1]] + special[2]) for part in parts)
    names = re.findall(r"\b(period|question mark|exclamation mark|semicolon|punctuation mark)s?\b", rule)
    allowed = string.punctuation if "punctuation mark" in names else "".join(_MARKS[name] for name in names)
    return all((part[-1] in allowed) != negative for part in parts)


# --- language -----------------------------------------------------------------------------------------------------------


def english(constraint: str, answer: str) -> bool:
    if not answer.strip():
        return False
    rule = constraint.strip().lower()
    text, case = _named_part(rule, answer), _letter_case(rule)
    if case == "title":
        return not any("a" <= word[0] <= "z" for word in text.split())
    return bool(case) and text == (text.upper() if case == "upper" else text.lower())


def _letter_case(rule: str) -> str:
    """Which case a constraint asks for, "" where none is understood."""
    if re.search(r"\ball[- ]?uppercase\b", rule) or "in capitalized form" in rule:
        return "upper"
    if "each word in" in rule or re.search(r"\bcapitalized\b", rule) or ("capital" in rule and "each" in rule):
        return "title"
    return "lower" if re.search(r"\blowercase\b", rule) else ""


def _named_part(rule: str, answer: str) -> str:
    """The part that a constraint names, or the whole answer where it has no such part."""
    headings = " ".join(re.findall(r"^#+\s*(.+)$", answer, re.M)) or answer
    if "table" in rule:
        if "|" not in answer:
            return answer
        rows = [[cell.strip() for cell in row.split("|") if cell.strip()] for row in answer.split("\n") if row.strip()]
        if "headings" in rule:
            chosen = rows
        elif "header" in rule:
            chosen = rows[:1]
        elif "entries" in rule:
            chosen = rows[1:]
            if not chosen:
                return answer
        else:
            chosen = rows
        return " ".join(cell for row in chosen for cell in row)
    if "json" in rule:
        pattern = r'"([^"]+)"\s*:' if "keys" in rule else r':\s*"([^"]+)"' if "values" in rule else ""
        found = re.findall(pattern, answer) if pattern and "{" in answer and "}" in answer else []
        return " ".join(found) or answer
    return headings if "heading" in rule else answer


@cache
def converter() -> Callable[[str, str], str]:
    """Converts between simplified and traditional Chinese. Raises ValueError without zhconv."""
    try:
        from zhconv import convert
    except ImportError:
        raise ValueError("constraints on Chinese characters need zhconv: pip install zhconv") from None
    return lambda text, locale: str(convert(text, locale))


def chinese(constraint: str, answer: str) -> bool:
    if named := re.search(r'Must include the phrase "{1,2}(.+?)"{1,2}', constraint, re.I):
        return named[1] in answer
    whole = re.search(r"Must (?:use|convert into|be converted into) Traditional Chinese characters", constraint, re.I)
    if whole:
        if re.search(r"[A-Za-z]", answer):
            return False
        return not answer or converter()(answer, "zh-tw") == answer
    if not answer:
        return False
    if re.search(r"(?:include|use) .*?Traditional Chinese characters|使用繁體中文", constraint, re.I):
        return any(converter()(character, "zh-cn") != character for character in answer)
    if re.search(r"Simplified|简体中文|中文简体", constraint, re.I):
        return any(converter()(character, "zh-tw") != character for character in answer)
    return False


# --- format -------------------------------------------------------------------------------------------------------------

Headings = list[tuple[int, str]]
Rule = Callable[[Headings], bool]
_LEVEL = rf"(\b(?:{_TEN}|\d+)\b)"


def markdown(constraint: str, answer: str) -> bool:
    rule = constraint.lower()
    if "block quotes" in rule and not _quoted(rule, answer):
        return False
    if "bold" in rule and not re.search(r"(\*\*.*?\*\*|__.*?__)", answer):
        return False
    if "bullet points" in rule and not re.search(r"^\s*[-*+]\s", answer, re.M):
        return False
    lines = (re.match(r"^(#+)\s+(.*?)\s*$", line.strip()) for line in answer.split("\n"))
    headings = [(len(match[1]), match[2].strip()) for match in lines if match]
    rules = _heading_rules(constraint)
    if "each" in rule or "any" in rule:
        return bool(headings) and all(test([heading]) for heading in headings for test in rules)
    return all(test(headings) for test in rules)


def _heading_rules(constraint: str) -> list[Rule]:
    return [found for clause in re.split(r"\b,\b", constraint) if (found := _heading_rule(clause, constraint))]


def _quoted(rule: str, answer: str) -> bool:
    quoted = sum(line.strip().startswith(">") for line in answer.split("\n"))
    if "at least" in rule:
        match = re.search(rf"{_LEVEL} block quotes", rule)
        return quoted >= (_number(match[1]) or 0) if match else False
    some = ("use block quotes", "using block quotes", "using markdown block quotes", "employ block quotes")
    return quoted > 0 if any(phrase in rule for phrase in some) else quoted == len(answer.split("\n"))


def _has(*levels: int | None) -> Rule:
    return lambda headings: set(levels) <= {level for level, _ in headings}


def _heading_rule(clause: str, constraint: str) -> Rule | None:
    """What one clause asks of headings; None where nothing is understood, which passes."""
    whole = constraint.lower()
    if (
        "include headings at two levels: main and subheadings" in whole
        or "be structured with a main heading and sub" in whole
    ):
        return _has(1, 2)
    if constraint == "Questions must be organized under a level 2 heading.":
        return lambda headings: bool(headings) and all(level == 2 for level, name in headings if "?" in name)
    if "include a single level 1 heading" in whole:
        return lambda headings: sum(level == 1 for level, _ in headings) == 1
    if "structured using a minimum of two heading levels" in whole or "include headings at two levels" in whole:
        return lambda headings: len({level for level, _ in headings}) >= 2
    if constraint.startswith("format the response using Markdown, employing '##' for main points and '###' for subpoints"):
        return _has(2, 3)
    pair = re.search(rf"(?i)use heading levels {_LEVEL} and {_LEVEL}", clause) or re.search(
        rf"(?i)use heading levels.*?level\s*{_LEVEL}.*?level\s*{_LEVEL}", clause
    )
    if pair:
        return _has(_number(pair[1]), _number(pair[2]))
    named = (
        re.findall(rf"(?i)a heading level {_LEVEL}", clause)
        or re.findall(r"(?i)H(\d+)", clause)
        or re.findall(rf"(?i)Level {_LEVEL} for", clause)
    )
    if named and ("must include" in clause or "should" in clause):
        return _has(*(_number(one) for one in named))
    if "titled" in clause:
        titled = re.search(rf"(?i)level {_LEVEL} heading titled [\"'](.*?)[\"']", clause.strip().rstrip(".")) or re.search(
            rf"(?i)(?:a|at least one|{_TEN}|\d+) level {_LEVEL} heading with the text [\"'](.*?)[\"']", clause
        )
        if titled:
            return lambda headings: (_number(titled[1]), titled[2]) in headings
    clause = clause.strip().lower().rstrip(".")
    if re.search(
        r"includ|\buse|us(?:e|ing|ed|es)|formatted|presented|organized|structured|feature|should be|incorporate", clause
    ):
        level = (
            re.search(rf"(?:a|at least \d+) heading level {_LEVEL}", clause)
            or re.search(rf"(?:a|at least one|{_TEN}|\d+) level {_LEVEL} heading", clause)
            or re.search(r"must use a heading level of h(\d+)", clause)
        )
        if level:
            return _has(_number(level[1]))
        amount = rf"(at least|at most|exactly|up to|a maximum of|under) {_LEVEL} (?:heading )?levels?"
        if count := re.search(amount, clause):
            wanted = _number(count[2]) or 0
            low = wanted if count[1] in ("at least", "exactly") else None
            high = None if count[1] == "at least" else wanted
            return lambda headings: _within(len({level for level, _ in headings}), low, high)
    if most := re.search(rf"must (?:not exceed|be limited to)\s+(?:level\s+)?{_LEVEL}", clause):
        deepest = _number(most[1]) or 0
        return lambda headings: bool(headings) and all(level <= deepest for level, _ in headings)
    if begin := re.search(rf"must begin with a level {_LEVEL} heading", clause):
        return lambda headings: bool(headings) and headings[0][0] == _number(begin[1])
    if used := re.search(rf"use heading level {_LEVEL}", clause):
        return _has(_number(used[1]))
    some = ("include headings", "includes headings", "use heading levels", "using heading levels", "with headings",
            "presented under a separate heading", "separated with headings")  # fmt: skip
    return bool if any(phrase in whole for phrase in some) else None


_A = rf"(\d+|\b(?:{'|'.join(list(NUMBERS)[1:])})\b)"


def _size_rules(noun: str, alone: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Phrases that limit rows or columns, in the order in which they are tried."""
    ask = rf"{_A}\s+{noun}s?"
    return [
        (rf"exactly\s+{ask}", "exact"), (rf"no\s+more\s+than\s+{ask}", "most"),
        (rf"not\s+have\s+more\s+than\s+{ask}", "most"),
        (rf"not\s+exceed(?:ing)?\s+{ask}", "most"), (rf"{noun}\s+limit\s+of\s+{_A}", "most"), *alone,
        (rf"exactly\s+.+and {ask}", "exact"), (rf"not exceed\s+.+and {ask}", "most"),
        (rf"maximum of\s+{_A}\s+{noun}s", "most"), (rf"limited to\s+{_A}\s+{noun}s", "most"),
        (rf"a maximum of\s+.+and {ask}", "most"), (rf"limit the number of {noun}s to\s+{_A}", "most"),
        (rf"limit (?:it|the table) to\s+{_A}\s+{noun}s", "most"),
        (rf"the number of {noun}s in each table does not exceed\s+{_A}", "most"),
    ]  # fmt: skip


_ROWS = _size_rules("row", [(rf"{_A}\s+rows?\s+must\s+be\s+included", "exact")])
_COLUMNS = _size_rules("column", [(rf"in\s+{_A}\s+columns", "exact"), (rf"(?:at most|maximum)\s+{_A}\s+columns", "most")])
_OPTIONAL = re.compile(
    r"if (?:you (?:include|use|utilize|incorporate|present) (?:a |any )?(?:tables?|tabular data)"
    r"|you (?:decide|choose|opt) to (?:use|include|incorporate|present|utilize) (?:a |any )?(?:tables?|tabular data)"
    r"|(?:there (?:is|are) )?(?:a |any )?(?:tables?|tabular data|table format) "
    r"(?:(?:is|are) )?(?:used|included|utilized|incorporated|presented|chosen))"
)


def _size(rules: Sequence[tuple[str, str]], rule: str) -> tuple[int | None, int | None]:
    for pattern, kind in rules:
        if match := re.search(pattern, rule):
            value = _number(match[1])
            return (value if kind == "exact" else None), value
    return None, None


def table(constraint: str, answer: str) -> bool:
    rule = constraint.lower()
    if "|" not in answer:
        return "table" not in rule or bool(_OPTIONAL.search(rule))
    match = re.search(r"(\|.*\|)", answer, re.S)
    lines = [line.strip() for line in (match[1] if match else "").split("\n") if line.strip()]
    if "markdown" in rule and not any(line.startswith("|") for line in lines):
        return False
    rows = len(lines) - (2 if len(lines) > 1 and "---" in lines[1] else 1)
    if not _within(rows, *_size(_ROWS, rule)):
        return False
    columns = (1, 1) if "single column" in rule else _size(_COLUMNS, rule)
    if columns != (None, None) and not (lines and _within(len(lines[0].split("|")) - 2, *columns)):
        return False
    headers = [cell.strip().lower() for cell in lines[0].split("|")[1:-1]] if lines else []
    named = [name.strip().rstrip(",").strip() for name in re.findall(r'"([^"]+)"', rule)]
    for pattern in (r"columns?\s+should\s+be\s+([\w\s,]+)", r"columns:\s+([\w\s,']+)"):
        if match := re.search(pattern, rule):  # the original splits at the letters a, n and d, too
            named += [name.strip("'\" ") for name in re.split(r"[,、，和and]", match[1])]
    return all(any(name in header for header in headers) for name in named if name)


_DEPTH = r"(\d+|two|three)"


def json_depth(constraint: str, answer: str) -> bool:
    rule = re.sub(r"[^\w\s]", "", constraint.lower())

    def read(*patterns: str) -> list[int]:
        return [_number(found) or 0 for pattern in patterns for found in re.findall(pattern, rule)]

    exact = read(
        rf"exactly {_DEPTH} levels?", rf"nesting levels? (?:of|must be) {_DEPTH}", rf"limited to {_DEPTH} levels of nesting"
    )
    most = read(
        rf"(?:exceed|exceeding|no more than) {_DEPTH}(?: levels?)?", rf"maximum of {_DEPTH} (?:object )?(?:nesting )?levels",
        rf"and at most {_DEPTH}",
    )  # fmt: skip
    least = read(rf"at least {_DEPTH} levels?", rf"and at least {_DEPTH}")
    block = re.search(r"```json(.*?)```", answer, re.S)
    try:
        depth = _depth(json.loads(block[1].strip() if block else answer))
    except (ValueError, RecursionError):
        return False
    if exact:
        return depth == exact[0]
    return bool(most or least) and _within(depth, max(least, default=None), min(most, default=None))


def _depth(value: Any) -> int:
    """How many objects and lists with contents are inside each other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((1 + _depth(one) for one in inner), default=0)


def _attributes(answer: str) -> list[int]:
    """How many attributes each XML tag has."""
    block = re.search(r"```xml(.*?)```", answer, re.S)
    pattern = r"<\s*[a-zA-Z_:][\w:.-]*\s*(?:\s+[a-zA-Z_:][\w:.-]*=['\"][^'\"]*['\"])*\s*/?>"
    return [len(re.findall(r"\w+=[\"'][^\"']*[\"']", tag)) for tag in re.findall(pattern, block[1] if block else answer)]


def others(constraint: str, answer: str) -> bool:
    """The rest of the format constraints."""
    rule = constraint.lower()
    amounts = (
        (rf"no more than {_UP_TO_TEN} attributes?|must not exceed {_UP_TO_TEN}.*?attributes?", "high"),
        (
            rf"number of attributes must be exactly {_UP_TO_TEN}|must (?:have|include) exactly {_UP_TO_TEN} attributes?",
            "exact",
        ),
        (rf"at least {_UP_TO_TEN} attributes?", "low"),
    )
    for pattern, kind in amounts:
        if match := re.search(pattern, rule):
            value = _number(next(filter(None, match.groups())))
            low, high = value if kind != "high" else None, value if kind != "low" else None
            return all(_within(count, low, high) for count in _attributes(answer))
    if "bullet points" in rule:
        return bool(re.search(r"^\s*[-*]", answer, re.M)) != ("no bullet points" in rule)
    if "block quotes format" in rule or "be formatted in block quotes" in rule:
        return bool(re.search(r"^>", answer, re.M)) or "<blockquote>" in answer.lower()
    if match := re.search(rf"(?:no more than|limited to a maximum of) {_UP_TO_TEN} rows", rule):
        rows = [row for row in re.findall(r"^\|.*\|$", answer, re.M) if not re.match(r"^\|(\s*-+\s*\|)+$", row)]
        return max(len(rows), answer.lower().count("<tr>")) <= (_number(match[1]) or 0)
    if "short blurb" in rule:
        return len(answer) <= 200
    return "full sentences" in rule


def identifiers(constraint: str, answer: str) -> bool:
    """Words at the start."""
    if match := re.match(r"Start identifier(?: must be|:).*\s'([^']+)'", constraint):
        return match[1] in answer if "Each example must start with" in constraint else _starts(answer, match[1])
    if match := re.search(r"(?:start|begin) (?:with|by) the (?:identifier|phrase) '?([^']+)'?", constraint, re.I):
        return _starts(answer, match[1])
    if match := re.match(r"The name of the showroom must start with the letter '([A-Za-z])'\.", constraint):
        return bool(re.search(rf"\b{match[1].upper()}[a-zA-Z]*\b", answer))
    return False


def _starts(answer: str, words_: str) -> bool:
    return answer.lstrip(" #").lower().startswith(words_.lower())


#: the benchmark's second level (after its own mapping of stray names) -> how it is decided
CHECKS: dict[str, Callable[[str, str], bool]] = {
    "Keywords": keywords, "Identifiers": identifiers, "Punctuation": punctuation, "Markdown": markdown, "Json": json_depth,
    "XML": others, "Table": table, "English": english, "Chinese": chinese, "Words": words, "Sentences": sentences,
    "Paragraphs": paragraphs,
}  # fmt: skip
#: names of the data whose checker is not that of their category
_STRAY = {
    ("Format", "Text"): others, ("Format", "Blurb"): others, ("Table", "Table"): others,
    ("Format", "Markdown: Block quotes"): others,
}  # fmt: skip


def reads(second: str, constraint: str) -> str:
    """What the original makes of a constraint: "vacuous" where nothing is understood and every answer passes (of XML: every
    answer without any), "impossible" where nothing is understood and every answer fails, else "decides"."""
    rule = constraint.lower()
    if second == "Sentences" and _limits(_SENTENCES, rule.strip()) == (None, None):
        return "vacuous"
    told = "block quotes|bold|bullet points|each|any"  # the last two ask for some heading
    if second == "Markdown" and not _heading_rules(constraint) and not re.search(told, rule):
        return "vacuous"
    if second == "English" and not _letter_case(rule.strip()):
        return "impossible"
    if second == "Paragraphs" and _limits(_PARAGRAPHS, rule) == (None, None):
        return "impossible"
    return "vacuous" if second == "XML" and others(constraint, "") else "decides"


def verdict(main: str, sub: str, second: str, constraint: str, answer: str) -> bool:
    """Whether the original would say that ``answer`` obeys; ``second`` is the category that `taxonomy` gives."""
    check = _STRAY.get((main, sub)) or CHECKS[second]
    return check(constraint, answer)
