"""What the chat client costs, and what a kill costs it.

    python benchmarks/chat_harness.py [--calls 640] [--rounds 12] [--killed-calls 10000] [--kills 10]

Overhead: `Chat` over an endpoint against bare calls of OpenAI's SDK to the same endpoint (a server with an instrument behind
it, in a process of its own), 64 at once. The two answer the same number of new questions in turns; the difference of the
seconds a call of one round is one value, of wall time and of the client's CPU time. SIMULATED: nothing is a model's here.

Kills: a process asks so many questions over HTTP, 32 at once, and is killed with SIGKILL at a random moment, ten times; then
it runs to its end. The server counts what it answered, by question. No answer may be lost; what was answered and is not in
the ledger was under way at a kill, so there is at most 32 of it a kill.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from broadsheet.core.chat import Chat, Ledger, Message, Request, in_order, run
from broadsheet.core.chat.client import here
from broadsheet.core.chat.endpoint import Endpoint
from broadsheet.core.chat.server import serving
from broadsheet.core.chat.simulated import Draw, SimulatedChat
from broadsheet.core.records import Record, now, provenance, read_json, write_results

MODEL = "sim:harness"


@dataclass(frozen=True)
class Words:
    """Answers with fifty words."""

    def reply(self, request: Request, draw: Draw) -> str:
        return " ".join(f"word{int(draw.uniform(str(place)) * 1000)}" for place in range(50))


def question(number: int, size: int = 40) -> list[Message]:
    return [
        {"role": "system", "content": "You are a careful assistant. " * size},
        {"role": "user", "content": f"Question number {number}?"},
    ]


# --- overhead -------------------------------------------------------------------------------------------------------------


def _serve(pipe: Any) -> None:
    with serving(SimulatedChat(Words(), MODEL)) as url:
        pipe.send(url)
        pipe.recv()


def overhead(calls: int, rounds: int, concurrency: int) -> list[tuple[str, list[float]]]:
    """(metric, milliseconds a call of every round)."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    url = mine.recv()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        endpoint = Endpoint(url, MODEL)
        chat = Chat(endpoint, ledger=Path(folder) / "ledger.sqlite", concurrency=concurrency)

        async def bare(number: int) -> str:
            answer = await endpoint._client.chat.completions.create(
                model=MODEL, messages=question(number), temperature=0.0, max_tokens=256
            )
            return answer.choices[0].message.content or ""

        async def ours(number: int) -> str:
            return (await chat.acomplete(question(number), max_tokens=256))[0].text

        async def timed(function: Any, numbers: range) -> tuple[float, float]:
            start, cpu = time.perf_counter(), time.process_time()
            texts = await in_order(function, numbers, concurrency)
            assert all(len(text.split()) == 50 for text in texts)
            return time.perf_counter() - start, time.process_time() - cpu

        contenders = {"bare SDK": bare, "Chat": ours}
        for number in range(rounds + 1):
            seconds = {}
            names = list(contenders) if number % 2 else list(contenders)[::-1]
            for name in names:  # questions that were never asked before
                first = (2 * number + (name == "Chat")) * calls
                seconds[name] = run(timed(contenders[name], range(first, first + calls)))
            if number:  # the first round opens connections
                for place, clock in enumerate(("wall", "CPU")):
                    for name in contenders:
                        found.setdefault(f"{name}, {clock}", []).append(1e3 * seconds[name][place] / calls)
                    difference = 1e3 * (seconds["Chat"][place] - seconds["bare SDK"][place]) / calls
                    found.setdefault(f"overhead, {clock}", []).append(difference)
        again = (2 * rounds + 1) * calls
        wall, _ = run(timed(ours, range(again, again + calls)))
        found["replay, wall"] = [1e3 * wall / calls]
        assert chat.spent.calls == (rounds + 1) * calls
        chat.close()
    mine.send("stop")
    server.join()
    return list(found.items())


# --- kills ----------------------------------------------------------------------------------------------------------------


class Counting:
    """Counts the answers of a backend by question; an answer is counted before it is sent."""

    def __init__(self, backend: SimulatedChat):
        self.backend, self.name, self.identity, self.answered = backend, backend.name, backend.identity, Counter[str]()

    async def send(self, request: Request, samples: Sequence[int]) -> Any:
        choices = await self.backend.send(request, samples)
        self.answered[request.content] += 1
        return choices

    async def close(self) -> None:
        pass


def client(url: str, path: str, calls: int, concurrency: int) -> None:
    """The process that is killed: asks everything, prints a digest of all texts."""
    chat = Chat(Endpoint(url, MODEL), ledger=path, concurrency=concurrency)

    async def one(number: int) -> str:
        return (await chat.acomplete(question(number, 1)))[0].text

    print(json.dumps({"texts": run(here(in_order(one, range(calls), concurrency))), "paid": chat.spent.calls}))


def kills(calls: int, count: int, concurrency: int, seed: int) -> dict[str, float]:
    draws, world = random.Random(seed), Words()
    server = Counting(SimulatedChat(world, MODEL, seconds=0.02))
    with tempfile.TemporaryDirectory() as folder, serving(server) as url:
        path = str(Path(folder) / "ledger.sqlite")
        command = [sys.executable, __file__, "--client", url, path, str(calls), str(concurrency)]
        done = 0
        for kill in range(count):
            # At a random number of answers in the next stretch, so that kills spread over the whole run.
            target = done + draws.uniform(0.2, 1.0) * (calls - done) / (count - kill)
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while process.poll() is None and sum(server.answered.values()) < target:
                time.sleep(0.001)
            time.sleep(draws.uniform(0, 0.05))
            assert process.poll() is None, "the client ended before it was killed"
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done = sum(server.answered.values())
            with sqlite3.connect(path) as ledger:
                assert ledger.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        last = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        stored = {json.dumps(row["request"], sort_keys=True, separators=(",", ":")) for row in Ledger(path)}
        asked = [Request.of(question(number, 1)) for number in range(calls)]
        truth = run(SimulatedChat(world, MODEL).send(asked[0], [0]))[0].text  # the instrument's answer, without a server
        assert last["texts"][0] == truth
        answered = sum(server.answered.values())
        assert stored >= {one.content for one in asked}, "answers were lost"
        assert answered - len(stored) <= count * concurrency, "more was paid for twice than was under way at the kills"
        return {
            "asked": calls,
            "answered by the server": answered,
            "in the ledger": len(stored),
            "lost": calls - len(stored & {one.content for one in asked}),
            "paid for twice": answered - len(stored),
            "paid for more than twice": sum(times > 2 for times in server.answered.values()),
            "most that may be under way at the kills": count * concurrency,
            "paid for in the last run": last["paid"],
            "wrong texts": sum(a != b for a, b in zip(last["texts"], _texts(world, asked), strict=True)),
        }


def _texts(world: Words, asked: Sequence[Request]) -> list[str]:
    async def all_of_them() -> list[str]:
        model = SimulatedChat(world, MODEL)
        return [(await model.send(one, [0]))[0].text for one in asked]

    return asyncio.run(all_of_them())


# --- records --------------------------------------------------------------------------------------------------------------


def median_ci(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95 % percentile interval of the median."""
    medians = np.median(np.random.default_rng(0).choice(values, (draws, len(values))), 1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="overhead,kills", help="the records of parts left out stay as they are")
    parser.add_argument("--calls", type=int, default=640, help="calls a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--killed-calls", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "chat_harness.records.json"))
    a = parser.parse_args()
    shared: dict[str, Any] = {"paper": "", "bench": "chat-harness", "model": MODEL, "time": now(), **provenance()}
    parts = a.parts.split(",")
    records = [one for one in read_json(a.out) if one.setting["part"] not in parts] if Path(a.out).exists() else []
    table = Table("part", "metric", "value", "95 % interval", "n", title="SIMULATED: the model is an instrument")
    setting = {"part": "overhead", "concurrency": a.concurrency, "calls_a_round": a.calls}
    for metric, values in overhead(a.calls, a.rounds, a.concurrency) if "overhead" in parts else ():
        method, clock = metric.split(", ")
        interval = median_ci(values) if len(values) > 1 else None
        value, spread = statistics.median(values), {"clock": clock, "least": min(values), "most": max(values)}
        records.append(
            Record(method=method, metric="milliseconds a call", value=value, unit="ms", ci=interval, n=len(values),
                   setting={**setting, **spread}, **shared)
        )  # fmt: skip
        shown = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        table.add_row("overhead", metric, f"{value:.3f} ms", shown, str(len(values)))
    setting = {"part": "kills", "concurrency": 32, "kills": a.kills}
    for metric, number in (kills(a.killed_calls, a.kills, 32, a.seed) if "kills" in parts else {}).items():
        records.append(Record(method="Chat", metric=metric, value=number, unit="calls", setting=setting, **shared))
        table.add_row("kills", metric, f"{number:g}", "", "")
    write_results(records, a.out)
    Console(width=120).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
