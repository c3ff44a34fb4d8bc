"""The database: any that SQLAlchemy speaks to, SQLite by default.

Everything that writes does so in one short transaction: ``with session(engine) as db: ...`` commits at its end or not at
all, so that a process killed at any moment leaves no half of anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from broadsheet.core.records import StorageError

T = TypeVar("T")

#: Seconds that a writer waits for another before it gives up with "database is locked".
LOCKED_FOR = 10
#: Seconds during which what was dear is tried to be stored again.
PATIENCE = 60.0


def open_database(url: str) -> Engine:
    """The engine, its tables brought up to date. Raises ValueError or StorageError with what to do."""
    try:
        found = make_url(url)
    except ArgumentError:
        raise ValueError(
            "BROADSHEET_DATABASE is an SQLAlchemy URL such as sqlite:///papers.sqlite or postgresql+psycopg://…"
        ) from None
    engine = connect(url)
    if found.get_backend_name() == "sqlite" and found.database not in (None, "", ":memory:"):
        Path(str(found.database)).parent.mkdir(parents=True, exist_ok=True)
    try:
        migrate(engine)
    except OperationalError as error:
        raise StorageError(f"cannot open the database {found.render_as_string()}: {error.orig}") from None
    return engine


def connect(url: str) -> Engine:
    """An engine as all processes of the page open it. SQLite: write-ahead log (readers never wait), foreign keys, and
    writers take their lock when they begin, so that two never deadlock."""
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": LOCKED_FOR, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin ourselves
        for pragma in ("journal_mode = wal", "synchronous = normal", "foreign_keys = on", "cache_size = -65536"):
            connection.execute(f"pragma {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        mode = "" if connection.get_execution_options().get("reading") else "immediate"
        connection.exec_driver_sql(f"begin {mode}")

    return engine


@contextmanager
def session(engine: Engine) -> Iterator[Session]:
    """A transaction that may write."""
    with Session(engine, expire_on_commit=False) as db, db.begin():
        yield db


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A snapshot that only reads: it waits for no writer."""
    with Session(engine.execution_options(reading=True), expire_on_commit=False) as db:
        yield db


def insist(step: Callable[[], T], tell: Callable[[str], None], seconds: float = PATIENCE) -> T:
    """Takes a step that was dear, again and again while the database refuses it: a lock or a full disk may go. ``tell`` is
    told why it waits. Raises what the database said last when ``seconds`` are over."""
    until = time.monotonic() + seconds
    while True:
        try:
            return step()
        except SQLAlchemyError as error:
            if time.monotonic() > until:
                raise
            tell(line_of(error))
            time.sleep(1.0)


def line_of(error: Exception) -> str:
    """An error's first line, without what does not print; of the database's errors what it said itself."""
    if isinstance(error, SQLAlchemyError):
        error = getattr(error, "orig", None) or error
    lines = str(error).strip().splitlines() or [""]
    whole = " ".join(lines) if isinstance(error, ValueError) else lines[0]
    return " ".join("".join(c if c.isprintable() else " " for c in whole).split())[:500]


def migrate(engine: Engine, revision: str = "head") -> None:
    """Brings the tables to ``revision`` (Alembic); several processes may do so at once."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:  # SQLite: the lock makes others wait; PostgreSQL: env.py takes an advisory lock
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
