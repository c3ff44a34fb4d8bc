"""A page to test: made papers, the catalogue's, and a client that sees errors as a browser does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
from fastapi.testclient import TestClient

from broadsheet.web.app import create_app
from broadsheet.web.db import session
from broadsheet.web.settings import Settings


def open_site(home: Path, count: int = 100, rows: list[dict[str, Any]] | None = None, **given: str) -> TestClient:
    """A client of a page with ``count`` made papers (or ``rows``) and the catalogue's."""
    home.mkdir(parents=True, exist_ok=True)
    app = create_app(Settings.from_environment({"BROADSHEET_HOME": str(home)}, **given))
    with session(app.state.engine) as db:
        made.store(db, made.papers(count) if rows is None else rows)
    return TestClient(app, follow_redirects=False, base_url=app.state.settings.url)
