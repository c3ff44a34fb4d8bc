"""What outages cost the web page, for `web_faults`: a database that is locked or full, a mail server that refuses, a feed
that does not come. Each function brings the outage about so many times, ends it each time, and returns counts of what must
not be.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from sqlalchemy import Engine, func, select, update
from sqlalchemy.engine import make_url

from broadsheet.web import accounts, digest, ingest, library
from broadsheet.web.db import open_database, reading, session
from broadsheet.web.fetching import ATTEMPTS, Fetcher
from broadsheet.web.render import templates
from broadsheet.web.security import SESSION_COOKIE
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Delivery, Mark, Paper, Subscription, utcnow

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "web"))

#: Starts a server for these settings on this port.
Start = Callable[[Settings, int], "subprocess.Popen[bytes]"]
FIRST = date(2026, 9, 1)


# --- a page that is used while something is wrong -----------------------------------------------------------------


@dataclass
class Visitor:
    """Somebody who votes and reads, and what was answered."""

    address: str
    account: int
    cookies: dict[str, str]
    papers: list[int]
    answers: list[str] = field(default_factory=list)  # such as "vote 303", in order
    votes: dict[int, set[bool]] = field(default_factory=dict)  # paper -> how it may stand
    slowest: float = 0.0

    def vote(self, paper: int) -> None:
        """Votes for a paper; 503 says that nothing was stored."""
        with httpx.Client(base_url=self.address, timeout=60, cookies=self.cookies) as browser:
            csrf = browser.get("/papers/gear/run").text.split('name="csrf" value="')[1].split('"')[0]
            status = browser.post(f"/papers/{paper}/vote", data={"csrf": csrf, "on": True}).status_code
        self.answers.append(f"vote {status}")
        self.votes[paper] = {True} if status == 303 or self.votes.get(paper) == {True} else {False}

    def read(self, until: threading.Event) -> None:
        """Reads pages, one after the other."""
        with httpx.Client(base_url=self.address, timeout=60) as browser:
            for paper in self.papers:
                begun = time.monotonic()
                self.answers.append(f"page {browser.get(f'/papers/{paper}', follow_redirects=True).status_code}")
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if until.wait(0.05):
                    return

    def mistaken(self, engine: Engine) -> int:
        """Votes that do not stand as answered."""
        with reading(engine) as db:
            stand = set(db.scalars(select(Mark.paper_id).where(Mark.account_id == self.account, Mark.kind == "vote")))
        return sum((paper in stand) not in may for paper, may in self.votes.items())


@dataclass
class Site:
    """A page at work: its database with papers, a server, a mail server, and somebody who uses it."""

    settings: Settings
    engine: Engine
    visitor: Visitor
    box: Path
    said: list[list[str]] = field(default_factory=list)  # what each command that failed wrote on standard error

    def command(self, *arguments: str) -> int:
        """Runs a command as it is typed; its exit code."""
        done = subprocess.run(
            [sys.executable, "-c", "from broadsheet.cli import main; main()", *arguments],
            env=environment(self.settings), capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        if done.returncode:
            self.said.append([line for line in done.stderr.splitlines() if line.strip()])
        return done.returncode

    def tattle(self) -> int:
        """Commands that failed and said more than a line, or nothing."""
        return sum(len(lines) != 1 for lines in self.said)


def environment(settings: Settings) -> dict[str, str]:
    """What a process of the page is told."""
    return {
        **os.environ, "BROADSHEET_HOME": str(settings.home), "BROADSHEET_DATABASE": settings.database,
        "BROADSHEET_SMTP": settings.smtp, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip


@contextmanager
def site(settings: Settings, start: Start, subscribers: int) -> Iterator[Site]:
    """The page of these settings, at work."""
    from sending import smtp

    engine = open_database(settings.database)
    with session(engine) as db:
        library.seed(db)
        account = accounts.account_of(db, "visitor@example.org").id
        cookies = {SESSION_COOKIE: accounts.start_session(db, account)}
        papers = list(db.scalars(select(Paper.id).order_by(Paper.id)))
        for number in range(subscribers):
            digest.start(db, f"p{number:02}@example.org", "daily")
    with ExitStack() as stack:
        box = settings.home / "taken"
        settings = replace(settings, smtp=stack.enter_context(smtp(box)))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = start(settings, port)
        stack.callback(server.wait)
        stack.callback(server.terminate)
        stack.callback(engine.dispose)
        address = f"http://127.0.0.1:{port}"
        while True:
            with suppress(httpx.HTTPError):  # the first paper's page reads the records, as `serve` does when it starts
                httpx.get(f"{address}/papers/gear", timeout=60)
                break
            time.sleep(0.2)
        yield Site(settings, engine, Visitor(address, account, cookies, papers), box)


def news(engine: Engine, day: date) -> None:
    """A paper that a day's digest tells of."""
    with session(engine) as db:
        made = {"title_key": f"news{day}", "published": utcnow(), "updated": utcnow(), "day": day}
        db.add(Paper(title=f"News of {day}", **made))


def file_of(folder: Path, name: str, count: int) -> Path:
    """A file of papers."""
    path = folder / f"{name}.jsonl"
    row = {"authors": ["Ada Vogel"], "abstract": "Text of the made kind. " * 30}
    path.write_text("".join(json.dumps({**row, "title": f"Paper {i} of file {name}"}) + "\n" for i in range(count)))
    return path


def stored(engine: Engine, files: dict[str, int]) -> tuple[int, int]:
    """Of papers in files (name -> how many): how many are missing, and how many are there more than once."""
    with reading(engine) as db:
        found = Counter(db.scalars(select(Paper.title).where(Paper.title.like("Paper % of file %"))))
    wanted = [f"Paper {i} of file {name}" for name, count in files.items() for i in range(count)]
    return sum(not found[title] for title in wanted), sum(count > 1 for count in found.values())


def mailed(engine: Engine, box: Path, issues: int) -> dict[str, float]:
    """Digests that were lost without a word, left alone as unknown, and that somebody got twice."""
    from sending import taken

    got = Counter((to, mail["Subject"]) for to, mails in taken(box).items() for mail in mails)
    with reading(engine) as db:
        states = Counter(db.scalars(select(Delivery.state)))
        people = db.scalar(select(func.count()).select_from(Subscription)) or 0
    return {
        "digests due": issues * people,
        "digests sent": states["sent"],
        "digests left alone as unknown": states["unknown"],
        "digests lost without a word": max(0, issues * people - states["unknown"] - len(got)),
        "digests that somebody got twice": sum(count - 1 for count in got.values()),
    }


# --- the database -----------------------------------------------------------------------------------------------


def locked(settings: Settings, times: int, start: Start) -> dict[str, float]:
    """Another connection holds the lock for writing: for two seconds, which everybody waits, and until all have given up."""
    path = make_url(settings.database).database
    if not path or not settings.database.startswith("sqlite"):
        raise SystemExit("'locked' is about SQLite's one lock: PostgreSQL has locks of rows")
    files: dict[str, int] = {}
    days, short, long = [], Counter[str](), Counter[str]()
    with site(settings, start, subscribers=5) as page:
        for number in range(2 * times):
            longer = number % 2 == 1
            seen = long if longer else short
            day, name = FIRST + timedelta(days=number), f"locked-{number}"
            files[name] = 20
            days.append(day)
            news(page.engine, day)
            commands = [["ingest", str(file_of(page.settings.home, name, 20))], ["digest", "send", "--issue", f"{day}"]]
            over, before, failed = threading.Event(), len(page.visitor.answers), len(page.said)
            lock = sqlite3.connect(path, isolation_level=None)
            lock.execute("begin immediate")
            reader = threading.Thread(target=page.visitor.read, args=(over,))
            voted = page.visitor.papers[3 * number : 3 * number + 3]
            writers = [threading.Thread(target=page.visitor.vote, args=(paper,)) for paper in voted]
            writers += [threading.Thread(target=page.command, args=command) for command in commands]
            for job in (reader, *writers):
                job.start()
            time.sleep(2)
            if longer:
                for job in writers:  # until all have given up
                    job.join()
            lock.rollback()
            lock.close()
            over.set()
            for job in (reader, *writers):
                job.join()
            seen.update(page.visitor.answers[before:])
            seen["commands that failed"] += len(page.said) - failed
            for paper in voted:  # and again: the lock is gone
                page.visitor.vote(paper)
            for command in commands:
                page.command(*command)
        missing, twice = stored(page.engine, files)
        return {
            "pages read while it was locked": short["page 200"] + long["page 200"],
            "pages that did not come": sum(n for seen in (short, long) for what, n in seen.items() if what[:4] == "page")
            - short["page 200"] - long["page 200"],
            "seconds that the slowest page took": round(page.visitor.slowest, 2),
            "short locks: votes that were not taken": 3 * times - short["vote 303"],
            "short locks: commands that failed": short["commands that failed"],
            "long locks: votes answered 'try again'": long["vote 503"],
            "long locks: votes answered with anything else": 3 * times - long["vote 503"],
            "long locks: commands that gave up": long["commands that failed"],
            "commands that gave up with more than a line": page.tattle(),
            "votes that do not stand as answered": page.visitor.mistaken(page.engine),
            "votes that do not stand at the end": sum(may != {True} for may in page.visitor.votes.values()),
            "papers lost": missing,
            "papers stored twice": twice,
            **mailed(page.engine, page.box, len(days)),
        }  # fmt: skip


def full(settings: Settings, times: int, start: Start) -> dict[str, float]:
    """The disk of the database, a tmpfs of 6 MB, is full."""
    disk = settings.home / "disk"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode:
        raise SystemExit("'full' mounts a small disk, which takes the right to")
    files: dict[str, int] = {}
    days, seen = [], Counter[str]()
    try:
        with site(replace(settings, database=f"sqlite:///{disk / 'web.sqlite'}"), start, subscribers=5) as page:
            for number in range(times):
                day, name = FIRST + timedelta(days=number), f"full-{number}"
                files[name] = 40
                days.append(day)
                news(page.engine, day)
                with sqlite3.connect(disk / "web.sqlite") as connection:  # or what is written fits in the log's old pages
                    connection.execute("pragma wal_checkpoint(truncate)")
                connection.close()
                commands = [["ingest", str(file_of(page.settings.home, name, 40))], ["digest", "send", "--issue", f"{day}"]]
                with open(disk / "full", "wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(b"x" * 4096)
                over, before = threading.Event(), len(page.visitor.answers)
                reader = threading.Thread(target=page.visitor.read, args=(over,))
                reader.start()
                voted = page.visitor.papers[3 * number : 3 * number + 3]
                for paper in voted:
                    page.visitor.vote(paper)
                seen["commands that failed"] += sum(bool(page.command(*command)) for command in commands)
                over.set()
                reader.join()
                seen.update(page.visitor.answers[before:])
                (disk / "full").unlink()
                for paper in voted:
                    page.visitor.vote(paper)
                seen["commands that failed afterwards"] += sum(bool(page.command(*command)) for command in commands)
            missing, twice = stored(page.engine, files)
            return {
                "pages read while it was full": seen["page 200"],
                "pages that did not come": sum(n for what, n in seen.items() if what[:4] == "page") - seen["page 200"],
                "votes answered 'try again'": seen["vote 503"],
                "votes answered with anything else": 3 * times - seen["vote 503"] - seen["vote 303"],
                "commands that gave up": seen["commands that failed"],
                "commands that gave up with more than a line": page.tattle(),
                "commands that failed when there was room again": seen["commands that failed afterwards"],
                "votes that do not stand as answered": page.visitor.mistaken(page.engine),
                "votes that do not stand at the end": sum(may != {True} for may in page.visitor.votes.values()),
                "papers lost": missing,
                "papers stored twice": twice,
                **mailed(page.engine, page.box, len(days)),
            }
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# --- mail -------------------------------------------------------------------------------------------------------

#: How a mail server treats addresses that begin so, and how many mails they must have got when it is well again.
REFUSALS = {"fine": 1, "450": 1, "550": 0, "data-450": 1, "data-550": 0, "drop": 1}


def refusing(settings: Settings, times: int, start: Start) -> dict[str, float]:
    """No mail server answers; then one refuses receivers or texts, for now (4xx) or for good (5xx), or hangs up after the
    text; then it is well."""
    from sending import smtp, taken

    engine, made, box = open_database(settings.database), templates(), settings.home / "taken"
    wrong = Counter[str]()
    seen = Counter[str]()
    for number in range(times):
        day = FIRST + timedelta(days=number)
        issue = digest.Issue.named(f"{day}")
        news(engine, day)
        people = {f"{kind}-{number}@example.org": kind for kind in REFUSALS}
        with session(engine) as db:
            for email in people:
                digest.start(db, email, "daily")
        with socket.socket() as deaf, smtp(box) as refuses, smtp(box, "--well") as well:
            deaf.bind(("127.0.0.1", 0))  # and does not listen: refused, and nobody else gets the port
            nobody = f"smtp://127.0.0.1:{deaf.getsockname()[1]}"
            for server in (nobody, refuses, well):
                here = replace(settings, smtp=server)
                digest.retry(engine, here)
                counts = digest.send(engine, here, made, issue).counts
                seen.update(counts)
                if server == nobody:
                    wrong["mails that left though nobody took them"] += sum(counts.values()) - counts.get("later", 0)
        got = taken(box)
        with session(engine) as db:
            rows = select(Subscription.email, Delivery.state, Delivery.error).join(Delivery)
            ended = {email: (state, error) for email, state, error in db.execute(rows.where(Delivery.issue == issue.name))}
            db.execute(update(Subscription).values(state="stopped"))
        for email, kind in people.items():
            state, error = ended.get(email, ("", ""))
            sent = len(got.get(email, ()))
            must = {"550": "refused", "data-550": "refused", "drop": "unknown"}.get(kind, "sent")
            wrong["mails lost"] += sent < REFUSALS[kind]
            wrong["mails that somebody got twice"] += sent > max(1, REFUSALS[kind])
            wrong["mails that a refused address got"] += sent > REFUSALS[kind]
            wrong["deliveries whose state is not what happened"] += state != must
            wrong["reasons that are no line"] += state != "sent" and (not error or "\n" in error)
    engine.dispose()
    return {
        "addresses": times * len(REFUSALS),
        **{f"times '{outcome}'": seen[outcome] for outcome in ("sent", "later", "refused", "unknown")},
        **wrong,
    }


# --- a feed -----------------------------------------------------------------------------------------------------

#: How a feed fails.
WAYS = ("silent", "headers a byte at a time", "text a byte at a time", "torn", "busy")
_OAI = '<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><ListRecords>{}{}</ListRecords></OAI-PMH>'
_RECORD = (
    "<record><header><identifier>oai:made:{name}-{i}</identifier><datestamp>2026-11-01</datestamp></header><metadata>"
    '<dc xmlns="http://purl.org/dc/elements/1.1/"><title>Paper {i} of file {name}</title><creator>Vogel, Ada</creator></dc>'
    "</metadata></record>"
)


class Feed(BaseHTTPRequestHandler):
    """An OAI-PMH server with two pages, whose second one comes in the way that is set."""

    way = ""

    def do_GET(self) -> None:
        name, second = self.path[1:].partition("?")[0], "resumptionToken" in self.path
        records = "".join(_RECORD.format(name=name, i=i) for i in (range(10, 20) if second else range(10)))
        body = _OAI.format(records, "" if second else "<resumptionToken>two</resumptionToken>").encode()
        way = self.way if second else ""
        with suppress(OSError):  # whoever asked had enough
            if way == "silent":
                time.sleep(3)
                return
            self.send_response(503 if way == "busy" else 200)
            self.send_header("content-length", str(len(body)))
            if way == "headers a byte at a time":
                self.flush_headers()
                self.wfile.write(b"x-more: ")
                self._trickle(b"x" * 1000)
            self.end_headers()
            if way == "text a byte at a time":
                self._trickle(body)
            self.wfile.write(body[: len(body) // 2] if way == "torn" else body)

    def _trickle(self, text: bytes) -> None:
        for i in range(len(text)):
            self.wfile.write(text[i : i + 1])
            time.sleep(0.05)

    def log_message(self, *_: object) -> None:
        pass


def starving(settings: Settings, times: int, start: Start) -> dict[str, float]:
    """The second of a feed's two pages does not come, in each of `WAYS`; then it does."""
    engine = open_database(settings.database)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Feed)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    os.environ["BROADSHEET_ALLOW_HOSTS"] = "feed.test"
    deadline, files, slowest = 0.5, dict[str, int](), 0.0
    wrong = Counter({"readings that did not say what went wrong": 0})
    try:
        for number in range(times):
            for way in WAYS:
                name = f"{number}-{WAYS.index(way)}"
                files[name] = 20
                source = ingest.named(f"http://feed.test:{listening.server_address[1]}/{name}", "oai")
                fetcher = Fetcher(deadline=deadline, delay=0.0, sleep=lambda _: None, resolve=lambda *_: ["127.0.0.1"])
                Feed.way, begun = way, time.monotonic()
                try:
                    ingest.read(engine, source, fetcher=fetcher)
                    wrong["readings that did not say what went wrong"] += 1
                except ValueError as error:
                    wrong["reasons that are no line"] += "\n" in str(error) or not str(error)
                slowest = max(slowest, time.monotonic() - begun)
                wrong["first pages that were not kept"] += 20 - stored(engine, {name: 20})[0] != 10
                Feed.way = ""
                ingest.read(engine, source, fetcher=fetcher)
    finally:
        listening.shutdown()
    missing, twice = stored(engine, files)
    engine.dispose()
    return {
        "readings that failed": times * len(WAYS),
        "seconds that the slowest took": round(slowest, 2),
        "seconds that it may take: its deadline, for every attempt": ATTEMPTS * deadline,
        **wrong,
        "papers lost": missing,
        "papers stored twice": twice,
    }


OUTAGES: dict[str, Callable[[Settings, int, Start], dict[str, float]]] = {
    "locked": locked,
    "full": full,
    "smtp": refusing,
    "feed": starving,
}
