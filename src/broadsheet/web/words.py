"""Text from outside: cleaned, cut, and with the words that were looked for marked."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

#: Characters of a search result's text.
EXCERPT = 320


def clean(text: str, most: int) -> str:
    """Without control characters and lone surrogates (no database and no XML takes them), at most so long."""
    kept = "".join(c for c in text[:most] if c.isprintable() or c in "\n\t")
    return kept.encode("utf-8", "ignore").decode().strip()


def words_of(query: str) -> list[str]:
    """The words of a query that are worth marking."""
    return [word for word in dict.fromkeys(re.findall(r"\w+", query.lower())) if len(word) > 1 and word not in _OPERATORS]


def highlight(text: str, words: list[str]) -> Markup:
    """The text, escaped, with the words and what they begin marked."""
    if not words:
        return escape(text)
    parts = _pattern(words).split(text)
    return Markup("").join(Markup("<mark>{}</mark>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))


def excerpt(summary: str, abstract: str, words: list[str]) -> Markup:
    """A paper's summary; where it has none of the words, the abstract from the first of them on."""
    text = summary
    if words and not _pattern(words).search(text) and (hit := _pattern(words).search(abstract)):
        start = abstract.rfind(". ", 0, hit.start()) + 2 if ". " in abstract[: hit.start()] else 0
        start = max(start, hit.start() - EXCERPT // 2)
        text = ("… " if start else "") + shortened(abstract[start:], EXCERPT)
    return highlight(text, words)


def shortened(text: str, most: int) -> str:
    """At most so many characters, cut between words."""
    return text if len(text) <= most else text[:most].rpartition(" ")[0] + " …"


def _pattern(words: list[str]) -> re.Pattern[str]:
    return re.compile(rf"\b((?:{'|'.join(map(re.escape, words))})\w*)", re.IGNORECASE)


_OPERATORS = frozenset(("and", "or", "not", "near"))
