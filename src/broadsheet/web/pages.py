"""Days, papers and the lists of them."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from sqlalchemy import func, select

from .db import reading
from .render import page
from .tables import Paper

router = APIRouter(default_response_class=HTMLResponse)


@router.get("/")
def front(request: Request) -> HTMLResponse:
    """The newest day's papers."""
    with reading(request.app.state.engine) as db:
        day = db.scalar(select(func.max(Paper.day)))
        papers = db.scalars(select(Paper).where(Paper.day == day).order_by(Paper.votes.desc(), Paper.id)).all()
        return page(request, "day.html", day=day, papers=papers)
