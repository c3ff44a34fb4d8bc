"""Databases for the page's tests: SQLite, and PostgreSQL where a server can be started."""

from __future__ import annotations

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path
from uuid import uuid4

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sqlalchemy")


def _binary(name: str) -> str:
    return shutil.which(name) or next(iter(sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), "")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """The address of a PostgreSQL server of our own, on a socket in a folder of our own; skips where there can be none."""
    pytest.importorskip("psycopg")
    if not _binary("initdb"):
        pytest.skip("there is no PostgreSQL server here")
    folder = Path("/tmp") / f"broadsheet-pg-{os.getpid()}-{uuid4().hex[:8]}"  # the path of a socket must be short
    folder.mkdir(mode=0o755)
    user = []
    if os.geteuid() == 0:  # it does not run as root
        shutil.chown(folder, "nobody")
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        if not shutil.which("setpriv"):
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    data = str(folder / "data")
    subprocess.run([*user, _binary("initdb"), "-D", data, "-U", "test", "--auth=trust", "--no-sync"], check=True, **quiet)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=60"
    control = [*user, _binary("pg_ctl"), "-D", data, "-w"]
    subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], check=True, **quiet)
    yield f"postgresql+psycopg://test@/{{}}?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], check=False, **quiet)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'web.sqlite'}"
    from sqlalchemy import create_engine, text

    server, name = request.getfixturevalue("postgres"), f"t{uuid4().hex[:12]}"
    engine = create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    engine.dispose()
    return server.format(name)
