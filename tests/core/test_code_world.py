"""The language of function completion: true, decidable, and split so that nothing evaluated was trained on."""

import random
import re

import pytest
import torch

from broadsheet.core.codetasks import truncate
from broadsheet.core.microworld import code
from broadsheet.core.microworld.encoding import IGNORE
from broadsheet.core.microworld.train import RECIPES, make_batch
from broadsheet.core.models import load
from broadsheet.core.sandbox import run


@pytest.fixture(scope="module")
def tokenizer():
    return load("pocket-code")[1]


def test_solutions_pass_and_changed_constants_fail():
    """Of changed constants a fifth survives, nearly all because nothing changes: ``n > 0 and n > 40``."""
    killed = []
    for task in code.make_tasks(8, seed="test"):
        assert run(task.source(task.solution), task.tests, seconds=20).passed, task
        for constant in re.finditer(r"\d+", task.solution):
            changed = f"{task.solution[: constant.start()]}{int(constant[0]) + 1}{task.solution[constant.end() :]}"
            killed.append(not run(task.source(changed), task.tests, seconds=20).passed)
        assert truncate(task.prompt, task.solution + "\n\ndef other(") == task.solution.rstrip()
    assert sum(killed) > 0.6 * len(killed)


def test_training_and_evaluation_share_no_function():
    rng = random.Random(0)
    drawn = {split: {_meaning(code.draw_function(rng, split)) for _ in range(600)} for split in ("train", "evaluation")}
    assert not drawn["train"] & drawn["evaluation"]
    assert len(drawn["evaluation"]) > 400
    assert all(re.search(r"\d", body) for body in drawn["evaluation"])


def _meaning(function):
    """The body with the same names for all."""
    names = {name: f"a{i}" for i, name in enumerate(function.arguments)}
    if function.arguments[0] in code._LISTS:
        names[function.arguments[0][0]] = "e"
    return re.sub(r"[a-z]+", lambda word: names.get(word[0], word[0]), function.body)


def test_names_do_not_decide_the_split():
    one = code.Function("f", ("xs",), "", "sum(x * 3 for x in xs if x > 7)", (3, 7))
    other = code.Function("g", ("values",), "", "sum(v * 3 for v in values if v > 7)", (3, 7))
    assert one.split == other.split
    assert code.Function("f", ("xs",), "", "len(xs)", ()).split == "train"


def test_the_same_seed_gives_the_same_tasks():
    assert code.make_tasks(5, seed=1) == code.make_tasks(5, seed=1) != code.make_tasks(5, seed=2)
    assert len({task.name for task in code.make_tasks(50)}) == 50


@pytest.mark.parametrize("kind", code.CALIBRATIONS)
def test_calibration_is_of_its_kind(kind, tokenizer):
    ids = code.calibration(kind, 8, 128, tokenizer, seed=3)
    assert ids.shape == (8, 128)
    assert torch.equal(ids, code.calibration(kind, 8, 128, tokenizer, seed=3))
    assert not torch.equal(ids, code.calibration(kind, 8, 128, tokenizer, seed=4))
    lines = sum("return" in text for text in tokenizer.batch_decode(ids))
    assert lines == {"code": 8, "mixed": 4, "random": 0}[kind]
    assert int(tokenizer.bos_token_id) in ids
    with pytest.raises(ValueError, match="unknown calibration"):
        code.calibration("wiki", 1, 8, tokenizer)


def test_a_batch_is_a_function_of_its_step_and_learns_what_answers(tokenizer):
    recipe = RECIPES["pocket-code"]
    stage = recipe.stages[1]
    one, same = (make_batch(recipe, stage, 3, tokenizer) for _ in range(2))
    assert torch.equal(one.ids, same.ids)
    assert torch.equal(one.labels, same.labels)
    shares = {}
    for row in range(len(one.ids)):
        kept = one.labels[row] != IGNORE
        assert torch.equal(one.labels[row][kept], one.ids[row][kept])
        shares.setdefault(one.tasks[row], []).append(float(kept.float().mean()))
    assert min(shares["text"]) > 0.9
    assert min(shares["code"]) < 0.5  # answers alone
    assert max(shares["code"]) > 0.9  # every fourth row in whole


@pytest.mark.slow
def test_the_tokenizer_that_ships_is_the_recipe_s(tokenizer):
    assert RECIPES["pocket-code"].tokenizer().get_vocab() == tokenizer.get_vocab()


def test_a_prompt_is_cut_into_the_same_tokens_whether_its_answer_follows_or_not(tokenizer):
    prompt = code.make_tasks(1)[0].prompt
    ids = tokenizer(prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == prompt
    assert tokenizer(prompt + "    return 1\n")["input_ids"][: len(ids)] == ids
