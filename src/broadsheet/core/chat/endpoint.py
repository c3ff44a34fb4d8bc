"""`Endpoint`: any server that speaks OpenAI's protocol (vLLM, llama.cpp, Ollama, SGLang, hosted ones), through OpenAI's SDK.

The SDK does the transport; its retries are off, because tries, pauses and limits are `Chat`'s. Answers are read by us from
the body as it came: servers differ in what they leave out, and some answer with a page of HTML and status 200.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from .protocol import (
    NOTHING,
    ChatError,
    Choice,
    Request,
    RequestRefused,
    Transient,
    Unreachable,
    Usage,
    best_first,
    estimated_tokens,
)

# What servers say when the prompt (with max_tokens) is longer than the model: OpenAI, vLLM, llama.cpp, SGLang, TGI, hosted.
_CONTEXT = re.compile(
    r"context[ _](length|window|size)|maximum (context|model) length|max_model_len|exceed_context|"
    r"(prompt|input|inputs?`? ?tokens?|request) (is|are|was)? ?too (long|large)|reduce the length|too many (input )?tokens|"
    r"string_above_max_length|longer than the (model|maximum)",
    re.I,
)
_FILTERED = re.compile(r"content[_ ](filter|policy|management)|responsibleai|moderation|flagged", re.I)


class Endpoint:
    """A model behind an address.

    ``url``: ``http://host:8000``, ``http://host:8000/v1`` or ``.../v1/chat/completions``; where the path is empty it is
    ``/v1``, else it is taken as it is (``https://openrouter.ai/api/v1``). ``api_key``: else ``BROADSHEET_API_KEY``, else
    ``OPENAI_API_KEY``, else "none"; it is kept by the SDK's client only, and stands in no ledger, log or message.
    ``seconds``: the longest that one call may take. ``identity``: what the ledger knows the server by, its address unless
    given: give a name that stays where the address changes.

    The number of a sample travels as the request's ``seed``: the samples from number k on of a request with seed s (0 if it
    has none) are asked for with seed s + k, as vLLM counts the samples of one call, too; without a seed where k is 0 and the
    request has none. ``seeded=False`` sends only seeds that requests have, for servers that refuse ``seed``. Where an answer
    comes without a count of tokens, they are estimated (`Usage.estimated`); without a ``finish_reason``, it is "length" if
    all ``max_tokens`` were written, else "stop"; others are passed on as they are. Lone surrogates of a request are sent as
    U+FFFD, since UTF-8 has none; those of answers are kept.

    Raises ChatError for an address that cannot be one, and where the ``openai`` package is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        seconds: float = 600.0,
        seeded: bool = True,
        headers: Mapping[str, str] | None = None,
        identity: str = "",
    ):
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise ChatError("endpoints need the openai package: pip install openai") from None
        self.name, self.url, self.seconds, self.seeded = model, address(url), seconds, seeded
        self.identity = identity or self.url
        key = (api_key or os.environ.get("BROADSHEET_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ChatError("the key holds characters that no key has: it is one line of ASCII without spaces")
        self._has_key = key != "none"
        self._client = AsyncOpenAI(
            base_url=self.url, api_key=key, max_retries=0, timeout=seconds, default_headers=dict(headers or {})
        )
        self._length = "max_tokens"  # "max_completion_tokens" once the server asked for that
        self._several = True  # False once the server refused n > 1

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.name!r})"

    async def close(self) -> None:
        await self._client.close()

    async def models(self) -> list[str]:
        """The models that the server lists. Raises `Transient` or `ChatError`."""
        try:
            body = await self._body(self._client.get("/models", cast_to=bytes))
            return [str(one["id"]) for one in body["data"]]
        except (_Missing, _Refusal, LookupError, TypeError):
            raise ChatError(f"{self.url} lists no models; is it the address of an OpenAI-compatible API?") from None

    async def only_model(self) -> str:
        """The name of the model where there is one only. Raises ChatError where there are more, or nobody answers."""
        try:
            names = await self.models()
        except Transient as error:
            raise ChatError(str(error)) from None
        if len(names) != 1:
            more = ", ..." if len(names) > 8 else ""
            raise ChatError(f"{self.url} has {len(names)} models; name one of them: {', '.join(names[:8])}{more}")
        return names[0]

    async def send(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        fewer = False
        while True:
            if fewer or not self._several:
                samples = samples[:1]
            length = self._length
            try:
                choices = await self._asked(request, samples)
            except _Missing as missing:
                raise await self._explained(missing) from None
            except _Refusal as refusal:
                if "max_completion_tokens" in str(refusal) and length == "max_tokens":
                    self._length = "max_completion_tokens"  # OpenAI's reasoning models
                elif len(samples) > 1:
                    fewer = True  # many servers give one choice only: perhaps that is it
                else:
                    raise ChatError(f"{self.url} refuses what {self.name} is asked: {refusal}") from None
            else:
                self._several = self._several and not fewer
                return choices

    async def _asked(self, request: Request, samples: Sequence[int]) -> list[Choice]:
        messages, extra = request.messages, dict(request.extra)
        if r"\ud" in request.content:  # the escape of a surrogate, perhaps a lone one, which UTF-8 does not have
            messages, extra = _whole(messages), _whole(extra)
        fields: dict[str, Any] = {"model": self.name, self._length: request.max_tokens, "temperature": request.temperature}
        if request.top_p != 1:
            fields["top_p"] = request.top_p
        if request.stop:
            fields["stop"] = list(request.stop)
        if self.seeded and (request.seed is not None or samples[0]):
            fields["seed"] = (request.seed or 0) + samples[0]
        elif request.seed is not None:
            fields["seed"] = request.seed
        if len(samples) > 1:
            fields["n"] = len(samples)
        if request.response_format is not None:
            fields["response_format"] = request.response_format
        if isinstance(messages, str):
            if request.tools:
                raise ChatError("tools go with chats, not with a string to complete")
            path, fields = "/completions", {**fields, "prompt": messages, "max_tokens": fields.pop(self._length)}
            if request.logprobs is not None:
                fields["logprobs"] = request.logprobs
        else:
            path, fields["messages"] = "/chat/completions", list(messages)
            if request.tools:
                fields["tools"] = _whole(request.tools)
            if request.logprobs is not None:
                fields |= {"logprobs": True, "top_logprobs": request.logprobs}
        # Not through the SDK's typed methods, which walk the messages and the answer at half a millisecond a call.
        body = await self._body(self._client.post(path, body={**fields, **extra}, cast_to=bytes))
        if isinstance(body, dict) and isinstance(body.get("error"), dict) and not body.get("choices"):
            code = body["error"].get("code")  # OpenRouter passes on the errors of others with status 200
            raise self._failure(code if isinstance(code, int) and 400 <= code < 600 else 500, body, None)
        try:
            return _choices(body, request)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise Transient(f"{self.url} answered JSON that is no completion", begun=True) from None

    async def _body(self, call: Awaitable[bytes]) -> Any:
        """The JSON that a call of the SDK came back with; its errors as ours."""
        import openai

        try:
            async with asyncio.timeout(self.seconds):
                content = await call
        except TimeoutError:
            raise Transient(f"{self.url} gave no answer within {self.seconds:g} s", begun=True) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            if cause in ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"):
                raise Unreachable(f"nobody answers at {self.url} ({cause}); is the server up?") from None
            raise Transient(f"the answer of {self.url} was cut off ({cause})", begun=True) from None
        except openai.APIStatusError as error:
            headers = error.response.headers
            raise self._failure(error.status_code, _parsed(error.response.content), _after(headers)) from None
        parsed = _parsed(content)
        if isinstance(parsed, str):
            kind = "HTML" if parsed.lstrip().startswith("<") else "no JSON"
            raise Transient(f"{self.url} answered {kind}: {self._line(parsed)[:80]!r}; is it an API's address?", begun=True)
        return parsed

    def _failure(self, status: int, body: Any, after: float | None) -> Exception:
        """The error that an answer with such a status is."""
        message, code = _message(body)
        told, message = f"{code} {message}", self._line(message)
        if status == 401:
            what = "refuses the key" if self._has_key else "wants a key"
            return ChatError(f"{self.url} {what} (401): set BROADSHEET_API_KEY or pass api_key")
        if status == 404:
            return _Missing(message)
        if status in (400, 403, 422) and _FILTERED.search(told):
            return RequestRefused("content_filter", message)
        if status == 413 or ((status in (400, 422) or status >= 500) and _CONTEXT.search(told)):
            return RequestRefused("context", message)
        if status == 403:
            return ChatError(f"{self.url} forbids it (403): {message}; is the key right, and may it use {self.name}?")
        if status == 402 or (status == 429 and "insufficient_quota" in told):
            return ChatError(f"{self.url} wants money ({status}): {message}")
        if status in (408, 409, 425, 429) or status >= 500:
            return Transient(f"{self.url} answered {status}: {message}", after, begun=status in (408, 504, 524))
        if status in (400, 422):
            return _Refusal(message)
        return ChatError(f"{self.url} answered {status}: {message}")

    async def _explained(self, missing: _Missing) -> ChatError:
        """What a 404 means: no such model, or no such address."""
        try:
            names = await self.models()
        except (ChatError, Transient, RequestRefused):
            return ChatError(
                f"{self.url} answered 404 ({missing}): is '{self.name}' one of its models, and does the address end as the "
                "server's documentation says (mostly in /v1)?"
            )
        if self.name in names:
            return ChatError(f"{self.url} has {self.name}, but not for this kind of request (404): {missing}")
        near = difflib.get_close_matches(self.name, names, 8, 0.3) or names[:8]
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        return ChatError(f"no model '{self.name}' at {self.url}; it has {', '.join(near) or 'none'}{more}")

    def _line(self, text: str) -> str:
        """What a server said, fit for a message: one short line without the key."""
        text = text.replace(self._client.api_key, "***") if self._has_key else text
        return " ".join(text.split())[:300] or "no reason given"


class _Missing(Exception):
    """404."""


class _Refusal(Exception):
    """400 or 422 for no reason that is known here."""


def address(url: str) -> str:
    """The base address of an API. Raises ChatError for what cannot be one."""
    example = "give one such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url.strip())
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known:
        raise ChatError(f"that is no http address; {example}")
    if parts.username or parts.password or parts.query:
        raise ChatError(f"addresses hold no names, keys or queries: {example}, and the key through BROADSHEET_API_KEY")
    path = re.sub(r"/+(chat/completions|completions|models)$", "", parts.path.rstrip("/")).rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def _parsed(content: bytes) -> Any:
    """JSON, or the text where it is none. Lone surrogates and raw control characters of careless servers are read."""
    try:
        return json.loads(content.decode("utf-8", "surrogatepass"), strict=False)
    except (ValueError, RecursionError):
        return content.decode("utf-8", "replace")


def _message(body: Any) -> tuple[str, str]:
    """What an error's body says, and its code or type."""
    if isinstance(body, str):
        return "a page of HTML" if body.lstrip().startswith("<") else body, ""
    if not isinstance(body, dict):
        return "", ""
    inner = body.get("error")
    error = inner if isinstance(inner, dict) else body
    message = error.get("message") or error.get("detail") or (inner if isinstance(inner, str) else "")
    return str(message or ""), f"{error.get('code') or ''} {error.get('type') or ''}"


def _after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if not value:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def _whole(value: Any) -> Any:
    """JSON whose texts have no lone surrogates: U+FFFD stands for them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_whole(name): _whole(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(one) for one in value]
    return value


# --- reading answers ----------------------------------------------------------------------------------------------------


def _choices(body: Any, request: Request) -> list[Choice]:
    """The choices of a completion. Raises LookupError, TypeError, ValueError or AttributeError where it is none."""
    rows = sorted(body["choices"], key=lambda row: row.get("index") or 0)
    if not all(isinstance(row, dict) for row in rows):
        raise TypeError("choices are objects")
    texts, calls = [], []
    for row in rows:
        message = row if "text" in row else row["message"]
        texts.append(_text(message.get("text") or message.get("content") or message.get("refusal") or ""))
        calls.append(tuple(dict(call) for call in message.get("tool_calls") or ()))
    logprobs = [_logprobs(row.get("logprobs")) for row in rows]
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]

    used = body.get("usage") or {}
    prompt, written, estimated = used.get("prompt_tokens"), used.get("completion_tokens"), 0
    if not (isinstance(prompt, int) and isinstance(written, int) and prompt >= 0 and written >= 0):
        prompt, estimated = estimated_tokens(request.size), 1
        counts = [estimated_tokens(size) for size in sizes]
    else:
        counts = _shared(written, [len(found) if found else size for found, size in zip(logprobs, sizes, strict=True)])
    choices = []
    for place, row in enumerate(rows):
        reason = row.get("finish_reason") or ("length" if counts[place] >= request.max_tokens else "stop")
        usage = (
            Usage(1, prompt, counts[place], estimated=estimated)
            if place == 0
            else replace(NOTHING, completion_tokens=counts[place])
        )
        choices.append(Choice(texts[place], str(reason), usage, logprobs[place], calls[place]))
    return choices


def _text(content: Any) -> str:
    if isinstance(content, list):  # parts
        return "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise TypeError("content is text")
    return content


def _shared(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` in whole numbers in proportion to ``sizes``: servers count the tokens of all choices together."""
    whole = sum(sizes) or len(sizes)
    sizes = sizes if sum(sizes) else [1] * len(sizes)
    ends = [total * sum(sizes[: place + 1]) // whole for place in range(len(sizes))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _logprobs(found: Any) -> tuple[dict[str, Any], ...] | None:
    """Of either API in one form."""
    if not found:
        return None
    if found.get("content") is not None:
        return tuple(
            {
                "token": row["token"],
                "logprob": float(row["logprob"]),
                "top": best_first((top["token"], float(top["logprob"])) for top in row.get("top_logprobs") or ()),
            }
            for row in found["content"]
        )
    if found.get("tokens") is None:
        return None
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    rows = zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    return tuple({"token": token, "logprob": value, "top": dict(top or {})} for token, value, top in rows)
