"""What goes out for other programs: Atom feeds, the sitemap, robots.txt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from urllib.parse import quote

from fastapi import HTTPException, Request
from fastapi.responses import PlainTextResponse, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from . import papers, search, turns
from .db import reading
from .render import SHARED, address_of
from .tables import Paper, Tag
from .words import clean

router = turns.router(include_in_schema=False)

#: Papers in a feed, and addresses in a part of the sitemap (its protocol's limit).
ENTRIES, A_PART = 50, 50_000


@router.get("/feeds/new.atom")
def new(request: Request) -> Response:
    """The newest papers."""
    with reading(request.app.state.engine) as db:
        newest = select(Paper.id).order_by(Paper.day.desc(), Paper.id.desc()).limit(ENTRIES)
        return _atom(request, db, "Broadsheet: new papers", "/", "/feeds/new.atom", db.scalars(newest).all())


@router.get("/feeds/tag/{tag}.atom")
def tagged(request: Request, tag: str) -> Response:
    """The newest papers with a tag."""
    tag = clean(tag, 80)
    with reading(request.app.state.engine) as db:
        ids = db.scalars(
            select(Paper.id).join(Tag).where(Tag.name == tag).order_by(Paper.day.desc(), Paper.id.desc()).limit(ENTRIES)
        ).all()
        if not ids:
            raise HTTPException(404, "No paper has this tag.")
        page, here = f"/search?tag={quote(tag, safe='')}", f"/feeds/tag/{quote(tag, safe='')}.atom"
        return _atom(request, db, f"Broadsheet: {tag}", page, here, ids)


@router.get("/feeds/search.atom")
def searched(request: Request, q: str = "") -> Response:
    """The best matches of a search, newest first."""
    query = clean(q, 300)
    if not query:
        raise HTTPException(422, "A search feed needs a question: /feeds/search.atom?q=kv+cache")
    with reading(request.app.state.engine) as db:
        ids = search.search(db, query, limit=ENTRIES).ids
        words = quote(query, safe="")
        return _atom(request, db, f"Broadsheet: {query}", f"/search?q={words}", f"/feeds/search.atom?q={words}", ids)


def _atom(request: Request, db: Session, title: str, page: str, here: str, ids: Sequence[int]) -> Response:
    entries = sorted(papers.read(db, ids), key=lambda paper: (paper.day, paper.id), reverse=True)
    updated = max((paper.updated for paper in entries), default=datetime(2000, 1, 1))
    state = request.app.state
    text = state.templates.get_template("feed.xml").render(
        site=state.settings.url, title=title, page=page, here=here, papers=entries, updated=updated, plain=_plain
    )
    return _xml(text, "application/atom+xml")


@router.get("/sitemap.xml")
def sitemap(request: Request) -> Response:
    """The index of the sitemap's parts."""
    with reading(request.app.state.engine) as db:
        count = db.scalar(select(func.count()).select_from(Paper)) or 0
    site = request.app.state.settings.url
    parts = "".join(f"<sitemap><loc>{site}/sitemap-{n}.xml</loc></sitemap>" for n in range(1, -(-count // A_PART) + 1))
    return _xml(f'{_XML}<sitemapindex xmlns="{_SITEMAPS}">{parts}</sitemapindex>', "application/xml")


@router.get("/sitemap-{number}.xml")
def sitemap_part(request: Request, number: str) -> Response:
    """Fifty thousand papers' addresses; the first part has those of the catalogue too."""
    part = int(number) if number.isascii() and number.isdecimal() and len(number) < 6 else 0
    start = (part - 1) * A_PART
    columns = select(Paper.id, Paper.slug, Paper.arxiv_id, Paper.updated)
    with reading(request.app.state.engine) as db:
        listed = db.execute(columns.order_by(Paper.id).offset(max(0, start)).limit(A_PART)).all() if part else ()
    if not listed:
        raise HTTPException(404)
    site = request.app.state.settings.url
    rows = (f"<url><loc>{site}{address_of(p)}</loc><lastmod>{p.updated:%Y-%m-%d}</lastmod></url>" for p in listed)
    return _xml(f'{_XML}<urlset xmlns="{_SITEMAPS}">{"".join(rows)}</urlset>', "application/xml")


@router.get("/robots.txt")
def robots(request: Request) -> PlainTextResponse:
    """Everything but what is endless or somebody's own."""
    site = request.app.state.settings.url
    closed = ("/search", "/feeds/search.atom", "/account", "/sign-in", "/runs", "/api/search")
    lines = ["User-agent: *", *(f"Disallow: {path}" for path in closed), f"Sitemap: {site}/sitemap.xml", ""]
    return PlainTextResponse("\n".join(lines), headers={"cache-control": SHARED})


_XML = '<?xml version="1.0" encoding="utf-8"?>\n'
_SITEMAPS = "http://www.sitemaps.org/schemas/sitemap/0.9"


def _xml(text: str, kind: str) -> Response:
    return Response(text, media_type=f"{kind}; charset=utf-8", headers={"cache-control": SHARED})


def _plain(text: str) -> str:
    """Text that XML 1.0 can hold."""
    return "".join(c for c in text if c in "\t\n" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff")
