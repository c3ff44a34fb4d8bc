"""Papers that were made up, for tests, pictures and loads."""

from __future__ import annotations

import random
from collections import Counter
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from broadsheet.web.tables import Author, Paper, Tag

_FIRST = """
Ada Chen Dmitri Elif Fatima Goran Hana Ines Jonas Kofi Lena Mateo Nadia Omar Priya Quentin Rosa Sven Tomoko
Uma Wei Yara
""".split()
_LAST = """
Abiola Bergström Castillo Dubois Eriksson Fischer Gupta Haddad Ivanova Jansen Kim Lindqvist Moreau Nakamura
Okafor Petrov Rossi Silva Tanaka Vogel Wang Zhou
""".split()
_WHAT = """
KV-Cache Attention Quantisation Pruning Decoding Routing Distillation Prefill Instruction Reasoning Retrieval
Sparsity
""".split()
_HOW = """
Adaptive Low-Rank Entropy-Guided Token-Wise Layer-Wise Hierarchical Calibrated Streaming Asynchronous Modular
Verified Cheap
""".split()
_END = (
    "for Long Contexts",
    "of Small Language Models",
    "under Tight Memory",
    "without Retraining",
    "at Four Bits",
    "in Multi-Turn Dialogue",
    "on Commodity Hardware",
    "for Code Generation",
    "with Guarantees",
    "beyond Benchmarks",
)
_SENTENCES = (
    "Serving long contexts is limited by the memory that keys and values take.",
    "We show that most of this memory holds what no later token looks at.",
    "The method needs no training and two hyperparameters.",
    "On six models from 1B to 70B it keeps 98 % of the accuracy at a quarter of the bytes.",
    "Ablations show that each part helps, and where none does.",
    "We release code and the measurements behind every number.",
    "Instruction data that are easy teach a model little; those that are too hard teach it less.",
    "A bandit chooses what to look at next, at the price of one forward pass.",
    "Results on held-out tasks suggest that the gain comes from the selection and not from its size.",
)
_TAGS = ("cs.CL", "cs.LG", "cs.AI", "cs.DC", "cs.AR", "stat.ML")


_PLAIN = {
    **{"doi": None, "slug": None, "arxiv_id": None, "family": None, "trend": None},
    **{"code_url": "", "source": "", "running": False, "version": 1, "votes": 0},
}


def papers(count: int, seed: int = 0, last: date = date(2026, 11, 29), a_day: int = 40) -> list[dict[str, Any]]:
    """Rows of made papers with ``authors`` and ``tags``, newest last; the same for the same seed."""
    roll = random.Random(seed)
    rows, of_month = [], Counter[str]()
    for number in range(count):
        day = last - timedelta(days=(count - 1 - number) // a_day)
        of_month[f"{day:%y%m}"] += 1
        arxiv = f"{day:%y%m}.{50_000 + of_month[f'{day:%y%m}']}"  # arXiv itself does not come so far in a month
        title = f"{roll.choice(_HOW)} {roll.choice(_WHAT)} {roll.choice(_END)}"
        abstract = " ".join(roll.sample(_SENTENCES, 5))
        made = datetime(day.year, day.month, day.day, roll.randrange(24), roll.randrange(60))
        votes = int(roll.paretovariate(1.1)) - 1 if roll.random() < 0.3 else 0
        rows.append(
            {
                "arxiv_id": arxiv, "title": title, "title_key": title.lower().replace(" ", "")[:200],
                "abstract": abstract, "summary": abstract.partition(". ")[0] + ". " + abstract.split(". ")[1] + ".",
                "url": f"https://arxiv.org/abs/{arxiv}", "day": day, "published": made, "updated": made,
                "code_url": f"https://github.com/made/{number}" if roll.random() < 0.2 else "", "votes": min(votes, 400),
                "trend": float(number % 97) / 9 if votes else None, "source": "made",
                "authors": [f"{roll.choice(_FIRST)} {roll.choice(_LAST)}" for _ in range(roll.randint(1, 7))],
                "tags": sorted(["made-up", *roll.sample(_TAGS, roll.randint(1, 2))]),
            }
        )  # fmt: skip
    return rows


def store(db: Session, rows: list[dict[str, Any]]) -> None:
    """Writes rows of `papers`."""
    start = (db.scalar(select(Paper.id).order_by(Paper.id.desc()).limit(1)) or 0) + 1
    known_columns, bare = set(Paper.__table__.columns.keys()), []
    for number, row in enumerate(rows):
        names = " ".join([*row["authors"], *row["tags"]])
        full = {**_PLAIN, "id": start + number, "names": names, **row}
        bare.append({name: value for name, value in full.items() if name in known_columns})
    if not bare:
        return
    db.execute(insert(Paper), bare)
    authors = [
        {"paper_id": start + n, "place": i, "name": name, "key": name.lower()}
        for n, row in enumerate(rows)
        for i, name in enumerate(row["authors"])
    ]
    tags = [{"paper_id": start + n, "name": tag} for n, row in enumerate(rows) for tag in row["tags"]]
    for table, found in ((Author, authors), (Tag, tags)):
        if found:
            db.execute(insert(table), found)
