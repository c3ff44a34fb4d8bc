"""Is it well: ``/healthz``, ``/metrics`` for Prometheus, and a line of JSON a request.

Neither holds anything of a visitor: no addresses, no query strings (they may carry tokens), paths by their template.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import queue
from .db import line_of, reading
from .render import PRIVATE, problem
from .tables import Paper, Run, utcnow

router = APIRouter(include_in_schema=False)
log = logging.getLogger("broadsheet.requests")

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """What is counted, for one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        made: Any = {"registry": self.registry}
        self.requests = Counter("broadsheet_requests", "Requests answered.", labels, **made)
        self.seconds = Histogram(
            "broadsheet_request_seconds", "Time to the end of an answer.", ("route",), buckets=_BUCKETS, **made
        )
        self.queue = Gauge("broadsheet_runs", "Runs by state.", ("state",), **made)
        self.papers = Gauge("broadsheet_papers", "Papers in the database.", **made)


@router.get("/healthz")
def healthz(request: Request) -> JSONResponse:
    """200 while the database answers and somebody works on the runs, if there are any; when a worker was last heard of."""
    try:
        with reading(request.app.state.engine) as db:
            papers = db.scalar(select(func.count()).select_from(Paper)) or 0
            runs = {state: db.scalar(select(func.count()).where(Run.state == state)) or 0 for state in ("queued", "running")}
            beat = queue.last_beat(db)
    except SQLAlchemyError:
        return _json({"status": "failing", "database": "unreachable"}, 503)
    stuck = bool(sum(runs.values())) and queue.silent(beat)
    age = round((utcnow() - beat).total_seconds(), 1) if beat else None
    found = {"database": "ok", "papers": papers, "runs": runs, "worker": {"seconds_since_beat": age}}
    return _json({"status": "failing" if stuck else "ok", **found}, 503 if stuck else 200)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """For Prometheus, in its text format."""
    found: Metrics = request.app.state.metrics
    with reading(request.app.state.engine) as db:
        for state, count in db.execute(select(Run.state, func.count()).group_by(Run.state)):
            found.queue.labels(state).set(count)
        found.papers.set(db.scalar(select(func.count()).select_from(Paper)) or 0)
    return Response(generate_latest(found.registry), headers={"content-type": CONTENT_TYPE_LATEST, "cache-control": PRIVATE})


def _json(content: dict[str, Any], status: int) -> JSONResponse:
    return JSONResponse(content, status, {"cache-control": PRIVATE})


class Watch:
    """Middleware: counts and logs every request, names it (``x-request-id``), and turns what nobody caught
    into a plain page; its trace is in the log alone. A database that is locked, full or away is no fault of the page: 503,
    and a line in the log."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name, begun, status = secrets.token_hex(8), time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        error, refused = None, ""
        try:
            await self.app(scope, receive, named)
        except OperationalError as found:
            refused = line_of(found)
            if not status:
                await problem(Request(scope), 503, headers={"retry-after": "10"})(scope, receive, named)
        except Exception as found:
            error = found
            if not status:
                await problem(Request(scope), 500)(scope, receive, named)
        seconds = time.perf_counter() - begun
        route = scope.get("route_template") or getattr(scope.get("route"), "path", "") or "none"
        self.metrics.requests.labels(route, scope["method"] if scope["method"] in _METHODS else "other", status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        told = {"id": name, "method": scope["method"][:10], "route": route, "status": status, "ms": round(seconds * 1e3, 2)}
        if refused:
            told["database"] = refused
        level = logging.ERROR if error else logging.WARNING if refused else logging.INFO
        log.log(level, "request", extra={"told": told}, exc_info=error)
        return None


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class JsonLines(logging.Formatter):
    """A log line as JSON: time, level, where from, message, and what a request says of itself."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname.lower(),
            "from": record.name,
            "message": record.getMessage(),
            **getattr(record, "told", {}),
        }
        if record.exc_info:
            row["error"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False)
