"""What is sent to a model, what comes back, and how it can fail.

A *backend* carries requests: an OpenAI-compatible endpoint (`endpoint`), a local transformers model (`local`), or the
instrument `SimulatedChat` (`simulated`). It answers or raises one of the errors below; everything else (order, retries,
limits, the ledger, budgets) is `Chat`'s and the same for all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
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

    ``after``: seconds that the server asked to wait, from its ``Retry-After``. ``begun``: the server may have worked (and
    charged) for it, as when the answer was cut off.
    """

    def __init__(self, message: str, after: float | None = None, begun: bool = False):
        super().__init__(message)
        self.after, self.begun = after, begun


class Unreachable(Transient):
    """Nobody listens: after all tries that ends the run, since no other request would be answered either."""


#: so many tokens a chat template may add to a request (role marks, a default system prompt), and so many an image may be
_TEMPLATE, _IMAGE = 256, 16_384


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
        """A checked request, a copy of what it is made of. Raises ValueError for what cannot be meant."""
        if not isinstance(messages, str):
            messages = tuple(messages)
            for message in messages:
                if not isinstance(message, Mapping) or "role" not in message:
                    raise ValueError("a message is a mapping with 'role' and 'content'")
            messages = tuple(_copied(message) for message in messages)
        if not messages:
            raise ValueError("there is nothing to ask: messages are empty")
        for name in ("stop", "tools"):
            value = parameters.get(name) or ()
            parameters[name] = tuple(_copied([value] if isinstance(value, str) else list(value)))
        if not all(isinstance(stop, str) and stop for stop in parameters["stop"]):
            raise ValueError("stop strings are texts that are not empty")
        for name in ("response_format", "extra"):
            if name in parameters:
                parameters[name] = _copied(parameters[name])
        for name, kind in (("temperature", float), ("top_p", float), ("max_tokens", int)):  # 0 and 0.0 are one request
            if name in parameters:
                parameters[name] = _number(name, parameters[name], kind)
        made = cls(messages, **parameters)
        if not 0 <= made.temperature < math.inf or not 0 < made.top_p <= 1 or made.max_tokens < 1:
            raise ValueError(
                f"temperature must be at least 0, top_p in (0, 1], max_tokens at least 1; got {made.temperature}, "
                f"{made.top_p}, {made.max_tokens}"
            )
        return made

    @cached_property
    def content(self) -> str:
        """The request as canonical JSON, without what is not set: what it is known by, and what the ledger keeps."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        kept = {name: value for name, value in fields.items() if value not in ((), None, {})}
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), default=dict)

    @cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(self.content.encode(), digest_size=32).hexdigest()

    def key(self, identity: str, sample: int) -> str:
        """What the ledger finds an answer by: the model's identity, the request and the number of the sample."""
        known_by = f"{identity}\0{sample}\0{self._digest}"
        return hashlib.blake2b(known_by.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()

    @cached_property
    def size(self) -> int:
        """Bytes of the prompt and of the tools' descriptions, images apart."""
        if isinstance(self.messages, str):
            return len(self.messages.encode("utf-8", "surrogatepass"))
        texts = [json.dumps({**m, "content": _without_images(m.get("content"))}, ensure_ascii=False) for m in self.messages]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in self.tools]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)

    @property
    def images(self) -> int:
        if isinstance(self.messages, str):
            return 0
        return sum(_is_image(part) for m in self.messages for part in _parts(m.get("content")))

    @property
    def most_tokens(self) -> int:
        """Tokens that the prompt has at most: one a byte of text and tools, what templates add, and the largest images.

        Tokens of byte-level tokenizers have at least one byte each; templates and images are bounded by those in use.
        """
        return self.size if isinstance(self.messages, str) else self.size + _TEMPLATE + _IMAGE * self.images


def _copied(value: Any) -> Any:
    """JSON, copied: what is changed by the caller later changes neither what is sent nor what it is known by."""
    if isinstance(value, Mapping):
        return {str(name): _copied(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(one) for one in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(
        f"requests are JSON: text, finite numbers, lists and mappings; got {type(value).__name__} {value!r:.40}"
    )


def _number(name: str, value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or kind(value) != value:
        raise ValueError(f"{name} is {'a whole number' if kind is int else 'a number'}, got {value!r}")
    return kind(value)


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and "image_url" in part


def _without_images(content: Any) -> Any:
    return [part for part in content if not _is_image(part)] if isinstance(content, list) else content


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0


@dataclass(frozen=True)
class Usage:
    """What was used: calls, tokens read and written, US dollars, seconds from request to answer (summed over calls).

    ``estimated``: so many of the calls came back without a count of tokens, which is a quarter of the bytes for them.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0
    seconds: float = 0.0
    estimated: int = 0

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
            self.estimated + sign * other.estimated,
        )


#: nothing used
NOTHING = Usage()


def estimated_tokens(size: int) -> int:
    """Tokens of ``size`` bytes where nobody counted them: four bytes each, as for English."""
    return -(-size // 4)


@dataclass(frozen=True)
class Choice:
    """One answer.

    ``finish_reason``: "stop" or "tool_calls" when it is whole; else it is a failure: "length" (cut at max_tokens), "context"
    (the prompt does not fit), "content_filter", "error" (no answer after all tries). ``usage``: of a call for several
    samples, its first choice carries the call and the prompt, so that sums are right. ``logprobs``: for every token
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


def best_first(alternatives: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The ``top`` of a token's log-probabilities: of tokens that are spelled alike, the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in sorted(alternatives, key=lambda one: -one[1]):
        found.setdefault(token, logprob)
    return found


class Backend(Protocol):
    """Carries requests to one model."""

    #: what tables call the model
    name: str
    #: what else an answer depends on: the endpoint's address or the weights' fingerprint; never a secret
    identity: str

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        """One answer for each of ``samples`` (consecutive numbers), or fewer where the server ignores ``n``.

        Raises `Transient` (`Unreachable`), `RequestRefused` or `ChatError`.
        """
        ...

    async def close(self) -> None: ...
