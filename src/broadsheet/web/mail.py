"""Mail: what is sent, and how it leaves.

A message leaves in two steps with a point between them: before it nothing of the text was sent, so the message may be tried
again; after it the server may have taken it, whatever happens next. `Post.deliver` tells its caller when it gets there.
"""

from __future__ import annotations

import smtplib
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import EmailPolicy
from email.utils import format_datetime, parseaddr
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self
from urllib.parse import unquote, urlsplit

from email_validator import EmailNotValidError, validate_email

from .settings import Settings
from .tables import utcnow

#: Seconds that a mail server may take for one answer.
PATIENCE = 20.0

Outcome = Literal["sent", "later", "refused", "unknown"]


@dataclass(frozen=True)
class Delivered:
    """How it went. ``later``: not taken now (a 4xx, or the server cannot be reached), certainly not delivered; ``refused``:
    never will be (5xx); ``unknown``: the connection broke after the text was on its way."""

    outcome: Outcome
    error: str = ""


class _Policy(EmailPolicy):
    """An address in a header stays whole: the library encodes one that is longer than a line, and then no mail program finds
    the link that ends a digest."""

    def fold(self, name: str, value: Any) -> str:
        return f"{name}: {value}{self.linesep}" if name == "List-Unsubscribe" else super().fold(name, value)

    def fold_binary(self, name: str, value: Any) -> bytes:
        return self.fold(name, value).encode() if name == "List-Unsubscribe" else super().fold_binary(name, value)


def address(text: str) -> str:
    """A mail address as it is stored: in lower case, its domain in ASCII. Raises ValueError."""
    try:
        found = validate_email(text.strip(), check_deliverability=False, strict=True)
    except EmailNotValidError:
        raise ValueError("that is no mail address") from None
    return f"{found.local_part}@{found.ascii_domain}".lower()


def new_id(settings: Settings) -> str:
    """A Message-ID that nobody can guess: who quotes it has seen the message."""
    return f"<{uuid.uuid4().hex}@{urlsplit(settings.url).hostname}>"


def message(settings: Settings, to: str, subject: str, text: str, html: str = "", message_id: str = "") -> EmailMessage:
    """A message of ours in text and, if given, HTML. Line breaks in ``subject`` become spaces."""
    made = EmailMessage(policy=_Policy(linesep="\r\n", utf8=not to.isascii()))
    name, sender = parseaddr(settings.mail_from)
    made["From"] = Address(name, addr_spec=sender)
    made["To"] = to  # `address` has looked at it
    made["Subject"] = " ".join(subject.split())
    made["Date"] = format_datetime(utcnow())
    made["Message-ID"] = message_id or new_id(settings)
    made["Auto-Submitted"] = "auto-generated"
    made.set_content(text)
    if html:
        made.add_alternative(html, subtype="html")
    return made


def post(settings: Settings) -> Post:
    """The way out that the settings name: a server, or files in ``home/outbox``. Raises ValueError for what is none."""
    return Server(settings) if settings.smtp else Outbox(settings.home / "outbox")


class Post:
    """A way out for mail, open within a ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def deliver(self, mail: EmailMessage, to: str, leaving: Callable[[], None] = lambda: None) -> Delivered:
        """Sends one message. ``leaving`` is called between the last moment at which nothing was sent and the first at which
        something may have been."""
        raise NotImplementedError


class Outbox(Post):
    """Messages as files, named by their Message-ID: the same message twice is one file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def deliver(self, mail: EmailMessage, to: str, leaving: Callable[[], None] = lambda: None) -> Delivered:
        name = "".join(c for c in str(mail["Message-ID"]) if c.isalnum() or c in "-.@")
        path, made = self.folder / f"{name}.eml", self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            made.write_bytes(mail.as_bytes())
            leaving()
            made.rename(path)
        except OSError as error:
            return Delivered("later", f"cannot write {path.name}: {error.strerror}")
        return Delivered("sent")


class Server(Post):
    """An SMTP server: ``smtp://``, ``smtp+starttls://`` (TLS or nothing) or ``smtps://``, with ``user:password@`` if it asks
    for one. One connection for all messages of a ``with`` block, made again when it breaks."""

    PORTS: ClassVar = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}

    def __init__(self, settings: Settings):
        found = urlsplit(settings.smtp)
        try:
            port = found.port
        except ValueError:
            port = -1
        if found.scheme not in self.PORTS or not found.hostname or port == -1:
            raise ValueError("BROADSHEET_SMTP is an address such as smtp+starttls://user:password@mail.example.org:587")
        self.scheme, self.host, self.port = found.scheme, found.hostname, port or self.PORTS[found.scheme]
        self.user, self.password = unquote(found.username or ""), unquote(found.password or "")
        self.sender = parseaddr(settings.mail_from)[1]
        self.connection: smtplib.SMTP | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.connection:
            try:
                self.connection.quit()
            except (smtplib.SMTPException, OSError):
                self._close()

    def deliver(self, mail: EmailMessage, to: str, leaving: Callable[[], None] = lambda: None) -> Delivered:
        try:
            connection = self._open()
            said = connection.mail(self.sender, [] if to.isascii() else ["SMTPUTF8"])
            if said[0] == 250:
                said = connection.rcpt(to)
        except (smtplib.SMTPException, OSError) as error:
            self._close()
            return self._unsent(error)
        if said[0] not in (250, 251):
            self._reset()
            return _answered(*said)
        leaving()
        try:
            said = connection.data(mail.as_bytes())
        except smtplib.SMTPDataError as error:  # it did not want the text
            self._reset()
            return _answered(error.smtp_code, error.smtp_error)
        except (smtplib.SMTPException, OSError) as error:
            self._close()
            return Delivered("unknown", _line(error))
        if said[0] != 250:
            self._reset()
            return _answered(*said)
        return Delivered("sent")

    def _open(self) -> smtplib.SMTP:
        """The connection; what is kept of an older one is tried first, since servers close those that are idle."""
        if self.connection:
            try:
                if self.connection.noop()[0] == 250:
                    return self.connection
            except (smtplib.SMTPException, OSError):
                pass
            self._close()
        if self.scheme == "smtps":
            made: smtplib.SMTP = smtplib.SMTP_SSL(
                self.host, self.port, timeout=PATIENCE, context=ssl.create_default_context()
            )
        else:
            made = smtplib.SMTP(self.host, self.port, timeout=PATIENCE)
        self.connection = made
        made.ehlo_or_helo_if_needed()
        if self.scheme == "smtp+starttls":
            made.starttls(context=ssl.create_default_context())  # raises where the server has none: TLS or nothing
            made.ehlo()
        if self.user:
            made.login(self.user, self.password)
        return made

    def _reset(self) -> None:
        try:
            if self.connection:
                self.connection.rset()
        except (smtplib.SMTPException, OSError):
            self._close()

    def _close(self) -> None:
        if self.connection:
            self.connection.close()
            self.connection = None

    def _unsent(self, error: Exception) -> Delivered:
        code = getattr(error, "smtp_code", 0)
        if isinstance(error, smtplib.SMTPAuthenticationError | smtplib.SMTPNotSupportedError):
            return Delivered("later", f"{self.host}: {_line(error)}")  # ours to mend, and not the recipient's
        return _answered(code, str(error)) if code >= 500 else Delivered("later", f"{self.host}: {_line(error)}")


def _answered(code: int, said: bytes | str) -> Delivered:
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    return Delivered("refused" if code >= 500 else "later", _line(f"{code} {text}"))


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
