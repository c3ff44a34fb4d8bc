"""`Chat`: order, one call for one question, resume, limits, tries, what is counted; and the ledger under it."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.chat import (
    Budget,
    BudgetSpent,
    Chat,
    ChatError,
    Choice,
    Ledger,
    Price,
    Request,
    Usage,
    connect,
    in_order,
    run,
)
from broadsheet.core.chat.protocol import RequestRefused, Transient
from broadsheet.core.records import StorageError

ASK = [{"role": "user", "content": "hello"}]


class Scripted:
    """A backend that does what ``act(request, samples, number of the call)`` says, after ``seconds``."""

    name, identity = "scripted", "here"

    def __init__(self, act=None, seconds=0.0):
        self.act, self.seconds = act, seconds
        self.calls, self.at_once, self.most_at_once, self.closed = [], 0, 0, False

    async def send(self, request, samples):
        number = len(self.calls)
        self.calls.append((request, tuple(samples)))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
            if self.act:
                return self.act(request, samples, number)
            return [answer(f"{asked(request)}/{sample}") for sample in samples]
        finally:
            self.at_once -= 1

    async def close(self):
        self.closed = True


def asked(request):
    return request.messages if isinstance(request.messages, str) else request.messages[-1]["content"]


def answer(text, reason="stop", prompt=10, written=5):
    return Choice(text, reason, Usage(1, prompt, written))


def failing(*errors, then="fine"):
    """Raises these errors, a call each, then answers."""

    def act(request, samples, number):
        if number < len(errors):
            raise errors[number]
        return [answer(then) for _ in samples]

    return act


def quick(backend, **options):
    return Chat(backend, **{"backoff": (0.001, 0.002), **options})


# --- order, samples, the ledger -------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests():
    class Backwards(Scripted):
        async def send(self, request, samples):
            await asyncio.sleep(0.02 - int(asked(request)) / 1000)
            return await super().send(request, samples)

    chat = Chat(Backwards(), concurrency=16)

    async def one(number):
        return (await chat.acomplete(str(number)))[0].text

    assert chat.map(one, range(16)) == [f"{number}/0" for number in range(16)]


def test_at_most_so_many_calls_are_under_way():
    backend = Scripted(seconds=0.002)
    chat = Chat(backend, concurrency=3)

    async def all_at_once():
        await asyncio.gather(*(chat.acomplete(str(number)) for number in range(20)))

    run(all_at_once())
    assert backend.most_at_once == 3


def test_the_same_question_is_asked_once():
    backend = Scripted(seconds=0.01)
    chat = Chat(backend)

    async def both():
        return await asyncio.gather(*(chat.acomplete(ASK) for _ in range(5)))

    answers = run(both())
    assert len(backend.calls) == 1
    assert {choices[0].text for choices in answers} == {"hello/0"}
    assert sum(choices[0].stored for choices in answers) == 4
    assert chat.spent.calls == 1
    assert chat.complete(ASK)[0].stored  # and later from the ledger
    assert len(backend.calls) == 1
    assert chat.replayed[""].calls == 5


def test_samples_are_numbered_and_only_missing_ones_are_asked_for():
    backend = Scripted()
    chat = Chat(backend)
    chat.complete(ASK, n=1, first=2)
    choices = chat.complete(ASK, n=5)
    assert [choice.text for choice in choices] == [f"hello/{number}" for number in range(5)]
    assert [samples for _, samples in backend.calls] == [(2,), (0, 1), (3, 4)]


def test_a_server_that_ignores_n_is_asked_again():
    backend = Scripted(lambda request, samples, number: [answer(f"call {number}")])
    chat = Chat(backend)
    assert [choice.text for choice in chat.complete(ASK, n=3)] == ["call 0", "call 1", "call 2"]
    assert [samples for _, samples in backend.calls] == [(0, 1, 2), (1, 2), (2,)]
    assert chat.spent.calls == 3


def test_a_server_that_gives_too_much_is_cut():
    chat = Chat(Scripted(lambda request, samples, number: [answer("a"), answer("b"), answer("c")]))
    assert [choice.text for choice in chat.complete(ASK, n=2)] == ["a", "b"]


def test_a_run_goes_on_from_the_ledger(tmp_path):
    path = tmp_path / "calls.sqlite"
    first = Chat(Scripted(), ledger=path)
    texts = [first.complete(ASK, n=3, temperature=1.0), first.complete("raw")]
    first.close()
    backend = Scripted()
    again = Chat(backend, ledger=path)
    assert [[choice.text for choice in choices] for choices in texts] == [
        [choice.text for choice in again.complete(ASK, n=3, temperature=1.0)],
        [choice.text for choice in again.complete("raw")],
    ]
    assert not backend.calls
    assert again.spent == Usage()
    assert again.replayed[""].calls == 2  # as many as were paid for


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5}, {"top_p": 0.9}, {"max_tokens": 7}, {"stop": "x"}, {"seed": 1}, {"logprobs": 0},
        {"response_format": {"type": "json_object"}}, {"tools": [{"type": "function"}]}, {"extra": {"min_p": 0.1}},
    ],
)  # fmt: skip
def test_whatever_changes_an_answer_changes_its_key(change):
    assert Request.of(ASK, **change).key("model", 0) != Request.of(ASK).key("model", 0)


def test_keys_tell_models_and_samples_apart_but_not_spellings():
    request = Request.of(ASK, temperature=0, stop=["x"], max_tokens=8.0)
    same = Request.of(({"content": "hello", "role": "user"},), temperature=0.0, stop="x", max_tokens=8)
    assert request.key("m", 0) == same.key("m", 0)
    assert len({request.key("m", 0), request.key("m", 1), request.key("other", 0)}) == 3


def test_what_is_asked_is_a_copy():
    message = {"role": "user", "content": [{"type": "text", "text": "before"}]}
    request = Request.of([message])
    message["content"][0]["text"] = "after"
    assert "before" in request.content
    assert request.messages[0]["content"][0]["text"] == "before"


@pytest.mark.parametrize(
    ("messages", "parameters"),
    [
        ([], {}), ("", {}), ([{"content": "no role"}], {}), (["text"], {}), ([{"role": "user", "content": b"bytes"}], {}),
        (ASK, {"temperature": -1}), (ASK, {"temperature": float("nan")}), (ASK, {"temperature": float("inf")}),
        (ASK, {"temperature": "hot"}), (ASK, {"top_p": 0}), (ASK, {"top_p": 1.5}), (ASK, {"max_tokens": 0}),
        (ASK, {"max_tokens": 1.5}), (ASK, {"max_tokens": None}), (ASK, {"stop": [""]}), (ASK, {"stop": [1]}),
        (ASK, {"extra": {"x": float("nan")}}), (ASK, {"n": 0}),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error_of_one_line(messages, parameters):
    with pytest.raises(ValueError) as caught:
        Chat(Scripted()).complete(messages, **parameters)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=30), st.text(st.characters(exclude_categories=()), max_size=9))
def test_every_text_survives_the_ledger(text, tag):
    backend = Scripted(lambda request, samples, number: [answer(text)])
    chat = Chat(backend)
    for _ in range(2):
        assert chat.complete([{"role": "user", "content": text + "\0\ud83d"}], tag=tag)[0].text == text
    assert len(backend.calls) == 1
    (row,) = chat.ledger
    assert row["request"]["messages"][0]["content"] == text + "\0\ud83d"
    assert row["answer"]["text"] == text


def test_the_ledger_keeps_log_probabilities_tool_calls_and_usage(tmp_path):
    full = Choice(
        "x", "tool_calls", Usage(1, 7, 3, estimated=1),
        ({"token": "\0", "logprob": -0.5, "top": {"\0": -0.5, "\ud83d": -1.0}},), ({"id": "1", "function": {"name": "f"}},),
    )  # fmt: skip
    chat = Chat(Scripted(lambda *_: [full]), ledger=tmp_path / "l.sqlite", price=Price(1.0, 10.0))
    paid = chat.complete(ASK)[0]
    stored = chat.complete(ASK)[0]
    assert stored.stored
    assert (stored.text, stored.finish_reason, stored.logprobs, stored.tool_calls) == (
        full.text, full.finish_reason, full.logprobs, full.tool_calls,
    )  # fmt: skip
    assert stored.usage == paid.usage
    assert paid.usage.money == pytest.approx(37e-6)
    assert paid.usage.estimated == 1
    assert paid.ok


def test_ledger_totals_by_model_and_tag():
    chat = Chat(Scripted(lambda request, samples, number: [answer("a"), answer("b", prompt=0)]))
    chat.complete("one", n=2, tag="judge")
    chat.complete("two", n=2, tag="judge")
    chat.complete("three", n=2)
    totals = {(model, tag): (count, usage.calls, usage.tokens) for model, tag, count, usage in chat.ledger.totals()}
    assert totals == {("scripted", ""): (2, 1, 20), ("scripted", "judge"): (4, 2, 40)}
    assert len(chat.ledger) == 6


def test_a_ledger_that_cannot_be_used_is_said_in_one_line(tmp_path):
    (tmp_path / "text").write_text("this is no database, and long enough to be sure of it" * 20)
    with pytest.raises(StorageError, match="cannot open the ledger"):
        Ledger(tmp_path / "text")
    with pytest.raises(StorageError, match="cannot open the ledger"):
        Ledger(tmp_path / "text" / "below")
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version=99")
    later.close()
    with pytest.raises(StorageError, match="another version"):
        Ledger(tmp_path / "later")
    closed = Ledger(tmp_path / "fine")
    closed.close()
    with pytest.raises(StorageError, match="cannot read"):
        closed.get("key")


def test_answers_of_one_call_are_stored_all_or_none(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    rows = [("k1", 0, answer("a")), ("k2", {}, answer("b"))]  # the second cannot be written
    with pytest.raises(StorageError):
        ledger.add("m", "", Request.of(ASK), rows)
    assert len(ledger) == 0
    ledger.add("m", "", Request.of(ASK), rows[:1])
    assert len(ledger) == 1


def test_processes_share_a_ledger(tmp_path):
    script = (
        "import sys; from broadsheet.core.chat import Ledger, Request, Choice\n"
        "ledger = Ledger(sys.argv[1])\n"
        "for i in range(200):\n"
        "    keys = f'{sys.argv[2]} {i}', f'both {i}'\n"
        "    ledger.add('m', 't', Request.of('q'), [(key, 0, Choice('a')) for key in keys])\n"
    )
    path = str(tmp_path / "l.sqlite")
    writers = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "xy"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(Ledger(path)) == 600


def test_a_ledger_that_was_given_stays_open():
    ledger, backend = Ledger(), Scripted()
    chat = Chat(backend, ledger=ledger)
    chat.complete(ASK)
    chat.close()
    assert backend.closed
    assert len(ledger) == 1


# --- failures -------------------------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again():
    backend = Scripted(failing(Transient("429"), Transient("500")))
    chat = quick(backend)
    assert chat.complete(ASK)[0].text == "fine"
    assert len(backend.calls) == 3
    assert chat.spent.calls == 1


def test_pauses_double_up_to_the_longest(monkeypatch):
    pauses = []
    sleep = asyncio.sleep

    async def noted(seconds, *rest):
        if seconds:
            pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    backend = Scripted(failing(*[Transient("500")] * 6))
    Chat(backend, tries=7, backoff=(1.0, 8.0)).complete(ASK)
    assert [0.5 * most <= pause <= most for pause, most in zip(pauses, [1, 2, 4, 8, 8, 8], strict=True)] == [True] * 6


def test_retry_after_is_kept_by_all_calls_of_the_chat():
    times = []

    def act(request, samples, number):
        times.append(time.monotonic())
        if number == 0:
            raise Transient("429", after=0.3)
        return [answer("fine")]

    chat = quick(Scripted(act))

    async def all_of_them():
        first = asyncio.ensure_future(chat.acomplete("first"))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, chat.acomplete("second"))

    run(all_of_them())
    assert len(times) == 3
    assert min(times[1:]) - times[0] >= 0.3


def test_a_pause_of_an_hour_ends_the_run():
    with pytest.raises(ChatError, match="3600 s"):
        quick(Scripted(failing(Transient("429", after=3600)))).complete(ASK)


def test_nobody_there_ends_the_run_after_all_tries():
    backend = Scripted(failing(*[Transient("nobody")] * 99))
    with pytest.raises(ChatError, match="did not answer after 4 tries: nobody"):
        quick(backend, tries=4).complete(ASK)
    assert len(backend.calls) == 4


def test_a_request_that_never_works_is_counted_while_others_are_answered():
    def act(request, samples, number):
        if asked(request) == "bad":
            raise Transient("500")
        return [answer("fine")]

    chat = quick(Scripted(act), tries=2)
    assert chat.complete("good")[0].ok
    choices = chat.complete("bad", n=2)
    assert [choice.finish_reason for choice in choices] == ["error", "error"]
    assert not choices[0].ok
    assert len(chat.ledger) == 1  # failures are not kept: the next run asks again
    for number in range(6):
        chat.complete("bad", first=number)
    with pytest.raises(ChatError):  # an endpoint that fails eight times in a row is dead
        chat.complete("bad")


def test_refusals_of_one_request_are_counted_and_never_stored():
    def act(request, samples, number):
        raise RequestRefused(asked(request))

    backend = Scripted(act)
    chat = quick(backend)
    for reason in ("context", "content_filter"):
        assert [choice.finish_reason for choice in chat.complete(reason, n=2)] == [reason, reason]
    assert len(backend.calls) == 2  # no second tries
    assert len(chat.ledger) == 0


def test_truncated_and_empty_answers_are_kept_as_what_they_are():
    backend = Scripted(
        lambda request, samples, number: [answer("cut", "length") if asked(request) == "long" else answer("")]
    )
    chat = Chat(backend)
    for _ in range(2):
        long, empty = chat.complete("long")[0], chat.complete("empty")[0]
        assert (long.text, long.finish_reason, long.ok) == ("cut", "length", False)
        assert (empty.text, empty.ok) == ("", True)
    assert len(backend.calls) == 2


def test_an_answer_without_a_choice_is_tried_again():
    backend = Scripted(lambda request, samples, number: [answer("fine")] if number else [])
    assert quick(backend).complete(ASK)[0].text == "fine"


def test_an_error_of_a_backend_is_seen_and_releases_what_was_held():
    budget = Budget(calls=2)
    chat = quick(Scripted(failing(KeyError("bug"))), budget=budget, concurrency=1)
    with pytest.raises(KeyError):
        chat.complete(ASK)
    assert chat.complete(ASK)[0].text == "fine"
    assert budget.spent.calls == 1


# --- cancelling -----------------------------------------------------------------------------------------------------------


def test_the_first_error_of_a_map_waits_for_calls_under_way_and_stores_them():
    def act(request, samples, number):
        if asked(request) == "bad":
            raise ChatError("wrong key")
        return [answer("paid")]

    class Slow(Scripted):
        async def send(self, request, samples):
            if asked(request) != "bad":
                await asyncio.sleep(0.1)
            return await super().send(request, samples)

    backend = Slow(act)
    chat = Chat(backend, concurrency=4)
    with pytest.raises(ChatError, match="wrong key"):
        chat.map(chat.acomplete, ["a", "b", "bad", "c", "d", "e"])
    assert len(chat.ledger) == 3  # a, b and c were under way; d and e were never sent
    assert len(backend.calls) == 4


def test_who_waits_for_a_call_that_is_cancelled_asks_itself():
    backend = Scripted(seconds=0.05)
    chat = Chat(backend, concurrency=1)

    async def two():
        blocking = asyncio.ensure_future(chat.acomplete("other"))
        await asyncio.sleep(0.01)
        first = asyncio.ensure_future(chat.acomplete(ASK))  # waits for its place
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(chat.acomplete(ASK))  # waits for the first
        await asyncio.sleep(0.01)
        first.cancel()
        await blocking
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert run(two())[0].text == "hello/0"
    assert [asked(request) for request, _ in backend.calls] == ["other", "hello"]


def test_a_cancelled_call_is_counted_and_stored():
    backend = Scripted(seconds=0.05)
    chat = Chat(backend, budget=Budget(calls=1))

    async def impatient():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(chat.acomplete(ASK), 0.01)

    run(impatient())
    assert chat.budget.spent.calls == chat.spent.calls == 1
    assert chat.complete(ASK)[0].stored


# --- budgets --------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_budgets_are_never_exceeded(data):
    """Whatever is asked at once, with failures among it; what was cut off counts as the worst case."""
    calls = data.draw(st.none() | st.integers(0, 12))
    tokens = data.draw(st.none() | st.integers(0, 2500))
    money = data.draw(st.none() | st.floats(0, 0.01))
    budget = Budget(calls=calls, tokens=tokens, money=money)
    price = Price(2.0, 10.0)
    outcomes = data.draw(st.lists(st.sampled_from(["fine", "cut", "busy", "context"]), min_size=30, max_size=30))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=12, max_size=12))
    paid: list[Usage] = []  # what a provider may charge for: everything it began

    def act(request, samples, number):
        outcome = outcomes[number % len(outcomes)]
        prompt = 1 + number * 37 % request.most_tokens
        written = [1 + (number + sample) * 13 % request.max_tokens for sample in samples]
        cost = Usage(1, prompt, sum(written), (prompt * 2 + sum(written) * 10) / 1e6)
        if outcome == "busy":
            raise Transient("429", begun=False)
        if outcome == "context":
            paid.append(Usage(1))
            raise RequestRefused("context")
        paid.append(cost)
        if outcome == "cut":
            raise Transient("cut", begun=True)
        return [answer("x", prompt=0 if place else prompt, written=count) for place, count in enumerate(written)]

    chats = [Chat(Scripted(act, seconds=0.0), budget=budget, price=price, backoff=(0.0, 0.0), concurrency=4) for _ in "ab"]
    for chat, name in zip(chats, "ab", strict=True):
        chat.backend.identity = name
        chat._answered = 1  # so that requests that never work are counted instead of ending the run

    async def one(number):
        chat = chats[number % 2]
        try:
            await chat.acomplete(f"question {number}", n=1 + number % 3, max_tokens=lengths[number % 12], temperature=1.0)
        except BudgetSpent:
            return "spent"
        except ChatError:
            return "dead"

    run(in_order(one, range(24), 8))
    total = sum(paid, Usage())
    assert calls is None or total.calls <= budget.spent.calls <= calls
    assert tokens is None or total.tokens <= budget.spent.tokens <= tokens
    assert money is None or total.money <= budget.spent.money + 1e-12 <= money + 2e-12
    assert budget._under_way == 0
    assert budget._reserved == Usage()


def test_a_budget_is_used_up_to_its_end():
    """Calls under way that turn out cheap make room: the budget is not lost to worst cases."""
    budget = Budget(tokens=700)
    chat = Chat(Scripted(seconds=0.001), budget=budget, concurrency=8)  # 15 tokens a call, up to 352 in the worst case

    async def one(number):
        try:
            return (await chat.acomplete(ASK, first=number, max_tokens=60))[0].ok
        except BudgetSpent:
            return False

    answered = sum(run(in_order(one, range(60), 8)))
    worst = Request.of(ASK, max_tokens=60).most_tokens + 60
    assert answered == (700 - worst) // 15 + 1
    assert budget.spent.tokens == 15 * answered


def test_answers_from_the_ledger_are_free():
    chat = Chat(Scripted(), budget=Budget(calls=1))
    chat.complete(ASK)
    assert chat.complete(ASK)[0].stored
    with pytest.raises(BudgetSpent, match="the budget of 1 calls is spent"):
        chat.complete("something else")


def test_a_budget_shared_by_chats_wakes_those_that_wait():
    budget = Budget(tokens=2000)
    slow, fast = Scripted(seconds=0.05), Scripted()
    fast.identity = "fast"
    one, other = Chat(slow, budget=budget), Chat(fast, budget=budget)

    async def both():
        first = asyncio.ensure_future(one.acomplete(ASK, max_tokens=1500))
        await asyncio.sleep(0.01)
        await asyncio.wait_for(other.acomplete(ASK, max_tokens=1500), 5)  # fits once the first is settled
        await first

    run(both())
    assert budget.spent.calls == 2


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": "\ud83d" * 100}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
        "raw text",
    ],
)
def test_the_worst_case_covers_templates_and_images(messages):
    request = Request.of(messages)
    text = json.dumps(messages).count("\\ud83d") * 3
    image = 16_000 if "image_url" in str(messages) else 0
    template = 0 if isinstance(messages, str) else 100
    assert request.most_tokens >= text + image + template
    with_tools = Request.of(ASK, tools=[{"type": "function", "function": {"name": "f" * 500}}])
    assert with_tools.most_tokens > Request.of(ASK).most_tokens + 500


@pytest.mark.parametrize("limits", [{"calls": -1}, {"money": float("nan")}, {"tokens": -5}])
def test_budgets_below_nothing_are_errors(limits):
    with pytest.raises(ValueError, match="at least 0"):
        Budget(**limits)


def test_options_that_cannot_be():
    for options in ({"concurrency": 0}, {"tries": 0}, {"budget": Budget(money=1.0)}, {"requests_per_minute": -1}):
        with pytest.raises(ValueError):
            Chat(Scripted(), **options)


def test_requests_a_minute():
    chat = Chat(Scripted(), requests_per_minute=60_000 / 20)  # one in 20 ms
    start = time.monotonic()
    chat.map(chat.acomplete, [str(number) for number in range(6)])
    assert time.monotonic() - start >= 5 * 0.02 - 0.005


# --- event loops ----------------------------------------------------------------------------------------------------------


def test_a_chat_can_be_used_from_any_loop_and_thread():
    chat = Chat(Scripted(seconds=0.001))
    texts = []

    def elsewhere(number):
        texts.append(asyncio.run(chat.acomplete(str(number)))[0].text)

    threads = [threading.Thread(target=elsewhere, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == [f"{number}/0" for number in range(4)]
    assert chat.complete("here")[0].text == "here/0"


def test_asking_synchronously_on_the_loop_is_an_error():
    chat = Chat(Scripted())

    async def wrong():
        chat.complete(ASK)

    with pytest.raises(RuntimeError, match="await"):
        run(wrong())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own_loop():
    script = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from broadsheet.core.chat import run\n"
        "async def one(): return 1\n"
        "run(one()); child = os.fork()\n"
        "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "os._exit(0 if run(one()) == 1 else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 0


def test_importing_chat_is_light():
    script = (
        "import sys; import broadsheet.core.chat, broadsheet.core.chat.simulated, broadsheet.core.chat.endpoint\n"
        "heavy = {'openai', 'torch', 'transformers', 'starlette', 'uvicorn', 'httpx2', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_what_is_no_address_and_no_model_is_said():
    with pytest.raises(ValueError, match="no model 'nonsense'"):
        connect("nonsense", ledger=None)
