"""Pages are made in turn, and forms that wait hold none of them up."""

from __future__ import annotations

import threading
import time

import anyio
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine

from broadsheet.web import turns


@pytest.fixture
def app():
    """Pages that say how many were made at once, and forms that wait for the test."""
    app, router = FastAPI(), turns.router()
    app.state.engine = create_engine("sqlite://")
    app.state.at_once, app.state.most, app.state.lock = 0, 0, threading.Lock()
    app.state.let_go = threading.Event()

    @router.get("/page/{number}")
    def page(number: int):
        with app.state.lock:
            app.state.at_once += 1
            app.state.most = max(app.state.most, app.state.at_once)
        time.sleep(0.005)
        with app.state.lock:
            app.state.at_once -= 1
        if number == 13:
            raise ValueError("of a page")
        return number

    @router.get("/waits")
    async def waits():
        with anyio.fail_after(5):
            while not app.state.let_go.is_set():
                await anyio.sleep(0.01)

    @router.post("/form")
    def form():
        assert app.state.let_go.wait(10)

    app.include_router(router)
    return app


def client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://here")


@pytest.mark.anyio
async def test_only_so_many_pages_are_made_at_once(app):
    answers = []
    async with client(app) as browser, anyio.create_task_group() as group:

        async def ask(number):
            answers.append((await browser.get(f"/page/{number}")).status_code)

        for number in range(20):
            group.start_soon(ask, number)
    assert app.state.most == turns.PAGES
    assert sorted(answers) == [200] * 19 + [500]  # one that fails gives its turn back


@pytest.mark.anyio
async def test_pages_wait_for_no_form_and_for_nothing_that_is_a_coroutine(app):
    async with client(app) as browser, anyio.create_task_group() as group:
        for _ in range(3 * turns.FORMS):
            group.start_soon(browser.post, "/form")
            group.start_soon(browser.get, "/waits")
        await anyio.sleep(0.1)
        with anyio.fail_after(5):
            for number in range(4):
                assert (await browser.get(f"/page/{number}")).json() == number
        assert not app.state.let_go.is_set()
        app.state.let_go.set()


@pytest.fixture
def anyio_backend():
    return "asyncio"
