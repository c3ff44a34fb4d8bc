"""What keeps strangers from doing harm: headers, forms that only our own pages can send, signed tokens, limits.

Nothing in a page runs or loads from elsewhere: the content security policy allows this server's own files and no inline
script. The classes at the end are middleware, see `app`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Annotated

from fastapi import Form, Header, HTTPException, Request
from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
CSRF_COOKIE = "broadsheet_form"
#: Of a browser that is signed in.
SESSION_COOKIE = "broadsheet_session"
#: Bytes of the largest body that is read.
LARGEST_BODY = 64 << 10


def hashed(token: str) -> str:
    """What is stored of a token: a thief of the database cannot use it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Signer:
    """Tokens that carry a value, a purpose and their age: made for one purpose, they are worth nothing for another."""

    def __init__(self, secret: str):
        self.secret = secret

    def sign(self, purpose: str, value: object) -> str:
        """A token for an address line."""
        return str(URLSafeTimedSerializer(self.secret, salt=f"broadsheet.{purpose}").dumps(value))

    def read(self, purpose: str, token: str, seconds: int | None = None) -> object | None:
        """What was signed, or None: forged, for something else, or older than ``seconds``."""
        try:
            return URLSafeTimedSerializer(self.secret, salt=f"broadsheet.{purpose}").loads(token, max_age=seconds)
        except BadSignature:
            return None


def csrf_token(request: Request) -> str:
    """What a form of ours must send back: it belongs to the browser's cookie, which other sites can neither read nor set.

    A browser without one gets its cookie with the answer (`render.page`).
    """
    known = request.cookies.get(CSRF_COOKIE, "")
    if not known:
        known = getattr(request.state, "csrf_cookie", "") or secrets.token_urlsafe(16)
        request.state.csrf_cookie = known
    return _mac(request, known)


def _mac(request: Request, cookie: str) -> str:
    return hmac.new(request.app.state.settings.secret.encode(), f"csrf:{cookie}".encode(), "sha256").hexdigest()


def from_our_page(request: Request, csrf: Annotated[str, Form()] = "", x_csrf: Annotated[str, Header()] = "") -> None:
    """A dependency of everything that changes something for a browser: 403 unless a page of ours sent it."""
    cookie = request.cookies.get(CSRF_COOKIE, "")
    given = csrf or x_csrf
    if not cookie or not hmac.compare_digest(_mac(request, cookie).encode(), given.encode()):
        raise HTTPException(403, "this form is out of date or came from elsewhere; load the page again and repeat")


# --- middleware -----------------------------------------------------------------------------------------------------


class SafeHeaders:
    """Every answer carries `HEADERS`, unless it has its own."""

    def __init__(self, app: ASGIApp, https: bool = False):
        self.app = app
        more = {"strict-transport-security": "max-age=31536000"} if https else {}
        self.headers = [(name.encode(), value.encode()) for name, value in {**HEADERS, **more}.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in self.headers if pair[0] not in there)]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class BodyLimit:
    """Refuses bodies of more than ``most`` bytes (413), whether they say so or not."""

    def __init__(self, app: ASGIApp, most: int = LARGEST_BODY):
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = Headers(scope=scope).get("content-length", "0")
        if not said.isdecimal() or int(said) > self.most:
            from .render import problem

            return await problem(Request(scope), 413, headers={"connection": "close"})(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413)
            return message

        return await self.app(scope, counted, send)


@dataclass(frozen=True)
class Rate:
    """So many at once, and so many a second after that."""

    burst: float
    per_second: float


#: Reading is for everybody; what sends mail is not for machines.
READS, WRITES, MAILS = Rate(400, 20), Rate(60, 1), Rate(8, 1 / 60)
READING = ("GET", "HEAD", "OPTIONS")
#: Forms that make us send a mail to an address of the visitor's choice.
MAILING = ("/sign-in", "/subscribe")


class Buckets:
    """Token buckets by name, in this process; the longest unused are forgotten first."""

    def __init__(self, rate: Rate, most: int = 50_000):
        self.rate = rate
        self.most = most
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float | None = None) -> float:
        """Takes one; 0, or the seconds to wait when there is none."""
        now = time.monotonic() if now is None else now
        tokens, then = self.left.pop(name, (self.rate.burst, now))
        tokens = min(self.rate.burst, tokens + (now - then) * self.rate.per_second)
        enough = tokens >= 1
        self.left[name] = (tokens - 1 if enough else tokens, now)
        if len(self.left) > self.most:
            self.left.popitem(last=False)
        return 0.0 if enough else (1 - tokens) / self.rate.per_second


class RateLimits:
    """Token buckets for every address (429, with ``Retry-After``).

    An IPv6 address counts as its /64 network. On a page that only this machine sees the machine itself is not limited.
    """

    def __init__(self, app: ASGIApp, public: bool = True):
        self.app = app
        self.public = public
        self.reads, self.writes, self.mails = Buckets(READS), Buckets(WRITES), Buckets(MAILS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wait = self.wait(scope) if scope["type"] == "http" else 0.0
        return await (_too_fast(wait, scope, receive, send) if wait else self.app(scope, receive, send))

    def wait(self, scope: Scope) -> float:
        """Seconds that whoever asks has to wait; 0: none."""
        address, local = _network(scope)
        if local and not self.public:
            return 0.0
        if scope["method"] in READING:
            return self.reads.take(address)
        wait = self.writes.take(address)
        return max(wait, self.mails.take(address)) if scope["path"] in MAILING else wait


class AccountLimits:
    """Token buckets for what an account changes, from wherever it comes. It stands behind what finds out who that is."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.writes = Buckets(WRITES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = scope.get("state", {}).get("account")
        changes = scope["type"] == "http" and scope["method"] not in READING
        wait = self.writes.take(str(account.id)) if account and changes else 0.0
        return await (_too_fast(wait, scope, receive, send) if wait else self.app(scope, receive, send))


async def _too_fast(wait: float, scope: Scope, receive: Receive, send: Send) -> None:
    from .render import problem

    await problem(Request(scope), 429, headers={"retry-after": str(int(wait) + 1)})(scope, receive, send)


def _network(scope: Scope) -> tuple[str, bool]:
    """Whom a request is counted for, and whether it comes from this machine."""
    host = (scope.get("client") or ("", 0))[0]
    try:
        address = ip_address(host)
    except ValueError:
        return host, False
    if isinstance(address, IPv6Address) and not address.ipv4_mapped:
        return str(int(address) >> 64), address.is_loopback
    return host, address.is_loopback
