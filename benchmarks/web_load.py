"""How many pages a second, and how long the slowest visitor waits: this page and arxiv-sanity-lite on the same papers.

python benchmarks/web_load.py --peer DIR [--peer-python PYTHON] [--folder out/web_load]

``DIR`` is a checkout of github.com/karpathy/arxiv-sanity-lite, ``PYTHON`` one that has what it needs and gunicorn (its own
way to run it is Flask's development server, with one process; two gunicorn workers are kinder to it). Both get the same made
papers and the same questions, in the same order, by wrk on the loopback; they take turns. Every paper and every question is
asked for once: nothing but the front page can be handed out from a copy, and "front page made anew" is not either.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

import _papers

from broadsheet.core.records import Record, now, provenance, write_results

HERE = Path(__file__).parent

#: A page -> how many connections ask at once.
PAGES = {"front page": 8, "front page made anew": 8, "paper": 8, "search": 4}
#: Metrics of wrk and their units.
METRICS = {"requests_per_second": "1/s", "p50": "ms", "p99": "ms", "failed": "requests"}

_LUA = """
local paths, at = {}, 0
for line in io.lines(os.getenv("PATHS")) do paths[#paths + 1] = line end
wrk.headers["Cookie"] = os.getenv("COOKIE")
wrk.headers["Accept-Encoding"] = "gzip"
function request()
  at = at % #paths + 1
  return wrk.format("GET", paths[at])
end
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('\\n{"requests": %d, "us": %d, "p50": %f, "p99": %f, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), failed))
end
"""

_FILL = """
import json, sys
from aslite.db import get_papers_db, get_metas_db
for opened, part in ((get_papers_db, lambda paper: paper), (get_metas_db, lambda paper: {"_time": paper["_time"]})):
    table = opened(flag="c", autocommit=False)
    for line in open(sys.argv[1]):
        paper = json.loads(line)
        table[paper["_id"]] = part(paper)
    table.commit()
    table.close()
"""


def for_the_peer(row: dict) -> dict:
    """A line of arXiv's snapshot as arxiv-sanity-lite keeps a paper."""
    at = parsedate_to_datetime(row["versions"][-1]["created"])
    return {
        "_id": row["id"], "_idv": row["id"] + row["versions"][-1]["version"], "_version": len(row["versions"]),
        "_time": at.timestamp(), "_time_str": at.strftime("%b %d %Y"), "title": row["title"],
        "summary": row["abstract"].strip(),
        "authors": [{"name": name} for name in row["authors"].split(", ")],
        "tags": [{"term": tag} for tag in row["categories"].split()],
    }  # fmt: skip


def paths(rows: list[dict], page: str, ours: bool, round_: int) -> list[str]:
    """What is asked for; the same papers and questions on both sides, others in every round."""
    roll = random.Random(f"{page}/{round_}")
    if page.startswith("front"):
        return ["/"]
    if page == "paper":
        ids = [row["id"] for row in roll.sample(rows, min(len(rows), 20_000))]
        return [f"/papers/{one}" if ours else f"/inspect?pid={one}" for one in ids]
    found: dict[str, None] = {}
    while len(found) < 3_000:
        words = roll.choice(rows)["title"].lower().split()
        found["+".join(roll.sample(words, min(len(words), roll.choice((1, 2, 2, 3)))))] = None
    return [f"/search?q={words}" if ours else f"/?q={words}&rank=search" for words in found]


@contextmanager
def ours(folder: Path, papers: Path, extra: str):
    """This page with the papers of a file; its address."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [extra, *sys.path]))}
    command = [sys.executable, str(HERE / "_web_page.py"), str(folder), "--file", str(papers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise SystemExit("the page did not open")
            yield address
        finally:
            process.terminate()


@contextmanager
def theirs(checkout: Path, python: str, rows: list[dict]):
    """arxiv-sanity-lite with the same papers; its address."""
    data = checkout / "data"
    if not (data / "features.p").exists():
        lines = data / "made.jsonl"
        lines.write_text("".join(json.dumps(for_the_peer(row)) + "\n" for row in rows))
        subprocess.run([python, "-c", _FILL, str(lines)], cwd=checkout, check=True)
        subprocess.run([python, "compute.py"], cwd=checkout, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{port}", "--timeout", "300", "serve:app"]
    with subprocess.Popen(command, cwd=checkout, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"{address}/about", timeout=60).read()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def load(address: str, asked: list[str], connections: int, seconds: int, folder: Path, cookie: str) -> dict:
    """One run of wrk."""
    lua, listed = folder / "ask.lua", folder / "paths"
    lua.write_text(_LUA)
    listed.write_text("\n".join(asked) + "\n")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "120s", "-s", str(lua), address]
    environment = {**os.environ, "PATHS": str(listed), "COOKIE": cookie}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "requests_per_second": found["requests"] / found["us"] * 1e6,
        "p50": found["p50"] / 1e3,
        "p99": found["p99"] / 1e3,
        "requests": found["requests"],
        "failed": found["failed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of arxiv-sanity-lite")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--folder", type=Path, default=Path("out/web_load"))
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pages", default=",".join(PAGES))
    parser.add_argument("--extra", default="", help="a folder of more packages for this page's server (uvloop, httptools)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "web_load.records.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    papers = given.folder / f"papers-{given.papers}.jsonl"
    if not papers.exists():
        _papers.write(papers, given.papers)
    with open(papers, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found: dict[tuple[str, str], list[dict]] = {}
    with ExitStack() as stack:
        sides = {
            "broadsheet": stack.enter_context(ours(given.folder, papers, given.extra)),
            "arxiv-sanity-lite": stack.enter_context(theirs(given.peer.resolve(), given.peer_python, rows)),
        }
        for round_ in range(given.rounds):
            for page in given.pages.split(","):
                for side, address in sides.items():
                    cookie = "broadsheet_session=nobody" if page.endswith("made anew") else "a=b"
                    asked = paths(rows, page, side == "broadsheet", round_)
                    one = load(address, asked, PAGES[page], given.seconds, given.folder, cookie)
                    found.setdefault((page, side), []).append(one)
                    told = "  ".join(f"{name} {value:,.1f}" for name, value in one.items())
                    print(f"{round_} {page:<24} {side:<18} {told}", flush=True)
    records: list[Record] = []
    shared = {"bench": "web-load", "device": "cpu", "time": now(), **provenance()}
    for (page, side), runs in found.items():
        setting = {"page": page, "papers": given.papers, "connections": PAGES[page], "seconds": given.seconds}
        for round_, run in enumerate(runs):
            for metric, unit in METRICS.items():
                records.append(
                    Record(
                        paper="",
                        method=side,
                        metric=metric,
                        value=run[metric],
                        unit=unit,
                        n=run["requests"],
                        seed=round_,
                        setting=setting,
                        **shared,
                    )
                )
    for page in dict.fromkeys(page for page, _ in found):
        pace = [statistics.median(run["requests_per_second"] for run in found[page, side]) for side in sides]
        print(f"{page}: {pace[0] / pace[1]:,.0f} times the requests a second")
    write_results(records, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
