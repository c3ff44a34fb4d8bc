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
from dataclasses import dataclass, is_dataclass, replace
from statistics import NormalDist
from typing import Protocol, TypeVar

from .protocol import NOTHING, Choice, Request, Usage, estimated_tokens

T = TypeVar("T")


class Draw:
    """Randomness of one answer: the same question and sample always draw the same for the same ``kind``."""

    def __init__(self, key: str):
        self.key = key  # perhaps a long prompt: it is hashed once
        self._hash = hashlib.blake2b(f"{key}\0".encode("utf-8", "surrogatepass"), digest_size=8)

    def uniform(self, kind: str) -> float:
        """In (0, 1)."""
        drawn = self._hash.copy()
        drawn.update(kind.encode("utf-8", "surrogatepass"))
        return (int.from_bytes(drawn.digest(), "big") + 0.5) / 2**64

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
    """A backend that answers from ``world``; see the module. ``seconds``: how long an answer takes.

    Worlds are dataclasses: two that differ in a field are two models to a ledger. A token is four bytes; replies end before
    a ``stop`` string and are cut at ``max_tokens``, as a model's are.
    """

    def __init__(self, world: World, name: str = "sim:model", seed: int = 0, faults: Faults = SOUND, seconds: float = 0.0):
        if not name.startswith("sim:"):
            raise ValueError(f"names of simulated models begin with sim:, got '{name}'")
        self.world, self.name, self.seed, self.faults, self.seconds = world, name, seed, faults, seconds
        self.identity = f"{_identity(world)} seed {seed} {faults}"

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        # A server is told the number of a sample only through the request's seed.
        asked, first = replace(request, seed=None).content, request.seed or 0
        used = Usage(1, estimated_tokens(request.size))
        choices = []
        for sample in samples:
            draw = Draw(f"{self.name}\0{self.seed}\0{first + sample}\0{asked}")
            text, reason = self._answer(request, draw)
            written = estimated_tokens(len(text.encode("utf-8", "surrogatepass")))
            choices.append(Choice(text, reason, replace(used, completion_tokens=written)))
            used = NOTHING
        return choices

    async def close(self) -> None:
        pass

    def _answer(self, request: Request, draw: Draw) -> tuple[str, str]:
        text, faults, fault = self.world.reply(request, draw), self.faults, draw.uniform("fault")
        if fault < faults.refuse:
            text = "I'm sorry, but I can't help with that."
        elif fault < faults.refuse + faults.empty:
            text = ""
        elif fault < faults.refuse + faults.empty + faults.truncate:
            return text[: len(text) // 2], "length"
        for stop in request.stop:
            text = text.split(stop, 1)[0]
        written = text.encode("utf-8", "surrogatepass")
        if len(written) > 4 * request.max_tokens:
            return written[: 4 * request.max_tokens].decode("utf-8", "ignore"), "length"
        return text, "stop"


def _identity(world: World) -> str:
    kind = f"{type(world).__module__}.{type(world).__qualname__}"
    if not is_dataclass(world):
        return kind
    return f"{kind} {hashlib.blake2b(repr(world).encode('utf-8', 'backslashreplace'), digest_size=8).hexdigest()}"
