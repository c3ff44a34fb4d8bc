"""Fetching does what is asked, and nothing that must not be."""

from __future__ import annotations

import gzip
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from broadsheet.web import fetching
from broadsheet.web.fetching import Fetcher, FetchError, is_public


class Handler(BaseHTTPRequestHandler):
    """Answers by path; remembers what was asked."""

    asked: list[tuple[str, dict[str, str]]]
    busy = 0

    def do_GET(self):
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        port = self.server.server_address[1]
        plain = {
            "/feed": (200, {"ETag": '"one"', "Last-Modified": "Sat, 28 Nov 2026 08:00:00 GMT"}, b"<feed/>"),
            "/away": (302, {"Location": f"http://localhost:{port}/feed"}, b""),
            "/metadata": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""),
            "/file": (302, {"Location": "file:///etc/passwd"}, b""),
            "/loop": (302, {"Location": "/loop"}, b""),
            "/gone": (404, {}, b""),
            "/large": (200, {}, b"x" * 5000),
            "/bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(50_000_000))),
            "/zipped": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"<feed/>")),
            "/torn": (200, {"Content-Encoding": "gzip"}, b"not gzip at all"),
            "/brotli": (200, {"Content-Encoding": "br"}, b"xx"),
        }
        if self.path == "/feed" and self.headers.get("If-None-Match") == '"one"':
            return self._send(304, {}, b"")
        if self.path == "/busy" and type(self).busy:
            type(self).busy -= 1
            return self._send(429, {"Retry-After": "7"}, b"")
        if self.path in ("/slow", "/slow-headers"):
            self.send_response(200)
            if self.path == "/slow":
                self.end_headers()
            else:
                self.flush_headers()
            with suppress(OSError):  # whoever asked had enough
                for _ in range(100):
                    self.wfile.write(b"x" * 10)
                    time.sleep(0.05)
            return None
        return self._send(*plain.get(self.path, (200, {}, b"<feed/>")))

    def _send(self, status, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Handler, "asked", [], raising=False)
    monkeypatch.setattr(Handler, "busy", 0)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("BROADSHEET_ALLOW_HOSTS", "intranet.test, localhost")
    yield f"http://intranet.test:{listening.server_address[1]}"
    listening.shutdown()
    listening.server_close()


def fetcher(**given):
    return Fetcher(delay=0.0, resolve=lambda host, port: ["127.0.0.1"], **given)


def test_a_document_and_the_conditional_request_for_it(server):
    got = fetcher().get(server + "/feed")
    assert (got.body, got.etag, got.modified) == (b"<feed/>", '"one"', "Sat, 28 Nov 2026 08:00:00 GMT")
    again = fetcher().get(server + "/feed", got.etag, got.modified)
    assert not again.changed
    path, headers = Handler.asked[-1]
    assert (path, headers["if-none-match"], headers["if-modified-since"]) == ("/feed", got.etag, got.modified)
    assert headers["user-agent"].startswith("broadsheet/")
    assert headers["host"] == server.removeprefix("http://")
    assert fetcher().get(server + "/zipped").body == b"<feed/>"
    assert fetcher().get(server + "/away").body == b"<feed/>"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/metadata", "not public"), ("/file", "only http and https"), ("/loop", "redirects"), ("/gone", "404"),
        ("/large", "more than 4,000 bytes"), ("/bomb", "more than 4,000 bytes"), ("/torn", "no gzip"),
        ("/brotli", "not asked"),
    ],
)  # fmt: skip
def test_what_is_refused(server, path, says):
    def resolve(host, port):
        return ["169.254.169.254"] if host.startswith("169") else ["127.0.0.1"]

    with pytest.raises(FetchError, match=says) as error:
        Fetcher(delay=0.0, resolve=resolve, largest=4000).get(server + path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/slow", "/slow-headers"])
def test_a_slow_answer_has_a_deadline(server, path):
    begun = time.monotonic()
    with pytest.raises(FetchError, match="not whole after 1 s"):  # the whole would take five seconds
        fetcher(deadline=0.6, sleep=lambda seconds: None).get(server + path)
    assert time.monotonic() - begun < 4


def test_private_hosts_need_a_name_in_the_environment(server, monkeypatch):
    monkeypatch.delenv("BROADSHEET_ALLOW_HOSTS")
    with pytest.raises(FetchError, match=r"BROADSHEET_ALLOW_HOSTS=intranet\.test"):
        fetcher().get(server + "/feed")
    assert Handler.asked == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(server, monkeypatch):
    """A name that is public when it is checked and private a moment later gets nothing: it is resolved once."""
    monkeypatch.delenv("BROADSHEET_ALLOW_HOSTS")
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])
    connected = []

    class Refusing:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def build_request(self, method, url, headers, extensions):
            connected.append((url.host, headers["host"], extensions["sni_hostname"]))
            raise fetching.httpx.ConnectError("no network in tests")

    monkeypatch.setattr(fetching.httpx, "Client", Refusing)
    monkeypatch.setattr(fetching, "ATTEMPTS", 1)
    with pytest.raises(FetchError, match="no connection"):
        Fetcher(delay=0.0, resolve=lambda host, port: next(answers)).get("https://rebinding.test/feed")
    assert connected == [("93.184.216.34", "rebinding.test", "rebinding.test")]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "192.0.2.1", "2001:db8::1",
        "fd00:ec2::254", "nonsense",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_addresses_that_are_public():
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.test/x", "file:///etc/passwd", "gopher://a.test", "http://user:pw@a.test/", "http://", "http://[::1",
        "//a.test", "",
    ],
)  # fmt: skip
def test_addresses_that_are_not_fetched(url):
    with pytest.raises(FetchError) as error:
        fetcher().get(url)
    assert "pw" not in str(error.value)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "localhost", "localhost."])
def test_other_spellings_of_this_machine(host, monkeypatch):
    monkeypatch.delenv("BROADSHEET_ALLOW_HOSTS", raising=False)
    with pytest.raises(FetchError, match=r"not public|no host"):
        Fetcher(delay=0.0).get(f"http://{host}:1/")


def test_politeness_and_patience(server):
    slept = []
    now = [0.0]

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    def resolve(host, port):
        return ["127.0.0.1"]

    polite = Fetcher(clock=lambda: now[0], sleep=sleep, resolve=resolve)
    for _ in range(3):
        polite.get(server + "/feed")
    assert slept == [1.0, 1.0]
    assert fetching.DELAYS["arxiv.org"] == 3.0
    polite._wait("export.arxiv.org")
    assert polite._wait("export.arxiv.org") == 3.0
    slept.clear()
    Handler.busy = 2
    assert fetcher(sleep=sleep).get(server + "/busy").body == b"<feed/>"
    assert slept == [7.0, 7.0]  # what the server asked for
    Handler.busy = 9
    with pytest.raises(FetchError, match="429"):
        fetcher(sleep=sleep).get(server + "/busy")
