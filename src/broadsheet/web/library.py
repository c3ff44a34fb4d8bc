"""The papers: what feeds say becomes rows, once each.

Nothing that a feed says is trusted: texts lose markup, control and direction characters and are cut, addresses are http(s)
or nothing, and no paper is from the future (it would stay on the front page).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import ColumnElement, Table, bindparam, delete, func, insert, select, text, update
from sqlalchemy.orm import Session

from broadsheet import catalogue

from .tables import Author, Paper, Tag, utcnow

#: Papers that are looked up and written together.
BATCH = 500
#: The longest of everything, in characters, and the most of what there can be many of.
TITLE, TITLE_KEY, ABSTRACT, SUMMARY, NAME, TAG, URL, DOI = 500, 200, 10_000, 400, 200, 80, 1000, 200
AUTHORS, TAGS = 300, 30
#: A title of fewer letters and digits is nobody's own: without authors it proves nothing.
TELLING = 24
_FIRST_DAY = date(1900, 1, 1)


@dataclass(frozen=True)
class Item:
    """What a feed says about a paper. Times are UTC without a zone; ``version`` 0: the feed does not say.

    ``day`` is the day whose page it belongs on, where that is not the day it was published.
    """

    title: str
    authors: tuple[str, ...] = ()
    abstract: str = ""
    summary: str = ""
    arxiv_id: str = ""
    doi: str = ""
    url: str = ""
    code_url: str = ""
    tags: tuple[str, ...] = ()
    version: int = 0
    published: datetime | None = None
    updated: datetime | None = None
    day: date | None = None
    source: str = ""


@dataclass
class Added:
    """How many papers were new, changed, known and the same, and refused (without a title)."""

    new: int = 0
    changed: int = 0
    same: int = 0
    refused: int = 0

    def __iadd__(self, other: Added) -> Added:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def total(self) -> int:
        return self.new + self.changed + self.same + self.refused


# --- adding -----------------------------------------------------------------------------------------------------


def add(db: Session, items: Iterable[Item]) -> Added:
    """Stores papers, in the caller's transaction. One that is known is not stored again: a later version replaces title,
    abstract and authors; whatever else a feed knows fills what was empty."""
    added = Added()
    items = iter(items)
    while batch := list(islice(items, BATCH)):
        rows = [row for row in map(_row, batch) if row]
        added.refused += len(batch) - len(rows)
        added += _add(db, rows)
    return added


def seed(db: Session) -> None:
    """The catalogue's papers as rows; what changed in the catalogue is changed, what a feed brought stays."""
    rows = {row.slug: row for row in db.scalars(select(Paper).where(Paper.slug.is_not(None)))}
    missing = [paper for slug, paper in catalogue.papers().items() if slug not in rows]
    if missing:
        add(db, map(_item, missing))
        found = _Known(db, [row for row in (_row(_item(paper)) for paper in missing) if row])
        for paper in missing:
            known = found.find(_row(_item(paper)) or {})
            if known:
                rows[paper.slug] = db.get_one(Paper, known["id"])
    tags: dict[int, set[str]] = {}
    for tag in db.scalars(select(Tag).where(Tag.paper_id.in_([row.id for row in rows.values()]))):
        tags.setdefault(tag.paper_id, set()).add(tag.name)
    for slug, row in rows.items():
        entry = catalogue.papers().get(slug or "")
        if entry is None:  # no longer in the catalogue: a paper like any other
            row.slug, row.family, row.running = None, None, False
            continue
        new = [tag for tag in entry.tags if tag not in tags.get(row.id, ())]
        db.add_all(Tag(paper_id=row.id, name=tag) for tag in new)
        for name, value in (
            ("slug", slug), ("family", entry.family), ("running", bool(entry.method)), ("title", clean(entry.title, TITLE)),
            ("summary", clean(entry.summary, 10 * SUMMARY)), ("code_url", row.code_url or entry.code),
            ("names", " ".join(dict.fromkeys(f"{row.names} {slug} {entry.family} {' '.join(new)}".split()))),
        ):  # fmt: skip
            if getattr(row, name) != value:
                setattr(row, name, value)
    db.flush()


def _item(paper: catalogue.Paper) -> Item:
    first = date(2000 + int(paper.arxiv[:2]), int(paper.arxiv[2:4]), 1) if paper.arxiv else date(paper.year, 1, 1)
    return Item(
        title=paper.title, authors=(paper.authors,), summary=paper.summary, arxiv_id=paper.arxiv, code_url=paper.code,
        tags=paper.tags, published=datetime(first.year, first.month, first.day), source="catalogue",
    )  # fmt: skip


def _add(db: Session, rows: list[dict[str, Any]]) -> Added:
    added = Added()
    known = _Known(db, rows)
    new: list[dict[str, Any]] = []
    changes: dict[int, dict[str, Any]] = {}
    for row in rows:
        if old := known.find(row):
            change = known.change(old, row)
            waits = old.get("id") is None  # it is among the new ones of this batch: they are merged before they are written
            added.same += not change or waits
            if change and not waits:
                added.changed += old["id"] not in changes
                added.same += old["id"] in changes
                changes.setdefault(old["id"], {}).update(change)
        else:
            new.append(row)
            known.remember(row)
            added.new += 1
    _write(db, new, changes, known)
    return added


def _write(db: Session, new: list[dict[str, Any]], changes: dict[int, dict[str, Any]], known: _Known) -> None:
    papers, authors, tags = (_table(kind) for kind in (Paper, Author, Tag))
    for row in [*new, *(known.by_id[number] for number in changes)]:
        row["names"] = _names(row)
    names: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    if new:
        columns = [column.name for column in papers.columns if column.name not in ("slug", "family")]
        for row, number in zip(new, _numbers(db, len(new)), strict=True):
            row["id"] = number
            names += _author_rows(row)
            marks += [{"paper_id": number, "name": tag} for tag in row["tags"]]
        db.execute(insert(papers), [{name: row.get(name, _DEFAULTS.get(name)) for name in columns} for row in new])
    for number, change in changes.items():
        row = known.by_id[number]
        if "authors" in change:
            db.execute(delete(authors).where(authors.c.paper_id == number))
            names += _author_rows(row)
        marks += [{"paper_id": number, "name": tag} for tag in change.get("tags", ())]
        columns_only = {name: value for name, value in change.items() if name not in ("authors", "tags")}
        db.execute(update(papers).where(papers.c.id == number).values(names=row["names"], **columns_only))
    for table, lines in ((authors, names), (tags, marks)):
        if lines:
            db.execute(insert(table), lines)


def _numbers(db: Session, count: int) -> Sequence[int]:
    """Free ids, in order. Asked for before the rows are written, since rows that return theirs go in one by one."""
    if db.get_bind().dialect.name == "postgresql":
        ask = text("select nextval(pg_get_serial_sequence('paper', 'id')) from generate_series(1, :count)")
        return sorted(db.scalars(ask, {"count": count}))
    last = db.scalar(select(func.max(Paper.id))) or 0  # whoever writes is alone
    return range(last + 1, last + 1 + count)


_DEFAULTS = {"running": False, "votes": 0, "trend": None}


def _author_rows(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"paper_id": row["id"], "place": place, "name": name, "key": author_key(name)}
        for place, name in enumerate(row["authors"])
    ]


def _table(kind: Any) -> Table:
    table: Table = kind.__table__
    return table


class _Known:
    """The rows that a batch may be about, found by id, DOI or title: one query for each kind and batch."""

    _READ = (
        "id", "slug", "arxiv_id", "doi", "title", "title_key", "abstract", "summary", "url", "code_url", "version",
        "published", "updated",
    )  # fmt: skip

    def __init__(self, db: Session, rows: Sequence[dict[str, Any]]):
        self.by_id: dict[int, dict[str, Any]] = {}
        self.by_arxiv: dict[str, dict[str, Any]] = {}
        self.by_doi: dict[str, dict[str, Any]] = {}
        self.by_title: dict[str, list[dict[str, Any]]] = {}
        columns = [getattr(Paper, name) for name in self._READ]
        for column in (Paper.arxiv_id, Paper.doi, Paper.title_key):
            wanted = sorted({row[column.key] for row in rows} - {None, ""})
            for found in db.execute(select(*columns).where(_among(column, wanted))) if wanted else ():
                if found.id not in self.by_id:
                    self.by_id[found.id] = {**found._asdict(), "authors": (), "tags": ()}
        if self.by_id:
            numbers = sorted(self.by_id)
            by_paper = select(Author.paper_id, Author.name).where(_among(Author.paper_id, numbers))
            for number, name in db.execute(by_paper.order_by(Author.paper_id, Author.place)):
                self.by_id[number]["authors"] += (name,)
            for number, name in db.execute(select(Tag.paper_id, Tag.name).where(_among(Tag.paper_id, numbers))):
                self.by_id[number]["tags"] += (name,)
        for row in self.by_id.values():
            self.remember(row)

    def remember(self, row: dict[str, Any]) -> None:
        if row["arxiv_id"]:
            self.by_arxiv[row["arxiv_id"]] = row
        if row["doi"]:
            self.by_doi[row["doi"]] = row
        self.by_title.setdefault(row["title_key"], []).append(row)

    def find(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The paper that this one is, or None: by arXiv id, else by DOI, else by title and first author."""
        if row["arxiv_id"] and (found := self.by_arxiv.get(row["arxiv_id"])):
            return found
        if row["doi"] and (found := self.by_doi.get(row["doi"])) and not _differ(found, row, "arxiv_id"):
            return found
        for found in self.by_title.get(row["title_key"], ()):
            if not _differ(found, row, "arxiv_id") and not _differ(found, row, "doi") and _same_first_author(found, row):
                return found
        return None

    def change(self, old: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """What ``row`` adds to ``old``, which is changed too; ``tags`` are those to add."""
        change: dict[str, Any] = {}
        later = row["version"] > old["version"]
        if later:
            change = {"version": row["version"], "updated": max(row["updated"], old["updated"])}
            change |= {name: row[name] for name in ("abstract", "authors") if row[name]}
            if not old.get("slug"):
                change |= {name: row[name] for name in ("title", "title_key")}
                change |= {"summary": row["summary"]} if row["summary"] and _written_by_us(old) else {}
        change |= {name: row[name] for name in ("abstract", "summary", "url", "code_url") if row[name] and not old[name]}
        for name, index in (("arxiv_id", self.by_arxiv), ("doi", self.by_doi)):
            if row[name] and not old[name] and row[name] not in index:
                change[name] = row[name]
                index[row[name]] = old
        if row["authors"] and (not old["authors"] or (_et_al(old["authors"]) and not _et_al(row["authors"]))):
            change["authors"] = row["authors"]
        change = {name: value for name, value in change.items() if value != old[name]}
        new = tuple(tag for tag in row["tags"] if tag not in old["tags"])[: max(0, TAGS - len(old["tags"]))]
        old.update(change)
        if new:
            old["tags"] = (*old["tags"], *new)
            change["tags"] = new
        return change


def _among(column: Any, values: Sequence[Any]) -> ColumnElement[bool]:
    found: ColumnElement[bool] = column.in_(bindparam(None, values, expanding=True))
    return found


def _differ(old: dict[str, Any], row: dict[str, Any], name: str) -> bool:
    return bool(old[name] and row[name] and old[name] != row[name])


def _same_first_author(old: dict[str, Any], row: dict[str, Any]) -> bool:
    if old["authors"] and row["authors"]:
        return bool(_surname(old["authors"][0]) == _surname(row["authors"][0]))
    return len(row["title_key"]) >= TELLING


def _surname(name: str) -> str:
    """Of "Ada Lovelace", "Lovelace, Ada", "A. Lovelace" and "Lovelace et al.": lovelace."""
    name = folded(name)
    if "," in name:
        return name.partition(",")[0].strip()
    words = name.removesuffix("et al.").removesuffix("et al").split()
    return words[-1] if words else ""


def _et_al(authors: Sequence[str]) -> bool:
    return len(authors) == 1 and authors[0].rstrip(".").endswith(" et al")


def _written_by_us(row: dict[str, Any]) -> bool:
    return bool(row["summary"] == shortened(row["abstract"]))


# --- cleaning ---------------------------------------------------------------------------------------------------


def _row(item: Item) -> dict[str, Any] | None:
    """The item as columns, fit to be stored, with ``authors`` and ``tags``; None where it has no title."""
    title = clean(item.title, TITLE)
    key = title_key(title)
    if not key:
        return None
    now = utcnow()
    arxiv_id = arxiv_id_of(item.arxiv_id) or arxiv_id_of(item.url if "arxiv.org/" in item.url else "")
    doi = doi_of(item.doi)
    if doi.startswith("10.48550/arxiv."):  # arXiv's own: the same as its id
        arxiv_id, doi = arxiv_id or arxiv_id_of(doi.removeprefix("10.48550/arxiv.")), ""
    published = _possible(item.published, now) or _possible(item.updated, now) or now
    day = item.day if item.day and _FIRST_DAY <= item.day <= now.date() else published.date()
    abstract = clean(item.abstract, ABSTRACT)
    authors = dict.fromkeys(name for name in (clean(name, NAME) for name in item.authors[: 2 * AUTHORS]) if name)
    tags = dict.fromkeys(name for name in (clean(name, TAG) for name in item.tags[: 2 * TAGS]) if name)
    said = abstract + " " + item.summary[:ABSTRACT]
    return {
        "arxiv_id": arxiv_id or None, "doi": doi or None, "title": title, "title_key": key, "abstract": abstract,
        "summary": clean(item.summary, 10 * SUMMARY) or shortened(abstract),
        "url": web_address(item.url) or (f"https://arxiv.org/abs/{arxiv_id}" if arxiv_id else "")
        or (f"https://doi.org/{doi}" if doi else ""),
        "code_url": web_address(item.code_url) or code_address(said), "source": clean(item.source, 100),
        "version": min(max(0, item.version), 999) or 1, "day": day, "published": published,
        "updated": max(_possible(item.updated, now) or published, published),
        "authors": tuple(islice(authors, AUTHORS)), "tags": tuple(islice(tags, TAGS)),
    }  # fmt: skip


def clean(text: str, most: int) -> str:
    """One line of plain text of at most so many characters: no markup, no control or direction characters."""
    text = text[: 4 * most]  # so that nothing below works on megabytes
    if not _PLAIN.fullmatch(text):
        if "<" in text:
            text = _without_markup(text)
        text = unicodedata.normalize("NFC", text).translate(_HARMFUL)
        text = text.encode("utf-8", "ignore").decode()  # lone surrogates: no database takes them
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return (text[: most - 1].rpartition(" ")[0] or text[: most - 1]) + "…"


_PLAIN = re.compile(r"[\n -;=-~]*")  # ASCII without "<"
_ELEMENTS = (
    "a|abbr|applet|article|b|base|big|blockquote|body|br|button|canvas|center|code|dd|del|details|dialog|div|dl|dt|em|embed|"
    "font|footer|form|frame|frameset|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|jats:[a-z]+|kbd|label|li|link|main|"
    "marquee|math|meta|nav|noscript|object|ol|option|p|picture|pre|q|s|samp|script|section|select|small|source|span|strong|"
    "style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video|audio"
)
_MARKUP = re.compile(rf"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1\s*>|</?(?:{_ELEMENTS})(?:[\s/][^<>]*)?>", re.I | re.S)
_HARMFUL = {
    **dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 133), *range(134, 160)], " "),
    **dict.fromkeys(
        [
            0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2060, 0x2070),
            0xFEFF, *range(0xFFF9, 0xFFFC), 0xFFFE, 0xFFFF, *range(0xE0000, 0xE0080),
        ],
        None,
    ),
}  # fmt: skip


def _without_markup(text: str) -> str:
    for _ in range(4):  # what is left when a tag is gone may be one again
        bare = _MARKUP.sub(" ", text)
        if bare == text:
            return text
        text = bare
    return _MARKUP.sub(" ", text).replace("<", " ")


def shortened(abstract: str) -> str:
    """An abstract's first sentences, as far as they fit."""
    if len(abstract) <= SUMMARY:
        return abstract
    head = abstract[:SUMMARY]
    ends = [end.end() for end in _SENTENCE_END.finditer(head)]
    if ends and ends[-1] > SUMMARY // 3:
        return head[: ends[-1]].strip()
    return head[: SUMMARY - 2].rpartition(" ")[0] + " …"


_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bet al)(?<!\bvs)(?<!\bcf)[.!?](?=\s+[A-Z0-9“\"(])")


def folded(text: str) -> str:
    """Lower case without accents."""
    if text.isascii():
        return text.lower()
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).lower()


def title_key(title: str) -> str:
    """The title's letters and digits in lower case: what stays the same when a feed writes it in its own way."""
    return _NO_WORD.sub("", folded(title))[:TITLE_KEY]


_NO_WORD = re.compile(r"[\W_]+")


def author_key(name: str) -> str:
    """By which authors are followed and looked for."""
    return name.lower()[:NAME]


def arxiv_id_of(text: str) -> str:
    """The arXiv id in an id, an address or ``oai:arXiv.org:…``, without its version; "" where there is none.

    New ids are ``2403.05527``, old ones ``cs/0301012`` (``math.GT/0309136`` is ``math/0309136``).
    """
    found = _ARXIV.search(text[:300])
    if not found:
        return ""
    archive, number = (found["archive"] or "").lower(), found["number"]
    return f"{archive}/{number}" if archive else number


def arxiv_version_of(text: str) -> int:
    """The version in an arXiv id or address, or 0."""
    found = _ARXIV.search(text[:300])
    return int(found["version"] or 0) if found else 0


_ARXIV = re.compile(
    r"(?:^|(?:arxiv(?:\.org)?[:/](?:abs/|pdf/|html/)?))"
    r"(?:(?P<archive>[a-z]+(?:-[a-z]+)?)(?:\.[a-z]{2})?/)?"
    r"(?P<number>(?<=/)\d{7}|\d{4}\.\d{4,5})(?:v(?P<version>\d{1,3}))?(?=$|[^\d.]|\.pdf|\.$)",
    re.IGNORECASE,
)


def doi_of(text: str) -> str:
    """A DOI in lower case without ``https://doi.org/`` or ``doi:``; "" where there is none."""
    found = _DOI.search(text[: 2 * DOI])
    return found[1].rstrip(".,;").lower()[:DOI] if found else ""


_DOI = re.compile(r"^\s*(?:https?://(?:dx\.)?doi\.org/|doi:\s*)?(10\.\d{4,9}/[!-~]+)", re.IGNORECASE)


def web_address(text: str) -> str:
    """The address if a link may lead there: http or https, a host, no name and password; else ""."""
    text = text.strip()
    if len(text) > URL or not _ADDRESS.fullmatch(text):
        return ""
    try:
        parts = urlsplit(text)
        good = parts.hostname and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # of the port, or of brackets around no IPv6 address
        return ""
    return text if good else ""


_ADDRESS = re.compile(r"https?://[^\s<>\"'\\`{}|^\x00-\x20\x7f-\x9f]+", re.IGNORECASE)


def code_address(text: str) -> str:
    """The first repository that a text names."""
    found = _CODE.search(text)
    return "https://" + found[1].rstrip(".") if found else ""


_CODE = re.compile(r"\b((?:github\.com|gitlab\.com|codeberg\.org)/[\w-]{1,60}/[\w.-]{1,100})", re.ASCII)


def _possible(time: datetime | None, now: datetime) -> datetime | None:
    """A time that a paper can have: not before 1900 and, a day's zones apart, not to come."""
    if time is None:
        return None
    if time.tzinfo:
        try:
            time = time.astimezone(UTC).replace(tzinfo=None)
        except OverflowError:
            return None
    if time.date() < _FIRST_DAY or time > now + timedelta(days=1):
        return None
    return min(time, now)


def _names(row: dict[str, Any]) -> str:
    """What `search` finds a paper by besides its texts: authors, also without accents, tags and slug."""
    names = " ".join(row["authors"])
    plain = folded(names)
    known = catalogue.papers().get(row.get("slug") or "")
    tags = " ".join(_NO_WORD.sub(" ", tag) for tag in row["tags"])  # PostgreSQL takes cs.CL for a host's name
    parts = [names, "" if plain == names.lower() else plain, tags]
    return " ".join(filter(None, [*parts, *((known.slug, known.family) if known else ())]))
