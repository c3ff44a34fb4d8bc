"""RSS and Atom of any kind, read by feedparser once defusedxml found nothing harmful in the document."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from ..fetching import Answer
from ..library import Item, arxiv_id_of, arxiv_version_of, doi_of
from .common import Page, Wanted, parse

#: Entries that are read of one document.
MOST = 5_000


def read(wanted: Wanted, fetch: Callable[[str, str, str], Answer]) -> Iterator[Page]:
    """One page, empty where the document has not changed since it was last read. Raises ValueError for what is no feed."""
    answer = fetch(wanted.url, wanted.etag, wanted.modified)
    if not answer.changed:
        yield Page([], done=1.0, etag=wanted.etag, modified=wanted.modified)
        return
    items, skipped = items_of(answer.body)
    if wanted.since:
        items = [i for i in items if i.published is None or i.published.date() >= wanted.since]
    yield Page(items, "", skipped, 1.0, answer.etag, answer.modified)


def items_of(document: bytes) -> tuple[list[Item], int]:
    """The papers of a feed, and how many entries are none."""
    parse(document)  # refuses document types, entities, and what is no XML
    import feedparser

    found = feedparser.parse(document, sanitize_html=True, resolve_relative_uris=False)
    if not found.get("version"):
        raise ValueError("this is neither RSS nor Atom")
    source = str(found.feed.get("title", "")) or "feed"
    items = [_item(entry, source) for entry in found.entries[:MOST]]
    return [item for item in items if item.title.strip()], sum(not item.title.strip() for item in items)


def _item(entry: Any, source: str) -> Item:
    link, identifier = str(entry.get("link", "")), str(entry.get("id", ""))
    texts = [str(part.get("value", "")) for part in entry.get("content", ())] + [str(entry.get("summary", ""))]
    abstract = html.unescape(max(texts, key=len)).rpartition("Abstract:")[
        2
    ]  # arXiv's own says what kind of news it is first
    names = [str(author.get("name", "")) for author in entry.get("authors", ())]
    arxiv = next((text for text in (identifier, link) if "arxiv" in text.lower() and arxiv_id_of(text)), "")
    dois = (str(entry.get(name, "")) for name in ("prism_doi", "dc_identifier", "id", "link"))
    return Item(
        title=html.unescape(str(entry.get("title", ""))), abstract=abstract, url=link, arxiv_id=arxiv,
        authors=tuple(part.strip() for name in names for part in name.split(", ")), version=arxiv_version_of(arxiv),
        doi=next((text for text in dois if doi_of(text)), ""),
        tags=tuple(str(tag.get("term", "")) for tag in entry.get("tags", ())), published=_time(entry, "published"),
        updated=_time(entry, "updated"), source=source,
    )  # fmt: skip


def _time(entry: Any, name: str) -> datetime | None:
    parsed = entry.get(f"{name}_parsed")
    try:
        return datetime(*parsed[:6]) if parsed else None
    except (ValueError, TypeError):
        return None
