"""The smallest stand-ins for parts of the page that are not there; what is there is used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import ChoiceLoader, DictLoader
from sqlalchemy import func, or_, select

TEMPLATES = {
    "_marks.html": """{% macro marks(paper, csrf, account, voted, bookmarked) %}
<a class="button quiet" href="/sign-in">▲ {{ paper.votes }}<span class="away"> votes; sign in to vote</span></a>
{% endmacro %}""",
    "_run_button.html": """{% macro run_button(slug, csrf, settings) %}
<form class="inline" method="post" action="/papers/{{ slug }}/run">
<input type="hidden" name="csrf" value="{{ csrf }}"><button>Run</button></form>
{% endmacro %}""",
}


@dataclass
class Found:
    papers: list[Any]
    total: int


def _search(
    db: Any, query: str, *, day: Any = None, since: Any = None, until: Any = None, family: str = "", tag: str = "",
    author: str = "", has_code: bool = False, running: bool = False, limit: int = 30, offset: int = 0,
) -> Found:  # fmt: skip
    from broadsheet.web.tables import Author, Paper, Tag

    which = select(Paper)
    for word in query.split():
        like = f"%{word}%"
        which = which.where(or_(Paper.title.ilike(like), Paper.abstract.ilike(like), Paper.summary.ilike(like)))
    if family:
        which = which.where(Paper.family == family)
    if since:
        which = which.where(Paper.day >= since)
    if until:
        which = which.where(Paper.day <= until)
    if day:
        which = which.where(Paper.day == day)
    if tag:
        which = which.where(Paper.id.in_(select(Tag.paper_id).where(Tag.name == tag)))
    if author:
        which = which.where(Paper.id.in_(select(Author.paper_id).where(Author.name == author)))
    if has_code:
        which = which.where(Paper.code_url != "")
    if running:
        which = which.where(Paper.running)
    total = db.scalar(select(func.count()).select_from(which.subquery()))
    return Found(list(db.scalars(which.order_by(Paper.id.desc()).offset(offset).limit(limit))), total)


def _related(db: Any, paper: Any, limit: int = 5) -> list[Any]:
    from broadsheet.web.tables import Paper

    return list(db.scalars(select(Paper).where(Paper.family == paper.family, Paper.id != paper.id).limit(limit)))


def install() -> None:
    """Puts stand-ins where a module is missing."""
    import broadsheet.web

    for name, contents in {
        "search": {"search": _search, "related": _related, "Found": Found},
        "accounts": {"marked": lambda db, account, papers: {}},
    }.items():
        if find_spec(f"broadsheet.web.{name}") is None:
            module = ModuleType(f"broadsheet.web.{name}")
            vars(module).update(contents)
            sys.modules[module.__name__] = module
            setattr(broadsheet.web, name, module)


def fill(app: Any) -> Any:
    """Stand-ins for the templates that are missing."""
    environment = app.state.templates
    there = Path(environment.loader.searchpath[0])
    missing = {name: text for name, text in TEMPLATES.items() if not (there / name).exists()}
    environment.loader = ChoiceLoader([environment.loader, DictLoader(missing)])
    return app
