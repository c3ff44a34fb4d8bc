"""A monitor in front of an OpenAI-compatible endpoint: ASGI middleware, for any server or proxy in Python.

    app = MonitorMiddleware(app, monitor)

Chat completions carry the whole conversation, so nothing is remembered: the requests are the user's messages, every step of
them is judged (steps judged earlier come from the chat's ledger), and a conversation that was flagged at some step stays
stopped however it goes on. A flagged one gets status 403 and an error of the API's form; all else passes unchanged. Other
routes of the server are not looked at: close those that generate too.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import SequentialMonitor

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two values the server behind might take the one that was not watched."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def requests_of(messages: Any, roles: Sequence[str] = ("user",)) -> list[str]:
    """The texts of the messages of these roles; parts that are no text are named. Raises ValueError for what is no chat."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages must be a list of objects")
    found = []
    for message in messages:
        if message.get("role") not in roles:
            continue
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(
                str(part.get("text", "")) if part.get("type") == "text" else f"[{part.get('type')}]"
                for part in content
                if isinstance(part, dict)
            )
        if not isinstance(content, str):
            raise ValueError("the content of a message must be text or parts")
        found.append(content if content.strip() else "[empty]")
    return found


@dataclass
class MonitorMiddleware:
    """Wraps the ASGI application ``app``.

    ``roles``: whose messages are requests; add "system" where clients write that too. ``suffixes``: paths that are watched
    end so. ``longest``: bytes of a request that are read at most (413 above). ``flagged`` is called with the requests and
    the decision of whatever is stopped.
    """

    app: App
    monitor: SequentialMonitor
    roles: Sequence[str] = ("user",)
    suffixes: Sequence[str] = ("/chat/completions",)
    longest: int = 4_000_000
    flagged: Callable[[list[str], Any], None] | None = field(default=None, repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watched = scope["type"] == "http" and scope["method"] == "POST"
        if not watched or not scope["path"].rstrip("/").endswith(tuple(self.suffixes)):
            return await self.app(scope, receive, send)
        body = await _body(receive, self.longest)
        if body is None:
            return await _error(send, 413, "the request is too long", "request_too_large")
        try:
            given = json.loads(body, object_pairs_hook=_once)
            requests = requests_of(given["messages"] if isinstance(given, dict) else None, self.roles)
        except (ValueError, KeyError, RecursionError):
            # What cannot be read cannot be watched, and a server that is laxer than this must not get it.
            return await _error(send, 400, "the body is no chat completion request", "invalid_request_error")
        if requests:
            decision = await self.monitor.ahalt(requests)
            if decision.flag:
                if self.flagged:
                    self.flagged(requests, decision)
                return await _error(send, 403, "the conversation was stopped by a monitor", "conversation_stopped")
        return await self.app(scope, _replayed(body, receive), send)


async def _body(receive: Receive, longest: int) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > longest:
            return None
        if not event.get("more_body"):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever else comes (a disconnect)."""
    waiting: list[Event] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Event:
        return waiting.pop() if waiting else await receive()

    return again


async def _error(send: Send, status: int, message: str, kind: str) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "code": kind, "param": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
