"""`SimulatedChat`: an instrument, not a model.

It answers from a hidden *world* whose error rates are known, so that a method's measured gain can be held to a closed form.
Every draw is a function of (seed, what was asked, the number of the sample, what is drawn for), so results depend neither on
the order of calls nor on how many run at once, and a resumed run equals an uninterrupted one. Names begin with ``sim:``, and
whatever is printed from it says SIMULATED. Methods never see the world; only tests and audits may.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol, TypeVar

from .protocol import Choice, Request, Usage

T = TypeVar("T")


class Draw:
    """Randomness of one answer: the same question and sample always draw the same for the same ``kind``."""

    def __init__(self, key: str):
        self._keyed = hashlib.blake2b(f"{key}\0".encode("utf-8", "surrogatepass"), digest_size=8)

    def uniform(self, kind: str) -> float:
        """In (0, 1)."""
        hashed = self._keyed.copy()  # the key may be a long prompt: it is hashed once
        hashed.update(kind.encode("utf-8", "surrogatepass"))
        return (int.from_bytes(hashed.digest(), "big") + 0.5) / 2**64

    def chance(self, kind: str, probability: float) -> bool:
        return self.uniform(kind) < probability

    def normal(self, kind: str, mean: float = 0.0, deviation: float = 1.0) -> float:
        return mean + deviation * NormalDist().inv_cdf(min(max(self.uniform(kind), 1e-12), 1 - 1e-12))

    def pick(self, kind: str, options: Sequence[T]) -> T:
        return options[min(math.floor(self.uniform(kind) * len(options)), len(options) - 1)]


class World(Protocol):
    """What a simulated model knows and how it errs."""

    def reply(self, request: Request, draw: Draw) -> str:
        """The answer to one request."""
        ...


@dataclass(frozen=True)
class Faults:
    """Probabilities, a call each, that the answer is a refusal, empty, or cut in its middle."""

    refuse: float = 0.0
    empty: float = 0.0
    truncate: float = 0.0

    def __post_init__(self) -> None:
        if min(self.refuse, self.empty, self.truncate) < 0 or self.refuse + self.empty + self.truncate > 1:
            raise ValueError("fault rates are probabilities whose sum is at most 1")


SOUND = Faults()


class SimulatedChat:
    """A backend that answers from ``world``; see the module. ``seconds``: how long an answer takes."""

    def __init__(self, world: World, name: str = "sim:model", seed: int = 0, faults: Faults = SOUND, seconds: float = 0.0):
        if not name.startswith("sim:"):
            raise ValueError(f"names of simulated models begin with sim:, got '{name}'")
        self.world, self.name, self.seed, self.faults, self.seconds = world, name, seed, faults, seconds
        self.identity = f"seed {seed} {faults}"

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return [self._answer(request, sample, first=sample == samples[0]) for sample in samples]

    async def close(self) -> None:
        pass

    def _answer(self, request: Request, sample: int, first: bool) -> Choice:
        # A server is told the number of a sample only through the request's seed.
        asked = request.content if request.seed is None else Request.of(**{**_fields(request), "seed": None}).content
        draw = Draw(f"{self.name}\0{self.seed}\0{(request.seed or 0) + sample}\0{asked}")
        text, reason, fault = self.world.reply(request, draw), "stop", draw.uniform("fault")
        if fault < self.faults.refuse:
            text = "I'm sorry, but I can't help with that."
        elif fault < self.faults.refuse + self.faults.empty:
            text = ""
        elif fault < self.faults.refuse + self.faults.empty + self.faults.truncate:
            text, reason = text[: len(text) // 2], "length"
        prompt = -(-request.most_tokens // 4) if first else 0  # four bytes a token, as for English
        return Choice(text, reason, Usage(1, prompt, -(-len(text) // 4)))


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}
