"""The class, its report, and `broadsheet train-sim`."""

import json

import pytest
from command import broadsheet

from broadsheet.methods.estimates.megascale import MegaScale, simulate
from broadsheet.methods.estimates.megascale.calibration import published


@pytest.fixture(scope="module")
def report():
    return MegaScale().estimate()


def test_the_largest_run_is_near_the_papers(report):
    """Neither fit has seen it."""
    rows = {row["system"]: row for row in published()["strong_scaling"] if row["gpus"] == 12_288}
    assert report.step.seconds == pytest.approx(rows["megascale"]["seconds"], rel=0.05)
    assert report.rungs["baseline"].seconds == pytest.approx(rows["megatron"]["seconds"], rel=0.05)


def test_the_report_says_what_is_simulated(report):
    tables = {table.title: table for table in report.tables()}
    assert next(iter(tables)) == "One step"
    for title in ("One step", "Levers, one after the other", "Slow machines", "Failures"):
        assert "SIMULATED" in tables[title].note, title
    step = {row["part"]: row["seconds"] for row in tables["One step"].records()}
    assert step.pop("step") == pytest.approx(sum(step.values()))
    start = tables["Starting communication groups"].records()
    assert start[0]["asynchronous store, s"] > 1000 > 30 > start[1]["asynchronous store, s"]
    assert "SIMULATED" in tables["Flows that meet on an uplink"].note
    ladder = [row["MFU %"] for row in tables["Levers, one after the other"].records()]
    assert ladder == sorted(ladder)
    assert json.loads(json.dumps(report.to_json()))["simulated"] is True


def test_files_are_a_trace_and_the_failures(report, tmp_path):
    paths = {path.name: path for path in report.save(tmp_path)}
    events = json.loads(paths["pipeline.trace.json"].read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 8 * 2 * 6 * 32
    assert len(paths["faults.csv"].read_text().splitlines()) == 1 + len(report.run.incidents)


def test_a_fault_trace_takes_the_place_of_simulated_failures(report, tmp_path):
    report.save(tmp_path)
    days = report.run.seconds
    again = MegaScale().estimate(faults=str(tmp_path / "faults.csv"), wall_seconds=days)
    assert again.run.incidents == report.run.incidents
    failures = {table.title: table for table in again.tables()}["Failures"]
    assert "fault trace" in failures.note
    assert "SIMULATED" not in failures.note


def test_a_plan_from_json_and_from_numbers_agree(tmp_path):
    numbers = MegaScale(gpus=256, batch=768, levers="none")
    model, system, execution = numbers.plan()
    for name, part in (("model", model), ("system", system), ("execution", execution)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part.to_json()))
    files = {name: str(tmp_path / f"{name}.json") for name in ("model", "system", "execution")}
    assert MegaScale(**files, levers="none").estimate().step == numbers.estimate().step
    assert numbers.estimate().step == simulate(model, system, execution)


def test_lamb_is_one_rung_more():
    assert "lamb" not in MegaScale(gpus=256, batch=256).estimate().rungs
    rungs = MegaScale(gpus=256, batch=256, levers="all,lamb=3").estimate().rungs
    assert list(rungs)[-1] == "lamb"
    assert rungs["lamb"].mfu > rungs["misc"].mfu


def test_bad_input_is_told_in_one_line():
    for job, options, message in (
        ({"levers": "fast"}, {}, "unknown lever 'fast'"),
        ({"node_mtbf_days": 0}, {}, "node_mtbf_days"),
        ({"gpus": 100}, {}, "100 processors"),
        ({"gpus": "many"}, {}, "gpus must be a number above 0, not 'many'"),
        ({"window": -1}, {}, "window is a number of tokens"),
        ({"gpus": 192, "batch": 768, "pipeline_par": 3, "interleaving": 1, "levers": "none"}, {}, "GiB a processor"),
        ({}, {"days": "long"}, "days must be a number"),
        ({}, {"faults": "nowhere.csv"}, "cannot read the fault trace"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            MegaScale(**job).estimate(**options)
        assert "\n" not in str(caught.value)


def test_the_command(tmp_path):
    done = broadsheet(
        "train-sim", "--gpus", "1024", "--batch", "768", "--levers", "tp_overlap", "--out", str(tmp_path / "sim")
    )
    assert "MFU" in done.stdout
    assert "SIMULATED" in done.stdout
    assert {path.name for path in (tmp_path / "sim").iterdir()} == {"pipeline.trace.json", "faults.csv"}
    found = json.loads(broadsheet("train-sim", "--json", "-", "-o", "days=7").stdout)
    assert found["step"]["mfu"] == pytest.approx(0.55, abs=0.02)
    assert found["faults"]["seconds"] == 7 * 86_400
    for arguments, message in (
        (("--gpus", "100"), "no multiple"),
        (("-o", "colour=red"), "unknown option 'colour'"),
        (("--execution", "none.json"), "cannot read none.json"),
    ):
        failed = broadsheet("train-sim", *arguments, check=False)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1
