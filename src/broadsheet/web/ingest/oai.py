"""OAI-PMH 2.0, as arXiv and most repositories speak it: pages of records, each naming the next by a resumption token.

Metadata: ``arXiv``, ``arXivRaw`` (which has the versions) and ``oai_dc`` (which everybody has).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, timedelta
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from xml.etree.ElementTree import Element

from ..library import Item, arxiv_id_of, arxiv_version_of, doi_of
from .common import Page, Wanted, parse, text_of, time_of

OAI = "{http://www.openarchives.org/OAI/2.0/}"
ARXIV = "{http://arxiv.org/OAI/arXiv/}"
RAW = "{http://arxiv.org/OAI/arXivRaw/}"
DC = "{http://purl.org/dc/elements/1.1/}"


def read(wanted: Wanted, fetch: Callable[[str], bytes]) -> Iterator[Page]:
    """Pages of ListRecords, from the day of the last reading on. Raises ValueError with the server's words."""
    since = wanted.since or (wanted.read.date() - timedelta(days=1) if wanted.read else None)
    token, retried = wanted.cursor, False
    seen = {token}
    while True:
        root = parse(fetch(address(wanted.url, token, since)))
        error = root.find(f"{OAI}error")
        if error is not None:
            code = error.get("code", "")
            if code == "noRecordsMatch":
                yield Page([], done=1.0)
                return
            if code == "badResumptionToken" and token and not retried:  # they live for hours: begin anew, nothing is lost
                token, retried = "", True
                continue
            raise ValueError(f"the server says {code or 'error'}: {text_of(error)[:200]}")
        listed = root.find(f"{OAI}ListRecords")
        if listed is None:
            raise ValueError("this is no answer of an OAI-PMH server to ListRecords")
        records = [(record, item_of(record)) for record in listed.findall(f"{OAI}record")]
        skipped = sum(item is None and not is_deleted(record) for record, item in records)
        following = listed.find(f"{OAI}resumptionToken")
        token = text_of(following)
        if token in seen:  # a server that sends us in a circle
            token = ""
        seen.add(token)
        yield Page([item for _, item in records if item], token, skipped, _part(following, len(records)))
        if not token:
            return


def address(url: str, token: str, since: date | None) -> str:
    """The request: a token alone, or what is asked for in the address's query (``set``, ``metadataPrefix``, ``until``)."""
    parts = urlsplit(url)
    given = dict(parse_qsl(parts.query))
    asked = {"verb": "ListRecords"}
    if token:
        asked["resumptionToken"] = token
    else:
        asked |= {"metadataPrefix": "arXiv" if (parts.hostname or "").endswith("arxiv.org") else "oai_dc"}
        asked |= {"from": since.isoformat()} if since else {}
        asked |= {name: value for name, value in given.items() if name != "verb"}
    return urlunsplit(parts._replace(query=urlencode(asked), fragment=""))


def item_of(record: Element) -> Item | None:
    """A record's paper; None where it was deleted or says nothing that can be read."""
    if is_deleted(record):
        return None
    identifier = text_of(record, f"{OAI}header/{OAI}identifier")
    stamp = time_of(text_of(record, f"{OAI}header/{OAI}datestamp"))
    for metadata in record.findall(f"{OAI}metadata/*"):
        if metadata.tag == f"{ARXIV}arXiv":
            return _of_arxiv(metadata)
        if metadata.tag == f"{RAW}arXivRaw":
            return _of_raw(metadata)
        item = _of_dublin_core(metadata, identifier)
        return Item(**{**vars(item), "updated": item.updated or stamp}) if item.title else None
    return None


def is_deleted(record: Element) -> bool:
    """Whether all that is left of it is its header."""
    header = record.find(f"{OAI}header")
    return header is not None and header.get("status") == "deleted"


def _of_arxiv(metadata: Element) -> Item:
    parts = (f"{ARXIV}forenames", f"{ARXIV}keyname", f"{ARXIV}suffix")
    authors = [
        " ".join(filter(None, (text_of(author, part) for part in parts)))
        for author in metadata.findall(f"{ARXIV}authors/{ARXIV}author")
    ]
    created, updated = (time_of(text_of(metadata, f"{ARXIV}{name}")) for name in ("created", "updated"))
    return Item(
        title=text_of(metadata, f"{ARXIV}title"), authors=tuple(authors), abstract=text_of(metadata, f"{ARXIV}abstract"),
        arxiv_id=text_of(metadata, f"{ARXIV}id"), doi=text_of(metadata, f"{ARXIV}doi"),
        tags=tuple(text_of(metadata, f"{ARXIV}categories").split()), published=created, updated=updated or created,
        source="arxiv",
    )  # fmt: skip


def _of_raw(metadata: Element) -> Item:
    versions = metadata.findall(f"{RAW}version")
    times = [time_of(text_of(version, f"{RAW}date")) for version in versions]
    numbers = [version.get("version", "").removeprefix("v") for version in versions]
    authors = text_of(metadata, f"{RAW}authors").replace(" and ", ", ").split(",")
    return Item(
        title=text_of(metadata, f"{RAW}title"), authors=tuple(name.strip() for name in authors),
        abstract=text_of(metadata, f"{RAW}abstract"), arxiv_id=text_of(metadata, f"{RAW}id"),
        doi=text_of(metadata, f"{RAW}doi"), tags=tuple(text_of(metadata, f"{RAW}categories").split()),
        version=max((int(number) for number in numbers if number.isdecimal()), default=0),
        published=times[0] if times else None, updated=times[-1] if times else None, source="arxiv",
    )  # fmt: skip


def _of_dublin_core(metadata: Element, identifier: str) -> Item:
    def every(name: str) -> list[str]:
        return [text_of(element) for element in metadata.findall(f"{DC}{name}")]

    identifiers = [*every("identifier"), *every("relation"), identifier]
    dates = sorted(time for time in map(time_of, every("date")) if time)
    texts = sorted(every("description"), key=len)
    return Item(
        title=next(iter(every("title")), ""), authors=tuple(map(_turned, every("creator"))),
        abstract=texts[-1] if texts else "",
        arxiv_id=next((i for i in identifiers if "arxiv" in i.lower() and arxiv_id_of(i)), ""),
        version=max((arxiv_version_of(i) for i in identifiers if "arxiv" in i.lower()), default=0),
        doi=next((i for i in identifiers if doi_of(i)), ""),
        url=next((i for i in identifiers if i.startswith(("http://", "https://")) and not doi_of(i)), ""),
        tags=tuple(every("subject")), published=dates[0] if dates else None, updated=dates[-1] if dates else None,
        source="oai",
    )  # fmt: skip


def _turned(name: str) -> str:
    """Of "Lovelace, Ada": Ada Lovelace."""
    last, comma, first = name.partition(",")
    return f"{first.strip()} {last.strip()}" if comma and "," not in first else name


def _part(token: Element | None, count: int) -> float | None:
    if token is None or not text_of(token):
        return 1.0
    size, cursor = token.get("completeListSize", ""), token.get("cursor", "")
    if size.isdecimal() and cursor.isdecimal() and 0 < int(size) < 10**9:
        return min(1.0, (int(cursor) + count) / int(size))
    return None
