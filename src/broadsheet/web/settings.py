"""What the page is told from outside: the environment, and nothing else."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from broadsheet.core.records import home


@dataclass(frozen=True)
class Settings:
    """How one page runs.

    ``database`` is any SQLAlchemy URL, ``url`` the address that mails and feeds link to, ``smtp`` where mail goes
    (``smtp://``, ``smtp+starttls://`` or ``smtps://`` with ``user:password@host:port``; empty: mails are left as files in
    ``home/outbox``), ``owner_token`` what a run must show where the page is public.
    """

    home: Path
    database: str
    url: str = "http://127.0.0.1:8000"
    secret: str = field(default="", repr=False)
    smtp: str = field(default="", repr=False)
    mail_from: str = "Broadsheet <broadsheet@localhost>"
    owner_token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: str) -> Settings:
        """Settings of ``BROADSHEET_HOME``, ``_DATABASE``, ``_URL``, ``_SECRET``, ``_SMTP``, ``_MAIL_FROM``,
        ``_OWNER_TOKEN``; what is ``given`` comes first.

        Without a secret one is made once and kept in ``home/web.secret``, readable by its owner only. Raises ValueError for
        an address that is none.
        """
        found = os.environ if environment is None else environment
        folder = Path(found["BROADSHEET_HOME"]) if found.get("BROADSHEET_HOME") else home()
        names = ("database", "url", "secret", "smtp", "mail_from", "owner_token")
        values = {name: found[f"BROADSHEET_{name.upper()}"] for name in names if found.get(f"BROADSHEET_{name.upper()}")}
        values.update({name: value for name, value in given.items() if value})
        values.setdefault("database", f"sqlite:///{folder / 'web.sqlite'}")
        values.setdefault("secret", _kept_secret(folder / "web.secret"))
        values["url"] = values.get("url", cls.url).rstrip("/")
        if urlsplit(values["url"]).scheme not in ("http", "https") or not urlsplit(values["url"]).hostname:
            raise ValueError(f"BROADSHEET_URL is an address such as https://papers.example.org, got '{values['url']}'")
        return cls(home=folder, **values)

    @property
    def public(self) -> bool:
        """Whether others than this machine's users see the page: its address is not the loopback's."""
        host = urlsplit(self.url).hostname or ""
        try:
            return not ip_address(host).is_loopback
        except ValueError:
            return host != "localhost"

    @property
    def https(self) -> bool:
        """Whether cookies may be marked secure."""
        return self.url.startswith("https:")


def _kept_secret(path: Path) -> str:
    """The secret in ``path``, made when there is none; two processes that start together agree on one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    if not path.exists():
        made.touch(mode=0o600)
        made.write_text(secrets.token_urlsafe(32))
        try:
            os.link(made, path)  # fails where the other was first
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_text().strip()
