"""Anomaly rules on heartbeats made by hand."""

import pytest

from broadsheet.methods.estimates.megascale.rules import Rules, Watch
from broadsheet.methods.estimates.megascale.selfcheck import examine, failures


def beat(node, ranks, step=1, codes=None, lines=(), links=0, loss=1.0, sent=1000, first=0):
    rows = [
        {
            "rank": rank, "pid": 1, "code": (codes or {}).get(rank), "lines": 0, "first": first, "step": step,
            "event": "step",
            "bytes": sent * step, "loss": loss,
        }
        for rank in ranks
    ]  # fmt: skip
    return {"node": node, "ranks": rows, "lines": list(lines), "links": links}


def running(rules=None, seconds=20):
    """A watch over two nodes of two ranks that made four steps a second."""
    watch = Watch(rules or Rules(), ("node0", "node1"), 0.0)
    for tick in range(2 * seconds):
        watch.update(beat("node0", (0, 1), 2 * tick), tick / 2)
        watch.update(beat("node1", (2, 3), 2 * tick), tick / 2)
    return watch, seconds - 0.5


def test_a_healthy_run_raises_nothing():
    watch, now = running()
    assert watch.error(now + 0.5, 4) is None
    assert watch.warnings == []
    assert watch.usual == pytest.approx(0.25)


def test_a_lost_node_is_named_with_its_ranks():
    watch, now = running()
    for tick in range(1, 6):
        watch.update(beat("node0", (0, 1), 78 + tick), now + tick / 2)
    alarm = watch.error(now + 2.5, 4)
    assert (alarm.rule, alarm.nodes, alarm.ranks) == ("heartbeat", ("node1",), (2, 3))


def test_heartbeats_without_progress_are_a_hang_not_a_healthy_run():
    watch, now = running()
    last = watch.step
    for tick in range(1, 30):
        watch.update(beat("node0", (0, 1), last), now + tick / 2)
        watch.update(beat("node1", (2, 3), last), now + tick / 2)
        if alarm := watch.error(now + tick / 2, 4):
            break
    assert alarm.rule == "progress"
    assert tick / 2 == pytest.approx(20 * 0.25, abs=0.6)  # stall x usual step


def test_a_first_step_may_take_as_long_as_a_start():
    watch = Watch(Rules(startup=60), ("node0",), 0.0)
    for second in range(59):
        watch.update(beat("node0", (0, 1), 0), second)
        assert watch.error(second, 2) is None
    watch.update(beat("node0", (0, 1), 0), 61)
    assert watch.error(61, 2).rule == "progress"


def test_the_killed_rank_is_named_not_those_that_lost_their_connection():
    watch, now = running()
    lines = [(rank, "RuntimeError: Connection closed by peer [127.0.0.1]:1") for rank in (0, 1)]
    watch.update(beat("node0", (0, 1), 78, {0: 1, 1: 1}, lines), now + 0.1)
    watch.update(beat("node1", (2, 3), 78, {2: -9, 3: 1}, [(3, "Connection reset by peer")]), now + 0.2)
    alarm = watch.error(now + 0.3, 4)
    assert (alarm.rule, alarm.ranks, alarm.nodes) == ("exit", (2,), ("node1",))
    assert "signal 9" in alarm.evidence


def test_an_exception_is_told_from_its_echoes():
    watch, now = running()
    lines = [(1, "RuntimeError: boom")]
    watch.update(beat("node0", (0, 1), 78, {0: 1, 1: 1}, [*lines, (0, "Connection closed by peer")]), now)
    assert watch.error(now + 0.1, 4) is None  # waits for the others' last words
    alarm = watch.error(now + 1, 4)
    assert alarm.ranks == (1,)
    assert "boom" in alarm.evidence


def test_nan_links_and_keywords():
    watch, now = running()
    watch.update(beat("node1", (2, 3), 80, loss="nan"), now)
    assert watch.error(now, 4).rule == "nan"
    watch, now = running()
    watch.update(beat("node1", (2, 3), 80, links=4), now)
    assert (watch.error(now, 4).rule, watch.error(now, 4).nodes) == ("links", ("node1",))
    watch, now = running()
    watch.update(beat("node1", (2, 3), 80, lines=[(3, "CUDA error: uncorrectable ECC")]), now)
    assert (watch.error(now, 4).rule, watch.error(now, 4).ranks) == ("log", (3,))


def test_warnings_do_not_stop_a_run_and_a_repeated_failure_to_write_does():
    watch, now = running()
    line = (2, "WARNING checkpoint not written: [Errno 28] No space left on device")
    watch.update(beat("node1", (2, 3), 80, lines=[line]), now)
    assert watch.error(now, 4) is None
    assert watch.warnings[-1].rule == "log"
    watch.update(beat("node1", (2, 3), 82, lines=[line]), now)
    assert (watch.error(now, 4).rule, watch.error(now, 4).nodes) == ("disk", ("node1",))


def test_a_drop_of_traffic_is_a_warning():
    watch = Watch(Rules(), ("node1",), 0.0)
    for tick in range(10):
        watch.update(beat("node1", (2, 3), 5 * tick), tick)
    assert watch.warnings == []
    row = beat("node1", (2, 3), 50)
    row["ranks"][1]["bytes"] = 1000 * 45 + 5 * 100  # five more steps with a tenth of the bytes
    watch.update(row, 10)
    assert [(alarm.rule, alarm.severity, alarm.ranks) for alarm in watch.warnings] == [("traffic", "warning", (3,))]


def test_stragglers_are_warned_of_once_and_evicted_on_demand():
    watch, now = running()
    watch.slow(3, 0.1, now)
    watch.slow(3, 0.1, now)
    assert [alarm.ranks for alarm in watch.warnings] == [(3,)]
    assert watch.error(now, 4) is None
    watch, now = running(Rules(evict=True))
    watch.slow(3, 0.1, now)
    assert (watch.error(now, 4).rule, watch.error(now, 4).nodes) == ("straggler", ("node1",))


def test_bad_thresholds():
    with pytest.raises(ValueError, match="heartbeat=0 must be positive"):
        Rules(heartbeat=0)
    with pytest.raises(ValueError, match="drop"):
        Rules(drop=1.5)


def test_the_self_check_measures_and_judges(tmp_path):
    found = examine(2, tmp_path)
    assert set(found) == {"memory", "loopback", "all_to_all", "disk"}
    assert all(value > 0 for value in found.values())
    assert failures(found, found) == []
    assert failures({**found, "loopback": found["loopback"] / 20}, found)[0].startswith("loopback")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "disk" in failures(examine(1, blocked / "inside"), found)[0]
    assert failures({"error": "no answer"}, found) == ["no answer"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "socket.create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError(101, "Network is unreachable"))
        )
        assert "Network is unreachable" in failures({"network": examine(1, tmp_path, ("127.0.0.1", 1))["network"]}, {})[0]
