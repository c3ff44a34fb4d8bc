"""MulDimIF: compiling, the original's verdicts, the scorer against a known truth, the pipeline, the reward."""

import json
import math
import os
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import Faults, SimulatedChat
from broadsheet.core.constraints import Constraint, Unverifiable
from broadsheet.core.constraints.demands import compose, converter
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.evals.muldimif import (
    LEVELS,
    PATTERNS,
    TAXONOMY,
    Grammar,
    Item,
    MulDimIF,
    Pipeline,
    as_reward,
    audit,
    category,
    compile_constraint,
    demand_of,
    load_muldimif,
    official,
    to_table,
)
from broadsheet.methods.evals.muldimif.items import makers
from broadsheet.methods.evals.muldimif.pipeline import choose_shots
from broadsheet.methods.evals.muldimif.world import PENALTY, SimAuthor, SimResponder, faults

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "muldimif_official.json").read_text(encoding="utf-8"))
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared"))
DATA = SHARED / "data" / "muldimif"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"needs MulDimIF's test set at {DATA}; set BROADSHEET_SHARED")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return load_muldimif(DATA)


# --- the official data --------------------------------------------------------------------------------------------------


@needs_data
def test_check1_the_official_file(items):
    assert len(items) == 1200
    assert Counter(item.pattern for item in items) == dict.fromkeys(PATTERNS, 400)
    assert Counter(item.level for item in items) == dict.fromkeys(LEVELS, 300)
    assert sum(len(item.constraints) for item in items) == 4180


@needs_data
def test_check2_what_compiles_has_both_witnesses_and_the_rest_is_counted(items):
    seen: Counter[str] = Counter()
    for triple in {triple for item in items for triple in item.constraints}:
        checker = compile_constraint(*triple)
        if isinstance(checker, Unverifiable):
            seen["unverifiable"] += 1
            assert checker.reason
        else:
            assert checker.check(checker.witness())
            assert not checker.check(checker.violation())
            assert checker.violation().strip()
            seen["verified"] += 1
    found = audit(items)
    chinese = 0 if converter() else 10
    assert found["verifiable"] == 3908 - chinese
    assert found["verifiable"] + sum(found["reasons"].values()) == 4180


@needs_data
def test_what_the_original_does_not_understand(items):
    """The counts of the pitfalls: 74 Markdown, 12 sentences, 5 XML pass whatever is written, 5 English and 1 paragraphs
    fail."""
    reads = Counter(
        (category(*triple[:2])[1], official.reads(category(*triple[:2])[1], triple[2]))
        for item in items
        for triple in item.constraints
    )
    del reads["", ""]
    assert {key: count for key, count in reads.items() if key[1] != "decides"} == {
        ("Markdown", "vacuous"): 74, ("Sentences", "vacuous"): 12, ("XML", "vacuous"): 5,
        ("English", "impossible"): 5, ("Paragraphs", "impossible"): 1,
    }  # fmt: skip
    found = audit(items)
    assert (found["vacuous_items"], found["impossible_items"]) == (89, 6)


@needs_data
def test_check3_an_empty_answer(items):
    path = str(DATA)
    ours = MulDimIF(path=path).score([""] * 1200)
    assert ours.get("accuracy").value == 0
    theirs = MulDimIF(path=path, compat="official").score([""] * 1200)
    assert round(theirs.get("accuracy").value * 1200) == 40
    assert round(theirs.get("micro").value * 4180) == 851


@needs_data
def test_check4_the_originals_verdicts(items):
    """On 13 probes and all constraints; those on Chinese characters where the converter is installed."""
    triples = [triple for item in items for triple in item.constraints]
    assert len(triples) == GOLDEN["constraints"]
    differ, skipped = [], 0
    for probe, passes in zip(GOLDEN["probes"], GOLDEN["passes"], strict=True):
        bits = bin(int(passes, 16))[2:].zfill(len(triples))
        for triple, bit in zip(triples, bits, strict=True):
            second = category(*triple[:2])[1]
            if second == "Chinese" and converter() is None:
                skipped += 1
            elif official.verdict(*triple[:2], second, triple[2], probe) != (bit == "1"):
                differ.append((triple, probe))
    assert differ == []  # the check asks for 99 %
    assert skipped in (0, 130)


def test_check4_the_originals_verdicts_on_our_wordings():
    differ = [
        (text, probe)
        for main, sub, text, digits in GOLDEN["own"]
        for probe, digit in zip(GOLDEN["probes"], digits, strict=True)
        if official.verdict(main, sub, category(main, sub)[1], text, probe) != (digit == "1")
    ]
    assert differ == []


# --- compiling ----------------------------------------------------------------------------------------------------------


def test_the_grammar_compiles_to_what_it_was_made_from():
    for place, maker in enumerate(makers()):
        main = next(
            main for main in TAXONOMY for second in TAXONOMY[main] if second == maker(random.Random(0))[0].split(":")[0]
        )
        for seed in range(20):
            sub, demand, text = maker(random.Random(f"{place}/{seed}"))
            assert demand_of(main, sub, text) == demand, text
            assert isinstance(compile_constraint(main, sub, text), Constraint), text


@pytest.mark.parametrize(
    ("main", "sub", "text", "good", "bad"),
    [
        ("Length", "Words", "Use no more than twenty-five words", "word " * 25, "word " * 26),
        ("Length", "Words", "a minimum of two hundred words", "word " * 200, "word " * 199),
        ("Length", "Sentences", "limited to a maximum of 3 sentences", "One. Two. Six.", "One. Two. Six. Ten."),
        ("Content", "Keywords", "Must include the keyword 'Apple Inc.'", "I like apple inc", "I like apples"),
        ("Content", "Keywords", "The keyword 'sea' must appear at least twice", "Sea and sea", "Sea and seaside"),
        ("Content", "Punctuation", "Each sentence must end with a period", "One. Two.", "One. Two!"),
        ("Language", "English", "be entirely in uppercase", "ALL OF IT", "All of it"),
        ("Language", "English", "use capitalized letters for each word", "All (Of) 3 Things", "All of it"),
        ("Format", "Markdown", "Use '##' for main points and '###' for subpoints", "## A\n### B", "## A"),
        ("Format", "Table", "If a table is used, it must not exceed 1 row", "no table", "|a|\n|-|\n|1|\n|2|"),
        ("Format", "Table", "Include a table with no more than 1 row", "|a|\n|-|\n|1|", "no table"),
        ("Json", "Object nesting levels", "at least two levels of nesting", 'So: {"a": {"b": 1}}', '{"a": 1}'),
        ("XML", "Number of attributes", "no more than one attribute", '<a b="1"/>', "no XML"),
    ],
)  # fmt: skip
def test_what_constraints_mean(main, sub, text, good, bad):
    checker = compile_constraint(main, sub, text)
    assert isinstance(checker, Constraint)
    assert checker.check(good), checker.check(good).evidence
    assert not checker.check(bad), checker.check(bad).evidence


@pytest.mark.parametrize(
    ("main", "sub", "text", "why"),
    [
        ("Length", "Words", "Each entry must contain at most 20 words", "each entry"),
        ("Length", "Words", "Be brief", "no limit"),
        ("Length", "Sentences", "include at least one sentence", "no text"),
        ("Content", "Keywords", "Mention the key players", "quotation marks"),
        ("Language", "English", "The titles should be capitalized", "titles"),
        ("Format", "Text", "The answer must be in full sentences", "no words"),
    ],
)
def test_what_cannot_be_verified_is_said_and_never_passes(main, sub, text, why):
    checker = compile_constraint(main, sub, text)
    assert isinstance(checker, Unverifiable)
    assert why in checker.reason
    bench = MulDimIF()
    assert bench.verdicts([(main, sub, text)], "Anything.")[0][0] is None


def test_bad_input_is_a_one_line_error(tmp_path):
    with pytest.raises(ValueError, match="no category 'Tone'"):
        compile_constraint("Tone", "Polite", "Be polite")
    with pytest.raises(ValueError, match="no constraints"):
        Item("1", "Say hello.", ())
    bench = MulDimIF(count=12)
    with pytest.raises(ValueError, match="3 responses to 12 samples"):
        bench.score(["a"] * 3)
    with pytest.raises(ValueError, match="ids"):
        bench.score({"nobody": "a"})
    with pytest.raises(ValueError, match="not a string"):
        bench.score([1] * 12)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="compat"):
        MulDimIF(compat="theirs")  # type: ignore[arg-type]
    (tmp_path / "test.json").write_text('[{"id": "1", "conversations": [], "constraints": []}]')
    with pytest.raises(ValueError, match="item 0"):
        load_muldimif(tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        load_muldimif(tmp_path / "none.json")


def test_chinese_without_its_converter_is_said(monkeypatch):
    if converter() is None:
        checker = compile_constraint("Language", "Chinese", "The answer must be in Simplified Chinese")
        assert isinstance(checker, Unverifiable)
        assert "zhconv" in checker.reason
        with pytest.raises(ValueError, match="pip install zhconv"):
            official.chinese("The answer must be in Simplified Chinese", "这")


# --- the scorer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated():
    bench = MulDimIF(count=1200)
    world = SimResponder(bench.items())
    return world, bench.evaluate(Chat(SimulatedChat(world, name="sim:responder", seed=1)))


def test_check5_the_scorer_returns_what_was_planted(simulated):
    """SIMULATED: every level, pattern and category within three standard errors of its closed form."""
    world, report = simulated
    cuts = [("level", level) for level in LEVELS] + [("pattern", pattern) for pattern in PATTERNS]
    for axis, cut in [*cuts, *(("category", main) for main in TAXONOMY)]:
        expected, error = world.expected(**{"main" if axis == "category" else axis: cut})
        assert abs(report.get("accuracy", axis, cut).value - expected) < 3 * error, (axis, cut)
    assert all(one.answers[0].text for one in report.scored)  # every mixture could be written


def test_check5_changing_one_patterns_penalty_moves_its_row_alone(simulated):
    world, report = simulated
    bench = MulDimIF(count=1200)
    harder = SimResponder(world.items, penalty={**PENALTY, "Listing": 0.3})
    moved = bench.evaluate(Chat(SimulatedChat(harder, name="sim:responder", seed=1)))
    for pattern in PATTERNS:
        change = moved.get("accuracy", "pattern", pattern).value - report.get("accuracy", "pattern", pattern).value
        assert change < -0.1 if pattern == "Listing" else change == 0


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=20))
def test_check6_macro_is_at_least_overall(verdicts):
    overall = sum(all(some) for some in verdicts) / len(verdicts)
    triple = ("Content", "Keywords", "Must include the keyword 'yes'")
    bench = MulDimIF(count=1)
    first, marks = bench.samples()[0], []
    for some in verdicts:
        triples = tuple((*triple[:2], f"Must include the keyword 'w{place}'") for place, _ in enumerate(some))
        sample = replace(first, data={"constraints": triples})
        marks.append(bench.mark(sample, "said: " + " ".join(f"w{place}" for place, ok in enumerate(some) if ok)).values)
    macro = sum(mark["macro"] for mark in marks) / len(marks)
    assert overall == pytest.approx(sum(mark["accuracy"] for mark in marks) / len(marks))
    assert macro >= overall - 1e-12
    assert (overall == 1) == all(all(some) for some in verdicts) == (macro == 1)


def test_failures_count_as_nothing_and_are_told_apart():
    bench = MulDimIF(count=24)
    world = SimResponder(bench.items(), base=dict.fromkeys(TAXONOMY, 1.0), penalty=dict.fromkeys(PATTERNS, 0.0))
    perfect = bench.evaluate(Chat(SimulatedChat(world, name="sim:perfect")))
    assert perfect.get("accuracy").value == perfect.get("macro").value == perfect.get("micro").value == 1
    cut = bench.evaluate(Chat(SimulatedChat(world, name="sim:perfect", faults=Faults(truncate=1.0))))
    assert cut.outcomes == {"truncated": 24}
    assert cut.get("accuracy").value == cut.get("macro").value == cut.get("micro").value == 0
    assert "overall" in to_table(perfect)


def test_reasoning_is_not_judged():
    bench = MulDimIF(count=1)
    triples = [("Length", "Words", "Use no more than 3 words")]
    assert bench.verdicts(triples, "a long thought about it</think>Three words here")[0][0]


def test_check9_the_same_seed_gives_the_same_bytes():
    first, second = (json.dumps([item.to_json() for item in Grammar(3).items(60)]) for _ in range(2))
    assert first == second
    assert first != json.dumps([item.to_json() for item in Grammar(4).items(60)])


def test_our_items_are_in_the_official_form(tmp_path):
    mine = Grammar(1).items(48)
    (tmp_path / "test.json").write_text(json.dumps([item.to_json() for item in mine]), encoding="utf-8")
    read = load_muldimif(tmp_path)
    assert [item.to_json() for item in read] == [item.to_json() for item in mine]
    for item in mine:
        level = int(item.level[-1])
        assert len({main for main, _ in item.categories}) == level
        assert level <= len(item.constraints) <= 2 * level
        assert isinstance(compose([(demand_of(*triple), True) for triple in item.constraints]), str)  # type: ignore[misc]


# --- the pipeline -------------------------------------------------------------------------------------------------------


def _grown(author: SimAuthor, count: int, **settings):
    pipeline = Pipeline(**settings)
    chat = Chat(SimulatedChat(author, name="sim:author"))
    return chat.map(lambda question: pipeline.agrow(chat, question), [f"What is thing {n}?" for n in range(count)])


def test_the_two_questions_cut_bad_data_as_their_error_rates_say():
    """SIMULATED: one expansion each; the share of contradictory or incomplete versions before and after."""
    author = SimAuthor()
    before, after = author.kept_bad()
    for check, expected in ((False, before), (True, after)):
        grown = [one for one in _grown(author, 1500, level=1, tries=1, check=check) if one.complete]
        bad = [float(any(faults(one.question, one.constraints))) for one in grown]
        share, error = sum(bad) / len(bad), math.sqrt(expected * (1 - expected) / len(bad))
        assert abs(share - expected) < 3 * error
    assert after < before / 3


def test_growing_goes_through_all_categories_and_keeps_versions():
    grown = _grown(SimAuthor(conflict=0, omission=0, alarm=0), 20)
    for one in grown:
        assert one.complete
        assert {category(*triple[:2])[0] for triple in one.constraints} == set(TAXONOMY)
        assert len(one.versions) == 5
        assert all(len(a[1]) < len(b[1]) for a, b in zip(one.versions, one.versions[1:], strict=False))


def test_rejected_replies_do_not_crash_the_builder():
    grown = _grown(SimAuthor(broken=1.0), 5)
    assert not any(one.complete for one in grown)
    assert all(one.rejected == ("a field is missing",) * 3 for one in grown)
    assert all(one.constraints == () for one in grown)


class _Says:
    def __init__(self, text):
        self.text = text

    def reply(self, request, draw):
        return self.text


@pytest.mark.parametrize(
    "reply",
    [
        "no JSON", "[]", '{"reasoning": "", "constraints": "x", "question": "q"}',
        '{"reasoning": "", "constraints": [["Content", "Keywords"]], "question": "q"}',
        '{"reasoning": "", "constraints": [["Tone", "Polite", "Be polite"]], "question": "q"}',
        '{"reasoning": "", "constraints": [], "question": "q"}',
        '{"reasoning": "", "constraints": [["Length", "Words", "a"], ["Length", "Words", "b"]], "question": " "}',
    ],
)  # fmt: skip
def test_malformed_expansions_are_rejections(reply):
    chat = Chat(SimulatedChat(_Says(reply), name="sim:says"))
    grown = Pipeline().grow(chat, "What is it?")
    assert not grown.complete
    assert grown.rejected


def test_check9_the_pipeline_repeats_itself():
    first, second = (_grown(SimAuthor(), 30) for _ in range(2))
    assert first == second


def test_rewriting_by_pattern():
    chat = Chat(SimulatedChat(SimAuthor(conflict=0, omission=0, miss=0, alarm=0), name="sim:author"))
    pipeline = Pipeline(level=2)
    grown = pipeline.grow(chat, "What is a river?")
    for pattern in ("Listing", "Incorporation"):
        prompt = pipeline.rewrite(chat, "What is a river?", grown, pattern)
        assert prompt
        assert prompt.startswith("What is a river?")
        assert ("1. " in prompt) == (pattern == "Listing")
    assert pipeline.rewrite(chat, "What is a river?", grown, "Example") is None  # an empty pool


def test_check7_examples_are_three_others_and_never_the_item():
    pool_items = [item for item in Grammar(5).items(360) if item.pattern == "Listing"]
    pool = [(item, compose([(demand_of(*t), True) for t in item.constraints])) for item in pool_items]  # type: ignore[misc]
    again = [(Item(f"copy-{item.id}", item.prompt, item.constraints, question=item.question), text) for item, text in pool]
    found = 0
    for item, _ in pool:
        shots = choose_shots(item, pool + again)
        if shots is None:
            continue
        found += 1
        assert len(shots) == 3
        questions = [shot.question for shot, _ in shots]
        assert item.question not in questions
        assert len(set(questions)) == 3
        assert shots == choose_shots(item, pool + again)
    assert found > 10
    assert choose_shots(pool[0][0], pool[:2]) is None


# --- the reward ---------------------------------------------------------------------------------------------------------


def test_rewards():
    triples = [("Length", "Words", "Use no more than 3 words"), ("Content", "Keywords", "Must include the keyword 'sea'")]
    checkers = [compile_constraint(*triple) for triple in triples]
    texts = ["the sea", "the river", "a long text without that", "so</think>sea"]
    expected = {"count": [2, 1, 0, 2], "fraction": [1, 0.5, 0, 1], "all": [1, 0, 0, 1]}
    for mode, values in expected.items():
        assert as_reward(checkers, mode)(completions=texts) == values  # type: ignore[arg-type]
        chats = [[{"role": "assistant", "content": text}] for text in texts]
        assert as_reward(mode=mode)(completions=chats, constraints=[triples] * 4, prompts=None) == values  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode"):
        as_reward(checkers, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="constraints"):
        as_reward()(completions=texts)
    with pytest.raises(ValueError, match="verified"):
        as_reward()(completions=["a"], constraints=[[("Length", "Words", "Be brief")]])


def test_intervals_are_over_items():
    report = MulDimIF(count=24).score([""] * 24)
    assert report.get("accuracy").ci == bootstrap_ci([0.0] * 24)
