"""Instruments for DeCRIM: `SimWriter` and `SimCritic`, worlds for `SimulatedChat` whose rates are those of `markov.Rates`.

They answer the method's own prompts about requests of `checkable`. The state of an answer is read off its text; the critic's
errors are put on top of the true checks. Everything measured with them is SIMULATED.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from broadsheet.core import replies
from broadsheet.core.chat import Request as ChatRequest
from broadsheet.core.chat.simulated import Draw

from ..checkable import Checkable, SimWorld, content, sheet_of
from . import prompts
from .markov import Rates


def _first_line(template: str) -> str:
    return template.split("\n")[0]


_STAGES = {
    _first_line(getattr(prompts, name)): name.lower()
    for name in ("DECOMPOSE", "CRITIQUE", "CRITIQUE_WHOLE", "REFINE", "REFINE_WHOLE")
}
#: what follows the request where the constraints are repeated
_REPEATED = prompts.REPEAT.removeprefix("{request}").split("{")[0]


def stage_of(prompt: str) -> str:
    """Which of the method's prompts this is; "generate" for a request alone."""
    return _STAGES.get(prompt.split("\n", 1)[0], "generate")


@dataclass(frozen=True)
class SimWriter(SimWorld):
    """Writes, splits and rewrites. ``invented``: probability that the decomposition has a constraint that nobody asked for.
    Where it is told only that something is wrong, it takes one constraint, drawn at random, for the fault."""

    rates: Rates = Rates()  # noqa: RUF009  # frozen
    invented: float = 0.0

    def reply(self, request: ChatRequest, draw: Draw) -> str:
        prompt = content(request).split(_REPEATED)[0]
        about, stage = self.about(prompt), stage_of(prompt)
        if stage == "decompose":
            return self._decompose(about, draw)
        if stage in ("refine", "refine_whole"):
            return self._refine(about, prompt, stage, draw)
        if stage != "generate":
            raise ValueError("a SimWriter does not judge; give DeCRIM a critic")
        count = len(about.features)
        return about.write([draw.chance(f"satisfied {n}", self.rates.satisfied) for n in range(count)], draw)

    def _decompose(self, about: Checkable, draw: Draw) -> str:
        listed = [f.statement for n, f in enumerate(about.features) if not draw.chance(f"omitted {n}", self.rates.omitted)]
        if draw.chance("invented", self.invented):
            listed.append("Keep a friendly tone throughout.")
        return f"Task: {about.task}\nConstraints:\n{prompts.numbered_list(listed)}"

    def _refine(self, about: Checkable, prompt: str, stage: str, draw: Draw) -> str:
        response = replies.tag(prompt, "response") or ""
        state = about.state(response)
        if stage == "refine":
            told = set(replies.numbered(replies.between(prompt, "Not met yet:", "Write the whole response anew.") or ""))
            flagged = [any(line.startswith(feature.statement) for line in told) for feature in about.features]
        else:
            fault = draw.pick("fault", range(len(state)))
            flagged = [place == fault for place in range(len(state))]
        new = []
        for place, (met, named) in enumerate(zip(state, flagged, strict=True)):
            if met:
                new.append(not draw.chance(f"break {place}", self.rates.break_flagged if named else self.rates.break_other))
            else:
                new.append(named and draw.chance(f"fix {place}", self.rates.fix))
        return about.write(new, draw, sheet_of(response))


@dataclass(frozen=True)
class SimCritic(SimWorld):
    """Judges each constraint: what is missed is flagged with probability ``recall``, what is met with ``false_alarm``.
    Constraints that are not the request's own count as met."""

    rates: Rates = Rates()  # noqa: RUF009  # frozen

    def reply(self, request: ChatRequest, draw: Draw) -> str:
        prompt = content(request)
        about, stage = self.about(prompt), stage_of(prompt)
        response = replies.tag(prompt, "response") or ""
        if stage == "critique_whole":
            return "It could be better in places.\nVerdict: not met"
        if stage != "critique":
            raise ValueError("a SimCritic only judges")
        truth = dict(zip((f.statement for f in about.features), about.state(response), strict=True))
        listed = replies.numbered(replies.between(prompt, "\nConstraints:\n", "For every constraint") or "")
        met = []
        for place, statement in enumerate(listed):
            right = truth.get(statement, True)
            met.append(not draw.chance(f"flag {place}", self.rates.false_alarm if right else self.rates.recall))
        return self._worded(met, draw)

    def _worded(self, met: Sequence[bool], draw: Draw) -> str:
        """As the JSON that was asked for, or as models answer instead."""
        if draw.chance("json", 0.7):
            reason = ("It is missing.", "It is there.")
            return json.dumps([{"constraint": n + 1, "reason": reason[ok], "met": ok} for n, ok in enumerate(met)])
        words = draw.pick("words", (("not satisfied", "satisfied"), ("violated", "met"), ("not met", "met"), ("no", "yes")))
        return "\n".join(f"{n + 1}. I looked for it. Verdict: {words[ok]}" for n, ok in enumerate(met))
