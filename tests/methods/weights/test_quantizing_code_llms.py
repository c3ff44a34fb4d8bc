"""The study: equal work for all arms, paired samples, both levels of testing, nothing lost on a kill."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from broadsheet.core.codetasks import CodeTask
from broadsheet.core.microworld import code
from broadsheet.core.records import Record
from broadsheet.core.stats import mcnemar
from broadsheet.core.verdicts import DIRECTION, FAILS, HOLDS
from broadsheet.lab.code_study import picture, tables
from broadsheet.lab.plots import svg
from broadsheet.methods.weights import claims
from broadsheet.methods.weights.gptq import GPTQ
from broadsheet.methods.weights.quantizing_code_llms import Arm, ArmResult, Results, Study
from broadsheet.methods.weights.quantizing_code_llms import study as module
from broadsheet.methods.weights.rtn import RTN
from broadsheet.methods.weights.uncompressed import Uncompressed

TASKS = code.make_tasks(5)
FACTORS = {"model": ["pocket-code"], "method": ["rtn", "gptq"], "precision": [8, 2], "calibration": ["code", "random"]}
SMALL = {"n_samples": 2, "max_new_tokens": 64, "samples": 12, "tokens": 96, "scored": 4, "seconds": 20.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Study(FACTORS, TASKS, **SMALL).run(tmp_path_factory.mktemp("study") / "code.jsonl")


def test_the_design_is_crossed_and_has_its_baseline(results):
    labels = [result.arm.label for result in results.arms]
    assert labels == [
        *("bf16", "rtn 8 bits", "rtn 2 bits"),  # round-to-nearest needs no calibration
        *("gptq 8 bits, code", "gptq 8 bits, random", "gptq 2 bits, code", "gptq 2 bits, random"),
    ]
    bits = {result.arm.label: result.facts["bits"] for result in results.arms}
    assert bits["bf16"] == 16
    assert bits["rtn 2 bits"] == bits["gptq 2 bits, code"] == 2.25


def test_the_table_has_a_row_a_sample(results, tmp_path):
    rows = list(results.rows())
    assert len(rows) == 7 * 5 * 2
    assert {row["task"] for row in rows} == {task.name for task in TASKS}
    results.write(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["completion"] for row in read] == [row["completion"] for row in rows]
    assert [row["passed"] == "True" for row in read] == [row["passed"] for row in rows]
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    results.write(tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == rows
    with pytest.raises(ValueError, match="a table is written as"):
        results.write(tmp_path / "t.xlsx")


def test_two_bits_hurt_and_eight_do_not(results):
    passed = {result.arm.label: results.pass_at_1(result, "python")[0] for result in results.arms}
    assert passed["bf16"] > 0.5
    assert abs(passed["rtn 8 bits"] - passed["bf16"]) < 0.11
    assert passed["rtn 2 bits"] < passed["bf16"] - 0.3
    perplexity = {result.arm.label: result.facts["perplexity"] for result in results.arms}
    # Calibrated on one domain, a model keeps that one better.
    assert perplexity["gptq 2 bits, code"]["code"] < perplexity["gptq 2 bits, random"]["code"]
    assert perplexity["gptq 2 bits, code"]["text"] > perplexity["gptq 2 bits, random"]["text"]


def test_samples_are_paired(results):
    """8 bits change next to nothing, so with the same noise nearly all completions are the same ones."""
    by_label = {result.arm.label: result for result in results.arms}
    one, other = by_label["bf16"].completions, by_label["rtn 8 bits"].completions
    same = [a == b for texts, others in zip(one, other) for a, b in zip(texts, others)]
    assert sum(same) >= 0.8 * len(same)
    lossless = Study({**FACTORS, "method": {"none": Uncompressed()}}, TASKS[:2], **SMALL).run()
    assert lossless.arms[0].completions == lossless.arms[1].completions
    assert [result.arm.precision for result in lossless.arms] == [None, None]  # it has no budgets: one arm


def test_a_comparison_pairs_samples_and_adjusts(results):
    found = {one.arm.label: one for one in results.compare("bf16")}
    assert set(found) == {result.arm.label for result in results.arms} - {"bf16"}
    one = found["rtn 2 bits"]
    base, arm = (next(r for r in results.arms if r.arm.label == label) for label in ("bf16", "rtn 2 bits"))
    assert one.p == mcnemar(arm.passed(range(5))[0], base.passed(range(5))[0])
    assert one.p_adjusted >= one.p
    assert one.samples == 10
    assert one.tasks == 5
    assert one.only_baseline - one.only_arm == round(-10 * one.difference)
    assert one.interval[0] <= one.difference <= one.interval[1]
    raw = {one.arm.label: one for one in results.compare("bf16", correction="none")}
    assert raw["rtn 2 bits"].p_adjusted == one.p

    by_text = results.compare({"calibration": "random"})
    assert [(c.arm.label, c.baseline.label) for c in by_text] == [
        ("gptq 8 bits, code", "gptq 8 bits, random"),
        ("gptq 2 bits, code", "gptq 2 bits, random"),
    ]
    by_method = results.compare({"method": "rtn"})
    assert {(c.arm.method, c.baseline.method, c.arm.precision == c.baseline.precision) for c in by_method} == {
        ("gptq", "rtn", True)
    }
    assert len(by_method) == 4
    assert len(results.pairwise("method")) == 4
    assert results.pairwise("model") == []


def test_comparisons_that_cannot_be_made_are_refused(results):
    with pytest.raises(ValueError, match="unpaired results: no arm"):
        results.compare({"calibration": "mixed"})
    with pytest.raises(ValueError, match="unknown factor 'bits'"):
        results.compare({"bits": 4})
    with pytest.raises(ValueError, match="unknown test"):
        results.compare(test="t")
    with pytest.raises(ValueError, match="unknown correction"):
        results.compare(correction="holm")
    short = replace(results.arms[1], statuses=tuple(row[:1] for row in results.arms[1].statuses))
    with pytest.raises(ValueError, match="unpaired results: rtn 8 bits and bf16 have other samples"):
        replace(results, arms=(results.arms[0], short)).compare()


def _made(*arms):
    """Results of ten tasks of twenty samples in which each arm passes so many samples a task."""
    facts = {"bits": 4.0, "bytes": 1, "disk_bytes": 1, "perplexity": {}}
    tasks = tuple(CodeTask(f"t{i}", "python", "", "") for i in range(10))
    made = []
    for arm, passes in arms:
        statuses = tuple(("pass",) * count + ("fail",) * (20 - count) for count in passes)
        made.append(ArmResult(arm, facts, statuses, tuple(("",) * 20 for _ in tasks)))
    return Results(tasks, tuple(made), 20, 0.2, 0)


def test_it_says_where_the_two_levels_disagree():
    """One task lost in whole is twenty witnesses to McNemar and one to Wilcoxon."""
    whole, one_lost, all_worse = [20] * 10, [0, *[20] * 9], [8] * 10
    results = _made((Arm("m"), whole), (Arm("m", "a", 4.0), one_lost), (Arm("m", "b", 4.0), all_worse))
    one, many = results.compare()
    assert one.significant
    assert not one.significant_by_task
    assert one.disagree
    assert many.significant
    assert many.significant_by_task
    assert not many.disagree
    assert one.odds_ratio == float("inf")


def test_families_of_p_values_are_a_model_s_own():
    arms = [(Arm(m, method, bits), [20] * 10) for m in ("m", "n") for method, bits in (("bf16", None), ("a", 4.0))]
    arms[1] = (arms[1][0], [14, 15, *[20] * 8])
    one, other = _made(*arms).compare()
    assert (one.p_adjusted, one.arm.model) == (one.p, "m")  # alone in its family
    assert other.p_adjusted == 1
    sizes = _made((Arm("small", "a", 4.0), [9] * 10), (Arm("large", "a", 4.0), [11] * 10)).compare({"model": "small"})
    assert [(c.arm.model, c.baseline.model) for c in sizes] == [("large", "small")]


def test_completions_that_lead_nowhere_fail_and_stay():
    nothing = Study({**FACTORS, "method": ["rtn"], "precision": [8]}, TASKS[:2], **{**SMALL, "max_new_tokens": 1}).run()
    for result in nothing.arms:
        assert [len(row) for row in result.statuses] == [2, 2]
        assert results_of(result) <= {"fail", "timeout"}
    assert nothing.compare()[0].samples == 4


def results_of(result):
    return {status for row in result.statuses for status in row}


def test_a_stopped_study_goes_on_where_it_was(tmp_path, monkeypatch, results):
    path = tmp_path / "code.jsonl"
    study = Study({**FACTORS, "method": ["rtn"]}, TASKS, **SMALL, rows=4)

    def stop(arm, done, of, number, total):
        if arm.method == "rtn" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.run(path, stop)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"arm": "torn')
    seen = []
    whole = study.run(path, lambda arm, done, *rest: seen.append((arm.label, done)))
    assert [label for label, done in seen if done == 5][:1] == ["bf16"]
    assert min(done for label, done in seen if label == "rtn 8 bits") == sum("task" in row for row in kept) - 5
    for arm in whole.arms:  # the same as without a stop, and whatever the batches
        other = next(r for r in results.arms if r.arm == arm.arm)
        assert (arm.statuses, arm.completions) == (other.statuses, other.completions)

    monkeypatch.setattr(module, "sample", None)  # would fail if anything were drawn again
    again = study.run(path)
    assert [arm.statuses for arm in again.arms] == [arm.statuses for arm in whole.arms]


def test_what_a_method_cannot_reach_is_an_arm_without_samples():
    results = Study({**FACTORS, "method": {"rtn": RTN()}, "precision": [0.5, 8]}, TASKS[:1], **SMALL).run()
    assert [result.reached for result in results.arms] == [True, False, True]
    assert "cannot go below 1." in _text(tables(results)[0])
    assert len(results.compare()) == 1
    assert {record.metric for record in results.records() if record.setting.get("budget") == 0.5} == {"reachable"}


def _text(table):
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    Console(file=out, width=220).print(table)
    return out.getvalue()


def test_methods_are_named_in_every_way():
    tasks = TASKS[:1]
    known = Study({**FACTORS, "method": ["rtn", "broadsheet.methods.weights.gptq:GPTQ", "hqq"]}, tasks).methods
    assert list(known) == ["rtn", "gptq", "hqq"]
    exact = Study({**FACTORS, "method": {"three": GPTQ(bits=3, group_size=64)}, "precision": [None]}, tasks)
    assert [arm.label for arm in exact.arms()] == ["bf16", "three, code", "three, random"]
    assert list(Study({**FACTORS, "method": [RTN()]}, tasks).methods) == ["rtn"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {**FACTORS, "size": [1]}}, "unknown factor 'size'"),
        ({"factors": {"model": ["pocket-code"], "method": ["rtn"]}}, "at least one precision"),
        ({"factors": {**FACTORS, "precision": [17]}}, "a precision is bits a weight"),
        ({"factors": {**FACTORS, "calibration": ["wiki"]}}, "no calibration 'wiki'"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": [TASKS[0], TASKS[0]]}, "the same name"),
        ({"n_samples": 0}, "n_samples and max_new_tokens"),
        ({"tasks": [CodeTask("a", "cobol", "", "")]}, "no executor for the language 'cobol'"),
    ],
)
def test_bad_input_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"factors": FACTORS, "tasks": TASKS, **changes})


def test_unknown_methods_models_and_short_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown method 'rnt'"):
        Study({**FACTORS, "method": ["rnt"]}, TASKS).arms()
    with pytest.raises(ValueError, match="no model 'pocket'"):
        Study({**FACTORS, "model": ["pocket"]}, TASKS).run()
    text = tmp_path / "short.txt"
    text.write_text("too short")
    study = Study({**FACTORS, "method": ["gptq"], "calibration": ["mine"]}, TASKS[:1], texts={"mine": str(text)}, **SMALL)
    with pytest.raises(ValueError, match="holds 0 pieces of 96 tokens"):
        study.run()


def test_own_texts_calibrate_any_model(tmp_path):
    """Another model, with the tokenizer's own habits; it passes nothing."""
    from broadsheet.core.models import load

    model = tiny(vocab_size=640, seed=1)
    model.save_pretrained(tmp_path / "model")
    load("pocket-code")[1].save_pretrained(tmp_path / "model")
    text = tmp_path / "mine.txt"
    text.write_text(" ".join(task.prompt for task in code.make_tasks(100)))
    factors = {"model": [str(tmp_path / "model")], "method": ["gptq"], "precision": [4], "calibration": ["mine"]}
    found = Study(factors, TASKS[:2], texts={"mine": str(text)}, perplexity={"own": str(text)}, **SMALL).run()
    assert found.arms[1].facts["perplexity"]["own"] > 1
    assert all(status != "pass" for arm in found.arms for row in arm.statuses for status in row)
    assert torch.isfinite(torch.tensor(found.arms[0].facts["perplexity"]["own"]))


def test_tables_and_picture_show_every_arm(results):
    shown = [_text(table) for table in tables(results)]
    assert len(shown) == 4  # arms; against bf16; calibrations; methods
    for result in results.arms:
        assert f"{result.facts['bits']:.2f}" in shown[0]
    assert "McNemar" in shown[1]
    drawn = svg(picture(results, "python"))
    assert drawn.startswith("<svg")
    records = results.records() + results.comparison_records(results.compare(), "precision")
    assert {record.metric for record in records} == {
        "pass@1",
        "bits",
        "bytes",
        "disk_bytes",
        "perplexity",
        "pass@1_difference",
    }
    assert all(json.loads(json.dumps(record.to_json())) for record in records)


def _difference(question, budget, calibration, value, p, seed, against="", method="gptq"):
    setting = {"question": question, "budget": budget, "calibration": calibration, "bits": budget + 0.25, "p_tasks": p}
    return Record(
        *("quantizing-code-llms", method, "code-study", "pass@1_difference", value),
        seed=seed,
        setting={**setting, "against": {"method": method, "calibration": against}},
    )


def _found(three_bits=0.001, four_bits=0.5, gain=0.3, method="gptq"):
    """Differences as a study of three seeds writes them."""
    for seed in range(3):
        for budget, value, p in ((8.0, 0.0, 0.9), (4.0, -0.003, four_bits), (3.0, -0.05, three_bits), (2.0, -0.3, 0.001)):
            yield _difference("precision", budget, "code", value, p, seed, method=method)
        yield _difference("calibration", 2.0, "random", -gain, 0.001, seed, "code", method)
        yield _difference("calibration", 2.0, "random", 0.5, 0.9, seed, "mixed", method)  # not what is asked
        yield _difference("calibration", 4.0, "random", 0.0, four_bits, seed, "code", method)


@pytest.mark.parametrize(
    ("check", "changes", "verdict"),
    [
        (claims.code_four_bits, {}, HOLDS),
        (claims.code_four_bits, {"four_bits": 0.01}, FAILS),
        (claims.code_bits, {}, HOLDS),
        (claims.code_bits, {"three_bits": 0.2}, DIRECTION),
        (claims.code_bits, {"four_bits": 0.01}, FAILS),
        (claims.code_calibration, {}, HOLDS),
        (claims.code_calibration, {"four_bits": 0.01}, DIRECTION),
        (claims.code_calibration, {"gain": -0.3}, FAILS),
    ],
)
def test_claims_are_judged_by_the_records(check, changes, verdict):
    found = check(tuple(_found(**changes)))
    assert found is not None
    assert found[0] == verdict
    assert check(()) is None


def test_the_paper_s_own_quantiser_is_judged_where_it_was_run():
    found = claims.code_four_bits((*_found(four_bits=0.01), *_found(method="aqlm")))
    assert found is not None
    assert found[0] == HOLDS
    assert found[1].startswith("aqlm at 4.25 bits: -0.3 points")
