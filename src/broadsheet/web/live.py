"""Live progress: many visitors watch a run, and one of us looks at the database for all of them.

Server-sent events as the HTML standard has them: what a browser missed while it was away it asks for by ``Last-Event-ID``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator

from sqlalchemy import Engine, select

from .db import reading
from .queue import ENDED
from .tables import Run, RunEvent

log = logging.getLogger("broadsheet.live")

#: Seconds between looks at the database, and between comments that keep a quiet connection open.
LOOK, HEARTBEAT = 0.4, 15.0
#: Connections that may be open at once, and from one address.
MOST, MOST_OF_ONE = 500, 250


class Watch:
    """One run, watched by at least one visitor."""

    def __init__(self, engine: Engine, run_id: int):
        self.engine, self.run_id = engine, run_id
        self.watchers = 0
        self.last = 0
        self.ended = False
        self.told: list[tuple[int, str, bytes]] = []  # id, kind, as it is sent
        self.news = asyncio.Event()
        self.task = asyncio.create_task(self._follow())

    async def stream(self, after: int) -> AsyncIterator[bytes]:
        """What was told after the event ``after``, then what is told, to the run's end."""
        while True:
            news, ended = self.news, self.ended
            if fresh := [(number, sent) for number, _, sent in self.told if number > after]:
                after = fresh[-1][0]
                yield b"".join(sent for _, sent in fresh)
            if ended:
                return
            try:
                await asyncio.wait_for(news.wait(), HEARTBEAT)
            except TimeoutError:
                yield b": still here\n\n"

    async def _follow(self) -> None:
        while not self.ended:
            try:
                events, state = await asyncio.to_thread(self._look)
            except Exception as error:  # whatever it is: they wait for us
                log.warning("run %d: cannot look at the database, trying again: %s", self.run_id, type(error).__name__)
                await asyncio.sleep(5 * LOOK)
                continue
            self.ended = state is None or state in ENDED
            if events:
                self.last = events[-1].id
                if any(event.kind == "progress" for event in events):  # who comes now need not hear the older ones
                    self.told = [told for told in self.told if told[1] != "progress"]
                self.told += [(event.id, event.kind, encoded(event)) for event in events]
            if events or self.ended:
                self.news.set()
                self.news = asyncio.Event()
            if not self.ended:
                await asyncio.sleep(LOOK)

    def _look(self) -> tuple[list[RunEvent], str | None]:
        with reading(self.engine) as db:
            state = db.scalar(select(Run.state).where(Run.id == self.run_id))  # first: an end is told before it is seen
            newer = select(RunEvent).where(RunEvent.run_id == self.run_id, RunEvent.id > self.last).order_by(RunEvent.id)
            return list(db.scalars(newer)), state


class Hub:
    """All that is watched in this process."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.watches: dict[int, Watch] = {}
        self.addresses: Counter[str] = Counter()

    def full(self, address: str) -> bool:
        """Whether nobody, or nobody at this address, may watch now."""
        return self.addresses.total() >= MOST or self.addresses[address] >= MOST_OF_ONE

    async def nothing_left(self, run_id: int, after: int) -> bool:
        """Whether nothing will come after the event ``after``: the run has ended, or there is none."""
        watch = self.watches.get(run_id)
        if watch is not None and not watch.ended:
            return False

        def look() -> bool:
            with reading(self.engine) as db:
                state = db.scalar(select(Run.state).where(Run.id == run_id))
                newer = select(RunEvent.id).where(RunEvent.run_id == run_id, RunEvent.id > after).limit(1)
                return state is None or (state in ENDED and db.scalar(newer) is None)

        return await asyncio.to_thread(look)

    async def watch(self, run_id: int, after: int, address: str) -> AsyncIterator[bytes]:
        """A run's events to one visitor, until the run ends or the visitor goes."""
        watch = self.watches.get(run_id)
        if watch is None or watch.ended:
            watch = self.watches[run_id] = Watch(self.engine, run_id)
        watch.watchers += 1
        self.addresses[address] += 1
        try:
            async for chunk in watch.stream(after):
                yield chunk
        finally:
            watch.watchers -= 1
            self.addresses[address] -= 1
            if not self.addresses[address]:
                del self.addresses[address]
            if not watch.watchers:
                watch.task.cancel()
                if self.watches.get(run_id) is watch:
                    del self.watches[run_id]


def encoded(event: RunEvent) -> bytes:
    """As it goes over the wire; JSON of one line holds no line's end."""
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(event.data)}\n\n".encode()
