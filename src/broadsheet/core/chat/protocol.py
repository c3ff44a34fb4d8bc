"""What is sent to a model, what comes back, and how it can fail.

A *backend* carries requests: an OpenAI-compatible endpoint (`endpoint`), a local transformers model (`local`), or the
instrument `SimulatedChat` (`simulated`). It answers or raises one of the errors below; everything else (order, retries,
limits, the ledger, budgets) is `Chat`'s and the same for all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

#: ``{"role": ..., "content": text or parts, ...}``, as the OpenAI API has it; parts may be text and images.
Message = Mapping[str, Any]


class ChatError(ValueError):
    """The run cannot go on: a wrong key, an unknown model, nobody there. The message is one line and says what to do."""


class BudgetSpent(ChatError):
    """The next call could exceed the budget; every call that was paid for is in the ledger."""


class RequestRefused(Exception):
    """This one request cannot be answered (too long, filtered): a counted failure, never the end of a run."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


class Transient(Exception):
    """Worth another try: 429, 5xx, a time-out, a cut stream, an answer that is no answer.

    ``after``: seconds that the server asked to wait, from its ``Retry-After``.
    """

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Request:
    """Everything that determines an answer but the model and the number of the sample.

    ``messages``: a chat, or a string for the completions API (base models). ``temperature`` 0 is greedy. ``logprobs``: how
    many alternatives to report for every token; None reports none. ``extra``: further fields of the request, as they are.
    """

    messages: tuple[Message, ...] | str
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, messages: Sequence[Message] | str, **parameters: Any) -> Request:
        """A checked request. Raises ValueError for parameters that cannot be meant."""
        if not isinstance(messages, str):
            messages = tuple(messages)
            for message in messages:
                if not isinstance(message, Mapping) or "role" not in message:
                    raise ValueError("a message is a mapping with 'role' and 'content'")
        if not messages:
            raise ValueError("there is nothing to ask: messages are empty")
        for name in ("stop", "tools"):
            value = parameters.get(name) or ()
            parameters[name] = (value,) if isinstance(value, str) else tuple(value)
        made = cls(messages, **parameters)
        if made.temperature < 0 or not 0 < made.top_p <= 1 or made.max_tokens < 1:
            raise ValueError(
                f"temperature must be at least 0, top_p in (0, 1], max_tokens at least 1; got {made.temperature}, "
                f"{made.top_p}, {made.max_tokens}"
            )
        return made

    @cached_property
    def content(self) -> str:
        """The request as canonical JSON, without what is not set: what it is known by, and what the ledger keeps."""
        fields = {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}
        kept = {name: value for name, value in fields.items() if value not in ((), None, {})}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), default=dict)

    def key(self, identity: str, sample: int) -> str:
        """What the ledger finds an answer by: the model's identity, the request and the number of the sample."""
        return hashlib.blake2b(f"{identity}\0{sample}\0{self.content}".encode(), digest_size=20).hexdigest()

    @property
    def most_tokens(self) -> int:
        """No tokenizer makes more of the prompt: tokens have at least one byte each."""
        if isinstance(self.messages, str):
            return len(self.messages.encode("utf-8", "replace"))
        return sum(
            len(json.dumps(dict(m), ensure_ascii=False, default=dict).encode("utf-8", "replace")) for m in self.messages
        )


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True)
class Usage:
    """What was used: calls, tokens read and written, US dollars, seconds from request to answer (summed over calls)."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return self._with(other, 1)

    def __sub__(self, other: Usage) -> Usage:
        return self._with(other, -1)

    def _with(self, other: Usage, sign: int) -> Usage:
        return Usage(
            self.calls + sign * other.calls,
            self.prompt_tokens + sign * other.prompt_tokens,
            self.completion_tokens + sign * other.completion_tokens,
            self.money + sign * other.money,
            self.seconds + sign * other.seconds,
        )


#: nothing used
NOTHING = Usage()


@dataclass(frozen=True)
class Choice:
    """One answer.

    ``finish_reason``: "stop" or "tool_calls" when it is whole; else it is a failure: "length" (cut at max_tokens), "context"
    (the prompt does not fit), "content_filter", "error" (no answer after all tries). ``logprobs``: for every token
    ``{"token", "logprob", "top": {token: logprob}}``. ``stored``: it came from the ledger and cost nothing now.
    """

    text: str
    finish_reason: str = "stop"
    usage: Usage = NOTHING
    logprobs: tuple[Mapping[str, Any], ...] | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    stored: bool = False

    @property
    def ok(self) -> bool:
        """Whether the answer is whole."""
        return self.finish_reason in ("stop", "tool_calls")


class Backend(Protocol):
    """Carries requests to one model."""

    #: what tables call the model
    name: str
    #: what else an answer depends on: the endpoint's address or the weights' fingerprint; never a secret
    identity: str

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        """One answer for each of ``samples`` (consecutive numbers), or fewer where the server ignores ``n``.

        Raises `Transient`, `RequestRefused` or `ChatError`.
        """
        ...

    async def close(self) -> None: ...
