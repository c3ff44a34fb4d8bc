"""A lock of which there is one a database: two senders or two workers never work at once.

PostgreSQL: an advisory lock, which holds across machines and goes with its connection. Else a lock on a file, which goes
with its process. So a process that was killed leaves none behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from broadsheet.core.records import StorageError

from .settings import Settings

log = logging.getLogger(__name__)

#: Seconds between tries of who waits.
AGAIN = 0.5
#: (takes the lock if it is free, says whether it is still held)
Lock = tuple[Callable[[], bool], Callable[[], bool]]


class Locked(ValueError):
    """Somebody else has it."""


@contextmanager
def only_one(
    engine: Engine, settings: Settings, name: str, wait: bool = False, stopping: threading.Event | None = None
) -> Iterator[Callable[[], bool]]:
    """Holds the lock ``name`` ("worker", "sender"); yields what says whether it is still held.

    Raises `Locked` when somebody has it, unless it is to ``wait``; ``stopping`` ends the wait.
    """
    take = _advisory_lock(engine, name) if engine.dialect.name == "postgresql" else _file_lock(engine, settings, name)
    with take as (try_it, still_mine):
        while not try_it():
            if not wait:
                raise Locked(f"another {name} is at work; it must end first")
            if stopping and stopping.wait(AGAIN):
                break
        yield still_mine


@contextmanager
def _advisory_lock(engine: Engine, name: str) -> Iterator[Lock]:
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
    held: list[Connection] = []

    def try_it() -> bool:
        try:
            if not held:
                held.append(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
            return held[0].scalar(text("select pg_try_advisory_lock(:number)"), {"number": number}) is True
        except SQLAlchemyError as error:  # it restarts
            log.warning("the database refuses, trying again: %s", " ".join(str(error).split())[:300])
            drop()
            return False

    def still_mine() -> bool:
        try:
            return held[0].scalar(text("select true")) is True
        except SQLAlchemyError:
            return False

    def drop() -> None:  # the lock goes with the connection, which must not return to the pool
        while held:
            connection = held.pop()
            with suppress(SQLAlchemyError):  # given back now, and not when the server notices that the connection is gone
                connection.execute(text("select pg_advisory_unlock_all()"))
            connection.invalidate()
            connection.close()

    try:
        yield try_it, still_mine
    finally:
        drop()


@contextmanager
def _file_lock(engine: Engine, settings: Settings, name: str) -> Iterator[Lock]:
    database = engine.url.database or ""
    inside = engine.dialect.name == "sqlite" and database not in ("", ":memory:")
    path = Path(f"{database}.{name}") if inside else settings.home / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115  # closed below
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None

    def try_it() -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    with file:
        yield try_it, lambda: True
