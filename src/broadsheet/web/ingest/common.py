"""What the formats share: what is asked of them, what they give, and XML that can do no harm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from typing import IO, Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml import ElementTree as Safe

from ..library import Item


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source: its address, from which day on, and where reading stopped the last time.

    ``cursor`` is a format's own; "" begins anew. ``read``: when the source was last read to its end.
    """

    url: str
    since: date | None = None
    cursor: str = ""
    read: datetime | None = None
    etag: str = ""
    modified: str = ""


@dataclass
class Page:
    """Some papers, and where to go on once they are stored (``cursor`` "": this was the last page).

    ``skipped`` counts entries that could not be read, ``done`` is the part of the source that was read, if known.
    """

    items: Sequence[Item]
    cursor: str = ""
    skipped: int = 0
    done: float | None = None
    etag: str = ""
    modified: str = ""
    kept: bool = field(default=False)  # the cursor stays after the last page: a file that may grow


def parse(document: bytes) -> Element:
    """An XML document's root. Raises ValueError, in one line, for what is none or declares a document type."""
    try:
        root: Element = Safe.fromstring(document, forbid_dtd=True)
    except DefusedXmlException:
        raise ValueError("the document declares a document type or entities, which feeds need not: refused") from None
    except (ParseError, LookupError, ValueError) as error:  # LookupError: an encoding that is none
        raise ValueError(f"this is no XML that can be read: {error}") from None
    return root


def elements(file: IO[bytes], tag: str) -> Iterator[Element]:
    """The elements of that name, one at a time however large the document; each is emptied when the next is asked for."""
    try:
        path: list[Element] = []
        for event, element in Safe.iterparse(file, events=("start", "end"), forbid_dtd=True):
            if event == "start":
                path.append(element)
                continue
            path.pop()
            if element.tag == tag:
                yield element
                if path:
                    path[-1].remove(element)
    except DefusedXmlException:
        raise ValueError("the document declares a document type or entities, which feeds need not: refused") from None
    except (ParseError, LookupError, ValueError) as error:
        raise ValueError(f"this is no XML that can be read: {error}") from None


def text_of(element: Element | None, path: str = ".") -> str:
    """The text of the element at ``path``, or ""."""
    found = element.find(path) if element is not None else None
    return "".join(found.itertext()).strip() if found is not None else ""


def time_of(value: Any) -> datetime | None:
    """A time as feeds write it (ISO 8601, RFC 2822, a bare day), in UTC without a zone; None for what is none."""
    if not isinstance(value, str) or not value.strip() or len(value) > 100:
        return None
    value = value.strip()
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        try:
            found = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    try:
        return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found
    except (OverflowError, ValueError):
        return None


def words(value: Any) -> str:
    """A text of JSON, or "" where there is something else."""
    return value if isinstance(value, str) else ""
