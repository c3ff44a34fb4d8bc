"""`Chat`: asks a model, in order, within limits, and never twice for what it was told already."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from .ledger import Ledger
from .protocol import (
    NOTHING,
    Backend,
    BudgetSpent,
    ChatError,
    Choice,
    Message,
    Price,
    Request,
    RequestRefused,
    Transient,
    Unreachable,
    Usage,
)

A = TypeVar("A")
B = TypeVar("B")

#: So many requests in a row may come to nothing before a run whose endpoint did answer earlier is ended.
_DEAD = 8
#: The longest pause, in seconds, that a server is granted.
_PATIENCE = 600.0
#: What is no answer to the question and is asked for again when the run goes on.
_NO_ANSWER = ("error", "context", "content_filter")

# --- one event loop for all chats ---------------------------------------------------------------------------------------
# HTTP connections belong to the event loop that opened them, and the library is called from scripts, notebooks (which
# have a loop of their own) and Inspect (which has another). So all chats live on one loop in a thread of their own.

_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None
_starting = threading.Lock()


def _background() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _starting:
        if _loop is None or _thread is None or not _thread.is_alive():  # dead in a forked process
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="broadsheet-chat", daemon=True)
            _thread.start()
    return _loop


def run(work: Coroutine[Any, Any, A]) -> A:
    """The result of a coroutine, run on the chats' event loop; ctrl-C cancels it and what it waits for."""
    loop = _background()
    if threading.current_thread() is _thread:
        work.close()
        raise RuntimeError("already on the chats' event loop: await the asynchronous twin instead")
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        raise


async def here(work: Coroutine[Any, Any, A]) -> A:
    """Awaits a coroutine that must run on the chats' event loop, from whichever loop."""
    loop = _background()
    if asyncio.get_running_loop() is loop:
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


async def in_order(
    function: Callable[[A], Awaitable[B]], items: Iterable[A], limit: int, done: Callable[[int], None] | None = None
) -> list[B]:
    """``function`` of every item, at most ``limit`` at once; results in the order of the items.

    ``done(count)`` is called after each. The first exception cancels the rest and is raised, once the calls under way are
    answered and stored.
    """
    waiting = enumerate(items)
    results: dict[int, B] = {}

    async def work() -> None:
        for place, item in waiting:
            results[place] = await function(item)
            if done:
                done(len(results))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, limit)):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[place] for place in range(len(results))]


# --- limits ---------------------------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Hard limits of what chats may use; None is no limit. Several chats may share one.

    A call is sent only if its worst case (`Request.most_tokens` read, ``max_tokens`` written a sample) fits into what is
    left beside the calls under way, so that no limit is ever exceeded. What was cut off after it was sent counts with its
    worst case, since it may have been charged. Answers from the ledger are free.
    """

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None  #: US dollars; needs the chat's ``price``
    spent: Usage = NOTHING
    _reserved: Usage = field(default=NOTHING, repr=False)
    _under_way: int = field(default=0, repr=False)
    _settled: asyncio.Condition = field(default_factory=asyncio.Condition, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("calls", "tokens", "money"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise ValueError(f"a budget of {name} is at least 0, got {limit}")

    @property
    def limited(self) -> bool:
        return (self.calls, self.tokens, self.money) != (None, None, None)

    async def reserve(self, worst: Usage) -> None:
        """Waits until ``worst`` fits beside the calls under way. Raises `BudgetSpent` once it never will."""
        async with self._settled:
            while name := self._lacks(self.spent + self._reserved + worst):
                if not self._under_way or self._lacks(self.spent + worst):
                    limit, spent = getattr(self, name), getattr(self.spent, name)
                    raise BudgetSpent(
                        f"the budget of {limit:g} {name} is spent ({spent:g} used; the next call could take "
                        f"{getattr(worst, name):g}): raise it and run again, answers so far are kept"
                    )
                await self._settled.wait()  # calls under way may turn out cheaper than their worst case
            self._reserved, self._under_way = self._reserved + worst, self._under_way + 1

    async def settle(self, worst: Usage, cost: Usage) -> None:
        """A call is over that had reserved ``worst`` and took ``cost``."""
        async with self._settled:
            self.spent, self._under_way = self.spent + cost, self._under_way - 1
            self._reserved = self._reserved - worst if self._under_way else NOTHING  # no dust of rounding
            self._settled.notify_all()

    def _lacks(self, total: Usage) -> str:
        """A limit that ``total`` exceeds, or ""."""
        for name in ("calls", "tokens", "money"):
            limit = getattr(self, name)
            if limit is not None and getattr(total, name) > limit + 1e-12:
                return name
        return ""


class _Rate:
    """So many requests a minute, evenly, and none while the server asks for a pause."""

    def __init__(self, per_minute: float | None):
        if per_minute is not None and not per_minute > 0:
            raise ValueError(f"requests a minute must be more than 0, got {per_minute}")
        self.pause = 60.0 / per_minute if per_minute else 0.0
        self.next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        start = max(self.next, now)
        self.next = start + self.pause
        if start > now:
            await asyncio.sleep(start - now)

    def hold(self, seconds: float) -> None:
        self.next = max(self.next, time.monotonic() + seconds)


# --- the client -----------------------------------------------------------------------------------------------------------


class Chat:
    """A model to talk to, over any backend.

    ``ledger``: a `Ledger`, a path, or None for one in memory. ``concurrency``: calls under way at once. ``price``: what
    tokens cost. ``budget``: hard limits, which may be shared by several chats. ``tries``: attempts at a call whose failure
    may pass (429, 5xx, time-outs, garbage), with pauses that double within ``backoff`` seconds, or as ``Retry-After`` says
    (for all calls of the chat).

    Answers come in the order of the requests, whatever the order in which they arrive. A truncated or refused answer is a
    `Choice` that is not ``ok``: a failure to be counted by whoever asked. ``used`` says what was paid for, by tag;
    ``replayed`` what the ledger gave. Whoever is cancelled waits for its call under way, so that what was paid for is kept.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ledger: Ledger | str | Path | None = None,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        price: Price | None = None,
        budget: Budget | None = None,
        tries: int = 5,
        backoff: tuple[float, float] = (1.0, 20.0),
    ):
        if concurrency < 1 or tries < 1:
            raise ValueError("concurrency and tries must be at least 1")
        if budget and budget.money is not None and price is None:
            raise ValueError("a budget of money needs the price of tokens")
        self.backend = backend
        self._own_ledger = not isinstance(ledger, Ledger)
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger or ":memory:")
        self.concurrency = concurrency
        self.price = price or Price()
        self.budget = budget or Budget()
        self.tries, self.backoff = tries, backoff
        self.used: dict[str, Usage] = defaultdict(Usage)
        self.replayed: dict[str, Usage] = defaultdict(Usage)
        self._rate = _Rate(requests_per_minute)
        self._places = asyncio.Semaphore(concurrency)
        self._under_way: dict[str, asyncio.Future[Choice]] = {}
        self._answered = self._dead = 0

    @property
    def name(self) -> str:
        """What tables call the model; names of instruments begin with ``sim:``."""
        return self.backend.name

    @property
    def spent(self) -> Usage:
        """What was paid for in all."""
        return sum(self.used.values(), NOTHING)

    def complete(self, messages: Sequence[Message] | str, *, n: int = 1, tag: str = "", **parameters: Any) -> list[Choice]:
        """``n`` answers; see `acomplete`."""
        return run(self.acomplete(messages, n=n, tag=tag, **parameters))

    async def acomplete(
        self, messages: Sequence[Message] | str, *, n: int = 1, tag: str = "", first: int = 0, **parameters: Any
    ) -> list[Choice]:
        """``n`` answers to a chat, or completions of a string: samples number ``first`` to ``first + n - 1``.

        ``parameters``: fields of `Request` (temperature, top_p, max_tokens, stop, seed, logprobs, response_format, tools).
        ``tag``: the stage that the call is counted under. Raises `ChatError` where the run cannot go on.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        request = Request.of(messages, **parameters)
        return await here(self._complete(request, range(first, first + n), tag))

    def map(
        self, function: Callable[[A], Awaitable[B]], items: Iterable[A], done: Callable[[int], None] | None = None
    ) -> list[B]:
        """``function`` of every item, as many at once as calls may be under way; results in order."""
        return run(in_order(function, items, self.concurrency, done))

    async def aclose(self) -> None:
        """Closes the backend, and the ledger unless it was given open."""
        await here(self.backend.close())
        if self._own_ledger:
            self.ledger.close()

    def close(self) -> None:
        run(self.aclose())

    async def _complete(self, request: Request, samples: Sequence[int], tag: str) -> list[Choice]:
        identity = f"{self.backend.name}\0{self.backend.identity}"
        keys = {sample: request.key(identity, sample) for sample in samples}
        found: dict[int, Choice] = {}
        waiting: dict[int, asyncio.Future[Choice]] = {}
        missing: list[int] = []
        for sample, key in keys.items():
            stored = self.ledger.get(key)
            if stored is not None:
                found[sample] = stored
                self.replayed[tag] = self.replayed[tag] + stored.usage
            elif key in self._under_way:  # somebody is asking just this: one call serves both
                waiting[sample] = self._under_way[key]
            else:
                missing.append(sample)
        if missing:
            loop = asyncio.get_running_loop()
            ours = {sample: loop.create_future() for sample in missing}
            self._under_way.update({keys[sample]: future for sample, future in ours.items()})
            try:
                for run_of in _runs(missing):
                    await self._fetch(request, run_of, keys, tag, ours, found)
            except BaseException as error:
                for future in ours.values():
                    if not future.done():
                        future.set_exception(error if isinstance(error, Exception) else _Abandoned())
                        future.exception()  # whoever waits sees it; nobody need
                raise
            finally:
                for sample in missing:
                    del self._under_way[keys[sample]]
        for sample, future in waiting.items():
            try:
                found[sample] = replace(await asyncio.shield(future), stored=True)
                self.replayed[tag] = self.replayed[tag] + found[sample].usage
            except _Abandoned:
                (found[sample],) = await self._complete(request, (sample,), tag)
        return [found[sample] for sample in samples]

    async def _fetch(
        self,
        request: Request,
        samples: Sequence[int],
        keys: dict[int, str],
        tag: str,
        ours: dict[int, asyncio.Future[Choice]],
        found: dict[int, Choice],
    ) -> None:
        """Asks for consecutive samples until all are there; a server that ignores ``n`` is asked again for the rest."""
        left = list(samples)
        while left:
            choices = await self._tried(request, left, keys, tag)
            for sample, choice in zip(left, choices, strict=False):
                found[sample] = choice
                ours[sample].set_result(choice)
            left = left[len(choices) :]

    async def _tried(self, request: Request, samples: Sequence[int], keys: dict[int, str], tag: str) -> list[Choice]:
        """One call within all limits, tried as often as it may be."""
        worst, pause = self._worst(request, len(samples)), self.backoff[0]
        async with self._places:
            for attempt in range(1, self.tries + 1):
                await self._rate.wait()
                await self.budget.reserve(worst)
                try:
                    choices = await _to_the_end(self._sent(request, samples, keys, tag, worst))
                except Transient as error:
                    if (error.after or 0.0) > _PATIENCE:
                        raise ChatError(
                            f"{self.name} asks for a pause of {error.after:.0f} s ({error}); run again then, answers so far "
                            "are kept"
                        ) from None
                    if attempt == self.tries:
                        return self._given_up(error, len(samples))
                    if error.after is not None:
                        self._rate.hold(error.after)
                    else:
                        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                    pause = min(2 * pause, self.backoff[1])
                else:
                    self._answered, self._dead = self._answered + 1, 0
                    return choices
        raise AssertionError("unreachable")

    async def _sent(
        self, request: Request, samples: Sequence[int], keys: dict[int, str], tag: str, worst: Usage
    ) -> list[Choice]:
        """One request and its answer, which is counted and stored before anybody hears of it."""
        start, cost = time.monotonic(), NOTHING
        try:
            try:
                choices = (await self.backend.send(request, samples))[: len(samples)]
                if not choices:
                    raise Transient("it answered without a choice", begun=True)
            except RequestRefused as error:
                choices = [Choice("", error.reason) for _ in samples]
            except Transient as error:
                cost = worst if error.begun else NOTHING
                raise
            seconds = time.monotonic() - start
            choices = [self._priced(choice, seconds, first=place == 0) for place, choice in enumerate(choices)]
            cost = sum((choice.usage for choice in choices), NOTHING)
            self.used[tag] = self.used[tag] + cost
            kept = [(keys[sample], sample, choice) for sample, choice in zip(samples, choices, strict=False)]
            self.ledger.add(self.name, tag, request, [row for row in kept if row[2].finish_reason not in _NO_ANSWER])
            return choices
        finally:
            await self.budget.settle(worst, cost)

    def _worst(self, request: Request, samples: int) -> Usage:
        if not self.budget.limited:
            return Usage(1)
        prompt, completion = request.most_tokens, request.max_tokens * samples
        return Usage(1, prompt, completion, self._money(prompt, completion))

    def _money(self, prompt: int, completion: int) -> float:
        return (prompt * self.price.prompt + completion * self.price.completion) / 1e6

    def _priced(self, choice: Choice, seconds: float, first: bool) -> Choice:
        usage = choice.usage
        money = self._money(usage.prompt_tokens, usage.completion_tokens)
        return replace(choice, usage=replace(usage, calls=int(first), money=money, seconds=seconds if first else 0.0))

    def _given_up(self, error: Transient, samples: int) -> list[Choice]:
        """A counted failure while the endpoint answers others, else the end of the run."""
        self._dead += 1
        if isinstance(error, Unreachable) or not self._answered or self._dead >= _DEAD:
            raise ChatError(f"{self.name} did not answer after {self.tries} tries: {error}") from None
        return [Choice("", "error") for _ in range(samples)]


class _Abandoned(Exception):
    """Whoever was asking was cancelled; those who wait for the same answer ask themselves."""


async def _to_the_end(work: Coroutine[Any, Any, A]) -> A:
    """Awaits work that is not to be cut off: whoever is cancelled meanwhile waits for it (and, cancelled again, no more)."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        task.exception()  # has been seen
        raise


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Consecutive runs of increasing numbers."""
    grouped = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in grouped]
