"""`broadsheet digest`: the page's digest by mail, looked at, sent, and its bounces."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from broadsheet.web.digest import Issue

digest = typer.Typer(help="The page's digest by mail: look at it, send it, read its bounces.", no_args_is_help=True)

FREQUENCY = Annotated[str, typer.Option(help="daily or weekly.")]
ISSUE = Annotated[str, typer.Option(help="The day or week, such as 2026-11-29 or 2026-W48; default: the last whole one.")]


@digest.command()
def preview(
    email: Annotated[str, typer.Option(help="As this address would get it, with what it follows.")] = "reader@example.org",
    frequency: FREQUENCY = "weekly",
    issue: ISSUE = "",
    html: Annotated[str, typer.Option(metavar="FILE", help="Write the HTML part to FILE instead of showing the text.")] = "",
) -> None:
    """Show a digest without sending it.

    Example: broadsheet digest preview --issue 2026-W48 --html digest.html
    """
    from broadsheet.core.records import write_text
    from broadsheet.web.db import reading
    from broadsheet.web.digest import message
    from broadsheet.web.tables import Subscription

    engine, settings, templates = _site()
    about = _issue(frequency, issue)
    with reading(engine) as db:
        made = message(db, settings, templates, about, Subscription(id=0, email=email, frequency=about.frequency))
    if made is None:
        raise ValueError(
            f"there is nothing to say about {about.title}: no papers and no runs; 'broadsheet ingest' brings papers"
        )
    part = made.get_body(("html",) if html else ("plain",))
    text = part.get_content() if part else ""
    if html:
        write_text(text, html)
        typer.echo(f"wrote {html}: {made['Subject']}")
    else:
        typer.echo(f"Subject: {made['Subject']}\n\n{text}")


@digest.command()
def send(frequency: FREQUENCY = "daily", issue: ISSUE = "") -> None:
    """Send an issue to its subscribers; those who have it get it no second time.

    Run it from a timer, every few minutes if you like: an issue that went out costs nothing, and mails that a server did not
    take are tried again, later and later. Ctrl-C, a crash and a kill lose nothing and send nothing twice; a mail whose text
    was on its way at that moment is listed as unknown and left alone.

    BROADSHEET_SMTP is the way out (smtp+starttls://user:password@mail.example.org:587); without it mails are left as files.

    Example: broadsheet digest send --frequency weekly
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from broadsheet.web import digest as parts

    engine, settings, templates = _site()
    about = _issue(frequency, issue)
    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task(about.name, total=None)
        done = parts.send(engine, settings, templates, about, lambda n, of: bar.update(line, completed=n, total=of))
    typer.echo(f"{about.name}: {done}")
    if not settings.smtp and done.counts.get("sent"):
        typer.echo(f"left as files in {settings.home / 'outbox'}: set BROADSHEET_SMTP to send them")
    if failed := sum(done.counts.get(name, 0) for name in ("later", "refused", "unknown")):
        typer.echo(f"{failed} did not go out; 'broadsheet digest list --errors' says why", err=True)
        raise typer.Exit(1)


@digest.command()
def retry() -> None:
    """Make due at once what certainly did not go out, also what was given up; then send that issue again.

    What is unknown is left alone: whether it went out nobody can tell, and nobody gets a digest twice.
    """
    from broadsheet.web import digest as parts

    engine, settings, _ = _site()
    typer.echo(f"{parts.retry(engine, settings)} deliveries are due again: broadsheet digest send")


@digest.command()
def bounces(
    files: Annotated[list[str] | None, typer.Argument(help="Mails, each a file; - is standard input.")] = None,
    maildir: Annotated[str, typer.Option(metavar="DIR", help="Take what is new in this maildir, and mark it as seen.")] = "",
) -> None:
    """Read notifications of mail that could not be delivered (RFC 3464); three hard ones in a row end a subscription.

    Only those count that quote the Message-ID of a digest of ours. Have your mail server pipe the sender's mailbox in, or
    point --maildir at it.

    Example: broadsheet digest bounces --maildir ~/Maildir
    """
    import mailbox
    from pathlib import Path

    from broadsheet.web import digest as parts

    if bool(files) == bool(maildir):
        raise ValueError("give mails as files, or --maildir DIR")
    engine, _, _ = _site()
    if maildir:
        if not (Path(maildir) / "new").is_dir():
            raise ValueError(f"{maildir} is no maildir: it has no folder 'new'")
        box = mailbox.Maildir(maildir, create=False)
        keys = [key for key, mail in box.items() if mail.get_subdir() == "new"]
        found = parts.bounced(engine, (box.get_bytes(key) for key in keys))
        for key in keys:
            mail = box[key]
            mail.set_subdir("cur")
            mail.add_flag("S")
            box[key] = mail
    else:
        found = parts.bounced(engine, (_read(name) for name in files or ()))
    typer.echo(", ".join(f"{count} {kind}" for kind, count in found.items()))


@digest.command(name="list")
def list_states(
    errors: Annotated[
        bool, typer.Option("--errors", help="Also the last twenty deliveries that failed, by number.")
    ] = False,
) -> None:
    """Count subscriptions and deliveries by state. No addresses are shown."""
    from sqlalchemy import select

    from broadsheet.web.db import reading
    from broadsheet.web.digest import counts
    from broadsheet.web.tables import Delivery

    engine, _, _ = _site()
    with reading(engine) as db:
        for name, states in counts(db).items():
            shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
            typer.echo(f"{name}: {shown}")
        if errors:
            failed = select(Delivery).where(Delivery.error != "").order_by(Delivery.id.desc()).limit(20)
            for one in db.scalars(failed):
                typer.echo(
                    f"  {one.time:%Y-%m-%d %H:%M} {one.issue} to subscriber {one.subscription_id}: {one.state}, {one.error}"
                )


def _site() -> Any:
    """The database, the settings and the templates."""
    try:
        from broadsheet.web.db import open_database
        from broadsheet.web.render import templates
        from broadsheet.web.settings import Settings
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'broadsheet[web]'") from None
    settings = Settings.from_environment()
    return open_database(settings.database), settings, templates()


def _issue(frequency: str, name: str) -> "Issue":
    from broadsheet.web.digest import FREQUENCIES, Issue
    from broadsheet.web.tables import utcnow

    if frequency not in FREQUENCIES:
        raise ValueError(f"the digest is daily or weekly, got '{frequency}'")
    return Issue.named(name) if name else Issue.of(frequency, utcnow().date())


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None
