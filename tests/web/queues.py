"""What tests of runs share: a page without its worker, workers on a cheap bench, a PostgreSQL server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from broadsheet.web import queue
from broadsheet.web.app import create_app
from broadsheet.web.db import reading, session
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Run, RunEvent
from broadsheet.web.worker import Limits, Worker

CHEAP = (sys.executable, str(Path(__file__).with_name("cheap.py")))
PROGRAMS = Path("/usr/lib/postgresql/15/bin")


def settings_of(home: Path, **given: str) -> Settings:
    return Settings.from_environment({"BROADSHEET_HOME": str(home)}, **given)


def client_of(home: Path, owner: bool = True, **given: str) -> TestClient:
    """A browser on this machine."""
    app = create_app(settings_of(home, **given))
    return TestClient(app, base_url=app.state.settings.url, client=("127.0.0.1", 50000), follow_redirects=False)


def cheap_worker(settings: Settings, **limits: Any) -> Worker:
    return Worker(settings, Limits(**limits), CHEAP)


@contextmanager
def at_work(worker: Worker) -> Iterator[None]:
    """A worker that works while the test looks on."""
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join(20)
        assert not thread.is_alive()


def start(engine: Engine, **options: Any) -> int:
    with session(engine) as db:
        return queue.add(db, "gear", {"model": "pocket-2m", **options}).id


def seen(engine: Engine, run_id: int) -> Run:
    with reading(engine) as db:
        run = db.get_one(Run, run_id)
        _ = run.records, run.sheet  # before the session closes
        return run


def told(engine: Engine, run_id: int, kind: str = "log") -> list[Any]:
    with reading(engine) as db:
        events = db.scalars(select(RunEvent).where(RunEvent.run_id == run_id, RunEvent.kind == kind).order_by(RunEvent.id))
        return [event.data.get("text", event.data.get("state")) for event in events]


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def csrf_of(html: str) -> str:
    return html.split('name="csrf" value="')[1].split('"')[0]


@contextmanager
def postgresql() -> Iterator[str]:
    """A server of its own, as user postgres where we are root, which it refuses to be."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    as_user = ["runuser", "-u", "postgres", "--"] if shutil.which("runuser") else []
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data, options = str(folder / "data"), f"-p {port} -h 127.0.0.1 -k {folder} -F"
    log = ["-l", str(folder / "log")]
    run = {"check": True, "capture_output": True}
    subprocess.run([*as_user, str(PROGRAMS / "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "-N"], **run)  # type: ignore[call-overload]
    subprocess.run([*as_user, str(PROGRAMS / "pg_ctl"), "-D", data, "-o", options, *log, "-w", "start"], **run)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/"
    finally:
        subprocess.run([*as_user, str(PROGRAMS / "pg_ctl"), "-D", data, "-m", "immediate", "stop"], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
