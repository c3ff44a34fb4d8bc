"""Papers as pages show them: plain values, with one query for the papers, one for their authors and one for their tags.

A row that somebody changes is a `tables.Paper`. Making one costs several times what reading its columns does, since it keeps
track of its changes; a page changes nothing, and a list has thirty.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Any

from sqlalchemy import Integer, Select, bindparam, select
from sqlalchemy.orm import Session

from .tables import Author, Paper, Tag
from .words import clean


@dataclass(frozen=True, slots=True)
class Brief:
    """As much of a paper as its line in a list of related papers shows. Columns as in `tables.Paper`; authors by name."""

    authors: tuple[str, ...]
    id: int
    slug: str | None
    arxiv_id: str | None
    title: str
    day: date
    running: bool


@dataclass(frozen=True, slots=True)
class Whole:
    """A paper as its page and every other list show it. Columns as in `tables.Paper`; authors and tags by name, authors in
    their order and tags in the alphabet's."""

    authors: tuple[str, ...]
    tags: tuple[str, ...]
    id: int
    slug: str | None
    arxiv_id: str | None
    title: str
    day: date
    running: bool
    doi: str | None
    abstract: str
    summary: str
    url: str
    code_url: str
    family: str | None
    version: int
    published: datetime
    updated: datetime
    votes: int


def find(db: Session, name: str) -> Whole | None:
    """The paper of that slug, arXiv id (with or without a version) or number."""
    name = clean(name, 200)
    if name.isascii() and name.isdecimal():
        return _first(db, _BY["id"], int(name)) if len(name) < 10 else None
    by_slug, by_arxiv_id = (_BY["slug"], name), (_BY["arxiv_id"], re.sub(r"v\d+$", "", name))
    likely = (by_arxiv_id, by_slug) if name[:4].isdecimal() else (by_slug, by_arxiv_id)
    return _first(db, *likely[0]) or _first(db, *likely[1])


def read(db: Session, ids: Sequence[int]) -> list[Whole]:
    """The papers of these ids, in their order; those that there are."""
    if not ids:
        return []
    authors, tags = _names(db, _AUTHORS, ids), _names(db, _TAGS, ids)
    rows = {row[0]: row for row in db.execute(_WHOLE, {"ids": ids})}
    return [Whole(tuple(authors[number]), tuple(tags[number]), *rows[number]) for number in ids if number in rows]


def read_brief(db: Session, ids: Sequence[int]) -> list[Brief]:
    """The same, with less of each."""
    if not ids:
        return []
    authors = _names(db, _AUTHORS, ids)
    rows = {row[0]: row for row in db.execute(_BRIEF, {"ids": ids})}
    return [Brief(tuple(authors[number]), *rows[number]) for number in ids if number in rows]


# --- statements: made once, since SQLAlchemy takes longer to make and look up a query than the database to answer it ---

_paper, _author, _tag = (kind.__table__.c for kind in (Paper, Author, Tag))
_ids = bindparam("ids", expanding=True, type_=Integer)


def _columns(kind: type) -> Select[Any]:
    return select(*(_paper[field.name] for field in fields(kind) if field.name not in ("authors", "tags")))


_WHOLE, _BRIEF = (_columns(kind).where(_paper.id.in_(_ids)) for kind in (Whole, Brief))
_BY = {name: _columns(Whole).where(_paper[name] == bindparam("wanted")) for name in ("id", "slug", "arxiv_id")}
_AUTHORS = select(_author.paper_id, _author.name).where(_author.paper_id.in_(_ids)).order_by(_author.paper_id, _author.place)
_TAGS = select(_tag.paper_id, _tag.name).where(_tag.paper_id.in_(_ids)).order_by(_tag.paper_id, _tag.name)


def _first(db: Session, statement: Select[Any], wanted: int | str) -> Whole | None:
    row = db.execute(statement, {"wanted": wanted}).first()
    if row is None:
        return None
    authors, tags = (tuple(_names(db, names, row[:1])[row[0]]) for names in (_AUTHORS, _TAGS))
    return Whole(authors, tags, *row)


def _names(db: Session, statement: Select[Any], ids: Sequence[int]) -> defaultdict[int, list[str]]:
    found: defaultdict[int, list[str]] = defaultdict(list)
    for number, name in db.execute(statement, {"ids": ids}):
        found[number].append(name)
    return found
