"""Accounts: links, sessions, votes and their trend, follows, and taking everything away."""

from __future__ import annotations

import math
import re
import threading
from datetime import date, timedelta
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from people import csrf_of, open_page, outbox, press, sign_in
from sqlalchemy import func, select, update

from broadsheet.web import accounts
from broadsheet.web.db import session
from broadsheet.web.tables import (
    Account,
    Author,
    Delivery,
    Follow,
    Mark,
    Paper,
    Run,
    Session,
    SignIn,
    Subscription,
    Table,
    Tag,
    utcnow,
)


@pytest.fixture
def client(tmp_path, database_url):
    return open_page(tmp_path, database_url)


@pytest.fixture
def here(tmp_path):
    """A page on SQLite alone, for what has nothing to do with the database."""
    return open_page(tmp_path, "")


def engine(client):
    return client.app.state.engine


# --- signing in -------------------------------------------------------------------------------------------------


def test_a_link_signs_in_once_and_opening_it_does_not_use_it(client, tmp_path):
    answer = press(client, "/sign-in", "/sign-in", email="Ada@Example.ORG", next="/trending")
    assert "on its way" in answer.text
    [mail] = outbox(tmp_path)
    assert mail["To"] == "ada@example.org"
    link = urlsplit(re.search(r"http\S+", mail.get_body().get_content())[0])
    address = f"{link.path}?{link.query}"
    for _ in range(3):  # what mail scanners do
        assert "One more press" in client.get(address).text
    assert client.get("/account").status_code == 303
    signed = press(client, address, link.path, next="/trending")
    assert (signed.status_code, signed.headers["location"]) == (303, "/trending")
    cookie = signed.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "ada@example.org" in client.get("/account").text
    assert press(client, "/sign-in/x", link.path, token=csrf_of(client)).status_code == 410  # it is used up
    with session(engine(client)) as db:
        stored = db.scalars(select(Session.token_hash)).all() + db.scalars(select(SignIn.token_hash)).all()
        assert not any(value in cookie for value in stored)


def test_old_and_forged_links_and_cookies_are_nothing(here, tmp_path):
    press(here, "/sign-in", "/sign-in", email="a@example.org")
    [mail] = outbox(tmp_path)
    path = urlsplit(re.search(r"http\S+", mail.get_body().get_content())[0]).path
    with session(engine(here)) as db:
        db.execute(update(SignIn).values(expires=utcnow() - timedelta(seconds=1)))
    assert here.get(path).status_code == 410
    assert press(here, "/subscribe", path).status_code == 410
    assert here.get("/sign-in/forged").status_code == 410
    here.cookies.set("broadsheet_session", "forged")
    assert here.get("/account").status_code == 303
    for value in ("'; drop table session; --", "\x00", "a" * 5000, "\xff"):
        strange = here.get("/account", headers={"cookie": f'broadsheet_session="{value}"'.encode("latin-1")})
        assert strange.status_code in (303, 400, 431)


def test_an_address_gets_three_links_and_the_answer_is_the_same(here, tmp_path):
    texts = {press(here, "/sign-in", "/sign-in", email="a@example.org").text for _ in range(5)}
    assert len(texts) == 1
    assert len(outbox(tmp_path)) == accounts.MOST_LINKS
    assert "on its way" in press(here, "/sign-in", "/sign-in", email="b@example.org").text


@pytest.mark.parametrize(
    "email",
    [
        "",
        "ada",
        "a@b@c.org",
        "a@example.org\nBcc: x@example.org",
        "a b@example.org",
        "x" * 70 + "@e.org",
        "a@e.org, b@e.org",
    ],
)
def test_what_is_no_address_is_said_to_be_none(here, tmp_path, email):
    answer = press(here, "/sign-in", "/sign-in", email=email)
    assert answer.status_code == 422
    assert "no mail address" in answer.text
    assert outbox(tmp_path) == []


@pytest.mark.parametrize(
    "where",
    ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/\r\nx: y", "/" + "a" * 600],
)
def test_nobody_is_led_away(here, where):
    assert accounts._local(where) == "/"
    assert sign_in(here, "a@example.org", next=where).headers["location"] == "/"


def test_forms_of_others_do_nothing(here, tmp_path):
    sign_in(here, "a@example.org")
    for path in ("/sign-in", "/papers/1/vote", "/follow", "/sign-out", "/account/delete", "/subscribe"):
        for data in ({}, {"csrf": "0" * 64}):
            assert here.post(path, data=data).status_code == 403, path
    assert here.get("/account").status_code == 200


def test_the_cookie_changes_daily_and_old_ones_end(here):
    sign_in(here, "a@example.org")
    first = here.cookies["broadsheet_session"]
    assert here.get("/account").status_code == 200
    assert here.cookies["broadsheet_session"] == first
    with session(engine(here)) as db:
        db.execute(update(Session).values(created=utcnow() - timedelta(days=1, seconds=1)))
    assert here.get("/account").status_code == 200
    second = here.cookies["broadsheet_session"]
    assert second != first
    stale = {"cookie": f"broadsheet_session={first}"}
    assert (
        TestClient(here.app, follow_redirects=False).get("/account", headers=stale).status_code == 200
    )  # what was under way
    with session(engine(here)) as db:
        db.execute(update(Session).where(Session.token_hash == accounts.hashed(first)).values(expires=utcnow()))
    assert TestClient(here.app, follow_redirects=False).get("/account", headers=stale).status_code == 303
    assert here.get("/account").status_code == 200


def test_signing_out_here_and_everywhere(here):
    sign_in(here, "a@example.org")
    other = TestClient(here.app, follow_redirects=False, base_url=str(here.base_url))
    sign_in(other, "a@example.org", folder=here.folder)
    press(here, "/account", "/sign-out")
    assert here.get("/account").status_code == 303
    assert other.get("/account").status_code == 200
    sign_in(here, "a@example.org")
    press(here, "/account", "/sign-out", everywhere="1")
    assert other.get("/account").status_code == 303


# --- votes ------------------------------------------------------------------------------------------------------


def test_a_vote_counts_once_however_often_it_is_sent(client):
    sign_in(client, "a@example.org")
    for _ in range(3):
        answer = press(client, "/account", "/papers/1/vote", on="1")
        assert answer.status_code == 303
    with session(engine(client)) as db:
        paper = db.get(Paper, 1)
        assert paper.votes == 1
        assert paper.trend == pytest.approx((utcnow() - accounts.EPOCH) / accounts.HALVING, abs=1e-3)
    part = client.post("/papers/1/vote", data={"csrf": csrf_of(client), "on": "0"}, headers={"hx-request": "true"})
    assert 'aria-pressed="false"' in part.text
    assert "<html" not in part.text
    with session(engine(client)) as db:
        assert (db.get(Paper, 1).votes, db.get(Paper, 1).trend) == (0, None)
    assert press(client, "/account", "/papers/99999/vote").status_code == 404
    assert press(client, "/account", "/papers/1/murder").status_code == 404
    assert client.post("/papers/99999999999999999999/vote", data={"csrf": csrf_of(client)}).status_code == 404


def test_who_is_not_signed_in_votes_for_nothing(here):
    assert press(here, "/sign-in", "/papers/1/vote").status_code == 401
    assert 'href="/sign-in?next=' in here.get("/").text


def test_many_at_once_lose_no_vote(client):
    """Twelve people, each from a thread of its own, all for the same paper."""
    with session(engine(client)) as db:
        people = [accounts.account_of(db, f"p{number}@example.org").id for number in range(12)]
    errors = []

    def vote(account_id):
        try:
            for on in (True, False, True):
                with session(engine(client)) as db:
                    accounts.mark(db, account_id, 2, "vote", on)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=vote, args=(one,)) for one in people]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert errors == []
    with session(engine(client)) as db:
        assert db.get(Paper, 2).votes == 12
        times = db.scalars(select(Mark.time).where(Mark.paper_id == 2)).all()
        assert db.get(Paper, 2).trend == pytest.approx(accounts.trend(times), abs=1e-9)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 200))
@settings(deadline=None)
def test_a_trend_is_the_votes_each_halved_weekly(ages, later):
    """2^(trend - now in weeks) is the sum of the votes' weights, now and at any later time."""
    now = accounts.EPOCH + timedelta(weeks=150)
    value = accounts.trend([now - timedelta(weeks=age) for age in ages])
    for shift in (0, later):
        weights = sum(0.5 ** (age + shift) for age in ages)
        assert 2 ** (value - 150 - shift) == pytest.approx(weights, rel=1e-9)


@given(st.integers(0, 30), st.integers(1, 3000))
@settings(deadline=None)
def test_one_vote_now_against_many_of_some_weeks_ago(weeks, count):
    now = accounts.EPOCH + timedelta(weeks=100)
    one, many = accounts.trend([now]), accounts.trend([now - timedelta(weeks=weeks)] * count)
    if count != 2**weeks:
        assert (one > many) == (count < 2**weeks)
    else:
        assert math.isclose(one, many)
    assert accounts.trend([]) is None


# --- what is kept -----------------------------------------------------------------------------------------------


def filled(client, email="a@example.org"):
    """Somebody with something in every table that is about people."""
    with session(engine(client)) as db:
        account = accounts.account_of(db, email)
        accounts.start_session(db, account.id)
        accounts.mark(db, account.id, 1, "vote", True)
        accounts.mark(db, account.id, 2, "bookmark", True)
        db.add(Follow(account_id=account.id, kind="tag", value="cs.CL"))
        db.add(SignIn(token_hash=accounts.hashed(email), email=email, expires=utcnow() + timedelta(minutes=5)))
        db.add(Run(slug="gear", options={}, account_id=account.id))
        db.add(made := Subscription(email=email, frequency="daily", state="active"))
        db.flush()
        db.add(Delivery(subscription_id=made.id, issue="2026-11-28", message_id=f"<{email}>", state="sent"))
        return account


def about_people():
    """Names of the tables that are about somebody: they name an account or hold an address, or name one that does."""
    found = set()
    for table in Table.metadata.sorted_tables:
        named = {key.column.table.name for key in table.foreign_keys}
        if "email" in table.c or table.name == "account" or named & found:
            found.add(table.name)
    return found


def test_everything_that_is_kept_is_handed_out(client):
    account = filled(client)
    filled(client, "b@example.org")
    with session(engine(client)) as db:
        found = accounts.everything_of(db, account)
    assert set(found) == about_people()
    for name, rows in found.items():
        if name != "run_event":
            assert rows, f"nothing of {name}: a new table must be filled in `filled`"
        assert len(rows) == (2 if name == "mark" else 1 if name != "run_event" else 0)
    assert "b@example.org" not in str(found)
    assert not [row for rows in found.values() for row in rows if "token_hash" in row]


def test_deleting_leaves_nothing_and_the_votes_go(client):
    filled(client)
    filled(client, "b@example.org")
    sign_in(client, "a@example.org")
    export = client.get("/account/export.json").json()
    assert len(export["mark"]) == 2
    refused = press(client, "/account", "/account/delete")
    assert refused.status_code == 422
    assert "is gone" in press(client, "/account", "/account/delete", sure="yes").text
    assert client.get("/account").status_code == 303
    with session(engine(client)) as db:
        for table in Table.metadata.sorted_tables:
            if "email" in table.c:
                assert set(db.scalars(select(table.c.email))) <= {"b@example.org"}, table.name
        assert set(db.scalars(select(Mark.account_id))) == {db.scalar(select(Account.id))}
        assert db.get(Paper, 1).votes == 1
        assert db.scalar(select(func.count()).select_from(Delivery)) == 1
        runs = db.scalars(select(Run.account_id)).all()
        assert sorted(runs, key=bool)[0] is None  # the run stays, without a name
        assert len(runs) == 2


def test_follows_bring_papers(client):
    account = sign_in(client, "a@example.org")
    assert account.status_code == 303
    assert press(client, "/account", "/follow", kind="author", value="  Ada Lovelace ").status_code == 303
    assert press(client, "/account", "/follow", kind="tag", value="cs.CL").status_code == 303
    assert press(client, "/account", "/follow", kind="planet", value="Mars").status_code == 422
    today = date(2026, 11, 28)
    with session(engine(client)) as db:
        one = db.scalar(select(Account.id))
        new = {"title_key": "x", "published": utcnow(), "updated": utcnow()}
        db.add(
            Paper(
                id=9001, title="Hers", day=today, authors=[Author(place=0, name="Ada Lovelace", key="ada lovelace")], **new
            )
        )
        db.add(Paper(id=9002, title="Tagged", day=today, tags=[Tag(name="cs.CL")], **new))
        db.add(Paper(id=9003, title="Older", day=today - timedelta(days=9), tags=[Tag(name="cs.CL")], **new))
        db.flush()
        titles = {paper.title for paper in accounts.followed(db, one, today, today, 50)}
    assert {"Hers", "Tagged"} <= titles
    assert "Older" not in titles
    shown = client.get("/account").text
    assert "ada lovelace" in shown
    assert "Unfollow Ada Lovelace" in client.get("/search?author=Ada+Lovelace").text
    assert "Unfollow cs.CL" in client.get("/search?tag=cs.CL").text
    assert "Follow stat.ML" in client.get("/search?tag=stat.ML").text
    press(client, "/account", "/follow", kind="author", value="Ada Lovelace", on="0")
    assert "ada lovelace" not in client.get("/account").text


def test_a_link_whose_mail_was_not_sent_does_not_count(client):
    (client.folder / "outbox").write_text("in the way: a file where the folder should be")
    for _ in range(4):
        assert press(client, "/sign-in", "/sign-in", email="late@example.org").status_code == 503
    (client.folder / "outbox").unlink()
    assert press(client, "/sign-in", "/sign-in", email="late@example.org").status_code == 200
    assert len(outbox(client.folder)) == 1
