"""Sources are read in their true formats, go on where they stopped, and can do no harm."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import func, select

from broadsheet.web import ingest, library
from broadsheet.web.db import open_database, reading, session
from broadsheet.web.fetching import Answer
from broadsheet.web.ingest import Named, arxiv, common, local, oai, rss
from broadsheet.web.library import Added, Item
from broadsheet.web.tables import Author, Paper, Source, utcnow

DATA = Path(__file__).parent / "data"
FORGET = "Caches That Forget: A Study of $n < k$ Slots"


class Served:
    """A fetcher that answers from documents, in order, and remembers what was asked."""

    def __init__(self, *documents):
        self.documents = list(documents)
        self.asked = []

    def get(self, url, etag="", modified=""):
        self.asked.append((url, etag, modified))
        found = self.documents.pop(0)
        if isinstance(found, Exception):
            raise found
        return (
            found
            if isinstance(found, Answer)
            else Answer((DATA / found).read_bytes() if isinstance(found, str) else found, url)
        )

    def queries(self):
        return [{name: values[0] for name, values in parse_qs(urlsplit(url).query).items()} for url, _, _ in self.asked]


def read(engine, kind, *documents, url="https://feeds.test/x", **given):
    served = Served(*documents)
    return ingest.read(engine, Named(kind, url), fetcher=served, **given), served


def stored(engine):
    with reading(engine) as db:
        return {p.title: (p, [a.name for a in p.authors], {t.name for t in p.tags}) for p in db.scalars(select(Paper))}


def source(engine, url="https://feeds.test/x"):
    with reading(engine) as db:
        return db.get(Source, url)


@pytest.fixture
def engine(tmp_path):
    """SQLite alone: how papers are stored is tested with every database in test_library."""
    made = open_database(f"sqlite:///{tmp_path / 'web.sqlite'}")
    yield made
    made.dispose()


def test_arxiv_s_api(engine):
    added, served = read(engine, "arxiv", "arxiv.atom.xml", since=date(2000, 1, 1), limit=2)
    assert added == Added(new=2)
    paper, authors, tags = stored(engine)[FORGET]
    assert (paper.arxiv_id, paper.version, paper.doi) == ("2611.01234", 2, "10.1000/made.1")
    assert (paper.published, paper.updated) == (datetime(2026, 11, 25, 9), datetime(2026, 11, 27, 17, 59, 2))
    assert paper.abstract == "We study caches where n < k and show that they forget. Code: https://github.com/made/forget."
    assert paper.code_url == "https://github.com/made/forget"
    assert (authors, tags) == (["Ada Bergström", "Kofi Okafor"], {"cs.CL", "cs.LG"})
    assert served.queries()[0] | {"x": ""} == {
        "start": "0", "max_results": "200", "sortBy": "submittedDate", "sortOrder": "descending", "x": "",
    }  # fmt: skip
    assert source(engine).cursor == "2"
    _, served = read(engine, "arxiv", "arxiv.atom.xml", since=date(2000, 1, 1))  # goes on, and ends at the total
    assert served.queries()[0]["start"] == "2"
    assert source(engine).cursor == ""
    _, served = read(engine, "arxiv", "arxiv.atom.xml")  # anew, to the day of the last reading
    assert served.queries()[0]["start"] == "0"


def test_arxiv_s_errors_are_told_and_kept(engine):
    with pytest.raises(ValueError, match="start must be non-negative"):
        read(engine, "arxiv", "arxiv.error.xml")
    assert (source(engine).failures, "non-negative" in source(engine).error) == (1, True)
    with pytest.raises(ValueError, match="no answer of arXiv"):
        read(engine, "arxiv", b"<html/>")
    assert source(engine).failures == 2


def test_oai_in_every_metadata_format(engine):
    url = "https://oaipmh.arxiv.org/oai?set=cs&metadataPrefix=arXiv"
    added, served = read(engine, "oai", "oai.first.xml", "oai.last.xml", url=url, since=date(2026, 11, 20))
    assert added == Added(new=3)
    first = {"verb": "ListRecords", "set": "cs", "metadataPrefix": "arXiv", "from": "2026-11-20"}
    assert served.queries() == [first, {"verb": "ListRecords", "resumptionToken": "token/2 & more"}]
    found = stored(engine)
    assert found[FORGET][1] == ["Ada Bergström", "Kofi Okafor Jr."]
    assert (found["Raw Records"][0].version, found["Raw Records"][1]) == (2, ["Hana Kim", "Dmitri Petrov", "Elif Vogel"])
    core = found["Dublin Core"]
    assert (core[0].doi, core[0].url, core[1]) == ("10.1000/made.7", "https://journal.example.org/7", ["Elif Vogel"])
    assert core[0].abstract == "The longer description is the abstract."


def error_of(code):
    return f'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><error code="{code}">words</error></OAI-PMH>'.encode()


def test_oai_goes_on_with_its_token_and_begins_anew_where_that_is_too_old(engine):
    with pytest.raises(ValueError, match="503"):
        read(engine, "oai", "oai.first.xml", ValueError("the server answers 503"))
    assert source(engine).cursor == "token/2 & more"
    _, served = read(engine, "oai", error_of("badResumptionToken"), "oai.last.xml")
    assert [q.get("resumptionToken") for q in served.queries()] == ["token/2 & more", None]
    assert (source(engine).cursor, source(engine).failures) == ("", 0)
    added, served = read(engine, "oai", error_of("noRecordsMatch"))
    assert added.total == 0
    assert served.queries()[0]["from"] == (utcnow().date() - timedelta(days=1)).isoformat()
    with pytest.raises(ValueError, match="badArgument: words"):
        read(engine, "oai", error_of("badArgument"))
    circle = (DATA / "oai.first.xml").read_bytes()
    read(engine, "oai", circle, circle)  # names the same page for ever: ends


def test_hugging_face_s_daily_papers(engine):
    day = utcnow().date() - timedelta(days=1)
    added, served = read(engine, "hf-daily", "daily.json", b"[]", since=day)
    assert added == Added(new=1, refused=2)
    paper, authors, _ = stored(engine)[FORGET]
    assert (paper.summary, paper.day, paper.arxiv_id) == (
        "Small caches forget, measurably.",
        date(2026, 11, 27),
        "2611.01234",
    )
    assert (paper.code_url, authors) == ("https://github.com/made/forget", ["Ada Bergström", "Kofi Okafor"])
    assert [q["date"] for q in served.queries()] == [day.isoformat(), utcnow().date().isoformat()]
    with pytest.raises(ValueError, match="no list"):
        read(engine, "hf-daily", b'{"error": "x"}')


def test_rss_and_atom_with_conditional_requests(engine):
    body = (DATA / "blog.rss.xml").read_bytes()
    added, _ = read(engine, "rss", Answer(body, "u", True, '"tag"', "Sat, 28 Nov 2026 08:00:00 GMT"))
    assert added == Added(new=2, refused=1)
    paper, authors, tags = stored(engine)[FORGET]
    assert (paper.abstract, paper.arxiv_id, authors, tags) == (
        "We study caches .", "2611.01234", ["Ada Bergström", "Kofi Okafor"], {"cs.CL"},
    )  # fmt: skip
    assert stored(engine)["A Post"][0].url == ""
    added, served = read(engine, "rss", Answer(b"", "u", False))
    assert added.total == 0
    assert served.asked[0][1:] == ('"tag"', "Sat, 28 Nov 2026 08:00:00 GMT")
    read(engine, "rss", "blog.atom.xml", url="https://blog.test/atom")
    paper, authors, _ = stored(engine)["Posts & Papers"]
    assert (paper.abstract, paper.url, authors) == ("Long text .", "https://blog.example.org/1", ["Elif Vogel"])
    assert paper.published == datetime(2026, 11, 27, 4, 30)
    with pytest.raises(ValueError, match="neither RSS nor Atom"):
        read(engine, "rss", b"<html><body/></html>")


def test_one_paper_from_all_feeds_is_one_row(engine):
    read(engine, "rss", "blog.rss.xml", url="https://a.test/rss")
    read(engine, "hf-daily", "daily.json", b"[]", since=utcnow().date() - timedelta(days=1))
    read(engine, "oai", "oai.first.xml", "oai.last.xml", url="https://a.test/oai")
    read(engine, "arxiv", "arxiv.atom.xml", since=date(2000, 1, 1), limit=2, url="https://a.test/api")
    ingest.read(engine, Named("file", str(DATA / "snapshot.jsonl")))
    with reading(engine) as db:
        rows = list(db.scalars(select(Paper).where(Paper.arxiv_id == "2611.01234")))
        assert len(rows) == 1
        assert db.scalar(select(func.count()).where(Paper.title_key == library.title_key(FORGET))) == 1
        assert (rows[0].version, rows[0].code_url, rows[0].doi) == (2, "https://github.com/made/forget", "10.1000/made.1")


@pytest.mark.parametrize("zipped", [False, True])
def test_files_are_read_once_and_what_is_added_later(engine, tmp_path, zipped):
    path = tmp_path / ("papers.jsonl.gz" if zipped else "papers.jsonl")
    body = (DATA / "snapshot.jsonl").read_bytes()
    more = json.dumps({"title": "Later", "authors": ["X"]}).encode() + b"\n"
    write = (lambda data: path.write_bytes(gzip.compress(data))) if zipped else path.write_bytes
    write(body)
    named = ingest.named(str(path))
    assert ingest.read(engine, named) == Added(new=2, refused=1)
    assert ingest.read(engine, named).total == 0
    own, authors, _ = stored(engine)["Our Own"]
    assert (own.arxiv_id, own.version, own.day, authors) == ("2611.03333", 3, date(2026, 11, 27), ["Hana Kim"])
    write(body + more[:10])  # still being written
    assert ingest.read(engine, named).total == 0
    write(body + more)
    assert ingest.read(engine, named) == Added(new=1)
    write(more)  # another file
    assert ingest.read(engine, named) == Added(same=1)


def test_oai_dumps_are_read_record_by_record(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "A_PAGE", 1)
    path = tmp_path / "dump.xml"
    path.write_bytes((DATA / "oai.last.xml").read_bytes())
    assert ingest.read(engine, ingest.named(str(path)), limit=1) == Added(new=1)
    assert ingest.read(engine, ingest.named(str(path))).new == 1
    assert set(stored(engine)) == {"Raw Records", "Dublin Core"}


def test_a_torn_archive_keeps_what_was_whole(engine, tmp_path):
    path = tmp_path / "papers.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"title": "One", "authors": ["X"]}\n' * 5)[:-9])
    with pytest.raises(ValueError, match="cannot read"):
        ingest.read(engine, ingest.named(str(path)))


def test_a_reader_that_is_killed_loses_nothing_and_goes_on(tmp_path):
    path, count = tmp_path / "papers.jsonl", 6000
    with open(path, "w") as file:
        for i in range(count):
            file.write(json.dumps({"title": f"Paper number {i}", "authors": [f"A {i}"], "arxiv_id": f"2001.{i:05d}"}) + "\n")
    home = tmp_path / "killed"
    command = [sys.executable, "-c", READER, str(path)]
    environment = {**os.environ, "BROADSHEET_HOME": str(home)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "page\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    engine = open_database(f"sqlite:///{home / 'web.sqlite'}")
    with reading(engine) as db:
        before = db.scalar(select(func.count()).select_from(Paper))
        kept = int(db.scalars(select(Source.cursor)).one().partition(":")[0])
    assert 0 < before < count
    assert path.read_bytes()[:kept].count(b"\n") == before  # what is stored and how far it was read agree
    added = ingest.read(engine, ingest.named(str(path)))
    assert added == Added(new=count - before)


READER = """
import sys, time
from broadsheet.web import ingest
from broadsheet.web.db import open_database
from broadsheet.web.settings import Settings
def told(added, done):
    print("page", flush=True)
    time.sleep(0.05)
ingest.read(open_database(Settings.from_environment().database), ingest.named(sys.argv[1]), progress=told)
"""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("arxiv:cs.CL", "arxiv"), ("oai:cs", "oai"), ("hf-daily", "hf-daily"), ("https://a.test/feed.xml", "rss"),
        ("https://a.test/oai?verb=ListRecords", "oai"), ("https://export.arxiv.org/api/query?search_query=all:x", "arxiv"),
    ],
)  # fmt: skip
def test_sources_are_named(name, kind):
    assert ingest.named(name).kind == kind
    for wrong in ("ftp://a.test/x", "no-such-file", "arxiv:"):
        with pytest.raises(ValueError):
            ingest.named(wrong)


# --- hostile feeds ----------------------------------------------------------------------------------------------

NESTED = b"".join(b'<!ENTITY %c "%s">' % (c + 1, (b"&%c;" % c) * 10) for c in b"abcdefghi")
BOMB = b'<!DOCTYPE x [<!ENTITY a "lol">' + NESTED + b']><rss version="2.0"><channel><title>&j;</title></channel></rss>'


@pytest.mark.parametrize(
    "document",
    [
        BOMB,
        b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]>'
        b'<rss version="2.0"><channel><title>&e;</title></channel></rss>',
        b'<!DOCTYPE x SYSTEM "http://169.254.169.254/x.dtd"><rss version="2.0"/>',
        b"\xff\xfe\x00bad", b"<rss", b"", b"\x00" * 100, b'<?xml version="1.0" encoding="no-such"?><rss/>',
        b'<?xml version="1.0" encoding="utf-8"?><rss version="2.0"><channel><title>\xe9</title></channel></rss>',
        b"<a>" * 20_000,
    ],
)  # fmt: skip
def test_documents_that_are_refused(document, tmp_path):
    def asked(document):
        return list(arxiv.read(common.Wanted("https://a.test"), lambda url: document))

    for reader in (rss.items_of, common.parse, asked):
        start = time.process_time()
        with pytest.raises(ValueError) as error:
            reader(document)
        assert "\n" not in str(error.value)
        assert time.process_time() - start < 2
    (tmp_path / "dump.xml").write_bytes(b"<" + document if not document.startswith(b"<") else document)
    with pytest.raises(ValueError):
        list(local.read(common.Wanted(str(tmp_path / "dump.xml"))))


EVIL = (
    "<script>alert(1)</script>", "<scr<script>ipt>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)>", "\x00\x01\x1b[31m", "a\u202eb\u2066c\u200f", "\ud800",
    "<style>*{}</style>",
    "'; drop table paper; --",
)  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_evil_in_every_field_is_stored_as_plain_text(engine, evil):
    item = Item(
        title=f"Fine {evil} title", authors=(evil, f"Ada {evil}"), abstract=evil * 3, summary=evil, arxiv_id=evil, doi=evil,
        url="javascript:alert(1)" + evil, code_url="https://u:p@x.test/" + evil, tags=(evil, "t" + evil), source=evil,
    )  # fmt: skip
    with session(engine) as db:
        assert library.add(db, [item, item]).new == 1
    (paper, authors, tags) = next(iter(stored(engine).values()))
    assert (paper.url, paper.code_url, paper.arxiv_id, paper.doi) == ("", "", None, None)
    for text in (paper.title, paper.abstract, paper.summary, paper.names, paper.source, *authors, *tags):
        assert not re.search(r"<[^>]*>", text)
        assert text.isprintable()
        assert not set(text) & set("\u202e\u2066\u200f\ud800")


def test_huge_fields_are_cut_and_in_time(engine):
    many = tuple(f"Author Number{i}" for i in range(100_000))
    start = time.process_time()
    with session(engine) as db:
        library.add(
            db,
            [
                Item("T" * 5_000_000, many, "<b " * 2_000_000, tags=many, url="https://x.test/" + "a" * 10**6),
                Item("word " * 1_000_000, ("A" * 10**6,), "x" * 5_000_000, doi="10.1000/" + "d" * 10**6),
            ],
        )
    assert time.process_time() - start < 3
    with reading(engine) as db:
        for paper in db.scalars(select(Paper)):
            assert len(paper.title) <= library.TITLE
            assert len(paper.abstract) <= library.ABSTRACT
            assert len(paper.authors) <= library.AUTHORS
            assert len(paper.tags) <= library.TAGS
            assert len(paper.url) <= library.URL
        assert db.scalar(select(func.max(func.length(Author.name)))) <= library.NAME


@pytest.mark.parametrize(
    "time", ["9999-12-31T23:59:59Z", "0001-01-01", "2026-13-45", "never", "", None, 7, "2026-11-27T25:00:00Z"]
)
def test_impossible_times_put_no_paper_before_others(engine, time):
    line = json.dumps({"title": "A paper of no time", "authors": ["X"], "published": time, "updated": time, "day": time})
    with session(engine) as db:
        library.add(db, [local.item_of(line.encode())])
    with reading(engine) as db:
        paper = db.scalars(select(Paper)).one()
        assert date(1900, 1, 1) <= paper.day <= utcnow().date()
        assert paper.published <= utcnow()


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000, b"{}", b"[]", b"null", b'{"title": 7}', b'{"title": ["x"]}', b"\xff\xfe", b'{"title": "x', b"1e999",
        b'{"id": 5, "categories": 7, "title": "x", "versions": {"a": 1}, "authors_parsed": [1, ["a"], [[]], null]}',
        b'{"title": "x", "authors": "one", "tags": {"a": 1}, "version": "v2", "published": [], "arxiv_id": 9}',
        b'{"title": "x", "version": 1e400}', b'{"title": "x", "version": true}', b'{"title": "\\ud800"}',
    ],
)  # fmt: skip
def test_lines_of_any_kind_are_no_error(engine, line):
    item = local.item_of(line)
    with session(engine) as db:
        library.add(db, [item] if item else [])


def test_a_line_without_end_is_skipped(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LONGEST", 1000)
    path = tmp_path / "papers.jsonl"
    path.write_bytes(b'{"title": "' + b"x" * 10_000 + b'"}\n{"title": "After it", "authors": ["X"]}\n')
    assert ingest.read(engine, ingest.named(str(path))) == Added(new=1, refused=1)


def test_oai_records_without_anything_are_no_papers():
    for text in ("<record/>", "<record><metadata/></record>", "<record><metadata><x/></metadata></record>"):
        root = common.parse(text.replace("<record", '<record xmlns="http://www.openarchives.org/OAI/2.0/"', 1).encode())
        assert oai.item_of(root) is None
