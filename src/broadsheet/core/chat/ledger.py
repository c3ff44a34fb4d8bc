"""Every answer that was paid for, by what was asked: one SQLite file.

An answer is committed before `add` returns, so a kill loses at most the calls in flight, and whoever asks the same model the
same thing for the same sample again is answered from here. Keys and headers never reach it: it sees requests and answers.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..records import StorageError, now
from .protocol import Choice, Request, Usage

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, tag TEXT NOT NULL, sample INTEGER NOT NULL,
    request TEXT NOT NULL, answer TEXT NOT NULL, finish_reason TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, money REAL NOT NULL, seconds REAL NOT NULL,
    time TEXT NOT NULL
) WITHOUT ROWID
"""


class Ledger:
    """Answers by key. ``path`` is created when missing; ":memory:" keeps nothing beyond the process.

    Raises `StorageError` where the file cannot be read or written.
    """

    def __init__(self, path: str | Path = ":memory:"):
        self.path = str(path)
        try:
            if self.path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Each statement is its own transaction; the write-ahead log makes that cheap and safe against kills.
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"cannot open the ledger {self.path}: {error}; move it away or set BROADSHEET_HOME") from None

    def get(self, key: str) -> Choice | None:
        """The stored answer, or None."""
        query = "SELECT answer, finish_reason, prompt_tokens, completion_tokens, money, seconds FROM calls WHERE key = ?"
        try:
            row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the ledger {self.path}: {error}") from None
        if row is None:
            return None
        answer, reason, prompt, completion, money, seconds = row
        return replace(
            _choice(answer), finish_reason=reason, usage=Usage(1, prompt, completion, money, seconds), stored=True
        )

    def add(self, key: str, model: str, tag: str, sample: int, request: Request, choice: Choice) -> None:
        """Stores an answer; one that is there already stays."""
        kept: dict[str, Any] = {"text": choice.text}
        if choice.logprobs is not None:
            kept["logprobs"] = choice.logprobs
        if choice.tool_calls:
            kept["tool_calls"] = choice.tool_calls
        usage = choice.usage
        row = (
            key, model, tag, sample, request.content, json.dumps(kept), choice.finish_reason,
            usage.prompt_tokens, usage.completion_tokens, usage.money, usage.seconds, now(),
        )  # fmt: skip
        try:
            self._connection.execute(f"INSERT OR IGNORE INTO calls VALUES ({','.join('?' * len(row))})", row)
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot write the ledger {self.path}: {error}; free space or set BROADSHEET_HOME, then run again: "
                "answers so far are kept"
            ) from None

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM calls").fetchone()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every call as a dictionary, the request and the answer parsed."""
        with closing(self._connection.execute("SELECT * FROM calls ORDER BY time, key")) as cursor:
            names = [column[0] for column in cursor.description]
            for row in cursor:
                found = dict(zip(names, row, strict=True))
                yield {**found, "request": json.loads(found["request"]), "answer": json.loads(found["answer"])}

    def close(self) -> None:
        self._connection.close()


def _choice(answer: str) -> Choice:
    kept = json.loads(answer)
    logprobs = kept.get("logprobs")
    return Choice(
        text=kept["text"],
        logprobs=None if logprobs is None else tuple(logprobs),
        tool_calls=tuple(kept.get("tool_calls", ())),
    )
