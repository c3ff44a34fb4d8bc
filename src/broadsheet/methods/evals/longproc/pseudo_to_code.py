"""Pseudocode to C++, line by line (paper section 3): scored by running the program's tests."""

from __future__ import annotations

from collections.abc import Sequence

from broadsheet.core.replies import answer_part, code_blocks

from .common import Item, Score

HEADERS = (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream climits cassert iomanip "
    "sstream bitset"
).split()
TESTS, SECONDS = 10, 3.0


def program(code: str) -> str:
    """The code below the headers that the prompt promises."""
    return "".join(f"#include <{name}>\n" for name in HEADERS) + f"using namespace std;\n{code}\n"


def failure(code: str, tests: Sequence[tuple[Sequence[str], Sequence[str]]]) -> str:
    """Why the program does not print exactly what the first ten tests expect, or "". Needs g++.

    It is compiled (C++11, as officially) and run in `core.sandbox`, never in our process; its exit code does not matter.
    Raises `ExecutorMissing` where C++ cannot be run.
    """
    from broadsheet.core.sandbox import Sandbox, check_language

    check_language("cpp")
    words = ["g++", "-std=c++11", "-O", "-pipe", "-o", "program", "program.cpp"]
    made = Sandbox(disk_mb=256, processes=64).run(
        {"program.cpp": program(code).encode("utf-8", "replace")}, words, timeout=60, memory_mb=4096, collect=("program",)
    )
    if not made.passed:
        return f"it does not compile ({made.status}): {made.stderr.strip()[-200:]}"
    for number, (given, wanted) in enumerate(tests[:TESTS], 1):
        expected = "\n".join(wanted) + "\n"
        ended = Sandbox(disk_mb=0).run(
            made.files, ["./program"], timeout=SECONDS, stdin="\n".join(given) + "\n", max_output=len(expected) + 10_000
        )
        if ended.status not in ("pass", "fail"):
            return f"test {number}: {ended.status} {ended.message}".strip()
        if ended.stdout != expected:
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
