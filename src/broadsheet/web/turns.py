"""Who works when: a few pages are made at once and the others wait in the order they were asked for.

Threads of one Python share one interpreter. Twelve that make a page each finish no sooner than two, lose a good part of
their time handing the interpreter on, and the slowest of the twelve keeps its visitor longest. What waits for its turn holds
no thread. Forms have turns of their own: they wait for the database's lock or for a mail server, and pages must not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from inspect import iscoroutinefunction
from typing import Any

from anyio.lowlevel import RunVar
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from sqlalchemy import Engine

from .security import READING

#: Pages that are made at once: from SQLite, which works in our own threads, one is made while it looks things up for the
#: other; a database elsewhere is mostly waited for.
PAGES, PAGES_FROM_ELSEWHERE = 2, 6
#: Forms that are at work at once.
FORMS = 8
#: Threads for these, and for what has no turns: who somebody is, and whether all is well.
THREADS = max(PAGES, PAGES_FROM_ELSEWHERE) + FORMS + 2


class _Turns:
    def __init__(self, pages: int):
        self.pages, self.forms = asyncio.Semaphore(pages), asyncio.Semaphore(FORMS)


_of_loop: RunVar[_Turns] = RunVar("turns")


def _turns(engine: Engine) -> _Turns:
    """Of the event loop that asks: its threads are shared by all that runs in it."""
    found = _of_loop.get(None)
    if found is None:
        found = _Turns(PAGES if engine.dialect.name == "sqlite" else PAGES_FROM_ELSEWHERE)
        _of_loop.set(found)
    return found


class InTurn(APIRoute):
    """A route that is answered in turn. Endpoints that are coroutines do not compute: they wait for nobody."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if iscoroutinefunction(self.endpoint):
            return handler

        async def in_turn(request: Request) -> Response:
            turns = _turns(request.app.state.engine)
            async with turns.pages if request.method in READING else turns.forms:
                return await handler(request)

        return in_turn


def router(**given: Any) -> APIRouter:
    """A router whose routes are answered in turn."""
    return APIRouter(route_class=InTurn, **given)
