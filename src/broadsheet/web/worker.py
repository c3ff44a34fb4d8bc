"""The one process that works off the queue of runs, and the process that each run has to itself.

`Worker` takes the run that has waited longest and starts ``python -m broadsheet.web.worker`` for it, a process that it can
stop at any moment and whose crash is not its own. That process (`work`) measures, says how far it is, and stores the result
in one transaction. Where the worker is killed its run's process goes too, and the next worker lets the run go on.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from broadsheet.core.records import StorageError

from . import queue
from .db import connect, insist, line_of, open_database, reading
from .locks import only_one
from .queue import last_beat
from .settings import Settings
from .tables import Run, utcnow

__all__ = ["Limits", "Worker", "last_beat"]
T = TypeVar("T")
log = logging.getLogger("broadsheet.worker")

#: Seconds between looks at the queue, and between looks at a run under way.
IDLE, LOOK = 0.5, 0.2
#: Seconds between signs of life.
BEAT = 10.0
#: Seconds that a run's process has to put its things away before it is killed.
GRACE = 1.0
#: Seconds between two lines of a run's progress.
PACE = 0.4


@dataclass(frozen=True)
class Limits:
    """What one run may take: ``seconds`` of time, ``megabytes`` of memory (0: no limit), and how nice it is to others."""

    seconds: float = 3600.0
    megabytes: int = 0
    nice: int = 10

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.megabytes < 0 or not 0 <= self.nice <= 19:
            raise ValueError("a run's limits: seconds above 0, megabytes of at least 0 (none), nice of 0 to 19")


# --- the worker -------------------------------------------------------------------------------------------------


class Worker:
    """Works off the queue of ``settings.database``; ``command`` starts a run's process."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "broadsheet.web.worker"),
    ):
        self.settings = settings
        self.limits = limits or Limits()
        self.command = command
        self.engine = open_database(settings.database)
        self.stopping = threading.Event()

    def run(self, once: bool = False, wait: bool = False) -> None:
        """Until `stop`, or ``once``: until the queue is empty. Raises `Locked` where there is a worker, unless it is to
        ``wait`` for that one's end."""
        while not self.stopping.is_set():
            with only_one(self.engine, self.settings, "worker", wait, self.stopping) as still_mine:
                self._patiently(lambda: queue.recover(self.engine))
                if self._serve(still_mine, once):
                    return
            log.warning("the connection that makes this the one worker broke; waiting for another")
            wait = True

    def _serve(self, still_mine: Callable[[], bool], once: bool) -> bool:
        """Works off the queue; False when somebody else may have become the one worker."""
        beaten = -math.inf
        while still_mine():
            if time.monotonic() - beaten > BEAT:
                self._patiently(lambda: queue.beat(self.engine))
                beaten = time.monotonic()
            run = self._patiently(lambda: queue.claim(self.engine))
            if run is not None:
                log.info("run %d: %s", run.id, run.slug)
                self.attend(run, still_mine)
            elif once:
                return True
            if self.stopping.wait(0 if run else IDLE):
                return True
        return False

    def stop(self) -> None:
        """Lets `run` end soon; a run under way waits in the queue for the next worker."""
        self.stopping.set()

    def attend(self, run: Run, still_mine: Callable[[], bool] = lambda: True) -> None:
        """Starts a run's process and stays with it to its end."""
        began = beaten = time.monotonic()
        end: Callable[[], Any] | None = None
        with self._process(run) as process:
            while end is None and process.poll() is None:
                now = time.monotonic()
                if self.stopping.is_set() or not still_mine():
                    end = partial(queue.give_back, self.engine, run)
                elif now - began > self.limits.seconds:
                    error = f"it took more than the {self.limits.seconds:g} seconds that a run may take here"
                    end = partial(self._finish, run, "failed", error)
                elif self._cancelled(run, beat=now - beaten > BEAT):
                    end = partial(self._finish, run, "cancelled", log="cancelled")
                else:
                    beaten = now if now - beaten > BEAT else beaten
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(LOOK)
        # Where the process ended the run itself there is nothing to end, and this changes nothing.
        self._patiently(end or partial(self._finish, run, "failed", _died(process.returncode)))

    def _finish(self, run: Run, state: str, error: str = "", log: str = "") -> bool:
        return queue.finish(self.engine, run.id, run.attempt, state, error, log)

    def _cancelled(self, run: Run, beat: bool) -> bool:
        """Whether somebody wants the run to stop; a database that does not answer now will be asked again."""
        try:
            if beat:
                return queue.beat(self.engine, run)
            with reading(self.engine) as db:
                return bool(db.get_one(Run, run.id).cancel)
        except SQLAlchemyError as error:
            log.warning("run %d: %s", run.id, line_of(error))
            return False

    @contextmanager
    def _process(self, run: Run) -> Iterator[subprocess.Popen[bytes]]:
        """A process group of its own, of which nothing is left at the end."""
        limits = self.limits
        command = [*self.command, str(run.id), str(run.attempt), str(limits.megabytes), str(limits.nice)]
        secrets = ("BROADSHEET_SECRET", "BROADSHEET_SMTP", "BROADSHEET_OWNER_TOKEN")  # of the page: none of a run's business
        environment = {name: value for name, value in os.environ.items() if name not in secrets} | {
            "BROADSHEET_HOME": str(self.settings.home),
            "BROADSHEET_DATABASE": self.settings.database,
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
        with _log_file(self.settings.home, run) as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end tells the process that we are no more
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
                    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                        os.killpg(process.pid, number)
                        process.wait(seconds)
                process.wait()
                if process.stdin:
                    process.stdin.close()

    def _patiently(self, step: Callable[[], T]) -> T | None:
        """Takes a step of the queue, again and again while the database refuses; None when we are to stop meanwhile."""
        while True:
            try:
                return step()
            except SQLAlchemyError as error:
                log.warning("the database refuses, trying again: %s", line_of(error))
                if self.stopping.wait(1.0):
                    return None


def log_path(folder: Path, run_id: int) -> Path:
    """Where a run's process writes what it prints, and the trace of a crash."""
    return folder / "runs" / f"{run_id}.log"


@contextmanager
def _log_file(folder: Path, run: Run) -> Iterator[Any]:
    path = log_path(folder, run.id)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115  # closed below
    except OSError as error:  # a full disk: a run can do without its log
        log.warning("run %d has no log: %s", run.id, error)
        yield subprocess.DEVNULL
        return
    with file:
        yield file


def _died(code: int) -> str:
    """What is said of a process that ended without a word."""
    if code == -signal.SIGKILL:
        return "its process was killed, as happens when memory runs out"
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}; the log on the server may say more"
    return f"its process ended with code {code} and no result; the log on the server may say why"


# --- a run's own process ------------------------------------------------------------------------------------------


class Reporter:
    """Says how far a run is, a few times a second and from a thread of its own: what is measured must not wait for a disk.

    A database that refuses costs no more than what it was told last: what is left is told with the next line.
    """

    def __init__(self, engine: Engine, run: Run):
        self.engine, self.run = engine, run
        self.lines: list[str] = []
        self.newest: dict[str, Any] | None = None
        self.cell = ("", 0, 1)
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._speak, daemon=True)
        self.thread.start()

    def progress(self, cell: Any, number: int, total: int, stored: bool) -> None:
        """A cell begins."""
        budget = "" if cell.budget is None else f" at {cell.budget:g}"
        name = f"{cell.method}{budget}"
        with self.lock:
            self.cell = (name, number, total)
            self.lines.append(f"{name}: {'measured before' if stored else 'measuring'} ({number + 1} of {total})")
            self.newest = {"value": number / total, "text": name}

    def tick(self, done: int, of: int) -> None:
        """So much of a cell is done."""
        with self.lock:
            name, number, total = self.cell
            self.newest = {"value": (number + done / max(of, 1)) / total, "text": f"{name}: {done} of {of}"}

    def close(self) -> None:
        """Tells what is left, if the database lets us."""
        self.ended.set()
        self.thread.join()

    def _speak(self) -> None:
        while True:
            last = self.ended.wait(PACE)
            with self.lock:
                lines, newest = self.lines, self.newest
                self.lines, self.newest = [], None
            if lines or newest:
                try:
                    queue.tell(self.engine, self.run.id, self.run.attempt, lines, newest)
                except SQLAlchemyError as error:
                    print(f"not told: {line_of(error)}", file=sys.stderr)
                    with self.lock:
                        self.lines, self.newest = lines + self.lines, self.newest or newest
            if last:
                return


def work(run_id: int, attempt: int) -> None:
    """Does one run and ends it: done, or failed with a line that says why."""
    engine = connect(os.environ["BROADSHEET_DATABASE"])
    with reading(engine) as db:
        run = db.get(Run, run_id)
    if run is None or run.attempt != attempt or run.state != "running":
        return
    reporter, began = Reporter(engine, run), time.monotonic()
    try:
        result = outcome(run, reporter)
    except Exception as error:
        traceback.print_exc()
        state, result, said = "failed", {}, _said(error)
    else:
        state, said = "done", ""
    reporter.close()
    words = f"done in {time.monotonic() - began:.1f} s" if state == "done" else ""
    try:
        insist(
            lambda: queue.finish(engine, run_id, attempt, state, said, words, **result),
            lambda why: print(f"not stored: {why}", file=sys.stderr),
        )
    except SQLAlchemyError as error:
        sys.exit(f"given up: {line_of(error)}")


def outcome(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Does the work: what is stored of it. Cells that earlier attempts stored are not measured again."""
    from broadsheet.lab.run import family_of, run_method

    options = {name: tuple(value) if isinstance(value, list) else value for name, value in run.options.items()}
    fresh = options.pop("fresh", False)
    since = f"{run.created + timedelta(seconds=1):%Y-%m-%dT%H:%M:%SZ}" if fresh else ""  # records tell full seconds
    family = family_of(run.slug)
    if family == "estimates":
        return estimated(run.slug, options)
    return result_of(run_method(family, run.slug, options, progress=reporter.progress, tick=reporter.tick, since=since))


def estimated(slug: str, options: dict[str, Any]) -> dict[str, Any]:
    """An estimate's tables, and their rows as records."""
    from broadsheet.lab.estimate import estimate
    from broadsheet.lab.report import sheet_of

    tables = estimate(slug, options).tables()
    rows = [{"table": table.title, **row} for table in tables for row in table.records()]
    return {"sheet": [asdict(sheet_of(table)) for table in tables], "records": _finite(rows)}


def result_of(records: list[Any]) -> dict[str, Any]:
    """What is stored of a run: its records, and their table and plot where they can be made."""
    from broadsheet.lab import plots, report
    from broadsheet.lab.table import quality_of, rows, view

    found: dict[str, Any] = {"records": [_finite(record.to_json()) for record in records]}
    try:
        found["sheet"] = [asdict(report.sheet(records))]
        table, quality, how = rows(records), quality_of(records), view(records)
        if sum(quality.metric in row.values and how.price in row.values for row in table) > 1:  # one point is no picture
            found["plot"] = plots.svg(plots.quality_against_price(table, quality, how))
    except Exception:
        traceback.print_exc()  # the records are what matters
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(error: Exception) -> str:
    """A line for people: what they can act on as it stands, anything else with its kind."""
    known = isinstance(error, ValueError | StorageError)
    return line_of(error) if known and str(error) else f"{type(error).__name__}: {line_of(error)}".rstrip(": ")


def _go_with_parent() -> None:
    """Kills this process's group when whoever started it is gone: its end of our standard input closes, even by kill -9."""

    if os.getpgrp() != os.getpid():
        return  # started by hand: the group is the terminal's

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _limit(megabytes: int, nice: int) -> None:
    import resource

    os.nice(nice)
    if megabytes:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def main(arguments: list[str] | None = None) -> None:
    """``python -m broadsheet.web.worker RUN ATTEMPT MEGABYTES NICE``: a run's own process, which only `Worker` starts."""
    _go_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it opened is put away
    parser = argparse.ArgumentParser(prog="python -m broadsheet.web.worker", description=main.__doc__)
    for name in ("run", "attempt", "megabytes", "nice"):
        parser.add_argument(name, type=int)
    given = parser.parse_args(arguments)
    _limit(given.megabytes, given.nice)
    print(f"{utcnow():%Y-%m-%d %H:%M:%S} run {given.run}, attempt {given.attempt}", flush=True)
    work(given.run, given.attempt)


if __name__ == "__main__":
    main()
