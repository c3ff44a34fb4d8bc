"""Papers as pages show them are what is stored."""

from __future__ import annotations

from dataclasses import fields

import pytest
from sqlalchemy import select

from broadsheet.web import papers as shown
from broadsheet.web.db import reading
from broadsheet.web.tables import Paper


@pytest.mark.usefixtures("papers")
def test_what_is_read_is_what_the_rows_say(engine):
    with reading(engine) as db:
        rows = {row.id: row for row in db.scalars(select(Paper))}
        ids = [*sorted(rows, reverse=True), 4711]
        for kind, found in ((shown.Whole, shown.read(db, ids)), (shown.Brief, shown.read_brief(db, ids))):
            assert [paper.id for paper in found] == ids[:-1]  # in the order that was asked for, those that there are
            for paper in found:
                row = rows[paper.id]
                expected = {field.name: getattr(row, field.name) for field in fields(kind)}
                expected["authors"] = tuple(author.name for author in row.authors)
                if "tags" in expected:
                    expected["tags"] = tuple(tag.name for tag in row.tags)
                assert paper == kind(**expected)
        assert shown.read(db, []) == shown.read_brief(db, []) == []


@pytest.mark.usefixtures("papers")
def test_a_paper_is_found_by_its_names(engine):
    with reading(engine) as db:
        [number] = db.scalars(select(Paper.id).where(Paper.arxiv_id == "2611.00001"))
        for name in ("2611.00001", "2611.00001v1", str(number)):
            assert shown.find(db, name) == shown.read(db, [number])[0]
        assert shown.find(db, "cs/0301012").authors == ("Hana Kim",)
        for name in ("", "nobody", "9" * 30, "2611.99999", "\x00", "\ud800"):
            assert shown.find(db, name) is None
