"""The application: its parts put together."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from . import library, pages
from .db import open_database, session
from .render import templates
from .security import Signer
from .settings import Settings

#: Every part has a ``router``.
PARTS = (pages,)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The page for these settings (the environment's). Raises ValueError or StorageError where they cannot be used."""
    settings = settings or Settings.from_environment()
    app = FastAPI(
        title="Broadsheet", version=version("broadsheet"), docs_url=None, redoc_url=None
    )  # theirs load from elsewhere
    app.state.settings = settings
    app.state.engine = open_database(settings.database)
    with session(app.state.engine) as db:
        library.seed(db)
    app.state.templates = templates()
    app.state.signer = Signer(settings.secret)
    for part in PARTS:
        app.include_router(part.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"), name="static")
    return app
