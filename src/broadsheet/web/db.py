"""The database: any that SQLAlchemy speaks to, SQLite by default.

Everything that writes does so in one short transaction: ``with session(engine) as db: ...`` commits at its end or not at
all, so that a process killed at any moment leaves no half of anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import Session

from broadsheet.core.records import StorageError

#: Seconds that a writer waits for another before it gives up with "database is locked".
PATIENCE = 10


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
    engine = create_engine(url, connect_args={"timeout": PATIENCE, "check_same_thread": False})

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


def migrate(engine: Engine, revision: str = "head") -> None:
    """Brings the tables to ``revision`` (Alembic); several processes may do so at once."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:  # SQLite: the lock makes others wait; PostgreSQL: env.py takes an advisory lock
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
