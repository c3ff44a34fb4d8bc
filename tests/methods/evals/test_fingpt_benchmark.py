"""FinGPT-Benchmark: official scores and splits, strict scores, data, mixtures, masks, baselines, the instrument."""

import itertools
import json
import math
import os
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import Draw, Faults, SimulatedChat
from broadsheet.methods.evals.fingpt_benchmark import (
    FAMILIES,
    MULTI,
    RELATIONS,
    FinGPTBenchmark,
    FinTask,
    Row,
    baselines,
    build_mix,
    check_apart,
    phase_data,
    read_entities,
    read_option,
    read_sentiment,
    read_triples,
    read_yes_no,
    run_phase,
    score_headline,
    score_ner,
    score_re,
    score_rows,
    score_sentiment,
    synthetic,
    tune,
    vote,
)
from broadsheet.methods.evals.fingpt_benchmark.readers import (
    headline_split,
    random_split,
    read_conll,
    read_finred,
    read_fiqa,
    read_fpb,
    read_headline,
    read_nwgi,
    read_tfns,
)
from broadsheet.methods.evals.fingpt_benchmark.rows import relations
from broadsheet.methods.evals.fingpt_benchmark.tasks import FILES, parse_mix
from broadsheet.methods.evals.fingpt_benchmark.training import IGNORED, causal_loss, collate, encode
from broadsheet.methods.evals.fingpt_benchmark.world import SimClassifier

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "fingpt_benchmark_official.json").read_text(encoding="utf-8"))
CASES, OFFICIAL = GOLDEN["cases"], GOLDEN["official"]
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared")) / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED}: row counts of the public files are not checked")
    return SHARED / name


def scored(family, pairs, compat):
    preds, golds = [said for said, _ in pairs], [gold for _, gold in pairs]
    if family in ("sentiment", "headline"):
        score = score_sentiment if family == "sentiment" else score_headline
        return score(preds, golds, compat=compat)
    score = score_ner if family == "ner" else score_re
    return score(preds, golds, [CASES[family]["input"]] * len(pairs), compat=compat)


def pairs_of(family):
    return CASES[family] if isinstance(CASES[family], list) else CASES[family]["pairs"]


# --- 1: rows of the public files ------------------------------------------------------------------------------------------


def test_check1_phrasebank_and_its_split():
    folder = shared("financial_phrasebank")
    rows = read_fpb(folder / "Sentences_50Agree.txt", accept_noncommercial=True)
    split = FinTask("sentiment", folder, accept_noncommercial=True).load()
    assert (len(rows), len(split.train), len(split.test)) == (4846, 6 * 3634, 1212)
    assert len(split.train) == 21_804
    assert Counter(row.output for row in rows) == {"neutral": 2879, "positive": 1363, "negative": 604}
    assert rows[0].prompt.startswith(
        "Instruction: What is the sentiment of this news? Please choose an answer from {negative/neu"
    )
    assert 21_804 + 19_698 + 19_086 + 16_184 == 76_772  # with FiQA 938 x 21, TFNS 9,543 x 2, NWGI 16,184, which are not here


def test_check1_tweets():
    rows = read_tfns(shared("tfns_valid") / "sent_valid.csv")
    assert len(rows) == 2388
    assert Counter(row.output for row in rows) == {"neutral": 1566, "positive": 475, "negative": 347}
    assert "tweet" in rows[0].instruction
    assert FinTask("sentiment", SHARED / "tfns_valid").load().train == ()


@pytest.mark.parametrize("count", ["4846", "1213"])
def test_check1_splits_are_those_of_datasets(count):
    wanted = OFFICIAL["splits"][count]
    train, test = random_split(int(count), wanted["share"], 42)
    assert (len(train), len(test)) == (wanted["train"], wanted["test"])
    assert (train[:8], test[:8]) == (wanted["first_train"], wanted["first_test"])
    assert not set(train) & set(test)
    assert len(random_split(1213, 0.226, 42)[0]) * 21 == 19_698


HEADLINE = (
    "Dates,URL,News,Price or Not,Price Direction Up,Price Direction Constant,Price Direction Down,Asset Comparision,"
    "PastPrice,FuturePrice,PastNews,FutureNews\n"
)


def test_check1_headlines(tmp_path):
    file = tmp_path / FILES["headline"]
    file.write_text(HEADLINE + "".join(f"d,u,gold {i} up,1,1,0,0,0,1,0,0,0\n" for i in range(11_412)))
    train, test = headline_split(read_headline(file))
    assert (len(train), len(test)) == (9 * 9129, 9 * 2283)
    assert [row.output for row in train[:9]] == ["Yes", "Yes", "No", "No", "Yes", "No", "No", "No", "No"]
    # Officially "price or not" has the answer to "price stays constant".
    assert [row.output for row in read_headline(file, official=True)[0]][:3] == ["No", "Yes", "No"]


def test_check1_agreements(tmp_path):
    file = tmp_path / "FIN5.txt"
    file.write_text(OFFICIAL["conll"]["text"])
    official = read_conll(file, official=True)
    assert [row.input for row, _ in official] == OFFICIAL["conll"]["inputs"]
    assert [row.output for row, _ in official] == OFFICIAL["conll"]["outputs"]
    ours = read_conll(file)
    assert [row.output for row, _ in ours] == [
        "Lender Beta Bank is an organization, John Smith is a person, New York is a location.",
        "Jane is a person.",
        "Oslo is a location, Delta Corp is an organization.",
    ]
    (tmp_path / "FIN3.txt").write_text(OFFICIAL["conll"]["text"])
    faulty = FinTask("ner-cls", tmp_path, official=True).load().train
    assert [row.output for row in faulty[:: OFFICIAL["conll"]["wordings"]]] == OFFICIAL["conll"]["cls_outputs"]
    right = FinTask("ner-cls", tmp_path).load().train
    assert [row.output for row in right[::17]][:4] == ["organization", "person", "location", "person"]


def test_other_public_formats(tmp_path):
    (tmp_path / "fiqa.jsonl").write_text(
        "".join(json.dumps({"sentence": f"s{i}", "sentiment_score": s, "format": "post"}) + "\n"
                for i, s in enumerate((-0.5, -0.1, 0.0, 0.0999, 0.1, 0.5)))
    )  # fmt: skip
    assert [row.output for row in read_fiqa(tmp_path / "fiqa.jsonl")] == ["negative", *["neutral"] * 3, *["positive"] * 2]
    (tmp_path / "nwgi_train.jsonl").write_text(json.dumps({"news": "n", "label": "mildly positive"}))
    assert (
        "strong negative/moderately negative/mildly negative/neutral"
        in read_nwgi(tmp_path / "nwgi_train.jsonl")[0].instruction
    )
    for part in ("train", "test"):
        (tmp_path / f"{part}.sent").write_text("Acme was founded by Jo .\n")
        (tmp_path / f"{part}.tup").write_text("Acme ; Jo ; founded by | Acme ; Jo ; chairperson\n")
    split = FinTask("finred", tmp_path).load()
    assert [row.output for row in split.train] == [
        *["founded_by: Acme, Jo; chairperson: Acme, Jo"] * 2, "founded_by", "founded_by", "chairperson", "chairperson",
    ]  # fmt: skip
    assert len(FinTask("finred-re", tmp_path).load().train) == 2
    chosen = FinTask("finred-cls", tmp_path).load().train
    assert len(chosen) == 12
    assert all(len(row.options) == 4 and row.output in row.options and row.output in row.instruction for row in chosen)


# --- 2: the mask ----------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    eos_token_id, pad_token_id = 1, 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [2] * add_special_tokens + [3 + ord(letter) % 60 for letter in text]}


@pytest.mark.parametrize("mask", ["ignore", "official"])
def test_check2_gradient_of_the_prompt(mask):
    rows = [
        Row("Say it.", "gold rose", "Yes", "headline", "x"),
        Row("Say it.", "gold fell after a long day", "No", "headline", "x"),
    ]
    encoded, dropped = encode(rows, Letters(), mask=mask)
    batch = collate(encoded, Letters.pad_token_id)
    assert dropped == 0
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    logits = torch.randn(*batch["labels"].shape, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    causal_loss(logits, batch["labels"]).backward()
    size = logits.grad.abs().sum(-1)  # position t predicts token t + 1
    for row, one in enumerate(encoded):
        prompt = len(Letters()(rows[row].prompt)["input_ids"])
        begin = size.shape[1] - len(one.input_ids)
        answer = size[row, begin + prompt - 1 : -1]
        asked = size[row, begin : begin + prompt - 1]
        assert (answer > 0).all()
        assert (asked == 0).all() if mask == "ignore" else (asked > 0).all()
        assert (size[row, : max(begin - 1, 0)] == 0).all()  # padding has no label under either
    hidden = {"ignore": IGNORED, "official": Letters.pad_token_id}[mask]
    assert encoded[0].labels[:5] == [hidden] * 5
    assert encoded[0].labels[-1] == Letters.eos_token_id


def test_long_rows_are_left_out_and_long_answers_are_errors():
    rows = [Row("Say it.", "x" * n, "Yes", "headline", "x") for n in (10, 600)]
    assert [len(encode(rows, Letters(), max_length=512)[0]), encode(rows, Letters(), max_length=512)[1]] == [1, 1]
    with pytest.raises(ValueError, match="more than max_length"):
        encode([Row("Say it.", "x", "y" * 600, "headline", "x")], Letters())
    with pytest.raises(ValueError, match="ignore or official"):
        encode(rows, Letters(), mask="all")
    assert Row("", "only this", "a", "ner", "x").prompt == "only this"


# --- 3: scores ------------------------------------------------------------------------------------------------------------


def test_check3_sixty_fixtures():
    assert sum(len(pairs_of(family)) for family in FAMILIES) == 60


@pytest.mark.parametrize("family", FAMILIES)
def test_check3_official_scores(family):
    result, wanted = scored(family, pairs_of(family), compat=True), OFFICIAL[family]
    shared_names = [name for name in wanted if name in result.metrics]
    assert len(shared_names) >= 2
    for name in shared_names:
        assert result.metrics[name] == pytest.approx(wanted[name], abs=1e-15)
    for kind, f1 in wanted.get("by_type", {}).items():
        assert result.metrics[f"{kind} f1"] == pytest.approx(f1, abs=1e-15)
    assert result.unparsed == 0  # officially everything can be read


@pytest.mark.parametrize("entry", OFFICIAL["subsets"], ids=lambda entry: f"{entry['family']} {len(entry['rows'])}")
def test_check3_official_scores_of_samples(entry):
    pairs = [pairs_of(entry["family"])[i] for i in entry["rows"]]
    result = scored(entry["family"], pairs, compat=True)
    for name, value in entry["official"].items():
        if name == "by_type":
            for kind, f1 in value.items():
                assert result.metrics[f"{kind} f1"] == pytest.approx(f1, abs=1e-15)
        elif name.endswith("raises"):
            assert math.isnan(result.metrics["relation_f1" if name.startswith("relation") else "f1"])
        else:
            assert result.metrics[name] == pytest.approx(value, abs=1e-15)


def test_check3_strict_scores_flag_what_cannot_be_read():
    unparsed = {family: scored(family, pairs_of(family), compat=False).unparsed for family in FAMILIES}
    assert sum(unparsed.values()) >= 15
    assert unparsed == {"sentiment": 9, "headline": 8, "ner": 4, "re": 3}


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", "positive"),
        ("Not negative, so neutral", "neutral"),
        ("not positive", None),
        ("positive or negative", None),
        ("It is neither positive nor negative, hence neutral.", "neutral"),
        ("", None),
        ("positively", None),
        ("mildly positive", "neutral"),
        ("strong negative", "negative"),
        ("<think>maybe positive</think> negative", "negative"),
        ("It isn't positive. Negative.", "negative"),
        ("{negative/neutral/positive}", None),
    ],
)
def test_reading_sentiment(text, label):
    assert read_sentiment(text) == label


def test_reading_the_others():
    assert [read_yes_no(text) for text in ("Yes", "no.", "yesterday", "eyes", "Yes and no", "not yes", "")] == [
        "yes", "no", None, None, None, None, None,
    ]  # fmt: skip
    assert read_entities("Acme, Inc. is an organization, Jo is a person.") == [("Acme, Inc.", "ORG"), ("Jo", "PER")]
    assert read_entities("none") is None
    source = "Acme, Inc. was founded by Jo"
    assert read_triples("founded_by: Acme, Inc., Jo", source) == [("founded_by", "Acme, Inc.", "Jo")]
    assert read_triples("nothing", source) is None
    options = ("owner of", "owned by", "operator")
    assert [read_option(text, options) for text in ("Owned_by", "owner of or operator", "not operator", "")] == [
        "owned by",
        None,
        None,
        None,
    ]


def test_hallucinated_entities_and_triples_cost_precision():
    text = "Jo works for Acme"
    said, gold = "Jo is a person, Zed is a person, Ada is a person.", "Jo is a person."
    assert score_ner([said], [gold], [text]).metrics["precision"] == pytest.approx(1 / 3)
    assert score_ner([said], [gold], [text], compat=True).metrics["precision"] == 1
    said, gold = "employer: Jo, Acme; employer: Jo, Acme; owned_by: Acme, Zed", "employer: Jo, Acme"
    assert score_re([said], [gold], [text]).metrics["precision"] == pytest.approx(1 / 3)
    assert score_re([said], [gold], [text], compat=True).metrics["precision"] == 1


# --- 4: nothing and everything ---------------------------------------------------------------------------------------------


def test_check4_no_predictions_and_gold_as_prediction():
    assert OFFICIAL["re_nothing"]["raises"] == "ZeroDivisionError"
    ner_rows = [row for row, _ in synthetic.make_ner(40)]
    re_rows = [
        row
        for text, triples in synthetic.make_relations(40)
        for row in relations(text, triples, "synthetic", classify=False)
    ]
    for rows, score in ((ner_rows, score_ner), (re_rows, score_re)):
        golds, inputs = [row.output for row in rows], [row.input for row in rows]
        nothing, all_right = score([""] * len(rows), golds, inputs), score(golds, golds, inputs)
        for name in ("precision", "recall", "f1"):
            assert (nothing.metrics[name], all_right.metrics[name]) == (0, 1)
        assert (nothing.unparsed, all_right.unparsed) == (len(rows), 0)
        assert nothing.ci95["f1"] == (0, 0)
    assert math.isnan(score_re([""], [re_rows[0].output], [re_rows[0].input], compat=True).metrics["f1"])


def test_intervals_cover_and_small_sets_have_wide_ones():
    rows = [row for row, _ in synthetic.make_ner(98)]
    preds = [row.output if i % 2 else "" for i, row in enumerate(rows)]
    low, high = score_rows(rows, preds).ci95["f1"]
    value = score_rows(rows, preds).metrics["f1"]
    assert low < value < high
    assert 0.1 < high - low < 0.3


# --- 5: the instrument -----------------------------------------------------------------------------------------------------

CONFUSION = {
    "negative": {"negative": 0.8, "neutral": 0.15, "positive": 0.05},
    "neutral": {"negative": 0.1, "neutral": 0.7, "positive": 0.2},
    "positive": {"negative": 0.05, "neutral": 0.05, "positive": 0.9},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_check5_simulated_classifier(seed):
    rows = synthetic.make_sentiment(3000, 40 + seed)
    world = SimClassifier(rows, CONFUSION, format_error=0.12)
    draws = [Draw(f"{seed} {i}") for i in range(len(rows))]
    preds, golds = (
        [world.answer(row.output, draw) for row, draw in zip(rows, draws, strict=True)],
        [row.output for row in rows],
    )
    result = score_sentiment(preds, golds)
    expected = world.expected_accuracy(golds)
    assert abs(result.metrics["accuracy"] - expected) < 2 * math.sqrt(expected * (1 - expected) / len(rows))
    assert result.unparsed == sum(world.broken(draw) for draw in draws)
    assert score_sentiment(preds, golds, compat=True).unparsed == 0


# --- 6: zero-shot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_check6_nothing_of_the_held_out_family_is_trained_on(family):
    phase = phase_data("zero", held_out=family, items=60)
    (test,) = phase.test.values()
    digests = {row.digest for row in test}
    assert len(phase.train) > 0
    assert all(row.family != family and row.digest not in digests for row in phase.train)
    assert all(row.options for row in (*phase.train, *test))
    assert (phase.epochs, phase.warmup) == (1, 0.0)


def test_check6_leaks_are_errors():
    test = synthetic.make_sentiment(5)
    check_apart([row for row, _ in synthetic.make_ner(5)], test, "sentiment")
    with pytest.raises(ValueError, match="held-out family"):
        check_apart(test[:1], test, "sentiment")
    copied = Row("Extract.", test[2].input.upper() + "!", "x", "ner", "x")
    with pytest.raises(ValueError, match="held-out family"):
        check_apart([copied], test, "sentiment")


def test_options_are_shuffled_and_wordings_as_many_as_in_the_paper():
    firsts = Counter(
        row.instruction.split("Options: ")[1].split(",")[0] for row in FinTask("sentiment-cls", items=200).load().train
    )
    assert set(firsts) == {"positive", "negative"}
    assert min(firsts.values()) > 20
    wordings = {name: len({row.instruction.split("\nOptions")[0].replace(row.group.split(" ", 1)[-1], "") for row in rows})
                for name, rows in (("ner", FinTask("ner-cls").load().train),)}  # fmt: skip
    assert wordings["ner"] == 17
    relations_rows = FinTask("finred-cls").load().train
    assert Counter(Counter(row.group for row in relations_rows).values()).most_common(1)[0][0] == 6
    assert not any(row.output == "neutral" for row in FinTask("sentiment-cls").load().test)
    assert set(Counter(row.group for row in FinTask("sentiment-cls").load().test).values()) == {5}


def test_votes():
    assert vote(["positive", "not positive", "positive", "negative", "neutral"], ["a"] * 5) == {"a": "positive"}
    assert vote(["positive", "negative"], ["a", "a"]) == {"a": "neutral"}


# --- 7: baselines ----------------------------------------------------------------------------------------------------------


def test_check7_tfidf_on_tweets():
    rows = read_tfns(shared("tfns_valid") / "sent_valid.csv")
    golds = [row.output for row in rows]
    result = score_sentiment(baselines.cross_validated(rows), golds)
    usual = score_sentiment(baselines.majority(rows, rows), golds)
    low, high = result.ci95["accuracy"]
    assert low < result.metrics["accuracy"] < high
    assert high - low < 0.05
    assert low > usual.metrics["accuracy"] == pytest.approx(1566 / 2388)


def test_folds_never_train_on_what_they_answer():
    rows = [Row("q", f"word{i} only", ("positive", "negative")[i % 2], "sentiment", "x") for i in range(40)]
    answers = baselines.cross_validated(rows)  # nothing is common to two rows but "only"
    assert statistics.fmean(said == row.output for said, row in zip(answers, rows, strict=True)) < 0.8
    with pytest.raises(ValueError, match="at least 5 rows of every class"):
        baselines.cross_validated(rows[:6])


def test_baselines_on_synthetic_rows():
    for name in ("sentiment", "headline"):
        split = FinTask(name).load()
        plain, learned = (score_rows(split.test, f(split.train, split.test)) for f in (baselines.majority, baselines.tfidf))
        assert learned.metrics["accuracy"] > plain.metrics["accuracy"] + 0.1
        assert learned.unparsed == plain.unparsed == 0
    split = FinTask("ner").load()
    tagged = score_rows(split.test, baselines.Gazetteer().fit(split.train).predict(split.test))
    assert tagged.metrics["f1"] > 0.8


# --- 8: mixtures -----------------------------------------------------------------------------------------------------------


def test_check8_every_stretch_has_the_stated_proportions():
    mix = build_mix(MULTI, items=200)
    named = [name for name, _ in mix.named()]
    assert len(named) == len(mix) == sum(len(rows) * mix.factors[name] for name, rows in mix.parts.items())
    assert sum(mix.proportions.values()) == pytest.approx(1)
    for part in (named, named[: len(named) // 3], named[1000:3000]):
        for name, share in mix.proportions.items():
            assert abs(part.count(name) / len(part) - share) < 0.01
    again = [row for _, row in build_mix(MULTI, items=200).named()]
    assert again == list(mix)
    assert [row for _, row in build_mix(MULTI, items=200, seed=1).named()] != again


def test_mixtures_are_parsed():
    assert parse_mix("sentiment, headline,finred*3,ner * 15") == {"sentiment": 1, "headline": 1, "finred": 3, "ner": 15}
    seen = [row.input for name, row in build_mix("ner*3", items=50).named()]
    assert max(Counter(seen).values()) >= 3
    assert all(a != b for a, b in itertools.pairwise(seen))


# --- the benchmark, tuning, errors ----------------------------------------------------------------------------------------


class Oracle:
    def __init__(self, bench):
        self.golds = {row.prompt: row.output for rows in bench.rows().values() for row in rows}

    def reply(self, request, draw):
        return self.golds[str(request.messages[-1]["content"])]


@pytest.mark.parametrize("phase", ["single", "zero"])
@pytest.mark.parametrize("compat", [False, True])
def test_benchmark_runs_after_install(phase, compat):
    bench = FinGPTBenchmark(phase=phase, items=25, compat=compat)
    report = bench.evaluate(Chat(SimulatedChat(Oracle(bench), "sim:oracle")))
    assert report.get("accuracy").value == 1
    assert report.outcomes == {"scored": len(report.scored)}
    assert {one.sample.axes["source"] for one in report.scored} == {"synthetic"}
    if phase == "zero":
        assert report.get("vote_accuracy", "task", "sentiment").value == 1
    else:
        assert all(report.get("f1", "task", family).value == 1 for family in ("headline", "ner", "re"))


def test_benchmark_counts_unread_and_cut_answers():
    bench = FinGPTBenchmark(task="sentiment", items=300)
    world = SimClassifier(bench.rows()["sentiment"], CONFUSION, format_error=0.2)
    report = bench.evaluate(Chat(SimulatedChat(world, "sim:classifier", faults=Faults(truncate=0.1))))
    assert report.outcomes["truncated"] > 10
    assert report.outcomes["unparsed"] > 20
    total = sum(report.outcomes.values())
    unread = report.get("unparsed", "task", "sentiment").value * total
    assert round(unread, 6) == report.outcomes["truncated"] + report.outcomes["unparsed"]
    right = sum(mark.values["accuracy"] for one in report.scored for mark in one.marks)
    assert report.get("accuracy").value == pytest.approx(right / total)
    compat = FinGPTBenchmark(task="sentiment", items=300, compat=True)
    official = compat.evaluate(Chat(SimulatedChat(world, "sim:classifier")))
    assert official.outcomes == {"scored": 300}


@pytest.fixture
def one_thread():
    """So small a model is slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_tuning_learns_and_counts_its_price(one_thread):
    rows = [Row("Up?", f"gold {'up' if i % 2 else 'down'}", "Yes" if i % 2 else "No", "headline", "x") for i in range(24)]
    tuned = tune(tiny(), Letters(), rows, lora=None, epochs=6, learning_rate=1e-2, batch_size=8)
    assert tuned.losses[-1] < 0.3 * tuned.losses[0]
    assert tuned.tokens == 6 * sum(len(one.input_ids) for one in encode(rows, Letters())[0])
    assert tuned.trainable == sum(weight.numel() for weight in tuned.model.parameters())
    assert tune(tiny(), Letters(), rows, lora=None, max_steps=3, batch_size=8).tokens < tuned.tokens


def test_lora_trains_only_its_adapters(one_thread):
    pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")
    phase = phase_data("single", "headline", items=20)
    tuned = run_phase(tiny(), Letters(), phase, lora={"r": 2}, max_steps=2, batch_size=4, max_length=4000)
    assert tuned.trainable == 2 * 2 * ((32 + 32) + 2 * (32 + 16))  # two layers; q, k, v of rank 2
    assert len(tuned.losses) >= 1


def test_without_peft_there_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft"):
        tune(tiny(), Letters(), synthetic.make_sentiment(4))


def test_splits_have_hashes():
    one, other = FinTask("sentiment", seed=1).load(), FinTask("sentiment", seed=2).load()
    assert one.split_hash == FinTask("sentiment", seed=1).load().split_hash != other.split_hash
    assert all(FinTask(name).load().leaked == [] for name in ("sentiment", "headline", "ner", "finred"))


def test_synthetic_rows_are_consistent():
    for text, triples in synthetic.make_relations(400):
        for head, tail, relation in triples:
            assert head in text
            assert tail in text
            assert relation in RELATIONS
    assert {r for _, triples in synthetic.make_relations(400) for *_, r in triples} == set(RELATIONS)
    for row, entities in synthetic.make_ner(200):
        assert all(text in row.input for text, _ in entities)
    for nine in range(0, 90, 9):
        rows = synthetic.make_headline(10)[nine : nine + 9]
        price, up, flat, down = (row.output == "Yes" for row in rows[:4])
        assert price == (up + flat + down == 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FinTask("fraud"), "there is no task"),
        (lambda: parse_mix("ner*0"), "at least 1"),
        (lambda: parse_mix("ner*-2"), "at least 1"),
        (lambda: parse_mix("ner+re"), "cannot read"),
        (lambda: read_fpb("x"), "accept_noncommercial=True"),
        (lambda: read_tfns("/nowhere.csv"), "cannot read /nowhere.csv"),
        (lambda: FinTask("sentiment", "/nowhere").load(), "none of the files of sentiment"),
        (lambda: FinTask("ner", "/nowhere").load(), "lacks FIN5.txt, FIN3.txt"),
        (lambda: relations("a b", [("a", "b", "likes")], "x"), "none of the 29 relations"),
        (lambda: score_re(["x"], ["likes: a, b"], ["a b"]), "none of the 29 relations"),
        (lambda: score_sentiment([], []), "test split is empty"),
        (lambda: score_sentiment(["a"], []), "differ in number"),
        (lambda: score_sentiment(["a"], ["bullish"]), "no gold label"),
        (lambda: phase_data("zero", "sentiment,ner"), "reformulations"),
        (lambda: phase_data("single", "ner,headline"), "trains on one task"),
        (lambda: phase_data("zero", "sentiment-cls,ner-cls", items=20), "held-out family"),
        (lambda: phase_data("four"), "single, multi or zero"),
        (lambda: FinGPTBenchmark(task="fraud"), "there is no family"),
        (lambda: FinGPTBenchmark(phase="two"), "single, multi or zero"),
        (lambda: SimClassifier((), {"negative": {}}), "sum to 1"),
        (lambda: baselines.majority([], []), "no training rows"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_damaged_files_are_errors(tmp_path):
    def written(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    for make, message in (
        (lambda: read_tfns(written("a.csv", "a,b\n1,2\n")), "has no column text, label"),
        (lambda: read_tfns(written("a.csv", "text,label\nx,7\n")), "a label is 0, 1 or 2"),
        (lambda: read_fpb(written("a.txt", "no label\n"), True), "line 1: not of the form"),
        (lambda: read_fiqa(written("a.jsonl", "{}\n")), "line 1: an object with"),
        (lambda: read_nwgi(written("a.jsonl", '{"news": "x", "label": "good"}')), "a label is one of"),
        (lambda: read_finred(written("a.sent", "x\n"), written("a.tup", "")), "have 1 and 0 lines"),
        (lambda: read_finred(written("a.sent", "x\n"), written("a.tup", "a ; b\n")), "line 1: triples are"),
        (lambda: read_headline(written("a.csv", HEADLINE + "d,u,n,x,0,0,0,0,0,0,0,0\n")), "labels are 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    written("sent_train.csv", "text,label\nx,0\n")
    with pytest.raises(ValueError, match="test split of sentiment is empty"):
        FinTask("sentiment", tmp_path).load()
