"""Copies of what is the same for everybody."""

from __future__ import annotations

import gzip
import threading
import time

import made
import pytest
from fastapi import Response
from opened import open_site
from sqlalchemy import select

from broadsheet.web import caching
from broadsheet.web.db import session
from broadsheet.web.render import SHARED
from broadsheet.web.security import SESSION_COOKIE
from broadsheet.web.tables import Paper


@pytest.fixture
def client(tmp_path):
    return open_site(tmp_path, 5)


def counted(client, path="/counted", **headers):
    """An endpoint that says how often it was asked."""
    calls = []

    @client.app.get(path)
    def answer():
        calls.append(1)
        return Response(f"{len(calls)} " + "x" * 2000, headers={"cache-control": SHARED, **headers}, media_type="text/plain")

    return calls


def change(client):
    with session(client.app.state.engine) as db:
        db.scalar(select(Paper).limit(1)).votes += 1


def test_a_copy_is_handed_out_until_the_data_change(client):
    calls = counted(client)
    assert {client.get("/counted").text[:2] for _ in range(5)} == {"1 "}
    change(client)
    assert client.get("/counted").text[:2] == "2 "
    assert client.get("/counted?x=1").text[:2] == "3 "
    assert len(calls) == 3


def test_a_vote_is_seen_by_the_next_visitor(client):
    with session(client.app.state.engine) as db:
        paper = db.scalar(select(Paper).where(Paper.slug.is_(None)).limit(1))
        paper.votes = 41
    address = f"/papers/{paper.arxiv_id}"
    assert "41" in client.get(address).text
    change_to = 42
    with session(client.app.state.engine) as db:
        db.get(Paper, paper.id).votes = change_to
    assert "42" in client.get(address).text


def test_whoever_is_signed_in_gets_no_copy(client):
    calls = counted(client)
    for _ in range(3):
        client.get("/counted", headers={"cookie": f"a=b; {SESSION_COOKIE}=x"})
    client.get("/counted")
    assert len(calls) == 4


@pytest.mark.parametrize(
    "headers", [{"cache-control": "private, no-store"}, {"set-cookie": "a=b"}, {"cache-control": "no-cache"}]
)
def test_what_is_not_shared_is_not_kept(client, headers):
    calls = counted(client, **headers)
    client.get("/counted")
    client.get("/counted")
    assert len(calls) == 2


def test_conditional_requests(client):
    first = client.get("/")
    assert first.headers["cache-control"] == SHARED
    assert first.headers["vary"] == "Accept-Encoding, Cookie"
    tag = first.headers["etag"]
    for known in (tag, f'"other", {tag}', "*", tag.removeprefix("W/")):
        answer = client.get("/", headers={"if-none-match": known})
        assert answer.status_code == 304
        assert answer.content == b""
        assert answer.headers["etag"] == tag
        assert "content-security-policy" in answer.headers
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200
    change_votes = client.get("/papers/glan").headers["etag"]
    with session(client.app.state.engine) as db:
        db.scalar(select(Paper).where(Paper.slug == "glan")).title = "Another title"
    assert client.get("/papers/glan", headers={"if-none-match": change_votes}).status_code == 200


def test_head_is_get_without_a_body(client):
    for path in ("/", "/healthz", "/papers/gear", "/nope", "/static/style.css"):
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code
        assert head.content == b""
    assert client.head("/").headers["content-length"] == client.get("/").headers["content-length"]


def test_answers_are_compressed_for_those_who_take_it(client):
    with client.stream("GET", "/", headers={"accept-encoding": "gzip"}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    plain = client.get("/", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(raw) == plain.content
    assert len(raw) < len(plain.content) / 2
    private = client.get("/papers/glan", headers={"accept-encoding": "gzip", "cookie": f"{SESSION_COOKIE}=x"})
    assert private.headers["content-encoding"] == "gzip"


def test_many_who_wait_for_a_stale_page_make_it_once(client):
    calls = []

    @client.app.get("/slow")
    def slow():
        calls.append(1)
        time.sleep(0.3)
        return Response(str(len(calls)), headers={"cache-control": SHARED})

    with client:  # one loop for all of them
        client.get("/slow")
        change(client)
        got = []
        threads = [threading.Thread(target=lambda: got.append(client.get("/slow").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == ["2"] * 8
    assert len(calls) == 2


def test_an_error_lets_the_next_one_try(client):
    state = {"fails": False}

    @client.app.get("/flaky")
    def flaky():
        if state["fails"]:
            raise RuntimeError
        return Response("well", headers={"cache-control": SHARED})

    assert client.get("/flaky").text == "well"
    change(client)
    state["fails"] = True
    assert client.get("/flaky").status_code == 500
    state["fails"] = False
    assert client.get("/flaky").text == "well"


def test_room_is_bounded(client, monkeypatch):
    monkeypatch.setattr(caching, "ROOM", 50_000)

    @client.app.get("/fill/{number}")
    def fill(number: int):
        return Response(b"x" * 5000, headers={"cache-control": SHARED})

    cache = client.app.middleware_stack
    client.get("/")
    cache = client.app.middleware_stack
    while not isinstance(cache, caching.Cache):
        cache = cache.app
    for number in range(30):
        client.get(f"/fill/{number}")
    assert cache.nbytes <= 50_000
    assert cache.nbytes == sum(copy.nbytes for copy in cache.copies.values())
    assert 2 <= len(cache.copies) <= 5


def test_files_with_a_mark_of_their_content_are_kept_for_good(client):
    import re

    address = re.search(r'href="(/static/style\.css\?v=\w+)"', client.get("/").text)[1]
    assert client.get(address).headers["cache-control"] == "public, max-age=31536000, immutable"
    assert client.get("/static/style.css").headers["cache-control"] == "public, max-age=300"


def test_versions_of_other_databases_last_a_second(tmp_path):
    from sqlalchemy import create_engine

    version = caching.data_version(create_engine("postgresql+psycopg://nobody@localhost/none"))
    assert version() == version() or version() == version()
    assert caching.data_version(create_engine("sqlite://"))() != caching.data_version(create_engine("sqlite://"))()


def test_made_papers_are_the_same_for_the_same_seed():
    assert made.papers(5) == made.papers(5)
