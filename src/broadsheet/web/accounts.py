"""People: signing in by mail, votes, bookmarks, follows, and what is kept of somebody.

There are no passwords. Who wants to sign in gets a link by mail; what is stored of links and browsers are hashes. A link is
opened before it is used (programs that check mails open every link), so it shows a button, and the button signs in.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from http.cookies import CookieError, SimpleCookie
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio.to_thread import run_sync
from fastapi import Depends, Form, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from sqlalchemy import Engine, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as Database
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import mail, papers, turns
from .db import reading, session
from .papers import Whole
from .render import address_of, page
from .security import SESSION_COOKIE, from_our_page, hashed
from .tables import Account, Author, Follow, Mark, Paper, Session, SignIn, Subscription, Table, Tag, utcnow
from .words import clean

router = turns.router(include_in_schema=False)
log = logging.getLogger(__name__)

LINK_GOOD_FOR = timedelta(minutes=15)
SESSION_GOOD_FOR = timedelta(days=30)
#: A browser's cookie is changed this often; the old one is good for a little longer, for what is under way.
ROTATED_AFTER, GRACE = timedelta(days=1), timedelta(minutes=1)
#: Links that an address is sent within their time: nobody can fill another's mailbox.
MOST_LINKS = 3
#: Things that one account may mark or follow.
MOST_MARKS, MOST_FOLLOWS = 20_000, 500
#: When trends begin to count, and how long it takes until a vote counts half.
EPOCH, HALVING = datetime(2024, 1, 1), timedelta(days=7)
MARKS = ("vote", "bookmark")
FOLLOWS = {"tag": Tag.name, "author": Author.key}

OurPage = Depends(from_our_page)


# --- who is it --------------------------------------------------------------------------------------------------


def current(request: Request) -> Account | None:
    """Who is signed in; `Recognise` has found out."""
    return getattr(request.state, "account", None)


def signed_in(request: Request) -> Account:
    """A dependency of what only somebody with an account may do: 401 without."""
    account = current(request)
    if account is None:
        raise HTTPException(401, "Sign in first: the link is at the foot of the page.")
    return account


SignedIn = Annotated[Account, Depends(signed_in)]


class Recognise:
    """Middleware: who a request is from (``request.state.account``), by the browser's cookie. Changes the cookie daily."""

    def __init__(self, app: ASGIApp, engine: Engine, https: bool = False):
        self.app = app
        self.engine = engine
        self.https = https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = _cookie(scope) if scope["type"] == "http" else ""
        if not token:
            return await self.app(scope, receive, send)
        account, changed = await run_sync(self._find, token)
        scope.setdefault("state", {})["account"] = account

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                if changed and not any(SESSION_COOKIE in value for value in headers.getlist("set-cookie")):
                    holder = Response()
                    set_session(holder, changed, self.https)
                    headers.append("set-cookie", holder.headers["set-cookie"])
                    message = {**message, "headers": headers.raw}
            await send(message)

        return await self.app(scope, receive, with_cookie if changed else send)

    def _find(self, token: str) -> tuple[Account | None, str]:
        """The account of a cookie, and the cookie that takes its place, if one is due."""
        now = utcnow()
        with reading(self.engine) as db:
            found = db.get(Session, hashed(token))
            if found is None or found.expires <= now:
                return None, ""
            account = db.get(Account, found.account_id)
        if now - found.created < ROTATED_AFTER or found.expires - now <= GRACE:  # or it was changed just now
            return account, ""
        with session(self.engine) as db:
            db.execute(update(Session).where(Session.token_hash == found.token_hash).values(expires=now + GRACE))
            return account, start_session(db, found.account_id)


def _cookie(scope: Scope) -> str:
    try:
        cookie = SimpleCookie(Headers(scope=scope).get("cookie", "")).get(SESSION_COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""


def start_session(db: Database, account_id: int) -> str:
    """A new browser of an account: its cookie."""
    token, now = secrets.token_urlsafe(32), utcnow()
    db.execute(delete(Session).where(Session.expires <= now))
    db.add(Session(token_hash=hashed(token), account_id=account_id, created=now, expires=now + SESSION_GOOD_FOR))
    return token


def set_session(answer: Response, token: str, https: bool) -> None:
    """Gives a browser its cookie: no script reads it, and no other site's form sends it."""
    lasting = int(SESSION_GOOD_FOR.total_seconds())
    answer.set_cookie(SESSION_COOKIE, token, max_age=lasting, httponly=True, samesite="lax", secure=https)


# --- signing in and out -----------------------------------------------------------------------------------------


def _local(address: str) -> str:
    """An address on this page, or the front page: nobody is led away from here."""
    inside = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable()
    return address if inside and len(address) <= 500 else "/"


@router.get("/sign-in")
def sign_in_form(request: Request, next: str = "/") -> Response:
    """The form for the address."""
    if current(request):
        return RedirectResponse("/account", 303)
    return page(request, "sign_in.html", next=_local(next))


@router.post("/sign-in", dependencies=[OurPage])
def ask_for_link(
    request: Request, email: Annotated[str, Form(max_length=320)] = "", next: Annotated[str, Form()] = "/"
) -> Response:
    """Sends the link. The answer is the same whether or not there is an account, and whether or not a mail was sent."""
    try:
        to = mail.address(email)
    except ValueError as error:
        return page(request, "sign_in.html", 422, next=_local(next), error=str(error), email=clean(email, 320))
    token, now, settings = secrets.token_urlsafe(32), utcnow(), request.app.state.settings
    with session(request.app.state.engine) as db:
        db.execute(delete(SignIn).where(SignIn.expires <= now))
        sent = db.scalar(select(func.count()).select_from(SignIn).where(SignIn.email == to)) or 0
        if allowed := sent < MOST_LINKS:
            db.add(SignIn(token_hash=hashed(token), email=to, expires=now + LINK_GOOD_FOR))
    if allowed:
        link = f"{settings.url}/sign-in/{token}?{urlencode({'next': _local(next)})}"
        text = request.app.state.templates.get_template("mail/sign_in.txt").render(link=link, settings=settings)
        with mail.post(settings) as post:
            if (done := post.deliver(mail.message(settings, to, "Your link to Broadsheet", text), to)).outcome != "sent":
                log.warning("a sign-in mail was not sent: %s", done.error)
                with session(request.app.state.engine) as db:  # a link that nobody got counts for nobody
                    db.execute(delete(SignIn).where(SignIn.token_hash == hashed(token)))
                raise HTTPException(503, "The mail could not be sent just now. Try again in a few minutes.")
    return page(request, "sign_in_sent.html", email=to)


@router.get("/sign-in/{token}")
def open_link(request: Request, token: str, next: str = "/") -> Response:
    """What the link shows: a button."""
    with reading(request.app.state.engine) as db:
        found = db.get(SignIn, hashed(token))
        good = found is not None and found.expires > utcnow()
    return page(request, "sign_in_link.html", 200 if good else 410, good=good, token=token, next=_local(next))


@router.post("/sign-in/{token}", dependencies=[OurPage])
def sign_in(request: Request, token: str, next: Annotated[str, Form()] = "/") -> Response:
    """Uses the link up, makes the account if it is the first time, and signs this browser in."""
    with session(request.app.state.engine) as db:
        used = delete(SignIn).where(SignIn.token_hash == hashed(token), SignIn.expires > utcnow()).returning(SignIn.email)
        email = db.scalar(used)
        if email is None:
            return page(request, "sign_in_link.html", 410, good=False, token="", next="/")
        cookie = start_session(db, account_of(db, email).id)
    answer = RedirectResponse(_local(next), 303)
    set_session(answer, cookie, request.app.state.settings.https)
    return answer


def account_of(db: Database, email: str) -> Account:
    """The account of an address, made when there is none. Two who make it at once make one."""
    find = select(Account).where(Account.email == email)
    if found := db.scalar(find):
        return found
    try:
        with db.begin_nested():
            db.add(Account(email=email))
    except IntegrityError:
        pass
    return db.scalars(find).one()


@router.post("/sign-out", dependencies=[OurPage])
def sign_out(request: Request, account: SignedIn, everywhere: Annotated[bool, Form()] = False) -> Response:
    """Signs this browser out, or all of them."""
    which = Session.account_id == account.id if everywhere else Session.token_hash == hashed(_cookie(request.scope))
    with session(request.app.state.engine) as db:
        db.execute(delete(Session).where(which))
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


# --- votes and bookmarks ----------------------------------------------------------------------------------------


def trend(times: Sequence[datetime]) -> float | None:
    """How much a paper is wanted, from the times of its votes: log2 of Σ 2^((t - epoch) / week); None without votes.

    Every vote counts half as much after every week. At a time T the votes weigh Σ 2^((t - T) / week), which is this sum over
    2^((T - epoch) / week): the same factor for every paper, so their order is that of these values at any T, and an index on
    the column is never out of date. Some values: a vote now outweighs 2^n - 1 votes of n weeks ago.
    """
    if not times:
        return None
    weeks = [(time - EPOCH) / HALVING for time in times]
    top = max(weeks)
    return top + math.log2(math.fsum(2 ** (week - top) for week in weeks))


def mark(db: Database, account_id: int, paper_id: int, kind: str, on: bool) -> Paper | None:
    """Sets or takes away a mark; the paper as it is then, None where there is none. Doing it twice is doing it once."""
    # Votes of one paper are counted one after the other, so that no count is lost.
    paper = db.scalar(select(Paper).where(Paper.id == paper_id).with_for_update())
    if paper is None:
        return None
    this = {"account_id": account_id, "paper_id": paper_id, "kind": kind}
    had = db.get(Mark, this) is not None
    if on and not had:
        marks = db.scalar(select(func.count()).select_from(Mark).where(Mark.account_id == account_id)) or 0
        if marks >= MOST_MARKS:
            raise HTTPException(422, f"An account holds {MOST_MARKS:,} votes and bookmarks at most.")
        db.execute(insert(Mark).values(**this, time=utcnow()))
    elif had and not on:
        db.execute(delete(Mark).filter_by(**this))
    if kind == "vote" and on != had:
        count(db, paper)
    return paper


def count(db: Database, paper: Paper) -> None:
    """A paper's votes and trend, from its marks."""
    times = db.scalars(select(Mark.time).where(Mark.paper_id == paper.id, Mark.kind == "vote")).all()
    paper.votes, paper.trend = len(times), trend(times)
    db.flush()


def marked(db: Database, account: Account | None, ids: Sequence[int]) -> dict[int, set[str]]:
    """What of these papers somebody has marked, and how."""
    found: dict[int, set[str]] = defaultdict(set)
    if account and ids:
        rows = select(Mark.paper_id, Mark.kind).where(Mark.account_id == account.id, Mark.paper_id.in_(ids))
        for paper_id, kind in db.execute(rows):
            found[paper_id].add(kind)
    return dict(found)


@router.post("/papers/{paper_id:int}/{kind}", dependencies=[OurPage])
def set_mark(request: Request, paper_id: int, kind: str, account: SignedIn, on: Annotated[bool, Form()] = True) -> Response:
    """A vote or a bookmark: what it is to be afterwards is said, so that a second press changes nothing."""
    if kind not in MARKS or not 0 < paper_id < 2**31:
        raise HTTPException(404)
    with session(request.app.state.engine) as db:
        paper = mark(db, account.id, paper_id, kind, on)
        if paper is None:
            raise HTTPException(404, "There is no such paper here.")
        own = marked(db, account, [paper.id]).get(paper.id, set())
    if request.headers.get("hx-request"):
        return page(request, "_vote.html", paper=paper, own=own)
    return RedirectResponse(f"{_back(request, address_of(paper))}#paper-{paper.id}", 303)


def _back(request: Request, otherwise: str) -> str:
    """The page of ours that a form was on."""
    said = request.headers.get("referer", "")
    ours = request.app.state.settings.url
    own = f"{request.url.scheme}://{request.url.netloc}"
    for root in (ours, own):
        if said.startswith(f"{root}/"):
            return _local(said.removeprefix(root).partition("#")[0])
    return otherwise


# --- follows ----------------------------------------------------------------------------------------------------


@router.post("/follow", dependencies=[OurPage])
def follow(
    request: Request, account: SignedIn, kind: Annotated[str, Form()], value: Annotated[str, Form(max_length=300)],
    on: Annotated[bool, Form()] = True,
) -> Response:  # fmt: skip
    """Follows a tag or an author, or no longer."""
    value = clean(value, 200)
    if kind == "author":
        value = value.lower()
    if kind not in FOLLOWS or not value:
        raise HTTPException(422, "One follows a tag or an author.")
    this = {"account_id": account.id, "kind": kind, "value": value}
    with session(request.app.state.engine) as db:
        db.execute(delete(Follow).filter_by(**this))
        if on:
            if (
                db.scalar(select(func.count()).select_from(Follow).where(Follow.account_id == account.id)) or 0
            ) >= MOST_FOLLOWS:
                raise HTTPException(422, f"An account follows {MOST_FOLLOWS} tags and authors at most.")
            db.execute(insert(Follow).values(**this))
    return RedirectResponse(_back(request, "/account"), 303)


def follows(db: Database, account: Account | None) -> set[tuple[str, str]]:
    """(kind, value) of everything that somebody follows."""
    if account is None:
        return set()
    return set(db.execute(select(Follow.kind, Follow.value).where(Follow.account_id == account.id)).tuples())


def followed(db: Database, account_id: int, since: date, until: date, limit: int) -> list[Whole]:
    """Papers of the days from ``since`` to ``until`` with a tag or an author that somebody follows, newest first."""
    mine = {kind: select(Follow.value).where(Follow.account_id == account_id, Follow.kind == kind) for kind in FOLLOWS}
    which = or_(
        Paper.id.in_(select(Tag.paper_id).where(Tag.name.in_(mine["tag"]))),
        Paper.id.in_(select(Author.paper_id).where(Author.key.in_(mine["author"]))),
    )
    days = Paper.day.between(since, until)
    newest = select(Paper.id).where(days, which).order_by(Paper.day.desc(), Paper.id.desc()).limit(limit)
    return papers.read(db, db.scalars(newest).all())


# --- what is kept of somebody -----------------------------------------------------------------------------------


@router.get("/account")
def account_page(request: Request) -> Response:
    """Bookmarks, votes, follows, the digest, and the ways out."""
    account = current(request)
    if account is None:
        return RedirectResponse("/sign-in?next=/account", 303)
    with reading(request.app.state.engine) as db:
        kept = {
            kind: db.scalars(
                select(Mark.paper_id)
                .where(Mark.account_id == account.id, Mark.kind == kind)
                .order_by(Mark.time.desc())
                .limit(200)
            ).all()
            for kind in MARKS
        }
        return page(
            request, "account.html", bookmarks=papers.read(db, kept["bookmark"]), votes=papers.read(db, kept["vote"]),
            marked=marked(db, account, [*kept["bookmark"], *kept["vote"]]),
            follows=db.scalars(select(Follow).filter_by(account_id=account.id).order_by(Follow.kind, Follow.value)).all(),
            subscription=db.scalar(select(Subscription).where(Subscription.email == account.email)),
            sessions=db.scalar(select(func.count()).select_from(Session).where(Session.account_id == account.id)),
        )  # fmt: skip


@router.get("/account/export.json")
def export(request: Request, account: SignedIn) -> Response:
    """Everything that is stored of whoever asks."""
    with reading(request.app.state.engine) as db:
        answer = JSONResponse(everything_of(db, account))
    answer.headers["content-disposition"] = 'attachment; filename="broadsheet-account.json"'
    answer.headers["cache-control"] = "private, no-store"
    return answer


def everything_of(db: Database, account: Account) -> dict[str, list[dict[str, Any]]]:
    """The rows of all tables that are about an account, by table: those that name it, those with its mail address, and
    those that name one of these. Hashes of secrets are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    known: dict[str, set[Any]] = {}
    for table in Table.metadata.sorted_tables:  # those that are named come before those that name them
        which = []
        if table.name == "account":
            which.append(table.c.id == account.id)
        if "email" in table.c:
            which.append(table.c.email == account.email)
        for key in table.foreign_keys:
            if key.column.table.name in known:
                which.append(key.parent.in_(known[key.column.table.name]))
        if not which:
            continue
        rows = [dict(row) for row in db.execute(select(table).where(or_(*which))).mappings()]
        if "id" in table.c:
            known[table.name] = {row["id"] for row in rows}
        found[table.name] = [{name: _plain(value) for name, value in row.items() if name != "token_hash"} for row in rows]
    return found


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value


@router.post("/account/delete", dependencies=[OurPage])
def delete_account(request: Request, account: SignedIn, sure: Annotated[str, Form()] = "") -> Response:
    """Deletes the account and everything with its address."""
    if sure != "yes":
        raise HTTPException(422, "Tick the box to say that you mean it.")
    with session(request.app.state.engine) as db:
        forget(db, account)
    answer = page(request, "notice.html", title="Deleted", text="Everything that was kept of you is gone.", account=None)
    answer.delete_cookie(SESSION_COOKIE)
    return answer


def forget(db: Database, account: Account) -> None:
    """Deletes an account and every row with its address; its votes no longer count. Runs stay, without a name."""
    voted = select(Mark.paper_id).where(Mark.account_id == account.id, Mark.kind == "vote")
    theirs = db.scalars(select(Paper).where(Paper.id.in_(voted)).order_by(Paper.id).with_for_update()).all()
    for table in reversed(Table.metadata.sorted_tables):
        if "email" in table.c and table.name != "account":
            db.execute(delete(table).where(table.c.email == account.email))
    db.execute(delete(Account).where(Account.id == account.id))  # and what names it, by the database's own rules
    for paper in theirs:
        count(db, paper)
