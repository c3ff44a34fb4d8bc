"""Any backend behind OpenAI's protocol: a local model for other programs, an instrument for tests over real HTTP.

    with serving(backend) as url: ...          # in this process, on a port of 127.0.0.1
    uvicorn.run(application(backend))          # or wherever else

Answers chats (``/v1/chat/completions``), strings (``/v1/completions``) and ``/v1/models``; ``stream`` sends the finished
answer in pieces. `ServerFaults` makes it as unreliable as servers are.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .protocol import NOTHING, Backend, ChatError, Choice, Request, RequestRefused, Transient

#: fields of the protocol that are no parameters of a request here
_HANDLED = {"model", "messages", "prompt", "n", "stream", "stream_options", "logprobs", "top_logprobs"}
_PARAMETERS = {"temperature", "top_p", "max_tokens", "stop", "seed", "response_format", "tools"}
#: more choices than that are not meant
_MOST_CHOICES = 1024


@dataclass(frozen=True)
class ServerFaults:
    """How often (probabilities, a request each, by its number and ``seed``) an answer is 429, 500, comes only after
    ``stall_seconds``, ends in its middle, is no JSON, or is a page of HTML. All but the first two reach the model first.

    ``retry_after``: what 429 and 500 say in ``Retry-After``.
    """

    rate_429: float = 0.0
    rate_500: float = 0.0
    stall: float = 0.0
    cut: float = 0.0
    garbage: float = 0.0
    html: float = 0.0
    stall_seconds: float = 60.0
    retry_after: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rates.values()) < 0 or sum(self.rates.values()) > 1:
            raise ValueError("fault rates are probabilities whose sum is at most 1")

    @property
    def rates(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("rate_429", "rate_500", "stall", "cut", "garbage", "html")}

    def drawn(self, number: int) -> str:
        """What goes wrong with the request of that number, or ""."""
        left = random.Random(f"{self.seed}/{number}").random()
        for name, rate in self.rates.items():
            left -= rate
            if left < 0:
                return name
        return ""


@dataclass
class Served:
    """What a server did: requests by outcome ("answered" or the fault's name); ``tokens`` of all answers."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())


def application(
    backend: Backend, *, key: str = "", faults: ServerFaults | None = None, served: Served | None = None
) -> Starlette:
    """A web application that answers from ``backend``. ``key``: what clients must send; "" lets all in.

    ``served`` is counted into.
    """
    faults, served, numbers = faults or ServerFaults(), served or Served(), itertools.count()

    def refused(request: HTTPRequest) -> Response | None:
        sent = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return _error(401, "wrong key", "invalid_api_key")
        return None

    async def models(request: HTTPRequest) -> Response:
        return refused(request) or JSONResponse(
            {"object": "list", "data": [{"id": backend.name, "object": "model", "owned_by": "broadsheet"}]}
        )

    async def complete(request: HTTPRequest) -> Response:
        if response := refused(request):
            return response
        fault = faults.drawn(next(numbers))
        if fault in ("rate_429", "rate_500"):
            served.outcomes[fault] += 1
            headers = {"retry-after": faults.retry_after} if faults.retry_after is not None else {}
            return _error(int(fault[5:]), "an injected fault", "fault", headers)
        try:
            body = json.loads(await request.body())
            asked, count = _request(body, chat=request.url.path.endswith("/chat/completions"))
            if body.get("model") != backend.name:
                return _error(404, f"the model '{body.get('model')}' does not exist", "model_not_found")
            choices = await _answers(backend, asked, count)
        except (ValueError, TypeError) as error:
            if isinstance(error, ChatError):
                return _error(502, str(error), "backend")
            return _error(400, str(error), "invalid_request")
        except RequestRefused as error:
            code = {"context": "context_length_exceeded"}.get(error.reason, error.reason)
            return _error(400, str(error), code)
        except Transient as error:
            return _error(503, str(error), "overloaded", {} if error.after is None else {"retry-after": str(error.after)})
        served.tokens += sum(choice.usage.tokens for choice in choices)
        served.outcomes[fault or "answered"] += 1
        answer = _completion(backend.name, asked, choices)
        if fault == "stall":
            await asyncio.sleep(faults.stall_seconds)
        elif fault == "garbage":
            return Response(json.dumps(answer)[1:-1], media_type="application/json")
        elif fault == "html":
            return Response("<html><body><h1>Bad gateway</h1></body></html>", media_type="text/html")
        elif fault == "cut":
            return _Cut(json.dumps(answer))
        if body.get("stream"):
            return StreamingResponse(_events(answer), media_type="text/event-stream")
        return Response(json.dumps(answer), media_type="application/json")  # escaped: lone surrogates survive

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await backend.close()

    routes = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


@contextmanager
def serving(
    backend: Backend, *, key: str = "", faults: ServerFaults | None = None, served: Served | None = None, port: int = 0
) -> Iterator[str]:
    """Serves ``backend`` from a thread of this process, on 127.0.0.1; gives the address. ``port`` 0: a free one."""
    import uvicorn

    app = application(backend, key=key, faults=faults, served=served)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, name="broadsheet-server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise ChatError(f"cannot serve on port {port}; is it taken?")
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def _request(body: Mapping[str, Any], chat: bool) -> tuple[Request, int]:
    """A request and the number of samples. Raises ValueError and TypeError for what cannot be meant."""
    if not isinstance(body, dict):
        raise ValueError("the body is no object")
    messages = body.get("messages" if chat else "prompt")
    if not isinstance(messages, list if chat else str):
        raise ValueError("'messages' must be a list" if chat else "'prompt' must be one string")
    given = {name: body[name] for name in _PARAMETERS if body.get(name) is not None}
    length = body.get("max_completion_tokens")
    if length is not None:
        given["max_tokens"] = length
    given.setdefault("temperature", 1.0)  # as the protocol has it
    if body.get("logprobs") not in (None, False):
        given["logprobs"] = int(body.get("top_logprobs") or 0) if chat else int(body["logprobs"])
    count = body.get("n") or 1
    if not isinstance(count, int) or not 1 <= count <= _MOST_CHOICES:
        raise ValueError(f"n is a whole number from 1 to {_MOST_CHOICES}")
    known = _HANDLED | _PARAMETERS | {"max_completion_tokens"}
    extra = {name: value for name, value in body.items() if name not in known}
    return Request.of(messages, **given, extra=extra), count


async def _answers(backend: Backend, request: Request, count: int) -> list[Choice]:
    choices: list[Choice] = []
    while len(choices) < count:
        more = await backend.send(request, range(len(choices), count))
        if not more:
            raise Transient("the model gave no answer")
        choices += more
    return choices[:count]


def _completion(model: str, request: Request, choices: list[Choice]) -> dict[str, Any]:
    chat = not isinstance(request.messages, str)
    rows = []
    for place, choice in enumerate(choices):
        row: dict[str, Any] = {"index": place, "finish_reason": choice.finish_reason}
        if chat:
            row["message"] = {"role": "assistant", "content": choice.text}
            if choice.tool_calls:
                row["message"]["tool_calls"] = list(choice.tool_calls)
        else:
            row["text"] = choice.text
        if choice.logprobs is not None:
            row["logprobs"] = (_chat_logprobs if chat else _text_logprobs)(choice)
        rows.append(row)
    used = sum((choice.usage for choice in choices), NOTHING)
    return {
        "id": f"cmpl-{time.time_ns():x}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": rows,
        "usage": {
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "total_tokens": used.tokens,
        },
    }


def _chat_logprobs(choice: Choice) -> dict[str, Any]:
    rows = []
    for one in choice.logprobs or ():
        top = [{"token": token, "logprob": value} for token, value in one["top"].items()]
        rows.append({"token": one["token"], "logprob": one["logprob"], "top_logprobs": top})
    return {"content": rows}


def _text_logprobs(choice: Choice) -> dict[str, Any]:
    rows = choice.logprobs or ()
    return {
        "tokens": [one["token"] for one in rows],
        "token_logprobs": [one["logprob"] for one in rows],
        "top_logprobs": [one["top"] for one in rows],
    }


def _error(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": code, "code": code}}, status, dict(headers or {}))


class _Cut(Response):
    """An answer of which half arrives."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2]})
        # Less than the announced length: the server can but close the connection.


async def _events(answer: dict[str, Any], width: int = 16) -> AsyncIterator[str]:
    """A finished answer as server-sent events."""
    chat = answer["object"] == "chat.completion"
    shared = {name: answer[name] for name in ("id", "created", "model")}
    shared["object"] = "chat.completion.chunk" if chat else "text_completion"
    for row in answer["choices"]:
        text = row["message"]["content"] if chat else row["text"]
        pieces = [text[start : start + width] for start in range(0, len(text), width)]
        for piece in pieces:
            part = {"delta": {"role": "assistant", "content": piece}} if chat else {"text": piece}
            yield _event({**shared, "choices": [{"index": row["index"], "finish_reason": None, **part}]})
        part = {"delta": {}} if chat else {"text": ""}
        yield _event({**shared, "choices": [{"index": row["index"], "finish_reason": row["finish_reason"], **part}]})
    yield _event({**shared, "choices": [], "usage": answer["usage"]})
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
