"""INSTINCT: the bandit against autograd and the authors' code, spaces, budgets, fresh scores, real tasks."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.methods.evals.instinct import (
    INSTINCT,
    Example,
    InstructionSpace,
    NeuralUCB,
    Scorer,
    load_task,
    optimise,
    own_task,
    score_of,
)
from broadsheet.methods.evals.instinct.bandit import Weights, forward, gradients, initial, weighted_squares
from broadsheet.methods.evals.instinct.rivals import Evolution, GaussianProcess, matern
from broadsheet.methods.evals.instinct.scoring import THOUGHT, Task
from broadsheet.methods.evals.instinct.space import domain, first_sentence, projection
from broadsheet.methods.evals.instinct.world import Answering, BlackBox, easy

GOLDEN = Path(__file__).parents[2] / "golden"
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared"))
TASKS = SHARED / "data" / "instruction_induction"
SMALL = INSTINCT(n_domain=400, n_init=10, budget=30, n_eval=200, steps=40, hidden=20, nu=0.1)


@pytest.fixture(scope="module")
def small():
    return BlackBox(size=400, seed=3)


@pytest.fixture(scope="module")
def pocket():
    from broadsheet.core.models import load

    return load("pocket-2m")


# --- the bandit ---


@pytest.mark.parametrize("kind", ["scaled", "unit"])
def test_check1_gradients_are_those_of_autograd(kind):
    weights, x = initial(7, 11, kind, 0), np.random.default_rng(0).normal(size=(5, 7))
    ours = gradients(weights, x)
    parts = [torch.tensor(part, requires_grad=True) for part in weights.parts]
    for row, given in zip(ours, torch.tensor(x), strict=True):
        value = torch.relu(parts[0] @ given + parts[1]) @ parts[2] + parts[3]
        found = torch.cat([g.flatten() for g in torch.autograd.grad(value.sum(), parts)])
        assert np.abs(found.numpy() - row).max() < 1e-12
    inverse = Weights(*(np.random.default_rng(1).uniform(0.1, 2, part.shape) for part in weights.parts))
    flat = np.concatenate([part.reshape(-1) for part in inverse.parts])
    assert np.allclose(weighted_squares(weights, forward(weights, x)[1], x, inverse), (ours**2 * flat).sum(1), rtol=1e-12)


def test_check1_sigma_and_u_of_three_arms_by_hand():
    """One unit, one feature: f = 2 relu(3 x + 1) + 5, so g = (2 x, 2, 3 x + 1, 1) where 3 x + 1 > 0, else (0, 0, 0, 1)."""
    bandit = NeuralUCB(1, hidden=1, lam=0.5, nu=2.0, steps=0, cold=True)
    bandit.weights = Weights(np.array([[3.0]]), np.array([1.0]), np.array([2.0]), np.array([5.0]))
    arms = np.array([[1.0], [0.0], [-1.0]])
    mu, sigma = bandit.predict(arms)
    assert mu.tolist() == [13.0, 7.0, 5.0]
    # g² = (4, 4, 16, 1), (0, 4, 1, 1), (0, 0, 0, 1); lam nu / U = 2
    assert np.allclose(sigma**2, [50.0, 12.0, 2.0])
    assert bandit.select(arms) == 0
    bandit.update(arms[0], 0.3)
    assert [part.reshape(-1).tolist() for part in bandit.u.parts] == [[4.5], [4.5], [16.5], [1.5]]


@pytest.mark.parametrize(("run", "nu", "steps"), [("a", 1.0, 1000), ("b", 0.01, 100)])
def test_check2_the_authors_sequence_of_arms(run, nu, steps):
    golden = load_file(GOLDEN / "instinct_official.safetensors")
    x, rewards = golden["x"], golden["r"]
    bandit = NeuralUCB(16, lam=0.1, nu=nu, init="unit", steps=steps, cold=True)
    bandit.start = Weights(*(golden[name].astype(float) for name in ("w1", "b1", "w2", "b2")))
    bandit.start = replace(bandit.start, w2=bandit.start.w2.reshape(-1))
    bandit.weights = bandit.start.copy()
    for arm in golden["init"]:
        bandit.observe(x[arm].astype(np.float32), float(np.float32(rewards[arm])))
    chosen, sums = [], []
    for _ in range(12):
        chosen.append(bandit.select(x))
        bandit.update(x[chosen[-1]], rewards[chosen[-1]])
        sums.append(sum(part.sum() for part in bandit.u.parts))
    assert chosen == golden[f"{run}.arms"].tolist()
    assert np.allclose(sums, golden[f"{run}.u_sums"], rtol=1e-6)
    assert np.abs(bandit.predict(x)[0] - golden[f"{run}.mu_last"]).max() < 1e-6


def test_scaled_networks_begin_at_zero_with_a_gradient():
    for hidden in (20, 21):
        weights, x = initial(6, hidden, "scaled", 0), np.random.default_rng(0).normal(size=(9, 6))
        assert np.abs(forward(weights, x)[0]).max() < 1e-12
        assert np.abs(gradients(weights, x)[:, :-1]).max() > 0.01


def test_a_trained_bandit_finds_the_good_arm_and_constant_features_do_no_harm():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4))
    x[:30, 3] = 1.0  # constant among the observed, not among the others
    good = x[:, 0] + x[:, 1]
    bandit = NeuralUCB(4, nu=1e-4, steps=400)
    for arm in range(30):
        bandit.observe(x[arm], good[arm])
    mu, sigma = bandit.predict(x)
    assert np.isfinite(mu).all()
    assert np.corrcoef(mu[:30], good[:30])[0, 1] > 0.95
    assert (sigma > 0).all()


def test_thompson_draws_about_the_mean():
    bandit, x = NeuralUCB(3, style="ts", nu=1.0, steps=5), np.ones((4000, 3))
    mu, sigma = bandit.predict(x)
    ranks = bandit.rank(x)
    assert abs(ranks.mean() - mu[0]) < 4 * sigma[0] / np.sqrt(4000)
    assert ranks.std() == pytest.approx(sigma[0], rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 0}, {"hidden": 0}, {"lam": 0}, {"nu": -1}, {"lr": 0}, {"steps": -1}, {"init": "zero"}, {"style": "greedy"}],
)
def test_bandits_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        NeuralUCB(**{"dim": 3, **wrong})


def test_rewards_and_features_are_checked():
    bandit = NeuralUCB(3)
    for x, reward in ((np.ones(3), float("nan")), (np.ones(4), 1.0), (np.array([1, np.inf, 0]), 1.0)):
        with pytest.raises(ValueError):
            bandit.observe(x, reward)
    with pytest.raises(ValueError, match="3 features"):
        bandit.predict(np.ones((2, 4)))


# --- rivals ---


def test_the_gaussian_process_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.gaussian_process")
    rng = np.random.default_rng(0)
    x, new = rng.normal(size=(25, 3)), rng.normal(size=(40, 3))
    y = np.sin(x.sum(1))
    ours = GaussianProcess(standardise=False, lengths=(1.0,), noises=(0.1,))
    for row, reward in zip(x, y, strict=True):
        ours.observe(row, reward)
    among = np.linalg.norm(x[:, None] - x, axis=-1)
    length = np.median(among[np.triu_indices(25, 1)])
    kernel = sklearn.kernels.Matern(length_scale=length, nu=2.5)
    theirs = sklearn.GaussianProcessRegressor(kernel, alpha=0.1, optimizer=None).fit(x, (y - y.mean()) / y.std())
    mean, deviation = theirs.predict(new, return_std=True)
    found = ours.predict(new)
    assert np.allclose(found[0], mean, atol=1e-6)
    assert np.allclose(found[1], deviation, atol=1e-6)
    assert matern(np.array([0.0]))[0] == 1
    # expected improvement by sampling
    drawn = rng.normal(mean[:, None], deviation[:, None], (40, 20_000))
    best = ((y - y.mean()) / y.std()).max()
    assert np.allclose(ours.rank(new), np.maximum(drawn - best, 0).mean(1), atol=0.02)


def test_evolution_breeds_new_texts_from_the_best():
    pool = Evolution(seed=1)
    for text, reward in {"a b c": 0.9, "a x c": 0.8, "q r s": 0.0}.items():
        pool.observe(text, reward)
    children = []
    for _ in range(20):
        children.append(pool.child())
        pool.observe(children[-1], 0.1)
    assert len(set(children) | {"a b c", "a x c", "q r s"}) > 10
    assert all(len(child.split()) == 3 for child in children)
    assert Evolution(lambda first, second, draw: f"{first}+{second}").breed("a", "b", None) == "a+b"


# --- the search ---


def test_check4_calls_are_distinct_texts_within_the_budget(small):
    calls = []

    def scorer(text):
        calls.append(text)
        return small(text)

    result = SMALL.optimise(small.space, scorer, rivals=("random", "gp", "evolution"))
    before = 0
    for row in result.table:
        searched = {one.text for one in row.history}
        assert len(row.history) == 30
        assert row.paid == len(searched)
        assert row.hits == 30 - row.paid == sum(one.cached for one in row.history)
        later = calls[before : before + row.paid]
        assert len(set(later)) == len(later) == row.paid  # no text is paid for twice in a search
        before += row.paid + 5 + 1  # the five best once more, the chosen a third time
    assert len(calls) == before


def test_all_methods_begin_alike_and_runs_repeat(small):
    first = SMALL.optimise(small.space, small, seed=5, rivals=("random", "gp_z", "neural_unit"))
    again = SMALL.optimise(small.space, small, seed=5)
    assert again.table[0] == first.table[0]
    starts = {tuple(one.text for one in row.history if one.initial) for row in first.table}
    assert len(starts) == 1
    assert SMALL.optimise(small.space, small, seed=6).history != first.history


def test_unique_text_spends_no_round_on_what_is_known(small):
    plain, unique = SMALL.optimise(small.space, small), replace(SMALL, unique_text=True).optimise(small.space, small)
    assert sum(one.cached for one in unique.history if not one.initial) == 0
    assert unique.table[0].paid > plain.table[0].paid


def test_check6_no_signal():
    flat = BlackBox(size=400, flat=True)
    with pytest.warns(UserWarning, match="no signal"):
        result = SMALL.optimise(flat.space, flat, rivals=("gp",))
    assert not result.signal
    assert "no signal" in str(result)
    assert len(result.history) == 30


def test_check7_both_scores_are_printed_and_the_search_is_optimistic():
    """Best of many binomials: over seeds the fresh score is lower."""
    drops = []
    for seed in range(12):
        box = BlackBox(size=400, seed=seed)
        result = SMALL.optimise(box.space, box, seed, ("random",))
        drops += [row.optimism for row in result.table]
        assert result.searched == box.fresh(result.best, 0)
        assert result.rescored == box.fresh(result.best, 2)
        assert f"{result.searched:.3f}" in str(result)
        assert f"{result.rescored:.3f}" in str(result)
    assert np.mean(drops) >= 0


def test_a_score_that_is_no_number_is_an_error(small):
    with pytest.raises(ValueError, match="finite"):
        SMALL.optimise(small.space, lambda text: float("nan"))


@pytest.mark.parametrize(
    "wrong",
    [{"budget": 5}, {"n_init": 1}, {"d": 0}, {"n_eval": 401}, {"features": "y"}, {"recheck": 0}, {"nu": -1.0}],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError):
        replace(SMALL, **wrong)


def test_a_space_must_hold_what_is_looked_at(small):
    with pytest.raises(ValueError, match="space of 400"):
        INSTINCT().optimise(small.space, small)
    with pytest.raises(ValueError, match="no rival"):
        SMALL.optimise(small.space, small, rivals=("ape",))
    assert optimise(small.space, small, 12, 10, 50, rivals=(), steps=5).table[0].method == "instinct"


@pytest.mark.slow
def test_check3_the_scaled_network_beats_chance_threefold_and_the_unit_one_does_not():
    """The whole table with ten seeds is in the study; here are four."""
    scaled, unit, chance = [], [], []
    for seed in range(4):
        box = easy(seed)
        table = INSTINCT(n_domain=4000, steps=300, nu=0.1).optimise(box.space, box, seed, ("random", "neural_unit")).table
        for row, values in zip(table, (scaled, chance, unit), strict=True):
            values.append(row.mean_reward)
    assert np.mean(scaled) >= 3 * np.mean(chance)
    assert abs(np.mean(unit) - np.mean(chance)) <= 0.03


# --- the space ---


def test_check5_the_domain_is_fixed_and_the_projection_has_its_shape():
    z = domain(300, 10)
    assert np.array_equal(z, domain(300, 10))
    assert z.shape == (300, 10)
    assert z.min() >= 0
    assert z.max() <= 1
    assert not np.array_equal(z, domain(300, 10, seed=1))
    a = projection(5 * 64, 10)
    assert a.shape == (320, 10)
    assert -1 <= float(a.min()) < -0.9
    assert 0.9 < float(a.max()) <= 1


DEMOS = [("cat", "cats"), ("dog", "dogs"), ("tree", "trees")]


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_check5_features_do_not_depend_on_the_batch(pocket, pooling):
    model, tokenizer = pocket
    spaces = [
        InstructionSpace.from_model(model, tokenizer, DEMOS, 12, 4, 3, pooling, batch=batch, max_new_tokens=8)
        for batch in (1, 5, 12)
    ]
    assert spaces[0].features.shape == (12, model.config.hidden_size)
    for space in spaces[1:]:
        assert np.abs(space.features - spaces[0].features).max() < 1e-5
    assert np.abs(np.diff(spaces[0].features, axis=0)).max() > 1e-3
    assert spaces[0].decode(3) == spaces[2].decode(3)
    assert spaces[0].decode(3).startswith("The instruction was to")


def test_greedy_text_from_embeddings_is_that_of_the_words(pocket):
    """Given a soft prompt that happens to be words' embeddings, the model says what it says after those words."""
    model, tokenizer = pocket
    ids = tokenizer("\nInput: cat\nOutput: cats", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    embedded = model.get_input_embeddings()(ids)
    soft = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=6, do_sample=False)[0]
    assert torch.equal(plain, soft)


def test_instructions_are_first_sentences():
    assert first_sentence(" write the opposite. Comment: x") == "The instruction was to write the opposite"
    assert first_sentence("count!\nInput: 3") == "The instruction was to count"
    assert first_sentence("") == "The instruction was to"


def test_spaces_of_the_wrong_models_are_errors(pocket):
    model, tokenizer = pocket
    with pytest.raises(ValueError, match="inputs_embeds"):
        InstructionSpace.from_model(torch.nn.Linear(2, 2), tokenizer, DEMOS)
    for wrong in ({"n_tok": 0}, {"pooling": "first"}, {"demos": []}, {"d": 0}):
        settings = {"demos": DEMOS, "n_domain": 4, "d": 2, "n_tok": 1, **wrong}
        with pytest.raises(ValueError):
            InstructionSpace.from_model(model, tokenizer, **settings)


# --- scoring ---


def test_metrics_are_the_authors():
    rows = json.loads((GOLDEN / "instinct_metrics.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 20
    for row in rows:
        for metric in ("em", "f1", "set", "contains"):
            assert score_of(row["said"], row["outputs"], metric) == pytest.approx(row[metric]), (row, metric)


def test_contains_takes_text_for_text():
    assert score_of("see a+b here", ["a+b"], "contains") == 1
    assert score_of("anything", ["(("], "em") == 0


def test_scores_are_means_over_fresh_samples_and_failures_count():
    examples = tuple(Example(f"in {number}", (f"out {number}",)) for number in range(200))
    keys = {example.input: example.outputs[0] for example in examples}
    chat = Chat(SimulatedChat(Answering(keys, lambda text: 0.7), "sim:box"))
    scorer = Scorer(chat, examples, samples=100)
    first, second = scorer("do it"), scorer.fresh("do it", 1)
    assert first == scorer("do it")
    assert first != second
    assert abs(first - 0.7) < 0.2
    calls = chat.spent.calls
    scorer("do it")
    assert chat.spent.calls == calls  # answered by the ledger
    whole = Chat(SimulatedChat(Answering(keys, lambda text: 1.0), "sim:box"))
    assert Scorer(whole, examples)("do it") == 1
    from broadsheet.core.chat.simulated import Faults

    cut = Chat(SimulatedChat(Answering(keys, lambda text: 1.0), "sim:box", faults=Faults(truncate=0.5)))
    assert 0.3 < Scorer(cut, examples, samples=100)("do it") < 0.7


def test_templates_put_the_instruction_where_it_belongs():
    asked = []

    class Echo:
        def reply(self, request, draw):
            asked.append(request.messages[0]["content"])
            return "x"

    examples = (Example("what {input} is", ("x",)),)
    chat = Chat(SimulatedChat(Echo(), "sim:echo"))
    assert Scorer(chat, examples)("say {x}") == 1
    Scorer(chat, examples, template=THOUGHT)("think")
    Scorer(chat, examples, demo=Example("one", ("1",)))("do")
    assert asked[0] == "Instruction: say {x}\n\nInput: what {input} is\n\nOutput:"
    assert asked[1] == "Q: what {input} is\n\nA: think"
    assert "Input: one\n\nOutput: 1\n\nInput: what" in asked[2]


def test_scorers_are_checked():
    chat = Chat(SimulatedChat(Answering({}, lambda text: 0.0), "sim:box"))
    for wrong in ({"examples": ()}, {"samples": 0}, {"metric": "bleu"}):
        with pytest.raises(ValueError):
            Scorer(**{"chat": chat, "examples": (Example("a", ("b",)),), **wrong})


def test_tasks_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        load_task(tmp_path, "antonyms")
    (tmp_path / "raw" / "execute").mkdir(parents=True)
    (tmp_path / "raw" / "execute" / "antonyms.json").write_text('{"examples": [1]}')
    with pytest.raises(ValueError, match="cannot read"):
        load_task(tmp_path, "antonyms")


def test_a_scorer_may_be_a_chat_with_examples(small):
    examples = [Example(f"in {number}", (f"out {number}",)) for number in range(60)]
    keys = {example.input: example.outputs[0] for example in examples}
    chat = Chat(SimulatedChat(Answering(keys, small.truth), "sim:box"))
    result = optimise(small.space, (chat, examples, "em"), 20, 10, 100, rivals=("random",), steps=20)
    assert chat.spent.calls >= 20 * result.table[0].paid / 2
    assert 0 <= result.rescored <= 1


# --- real tasks ---


def keyword_rule(space, words=12):
    """An instruction's score by the words it holds, of a few that the white box likes to say."""
    texts = [set(space.decode(i).split()) for i in range(0, len(space), 4)]
    common = sorted({word for text in texts for word in text}, key=lambda word: sum(word in text for text in texts))
    rare = [word for word in common if 0.05 * len(texts) < sum(word in text for text in texts) < 0.4 * len(texts)][:words]
    return lambda text: sum(word in text.split() for word in rare[::2]) / max(len(rare[::2]), 1)


@pytest.mark.slow
@pytest.mark.skipif(not TASKS.exists(), reason="needs the instruction-induction data, see BROADSHEET_SHARED")
@pytest.mark.parametrize("name", ["antonyms", "singular_to_plural", "larger_animal"])
def test_check8_better_than_the_median_random_instruction_on_real_tasks(name):
    """White box: a real model's words; black box: deterministic, keywords decide which examples are answered."""
    from broadsheet.core.models import load

    folder = SHARED / "models" / "stories260K"
    model, tokenizer = load(str(folder) if folder.exists() else "pocket-2m")
    task = load_task(TASKS, name)
    assert isinstance(task, Task)
    demos = [(example.input, example.outputs[0]) for example in task.train[:5]]
    space = InstructionSpace.from_model(model, tokenizer, demos, 300, 10, 5, max_new_tokens=16)
    rule = keyword_rule(space)
    keys = {example.input: example.outputs[0] for example in (*task.train, *task.test)}
    chat = Chat(SimulatedChat(Answering(keys, rule, "rule"), "sim:keywords"))
    scorer = Scorer(chat, task.train[5:], task.metric)
    method = INSTINCT(n_domain=300, n_init=20, budget=60, n_eval=150, steps=150, nu=0.1)
    found = method.optimise(space, scorer)
    median = float(np.median([scorer.on(space.decode(i), task.test) for i in range(0, 300, 10)]))
    assert scorer.on(found.best, task.test) > median


@pytest.mark.skipif(not TASKS.exists(), reason="needs the instruction-induction data, see BROADSHEET_SHARED")
def test_every_induction_task_is_read():
    names = sorted(path.stem for path in (TASKS / "raw" / "execute").glob("*.json"))
    assert len(names) == 24
    for name in names:
        task = load_task(TASKS, name)
        assert task.train
        assert task.test
        assert all(example.input and example.outputs and all(example.outputs) for example in (*task.train, *task.test))


def test_solve_goes_from_examples_to_a_tested_instruction(pocket):
    model, tokenizer = pocket
    examples = tuple(Example(f"w{number}", (f"w{number}s",)) for number in range(40))
    task = Task("plural", examples[:30], examples[30:], "em")
    keys = {example.input: example.outputs[0] for example in examples}
    chat = Chat(SimulatedChat(Answering(keys, lambda text: 1.0, "rule"), "sim:box"))
    method = INSTINCT(n_domain=16, n_init=4, budget=8, n_eval=8, steps=5)
    with pytest.warns(UserWarning, match="no signal"):  # this box answers right whatever it is told
        found = method.solve(chat, task, model, tokenizer, rivals=("random",), samples=8)
    assert found.tested == found.rescored == 1
    assert found.best.startswith("The instruction was to")
    assert found.table[1].method == "random"
    assert chat.spent.calls > 0


# --- the command ---


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "sizes.jsonl"
    rows = [{"input": f"thing {number}", "output": ["small", "little"] if number % 2 else "large"} for number in range(18)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_examples_of_ones_own_make_a_task(examples, tmp_path):
    task = own_task(examples, "contains")
    assert (task.name, task.metric, len(task.train), len(task.test)) == ("sizes", "contains", 12, 6)
    assert task.train[1].outputs == ("small", "little")
    bad = tmp_path / "bad.jsonl"
    for line, said in (
        ("[1]", "line 1"),
        ('{"input": 3, "output": "x"}', "line 1"),
        ('{"input": "x"}', "line 1"),
        ("", "6"),
    ):
        bad.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            own_task(bad)
    with pytest.raises(ValueError, match="metric"):
        own_task(examples, "bleu")


def test_the_command_finds_an_instruction_over_http_and_pays_once(examples, tmp_path):
    from command import broadsheet

    from broadsheet.core.chat.server import Served, serving

    keys = {example.input: example.outputs[0] for example in (*own_task(examples).train, *own_task(examples).test)}
    box = SimulatedChat(Answering(keys, lambda text: len(text) % 7 / 7, "rule"), "sim:length")
    small = ["-o", "budget=14", "-o", "n_init=8", "-o", "n_domain=64", "-o", "n_eval=32", "-o", "steps=30"]
    served = Served()
    with serving(box, served=served) as url:
        command = ["instinct", str(examples), "--chat", url, "--samples", "6", *small]
        shown = broadsheet(*command, "--json", str(tmp_path / "found.json"))
        asked = served.requests
        again = broadsheet(*command)
        assert served.requests == asked
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["spent"]["calls"] == asked
    assert [row["method"] for row in found["table"]] == ["instinct", "random", "gp"]
    assert all(len(row["history"]) == 14 for row in found["table"])
    assert all(text in shown.stdout for text in ("sim:length", "optimism", "test examples"))
    assert "0 calls" in again.stdout
    refused = broadsheet("instinct", str(examples), "-o", "budget=3", check=False)
    assert refused.returncode == 2
    assert "initial points" in refused.stderr


def test_a_dspy_program_gets_the_instruction_that_its_metric_likes(pocket):
    dspy = pytest.importorskip("dspy", reason="dspy is not installed")
    from broadsheet.methods.evals.instinct.dspy import InstinctPrompter

    class Box(dspy.LM):
        """Says "yes" to prompts whose instruction has an even number of characters."""

        def __init__(self):
            super().__init__("box")

        def __call__(self, prompt=None, messages=None, **_):
            instruction = messages[0]["content"].split("your objective is:")[1].strip()
            return [f"[[ ## answer ## ]]\n{'no' if len(instruction) % 2 else 'yes'}\n\n[[ ## completed ## ]]"]

    examples = [dspy.Example(question=f"q{n}", answer="yes").with_inputs("question") for n in range(8)]
    method = replace(SMALL, n_domain=64, n_eval=32, n_init=6, budget=14)
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=Box()):
        prompter = InstinctPrompter(
            lambda example, said: said.answer == example.answer, *pocket, method, samples=2, threads=1
        )
        tuned = prompter.compile(program, trainset=examples)
        [found] = tuned.instinct.values()
        assert tuned.signature.instructions == found.best
        assert found.searched == max(one.reward for one in found.history)
        assert {one.reward for one in found.history} <= {0.0, 1.0}
        assert program.signature.instructions != found.best
        with pytest.raises(ValueError, match="2 examples"):
            prompter.compile(program, trainset=examples[:1])
