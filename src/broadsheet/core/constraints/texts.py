"""Counting what a text is made of, and writing plain texts with given numbers of it."""

from __future__ import annotations

import re

#: words of the texts that witnesses are made of: plain English, lower case, no punctuation
WORDS = (
    "the small boat went slowly along the wide river while people on the green bank looked at the water and talked about "
    "their long warm day in the old town near the hills where many birds sang in the tall trees"
).split()

#: A full stop after one of these ends no sentence; after one of the second row it does before a word that begins many.
_TITLES = frozenset("mr mrs ms dr prof st gen col sgt capt lt rev hon gov sen rep no vol fig approx vs e.g i.e".split())
_ABBREVIATIONS = frozenset(
    "jr sr etc inc ltd co corp dept a.m p.m u.s u.k jan feb mar apr jun jul aug sep sept oct nov dec ph.d m.d b.a".split()
)
_STARTERS = frozenset(
    "the a an at we they he she it this that these those in on for and but or so then what how when where who why if you i "
    "there as with after before to from my our their his her its since because while given all some one each".split()
)
_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s|$)")
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])*")
_FIRST = re.compile(r"\W*(\w+)")


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
    """Sentences: up to . ! or ? (and closing quotes or brackets) before white space.

    Not after a title ("Dr."), nor after a usual abbreviation or an initial unless a word follows that begins many sentences
    ("in the U.S. The"). A list's number ("1.") is one, as for NLTK's Punkt, which this follows without its trained tables.
    """
    found, start = [], 0
    for end in _END.finditer(text):
        if end[0].startswith(".") and "!" not in end[0] and "?" not in end[0]:
            word = text[start : end.start()].rsplit(maxsplit=1)[-1:] or [""]
            last, after = word[0].lstrip("\"'“‘([*").lower(), _FIRST.match(text, end.end())
            initial = last != "i" and bool(_INITIALS.fullmatch(last))
            follows = after[1] if after else "The"
            begins = (initial and follows.isdigit()) or (follows[0].isupper() and follows.lower() in _STARTERS)
            inside = last.isdigit() and follows[0].islower()
            if last in _TITLES or inside or ((last in _ABBREVIATIONS or initial) and not begins):
                continue
        found.append(text[start : end.end()].strip())
        start = end.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


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
