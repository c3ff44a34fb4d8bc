"""Live progress over real connections: many watchers, one who looks; and in a real browser."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from contextlib import suppress

import httpx
import pytest
from queues import at_work, cheap_worker, client_of, seen, start, until

from broadsheet.web import live, queue, usage
from broadsheet.web.db import session

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def site(tmp_path):
    """(the application, its address), served by uvicorn."""
    import uvicorn

    app = client_of(tmp_path / "home").app
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield app, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


class Watcher:
    """Reads server-sent events, as the standard says."""

    def __init__(self):
        self.events: list[tuple[int, str, dict]] = []
        self.comments = 0

    async def watch(self, client, address, headers=None, most=10**9):
        async with client.stream("GET", address, headers=headers or {}) as answer:
            assert answer.status_code == 200, answer.status_code
            assert answer.headers["content-type"].startswith("text/event-stream")
            found: dict[str, str] = {}
            async for line in answer.aiter_lines():
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    found[name] = value
                elif found:
                    self.events.append((int(found["id"]), found["event"], json.loads(found["data"])))
                    found = {}
                    if len(self.events) >= most:
                        return self
        return self


def client():
    return httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None))


def texts(watcher):
    return [data["text"] for _, kind, data in watcher.events if kind == "log"]


def test_two_hundred_watch_and_one_looks(site, monkeypatch):
    app, address = site
    run_id = start(app.state.engine)
    run = queue.claim(app.state.engine)
    looks = []
    look = live.Watch._look
    monkeypatch.setattr(live.Watch, "_look", lambda self: looks.append(time.monotonic()) or look(self))

    async def all_of_them():
        async with client() as browser:
            watchers = [Watcher() for _ in range(200)]
            tasks = [asyncio.create_task(w.watch(browser, f"{address}/runs/{run_id}/events")) for w in watchers]
            while getattr(app.state, "hub", None) is None or app.state.hub.addresses.total() < 200:
                await asyncio.sleep(0.05)
            began = time.monotonic()
            for step in range(5):
                told = [f"line {step}"], {"value": step / 5, "text": f"{step} of 5"}
                await asyncio.to_thread(queue.tell, app.state.engine, run.id, run.attempt, *told)
                await asyncio.sleep(0.5)
            await asyncio.to_thread(queue.finish, app.state.engine, run.id, run.attempt, "done", log="done")
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
            return watchers, time.monotonic() - began

    watchers, seconds = asyncio.run(all_of_them())
    for watcher in watchers:
        assert texts(watcher) == [*(f"line {step}" for step in range(5)), "done"]
        assert watcher.events[-1][1:] == ("state", {"state": "done"})
        ids = [number for number, _, _ in watcher.events]
        assert ids == sorted(set(ids))
        assert any(kind == "progress" for _, kind, _ in watcher.events)
    assert len(looks) < 20 + 3 * seconds / live.LOOK  # as if there were one of them
    until(lambda: not app.state.hub.watches and not app.state.hub.addresses)


def test_who_comes_back_gets_what_was_missed(site):
    app, address = site
    run_id = start(app.state.engine)
    run = queue.claim(app.state.engine)
    queue.tell(app.state.engine, run.id, run.attempt, ["one", "two"])

    async def gone_and_back():
        async with client() as browser:
            here = f"{address}/runs/{run_id}/events"
            first = await Watcher().watch(browser, here, most=3)  # queued, running, one
            assert texts(first) == ["one"]
            await asyncio.to_thread(queue.tell, app.state.engine, run.id, run.attempt, ["three"])
            await asyncio.to_thread(queue.finish, app.state.engine, run.id, run.attempt, "done", log="done")
            last = {"last-event-id": str(first.events[-1][0])}
            second = await Watcher().watch(browser, here, headers=last)
            assert texts(second) == ["two", "three", "done"]
            third = await Watcher().watch(browser, f"{here}?after={first.events[-1][0]}")
            assert texts(third) == texts(second)
            end = {"last-event-id": str(second.events[-1][0])}
            assert (await browser.get(here, headers=end)).status_code == 204
            for odd in ("x", "-1", "9" * 50, "\u00e9".encode()):
                assert texts(await Watcher().watch(browser, here, headers={"last-event-id": odd})) == ["one", *texts(second)]

    asyncio.run(gone_and_back())


def test_a_quiet_run_keeps_its_connections_and_a_full_house_says_so(site, monkeypatch):
    monkeypatch.setattr(live, "HEARTBEAT", 0.2)
    monkeypatch.setattr(live, "MOST_OF_ONE", 2)
    app, address = site
    run_id = start(app.state.engine)

    async def quiet():
        async with client() as browser:
            here = f"{address}/runs/{run_id}/events"
            watchers = [Watcher(), Watcher()]
            tasks = [asyncio.create_task(watcher.watch(browser, here)) for watcher in watchers]
            while not all(watcher.comments >= 2 for watcher in watchers):
                await asyncio.sleep(0.05)
            refused = await browser.get(here)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    asyncio.run(quiet())
    until(lambda: not app.state.hub.watches and not app.state.hub.addresses)  # nothing is left of who went


def test_a_database_that_refuses_for_a_while_is_looked_at_again(site, monkeypatch):
    app, address = site
    run_id = start(app.state.engine)
    looks = []
    look = live.Watch._look

    def refusing(self):
        looks.append(1)
        if len(looks) < 3:
            raise OSError("no connection")
        return look(self)

    monkeypatch.setattr(live.Watch, "_look", refusing)

    async def waits():
        async with client() as browser:
            return await Watcher().watch(browser, f"{address}/runs/{run_id}/events", most=1)

    assert asyncio.run(waits()).events[0][1:] == ("state", {"state": "queued"})


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as made:
        browser = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_in_a_browser_a_run_is_started_watched_and_cancelled(site, chromium, monkeypatch):
    app, address = site
    monkeypatch.setattr(usage, "options", lambda slug: frozenset())  # the cheap bench has its own
    context = chromium.new_context()
    context.set_default_timeout(60_000)
    tab = context.new_page()
    problems: list[str] = []
    missing = "Failed to load resource"  # of what is our own the response tells; a browser also wants /favicon.ico
    tab.on("response", lambda got: problems.append(got.url) if got.status >= 400 and "favicon" not in got.url else None)
    tab.on("console", lambda said: problems.append(said.text) if said.type == "error" and missing not in said.text else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    with at_work(cheap_worker(app.state.settings)):
        tab.route("**/plot.svg", lambda route: route.abort())  # it would be drawn first
        tab.goto(f"{address}/papers/gear")
        tab.get_by_text("On your own model").click()
        tab.get_by_label("Options").fill("steps=40\npause=0.1")
        tab.get_by_role("button", name="Run", exact=True).click()
        tab.wait_for_url(f"{address}/runs/1")
        tab.get_by_text("full: measuring (1 of 2)").wait_for()
        tab.get_by_text("gear: measuring (2 of 2)").wait_for()
        until(lambda: tab.locator("#run-progress").evaluate("bar => bar.value") > 0.6)
        assert tab.get_by_text("full: measuring (1 of 2)").count() == 1
        tab.get_by_role("button", name="Cancel").click()
        tab.locator("#run-state", has_text=re.compile("^cancelled$")).wait_for()
        assert seen(app.state.engine, 1).state == "cancelled"
        tab.goto(f"{address}/papers/gear/run")
        tab.get_by_label("Options").fill("steps=10\npause=0.1")
        tab.get_by_role("button", name="Start").click()
        tab.get_by_role("cell", name="50.0 %").first.wait_for()  # the table comes by itself
        assert tab.locator("#run-state").inner_text() == "done"
    assert problems == []
    context.close()


def test_without_javascript_a_run_is_started_watched_and_cancelled(site, chromium, monkeypatch):
    app, address = site
    monkeypatch.setattr(usage, "options", lambda slug: frozenset())
    context = chromium.new_context(java_script_enabled=False)
    context.set_default_timeout(60_000)
    tab = context.new_page()
    with at_work(cheap_worker(app.state.settings)):
        tab.goto(f"{address}/papers/gear/run")
        tab.get_by_label("Options").fill("steps=100\npause=0.5")
        tab.get_by_role("button", name="Start").click()
        tab.get_by_text("full: measuring (1 of 2)").wait_for()  # the page loads itself again
        tab.get_by_role("button", name="Cancel").click()
        tab.locator("#run-state", has_text=re.compile("^cancelled$")).wait_for()
    context.close()
    with session(app.state.engine) as db:
        assert db.scalar(queue.select(queue.Run.state)) == "cancelled"
