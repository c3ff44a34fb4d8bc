"""A database to test with: SQLite, and PostgreSQL where it can be started."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date, datetime
from glob import glob
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")

from sqlalchemy import Engine, create_engine, text

from broadsheet.web import library
from broadsheet.web.db import open_database, session
from broadsheet.web.library import Item
from broadsheet.web.settings import Settings


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The folder of a PostgreSQL server's socket; the server is ours alone and goes with its folder."""
    initdb = shutil.which("initdb") or next(iter(sorted(glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)), "")
    if not initdb:
        pytest.skip("PostgreSQL's initdb is not on this machine")
    pytest.importorskip("psycopg")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # short: a socket's path has at most 107 characters
    data = folder / "data"
    try:
        if user:
            shutil.chown(folder, user)
        _as(user, initdb, "-D", str(data), "-U", "broadsheet", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync")
        server = Path(initdb).parent / "pg_ctl"
        quick = f"-k {folder} -c listen_addresses='' -c fsync=off -c full_page_writes=off -c shared_buffers=32MB"
        _as(user, str(server), "-D", str(data), "-l", str(folder / "log"), "-o", quick, "-w", "start")
        try:
            yield str(folder)
        finally:
            _as(user, str(server), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'web.sqlite'}"
        return
    folder = request.getfixturevalue("postgresql")
    name = f"test_{os.urandom(6).hex()}"
    every = create_engine(f"postgresql+psycopg://broadsheet@/postgres?host={folder}", isolation_level="AUTOCOMMIT")
    with every.connect() as connection:
        connection.execute(text(f"create database {name}"))
    yield f"postgresql+psycopg://broadsheet@/{name}?host={folder}"
    with every.connect() as connection:
        connection.execute(text(f"drop database {name} with (force)"))
    every.dispose()


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """Of a page on this machine."""
    return Settings.from_environment({"BROADSHEET_HOME": str(tmp_path / "home"), "BROADSHEET_DATABASE": database_url})


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """The database with its tables, without papers."""
    engine = open_database(settings.database)
    yield engine
    engine.dispose()


PAPERS = (
    Item(
        "Quantised Key-Value Caches for Long Contexts", ("Ada Bergström", "Kofi Okafor"),
        "Serving long contexts is limited by memory. We quantise keys and values to two bits and keep outliers exactly. "
        "Code: https://github.com/made/kv.", arxiv_id="2611.00001v1", tags=("cs.LG", "cs.CL"),
        published=datetime(2026, 11, 25, 12), day=date(2026, 11, 26),
    ),
    Item(
        "Pruning Attention Heads without Retraining", ("Dmitri Petrov",),
        "Many heads attend to nothing. We prune them with a closed-form correction of the remaining ones.",
        arxiv_id="2611.00002v2", tags=("cs.CL",), published=datetime(2026, 11, 26, 8), version=2,
    ),
    Item(
        "Instruction Data That Teach", ("Elif Vogel", "Ada Bergström"),
        "Easy instructions teach little. A bandit selects instruction data by what a small model learns from them.",
        doi="10.1000/Made.3", url="https://journal.example.org/3", tags=("data",), published=datetime(2026, 11, 27, 8),
    ),
    Item(
        "A Roofline of Small Accelerators", ("Hana Kim",), "We measure and model memory bandwidth of edge accelerators.",
        arxiv_id="cs/0301012", tags=("cs.AR",), published=datetime(2003, 1, 14), code_url="https://example.org/roofline",
    ),
)  # fmt: skip


@pytest.fixture
def papers(engine: Engine) -> tuple[Item, ...]:
    """A handful of papers, stored."""
    with session(engine) as db:
        library.add(db, PAPERS)
    return PAPERS


def _unprivileged() -> str | None:
    """As whom the server runs: not as root, which it refuses."""
    if os.geteuid():
        return None
    import pwd

    users = {entry.pw_name for entry in pwd.getpwall()}
    found = next((name for name in ("postgres", "nobody") if name in users), None)
    if not found:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    return found


def _as(user: str | None, *command: str) -> None:
    given = {"user": user, "group": user if user == "postgres" else "nogroup"} if user else {}
    done = subprocess.run(command, cwd="/tmp", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, **given)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}")
