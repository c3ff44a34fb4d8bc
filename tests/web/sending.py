"""What tests and benchmarks of sending share: a real mail server, subscribers, and senders that are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from email import message_from_bytes
from email.policy import default
from pathlib import Path

from sqlalchemy import select

from broadsheet.web import digest
from broadsheet.web.db import open_database, session
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Delivery, Paper, Subscription, utcnow

ISSUE = digest.Issue.named("2026-11-28")
HERE = Path(__file__).parent


@contextmanager
def smtp(folder, *options):
    """A mail server in a process of its own: its address, and the texts it took by receiver."""
    command = [sys.executable, str(HERE / "smtp_server.py"), str(folder), *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield f"smtp://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def taken(folder):
    """Receiver -> the mails that the server took for it."""
    found = {}
    for file in folder.iterdir() if folder.exists() else ():
        if not file.name.startswith("."):
            found.setdefault(file.name.split()[0], []).append(message_from_bytes(file.read_bytes(), policy=default))
    return found


def subscribers(engine, *emails, frequency="daily"):
    with session(engine) as db:
        for email in emails:
            digest.start(db, email, frequency)


def states(engine):
    with session(engine) as db:
        rows = select(Subscription.email, Delivery.state).join(Delivery, Delivery.subscription_id == Subscription.id)
        return dict(db.execute(rows).tuples().all())


def killed_sends(folder, database, count, kills, seed, slow="0.01"):
    """Starts senders and kills them with SIGKILL at random moments, then lets one finish; what the server took, and the
    deliveries' states."""
    box = folder / "taken"
    settings = Settings.from_environment({"BROADSHEET_HOME": str(folder)}, database=database)
    engine = open_database(settings.database)
    subscribers(engine, *(f"p{number:03}@example.org" for number in range(count)))
    with session(engine) as db:
        new = {"title_key": "x", "published": utcnow(), "updated": utcnow(), "day": ISSUE.since}
        db.add(Paper(title="News", **new))
    roll, died = random.Random(seed), 0
    with smtp(box, "--slow", slow) as server:
        environment = {
            **os.environ, "BROADSHEET_HOME": str(folder), "BROADSHEET_DATABASE": settings.database,
            "BROADSHEET_SMTP": server, "PYTHONPATH": os.pathsep.join(sys.path),
        }  # fmt: skip
        code = "from broadsheet.cli.digest import digest; digest(['send', '--issue', '2026-11-28'])"
        for number in range(kills + 1):
            before = len(taken(box))
            process = subprocess.Popen(
                [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if number == kills:
                process.wait(timeout=120)
                break
            until = time.monotonic() + 60
            while len(taken(box)) < before + roll.randint(1, 3) and process.poll() is None and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(roll.random() * 0.02)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                died += 1
            process.wait()
    return taken(box), states(engine), died
