"""What is stored. Times are UTC without a zone; days are dates.

Papers of the catalogue are rows like any other, with their ``slug``; what they claim and how they run stays there.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


def utcnow() -> datetime:
    """Now, as it is stored."""
    return datetime.now(UTC).replace(tzinfo=None)


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={  # migrations can then name what they change
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


# --- papers -----------------------------------------------------------------------------------------------------


class Paper(Table):
    """A paper. Two are the same when arXiv id (without version), DOI, or ``title_key`` and first author agree."""

    __tablename__ = "paper"
    __table_args__ = (
        Index(None, "day", "id"),
        Index(None, "trend", "id"),
        Index("ix_paper_has_code", "id", sqlite_where=text("code_url != ''"), postgresql_where=text("code_url != ''")),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str | None] = mapped_column(String(80), unique=True)  # of the catalogue
    arxiv_id: Mapped[str | None] = mapped_column(String(40), unique=True)
    doi: Mapped[str | None] = mapped_column(String(200), unique=True)
    title: Mapped[str] = mapped_column(String(500))
    title_key: Mapped[str] = mapped_column(String(200), index=True)  # letters and digits, lower case
    abstract: Mapped[str] = mapped_column(Text, default="")
    summary: Mapped[str] = mapped_column(Text, default="")  # short; the abstract's first sentences where nobody wrote one
    names: Mapped[str] = mapped_column(Text, default="", server_default="")  # authors and tags, as `search` reads them
    url: Mapped[str] = mapped_column(String(1000), default="")
    code_url: Mapped[str] = mapped_column(String(1000), default="")
    source: Mapped[str] = mapped_column(String(100), default="")  # which feed brought it
    family: Mapped[str | None] = mapped_column(String(40), index=True)  # of the catalogue
    running: Mapped[bool] = mapped_column(default=False, index=True)
    version: Mapped[int] = mapped_column(default=1)
    day: Mapped[date]  # the day whose page it is on
    published: Mapped[datetime]
    updated: Mapped[datetime]
    votes: Mapped[int] = mapped_column(default=0)
    #: log2 of the votes' sum, each halved every week (see `accounts.trend`): an order that holds at any later time; None: no
    #: votes.
    trend: Mapped[float | None]

    authors: Mapped[list[Author]] = relationship(order_by="Author.place", cascade="all, delete-orphan", passive_deletes=True)
    tags: Mapped[list[Tag]] = relationship(order_by="Tag.name", cascade="all, delete-orphan", passive_deletes=True)


class Author(Table):
    """One author of one paper; ``key`` is the name in lower case, which people follow."""

    __tablename__ = "author"
    __table_args__ = (Index(None, "key", "paper_id"),)

    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    key: Mapped[str] = mapped_column(String(200))


class Tag(Table):
    """A tag of a paper: an arXiv category, or a word of the catalogue."""

    __tablename__ = "tag"
    __table_args__ = (Index(None, "name", "paper_id"),)

    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(80), primary_key=True)


class Source(Table):
    """Where papers come from, and how far it was read: for conditional requests and to go on after a stop."""

    __tablename__ = "source"

    url: Mapped[str] = mapped_column(String(1000), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))  # arxiv, oai, hf-daily, rss, file
    etag: Mapped[str] = mapped_column(String(300), default="")
    modified: Mapped[str] = mapped_column(String(100), default="")  # the server's Last-Modified, as it wrote it
    cursor: Mapped[str] = mapped_column(String(1000), default="")  # resumption token, or byte offset in a file
    read: Mapped[datetime | None]
    failures: Mapped[int] = mapped_column(default=0)  # in a row
    error: Mapped[str] = mapped_column(String(500), default="")


# --- people -----------------------------------------------------------------------------------------------------


class Account(Table):
    """A person, known by a mail address alone."""

    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(254), unique=True)  # lower case
    created: Mapped[datetime] = mapped_column(default=utcnow)


class SignIn(Table):
    """A mail link that signs in once. Only a hash of its token is kept."""

    __tablename__ = "sign_in"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    email: Mapped[str] = mapped_column(String(254), index=True)
    expires: Mapped[datetime]


class Session(Table):
    """A browser that is signed in. Only a hash of its cookie is kept; the cookie changes when one signs in and every day."""

    __tablename__ = "session"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey("account.id", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(default=utcnow)
    expires: Mapped[datetime]


class Mark(Table):
    """A vote or a bookmark."""

    __tablename__ = "mark"

    account_id: Mapped[int] = mapped_column(ForeignKey("account.id", ondelete="CASCADE"), primary_key=True)
    paper_id: Mapped[int] = mapped_column(ForeignKey("paper.id", ondelete="CASCADE"), primary_key=True, index=True)
    kind: Mapped[str] = mapped_column(String(10), primary_key=True)  # vote, bookmark
    time: Mapped[datetime] = mapped_column(default=utcnow)


class Follow(Table):
    """A tag or an author that somebody follows."""

    __tablename__ = "follow"

    account_id: Mapped[int] = mapped_column(ForeignKey("account.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(10), primary_key=True)  # tag, author
    value: Mapped[str] = mapped_column(String(200), primary_key=True)  # a tag's name or an author's key


# --- the digest -------------------------------------------------------------------------------------------------


class Subscription(Table):
    """An address that asked for the digest. It gets none before it confirmed (double opt-in)."""

    __tablename__ = "subscription"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(String(254), unique=True)
    frequency: Mapped[str] = mapped_column(String(10))  # daily, weekly
    state: Mapped[str] = mapped_column(String(20), default="pending", index=True)  # pending, active, stopped, bounced
    created: Mapped[datetime] = mapped_column(default=utcnow)
    asked: Mapped[datetime | None]  # when the mail that asks for confirmation was last sent
    confirmed: Mapped[datetime | None]
    bounces: Mapped[int] = mapped_column(default=0)  # in a row


class Delivery(Table):
    """One digest to one subscriber. ``issue`` is the day or week it is about; there is never a second one of the same."""

    __tablename__ = "delivery"
    __table_args__ = (UniqueConstraint("subscription_id", "issue"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    subscription_id: Mapped[int] = mapped_column(ForeignKey("subscription.id", ondelete="CASCADE"))
    issue: Mapped[str] = mapped_column(String(20))  # 2026-11-29, 2026-W48
    message_id: Mapped[str] = mapped_column(String(200), unique=True)
    #: claimed (nothing was sent), sending (its text may have been), sent, later, refused, unknown, bounced
    state: Mapped[str] = mapped_column(String(20), index=True)
    tries: Mapped[int] = mapped_column(default=0)
    time: Mapped[datetime] = mapped_column(default=utcnow)  # of the last change
    error: Mapped[str] = mapped_column(String(500), default="")


# --- runs -------------------------------------------------------------------------------------------------------


class Run(Table):
    """One press on a Run button. ``records`` are what the command line would have printed with ``--json``; ``sheet`` and
    ``plot`` are their table and picture, made where they were measured: showing them must not load torch."""

    __tablename__ = "run"

    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(String(80), index=True)
    options: Mapped[dict[str, Any]] = mapped_column(JSON)
    account_id: Mapped[int | None] = mapped_column(ForeignKey("account.id", ondelete="SET NULL"))
    state: Mapped[str] = mapped_column(String(20), default="queued", index=True)  # queued, running, done, failed, cancelled
    created: Mapped[datetime] = mapped_column(default=utcnow)
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]
    beat: Mapped[datetime | None]  # when its worker was last alive
    cancel: Mapped[bool] = mapped_column(default=False)
    error: Mapped[str] = mapped_column(String(1000), default="")
    attempt: Mapped[int] = mapped_column(default=0)  # counts claims: who writes for an earlier one is not listened to
    lost: Mapped[int] = mapped_column(default=0)  # how often its worker was killed over it
    records: Mapped[list[Any] | None] = mapped_column(JSON, deferred=True)
    sheet: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON, deferred=True)  # tables: heads, rows, note, about
    plot: Mapped[str] = mapped_column(Text, default="", deferred=True)  # an SVG


class RunEvent(Table):
    """A line of a run's progress, in order; what many watch at once is read from here."""

    __tablename__ = "run_event"
    __table_args__ = (Index(None, "run_id", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(20))  # state, progress, log
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    time: Mapped[datetime] = mapped_column(default=utcnow)


class WorkerBeat(Table):
    """One row: when the one worker process was last alive."""

    __tablename__ = "worker_beat"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime]
