"""Headers, limits, and what strangers send."""

from __future__ import annotations

import re
import sqlite3
from types import SimpleNamespace

import made
import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient
from opened import open_site
from sqlalchemy.exc import OperationalError

from broadsheet.web import security
from broadsheet.web.db import session
from broadsheet.web.security import (
    CSRF_COOKIE,
    HEADERS,
    LARGEST_BODY,
    MAILS,
    WRITES,
    AccountLimits,
    Buckets,
    Rate,
    RateLimits,
)
from broadsheet.web.tables import Paper

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}&amp;\x00\x1b\u202e]]>"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return open_site(tmp_path_factory.mktemp("limits"), 5)


def address(client: TestClient, host: str, **more: str) -> TestClient:
    return TestClient(client.app, client=(host, 1), follow_redirects=False, headers=more)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/papers/gear",
        "/api/papers",
        "/api/nope",
        "/static/style.css",
        "/feeds/new.atom",
        "/healthz",
        "/days/x",
    ],
)
def test_every_answer_carries_the_security_headers(client, path):
    headers = client.get(path).headers
    for name, value in HEADERS.items():
        assert headers[name] == value
    assert "server" not in headers
    assert "strict-transport-security" not in headers


def test_https_is_asked_for_where_the_page_has_it(tmp_path):
    client = open_site(tmp_path, 1, url="https://papers.example.org")
    assert client.get("/").headers["strict-transport-security"] == "max-age=31536000"


def test_what_nobody_caught_is_a_plain_page(tmp_path, caplog):
    """No trace for the visitor, the trace in the log, all headers there."""
    client = open_site(tmp_path, 1)

    @client.app.get("/broken")
    def broken():
        raise RuntimeError("the secret is 4711")

    @client.app.get("/api/broken")
    def broken_api():
        raise RuntimeError("the secret is 4711")

    answer = client.get("/broken")
    assert answer.status_code == 500
    assert "Out of order" in answer.text
    assert "4711" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["content-security-policy"]
    assert client.get("/api/broken").json() == {
        "detail": "Something went wrong here. It has been noted; try again in a while."
    }
    assert "4711" in caplog.text


def test_a_database_that_refuses_is_said_in_a_line(tmp_path, caplog):
    """Locked by somebody else, full, or away: try again, and no trace in the log."""
    client = open_site(tmp_path, 1)

    @client.app.get("/locked")
    def locked():
        raise OperationalError("update paper", {}, sqlite3.OperationalError("database is locked"))

    answer = client.get("/locked")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert "The page cannot reach its data. Try again in a while." in answer.text
    told = caplog.records[-1]
    assert (told.levelname, told.exc_info, told.told["database"]) == ("WARNING", None, "database is locked")


def test_refusals_are_pages_for_people_and_json_for_programs(client):
    assert "Not found" in client.get("/nope").text
    assert client.get("/nope").headers["content-type"].startswith("text/html")
    assert client.get("/api/papers/nope").json() == {"detail": "There is no such paper here."}
    assert client.get("/nope", headers={"accept": "application/json"}).json() == {"detail": "There is no such page."}
    assert client.post("/").status_code == 405
    assert client.get("/?page=x").status_code == 422
    assert client.get("/?page=0").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("said", [True, False])
def test_large_bodies_are_refused(client, said):
    """Whether their length is told or not; the largest that is allowed is read."""

    @client.app.post(f"/echo-{said}")
    async def echo(request: Request):
        return {"read": len(await request.body())}

    def chunks(size):
        for start in range(0, size, 1000):
            yield b"x" * min(1000, size - start)

    for size, status in ((LARGEST_BODY, 200), (LARGEST_BODY + 1, 413)):
        body = b"x" * size if said else chunks(size)
        answer = client.post(f"/echo-{said}", content=body)
        assert answer.status_code == status
    assert "content-security-policy" in answer.headers
    assert client.post(f"/echo-{said}", content=b"", headers={"content-length": "-1"}).status_code == 413


def test_buckets_fill_again_and_forget():
    buckets = Buckets(Rate(3, 0.5), most=2)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0, 0, 0, 2.0]
    assert buckets.take("a", 1.0) == 1.0
    assert buckets.take("a", 2.0) == 0
    buckets.take("b", 2.0)
    buckets.take("c", 2.0)
    assert set(buckets.left) == {"b", "c"}


def test_reading_fast_is_refused_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(security, "READS", Rate(20, 0.2))
    client = open_site(tmp_path, 1, url="https://papers.example.org")
    one, other = address(client, "203.0.113.5"), address(client, "203.0.113.6")
    answers = [one.get("/robots.txt").status_code for _ in range(30)]
    assert answers[:20] == [200] * 20
    assert answers[-1] == 429
    refused = one.get("/")
    assert int(refused.headers["retry-after"]) in range(1, 7)
    assert "a little fast" in refused.text
    assert "content-security-policy" in refused.headers
    assert other.get("/").status_code == 200


def test_forms_that_send_mail_are_limited_tightly_and_by_network(tmp_path):
    client = open_site(tmp_path, 1, url="https://papers.example.org")
    some = [address(client, f"2001:db8:1:2::{n}") for n in range(1, 20)]
    answers = [one.post("/sign-in", data={"email": f"{n}@example.org"}) for n, one in enumerate(some)]
    assert [a.status_code == 429 for a in answers] == [n >= MAILS.burst for n in range(19)]
    assert int(answers[-1].headers["retry-after"]) > 30
    assert address(client, "2001:db8:1:3::1").post("/sign-in", data={}).status_code != 429


def test_what_an_account_sends_is_limited_from_wherever_it_comes(client):
    """Reading is not, and another account has its own share."""

    async def well(scope, receive, send):
        await Response("well")(scope, receive, send)

    limits, who = AccountLimits(well), {}

    async def known(scope, receive, send):
        await limits({**scope, "app": client.app, "state": {"account": SimpleNamespace(id=who["id"])}}, receive, send)

    def status(account, host, method="POST"):
        who["id"] = account
        return TestClient(known, client=(host, 1)).request(method, "/papers/1/vote").status_code

    found = [status(1, f"198.51.100.{n}") for n in range(66)]
    assert found[: int(WRITES.burst)] == [200] * int(WRITES.burst)
    assert found[-1] == 429
    assert status(1, "198.51.100.1", "GET") == 200
    assert status(2, "198.51.100.1") == 200


def test_the_owner_s_machine_is_limited_only_on_a_public_page(client):
    scope = {"method": "POST", "path": "/sign-in", "headers": [], "client": ("127.0.0.1", 1)}
    for public in (False, True):
        limits = RateLimits(client.app, public=public)
        assert any(limits.wait(dict(scope)) for _ in range(20)) == public


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page whose papers are all of what feeds can bring, in every field."""
    rows = made.papers(3)
    fields = ("title", "abstract", "summary", "source")
    rows[0] |= {name: f"{name} {EVIL}" for name in fields} | {
        "authors": [f"author {EVIL}"], "tags": [f"tag {EVIL}"[:80]], "url": "javascript:alert(1)",
        "code_url": "JaVaScRiPt:alert(1)", "doi": f"10.1/{EVIL}", "arxiv_id": f"evil/{EVIL}"[:40],
    }  # fmt: skip
    rows[1] |= {
        "url": "data:text/html,<script>alert(1)</script>",
        "code_url": 'https://a.example/"onmouseover=alert(1)',
        "authors": [],
        "tags": [],
    }
    rows[2] |= {"title": "x" * 500, "abstract": "y" * 200_000, "summary": "", "authors": ["z" * 200] * 300}
    return open_site(tmp_path_factory.mktemp("hostile"), rows=rows)


def test_nothing_that_a_paper_brings_is_markup(hostile):
    with session(hostile.app.state.engine) as db:
        evil = db.query(Paper).filter(Paper.title.like("title %script%")).one().id
    pages = [
        "/",
        f"/papers/{evil}",
        "/trending",
        "/search?q=alert",
        "/search?q=script&tag=tag",
        "/feeds/new.atom",
        "/calendar",
    ]
    for path in pages:
        answer = hostile.get(path)
        assert answer.status_code == 200, path
        assert "<script>alert" not in answer.text, path
        assert "onerror=alert(1)>" not in re.sub(r"&lt;.*?&gt;", "", answer.text), path
        assert not re.search(r'(href|src)="\s*(javascript|data):', answer.text, re.I), path
        assert "49" not in re.findall(r"&gt;(\d+)&amp;amp;", answer.text), path
        for tag in re.findall(r"<[a-z][^>]*>", answer.text):
            assert not re.search(r"\son[a-z]+=", re.sub(r'"[^"]*"', '""', tag)), tag


def test_the_feed_stays_well_formed(hostile):
    from defusedxml.ElementTree import fromstring

    assert len(fromstring(hostile.get("/feeds/new.atom").content)) > 3
    fromstring(hostile.get("/sitemap-1.xml").content)


@pytest.mark.parametrize("field", ["q", "tag", "author", "family", "day", "since", "page", "code"])
def test_nothing_that_an_address_brings_is_markup(client, field):
    answer = client.get("/search", params={field: EVIL})
    assert answer.status_code == 200
    assert "<script>alert" not in answer.text
    assert "<img" not in answer.text
    missing = client.get(f"/papers/{'%3Cscript%3Ealert(1)%3C%2Fscript%3E'}")
    assert "<script>alert" not in missing.text


@pytest.mark.parametrize(
    "path",
    [
        *("/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/settings.py", "/static//etc/passwd", "/days/..%2f.."),
        *("/papers/..%2f..%2fweb.secret", "/feeds/tag/..%2f..%2fx.atom", "/papers/%00", "/calendar/2026-11%00", "/papers/١"),
        *("/sitemap-99999.xml", "/sitemap-0.xml", "/sitemap--1.xml", "/papers/99999999999999999999", "/feeds/tag/%00.atom"),
        "/papers/" + "9" * 5000,
    ],
)
def test_paths_that_try_to_leave_find_nothing(client, path):
    answer = client.get(path)
    assert answer.status_code in (404, 308), path
    assert "def create_app" not in answer.text
    assert "root:" not in answer.text


def test_pages_without_forms_set_no_cookie(client):
    for path in ("/", "/trending", "/papers/glan", "/search?q=cache", "/about", "/nope"):
        assert "set-cookie" not in client.get(path).headers, path


def test_a_page_with_a_form_gives_its_browser_a_token(tmp_path):
    client = open_site(tmp_path, 1)
    answer = client.get("/papers/gear")
    if "csrf" not in answer.text:
        pytest.skip("the run button needs no form here")
    assert CSRF_COOKIE in answer.headers["set-cookie"]
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert answer.headers["cache-control"] == "private, no-store"
    token = re.search(r'name="csrf" value="(\w+)"', answer.text)[1]
    again = re.search(r'name="csrf" value="(\w+)"', client.get("/papers/gear").text)[1]
    assert token == again
