"""Instructions that code can check: `Constraint` says whether a text obeys, why, and how a text would obey or not.

A constraint that is honest has a *witness*, a text that passes, and a *violation*, one that fails: without the first nobody
can obey it, without the second it asks for nothing. `verified` builds both and tries them; what cannot be compiled, or lacks
one, is `Unverifiable`, an outcome of its own that is never a pass. A blank text obeys nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """Whether a text obeys, and what was seen."""

    ok: bool
    evidence: str

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Unverifiable:
    """What cannot be checked by code here, and why."""

    reason: str
    kind: str = ""


@dataclass(frozen=True)
class Constraint:
    """One checkable demand.

    ``kind``: its type, dotted or with a colon ("length_constraints:number_words"); ``text``: the demand in words. ``test``
    takes a text that is not blank. ``good`` and ``bad`` make the witness and the violation.
    """

    kind: str
    text: str
    test: Callable[[str], Verdict] = field(compare=False, repr=False)
    good: Callable[[], str] = field(compare=False, repr=False)
    bad: Callable[[], str] = field(compare=False, repr=False)

    def check(self, text: str) -> Verdict:
        """Whether ``text`` obeys. Raises ValueError for what is not a string."""
        if not isinstance(text, str):
            raise ValueError(f"a constraint checks a string, got {type(text).__name__}")
        if not text.strip():
            return Verdict(False, "the text is blank")
        return self.test(text)

    def witness(self) -> str:
        """A text that passes."""
        return self.good()

    def violation(self) -> str:
        """A text that fails and is not blank."""
        return self.bad()


def verified(constraint: Constraint) -> Constraint | Unverifiable:
    """The constraint, if its witness passes and its violation fails; else why it asks for nothing or for too much."""
    try:
        good, bad = constraint.witness(), constraint.violation()
    except ValueError as error:
        return Unverifiable(f"no text that tells: {error}", constraint.kind)
    if not constraint.check(good):
        return Unverifiable("no text is known that passes", constraint.kind)
    if not bad.strip() or constraint.check(bad):
        return Unverifiable("no text is known that fails", constraint.kind)
    return constraint


@dataclass(frozen=True)
class Range:
    """How many there may be: ``low`` to ``high``, both included; ``high`` None is no upper limit."""

    low: int = 0
    high: int | None = None

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < 0):
            raise ValueError(f"a number of things is at least 0, got {self.low} to {self.high}")

    def __contains__(self, count: int) -> bool:
        return self.low <= count and (self.high is None or count <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low}"
        if self.low == self.high:
            return f"exactly {self.low}"
        return f"at most {self.high}" if self.low == 0 else f"{self.low} to {self.high}"

    def inside(self) -> int:
        """A number that is in it, and not 0 where it can be helped. Raises ValueError when there is none."""
        if self.high is not None and self.high < self.low:
            raise ValueError(f"nothing is at least {self.low} and at most {self.high}")
        if self.high is None:
            return max(self.low, 1)
        return max(self.low, min(1, self.high))

    def outside(self) -> int:
        """A number that is not in it. Raises ValueError when there is none."""
        if self.high is not None:
            return self.high + 1
        if self.low == 0:
            raise ValueError("any number will do")
        return self.low - 1


def counted(
    kind: str, noun: str, allowed: Range, count: Callable[[str], int], make: Callable[[int], str], text: str = ""
) -> Constraint:
    """A limit of how many ``noun`` a text holds; ``make(n)`` writes one with n of them."""

    def test(value: str) -> Verdict:
        found = count(value)
        return Verdict(found in allowed, f"{found} {noun}, asked for {allowed}")

    return Constraint(
        kind, text or f"{allowed} {noun}", test, lambda: make(allowed.inside()), lambda: make(allowed.outside())
    )
