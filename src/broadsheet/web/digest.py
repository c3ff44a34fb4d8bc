"""The digest: who gets it, what is in it, and sending it once.

A subscription begins with a mail that asks whether it was meant (double opt-in), and every digest has a link that ends it.

Sending. A *delivery* is one issue (a day, a week) to one subscriber, and the database holds at most one. It goes through
states of which each is committed before the next step:

    claimed   nothing of the text has left        -> after a crash it is simply sent again
    sending   the text may have left              -> after a crash nobody can know: it becomes ``unknown`` and is left alone
    sent, later, refused                          what the mail server said

So whatever kills the sender, nobody gets an issue twice, and only a delivery whose text was on its way at that moment may be
lost: at most one a crash, which is named. One sender works at a time (`locks.only_one`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage, Message
from email.policy import default
from typing import Annotated, Any

from fastapi import Depends, Form, HTTPException, Request
from fastapi.responses import Response
from jinja2 import Environment
from sqlalchemy import Engine, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from . import accounts, mail, papers, turns
from .db import insist, reading, session
from .locks import only_one
from .papers import Whole
from .render import long_day, page
from .security import Signer, from_our_page
from .settings import Settings
from .tables import Account, Delivery, Paper, Run, Subscription, utcnow
from .words import clean

log = logging.getLogger(__name__)
router = turns.router(include_in_schema=False)

FREQUENCIES = ("daily", "weekly")
#: A confirmation can be asked for again after this, and its link is good for that long.
ASKED_AGAIN, CONFIRM_WITHIN = timedelta(minutes=10), timedelta(days=7)
#: Papers of a section.
A_SECTION = 10
#: A mail that a server did not take now is tried again after so long, twice that, and so on, so many times.
BACKOFF, TRIES = timedelta(minutes=5), 6
#: Hard bounces in a row that end a subscription.
BOUNCES = 3


# --- subscribing ------------------------------------------------------------------------------------------------


@router.get("/subscribe")
def subscribe_form(request: Request, email: str = "", frequency: str = "weekly") -> Response:
    """The form."""
    account = accounts.current(request)
    shown = clean(email, 254) or (account.email if account else "")
    return page(request, "subscribe.html", email=shown, frequency=frequency if frequency in FREQUENCIES else "weekly")


@router.post("/subscribe", dependencies=[Depends(from_our_page)])
def subscribe(
    request: Request, email: Annotated[str, Form(max_length=320)] = "", frequency: Annotated[str, Form()] = "weekly"
) -> Response:
    """Asks the address whether it was meant. The answer is the same whoever is subscribed already."""
    if frequency not in FREQUENCIES:
        raise HTTPException(422, "The digest comes daily or weekly.")
    try:
        to = mail.address(email)
    except ValueError as error:
        return page(request, "subscribe.html", 422, email=clean(email, 320), frequency=frequency, error=str(error))
    settings, signer, now = request.app.state.settings, request.app.state.signer, utcnow()
    try:
        with session(request.app.state.engine) as db:
            found = db.scalar(select(Subscription).where(Subscription.email == to).with_for_update())
            due = found is None or found.asked is None or now - found.asked >= ASKED_AGAIN
            if found is None:
                db.add(Subscription(email=to, frequency=frequency, asked=now))
            elif due:
                found.asked = now
    except IntegrityError:  # the same address, asked for at the same moment: that request sends the question
        due = False
    if due:
        link = f"{settings.url}/subscribe/{signer.sign('confirm', [to, frequency])}"
        text = request.app.state.templates.get_template("mail/confirm.txt").render(link=link, frequency=frequency)
        asked = mail.message(settings, to, "Broadsheet's digest: was it you?", text)
        with mail.post(settings) as post:
            if post.deliver(asked, to).outcome != "sent":
                raise HTTPException(503, "The mail could not be sent just now. Try again in ten minutes.")
    text = f"If {to} can get mail, a question is on its way: was it you? The link in it starts the digest."
    return page(request, "notice.html", title="Look into your mail", text=text)


@router.get("/subscribe/{token}")
def open_confirmation(request: Request, token: str) -> Response:
    """What the link shows: a button."""
    to, frequency = _confirmed(request, token)
    text = f"Broadsheet's {frequency} digest goes to {to}."
    return page(
        request,
        "press.html",
        title="Start the digest",
        text=text,
        action=f"/subscribe/{token}",
        button="Start it",
        guarded=True,
    )


@router.post("/subscribe/{token}", dependencies=[Depends(from_our_page)])
def confirm(request: Request, token: str) -> Response:
    """Starts the digest."""
    to, frequency = _confirmed(request, token)
    with session(request.app.state.engine) as db:
        start(db, to, frequency)
    text = f"The {frequency} digest goes to {to} from now on. Every one has a link that ends it."
    return page(request, "notice.html", title="That is settled", text=text)


def start(db: Session, email: str, frequency: str) -> None:
    """An active subscription of an address, new or old."""
    values = {"frequency": frequency, "state": "active", "confirmed": utcnow(), "bounces": 0}
    if not db.execute(update(Subscription).where(Subscription.email == email).values(**values)).rowcount:  # type: ignore[attr-defined]
        db.add(Subscription(email=email, **values))


def _confirmed(request: Request, token: str) -> tuple[str, str]:
    said = request.app.state.signer.read("confirm", token, int(CONFIRM_WITHIN.total_seconds()))
    if not isinstance(said, list) or len(said) != 2 or said[1] not in FREQUENCIES:
        raise HTTPException(410, "This link is not good, or no longer: links are good for a week. Subscribe again.")
    return str(said[0]), str(said[1])


@router.get("/unsubscribe/{token}")
def open_unsubscribe(request: Request, token: str) -> Response:
    """What the link in a digest shows: a button."""
    with reading(request.app.state.engine) as db:
        found = _subscription(request, db, token)
        text = f"{found.email} gets no more digests."
    return page(
        request,
        "press.html",
        title="No more digests?",
        text=text,
        action=f"/unsubscribe/{token}",
        button="Stop it",
        guarded=False,
    )


@router.post("/unsubscribe/{token}")
def unsubscribe(request: Request, token: str) -> Response:
    """Ends a subscription. Mail programs press this by themselves (RFC 8058), so no form guards it: the token does."""
    with session(request.app.state.engine) as db:
        found = _subscription(request, db, token)
        found.state = "stopped"
    text = f"{found.email} gets no more digests."
    return page(request, "notice.html", title="Done", text=text)


def _subscription(request: Request, db: Session, token: str) -> Subscription:
    number = request.app.state.signer.read("unsubscribe", token)
    found = db.get(Subscription, number) if isinstance(number, int) else None
    if found is None:
        raise HTTPException(410, "This link is not good: copy it whole from the mail. Nobody is subscribed by it.")
    return found


# --- what is in it ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Issue:
    """The days that a digest is about: ``name`` is 2026-11-29 or 2026-W48."""

    name: str
    since: date
    until: date

    @classmethod
    def of(cls, frequency: str, day: date) -> Issue:
        """The last whole day, or whole week (from Monday), before ``day``."""
        if frequency == "daily":
            before = day - timedelta(days=1)
            return cls(before.isoformat(), before, before)
        monday = day - timedelta(days=day.weekday() + 7)
        year, week, _ = monday.isocalendar()
        return cls(f"{year}-W{week:02}", monday, monday + timedelta(days=6))

    @classmethod
    def named(cls, name: str) -> Issue:
        """The issue of that name. Raises ValueError."""
        try:
            if found := re.fullmatch(r"(\d{4})-W(\d\d)", name):
                monday = date.fromisocalendar(int(found[1]), int(found[2]), 1)
                return cls(name, monday, monday + timedelta(days=6))
            day = date.fromisoformat(name)
            return cls(day.isoformat(), day, day)
        except ValueError:
            raise ValueError(f"an issue is a day such as 2026-11-29 or a week such as 2026-W48, got '{name}'") from None

    @property
    def frequency(self) -> str:
        return "daily" if self.since == self.until else "weekly"

    @property
    def title(self) -> str:
        if self.since == self.until:
            return long_day(self.since)
        return f"the week from {long_day(self.since).partition(', ')[2]} to {long_day(self.until).partition(', ')[2]}"


@dataclass
class Section:
    """A headline with papers, or runs, below it."""

    title: str
    papers: Sequence[Whole] = ()
    runs: Sequence[Run] = ()


def sections(db: Session, issue: Issue, email: str = "") -> list[Section]:
    """What an issue says to an address: its follows, what was liked most, what ran. Empty sections are left out; a paper
    stands once."""
    account = db.scalar(select(Account).where(Account.email == email)) if email else None
    mine = accounts.followed(db, account.id, issue.since, issue.until, A_SECTION) if account else []
    known = {paper.id for paper in mine}
    within = select(Paper.id).where(Paper.day.between(issue.since, issue.until))
    liked = within.where(Paper.votes > 0, Paper.id.not_in(known))
    best = list(db.scalars(liked.order_by(Paper.votes.desc(), Paper.id.desc()).limit(A_SECTION)))
    if left := A_SECTION - len(best):
        new = within.where(Paper.id.not_in({*known, *best}))
        best += db.scalars(new.order_by(Paper.running.desc(), Paper.id.desc()).limit(left))
    end = datetime.combine(issue.until + timedelta(days=1), datetime.min.time())
    during = Run.ended >= datetime.combine(issue.since, datetime.min.time()), Run.ended < end
    ran: dict[str, Run] = {}
    for run in db.scalars(select(Run).where(Run.state == "done", *during).order_by(Run.ended.desc())):
        ran.setdefault(run.slug, run)  # the newest of each paper
    found = [
        Section("Whom and what you follow", mine),
        Section("The papers", papers.read(db, best)),
        Section("What ran", runs=list(ran.values())[:A_SECTION]),
    ]
    return [section for section in found if section.papers or section.runs]


def message(
    db: Session, settings: Settings, templates: Environment, issue: Issue, to: Subscription, message_id: str = ""
) -> EmailMessage | None:
    """The digest for a subscriber; None where there is nothing to say."""
    found = sections(db, issue, to.email)
    if not found:
        return None
    link = f"{settings.url}/unsubscribe/{Signer(settings.secret).sign('unsubscribe', to.id)}"
    shown = {"title": issue.title, "sections": found, "settings": settings, "unsubscribe": link}
    text, html = (templates.get_template(f"mail/digest.{kind}").render(**shown) for kind in ("txt", "html"))
    headline = next((section.papers[0].title for section in found if section.papers), f"{len(found[0].runs)} papers ran")
    made = mail.message(settings, to.email, f"Broadsheet: {clean(headline, 120)}", text, html, message_id)
    made["List-Id"] = f"Broadsheet digest <digest.{made['Message-ID'].rpartition('@')[2].rstrip('>')}>"
    made["List-Unsubscribe"] = f"<{link}>"
    made["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    made["Precedence"] = "bulk"
    return made


def html_of(db: Session, settings: Settings, templates: Environment, issue: Issue, email: str = "reader@example.org") -> str:
    """The HTML part of an issue, as that address would get it."""
    made = message(db, settings, templates, issue, Subscription(id=0, email=email, frequency=issue.frequency))
    body = made and made.get_body(("html",))
    return body.get_content() if body else ""


# --- sending ----------------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """What a run of the sender did, by outcome; ``empty``: subscribers for whom the issue had nothing to say."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {outcome}" for outcome, count in self.counts.items()) or "nothing to send"


def send(
    engine: Engine,
    settings: Settings,
    templates: Environment,
    issue: Issue,
    tick: Callable[[int, int], None] = lambda done, of: None,
) -> Sent:
    """Sends an issue to every active subscriber of its frequency who has not had it; see the module for what a crash does.

    Raises `locks.Locked` while another sender works.
    """
    done = Sent()
    with only_one(engine, settings, "sender"):
        recover(engine)
        due = list(_due(engine, issue))
        with mail.post(settings) as post:
            for number, subscription_id in enumerate(due):
                tick(number, len(due))
                if outcome := _send_one(engine, settings, templates, post, issue, subscription_id):
                    done.add(outcome)
            tick(len(due), len(due))
    return done


def recover(engine: Engine) -> int:
    """What a killed sender left between `sending` and the server's answer is ``unknown``; how many there were. Only for who
    holds the sender's lock."""
    with session(engine) as db:
        left = update(Delivery).where(Delivery.state == "sending")
        return db.execute(
            left.values(state="unknown", error="the sender was stopped while the text was on its way")
        ).rowcount  # type: ignore[attr-defined]


def _due(engine: Engine, issue: Issue) -> Iterator[int]:
    """Subscriptions that have not had the issue, or whose delivery may be tried (again) now."""
    with reading(engine) as db:
        theirs = (Delivery.subscription_id == Subscription.id) & (Delivery.issue == issue.name)
        rows = db.execute(
            select(Subscription.id, Delivery.state, Delivery.tries, Delivery.time).outerjoin(Delivery, theirs)
            .where(Subscription.state == "active", Subscription.frequency == issue.frequency).order_by(Subscription.id)
        ).all()  # fmt: skip
    now = utcnow()
    for subscription_id, state, tries, time in rows:
        waited = state == "later" and tries < TRIES and now - time >= BACKOFF * 2 ** (tries - 1)
        if state in (None, "claimed") or waited:
            yield subscription_id


def _send_one(
    engine: Engine, settings: Settings, templates: Environment, post: mail.Post, issue: Issue, subscription_id: int
) -> str | None:
    try:
        with session(engine) as db:
            to = db.get(Subscription, subscription_id)
            if to is None or to.state != "active":  # it ended meanwhile
                return None
            this = select(Delivery).where(Delivery.subscription_id == to.id, Delivery.issue == issue.name)
            delivery = db.scalar(this)
            if delivery is None:
                delivery = Delivery(
                    subscription_id=to.id, issue=issue.name, message_id=mail.new_id(settings), state="claimed"
                )
                db.add(delivery)
            made = message(db, settings, templates, issue, to, delivery.message_id)
            if made is None:
                db.expunge(delivery)
                return "empty"
            delivery.state, delivery.tries, delivery.time = "claimed", (delivery.tries or 0) + 1, utcnow()
            _calm(db, to, issue)
    except IntegrityError:  # somebody else claimed it
        return None
    moved = _Mover(engine, delivery.id)
    done = post.deliver(made, to.email, lambda: moved("sending"))

    def keep() -> None:
        moved(done.outcome, done.error)
        if done.outcome == "refused":
            with session(engine) as db:
                _bounced(db, subscription_id)

    insist(keep, lambda why: log.warning("how it went is not stored, trying again: %s", why))
    return done.outcome


@dataclass
class _Mover:
    """Writes a delivery's next state, each in a transaction of its own."""

    engine: Engine
    delivery_id: int

    def __call__(self, state: str, error: str = "") -> None:
        with session(self.engine) as db:
            this = update(Delivery).where(Delivery.id == self.delivery_id)
            db.execute(this.values(state=state, error=error[:500], time=utcnow()))


def retry(engine: Engine, settings: Settings) -> int:
    """Makes everything that certainly did not go out, or was given up, due at once; how many. What is ``unknown`` is not
    among it: whether it went out nobody can tell."""
    with only_one(engine, settings, "sender"):
        recover(engine)
        with session(engine) as db:
            again = update(Delivery).where(Delivery.state.in_(("later", "claimed")))
            return db.execute(again.values(state="claimed", tries=0)).rowcount  # type: ignore[attr-defined]


# --- bounces ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounce:
    """What a delivery-status notification says: of which message, and whether for good."""

    message_id: str
    hard: bool
    reason: str


def read_bounce(raw: bytes) -> Bounce | None:
    """The bounce that a mail reports (RFC 3464), or None: it is no report, or of a delay, or does not say of what."""
    try:
        report = message_from_bytes(raw, policy=default)
        parts = list(report.walk())
    except (ValueError, LookupError, RecursionError, AttributeError, TypeError):  # hostile mail
        return None
    if report.get_content_type() != "multipart/report":
        return None
    status, action, reason, about = "", "", "", ""
    for part in parts[:50]:
        kind = part.get_content_type()
        if kind == "message/delivery-status":
            for block in _blocks(part):
                status, action = _field(block, "Status") or status, _field(block, "Action").lower() or action
                reason = _field(block, "Diagnostic-Code") or reason
        elif (
            kind in ("message/rfc822", "text/rfc822-headers", "message/rfc822-headers", "message/global-headers")
            and not about
        ):
            about = _message_id(part)
    if action != "failed" or not about:
        return None
    return Bounce(about, not status.startswith("4"), clean(f"{status} {reason}", 300))


def _blocks(part: Message) -> list[Message]:
    inside = part.get_payload()
    return [block for block in inside if isinstance(block, Message)] if isinstance(inside, list) else []


def _field(block: Message, name: str) -> str:
    try:
        return str(block.get(name, "")).strip()
    except (ValueError, TypeError, AttributeError):
        return ""


def _message_id(part: Message) -> str:
    """The Message-ID of what came back, whole or its headers alone."""
    inside = part.get_payload()
    if isinstance(inside, list):
        return _field(inside[0], "Message-ID") if inside and isinstance(inside[0], Message) else ""
    found = re.search(r"^message-id:\s*(<[^<>\s]{1,200}>)", str(inside), re.I | re.M)
    return found[1] if found else ""


def bounced(engine: Engine, mails: Iterable[bytes]) -> dict[str, int]:
    """Takes note of bounces. A notification counts only if it quotes the Message-ID of a digest of ours, which none but its
    receiver and the servers on its way have seen, and once."""
    counts = {"hard": 0, "soft": 0, "ignored": 0}
    for raw in mails:
        found = read_bounce(raw)
        with session(engine) as db:
            delivery = db.scalar(select(Delivery).where(Delivery.message_id == found.message_id)) if found else None
            if found is None or delivery is None or delivery.state == "bounced":
                counts["ignored"] += 1
                continue
            delivery.state, delivery.error = "bounced", found.reason
            counts["hard" if found.hard else "soft"] += 1
            if found.hard:  # a full mailbox is no reason to go
                _bounced(db, delivery.subscription_id)
    return counts


def _bounced(db: Session, subscription_id: int) -> None:
    """One more hard bounce in a row; the last one ends the subscription."""
    found = db.get(Subscription, subscription_id, with_for_update=True)
    if found:
        found.bounces += 1
        if found.bounces >= BOUNCES and found.state == "active":
            found.state = "bounced"


def _calm(db: Session, to: Subscription, issue: Issue) -> None:
    """Bounces in a row are over when an earlier digest was taken and nothing came back for a day."""
    if not to.bounces:
        return
    earlier = select(Delivery).where(Delivery.subscription_id == to.id, Delivery.issue != issue.name)
    last = db.scalar(earlier.order_by(Delivery.id.desc()).limit(1))
    if last is not None and last.state == "sent" and utcnow() - last.time >= timedelta(days=1):
        to.bounces = 0


def counts(db: Session) -> dict[str, Any]:
    """How many subscriptions and deliveries there are, by state; no addresses."""
    by = {
        "subscriptions": select(Subscription.state, func.count()).group_by(Subscription.state),
        "deliveries": select(Delivery.state, func.count()).group_by(Delivery.state),
    }
    return {name: dict(db.execute(rows).tuples().all()) for name, rows in by.items()}
