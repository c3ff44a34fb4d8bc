"""Days, papers and the lists of them."""

from __future__ import annotations

import asyncio
import re
from calendar import Calendar
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import HTTPException, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session
from starlette.convertors import Convertor, register_url_convertor

from broadsheet import catalogue

from . import accounts, facts, papers, search, turns
from .db import reading
from .papers import Whole
from .render import SHARED, address_of, month, page
from .tables import Paper
from .words import clean, excerpt, highlight, words_of

router = turns.router(default_response_class=HTMLResponse, include_in_schema=False)

#: Papers on a page of a list.
A_PAGE = 30
Number = Annotated[int, Query(alias="page", ge=1, le=100_000)]


# --- days -------------------------------------------------------------------------------------------------------


@router.get("/")
def front(request: Request, number: Number = 1) -> HTMLResponse:
    """The newest day's papers."""
    with reading(request.app.state.engine) as db:
        return _day(request, db, db.scalar(select(func.max(Paper.day))), number)


@router.get("/days/{day}")
def one_day(request: Request, day: str, number: Number = 1) -> HTMLResponse:
    """A day's papers, most votes first."""
    with reading(request.app.state.engine) as db:
        return _day(request, db, _date(day), number)


def _day(request: Request, db: Session, day: date | None, number: int) -> HTMLResponse:
    if day is None:
        return page(request, "day.html", shared=True, day=None, newest=None)
    shown, pages = _listed(db, number, Paper.day == day, order=(Paper.votes.desc(), Paper.id.desc()))
    before, after = (
        db.scalar(select(f(Paper.day)).where(c)) for f, c in ((func.max, Paper.day < day), (func.min, Paper.day > day))
    )
    newest = db.scalar(select(func.max(Paper.day)))
    return _list(
        request, db, "day.html", shown, pages, day=day, count=pages.total, before=before, after=after, newest=newest
    )


@router.get("/calendar")
def newest_month(request: Request, month: str = "") -> Response:
    """The newest month that has papers, or the one that was asked for in the form."""
    if month:
        return RedirectResponse(f"/calendar/{_date(month + '-01'):%Y-%m}", 303)
    with reading(request.app.state.engine) as db:
        return _month(request, db, db.scalar(select(func.max(Paper.day))) or date.today())


@router.get("/calendar/{month}")
def one_month(request: Request, month: str) -> HTMLResponse:
    """A month's days and how many papers each has."""
    with reading(request.app.state.engine) as db:
        return _month(request, db, _date(month + "-01"))


def _month(request: Request, db: Session, day: date) -> HTMLResponse:
    first = day.replace(day=1)
    after = (first + timedelta(days=31)).replace(day=1)
    within = select(Paper.day, func.count()).where(Paper.day >= first, Paper.day < after).group_by(Paper.day)
    before, later = (
        db.scalar(select(f(Paper.day)).where(c)) for f, c in ((func.max, Paper.day < first), (func.min, Paper.day >= after))
    )
    weeks = Calendar().monthdatescalendar(first.year, first.month)
    return page(
        request, "calendar.html", shared=True, first=first, name=month(first), weeks=weeks,
        counts=dict(db.execute(within).tuples().all()), before=before, after=later,
    )  # fmt: skip


# --- lists ------------------------------------------------------------------------------------------------------


@router.get("/trending")
def trending(request: Request, number: Number = 1) -> HTMLResponse:
    """By votes that fade; those that have none follow, newest first."""
    with reading(request.app.state.engine) as db:
        shown, total = trending_papers(db, (number - 1) * A_PAGE, A_PAGE)
        return _list(request, db, "trending.html", shown, Pages(number, total))


def trending_papers(db: Session, offset: int, limit: int) -> tuple[list[Whole], int]:
    """Some of all papers in the order of `Paper.trend`, then newest first; and how many there are."""
    voted = db.scalar(select(func.count()).where(Paper.trend.is_not(None))) or 0
    total = db.scalar(select(func.count()).select_from(Paper)) or 0
    found: list[Whole] = []
    if offset < voted:  # two walks along an index instead of one sort of everything
        found += _some(db, Paper.trend.is_not(None), (Paper.trend.desc(), Paper.id.desc()), offset, limit)
    if rest := limit - len(found):
        found += _some(db, Paper.trend.is_(None), (Paper.day.desc(), Paper.id.desc()), max(0, offset - voted), rest)
    return found, total


@router.get("/running")
def running(request: Request, family: str = "", status: str = "") -> HTMLResponse:
    """The catalogue by family: what runs here, and how its claims fared."""
    families = {name: [p for p in catalogue.papers().values() if p.family == name] for name in catalogue.FAMILIES}
    if (family and family not in families) or status not in ("", "running", "planned"):
        raise HTTPException(404)
    chosen = {
        name: [facts.Entry(paper) for paper in known if status in ("", paper.status)]
        for name, known in families.items()
        if family in ("", name)
    }
    counts = {name: (len(known), sum(p.status == "running" for p in known)) for name, known in families.items()}
    return page(
        request, "running.html", shared=True, counts=counts, family=family, wanted=status,
        families={name: entries for name, entries in chosen.items() if entries},
    )  # fmt: skip


@router.get("/search")
def find(
    request: Request, q: str = "", day: str = "", since: str = "", until: str = "", family: str = "", tag: str = "",
    author: str = "", code: str = "", running: str = "", page_: Annotated[str, Query(alias="page")] = "1",
) -> HTMLResponse:  # fmt: skip
    """Papers that match, with the words marked; without a question the form alone."""
    number = int(page_) if re.fullmatch(r"[1-9]\d{0,2}", page_, re.ASCII) else 1
    query, family, tag, author = (clean(text, 300) for text in (q, family, tag, author))
    days = {name: _maybe_date(text) for name, text in (("day", day), ("since", since), ("until", until))}
    filters: dict[str, Any] = {**days, "family": family, "tag": tag, "author": author}
    filters |= {"has_code": bool(code), "running": bool(running)}
    asked = bool(query or any(filters.values()))
    with reading(request.app.state.engine) as db:
        found = search.search(db, query, **filters, limit=A_PAGE, offset=(number - 1) * A_PAGE) if asked else None
        listed = papers.read(db, found.ids) if found else []
        shown = {
            "q": query, **{name: value.isoformat() if value else "" for name, value in days.items()}, "family": family,
            "tag": tag, "author": author, "code": bool(code), "running": bool(running),
        }  # fmt: skip
        given = urlencode({name: "1" if value is True else value for name, value in shown.items() if value})
        words, total = words_of(query), found.total if found else 0
        return _list(
            request, db, "search.html", listed, Pages(number, total, A_PAGE, f"?{given}&" if given else "?"),
            asked=asked, form=shown, given=given, families=catalogue.FAMILIES,
            follows=accounts.follows(db, getattr(request.state, "account", None)),
            titles={p.id: highlight(p.title, words) for p in listed},
            texts={p.id: excerpt(p.summary, p.abstract, words) for p in listed},
        )  # fmt: skip


# --- a paper ----------------------------------------------------------------------------------------------------


@router.get("/papers/{name}")
def one_paper(request: Request, name: str) -> Response:
    """A paper, by slug, arXiv id or number; its other names lead to the first it has."""
    with reading(request.app.state.engine) as db:
        paper = papers.find(db, name)
        if paper is None:
            raise HTTPException(404, "There is no such paper here.")
        if (address := address_of(paper)) != f"/papers/{quote(name)}":
            return RedirectResponse(address, 308, {"cache-control": "public, max-age=300"})
        known = catalogue.papers().get(paper.slug or "")
        return page(
            request, "paper.html", shared=True, paper=paper, related=papers.read_brief(db, search.related(db, paper)),
            entry=facts.Entry(known) if known else None, marked=_marked(request, db, [paper]),
        )  # fmt: skip


@router.get("/papers/{slug}/plot.svg")
async def plot(request: Request, slug: str) -> Response:
    """Quality against price in the paper's family, with the paper set off."""
    drawn = await asyncio.to_thread(facts.plot, slug, request.app.state.settings.home)  # the others' threads stay free
    if drawn is None:
        raise HTTPException(404, "There is no plot of this paper.")
    headers = {
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",  # matplotlib's own styles
        "cache-control": SHARED,
    }
    return Response(drawn, media_type="image/svg+xml", headers=headers)


class OldNumber(Convertor[str]):
    """What follows the archive in an arXiv id of before 2007; anything else is another part's address."""

    regex = r"[0-9]{7}(?:v[0-9]+)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("old_number", OldNumber())


@router.get("/papers/{archive}/{number:old_number}")
def old_paper(request: Request, archive: str, number: str) -> Response:
    """An arXiv id of before 2007, such as cs/0301012."""
    with reading(request.app.state.engine) as db:
        paper = papers.find(db, f"{archive}/{number}")
    if paper is None:
        raise HTTPException(404, "There is no such paper here.")
    return RedirectResponse(address_of(paper), 308, {"cache-control": "public, max-age=300"})


@router.get("/about")
def about(request: Request) -> HTMLResponse:
    """What this is, how it counts, and what it keeps of visitors."""
    return page(request, "about.html", shared=True, papers=catalogue.papers())


# --- helpers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pages:
    """Which page of a list this is. ``address``: what its links begin with."""

    number: int
    total: int
    size: int = A_PAGE
    address: str = "?"

    @property
    def count(self) -> int:
        return max(1, -(-self.total // self.size))

    @property
    def first(self) -> int:
        """The number of the page's first paper."""
        return (self.number - 1) * self.size + 1


def _some(db: Session, which: ColumnElement[bool], order: tuple[Any, ...], offset: int, limit: int) -> list[Whole]:
    return papers.read(db, db.scalars(select(Paper.id).where(which).order_by(*order).offset(offset).limit(limit)).all())


def _listed(db: Session, number: int, which: ColumnElement[bool], order: tuple[Any, ...]) -> tuple[list[Whole], Pages]:
    total = db.scalar(select(func.count()).where(which)) or 0
    return _some(db, which, order, (number - 1) * A_PAGE, A_PAGE), Pages(number, total)


def _list(request: Request, db: Session, template: str, shown: Sequence[Whole], pages: Pages, **more: Any) -> HTMLResponse:
    marked = _marked(request, db, shown)
    return page(request, template, shared=True, papers=shown, pages=pages, marked=marked, **more)


def _marked(request: Request, db: Session, shown: Sequence[Whole]) -> dict[int, set[str]]:
    """What whoever is signed in did to these papers: id -> "vote", "bookmark"."""
    account = getattr(request.state, "account", None)
    return accounts.marked(db, account, [paper.id for paper in shown]) if account else {}


def _date(text: str) -> date:
    """A day as it stands in an address. Raises 404."""
    found = _maybe_date(text)
    if found is None:
        raise HTTPException(404, "There is no such day.")
    return found


def _maybe_date(text: str) -> date | None:
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return None
    try:
        found = date.fromisoformat(text)
    except ValueError:
        return None
    return found if date(1900, 1, 1) <= found <= date(2200, 1, 1) else None
