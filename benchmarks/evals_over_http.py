"""Every benchmark and loop against a small real model behind HTTP: killed in its middle, resumed, opened in Inspect View.

    python benchmarks/evals_over_http.py [--model pocket-2m] [--limit 6] [--methods ifeval,decrim]

The model answers OpenAI's protocol in a process of its own (what ``broadsheet serve-model`` serves). For each method
``broadsheet run METHOD --chat URL --out FOLDER`` is started, killed with SIGKILL when a third of its answers are there (how
many there are is learned from a run that nobody kills), and run again. ``under_way``: answers that can be under way at once
(four calls); ``lost``: answers that the ledger does not have after the kill beyond those; ``paid_twice``: answers that the
server gave twice, which is no more than those; ``same``: whether the resumed run's answers are those of the run that nobody
killed; ``opened``: samples that Inspect View's server hands out for its log. Scores of so small a model are near zero and
stand here only to be seen.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from broadsheet.core.chat.local import LocalModel
from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.server import serving
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.methods.evals.base import Benchmark
from broadsheet.methods.evals.bench import methods

AT_ONCE = 4
#: LongProc's prompts are too long for a small model, unless they are about short procedures.
OPTIONS = {"longproc": ["-o", "tasks=path_traversal", "-o", "steps=6"]}
KINDS = {True: "benchmark", False: "loop"}


class Counted:
    """A backend that remembers which sample of which request it answered, and how many samples were asked for at once."""

    def __init__(self, backend: LocalModel, log: Any):
        self.backend, self.name, self.identity, self.log = backend, backend.name, backend.identity, log

    async def send(self, request: Request, samples: Sequence[int]) -> Any:
        choices = await self.backend.send(request, samples)
        for sample, _ in zip(samples, choices):  # before they are sent
            self.log.append((request.content, sample, len(samples)))
        return choices

    async def close(self) -> None:
        pass


def _serve(model: str, pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    log: list[tuple[str, int, int]] = []
    with serving(Counted(LocalModel(model, batch=1), log)) as url:
        pipe.send(url)
        while pipe.recv() != "stop":
            pipe.send(list(log))
            log.clear()


class Server:
    """The model in its process; `answered` is what it answered since it was asked last."""

    def __init__(self, model: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(model, theirs), daemon=True)
        self.process.start()
        self.url = self.pipe.recv()

    def answered(self) -> list[tuple[str, int, int]]:
        self.pipe.send("log")
        return self.pipe.recv()  # type: ignore[no-any-return]


def command(name: str, url: str, limit: int, out: Path) -> list[str]:
    options = ["-o", f"limit={limit}", "-o", f"concurrency={AT_ONCE}", *OPTIONS.get(name, [])]
    options += ["--out", str(out), "--json", str(out / "records.json")]
    return [sys.executable, "-c", "from broadsheet.cli import main; main()", "run", name, "--chat", url, *options]


def whole(name: str, server: Server, limit: int, folder: Path) -> tuple[Path, list[tuple[str, int, int]]]:
    """A run that nobody kills: where its files are, and what was answered."""
    out = folder / "whole"
    out.mkdir(parents=True)
    environment = {**os.environ, "BROADSHEET_HOME": str(folder / "home-whole")}
    done = subprocess.run(command(name, server.url, limit, out), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return out, server.answered()


def killed(name: str, server: Server, limit: int, folder: Path, after: int) -> tuple[Path, list[Any], int, int]:
    """A run killed when ``after`` answers are in its ledger, and then run to its end: where its files are, what was
    answered, how many calls the ledger had when it was killed, and how many the server had answered by then."""
    out, home = folder / "killed", folder / "home-killed"
    out.mkdir(parents=True)
    environment = {**os.environ, "BROADSHEET_HOME": str(home)}
    process = subprocess.Popen(
        command(name, server.url, limit, out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and _calls(home) < after:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = _calls(home)
    before = server.answered()
    done = subprocess.run(command(name, server.url, limit, out), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}, resumed: {done.stderr}")
    return out, before + server.answered(), kept, len(before)


def _calls(home: Path) -> int:
    try:
        with sqlite3.connect(f"file:{home / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
            return int(ledger.execute("select count(*) from calls").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def answers(folder: Path, name: str) -> list[tuple[str, str]]:
    """(sample, answer) of a transcript."""
    rows = (json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["id"], row["answer"]) for row in rows]


@contextmanager
def inspect_view(folder: Path) -> Iterator[str]:
    """Inspect View over the logs below ``folder``: its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    view = [sys.executable, "-m", "inspect_ai", "view", "start", "--log-dir", str(folder), "--port", str(port)]
    process = subprocess.Popen(view, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def opened(url: str) -> dict[str, int]:
    """Samples that Inspect View shows, by task."""
    listed = json.load(urllib.request.urlopen(f"{url}/api/logs"))["files"]
    found = {}
    for file in listed:
        log = json.load(urllib.request.urlopen(f"{url}/api/logs/{urllib.parse.quote(file['name'], safe='')}"))
        found[Path(file["name"]).stem] = len(log["samples"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-2m")
    parser.add_argument("--limit", type=int, default=6, help="samples, or prompts of a loop (default %(default)s)")
    parser.add_argument("--methods", default="", help="comma-separated; default all (only then are results written)")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "evals_over_http.records.json"))
    arguments = parser.parse_args()
    known = methods()
    names = [name for name in arguments.methods.split(",") if name] or list(known)
    server, records, logs = Server(arguments.model), list[Record](), dict[str, int]()
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            folder = Path(temporary) / name
            expected, first = whole(name, server, arguments.limit, folder)
            out, answered, kept, before = killed(name, server, arguments.limit, folder, max(1, len(first) // 3))
            counts = Counter(answer[:2] for answer in answered)
            under_way = AT_ONCE * max((together for *_, together in answered), default=1)
            same = answers(out, name) == answers(expected, name)
            rows = json.loads((out / "records.json").read_text())
            score = next(row for row in rows if row["metric"] == "score" and row["method"] == name and "ci" in row)
            logs[name] = len(answers(out, name))
            values = {
                "answers": len(counts),
                "kept": kept,
                "under_way": under_way,
                "lost": max(0, before - kept - under_way),
                "paid_twice": sum(counts.values()) - len(counts),
                "same": same,
                "score": score["value"],
                "samples": logs[name],
            }
            kind = KINDS[isinstance(known[name], Benchmark)]
            print(
                f"{name:<22} {kind:<9} " + "  ".join(f"{metric} {value:g}" for metric, value in values.items()), flush=True
            )
            for metric, value in values.items():
                records.append(
                    Record(
                        paper="", method=name, bench="evals-over-http", metric=metric, value=float(value),
                        model=arguments.model, parameters={"limit": arguments.limit, "concurrency": AT_ONCE},
                        setting={"kind": kind}, time=now(), **provenance(),
                    )
                )  # fmt: skip
        with inspect_view(Path(temporary)) as url:
            shown = opened(url)
    for name in names:
        print(f"{name:<22} {shown.get(name, 0)} of {logs[name]} samples opened in Inspect View")
        like = next(record for record in records if record.method == name)
        records.append(Record(**{**like.to_json(), "metric": "opened", "value": float(shown.get(name, 0))}))
    server.pipe.send("stop")
    server.process.join()
    if not arguments.methods:
        write_results(records, arguments.out)


if __name__ == "__main__":
    main()
