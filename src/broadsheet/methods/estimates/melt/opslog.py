"""Logs of runtimes that time every operator: llama.cpp's graph prints and MLC's profiler reports.

llama.cpp, built to time its graph, prints for every evaluation ``n_nodes = N`` and a line a node (number, shape, operator,
runs, CPU and wall milliseconds), then a sum an operator. CPU time is of the process: all of its threads count.
MLC prints a JSON report a function, whole or in numbered pieces (as Android's log cuts it).

Merging: ``per_op`` sums over operators. ``per_module`` sums over what the operators belong to: for MLC the function
(prefill, decode, ...), as the authors do; llama.cpp's log names no modules, so a node belongs to the embedding, to the
attention, the MLP or the output layer by the RMS norms before it. ``per_node`` is what the authors' parser calls per module
there: the same node of every evaluation. Their MLC parser asks for numbered pieces and finds nothing in the log of
a command line, their own sample among them; here both are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from broadsheet.methods.estimates.base import Table

Merge = Literal["per_op", "per_module", "per_node"]
MERGES: tuple[Merge, ...] = ("per_op", "per_module", "per_node")

_COUNT = re.compile(r"n_nodes = (\d+)")
_NODE = re.compile(
    r"\s*-\s*(?P<number>\d+): \[\s*(?P<dims>[\d,\s]+)\]\s+(?P<op>\S+)\s+\(\s*(?P<runs>\d+)\) "
    r"cpu\s*=\s*(?P<cpu>[\d.]+)\s*/\s*[\d.]+ ms, wall\s*=\s*(?P<wall>[\d.]+)\s*/\s*[\d.]+ ms"
)
_SUM = re.compile(r"perf_total_per_op_us\[\s*(\w+)\]\s*=\s*([\d.]+)\s*ms")
_WEIGHT = re.compile(r"llama_model_loader:\s+-\s+tensor\s+\d+:\s+(\S+)\s+(\S+)\s+\[([\d,\s]+)\]")
_REPORT = re.compile(r"Report from function (?P<name>[^\[\s:]+)(?:\[(?P<piece>\d+)/(?P<last>\d+)\])?:\s*$")


@dataclass(frozen=True)
class Node:
    """One timed operator. ``module``: what it belongs to; ``cpu_ms`` is None where only wall time was taken."""

    evaluation: int
    number: int
    op: str
    shape: str
    count: int
    cpu_ms: float | None
    wall_ms: float
    module: str


@dataclass(frozen=True)
class OpsLog:
    """``nodes`` in the order of the log; ``sums``: one mapping operator -> ms an evaluation, as the runtime printed them
    (llama.cpp); ``weights``: name -> (format, shape)."""

    backend: Literal["llama.cpp", "mlc", "torch"]
    nodes: tuple[Node, ...]
    sums: tuple[dict[str, float], ...] = ()
    weights: dict[str, tuple[str, tuple[int, ...]]] | None = None

    @property
    def evaluations(self) -> int:
        return len({node.evaluation for node in self.nodes})

    def merged(self, how: Merge = "per_op") -> list[Share]:
        """Sums over the whole log, the largest first. Raises ValueError for another way of merging."""
        keys: dict[str, Callable[[Node], str]] = {
            "per_op": lambda node: node.op,
            "per_module": lambda node: node.module,
            "per_node": lambda node: f"{node.number} {node.op}",
        }
        if how not in keys:
            raise ValueError(f"merge is one of {', '.join(MERGES)}; got '{how}'")
        groups: dict[str, list[Node]] = {}
        for node in self.nodes:
            groups.setdefault(keys[how](node), []).append(node)
        total = sum(node.wall_ms for node in self.nodes)
        shares = []
        for name, nodes in groups.items():
            wall = sum(node.wall_ms for node in nodes)
            known = [node.cpu_ms for node in nodes if node.cpu_ms is not None]
            shares.append(
                Share(
                    name,
                    sum(node.count for node in nodes),
                    sum(known) if known else None,
                    wall,
                    wall / total if total else 0,
                )
            )
        return sorted(shares, key=lambda share: -share.wall_ms)

    def printed(self) -> list[Share]:
        """The sums that the runtime printed, over all evaluations, the largest first; wall time."""
        names = list(dict.fromkeys(name for one in self.sums for name in one))
        total = sum(sum(one.values()) for one in self.sums)
        rows = [(name, sum(one.get(name, 0.0) for one in self.sums)) for name in names]
        return sorted((Share(n, len(self.sums), None, ms, ms / total) for n, ms in rows), key=lambda share: -share.wall_ms)

    def table(self, how: Merge = "per_op") -> Table:
        """`merged`, to print."""
        rows = tuple((s.name, s.count, s.cpu_ms, s.wall_ms, f"{100 * s.share:.2f} %") for s in self.merged(how))
        note = f"{self.backend}: {self.evaluations} evaluations, {len(self.nodes)} operators; the share is of wall time."
        return Table(f"Time {how.replace('_', ' ')}", ("name", "count", "CPU ms", "wall ms", "share"), rows, note)


@dataclass(frozen=True)
class Share:
    """A row of a merged log; ``share`` of all wall time."""

    name: str
    count: int
    cpu_ms: float | None
    wall_ms: float
    share: float


def parse_ops(path: str | Path) -> OpsLog:
    """Reads a log of either runtime. Raises ValueError, with the line, for one that is cut or of neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no log at {path}")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    for line in lines:
        if _COUNT.match(line):
            return _llama(path, lines)
        if _REPORT.search(line):
            return _mlc(path, lines)
    raise ValueError(
        f"{path} holds no operator times: neither llama.cpp's 'n_nodes = ' nor MLC's 'Report from function'; "
        "build the runtime with its per-operator timing switched on"
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _llama(path: Path, lines: list[str]) -> OpsLog:
    nodes: list[Node] = []
    sums: list[dict[str, float]] = []
    weights: dict[str, tuple[str, tuple[int, ...]]] = {}
    evaluation, place = -1, 0
    while place < len(lines):
        line = lines[place]
        if found := _WEIGHT.match(line):
            weights[found[1]] = (found[2], _numbers(found[3]))
        elif found := _COUNT.match(line):
            evaluation, count, norms = evaluation + 1, int(found[1]), 0
            for number in range(count):
                place += 1
                node = _NODE.match(lines[place]) if place < len(lines) else None
                if not node or int(node["number"]) != number:
                    raise ValueError(f"{path}, line {place + 1}: node {number} of {count} is missing; the log is cut")
                norms += node["op"] == "RMS_NORM"
                shape = "x".join(map(str, _numbers(node["dims"])))
                cpu, wall = float(node["cpu"]), float(node["wall"])
                nodes.append(Node(evaluation, number, node["op"], shape, int(node["runs"]), cpu, wall, str(norms)))
        elif found := _SUM.match(line):
            if not _SUM.match(lines[place - 1]):
                sums.append({})
            sums[-1][found[1]] = float(found[2])
        place += 1
    return OpsLog("llama.cpp", tuple(_named(nodes)), tuple(sums), weights)


def _named(nodes: list[Node]) -> Iterator[Node]:
    """Modules from the count of RMS norms so far: a block begins with one, its MLP with the next, the output with the last.

    Until then ``module`` holds that count.
    """
    last = {node.evaluation: node.module for node in nodes}
    for node in nodes:
        module = ("mlp", "attention")[int(node.module) % 2]
        if node.module in ("0", last[node.evaluation]):
            module = "embedding" if node.module == "0" else "output"
        yield replace(node, module=module)


def _mlc(path: Path, lines: list[str]) -> OpsLog:
    nodes: list[Node] = []
    evaluation, pieces = 0, ""
    for place, line in enumerate(lines):
        found = _REPORT.search(line)
        if not found:
            continue
        if place + 1 >= len(lines):
            raise ValueError(f"{path}, line {place + 1}: the report of {found['name']} is missing; the log is cut")
        text = lines[place + 1].strip()
        if found["piece"] is not None:  # pieces are numbered from 0 to the last, which is included
            pieces = text if int(found["piece"]) == 0 else pieces + text
            if int(found["piece"]) < int(found["last"]):
                continue
            text = pieces
        try:
            calls = json.loads(text)["calls"]
            for number, call in enumerate(calls):
                plain = {key.replace(" ", ""): value for key, value in call.items()}
                name, shapes = plain["Name"]["string"], plain["ArgumentShapes"]["string"]
                count, wall = plain["Count"]["count"], plain["Duration(us)"]["microseconds"] / 1000
                nodes.append(Node(evaluation, number, name, shapes, count, None, wall, found["name"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {place + 2}: not a profiler report ({error!r}); the log is cut") from None
        evaluation += 1
    return OpsLog("mlc", tuple(nodes))
