"""What DeCRIM's loop must give in a world whose error rates are known: the exact Markov chain.

The world: a request has k independent constraints; the writer meets each with probability ``satisfied``. A critique flags a
missed constraint with probability ``recall`` and a met one with ``false_alarm``; nothing flagged ends the loop. A refinement
mends a flagged missed constraint with ``fix``, breaks a flagged met one with ``break_flagged`` and an unflagged met one with
``break_other``; an unflagged missed one stays missed. The state is the number of missed constraints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class Outcome(NamedTuple):
    """Shares of requests with all constraints met and of constraints met, and generator calls a request."""

    instruction: float
    constraint: float
    generations: float


def binomial(n: int, p: float) -> Vector:
    """Probabilities of 0 to n successes."""
    return np.array([comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)])


@dataclass(frozen=True)
class Rates:
    """The world's rates. ``omitted``: probability that the decomposer leaves a constraint out, so that it is never
    critiqued."""

    constraints: int = 4
    recall: float = 1.0
    false_alarm: float = 0.0
    satisfied: float = 0.85
    fix: float = 0.6
    break_flagged: float = 0.15
    break_other: float = 0.03
    omitted: float = 0.0

    def __post_init__(self) -> None:
        rates = {name: value for name, value in self.__dict__.items() if name != "constraints"}
        if self.constraints < 1 or not all(0 <= value <= 1 for value in rates.values()):
            raise ValueError(f"at least 1 constraint and rates in [0, 1], got {self}")

    def _listed(self, count: int, rounds: int) -> Outcome:
        """``count`` of the constraints are on the decomposer's list. State: [missed on the list, missed off it]."""
        off = self.constraints - count
        open_ = np.outer(binomial(count, 1 - self.satisfied), binomial(off, 1 - self.satisfied))
        done = np.zeros_like(open_)
        if count == 0:  # no list, no loop
            open_, done, rounds = done, open_, 0
        generations = 1.0
        spoil = [np.convolve(np.eye(1, m + 1, m)[0], binomial(off - m, self.break_other)) for m in range(off + 1)]
        for _ in range(rounds):
            after = np.zeros_like(open_)
            for missed in range(count + 1):
                met = count - missed
                accepted = (1 - self.recall) ** missed * (1 - self.false_alarm) ** met
                done[missed] += accepted * open_[missed]
                kept = binomial(missed, 1 - self.recall * self.fix)
                broken = self.false_alarm * self.break_flagged + (1 - self.false_alarm) * self.break_other
                # The case of no flag at all is no refinement; it is taken out of the product of independent flags.
                moved = np.convolve(kept, binomial(met, broken))
                moved -= accepted * np.convolve(np.eye(1, missed + 1, missed)[0], binomial(met, self.break_other))
                for off_missed in range(off + 1):
                    after += open_[missed, off_missed] * np.outer(moved, spoil[off_missed])
            open_ = after
            generations += open_.sum()
        total = open_ + done
        missed_all = np.add.outer(np.arange(count + 1), np.arange(off + 1))
        return Outcome(float(total[0, 0]), float(1 - (total * missed_all).sum() / self.constraints), float(generations))

    def decrim(self, rounds: int) -> Outcome:
        """DeCRIM with at most ``rounds`` refinements; the last answer is returned."""
        weights = binomial(self.constraints, 1 - self.omitted)
        parts = [self._listed(count, rounds) for count in range(self.constraints + 1) if weights[count]]
        return Outcome(*(float(np.dot(weights[weights > 0], column)) for column in zip(*parts, strict=True)))

    def best_of(self, n: int) -> Outcome:
        """Best of n with the same critic: the first answer without a flag, else the one with the fewest, earliest of
        equals."""
        k, met = self.constraints, self.satisfied
        flagged = met * self.false_alarm + (1 - met) * self.recall
        flags = binomial(k, flagged)
        least = np.append(np.cumsum(flags[::-1])[::-1], 0.0)
        fewest = least[:-1] ** n - least[1:] ** n
        of_flagged = met * self.false_alarm / flagged if flagged else 0.0
        of_free = met * (1 - self.false_alarm) / (1 - flagged) if flagged < 1 else 0.0
        counts = np.arange(k + 1)
        right = of_flagged**counts * of_free ** (k - counts)
        share = (counts * of_flagged + (k - counts) * of_free) / k
        calls = sum((1 - flags[0]) ** number for number in range(n))
        return Outcome(float(fewest @ right), float(fewest @ share), float(calls))

    def vague(self, rounds: int) -> Outcome:
        """Self-refine without a judgement: every round one constraint, drawn at random, is taken for the fault."""
        k = self.constraints
        state = binomial(k, 1 - self.satisfied)
        for _ in range(rounds):
            after = np.zeros_like(state)
            for missed in range(k + 1):
                met = k - missed
                if missed:
                    mended = np.convolve(np.eye(1, missed, missed - 1)[0], [self.fix, 1 - self.fix])
                    after += state[missed] * missed / k * np.convolve(mended, binomial(met, self.break_other))
                if met:
                    spoilt = np.convolve(np.eye(1, missed + 1, missed)[0], [1 - self.break_flagged, self.break_flagged])
                    after += state[missed] * met / k * np.convolve(spoilt, binomial(met - 1, self.break_other))
            state = after
        return Outcome(float(state[0]), float(1 - state @ np.arange(k + 1) / k), float(rounds + 1))

    def gain(self, rounds: int) -> float:
        """What the loop adds to the share of requests with all constraints met."""
        return self.decrim(rounds).instruction - self.satisfied**self.constraints


def break_even(rates: Rates, rounds: int = 10, tolerance: float = 1e-6) -> float:
    """How often a critic's verdict must be right (recall = 1 - false alarm = accuracy) for the loop to gain nothing: with a
    better critic it helps, with a worse one it harms. nan where it helps, or harms, with every one."""

    def gain(accuracy: float) -> float:
        return replace(rates, recall=accuracy, false_alarm=1 - accuracy).gain(rounds)

    low, high = 0.0, 1.0
    if gain(low) >= 0 or gain(high) <= 0:
        return float("nan")
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) < 0 else (low, middle)
    return (low + high) / 2
