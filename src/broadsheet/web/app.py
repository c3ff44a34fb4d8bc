"""The application: its parts put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, Request
from fastapi.exception_handlers import request_validation_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from . import accounts, api, digest, feeds, health, library, owner, pages, runs, turns
from .caching import Cache
from .db import open_database, session
from .render import problem, templates
from .security import AccountLimits, BodyLimit, RateLimits, SafeHeaders, Signer
from .settings import Settings

#: Every part has a ``router``.
PARTS = (pages, runs, owner, accounts, digest, api, feeds, health)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The page for these settings (the environment's). Raises ValueError or StorageError where they cannot be used."""
    settings = settings or Settings.from_environment()
    engine, metrics = open_database(settings.database), health.Metrics()
    with session(engine) as db:
        library.seed(db)
    app = FastAPI(
        title="Broadsheet",
        version=version("broadsheet"),
        description="The daily papers on efficient, instruction-following language models, each one running.",
        docs_url=None,  # theirs load from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        middleware=[  # from outside to inside
            Middleware(SafeHeaders, https=settings.https),
            Middleware(health.Watch, metrics=metrics),
            Middleware(RateLimits, public=settings.public),
            Middleware(GZipMiddleware, minimum_size=800, compresslevel=5),
            Middleware(Cache, engine=engine),
            Middleware(BodyLimit),
            Middleware(accounts.Recognise, engine=engine, https=settings.https),
            Middleware(AccountLimits),
        ],
        exception_handlers={HTTPException: _refused, RequestValidationError: _unreadable},
    )
    app.state.settings = settings
    app.state.engine = engine
    app.state.metrics = metrics
    app.state.templates = templates()
    app.state.templates.globals["runs"] = runs
    app.state.signer = Signer(settings.secret)
    for part in PARTS:
        app.include_router(part.router)
    app.mount("/static", Files(directory=Path(__file__).parent / "static"), name="static")
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    current_default_thread_limiter().total_tokens = turns.THREADS
    yield
    app.state.engine.dispose()


class Files(StaticFiles):
    """Our own files; one that is asked for with the mark of its content (`render.static`) is kept for good."""

    def file_response(self, full_path: Any, stat_result: Any, scope: Any, status_code: int = 200) -> Response:
        answer = super().file_response(full_path, stat_result, scope, status_code)
        marked = scope["query_string"].startswith(b"v=")
        answer.headers["cache-control"] = "public, max-age=31536000, immutable" if marked else "public, max-age=300"
        return answer


async def _refused(request: Request, error: Any) -> Response:
    said = error.detail if isinstance(error.detail, str) and error.detail not in _REASONS else ""
    return problem(request, error.status_code, said, dict(error.headers or {}))


async def _unreadable(request: Request, error: Any) -> Response:
    if request.url.path.startswith("/api/"):
        return await request_validation_exception_handler(request, error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return problem(request, 422, f"{where}: {first['msg']}" if where else first["msg"])


#: What Starlette says where nobody said anything.
_REASONS = frozenset(("Not Found", "Method Not Allowed", "Forbidden", "Content Too Large", "Request Entity Too Large"))
