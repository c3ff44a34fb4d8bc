"""Users at a machine, event by event: the truth that the closed forms of `sessions` bound.

Every user uploads a document (prefill), then asks round after round: an answer is decoded, then read while others are
served.
A cache is held until it has to make room: the longest-reading user's goes first, to the host over the link, or it is dropped
and made anew when its owner asks again. Service times are given (`Service`): a datasheet's, or what a real loop measured.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from broadsheet.core.perf.events import Event, Resource, Simulation, Trace

from .sessions import SessionModel

Policy = Literal["lru", "recompute", "none"]
POLICIES = ("lru", "recompute", "none")


@dataclass(frozen=True)
class Service:
    """What work takes, in seconds: the prefill of n tokens, a decode step of users who each hold n, one way of a cache.

    ``size``: bytes of a cache of n tokens, of the ``room`` for all. ``batch``: users that a step serves at most; None: all.
    """

    prefill: Callable[[int], float]
    step: Callable[[Sequence[int]], float]
    switch: Callable[[int], float]
    size: Callable[[int], float]
    room: float
    batch: int | None = None


def service_of(model: SessionModel) -> Service:
    """The paper's formulas as service times."""

    def step(held: Sequence[int]) -> float:
        read = model.weight_bytes + sum(model.cache_bytes(tokens, "decode") for tokens in held)
        return read / (model.tp * model.on.bandwidth * model.on.efficiency.memory)

    return Service(model.prefill_s, step, model.switch_s, model.cache_bytes, model.room())


@dataclass(frozen=True)
class Session:
    """A document of ``tokens`` at ``arrival`` (seconds), then ``rounds`` answers of ``answer`` tokens, each read for
    ``think_s`` on average."""

    tokens: int
    rounds: int = 5
    answer: int = 250
    think_s: float = 60.0
    arrival: float = 0.0

    def __post_init__(self) -> None:
        if min(self.tokens, self.rounds, self.answer) < 1 or self.think_s < 0 or self.arrival < 0:
            raise ValueError(f"tokens, rounds and answer are at least 1, times not negative; got {self}")


def read_trace(path: str | Path, rounds: int = 1, think_s: float = 0.0) -> list[Session]:
    """Sessions from a CSV with arrived_at, num_prefill_tokens and num_decode_tokens (the convention of vidur and of Azure's
    traces). Raises ValueError."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [
            Session(int(row["num_prefill_tokens"]), rounds, int(row["num_decode_tokens"]), think_s, float(row["arrived_at"]))
            for row in rows
        ]
    except (OSError, KeyError, ValueError) as error:
        wanted = "arrived_at, num_prefill_tokens, num_decode_tokens"
        raise ValueError(f"{path} is no trace of sessions: it wants the columns {wanted} ({error})") from None


@dataclass
class SimReport:
    """What happened. Times in seconds; ``shares``: parts of the time in which the machine did what."""

    seconds: float
    sessions: int
    rounds: int
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    responses: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    swaps: int = 0
    recomputed: int = 0
    in_response: float = 0.0  #: the time integral of users who wait for an answer
    warm: float = 0.0  #: when every user had its first answer, and so its prefill
    warm_rounds: int = 0  #: answers until then
    trace: Trace = field(default_factory=Trace)
    _begun: int = 0

    @property
    def sessions_per_hour(self) -> float:
        return 3600 * self.sessions / self.seconds if self.seconds else 0.0

    @property
    def rounds_per_hour(self) -> float:
        return 3600 * self.rounds / self.seconds if self.seconds else 0.0

    @property
    def steady_rounds_per_hour(self) -> float:
        """Answers an hour since every user had its first: documents do not arrive all at once."""
        left = self.seconds - self.warm
        return 3600 * (self.rounds - self.warm_rounds) / left if left > 0 else 0.0

    def answered(self, users: int, first: bool, now: float) -> None:
        """Counts an answer; ``first``: its user's."""
        self.rounds += 1
        if first:
            self._begun += 1
            if self._begun == users:
                self.warm, self.warm_rounds = now, self.rounds

    @property
    def shares(self) -> dict[str, float]:
        return {what: time / self.seconds for what, time in self.busy.items()}

    def little(self) -> tuple[float, float]:
        """Mean number of users in response, and rate times mean response: equal, by Little's law."""
        return self.in_response / self.seconds, self.rounds / self.seconds * statistics.mean(self.responses or [0.0])

    def quantiles(self) -> dict[str, tuple[float, float]]:
        """Median and 95th percentile of the time to the first token and between tokens."""
        named = {"first token": self.first_token, "token": self.per_token}
        both = {name: np.quantile(times or [math.nan], (0.5, 0.95)) for name, times in named.items()}
        return {name: (float(middle), float(high)) for name, (middle, high) in both.items()}


@dataclass(eq=False)
class _User:
    """Who asks: what its cache takes, and whether that is held, on the host, or nowhere."""

    name: str
    session: Session
    place: Literal["held", "host", "nowhere"] = "nowhere"
    reading: bool = False
    since: float = 0.0
    left: int = 0
    served: bool = False
    done: Event | None = None


class _Machine:
    """Compute, memory and link, and who waits for them."""

    def __init__(self, service: Service, policy: Policy, overlap: bool, trace: bool):
        self.simulation = Simulation()
        self.service, self.policy, self.overlap = service, policy, overlap
        self.compute, self.link = Resource(self.simulation), Resource(self.simulation)
        self.door = Resource(self.simulation)  # one after the other is let in, so that nobody is overtaken for ever
        self.prefills: deque[_User] = deque()
        self.decoding: deque[_User] = deque()
        self.users: list[_User] = []
        self.free = service.room
        self.awake, self.space = self.simulation.event(), self.simulation.event()
        self.report = SimReport(0.0, 0, 0, busy={"prefill": 0.0, "decode": 0.0, "switch": 0.0})
        self.traced = trace
        self.waiting, self.changed = 0, 0.0
        self.simulation.process(self.work(), "machine")

    # --- compute: prefills first, then a step for all who decode ---

    def work(self) -> Generator[Any, Any, None]:
        while True:
            while not self.simulation.settled:  # whoever comes at this very time is served in the same batch
                yield 0.0
            if self.prefills:
                user = self.prefills.popleft()
                yield from self.busy("prefill", self.service.prefill(user.session.tokens), user.name)
                self._ready(user)
            elif self.decoding:
                count = self.service.batch or len(self.decoding)
                batch = [self.decoding.popleft() for _ in range(min(count, len(self.decoding)))]
                steps = yield from self.decode(batch)
                for user in batch:
                    user.left -= steps
                    if user.left:
                        self.decoding.append(user)
                    else:
                        self._ready(user)
            else:
                self.awake = self.simulation.event()
                yield self.awake

    def decode(self, batch: Sequence[_User]) -> Generator[Any, Any, int]:
        """As many steps as change nothing: until the first has its answer; or the one under way when somebody comes."""
        step = self.service.step([user.session.tokens for user in batch])
        steps = 1 if self.decoding else min(user.left for user in batch)
        with self.compute.request() as turn:
            yield turn
            begun = self.simulation.now
            self.awake, end = self.simulation.event(), self.simulation.after(steps * step)
            yield self.simulation.any_of([end, self.awake])
            if not end.fired:
                steps = min(steps, math.floor((self.simulation.now - begun) / step) + 1)
                yield max(0.0, begun + steps * step - self.simulation.now)
        self.spend("decode", steps * step, f"{len(batch)} users")
        return steps

    def busy(self, what: str, seconds: float, name: str) -> Generator[Any, Any, None]:
        with self.compute.request() as turn:
            yield turn
            yield seconds
        self.spend(what, seconds, name)

    def spend(self, what: str, seconds: float, name: str) -> None:
        self.report.busy[what] += seconds
        if self.traced and len(self.report.trace.spans) < 20_000:
            now = self.simulation.now
            self.report.trace.add(name, ("machine", what), now - seconds, now)

    def _ready(self, user: _User) -> None:
        assert user.done is not None
        user.done.fire()

    def ask(self, line: deque[_User], user: _User) -> Event:
        user.done = self.simulation.event()
        line.append(user)
        self.wake()
        return user.done

    def wake(self) -> None:
        if not self.awake.fired:
            self.awake.fire()

    # --- memory: make room, bring back ---

    def transfer(self, user: _User) -> Generator[Any, Any, None]:
        seconds = self.service.switch(user.session.tokens)
        with self.link.request() as turn:
            yield turn
            yield seconds
        self.spend("switch", seconds, user.name)

    def let_in(self, user: _User) -> Generator[Any, Any, None]:
        """Room for a user's cache, and the cache in it.

        Copies that stop compute stop it once for both ways: no step is taken between one cache's way out and another's in.
        """
        size = self.service.size(user.session.tokens)
        if size > self.service.room:
            room = f"there is room for {self.service.room / 1e9:.2f}"
            raise ValueError(f"a cache of {user.session.tokens} tokens takes {size / 1e9:.2f} GB; {room}")
        before = user.place
        with self.door.request() as turn:
            yield turn
            while user.place != "held":
                with nullcontext() if self.overlap else self.compute.request(priority=-1.0) as stop:
                    if stop:
                        self.wake()
                        yield stop
                    if (yield from self.make_room(size)):
                        self.free -= size
                        user.place = "held"
                        if before == "host":
                            yield from self.transfer(user)
                if user.place != "held":
                    self.space = self.simulation.event()
                    yield self.space
        if before == "nowhere":
            self.report.recomputed += user.since > 0
            yield self.ask(self.prefills, user)

    def make_room(self, size: float) -> Generator[Any, Any, bool]:
        """Whether there is room for ``size``, after the longest readers' caches went."""
        while self.free < size:
            readers = [one for one in self.users if one.place == "held" and one.reading]
            if self.policy == "none" or not readers:
                return False
            victim = min(readers, key=lambda one: one.since)
            # From now on: who asks while its cache is on its way out has to bring it back.
            victim.place = "host" if self.policy == "lru" else "nowhere"
            if self.policy == "lru":
                yield from self.transfer(victim)
            self.free += self.service.size(victim.session.tokens)
            self.report.swaps += 1
        return True

    def gave_room(self) -> None:
        if not self.space.fired:
            self.space.fire()

    def count(self, change: int) -> None:
        now = self.simulation.now
        self.report.in_response += self.waiting * (now - self.changed)
        self.waiting, self.changed = self.waiting + change, now

    # --- users ---

    def attend(self, user: _User, think: Callable[[], float]) -> Generator[Any, Any, None]:
        """One session from its document to its last answer."""
        session = user.session
        user.place, user.since, user.reading = "nowhere", 0.0, False
        for _ in range(session.rounds):
            asked = self.simulation.now
            self.count(+1)
            held = user.place == "held"
            user.reading = False
            if not held:
                yield from self.let_in(user)
            begun = self.simulation.now
            user.left = session.answer
            yield self.ask(self.decoding, user)
            now = self.simulation.now
            each = (now - begun) / session.answer
            self.report.first_token.append(begun + each - asked)
            self.report.per_token.append(each)
            self.report.responses.append(now - asked)
            self.count(-1)
            self.report.answered(len(self.users), not user.served, now)
            user.served = True
            user.reading, user.since = True, now
            self.gave_room()
            yield think()
        if user.place == "held":
            self.free += self.service.size(session.tokens)
        user.place, user.reading = "nowhere", False
        self.gave_room()
        self.report.sessions += 1


def simulate(
    service: Service,
    sessions: Session | Iterable[Session],
    users: int = 1,
    repeats: int = 20,
    policy: Policy = "lru",
    overlap: bool = True,
    random_think: bool = True,
    seed: int = 0,
    trace: bool = False,
    seconds: float | None = None,
) -> SimReport:
    """Runs a closed system (a `Session` that each of ``users`` repeats, until together they have had ``repeats`` times
    ``users`` of them, or for so many ``seconds``) or a trace of arriving sessions.

    policy: "lru" swaps the longest reader's cache to the host, "recompute" drops it, "none" lets nobody in until a session
    ends. overlap: transfers go on beside compute. random_think: reading times are exponential, else all the mean. The same
    seed gives the same run. Raises ValueError.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is of {', '.join(POLICIES)}; got '{policy}'")
    if users < 1 or repeats < 1:
        raise ValueError("users and repeats are at least 1")
    machine = _Machine(service, policy, overlap, trace)
    roll = np.random.default_rng(seed)
    closed = isinstance(sessions, Session)
    every = [sessions] * users if isinstance(sessions, Session) else sorted(sessions, key=lambda one: one.arrival)
    if not every:
        raise ValueError("there is no session: the trace is empty")
    goal = users * repeats if closed else len(every)
    over = machine.simulation.event()

    def think(session: Session) -> Callable[[], float]:
        return lambda: float(roll.exponential(session.think_s)) if random_think else session.think_s

    def live(number: int, session: Session) -> Generator[Any, Any, None]:
        user = _User(f"user {number + 1}", session)
        machine.users.append(user)
        yield session.arrival
        while True:
            yield from machine.attend(user, think(session))
            enough = seconds is None and machine.report.sessions >= goal
            if enough and not over.fired:
                over.fire()
            if not closed or enough:
                machine.users.remove(user)
                return

    for number, session in enumerate(every):
        machine.simulation.process(live(number, session), f"user {number + 1}")
    machine.simulation.run(until=over if seconds is None else seconds)
    machine.count(0)
    machine.report.seconds = machine.simulation.now
    return machine.report
