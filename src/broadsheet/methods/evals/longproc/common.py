"""What the six tasks share: items, scores, and comparing traces line by line."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from broadsheet.core.replies import answer_part


@dataclass(frozen=True)
class Item:
    """One problem: ``prompt``, the ``reference`` answer, and ``data``, what the evaluator needs."""

    prompt: str
    reference: str
    data: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Item:
        """From a row with the three official fields."""
        return cls(row["input_prompt"], row["reference_output"], row["item"])


@dataclass(frozen=True)
class Score:
    """What one answer is worth.

    ``accuracy``: 0 or 1, for html_to_tsv the F1 of its rows. ``partial``: the share of the trace's lines that are right, in
    [0, 1]. ``prefix``: how many of its first lines are right, of ``lines`` that the reference has. ``extracted``: whether
    the answer could be found at all. ``values``: further metrics. ``evidence``: the first line that differs.
    """

    accuracy: float
    partial: float
    prefix: int = 0
    lines: int = 1
    extracted: bool = True
    values: Mapping[str, float] = field(default_factory=dict)
    evidence: str = ""


class Task(Protocol):
    """A module of a task: its answers' parts and their score."""

    def parts(self, item: Item) -> tuple[str, list[str], str]:
        """The reference answer as (what stands before, the trace's lines, what stands after)."""

    def score(self, item: Item, text: str) -> Score: ...


def section(text: str, tag: str) -> tuple[str, bool] | None:
    """(what stands after the last ``<tag>``, whether it is closed), or None where it was never opened.

    A trace that was cut off is still a trace: its first lines count, the answer does not.
    """
    part = answer_part(text)
    start = part.rfind(f"<{tag}>")
    if start < 0:
        return None
    inside, closed, _ = part[start + len(tag) + 2 :].partition(f"</{tag}>")
    return inside.strip("\n"), bool(closed)


def lines_of(text: str) -> list[str]:
    """Lines that are not blank, without what trails them; their indentation is part of a trace."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def compare(found: Sequence[str], wanted: Sequence[str], whole: bool = True) -> tuple[int, float, str]:
    """(right lines before the first wrong one, partial score, the difference).

    The partial score is the right prefix over the longer of the two, so that it is 0 when the first line is wrong, 1 only
    when all lines are equal, and never above the share of the reference that is right. A trace that is not ``whole`` (its
    end mark is missing) lacks a line.
    """
    prefix = 0
    for one, other in zip(found, wanted, strict=False):
        if one != other:
            break
        prefix += 1
    partial = prefix / max(len(found), len(wanted) + (not whole), 1)
    if prefix == len(found) == len(wanted):
        return prefix, partial, "" if whole else "it does not end"
    said = found[prefix] if prefix < len(found) else "(nothing)"
    meant = wanted[prefix] if prefix < len(wanted) else "(nothing)"
    return prefix, partial, f"line {prefix + 1}: '{said[:200]}' instead of '{meant[:200]}'"


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@lru_cache(maxsize=1 << 16)  # references are read again for every answer
def plain(text: str, dropped: re.Pattern[str] = _ARTICLES) -> str:
    """Lower case, without punctuation, the ``dropped`` words and superfluous spaces."""
    return " ".join(dropped.sub(" ", text.lower().translate(_PUNCTUATION)).split())
