"""The bench over real HTTP, its resume after kill -9, and the same benchmarks through Inspect and lm-eval."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import broadsheet

from broadsheet.core.chat import Chat
from broadsheet.core.chat.server import Served, serving
from broadsheet.core.chat.simulated import SimulatedChat
from broadsheet.methods.evals import bench
from broadsheet.methods.evals.base import Benchmark, Solver
from broadsheet.methods.evals.bench import VIEW, Workload, measure, methods
from broadsheet.methods.evals.decrim import DeCRIM, Plain
from broadsheet.methods.evals.ifeval import IFEval


@dataclass(frozen=True)
class Polite:
    """A world that says one of two things."""

    def reply(self, request, draw):
        return draw.pick("word", ("In short: <<a note>> My answer is yes. P.S. Good night.", "no idea"))


@pytest.fixture
def endpoint():
    served = Served()
    with serving(SimulatedChat(Polite(), name="sim:polite"), served=served) as url:
        yield url, served


def test_every_method_of_the_family_can_be_configured_and_asked():
    found = methods()
    assert {"plain", "ifeval", "decrim", "spar", "longproc", "fingpt-benchmark"} <= found.keys()
    for name, method in found.items():
        json.dumps(method.parameters, default=str)
        if isinstance(method, Benchmark):
            sample = method.samples()[0]
            outcomes = {method.missing(sample, outcome).outcome for outcome in ("truncated", "refused", "error")}
            assert outcomes == {"truncated", "refused", "error"}, name
            assert not method.budgeted
        else:
            assert isinstance(method, Solver), name


def test_an_endpoint_is_scored_and_stored_and_asked_for_nothing_twice(endpoint, tmp_path):
    url, served = endpoint
    command = ["compare", "evals", "--chat", url, "--methods", "plain,decrim,ifeval", "-o", "limit=6"]
    shown = broadsheet(*command, "--json", str(tmp_path / "records.json"), "--html", str(tmp_path / "page.html"))
    records = json.loads((tmp_path / "records.json").read_text())
    whole = [r for r in records if r["metric"] == "score" and not set(r["setting"]) - {"budget"}]
    scores = {(r["method"], r["setting"].get("budget")): r for r in whole}
    assert scores.keys() == {("plain", None), ("ifeval", None), ("decrim", 4.0)}
    assert all(r["model"] == "sim:polite" and r["n"] == 6 for r in scores.values())
    for name in ("plain", "decrim", "ifeval", "score", "unparsed"):
        assert name in shown.stdout
    assert "sim:polite" in (tmp_path / "page.html").read_text()
    asked = served.requests
    assert shown.stdout.startswith(broadsheet(*command).stdout)
    broadsheet(*command, "--fresh")  # the cells are measured again, from the ledger
    assert served.requests == asked


def test_budgets_are_hard_and_a_larger_one_goes_on(endpoint):
    url, served = endpoint
    failed = broadsheet("run", "ifeval", "--chat", url, "-o", "limit=10", "-o", "calls=4", check=False)
    assert failed.returncode == 2
    assert "budget" in failed.stderr
    assert "\n" not in failed.stderr.strip()
    assert served.requests == 4
    broadsheet("run", "ifeval", "--chat", url, "-o", "limit=10")
    assert served.requests == 10


def test_a_report_is_a_transcript_and_a_log_that_inspect_reads(endpoint, tmp_path):
    log = pytest.importorskip("inspect_ai.log")
    url, _ = endpoint
    broadsheet("run", "ifeval", "--chat", url, "-o", "limit=5", "--out", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "ifeval.jsonl").read_text().splitlines()]
    found = log.read_eval_log(str(tmp_path / "ifeval.eval"))
    assert found.status == "success"
    assert [sample.output.completion for sample in found.samples] == [row["answer"] for row in rows]
    assert [sample.scores["ifeval"].value["prompt_strict"] for sample in found.samples] == [
        row["values"]["prompt_strict"] for row in rows
    ]


def test_inspect_gives_the_same_marks(tmp_path, monkeypatch):
    inspect_ai = pytest.importorskip("inspect_ai")
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from broadsheet.methods.evals.inspect_tasks import inspect_task

    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    benchmark, answer = IFEval(count=4), "<<title>> One lantern, two compass. P.S. Good night."
    outputs = [ModelOutput.from_content("mockllm/model", answer) for _ in range(4)]
    for output in outputs:  # else Inspect downloads a tokenizer to count tokens
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
    model = get_model("mockllm/model", custom_outputs=outputs)
    [log] = inspect_ai.eval(inspect_task(benchmark), model=model, log_dir=str(tmp_path))
    assert log.status == "success", log.error
    samples = {sample.id: sample for sample in benchmark.samples()}
    for one in log.samples:
        assert one.scores["ifeval"].value == dict(benchmark.mark(samples[one.id], answer).values)


def test_a_killed_run_goes_on_and_pays_only_for_what_was_under_way(tmp_path):
    served = Served()
    with serving(SimulatedChat(Polite(), name="sim:polite", seconds=0.1), served=served) as url:
        asked = ["run", "ifeval", "--chat", url, "-o", "limit=60", "-o", "concurrency=4"]
        command = [sys.executable, "-c", "from broadsheet.cli import main; main()", *asked]
        environment = {**os.environ, "BROADSHEET_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while served.requests < 12 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 12 <= served.requests < 60
        kept = sqlite3.connect(tmp_path / "ledger.sqlite").execute("select count(*) from calls").fetchone()[0]
        assert kept >= served.requests - 4
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "ifeval" in done.stdout
    assert 60 <= served.requests <= 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--chat", "http://127.0.0.1:9", "--model-name", "m"), "nobody answers"),
        (("--model-name", "m"), "--chat"),
        (("--chat", "nonsense", "--model-name", "m"), "http://"),
        (("-o", "limit=-1"), "limit"),
        (("-o", "path=/nowhere.jsonl"), "/nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(arguments, said, monkeypatch):
    monkeypatch.setitem(Chat.__init__.__kwdefaults__, "backoff", (0.01, 0.02))
    failed = broadsheet("run", "ifeval", *arguments, check=False)
    assert failed.returncode == 2
    assert said in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_loops_are_held_to_their_budget(monkeypatch):
    chat = Chat(SimulatedChat(Polite()))
    monkeypatch.setattr(bench, "_chat", lambda _: chat)
    records = measure("decrim", DeCRIM(decomposer=["Use no commas.", "Say no."]), Workload(limit=4), budget=3.0)
    written = next(r.value for r in records if r.metric == "answers")
    assert 1 <= written <= 3
    assert next(r for r in records if r.metric == VIEW.quality({"score"}).metric).setting == {"budget": 3.0}
    assert Plain().at_budget(7) == Plain()


def test_lm_eval_tasks_name_what_there_is():
    folder = Path(__file__).parents[3] / "src" / "broadsheet" / "methods" / "evals" / "lm_eval"
    tasks = (folder / "tasks.py").read_text()
    for path in folder.glob("[a-z]*.yaml"):
        for line in path.read_text().splitlines():
            if "!function tasks." in line:
                assert line.rpartition(".")[2] in tasks, path
