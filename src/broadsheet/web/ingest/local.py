"""Files: JSON lines of `library.Item`, arXiv's metadata snapshot (JSON lines), OAI-PMH dumps (XML); each also as .gz.

JSON lines go on where they stopped: the cursor is the offset and a digest of the file's beginning, so that lines that were
added later are read and no others, and a file that was replaced is read anew.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import date
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..library import Item, arxiv_id_of, arxiv_version_of
from . import oai
from .common import Page, Wanted, elements, time_of, words

#: Papers a transaction.
A_PAGE = 1000
#: Bytes of a line; longer ones are no papers.
LONGEST = 4 << 20


def read(wanted: Wanted) -> Iterator[Page]:
    """Pages of a file. Raises ValueError where it cannot be read."""
    path = Path(wanted.url)
    try:
        size = path.stat().st_size
        with _open(path) as file:
            start = file.read(4096)
            file.seek(0)
            if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                yield from _xml(file, wanted, blake2b(start, digest_size=6).hexdigest())
            else:
                yield from _lines(file, wanted, size if not path.name.endswith(".gz") else 0)
    except (OSError, EOFError) as error:  # gzip raises EOFError for what ends too early
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot read {path}: {reason}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(file: IO[bytes], wanted: Wanted, size: int) -> Iterator[Page]:
    offset = _offset(file, wanted.cursor)
    file.seek(offset)
    items: list[Item] = []
    skipped = count = 0
    mark = ""
    while line := file.readline(LONGEST):
        count += 1
        whole = line.endswith(b"\n")
        if not whole and len(line) == LONGEST:  # no line of ours: over it
            while (line := file.readline(LONGEST)) and not line.endswith(b"\n"):
                pass
            skipped += 1
        elif line.strip():
            item = item_of(line)
            if item is None and not whole:
                break  # still being written: the next time
            if item is None:
                skipped += 1
            elif _is_since(item, wanted.since):
                items.append(item)
        offset = file.tell()
        if count % A_PAGE == 0:
            mark = mark or _mark(file, offset)
            yield Page(items, f"{offset}:{mark}", skipped, offset / size if size else None)
            items, skipped = [], 0
    yield Page(items, f"{offset}:{_mark(file, offset)}", skipped, 1.0, kept=True)


def _offset(file: IO[bytes], cursor: str) -> int:
    """Where to go on: 0 unless the file still begins as it did."""
    offset, _, mark = cursor.partition(":")
    if not offset.isdigit() or not mark or _mark(file, int(offset)) != mark:
        return 0
    return int(offset) if int(offset) <= file.seek(0, 2) else 0


def _mark(file: IO[bytes], offset: int) -> str:
    """A digest of what the file begins with, as far as it was read."""
    here = file.tell()
    file.seek(0)
    digest = blake2b(file.read(min(4096, offset)), digest_size=6).hexdigest()
    file.seek(here)
    return digest


def _xml(file: IO[bytes], wanted: Wanted, mark: str) -> Iterator[Page]:
    known, _, of = wanted.cursor.partition(":")
    count = int(known) if known.isdigit() and of == mark else 0
    records = elements(file, f"{oai.OAI}record")
    for _ in islice(records, count):
        pass
    while True:
        batch = [oai.item_of(record) for record in islice(records, A_PAGE)]
        count += len(batch)
        items = [item for item in batch if item and _is_since(item, wanted.since)]
        last = len(batch) < A_PAGE
        yield Page(items, f"{count}:{mark}", sum(item is None for item in batch), 1.0 if last else None, kept=last)
        if last:
            return


def _is_since(item: Item, since: date | None) -> bool:
    time = item.updated or item.published
    return since is None or time is None or time.date() >= since


# --- lines ------------------------------------------------------------------------------------------------------


def item_of(line: bytes) -> Item | None:
    """A line's paper, or None where there is none."""
    try:
        row = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("title"), str):
        return None
    return _of_snapshot(row) if "categories" in row and "id" in row else _of_ours(row)


def _of_snapshot(row: dict[str, Any]) -> Item:
    """arXiv's own: id, authors_parsed [[last, first, suffix]], categories, versions [{version, created}], doi, abstract."""
    versions = [version for version in _list(row.get("versions")) if isinstance(version, dict)]
    times = [time_of(version.get("created")) for version in versions]
    names = [[words(part) for part in name[:3]] for name in _list(row.get("authors_parsed")) if isinstance(name, list)]
    authors = tuple(" ".join(filter(None, [*name[1:2], *name[:1], *name[2:3]])) for name in names)
    return Item(
        title=row["title"], abstract=words(row.get("abstract")), arxiv_id=words(row.get("id")), doi=words(row.get("doi")),
        authors=authors or tuple(name.strip() for name in words(row.get("authors")).split(",")),
        tags=tuple(words(row.get("categories")).split()), version=len(versions),
        published=times[0] if times else time_of(row.get("update_date")),
        updated=times[-1] if times else time_of(row.get("update_date")), source="arxiv",
    )  # fmt: skip


def _of_ours(row: dict[str, Any]) -> Item:
    """The fields of `Item`; ``authors`` and ``tags`` are lists of texts, times and days ISO 8601."""
    known = {name: words(row.get(name)) for name in ("title", "abstract", "summary", "doi", "url", "code_url")}
    day = time_of(row.get("day"))
    version = row.get("version")
    arxiv_id = words(row.get("arxiv_id"))
    return Item(
        **known, arxiv_id=arxiv_id_of(arxiv_id), authors=tuple(map(words, _list(row.get("authors")))),
        tags=tuple(map(words, _list(row.get("tags")))),
        version=version if isinstance(version, int) else arxiv_version_of(arxiv_id),
        published=time_of(row.get("published")), updated=time_of(row.get("updated")), day=day.date() if day else None,
        source=words(row.get("source")) or "file",
    )  # fmt: skip


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
