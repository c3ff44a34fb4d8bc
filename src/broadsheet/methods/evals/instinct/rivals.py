"""What NeuralUCB competes with at the same budget: chance, a Gaussian process, evolution over texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.special import ndtr

Array = NDArray[np.float64]


@dataclass
class Random:
    """Every arm is worth a random number."""

    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng((self.seed, 2))

    def observe(self, x: Array, reward: float) -> None:
        pass

    update = observe

    def rank(self, x: Array) -> Array:
        return self._rng.random(len(x))


@dataclass
class GaussianProcess:
    """Expected improvement under a Matérn-5/2 process, as InstructZero's and botorch's `SingleTaskGP` with one length scale.

    Rewards are standardised; features too with ``standardise`` (by what was observed). Length scale, in units of the median
    distance between observed arms, and noise come from a grid by marginal likelihood, in every round.
    """

    standardise: bool = True
    lengths: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0)
    noises: Sequence[float] = (0.01, 0.1, 0.5)
    _x: list[Array] = field(default_factory=list, init=False, repr=False)
    _y: list[float] = field(default_factory=list, init=False, repr=False)

    def observe(self, x: Array, reward: float) -> None:
        self._x.append(np.asarray(x, dtype=float).reshape(-1))
        self._y.append(float(reward))

    update = observe

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and deviation [n] of the standardised reward without its noise."""
        seen = np.array(self._x)
        if self.standardise and len(seen) > 1:
            mean, deviation = seen.mean(0), seen.std(0, ddof=1)
            deviation = np.where(deviation > 0, deviation, 1.0)
            seen, x = (seen - mean) / deviation, (x - mean) / deviation
        y = self._standardised()
        among, across = _distances(seen, seen), _distances(seen, x)
        unit = float(np.median(among[np.triu_indices(len(seen), 1)])) if len(seen) > 1 else 1.0
        best, kept = -np.inf, None
        for length in self.lengths:
            kernel = matern(among / (length * unit or 1.0))
            for noise in self.noises:
                root = cholesky(kernel + noise * np.eye(len(seen)), lower=True)
                weights = cho_solve((root, True), y)
                likelihood = -0.5 * y @ weights - np.log(np.diag(root)).sum()
                if likelihood > best:
                    best, kept = likelihood, (length, root, weights)
        length, root, weights = kept  # type: ignore[misc]  # grids are not empty
        cross = matern(across / (length * unit or 1.0))
        variance = 1 - np.einsum("ij,ij->j", cross, cho_solve((root, True), cross))
        return cross.T @ weights, np.sqrt(np.maximum(variance, 1e-12))

    def rank(self, x: Array) -> Array:
        """Expected improvement [n] over the best reward seen."""
        if not self._x:
            return np.zeros(len(x))
        mean, deviation = self.predict(x)
        gain = mean - self._standardised().max()
        ratio = gain / deviation
        return gain * ndtr(ratio) + deviation * np.exp(-0.5 * ratio**2) / np.sqrt(2 * np.pi)

    def _standardised(self) -> Array:
        y = np.array(self._y)
        return (y - y.mean()) / (y.std() or 1.0)


def matern(distance: Array) -> Array:
    """The Matérn-5/2 kernel at a distance in length scales."""
    r = np.sqrt(5) * distance
    return (1 + r + r * r / 3) * np.exp(-r)


def _distances(a: Array, b: Array) -> Array:
    square = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


@dataclass
class Evolution:
    """Instructions bred from the best ones (as EvoPrompt does): two parents of the ten best, and ``breed`` makes the child.

    ``breed(first, second, draw)`` may ask a model (`rewriting`); without it words are crossed and a few are exchanged for
    others that some instruction has in that place.
    """

    breed: Callable[[str, str, np.random.Generator], str] | None = None
    pool: int = 10
    mutation: float = 0.15
    seed: int = 0
    scored: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng((self.seed, 3))

    def observe(self, text: str, reward: float) -> None:
        self.scored[text] = reward

    def child(self) -> str:
        """The next instruction to try; a new one, if ten attempts bring one."""
        parents = sorted(self.scored, key=self.scored.__getitem__, reverse=True)[: self.pool]
        text = parents[0]
        for _ in range(10):
            first, second = (parents[min(self._rng.integers(0, len(parents), 2))] for _ in range(2))
            text = (self.breed or self._crossed)(first, second, self._rng)
            if text and text not in self.scored:
                break
        return text

    def _crossed(self, first: str, second: str, rng: np.random.Generator) -> str:
        a, b = first.split(), second.split()
        others = [text.split() for text in self.scored]
        words = []
        for place in range(len(a) if rng.random() < 0.5 else len(b)):
            options = [words_[place] for words_ in (a, b) if place < len(words_)]
            if rng.random() < self.mutation:
                options = [words_[place] for words_ in others if place < len(words_)] or options
            words.append(options[rng.integers(len(options))])
        return " ".join(words)


def rewriting(chat: object) -> Callable[[str, str, np.random.Generator], str]:
    """A `breed` that asks a chat model to cross two instructions and vary the result."""

    def breed(first: str, second: str, rng: np.random.Generator) -> str:
        ask = (
            "Here are two instructions for the same task.\n"
            f"1. {first}\n2. {second}\n"
            "Combine what is good in both into one new instruction, change its wording, and write only the instruction."
        )
        choice = chat.complete(  # type: ignore[attr-defined]
            [{"role": "user", "content": ask}], tag="evolution", temperature=1.0, max_tokens=128,
            first=int(rng.integers(2**31)),
        )[0]  # fmt: skip
        return " ".join(choice.text.split()) if choice.ok else ""

    return breed
