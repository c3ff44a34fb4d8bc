"""Readers of the public files, from paths that the user gives. Each raises one-line ValueErrors.

Two readers have known mistakes in the official preparation, which ``official=True`` repeats for comparison: "price or not"
is copied from the *constant price* column; and an entity that reaches the end of its sentence loses its last token (with
only one, it is lost, and an answer "." may be left), as the last sentence of a file is lost that does not end in a blank
line.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .rows import ENTITY_TYPES, LABELS, SEVEN, Row, headline, ner, sentiment

Entities = list[tuple[str, str]]
TFNS_LABELS = ("negative", "positive", "neutral")
NONCOMMERCIAL = (
    "the Financial PhraseBank is licensed CC BY-NC-SA 3.0, for non-commercial use: say accept_noncommercial=True if yours is"
)


def _text(path: str | Path, encoding: str = "utf-8") -> str:
    try:
        return Path(path).read_text(encoding=encoding)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not {encoding} text") from None


def random_split(count: int, test_share: float, seed: int) -> tuple[list[int], list[int]]:
    """(train, test) row numbers as ``datasets.Dataset.train_test_split(test_share, seed=seed)`` gives them."""
    order = np.random.default_rng(seed).permutation(count)
    test = math.ceil(test_share * count)
    train = math.floor((1 - test_share) * count)
    return order[test : test + train].tolist(), order[:test].tolist()


def read_fpb(path: str | Path, accept_noncommercial: bool = False) -> list[Row]:
    """``Sentences_*Agree.txt``: ISO-8859-1, "sentence@label" a line. Evaluation only, see `NONCOMMERCIAL`."""
    if not accept_noncommercial:
        raise ValueError(NONCOMMERCIAL)
    rows = []
    for number, line in enumerate(_text(path, "iso-8859-1").splitlines(), 1):
        text, at, label = line.rpartition("@")
        if line.strip():
            if not at or label.strip() not in LABELS:
                raise ValueError(f"{path}, line {number}: not of the form sentence@label")
            rows.append(sentiment(text, label.strip(), "fpb"))
    return rows


def _csv(path: str | Path, wanted: Sequence[str]) -> Iterator[dict[str, str]]:
    reader = csv.DictReader(_text(path, "utf-8-sig").splitlines(keepends=True))
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}")
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def read_tfns(path: str | Path) -> list[Row]:
    """``sent_*.csv`` with text and label (0 negative, 1 positive, 2 neutral)."""
    rows = []
    for row in _csv(path, ("text", "label")):
        if row["label"] not in ("0", "1", "2"):
            raise ValueError(f"{path}: a label is 0, 1 or 2, got '{row['label']}'")
        rows.append(sentiment(row["text"], TFNS_LABELS[int(row["label"])], "tfns", "tweet"))
    return rows


def _objects(path: str | Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"{path}, line {number}: not a JSON object") from None
        if not isinstance(row, dict) or any(name not in row for name in wanted):
            raise ValueError(f"{path}, line {number}: an object with {', '.join(wanted)} is expected")
        yield row


def score_label(score: float) -> str:
    """FiQA's scores as classes: below -0.1 negative, below 0.1 neutral, else positive."""
    return "negative" if score < -0.1 else "neutral" if score < 0.1 else "positive"


def read_fiqa(path: str | Path) -> list[Row]:
    """JSON lines with sentence, sentiment_score, format ("post" or "headline"): train, validation and test of FiQA, in
    order."""
    return [
        sentiment(
            row["sentence"],
            score_label(float(row["sentiment_score"])),
            "fiqa",
            "tweet" if row["format"] == "post" else "news",
        )
        for row in _objects(path, ("sentence", "sentiment_score", "format"))
    ]


def read_nwgi(path: str | Path) -> list[Row]:
    """JSON lines with news and label (seven classes)."""
    rows = []
    for row in _objects(path, ("news", "label")):
        if row["label"] not in SEVEN:
            raise ValueError(f"{path}: a label is one of {', '.join(SEVEN)}, got '{row['label']}'")
        classes = [f"{degree} negative" for degree in ("strong", "moderately", "mildly")]
        classes += ["neutral", *(f"{degree} positive" for degree in ("mildly", "moderately", "strong"))]
        rows.append(sentiment(row["news"], row["label"], "nwgi", classes=classes))
    return rows


_HEADLINE_COLUMNS = (
    "Price or Not",
    "Price Direction Up",
    "Price Direction Constant",
    "Price Direction Down",
    "PastPrice",
    "FuturePrice",
    "PastNews",
    "FutureNews",
    "Asset Comparision",
)


def read_headline(path: str | Path, official: bool = False) -> list[list[Row]]:
    """``gold-dataset-sinha-khandait.csv``: nine rows for every headline."""
    columns = list(_HEADLINE_COLUMNS)
    if official:
        columns[0] = "Price Direction Constant"
    try:
        return [
            headline(row["News"], [float(row[name] or 0) != 0 for name in columns], "headline")
            for row in _csv(path, ("News", *columns))
        ]
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: labels are 0 and 1 ({error})") from None


def headline_split(headlines: Sequence[list[Row]]) -> tuple[list[Row], list[Row]]:
    """The first four fifths are for training: 9,129 of the 11,412."""
    cut = max(math.ceil(0.8 * len(headlines)) - 1, 0)
    return [row for nine in headlines[:cut] for row in nine], [row for nine in headlines[cut:] for row in nine]


def read_conll(path: str | Path, official: bool = False) -> list[tuple[Row, Entities]]:
    """A CoNLL file (token first, tag last, blank lines between sentences): rows of the sentences that have an entity, with
    their entities. MISC is none."""
    found, sentence = [], []
    for line in [*_text(path).splitlines(), *([] if official else [""])]:
        fields = line.split()
        if fields:
            sentence.append((fields[0], fields[-1]))
        elif sentence:
            tagged, sentence = sentence, []
            if any(_typed(tag) for _, tag in tagged):
                entities = _entities_official(tagged) if official else _entities(tagged)
                found.append((ner([token for token, _ in tagged], entities, "sec"), entities))
    return found


def _typed(tag: str) -> str | None:
    return ENTITY_TYPES.get(tag.rpartition("-")[2])


def _entities(tagged: Sequence[tuple[str, str]]) -> Entities:
    """Runs of one type; a tag that begins with B starts a new entity."""
    found: list[tuple[list[str], str]] = []
    before: str | None = None
    for token, tag in tagged:
        kind = _typed(tag)
        if kind and kind == before and not tag.startswith("B"):
            found[-1][0].append(token)
        elif kind:
            found.append(([token], kind))
        before = kind
    return [(" ".join(tokens), kind) for tokens, kind in found]


def _entities_official(tagged: Sequence[tuple[str, str]]) -> Entities:
    found: Entities = []
    held: list[tuple[str, str]] = []
    for place, (token, tag) in enumerate(tagged):
        kind = _typed(tag)
        if held and (not kind or held[-1][1] != tag or place + 1 == len(tagged)):
            found.append((" ".join(t for t, _ in held), str(_typed(held[-1][1]))))
            held = [(token, tag)] if kind else []
        elif kind:
            held.append((token, tag))
    return found


def read_finred(sentences: str | Path, tuples: str | Path) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """``*.sent`` and ``*.tup``: (sentence, [(head, tail, relation)])."""
    texts, lines = _text(sentences).splitlines(), _text(tuples).splitlines()
    if len(texts) != len(lines):
        raise ValueError(
            f"{sentences} and {tuples} have {len(texts)} and {len(lines)} lines: they belong together line by line"
        )
    found = []
    for number, (text, line) in enumerate(zip(texts, lines, strict=True), 1):
        parts = [tuple(part.strip() for part in triple.split(" ; ")) for triple in line.split(" | ")]
        if any(len(triple) != 3 for triple in parts):
            raise ValueError(f"{tuples}, line {number}: triples are 'head ; tail ; relation', with ' | ' between them")
        found.append((text.strip(), parts))
    return found  # type: ignore[return-value]  # of length 3, as just seen
