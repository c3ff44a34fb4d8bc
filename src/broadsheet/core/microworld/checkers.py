"""Checkers: what an answer is worth, between 0 and 1.

Each takes the model's text and the turn and is deterministic. An empty answer is worth 0. The names and rules follow
SCBench's scorers (arXiv 2412.10319, section 3 and appendix); `strict` beside them is exact match after normalising space.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from .sessions import Turn

Checker = Callable[[str, Turn], float]


def gold_answers(turn: Turn) -> tuple[str, ...]:
    """The gold strings of a turn."""
    return turn.answer if isinstance(turn.answer, tuple) else (turn.answer,)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def strict(text: str, turn: Turn) -> float:
    """1 when the answer equals a gold answer (or the turn's full reference sentence) up to white space."""
    golds = (*gold_answers(turn), turn.extra.get("reference", ""))
    return float(bool(text.strip()) and any(_squeeze(text) == _squeeze(gold) for gold in golds))


def contains(text: str, turn: Turn) -> float:
    """1 when any gold answer is contained in the text (SCBench kv, prefix_suffix, qa_eng, many_shot)."""
    text = _squeeze(text)
    return float(bool(text) and any(_squeeze(gold) in text for gold in gold_answers(turn)))


def contains_all(text: str, turn: Turn) -> float:
    """Share of the gold strings contained in the text, rounded to two places (SCBench vt, ``string_match_all``)."""
    golds = gold_answers(turn)
    if not text.strip():
        return 0.0
    return round(sum(gold.lower() in text.lower() for gold in golds) / len(golds), 2)


def first_number(text: str, turn: Turn) -> float:
    """1 when the first integer of the text equals the gold number (SCBench math.find and passkeys).

    The scorer vector of the benchmark, gold 12 for "around 12, or 13" -> 1, holds.
    """
    found = re.search(r"-?\d+(?:\.\d+)?", text)
    return float(found is not None and float(found.group()) == float(gold_answers(turn)[0]))


def option_letter(text: str, turn: Turn) -> float:
    """1 when the option letter the text names is the gold one (SCBench choice_eng).

    Tried in order: "answer is: B" and the like, then a leading letter, then the text of the right option itself.
    """
    gold = gold_answers(turn)[0].strip()
    found = re.search(r"(?:answer|choice|option)\s*(?:is)?\s*[:\-]?\s*\(?([A-D])\b", text, re.IGNORECASE)
    if found is None:
        found = re.match(r"\s*\(?([A-D])(?:[\s).:,]|$)", text)
    if found is not None:
        return float(found.group(1).upper() == gold.upper())
    options = turn.extra.get("options") or []
    index = ord(gold.upper()) - ord("A") if len(gold) == 1 else -1
    return float(0 <= index < len(options) and bool(options[index]) and options[index] in text)


def _f1(predicted: list[str], gold: list[str]) -> float:
    overlap = sum((Counter(predicted) & Counter(gold)).values())
    if not overlap:
        return 0.0
    precision, recall = overlap / len(predicted), overlap / len(gold)
    return 2 * precision * recall / (precision + recall)


def f1_words(text: str, turn: Turn) -> float:
    """Best word F1 over the golds, lower case, without punctuation and articles."""

    def words(value: str) -> list[str]:
        value = "".join(" " if char in string.punctuation else char for char in value.lower())
        return [word for word in value.split() if word not in {"a", "an", "the"}]

    return max(_f1(words(text), words(gold)) for gold in gold_answers(turn))


def f1_characters(text: str, turn: Turn) -> float:
    """Best character F1 over the golds, without punctuation and space (SCBench qa_chn)."""
    skip = set(string.punctuation) | set("，。！？、；：“”‘’（）《》【】… \n\t　")

    def characters(value: str) -> list[str]:
        return [char for char in value.lower() if char not in skip]

    return max(_f1(characters(text), characters(gold)) for gold in gold_answers(turn))


def rouge_lsum(text: str, turn: Turn) -> float:
    """ROUGE-Lsum F1 on words: union of longest common subsequences, a sentence a line or a full stop (SCBench summary)."""

    def sentences(value: str) -> list[list[str]]:
        return [re.findall(r"[a-z0-9]+", part.lower()) for part in re.split(r"[.\n]", value) if part.strip()]

    def best(gold: str) -> float:
        want, have = sentences(gold), sentences(text)
        total_want, total_have = sum(map(len, want)), sum(map(len, have))
        if not total_want or not total_have:
            return 0.0
        left = Counter(word for part in have for word in part)
        hits = 0
        for part in want:
            covered = sorted({index for other in have for index in _lcs_indices(part, other)})
            for index in covered:
                if left[part[index]] > 0:
                    left[part[index]] -= 1
                    hits += 1
        precision, recall = hits / total_have, hits / total_want
        return 2 * precision * recall / (precision + recall) if hits else 0.0

    return max(best(gold) for gold in gold_answers(turn))


def _lcs_indices(a: list[str], b: list[str]) -> list[int]:
    """Indices into ``a`` of one longest common subsequence of ``a`` and ``b``."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    indices, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            indices.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i - 1][j] >= table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return indices[::-1]


def last_number(text: str, turn: Turn) -> float:
    """1 when the last integer of the text equals the last one of the gold answer (written-out arithmetic)."""
    found = re.findall(r"-?\d+", text)
    gold = re.findall(r"-?\d+", gold_answers(turn)[0])
    return float(bool(found) and int(found[-1]) == int(gold[-1]))


def format_rule(text: str, turn: Turn) -> float:
    """1 when the text keeps every rule of ``extra['rules']``: item count, category, separator, closing word."""
    rules = turn.extra["rules"]
    body = text.strip()
    if "end" in rules:
        if not body.endswith(rules["end"]):
            return 0.0
        body = body[: -len(rules["end"])].strip()
    items = [item.strip() for item in body.split(rules["separator"]) if item.strip()]
    distinct = len(set(items)) == len(items)
    return float(distinct and len(items) == rules["count"] and all(item in rules["allowed"] for item in items))


CHECKERS: dict[str, Checker] = {
    function.__name__: function
    for function in (
        strict,
        contains,
        contains_all,
        first_number,
        last_number,
        option_letter,
        f1_words,
        f1_characters,
        rouge_lsum,
        format_rule,
    )
}


def check(text: str, turn: Turn) -> float:
    """Scores ``text`` for ``turn`` with the turn's checker; raises ValueError for an unknown checker."""
    if turn.checker not in CHECKERS:
        raise ValueError(f"unknown checker '{turn.checker}'; known: {', '.join(CHECKERS)}")
    return CHECKERS[turn.checker](text, turn) if text.strip() else 0.0
