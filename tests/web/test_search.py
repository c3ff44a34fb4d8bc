"""Search and related papers, with every database."""

from __future__ import annotations

from datetime import date, datetime, timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from broadsheet.web import embeddings, library, papers, search
from broadsheet.web.db import reading, session
from broadsheet.web.library import Item
from broadsheet.web.tables import Paper

KV, PRUNE, DATA, ROOF = (
    "Quantised Key-Value Caches for Long Contexts", "Pruning Attention Heads without Retraining",
    "Instruction Data That Teach", "A Roofline of Small Accelerators",
)  # fmt: skip


def titles(engine, query, **given):
    with reading(engine) as db:
        found = search.search(db, query, **given)
        assert found.total >= len(found.ids)
        return [paper.title for paper in papers.read(db, found.ids)]


@pytest.mark.usefixtures("papers")
def test_words_are_found_wherever_they_stand(engine):
    for query, wanted in {
        "roofline": [ROOF], "accelerators": [ROOF], "accelerator bandwidth": [ROOF],  # stems, several words
        "bergström": [KV, DATA], "Bergstrom": [KV, DATA], "cs.AR": [ROOF], "okafor": [KV],  # names, accents, tags
        "prun": [PRUNE], "instruct": [DATA], '"instruction data"': [DATA], '"data instruction"': [],  # beginnings, phrases
        "key-value": [KV], "the": [], "-memory keys": [], "bergström -kofi": [DATA], "of roofline the": [ROOF],
        "outliers quantise": [KV], "zzzxqy": [], "retraining": [PRUNE],
    }.items():  # fmt: skip
        found = titles(engine, query)
        if query == "the":
            continue  # whatever it finds, it is no error
        assert sorted(found) == sorted(wanted), query


@pytest.mark.usefixtures("papers")
def test_where_no_paper_has_all_words_those_with_any_are_found(engine):
    assert set(titles(engine, "roofline pruning")) == {ROOF, PRUNE}


@pytest.mark.usefixtures("papers")
def test_filters(engine):
    with session(engine) as db:
        library.seed(db)
    assert titles(engine, "", day=date(2026, 11, 26)) == [PRUNE, KV]
    assert titles(engine, "", since=date(2026, 11, 26)) == [DATA, PRUNE, KV]
    assert titles(engine, "", since=date(2026, 11, 26), until=date(2026, 11, 26)) == [PRUNE, KV]
    assert titles(engine, "bergström", since=date(2026, 11, 27)) == [DATA]
    assert titles(engine, "", tag="data") == [DATA]
    assert titles(engine, "", author="ada bergström") == [DATA, KV]
    assert titles(engine, "memory", author="Ada Bergström") == [KV]
    assert set(titles(engine, "memory", has_code=True, until=date(2026, 12, 1), tag="cs.AR")) == {ROOF}
    assert titles(engine, "memory", running=True, tag="cs.AR") == []
    with reading(engine) as db:
        found = search.search(db, "cache", family="caches", running=True)
        assert found.total == len(found.ids) > 1
        assert all(paper.family == "caches" and paper.running for paper in papers.read(db, found.ids))
        assert search.search(db, "", family="caches", limit=2).total > 2


def made(count, word="common"):
    start = datetime(2020, 1, 1)
    return [
        Item(
            f"Paper {number}{' ' + word if number % 50 == 0 else ''}", ("Ada Vogel",),
            f"The {word} text {number} of the made kind." + (" Rare." if number % 100 == 7 else ""),
            arxiv_id=f"2001.{number:05d}", published=start + timedelta(hours=number),
        )
        for number in range(count)
    ]  # fmt: skip


def test_a_title_counts_more_than_an_abstract_even_if_it_is_old(engine):
    with session(engine) as db:
        library.add(db, made(2 * search.RANKED))
    with reading(engine) as db:
        first = search.search(db, "common", limit=2 * search.RANKED // 50)
        assert first.total == 2 * search.RANKED
        assert all(int(paper.title.split()[1]) % 50 == 0 for paper in papers.read(db, first.ids))
        seen = [
            number
            for offset in range(0, first.total, 100)
            for number in search.search(db, "common", limit=100, offset=offset).ids
        ]
        assert len(seen) == len(set(seen)) == first.total  # pages neither repeat nor lose a paper
        assert search.search(db, "common", offset=first.total).ids == []
        assert search.search(db, "rare common").total == 2 * search.RANKED // 100


@pytest.mark.usefixtures("papers")
def test_what_changes_is_found_as_it_is_now(engine):
    with session(engine) as db:
        row = db.scalars(select(Paper).where(Paper.title == ROOF)).one()
        row.title = "A Ceiling of Small Accelerators"
        row.votes = 3
        db.delete(db.scalars(select(Paper).where(Paper.title == KV)).one())
    assert titles(engine, "roofline") == []
    assert titles(engine, "ceiling") == ["A Ceiling of Small Accelerators"]
    assert titles(engine, "bergström") == [DATA]


HOSTILE = (
    '"', "'", '""', "*", "a*", '"a" *', "AND", "OR", "NOT", "a NOT", "NEAR(a b)", "NEAR", "title:", "{title} : x", "^a",
    "(", ")", "a OR (b", "-", "--", "-a", "- a", "a; drop table paper", "\x00", "a\x00b", "%", "_", "\\", ":*", "a:*", "!",
    "a & !b", "<->", "'a' <-> 'b'", "٣", "Ａ", "ﬁ", "é", "ß", "İ", "한국어", "\ud800", "\u202eevil", "a" * 5000, "a " * 3000,
    "' OR 1=1 --", "{", "+", "a.b.c", "c++", "x^2", "$1", "${x}", ":query", "the", "the of",
)  # fmt: skip


@pytest.mark.usefixtures("papers")
def test_no_spelling_is_an_error(engine):
    with reading(engine) as db:
        for query in HOSTILE:
            for filters in ({}, {"tag": query, "author": query, "family": query}):
                assert search.search(db, query, **filters).total >= 0, query

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.text(max_size=40) | st.text('ab"-*: ()^', max_size=15))
        @example('-"')
        def anything(query):
            assert search.search(db, query).total >= 0

        anything()


@pytest.mark.usefixtures("papers")
def test_related_papers_share_rare_words(engine):
    others = (
        Item("Long Contexts and Their Caches", ("X Y",), "Of caches.", arxiv_id="2611.00010"),
        Item("Learning to Cook", ("Z",), "Of soups.", arxiv_id="2611.00011"),
    )
    with session(engine) as db:
        library.add(db, others)
    with reading(engine) as db:
        paper = db.scalars(select(Paper).where(Paper.title == KV)).one()
        found = [p.title for p in papers.read_brief(db, search.related(db, paper, limit=3))]
        assert found[0] == "Long Contexts and Their Caches"
        assert KV not in found
        assert "Learning to Cook" not in found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, 40), max_size=15), st.sampled_from([0.1, 0.2, 0.3, 1.7])), max_size=6))
def test_the_heaviest_ids_are_those_that_a_sort_finds(shared):
    """Of equal sums the highest ids, in whatever order the weights are added."""
    sums = {number: sum(round(1e6 * w) for ids, w in shared if number in ids) for ids, _ in shared for number in ids}
    arrays = [(np.array(sorted(ids), dtype=np.int64), weight) for ids, weight in shared]
    for most in (1, 6, 100):
        expected = sorted(sums, key=lambda number: (-sums[number], -number))[:most]
        assert search._heaviest(arrays, most) == expected


@pytest.mark.usefixtures("papers")
def test_filters_in_any_order_find_the_same(engine, monkeypatch):
    """Whichever filter has fewest papers becomes the list; the others are looked up."""
    for filters in (
        {"tag": "cs.CL", "since": date(2026, 11, 26)},
        {"tag": "cs.LG", "author": "kofi okafor", "has_code": True, "until": date(2026, 11, 26)},
    ):
        found = titles(engine, "keys heads retraining", **filters)
        assert found
        monkeypatch.setattr(search.FTS5, "in_order", lambda self, db, filters: filters[::-1])
        assert titles(engine, "keys heads retraining", **filters) == found
        monkeypatch.undo()


def test_embeddings_find_what_is_near_in_meaning(engine, monkeypatch):
    monkeypatch.setenv("BROADSHEET_EMBEDDINGS", "lsa")
    topics = {
        "soup": ("carrot broth simmer spoon", "broth pot simmer ladle", "carrot pot ladle spoon"),
        "ship": ("anchor sail harbour mast", "harbour rudder sail deck", "anchor rudder mast deck"),
        "star": ("orbit comet nebula lens", "nebula quasar orbit dust", "comet quasar lens dust"),
    }
    items = [
        Item(f"{name} {i} {j}", ("A",), f"{text} {name if i else ''}", arxiv_id=f"20{k + 1:02d}.{i}{j:04d}")
        for k, (name, texts) in enumerate(topics.items()) for i, text in enumerate(texts) for j in range(3)
    ]  # fmt: skip
    with session(engine) as db:
        library.add(db, items)
    with reading(engine) as db:
        assert search.search(db, "ladle").total == 6
        assert embeddings.build(db) == len(items)
        found = search.search(db, "ladle", limit=9)
        assert found.total > 6  # those without the word but about the same
        shown = papers.read(db, found.ids)
        assert {paper.title.split()[0] for paper in shown} == {"soup"}
        assert [p.title for p in shown[:6]] == [p.title for p in shown if "ladle" in p.abstract]
        ship = db.scalars(select(Paper).where(Paper.title == "ship 0 0")).one()
        assert {p.title.split()[0] for p in papers.read_brief(db, search.related(db, ship))} == {"ship"}
        assert search.search(db, "ladle", tag="nowhere").ids == []
    monkeypatch.setenv("BROADSHEET_EMBEDDINGS", "magic")
    with reading(engine) as db, pytest.raises(ValueError, match="lsa or nothing"):
        search.search(db, "ladle")
