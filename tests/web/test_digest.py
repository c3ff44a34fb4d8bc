"""The digest: asked for twice, sent once, ended with one press, whatever is killed on the way."""

from __future__ import annotations

import re
import sqlite3
import threading
from datetime import date, timedelta
from urllib.parse import urlsplit

import pytest
from people import csrf_of, open_page, outbox, press
from sending import ISSUE, killed_sends, smtp, states, subscribers, taken
from sqlalchemy import select, update

from broadsheet.web import accounts, digest, mail
from broadsheet.web.db import session
from broadsheet.web.locks import Locked, only_one
from broadsheet.web.settings import Settings
from broadsheet.web.tables import Author, Delivery, Follow, Paper, Run, Subscription, utcnow

pytest.importorskip("aiosmtpd")


@pytest.fixture
def client(tmp_path, database_url):
    return open_page(tmp_path, database_url)


@pytest.fixture
def here(tmp_path):
    return open_page(tmp_path, "")


def parts(client):
    state = client.app.state
    return state.engine, state.settings, state.templates


# --- the whole way ----------------------------------------------------------------------------------------------


def test_from_the_form_to_the_last_digest(tmp_path, database_url):
    """Subscribe, confirm, a digest over real SMTP, one press, and none any more."""
    box = tmp_path / "taken"
    with smtp(box) as server:
        client = open_page(tmp_path, database_url, smtp=server)
        assert (
            "question is on its way"
            in press(client, "/subscribe", "/subscribe", email="Ada@Example.org", frequency="daily").text
        )
        engine, settings, templates = parts(client)
        assert str(digest.send(engine, settings, templates, ISSUE)) == "nothing to send"  # not before it is confirmed
        [asked] = taken(box)["ada@example.org"]
        path = urlsplit(re.search(r"http\S+", asked.get_body().get_content())[0]).path
        for _ in range(2):
            assert "Start it" in client.get(path).text
        assert str(digest.send(engine, settings, templates, ISSUE)) == "nothing to send"  # opening the link is not enough
        assert "settled" in press(client, "/subscribe", path).text
        assert str(digest.send(engine, settings, templates, ISSUE)) == "1 sent"
        assert str(digest.send(engine, settings, templates, ISSUE)) == "nothing to send"
        _, got = sorted(taken(box)["ada@example.org"], key=lambda one: "List-Id" in one)
        assert got["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert got["Auto-Submitted"] == "auto-generated"
        link = urlsplit(got["List-Unsubscribe"].strip("<>")).path
        text, html = got.get_body(("plain",)).get_content(), got.get_body(("html",)).get_content()
        assert link in text
        assert link in html
        assert "<script" not in html
        assert client.get(link).status_code == 200
        with session(engine) as db:
            assert db.scalar(select(Subscription.state)) == "active"  # opening it is not enough either
        done = client.post(link, data={"List-Unsubscribe": "One-Click"})  # as a mail program does, without any cookie
        assert done.status_code == 200
        assert str(digest.send(engine, settings, templates, digest.Issue.named("2026-11-29"))) == "nothing to send"


def test_the_question_is_asked_rarely_and_says_nothing_about_others(here, tmp_path):
    texts = {
        press(here, "/subscribe", "/subscribe", email="a@example.org", frequency=f).text
        for f in ("daily", "weekly", "daily")
    }
    assert len(texts) == 1
    assert len(outbox(tmp_path)) == 1
    subscribers(here.app.state.engine, "b@example.org")
    answer = press(here, "/subscribe", "/subscribe", email="b@example.org", frequency="daily")
    assert answer.text.replace("b@example.org", "a@example.org") in texts
    with session(here.app.state.engine) as db:
        assert db.scalar(select(Subscription.state).where(Subscription.email == "b@example.org")) == "active"


def test_tokens_are_good_for_what_they_were_made_for(here):
    signer = here.app.state.signer
    subscribers(here.app.state.engine, "a@example.org")
    confirm, stop = signer.sign("confirm", ["x@example.org", "daily"]), signer.sign("unsubscribe", 1)
    for token in (
        "",
        "x",
        stop,
        confirm[:-2],
        confirm + "x",
        signer.sign("confirm", "x"),
        signer.sign("confirm", ["x", "hourly"]),
    ):
        if token:
            assert press(here, "/subscribe", f"/subscribe/{token}").status_code == 410, token
    for token in ("x", confirm, signer.sign("unsubscribe", 99), signer.sign("unsubscribe", "1"), stop[:-1]):
        assert here.post(f"/unsubscribe/{token}").status_code == 410
    assert press(here, "/subscribe", "/subscribe", email="a@e.org", frequency="hourly").status_code == 422
    assert press(here, "/subscribe", f"/subscribe/{confirm}", token="0" * 64).status_code == 403
    assert here.post(f"/unsubscribe/{stop}").status_code == 200


# --- what is in it ----------------------------------------------------------------------------------------------


def test_follows_come_first_each_paper_once_and_runs_are_told(client):
    engine, settings, templates = parts(client)
    new = {"title_key": "x", "published": utcnow(), "updated": utcnow(), "day": ISSUE.since}
    with session(engine) as db:
        one = accounts.account_of(db, "a@example.org")
        db.add(Follow(account_id=one.id, kind="author", value="ada lovelace"))
        db.add(
            Paper(id=9001, title="Hers", votes=3, authors=[Author(place=0, name="Ada Lovelace", key="ada lovelace")], **new)
        )
        db.add(Paper(id=9002, title="<b>Liked\r\nBcc: x@y.org</b>", votes=90, **new))
        for slug in ("gear", "gear", "kivi"):
            db.add(Run(slug=slug, options={}, state="done", ended=utcnow().replace(year=2026, month=11, day=28)))
        db.add(Run(slug="h2o", options={}, state="failed", ended=utcnow().replace(year=2026, month=11, day=28)))
    subscribers(engine, "a@example.org", "b@example.org")
    with session(engine) as db:
        found = {section.title: section for section in digest.sections(db, ISSUE, "a@example.org")}
        titles = [paper.title for section in found.values() for paper in section.papers]
        assert [paper.title for paper in found["Whom and what you follow"].papers] == ["Hers"]
        assert len(titles) == len(set(titles)) or titles.count("Hers") == 1
        assert sorted(run.slug for run in found["What ran"].runs) == ["gear", "kivi"]
        others = digest.sections(db, ISSUE, "b@example.org")
        assert [section.title for section in others] == ["The papers", "What ran"]
        assert others[0].papers[0].votes == 90
        to = db.scalar(select(Subscription).where(Subscription.email == "b@example.org"))
        made = digest.message(db, settings, templates, ISSUE, to)
        assert made["Bcc"] is None
        assert "\n" not in made["Subject"]
        assert "&lt;b&gt;Liked" in made.get_body(("html",)).get_content()
        nothing = digest.Issue.named("1999-01-01")
        assert digest.message(db, settings, templates, nothing, to) is None
    assert str(digest.send(engine, settings, templates, nothing)) == "2 empty"


def test_the_link_that_ends_it_stays_whole_in_its_header(tmp_path):
    """Whatever the page's address: an encoded one is a link that no mail program finds."""
    client = open_page(tmp_path, "", url="https://papers.a-rather-long-name.example.org/broadsheet/of/efficient/models")
    engine, settings, templates = parts(client)
    subscribers(engine, "ä@example.org", "a@example.org")
    with session(engine) as db:
        for to in db.scalars(select(Subscription)):
            raw = digest.message(db, settings, templates, ISSUE, to).as_bytes().decode()
            [line] = re.findall(r"^List-Unsubscribe: (.*)\r$", raw, re.M)
            assert re.fullmatch(re.escape(f"<{settings.url}/unsubscribe/") + r"[\w.-]+>", line)
            assert max(map(len, raw.splitlines())) < 998


def test_issues_are_the_last_whole_day_and_week():
    sunday = date(2026, 11, 29)
    assert digest.Issue.of("daily", sunday).name == "2026-11-28"
    week = digest.Issue.of("weekly", sunday)
    assert (week.name, week.since, week.until) == ("2026-W47", date(2026, 11, 16), date(2026, 11, 22))
    assert digest.Issue.of("weekly", sunday + timedelta(days=1)).name == "2026-W48"
    for name in ("2026-11-28", "2026-W47", "2026-W53"):
        assert digest.Issue.named(name).name == name
    for name in ("", "2026-13-01", "2026-W54", "yesterday"):
        with pytest.raises(ValueError, match="2026-W48"):
            digest.Issue.named(name)


# --- sending ----------------------------------------------------------------------------------------------------


def test_what_a_server_says_is_believed(client, tmp_path, monkeypatch):
    """4xx is tried again, later and later; 5xx counts as a bounce; a connection that broke after the text is unknown."""
    box = tmp_path / "taken"
    emails = ("a@example.org", "450-b@example.org", "550-c@example.org", "drop-d@example.org", "ü@example.org")
    with smtp(box) as server:
        engine, settings, templates = parts(client)
        settings = Settings.from_environment({"BROADSHEET_HOME": str(tmp_path)}, database=settings.database, smtp=server)
        subscribers(engine, *emails)
        first = digest.send(engine, settings, templates, ISSUE)
        assert first.counts == {"sent": 2, "later": 1, "refused": 1, "unknown": 1}
        assert digest.send(engine, settings, templates, ISSUE).counts == {}  # not yet
        with session(engine) as db:
            db.execute(update(Delivery).values(time=utcnow() - timedelta(days=2)))
        assert digest.send(engine, settings, templates, ISSUE).counts == {"later": 1}
        assert digest.retry(engine, settings) == 1
        assert digest.send(engine, settings, templates, ISSUE).counts == {"later": 1}
    assert states(engine) == dict(zip(emails, ("sent", "later", "refused", "unknown", "sent"), strict=True))
    assert {email: len(found) for email, found in taken(box).items()} == {emails[0]: 1, emails[3]: 1, emails[4]: 1}
    for number in range(2):  # two more refusals end it
        with smtp(box) as server:
            again = Settings.from_environment({"BROADSHEET_HOME": str(tmp_path)}, database=settings.database, smtp=server)
            digest.send(engine, again, templates, digest.Issue.named(f"2026-11-2{6 + number}"))
    with session(engine) as db:
        assert db.scalar(select(Subscription.state).where(Subscription.email == emails[2])) == "bounced"


def test_a_server_that_is_not_there_or_has_no_tls_gets_nothing(here, tmp_path):
    engine, _, templates = parts(here)
    subscribers(engine, "a@example.org")
    found = {}
    with smtp(tmp_path / "taken") as server:
        for name, address in {"closed": "smtp://127.0.0.1:9", "plain": server.replace("smtp:", "smtp+starttls:")}.items():
            settings = Settings.from_environment({"BROADSHEET_HOME": str(tmp_path)}, smtp=address)
            digest.retry(engine, settings)
            found[name] = digest.send(engine, settings, templates, ISSUE).counts
    assert found == {"closed": {"later": 1}, "plain": {"later": 1}}
    assert taken(tmp_path / "taken") == {}
    with pytest.raises(ValueError, match="BROADSHEET_SMTP"):
        mail.post(Settings.from_environment({"BROADSHEET_HOME": str(tmp_path)}, smtp="http://x"))


def test_a_mail_that_left_while_the_database_was_locked_is_known_to_have_left(tmp_path, monkeypatch):
    monkeypatch.setattr("broadsheet.web.db.LOCKED_FOR", 0.05)
    engine, settings, templates = parts(open_page(tmp_path, ""))
    subscribers(engine, "a@example.org")
    deliver, locks = mail.Outbox.deliver, []

    def locked_meanwhile(*given):
        done = deliver(*given)
        locks.append(sqlite3.connect(tmp_path / "web.sqlite", isolation_level=None, check_same_thread=False))
        locks[0].execute("begin immediate")
        threading.Timer(0.3, locks[0].rollback).start()
        return done

    monkeypatch.setattr(mail.Outbox, "deliver", locked_meanwhile)
    assert str(digest.send(engine, settings, templates, ISSUE)) == "1 sent"
    assert states(engine) == {"a@example.org": "sent"}
    locks[0].close()


def test_two_senders_never_work_at_once(client):
    engine, settings, templates = parts(client)
    subscribers(engine, "a@example.org")
    with only_one(engine, settings, "sender"), pytest.raises(Locked, match="another sender"):
        digest.send(engine, settings, templates, ISSUE)
    assert str(digest.send(engine, settings, templates, ISSUE)) == "1 sent"


def test_a_killed_sender_mails_nobody_twice(tmp_path, database_url):
    got, ended, died = killed_sends(tmp_path, database_url, 30, 3, 0)
    assert died >= 2
    assert all(len(mails) == 1 for mails in got.values())
    assert set(ended.values()) <= {"sent", "unknown"}
    assert list(ended.values()).count("unknown") <= died
    assert {email for email, state in ended.items() if state == "sent"} <= set(got)
    assert len(ended) == 30


# --- bounces ----------------------------------------------------------------------------------------------------


def report(message_id, status="5.1.1", action="failed", kind="text/rfc822-headers"):
    """A notification as mail servers write it (RFC 3464)."""
    back = f"Message-ID: {message_id}\nSubject: Broadsheet\nTo: a@example.org\n"
    return (
        "From: MAILER-DAEMON@mail.example.org\nTo: papers@example.org\nSubject: Undelivered\nMIME-Version: 1.0\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="b"\n\n'
        "--b\nContent-Type: text/plain\n\nSorry.\n"
        "--b\nContent-Type: message/delivery-status\n\nReporting-MTA: dns; mail.example.org\n\n"
        f"Final-Recipient: rfc822; a@example.org\nAction: {action}\nStatus: {status}\n"
        "Diagnostic-Code: smtp; 550 no such user\n\n"
        f"--b\nContent-Type: {kind}\n\n{back}\n--b--\n"
    ).encode()


def test_three_hard_bounces_in_a_row_end_it_and_forged_ones_do_nothing(client):
    engine, settings, templates = parts(client)
    subscribers(engine, "a@example.org")

    def sent(day):
        digest.send(engine, settings, templates, digest.Issue.named(f"2026-11-{day}"))
        with session(engine) as db:
            return db.scalar(select(Delivery.message_id).where(Delivery.issue == f"2026-11-{day}"))

    first = sent(25)
    forged = [
        report("<made-up@example.org>"), report("' or 1=1 --"), report(first, action="delayed"),
        report(first, action="relayed"), b"", b"\x00\xff" * 100, b"Subject: hello\n\nno report",
        report(first).replace(b"multipart/report", b"multipart/mixed"),
    ]  # fmt: skip
    assert digest.bounced(engine, forged) == {"hard": 0, "soft": 0, "ignored": len(forged)}
    assert digest.bounced(engine, [report(first), report(first)]) == {"hard": 1, "soft": 0, "ignored": 1}  # once
    assert digest.bounced(engine, [report(sent(26), status="4.2.2", kind="message/rfc822")]) == {
        "hard": 0,
        "soft": 1,
        "ignored": 0,
    }
    assert digest.bounced(engine, [report(sent(27))])["hard"] == 1
    with session(engine) as db:
        assert db.scalar(select(Subscription.state)) == "active"
    assert digest.bounced(engine, [report(sent(28))])["hard"] == 1
    with session(engine) as db:
        assert db.scalar(select(Subscription.state)) == "bounced"
    assert sent(29) is None


def test_bounces_that_are_not_in_a_row_do_not_add_up(here):
    engine, settings, templates = parts(here)
    subscribers(engine, "a@example.org")
    for day in ("24", "25", "26", "27", "28"):
        digest.send(engine, settings, templates, digest.Issue.named(f"2026-11-{day}"))
        with session(engine) as db:
            last = db.scalar(select(Delivery).order_by(Delivery.id.desc()))
            last.time = utcnow() - timedelta(days=1)
            about = last.message_id
        if day in ("24", "26", "28"):
            digest.bounced(engine, [report(about)])
    with session(engine) as db:
        assert db.scalar(select(Subscription.bounces)) == 1


# --- the command ------------------------------------------------------------------------------------------------


def test_the_commands_tell_what_they_do(here, tmp_path, monkeypatch, capsys):
    from broadsheet.cli.digest import digest as app

    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path))
    subscribers(here.app.state.engine, "a@example.org")

    def run(*arguments):
        app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    assert "Subject: Broadsheet: " in run("preview", "--issue", "2026-11-28")
    run("preview", "--issue", "2026-11-28", "--html", str(tmp_path / "digest.html"))
    assert "Broadsheet" in (tmp_path / "digest.html").read_text(encoding="utf-8")
    assert "left as files" in run("send", "--issue", "2026-11-28")
    assert "nothing to send" in run("send", "--issue", "2026-11-28")
    listed = run("list", "--errors")
    assert "1 active" in listed
    assert "1 sent" in listed
    assert "@" not in listed
    box = tmp_path / "maildir"
    for name in ("new", "cur", "tmp"):
        (box / name).mkdir(parents=True)
    [mail_sent] = outbox(tmp_path)
    (box / "new" / "1.x").write_bytes(report(mail_sent["Message-ID"]))
    assert run("bounces", "--maildir", str(box)).startswith("1 hard")
    assert run("bounces", "--maildir", str(box)).startswith("0 hard")
    for bad in (
        ["bounces"],
        ["bounces", "--maildir", str(tmp_path / "none")],
        ["preview", "--issue", "1999-01-01"],
        ["send", "--frequency", "hourly"],
    ):
        with pytest.raises(ValueError):
            app(bad, standalone_mode=False)


def test_no_address_and_no_token_reach_the_log(here, tmp_path, caplog):
    with caplog.at_level("DEBUG", "broadsheet"):
        press(here, "/subscribe", "/subscribe", email="secret@example.org", frequency="daily")
        press(here, "/sign-in", "/sign-in", email="secret@example.org")
        here.post(f"/unsubscribe/{here.app.state.signer.sign('unsubscribe', 1)}")
    assert "secret@" not in caplog.text
    assert csrf_of(here) not in caplog.text
