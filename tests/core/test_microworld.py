"""Sessions are seeded, answerable and scored by the benchmark's rules."""

import json
import random

import pytest

from broadsheet.core.microworld.checkers import CHECKERS, check
from broadsheet.core.microworld.sessions import Session, Turn, read_sessions, write_sessions
from broadsheet.core.microworld.tasks import SCBENCH_MINI, SHORT, TASKS, facts_table, make_sessions
from broadsheet.core.microworld.tokenizer import VOCABULARY, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def reference(turn):
    gold = turn.answer if isinstance(turn.answer, str) else " ".join(turn.answer)
    return turn.extra.get("reference", gold)


@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_score_one_and_wrong_ones_nothing(task):
    for session in make_sessions(task, 5, 300, 4, seed=1):
        for turn in session.turns:
            assert check(reference(turn), turn) == 1.0
            assert check("", turn) == 0.0
            assert check("qqq xyzzy -777", turn) == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_bytes_and_more_sessions_change_none(task):
    dump = lambda sessions: [json.dumps(s.to_json()) for s in sessions]  # noqa: E731
    assert dump(make_sessions(task, 3, 256, 3, seed=5)) == dump(make_sessions(task, 6, 256, 3, seed=5))[:3]
    assert dump(make_sessions(task, 3, 256, 3, seed=5)) != dump(make_sessions(task, 3, 256, 3, seed=6))


@pytest.mark.parametrize("size", [256, 1024, 4096])
@pytest.mark.parametrize("task", SCBENCH_MINI)
def test_contexts_fill_but_do_not_exceed_their_size(task, size, tokenizer):
    capped = {
        "kv": 1400,
        "prefix_suffix": 1400,
        "mf": 1010,
        "many_shot": 1010,
        "repoqa": 1700,
        "copy": 1900,
        "kv_and_rules": 2400,
    }
    for session in make_sessions(task, 2, size, 5):
        count = len(tokenizer(" " + session.context, add_special_tokens=False)["input_ids"])
        assert 0.7 * min(size, capped.get(task, size)) <= count <= size


@pytest.mark.parametrize("task", ["kv", "prefix_suffix"])
def test_every_gold_answer_occurs_exactly_once(task):
    for session in make_sessions(task, 20, 800, 5):
        for turn in session.turns:
            assert session.context.count(turn.answer) == 1
    if task == "prefix_suffix":
        strings = [part.strip().split() for part in session.context.split(";") if part.strip()]
        ends = [(words[0], words[-1]) for words in strings]
        assert len(set(ends)) == len(ends)


def test_every_word_and_number_is_one_token(tokenizer):
    from broadsheet.core.microworld.lexicon import WORDS

    assert len(tokenizer) <= VOCABULARY
    for text in (*WORDS, *map(str, range(100))):
        assert len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) == 1
    odd = "Ünïcode – and\nnew lines, 12345!"
    assert tokenizer.decode(tokenizer(odd, add_special_tokens=False)["input_ids"]) == odd


def test_facts_withhold_a_fifth():
    table = facts_table()
    withheld = sum(home is None for home in table.values())
    assert 0.1 < withheld / len(table) < 0.3


def test_short_tasks_have_no_context():
    assert all(session.context == "" for task in SHORT for session in make_sessions(task, 2, 0, 2))


# Scorer vectors of SCBench.
@pytest.mark.parametrize(
    ("checker", "text", "answer", "extra", "expected"),
    [
        ("contains", "the value is abc.", "abc", {}, 1),
        ("contains", "the value is abd.", "abc", {}, 0),
        ("option_letter", "answer is: B", "B", {}, 1),
        ("option_letter", "B. because", "B", {}, 1),
        ("option_letter", "A horse", "B", {"options": ["a dog", "a cat", "x", "y"]}, 0),
        ("option_letter", "it was a cat", "B", {"options": ["a dog", "a cat", "x", "y"]}, 1),
        ("first_number", "around 12, or 13", "12", {}, 1),
        ("first_number", "around 13, or 12", "12", {}, 0),
        ("contains_all", "one and two", ("one", "two", "three"), {}, 0.67),
        ("f1_characters", "北京大学", "北京", {}, 2 / 3),
        ("f1_words", "the red fox", "a red fox", {}, 1),
        ("last_number", "1 then 2", "3 2", {}, 1),
        ("rouge_lsum", "the cat sat", "the cat sat", {}, 1),
        ("rouge_lsum", "the cat", "the cat sat down", {}, 2 / 3),
        ("contains", "   ", "", {}, 0),
    ],
)
def test_scorer_vectors(checker, text, answer, extra, expected):
    assert check(text, Turn("", answer, checker, extra=extra)) == pytest.approx(expected)


def test_format_rules():
    rules = {"count": 2, "separator": ",", "allowed": ["red", "blue"], "end": "done"}
    turn = Turn("", "red, blue done", "format_rule", extra={"rules": rules})
    assert check("blue, red done", turn) == 1
    for wrong in ("blue, red", "blue done", "blue, blue done", "blue, dog done", "blue; red done"):
        assert check(wrong, turn) == 0


def test_unknown_checker_is_named():
    with pytest.raises(ValueError, match="unknown checker 'magic'"):
        check("x", Turn("", "x", "magic"))
    assert "contains" in CHECKERS


def test_sessions_round_trip(tmp_path):
    sessions = make_sessions("vt", 3, 200, 3)
    write_sessions(sessions, tmp_path / "vt.jsonl")
    assert [s.to_json() for s in read_sessions(tmp_path / "vt.jsonl")] == [s.to_json() for s in sessions]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sessions"),
        ("not json\n", "line 1: not JSON"),
        ("[1]\n", "expected a JSON object"),
        ('{"id": "x", "context": "c"}\n', "'multi_turns' is missing"),
        ('{"id": "x", "context": "c", "multi_turns": []}\n', "'multi_turns' is empty"),
        ('{"id": "x", "context": "c", "multi_turns": [{"input": "q"}]}\n', "turn 1: field 'answer' is missing"),
    ],
)
def test_bad_session_files_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_sessions(path))
    assert "\n" not in str(caught.value)


def test_official_record_loads():
    row = {"id": 1, "context": "c", "multi_turns": [{"input": "q", "answer": ["a", "b"], "options": ["x"]}], "lang": "en"}
    session = Session.from_json(row, "scbench_choice_eng")
    assert session.turns[0].answer == ("a", "b")
    assert session.turns[0].extra == {"options": ["x"]}
    assert random.Random(0).random() != random.Random(1).random()
