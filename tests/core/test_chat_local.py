"""Local models as backends: templates, draws, ends, log-probabilities, and the same answers over HTTP."""

from __future__ import annotations

import asyncio
from functools import lru_cache

import pytest
import torch
from tiny import tiny

from broadsheet.core.chat import Chat, ChatError, Request, connect, in_order, run
from broadsheet.core.chat.local import LocalModel, _drawn_from
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import load
from broadsheet.core.sampling import Noise


@lru_cache
def pocket(batch=8):
    return LocalModel(*loaded(), name="pocket-2m", batch=batch)


@lru_cache
def loaded(name="pocket-2m"):
    return load(name)


def questions(count, task="kv"):
    sessions = make_sessions(task, count, 120, 1, 3)
    return [
        ([{"role": "user", "content": f"{session.context} {session.turns[0].input}"}], session.turns[0])
        for session in sessions
    ]


def generated(prompt_ids, count, name="pocket-2m"):
    model, tokenizer = loaded(name)
    ids = torch.tensor([prompt_ids])
    tokens = model.generate(ids, max_new_tokens=count, do_sample=False)[0, len(prompt_ids) :]
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


def test_a_pocket_model_is_asked_through_its_template_and_answers_right():
    chat = Chat(pocket())
    asked = questions(8)
    answers = [choices[0] for choices in chat.map(lambda one: chat.acomplete(one[0], max_tokens=16), asked)]
    right = sum(turn.answer in choice.text for choice, (_, turn) in zip(answers, asked, strict=True))
    assert right >= 6
    assert all(choice.finish_reason == "stop" for choice in answers)
    assert not any(choice.text.startswith(" ") or "<|" in choice.text for choice in answers)


def test_greedy_answers_are_what_transformers_generates():
    _, tokenizer = loaded()
    chat = Chat(pocket())
    for messages, _ in questions(3):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        text, tokens = generated(ids, 16)
        choice = chat.complete(messages, max_tokens=16)[0]
        assert choice.text == text.removeprefix(" ")
        assert (choice.usage.prompt_tokens, choice.usage.completion_tokens) == (len(ids), len(tokens))


def test_strings_are_continued_as_they_are():
    model, tokenizer = loaded("pocket-code")
    backend = LocalModel(model, tokenizer, name="pocket-code")
    prompt = 'def add(a, b):\n    """Add two numbers."""\n'
    text, _ = generated(tokenizer(prompt)["input_ids"], 12, "pocket-code")
    choice = Chat(backend).complete(prompt, max_tokens=12)[0]
    assert choice.text == text
    assert text.startswith("    ")  # nothing is stripped


def test_a_model_without_a_template_gets_lines_and_ends_before_the_next():
    model, tokenizer = loaded("pocket-code")
    assert not tokenizer.chat_template
    backend = LocalModel(model, tokenizer)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ids, stops = backend._prompt(Request.of(messages, stop="x"))
    assert ids == tokenizer("system: be brief\nuser: hi\nassistant:")["input_ids"]
    assert stops == ("x", "\nuser:")


def test_length_stop_and_stop_strings():
    chat = Chat(pocket())
    messages = questions(1)[0][0]
    whole = chat.complete(messages, max_tokens=16)[0]
    words = whole.text.split()
    assert len(words) >= 2
    cut = chat.complete(messages, max_tokens=whole.usage.completion_tokens - 1)[0]  # no room for the end token
    assert (cut.text, cut.finish_reason, cut.ok) == (whole.text, "length", False)
    short = chat.complete(messages, max_tokens=1)[0]
    assert (short.finish_reason, short.usage.completion_tokens) == ("length", 1)
    stopped = chat.complete(messages, max_tokens=16, stop=words[1])[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text.partition(words[1])[0], "stop")
    assert stopped.usage.completion_tokens < whole.usage.completion_tokens


def test_draws_depend_on_request_seed_and_sample_only():
    hot = {"temperature": 2.0, "max_tokens": 12}
    asked = [messages for messages, _ in questions(4)]

    def texts(batch, concurrency, **more):
        chat = Chat(LocalModel(*loaded(), batch=batch), concurrency=concurrency)
        answers = run(in_order(lambda one: chat.acomplete(one, n=3, **hot, **more), asked, concurrency))
        return [[choice.text for choice in choices] for choices in answers]

    alone = texts(1, 1)
    assert all(len(set(choices)) > 1 for choices in alone)
    assert texts(16, 8) == texts(3, 4) == alone
    assert texts(8, 4, seed=5) != alone
    chat = Chat(pocket())
    single = [chat.complete(asked[0], first=number, **hot)[0].text for number in (2, 0, 1)]
    assert single == [alone[0][number] for number in (2, 0, 1)]
    seeded = chat.complete(asked[0], n=2, seed=1, **hot)  # seed s, sample k is seed s + k: how a server is told of samples
    assert [choice.text for choice in seeded] == alone[0][1:]


def test_requests_that_wait_are_answered_together():
    backend, batches = LocalModel(*loaded(), batch=8), []
    inner = backend._answers
    backend._answers = lambda jobs: batches.append(len(jobs)) or inner(jobs)
    asked = [messages for messages, _ in questions(12)]
    chat = Chat(backend, concurrency=12)
    together = chat.map(lambda one: chat.acomplete(one, max_tokens=8), asked)
    assert max(batches) > 1
    assert sum(batches) == 12
    alone = Chat(pocket(1))
    assert [choices[0].text for choices in together] == [alone.complete(one, max_tokens=8)[0].text for one in asked]


def test_more_samples_than_a_batch_holds():
    chat = Chat(LocalModel(*loaded(), batch=2))
    choices = chat.complete(questions(1)[0][0], n=5, temperature=1.5, max_tokens=4)
    assert len(choices) == 5
    assert chat.spent.calls == 3


def test_log_probabilities_are_the_models():
    model, tokenizer = loaded()
    messages = questions(1)[0][0]
    for temperature in (0.0, 1.5):
        choice = Chat(pocket()).complete(messages, max_tokens=8, logprobs=3, temperature=temperature)[0]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert len(choice.logprobs) == choice.usage.completion_tokens
        vocabulary = tokenizer.get_vocab()
        written = list(ids)
        for one in choice.logprobs:
            with torch.inference_mode():
                truth = model(torch.tensor([written])).logits[0, -1].log_softmax(-1)
            values, tokens = truth.topk(3)
            assert list(one["top"]) == list(dict.fromkeys(tokenizer.decode([token]) for token in tokens.tolist()))
            assert max(one["top"].values()) == pytest.approx(float(values[0]), abs=1e-4)
            found = [token for token in vocabulary.values() if tokenizer.decode([token]) == one["token"]]
            token = min(found, key=lambda candidate: abs(float(truth[candidate]) - one["logprob"]))
            assert one["logprob"] == pytest.approx(float(truth[token]), abs=1e-4)
            written.append(token)
    assert Chat(pocket()).complete(messages, max_tokens=2)[0].logprobs is None


def test_the_nucleus_is_the_smallest_set_with_the_mass():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(20_000, 1)
    for top_p, shares in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.79, [0.625, 0.375, 0, 0]), (0.4, [1.0, 0, 0, 0])):
        asked = [Request.of("x", temperature=1.0, top_p=top_p)] * len(logits)
        noise = Noise(f"{top_p}", len(logits))
        drawn = _drawn_from(logits, asked, [noise, *[_Nothing()] * (len(logits) - 1)]).argmax(-1)
        assert torch.allclose(torch.bincount(drawn, minlength=4) / len(drawn), torch.tensor(shares), atol=0.015)
    mixed = [Request.of("x"), Request.of("x", temperature=0.5)]
    scores = _drawn_from(logits[:2], mixed, [None, Noise("y", 1)])
    assert torch.equal(scores[0], logits[0])  # greedy rows are left alone
    assert not torch.equal(scores[1], logits[1])


class _Nothing:
    """No rows of noise: the first source gives those of all."""

    def next(self, vocabulary):
        return torch.empty(0, vocabulary)


def test_a_prompt_without_room_for_an_answer_is_refused():
    backend = LocalModel(*loaded())
    backend.model.config.max_position_embeddings, before = 64, backend.model.config.max_position_embeddings
    try:
        chat = Chat(backend)
        assert chat.complete("give " * 200)[0].finish_reason == "context"
        fits = chat.complete("give " * 10, max_tokens=500)[0]
        assert fits.usage.tokens <= 64  # cut where the positions end
        assert fits.finish_reason in ("length", "stop")
    finally:
        backend.model.config.max_position_embeddings = before


def test_what_a_local_model_cannot_do_is_said():
    chat = Chat(pocket())
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    for messages, parameters, match in (
        (image, {}, "text only"),
        ("x", {"extra": {"min_p": 0.1}}, "knows no min_p"),
        ("x", {"response_format": {"type": "json_object"}}, "knows no response_format"),
    ):
        with pytest.raises(ChatError, match=match):
            chat.complete(messages, **parameters)
    model, tokenizer = loaded()
    with pytest.raises(ChatError, match="needs its tokenizer"):
        LocalModel(model)
    picky = LocalModel(model, tokenizer)
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('roles must\nalternate') }}"
    try:
        with pytest.raises(ChatError, match="refuses the messages: roles must alternate"):
            Chat(picky).complete([{"role": "user", "content": "x"}])
    finally:
        tokenizer.chat_template = template


def test_an_error_in_the_models_thread_reaches_who_asked():
    backend = LocalModel(*loaded())
    backend._answers = lambda jobs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Chat(backend).complete("x")


def test_identity_follows_weights_precision_and_template():
    _, tokenizer = loaded()
    same = [LocalModel(tiny(seed=seed), tokenizer).identity for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]
    assert LocalModel(tiny(seed=0).bfloat16(), tokenizer).identity != same[0]


def test_a_cancelled_request_that_waits_is_not_answered():
    backend, asked = LocalModel(*loaded(), batch=1), []
    inner = backend._answers
    backend._answers = lambda jobs: asked.append(jobs) or inner(jobs)

    async def two():
        first = asyncio.ensure_future(backend.send(Request.of("give", max_tokens=20), [0]))
        second = asyncio.ensure_future(backend.send(Request.of("take", max_tokens=20), [0]))
        await asyncio.sleep(0)
        second.cancel()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second

    run(two())
    run(backend.send(Request.of("give", max_tokens=1), [0]))  # whatever was submitted before is over
    assert not backend._waiting
    assert len(asked) == 2


def test_connect_loads_a_built_in_model():
    chat = connect("pocket-2m", ledger=None)
    assert chat.name == "pocket-2m"
    messages, turn = questions(1)[0]
    assert turn.answer in chat.complete(messages, max_tokens=16)[0].text


def test_a_local_model_over_http_is_the_same_model():
    pytest.importorskip("openai")
    from broadsheet.core.chat.server import serving

    backend = LocalModel(*loaded(), name="pocket-2m", batch=4)
    near = Chat(pocket())
    messages = questions(1)[0][0]
    asked = [
        {"messages": messages, "max_tokens": 16, "logprobs": 2},
        {"messages": messages, "max_tokens": 8, "n": 3, "first": 1, "temperature": 1.2, "top_p": 0.9},
        {"messages": "Give feru", "max_tokens": 5, "stop": ["foko"], "logprobs": 1},
    ]
    with serving(backend) as url:
        far = connect(url, "pocket-2m", ledger=None)
        for one in asked:
            for ours, theirs in zip(near.complete(**one), far.complete(**one), strict=True):
                assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
                assert [p["token"] for p in ours.logprobs or ()] == [p["token"] for p in theirs.logprobs or ()]
        assert near.spent.tokens == far.spent.tokens
        assert far.complete("give " * 5000)[0].finish_reason == "context"
