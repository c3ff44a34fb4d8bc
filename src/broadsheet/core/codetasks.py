"""Code tasks: a prompt to be completed and tests that say whether it was; loading them, and where a completion ends.

One form for all: that of MultiPL-E (``name, language, prompt, tests, stop_tokens``). HumanEval's and McEval's records are
brought into it.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_LANGUAGES = {"py": "python", "python": "python", "humaneval": "python", "java": "java"}
#: Where HumanEval's authors stop.
_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True)
class CodeTask:
    """``prompt``, a completion and ``tests`` after one another are a program that ends without an error if all is well.

    ``stop_tokens``: strings that a completion stops before. ``solution``: a completion that passes, where one is known.
    """

    name: str
    language: str
    prompt: str
    tests: str
    stop_tokens: tuple[str, ...] = ()
    solution: str = ""

    def source(self, completion: str) -> str:
        """The program without its tests."""
        return self.prompt + completion


# --- loading ----------------------------------------------------------------------------------------------------------


def load_tasks(source: str | Path) -> list[CodeTask]:
    """Tasks of a file of JSON lines (or a JSON list, plain or gzipped), or of the hub.

    Records may have the fields of MultiPL-E (``name, language, prompt, tests, stop_tokens``), of HumanEval (``task_id,
    prompt, test, entry_point``) or of McEval (the same, with tests that call themselves). On the hub a name is
    ``owner/name[:configuration]``, for example ``nuprl/MultiPL-E:humaneval-py``; this needs the package ``datasets``.
    Raises ValueError naming the file, the line and the field.
    """
    path = Path(source)
    if path.is_file():
        return [_task(row, f"{path}, record {number}") for number, row in enumerate(_rows(path), 1)]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(source)):
        raise ValueError(f"no file {source}: give JSON lines of tasks, or a hub name such as nuprl/MultiPL-E:humaneval-py")
    return [_task(row, f"{source}, record {number}") for number, row in enumerate(_hub(str(source)), 1)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"cannot read the tasks in {path}: {error}") from None
    if text.lstrip().startswith("["):
        lines: Iterable[tuple[int, str]] = [(1, text)]
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        yield from row if isinstance(row, list) else [row]


def _hub(name: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError("tasks from the hub need the package datasets: pip install 'broadsheet[data]'") from None
    repository, _, configuration = name.partition(":")
    try:
        splits = load_dataset(repository, configuration or None)
    except Exception as error:
        raise ValueError(f"cannot load {name} from the hub: {str(error).splitlines()[0]}") from None
    for split in splits.values():
        yield from split


def _task(row: Any, where: str) -> CodeTask:
    """One record of either form."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not an object with the fields of a task")
    multipl = "tests" in row
    needed = ("name", "language", "prompt", "tests") if multipl else ("task_id", "prompt", "test", "entry_point")
    for field in needed:
        if not isinstance(row.get(field), str):
            raise ValueError(f"{where} has no text '{field}'; a task has {', '.join(needed)}")
    name = row["name" if multipl else "task_id"]
    spoken = row["language"] if multipl else name.partition("/")[0]
    language = _LANGUAGES.get(spoken.lower(), spoken.lower())
    tests = row["tests" if multipl else "test"]
    if not multipl and language == "python" and not re.search(r"^check\w*\(", tests, re.M):
        tests += f"\ncheck({row['entry_point']})\n"  # HumanEval leaves calling them to its harness
    stop = row.get("stop_tokens") or ()
    if not multipl and language == "python":
        stop = _HUMANEVAL_STOP
    return CodeTask(name, language, row["prompt"], tests, tuple(stop), row.get("canonical_solution", ""))


# --- where a completion ends --------------------------------------------------------------------------------------------


def truncate(prompt: str, completion: str, language: str = "python") -> str:
    """The completion up to the end of the function that the prompt leaves open.

    What a model writes after it (more functions, prints, half a sentence) goes. When there is no such function, it does not
    end, or it does not parse, the completion stays as it is (arXiv 2503.07103, section 3.5). Where a prompt defines helpers
    before the function that it asks for, the original cuts at the end of the first of them and so throws every completion
    away; here it is the last function that begins in the prompt, or the first of the completion if none does.
    """
    if language == "python":
        return _truncate_python(prompt, completion)
    if language == "java":
        return _truncate_java(prompt, completion)
    return completion


def first_stop(text: str, stops: Iterable[str]) -> int:
    """Where the first of the strings begins, or the text's length."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=len(text))


def _truncate_python(prompt: str, completion: str) -> str:
    code = prompt + completion
    rows = _beyond(code, prompt.count("\n") + 1)
    try:
        tree = ast.parse("".join(code.splitlines(keepends=True)[:rows]))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return completion
    functions = sorted(_functions(tree), key=lambda function: function.lineno)
    last = prompt.rstrip().count("\n") + 1  # the prompt's last line with something on it
    begun = [function for function in functions if function.lineno <= last]
    if not functions:
        return completion
    function = begun[-1] if begun else functions[0]
    lines = code.splitlines(keepends=True)
    end = sum(map(len, lines[: function.end_lineno - 1])) if function.end_lineno else 0
    end += len(lines[(function.end_lineno or 1) - 1].encode()[: function.end_col_offset].decode())
    return code[len(prompt) : max(end, len(prompt))]


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, but none within another function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        else:
            yield from _functions(node)


def _beyond(code: str, first: int) -> int:
    """How many lines there are before the first statement outside of the function that stands open at line ``first``.

    So that what follows the function need not be Python. Tokens are read one by one, and an error ends them.
    """
    level, statement = 0, True
    base: int | None = None  # the level of the function's own first line
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            row = token.start[0]
            if token.type == tokenize.INDENT:
                level += 1
            elif token.type == tokenize.DEDENT:
                level -= 1
            elif token.type == tokenize.NEWLINE:
                statement = True
            elif statement and token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER):
                statement = False
                if row > first and base is not None and level <= base:
                    return row - 1
                if token.string in ("def", "async") and (base is None or level <= base):
                    base = level
    except (tokenize.TokenError, SyntaxError):
        pass
    return code.count("\n") + 1


_JAVA = re.compile(r'//[^\n]*|/\*.*?\*/|"""(?:\\.|.)*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|[{};]', re.S)
_TYPE = re.compile(r"\b(class|interface|enum|record)\s+\w+")


def _truncate_java(prompt: str, completion: str) -> str:
    """Braces are counted, those in comments, strings and characters apart."""
    code = prompt + completion
    opened: list[Literal["type", "method", "other"]] = []
    header = 0  # where what leads to the next brace begins
    for mark in _JAVA.finditer(code):
        text = mark[0]
        if text == "{":
            words = _JAVA.sub(" ", code[header : mark.start()])
            if _TYPE.search(words):
                opened.append("type")
            else:  # `f() {` in a type; not `int[] a = {`, nor the blocks of a method
                opened.append("method" if "(" in words and set(opened) <= {"type"} else "other")
        elif text == "}":
            if not opened:
                return completion
            if opened.pop() == "method" and mark.end() > len(prompt):
                return code[len(prompt) : mark.end()]
        if text in "{};":
            header = mark.end()
    return completion
