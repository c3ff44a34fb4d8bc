"""Pages from templates: everything is escaped, and every page knows who looks at it.

A page that shows nothing of its visitor (nobody is signed in, no form of it needs a token) is the same for all: it is marked
as such, and `caching` hands it out again. A form's token is made when a template writes it, so that pages without forms need
no cookie.
"""

from __future__ import annotations

import hashlib
import re
from calendar import day_name, month_abbr, month_name
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .security import CSRF_COOKIE, csrf_token

HERE = Path(__file__).parent
#: What stands in ``Cache-Control`` of answers that are the same for everybody: keep it, and ask whether it is still good.
SHARED = "public, no-cache"
#: Of all others: kept by nobody.
PRIVATE = "private, no-store"


def templates() -> Environment:
    """The templates, autoescaped whatever they are called; a name that is not there is an error and not an empty place."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(static=static)
    environment.filters.update(
        address=address_of, href=href, host=host, docs=docs, day=long_day, shortday=short_day, month=month
    )
    return environment


class FormToken:
    """A form's token, made when it is written."""

    def __init__(self, request: Request):
        self.request = request
        self.used = False

    def __str__(self) -> str:
        self.used = True
        return csrf_token(self.request)

    def __html__(self) -> str:
        return str(self)


def page(request: Request, template: str, status: int = 200, *, shared: bool = False, **context: Any) -> HTMLResponse:
    """A whole page, or with ``partial`` templates (names that start with _) a part of one for HTMX.

    ``shared``: nothing in it depends on who asks but the account and the forms' tokens; where there are none of these,
    everybody may get the same copy.
    """
    state = request.app.state
    context.setdefault("account", getattr(request.state, "account", None))
    csrf = FormToken(request)
    html = state.templates.get_template(template).render(request=request, settings=state.settings, csrf=csrf, **context)
    answer = HTMLResponse(html, status)
    same = shared and status == 200 and context["account"] is None and not csrf.used
    answer.headers["cache-control"] = SHARED if same else PRIVATE
    answer.headers["vary"] = "Cookie"
    if made := getattr(request.state, "csrf_cookie", ""):
        answer.set_cookie(CSRF_COOKIE, made, httponly=True, samesite="lax", secure=state.settings.https, max_age=30 * 86400)
    return answer


#: What is said of a refusal where nobody said more.
_PLAIN = {
    400: "The request could not be read.",
    401: "Sign in first.",
    403: "This may not be done from here.",
    404: "There is no such page.",
    405: "This address cannot be used that way.",
    413: "That is more than this page takes.",
    422: "Something in the address or the form does not fit.",
    429: "That was a little fast. Wait a moment and try again.",
    500: "Something went wrong here. It has been noted; try again in a while.",
    503: "The page cannot reach its data. Try again in a while.",
}
_TITLES = {
    401: "Sign in",
    403: "Not allowed",
    404: "Not found",
    413: "Too large",
    429: "Too many requests",
    500: "Out of order",
}


def problem(request: Request, status: int, message: str = "", headers: dict[str, str] | None = None) -> Response:
    """A refusal or an error: JSON under ``/api`` and for programs that ask for it, else a page."""
    message = message or _PLAIN.get(status, "This did not work.")
    if request.url.path.startswith("/api/") or request.headers.get("accept", "").startswith("application/json"):
        answer: Response = JSONResponse({"detail": message}, status)
        answer.headers["cache-control"] = PRIVATE
    else:
        answer = page(request, "notice.html", status, title=_TITLES.get(status, "Not possible"), text=message)
    answer.headers.update(headers or {})
    return answer


@cache
def static(name: str) -> str:
    """The address of one of our files, with a mark of its content: a browser may keep it for ever."""
    digest = hashlib.blake2b((HERE / "static" / name).read_bytes(), digest_size=6).hexdigest()
    return f"/static/{name}?v={digest}"


def href(address: str) -> str:
    """An address from outside, if it is one of the web's; anything else (``javascript:``) is no link."""
    return address if address.startswith(("https://", "http://")) else ""


def host(address: str) -> str:
    """Whose address it is."""
    return (urlsplit(address).hostname or address)[:60]


class Named(Protocol):
    """A paper by its names: the row, what pages show, or these three columns."""

    @property
    def id(self) -> int: ...
    @property
    def slug(self) -> str | None: ...
    @property
    def arxiv_id(self) -> str | None: ...


def address_of(paper: Named) -> str:
    """The address of a paper's page, from the root: by its slug, its arXiv id, or its number."""
    arxiv = paper.arxiv_id if paper.arxiv_id and re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv_id, re.ASCII) else None
    return f"/papers/{quote(paper.slug or arxiv or str(paper.id), safe='')}"


def long_day(day: date) -> str:
    """Sunday, 29 November 2026"""
    return f"{day_name[day.weekday()]}, {day.day} {month_name[day.month]} {day.year}"


def short_day(day: date) -> str:
    """29 Nov"""
    return f"{day.day} {month_abbr[day.month]}"


def month(day: date) -> str:
    """November 2026"""
    return f"{month_name[day.month]} {day.year}"


def docs(text: str) -> Markup:
    """A docstring's text: what stands in backquotes is code, empty lines part paragraphs, ``- `` begins a point."""
    blocks = []
    for block in text.split("\n\n"):
        lines = block.strip().split("\n")
        points = "\n".join(lines).split("\n- ") if lines[0].startswith("- ") else []
        if points:
            points[0] = points[0].removeprefix("- ")
            blocks.append(
                Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(_spans(p)) for p in points))
            )
        else:
            blocks.append(Markup("<p>{}</p>").format(_spans(block)))
    return Markup("\n").join(blocks)


def _spans(text: str) -> Markup:
    parts = " ".join(text.split()).replace("``", "`").split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))
