"""Instrument: a black box whose taste in instructions is known, over a space in which features determine the texts.

An instruction is a few slots, each filled by the word that one of fixed linear heads on x(z) prefers, so that (as with a
real white box) the features decide the text and many z share one. The true score is a logistic of the words' qualities and
one pair that goes well together; a measured score is a binomial share of 20, the same for the same text and draw. The
features never contain the score. Everything printed from here says SIMULATED.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw

from .space import InstructionSpace, domain

Array = NDArray[np.float64]


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


@dataclass
class BlackBox:
    """A world and its space. ``size`` points in ``d`` dimensions, ``width`` features, ``slots`` of ``words`` words.

    ``roughness``: how fast features turn with z. ``samples``: trials behind a measured score. ``noise_free`` scores are the
    true ones. `easy` and `hard` are the two worlds of the study.
    """

    d: int = 10
    slots: int = 5
    words: int = 8
    size: int = 4000
    width: int = 64
    roughness: float = 1.0
    samples: int = 20
    seed: int = 0
    flat: bool = False  #: every instruction is equally good: nothing to find
    space: InstructionSpace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng((20231005, self.seed))
        z = domain(self.size, self.d, self.seed)
        into = rng.normal(0, 1, (self.d, 96)) * self.roughness * 2 / np.sqrt(self.d / 10)
        hidden = np.tanh((z - 0.5) @ into + rng.normal(0, 0.5, 96))
        x = np.tanh(hidden @ rng.normal(0, 1.5 / np.sqrt(96), (96, self.width)) * 2)
        heads = rng.normal(0, 1, (self.slots, self.width, self.words))
        chosen = np.stack([(x @ head).argmax(1) for head in heads], axis=1)
        texts = [" ".join(f"s{slot}w{word}" for slot, word in enumerate(row)) for row in chosen]
        self.quality = rng.normal(0, 1, (self.slots, self.words))
        self._bonus = tuple(rng.integers(0, self.words, 2))
        # The scale is set by the texts that can be said: the mean is about .08, the best nearly 1.
        raw = np.array([self._raw(text) for text in dict.fromkeys(texts)])
        self._shift, self._slope = _calibrated(raw)
        self.space = InstructionSpace(z, x, texts.__getitem__)

    def _raw(self, text: str) -> float:
        words = {int(slot): int(word) for slot, word in re.findall(r"\bs(\d+)w(\d+)\b", text)}
        total = sum(self.quality[slot, word] for slot, word in words.items() if slot < self.slots and word < self.words)
        return float(total + 1.5 * ((words.get(0), words.get(1)) == self._bonus))

    def truth(self, text: str) -> float:
        """The probability that the black box answers right under this instruction."""
        if self.flat:
            return 0.5
        return float(1 / (1 + np.exp(-self._slope * (self._raw(text) - self._shift))))

    def __call__(self, text: str) -> float:
        return self.fresh(text, 0)

    def fresh(self, text: str, number: int) -> float:
        """The share that was right on draw ``number`` of the validation samples."""
        if self.flat:
            return 0.5
        rng = np.random.default_rng(_number(self.seed, text, number))
        return float(rng.binomial(self.samples, self.truth(text)) / self.samples)

    @property
    def best(self) -> float:
        """The true score of the best instruction of the space."""
        return max(self.truth(text) for text in set(self.space.texts(range(self.size))))


def easy(seed: int = 0) -> BlackBox:
    """10 dimensions, a smooth map, 5 slots."""
    return BlackBox(seed=seed)


def hard(seed: int = 0) -> BlackBox:
    """40 dimensions, a rough map, 4 slots."""
    return BlackBox(d=40, slots=4, roughness=2.5, seed=seed)


def _calibrated(raw: Array) -> tuple[float, float]:
    """Shift and slope of the logistic that give the best text .98 and all texts a mean of .08."""
    top, low, high = raw.max(), 0.05, 50.0
    for _ in range(60):  # the mean falls as the slope grows about the best
        slope = (low + high) / 2
        shift = top - np.log(0.98 / 0.02) / slope
        if float((1 / (1 + np.exp(-slope * (raw - shift)))).mean()) > 0.08:
            low = slope
        else:
            high = slope
    return float(shift), float(slope)


@dataclass(frozen=True)
class Answering:
    """`BlackBox` as a model to talk to: it gives the right output of an example with the instruction's probability.

    ``keys``: input -> output, hidden from the method. ``decide``: "draw" tosses a coin for every example; "rule" is
    deterministic: an example is answered when its difficulty, a hash in [0, 1), is below the instruction's score.
    ``score``: instruction -> probability.
    """

    keys: dict[str, str]
    score: object
    decide: str = "draw"

    def reply(self, request: Request, draw: Draw) -> str:
        text = request.messages if isinstance(request.messages, str) else str(request.messages[-1]["content"])
        asked = re.search(r"Instruction: (.*?)\n\nInput: (.*?)\n+Output:", text, re.S)
        if not asked:
            return "What is the instruction?"
        instruction, given = asked[1], asked[2]
        probability = self.score(instruction)  # type: ignore[operator]
        if self.decide == "rule":
            right = _number("difficulty", given) / 2**64 < probability
        else:
            right = draw.chance("right", probability)
        return self.keys[given] if right else "something else"
