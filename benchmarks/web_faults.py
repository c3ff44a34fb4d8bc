"""What faults cost the web page: kills at random moments, and outages of what it stands on, ten times each.

    python benchmarks/web_faults.py [worker] [server] [sender] [locked] [full] [smtp] [feed] [--times 10] [--runs 8]
                                    [--within 20] [--seed 0]

``worker``: real runs (a benchmark of the evals family on the built-in model, a sample each) wait in the queue; their worker
is killed with SIGKILL again and again, then one works to the end. Every run must have ended, with its records or, where it
was the one under way at three kills, with a line that says so; no finished cell may have been measured twice; no process may
be left.

``server``: visitors start runs, cancel them and vote, and others watch a run, while the server is killed and started again.
What was answered must be in the database; who watches must get every line once, in order, over all kills.

``sender``: a digest goes to sixty subscribers through a real mail server while its sender is killed. Nobody may get it
twice, and who did not get it must be named as unknown, at most one a kill.

``locked``, ``full``, ``smtp``, ``feed``: the database is locked by somebody else, for a short and for a long time; its disk
is full; the mail server is away or refuses; a feed times out, trickles or breaks off. See `_web_outages`. Nothing may be
lost, nothing done twice, every message must be a line, and when the fault ends all must go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
from _web_outages import OUTAGES
from sqlalchemy import Engine, func, select

from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.web import accounts, library, queue
from broadsheet.web.db import open_database, reading, session
from broadsheet.web.security import SESSION_COOKIE
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Mark, Paper, Run, RunEvent

RESULTS = Path(__file__).parent / "results" / "web_faults.records.json"
WORKER = "from broadsheet.cli.worker import worker; worker(False, False, 3600.0, 0, 10)"
SERVER = "import sys, uvicorn; from broadsheet.web.app import create_app; " + (
    "uvicorn.run(create_app(), port=int(sys.argv[1]), log_level='error')"
)


def started(script: str, settings: Settings, *arguments: str) -> subprocess.Popen[bytes]:
    """A process of the page."""
    paths = os.pathsep.join(filter(None, sys.path))
    here = {"BROADSHEET_HOME": str(settings.home), "BROADSHEET_DATABASE": settings.database, "PYTHONPATH": paths}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env={**os.environ, **here})


def _on_port(settings: Settings, port: int) -> subprocess.Popen[bytes]:
    return started(SERVER, settings, str(port))


def left_over(settings: Settings) -> int:
    """Processes of runs that are still there."""
    mark = f"BROADSHEET_HOME={settings.home}".encode()
    found = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += b"broadsheet.web.worker" in (path / "cmdline").read_bytes() and mark in (path / "environ").read_bytes()
    return found


# --- the worker -------------------------------------------------------------------------------------------------


def killed_workers(settings: Settings, kills: int, runs: int, within: float, draw: random.Random) -> dict[str, float]:
    """Counts of what must not be: runs lost, hanging or done twice, cells measured twice, processes left."""
    engine = open_database(settings.database)
    with session(engine) as db:
        wanted = [queue.add(db, "longproc", {"model": "pocket-2m", "limit": 1, "seed": seed}).id for seed in range(runs)]
    struck = 0
    for _ in range(kills):
        before = _claims(engine)
        process = started(WORKER, settings)
        while _claims(engine) == before:  # it has taken a run, maybe one that the last kill left
            time.sleep(0.05)
        time.sleep(draw.uniform(0, within))
        struck += _under_way(engine)
        process.kill()
        process.wait()
    time.sleep(2)
    left = left_over(settings)
    process = started(WORKER, settings)
    while _waiting(engine):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait()
    with reading(engine) as db:
        found = {run.id: (run.state, run.records, run.error) for run in db.scalars(select(Run))}
        ends = Counter(
            event.run_id
            for event in db.scalars(select(RunEvent).where(RunEvent.kind == "state"))
            if event.data["state"] in queue.ENDED
        )
    path = settings.home / "records" / "evals.jsonl"
    cells = Counter(json.loads(line)["cell"] for line in path.read_text().splitlines())
    said = sum(state == "failed" and error.startswith("its worker was killed") for state, _, error in found.values())
    done = sum(state == "done" and bool(records) for state, records, _ in found.values())
    return {
        "kills in mid-run": struck,
        "runs": runs,
        "runs done": done,
        "runs that failed after three kills": said,
        "runs lost": runs - done - said,
        "runs that ended twice": sum(ends[run_id] != 1 for run_id in wanted),
        "cells measured twice": sum(count - 1 for count in cells.values()),
        "processes left two seconds after the last kill": left,
    }


def _claims(engine: Engine) -> int:
    with reading(engine) as db:
        return db.scalar(select(func.sum(Run.attempt))) or 0


def _under_way(engine: Engine) -> bool:
    with reading(engine) as db:
        return db.scalar(select(Run.id).where(Run.state == "running").limit(1)) is not None


def _waiting(engine: Engine) -> bool:
    with reading(engine) as db:
        return db.scalar(select(Run.id).where(Run.state.in_(("queued", "running"))).limit(1)) is not None


# --- the server -------------------------------------------------------------------------------------------------


class Visitor(threading.Thread):
    """Starts runs, cancels them and votes, and remembers what was answered."""

    def __init__(self, address: str, number: int, engine: Engine, stopping: threading.Event):
        super().__init__(daemon=True)
        self.address, self.number, self.stopping = address, number, stopping
        with session(engine) as db:
            self.account = accounts.account_of(db, f"visitor{number}@example.org").id
            self.cookies = {SESSION_COOKIE: accounts.start_session(db, self.account)}
            self.papers = list(db.scalars(select(Paper.id).order_by(Paper.id)))
        self.asked = self.presses = 0
        self.known: dict[int, tuple[int, str]] = {}  # run -> the seed that was asked for, its state
        self.votes: dict[int, set[bool]] = {}  # paper -> how it may stand: as answered, and as asked for since

    def run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=10, cookies=self.cookies) as browser:
            while not self.stopping.is_set():
                try:
                    self._once(browser)
                except (httpx.HTTPError, IndexError):
                    time.sleep(0.5)  # the server was killed

    def _once(self, browser: httpx.Client) -> None:
        csrf = browser.get("/papers/gear/run").text.split('name="csrf" value="')[1].split('"')[0]
        self.asked += 1
        marker = self.number * 1_000_000 + self.asked
        for _ in range(3):
            paper, on = self.papers[self.presses % len(self.papers)], self.presses // len(self.papers) % 2 == 0
            self.presses += 1
            self.votes.setdefault(paper, {False}).add(on)
            if browser.post(f"/papers/{paper}/vote", data={"csrf": csrf, "on": on}).status_code == 303:
                self.votes[paper] = {on}
        answer = browser.post("/papers/gear/run", data={"csrf": csrf, "options": f"seed={marker}"})
        if answer.status_code != 303:
            return
        run_id = int(answer.headers["location"].rpartition("/")[2])
        self.known[run_id] = (marker, "queued")
        if browser.post(f"/runs/{run_id}/cancel", data={"csrf": csrf}).status_code == 303:
            self.known[run_id] = (marker, "cancelled")


class Onlooker(threading.Thread):
    """Watches a run to its end as a browser does: comes back with the id of the last event it saw."""

    def __init__(self, address: str):
        super().__init__(daemon=True)
        self.address = address
        self.lines: list[str] = []
        self.connections = 0

    def run(self) -> None:
        last = "0"
        while True:
            try:
                with httpx.stream("GET", self.address, headers={"last-event-id": last}, timeout=30) as answer:
                    if answer.status_code == 204:
                        return
                    self.connections += 1
                    found: dict[str, str] = {}
                    for line in answer.iter_lines():
                        name, _, value = line.partition(": ")
                        if line:
                            found[name] = value
                            continue
                        last = found.get("id", last)
                        if found.get("event") == "log":
                            self.lines.append(json.loads(found["data"])["text"])
                        found = {}
            except httpx.HTTPError:
                time.sleep(0.5)


def killed_servers(settings: Settings, kills: int, draw: random.Random) -> dict[str, float]:
    """Counts of what must not be: answers that the database does not know, lines that a watcher missed or got twice."""
    engine = open_database(settings.database)
    with session(engine) as db:
        library.seed(db)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with session(engine) as db:
        queue.add(db, "gear", {"model": "pocket-2m"})
    watched = queue.claim(engine)
    assert watched is not None
    stopping = threading.Event()
    visitors = [Visitor(address, number + 1, engine, stopping) for number in range(4)]
    onlookers = [Onlooker(f"{address}/runs/{watched.id}/events") for _ in range(5)]
    written: list[str] = []

    def write() -> None:
        while not stopping.is_set():
            written.append(f"line {len(written)}")
            queue.tell(engine, watched.id, watched.attempt, [written[-1]])
            time.sleep(0.05)

    writer = threading.Thread(target=write, daemon=True)
    server = started(SERVER, settings, str(port))
    for thread in (*visitors, *onlookers, writer):
        thread.start()
    for _ in range(kills):
        _answers(address)
        time.sleep(draw.uniform(0.2, 2))
        server.kill()
        server.wait()
        server = started(SERVER, settings, str(port))
    _answers(address)
    time.sleep(1)
    stopping.set()
    for thread in (*visitors, writer):
        thread.join()
    queue.finish(engine, watched.id, watched.attempt, "done", log="done")
    for onlooker in onlookers:
        onlooker.join(60)
    server.terminate()
    server.wait()
    with reading(engine) as db:
        found = {run.id: (run.options.get("seed"), run.state) for run in db.scalars(select(Run))}
        stand = set(db.execute(select(Mark.account_id, Mark.paper_id).where(Mark.kind == "vote")).all())
        shown = dict(db.execute(select(Paper.id, Paper.votes)).all())
    counted = Counter(paper for _, paper in stand)
    votes = [((visitor.account, paper) in stand, may) for visitor in visitors for paper, may in visitor.votes.items()]
    known = {run_id: told for visitor in visitors for run_id, told in visitor.known.items()}
    asked = Counter(seed for seed, _ in found.values() if seed is not None)
    return {
        "runs asked for": sum(visitor.asked for visitor in visitors),
        "runs answered": len(known),
        "answers lost": sum(found.get(run_id) != told and told[1] == "cancelled" for run_id, told in known.items())
        + sum(run_id not in found for run_id in known),
        "runs made twice of one request": sum(count - 1 for count in asked.values()),
        "votes asked for": sum(visitor.presses for visitor in visitors),
        "votes that do not stand as answered": sum(stands not in may for stands, may in votes),
        "papers that show another number than they have": sum(shown[paper] != counted[paper] for paper in shown),
        "lines written": len(written) + 1,
        "connections of watchers": sum(onlooker.connections for onlooker in onlookers),
        "watchers that missed a line or got one twice": sum(onlooker.lines != [*written, "done"] for onlooker in onlookers),
    }


def _answers(address: str) -> None:
    while True:
        with suppress(httpx.HTTPError):
            httpx.get(f"{address}/runs", timeout=10)
            return
        time.sleep(0.2)


# --- the sender -------------------------------------------------------------------------------------------------


def killed_senders(settings: Settings, kills: int, seed: int) -> dict[str, float]:
    """Counts of what must not be: digests that somebody got twice, or did not get though nothing says so."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "web"))
    from sending import killed_sends

    got, ended, died = killed_sends(settings.home, settings.database, 60, kills, seed)
    sent = {email for email, state in ended.items() if state == "sent"}
    return {
        "kills while mail went out": died,
        "subscribers": len(ended),
        "digests sent": len(sent),
        "left alone as unknown": list(ended.values()).count("unknown"),
        "subscribers who got a digest twice": sum(len(mails) > 1 for mails in got.values()),
        "digests lost without a word": len(sent - set(got)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"worker, server, sender, {', '.join(OUTAGES)}; default: all")
    parser.add_argument("--times", type=int, default=10, help="kills or outages")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--within", type=float, default=20, help="a worker is killed so many seconds after it took a run")
    parser.add_argument("--database", default="", help="default: a new SQLite file a part")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    parts: dict[str, Callable[[Settings], dict[str, float]]] = {
        "worker": lambda settings: killed_workers(settings, given.times, given.runs, given.within, draw),
        "server": lambda settings: killed_servers(settings, given.times, draw),
        "sender": lambda settings: killed_senders(settings, given.times, given.seed),
        **{name: partial(outage, times=given.times, start=_on_port) for name, outage in OUTAGES.items()},
    }
    chosen = given.parts or list(parts)
    records = [record for record in (read_json(RESULTS) if RESULTS.exists() else ()) if record.method not in chosen]
    for name in chosen:
        with tempfile.TemporaryDirectory() as home:
            settings = Settings.from_environment({"BROADSHEET_HOME": home}, database=given.database)
            counts = parts[name](settings)
        print(f"{name}, {given.times} times", flush=True)
        for metric, value in counts.items():
            print(f"  {value:>6g}  {metric}")
            kind = given.database.partition(":")[0] or "sqlite"
            records.append(
                Record(
                    paper="", method=name, bench="web_faults", metric=metric, value=value, n=given.times, seed=given.seed,
                    setting={"database": kind}, time=now(), **provenance(),
                )
            )  # fmt: skip
    write_results(records, RESULTS)


if __name__ == "__main__":
    main()
