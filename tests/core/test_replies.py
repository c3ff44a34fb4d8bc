"""Readers of replies: what cannot be read is None, never an answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core import replies


@pytest.mark.parametrize(
    ("text", "label", "answer"),
    [
        ("Yes", "", True),
        ("no.", "", False),
        ("Note that it is fine", "", None),
        ("Nothing wrong", "", None),
        ("Yes, at first; but no", "", False),
        ("<think>yes yes</think> No", "", False),
        ("not yes", "", None),
        ("", "", None),
        ("Yes ... Final Judgement: No, since yes was wrong", "Final Judgement", False),
        ("**Final judgement**: Yes", "Final Judgement", True),
        ("Yes", "Final Judgement", None),
    ],
)
def test_yes_no(text, label, answer):
    assert replies.yes_no(text, label) is answer


@pytest.mark.parametrize(
    ("text", "label", "value"),
    [
        ("0.7", "", 0.7),
        ("step 3 of 4: 0.25", "", 0.25),
        ("85", "", None),
        ("85 %", "", None),
        ("Score: 0.5 (of 1)", "Score", 0.5),
        ("1.2", "", None),
        ("v2 model", "", None),
        ("none", "", None),
        ("1e-3", "", 0.001),
    ],
)
def test_number_in_zero_to_one(text, label, value):
    assert replies.number(text, 0, 1, label) == value


def test_parts():
    assert replies.tag("<a>x</a> <A>y</A>", "a") == "y"
    assert replies.tag("<a>x", "a") is None
    assert replies.between("[[start]] one [[end]] [[start]] two [[end]]", "[[start]]", "[[end]]") == "two"
    assert replies.between("[[start]] one", "[[start]]", "[[end]]") is None
    assert replies.code_blocks("```PY\na\n```\n```\nb\n```\n```py\nc") == ["a\n", "b\n"]
    assert replies.code_blocks("```PY\na\n```\n```\nb\n```", "py") == ["a\n"]
    assert replies.json_of('so {"a": 1} and {"b": [2]} done') == {"b": [2]}
    assert replies.json_of('```json\n{"a": 1}\n```') == {"a": 1}
    assert replies.json_of("nothing") is None
    assert replies.numbered("1. one\n2) two\n- three\nfour") == ["one", "two", "three"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_a_reader(text):
    for reader in (
        replies.yes_no,
        replies.number,
        replies.json_of,
        replies.code_blocks,
        replies.numbered,
        replies.answer_part,
    ):
        reader(text)
    replies.tag(text, "a")
    replies.json_of(text + "[" * 5000)
