"""The JSON API: what the page shows, for programs. It only reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from fastapi import HTTPException, Path, Query, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, BeforeValidator, Field
from sqlalchemy import func, select

from broadsheet import catalogue
from broadsheet.catalogue import Paper as Known

from . import facts, search, turns
from . import papers as shelf
from .db import reading
from .pages import trending_papers
from .render import SHARED, address_of, page
from .tables import Paper as Row
from .tables import Tag
from .words import clean


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def _iso(text: Any) -> Any:
    """Only days written out: numbers would be taken for seconds since 1970."""
    if isinstance(text, str) and not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        raise ValueError("a day is written as 2026-11-29")
    return text


router = turns.router(prefix="/api", tags=["papers"])
NONE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is no such thing."}}
Limit = Annotated[int, Query(ge=1, le=100, description="How many, at most.")]
Offset = Annotated[int, Query(ge=0, le=10_000_000, description="How many to leave out.")]
OneDay = Annotated[date | None, BeforeValidator(_iso)]
Word = Annotated[str, Query(max_length=200)]


class Paper(BaseModel):
    """A paper. ``slug`` and ``family`` are those of the catalogue; ``running``: a method of Broadsheet implements it."""

    id: int
    slug: str | None
    arxiv_id: str | None
    doi: str | None
    title: str
    summary: str
    authors: list[str]
    tags: list[str]
    family: str | None
    running: bool
    day: date
    published: datetime
    updated: datetime
    version: int
    votes: int
    url: str = Field(description="Where it is published.")
    code_url: str
    page: str = Field(description="Its page here.")


class Whole(Paper):
    """A paper with its abstract."""

    abstract: str


class Papers(BaseModel):
    """Some of a list of ``total`` papers."""

    total: int
    papers: list[Paper]


class Day(BaseModel):
    """A day and how many papers it has."""

    day: date
    papers: int


class Days(BaseModel):
    """Some of ``total`` days, newest first."""

    total: int
    days: list[Day]


class Family(BaseModel):
    """A family of methods: how many papers of the catalogue it has, and how many run."""

    name: str
    papers: int
    running: int


class Claim(BaseModel):
    """What a paper says, and what was measured here."""

    slug: str
    id: str
    metric: str
    setting: str
    paper: str = Field(description="The paper's number.")
    ours: str = Field(description="Ours; empty where there is none.")
    status: Literal["holds", "holds in direction", "does not hold here", "not measured yet", "not testable here"]
    reason: str = Field(description="Why it cannot be tested here.")


@router.get("", include_in_schema=False, response_class=HTMLResponse)
def about(request: Request) -> HTMLResponse:
    """What there is, for people."""
    paths = request.app.openapi()["paths"]
    endpoints = [
        (path, spec["get"]["summary"]) for path, spec in paths.items() if "get" in spec and path.startswith("/api/")
    ]
    return page(request, "api.html", shared=True, endpoints=endpoints)


@router.get("/papers", summary="Papers, newest first")
def papers(
    request: Request,
    response: Response,
    day: OneDay = None,
    family: Word = "",
    tag: Word = "",
    running: bool | None = None,
    limit: Limit = 30,
    offset: Offset = 0,
) -> Papers:
    """All, or those of a day, a family or a tag."""
    with reading(request.app.state.engine) as db:
        query = select(Row.id)
        if day:
            query = query.where(Row.day == day)
        if family:
            query = query.where(Row.family == clean(family, 40))
        if tag:
            query = query.join(Tag).where(Tag.name == clean(tag, 80))
        if running is not None:
            query = query.where(Row.running == running)
        total = db.scalar(select(func.count()).select_from(query.subquery())) or 0
        ids = db.scalars(query.order_by(Row.day.desc(), Row.id.desc()).offset(offset).limit(limit)).all()
        return _papers(request, response, shelf.read(db, ids), total)


@router.get("/trending", summary="Papers by votes that fade")
def trending(request: Request, response: Response, limit: Limit = 30, offset: Offset = 0) -> Papers:
    """Each vote counts half as much after a week; papers without votes follow, newest first."""
    with reading(request.app.state.engine) as db:
        return _papers(request, response, *trending_papers(db, offset, limit))


@router.get("/papers/{name}", summary="One paper", responses=NONE)
def one(request: Request, response: Response, name: Annotated[str, Path(max_length=200)]) -> Whole:
    """By slug, arXiv id (old ones have a slash: give the number instead) or number."""
    with reading(request.app.state.engine) as db:
        found = shelf.find(db, name)
        if found is None:
            raise HTTPException(404, "There is no such paper here.")
        response.headers["cache-control"] = SHARED
        return Whole(abstract=found.abstract, **_paper(request, found).model_dump())


@router.get("/papers/{slug}/claims", summary="What a paper claims, and what was measured", responses=NONE)
def claims_of(response: Response, slug: Annotated[str, Path(max_length=80)]) -> list[Claim]:
    """Of a paper of the catalogue."""
    if slug not in catalogue.papers():
        raise HTTPException(404, "There is no such paper in the catalogue.")
    response.headers["cache-control"] = SHARED
    return _claims(catalogue.papers()[slug])


@router.get("/claims", summary="All claims of the papers that run")
def claims(response: Response) -> list[Claim]:
    """With the verdicts, computed from the committed records."""
    response.headers["cache-control"] = SHARED
    return [claim for paper in catalogue.papers().values() if paper.method for claim in _claims(paper)]


@router.get("/search", summary="Search")
def find(
    request: Request,
    response: Response,
    q: Annotated[str, Query(max_length=300, description="Words.")] = "",
    day: OneDay = None,
    since: OneDay = None,
    until: OneDay = None,
    family: Word = "",
    tag: Word = "",
    author: Word = "",
    has_code: bool = False,
    running: bool = False,
    limit: Limit = 30,
    offset: Annotated[int, Query(ge=0, le=10_000)] = 0,
) -> Papers:
    """Best matches first. No spelling of ``q`` is an error."""
    with reading(request.app.state.engine) as db:
        found = search.search(
            db, clean(q, 300), day=day, since=since, until=until, family=clean(family, 40), tag=clean(tag, 80),
            author=clean(author, 200), has_code=has_code, running=running, limit=limit, offset=offset,
        )  # fmt: skip
        return _papers(request, response, shelf.read(db, found.ids), found.total)


@router.get("/days", summary="Days and how many papers they have")
def days(request: Request, response: Response, limit: Limit = 30, offset: Offset = 0) -> Days:
    """Newest first."""
    with reading(request.app.state.engine) as db:
        total = db.scalar(select(func.count(Row.day.distinct()))) or 0
        query = select(Row.day, func.count()).group_by(Row.day).order_by(Row.day.desc()).offset(offset).limit(limit)
        response.headers["cache-control"] = SHARED
        return Days(total=total, days=[Day(day=day, papers=count) for day, count in db.execute(query)])


@router.get("/families", summary="Families of methods")
def families(response: Response) -> list[Family]:
    """Of the catalogue."""
    response.headers["cache-control"] = SHARED
    known = catalogue.papers().values()
    return [
        Family(
            name=name,
            papers=sum(paper.family == name for paper in known),
            running=sum(paper.family == name and bool(paper.method) for paper in known),
        )
        for name in catalogue.FAMILIES
    ]


# --- helpers ----------------------------------------------------------------------------------------------------


def _papers(request: Request, response: Response, rows: Sequence[shelf.Whole], total: int) -> Papers:
    response.headers["cache-control"] = SHARED
    return Papers(total=total, papers=[_paper(request, row) for row in rows])


def _paper(request: Request, row: shelf.Whole) -> Paper:
    made = ("published", "updated", "page")
    return Paper(
        **{name: getattr(row, name) for name in Paper.model_fields if name not in made},
        published=row.published.replace(tzinfo=UTC),
        updated=row.updated.replace(tzinfo=UTC),
        page=request.app.state.settings.url + address_of(row),
    )


def _claims(paper: Known) -> list[Claim]:
    shown = ("id", "metric", "setting", "paper", "reason")
    return [
        Claim.model_validate({"slug": paper.slug, **{name: getattr(claim, name) for name in shown}, **vars(status)})
        for claim, status in zip(paper.claims, facts.verdicts(paper.slug), strict=True)
    ]
