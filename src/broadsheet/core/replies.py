"""Reading what models wrote: yes or no, numbers, labelled parts, tags, JSON, code blocks.

Every reader returns None where the reply cannot be read, which is an outcome of its own: never a yes, a no or a zero. Where
a reply says several things, the last one counts, since models think before they answer.
"""

from __future__ import annotations

import json
import re
from typing import Any

_THOUGHT = re.compile(r"^.*</think>", re.S)
_NEGATED = re.compile(r"\b(?:not|never|isn't|aren't|doesn't|cannot|can't)\s+(?:\w+\s+)?$", re.I)
#: so many brackets are tried as the beginning of JSON
_STARTS = 200
_GOOD = (
    "met|meets?|satisf(?:ied|ies|y)|fulfil(?:s|l|ls|led)?|compl(?:y|ies|ied)|compliant|respect(?:s|ed)?|adhere[sd]?|"
    "follow(?:s|ed)?|pass(?:es|ed)?|yes|true|ok"
)
_BAD = (
    "unmet|unsatisfied|unfulfilled|violat(?:e|es|ed|ion|ions)|breach(?:es|ed)?|fail(?:s|ed|ure)?|broken|ignore[sd]|missed|"
    "non-?compliant|no|false"
)
_VERDICT = re.compile(rf"(?<![\w-])(?:({_GOOD})|({_BAD}))(?![\w-])", re.I)
_VERDICT_LABEL = re.compile(r"\b(?:verdict|judge?ment|answer|result)\b[*_\"']*\s*(?::|is\b)|=+>|→", re.I)
_MARKS = str.maketrans({"✓": " yes ", "✔": " yes ", "✅": " yes ", "✗": " no ", "✘": " no ", "❌": " no ", "’": "'"})
#: turns a verdict that follows in the same clause: "is not fully met", "no violation", "fails to comply", "partly met"
_TURN = re.compile(
    r"(?<![\w-])(?:(?:not|never|\w+n't|cannot|hardly|barely|nor|no longer|fail(?:s|ed)? to|far from|part(?:ly|ially)),?\s+"
    r"(?:[\w'-]+,?\s+){0,3}|no\s+(?:[\w'-]+\s+){0,3})$",
    re.I,
)
#: says that it does not know, or what would be
_UNSURE = re.compile(
    r"\b(?:un(?:clear|sure|certain|known|determined)|"
    r"can(?:no|')t (?:be )?(?:determined?|verif(?:y|ied)|judged?|tell|said|say)|"
    r"hard to (?:say|tell)|whether|m(?:ay|ight)|would|could|should|if|n(?:either|/a)|either)\b|\?",
    re.I,
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w])(?!\.\d)")
_PROBABILITY = re.compile(r"[\s*`\"'(=:]*([-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)[\s.*`\"')]*")
_REFUSAL = re.compile(
    r"\b(?:I(?:['’]m| am)? (?:sorry|unable|not able)|I (?:cannot|can['’]t|can not|won['’]t|must decline)|"
    r"(?:cannot|can['’]t|unable to) (?:help|assist|comply|provide)|decline to)\b",
    re.I,
)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.S | re.M)


def answer_part(text: str) -> str:
    """The reply without its reasoning: what follows the last ``</think>``, stripped."""
    return _THOUGHT.sub("", text).strip()


def after_label(text: str, label: str) -> str | None:
    """What follows the last ``label`` (any case; colon, asterisks and quotes around it are passed over), or None."""
    found = list(re.finditer(re.escape(label) + r"[\s:*\"'_]*", text, re.I))
    return text[found[-1].end() :].strip() if found else None


def yes_no(text: str, label: str = "", yes: str = "yes", no: str = "no") -> bool | None:
    """Yes or no, as whole words; with ``label`` only after its last occurrence, where the first of the two counts, else the
    last. A negated "yes" ("not yes") is no answer."""
    part = answer_part(text)
    if label:
        found = after_label(part, label)
        if found is None:
            return None
        part = found
    words = list(re.finditer(rf"\b(?:({re.escape(yes)})|({re.escape(no)}))\b", part, re.I))
    if not words:
        return None
    word = words[0] if label else words[-1]
    if _NEGATED.search(part[: word.start()]):
        return None
    return word[1] is not None


def verdict(text: str) -> bool | None:
    """Whether a sentence on one constraint says that it is met: "satisfied", "is not fully met", "violated", "no violation".

    Negations turn the word that they stand before; "partly met" is not met. A verdict after the last "verdict:" or
    "=>" counts alone. A text that says both, that it does not know, or what would be, is None.
    """
    part = answer_part(text).translate(_MARKS)
    labels = list(_VERDICT_LABEL.finditer(part))
    if labels and _VERDICT.search(part, labels[-1].end()):
        part = part[labels[-1].end() :]
    if _UNSURE.search(part):
        return None
    found = set()
    for word in _VERDICT.finditer(part):
        after = part[word.end() :]
        if re.match(r"no\s+\w|fail(?:s|ed)?\s+to\b", word[0] + after, re.I):
            continue  # "no violation", "fails to meet": belongs to the next word
        clause = re.split(r"[.;:!\n]|\bbut\b", part[max(0, word.start() - 80) : word.start()])[-1]
        found.add(bool(word[1]) != bool(_TURN.search(clause)))
    return found.pop() if len(found) == 1 else None


def number(text: str, low: float = float("-inf"), high: float = float("inf"), label: str = "") -> float | None:
    """The last number (after the last ``label``: the first), or None where there is none, it lies outside [low, high] or
    it is a percentage."""
    part = answer_part(text)
    if label:
        found = after_label(part, label)
        if found is None:
            return None
        part = found
    numbers = list(_NUMBER.finditer(part))
    if not numbers:
        return None
    match = numbers[0] if label else numbers[-1]
    if part[match.end() :].lstrip().startswith("%"):
        return None
    value = float(match[0])
    return value if low <= value <= high else None


def probability(text: str, label: str = "") -> float | None:
    """A probability that stands alone: as the whole reply, in the last ``<label>...</label>``, or on the rest of the line
    after the last ``label`` and a colon.

    "0.85" and "85 %" are read; "85", "1.2", "0.2 or 0.9" and a number within a sentence are not.
    """
    part = answer_part(text)
    if label:
        tagged = tag(part, label)
        lines = re.findall(rf"\b{re.escape(label)}\b[*\"'_]*\s*:([^\n]*)", part, re.I)
        part = tagged if tagged is not None else lines[-1] if lines else ""
    match = _PROBABILITY.fullmatch(part)
    if not match:
        return None
    value = float(match[1]) / (100 if match[2] else 1)
    return value if 0 <= value <= 1 else None


def refuses(text: str) -> bool:
    """Whether a reply says that its author will not answer. A guess from its wording; never the ground of a pass."""
    return bool(_REFUSAL.search(answer_part(text)))


def tag(text: str, name: str) -> str | None:
    """The contents of the last ``<name>...</name>`` (any case), stripped, or None."""
    found = re.findall(rf"<{re.escape(name)}\b[^>]*>(.*?)</{re.escape(name)}\s*>", text, re.S | re.I)
    return found[-1].strip() if found else None


def between(text: str, start: str, end: str) -> str | None:
    """What stands between the last ``start`` and the next ``end``, stripped, or None."""
    place = text.rfind(start)
    if place < 0:
        return None
    stop = text.find(end, place + len(start))
    return text[place + len(start) : stop].strip() if stop >= 0 else None


def code_blocks(text: str, language: str = "") -> list[str]:
    """Fenced blocks in order; with ``language`` (any case) only those of that language. Unclosed blocks are none."""
    return [match[3] for match in _FENCE.finditer(text) if not language or match[2].lower() == language.lower()]


def json_of(text: str) -> Any:
    """The last JSON object or list of the reply (in a fenced block, or bare), or None."""
    part = answer_part(text)
    for block in reversed([*code_blocks(part, "json"), *code_blocks(part)]):
        try:
            return json.loads(block)
        except (ValueError, RecursionError):
            continue
    decoder, found, place = json.JSONDecoder(), None, 0
    for _ in range(_STARTS):  # brackets that open nothing must not make this quadratic
        start = min((at for at in (part.find("{", place), part.find("[", place)) if at >= 0), default=-1)
        if start < 0:
            break
        try:
            found, place = decoder.raw_decode(part, start)
        except ValueError:
            place = start + 1
        except RecursionError:
            break
    return found


def numbered(text: str) -> list[str]:
    """The items of a numbered or bulleted list, in order."""
    return [match[1].strip() for match in re.finditer(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+(.+)$", answer_part(text), re.M)]
