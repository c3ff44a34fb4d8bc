"""Typed demands: a witness and a violation of every kind, texts for any mixture, counting."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.constraints import Constraint, Range, verified
from broadsheet.core.constraints.demands import TESTS, Demand, compose, converter, depth, headings, paragraphs, tables, words

DEMANDS = [
    Demand("words", Range(20)), Demand("words", Range(10, 12)), Demand("words", Range(0, 50)), Demand("sentences", Range(3)),
    Demand("sentences", Range(1, 1)), Demand("paragraphs", Range(2)), Demand("paragraphs", Range(0, 1)),
    Demand("include", names=("hello", "Big Tree")), Demand("include", Range(3), ("x",)),
    Demand("include_any", names=("a1", "b2")),
    Demand("avoid", names=("boat",)), Demand("starts", names=("Example:",)), Demand("end_mark", names=("?",)),
    Demand("no_end_mark", names=(".",)), Demand("sentence_marks", names=("!",)), Demand("no_mark", names=("!",)),
    Demand("upper"), Demand("title"), Demand("lower"), Demand("headings", Range(2)), Demand("heading_levels", Range(0, 2)),
    Demand("heading_levels", Range(3, 3)), Demand("levels", names=("2", "3")), Demand("deepest", Range(0, 3)),
    Demand("one_level", Range(1, 1), ("1",)), Demand("heading_names", names=("History", "Data")),
    Demand("titled", names=("2", "History")), Demand("quotes"), Demand("bold"), Demand("bullets"),
    Demand("rows", Range(0, 3)),
    Demand("rows", Range(0, 3), optional=True), Demand("columns", Range(2, 2)), Demand("rows_or_items", Range(0, 5)),
    Demand("json_depth", Range(2)), Demand("json_depth", Range(0, 2), optional=True), Demand("xml_attributes", Range(0, 3)),
    Demand("xml_attributes", Range(5, 5), optional=True),
]  # fmt: skip


@pytest.mark.parametrize("demand", DEMANDS, ids=lambda demand: f"{demand.kind} {demand.range}")
def test_every_kind_has_a_witness_and_a_violation(demand):
    assert isinstance(verified(demand.constraint()), Constraint)


def test_every_kind_is_tried_above():
    assert {demand.kind for demand in DEMANDS} == set(TESTS) - {"simplified", "traditional"}


@pytest.mark.skipif(converter() is None, reason="needs zhconv, the optional converter of Chinese characters")
@pytest.mark.parametrize("kind", ["simplified", "traditional"])
def test_chinese(kind):
    assert isinstance(verified(Demand(kind).constraint()), Constraint)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_what_is_composed_is_as_asked(roll: random.Random):
    """Any mixture of kinds that do not speak of the same thing: as asked, or an error, never something else."""
    chosen = {demand.kind: (demand, roll.random() < 0.5) for demand in roll.sample(DEMANDS, roll.randint(1, 5))}
    try:
        text = compose(list(chosen.values()))
    except ValueError:
        return
    assert all(demand.check(text).ok == want for demand, want in chosen.values())


def test_contradictions_have_no_text():
    with pytest.raises(ValueError, match="no text is known"):
        compose([(Demand("upper"), True), (Demand("lower"), True)])


def test_counting():
    assert words("两个 words 字") == 3  # Chinese characters where there are some
    assert len(paragraphs("a\n\n \nb\nc")) == 2
    assert headings("# A\ntext # no\n### B ##") == [(1, "A"), (3, "B")]
    assert [len(table) for table in tables("| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |\n\na | b\n")] == [3]
    assert [depth(value) for value in (1, {}, {"a": 1}, {"a": [{}]}, [[], {"b": {"c": 0}}])] == [0, 1, 1, 3, 3]


def test_unknown_kind():
    with pytest.raises(ValueError, match="no demand 'rhyme'"):
        Demand("rhyme")


def test_hostile_texts_are_linear():
    for text in (
        "|" * 50_000,
        "#" * 50_000,
        "<a " * 20_000,
        "[" * 50_000,
        "*" * 50_000,
        "\n" * 50_000 + "x",
        "<a b='" * 9_000,
    ):
        for demand in DEMANDS:
            demand.check(text)
