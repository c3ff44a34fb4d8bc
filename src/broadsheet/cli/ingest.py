"""`broadsheet ingest`: papers from feeds and files into the page's library."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from broadsheet.web.library import Added


def ingest(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="arxiv:CATEGORY, oai:SET, hf-daily, an address, or a file."),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="What the addresses are, where it cannot be guessed: arxiv, oai, hf-daily, rss.")
    ] = "",
    since: Annotated[
        str, typer.Option(metavar="DAY", help="From this day on, as 2026-11-01; default: where it stopped.")
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many papers of each source, to try it out.")] = None,
) -> None:
    """Read papers from SOURCES into the library that 'broadsheet serve' shows.

    Without a source: arXiv's cs.CL and cs.LG, and Hugging Face's daily papers. The first time the last days are read, later
    what came since. A paper that several sources bring is one paper. ctrl-C loses nothing: the same command goes on. Where
    a source fails, the others are read all the same, and the exit code is 1.

    Files are JSON lines (title, authors, abstract, arxiv_id, doi, url, code_url, tags, published, ...), arXiv's metadata
    snapshot, or OAI-PMH dumps, each also as .gz. Addresses must be public; BROADSHEET_ALLOW_HOSTS names hosts that need
    not be.

    Examples:

      broadsheet ingest

      broadsheet ingest arxiv:cs.AR hf-daily --since 2026-11-01

      broadsheet ingest oai:cs --limit 2000

      broadsheet ingest arxiv-metadata-oai-snapshot.json

      broadsheet ingest https://example.org/blog/feed.xml --kind rss
    """
    from datetime import date

    try:
        from broadsheet.web import embeddings, ingest, library
        from broadsheet.web.db import open_database, reading, session
        from broadsheet.web.settings import Settings
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'broadsheet[web]'") from None

    try:
        day = date.fromisoformat(since) if since else None
    except ValueError:
        raise ValueError(f"--since is a day such as 2026-11-01, not '{since}'") from None
    chosen = [ingest.named(name, kind) for name in sources or ingest.DEFAULTS]
    embedded = embeddings.wanted()
    engine = open_database(Settings.from_environment().database)
    with session(engine) as db:
        library.seed(db)
    failed = changed = 0
    for name, source in zip(sources or ingest.DEFAULTS, chosen, strict=True):
        line = Line(name)
        try:
            added = ingest.read(engine, source, since=day, limit=limit, progress=line.show)
            line.end(added)
            changed += added.new + added.changed
        except ValueError as error:
            line.fail(error)
            failed += 1
    if embedded and changed:
        with reading(engine) as db:
            typer.echo(f"embeddings of {embeddings.build(db):,} papers")
    if failed:
        raise typer.Exit(1)


class Line:
    """What a source brought, on one line that is written over while it is read at a terminal."""

    def __init__(self, name: str):
        self.name = "".join(c for c in name if c.isprintable())
        self.live = sys.stderr.isatty()

    def show(self, added: "Added", done: float | None) -> None:
        if self.live:
            part = f"{done:4.0%} " if done is not None else ""
            typer.echo(f"\r\x1b[K{self.name}: {part}{added.total:,} papers", err=True, nl=False)

    def end(self, added: "Added") -> None:
        self._clear()
        refused = f", {added.refused:,} unreadable" if added.refused else ""
        typer.echo(f"{self.name}: {added.new:,} new, {added.changed:,} changed, {added.same:,} known{refused}")

    def fail(self, error: Exception) -> None:
        self._clear()
        typer.echo(f"{self.name}: {' '.join(str(error).split())}", err=True)

    def _clear(self) -> None:
        if self.live:
            typer.echo("\r\x1b[K", err=True, nl=False)
