"""Fetching what strangers name: only http(s), only hosts of the public internet, never more or longer than allowed.

A host's addresses are resolved once, refused unless every one is public, and the connection goes to an address that was
checked: the name is not asked for again in between. Redirects are followed by hand and checked in the same way.
BROADSHEET_ALLOW_HOSTS names hosts that may be private (comma-separated: an intranet's, a test's).
"""

from __future__ import annotations

import os
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from importlib.metadata import version
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

#: Bytes of an answer, as sent and after decompression; seconds for all of one, redirects included; hops.
LARGEST, DEADLINE, REDIRECTS = 32 << 20, 60.0, 5
#: Seconds between two requests to a host; arXiv asks for three.
DELAY, DELAYS = 1.0, {"arxiv.org": 3.0}
#: Attempts where the server is busy, and the longest wait that it may ask for between them, in seconds.
ATTEMPTS, PATIENCE = 4, 120.0


class FetchError(ValueError):
    """What was asked for cannot or must not be fetched; one line says why."""


@dataclass(frozen=True)
class Answer:
    """What came; ``changed`` is False for 304 Not Modified, which has no body."""

    body: bytes
    url: str
    changed: bool = True
    etag: str = ""
    modified: str = ""


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system knows them."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def checked_address(host: str, port: int, allowed: frozenset[str], resolve: Callable[[str, int], list[str]]) -> str:
    """The address to connect to. Raises FetchError where the host has none or one that is not public."""
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError):
        raise FetchError(f"there is no host {host}") from None
    if not addresses:
        raise FetchError(f"there is no host {host}")
    if host not in allowed:
        for address in addresses:
            if not is_public(address):
                raise FetchError(
                    f"{host} is at {address}, which is not public; BROADSHEET_ALLOW_HOSTS={host} would allow it"
                )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large: not to this machine, its network or a cloud's metadata."""
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if not inner and int(found) >> 32 == 0x64FF9B << 64:  # NAT64: the last four bytes are an IPv4 address
            inner = IPv4Address(int(found) & 0xFFFFFFFF)
        if inner and not is_public(str(inner)):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


@dataclass
class Fetcher:
    """Gets documents, politely. ``clock``, ``sleep`` and ``resolve`` are the system's unless a test brings its own."""

    largest: int = LARGEST
    deadline: float = DEADLINE
    delay: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    resolve: Callable[[str, int], list[str]] = resolve
    _next: dict[str, float] = field(default_factory=dict)

    def get(self, url: str, etag: str = "", modified: str = "") -> Answer:
        """The document, or ``changed=False`` where it is still the one of ``etag`` or ``modified``. Raises FetchError."""
        for attempt in range(ATTEMPTS):
            try:
                return self._follow(url, etag, modified)
            except _Busy as busy:
                wait = busy.seconds if busy.seconds is not None else 2.0**attempt * random.uniform(1, 1.5)
                if attempt == ATTEMPTS - 1 or wait > PATIENCE:
                    raise FetchError(f"{_shown(url)}: {busy}") from None
                self.sleep(wait)
        raise AssertionError("unreachable")

    def _follow(self, url: str, etag: str, modified: str) -> Answer:
        ends = self.clock() + self.deadline
        for _ in range(REDIRECTS + 1):
            host, port, address = self._check(url)
            ends += self._wait(host)  # our own politeness is not the server's delay
            found = self._ask(url, host, port, address, etag, modified, ends)
            if isinstance(found, Answer):
                return found
            url = urljoin(url, found)
        raise FetchError(f"{_shown(url)}: more than {REDIRECTS} redirects")

    def _check(self, url: str) -> tuple[str, int, str]:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise FetchError(f"{_shown(url)} is no address") from None
        if parts.scheme not in ("http", "https") or not host:
            raise FetchError(f"{_shown(url)}: only http and https addresses are fetched")
        if parts.username or parts.password:
            raise FetchError(f"{_shown(url)}: addresses with a name or password are not fetched")
        named = os.environ.get("BROADSHEET_ALLOW_HOSTS", "").lower().split(",")
        allowed = frozenset(name.strip() for name in named if name.strip())
        port = port or (443 if parts.scheme == "https" else 80)
        return host, port, checked_address(host, port, allowed, self.resolve)

    def _wait(self, host: str) -> float:
        """Waits for the host's turn, and returns for how long."""
        delay = DELAY if self.delay is None else self.delay
        if self.delay is None:
            delay = next((d for name, d in DELAYS.items() if host == name or host.endswith("." + name)), DELAY)
        now = self.clock()
        wait = max(0.0, self._next.get(host, now) - now)
        if wait:
            self.sleep(wait)
        self._next[host] = now + wait + delay
        return wait

    def _ask(
        self, url: str, host: str, port: int, address: str, etag: str, modified: str, ends: float
    ) -> Answer | str:  # fmt: skip
        """One request; a text is where it redirects to."""
        pinned = httpx.URL(url).copy_with(host=address)
        standard = port == (443 if pinned.scheme == "https" else 80)
        name = f"[{host}]" if ":" in host else host
        headers = {
            "host": name if standard else f"{name}:{port}", "accept-encoding": "gzip, deflate", "user-agent": USER_AGENT,
            "accept": "application/atom+xml, application/rss+xml, application/json, text/xml, */*;q=0.1",
            **({"if-none-match": etag} if etag else {}), **({"if-modified-since": modified} if modified else {}),
        }  # fmt: skip
        left = max(0.1, ends - self.clock())
        cut = _Cut()
        late = threading.Timer(left, cut)  # a timeout is of one look at the connection: a byte at a time never meets it
        late.daemon = True
        late.start()
        try:
            with _client(min(20.0, left)) as client:
                extensions = {"sni_hostname": host, "trace": cut.watch}
                request = client.build_request("GET", pinned, headers=headers, extensions=extensions)
                answer = client.send(request, stream=True)
                try:
                    found = self._read(answer, url, ends)
                finally:
                    answer.close()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            if cut.done:
                raise self._late(url) from None
            slow = isinstance(error, httpx.TimeoutException)
            raise _Busy("no answer in time" if slow else f"no connection ({type(error).__name__})") from None
        finally:
            late.cancel()
            cut.forget()
        if cut.done:  # what looks like an answer's end was ours
            raise self._late(url)
        return found

    def _late(self, url: str) -> FetchError:
        return FetchError(f"{_shown(url)}: not whole after {self.deadline:.0f} s")

    def _read(self, answer: httpx.Response, url: str, ends: float) -> Answer | str:
        status, headers = answer.status_code, answer.headers
        if status in (301, 302, 303, 307, 308) and "location" in headers:
            return headers["location"][:2000]
        if status == 304:
            return Answer(b"", url, changed=False)
        if status in (429, 500, 502, 503, 504):
            raise _Busy(f"the server answers {status}", _seconds(headers.get("retry-after", "")))
        if status != 200:
            raise FetchError(f"{_shown(url)}: the server answers {status}")
        body = bytearray()
        for chunk in _decoded(answer.iter_raw(), headers.get("content-encoding", ""), self.largest):
            body += chunk
            if len(body) > self.largest:
                raise FetchError(f"{_shown(url)}: more than {self.largest:,} bytes")
            if self.clock() > ends:
                raise self._late(url)
        return Answer(bytes(body), url, True, headers.get("etag", "")[:300], headers.get("last-modified", "")[:100])


class _Cut:
    """Cuts a connection off when it is called, from another thread."""

    def __init__(self) -> None:
        self.socket: socket.socket | None = None
        self.done = False

    def watch(self, event: str, info: dict[str, Any]) -> None:
        """For httpx's ``trace``: remembers the connection that is made."""
        if event == "connection.connect_tcp.complete":
            self.socket = info["return_value"].get_extra_info("socket").dup()  # TLS takes the other one over
            if self.done:
                self()

    def forget(self) -> None:
        if self.socket:
            self.socket.close()

    def __call__(self) -> None:
        self.done = True
        if self.socket:
            with suppress(OSError):  # it has ended by itself
                self.socket.shutdown(socket.SHUT_RDWR)


class _Busy(Exception):
    """The server may answer later, after ``seconds`` if it said so."""

    def __init__(self, message: str, seconds: float | None = None):
        super().__init__(message)
        self.seconds = seconds


USER_AGENT = f"broadsheet/{version('broadsheet')} (daily papers; one polite reader; +https://pypi.org/project/broadsheet)"


@contextmanager
def _client(timeout: float) -> Iterator[httpx.Client]:
    """Without proxies of the environment, which would resolve names again."""
    with httpx.Client(verify=_trusted(), timeout=timeout, follow_redirects=False, trust_env=False) as client:
        yield client


@cache
def _trusted() -> ssl.SSLContext:
    """Read once: the list of authorities is long. Clients are not kept, since connections are to addresses, not names."""
    return httpx.create_ssl_context(trust_env=False)


def _decoded(chunks: Iterator[bytes], encoding: str, largest: int) -> Iterator[bytes]:
    """Chunks after decompression, none larger than what is allowed in all: a bomb is noticed while it unfolds."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        yield from chunks
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise FetchError(f"an answer in {encoding[:40]}, which was not asked for")
    unfolded = zlib.decompressobj(47 if encoding != "deflate" else 15)  # 47: gzip or zlib
    try:
        for chunk in chunks:
            yield unfolded.decompress(chunk, largest + 1)
            if unfolded.unconsumed_tail:
                yield b"\x00" * (largest + 1)  # more than is allowed
        yield unfolded.flush()
    except zlib.error:
        raise FetchError(f"an answer that is no {encoding}") from None


def _seconds(after: str) -> float | None:
    """Of a Retry-After header: seconds, or a date."""
    if after.strip().isdecimal():
        return float(after[:9])
    try:
        return max(0.0, (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _shown(url: str) -> str:
    """The address for a message, in one line: without what may be secret, its query and a name and password."""
    plain = re.sub(r"//[^/]*@", "//", url.partition("?")[0][:200])
    return "".join(c for c in plain if c.isprintable())
