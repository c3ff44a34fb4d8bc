"""Search: words in titles, authors, tags, summaries and abstracts, and papers that are about the same.

The words are indexed by the database: SQLite's FTS5 with BM25 (a word in a title counts ten times one in an abstract), or
PostgreSQL's tsvector with ts_rank and the same proportions. Words are stemmed, names are found without their accents, the
last word may be unfinished, "words in quotes" and hyphen-ated words stand side by side, and -word excludes. Nothing that
one can type is an error.

**What is ranked.** A common word stands in half of all abstracts, and scoring 60,000 papers takes longer than anybody
waits. So at most twice `RANKED` matches are scored: the newest with a match in the title, and the newest of all. What comes
after them (from about the fourteenth page on) is in order of age. A query with fewer matches is ranked in full. The total is
exact, but with filters it stops at `COUNTED`.

**Meaning.** Where BROADSHEET_EMBEDDINGS asks for it (see `embeddings`), the order by words is fused with the order by
meaning: each gives a paper 1 / (60 + its place), the sum decides (reciprocal rank fusion), and papers without the words
but near in meaning follow those that have them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ColumnElement,
    Select,
    Text,
    TextClause,
    cast,
    column,
    exists,
    func,
    intersect,
    literal_column,
    select,
    table,
    text,
    true,
)
from sqlalchemy.orm import Session

from .library import author_key
from .papers import Whole
from .tables import Author, Paper, Tag

#: Matches that are scored: so many with a match in the title, and so many of all.
RANKED = 400
#: Up to here matches that pass a filter are counted.
COUNTED = 5_000
#: Papers that a word of a title may have for it to say what the paper is about.
TELLING = 1_000
#: BM25's weights of title, names (authors and tags), summary and abstract.
WEIGHTS = (10.0, 6.0, 3.0, 1.0)
#: Of reciprocal rank fusion, as in Cormack, Clarke and Büttcher (2009).
FUSION = 60
#: Papers near in meaning that a query brings.
NEAR = 50
_WORDS_MOST = 16
#: Columns as such: with those of the ORM's classes SQLAlchemy takes longer for a statement.
_paper, _author, _tag = (kind.__table__.c for kind in (Paper, Author, Tag))


@dataclass
class Found:
    """Papers' ids, best first, and how many there are in all (with filters: at most `COUNTED`)."""

    ids: list[int]
    total: int


def search(
    db: Session, query: str, *, day: date | None = None, since: date | None = None, until: date | None = None,
    family: str = "", tag: str = "", author: str = "", has_code: bool = False, running: bool = False, limit: int = 30,
    offset: int = 0,
) -> Found:  # fmt: skip
    """The papers that match, some of them. Without words: all that pass the filters, newest first."""
    limit, offset = max(0, limit), max(0, offset)
    family, tag, author = map(_storable, (family, tag, author))
    filters = _filters(day or since, day or until, family, tag, author, has_code, running)
    terms = parse(query)
    if not any(not term.excluded for term in terms):
        return _newest(db, filters, limit, offset) if not query.strip() or filters else Found([], 0)
    index = _INDEXES[db.get_bind().dialect.name]
    matches = index.best(db, terms, filters)
    ids = matches.ranked
    near = _near(db, query, filters) if offset < RANKED else []
    if near:
        fused = Counter({number: 1 / (FUSION + place) for place, number in enumerate(ids)})
        fused.update({number: 1 / (FUSION + place) for place, number in enumerate(near)})
        ids = [number for number, _ in fused.most_common()]
    total = max(matches.total, len(ids))
    shown = ids[offset : offset + limit]
    if len(shown) < limit and matches.total > len(matches.ranked):
        rest = max(0, offset - len(ids))
        shown += index.others(db, matches, filters, set(ids), limit - len(shown), rest)
    return Found(shown, total)


def related(db: Session, paper: Paper | Whole, limit: int = 5) -> list[int]:
    """Papers about the same, nearest first: by meaning where there are embeddings, else those that share the words of the
    title which few papers have (each counts the logarithm of its rarity), or a family of the catalogue."""
    from . import embeddings

    if found := embeddings.of(db):
        near = [number for number in found.like(paper.id, limit + 1) if number != paper.id]
        if near:
            return near[:limit]
    index = _INDEXES[db.get_bind().dialect.name]
    count = db.scalar(_NEWEST) or 1
    shared: list[tuple[NDArray[np.int64], float]] = []
    words = dict.fromkeys(word for word in _WORD.findall(paper.title.lower()) if len(word) > 2 and word not in STOP_WORDS)
    for word in list(words)[:_WORDS_MOST]:
        ids = index.with_word(db, word, TELLING, count)
        shared.append((ids, math.log(1 + count / max(1, len(ids))) * (1 if len(ids) < TELLING else 0.3)))
    if paper.family:
        family = db.scalars(select(_paper.id).where(_paper.family == paper.family)).all()
        shared.append((np.array(family, np.int64), 2.0))
    return [number for number in _heaviest(shared, limit + 1) if number != paper.id][:limit]


_NEWEST = select(func.max(_paper.id))


def _heaviest(shared: list[tuple[NDArray[np.int64], float]], most: int) -> list[int]:
    """Of sets of ids, each with a weight: the ids with the largest sums of weights, of equal ones the highest."""
    if not any(len(ids) for ids, _ in shared):
        return []
    # Sorting ids with their set's number beneath them is several times as fast as sorting ids and taking the sets along.
    keys = np.sort(np.concatenate([place - ids * len(shared) for place, (ids, _) in enumerate(shared)]))
    numbers, places = np.divmod(keys, len(shared))  # minus the ids, so that the highest come first
    first = np.flatnonzero(np.diff(numbers, prepend=1))
    weights = np.round(1e6 * np.array([weight for _, weight in shared])).astype(np.int64)  # sums in any order are the same
    sums = np.add.reduceat(weights[places], first)
    found: list[int] = []
    for _ in range(min(most, len(sums))):  # a few times: sorting, or partitioning what has many ties, takes longer
        best = int(sums.argmax())  # of equal ones the first
        found.append(-int(numbers[first[best]]))
        sums[best] = -1
    return found


# --- what was typed ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """Words that stand side by side; of the last one perhaps only the beginning."""

    words: tuple[str, ...]
    excluded: bool = False
    unfinished: bool = False


def parse(query: str) -> list[Term]:
    """What was typed as terms that must all match. Words that every paper has are left out unless they are all there is."""
    terms: list[Term] = []
    query = query[:1000].replace("\x00", " ")
    for minus, quoted, plain in _PART.findall(query):
        words = tuple(_WORD.findall((quoted or plain).lower()))[:_WORDS_MOST]
        if words:
            terms.append(Term(words, bool(minus)))
    telling = [term for term in terms if len(term.words) > 1 or term.words[0] not in STOP_WORDS]
    terms = telling if any(not term.excluded for term in telling) else terms[:1]
    terms = list(dict.fromkeys(terms))[:_WORDS_MOST]
    if terms and query and _WORD.match(query[-1]) and not terms[-1].excluded and len(terms[-1].words[-1]) > 2:
        last = terms[-1]
        if last.words[-1] == _WORD.findall(query.lower())[-1]:
            terms[-1] = Term(last.words, unfinished=True)
    return terms


_PART = re.compile(r'((?<!\S)-)?(?:"([^"]*)"?|([^\s"]+))')
_WORD = re.compile(r"[^\W_]+")
STOP_WORDS = frozenset(
    "a an and are as at be by for from has have in into is it its of on or over that the their this to under using via we "
    "what when which with".split()
)


# --- filters ----------------------------------------------------------------------------------------------------


def _filters(
    since: date | None, until: date | None, family: str, tag: str, author: str, has_code: bool, running: bool
) -> list[Select[Any]]:  # fmt: skip
    """Each as a query for the ids that pass, which an index answers; the one of days, which have most papers, last."""
    found: list[Select[Any]] = []
    if has_code:
        found.append(select(_paper.id).where(literal_column("code_url != ''")))
    if family:
        found.append(select(_paper.id).where(_paper.family == family))
    if running:
        found.append(select(_paper.id).where(_paper.running == true()))
    if author:
        found.append(select(_author.paper_id).where(_author.key == author_key(author)))
    if tag:
        found.append(select(_tag.paper_id).where(_tag.name == tag))
    if since or until:
        days = select(_paper.id)
        days = days.where(_paper.day >= since) if since else days
        found.append(days.where(_paper.day <= until) if until else days)
    return found


def _has(ids: Select[Any], number: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether an id passes a filter, looked up by itself."""
    passing = ids.subquery()
    return exists(select(1).select_from(passing).where(passing.c[0] == number))


def _storable(text: str) -> str:
    """Without what no database takes, and thus no row has: it finds nothing instead of failing."""
    return text[:200].encode("utf-8", "replace").decode().replace("\x00", "?")


def _newest(db: Session, filters: list[Select[Any]], limit: int, offset: int) -> Found:
    passing = [_paper.id.in_(ids) for ids in filters]
    every = intersect(*filters) if len(filters) > 1 else filters[0] if filters else select(_paper.id)
    total = db.scalar(select(func.count()).select_from(every.subquery())) or 0
    if total < COUNTED // 5:  # few: found first, then sorted
        ids = db.scalars(select(_paper.id).where(*passing).order_by(_paper.day.desc(), _paper.id.desc()))
        return Found(list(ids)[offset : offset + limit], total)
    walk = select(_paper.id).order_by(_paper.day.desc(), _paper.id.desc()).offset(offset).limit(limit)
    for passing_ids in filters:  # many: along the index of days, each looked at until there are enough
        walk = walk.where(_has(passing_ids, _paper.id))
    return Found(list(db.scalars(walk)), total)


def _near(db: Session, query: str, filters: list[Select[Any]]) -> list[int]:
    from . import embeddings

    found = embeddings.of(db)
    near = found.near(query, NEAR) if found else []
    if near and filters:
        passing = set(db.scalars(select(_paper.id).where(_paper.id.in_(near), *(_paper.id.in_(ids) for ids in filters))))
        near = [number for number in near if number in passing]
    return near


# --- the databases' indexes -------------------------------------------------------------------------------------


@dataclass
class Matches:
    """Ids, best first, as far as they were ranked; of how many; and ``query``, for the rest."""

    ranked: list[int]
    total: int
    query: str


#: words whose papers are kept in memory, and those: at most WORDS_KEPT times TELLING numbers of 8 bytes
WORDS_KEPT = 4_000
_KEPT: dict[tuple[str, str, int, int], NDArray[np.int64]] = {}


class Words:
    """A database's index of words. Ids grow with time, so that the newest matches are those with the highest."""

    #: The ids of ``most`` newest matches of ``query``, `joined`.
    of_word: TextClause

    def best(self, db: Session, terms: list[Term], filters: list[Select[Any]]) -> Matches:
        """The matches, ranked as the module's head says."""
        query, filters = self.query(terms), self.in_order(db, filters)
        newest = self._ids(db, query, filters, COUNTED)
        if len(newest) < RANKED and terms[-1].unfinished:  # a whole word that is common is not unfinished
            query = self.query(terms, unfinished=True)
            newest = self._ids(db, query, filters, COUNTED)
        if not newest and sum(not term.excluded for term in terms) > 1:  # nothing has all: what has any of them
            query = self.query(terms, unfinished=True, any_of=True)
            newest = self._ids(db, query, filters, COUNTED)
        total = len(newest)
        if total > 2 * RANKED:
            titles = self._ids(db, self.in_title(query), [], COUNTED if filters else RANKED)
            if filters:
                passing = set(newest)
                titles = [number for number in titles if number in passing]
            elif total == COUNTED:
                total = db.scalar(select(func.count()).select_from(self.matching(query, []).order_by(None).subquery())) or 0
            newest = list(dict.fromkeys(titles[:RANKED] + newest[:RANKED]))
        return Matches(self.ranked(db, query, newest), total, query)

    def others(
        self, db: Session, matches: Matches, filters: list[Select[Any]], seen: set[int], limit: int, offset: int
    ) -> list[int]:  # fmt: skip
        """Those that were not ranked, newest first."""
        ids = self._ids(db, matches.query, filters, offset + limit + len(seen))
        return [number for number in ids if number not in seen][offset : offset + limit]

    def with_word(self, db: Session, word: str, most: int, newest: int) -> NDArray[np.int64]:
        """The newest papers with a word; kept for the words that titles repeat, until there is a paper above ``newest``."""
        key = (str(db.get_bind().engine.url), word, most, newest)
        if (kept := _KEPT.get(key)) is not None:
            return kept
        found = db.scalar(self.of_word, {"query": self.query([Term((word,))]), "most": most})
        ids = np.array(found.split(",") if found else [], dtype=np.int64)
        if len(_KEPT) >= WORDS_KEPT:
            _KEPT.clear()
        _KEPT[key] = ids
        return ids

    def _ids(self, db: Session, query: str, filters: list[Select[Any]], most: int) -> list[int]:
        matches = self.matching(query, filters).limit(most).subquery()
        found = db.scalar(select(self.joined(matches.c[0])))
        return sorted(map(int, found.split(",")), reverse=True) if found else []

    def in_order(self, db: Session, filters: list[Select[Any]]) -> list[Select[Any]]:
        """The filters in the order in which `matching` should have them."""
        return filters

    def joined(self, ids: ColumnElement[int]) -> ColumnElement[str]:
        """All ids as one text, commas between them: rows would cost an object each."""
        raise NotImplementedError

    def query(self, terms: list[Term], unfinished: bool = False, any_of: bool = False) -> str:
        """The terms in the index's own language."""
        raise NotImplementedError

    def in_title(self, query: str) -> str:
        """The same query of titles alone."""
        raise NotImplementedError

    def matching(self, query: str, filters: list[Select[Any]]) -> Select[Any]:
        """Ids, newest first."""
        raise NotImplementedError

    def ranked(self, db: Session, query: str, ids: list[int]) -> list[int]:
        """The ids, best first."""
        raise NotImplementedError


class FTS5(Words):
    """SQLite's: it walks its matches from the newest on, and stops when there are enough."""

    _table = table("paper_search", column("rowid"))
    of_word = text(
        "select group_concat(rowid) from "
        "(select rowid from paper_search where paper_search match :query order by rowid desc limit :most)"
    )

    _best_first = text(
        "select rowid from paper_search where paper_search match :query and +rowid in (select value from json_each(:ids)) "
        f"and rowid >= :first order by bm25(paper_search, {', '.join(map(str, WEIGHTS))}), rowid desc"
    )

    def query(self, terms: list[Term], unfinished: bool = False, any_of: bool = False) -> str:
        wanted: list[str] = []
        excluded: list[str] = []
        for term in terms:
            phrase = '"' + " ".join(term.words) + '"' + (" *" if unfinished and term.unfinished else "")
            (excluded if term.excluded else wanted).append(phrase)
        query = (" OR " if any_of else " AND ").join(wanted)
        return f"({query}) NOT ({' OR '.join(excluded)})" if excluded else query

    def in_title(self, query: str) -> str:
        return f"{{title}} : ({query})"

    def matching(self, query: str, filters: list[Select[Any]]) -> Select[Any]:
        rowid: ColumnElement[Any] = self._table.c.rowid
        matching = select(rowid).where(literal_column("paper_search").op("match")(query)).order_by(rowid.desc())
        if filters:  # the + keeps SQLite from asking the index for every id by itself
            matching = matching.where(literal_column("+paper_search.rowid").in_(filters[0]))
        return matching.where(*(_has(ids, rowid) for ids in filters[1:]))

    def in_order(self, db: Session, filters: list[Select[Any]]) -> list[Select[Any]]:
        """The fewest first: SQLite makes a list of the first one's ids, and looks the others up for what is left. A list of
        each, as its planner would have it, took longer than the search itself."""
        if len(filters) < 2:
            return filters
        some = [ids.limit(COUNTED).subquery() for ids in filters]
        counts = db.execute(select(*(select(func.count()).select_from(ids).scalar_subquery() for ids in some))).one()
        return [ids for _, ids in sorted(zip(counts, filters, strict=True), key=lambda pair: pair[0])]

    def joined(self, ids: ColumnElement[int]) -> ColumnElement[str]:
        return func.group_concat(ids)

    def ranked(self, db: Session, query: str, ids: list[int]) -> list[int]:
        if len(ids) < 2:
            return ids
        return list(db.scalars(self._best_first, {"query": query, "ids": json.dumps(ids), "first": min(ids)}))


class TsVector(Words):
    """PostgreSQL's: the column ``words`` and its GIN index."""

    _words: ColumnElement[Any] = literal_column("paper.words")
    of_word = text(
        "select string_agg(id::text, ',') from (select id from paper "
        "where words @@ to_tsquery('english'::regconfig, :query) order by id desc limit :most) as newest"
    )

    def query(self, terms: list[Term], unfinished: bool = False, any_of: bool = False) -> str:
        wanted: list[str] = []
        excluded: list[str] = []
        for term in terms:
            ends = [""] * (len(term.words) - 1) + [":*" if unfinished and term.unfinished else ""]
            phrase = " <-> ".join(f"'{word}'{end}" for word, end in zip(term.words, ends, strict=True))
            (excluded if term.excluded else wanted).append(f"({phrase})")
        query = (" | " if any_of else " & ").join(wanted)
        return f"({query}) & !({' | '.join(excluded)})" if excluded else query

    def in_title(self, query: str) -> str:
        return re.sub(r"('[^']+')(:\*)?", lambda word: f"{word[1]}{word[2] or ':'}A", query)

    def matching(self, query: str, filters: list[Select[Any]]) -> Select[Any]:
        matching = select(_paper.id).where(self._words.op("@@")(self._parsed(query)))
        return matching.where(*(_paper.id.in_(ids) for ids in filters)).order_by(_paper.id.desc())

    def joined(self, ids: ColumnElement[int]) -> ColumnElement[str]:
        return func.string_agg(cast(ids, Text), ",")

    def ranked(self, db: Session, query: str, ids: list[int]) -> list[int]:
        most = max(WEIGHTS)
        weights = "{" + ", ".join(str(weight / most) for weight in reversed(WEIGHTS)) + "}"  # PostgreSQL's are D, C, B, A
        score = func.ts_rank(literal_column(f"'{weights}'::real[]"), self._words, self._parsed(query), 1)
        return list(db.scalars(select(_paper.id).where(_paper.id.in_(ids)).order_by(score.desc(), _paper.id.desc())))

    def _parsed(self, query: str) -> ColumnElement[Any]:
        return func.to_tsquery(literal_column("'english'::regconfig"), query)


_INDEXES: dict[str, Words] = {"sqlite": FTS5(), "postgresql": TsVector()}
