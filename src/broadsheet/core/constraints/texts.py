"""Counting what a text is made of, and writing plain texts with given numbers of it."""

from __future__ import annotations

import re

#: words of the texts that witnesses are made of: plain English, lower case, no punctuation
WORDS = (
    "the small boat went slowly along the wide river while people on the green bank looked at the water and talked about "
    "their long warm day in the old town near the hills where many birds sang in the tall trees"
).split()

#: A full stop after one of these ends no sentence.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc e.g i.e inc ltd co corp gen col sgt capt lt rev hon gov sen rep no vol fig approx "
    "dept a.m p.m u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec ph.d m.d b.a m.a".split()
)
_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)")
_SPACE = re.compile(r"\s+")


def filler(words: int) -> str:
    """That many words of plain English, without capital letters or punctuation."""
    return " ".join(WORDS[place % len(WORDS)] for place in range(words))


def sentences_of(count: int, words: int = 6) -> str:
    """That many sentences of ``words`` words."""
    made = []
    for place in range(count):
        start = place * words
        part = [WORDS[(start + offset) % len(WORDS)] for offset in range(words)]
        made.append(" ".join(part).capitalize() + ".")
    return " ".join(made)


def paragraphs_of(count: int, between: str = "\n\n") -> str:
    """That many paragraphs of one sentence."""
    return between.join(sentences_of(1) for _ in range(count))


def sentences(text: str) -> list[str]:
    """Sentences: up to . ! or ? (and closing quotes or brackets) before white space, but not after a usual abbreviation,
    an initial, a list's number, or before a small letter."""
    found, start = [], 0
    for end in _END.finditer(text):
        rest = text[end.end() :].lstrip()
        mark = end[0].rstrip("\"'”’)]*")
        if mark == ".":
            word = text[start : end.start()].rsplit(maxsplit=1)[-1:] or [""]
            last = word[0].lstrip("\"'“‘([*").lower()
            initial = len(last) == 1 and last.isalpha() and last != "i"
            listed = last.isdigit() and not text[start : end.start()].strip().rstrip("0123456789").strip()
            if last in _ABBREVIATIONS or initial or listed:
                continue
        if rest[:1].islower() and mark != "!" and mark != "?":
            continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    if text[start:].strip():
        found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


#: what stands between tokens as `tokens` counts them
_MARKS = re.compile(r"""\.{3}|--+|[;@#$%&?!"“”«»‘()\[\]{}<>]|[:,](?=\D|$)|``|''""")
_CONTRACTED = re.compile(r"(?i)('(?:s|m|d|ll|re|ve)|n't)$")


def tokens(text: str) -> list[str]:
    """Words as the Penn treebank separates them: at white space and punctuation (not hyphens, slashes or points inside a
    word), with contractions as tokens of their own."""
    found = []
    for piece in _MARKS.sub(" ", text).split():
        word = piece.rstrip(".") if piece.count(".") == 1 else piece
        while match := _CONTRACTED.search(word):
            if not match.start():
                break
            found.append(match[1])
            word = word[: match.start()]
        if word:
            found.append(word)
    return found
