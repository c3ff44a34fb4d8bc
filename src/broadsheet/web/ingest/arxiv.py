"""arXiv's API (Atom): ``/api/query`` with search_query, start and max_results, newest first.

Reading stops at ``since``, or at the day of the last reading. The cursor is the place in the list: papers that are submitted
meanwhile push others back, so that going on repeats some and misses none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from xml.etree.ElementTree import Element

from ..library import Item, arxiv_id_of, arxiv_version_of, utcnow
from .common import Page, Wanted, parse, text_of, time_of

A_PAGE = 200
#: Days back where nothing was read yet; arXiv's API serves at most 30,000 papers of a list.
FIRST_DAYS, LAST = 7, 30_000
ATOM = "{http://www.w3.org/2005/Atom}"
ARXIV = "{http://arxiv.org/schemas/atom}"
TOTAL = "{http://a9.com/-/spec/opensearch/1.1/}totalResults"


def read(wanted: Wanted, fetch: Callable[[str], bytes]) -> Iterator[Page]:
    """Pages of the list. Raises ValueError with arXiv's words."""
    start = int(wanted.cursor) if wanted.cursor.isdecimal() else 0
    last = wanted.read.date() - timedelta(days=2) if wanted.read else utcnow().date() - timedelta(days=FIRST_DAYS)
    since = wanted.since or last
    while True:
        root = parse(fetch(address(wanted.url, start)))
        if root.tag != f"{ATOM}feed":
            raise ValueError("this is no answer of arXiv's API")
        entries = root.findall(f"{ATOM}entry")
        if entries and "/api/errors" in text_of(entries[0], f"{ATOM}id"):
            raise ValueError(f"arXiv says: {text_of(entries[0], f'{ATOM}summary')[:200]}")
        items = [item for item in map(item_of, entries) if item]
        start += len(entries)
        written = text_of(root, TOTAL)
        total = min(int(written) if written.isdecimal() else start, LAST)
        fresh = [item for item in items if item.published is None or item.published.date() >= since]
        over = not entries or start >= total or (bool(items) and len(fresh) < len(items))
        yield Page(fresh, "" if over else str(start), len(entries) - len(items), 1.0 if over else None)
        if over:
            return


def address(url: str, start: int) -> str:
    """The request for a page."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    query |= {"start": str(start), "max_results": query.get("max_results", str(A_PAGE))}
    query |= {"sortBy": "submittedDate", "sortOrder": "descending"}
    return urlunsplit(parts._replace(query=urlencode(query), fragment=""))


def item_of(entry: Element) -> Item | None:
    """An entry's paper."""
    address = text_of(entry, f"{ATOM}id")
    title = text_of(entry, f"{ATOM}title")
    if not title or not arxiv_id_of(address):
        return None
    return Item(
        title=title, authors=tuple(text_of(name) for name in entry.findall(f"{ATOM}author/{ATOM}name")),
        abstract=text_of(entry, f"{ATOM}summary"), arxiv_id=arxiv_id_of(address), version=arxiv_version_of(address),
        doi=text_of(entry, f"{ARXIV}doi"), tags=tuple(c.get("term", "") for c in entry.findall(f"{ATOM}category")),
        published=time_of(text_of(entry, f"{ATOM}published")), updated=time_of(text_of(entry, f"{ATOM}updated")),
        source="arxiv",
    )  # fmt: skip
