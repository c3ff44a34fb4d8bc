"""The driver with real processes: shell commands for its mechanics, four gloo ranks for what training must keep."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes
from broadsheet.methods.estimates.megascale.executor import NodeSpec
from broadsheet.methods.estimates.megascale.inject import Fault, Injector, flip, plan
from broadsheet.methods.estimates.megascale.job import GradientGuard, Job, losses_of
from broadsheet.methods.estimates.megascale.network import available
from broadsheet.methods.estimates.megascale.rules import Rules

FAST = Rules(heartbeat=0.2, missing=4, patience=1.0)


def run(tmp_path, script, nodes=2, ranks=1, spares=1, **kwargs):
    manager = LocalNodes(nodes + spares, warm=True)
    return Driver(["sh", "-c", script], tmp_path / "run", manager, nodes, ranks, FAST, **kwargs).run()


def test_a_failed_rank_is_named_and_the_job_runs_again(tmp_path):
    script = 'echo "rank $RANK of $WORLD_SIZE"; [ $BROADSHEET_ATTEMPT = 0 ] && [ $RANK = 1 ] && exit 3; exit 0'
    found = run(tmp_path, script)
    assert found.finished
    assert [(one.rule, one.ranks, one.nodes, one.blocked) for one in found.incidents] == [("exit", (1,), ("node1",), ())]
    assert "exit code 3" in found.incidents[0].evidence
    assert (tmp_path / "run" / "logs" / "1-0.log").read_text() == "rank 0 of 2\n"
    assert [json.loads(line)["rule"] for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()] == ["exit"]


def test_a_lost_executor_costs_its_node_and_nothing_else(tmp_path):
    script = "[ $BROADSHEET_ATTEMPT = 0 ] && [ $RANK = 0 ] && kill -9 $PPID; [ $BROADSHEET_ATTEMPT = 0 ] && sleep 30; exit 0"
    found = run(tmp_path, script)
    assert found.finished
    assert [(one.rule, one.blocked) for one in found.incidents] == [("heartbeat", ("node0",))]
    assert found.incidents[0].detected - found.incidents[0].restarted < 0


def test_without_a_spare_the_driver_says_so(tmp_path):
    found = run(tmp_path, "[ $RANK = 0 ] && kill -9 $PPID; sleep 30", spares=0)
    assert not found.finished
    assert "no spare node is left to replace node0" in found.reason


def test_a_bug_is_not_restarted_for_ever(tmp_path):
    found = run(tmp_path, 'echo "Error: no such file"; exit 1')
    assert not found.finished
    assert len(found.incidents) == 3
    assert "3 times in the same way" in found.reason
    assert found.incidents[0].ranks == (0, 1)


def test_a_keyword_in_the_log_stops_the_run_before_the_process_ends(tmp_path):
    script = '[ $BROADSHEET_ATTEMPT = 1 ] && exit 0; [ $RANK = 1 ] && echo "CUDA error: uncorrectable ECC"; sleep 30'
    found = run(tmp_path, script)
    assert found.finished
    assert (found.incidents[0].rule, found.incidents[0].ranks) == ("log", (1,))
    assert found.seconds < 20


def test_children_of_a_killed_rank_die_too(tmp_path):
    mark = tmp_path / "mark"
    script = f"[ $BROADSHEET_ATTEMPT = 1 ] && exit 0; [ $RANK = 1 ] && exit 1; (sleep 2; touch {mark}) & wait"
    found = run(tmp_path, script)
    assert found.finished
    subprocess.run(["sleep", "2.5"], check=True)
    assert not mark.exists()


def test_a_second_run_in_a_folder_goes_on_counting(tmp_path):
    run(tmp_path, "exit 0")
    run(tmp_path, "echo again")
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [
        "0-0.log",
        "0-1.log",
        "1-0.log",
        "1-1.log",
    ]


def test_bad_geometry(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        Driver(["true"], tmp_path, LocalNodes(1), nodes=0)
    with pytest.raises(ValueError, match="no command"):
        Driver([], tmp_path, LocalNodes(1))
    assert not Driver(["true"], tmp_path, LocalNodes(1, warm=True), nodes=2, ranks_per_node=1, rules=FAST).run().finished


# --- faults -------------------------------------------------------------------------------------------------------------


def test_faults_fire_once_and_those_of_a_node_stay_with_it(tmp_path):
    plan(tmp_path, [Fault("nan", 0, 3), Fault("slow", 1, 3, amount=0.1, node="node0")])
    one = Injector.read(tmp_path, 0, "node0")
    assert one.loss(2, 1.0) == 1.0
    assert one.loss(3, 1.0) != one.loss(3, 1.0)  # nan
    assert Injector.read(tmp_path, 0, "node0").loss(3, 1.0) == 1.0  # the restarted process
    assert Injector.read(tmp_path, 1, "node0").faults
    assert not Injector.read(tmp_path, 1, "node2").faults
    with pytest.raises(ValueError, match="unknown fault"):
        Fault("fire", 0, 1)
    assert flip(1.0, 30) == float("inf")
    assert flip(flip(0.3, 7), 7) == pytest.approx(0.3)


def test_the_guard_refuses_what_no_gradient_looks_like():
    import torch

    guard = GradientGuard()
    for _ in range(8):
        guard.check(torch.ones(4))
    with pytest.raises(RuntimeError, match="corrupt gradient"):
        guard.check(torch.full((4,), 1e6))
    with pytest.raises(RuntimeError, match="corrupt gradient"):
        guard.check(torch.tensor([1.0, float("nan")]))


def test_bad_jobs():
    for wrong, message in (
        ({"optimizer": "sgd"}, "adamw, lamb"),
        ({"checkpoint": "no"}, "two-stage"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            Job("x", **wrong)
    assert Job.from_json(json.loads(json.dumps(Job("x").to_json()))) == Job("x")
    assert NodeSpec("node0", "a", "b").heartbeat > 0


# --- training -----------------------------------------------------------------------------------------------------------

_TRAIN = """
    import json, sys
    from pathlib import Path
    from broadsheet.methods.estimates.megascale.driver import Driver, LocalNodes
    from broadsheet.methods.estimates.megascale.inject import Fault, plan
    from broadsheet.methods.estimates.megascale.job import Job
    from broadsheet.methods.estimates.megascale.network import namespaces
    from broadsheet.methods.estimates.megascale.rules import Rules

    for name, faults in json.loads(sys.argv[2]).items():
        folder = Path(sys.argv[1]) / name
        plan(folder, [Fault(**fault) for fault in faults])
        (folder / "job.json").write_text(json.dumps(Job(str(folder), steps=24, checkpoint_every=6).to_json()))
        command = ["python", "-m", "broadsheet.methods.estimates.megascale.job", str(folder / "job.json")]
        rules = Rules(heartbeat=0.3, patience=1.5)
        found = Driver(command, folder, LocalNodes(3, warm=True), 2, 2, rules).run()
        rows = [[one.rule, one.ranks, one.detected, one.resumed_step] for one in found.incidents]
        print(json.dumps({"name": name, "finished": found.finished, "reason": found.reason, "incidents": rows}), flush=True)
"""


def train(tmp_path, **runs):
    """Runs of the job in a process of its own, which forks its ranks; name -> what came of it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(_TRAIN), str(tmp_path), json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


def parameters(folder: Path):
    return [json.loads((folder / f"result-{rank}.json").read_text())["parameters"] for rank in range(4)]


def same(tmp_path, name):
    """Whether a run is the unbroken one to the bit: all losses of all ranks, and the parameters."""
    a, b = tmp_path / "clean", tmp_path / name
    return losses_of(a) == losses_of(b) and parameters(a) == parameters(b)


def test_a_killed_rank_is_found_at_once_and_costs_no_bit(tmp_path):
    found = train(tmp_path, clean=[], kill=[{"kind": "kill", "rank": 2, "step": 15, "phase": "backward"}])
    assert found["clean"] == {"name": "clean", "finished": True, "reason": "", "incidents": []}
    assert len(set(parameters(tmp_path / "clean"))) == 1
    ((rule, ranks, detected, resumed),) = found["kill"]["incidents"]
    assert (rule, ranks, resumed) == ("exit", [2], 12)
    injected = json.loads((tmp_path / "kill" / "injected.jsonl").read_text())["time"]
    assert detected - injected < 3 * 0.3  # heartbeats
    assert same(tmp_path, "kill")


@pytest.mark.slow
def test_every_other_fault_is_survived_to_the_bit(tmp_path):
    faults = {
        "stop": [{"kind": "stop", "rank": 1, "step": 14}],
        "hang": [{"kind": "hang", "rank": 3, "step": 14, "phase": "backward"}],
        "exit": [{"kind": "exit", "rank": 0, "step": 9}],
        "checkpoint": [{"kind": "checkpoint", "rank": 1, "step": 15}],
        "write": [{"kind": "write", "rank": 0, "step": 17}],
        "gradient": [{"kind": "gradient", "rank": 2, "step": 13}],
        "replica": [{"kind": "replica", "rank": 3, "step": 13}],
        "nan": [{"kind": "nan", "rank": 1, "step": 20}],
    }
    found = train(tmp_path, clean=[], **faults)
    for name, (fault,) in faults.items():
        assert found[name]["finished"], found[name]
        assert [ranks for _, ranks, *_ in found[name]["incidents"]] == [[fault["rank"]]], found[name]
        assert same(tmp_path, name), name
    assert found["checkpoint"]["incidents"][0][3] == 6  # 12 was damaged


@pytest.mark.slow
def test_a_fault_that_nothing_sees_changes_the_run(tmp_path):
    found = train(tmp_path, clean=[], silent=[{"kind": "silent", "rank": 2, "step": 13}])
    assert found["silent"]["incidents"] == []
    assert not same(tmp_path, "silent")  # which is why the comparison above means something


@pytest.mark.slow
@pytest.mark.skipif(bool(available()), reason=available() or "network namespaces")
def test_nodes_with_links_of_their_own(tmp_path):
    from broadsheet.methods.estimates.megascale.network import namespaces

    script = """[ $BROADSHEET_ATTEMPT = 1 ] && exit 0
        [ $RANK = 1 ] && for i in 1 2 3; do ip link set eth0 down; sleep 0.1; ip link set eth0 up; sleep 0.1; done
        sleep 20"""
    with namespaces(3, "bstest") as (names, addresses):
        manager = LocalNodes(3, warm=True, namespaces=names, addresses=addresses)
        found = Driver(["sh", "-c", script], tmp_path / "run", manager, 2, 1, FAST).run()
    assert found.finished
    assert (found.incidents[0].rule, found.incidents[0].blocked) == ("links", ("node1",))
