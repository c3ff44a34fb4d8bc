"""What the estimates family stands on: a method's one verb is ``estimate``, and what comes back is a `Report`.

A report is tables to print, JSON to keep and files (plots, traces, HTML) to look at. Every number says where it is from:
``measured`` here, ``datasheet``, ``published``, ``assumed`` or ``simulated``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: a cell of a table: None prints as a dash
Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Columns and rows under a title; ``note`` stands below and says what a reader must know (units, simulated parts)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"'{self.title}' has {len(self.columns)} columns, and a row of {len(row)} cells")

    def texts(self) -> list[tuple[str, ...]]:
        """The rows as they are shown."""
        return [tuple(map(shown, row)) for row in self.rows]

    def records(self) -> list[dict[str, Cell]]:
        """One dict a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def shown(value: Cell) -> str:
    """A cell as text: four significant digits are what an estimate is good for."""
    if isinstance(value, float):
        return f"{float(f'{value:.4g}'):,.12g}"
    if value is None:
        return "–"
    return str(value) if isinstance(value, str | bool) else f"{value:,}"


class Report(ABC):
    """What an estimate says."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """What a terminal shows."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""

    def files(self) -> Mapping[str, str]:
        """File name -> text of what ``--out`` writes beside the JSON: SVG plots, Chrome traces, an HTML page."""
        return {}

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``files()`` into ``folder``; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in self.files().items():
            path = folder / name
            path.write_text(text, encoding="utf-8")
            written.append(path)
        return written
