"""The commands of the driver and the diagnosis, and the checks behind the claims."""

import json

import pytest
from command import broadsheet

from broadsheet.core.records import Record
from broadsheet.methods.estimates import claims_megascale_robust as claims
from broadsheet.methods.estimates.megascale.timer import Timer


def test_robust_run_tells_what_happened(tmp_path):
    script = "[ $BROADSHEET_ATTEMPT = 0 ] && [ $RANK = 1 ] && exit 3; exit 0"
    folder, out = str(tmp_path / "run"), tmp_path / "out.json"
    options = ("--nodes", "1", "--ranks", "2", "--spares", "0", "-o", "heartbeat=0.2", "--json", str(out))
    done = broadsheet("robust-run", "--folder", folder, *options, "--", "sh", "-c", script)
    assert "rank 1: exit code 3" in done.stdout
    assert "done after 2 attempts" in done.stdout
    told = json.loads(out.read_text())
    assert (told["finished"], told["attempts"], told["incidents"][0]["ranks"]) == (True, 2, [1])


def test_robust_run_that_gives_up_is_one_line(tmp_path):
    options = ("--nodes", "1", "--ranks", "1", "--spares", "0", "-o", "heartbeat=0.2")
    done = broadsheet("robust-run", "--folder", str(tmp_path), *options, "--", "nothing-of-this-name", check=False)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("broadsheet: it failed 3 times in the same way")
    assert "cannot start nothing-of-this-name" in line


def test_unknown_thresholds_and_grids_are_one_line(tmp_path):
    done = broadsheet("robust-run", "-o", "hartbeat=1", "--", "true", check=False)
    assert done.returncode == 2
    assert "unknown threshold hartbeat; known: heartbeat" in done.stderr
    done = broadsheet("diagnose", str(tmp_path), "--grid", "two", check=False)
    assert "--grid takes TPxPPxDP" in done.stderr
    done = broadsheet("diagnose", str(tmp_path), check=False)
    assert "holds no timers" in done.stderr


def test_diagnose_prints_and_writes(tmp_path):
    for rank in range(4):
        timer = Timer(tmp_path / "run" / "timers", rank, f"node{rank}", 0, {"dp": (0, 1, 2, 3)})
        for step in range(4):
            timer.begin(step)
            with timer.event("forward"), timer.event("all-reduce", "dp", 8):
                pass
            timer.finish()
        timer.close()
    done = broadsheet("diagnose", str(tmp_path / "run"), "--out", str(tmp_path / "pictures"))
    assert "run longer" in done.stdout  # four steps make no window
    assert (tmp_path / "pictures" / "trace.json").exists()


# --- claims -------------------------------------------------------------------------------------------------------------


def record(metric, value, kind, n=10, **setting):
    return Record(
        "megascale", "robust-run", "megascale-faults", metric, value, n=n, setting={"kind": kind, **setting},
        parameters={"heartbeat": 0.3, "ranks": 4},
    )  # fmt: skip


def recovery(automatic=1.0, identical=1.0, most=0.2):
    shares = {"automatic": automatic, "named": 1.0, "identical": identical}
    return [
        *(record(name, value, "all but silent") for name, value in shares.items()),
        record("automatic", automatic, "kill"), record("detect_s", 0.1, "kill", most=most),
        record("detect_s", 3.0, "hang", most=3.2), record("recover_s", 1.0, "kill", most=2.0),
    ]  # fmt: skip


def test_recovery_is_judged_by_share_bits_and_heartbeats():
    assert claims.automatic_recovery([]) is None
    assert claims.automatic_recovery(recovery())[0] == "holds"
    assert claims.automatic_recovery(recovery(most=1.0))[0] == "holds in direction"  # three heartbeats are 0.9 s
    assert claims.automatic_recovery(recovery(identical=0.95))[0] == "holds in direction"
    assert claims.automatic_recovery(recovery(automatic=0.8))[0] == "does not hold here"


@pytest.mark.parametrize(
    ("named", "most", "wrong", "verdict"),
    [
        (1.0, 45, 0.0, "holds"),
        (0.9, 45, 0.0, "holds in direction"),
        (1.0, 60, 0.0, "holds in direction"),
        (0.4, 45, 0.0, "does not hold here"),
        (1.0, 45, 0.4, "does not hold here"),
    ],
)
def test_stragglers_are_judged_on_both_halves(named, most, wrong, verdict):
    gain = Record("megascale", "megascale", "megascale-tables", "mfu_gain", 0.7, setting={"gpus": 12288})
    rows = [
        gain, record("named", named, "slow"), record("detect_steps", 30, "slow", most=most),
        record("stragglers", wrong, "all but slow", n=100),
    ]  # fmt: skip
    assert claims.stragglers(rows)[0] == verdict
    assert "SIMULATED" in claims.stragglers([gain])[1]  # without runs, the simulated half alone
