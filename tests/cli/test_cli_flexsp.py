"""`broadsheet flexsp`: table, JSON, one-line errors."""

import json
from xml.etree import ElementTree

import pytest
from command import broadsheet

from broadsheet.methods.estimates.flexsp import Plan

QUICK = ("--devices", "8", "--memory", "60", "--context", "32000", "--batch", "32", "--batches", "2")


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{200 + 97 * number % 9000}\n" for number in range(64)))
    return str(path)


def test_a_table_of_planners_and_of_the_first_plan(lengths):
    done = broadsheet("flexsp", lengths, *QUICK, "--planners", "adaptive,balanced")
    for word in (
        "2 batches of 32 of 64 lengths on 8 devices (simulated)",
        "adaptive",
        "balanced",
        "search",
        "gap",
        "micro-batch",
    ):
        assert word in done.stdout, word


def test_a_picture_of_the_plans(lengths, tmp_path):
    done = broadsheet("flexsp", lengths, *QUICK, "--planners", "adaptive", "--out", str(tmp_path / "out"))
    assert "plans.svg" in done.stdout
    root = ElementTree.parse(tmp_path / "out" / "plans.svg").getroot()
    assert root.tag.endswith("svg")
    written = (tmp_path / "out" / "plans.svg").read_text()
    assert "adaptive" in written
    assert "simulated" in written


def test_json_has_plans_that_check(lengths, tmp_path):
    written = json.loads(broadsheet("flexsp", lengths, *QUICK, "--planners", "adaptive", "--json", "-").stdout)
    assert written["simulated"] is True
    assert list(written["planners"]) == ["adaptive", "search"]
    plans = [Plan.from_json(row) for row in written["planners"]["search"]]
    assert sum(len(plan.problem.lengths) for plan in plans) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.txt",), "cannot read lengths from nowhere.txt"),
        (("wikipedia", "--devices", "12"), "12 devices are no power of two"),
        (("wikipedia", "--planners", "best"), "no planner 'best'"),
        (("wikipedia", "--cost", "gpt-9b"), "no cost model 'gpt-9b'"),
        (("wikipedia", "--cost", "nowhere.json"), "nowhere.json holds no cost model"),
        (("wikipedia", "-o", "speed=3"), "flexsp has no parameter 'speed'"),
        (("wikipedia", "--memory", "1"), "give more memory or more devices"),
    ],
)
def test_errors_are_one_line(arguments, message):
    done = broadsheet("flexsp", *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
