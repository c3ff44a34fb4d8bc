"""Countdown: reach a target from four numbers by a depth-first search that is written out (paper section 3)."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from broadsheet.core.replies import answer_part

from .common import Item, Score, compare, lines_of, section

LIMIT = 2000  #: intermediate results stay below
HEADING = "# Search Procedure"
FOUND = "Now we have found the target"
DEMONSTRATIONS = (([40, 19, 23, 7], 29), ([9, 16, 6, 18], 12))

#: How it is done: what `LongProc(procedure=False)` leaves out of the prompt.
PROCEDURE = """\
Search for it step by step. In every state go through the pairs of numbers in order. For a pair (a, b) with a >= b try a \
+ b, a - b, a * b and a / b. Drop a result that is a decimal or at least 2000. Otherwise add the result to the numbers \
that are left and search on from there; with a single number left compare it with the target, and go back if it differs. \
Stop when the target is found.

"""
_PROMPT = """\
You are given four numbers and a target. Combine all four, each exactly once, by +, -, * and / so that the target results. \
Intermediate results are whole numbers, not negative, and below 2000.

{procedure}Write the search below the heading "{heading}" and the three equations between <Solution> and </Solution>, \
exactly as in this example:

Numbers: {nums0}
Target: {target0}

{answer0}

Now solve this.
Numbers: {nums}
Target: {target}
"""

#: one line of the search, the number it ends a branch with (else None), and the equations that led there
_Line = tuple[str, int | None, tuple[str, ...]]


def _indent(depth: int) -> str:
    return " " * depth + "|- "


def _pairs(nums: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    for i, j in combinations(range(len(nums)), 2):
        yield nums[i], nums[j], [n for k, n in enumerate(nums) if k not in (i, j)]


def _options(nums: Sequence[int]) -> str:
    return f"Options for choosing two numbers: {[(a, b) for a, b, _ in _pairs(nums)]}."


def _walk(nums: list[int], target: int | None, depth: int, made: tuple[str, ...]) -> Iterator[_Line]:
    """The whole search below one state, whatever is found."""
    inner = depth + (len(nums) > 2)
    for one, other, left in _pairs(nums):
        if len(nums) > 2:
            yield (
                f"{_indent(inner)}Pick two numbers ({one}, {other}) (numbers left: {left}). Try possible operations.",
                None,
                made,
            )
        a, b = max(one, other), min(one, other)
        for sign, result in (("+", a + b), ("-", a - b), ("*", a * b)):
            yield from _try(f"{a} {sign} {b} = {result}", result, left, target, inner + 1, made)
        if b == 0:
            yield f"{_indent(inner + 1)}Try {a} / {b} (invalid operation). drop this branch.", None, made
        elif a % b:
            yield f"{_indent(inner + 1)}Try {a} / {b} = {a / b:.1f}. {a / b:.1f} is a decimal, drop this branch.", None, made
        else:
            yield from _try(f"{a} / {b} = {a // b}", a // b, left, target, inner + 1, made)


def _try(
    equation: str, result: int, left: list[int], target: int | None, depth: int, made: tuple[str, ...]
) -> Iterator[_Line]:
    tried, made = f"{_indent(depth)}Try {equation}.", (*made, equation)
    if result >= LIMIT:
        yield f"{tried} {result} exceeds the maximum intermediate result, drop this branch.", None, made
    elif not left:
        end = f"== {target}, target found!" if result == target else f"!= {target}, drop this branch."
        yield f"{tried} Evaluate {result} {end}", result, made
    else:
        nums = [result, *left]
        what = f"Current number set: {nums}, target: {target}"
        what += ", just two numbers left." if len(nums) == 2 else f". {_options(nums)}"
        yield f"{tried} Add {result} to the number set. {what}", None, made
        yield from _walk(nums, target, depth, made)


def trace(nums: Sequence[int], target: int) -> str:
    """The reference answer, as the official files have it. Raises ValueError when the target cannot be reached."""
    numbers = list(nums)
    lines = [f"Initial number set: {numbers}, target: {target}. {_options(numbers)}"]
    for line, value, made in _walk(numbers, target, 0, ()):
        lines.append(line)
        if value == target:
            first, second, third = made
            back = f"Final step: {third}\nThe step before: {second}\nThe first step: {first}"
            solution = f"<Solution>\n{first}\n{second}\n{third}\n</Solution>"
            search = "\n".join(lines)
            return (
                f"{HEADING}\n{search}\n\n{FOUND}, let's trace back the solution:\n{back}\n\n"
                f"Output the solution in the required format:\n{solution}\n"
            )
    raise ValueError(f"{target} cannot be reached from {numbers}")


def _prompt(nums: Sequence[int], target: int) -> str:
    nums0, target0 = DEMONSTRATIONS[0]
    return _PROMPT.format(
        procedure=PROCEDURE,
        heading=HEADING,
        nums0=nums0,
        target0=target0,
        answer0=trace(nums0, target0),
        nums=list(nums),
        target=target,
    )


def make_countdown(steps: int, seed: int = 0, tolerance: float = 0.2) -> Item:
    """Four numbers below 50 and a target in [10, 50] that the search finds after about ``steps`` lines.

    (The official files: about 24 lines at 0.5k, 73 at 2k; the whole search has at most about 1,500.) Raises ValueError when
    no problem within ``tolerance`` of ``steps`` is found.
    """
    if steps < 8:
        raise ValueError(f"a search that succeeds has at least 8 lines, got {steps}")
    draw = random.Random(f"countdown {seed} {steps}")
    for _ in range(2000):
        nums = [draw.randint(1, 49) for _ in range(4)]
        first: dict[int, int] = {}
        for place, (_, value, _) in enumerate(_walk(nums, None, 0, ()), 2):  # the first line is the initial state
            if place > (1 + tolerance) * steps:
                break
            if value is not None:
                first.setdefault(value, place)
        near = sorted(v for v, place in first.items() if 10 <= v <= 50 and place >= (1 - tolerance) * steps)
        if near:
            target = draw.choice(near)
            return Item(_prompt(nums, target), trace(nums, target), {"nums": nums, "target": target, "steps": first[target]})
    raise ValueError(f"no search of about {steps} lines was found: ask for 8 to 1000")


# --- scoring ------------------------------------------------------------------------------------------------------------

_EQUATION = re.compile(r"\s*([0-9]{1,9})\s*([-+*/])\s*([0-9]{1,9})\s*=\s*([0-9]{1,9})\s*")


def flaw(nums: Sequence[int], target: int, solution: str) -> str:
    """What is wrong with three equations, or "". Nothing is evaluated but two whole numbers and a sign."""
    equations = [line for line in solution.splitlines() if line.strip()]
    if len(equations) != 3:
        return f"{len(equations)} equations instead of 3"
    have = Counter(int(n) for n in nums)
    for equation in equations:
        read = _EQUATION.fullmatch(equation)
        if read is None:
            return f"'{equation[:80]}' is not of the form a + b = c with whole numbers and + - * /"
        a, sign, b, c = int(read[1]), read[2], int(read[3]), int(read[4])
        right = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and b * c == a}[sign]
        if not right or c >= LIMIT:
            return f"'{equation.strip()}' does not hold" if not right else f"{c} is not below {LIMIT}"
        for number in (a, b):
            if have[number] == 0:
                return f"{number} is not there to be used"
            have[number] -= 1
        have[c] += 1
    left = [number for number, count in have.items() if count]
    return "" if left == [target] else f"{left} is left instead of {target}"


def _search(text: str) -> list[str]:
    _, heading, rest = text.rpartition(HEADING)
    for end in (FOUND, "<Solution>"):
        rest = rest.partition(end)[0]
    return lines_of(rest) if heading else []


def parts(item: Item) -> tuple[str, list[str], str]:
    head, _, tail = item.reference.partition(f"\n\n{FOUND}")
    return f"{HEADING}\n", head.split("\n")[1:], f"\n\n{FOUND}{tail}"


def score(item: Item, text: str) -> Score:
    """Accuracy: the three equations are right, use the numbers and keep the rules, whatever the search (any solution
    counts). Partial: of the search alone, so that a bare solution has accuracy 1 and partial 0."""
    prefix, partial, difference = compare(_search(answer_part(text)), wanted := _search(item.reference))
    found = section(text, "Solution")
    if found is None or not found[1]:
        return Score(0.0, partial, prefix, len(wanted), False, evidence=difference or "no closed <Solution>")
    wrong = flaw(item.data["nums"], item.data["target"], found[0])
    return Score(float(not wrong), partial, prefix, len(wanted), True, evidence=wrong or difference)
