"""Answers that are the same for everybody are made once, and again when the data change.

Only what `render` marks as shared is kept, and only for visitors who are not signed in. Whether a copy is still good costs a
few microseconds: SQLite says when another connection wrote (``pragma data_version``); with other databases a copy is good
for a second. Copies carry an ETag (a browser that has the page gets 304) and are compressed once.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from sqlalchemy import Engine
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .render import SHARED
from .security import SESSION_COOKIE

#: Bytes of all copies together, and of the largest that is kept.
ROOM = 64 << 20
LARGEST = 2 << 20
#: Seconds for which a copy is good where the database does not tell of changes.
GOOD_FOR = 1.0
#: Path and query; OWN stands for what one visitor alone gets.
Key = tuple[str, bytes]
OWN: Key = ("", b"")


@dataclass
class Copy:
    """An answer, whole. ``version``: the data's when it was made; ``route``: the template of its address, for metrics."""

    headers: list[tuple[bytes, bytes]]
    body: bytes
    version: object
    route: str
    etag: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.etag = b'W/"' + hashlib.blake2b(self.body, digest_size=12).hexdigest().encode() + b'"'

    @cached_property
    def gzipped(self) -> bytes:
        return gzip.compress(self.body, 5, mtime=0)

    @property
    def nbytes(self) -> int:
        return 2 * len(self.body) + 1000


def data_version(engine: Engine) -> Callable[[], object]:
    """A function whose value changes when the data do."""
    if engine.dialect.name != "sqlite":
        return lambda: int(time.monotonic() / GOOD_FOR)
    if engine.url.database in (None, "", ":memory:"):
        return object  # of one connection nobody can tell
    connection = sqlite3.connect(engine.url.database, isolation_level=None, check_same_thread=False)
    return lambda: connection.execute("pragma data_version").fetchone()[0]


class Cache:
    """Middleware: hands out copies of shared answers. It also answers HEAD, as GET without the body."""

    def __init__(self, app: ASGIApp, engine: Engine):
        self.app = app
        self.version = data_version(engine)
        self.copies: OrderedDict[Key, Copy] = OrderedDict()
        self.nbytes = 0
        self.under_way: dict[Key, asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        key = OWN if _is_somebody(scope) else (scope["path"], scope["query_string"])
        while key in self.copies:
            if self.copies[key].version == self.version():
                self.copies.move_to_end(key)
                scope["route_template"] = self.copies[key].route
                return await _answer(self.copies[key], scope, send)
            if key not in self.under_way:
                break
            await self.under_way[key].wait()  # a page that many want is made again once
        return await self._make(key, scope, receive, send)

    async def _make(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        """Asks the page; what it sends is held back if it may be kept, else passed on as it comes."""
        version, body = self.version(), list[bytes]()
        start: Message | None = None
        asked = {**scope, "method": "GET"}
        done = asyncio.Event()
        if key in self.copies:
            self.under_way[key] = done

        async def hold(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and key != OWN and _may_be_kept(message):
                start = message
            elif start:
                body.append(message.get("body", b""))
            else:
                bare = scope["method"] == "HEAD" and message["type"] == "http.response.body"
                await send({**message, "body": b""} if bare else message)

        try:
            await self.app(asked, receive, hold)
            scope["route_template"] = route = getattr(asked.get("route"), "path", "")
            self._drop(key)
            if start:
                copy = Copy(list(start["headers"]), b"".join(body), version, route)
                self._keep(key, copy)
                await _answer(copy, scope, send)
        finally:
            if self.under_way.get(key) is done:
                del self.under_way[key]
            done.set()

    def _drop(self, key: Key) -> None:
        if old := self.copies.pop(key, None):
            self.nbytes -= old.nbytes

    def _keep(self, key: Key, copy: Copy) -> None:
        if len(copy.body) > LARGEST:
            return
        self._drop(key)
        self.copies[key] = copy
        self.nbytes += copy.nbytes
        while self.nbytes > ROOM:
            self.nbytes -= self.copies.popitem(last=False)[1].nbytes


def _is_somebody(scope: Scope) -> bool:
    return any(name == b"cookie" and SESSION_COOKIE.encode() in value for name, value in scope["headers"])


def _may_be_kept(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return start["status"] == 200 and headers.get("cache-control") == SHARED and "set-cookie" not in headers


async def _answer(copy: Copy, scope: Scope, send: Send) -> None:
    asked = Headers(scope=scope)
    headers = [(name, value) for name, value in copy.headers if name not in (b"content-length", b"vary", b"etag")]
    headers += [(b"etag", copy.etag), (b"vary", b"Accept-Encoding, Cookie")]
    known = asked.get("if-none-match", "")
    if known.strip() == "*" or copy.etag.decode().removeprefix("W/") in (
        t.strip().removeprefix("W/") for t in known.split(",")
    ):
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    body = copy.body
    if "gzip" in asked.get("accept-encoding", "") and len(body) > 500:
        body = copy.gzipped
        headers.append((b"content-encoding", b"gzip"))
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body if scope["method"] == "GET" else b""})
