"""Pseudocode to C++, line by line (paper section 3): scored by running the program's tests."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.replies import answer_part, code_blocks

from .common import Item, Score

HEADERS = (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream climits cassert iomanip sstream bitset"
).split()
TESTS, SECONDS = 10, 3.0


def program(code: str) -> str:
    """The code below the headers that the prompt promises."""
    return "".join(f"#include <{name}>\n" for name in HEADERS) + f"using namespace std;\n{code}\n"


def failure(code: str, tests: Sequence[tuple[Sequence[str], Sequence[str]]]) -> str:
    """Why the program does not print exactly what the first ten tests expect, or "". Needs g++.

    It is compiled and run in `core.sandbox`, never in our process. Raises `ExecutorMissing` where C++ cannot be run.
    """
    from broadsheet.core.sandbox import run_program

    for number, (given, wanted) in enumerate(tests[:TESTS], 1):
        ended = run_program(program(code), "\n".join(given) + "\n", language="cpp", seconds=SECONDS)
        if ended.status != "passed":
            return f"test {number}: {ended.status} {ended.message}".strip()
        if ended.output != "\n".join(wanted) + "\n":
            return f"test {number}: another output"
    return ""


def parts(item: Item) -> tuple[str, list[str], str]:
    return "```cpp\n", item.reference.splitlines(), "\n```"


def score(item: Item, text: str) -> Score:
    """1 when the last C++ block passes its tests, else 0; there is no partial score."""
    part = answer_part(text)
    blocks = code_blocks(part, "cpp") + code_blocks(part, "c++") or code_blocks(part)
    if not blocks:
        return Score(0.0, 0.0, extracted=False, evidence="no block of C++")
    wrong = failure(blocks[-1], item.data["testcases"])
    return Score(float(not wrong), float(not wrong), int(not wrong), evidence=wrong)
