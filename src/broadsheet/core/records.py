"""Append-only results.

A record is one measured number with everything needed to question it. Records are written as JSON lines; a record is on disk
before the next cell starts, so a kill or a full disk loses at most the cell under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One measured value.

    ``parameters`` are the method's hyperparameters; ``setting`` says which cell of the bench the value belongs to (task,
    mode, turn, budget ...); ``ci`` is a 95 % interval or None; ``n`` the number of samples behind the value.
    """

    paper: str
    method: str
    bench: str
    metric: str
    value: float
    unit: str = ""
    ci: tuple[float, float] | None = None
    n: int = 1
    seed: int = 0
    model: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    versions: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    time: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        if row.get("ci") is not None:
            row = {**row, "ci": tuple(row["ci"])}
        return cls(**row)


@cache
def provenance() -> dict[str, Any]:
    """Library versions, git revision (when run from a checkout) and device name."""
    versions = {"python": platform.python_version()}
    for package in ("broadsheet", "torch", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        revision = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = ""
    return {"versions": versions, "revision": revision}


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def home() -> Path:
    """Where user state lives: ``BROADSHEET_HOME`` or the platform's data folder."""
    if folder := os.environ.get("BROADSHEET_HOME"):
        return Path(folder)
    from platformdirs import user_data_dir

    return Path(user_data_dir("broadsheet"))


class StorageError(RuntimeError):
    """Records could not be written; the message says where and what to do."""


class JsonLines:
    """A file of JSON objects, one a line, to which lines are only ever added.

    A line is flushed to disk before `add` returns. One torn by a kill is ignored when read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue

    def add(self, row: dict[str, Any]) -> None:
        """Appends one line; raises `StorageError` (earlier lines stay intact) when the disk refuses."""
        line = json.dumps(row, ensure_ascii=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and self.path.stat().st_size > 0 and not self._ends_clean()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(("\n" if torn else "") + line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write records to {self.path}: {error.strerror}; free space or set BROADSHEET_HOME, "
                "then run again: finished cells are kept"
            ) from None

    def _ends_clean(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


class RecordStore:
    """Cells of records in one JSON-lines file: ``{"cell": key, "records": [...]}`` a line.

    A cell is all that one (method, budget, seed) measured; it is written with one append. One that was torn is measured
    again.
    """

    def __init__(self, path: str | Path):
        self.lines = JsonLines(path)
        self.path = self.lines.path

    def cells(self) -> dict[str, list[Record]]:
        """Finished cells by key; a later line replaces an earlier one."""
        found: dict[str, list[Record]] = {}
        for row in self.lines:
            try:
                found[row["cell"]] = [Record.from_json(record) for record in row["records"]]
            except (KeyError, TypeError):
                continue
        return found

    def add(self, cell: str, records: Iterable[Record]) -> None:
        """Appends one cell; raises `StorageError` (earlier cells stay intact) when the disk refuses."""
        self.lines.add({"cell": cell, "records": [record.to_json() for record in records]})


@cache
def source_digest(family: str) -> str:
    """A hash of the code behind a family's numbers: cells measured by other code are measured again."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("core/**/*.py"), *root.glob(f"methods/{family}/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cell_key(**what: Any) -> str:
    """A short stable hash of everything that determines a cell."""
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(records: Iterable[Record], target: str) -> None:
    """Writes a JSON list to the file ``target``, or to standard output for ``-``."""
    write_text(json.dumps([record.to_json() for record in records], indent=1, ensure_ascii=False), target)


def write_text(text: str, target: str) -> None:
    """Writes a text and a line's end to the file ``target``, or to standard output for ``-``. Raises StorageError."""
    if target == "-":
        sys.stdout.write(text + "\n")
        return
    path = Path(target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None


def write_results(records: Sequence[Record], path: str | Path) -> None:
    """Writes a committed result: what all records share stands once, under ``shared``."""
    rows = [record.to_json() for record in records]
    first = rows[0]
    shared = {name: value for name, value in first.items() if all(row[name] == value for row in rows)}
    lines = [
        json.dumps({name: value for name, value in row.items() if name not in shared}, ensure_ascii=False) for row in rows
    ]
    text = '{"shared": ' + json.dumps(shared, ensure_ascii=False) + ',\n"records": [\n' + ",\n".join(lines) + "\n]}\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Iterator[Record]:
    """Reads what `write_json` or `write_results` wrote."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    shared = {}
    if isinstance(rows, dict):
        shared, rows = rows["shared"], rows["records"]
    for row in rows:
        yield Record.from_json({**shared, **row})


# --- what was published ----------------------------------------------------------------------


def results_folder() -> Path:
    """Committed records: ``benchmarks/results`` of a checkout, or what was installed with the package."""
    package = Path(__file__).parent.parent
    installed = package / "results"
    checkout = package.parent.parent / "benchmarks" / "results"
    return checkout if checkout.is_dir() else installed


@cache
def committed(folder: Path | None = None) -> tuple[Record, ...]:
    """Every committed record."""
    found: list[Record] = []
    for path in sorted((folder or results_folder()).glob("*.records.json")):
        found += read_json(path)
    return tuple(found)
