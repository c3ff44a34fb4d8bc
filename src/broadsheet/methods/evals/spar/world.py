"""An instrument for SPaR: actor and refiner whose rates are known, in a world where repairs can go astray.

They answer the method's own prompts about requests of `checkable`; the state of an answer is read off its text, and so is
whether its branch of the search is *locked*: each refinement locks the branch with probability ``lock``, and no fault
is mended in a locked one any more (the text says "It is closed."). Everything measured with it is SIMULATED.
"""

from __future__ import annotations

from dataclasses import dataclass

from broadsheet.core import replies
from broadsheet.core.chat import Request as ChatRequest
from broadsheet.core.chat.simulated import Draw

from ..checkable import Checkable, SimWorld, content, sheet_of
from . import prompts

_LOCKED = "It is closed."


@dataclass(frozen=True)
class SimSPaR(SimWorld):
    """Actor and refiner in one.

    ``satisfied``: probability that a fresh answer meets a constraint; ``vote``: that one vote on a text is right; ``named``
    and ``misnamed``: that a critique names a missed and a met constraint; ``fix``: that a named fault is mended (unless
    locked); ``spoil``: that a met constraint that was not named is broken by a refinement; ``lock``: see the module.
    """

    satisfied: float = 0.8
    vote: float = 0.85
    named: float = 0.85
    misnamed: float = 0.075
    fix: float = 0.6
    spoil: float = 0.02
    lock: float = 0.0

    def reply(self, request: ChatRequest, draw: Draw) -> str:
        first = content(request, 0)
        about = self.about(first)
        if not first.startswith(prompts.JUDGE.split("\n")[0]):
            return about.write([draw.chance(f"met {n}", self.satisfied) for n in range(len(about.features))], draw)
        output = replies.tag(first, "output") or ""
        if len(request.messages) == 1:
            return self._judge(about, output, draw)
        return self._refine(about, output, content(request, 1), draw)

    def _judge(self, about: Checkable, output: str, draw: Draw) -> str:
        state = about.state(output)
        says = all(state) == draw.chance("right", self.vote)
        named = [
            feature.statement
            for place, (feature, met) in enumerate(zip(about.features, state, strict=True))
            if not says and draw.chance(f"named {place}", self.misnamed if met else self.named)
        ]
        lines = [f"- not satisfied: {statement}" for statement in named]
        return "\n".join(["Step-by-step verification:", *lines, f"Final Judgement: {'Yes' if says else 'No'}"])

    def _refine(self, about: Checkable, output: str, critique: str, draw: Draw) -> str:
        locked = _LOCKED in output or draw.chance("lock", self.lock)
        told = {line.removeprefix("- not satisfied: ") for line in critique.split("\n")}
        new = []
        for place, (feature, met) in enumerate(zip(about.features, about.state(output), strict=True)):
            if feature.statement in told:
                new.append(met or (not locked and draw.chance(f"fix {place}", self.fix)))
            else:
                new.append(met and not draw.chance(f"spoil {place}", self.spoil))
        text = about.write(new, draw, sheet_of(output), [_LOCKED] if locked else [])
        return f"Reflection on what to change: what was named.\nRefined output: [[start]] {text} [[end]]"
