"""What several commands share: options as they are typed, and progress bars."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

    from broadsheet.core.records import Record
    from broadsheet.methods.estimates.base import Table


def asked(model: str, chat: str, model_name: str) -> dict[str, str]:
    """Which model a workload is about: an endpoint's, or a local one."""
    if model_name and not chat:
        raise ValueError("--model-name goes with --chat URL: it is one of the endpoint's models")
    if chat and not chat.startswith(("http://", "https://")):
        raise ValueError(f"--chat takes an address such as http://localhost:8000/v1, got '{chat}'")
    return {"model": chat, "name": model_name} if chat else {"model": model}


def split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def options_of(pairs: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"-o takes NAME=VALUE, got '{pair}'")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def print_tables(tables: "Sequence[Table]") -> None:
    """Tables of an estimate; where nobody watches, wide enough to be read by a program."""
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        shown = Shown(title=table.title, title_justify="left", header_style="bold", box=None, padding=(0, 1))
        for place, name in enumerate(table.columns):
            numbers = all(isinstance(row[place], int | float | None) for row in table.rows)
            shown.add_column(name, justify="right" if numbers else "left")
        for cells in table.texts():
            shown.add_row(*cells)
        console.print(shown)
        if table.note:
            console.print(table.note, style="dim", markup=False)
        console.print()


@contextmanager
def working() -> "Iterator[Progress]":
    """Progress bars on standard error, which go when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights: one bar is enough
    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*look, console=Console(stderr=True), transient=True) as bar:
        yield bar


def with_progress(work: Any) -> "list[Record]":
    """Runs ``work(progress, tick)`` under two bars: one of cells, one of what is done in a cell."""
    with working() as bar:
        line = bar.add_task("loading", total=None)

        def progress(cell: Any, number: int, total: int, stored: bool) -> None:
            budget = "" if cell.budget is None else f" at {cell.budget:g}"
            seed = f" seed {cell.seed}" if cell.seed else ""
            bar.update(line, completed=number, total=total, description=f"{cell.method}{budget}{seed}")

        def tick(done: int, of: int) -> None:
            if not inner:
                inner.append(bar.add_task("", total=of))
            bar.update(inner[0], completed=done, total=of, visible=done < of)

        inner: list[Any] = []
        return work(progress, tick)
