"""Every answer that was paid for, by what was asked: one SQLite file.

An answer is committed before `add` returns, so a kill loses at most the calls in flight, and whoever asks the same model the
same thing for the same sample again is answered from here. Keys and headers never reach it: it sees requests and answers.
Several processes may share one file.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..records import StorageError, now
from .protocol import Choice, Request, Usage

#: What is asked is stored as text that JSON escapes to ASCII: NULs and lone surrogates, which SQLite refuses, survive.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, tag TEXT NOT NULL, sample INTEGER NOT NULL,
    request TEXT NOT NULL, answer TEXT NOT NULL, finish_reason TEXT NOT NULL, calls INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, money REAL NOT NULL, seconds REAL NOT NULL,
    estimated INTEGER NOT NULL, time TEXT NOT NULL
) WITHOUT ROWID
"""
_VERSION = 1


class Ledger:
    """Answers by key. ``path`` is created when missing; ":memory:" keeps nothing beyond the process.

    Raises `StorageError` where the file cannot be read or written.
    """

    def __init__(self, path: str | Path = ":memory:"):
        self.path = str(path)
        try:
            if self.path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # The write-ahead log makes a transaction a call cheap, and safe against kills.
            self._connection = sqlite3.connect(self.path, isolation_level=None, timeout=30, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise StorageError(f"the ledger {self.path} is of another version of broadsheet ({version}); move it away")
            self._connection.execute(_SCHEMA)
            self._connection.execute(f"PRAGMA user_version={_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"cannot open the ledger {self.path}: {error}; move it away or set BROADSHEET_HOME") from None

    def get(self, key: str) -> Choice | None:
        """The stored answer, or None."""
        query = (
            "SELECT answer, finish_reason, calls, prompt_tokens, completion_tokens, money, seconds, estimated "
            "FROM calls WHERE key = ?"
        )
        try:
            row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.Error as error:
            raise StorageError(f"cannot read the ledger {self.path}: {error}") from None
        if row is None:
            return None
        answer, reason, *usage = row
        kept = json.loads(answer)
        logprobs = kept.get("logprobs")
        return Choice(
            kept["text"],
            reason,
            Usage(*usage),
            None if logprobs is None else tuple(logprobs),
            tuple(kept.get("tool_calls", ())),
            stored=True,
        )

    def add(self, model: str, tag: str, request: Request, answers: Sequence[tuple[str, int, Choice]]) -> None:
        """Stores the answers to one call, (key, sample, choice) each, all or none; those that are there already stay."""
        rows, time = [], now()
        for key, sample, choice in answers:
            kept: dict[str, Any] = {"text": choice.text}
            if choice.logprobs is not None:
                kept["logprobs"] = choice.logprobs
            if choice.tool_calls:
                kept["tool_calls"] = choice.tool_calls
            used = choice.usage
            row = (
                key, _storable(model), _storable(tag), sample, request.content, json.dumps(kept, default=dict),
                _storable(choice.finish_reason), used.calls, used.prompt_tokens, used.completion_tokens, used.money,
                used.seconds, used.estimated, time,
            )  # fmt: skip
            rows.append(row)
        if not rows:
            return
        try:
            with closing(self._connection.cursor()) as cursor:
                cursor.execute("BEGIN IMMEDIATE")
                try:
                    cursor.executemany(f"INSERT OR IGNORE INTO calls VALUES ({','.join('?' * len(rows[0]))})", rows)
                    cursor.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        cursor.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot write the ledger {self.path}: {error}; free space or set BROADSHEET_HOME, then run again: "
                "answers so far are kept"
            ) from None

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM calls").fetchone()[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every answer as a dictionary, oldest first, the request and the answer parsed."""
        with closing(self._connection.execute("SELECT * FROM calls ORDER BY time, key")) as cursor:
            names = [column[0] for column in cursor.description]
            for row in cursor:
                found = dict(zip(names, row, strict=True))
                yield {**found, "request": json.loads(found["request"]), "answer": json.loads(found["answer"])}

    def totals(self) -> list[tuple[str, str, int, Usage]]:
        """(model, tag, answers, what they cost) for every model and tag."""
        query = """
            SELECT model, tag, count(*), sum(calls), sum(prompt_tokens), sum(completion_tokens), sum(money), sum(seconds),
                   sum(estimated)
            FROM calls GROUP BY model, tag ORDER BY model, tag
        """
        return [(model, tag, count, Usage(*usage)) for model, tag, count, *usage in self._connection.execute(query)]

    def close(self) -> None:
        self._connection.close()


def _storable(text: str) -> str:
    """Without lone surrogates, which SQLite refuses."""
    return text.encode("utf-8", "backslashreplace").decode()
