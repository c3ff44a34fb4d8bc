"""`broadsheet ledger` and `broadsheet serve-model`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from broadsheet.cli.chat import ledger, serve_model
from broadsheet.core.chat import Choice, Ledger, Request, Usage, connect
from broadsheet.core.records import StorageError

app = typer.Typer(pretty_exceptions_enable=False)
app.command(name="serve-model")(serve_model)
app.add_typer(ledger, name="ledger")


def broadsheet(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.fixture
def calls(tmp_path):
    path = tmp_path / "calls.sqlite"
    book = Ledger(path)
    book.add("gpt", "judge", Request.of("a\0\ud83d"), [("1", 0, Choice("b\0\ud83d", usage=Usage(1, 1000, 20, 0.5, 2.0)))])
    book.add("gpt", "judge", Request.of("a"), [("2", 0, Choice("c", usage=Usage(1, 3, 4))), ("3", 1, Choice("d"))])
    book.add("sim:x", "", Request.of("a"), [("4", 0, Choice("", "length", Usage(1, 5, 6, estimated=1)))])
    book.close()
    return str(path)


def test_the_ledger_is_listed_by_model_and_tag(calls):
    lines = broadsheet("ledger", "list", "--ledger", calls).splitlines()
    assert [line.split() for line in lines] == [
        "model tag answers calls prompt tokens completion tokens USD seconds".split(),
        "gpt judge 3 2 1,003 24 0.5000 2.0".split(),
        "sim:x SIMULATED – 1 1 ~5 ~6 0.0000 0.0".split(),
    ]
    rows = json.loads(broadsheet("ledger", "list", "--json", "--ledger", calls))
    assert rows[0] == {
        "model": "gpt", "tag": "judge", "answers": 3, "calls": 2, "prompt_tokens": 1003, "completion_tokens": 24,
        "money": 0.5, "seconds": 2.0, "estimated": 0,
    }  # fmt: skip


def test_the_ledger_is_exported_as_json_lines(calls, tmp_path):
    rows = [json.loads(line) for line in broadsheet("ledger", "export", "--ledger", calls).splitlines()]
    assert len(rows) == 4
    assert rows[0]["request"]["messages"] == "a\0\ud83d"
    assert rows[0]["answer"]["text"] == "b\0\ud83d"
    out = str(tmp_path / "out.jsonl")
    assert "wrote 1 answers" in broadsheet("ledger", "export", out, "--model", "sim:x", "--ledger", calls)
    with open(out, encoding="utf-8") as file:
        assert json.loads(file.read())["finish_reason"] == "length"
    with pytest.raises(StorageError, match="cannot write"):
        broadsheet("ledger", "export", str(tmp_path), "--ledger", calls)


def test_a_ledger_that_is_not_there():
    with pytest.raises(ValueError, match="there is no ledger at"):
        broadsheet("ledger", "list")


def test_a_port_that_is_taken_and_a_model_that_is_none():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="cannot listen"):
        broadsheet("serve-model", "--port", str(taken.getsockname()[1]))
    with pytest.raises(ValueError, match="no model 'nonsense'"):
        broadsheet("serve-model", "--model", "nonsense", "--port", "0")


def test_help_says_how():
    for command in (["serve-model"], ["ledger"], ["ledger", "list"], ["ledger", "export"]):
        assert "Usage" in broadsheet(*command, "--help")


@pytest.mark.slow
def test_serving_a_pocket_model_from_a_process_of_its_own(tmp_path):
    script = "import typer; from broadsheet.cli.chat import serve_model; typer.run(serve_model)"
    environment = {**os.environ, "BROADSHEET_API_KEY": "sk-test"}
    command = [sys.executable, "-c", script, "--model", "pocket-2m", "--port", "0", "--name", "little"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"little at (http://127\.0\.0\.1:\d+/v1)", line)[1]
            with pytest.raises(ValueError, match="refuses the key"):
                connect(url, "little", api_key="sk-wrong", ledger=None).complete("x")
            chat = connect(url, api_key="sk-test", ledger=tmp_path / "l.sqlite")
            assert chat.name == "little"
            answer = chat.complete([{"role": "user", "content": "Give feru foko. What do you give feru?"}], max_tokens=8)[0]
            assert "foko" in answer.text
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, -signal.SIGINT, 130)
