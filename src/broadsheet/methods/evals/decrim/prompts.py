"""What DeCRIM asks, and how the replies are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from broadsheet.core import replies
from broadsheet.core.chat import Message

_ASKED = """\
<request>
{request}
</request>

<response>
{response}
</response>
"""

DECOMPOSE = """\
Split a request into its task and its constraints.

<request>
{request}
</request>

The task is what is to be produced, without any condition on it. A constraint is one single condition that a reply can be \
checked against on its own: on content, style, format, quantity, audience or role. Word each so that it is understood \
without the request, keep exact numbers, words and names, state none twice, and add none of your own.

Answer in this form:
Task: ...
Constraints:
1. ...
2. ..."""

CRITIQUE = (
    """\
Check a response against constraints, one after the other.

"""
    + _ASKED
    + """\

Constraints:
{constraints}

For every constraint look at what the response really says (count where numbers matter), give the reason in one \
sentence and decide. A constraint that is met in part is not met. Answer with a JSON list and nothing else, one entry a
constraint: [{{"constraint": 1, "reason": "...", "met": true}}, ...]"""
)

CRITIQUE_WHOLE = (
    """\
Check a response against a request.

"""
    + _ASKED
    + """\

Does the response do everything that the request asks for, exactly as it asks? Say in a few sentences what is wrong, if \
anything, and end with a line "Verdict: met" or "Verdict: not met"."""
)

REFINE = (
    """\
Correct a response so that it meets the constraints that it misses.

"""
    + _ASKED
    + """\

All constraints:
{constraints}

Not met yet:
{failed}

Write the whole response anew. Mend what is not met, keep what already works, and meet every constraint. Answer with \
the new response only, without comments and without tags."""
)

REFINE_WHOLE = (
    """\
Improve a response.

"""
    + _ASKED
    + """\

What a reader said about it:
{feedback}

Write the whole response anew. Answer with the new response only, without comments and without tags."""
)

REPEAT = """\
{request}

Before you answer, go through these constraints; your response must meet every one of them:
{constraints}"""


def request_text(messages: Sequence[Message] | str) -> str:
    """What was asked for: a single message as it is, a conversation with the speaker before each turn."""
    if isinstance(messages, str):
        return messages
    parts = [(str(message["role"]), _text(message.get("content", ""))) for message in messages]
    return parts[0][1] if len(parts) == 1 else "\n\n".join(f"{role}: {text}" for role, text in parts)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or () if isinstance(part, Mapping))


def numbered_list(items: Sequence[str], reasons: Sequence[str] = ()) -> str:
    """One numbered line an item, with its reason where there is one."""
    lines = []
    for number, item in enumerate(items):
        line = f"{number + 1}. {' '.join(item.split())}"
        if reasons and reasons[number]:
            line += f" ({' '.join(reasons[number].split())})"
        lines.append(line)
    return "\n".join(lines)


def parse_decomposition(reply: str) -> tuple[str, list[str]]:
    """Task and constraints. Of constraints that differ in case, space or the last stop only, the first is kept; the task
    itself is no constraint."""
    part = replies.answer_part(reply)
    head, label, tail = part.rpartition("Constraints:")
    task = (replies.after_label(head if label else part, "Task:") or "").split("\n")[0].strip()
    found: dict[str, str] = {}
    for item in replies.numbered(tail if label else part):
        found.setdefault(_plain(item), item)
    found.pop(_plain(task), None)
    found.pop("", None)
    return task, [item for plain, item in found.items() if plain not in ("none", "no constraints")]


def _plain(item: str) -> str:
    return " ".join(item.casefold().split()).rstrip(".;,")


def parse_verdicts(reply: str, count: int) -> tuple[list[bool | None], list[str]]:
    """Verdict and reason for each of ``count`` constraints; None where there is none that can be read.

    Reads the JSON that was asked for, else numbered lines. Entries without numbers count only when there are exactly
    ``count`` of them; two entries on one constraint that disagree are none.
    """
    rows = _rows(reply)
    if not all(number is not None for number, _, _ in rows):
        rows = [(place + 1, said, reason) for place, (_, said, reason) in enumerate(rows)] if len(rows) == count else []
    verdicts: list[bool | None] = [None] * count
    reasons = [""] * count
    seen: set[int] = set()
    for number, said, reason in rows:
        if number is None or not 1 <= number <= count:
            continue
        place = number - 1
        verdicts[place] = said if number not in seen or verdicts[place] == said else None
        reasons[place] = reason
        seen.add(number)
    return verdicts, reasons


def _rows(reply: str) -> list[tuple[int | None, bool | None, str]]:
    """(number, verdict, reason) of every entry of a critique."""
    found = replies.json_of(reply)
    if isinstance(found, Mapping):
        found = next((value for value in found.values() if isinstance(value, list)), [found])
    if isinstance(found, list) and found and all(isinstance(entry, Mapping) for entry in found):
        return [(_number(e.get("constraint")), _said(e.get("met")), str(e.get("reason", ""))) for e in found]
    if isinstance(found, list) and found and all(isinstance(entry, bool | str | None) for entry in found):
        return [(None, _said(entry), "") for entry in found]
    rows: list[tuple[int | None, bool | None, str]] = []
    for line in re.split(r"\n(?=\s*(?:\*\*)?(?:constraint\s+)?\d+\s*[.):])", "\n" + replies.answer_part(reply), flags=re.I):
        match = re.match(r"\s*(?:\*\*)?(?:constraint\s+)?(\d+)\s*[.):](?:\*\*)?\s*(.*)", line, re.S | re.I)
        if match:
            rows.append((int(match[1]), replies.verdict(match[2]), match[2].strip()))
    return rows


def _number(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    found = re.search(r"\d+", str(value))
    return int(found[0]) if found else None


def _said(value: Any) -> bool | None:
    return value if isinstance(value, bool) else replies.verdict(value) if isinstance(value, str) else None
