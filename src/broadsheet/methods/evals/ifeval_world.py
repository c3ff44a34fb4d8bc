"""IFEval's real prompts for the simulated worlds: texts whose true verdicts are those of the official checks.

An answer is put together from texts that pass or fail each instruction (`core.constraints`), and is checked as a whole; a
prompt is taken only if every combination of met and missed instructions was found. What a loop does with such answers is
SIMULATED; what counts as met is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

from broadsheet.core.chat.simulated import Draw
from broadsheet.core.constraints import Constraint, Verdict
from broadsheet.core.constraints.ifeval import Item
from broadsheet.core.constraints.texts import WORDS

State = tuple[bool, ...]


@dataclass(frozen=True)
class Told:
    """An instruction in words."""

    statement: str


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt of IFEval with a text for every combination of met and missed instructions."""

    prompt: str
    checkers: tuple[Constraint, ...]
    texts: dict[State, str]

    @property
    def task(self) -> str:
        return "Do what is asked."

    @property
    def features(self) -> tuple[Told, ...]:
        return tuple(Told(checker.text) for checker in self.checkers)

    def state(self, text: str) -> State:
        return _state(self.checkers, text)

    def write(self, state: Sequence[bool], draw: Draw, sheet: str = "", notes: Sequence[str] = ()) -> str:
        """A text with that state. Words that change nothing are added where that is possible, so that two drafts differ."""
        text = self.texts[tuple(state)]
        mark = " ".join(draw.pick(f"mark {n}", WORDS) for n in range(4))
        for marked in (
            f"{text}\n\n{mark}",
            f"{mark}\n\n{text}",
            text.replace(" ", f" {mark} ", 1),
            f"{text} {mark.upper()}",
        ):
            if self.state(marked) == tuple(state):
                return marked
        return text


@lru_cache(maxsize=200_000)
def _state(checkers: tuple[Constraint, ...], text: str) -> State:
    return tuple(checker.check(text).ok for checker in checkers)


def prompts(items: Iterable[Item]) -> list[Prompt]:
    """The prompts whose instructions can be met and missed in every combination by texts that are found here, and no two of
    which are equal."""
    found: dict[str, Prompt] = {}
    for item in items:
        checkers = tuple(one for one in item.checkers if isinstance(one, Constraint))
        if len(checkers) == len(item.checkers) and (texts := _texts(checkers)):
            found.setdefault(item.prompt.strip(), Prompt(item.prompt, checkers, texts))
    return list(found.values())


def _texts(checkers: Sequence[Constraint]) -> dict[State, str]:
    """A text for every state, or nothing. Tried are the witnesses and violations in every order, and these in one case or
    without commas."""
    found: dict[State, str] = {}
    states = list(product((True, False), repeat=len(checkers)))
    for wanted in states:
        parts = [checker.witness() if ok else checker.violation() for checker, ok in zip(checkers, wanted, strict=True)]
        for order, join in product(permutations(parts), ("\n\n", " ", "\n")):
            text = join.join(order)
            for variant in dict.fromkeys((text, text.lower(), text.upper(), text.replace(",", ""))):
                found.setdefault(tuple(checker.check(variant).ok for checker in checkers), variant)
            if len(found) == len(states):
                return found
    return {}


def checker_as_critic(
    prompt: Prompt, recall: float = 1.0, false_alarm: float = 0.0, seed: int = 0
) -> Callable[..., list[Verdict]]:
    """The official checks as a critic that sees a missed instruction with probability ``recall`` and takes a met one
    for missed with ``false_alarm``; always the same for the same text. (1, 0) is the oracle."""

    def critic(text: str, constraints: Sequence[str]) -> list[Verdict]:
        rng = random.Random(f"{seed}\0{prompt.prompt}\0{text}")
        flags = [rng.random() < (false_alarm if ok else recall) for ok in prompt.state(text)]
        return [Verdict(not flag, "") for flag in flags]

    return critic
