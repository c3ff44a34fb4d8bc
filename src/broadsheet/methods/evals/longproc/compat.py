"""The official evaluators, faults included, for comparison with published numbers. Use the default mode for anything else.

What they get wrong (measured at the commit in `tests/golden/README.md`):

- path_traversal: the first wrong line counts as right (an error in line 1 of 10 is worth 0.1), and an answer that goes on
  beyond the right route has partial score 1 with accuracy 0.
- tom_tracking: every line that begins with "-" counts as a step, indented ones but the first are lost, and the extraction
  rate is always 1.
- countdown: partial scores are one line short (a complete search without its solution 0.99, one of a single line below 0); a
  bare solution has partial score 1; wrong results in "Try" lines and results that break the rules (negative or beyond 2000)
  pass; the equations go through Python's ``eval``, so that "x = 1" or "1 / 0 = 0" stops the whole run.
- travel_planning: as countdown, one line short; a line passes when it contains the right one; stays are read from the
  flights alone, so that wrong dates of visits pass; cities after the right ones do not count; names of two words never
  match; a plan without its search has partial score 1.
- html_to_tsv: a right row may be written any number of times; a quote in a cell swallows what follows; without a header the
  first row is lost; a table of another width, or with no rows, scores 0 as a failed extraction.
- pseudo_to_code: compiled and run unconfined in the working directory.

Where an official evaluator stops with an exception (eval), the answer counts as wrong here, as on the authors' later branch.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence

from . import pseudo_to_code
from .common import Item, Score, plain
from .html_to_tsv import cell
from .tom_tracking import _FILLERS as TOM_FILLERS


def _tagged(text: str, tag: str) -> str | None:
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def path_traversal(item: Item, text: str) -> Score:
    wanted, found = _untagged(item.reference, "Route").strip(), _tagged(text, "Route")
    if found is None:
        return Score(0.0, 0.0, extracted=False)
    if found == wanted:
        return Score(1.0, 1.0)
    pairs = list(zip(wanted.split("\n"), found.split("\n"), strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1)
    return Score(0.0, (first + 1) / len(wanted.split("\n")))


def _untagged(reference: str, tag: str) -> str:
    inside = _tagged(reference, tag)
    return reference if inside is None else inside


def tom_tracking(item: Item, text: str) -> Score:
    def steps(trace: str) -> list[str]:
        dashed = "\n".join(line for line in trace.splitlines() if line.strip().startswith("-")).strip()
        # Its stop words include "step", and it reads words after their punctuation is gone.
        read = [_tom(line.split("-", 1)[1]) for line in dashed.split("\n") if line.startswith("-")]
        return [line for line in read if line]

    found, wanted = steps(text), steps(item.reference)
    if found == wanted:
        return Score(1.0, 1.0)
    pairs = list(zip(found, wanted, strict=False))
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    return Score(0.0, first / len(wanted))


def _tom(text: str) -> str:
    return plain(text.strip().replace("’", ""), TOM_FILLERS)


def countdown(item: Item, text: str) -> Score:
    solution = _tagged(text, "Solution")
    if solution is not None and _solves(item.data["nums"], item.data["target"], solution):
        return Score(1.0, 1.0)
    extracted, heading = solution is not None, "# Search Procedure"
    if heading not in text:
        return Score(0.0, 0.0, extracted=extracted)
    wanted = item.reference.split(heading)[-1].split("Now we have found the target")[0].strip().split("\n")
    found = text.split(heading)[-1].strip().split("\n")
    if found[0] != wanted[0]:
        return Score(0.0, 0.0, extracted=extracted)
    place = -1
    for place, (said, meant) in enumerate(zip(found[1:], wanted[1:], strict=False)):  # noqa: B007  # used after the loop
        if said != meant and ("Pick two numbers" in meant or not _same_try(said, meant)):
            break
    return Score(0.0, place / len(wanted[1:]), extracted=extracted)


def _same_try(said: str, meant: str) -> bool:
    dropped = "drop this branch"
    return said.split("=")[0] == meant.split("=")[0] and (dropped in said) == (dropped in meant)


def _solves(nums: Sequence[int], target: int, solution: str) -> bool:
    """What `eval` accepts, without it: only "a op b = c" with whole numbers can pass (negative ones too)."""
    left, lines = list(nums), solution.split("\n")
    if len(lines) != 3:
        return False
    for line in lines:
        sides = line.strip().split("=")
        sign = next((sign for sign in "+-*/" if sign in sides[0]), None)
        if len(sides) != 2 or sign is None or sides[0].count(sign) != 1:
            return False
        try:
            a, b, c = (_whole(text) for text in (*sides[0].split(sign), sides[1]))
        except ValueError:
            return False
        if sign == "/" and b == 0:
            return False
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0}[sign]
        if result != c:
            return False
        for number in (a, b):
            if number not in left:
                return False
            left.remove(number)
        left.append(c)
    return left[0] == target


def _whole(text: str) -> int:
    if len(text) > 30:
        raise ValueError("no number of this task is so long")
    return int(text)


def travel_planning(item: Item, text: str) -> Score:
    plan = _tagged(text, "Plan")
    if plan is not None and _travels(item, plan):
        return Score(1.0, 1.0)
    tag, output = "<Solving Procedure>", "Output the plan in the required format:"
    wanted = tag + item.reference.replace(output, "").split(tag)[1]
    found = text.replace(output, "")
    if tag in found:
        found = tag + found.split(tag)[1]
    said, meant = ([line for line in part.strip().split("\n") if line.strip()] for part in (found, wanted))
    place = 0
    for place, (one, other) in enumerate(zip(said, meant, strict=False)):  # noqa: B007  # used after the loop
        if plain(other) not in plain(one):
            break
    return Score(0.0, place / len(meant), extracted=plan is not None)


def _travels(item: Item, plan: str) -> bool:
    cities = [city for city in item.data["ground_truth_cities"].split("**") if city]
    days = [int(day) for day in item.data["ground_truth_durations"].split("**") if day]
    spans, flights, total = [], [], None
    for line in plan.split("\n"):
        if stated := re.findall(r"European cities for (\d+) days", line):
            total = int(stated[0])
        if found := re.findall(r"\d+-\d+", line):
            spans.append(found[0])
            if int(found[0].split("-")[1]) == total:
                break
        flights += re.findall(r".*Day (\d+).*from (\w+) to (\w+)", line)[:1]
    if not spans or not flights:
        return False
    visited = [flights[0][1], *(to for _, _, to in flights)]
    turns = [1, *(int(day) for day, _, _ in flights), int(spans[-1].split("-")[1])]
    stays = [(city, turns[i + 1] - turns[i] + 1) for i, city in enumerate(visited)]
    return stays[: len(cities)] == list(zip(cities, days, strict=False))


def html_to_tsv(item: Item, text: str) -> Score:
    fenced = re.search(r"```tsv([\s\S]*)```", text)
    table = fenced[1] if fenced else text.split("```tsv")[1] if "```tsv" in text else text
    wanted, found = _frame(item.reference), _frame(table.strip())
    nothing = Score(0.0, 0.0, extracted=False, values={"precision": 0.0, "recall": 0.0})
    if not wanted or not found or len(wanted[0]) != len(found[0]):
        return nothing
    precision = sum(row in wanted for row in found) / len(found)
    recall = sum(row in found for row in wanted) / len(wanted)
    f1 = 0.0 if recall + precision == 0 else 2 * recall * precision / (recall + precision)
    return Score(f1, f1, values={"precision": precision, "recall": recall})


def _frame(text: str) -> list[list[str]]:
    """The rows of a table, normalised; none where pandas would fail."""
    try:
        header, *rows = list(csv.reader(text.strip().split("\n"), delimiter="\t"))
    except (csv.Error, ValueError):
        return []
    if not rows or len(set(header)) < len(header):
        return []
    if len(rows[-1]) != len(header):
        rows = rows[:-1]
    return [[cell(value) for value in (row if len(row) == len(header) else ["N/A"] * len(header))] for row in rows]


def code_score(item: Item, text: str) -> Score:
    fenced = re.search(r"```cpp([\s\S]*)```", text.replace("```c++", "```cpp"))
    if fenced is None:
        return Score(0.0, 0.0, extracted=False)
    right = float(not pseudo_to_code.failure(fenced[1], item.data["testcases"]))
    return Score(right, right)


EVALUATORS = {
    "path_traversal": path_traversal, "tom_tracking": tom_tracking, "countdown": countdown,
    "travel_planning": travel_planning, "html_to_tsv": html_to_tsv, "pseudo_to_code": code_score,
}  # fmt: skip
