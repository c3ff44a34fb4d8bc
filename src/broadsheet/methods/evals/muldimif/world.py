"""Instruments for MulDimIF: a responder and an author whose error rates are known. What they give is SIMULATED."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw
from broadsheet.core.constraints.demands import Demand, compose

from .compiling import demand_of
from .items import _MAKERS, Item, woven
from .taxonomy import category

BASE = {"Content": 0.93, "Format": 0.85, "Length": 0.75, "Language": 0.90}
PENALTY = {"Example": 0.0, "Listing": 0.03, "Incorporation": 0.06}


@dataclass
class SimResponder:
    """Satisfies each constraint with probability base[category] - penalty[pattern], else breaks it deliberately.

    It knows the items' structured constraints by their prompts. Items whose chosen mixture cannot be written get a blank
    answer; those of our grammar can all be.
    """

    items: Sequence[Item]
    base: Mapping[str, float] = field(default_factory=lambda: BASE)
    penalty: Mapping[str, float] = field(default_factory=lambda: PENALTY)

    def __post_init__(self) -> None:
        self._known = {item.prompt: item for item in self.items}

    def chance(self, main: str, pattern: str) -> float:
        return min(1.0, max(0.0, self.base[main] - self.penalty[pattern]))

    def _demands(self, item: Item) -> list[tuple[str, Demand]]:
        pairs = [(category(*triple[:2])[0], demand_of(*triple)) for triple in item.constraints]
        return [(main, demand) for main, demand in pairs if isinstance(demand, Demand)]

    def reply(self, request: Request, draw: Draw) -> str:
        item = self._known[request.messages[-1]["content"]]  # type: ignore[index]  # a chat, never a string
        wanted = [
            (demand, draw.chance(f"constraint {place}", self.chance(main, item.pattern)))
            for place, (main, demand) in enumerate(self._demands(item))
        ]
        try:
            return compose(wanted, seed=math.floor(draw.uniform("text") * 1e6))
        except ValueError:
            return ""

    def truth(self, item: Item) -> float:
        """The probability that an item is satisfied."""
        return math.prod(self.chance(main, item.pattern) for main, _ in self._demands(item))

    def expected(self, level: str = "", pattern: str = "", main: str = "") -> tuple[float, float]:
        """(accuracy, its standard error) in closed form, for a level, a pattern or a main category."""
        chances = []
        for item in self.items:
            if level not in ("", item.level) or pattern not in ("", item.pattern):
                continue
            parts = [self.chance(one, item.pattern) for one, _ in self._demands(item) if main in ("", one)]
            if parts:
                chances.append(math.prod(parts))
        mean = sum(chances) / len(chances)
        return mean, math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)


#: texts that no answer can satisfy
_CONFLICTS = {
    "Content": ("Keywords: Must include", "The answer must include the keyword 'dusk' and must not contain the word 'dusk'"),
    "Format": ("Markdown: Heading levels", "Use at least 3 heading levels and no headings at all"),
    "Language": ("English: All Uppercase", "The answer must be in all uppercase letters and in all lowercase letters"),
    "Length": ("Words: Range", "The answer must be at most 10 words and at least 50 words"),
}


@dataclass(frozen=True)
class SimAuthor:
    """Writes expansions that contradict themselves at rate ``conflict`` and leave a constraint out of the question at rate
    ``omission``; checks them, missing a fault at ``miss`` and seeing one where there is none at ``alarm`` (the same for both
    questions, independently). ``broken``: the rate of replies without a field."""

    conflict: float = 0.25
    omission: float = 0.2
    miss: float = 0.1
    alarm: float = 0.05
    broken: float = 0.0

    def reply(self, request: Request, draw: Draw) -> str:
        text = request.messages[-1]["content"]  # type: ignore[index]  # a chat, never a string
        data = json.loads(text.rsplit("DATA\n", 1)[1])
        if "count" in data:
            return self._expand(data, draw)
        if text.startswith("Rewrite"):
            return json.dumps({"question": woven(data["question"], [one[2] for one in data["constraints"]])})
        bad, lacking = faults(data["question"], data["constraints"])
        conflict = not draw.chance("miss conflict", self.miss) if bad else draw.chance("alarm conflict", self.alarm)
        lacks = not draw.chance("miss omission", self.miss) if lacking else draw.chance("alarm omission", self.alarm)
        if text.startswith("Does"):
            return f"Let me see.\nCovers: {'no' if lacks else 'yes'}"
        return f"Let me see.\nConflict: {'yes' if conflict else 'no'}\nComplete: {'no' if lacks else 'yes'}"

    def _expand(self, data: dict[str, Any], draw: Draw) -> str:
        main, roll = data["main"], random.Random(draw.key)
        new = []
        for name in roll.sample(list(_MAKERS[main]), data["count"]):
            sub, _, said = _MAKERS[main][name](roll)
            new.append([main, sub, said])
        if draw.chance("conflict", self.conflict):
            new[-1] = [main, *_CONFLICTS[main]]
        told = new[:-1] if draw.chance("omission", self.omission) else new
        question = f"{data['question']} {' '.join(one[2] + '.' for one in told)}".strip()
        reply = {"reasoning": "It fits.", "constraints": data["constraints"] + new, "question": question}
        if draw.chance("broken", self.broken):
            del reply["question"]
        return json.dumps(reply)

    def kept_bad(self) -> tuple[float, float]:
        """Share of bad versions without and with the two questions, in closed form (one expansion)."""
        c, o, m, a = self.conflict, self.omission, self.miss, self.alarm
        kept = (c * m + (1 - c) * (1 - a)) * (o * m + (1 - o) * (1 - a))
        return 1 - (1 - c) * (1 - o), 1 - (1 - c) * (1 - a) * (1 - o) * (1 - a) / kept


def faults(question: str, constraints: Sequence[Sequence[str]]) -> tuple[bool, bool]:
    """The truth about what the author wrote: (contradictory, something left out of the question)."""
    impossible = {text for _, text in _CONFLICTS.values()}
    lacking = any(one[2].lower().rstrip(".") not in question.lower() for one in constraints)
    return any(one[2] in impossible for one in constraints), lacking
