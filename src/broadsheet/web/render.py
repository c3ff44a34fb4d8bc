"""Pages from templates: everything is escaped, and every page knows who looks at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .security import CSRF_COOKIE, csrf_token


def templates() -> Environment:
    """The templates, autoescaped whatever they are called; a name that is not there is an error and not an empty place."""
    folder = Path(__file__).parent / "templates"
    return Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def page(request: Request, template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A whole page, or with ``partial`` templates (names that start with _) a part of one for HTMX."""
    state = request.app.state
    context.setdefault("account", getattr(request.state, "account", None))
    html = state.templates.get_template(template).render(
        request=request, settings=state.settings, csrf=csrf_token(request), **context
    )
    answer = HTMLResponse(html, status)
    if made := getattr(request.state, "csrf_cookie", ""):
        answer.set_cookie(CSRF_COOKIE, made, httponly=True, samesite="lax", secure=state.settings.https, max_age=30 * 86400)
    return answer
