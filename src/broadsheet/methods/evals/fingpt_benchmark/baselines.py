"""Rivals that need no language model, and that every table shows: the majority, TF-IDF with logistic regression, a
gazetteer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .rows import Row
from .scoring import read_entities

_ARTICLE = {"person": "a person", "organization": "an organization", "location": "a location"}
_NAMES = {"PER": "person", "ORG": "organization", "LOC": "location"}


def majority(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """The most frequent answer, for headlines of the same question."""
    by_kind: dict[str, Counter] = {}
    for row in train:
        by_kind.setdefault(row.kind if row.family == "headline" else "", Counter())[row.output] += 1
    all_of = sum(by_kind.values(), Counter())
    if not all_of:
        raise ValueError("the majority of no training rows is not defined")
    best = {kind: count.most_common(1)[0][0] for kind, count in by_kind.items()}
    return [best.get(row.kind if row.family == "headline" else "", all_of.most_common(1)[0][0]) for row in test]


def _classifier(seed: int) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise ValueError("the TF-IDF baseline needs scikit-learn: pip install scikit-learn") from None
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1, lowercase=True)
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced", random_state=seed))


def _fitted(rows: Sequence[Row], seed: int) -> Any:
    classifier = _classifier(seed)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # so small a problem is slower on many threads
        return classifier.fit([row.input for row in rows], [row.output for row in rows])


def tfidf(train: Sequence[Row], test: Sequence[Row], seed: int = 0) -> list[str]:
    """TF-IDF of words and pairs of words, logistic regression; for headlines a classifier for every question."""
    kinds = sorted({row.kind for row in train if row.family == "headline"}) or [""]
    answers = [""] * len(test)
    for kind in kinds:
        here = [row for row in train if kind in ("", row.kind)]
        places = [i for i, row in enumerate(test) if kind in ("", row.kind)]
        if not here or not places:
            continue
        outputs = [row.output for row in here]
        if len(set(outputs)) == 1:
            said = [outputs[0]] * len(places)
        else:
            said = _fitted(here, seed).predict([test[i].input for i in places])
        for place, answer in zip(places, said, strict=True):
            answers[place] = str(answer)
    return answers


def cross_validated(rows: Sequence[Row], folds: int = 5, seed: int = 0) -> list[str]:
    """TF-IDF's answer to every row, from a fit to the other folds (stratified). Raises ValueError for too few rows."""
    golds = [row.output for row in rows]
    if not rows or min(Counter(golds).values()) < folds:
        raise ValueError(f"{folds} folds need at least {folds} rows of every class")
    fold = np.empty(len(rows), dtype=int)
    draw = np.random.default_rng(seed)
    for label in sorted(set(golds)):
        places = np.flatnonzero([gold == label for gold in golds])
        fold[draw.permutation(places)] = np.arange(len(places)) % folds
    answers = [""] * len(rows)
    for number in range(folds):
        test = np.flatnonzero(fold == number)
        train = [row for row, other in zip(rows, fold, strict=True) if other != number]
        held_out = [row for row, own in zip(rows, fold, strict=True) if own == number]
        for place, answer in zip(test, tfidf(train, held_out, seed), strict=True):
            answers[place] = answer
    return answers


class Gazetteer:
    """Tags what it has seen, and guesses the type of other capitalised runs from their words."""

    def fit(self, train: Sequence[Row]) -> Gazetteer:
        self.known: dict[str, Counter] = {}
        self.words: dict[str, Counter] = {}
        lower: set[str] = set()
        for row in train:
            inside = set()
            for text, kind in read_entities(row.output) or ():
                self.known.setdefault(text.lower(), Counter())[_NAMES[kind]] += 1
                inside |= set(text.split())
                for word in text.lower().split():
                    self.words.setdefault(word, Counter())[_NAMES[kind]] += 1
            lower |= {word.lower() for word in row.input.split() if word not in inside}
        self.common = lower - set(self.words)  # words that are no part of an entity, capitals or not
        return self

    def predict(self, rows: Sequence[Row]) -> list[str]:
        return [self._answer(row.input.split()) for row in rows]

    def _answer(self, tokens: Sequence[str]) -> str:
        found, run = [], []
        for token in [*tokens, "."]:
            if re.match(r"[A-Z]", token) and token.lower() not in self.common:
                run.append(token)
            elif run:
                text = " ".join(run)
                kinds = self.known.get(text.lower()) or sum((self.words.get(w.lower(), Counter()) for w in run), Counter())
                if kinds:
                    found.append(f"{text} is {_ARTICLE[kinds.most_common(1)[0][0]]}")
                run = []
        return ", ".join(found) + "." if found else ""
