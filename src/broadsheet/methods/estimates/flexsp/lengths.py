"""Sequence lengths: files of them, and a generator that is fitted to what is known of a corpus.

A file has one integer a line, as the authors' have (PKU-DAIR/Hetu-Galvatron, branch flexsp, galvatron/datasets).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import ndtr

#: what is known of a corpus
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


def read_lengths(path: str | Path) -> list[int]:
    """The lengths in a file. Raises ValueError, naming the line, for what is no positive integer."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read lengths from {path}: {error}") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            length = int(line)
        except ValueError:
            length = 0
        if length < 1:
            raise ValueError(f"{path}, line {number}: '{line.strip()[:40]}' is no length; give one positive integer a line")
        found.append(length)
    if not found:
        raise ValueError(f"{path} holds no lengths: give one positive integer a line")
    return found


def padded(lengths: Sequence[int], devices: int) -> list[int]:
    """Each rounded up to a multiple of 2 x devices, as the authors do, so that every group can split it evenly."""
    unit = 2 * devices
    return [-(-length // unit) * unit for length in lengths]


def describe(lengths: Sequence[int]) -> dict[str, Any]:
    """Number, mean and quantiles."""
    array = np.asarray(lengths)
    quantiles = {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(array, QUANTILES), strict=True)}
    return {"n": len(array), "mean": float(array.mean()), "max": int(array.max()), "quantiles": quantiles}


@dataclass(frozen=True)
class LengthMixture:
    """A lognormal body and, with probability ``tail``, a Pareto tail from ``start`` on: ln s ~ N(mu, sigma²), or
    P(s > x) = (start/x)^shape."""

    mu: float
    sigma: float
    tail: float
    start: float
    shape: float

    def cdf(self, lengths: Any) -> np.ndarray:
        s = np.asarray(lengths, float)
        pareto = np.where(s > self.start, 1 - (self.start / np.maximum(s, self.start)) ** self.shape, 0.0)
        return (1 - self.tail) * ndtr((np.log(s) - self.mu) / self.sigma) + self.tail * pareto

    @property
    def mean(self) -> float:
        body = np.exp(self.mu + self.sigma**2 / 2)
        return float((1 - self.tail) * body + self.tail * self.start * self.shape / (self.shape - 1))

    def draw(self, count: int, seed: int = 0, longest: int | None = None) -> list[int]:
        """``count`` lengths of at most ``longest`` tokens; longer ones are left out, not cut. Raises ValueError where hardly
        any are so short."""
        if longest is not None and self.cdf(max(longest, 1)) < 0.01:
            raise ValueError(f"less than 1 % of sequences have at most {longest} tokens: allow longer ones")
        rng, found = np.random.default_rng(seed), np.empty(0, np.int64)
        while len(found) < count:
            body = np.exp(rng.normal(self.mu, self.sigma, count))
            far = self.start * (1 - rng.random(count)) ** (-1 / self.shape)
            drawn = np.where(rng.random(count) < self.tail, far, body)
            drawn = drawn[drawn <= (longest or np.iinfo(np.int64).max)]
            found = np.concatenate([found, np.maximum(1, drawn.round()).astype(np.int64)])
        return found[:count].tolist()

    @classmethod
    def fit(cls, known: Mapping[str, Any]) -> LengthMixture:
        """The mixture whose distribution and mean are nearest to what `describe` says, in log odds and log."""
        at = np.array([known["quantiles"][f"{q:g}"] for q in QUANTILES])
        wanted = np.array(QUANTILES)

        def mixture(x: np.ndarray) -> LengthMixture:
            tail = 1 / (1 + np.exp(-x[2]))
            return cls(float(x[0]), float(np.exp(x[1])), float(tail), float(np.exp(x[3])), float(1.05 + np.exp(x[4])))

        def distance(x: np.ndarray) -> np.ndarray:
            candidate = mixture(x)
            p = np.clip(candidate.cdf(at), 1e-9, 1 - 1e-9)
            odds = np.log(p / (1 - p)) - np.log(wanted / (1 - wanted))
            return np.append(odds, np.log(candidate.mean / known["mean"]))

        begin = np.array([np.log(at[0]), 0.0, -3.0, np.log(at[3]), 0.0])
        return mixture(least_squares(distance, begin).x)


@cache
def corpora() -> dict[str, dict[str, Any]]:
    """What is known of public corpora (lengths.json, see its origin), by name."""
    return json.loads(Path(__file__).with_name("lengths.json").read_text(encoding="utf-8"))


@cache
def corpus(name: str) -> LengthMixture:
    """The generator fitted to a corpus. Raises ValueError for one that is not known."""
    known = corpora()
    if name not in known:
        raise ValueError(f"no corpus '{name}'; there is {', '.join(sorted(known))}, or give a file with one length a line")
    return LengthMixture.fit(known[name])
