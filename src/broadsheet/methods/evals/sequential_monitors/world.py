"""Instrument `SimMonitor`: a monitor whose evidence and reading noise are known. Everything printed from it says SIMULATED.

Behind every opaque request stands evidence e ~ N(mean, 1) in a harmful task and N(0, 1) in a benign one. Asked about a list,
the instrument reads sum(e) / sqrt(n) with noise, and answers with its logistic. Shown one request it is a single-request
filter, shown all so far a sequential monitor: the same instrument, only what it is shown differs.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from broadsheet.core.chat.protocol import Request
from broadsheet.core.chat.simulated import Draw

from . import SequentialMonitor
from .prompts import unlisted
from .scoring import NEVER, Trace
from .tasks import Task


@dataclass(frozen=True)
class Secret:
    """What stands behind a request: its evidence, the task it was written for, and a draw of N(0, 1) for how relevant it
    looks."""

    evidence: float
    owner: str
    look: float


def make_world(
    count: int, seed: int = 0, mean: float = 0.9, lengths: tuple[int, int] = (4, 11)
) -> tuple[list[Task], dict[str, Secret]]:
    """``count`` tasks, every second one harmful (at its last request), and what stands behind their requests."""
    draw = random.Random(f"monitor world {seed}")
    tasks, secrets = [], {}
    for number in range(count):
        harmful, length = number % 2 == 0, draw.randint(*lengths)
        name = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=5).hexdigest()
        texts = tuple(f"request {name}-{step}" for step in range(length))
        tasks.append(Task(name, texts, length if harmful else None))
        for text in texts:
            secrets[text] = Secret(draw.gauss(mean if harmful else 0.0, 1), name, draw.gauss(0, 1))
    return tasks, secrets


@dataclass(frozen=True)
class SimMonitor:
    """``noise``: of reading a list, which grows by ``fatigue`` with every further request.

    ``focus``: how well requests of other tasks are told apart and left out (0: not at all). The task is the one that most
    requests of the list were written for; each request is weighted by a logistic of ``focus`` times what it looks like,
    N(1, 1) for the task's own and N(-1, 1) for others.

    A reading depends on ``seed`` and what is shown alone, so that `scores` gives what a monitor over a chat is told.
    """

    secrets: Mapping[str, Secret] = field(repr=False)
    noise: float = 0.3
    fatigue: float = 0.0
    focus: float = 0.0
    seed: int = 0

    def reply(self, request: Request, draw: Draw) -> str:
        shown = unlisted(str(request.messages[-1]["content"]))  # type: ignore[index]
        return f"{self.score(shown):.6f}"

    def score(self, shown: Sequence[str]) -> float:
        """In (0, 1)."""
        behind = [self.secrets[text] for text in shown]
        task = Counter(one.owner for one in behind).most_common(1)[0][0]
        weights = [self._weight(one, task) for one in behind]
        total = sum(weight * one.evidence for weight, one in zip(weights, behind, strict=True))
        size = math.sqrt(sum(weight * weight for weight in weights))
        noise = self.noise + self.fatigue * (len(shown) - 1)
        error = Draw("\0".join([str(self.seed), *shown])).normal("reading", 0, noise)
        return 1 / (1 + math.exp(-(total / size + error)))

    def scores(self, monitor: SequentialMonitor, tasks: Sequence[Task]) -> list[Trace]:
        """What ``monitor`` reads at every step of ``tasks``, without asking a chat for each."""
        found = []
        for task in tasks:
            ends = range(1, len(task.subtasks) + 1)
            views = [monitor.view(task.subtasks[:end], last=end == len(task.subtasks)) for end in ends]
            found.append(Trace(task, tuple(round(self.score(view), 6) if view else NEVER for view in views)))
        return found

    def _weight(self, one: Secret, task: str) -> float:
        return 1 / (1 + math.exp(-self.focus * (one.look + (1 if one.owner == task else -1))))
