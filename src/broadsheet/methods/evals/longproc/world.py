"""An instrument: writes the reference line by line, and errs. It knows the answers; methods never see it.

Every line goes wrong with probability ``error``. After a wrong line the writer is derailed: all that follows is wrong, but
for a chance ``recovery`` a line to get back on the rails. A solution at the end is right when the writer is on the rails
there. So, for a trace of L lines,

- a line t is right with probability r_t = pi + (1 - pi) (1 - e - q)^t, with pi = q / (e + q) (`line_share` is its mean over
  lines);
- a trace is right with probability (1 - e)^L, whatever q (`accuracy`);
- the right prefix is on average sum_j (1 - e)^j e j / L + (1 - e)^L of the trace (`prefix_share`).
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw

from .common import Item

_AFTER_WORDS = string.punctuation + string.whitespace


def accuracy(error: float, lines: int) -> float:
    return (1 - error) ** lines


def prefix_share(error: float, lines: int) -> float:
    """The expected share of a trace before its first wrong line (1 where there is none)."""
    right = 1 - error
    return sum(right**j * error * j / lines for j in range(lines)) + right**lines


def line_share(error: float, recovery: float, lines: int) -> float:
    """The expected share of lines that are right."""
    on, total = 1.0, 0.0
    for _ in range(lines):
        on = on * (1 - error) + (1 - on) * recovery
        total += on
    return total / lines


def spoiled(line: str) -> str:
    """A line that says something else in its last word."""
    end = len(line.rstrip(_AFTER_WORDS))
    start = max(line.rfind(" ", 0, end), line.rfind("\t", 0, end)) + 1
    return f"{line[:start]}nowhere{line[end:]}"


@dataclass(frozen=True)
class LineByLine:
    """``tasks``: the module of every prompt's task; ``items``: what to answer. See the module."""

    items: Iterable[tuple[ModuleType, Item]]
    error: float = 0.01
    recovery: float = 0.0
    _known: dict[str, tuple[ModuleType, Item]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.error <= 1 or not 0 <= self.recovery <= 1:
            raise ValueError(f"error and recovery are probabilities, got {self.error} and {self.recovery}")
        self._known.update({item.prompt: (task, item) for task, item in self.items})

    def reply(self, request: Request, draw: Draw) -> str:
        asked = request.messages if isinstance(request.messages, str) else str(request.messages[-1]["content"])
        return self.answer(*self._known[asked], draw)

    def answer(self, task: ModuleType, item: Item, draw: Draw) -> str:
        """One answer to an item."""
        head, lines, tail = task.parts(item)
        on, written = True, []
        for number, line in enumerate(lines):
            if line.strip():
                chance = self.error if on else self.recovery
                on ^= draw.chance(f"line {number}", chance)
            written.append(line if on else spoiled(line))
        if not on:  # the answer below the trace is wrong too; its tags are not
            tail = "\n".join(
                part if part.startswith("<") or not part.strip() else spoiled(part) for part in tail.split("\n")
            )
        return head + "\n".join(written) + tail
