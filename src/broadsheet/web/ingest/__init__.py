"""Papers flow in: a module for each format; this one names the sources and keeps how far each was read.

A page of a source and the place where to go on are stored in one transaction: a reader that is killed loses nothing, and
reading again goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from urllib.parse import quote, urlsplit

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from .. import library
from ..db import reading, session
from ..fetching import Fetcher
from ..library import Added, clean, utcnow
from ..tables import Source
from . import arxiv, daily, local, oai, rss
from .common import Page, Wanted

KINDS = ("arxiv", "oai", "hf-daily", "rss", "file")
DEFAULTS = ("arxiv:cs.CL", "arxiv:cs.LG", "hf-daily")
_ARXIV = "https://export.arxiv.org/api/query?search_query=cat:"
_ARXIV_OAI = "https://oaipmh.arxiv.org/oai?metadataPrefix=arXiv&set="
_DAILY = "https://huggingface.co/api/daily_papers"


@dataclass(frozen=True)
class Named:
    """A source: its kind, and its address or the path of a file."""

    kind: str
    url: str


def named(name: str, kind: str = "") -> Named:
    """What the user names: ``arxiv:cs.CL``, ``oai:cs`` (arXiv's), ``hf-daily``, an address, or a file. The kind of an
    address is guessed from how it looks unless it is given. Raises ValueError."""
    if kind and kind not in KINDS:
        raise ValueError(f"unknown kind '{kind}'; known: {', '.join(KINDS)}")
    if name == "hf-daily":
        return Named(name, _DAILY)
    for short, address in (("arxiv:", _ARXIV), ("oai:", _ARXIV_OAI)):
        if name.startswith(short) and name != short:
            return Named(short[:-1], address + quote(name.removeprefix(short)))
    if "://" in name:
        if urlsplit(name).scheme not in ("http", "https"):
            raise ValueError(f"'{name}' is neither http nor https")
        if len(name) > library.URL:
            raise ValueError(f"an address has at most {library.URL} characters")
        return Named(kind or _guessed(name), name)
    if kind not in ("", "file") or not Path(name).is_file():
        raise ValueError(f"'{name}' is no file, no address, and neither arxiv:CATEGORY, oai:SET nor hf-daily")
    return Named("file", str(Path(name).resolve()))


def _guessed(url: str) -> str:
    parts = urlsplit(url)
    if "search_query=" in parts.query or "id_list=" in parts.query:
        return "arxiv"
    if parts.path.rstrip("/").endswith("/api/daily_papers"):
        return "hf-daily"
    return "oai" if "verb=" in parts.query or "metadataPrefix=" in parts.query or "oai" in parts.path.lower() else "rss"


def read(
    engine: Engine, source: Named, *, since: date | None = None, limit: int | None = None, fetcher: Fetcher | None = None,
    progress: Callable[[Added, float | None], None] = lambda added, done: None,
) -> Added:  # fmt: skip
    """Reads a source to its end, or ``limit`` papers of it. ``progress`` is told what was added so far and which part of the
    source that was, where it is known. Raises ValueError with what went wrong, which is also kept with the source."""
    started, added = utcnow(), Added()
    with reading(engine) as db:
        known = db.get(Source, source.url) or Source(url=source.url, etag="", modified="", cursor="", read=None)
    wanted = Wanted(source.url, since, known.cursor, known.read, known.etag, known.modified)
    try:
        for page in _pages(source.kind, wanted, fetcher or Fetcher()):
            rest = None if limit is None else limit - added.total
            cut = rest is not None and len(page.items) > rest
            with session(engine) as db:
                added += library.add(db, page.items[:rest])
                added.refused += page.skipped
                if not cut:
                    row = _row(db, source)
                    row.cursor, row.etag, row.modified = page.cursor, page.etag, page.modified
                    if page.kept or not page.cursor:
                        row.read, row.failures, row.error = started, 0, ""
            progress(added, page.done)
            if cut or (limit is not None and added.total >= limit):
                break
    except ValueError as error:
        with session(engine) as db:
            row = _row(db, source)
            row.failures, row.error = row.failures + 1, clean(str(error), 500)
        raise
    return added


def _row(db: Session, source: Named) -> Source:
    row = db.get(Source, source.url)
    if row is None:
        row = Source(url=source.url, kind=source.kind, etag="", modified="", cursor="", failures=0, error="", read=None)
        db.add(row)
    return row


def _pages(kind: str, wanted: Wanted, fetcher: Fetcher) -> Iterator[Page]:
    def fetch(url: str) -> bytes:
        return fetcher.get(url).body

    if kind == "file":
        return local.read(wanted)
    if kind == "rss":
        return rss.read(wanted, fetcher.get)
    return {"arxiv": arxiv.read, "oai": oai.read, "hf-daily": daily.read}[kind](wanted, fetch)
