"""Ingestion and search at 100,000 made papers; writes results/web_search.records.json.

The papers (`_papers`) go the way a user's do: as a file in arXiv's snapshot format, through `ingest.read`, into SQLite. Then
kinds of queries, each with words of their own, one after the other on one connection. Both the wall time and the thread's
CPU time of every query are recorded: on a machine that does something else besides, the wall time says more about it.

python benchmarks/web_search.py --papers 100000 --repeats 5
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import _papers
import numpy as np
from sqlalchemy import select

from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.web import ingest, library, search
from broadsheet.web.db import open_database, reading, session
from broadsheet.web.tables import Paper

OUT = Path(__file__).parent / "results" / "web_search.records.json"
COMMON = ["model", "learning", "data", "language", "training", "attention", "task", "network"]
RARE = _papers.words()[20_000:20_008]
PAIRS = ["language model", "training data", "attention network", "neural approach", "graph reasoning", "sparse kernel"]
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "one rare word": (RARE, {}),
    "one common word": (COMMON, {}),
    "two words": (PAIRS, {}),
    "four common words": (["learning language models performance", "training data tasks attention"], {}),
    "three rarer words": (["sparse attention kernel", "cache tokens latency", "pruning reward memory"], {}),
    "a phrase": ([f'"{pair}"' for pair in PAIRS], {}),
    "an unfinished word": (["atten", "quanti", "prun", "lear", "transf"], {}),
    "no paper has it": (["zzyzx", "qqqq"], {}),
    "a common word, tag": (COMMON, {"tag": "cs.CL"}),
    "a common word, rare tag": (COMMON, {"tag": "cs.AR"}),
    "a common word, code": (COMMON, {"has_code": True}),
    "a common word, since": (COMMON, {"since": date(2024, 1, 1)}),
    "a common word, day": (COMMON, {"day": date(2017, 1, 5)}),
    "a common word, family that runs": (COMMON, {"family": "caches", "running": True}),
    "two words, tag, code, since": (PAIRS, {"tag": "cs.CL", "has_code": True, "since": date(2018, 1, 1)}),
    "no words, tag": ([""], {"tag": "cs.CL"}),
    "no words, code": ([""], {"has_code": True}),
    "a common word, page 30": (COMMON, {"offset": 870}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), given.papers, given.repeats, given.out)


def measure(folder: Path, count: int, repeats: int, out: Path) -> None:
    """Writes the papers, reads them, asks."""
    file = folder / "snapshot.jsonl"
    _papers.write(file, count)
    engine = open_database(f"sqlite:///{folder / 'web.sqlite'}")
    with session(engine) as db:
        library.seed(db)
    wall, cpu = time.perf_counter(), time.process_time()
    added = ingest.read(engine, ingest.named(str(file)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert added.new == count, added
    records = [
        _record("ingestion, CPU", cpu, "s", count, {}),
        _record("ingestion, wall", wall, "s", count, {}),
        _record("database", (folder / "web.sqlite").stat().st_size / 1e6, "MB", count, {}),
    ]
    print(f"ingestion {cpu:.1f} s of CPU, {wall:.1f} s", flush=True)
    with reading(engine) as db:
        asks = {
            kind: [lambda q=query, f=filters: search.search(db, q, **f) for query in queries]
            for kind, (queries, filters) in KINDS.items()
        }
        some = db.scalars(select(Paper).where(Paper.id % (count // 20) == 7)).all()
        asks["related papers"] = [lambda p=paper: search.related(db, p) for paper in some]
        for kind, calls in asks.items():
            times: list[tuple[float, float]] = []
            for repeat in range(repeats + 1):
                for call in calls:
                    wall, cpu = time.perf_counter(), time.thread_time()
                    call()
                    if repeat:  # the first one fills the caches
                        times.append((1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - cpu)))
            for clock, values in zip(("wall", "CPU"), zip(*times, strict=True), strict=True):
                for part in (50, 99):
                    value = float(np.percentile(values, part))
                    records.append(_record(f"p{part}, {clock}", value, "ms", len(values), {"query": kind}))
            print(f"{kind:<32} p50 {records[-2].value:6.1f} p99 {records[-1].value:6.1f} ms of CPU", flush=True)
    write_results(records, out)


def _record(metric: str, value: float, unit: str, n: int, setting: dict[str, Any]) -> Record:
    found = provenance()
    return Record(
        paper="", method="search", bench="web_search", metric=metric, value=round(value, 3), unit=unit, n=n, setting=setting,
        versions=found["versions"], revision=found["revision"], time=now(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
