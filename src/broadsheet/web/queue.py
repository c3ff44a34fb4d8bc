"""The queue of runs, as rows: what the page asks for, what the worker takes, what a run says while it works.

A run is queued, running, then done, failed or cancelled. Each step is one transaction that names the state it expects, so
that of two who want to move a run one wins and the other changes nothing. A claim counts the run's ``attempt``: a process
that was given up for dead and writes after all writes for an old attempt, and nothing happens.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from .db import reading, session
from .tables import Run, RunEvent, WorkerBeat, utcnow

ENDED = ("done", "failed", "cancelled")
STATES = ("queued", "running", *ENDED)
#: Seconds without a sign of life after which a worker counts as gone.
SILENCE = 45.0
#: Runs that may wait.
LONGEST = 100
#: How often a run is tried again after its worker was killed over it.
RETRIES = 2


class QueueFull(ValueError):
    """There are too many runs waiting already."""


# --- for the page -----------------------------------------------------------------------------------------------


def add(db: Session, slug: str, options: dict[str, Any], account_id: int | None = None) -> Run:
    """A new run at the queue's end. Raises `QueueFull`."""
    waiting = db.scalars(select(Run.id).where(Run.state == "queued").limit(LONGEST)).all()
    if len(waiting) >= LONGEST:
        raise QueueFull(f"{LONGEST} runs are waiting already: cancel some, or come back later")
    run = Run(slug=slug, options=options, account_id=account_id)
    db.add(run)
    db.flush()
    _tell(db, run.id, "state", state="queued")
    return run


def cancel(db: Session, run_id: int) -> None:
    """A waiting run is cancelled at once; a running one when its worker sees it, or at once when that is gone."""
    gone = (Run.state == "running") & (Run.beat < _long_ago())
    if not _move(db, run_id, (Run.state == "queued") | gone, "cancelled", "cancelled"):
        db.execute(update(Run).where(Run.id == run_id, Run.state == "running").values(cancel=True))


def silent(beat: datetime | None) -> bool:
    """Whether a worker whose last sign of life this is counts as gone."""
    return beat is None or beat < _long_ago()


def last_beat(db: Session) -> datetime | None:
    """When a worker was last alive; None: there never was one."""
    return db.scalar(select(WorkerBeat.time))


def _long_ago() -> datetime:
    return utcnow() - timedelta(seconds=SILENCE)


# --- for the worker ---------------------------------------------------------------------------------------------


def beat(engine: Engine, run: Run | None = None) -> bool:
    """Says that the worker is alive, and with it its run; returns whether that is to be cancelled."""
    now = utcnow()
    with session(engine) as db:
        if not db.execute(update(WorkerBeat).values(time=now)).rowcount:  # type: ignore[attr-defined]
            db.add(WorkerBeat(id=1, time=now))
        if run is None:
            return False
        db.execute(update(Run).where(_current(run.id, run.attempt)).values(beat=now))
        return bool(db.scalar(select(Run.cancel).where(Run.id == run.id)))


def claim(engine: Engine) -> Run | None:
    """Takes the run that has waited longest, if one waits."""
    with reading(engine) as db:  # an empty queue is looked at often, and writers should not have to wait for that
        if db.scalar(select(Run.id).where(Run.state == "queued").limit(1)) is None:
            return None
    with session(engine) as db:
        oldest = select(Run).where(Run.state == "queued").order_by(Run.id).limit(1)
        run = db.scalar(oldest.with_for_update(skip_locked=True))
        if run is not None:
            now = utcnow()
            run.state, run.started, run.beat, run.attempt = "running", now, now, run.attempt + 1
            _tell(db, run.id, "state", state="running")
        return run


def recover(engine: Engine) -> None:
    """Runs whose worker was killed wait again; those that this happened to too often have failed.

    For the one worker, when it starts: what is said to run then runs no more.
    """
    with session(engine) as db:
        for run in db.scalars(select(Run).where(Run.state == "running").with_for_update()).all():
            here = Run.state == "running"
            if run.cancel:
                _move(db, run.id, here, "cancelled", "cancelled")
            elif run.lost >= RETRIES:
                error = f"its worker was killed {RETRIES + 1} times while it ran; is there enough memory for it?"
                _move(db, run.id, here, "failed", error, error=error)
            else:
                db.execute(update(Run).where(Run.id == run.id).values(lost=Run.lost + 1))
                _move(db, run.id, here, "queued", "its worker was killed; finished parts are kept, it will go on from there")


def give_back(engine: Engine, run: Run) -> None:
    """The worker stops: its run waits again."""
    with session(engine) as db:
        _move(db, run.id, _current(run.id, run.attempt), "queued", "the worker stopped; it will go on when it is back")


def finish(engine: Engine, run_id: int, attempt: int, state: str, error: str = "", log: str = "", **result: Any) -> bool:
    """Ends a run, with its ``result`` (records, sheet, plot); False when it is no longer this attempt's to end."""
    with session(engine) as db:
        return _move(db, run_id, _current(run_id, attempt), state, log or error, error=error[:1000], **result)


def tell(engine: Engine, run_id: int, attempt: int, lines: Iterable[str], progress: dict[str, Any] | None = None) -> bool:
    """Stores lines of a run's log and how far it is; False when it is no longer this attempt's."""
    with session(engine) as db:
        if db.scalar(select(Run.id).where(_current(run_id, attempt))) is None:
            return False
        for line in lines:
            _tell(db, run_id, "log", text=line[:500])
        if progress is not None:
            newest = _tell(db, run_id, "progress", **progress)
            old = (RunEvent.run_id == run_id) & (RunEvent.kind == "progress") & (RunEvent.id < newest)
            db.execute(delete(RunEvent).where(old))  # after the new one: an id is never given out again
        return True


# --- what all steps are made of -----------------------------------------------------------------------------------


def _current(run_id: int, attempt: int) -> Any:
    return (Run.id == run_id) & (Run.attempt == attempt) & (Run.state == "running")


def _move(db: Session, run_id: int, expected: Any, state: str, log: str, **values: Any) -> bool:
    """Moves a run that is as expected to another state, and says so to who watches."""
    ended = utcnow() if state in ENDED else None
    changed = db.execute(
        update(Run).where(Run.id == run_id, expected).values(state=state, ended=ended, **values),
        execution_options={"synchronize_session": False},
    )
    if not changed.rowcount:  # type: ignore[attr-defined]
        return False
    _tell(db, run_id, "log", text=log[:500])
    _tell(db, run_id, "state", state=state)
    return True


def _tell(db: Session, run_id: int, kind: str, **data: Any) -> int:
    event = RunEvent(run_id=run_id, kind=kind, data=data)
    db.add(event)
    db.flush()
    return event.id
