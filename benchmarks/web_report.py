"""Writes docs/page.md, what was measured of the web page, from the records of `web_load`, `web_search` and `web_faults`.

python benchmarks/web_report.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from broadsheet.core.records import Record, read_json

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "page.md"
OURS, PEER = "broadsheet", "arxiv-sanity-lite"

LOAD = """# The page, measured

Everything below is written by scripts under `benchmarks/` and put down here by `benchmarks/web_report.py`.

## Pages a second
{papers:,} made papers in SQLite; wrk on the loopback of a machine with two cores. One server process of Broadsheet, two
gunicorn workers of [arxiv-sanity-lite](https://github.com/karpathy/arxiv-sanity-lite); they take turns, {rounds} rounds of
{seconds} s each, medians. Every paper and every question is asked for once, so that no answer but the front page's is a copy
of an earlier one (`benchmarks/web_load.py`).

"""
SEARCH = """
## Search
{papers:,} made papers in SQLite, milliseconds of CPU of a search, without the page around it (`benchmarks/web_search.py`).
Reading the papers took {ingestion:.0f} s of CPU, the database has {size:.0f} MB.

"""
FAULTS = """
## Faults
Each of them {times} times (`benchmarks/web_faults.py`).
"""
#: A part of `web_faults`, and what is done there.
PARTS = {
    "worker": "The worker of runs is killed at random moments",
    "server": "The server is killed while visitors vote, start runs and watch one",
    "sender": "The digest's sender is killed while mail goes out",
    "locked": "Somebody else holds the database's lock: for two seconds, and until all have given up. Pages are those of "
    "the catalogue, each read for the first time, beside two commands that start on the same two cores",
    "full": "The database's disk is full (a tmpfs of 6 MB)",
    "smtp": "No mail server answers, then one refuses, then all is well",
    "feed": "The second of a feed's two pages does not come, in five ways",
}


def records(name: str) -> list[Record]:
    return list(read_json(HERE / "results" / f"{name}.records.json"))


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def load() -> str:
    found = records("web_load")
    setting = found[0].setting

    def median(side: str, page: str, metric: str) -> float:
        return statistics.median(
            r.value for r in found if (r.method, r.metric, r.setting["page"]) == (side, metric, page)
        )  # fmt: skip

    rows = []
    for page in dict.fromkeys(r.setting["page"] for r in found):
        pace, slow = ([median(side, page, metric) for side in (OURS, PEER)] for metric in ("requests_per_second", "p99"))
        rows.append([page, *(f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in (*pace, *slow)), f"{pace[0] / pace[1]:,.1f}"])
    heads = ("page", "Broadsheet, 1/s", f"{PEER}, 1/s", "Broadsheet, p99 ms", f"{PEER}, p99 ms", "times the pages")
    rounds = len({r.seed for r in found})
    return LOAD.format(papers=setting["papers"], rounds=rounds, seconds=setting["seconds"]) + table(heads, rows)


def search() -> str:
    found = records("web_search")
    whole = {r.metric: r for r in found if "query" not in r.setting}
    times = {(r.setting["query"], r.metric): r.value for r in found if "query" in r.setting}
    kinds = dict.fromkeys(kind for kind, _ in times)
    rows = [(kind, f"{times[kind, 'p50, CPU']:.1f}", f"{times[kind, 'p99, CPU']:.1f}") for kind in kinds]
    head = SEARCH.format(
        papers=whole["database"].n, ingestion=whole["ingestion, CPU"].value, size=whole["database"].value
    )  # fmt: skip
    return head + table(("query", "median", "p99"), rows)


def faults() -> str:
    found = records("web_faults")
    text = FAULTS.format(times=found[0].n)
    for part, what in PARTS.items():
        rows = [(r.metric, f"{r.value:g}") for r in found if r.method == part and r.setting["database"] == "sqlite"]
        text += f"\n{what}:\n\n{table((part, 'count'), rows)}" if rows else ""
    return text


if __name__ == "__main__":
    OUT.write_text(load() + search() + faults(), encoding="utf-8")
    print(f"wrote {OUT}")
