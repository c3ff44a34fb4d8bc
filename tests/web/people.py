"""What the tests of accounts and the digest share: a page, its outbox, and pressing buttons as a browser does."""

from __future__ import annotations

import re
from datetime import date
from email import message_from_bytes
from email.policy import default
from urllib.parse import urlsplit

from opened import open_site

from broadsheet.web.db import session
from broadsheet.web.tables import Paper, utcnow


def open_page(folder, database_url, **given):
    """A client of a page with made papers in that database ("": SQLite in ``folder``): some, and one a day of a week."""
    client = open_site(folder, 30, database=database_url, **given)
    with session(client.app.state.engine) as db:
        for day in range(22, 29):
            new = {"title_key": "news", "published": utcnow(), "updated": utcnow(), "day": date(2026, 11, day)}
            db.add(Paper(id=8000 + day, title=f"News of the {day}th", **new))
    client.folder = folder
    return client


def csrf_of(client, path="/subscribe"):
    """A token as the browser's own form has it."""
    return re.search(r'name="csrf" value="([0-9a-f]{64})"', client.get(path).text)[1]


def press(client, form, action, token="", **fields):
    """Loads the page with the form and sends it."""
    return client.post(action, data={"csrf": token or csrf_of(client), **fields})


def outbox(folder):
    """The mails that were left as files, oldest first."""
    files = sorted((folder / "outbox").glob("*.eml"), key=lambda file: file.stat().st_mtime_ns)
    return [message_from_bytes(file.read_bytes(), policy=default) for file in files]


def sign_in(client, email, folder=None, **fields):
    """Asks for a link, reads the mail, presses the button."""
    folder = folder or client.folder
    before = len(outbox(folder))
    press(client, "/sign-in", "/sign-in", email=email, **fields)
    mail = outbox(folder)[before]
    link = urlsplit(re.search(r"http\S+", mail.get_body().get_content())[0])
    return press(client, f"{link.path}?{link.query}", link.path, **fields)
