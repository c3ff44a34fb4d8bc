"""Runs: starting one from a paper's page, watching it, cancelling it, and all that there were."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Form, Header, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session, undefer

from broadsheet import catalogue
from broadsheet.core.models import pockets
from broadsheet.core.perf.architecture import shapes
from broadsheet.lab.run import COMMANDS, family_of

from . import queue, turns, usage
from .db import reading, session
from .live import Hub
from .owner import is_owner, only_owner
from .render import page
from .security import from_our_page
from .tables import Run, RunEvent, utcnow

router = turns.router(default_response_class=HTMLResponse, include_in_schema=False)

#: Runs on one page of the history; lines of a log that its page shows.
A_PAGE, LINES = 50, 300
#: Characters of a form's options.
MOST = 4000
#: What a picture may do when it is opened by itself: matplotlib styles its parts in place.
PICTURE = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}

RunId = Annotated[int, InPath(ge=1, le=2**31 - 1)]
Number = Annotated[int, Query(ge=0, le=2**31 - 1)]


# --- starting ---------------------------------------------------------------------------------------------------


def asked(slug: str, model: str, lines: str, fresh: bool = False) -> dict[str, Any]:
    """The options of a run from its form: the model, and a NAME=VALUE a line. Raises ValueError with what to do.

    What can be known without loading torch is checked here; the method checks the rest when its run begins.
    """
    family = family_of(slug)
    if len(lines) > MOST:
        raise ValueError(f"the options are longer than {MOST} characters")
    name = model.strip() or "pocket-2m"
    usual = family == "estimates" and name == "pocket-2m"  # each estimate has a default of its own
    options: dict[str, Any] = {} if usual else {"model": _model(name, family)}
    for line in filter(None, map(str.strip, lines.splitlines())):
        name, sign, value = (part.strip() for part in line.partition("="))
        if not sign or not re.fullmatch(r"[a-z_][a-z0-9_]*", name, re.ASCII):
            raise ValueError(f"an option is a line NAME=VALUE, such as seed=1; got '{line[:80]}'")
        if name in ("model", "fresh"):
            raise ValueError(f"'{name}' has a field of its own")
        options[name] = _value(value)
    _check_names(slug, set(options))
    if fresh:
        options["fresh"] = True
    try:
        json.dumps(options, allow_nan=False)
    except ValueError:
        raise ValueError("an option's number must be finite") from None
    return options


def _check_names(slug: str, names: set[str]) -> None:
    allowed = usage.options(slug)
    if allowed and "method" not in names and (unknown := sorted(names - allowed)):
        raise ValueError(f"{slug} has no option '{unknown[0]}'; it has {', '.join(sorted(allowed))}")


def _value(text: str) -> Any:
    """A value as the command line reads it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _model(name: str, family: str) -> str:
    """A model that can be one. Raises ValueError."""
    endpoint = family == "evals" and re.fullmatch(r"https?://\S+", name)
    if len(name) > 300 or not name.isprintable():
        raise ValueError("a model's name is a line of at most 300 characters")
    if (
        name in pockets()
        or endpoint
        or (family == "estimates" and name in shapes())
        or re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)
        or Path(name).is_dir()
    ):
        return name
    more = ", or an endpoint's address" if family == "evals" else ""
    raise ValueError(f"no model '{name}': give a built-in one ({', '.join(pockets())}), a folder, a hub name{more}")


def command(slug: str, options: dict[str, Any]) -> str:
    """The command line that does the same."""
    words = ["broadsheet", "run", slug]
    for name, value in options.items():
        if name == "model":
            words += ["--chat" if re.match("https?://", str(value)) else "--model", str(value)]
        elif name == "name":
            words += ["--model-name", str(value)]
        elif name != "fresh":
            plain = isinstance(value, str) and _value(value) == value
            words += ["-o", f"{name}={value if plain else json.dumps(value)}"]
    return shlex.join(words)


def own_command(slug: str) -> str:
    """The command of a paper that is run in a way of its own, or nothing; for templates."""
    return f"broadsheet {COMMANDS[slug]}" if slug in COMMANDS else ""


def models() -> list[str]:
    """The built-in models; for templates."""
    return pockets()


def _known(slug: str) -> catalogue.Paper:
    found = catalogue.papers().get(slug)
    if found is None:
        raise HTTPException(404, "there is no such paper in the catalogue")
    return found


@router.get("/papers/{slug}/run")
def form(request: Request, slug: str) -> Response:
    """The form that starts a run, on a page of its own."""
    paper = _known(slug)
    if not is_owner(request):
        return RedirectResponse(f"/owner?then=/papers/{paper.slug}/run", 303)
    return page(request, "run_form.html", paper=paper, given={"model": "", "options": "", "fresh": False}, error="")


@router.post("/papers/{slug}/run", dependencies=[Depends(from_our_page), Depends(only_owner)])
def start(
    request: Request,
    slug: str,
    model: Annotated[str, Form()] = "",
    options: Annotated[str, Form()] = "",
    fresh: Annotated[bool, Form()] = False,
) -> Response:
    """Puts a run into the queue and goes to its page; what cannot be run gets the form back with the reason."""
    paper = _known(slug)
    account = getattr(request.state, "account", None)
    try:
        wanted = asked(slug, model, options, fresh)
        with session(request.app.state.engine) as db:
            run = queue.add(db, slug, wanted, account.id if account else None)
    except ValueError as error:
        given = {"model": model, "options": options, "fresh": fresh}
        return page(request, "run_form.html", 400, paper=paper, given=given, error=str(error))
    return RedirectResponse(f"/runs/{run.id}", 303)


@router.post("/runs/{run_id}/cancel", dependencies=[Depends(from_our_page), Depends(only_owner)])
def cancel(request: Request, run_id: RunId) -> Response:
    """Stops a run that waits or works."""
    with session(request.app.state.engine) as db:
        if db.get(Run, run_id) is None:
            raise HTTPException(404, "there is no such run")
        queue.cancel(db, run_id)
    return RedirectResponse(f"/runs/{run_id}", 303)


# --- one run ----------------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """A run as its page and the list show it. Times are seconds, ``value`` is how much is done, 0 to 1."""

    run: Run
    title: str
    says: str = ""
    value: float | None = None
    doing: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)  # time of day (UTC), text
    last: int = 0  # the newest event in it

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in self.run.options.items() if name != "fresh"}

    @property
    def command(self) -> str:
        return command(self.run.slug, self.run.options)

    @property
    def live(self) -> bool:
        return self.run.state not in queue.ENDED

    @property
    def seconds(self) -> float | None:
        """That it took, or has taken."""
        begun = self.run.started
        return (((self.run.ended or utcnow()) - begun).total_seconds()) if begun else None


def _seen(db: Session, run: Run) -> Shown:
    """A run with its words for people."""
    paper = catalogue.papers().get(run.slug)
    shown = Shown(run, paper.title if paper else run.slug)
    if run.state == "queued":
        before = db.scalar(select(func.count()).where(Run.state == "queued", Run.id < run.id)) or 0
        shown.says = f"waiting, with {before} before it" if before else "waiting; it is next"
        if queue.silent(queue.last_beat(db)):
            shown.says = "waiting for a worker: none is running; ‘broadsheet worker’ starts one"
    elif run.state == "running":
        shown.says = "running"
        if queue.silent(run.beat):
            shown.says = "interrupted: its worker is gone; it goes on when there is one again"
        elif run.cancel:
            shown.says = "being cancelled"
    else:
        shown.says = run.state
    return shown


def _one(db: Session, run_id: int, *columns: Any) -> Run:
    run = db.get(Run, run_id, options=[undefer(column) for column in columns])
    if run is None:
        raise HTTPException(404, "there is no such run")
    return run


def _page(request: Request, template: str, run_id: int) -> HTMLResponse:
    with reading(request.app.state.engine) as db:
        shown = _seen(db, _one(db, run_id, Run.sheet, Run.records, Run.plot))
        newest = select(RunEvent).where(RunEvent.run_id == run_id).order_by(RunEvent.id.desc()).limit(LINES)
        for event in reversed(db.scalars(newest).all()):
            shown.last = event.id
            if event.kind == "log":
                shown.lines.append((f"{event.time:%H:%M:%S}", str(event.data["text"])))
            elif event.kind == "progress":
                shown.value, shown.doing = float(event.data["value"]), str(event.data["text"])
    return page(request, template, shown=shown, run=shown.run, may_cancel=shown.live and is_owner(request))


@router.get("/runs/{run_id:int}")
def run(request: Request, run_id: RunId) -> HTMLResponse:
    """A run: how far it is, or what came out."""
    return _page(request, "run.html", run_id)


@router.get("/runs/{run_id:int}/state")
def state(request: Request, run_id: RunId) -> HTMLResponse:
    """The part of a run's page that changes."""
    return _page(request, "_run_state.html", run_id)


@router.get("/runs/{run_id:int}.json", response_class=JSONResponse, include_in_schema=True, tags=["runs"])
def records(request: Request, run_id: RunId) -> Response:
    """A finished run's records, as ``broadsheet run --json`` writes them."""
    with reading(request.app.state.engine) as db:
        run = _one(db, run_id, Run.records)
    if run.records is None:
        raise HTTPException(404, "this run has no records (yet)")
    name = f"{run.slug}-run-{run.id}.json"
    text = json.dumps(run.records, indent=1, ensure_ascii=False)
    return Response(text, media_type="application/json", headers={"content-disposition": f'attachment; filename="{name}"'})


@router.get("/runs/{run_id:int}/plot.svg")
def plot(request: Request, run_id: RunId) -> Response:
    """A finished run's picture."""
    with reading(request.app.state.engine) as db:
        run = _one(db, run_id, Run.plot)
    if not run.plot:
        raise HTTPException(404, "this run has no picture")
    headers = {**PICTURE, "cache-control": "public, max-age=31536000, immutable"}
    return Response(run.plot, media_type="image/svg+xml", headers=headers)


@router.get("/runs/{run_id:int}/events")
async def events(
    request: Request,
    run_id: RunId,
    after: Number = 0,
    last_event_id: Annotated[str, Header()] = "",
) -> Response:
    """A run's progress as server-sent events: what came after the event ``after`` (or the one that a browser saw last), then
    what comes, to the run's end. 204 where nothing will come, so that browsers do not ask again."""
    hub = _hub(request)
    address = request.client.host if request.client else ""
    if hub.full(address):
        raise HTTPException(503, "too many watch already: the page itself can still be loaded again", {"retry-after": "10"})
    if re.fullmatch(r"[0-9]{1,10}", last_event_id):
        after = max(after, int(last_event_id))
    if await hub.nothing_left(run_id, after):
        return Response(status_code=204)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy must hand on what comes when it comes
    return StreamingResponse(hub.watch(run_id, after, address), headers=headers, media_type="text/event-stream")


def _hub(request: Request) -> Hub:
    state = request.app.state
    if not hasattr(state, "hub"):
        state.hub = Hub(state.engine)
    hub: Hub = state.hub
    return hub


# --- all runs ---------------------------------------------------------------------------------------------------


@router.get("/runs")
def history(request: Request, paper: str = "", state: str = "", before: Number = 0) -> HTMLResponse:
    """All runs, newest first; of a paper, or in a state."""
    which = select(Run).order_by(Run.id.desc()).limit(A_PAGE + 1)
    if paper:
        which = which.where(Run.slug == paper.replace("\0", ""))
    if state in queue.STATES:
        which = which.where(Run.state == state)
    if before:
        which = which.where(Run.id < before)
    with reading(request.app.state.engine) as db:
        found = [_seen(db, run) for run in db.scalars(which)]
        slugs = db.scalars(select(Run.slug).distinct().order_by(Run.slug)).all()
    more = found[A_PAGE - 1].run.id if len(found) > A_PAGE else 0
    given = {"paper": paper, "state": state}
    return page(
        request, "runs.html", runs=found[:A_PAGE], slugs=slugs, states=queue.STATES, given=given, more=more, before=before
    )
