"""The session runner: what SCBench demands of a harness."""

import hashlib
import json

import pytest
import torch
from tiny import tiny

from broadsheet.core.microworld.sessions import Session, Turn
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.microworld.tokenizer import train_tokenizer
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.scbench import OFFICIAL, SessionRunner, _Stream, encode, load_sessions
from broadsheet.methods.caches.snapkv import SnapKV


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny("gqa", vocab_size=2048, max_position_embeddings=4096, eos_token_id=2)


def ids_of(runs):
    return [(r.session, r.turn, r.answer, r.score) for r in runs]


@pytest.fixture(scope="module")
def sessions():
    return make_sessions("kv", 3, 160, 3, seed=2)


def fresh_answer(model, tokenizer, ids, cap):
    """Greedy decoding of a prompt by plain transformers."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=cap, do_sample=False, eos_token_id=2)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_acceptance_1_dense_answers_equal_a_fresh_prefill(model, tokenizer, sessions):
    runner = SessionRunner(model, tokenizer, Full(), dtype=None)
    by_turn = {(r.session, r.turn): r.answer for r in runner.run(sessions, "multi-turn")}
    for session in sessions:
        prompt = encode(session, tokenizer)
        ids: list[int] = list(prompt.context)
        for turn, question in enumerate(prompt.questions):
            ids += question
            cap = session.turns[turn].max_new_tokens
            assert by_turn[session.id, turn + 1] == fresh_answer(model, tokenizer, ids, cap)
            ids += prompt.answers[turn]


def test_prompt_is_the_chat_template_of_the_conversation(tokenizer, sessions):
    """Cut into context, questions and gold answers and put together again, nothing is lost or doubled."""
    session = sessions[0]
    prompt = encode(session, tokenizer)
    history = []
    for number, turn in enumerate(session.turns):
        opening = f"{session.context} " if number == 0 else ""
        history.append({"role": "user", "content": opening + turn.input})
        history.append({"role": "assistant", "content": turn.extra["reference"]})
    whole = tokenizer.apply_chat_template(history, tokenize=True, return_dict=False)
    ours = list(prompt.context)
    for question, answer in zip(prompt.questions, prompt.answers, strict=True):
        ours += [*question, *answer]
    assert ours == whole


def test_acceptance_2_requests_do_not_touch_the_shared_cache_or_each_other(model, tokenizer, sessions):
    method = SnapKV(0.5, window=8)
    runner = SessionRunner(model, tokenizer, method, dtype=None)
    session = sessions[0]
    shuffled = Session(session.id, session.task, session.context, session.turns[::-1])
    straight = {r.turn: r.answer for r in runner.run(session, "multi-request")}
    turned = {r.turn: r.answer for r in runner.run(shuffled, "multi-request")}
    assert straight == {1: turned[3], 2: turned[2], 3: turned[1]}

    def digest(cache):
        tensors = [t for layer in cache.layers for t in layer.state().values() if isinstance(t, torch.Tensor)]
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    with torch.inference_mode():
        stream = _Stream(runner, 1)
        prompt = encode(session, tokenizer)
        stream.feed([prompt.context])
        before = digest(stream.cache)
        request = stream.fork()
        logits = request.feed([prompt.questions[0]])
        request.decode(logits, [8])
        assert digest(stream.cache) == before


class Counting(torch.nn.Module):
    """Counts the tokens that go through the embedding."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen, self.weight = inner, 0, inner.weight

    def forward(self, ids):
        self.seen += ids.numel()
        return self.inner(ids)


@pytest.mark.parametrize("mode", ["multi-turn", "multi-request"])
def test_acceptance_3_context_tokens_are_forwarded_once(tokenizer, mode):
    model = tiny("gqa", vocab_size=2048, max_position_embeddings=4096)
    session = make_sessions("kv", 1, 1000, 5, seed=3)[0]
    context = len(encode(session, tokenizer).context)
    counter = Counting(model.model.embed_tokens)
    model.model.embed_tokens = counter
    runner = SessionRunner(model, tokenizer, Full(), dtype=None)
    runner.run(session, mode)
    assert runner.forwarded == context
    # A harness that prefilled again for every question would be five times over the context.
    assert context <= counter.seen < 1.5 * context


def test_acceptance_4_golden_context_decides_which_answer_enters(model, tokenizer, sessions, monkeypatch):
    fed: list[tuple[int, ...]] = []
    original = _Stream.feed

    def spy(self, chunk):
        fed.append(chunk[0])
        return original(self, chunk)

    monkeypatch.setattr(_Stream, "feed", spy)
    session = sessions[0]
    prompt = encode(session, tokenizer)
    SessionRunner(model, tokenizer, Full(), dtype=None).run(session, "multi-turn")
    assert any(chunk == prompt.answers[0] + prompt.questions[1] for chunk in fed)
    fed.clear()
    results = SessionRunner(model, tokenizer, Full(), golden=False, dtype=None).run(session, "multi-turn")
    starts = [chunk for chunk in fed if chunk[-len(prompt.questions[1]) :] == prompt.questions[1]]
    own = tokenizer.decode(starts[0][: -len(prompt.questions[1])], skip_special_tokens=True)
    assert own == results[0].answer
    assert starts[0][: -len(prompt.questions[1])][-1] == tokenizer.eos_token_id


def test_batch_equals_single_sessions(model, tokenizer, sessions):
    for mode in ("multi-turn", "multi-request"):
        runner = SessionRunner(model, tokenizer, SnapKV(0.5, window=8), dtype=None)
        together = ids_of(sorted(runner.run(sessions, mode), key=lambda r: (r.session, r.turn)))
        singly = ids_of(sorted((r for s in sessions for r in runner.run(s, mode)), key=lambda r: (r.session, r.turn)))
        assert together == singly


def official_sample(tmp_path, words=4000):
    row = {
        "id": 7,
        "context": " ".join(f"w{i}" for i in range(words)),
        "multi_turns": [{"input": "Which is first?", "answer": "w0"}, {"input": "Which is last?", "answer": "w3999"}],
    }
    path = tmp_path / "scbench_kv.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_acceptance_7_official_records_load_and_are_cut_in_the_middle(model, tokenizer, tmp_path):
    official_sample(tmp_path)
    session = load_sessions("scbench_kv", 10, data=str(tmp_path))[0]
    assert session.turns[0].checker == "contains"
    assert session.turns[0].max_new_tokens == OFFICIAL["scbench_kv"][1] == 150
    whole = encode(session, tokenizer).context
    cut = encode(session, tokenizer, 101).context
    assert len(cut) == 101
    assert cut[:50] == whole[:50]
    assert cut[50:] == whole[-51:]
    runner = SessionRunner(model, tokenizer, SnapKV(0.1), dtype=None)
    limit = runner._limit(session)
    results = runner.run(Session("x", session.task, session.context, (Turn("q?", "w0", max_new_tokens=4),)), "multi-turn")
    assert results[0].prompt_tokens <= 4096
    assert limit < 4096 - 300


@pytest.mark.parametrize("mode", ["multi-turn", "multi-request"])
def test_questions_whose_answer_was_cut_away_are_counted_and_not_scored(mode, model, tokenizer):
    words = [f"w{number}" for number in range(200)]
    turns = (Turn("first?", "w2", max_new_tokens=2), Turn("middle?", "w100", max_new_tokens=2), Turn("sum?", "7777"))
    session = Session("x", "kv", " ".join(words), turns)
    runner = SessionRunner(model, tokenizer, Full(), limit=80)
    assert [result.turn for result in runner.run(session, mode)] == [1, 3]  # 7777 never stood there: nothing was lost
    assert runner.unanswerable == 1
    whole = SessionRunner(model, tokenizer, Full())
    assert len(whole.run(session, mode)) == 3
    assert whole.unanswerable == 0


def test_unknown_tasks_and_modes_name_the_nearest(model, tokenizer):
    with pytest.raises(ValueError, match="did you mean"):
        load_sessions("prefix_sufix", 1)
    with pytest.raises(ValueError, match="unknown mode 'both'"):
        SessionRunner(model, tokenizer, Full()).run([], "both")


def test_models_without_a_chat_template_work(model, tokenizer, sessions):
    plain = train_tokenizer()
    plain.chat_template = None
    results = SessionRunner(model, plain, Full(), dtype=None).run(sessions[0], "multi-turn")
    assert len(results) == 3
