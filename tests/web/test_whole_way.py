"""In a real browser, with and without JavaScript: search, sign in, vote, subscribe, get a digest by mail, end it."""

from __future__ import annotations

import re
import shutil
import socket
import threading

import pytest
from people import open_page
from sending import smtp, taken
from sqlalchemy import select

from broadsheet.web import digest
from broadsheet.web.db import session
from broadsheet.web.tables import Mark, Subscription

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]


@pytest.fixture
def served(tmp_path):
    """A page at an address of its own that sends mail by a real server."""
    import uvicorn

    with smtp(tmp_path / "taken") as way_out, socket.create_server(("127.0.0.1", 0)) as listening:
        client = open_page(tmp_path, "", url=f"http://127.0.0.1:{listening.getsockname()[1]}", smtp=way_out)
        server = uvicorn.Server(uvicorn.Config(client.app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.05)
        yield client, tmp_path / "taken"
        server.should_exit = True
        thread.join(10)


def link_in(box, email, subject):
    """The first address in the newest mail with that subject."""
    [found] = [mail for mail in taken(box)[email] if subject in mail["Subject"]]
    return re.search(r"http\S+", found.get_body(("plain",)).get_content())[0]


@pytest.mark.parametrize("scripts", [True, False])
def test_the_whole_way(served, scripts):
    client, box = served
    url, engine = client.app.state.settings.url, client.app.state.engine
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(java_script_enabled=scripts)
        context.set_default_timeout(60_000)
        tab, problems = context.new_page(), []
        tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))

        tab.goto(f"{url}/")
        tab.get_by_label("Search the papers").fill("attention")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**/search?q=attention")
        tab.locator("mark").first.wait_for()

        tab.goto(f"{url}/sign-in")
        tab.get_by_label("Mail address").fill("ada@example.org")
        tab.get_by_role("button", name="Send me the link").click()
        tab.get_by_text("Look into your mail").wait_for()
        tab.goto(link_in(box, "ada@example.org", "Your link"))
        tab.get_by_role("button", name="Sign in with this browser").click()

        tab.goto(f"{url}/")
        first = tab.locator("article.paper").first
        first.get_by_role("button", name="votes").click()
        tab.locator("button[aria-pressed=true]", has_text=re.compile("▲ 1 ")).wait_for()  # made papers' votes are nobody's
        with session(engine) as db:
            assert db.scalars(select(Mark.kind)).all() == ["vote"]
        tab.goto(f"{url}/account")
        tab.get_by_role("heading", name="Votes").wait_for()

        tab.goto(f"{url}/subscribe")
        tab.get_by_label("every day").check()
        tab.get_by_role("button", name="Subscribe").click()
        tab.get_by_text("was it you").wait_for()
        tab.goto(link_in(box, "ada@example.org", "was it you"))
        tab.get_by_role("button", name="Start it").click()
        tab.get_by_text("That is settled").wait_for()

        parts = (engine, client.app.state.settings, client.app.state.templates)
        assert str(digest.send(*parts, digest.Issue.named("2026-11-29"))) == "1 sent"
        [mail] = [mail for mail in taken(box)["ada@example.org"] if "List-Id" in mail]
        assert client.post(mail["List-Unsubscribe"].strip("<>").removeprefix(url)).status_code == 200  # its mail program
        with session(engine) as db:
            assert db.scalar(select(Subscription.state)) == "stopped"
        assert str(digest.send(*parts, digest.Issue.named("2026-11-28"))) == "nothing to send"
        assert problems == []
        browser.close()
