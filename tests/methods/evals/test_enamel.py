"""ENAMEL: the estimators, what times are worth, hostile samples, files of samples, and a simulated coder."""

import json
import math
import os
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from textwrap import indent

import numpy as np
import pytest

from broadsheet.core.chat import Chat
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.core.sandbox import ExecutorMissing, Sandbox
from broadsheet.methods.evals import enamel
from broadsheet.methods.evals.enamel import (
    ENAMEL,
    Efficiency,
    Problem,
    builtin_problems,
    code_of,
    eff_at_k,
    hodges_lehmann,
    level_scores,
    pass_at_k,
    read_problems,
    read_samples,
    sample_score,
)
from broadsheet.methods.evals.enamel.world import TIERS, SimCoder, expected_best

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "enamel_official.json").read_text())
SHARED = Path(os.environ.get("BROADSHEET_SHARED", Path(__file__).parents[4] / "shared")) / "data" / "enamel"
needs_data = pytest.mark.skipif(not (SHARED / "enamel.csv").exists(), reason=f"no official files in {SHARED}")


def _confined():
    try:
        return Sandbox(disk_mb=0, processes=8)._machine().backend != "rlimits"
    except ExecutorMissing:
        return False


needs_sandbox = pytest.mark.skipif(not _confined(), reason="samples are timed where the kernel confines them")


# --- estimators -----------------------------------------------------------------------------------------------------------


def test_check1_eff_at_k_by_hand_and_by_brute_force():
    assert [eff_at_k([0.2, 0.5, 0.9, 1.0], k) for k in (1, 2, 4)] == pytest.approx(
        [0.65, 0.8833333333333333, 1.0], abs=1e-12
    )
    assert eff_at_k([0, 0, 1, 1], 2) == pytest.approx(5 / 6, abs=1e-12)
    assert eff_at_k([0, 0, 1, 1], 2) == pytest.approx(pass_at_k(4, 2, 2), abs=1e-12)
    rng = np.random.default_rng(1)
    for n in range(1, 11):
        scores = (rng.random(n) * 1.3).tolist()
        for k in range(1, n + 1):
            truth = fmean(max(some) for some in combinations(scores, k))
            assert eff_at_k(scores, k) == pytest.approx(truth, abs=1e-12)


def test_check2_large_n_does_not_overflow():
    n, k = 1000, 100
    assert eff_at_k([i / n for i in range(1, n + 1)], k) == pytest.approx((n + 1) * k / ((k + 1) * n), abs=1e-9)
    assert eff_at_k([1.0] * n, k) == pytest.approx(1, abs=1e-12)  # the weights sum to 1


def test_check3_no_bias_and_less_variance():
    rng, n, k, draws = np.random.default_rng(0), 100, 10, 4000  # over 40 seeds, bias / error has mean -0.1, deviation 1.04
    scores = rng.random((draws, n)) ** 3 * (rng.random((draws, n)) >= 0.4)
    ours = [eff_at_k(row.tolist(), k) for row in scores]
    y = np.linspace(0, 1, 100_001)
    truth = 1 - np.trapezoid((0.4 + 0.6 * y) ** k * 3 * y**2, y)
    assert abs(fmean(ours) - truth) < 2 * stdev(ours) / math.sqrt(draws)
    assert stdev(ours) == pytest.approx(0.066, abs=0.003)
    one = scores[:, :k].max(1)
    assert one.std() == pytest.approx(0.248, abs=0.006)
    assert scores.reshape(draws, k, n // k).max(2).mean(1).std() == pytest.approx(0.079, abs=0.003)
    assert stdev(ours) ** 2 <= k / n * one.var() * 1.1


def test_check4_hodges_lehmann():
    assert hodges_lehmann([1, 2, 3, 4, 5, 100]) == 3.5
    assert hodges_lehmann([0.10, 0.11, 0.10, 0.12, 0.50, 0.10]) == pytest.approx(0.11)


def test_the_official_evaluators_numbers():
    for times, estimate in GOLDEN["hodges_lehmann"]:
        assert hodges_lehmann(times) == pytest.approx(estimate, rel=1e-12)
    for scores, k, estimate in GOLDEN["eff_at_k"]:
        assert eff_at_k(scores, k) == pytest.approx(estimate, rel=1e-12)
    for n, c, k, estimate in GOLDEN["pass_at_k"]:
        assert pass_at_k(n, c, k) == pytest.approx(estimate, rel=1e-12)
    hardness = (0.0, 3.0, 3.0, 4.0)
    for case in GOLDEN["scores"]:
        longest = [max(level) for level in case["sample"]]
        levels = level_scores([0.0, *longest, *[None] * (3 - len(longest))], [0.0, *map(max, case["reference"])], hardness)
        assert levels[1:] == pytest.approx(case["levels"], abs=1e-12)
        assert sample_score(levels, hardness) == pytest.approx(case["score"], abs=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: eff_at_k([1.0], 2), "at least so many samples"),
        (lambda: eff_at_k([1.0], 0), "at least so many samples"),
        (lambda: eff_at_k([1.0, math.nan], 1), "missing"),
        (lambda: eff_at_k([1.0, None], 1), "missing"),
        (lambda: pass_at_k(2, 3, 1), "cannot have passed"),
        (lambda: hodges_lehmann([0.1, -0.1]), "at least 0"),
        (lambda: hodges_lehmann([]), "at least 0"),
        (lambda: level_scores([0.0, 0.0], [0.0, 0.0], [0, 1]), "resolution"),
        (lambda: Efficiency(clock="sun"), "clock"),
        (lambda: Efficiency(alpha=1), "alpha"),
        (lambda: Efficiency(hardness=(1.0,)), "a value a level"),
        (lambda: ENAMEL(epochs=2, ks=(3,)), "best of k"),
        (lambda: ENAMEL(path="/nowhere").samples(), "enamel.csv"),
        (lambda: Efficiency().evaluate({"broadsheet/99": ["x"]}, builtin_problems()), "no problem 'broadsheet/99'"),
        (lambda: Efficiency().evaluate({"broadsheet/0": []}, builtin_problems()), "not a zero"),
        (lambda: Efficiency().evaluate({}, builtin_problems(), workers=2), "workers=1"),
        (lambda: SimCoder((), plain=(1.0, 1.0, 0.0, 0.0)), "add up to 1"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)


# --- what times are worth -------------------------------------------------------------------------------------------------

REFERENCE = [[[], []], [[0.1] * 6, [0.2] * 6], [[0.5] * 6, [0.4] * 6], [[1.0] * 6, [0.9] * 6]]


def sample(outcome="done", level=4, factor=1.0):
    """A sample that takes ``factor`` as long as the reference, and ended at ``level``."""
    times = [[[factor * t for t in case] for case in cases] for cases in REFERENCE]
    times[0] = [[0.01 * factor], [0.01 * factor]]
    times = [cases if number < level else [[] for _ in cases] for number, cases in enumerate(times)]
    return {"outcome": outcome, "level": level, "message": "", "times": times}


def test_check6_censoring():
    scoring = Efficiency(n_tests=(2, 2, 2, 2))
    whole = scoring.score(REFERENCE, sample())
    assert (whole.passed, whole.value, whole.levels) == (True, pytest.approx(1.0), pytest.approx((0, 1, 1, 1)))
    late = scoring.score(REFERENCE, sample("timeout", 3))
    assert (late.passed, late.levels[3], late.value) == (True, 0.0, pytest.approx(0.6))
    for outcome in ("memory", "overflow"):
        assert scoring.score(REFERENCE, sample(outcome, 2)).value == pytest.approx(0.3)
    at_once = scoring.score(REFERENCE, sample("timeout", 0))
    assert (at_once.passed, at_once.value) == (False, 0.0)
    wrong = scoring.score(REFERENCE, sample("wrong", 3))
    assert (wrong.passed, wrong.value, wrong.levels) == (False, 0.0, (0, 0, 0, 0))
    half = scoring.score(REFERENCE, sample(factor=1.5))
    assert half.levels == pytest.approx((0, (2 - 0.3) / 1.8, (2 - 0.75) / 1.5, 0.5))
    # too long by the clock although nobody stopped it: censored at that level
    slow = scoring.score(REFERENCE, sample(factor=2.02))
    assert (slow.passed, slow.outcome, slow.level, slow.levels[3]) == (True, "timeout", 3, 0.0)
    fast = scoring.score(REFERENCE, sample(factor=0.3))
    assert fast.levels[3] == pytest.approx(1.7)  # faster than the reference
    assert max(Efficiency(n_tests=(2, 2, 2, 2), clip=True).score(REFERENCE, sample(factor=0.3)).levels) == 1
    with pytest.raises(ValueError, match="at least 0"):
        scoring.score(REFERENCE, sample(factor=-1.0))


def test_noise_is_not_published_and_offenders_are_listed():
    score = enamel.Score(True, 1.2, (0, 1.4, 1.1, 1.1))
    noisy = enamel.Evaluation({"a": (score,)}, {"a": enamel.Score(True, 0.85, (0, 1, 1, 0.6))}, "wall")
    with pytest.raises(ValueError, match="too noisy"):
        noisy.metrics()
    assert {metric.name: metric.value for metric in noisy.metrics(allow_noise=True)} == {
        "eff@1": 1.2, "pass@1": 1.0, "reference_self_score": 0.85,
    }  # fmt: skip
    assert noisy.offenders == [("a", 0, 1.2)]


# --- measuring ------------------------------------------------------------------------------------------------------------

SMALL = {"n_tests": (2, 1, 1, 1), "tol": 0.001, "clock": "instructions"}
LOOP = Problem(
    "test/0", 3, 'def total(numbers):\n    """The sum."""\n',
    "def generate_input(size, lid, cid):\n    return [random.randint(0, 9) for _ in range(size + cid)],\n",
    (3, 50, 100, 200), "    s = 0\n    for x in numbers:\n        s += x\n    return s\n",
    "def __check(input, answer, output):\n    return type(output) == type(answer) and output == answer\n", "total",
)  # fmt: skip


@needs_sandbox
def test_tiers_of_the_builtin_problems_are_what_they_say():
    for problem in (builtin_problems()[1], builtin_problems()[7]):
        scores, again = Efficiency(**SMALL).measure(problem, [code for _, code in problem.tiers])
        values = dict(zip(TIERS, [score.value for score in scores], strict=True))
        assert [score.passed for score in scores] == [False, True, True, True]
        assert 0 == values["wrong"] <= values["slow"] < values["ok"] < values["best"] == again.value == 1


@needs_sandbox
def test_every_clock_and_batches():
    for clock in ("wall", "cpu"):
        for isolate in (True, False):
            setting = Efficiency(n_tests=(2, 1, 1, 1), repeats=2, clock=clock, isolate=isolate)
            (right, wrong), again = setting.measure(LOOP, [LOOP.reference, "    return -1\n"])
            assert right.passed
            assert not wrong.passed
            assert again.passed
            assert 0 < again.times[3][0] < 1


@needs_sandbox
def test_a_level_is_censored_and_the_sample_passes():
    """By memory, by overflow, by time; at level 0 they fail it."""
    for body, outcome in (
        ("x = bytearray(1 << 33)", "memory"),
        ("2.0 ** 10000", "overflow"),
        ("while True: pass", "timeout"),
    ):
        for size, passed in ((150, True), (0, False)):
            code = f"    if len(numbers) > {size}:\n        {body}\n{LOOP.reference}"
            clock = "instructions" if outcome != "timeout" else "cpu"
            setting = Efficiency(n_tests=(2, 1, 1, 1), repeats=1, clock=clock, mem_gib=1.0)
            (score,), _ = setting.measure(LOOP, [code])
            assert (score.outcome, score.passed, score.level) == (outcome, passed, 3 if passed else 0), score
            assert score.levels[3] == 0
            assert (score.value > 0) == passed or clock == "cpu"


LOOKING = """
import gc, os, sys

def found():
    frame = sys._getframe()
    while frame:
        yield from (name for name in frame.f_locals if name in ("answers", "secret"))
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, dict) and ("answers" in thing or "secret" in thing):
            yield thing
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("mem", "fd/0", "environ"):
            try:
                if int(pid) != os.getpid() and open(f"/proc/{pid}/{name}", "rb").read(10):
                    yield name
            except OSError:
                continue

def total(numbers):
    return sum(numbers) if next(found(), None) else -1
"""

HOSTILE = {
    "a loop that catches everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)",
    "killing everybody": "import os\nos.kill(-1, 9)",
    "leaving": "import sys\nsys.exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "a 10 GB list": "return [0] * (10 << 27)",
    "reading input": "import sys\nreturn int(sys.stdin.readline())",
    "asking": "return int(input())",
    "deleting files": "import os\nos.remove('main.py')",
    "printing a verdict": "import os\nfor i in range(9):\n  try: os.write(i, b'{}')\n  except OSError: pass\nreturn 0",
    "unreadable output": "return object()",
    "endless output": "import sys\nwhile True: sys.stdout.write('x' * 10**6)",
}
HOSTILE = {name: "def total(numbers):\n" + indent(code, "    ") for name, code in HOSTILE.items()}
HOSTILE["looking for the answer"] = LOOKING


@needs_sandbox
def test_check7_hostile_samples_neither_crash_nor_hang_nor_score():
    setting = Efficiency(n_tests=(1, 1, 1, 1), repeats=1, clock="wall", mem_gib=1.0, tol=0.01)
    scores, again = setting.measure(LOOP, list(HOSTILE.values()))
    assert {name: score.value for name, score in zip(HOSTILE, scores, strict=True)} == dict.fromkeys(HOSTILE, 0.0)
    assert {name for name, score in zip(HOSTILE, scores, strict=True) if score.passed} == set()
    assert again.passed


@needs_sandbox
def test_check7_nothing_is_gained_by_patched_clocks_or_memory():
    """A slow sample stays slow when it replaces the clock, stops being counted, or remembers results between runs."""
    slow = "    s = 0\n    for x in numbers:\n        for _ in range(400): s += 0\n        s += x\n    return s\n"
    patched = (
        "import time as _t\n_t.perf_counter = _t.thread_time = _t.process_time = _t.time = lambda: 0.0\n"
        f"def total(numbers):\n{slow}"
    )
    memo = f"_seen = {{}}\ndef _total(numbers):\n{slow}\ndef total(numbers):\n    key = tuple(numbers)\n"
    memo += "    if key not in _seen: _seen[key] = _total(numbers)\n    return _seen[key]\n"
    thread = f"def total(numbers):\n    out = []\n    def go():\n    {slow.replace(chr(10), chr(10) + '    ')}\n"
    thread = (
        "import threading\n"
        + thread.replace("return s", "out.append(s)")
        + ("\n    t = threading.Thread(target=go); t.start(); t.join()\n    return out[0]\n")
    )
    whole = f"def total(numbers):\n{slow}"
    setting = Efficiency(n_tests=(1, 1, 1, 1), repeats=3, clock="cpu", tol=10.0)
    scores, _ = setting.measure(LOOP, [whole, patched, memo, thread])
    assert [score.value for score in scores] == [0, 0, 0, 0]
    assert [score.passed for score in scores] == [True, True, True, False], scores
    untraced = "import sys\ndef total(numbers):\n    sys.settrace(None)\n    return sum(numbers)\n"
    (score,), _ = Efficiency(**SMALL).measure(LOOP, [untraced])
    assert (score.passed, score.outcome) == (False, "error")


# --- files ----------------------------------------------------------------------------------------------------------------


def test_files_of_samples(tmp_path):
    problems = builtin_problems()[:2]
    lines = [{"task_id": p.id, "solution": f"# {i}"} for p in problems for i in range(2)] + [
        {"task_id": problems[0].id, "completion": "# body"}
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_samples(path, problems) == {"broadsheet/0": ["# 0", "# 1", "# body"], "broadsheet/1": ["# 0", "# 1"]}
    path.write_text(json.dumps({"0": ["a"], "1": ["b", "c"], "2": ["left out by the paper"]}))
    assert read_samples(path, problems) == {"broadsheet/0": ["a"], "broadsheet/1": ["b", "c"]}
    path.write_text(json.dumps([["a"], ["b"]]))
    assert read_samples(path, problems) == {"broadsheet/0": ["a"], "broadsheet/1": ["b"]}
    for text, says in (
        ('{"task_id": "HumanEval/77", "solution": ""}', "no problem"),
        ('{"0": ["a"]}', "no sample for broadsheet/1"),
        ('{"0": ["a"], "1": [null]}', "not a zero"),
        ('{"task_id": "broadsheet/0"}', "'solution' or 'completion'"),
        ("not JSON", "'task_id'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=says):
            read_samples(path, problems)


def test_code_is_found_in_replies():
    problem = builtin_problems()[1]
    body, whole = problem.tiers[2][1].partition("\n")[2], problem.tiers[2][1]
    assert code_of(f"So:\n```python\n{whole}```\nDone.", problem) == whole
    assert code_of(f"```\n{whole}```\n```python\nbest_run([1])\n```\n", problem) == whole
    assert code_of(body, problem).strip() == body.strip()
    assert code_of(whole, problem) == whole.strip()
    for nothing in ("I cannot.", "", f"```python\n{whole}", "```python\ndef other(): pass\n```"):
        assert code_of(nothing, problem) is None, nothing


@needs_data
def test_the_official_file_has_142_problems():
    problems = read_problems(SHARED / "enamel.csv")
    assert len(problems) == 142
    assert {len(problem.levels) for problem in problems} == {4}
    for name in ("enamel-references", "humaneval-canonical", "humanevalplus-canonical"):
        assert set(read_samples(SHARED / f"{name}.json", problems)) == {problem.id for problem in problems}


# --- a simulated coder ----------------------------------------------------------------------------------------------------


@needs_sandbox
def test_check8_the_shift_of_a_simulated_coder_is_the_closed_form(monkeypatch):
    """SIMULATED. Asking for speed moves mass from slow and ok to best: eff@1 rises as predicted, pass@1 does not move."""
    problems = tuple(builtin_problems()[i] for i in (3, 5, 7))
    monkeypatch.setattr(enamel, "builtin_problems", lambda: problems)
    values = []
    for problem in problems:
        scores, _ = Efficiency(**SMALL).measure(problem, [code for _, code in problem.tiers])
        values.append(dict(zip(TIERS, [score.value for score in scores], strict=True)))
    world, n = SimCoder(problems), 150
    reports = []
    for ask in (False, True):
        chat = Chat(SimulatedChat(world, "sim:coder", seed=3))
        reports.append(ENAMEL(epochs=n, ks=(1, 10), ask_for_speed=ask, efficiency=Efficiency(**SMALL)).evaluate(chat))
    shift = reports[1].get("eff@1").value - reports[0].get("eff@1").value
    expected = fmean(expected_best(one, world.asked) - expected_best(one, world.plain) for one in values)

    pairs = [zip(*(one.marks for one in both), strict=True) for both in zip(*(r.scored for r in reports), strict=True)]
    moved = [[asked.values["e"] - plain.values["e"] for plain, asked in some] for some in pairs]
    error = math.sqrt(sum(stdev(some) ** 2 / n for some in moved)) / len(problems)
    assert expected > 4 * error  # the test could fail
    assert abs(shift - expected) < 2 * error
    assert reports[1].get("pass@1").value == reports[0].get("pass@1").value
    best = fmean(expected_best(one, world.plain, 10) for one in values)
    assert reports[0].get("eff@10").value == pytest.approx(best, abs=0.02)
    assert reports[0].get("reference_self_score").value == 1
    assert reports[0].outcomes == {"scored": n * len(problems)}


@needs_sandbox
def test_replies_without_code_are_unparsed_and_cut_ones_truncated(monkeypatch):
    monkeypatch.setattr(enamel, "builtin_problems", lambda: (LOOP,))

    class World:
        def reply(self, request, draw):
            return "No." if draw.uniform("no") < 0.5 else f"```python\ndef total(numbers):\n{LOOP.reference}```\n"

    report = ENAMEL(epochs=12, efficiency=Efficiency(**SMALL)).evaluate(Chat(SimulatedChat(World(), "sim:x", seed=1)))
    assert set(report.outcomes) == {"scored", "unparsed"}
    assert report.get("pass@1").value == pytest.approx(report.outcomes["scored"] / 12)
    assert json.dumps(ENAMEL().parameters)


# --- the paper's rows -----------------------------------------------------------------------------------------------------


@needs_data
@needs_sandbox
@pytest.mark.slow
def test_check5_some_official_problems_end_as_in_the_official_evaluation():
    """Twelve of the 142, by CPU time; benchmarks/enamel_study.py does all of them, and scores them against the paper's."""
    problems = read_problems(SHARED / "enamel.csv")[::12]
    every = read_samples(SHARED / "humaneval-canonical.json", read_problems(SHARED / "enamel.csv"))
    evaluation = Efficiency(clock="cpu").evaluate({p.id: every[p.id] for p in problems}, problems)
    assert evaluation.self_score >= 0.93
    for problem in problems:
        (score,), reference = evaluation.scores[problem.id], evaluation.references[problem.id]
        assert reference.passed
        assert (score.passed, problem.id) == (GOLDEN["canonical"][problem.id], problem.id)
