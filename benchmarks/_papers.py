"""Made papers in any number, as lines of arXiv's metadata snapshot (its Kaggle data set); the same for the same seed.

Words follow Zipf's law as Mandelbrot wrote it (probability ∝ 1/(rank + 2.7)^1.1), over 120,000 words: English function words
first, then words of the field, then made ones. Lengths are those of cs.CL and cs.LG: titles of 9 ± 3 words, abstracts
log-normal around 165 words, 4.5 authors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np

VOCABULARY = 120_000
FUNCTION = (
    "the of and to a in we for that is on with this as by are from our can be which an models model these it at learning "
    "language or not data show have such using propose based more also their results has method methods performance"
).split()
FIELD = (
    "training task tasks large approach different paper however new neural two both between training network networks work "
    "information through text study novel while framework problem existing across representation representations accuracy "
    "attention experiments each image analysis code benchmark evaluation reasoning efficient algorithm transformer domain "
    "generation deep knowledge graph state learn features context human questions prompt instruction memory dataset "
    "inference cache tokens quantisation latency compression sparse pruning decoding speculative retrieval alignment "
    "preference reward "
    "distillation embedding multilingual robust calibration long-context kernel throughput accelerator roofline translation"
).split()
CATEGORIES = (
    ("cs.CL", 0.34),
    ("cs.LG", 0.30),
    ("cs.AI", 0.2),
    ("cs.CV", 0.12),
    ("stat.ML", 0.1),
    ("cs.AR", 0.03),
    ("cs.RO", 0.05),
)
_SYLLABLES = [c + v + e for c in "b d f g k l m n p r s t v z".split() for v in "a e i o u".split() for e in ("", "n", "r")]
_ENDS = ("", "", "", "", "", "", "ing", "ed", "tion", "ity", "er", "s")


@cache
def words(seed: int = 0) -> list[str]:
    """The vocabulary, commonest first."""
    roll = np.random.default_rng(seed)
    made: dict[str, None] = dict.fromkeys(FUNCTION + FIELD)
    while len(made) < VOCABULARY:
        parts = roll.integers(0, len(_SYLLABLES), (20_000, 3))
        counts, ends = roll.integers(2, 4, 20_000), roll.integers(0, len(_ENDS), 20_000)
        for row, count, end in zip(parts, counts, ends, strict=True):
            made["".join(_SYLLABLES[i] for i in row[:count]) + _ENDS[end]] = None
    return list(made)[:VOCABULARY]


def lines(count: int, seed: int = 0, first: datetime = datetime(2016, 1, 1), a_day: int = 28) -> Iterator[str]:
    """Lines of JSON, oldest first."""
    roll = np.random.default_rng(seed)
    vocabulary = np.array(words(), dtype=object)
    chance = 1 / (np.arange(1, VOCABULARY + 1) + 2.7) ** 1.1
    steps = np.cumsum(chance / chance.sum())
    names = vocabulary[2_000:9_000]
    months: dict[str, int] = {}
    for start in range(0, count, 1000):
        for number in range(start, min(count, start + 1000)):
            day = first + timedelta(days=number // a_day, seconds=int(roll.integers(86_400)))
            month = f"{day:%y%m}"
            months[month] = months.get(month, 0) + 1
            title = _sentence(vocabulary, steps, roll, int(np.clip(roll.normal(9, 3), 3, 25)))
            abstract = _text(vocabulary, steps, roll, int(np.clip(roll.lognormal(5.1, 0.3), 40, 330)))
            authors = [_name(names, roll) for _ in range(1 + roll.poisson(3.5))]
            hits = roll.random(len(CATEGORIES))
            tags = [name for (name, part), hit in zip(CATEGORIES, hits, strict=True) if hit < part] or ["cs.LG"]
            versions = [day + timedelta(days=40 * i) for i in range(1 + int(roll.random() < 0.3))]
            code = f"  Code at https://github.com/made/{number}." if roll.random() < 0.2 else ""
            yield json.dumps(
                {
                    "id": f"{month}.{months[month]:05d}", "submitter": authors[0], "authors": ", ".join(authors),
                    "title": title, "comments": "12 pages", "journal-ref": None,
                    "doi": f"10.1000/made.{number}" if roll.random() < 0.1 else None,
                    "report-no": None, "categories": " ".join(tags), "license": None, "abstract": f"  {abstract}{code}\n",
                    "versions": [
                        {"version": f"v{i + 1}", "created": f"{at:%a, %d %b %Y %H:%M:%S} GMT"}
                        for i, at in enumerate(versions)
                    ],
                    "update_date": f"{versions[-1]:%Y-%m-%d}",
                    "authors_parsed": [[name.split()[1], name.split()[0], ""] for name in authors],
                }
            )  # fmt: skip


def write(path: Path, count: int, seed: int = 0) -> None:
    """Writes the file, whole or not at all."""
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines(count, seed))
    part.rename(path)


def _sentence(vocabulary: np.ndarray, steps: np.ndarray, roll: np.random.Generator, count: int) -> str:
    chosen = vocabulary[np.minimum(np.searchsorted(steps, roll.random(count)), VOCABULARY - 1)]
    return " ".join(chosen).capitalize()


def _text(vocabulary: np.ndarray, steps: np.ndarray, roll: np.random.Generator, count: int) -> str:
    chosen = vocabulary[np.minimum(np.searchsorted(steps, roll.random(count)), VOCABULARY - 1)].tolist()
    sentences, start = [], 0
    while start < count:
        end = start + int(roll.integers(12, 32))
        sentences.append(" ".join(chosen[start:end]).capitalize() + ".")
        start = end
    return " ".join(sentences)


def _name(names: np.ndarray, roll: np.random.Generator) -> str:
    first, last = names[roll.integers(0, 600)], names[600 + int(roll.pareto(0.9) * 40) % 6_000]
    return f"{first.capitalize()} {last.capitalize()}"
