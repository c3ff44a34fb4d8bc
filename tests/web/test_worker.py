"""The worker and the processes of its runs: real ones, on a bench that costs nothing; and one real bench."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import typer
import typer.testing
from queues import CHEAP, at_work, cheap_worker, seen, settings_of, start, told, until

from broadsheet.cli.worker import worker
from broadsheet.core.records import RecordStore
from broadsheet.web import queue
from broadsheet.web.db import open_database, session
from broadsheet.web.worker import Limits, Worker, log_path

STEPS = """
import sys
from broadsheet.web.settings import Settings
from broadsheet.web.worker import Limits, Worker
Worker(Settings.from_environment(), Limits(), tuple(sys.argv[1:])).run()
"""


@pytest.fixture
def settings(tmp_path):
    return settings_of(tmp_path / "home")


@pytest.fixture
def engine(settings):
    opened = open_database(settings.database)
    yield opened
    opened.dispose()


def worker_process(settings):
    """A worker that can be killed."""
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "BROADSHEET_HOME": str(settings.home), "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, "-c", STEPS, *CHEAP], env=environment)


def processes_of(run_id):
    """Ids of the processes that a run has."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if CHEAP[1].encode() in words and str(run_id).encode() == words[2]:
                found.append(int(path.parent.name))
    return found


def lines(path):
    return path.read_text().split() if path.exists() else []


def test_runs_end_with_what_they_are_worth(settings, engine, tmp_path):
    count = tmp_path / "count"
    good = start(engine, bits=4, count=str(count))
    same = start(engine, bits=4, count=str(count))
    bad = start(engine, bits=3)
    unknown = start(engine, colour="red")
    value, crash, killed = (start(engine, fault=fault) for fault in ("value", "crash", "killed"))
    cheap_worker(settings).run(once=True)
    again = start(engine, bits=4, count=str(count), fresh=True)
    cheap_worker(settings).run(once=True)

    run = seen(engine, good)
    assert (run.state, run.error, run.attempt) == ("done", "", 1)
    assert [record["method"] for record in run.records] == ["full", "gear"]
    assert run.records[1]["value"] == 0.5
    assert run.sheet[0]["heads"] == ["method", "budget", "bytes", "accuracy"]
    assert [cells[0] for _, cells in run.sheet[0]["rows"]] == ["full", "gear"]
    assert told(engine, good)[:2] == ["full: measuring (1 of 2)", "gear: measuring (2 of 2)"]
    assert told(engine, good)[2].startswith("done in")
    assert told(engine, good, "state") == ["queued", "running", "done"]
    assert len(RecordStore(settings.home / "records" / "caches.jsonl").cells()) >= 2  # where compare finds them
    assert told(engine, same)[0] == "full: measured before (1 of 2)"
    assert seen(engine, same).records == run.records
    assert told(engine, again)[0] == "full: measuring (1 of 2)"
    assert lines(count) == ["full", "gear", "full", "gear"]

    failed = {run_id: seen(engine, run_id) for run_id in (bad, unknown, value, crash, killed)}
    assert {run.state for run in failed.values()} == {"failed"}
    assert failed[bad].error == "bits must be 2 or 4, got 3"
    assert failed[unknown].error.startswith("gear has no parameter 'colour'")
    assert failed[value].error == "no such data: give a file"
    assert failed[crash].error == "RuntimeError: boom"
    assert failed[killed].error == "its process was killed, as happens when memory runs out"
    assert "Traceback" in log_path(settings.home, crash).read_text()
    assert "Traceback" not in "".join(told(engine, crash))


def test_limits_of_memory_and_time(settings, engine):
    memory = start(engine, fault="memory")
    cheap_worker(settings, megabytes=600).run(once=True)
    assert seen(engine, memory).error == "MemoryError"
    long = start(engine, pause=60)
    cheap_worker(settings, seconds=1.5).run(once=True)
    assert seen(engine, long).error == "it took more than the 1.5 seconds that a run may take here"
    assert not processes_of(long)
    with pytest.raises(ValueError, match="limits"):
        Limits(seconds=0)


def test_cancelling_takes_less_than_two_seconds(settings, engine):
    run_id = start(engine, fault="stubborn")  # it does not even listen to SIGTERM
    with at_work(cheap_worker(settings)):
        until(lambda: len(told(engine, run_id)) == 2)
        time.sleep(0.5)
        began = time.monotonic()
        with session(engine) as db:
            queue.cancel(db, run_id)
        until(lambda: seen(engine, run_id).state == "cancelled")
        assert time.monotonic() - began < 2
        until(lambda: not processes_of(run_id), 5.0)
    assert told(engine, run_id)[-1] == "cancelled"


def test_a_worker_that_is_stopped_gives_its_run_back(settings, engine, tmp_path):
    run_id = start(engine, pause=0.5, steps=4, count=str(tmp_path / "count"))
    with at_work(cheap_worker(settings)):
        until(lambda: "gear: measuring (2 of 2)" in told(engine, run_id))
    assert (seen(engine, run_id).state, seen(engine, run_id).lost) == ("queued", 0)
    assert not processes_of(run_id)
    cheap_worker(settings).run(once=True)
    assert seen(engine, run_id).state == "done"
    assert lines(tmp_path / "count") == ["full", "gear"]  # what was finished was not measured again


def test_a_killed_worker_takes_its_run_along_and_the_next_goes_on(settings, engine, tmp_path):
    run_id = start(engine, pause=0.5, steps=4, count=str(tmp_path / "count"))
    process = worker_process(settings)
    until(lambda: "gear: measuring (2 of 2)" in told(engine, run_id))
    assert processes_of(run_id)
    process.kill()
    process.wait()
    until(lambda: not processes_of(run_id), 10)
    assert seen(engine, run_id).state == "running"  # nobody is left to say otherwise; the page looks at its beat
    cheap_worker(settings).run(once=True)
    assert (seen(engine, run_id).state, seen(engine, run_id).lost) == ("done", 1)
    assert lines(tmp_path / "count") == ["full", "gear"]


def test_a_locked_database_holds_no_run_up(settings, engine, tmp_path):
    run_id = start(engine, pause=0.2, steps=3, count=str(tmp_path / "count"))
    with at_work(cheap_worker(settings)):
        until(lambda: told(engine, run_id))
        other = sqlite3.connect(settings.home / "web.sqlite", isolation_level=None)
        other.execute("begin immediate")
        until(lambda: lines(tmp_path / "count") == ["full", "gear"])  # measured while nothing could be written
        assert seen(engine, run_id).state == "running"
        other.execute("rollback")
        other.close()
        until(lambda: seen(engine, run_id).state == "done")


def test_a_full_disk_loses_no_run(settings, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        small = settings_of(settings.home, database=f"sqlite:///{disk / 'web.sqlite'}")
        engine = open_database(small.database)
        run_id = start(engine, pause=0.2, steps=3, count=str(tmp_path / "count"))
        with at_work(cheap_worker(small)):
            until(lambda: told(engine, run_id))
            with open(disk / "full", "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            until(lambda: lines(tmp_path / "count") == ["full", "gear"])
            time.sleep(1)
            (disk / "full").unlink()
            until(lambda: seen(engine, run_id).state == "done")
        assert len(seen(engine, run_id).records) == 2
        engine.dispose()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_the_page_has_no_secrets_for_a_run(settings, engine, monkeypatch, tmp_path):
    monkeypatch.setenv("BROADSHEET_OWNER_TOKEN", "hush")
    monkeypatch.setenv("BROADSHEET_SMTP", "smtp://user:hush@localhost")
    script = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(str(dict(os.environ)))"
    run_id = start(engine)
    Worker(settings, command=(sys.executable, "-c", script)).run(once=True)
    assert "hush" not in (tmp_path / "seen").read_text()
    assert seen(engine, run_id).error == "its process ended with code 0 and no result; the log on the server may say why"


@pytest.mark.slow
def test_a_real_run(settings, engine):
    with session(engine) as db:
        run_id = queue.add(db, "longproc", {"model": "pocket-2m", "limit": 1}).id
    Worker(settings).run(once=True)
    run = seen(engine, run_id)
    assert run.state == "done", run.error
    assert {record["paper"] for record in run.records} == {"longproc"}
    assert all(record["n"] >= 1 and record["revision"] is not None for record in run.records)
    assert run.sheet[0]["rows"][0][1][0] == "longproc"


def test_the_command(settings, engine):
    program = typer.Typer(add_completion=False, rich_markup_mode=None)
    program.command()(worker)
    run = typer.testing.CliRunner().invoke
    assert "three times has failed" in run(program, ["--help"]).stdout
    done = run(program, ["--once"])
    assert (done.exit_code, done.stdout) == (0, "")
    process = worker_process(settings)
    until(lambda: processes_hold(settings))
    refused = run(program, ["--once"])
    assert isinstance(refused.exception, ValueError)  # which `broadsheet` prints as a line
    assert "another worker" in str(refused.exception)
    process.send_signal(signal.SIGTERM)
    process.wait()


def processes_hold(settings):
    """Whether the lock is taken."""
    with open(settings.home / "web.sqlite.worker") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_estimate_s_tables_are_its_result():
    """No weights and no records: what comes out are tables, and their rows."""
    from broadsheet.web.worker import estimated

    found = estimated("llm-viewer", {"model": "llama-2-7b", "hardware": "a6000"})
    assert found["sheet"][0]["about"] == "llama-2-7b on NVIDIA RTX A6000, batch 1, context 2048"
    assert found["sheet"][0]["rows"][1][1][:2] == ("decode", "18.62")
    assert found["records"][1]["stage"] == "decode"
    with pytest.raises(ValueError, match="has no option 'flash'"):
        estimated("llm-viewer", {"flash": True})
