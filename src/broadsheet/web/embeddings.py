"""What papers are about, as vectors: BROADSHEET_EMBEDDINGS=lsa turns it on.

Latent semantic analysis: tf-idf of words and pairs of words, and its 128 strongest directions (scikit-learn's TruncatedSVD),
fitted on the library itself, so that nothing is downloaded and every field of papers gets its own directions. `build`
makes the vectors (``broadsheet ingest`` does, at its end); they lie under BROADSHEET_HOME beside the words and their
weights, a file for each database, as plain arrays. A query costs one product of matrices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from broadsheet.core.records import StorageError, home

from .tables import Paper

DIMENSIONS = 128
#: Words that have a direction: those of at least two papers and not of half of them, the commonest first.
VOCABULARY = 30_000
#: Papers that directions are fitted on; the vectors are made for all.
FITTED = 20_000
#: A paper that is less like the query (the vectors' cosine) is not like it.
LEAST = 0.35


def wanted() -> bool:
    """Whether the environment asks for embeddings. Raises ValueError for a kind that there is not."""
    kind = os.environ.get("BROADSHEET_EMBEDDINGS", "")
    if kind not in ("", "lsa"):
        raise ValueError(f"BROADSHEET_EMBEDDINGS is lsa or nothing, not '{kind}'")
    return kind == "lsa"


@dataclass
class Embeddings:
    """Vectors [papers, dimensions] of length 1 in float16 on disk, float32 here; ``ids`` are theirs, ascending.

    ``words`` [words] with ``weights`` [words] (inverse document frequency) and ``directions`` [words, dimensions].
    """

    ids: np.ndarray
    vectors: np.ndarray
    words: np.ndarray
    weights: np.ndarray
    directions: np.ndarray

    @cached_property
    def place(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.words.tolist())}

    def near(self, query: str, most: int) -> list[int]:
        """Papers near in meaning to a text, nearest first."""
        return self._nearest(self.embed([query])[0], most)

    def like(self, paper: int, most: int) -> list[int]:
        """Papers near a paper, itself among them; [] where it has no vector yet."""
        place = int(np.searchsorted(self.ids, paper))
        if place == len(self.ids) or self.ids[place] != paper:
            return []
        return self._nearest(self.vectors[place], most)

    def _nearest(self, vector: np.ndarray, most: int) -> list[int]:
        scores = self.vectors @ vector
        best = np.argpartition(-scores, min(most, len(scores) - 1))[:most]
        best = best[np.argsort(-scores[best], kind="stable")]
        return [int(self.ids[place]) for place in best if scores[place] >= LEAST]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [texts, dimensions] of length 1, or 0 where no word is known."""
        vectors = np.zeros((len(texts), self.directions.shape[1]), dtype=np.float32)
        for row, text in enumerate(texts):
            places, counts = np.unique([self.place[w] for w in _terms(text) if w in self.place], return_counts=True)
            if len(places):
                places = places.astype(int)
                vectors[row] = ((1 + np.log(counts)) * self.weights[places]) @ self.directions[places]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


_loaded: dict[Path, tuple[int, Embeddings]] = {}


def of(db: Session) -> Embeddings | None:
    """The vectors of this database, or None: not asked for, or not made yet. They are loaded once, and again when remade."""
    if not wanted():
        return None
    path = _path(db)
    try:
        made = path.stat().st_mtime_ns
        if path not in _loaded or _loaded[path][0] != made:
            _loaded[path] = made, _load(path)
    except (OSError, ValueError, KeyError):  # none, or not one of ours
        return None
    return _loaded[path][1]


def build(db: Session) -> int:
    """Makes the vectors of all papers anew, and returns how many. Raises ValueError without scikit-learn, StorageError."""
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ValueError("BROADSHEET_EMBEDDINGS=lsa needs scikit-learn: pip install scikit-learn") from None
    ids = np.array(list(db.scalars(select(Paper.id).order_by(Paper.id))), dtype=np.int64)
    if len(ids) < 10:
        return 0
    chosen = ids[np.linspace(0, len(ids) - 1, min(FITTED, len(ids))).astype(int)]
    vectoriser = TfidfVectorizer(
        analyzer=_terms, sublinear_tf=True, min_df=2, max_df=0.5 if len(ids) > 100 else 1.0, max_features=VOCABULARY,
        dtype=np.float32,
    )  # fmt: skip
    try:
        counts = vectoriser.fit_transform(text for _, text in _texts(db, chosen.tolist()))
    except ValueError:  # no word is in two papers
        return 0
    decomposition = TruncatedSVD(min(DIMENSIONS, counts.shape[1] - 1, max(2, len(chosen) // 4)), random_state=0)
    decomposition.fit(counts)
    made = Embeddings(
        ids, np.zeros(0), np.array(vectoriser.get_feature_names_out(), dtype=str), vectoriser.idf_.astype(np.float32),
        np.ascontiguousarray(decomposition.components_.T, dtype=np.float32),
    )  # fmt: skip
    made.vectors = np.concatenate(
        [made.embed([text for _, text in _texts(db, ids[i : i + 1000].tolist())]) for i in range(0, len(ids), 1000)]
    )
    _save(made, _path(db))
    return len(ids)


def _texts(db: Session, ids: list[int]) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for start in range(0, len(ids), 1000):
        query = select(Paper.id, Paper.title, Paper.summary, Paper.abstract).where(Paper.id.in_(ids[start : start + 1000]))
        for number, title, summary, abstract in db.execute(query.order_by(Paper.id)):
            found.append((number, f"{title} . {title} . {abstract or summary}"))
    return found


def _terms(text: str) -> list[str]:
    """Words and neighbouring pairs, without the ends that English adds."""
    words = [_END.sub("", word) if len(word) > 4 else word for word in _WORD.findall(text.lower())]
    return words + [f"{a} {b}" for a, b in pairwise(words)]


_WORD = re.compile(r"[^\W\d_]{2,}")
_END = re.compile(r"(?:ies|es|s|ing|ed|ation|ations)$")


def _path(db: Session) -> Path:
    address = db.get_bind().engine.url.render_as_string()
    return home() / "embeddings" / f"{blake2b(address.encode(), digest_size=8).hexdigest()}.npz"


def _load(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in ("ids", "vectors", "words", "weights", "directions")}
    found["vectors"] = found["vectors"].astype(np.float32)
    return Embeddings(**found)


def _save(made: Embeddings, path: Path) -> None:
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            part, ids=made.ids, vectors=made.vectors.astype(np.float16), words=made.words, weights=made.weights,
            directions=made.directions,
        )  # fmt: skip
        part.replace(path)  # whole or not at all
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
