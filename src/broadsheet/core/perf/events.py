"""One discrete-event core for every simulator: a clock, processes that wait, and what they wait for.

A process is a generator. It yields a number to let so much time pass, or an `Event` to wait for it and get its value::

    simulation = Simulation()
    gpu = Resource(simulation, capacity=1)

    def request(name, seconds):
        with gpu.request() as turn:
            yield turn                      # in line
            yield seconds                   # at work
        return name

    last = [simulation.process(request(name, 2.0)) for name in "abc"][-1]
    simulation.run(until=last)              # "c"; simulation.now is 6.0

What happens at the same time happens in the order in which it was scheduled, so that a run is the same every time. The unit
of time is the user's; `Trace` wants seconds. Nothing here knows of GPUs or models.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import TracebackType
from typing import Any, Self

#: what a process is made of: yields delays and events, gets their values, returns its own
Steps = Generator[Any, Any, Any]


class Interrupted(Exception):
    """Thrown into a process that `Process.interrupt` was called on; ``cause`` says why."""

    def __init__(self, cause: Any = None):
        super().__init__(cause)
        self.cause = cause


@dataclass(frozen=True)
class Preemption:
    """The cause of an interrupt by a `Resource`: which request took the place, and since when it had been held."""

    by: Request
    since: float


# --- clock --------------------------------------------------------------------------------------------------------------


class Simulation:
    """The clock and what is still to happen. ``now``: the time, from 0; ``happened``: how many events are past."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self.active: Process | None = None  #: the process at work, for resources to know whom to interrupt
        self.alive: dict[Process, None] = {}  #: processes that have not ended, oldest first
        self._order = 0
        # (time, order, who is woken, with what); the order makes entries unique, so that nothing else is ever compared
        self._agenda: list[tuple[float, int, Any, Any]] = []

    def process(self, steps: Steps, name: str = "") -> Process:
        """Starts a process, now but after what was scheduled before it. The process is an event: its end, and its value."""
        return Process(self, steps, name)

    def event(self) -> Event:
        """An event that somebody will `fire`."""
        return Event(self)

    def call(self, delay: float, function: Callable[[], Any]) -> None:
        """Calls a function after a delay: for what needs no process."""
        self._schedule(delay, _Call(function), None)

    def all_of(self, events: Iterable[Event]) -> Event:
        """Fires when all have; its value is the list of theirs."""
        return _Gather(self, list(events), every=True)

    def any_of(self, events: Iterable[Event]) -> Event:
        """Fires with the first; its value is the event that fired."""
        return _Gather(self, list(events), every=False)

    def after(self, delay: float, value: Any = None) -> Event:
        """An event that fires by itself: a time-out to wait for beside other events."""
        event = Event(self)
        self.call(delay, lambda: event.fire(value))
        return event

    @property
    def settled(self) -> bool:
        """Nothing else happens at this time. A scheduler that yields 0 until then decides when all who come now are there;
        only one process may wait so."""
        return not self._agenda or self._agenda[0][0] > self.now

    def run(self, until: float | Event | None = None) -> Any:
        """Runs until a time, an event (returns its value), or until nothing is left to happen.

        Raises RuntimeError when an event is waited for that can no longer happen, naming the processes that wait for ever.
        """
        agenda = self._agenda
        end = until if isinstance(until, int | float) else math.inf
        goal = until if isinstance(until, Event) else None
        while agenda and (goal is None or not goal.fired):
            if agenda[0][0] > end:
                break
            self.now, order, target, value = heappop(agenda)
            self.happened += 1
            target._wake(order, value)
        if goal is not None:
            if not goal.fired:
                waiting = ", ".join(process.name for process in list(self.alive)[:5])
                raise RuntimeError(f"nothing is left to happen at {self.now:g}; still waiting: {waiting or 'nobody'}")
            return goal.value
        if math.isfinite(end):
            self.now = max(self.now, end)
        return None

    def _schedule(self, delay: float, target: Any, value: Any) -> int:
        if not delay >= 0:  # nan too
            raise ValueError(f"a delay of {delay} leads into the past")
        self._order += 1
        heappush(self._agenda, (self.now + delay, self._order, target, value))
        return self._order


class _Call:
    __slots__ = ("function",)

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def _wake(self, order: int, value: Any) -> None:
        self.function()


class Event:
    """Something that happens once. ``fired``, and then ``value``."""

    __slots__ = ("_waiting", "fired", "simulation", "value")

    def __init__(self, simulation: Simulation):
        self.simulation = simulation
        self.fired = False
        self.value: Any = None
        self._waiting: list[Any] = []

    def fire(self, value: Any = None) -> Self:
        """Happens now: whoever waits goes on at this time, in the order of arrival."""
        if self.fired:
            raise RuntimeError("an event happens once")
        self.fired, self.value = True, value
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one._notice(self)
        return self

    def _wait(self, who: Any) -> None:
        if self.fired:
            who._notice(self)
        else:
            self._waiting.append(who)


class _Gather(Event):
    __slots__ = ("events", "every", "missing")

    def __init__(self, simulation: Simulation, events: list[Event], every: bool):
        super().__init__(simulation)
        self.events, self.every, self.missing = events, every, len(events)
        if not events:
            self.fire([] if every else None)
        for event in events:
            event._wait(self)

    def _notice(self, event: Event) -> None:
        self.missing -= 1
        if self.fired:
            return
        if not self.every:
            self.fire(event)
        elif self.missing == 0:
            self.fire([one.value for one in self.events])


class Process(Event):
    """A running generator; as an event it is its end, with what it returned."""

    __slots__ = ("_steps", "_target", "name")

    def __init__(self, simulation: Simulation, steps: Steps, name: str = ""):
        super().__init__(simulation)
        self.name = name or getattr(steps, "__name__", "process")
        self._steps = steps
        simulation.alive[self] = None
        #: what it waits for: an event, or the order of its entry in the agenda; any other wake-up is out of date
        self._target: Any = simulation._schedule(0.0, self, None)

    def interrupt(self, cause: Any = None) -> None:
        """Throws `Interrupted` into it, now; what it waited for goes on without it. Nothing happens if it has ended."""
        if not self.fired:
            self._target = None
            self.simulation._schedule(0.0, self, Interrupted(cause))

    def kill(self) -> None:
        """Ends it: its ``with`` and ``finally`` blocks run, its value is None."""
        if not self.fired:
            self._steps.close()
            self._end(None)

    def _notice(self, event: Event) -> None:
        if self._target is event:
            self._target = self.simulation._schedule(0.0, self, event.value)

    def _wake(self, order: int, value: Any) -> None:
        interrupt = isinstance(value, Interrupted)
        if self.fired or (self._target != order and not interrupt):  # every interrupt arrives, however many at one time
            return
        simulation = self.simulation
        before, simulation.active = simulation.active, self
        try:
            step = self._steps.throw(value) if interrupt else self._steps.send(value)
        except StopIteration as stop:
            self._end(stop.value)
            return
        finally:
            simulation.active = before
        if isinstance(step, Event):
            self._target = step
            step._wait(self)
        elif isinstance(step, int | float):
            self._target = simulation._schedule(step, self, None)
        else:
            raise TypeError(f"process '{self.name}' yielded {step!r}: yield a delay or an event")

    def _end(self, value: Any) -> None:
        del self.simulation.alive[self]
        self.fire(value)


# --- what processes share -----------------------------------------------------------------------------------------------


class Request(Event):
    """A turn on a resource: fires when granted. As a context manager it gives back what it holds, or leaves the line."""

    __slots__ = ("arrival", "priority", "process", "resource", "since", "state")

    def __init__(self, resource: Resource, priority: float, arrival: int):
        super().__init__(resource.simulation)
        self.resource, self.priority, self.arrival = resource, priority, arrival
        self.process = resource.simulation.active
        self.state = "waiting"  # then "held", then "gone"
        self.since = math.nan

    def release(self) -> None:
        """Gives the place back, or leaves the line; a second time does nothing."""
        self.resource._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


class Resource:
    """``capacity`` places. Who waits is served by priority (a lower number first), then in the order of arrival.

    A request with ``preempt=True`` takes the place of the holder with the worst priority if that is worse than its own; the
    holder's process is interrupted with a `Preemption`. ``busy_time``: the integral of places held over time.
    """

    def __init__(self, simulation: Simulation, capacity: int = 1):
        if capacity < 1:
            raise ValueError(f"a resource needs a capacity of at least 1, not {capacity}")
        self.simulation, self.capacity = simulation, capacity
        self.held: set[Request] = set()
        self._line: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._gone = 0  # requests in the line that have left it
        self._busy, self._changed = 0.0, 0.0

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line) - self._gone

    @property
    def busy_time(self) -> float:
        return self._busy + len(self.held) * (self.simulation.now - self._changed)

    def request(self, priority: float = 0.0, preempt: bool = False) -> Request:
        """Asks for a place; yield what comes back."""
        self._arrivals += 1
        request = Request(self, priority, self._arrivals)
        if len(self.held) < self.capacity:
            self._grant(request)
        elif preempt and (victim := self._victim()) is not None and victim.priority > priority:
            self._free(victim)
            self._grant(request)
            victim.process.interrupt(Preemption(request, victim.since))  # type: ignore[union-attr]  # see _victim
        else:
            heappush(self._line, (priority, request.arrival, request))
        return request

    def use(self, duration: float, priority: float = 0.0, preempt: bool = False) -> Steps:
        """``yield from`` it: in line, at work for ``duration`` in all, and after a preemption in line again for the rest."""
        left = duration
        while True:
            with self.request(priority, preempt) as turn:
                try:
                    yield turn
                    yield left
                    return
                except Interrupted as interrupt:
                    cause = interrupt.cause
                    if not isinstance(cause, Preemption) or cause.by.resource is not self or turn.state != "gone":
                        raise
                    left -= self.simulation.now - cause.since
                    if left <= 0:  # it was just done
                        return

    def _victim(self) -> Request | None:
        """The holder with the worst priority, the latest of several; only processes can be interrupted."""
        return max((r for r in self.held if r.process), key=lambda r: (r.priority, r.arrival), default=None)

    def _account(self) -> None:
        self._busy, self._changed = self.busy_time, self.simulation.now

    def _grant(self, request: Request) -> None:
        self._account()
        self.held.add(request)
        request.state, request.since = "held", self.simulation.now
        request.fire(request)

    def _free(self, request: Request) -> None:
        self._account()
        self.held.remove(request)
        request.state = "gone"

    def _release(self, request: Request) -> None:
        if request.state == "waiting":
            request.state = "gone"
            self._gone += 1  # found and dropped when its turn comes
        elif request.state == "held":
            self._free(request)
            while self._line and len(self.held) < self.capacity:
                _, _, following = heappop(self._line)
                if following.state == "waiting":
                    self._grant(following)
                else:
                    self._gone -= 1


class Queue:
    """Items in transit between processes: FIFO, or by ``key`` (lowest first); at most ``capacity`` of them.

    A ``get`` that nobody waits for any more (its process was interrupted) still takes an item: withdraw it with `cancel`.
    """

    def __init__(self, simulation: Simulation, capacity: float = math.inf, key: Callable[[Any], float] | None = None):
        self.simulation, self.capacity, self.key = simulation, capacity, key
        self._items: Any = [] if key else deque()
        self._getters: deque[Event] = deque()
        self._putters: deque[tuple[Event, Any]] = deque()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Any) -> Event:
        """Fires when the item is in the queue; needs no waiting for where the capacity is unbounded."""
        event = Event(self.simulation)
        self._putters.append((event, item))
        self._move()
        return event

    def get(self) -> Event:
        """Fires with the next item."""
        event = Event(self.simulation)
        self._getters.append(event)
        self._move()
        return event

    def cancel(self, event: Event) -> None:
        """Withdraws a `get` that has not fired."""
        if event in self._getters:
            self._getters.remove(event)

    def _move(self) -> None:
        moved = True
        while moved:
            moved = False
            if self._putters and len(self._items) < self.capacity:
                event, item = self._putters.popleft()
                if self.key:
                    self._arrivals += 1
                    heappush(self._items, (self.key(item), self._arrivals, item))
                else:
                    self._items.append(item)
                event.fire(item)
                moved = True
            if self._getters and self._items:
                self._getters.popleft().fire(heappop(self._items)[2] if self.key else self._items.popleft())
                moved = True


class Link:
    """``rate`` units a second, shared equally by all transfers under way (processor sharing): a wire, a memory bus.

    Kept in virtual time, the units that each transfer present from the start would have moved: a transfer ends when that has
    grown by its size, whatever comes and goes meanwhile, so that an arrival costs O(log n).
    """

    def __init__(self, simulation: Simulation, rate: float):
        if not rate > 0:
            raise ValueError(f"a link needs a rate above 0, not {rate}")
        self.simulation, self.rate = simulation, rate
        self._ends: list[tuple[float, int, Event]] = []
        self._virtual, self._changed, self._changes = 0.0, 0.0, 0

    @property
    def active(self) -> int:
        """How many transfers share it."""
        return len(self._ends)

    def transfer(self, size: float) -> Event:
        """Fires when ``size`` units are through."""
        if not size >= 0:
            raise ValueError(f"a transfer of {size} units cannot be")
        self._advance()
        self._changes += 1
        event = Event(self.simulation)
        heappush(self._ends, (self._virtual + size, self._changes, event))
        self._plan()
        return event

    def _advance(self) -> None:
        now = self.simulation.now
        if self._ends:
            self._virtual += (now - self._changed) * self.rate / len(self._ends)
        self._changed = now

    def _plan(self) -> None:
        if self._ends:
            due, changes = self._ends[0][0], self._changes
            delay = max(0.0, due - self._virtual) * len(self._ends) / self.rate
            self.simulation.call(delay, lambda: self._finish(due, changes))

    def _finish(self, due: float, changes: int) -> None:
        if changes != self._changes:
            return  # somebody came since: planned anew then
        self._advance()
        self._virtual = max(self._virtual, due)  # no rounding error may leave a rest
        while self._ends and self._ends[0][0] <= self._virtual:
            heappop(self._ends)[2].fire()
        self._changes += 1
        self._plan()


# --- what happened ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Something that took from ``start`` to ``end`` (seconds) on a track: ("pipeline 0", "stage 3")."""

    name: str
    track: tuple[str, str]
    start: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trace:
    """Spans and arrows between them, for chrome://tracing and ui.perfetto.dev."""

    spans: list[Span] = field(default_factory=list)
    arrows: list[tuple[Span, Span]] = field(default_factory=list)

    def add(self, name: str, track: tuple[str, str] | str, start: float, end: float, **args: Any) -> Span:
        """One span; ``track`` is a group and a line of it, or a line alone."""
        if end < start:
            raise ValueError(f"'{name}' ends at {end}, before it starts at {start}")
        span = Span(name, ("", track) if isinstance(track, str) else track, start, end, args)
        self.spans.append(span)
        return span

    def arrow(self, source: Span, target: Span) -> None:
        """From the end of one to the start of another: what waited for what."""
        self.arrows.append((source, target))

    def to_chrome(self) -> dict[str, Any]:
        """The Trace Event Format: complete events (X), flow events (s, f) and names (M); times in microseconds."""
        tracks = {track: line for line, track in enumerate(dict.fromkeys(span.track for span in self.spans))}
        groups = {group: number for number, group in enumerate(dict.fromkeys(group for group, _ in tracks))}

        def at(span: Span, time: float, phase: str, **more: Any) -> dict[str, Any]:
            return {"ph": phase, "pid": groups[span.track[0]], "tid": tracks[span.track], "ts": time * 1e6, **more}

        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": group or "simulation"}}
            for group, number in groups.items()
        ]
        for (group, name), line in tracks.items():
            events.append({"ph": "M", "name": "thread_name", "pid": groups[group], "tid": line, "args": {"name": name}})
        for span in self.spans:
            events.append(at(span, span.start, "X", name=span.name, dur=(span.end - span.start) * 1e6, args=span.args))
        for number, (source, target) in enumerate(self.arrows):
            shared = {"name": "dependency", "cat": "dependency", "id": number}
            events.append(at(source, source.end, "s", **shared))
            events.append(at(target, target.start, "f", bp="e", **shared))
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def to_json(self) -> str:
        """`to_chrome` as text, to be written to a file."""
        return json.dumps(self.to_chrome(), separators=(",", ":"))
