"""Problem sets and files of samples."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Rows of the official file that the paper leaves out (Section 2.4).
EXCLUDED = frozenset(
    {2, 23, 41, 45, 53, 60, 71, 92, 97, 99, 102, 123, 124, 135, 137, 138, 144, 148, 156, 157, 159, 160}
)  # fmt: skip
COLUMNS = ("task_id", "prompt", "input_generator", "input_levels", "reference_solution", "checker", "entry_point")


@dataclass(frozen=True)
class Problem:
    """A task and how its solutions are measured.

    ``number``: its place in the file, part of the inputs' seeds. ``input_generator``: source of ``generate_input(size, lid,
    cid)``; ``levels``: a size a level. ``reference``: the body or the whole of the best known solution; ``checker``: source
    of ``__check(input, answer, output)``. ``tiers``: known solutions by name, where the set has some.
    """

    id: str
    number: int
    prompt: str
    input_generator: str
    levels: tuple[int, ...]
    reference: str
    checker: str
    entry_point: str
    tiers: tuple[tuple[str, str], ...] = ()


def read_problems(path: str | Path) -> list[Problem]:
    """The official CSV, without the rows that the paper leaves out. Raises ValueError for what cannot be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {error}; give the path of enamel.csv of the official repository") from None
    if not rows or not set(COLUMNS) <= set(rows[0]):
        raise ValueError(f"{path} has not the columns {', '.join(COLUMNS)}; give the path of the official enamel.csv")
    found = []
    for place, row in enumerate(rows):
        try:
            number = int(row["task_id"].rpartition("/")[2])
            sizes = tuple(map(int, row["input_levels"].split()))
        except (ValueError, AttributeError):
            raise ValueError(f"{path}, row {place}: task_id must end in a number and input_levels be numbers") from None
        if number not in EXCLUDED:
            found.append(
                Problem(
                    row["task_id"], number, row["prompt"], row["input_generator"], sizes, row["reference_solution"],
                    row["checker"], row["entry_point"],
                )
            )  # fmt: skip
    return found


def read_samples(path: str | Path, problems: Sequence[Problem]) -> dict[str, list[str]]:
    """{task id: codes} from EvalPlus' JSON lines (``task_id`` with ``solution`` or ``completion``), or from the official
    JSON: ``{"0": [code, ...]}`` or a list by number. Rows that the paper leaves out are passed over.

    Raises ValueError for unknown ids, for problems without a sample, and for what cannot be read.
    """
    known = {problem.number: problem.id for problem in problems}
    found: dict[str, list[str]] = {}

    def add(name: str, codes: Sequence[object]) -> None:
        number = name.rpartition("/")[2]
        identity = known.get(int(number)) if number.isdigit() else None
        if identity is None:
            if number.isdigit() and int(number) in EXCLUDED:
                return
            raise ValueError(f"{path}: there is no problem '{name}' in this set")
        if not all(isinstance(code, str) for code in codes):
            raise ValueError(f"{path}: a sample of '{name}' is missing or is no text; a missing sample is not a zero")
        found.setdefault(identity, []).extend(map(str, codes))

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, list):
        whole = {str(number): codes for number, codes in enumerate(whole)}
    if isinstance(whole, dict) and "task_id" not in whole:
        for name, codes in whole.items():
            add(name, codes)
    else:
        for place, line in enumerate(filter(str.strip, text.splitlines()), 1):
            try:
                row = json.loads(line)
                add(row["task_id"], [row["solution"] if "solution" in row else row["completion"]])
            except (KeyError, TypeError, json.JSONDecodeError):
                raise ValueError(
                    f"{path}, line {place}: a sample is an object with 'task_id' and 'solution' or 'completion'"
                ) from None
    if missing := [problem.id for problem in problems if not found.get(problem.id)]:
        raise ValueError(
            f"{path} has no sample for {missing[0]} and {len(missing) - 1} others; a missing sample is not a zero"
        )
    return found


def code_of(text: str, problem: Problem) -> str | None:
    """The program in a model's reply: the last Python block that defines the function or completes the prompt, or the whole
    reply where it does. None when there is none."""
    from broadsheet.core.replies import answer_part, code_blocks

    for block in [*reversed(code_blocks(text)), answer_part(text), text]:
        for whole in (block, f"{problem.prompt}\n{block}"):
            try:
                tree = ast.parse(whole)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            defined = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point]
            if defined and (whole is block or len(defined[-1].body) > 1):
                return block
    return None
