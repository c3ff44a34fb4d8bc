"""Endpoints over real HTTP: what is sent, what every kind of failure becomes, and that keys stay where they belong."""

from __future__ import annotations

import json
import logging
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep, time

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from broadsheet.core.chat import Budget, Chat, ChatError, Choice, Usage, connect, run
from broadsheet.core.chat.endpoint import Endpoint, address
from broadsheet.core.chat.protocol import Request, RequestRefused, Transient
from broadsheet.core.chat.server import Served, ServerFaults, serving
from broadsheet.core.chat.simulated import Faults, SimulatedChat

ASK = [{"role": "user", "content": "hello"}]
KEY = "sk-do-not-tell-anyone-7f3a"


@pytest.fixture(autouse=True)
def _no_certificates(monkeypatch):
    """Every client reads the certificates anew, which takes most of a test's time; nothing here is https."""
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)


@dataclass(frozen=True)
class Echo:
    """Says what it was asked, with a draw."""

    odd: bool = False

    def reply(self, request, draw):
        asked = request.messages if isinstance(request.messages, str) else request.messages[-1]["content"]
        return f"{asked} {draw.uniform('x'):.12f}" + (" \0 \ud83d \U0001f600 é\u2028" if self.odd else "")


def over_http(url, **options):
    return connect(url, "sim:model", **{"ledger": None, "backoff": (0.001, 0.002), **options})


# --- the instrument is the same in-process and over HTTP ------------------------------------------------------------------


def asked_everything(chat, concurrency):
    """Texts of many kinds of requests: samples from 0 and from elsewhere, seeds, strings, stops, parameters."""
    requests = [
        {"messages": [{"role": "user", "content": f"question {number}"}], "n": 1 + number % 3, "first": number % 4, **more}
        for number in range(12)
        for more in (
            {"temperature": 0}, {"temperature": 0.7, "seed": 5}, {"top_p": 0.5, "max_tokens": 3}, {"stop": ["7"], "seed": 0},
            {"extra": {"min_p": 0.1}, "response_format": {"type": "text"}},
        )
    ]  # fmt: skip
    requests += [{"messages": f"string {number}", "n": 2, "first": number, "extra": {"top_k": 3}} for number in range(4)]

    async def one(request):
        return [(choice.text, choice.finish_reason) for choice in await chat.acomplete(**request)]

    order = requests if concurrency == 1 else requests[::-1]
    answers = chat.map(one, order)
    return answers if concurrency == 1 else answers[::-1]


@pytest.mark.parametrize("faults", [Faults(), Faults(refuse=0.2, empty=0.2, truncate=0.2)])
def test_the_instrument_depends_on_no_order_concurrency_or_transport(faults):
    backend = SimulatedChat(Echo(odd=True), seed=3, faults=faults)
    alone = asked_everything(Chat(backend, concurrency=1), 1)
    assert len({text for choices in alone for text, _ in choices}) > 60
    assert asked_everything(Chat(backend, concurrency=16), 16) == alone
    with serving(backend) as url:
        assert asked_everything(over_http(url, concurrency=16), 16) == alone


def test_usage_is_the_same_over_http_and_sums_up():
    backend = SimulatedChat(Echo())
    with serving(backend) as url:
        far, near = over_http(url), Chat(backend)
        for chat in (far, near):
            chat.complete(ASK, n=3)
            chat.complete("string")
        assert (far.spent.calls, far.spent.tokens) == (near.spent.calls, near.spent.tokens)
        assert far.spent.estimated == 0


def test_odd_texts_survive_the_wire_and_the_ledger(tmp_path):
    path = tmp_path / "calls.sqlite"
    with serving(SimulatedChat(Echo(odd=True))) as url:
        chat = over_http(url, ledger=path)
        text = chat.complete(ASK)[0].text
        chat.close()
    assert "\0" in text
    assert "\ud83d " in text
    again = connect(url, "sim:model", ledger=path)  # the server is gone
    assert again.complete(ASK)[0].text == text
    (row,) = again.ledger
    assert row["answer"]["text"] == text


# --- what is sent and read ------------------------------------------------------------------------------------------------


@contextmanager
def scripted(reply):
    """A server that answers ``reply(path, body or None) -> (status, headers, body)``; gives its address and what came."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            seen.append((self.path, body))
            status, headers, content = reply(self.path, body)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def completion(*texts, usage=(7, 9), reason="stop", **more):
    choices = [
        {"index": number, "message": {"role": "assistant", "content": text}, "finish_reason": reason, **more}
        for number, text in enumerate(texts)
    ]
    body = {"choices": choices}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, body


def failure(status, message="no", code=None, headers=None):
    return status, headers or {}, {"error": {"message": message, "code": code}}


def send(url, messages=ASK, samples=(0,), **parameters):
    endpoint = Endpoint(url, "m", api_key=KEY, seconds=parameters.pop("seconds", 10), seeded=parameters.pop("seeded", True))

    async def once():
        try:
            return await endpoint.send(Request.of(messages, **parameters), samples)
        finally:
            await endpoint.close()

    return run(once())


def test_all_fields_of_a_request_are_sent():
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with scripted(lambda path, body: completion("a", "b")) as (url, seen):
        send(
            url, [image], (3, 4), temperature=0.5, top_p=0.9, max_tokens=7, stop=("x",), seed=10, logprobs=2, tools=[tool],
            response_format={"type": "json_object"}, extra={"min_p": 0.1},
        )  # fmt: skip
        send(url)
        send(url, "raw", logprobs=1, max_tokens=2)
        send(url, samples=(2,), seeded=False)
        send(url, samples=(2,), seeded=False, seed=8)
    assert seen[0] == (
        "/v1/chat/completions",
        {
            "model": "m", "messages": [image], "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "stop": ["x"], "seed": 13,
            "n": 2, "logprobs": True, "top_logprobs": 2, "tools": [tool], "response_format": {"type": "json_object"},
            "min_p": 0.1,
        },
    )  # fmt: skip
    assert seen[1][1] == {"model": "m", "messages": ASK, "temperature": 0.0, "max_tokens": 1024}
    assert seen[2] == (
        "/v1/completions", {"model": "m", "prompt": "raw", "temperature": 0.0, "max_tokens": 2, "logprobs": 1},
    )  # fmt: skip
    assert "seed" not in seen[3][1]
    assert seen[4][1]["seed"] == 8


def test_lone_surrogates_of_a_request_are_sent_as_replacement_characters():
    with scripted(lambda path, body: completion("fine")) as (url, seen):
        send(url, [{"role": "user", "content": "a\ud83d b \U0001f600"}])
        send(url, "c\udc00")
    assert seen[0][1]["messages"][0]["content"] == "a\ufffd b \U0001f600"
    assert seen[1][1]["prompt"] == "c\ufffd"


def test_choices_are_read_in_their_order_with_their_share_of_the_tokens():
    body = completion("first", "second is longer", usage=(7, 9))[2]
    body["choices"].reverse()
    with scripted(lambda *_: (200, {}, body)) as (url, _):
        first, second = send(url, samples=(0, 1))
    assert (first.text, second.text) == ("first", "second is longer")
    assert first.usage + second.usage == Usage(1, 7, 9)
    assert first.usage.completion_tokens < second.usage.completion_tokens


def test_log_probabilities_of_both_apis():
    chat = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}]}
    text = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}
    wanted = ({"token": "a", "logprob": -0.5, "top": {"a": -0.5}},)
    for one in (chat, text):
        with scripted(lambda *_, one=one: completion("a", logprobs=one)) as (url, _):
            assert send(url, logprobs=1)[0].logprobs == wanted


def test_tool_calls_and_refusals_and_parts():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    rows = [
        ({"content": None, "tool_calls": [call]}, "tool_calls", ("", (call,))),
        ({"content": None, "refusal": "I won't"}, "stop", ("I won't", ())),
        ({"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}, "stop", ("in parts", ())),
        ({"content": ""}, "stop", ("", ())),
        ({"content": "odd"}, "eos_token", ("odd", ())),
    ]
    for message, reason, wanted in rows:
        body = {"choices": [{"message": message, "finish_reason": reason}]}
        with scripted(lambda *_, body=body: (200, {}, body)) as (url, _):
            choice = send(url)[0]
        assert (choice.text, choice.tool_calls) == wanted
        assert choice.finish_reason == reason


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": -1, "completion_tokens": "x"}])
def test_tokens_that_nobody_counted_are_estimated_and_marked(usage):
    status, headers, body = completion("x" * 40, usage=None)
    with scripted(lambda *_: (status, headers, {**body, "usage": usage})) as (url, _):
        choice = send(url)[0]
    assert choice.usage.estimated == 1
    assert choice.usage.completion_tokens == 10
    assert choice.usage.prompt_tokens > 0


def test_an_answer_without_a_reason_is_cut_if_all_tokens_were_written():
    for written, reason in ((8, "length"), (7, "stop")):
        with scripted(lambda *_, written=written: completion("x", usage=(1, written), reason=None)) as (url, _):
            assert send(url, max_tokens=8)[0].finish_reason == reason


def test_a_server_that_refuses_several_choices_is_asked_for_one_at_a_time():
    def reply(path, body):
        return failure(400, "Only one completion choice is allowed") if body.get("n") else completion(str(body.get("seed")))

    with scripted(reply) as (url, seen):
        chat = Chat(Endpoint(url, "m"))
        assert [choice.text for choice in chat.complete(ASK, n=3)] == ["None", "1", "2"]
        chat.complete("x", n=2)
    assert [body.get("n") for _, body in seen] == [3, None, None, None, None, None]


def test_a_model_that_wants_max_completion_tokens_gets_them():
    def reply(path, body):
        if "max_tokens" in body:
            return failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return completion(str(body["max_completion_tokens"]))

    with scripted(reply) as (url, seen):
        chat = Chat(Endpoint(url, "m"))
        assert [chat.complete(ASK, max_tokens=size)[0].text for size in (5, 6)] == ["5", "6"]
        assert len(seen) == 3
        chat = Chat(Endpoint(url, "m"))

        async def many(number):
            return await chat.acomplete([{"role": "user", "content": str(number)}], n=1 + number % 2, max_tokens=9)

        assert [choices[0].text for choices in chat.map(many, range(8))] == ["9"] * 8  # those that learn it at once, too


# --- failures -------------------------------------------------------------------------------------------------------------


def caught(reply, kind, match=".", **parameters):
    with scripted(reply) as (url, _), pytest.raises(kind, match=match) as error:
        send(url, **parameters)
    assert "\n" not in str(error.value)
    assert KEY not in str(error.value)
    return error.value


@pytest.mark.parametrize("status", [400, 413, 422, 500])
@pytest.mark.parametrize(
    ("message", "code"),
    [
        (
            "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens",
            "context_length_exceeded",
        ),
        ("the request exceeds the available context size. try increasing the context size", "exceed_context_size_error"),
        ("This model's maximum context length is 2048 tokens and your request has 3000 input tokens", None),
        ("prompt is too long: 210000 tokens > 200000 maximum", None),
        ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", None),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_for_its_length(status, message, code):
    assert caught(lambda *_: failure(status, message, code), RequestRefused).reason == "context"


def test_filtered_content_is_refused_as_such():
    for status, message, code in (
        (400, "The response was filtered due to the prompt triggering our content management policy", "content_filter"),
        (403, "Your input was flagged", None),
    ):
        assert caught(lambda *_, f=(status, message, code): failure(*f), RequestRefused).reason == "content_filter"
    with scripted(lambda *_: completion("", reason="content_filter")) as (url, _):
        assert send(url)[0].finish_reason == "content_filter"


def test_keys_that_are_wrong_missing_or_forbidden(monkeypatch):
    for name in ("BROADSHEET_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    caught(lambda *_: failure(401, f"Incorrect API key provided: {KEY}"), ChatError, "refuses the key")
    caught(lambda *_: failure(403, f"{KEY} may not"), ChatError, r"forbids it \(403\): \*\*\* may not")
    with scripted(lambda *_: failure(401)) as (url, _), pytest.raises(ChatError, match="wants a key"):
        Chat(Endpoint(url, "m")).complete(ASK)


def test_other_refusals_say_why():
    caught(lambda *_: failure(400, f"temperature\nmust be 1 {KEY}"), ChatError, r"temperature must be 1 \*\*\*")
    caught(lambda *_: (418, {}, b"teapot"), ChatError, "418: teapot")
    caught(lambda *_: failure(402, "add credits"), ChatError, "wants money")
    caught(lambda *_: failure(429, "You exceeded your current quota", "insufficient_quota"), ChatError, "wants money")
    caught(lambda *_: (200, {}, {}), ChatError, "tools go with chats", messages="raw", tools=[{"type": "function"}])


def test_an_unknown_model_is_told_those_there_are():
    def reply(path, body):
        names = ["llama-3-8b", "qwen-7b"]
        if path.endswith("/models"):
            return 200, {}, {"data": [{"id": name} for name in names]}
        return failure(404, f"model '{body['model']}' not found")

    with scripted(reply) as (url, _):
        with pytest.raises(ChatError, match=r"no model 'm' at .*; it has llama-3-8b, qwen-7b"):
            send(url)
        with pytest.raises(ChatError, match="has 2 models; name one of them: llama-3-8b, qwen-7b"):
            connect(url, ledger=None)
        with pytest.raises(ChatError, match="has qwen-7b, but not for this kind of request"):
            Chat(Endpoint(url, "qwen-7b")).complete("base model text")


def test_a_wrong_address_is_said():
    caught(lambda *_: (404, {"content-type": "text/html"}, b"<html>nothing</html>"), ChatError, "mostly in /v1")


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_what_may_pass(status):
    error = caught(lambda *_: failure(status), Transient, str(status))
    assert error.begun == (status in (408, 504))
    assert error.after is None


def test_retry_after_in_seconds_milliseconds_and_as_a_date():
    for headers, least, most in (
        ({"retry-after": "7"}, 7, 7),
        ({"retry-after": "0.5"}, 0.5, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after": formatdate(time() + 30, usegmt=True)}, 27, 31),
        ({"retry-after": formatdate(time() - 99, usegmt=True)}, 0, 0),
        ({"retry-after": "-3"}, 0, 0),
    ):
        after = caught(lambda *_, h=headers: failure(429, headers=h), Transient).after
        assert least <= after <= most
    for nonsense in ("soon", "nan", "inf", "Mon, 99 Foo"):
        assert caught(lambda *_, n=nonsense: failure(429, headers={"retry-after": n}), Transient).after is None


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE html><p>hi", b"", b"{", b'"text"', b"[]", b"null", b"{}", b'{"choices": null}', b'{"choices": [1]}',
        b'{"choices": [{"message": 3, "finish_reason": "stop"}]}', b'{"choices": [{"finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": 5}}]}', b"\xff\xfe\x00", b"[" * 100_000,
        b'{"choices": [{"message": {"content": "x", "tool_calls": [5]}}]}',
        b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{}]}}]}',
        b'{"choices": [{"message": {"content": "x"}, "logprobs": 7}]}',
        b'{"choices": [{"message": {"content": "x"}}], "usage": 3}',
    ],
)  # fmt: skip
def test_an_answer_that_is_none_may_pass(body):
    assert caught(lambda *_: (200, {}, body), Transient).begun


def test_an_error_with_status_200_is_an_error():
    assert "429" in str(caught(lambda *_: (200, {}, {"error": {"message": "slow down", "code": 429}}), Transient))
    caught(lambda *_: (200, {}, {"error": {"message": "maximum context length is 5", "code": 400}}), RequestRefused)
    caught(lambda *_: (200, {}, {"error": {"message": "odd", "code": "x"}}), Transient, "odd")


def test_nobody_listening_is_said_after_the_tries():
    with scripted(lambda *_: failure(500)) as (url, _):
        pass  # the port is free again
    chat = Chat(Endpoint(url, "m"), tries=3, backoff=(0.001, 0.002))
    with pytest.raises(ChatError, match=r"did not answer after 3 tries: nobody answers at http.*is the server up"):
        chat.complete(ASK)
    assert chat.budget.spent.calls == 0
    with pytest.raises(ChatError, match="nobody answers"):
        connect(url, ledger=None)


# --- every fault over the wire --------------------------------------------------------------------------------------------

FAULTS = ["rate_429", "rate_500", "stall", "cut", "garbage", "html"]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(fault):
    """Many requests fail in that way; all questions are answered as without faults, each paid for once."""
    backend, served = SimulatedChat(Echo()), Served()
    wanted = [choices[0].text for choices in Chat(backend).map(Chat(backend).acomplete, map(str, range(30)))]
    stalls = fault == "stall"
    faults = ServerFaults(**{fault: 0.3 if stalls else 0.5}, stall_seconds=3, retry_after="0.001", seed=1)
    with serving(backend, faults=faults, served=served) as url:
        chat = over_http(url, seconds=1.0 if stalls else 30, tries=30, concurrency=32)
        answers = chat.map(chat.acomplete, map(str, range(30)))
    assert [choices[0].text for choices in answers] == wanted
    assert served.outcomes[fault] > 6
    assert chat.spent.calls == served.outcomes["answered"] == len(chat.ledger) == 30
    begun = fault not in ("rate_429", "rate_500")  # the model worked for these, and may have been charged for
    assert chat.budget.spent.calls == 30 + begun * served.outcomes[fault]


def test_all_faults_at_once_and_a_budget():
    faults = ServerFaults(**{**dict.fromkeys(FAULTS, 0.1), "stall": 0.04}, stall_seconds=5, retry_after="0.001")
    served = Served()
    with serving(SimulatedChat(Echo()), faults=faults, served=served) as url:
        chat = over_http(url, seconds=2.0, tries=30, budget=Budget(calls=40))
        with pytest.raises(ChatError, match="budget of 40 calls is spent"):
            chat.map(chat.acomplete, map(str, range(200)))
    worked = sum(count for fault, count in served.outcomes.items() if fault not in ("rate_429", "rate_500"))
    assert worked == chat.budget.spent.calls == 40
    assert len(chat.ledger) == served.outcomes["answered"]


def test_truncated_refused_and_overlong_are_counted_over_the_wire():
    class Choosy:
        name, identity = "sim:model", ""

        async def send(self, request, samples):
            asked = request.messages[-1]["content"]
            if asked in ("context", "content_filter"):
                raise RequestRefused(asked, "no")
            return [Choice("", asked, Usage(1, 1, 1)) for _ in samples]

        async def close(self):
            pass

    with serving(Choosy()) as url:
        chat = over_http(url)
        for reason in ("context", "content_filter", "length", "stop"):
            choice = chat.complete([{"role": "user", "content": reason}])[0]
            assert (choice.text, choice.finish_reason, choice.ok) == ("", reason, reason == "stop")


def test_a_server_names_what_is_wrong_with_a_request():
    with serving(SimulatedChat(Echo())) as url:
        endpoint = Endpoint(url, "sim:model")

        async def post(path, body):
            return await endpoint._client.post(path, cast_to=object, body=body)

        import openai

        for body in (
            {"model": "sim:model"},
            {"model": "sim:model", "messages": "x"},
            {"messages": [{"role": "user"}], "n": 0.5},
            [],
        ):
            with pytest.raises(openai.BadRequestError):
                run(post("/chat/completions", body))


def test_streams_are_the_same_answer_in_pieces():
    import openai

    backend = SimulatedChat(Echo())
    with serving(backend) as url, openai.OpenAI(base_url=url, api_key="none") as client:
        chunks = list(
            client.chat.completions.create(model="sim:model", messages=ASK, temperature=0, max_tokens=1024, stream=True)
        )
        texts = list(client.completions.create(model="sim:model", prompt="raw", temperature=0, max_tokens=1024, stream=True))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == Chat(backend).complete(ASK)[0].text
    assert parts[-1].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    assert "".join(chunk.choices[0].text for chunk in texts if chunk.choices) == Chat(backend).complete("raw")[0].text


# --- keys and addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["argument", "BROADSHEET_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_kept_nowhere(tmp_path, monkeypatch, caplog, capfd, source):
    for name in ("BROADSHEET_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = {"api_key": KEY + "\n"} if source == "argument" else monkeypatch.setenv(source, KEY) or {}
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "calls.sqlite"
    with serving(SimulatedChat(Echo()), key=KEY) as url:
        chat = over_http(url, ledger=path, **options)
        chat.complete(ASK, n=2)
        with pytest.raises(ChatError) as wrong:
            over_http(url, api_key="sk-another-secret-key").complete(ASK)
    with pytest.raises(ChatError) as down:
        chat.complete("nobody is there any more", n=1)  # the server is down
    files = b"".join(one.read_bytes() for one in tmp_path.iterdir())
    assert b"hello" in files
    out = capfd.readouterr()
    told = f"{caplog.text} {out} {wrong.value} {down.value} {chat.backend!r} {vars(chat.backend)} {chat.backend.identity}"
    for secret in (KEY, "sk-another-secret-key"):
        assert secret not in told
        assert secret.encode() not in files


def test_keys_that_cannot_be_sent_are_not_shown():
    for key in ("sk-ü-secret", "sk-a b-secret", "sk-\x07-secret"):
        with pytest.raises(ChatError, match="no key has") as error:
            Endpoint("http://localhost:1", "m", api_key=key)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1"),
        (" https://api.openai.com/v1 ", "https://api.openai.com/v1"),
        ("https://openrouter.ai/api/v1/chat/completions", "https://openrouter.ai/api/v1"),
        ("http://h/v1/completions/", "http://h/v1"),
        ("http://h/v1/models", "http://h/v1"),
        ("https://x.googleapis.com/v1beta/openai", "https://x.googleapis.com/v1beta/openai"),
        ("http://[::1]:8080", "http://[::1]:8080/v1"),
    ],
)
def test_addresses_with_and_without_v1(given, wanted):
    assert address(given) == wanted


@pytest.mark.parametrize(
    "given",
    ["localhost:8000", "ftp://x/v1", "http://", "http://x:99999/v1", "http://x:abc", "http://me:pass-word@x/v1", "http://x/v1?key=pass-word"],
)  # fmt: skip
def test_what_is_no_address(given):
    with pytest.raises(ChatError, match="http://localhost:8000/v1") as error:
        address(given)
    assert "pass-word" not in str(error.value)


def test_the_ledger_knows_a_server_by_its_address_or_a_name(tmp_path):
    texts = []
    for _ in range(2):
        with serving(SimulatedChat(Echo())) as url:
            chat = over_http(url, ledger=tmp_path / "l.sqlite", identity="our llama")
            texts.append(chat.complete(ASK)[0])
            chat.close()
    assert [choice.stored for choice in texts] == [False, True]


def test_connect_finds_the_only_model_and_the_home_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path / "home"))
    with serving(SimulatedChat(Echo(), name="sim:only")) as url:
        chat = connect(url.removesuffix("/v1"))
        assert chat.name == "sim:only"
        chat.complete(ASK)
        chat.close()
    assert (tmp_path / "home" / "ledger.sqlite").is_file()


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_pays_twice_at_most_for_calls_under_way(tmp_path):
    script = (
        "import sys; from broadsheet.core.chat import connect\n"
        "chat = connect(sys.argv[1], 'sim:model', ledger=sys.argv[2], concurrency=8)\n"
        "print([c[0].text for c in chat.map(chat.acomplete, map(str, range(400)))])\n"
    )
    backend, served = SimulatedChat(Echo(), seconds=0.01), Served()
    with serving(backend, served=served) as url:
        command = [sys.executable, "-c", script, url, str(tmp_path / "l.sqlite")]
        for kill in (100, 250):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while served.requests < kill:
                sleep(0.002)
                assert process.poll() is None
            process.kill()
            process.wait()
        texts = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    near = Chat(backend)
    assert texts.strip() == str([choices[0].text for choices in near.map(near.acomplete, map(str, range(400)))])
    assert 400 <= served.requests <= 400 + 2 * 8
