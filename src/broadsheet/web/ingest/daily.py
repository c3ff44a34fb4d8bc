"""Hugging Face's daily papers: ``/api/daily_papers?date=2026-11-28``, a JSON list for each day.

The cursor is the last day that was read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from typing import Any
from urllib.parse import urlencode

from ..library import Item, utcnow
from .common import Page, Wanted, time_of, words

#: Days back where nothing was read yet.
FIRST_DAYS = 3


def read(wanted: Wanted, fetch: Callable[[str], bytes]) -> Iterator[Page]:
    """A page for each day. Raises ValueError for what is no such list."""
    today = utcnow().date()
    day = wanted.since or (wanted.read.date() - timedelta(days=1) if wanted.read else today - timedelta(days=FIRST_DAYS))
    if stopped := time_of(wanted.cursor):
        day = max(day, stopped.date() + timedelta(days=1))
    first = day
    while day <= today:
        yield _page(fetch(f"{wanted.url}?{urlencode({'date': day.isoformat()})}"), day, first, today)
        day += timedelta(days=1)


def _page(document: bytes, day: date, first: date, today: date) -> Page:
    try:
        entries = json.loads(document)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError("this is no list of Hugging Face's daily papers")
    items = [item_of(entry) for entry in entries]
    done = ((day - first).days + 1) / ((today - first).days + 1)
    cursor = "" if day >= today else day.isoformat()
    return Page([item for item in items if item], cursor, sum(item is None for item in items), done)


def item_of(entry: Any) -> Item | None:
    """An entry's paper: ``paper`` with id, title, summary, ai_summary, authors, githubRepo and days."""
    paper = entry.get("paper") if isinstance(entry, dict) else None
    if not isinstance(paper, dict):
        return None
    title = words(paper.get("title")) or words(entry.get("title"))
    if not title or not words(paper.get("id")):
        return None
    authors = paper.get("authors")
    shown = time_of(paper.get("submittedOnDailyAt"))
    return Item(
        title=title, arxiv_id=words(paper["id"]), abstract=words(paper.get("summary")) or words(entry.get("summary")),
        authors=tuple(words(a.get("name")) for a in authors if isinstance(a, dict)) if isinstance(authors, list) else (),
        summary=words(paper.get("ai_summary")), code_url=words(paper.get("githubRepo")),
        published=time_of(paper.get("publishedAt")) or time_of(entry.get("publishedAt")),
        day=shown.date() if shown else None, source="hf-daily",
    )  # fmt: skip
