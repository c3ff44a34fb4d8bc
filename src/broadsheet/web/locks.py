"""A lock of which there is one a database: two senders or two workers never work at once."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, text

from broadsheet.core.records import StorageError

from .settings import Settings


class Locked(ValueError):
    """Somebody else has it."""


@contextmanager
def alone(engine: Engine, settings: Settings, name: str) -> Iterator[None]:
    """Holds the lock ``name``; raises `Locked` when somebody has it.

    PostgreSQL: an advisory lock, which holds across machines and goes with its connection. Else a lock on a file, which goes
    with its process. So a process that was killed leaves none behind.
    """
    if engine.dialect.name == "postgresql":
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest())
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            if not connection.scalar(text("select pg_try_advisory_lock(:number)"), {"number": number}):
                raise Locked(f"another {name} is at work")
            try:
                yield
                connection.execute(text("select pg_advisory_unlock(:number)"), {"number": number})
            finally:
                connection.invalidate()  # whatever happened, the lock goes with the connection, which nobody uses again
        return
    database = engine.url.database or ""
    inside = engine.dialect.name == "sqlite" and database not in ("", ":memory:")
    path = Path(f"{database}.{name}") if inside else settings.home / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115  # closed below
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another {name} is at work") from None
        yield
