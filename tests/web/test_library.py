"""Papers are stored once, whoever brings them."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

import pytest
from sqlalchemy import func, select

from broadsheet import catalogue
from broadsheet.web import library
from broadsheet.web.db import reading, session
from broadsheet.web.library import Added, Item
from broadsheet.web.tables import Author, Paper, Tag

BASE = Item(
    "GEAR for Caches", ("Hao Kang", "Ada Chen"), "Old text. It is long.", arxiv_id="2403.01234v1", version=1,
    tags=("cs.LG",), published=datetime(2024, 3, 8), updated=datetime(2024, 3, 8), source="arxiv",
)  # fmt: skip


def add(engine, *items):
    with session(engine) as db:
        return library.add(db, items)


def only(engine):
    with reading(engine) as db:
        paper = db.scalars(select(Paper)).one()
        return paper, [a.name for a in paper.authors], {t.name for t in paper.tags}


def test_the_same_paper_from_every_feed_is_one_row(engine):
    assert add(engine, BASE) == Added(new=1)
    again = (
        replace(BASE, arxiv_id="http://arxiv.org/abs/2403.01234v1"),
        replace(BASE, arxiv_id="oai:arXiv.org:2403.01234", version=0, tags=("cs.CL",), doi="https://doi.org/10.1145/ABC.1"),
        replace(BASE, arxiv_id="", doi="doi:10.1145/abc.1", title="Another spelling"),
        replace(BASE, arxiv_id="", title="GEAR — for caches!", authors=("Kang, Hao",), code_url="https://github.com/a/b"),
        replace(BASE, arxiv_id="", doi="10.48550/arXiv.2403.01234", abstract=""),
    )
    for item in again:
        assert add(engine, item).new == 0
    assert add(engine, *again) == Added(same=5)
    paper, authors, tags = only(engine)
    assert (paper.arxiv_id, paper.doi, paper.code_url) == ("2403.01234", "10.1145/abc.1", "https://github.com/a/b")
    assert (paper.title, paper.version, authors) == ("GEAR for Caches", 1, ["Hao Kang", "Ada Chen"])
    assert tags == {"cs.LG", "cs.CL"}
    assert paper.day == date(2024, 3, 8)


def test_one_batch_merges_with_itself(engine):
    added = add(
        engine, BASE, replace(BASE, doi="10.1145/abc.1"), replace(BASE, arxiv_id="", doi="10.1145/ABC.1", tags=("x",))
    )
    assert (added.new, added.same) == (1, 2)
    paper, _, tags = only(engine)
    assert paper.doi == "10.1145/abc.1"
    assert tags == {"cs.LG", "x"}


def test_a_later_version_replaces_and_an_earlier_does_not(engine):
    second = replace(
        BASE, title="GEAR, Revised", authors=("Hao Kang", "Noor Vos"), abstract="New text.", version=2,
        arxiv_id="2403.01234v2", updated=datetime(2024, 5, 1), published=BASE.published,
    )  # fmt: skip
    assert add(engine, BASE, second).new == 1  # within a batch
    for item in (BASE, second, replace(BASE, arxiv_id="2403.01234")):
        assert add(engine, item) == Added(same=1)
    third = replace(second, version=3, abstract="Third text.", authors=("Noor Vos",))
    assert add(engine, third) == Added(changed=1)  # across transactions
    paper, authors, _ = only(engine)
    assert (paper.title, paper.abstract, paper.summary, paper.version) == ("GEAR, Revised", "Third text.", "Third text.", 3)
    assert (authors, paper.updated, paper.day) == (["Noor Vos"], datetime(2024, 5, 1), date(2024, 3, 8))
    assert "Vos" in paper.names
    assert "Kang" not in paper.names


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, arxiv_id="2403.09999"),
        replace(BASE, arxiv_id="", authors=("Somebody Else",)),
        replace(BASE, arxiv_id="", title="GEAR for Gears"),
    ],
)
def test_other_papers_stay_apart(engine, other):
    add(engine, BASE)
    assert add(engine, other) == Added(new=1)


def test_a_doi_that_another_row_has_is_not_taken_from_it(engine):
    add(engine, BASE, replace(BASE, arxiv_id="", doi="10.1/one.1", title="Journal version"))
    add(engine, replace(BASE, doi="10.1/one.1"))
    with reading(engine) as db:
        assert db.scalar(select(func.count()).select_from(Paper)) == 2


@pytest.mark.parametrize(
    ("text", "id", "version"),
    [
        ("2403.05527", "2403.05527", 0), ("2403.05527v12", "2403.05527", 12), ("arXiv:0704.0001", "0704.0001", 0),
        ("http://arxiv.org/abs/cs/0301012v1", "cs/0301012", 1), ("math.GT/0309136", "math/0309136", 0),
        ("https://arxiv.org/pdf/2403.05527v2.pdf", "2403.05527", 2), ("oai:arXiv.org:hep-th/9901001", "hep-th/9901001", 0),
        ("https://huggingface.co/papers/2403.05527", "", 0), ("12.34", "", 0), ("0301012", "", 0), ("", "", 0),
        ("2403.055271", "", 0), ("https://export.arxiv.org/abs/2403.05527v3", "2403.05527", 3),
    ],
)  # fmt: skip
def test_arxiv_ids(text, id, version):
    assert (library.arxiv_id_of(text), library.arxiv_version_of(text)) == (id, version)


def test_the_catalogue_becomes_rows_and_merges_with_feeds(engine):
    known = catalogue.paper("gear")
    feed = Item(
        known.title, ("Hao Kang", "Qingru Zhang"), "What the authors wrote.", arxiv_id=known.arxiv + "v3", version=3,
        tags=("cs.LG",), published=datetime(2024, 3, 8),
    )  # fmt: skip
    with session(engine) as db:
        library.seed(db)
    add(engine, feed)
    add(engine, Item(catalogue.paper("snapkv").title if "snapkv" in catalogue.papers() else "Unrelated", ("Li",), "Text."))
    for _ in range(2):
        with session(engine) as db:
            library.seed(db)
    with reading(engine) as db:
        rows = list(db.scalars(select(Paper).where(Paper.slug.is_not(None))))
        assert {row.slug for row in rows} == set(catalogue.papers())
        assert all(row.running == bool(catalogue.paper(row.slug).method) for row in rows)
        gear = next(row for row in rows if row.slug == "gear")
        assert gear.day == date(2024, 3, 1)
        assert gear.summary == " ".join(known.summary.split())
        assert gear.abstract == "What the authors wrote."
        assert [a.name for a in gear.authors] == ["Hao Kang", "Qingru Zhang"]
        assert {"cs.LG", *known.tags} <= {t.name for t in gear.tags}
        assert "gear" in gear.names.split()
        assert "Qingru" in gear.names


def test_a_feed_that_came_first_merges_with_the_catalogue(engine):
    known = catalogue.paper("gear")
    add(engine, Item(known.title, ("Hao Kang",), "Theirs.", arxiv_id=known.arxiv, published=datetime(2024, 3, 8)))
    with session(engine) as db:
        library.seed(db)
    with reading(engine) as db:
        row = db.scalars(select(Paper).where(Paper.arxiv_id == known.arxiv)).one()
        assert (row.slug, row.family, row.abstract) == ("gear", "caches", "Theirs.")
        assert row.summary == " ".join(known.summary.split())
        assert db.scalar(select(func.count()).select_from(Paper)) == len(catalogue.papers())


def test_what_left_the_catalogue_is_a_paper_like_any_other(engine):
    with session(engine) as db:
        library.seed(db)
        gear = db.scalars(select(Paper).where(Paper.slug == "gear")).one()
        gear.slug = "no-longer-there"
    with session(engine) as db:
        library.seed(db)
    with reading(engine) as db:
        assert db.scalar(select(func.count()).where(Paper.slug == "no-longer-there")) == 0
        assert db.scalars(select(Paper).where(Paper.slug == "gear")).one().running


def test_a_deleted_paper_takes_its_authors_and_tags(engine, papers):
    with session(engine) as db:
        for paper in db.scalars(select(Paper)):
            db.delete(paper)
    with reading(engine) as db:
        for table in (Author, Tag):
            assert db.scalar(select(func.count()).select_from(table)) == 0
