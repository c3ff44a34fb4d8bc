"""Who is slow, who hangs, and what the clock says: on traces made by hand."""

import json
import random
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from broadsheet.methods.estimates.megascale.diagnosis import Stragglers, slowdown
from broadsheet.methods.estimates.megascale.hang import Grid, hang_view
from broadsheet.methods.estimates.megascale.report import diagnose
from broadsheet.methods.estimates.megascale.timeline import align, chrome_trace, late
from broadsheet.methods.estimates.megascale.timer import (
    Answerer,
    Beacon,
    Event,
    Timer,
    Trace,
    ask,
    read_status,
    read_trace,
    read_traces,
)

# --- heat map -----------------------------------------------------------------------------------------------------------


def times(ranks=8, steps=60, slow=None, share=0.1, noise=0.03, seed=0):
    """rank -> step -> phase -> ms of CPU time with noise, and now and then more of it."""
    draw = np.random.default_rng(seed)
    found = {}
    for rank in range(ranks):
        factor = 1 + share if rank == slow else 1.0
        found[rank] = {}
        for step in range(steps):
            forward = 3 * factor * (1 + noise * draw.standard_normal()) + (0.5 if draw.random() < 0.05 else 0)
            backward = 4 * factor * (1 + noise * draw.standard_normal())
            found[rank][step] = {"forward": forward, "backward": backward, "compute": forward + backward}
    return found


def test_ten_percent_slow_is_named_within_fifty_steps():
    for seed in range(30):
        found = Stragglers().judge(times(slow=seed % 8, seed=seed))
        assert set(found.flagged) == {seed % 8}
        assert found.found[seed % 8] < 50
        assert slowdown(found, seed % 8) == pytest.approx(0.1, abs=0.02)


def test_no_rank_is_named_in_clean_runs():
    flagged = sum(len(Stragglers().judge(times(seed=seed, steps=100)).flagged) for seed in range(100))
    assert flagged <= 8  # 1 % of 800 ranks


def test_a_rank_that_was_slow_for_a_moment_is_not_named():
    some = times()
    for step in range(20, 30):
        some[3][step] = {phase: value * 1.5 for phase, value in some[3][step].items()}
    assert Stragglers().judge(some).flagged == {}


def test_nested_communication_is_not_work():
    ms = 10**6
    events = [
        Event("all-reduce", 0, 2 * ms, 8 * ms, 3 * ms, "dp", 1, 100),
        Event("backward", 0, 0, 10 * ms, 7 * ms),
        Event("checkpoint", 0, 10 * ms, 20 * ms, 9 * ms),
    ]
    assert Stragglers().times(events) == {0: {"backward": 4.0, "compute": 4.0}}
    assert Stragglers(signal="wall").times(events) == {0: {"backward": 4.0, "compute": 4.0}}


def test_too_short_or_too_few():
    with pytest.raises(ValueError, match="run longer"):
        Stragglers().judge(times(steps=8))
    with pytest.raises(ValueError, match="at least 3"):
        Stragglers().judge(times(ranks=2))
    with pytest.raises(ValueError, match="positive"):
        Stragglers(floor=0)


# --- hang view ------------------------------------------------------------------------------------------------------------


def pipeline(grid, stuck, silent=False, steps=3):
    """Answers of a grid whose rank ``stuck`` never leaves its forward pass of the last step.

    A walk of all ranks until none can move. Each rank receives, reduces over tp, sends, reduces over dp; a call goes on
    when all its members have entered.
    """
    channels = grid.channels()
    programs = {}
    for rank in range(grid.world):
        tp, pp, dp = grid.place(rank)
        one = []
        if pp:
            one.append(f"pp.{tp}.{dp}.{pp - 1}.forward")
        one += ["", f"tp.{pp}.{dp}"]
        if pp < grid.pp - 1:
            one.append(f"pp.{tp}.{dp}.{pp}.forward")
        programs[rank] = [*one, f"dp.{tp}.{pp}"] * steps
    place = dict.fromkeys(programs, 0)
    entered = {rank: {name: 0 for name, members in channels.items() if rank in members} for rank in programs}
    inside = dict.fromkeys(programs, False)
    last = max(i for i, name in enumerate(programs[stuck]) if not name)
    moving = True
    while moving:
        moving = False
        for rank, program in programs.items():
            if place[rank] == len(program) or (rank == stuck and place[rank] == last):
                continue
            name = program[place[rank]]
            if not name:
                place[rank], moving = place[rank] + 1, True
                continue
            if not inside[rank]:
                inside[rank], moving = True, True
                entered[rank][name] += 1
            if all(entered[other][name] >= entered[rank][name] for other in channels[name]):
                inside[rank], moving = False, True
                place[rank] += 1
    answers = []
    for rank, program in programs.items():
        name = program[place[rank]] if place[rank] < len(program) and inside[rank] else ""
        answers.append(
            {
                "rank": rank, "step": 2, "event": name or ("forward" if rank == stuck else "step"), "channel": name,
                "sequence": entered[rank].get(name, 0), "entered": entered[rank],
                "channels": {n: list(m) for n, m in channels.items() if rank in m},
            }
        )  # fmt: skip
    return [answer for answer in answers if not (silent and answer["rank"] == stuck)]


@pytest.mark.parametrize("silent", [True, False])
def test_the_rank_that_all_others_wait_for_is_found(silent):
    for grid in (Grid(2, 2, 2), Grid(1, 4, 2), Grid(4, 1, 2)):
        for stuck in range(grid.world):
            answers = pipeline(grid, stuck, silent)
            random.Random(stuck).shuffle(answers)
            view = hang_view(answers, grid.world, answers)
            assert view.culprits == (stuck,), (grid, stuck, view)


def test_ranks_that_move_are_not_blamed():
    before = pipeline(Grid(2, 2, 2), 3)
    after = [answer | {"step": 3} for answer in before]
    assert hang_view(after, 8, before).culprits == ()


def test_all_in_the_same_call_is_the_network():
    answers = [
        {
            "rank": r,
            "step": 1,
            "event": "all-reduce",
            "channel": "dp",
            "sequence": 2,
            "entered": {"dp": 2},
            "channels": {"dp": [0, 1]},
        }
        for r in (0, 1)
    ]
    view = hang_view(answers, 2, answers)
    assert view.culprits == ()
    assert "network" in view.reason


def test_a_deadlock_blames_nobody():
    def one(rank, channel, other):
        entered = {channel: 1, other: 0}
        return {
            "rank": rank, "step": 1, "event": "recv", "channel": channel, "sequence": 1, "entered": entered,
            "channels": {"a": [0, 1], "b": [0, 1]},
        }  # fmt: skip

    view = hang_view([one(0, "a", "b"), one(1, "b", "a")], 2)
    assert view.culprits == ()
    assert "deadlock" in view.reason


def test_places_of_a_grid():
    grid = Grid(2, 3, 4)
    assert sorted(grid.rank(*grid.place(rank)) for rank in range(24)) == list(range(24))
    assert grid.channels()["tp.0.0"] == (0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        Grid(0, 1, 1)


# --- clocks ---------------------------------------------------------------------------------------------------------------


def skewed(offsets, calls=30, seed=0):
    """Traces of ranks whose clocks are off; rank 1 enters every call 2 ms after the others."""
    draw = random.Random(seed)
    ms, found = 10**6, []
    ends = [20 * ms * call + 9 * ms for call in range(calls)]
    for rank, offset in enumerate(offsets):
        events = []
        for call, end in enumerate(ends):
            start = end - (3 if rank == 1 else 5) * ms
            shift = offset + draw.randrange(-20_000, 20_000)
            events.append(Event("all-reduce", call, start + offset, end + shift, ms, "dp", call + 1, 64))
        found.append(Trace(rank, "", 0, {"dp": tuple(range(len(offsets)))}, tuple(events)))
    return found


def test_skewed_clocks_are_aligned_by_the_ends_of_collectives():
    offsets = (0, 5_000_000_000, -123_456_789)
    found = align(skewed(offsets))
    for rank, offset in enumerate(offsets):
        assert found.offsets[rank] == pytest.approx(offset, abs=20_000)
    assert found.residual < 20_000


def test_the_last_to_enter_is_charged_for_the_others_waiting():
    cost = late(skewed((0, 10**9, 0)))
    assert cost[1] == pytest.approx(2.0, abs=0.1)
    assert cost[0] + cost[2] < 0.1


def test_clocks_join_through_a_rank_that_both_know():
    one, two, three = skewed((0, 7_000_000, 9_000_000))
    rename = tuple(Event(e.name, e.step, e.start, e.end, e.cpu, "pair", e.sequence) for e in two.events)
    far = Trace(2, "", 0, {}, tuple(Event(e.name, e.step, e.start, e.end, e.cpu, "pair", e.sequence) for e in three.events))
    middle = Trace(1, "", 0, {}, (*two.events, *rename))
    assert align([one, middle, far]).offsets[2] == pytest.approx(9_000_000, abs=50_000)
    with pytest.raises(ValueError, match="links rank 2 to"):
        align([one, two, far])


def test_stages_that_only_send_to_each_other_are_aligned_as_clocks_are_in_a_network():
    ms, offset, draw = 10**6, 3_000_000_000, random.Random(0)
    first, second = [], []
    for step in range(40):
        start, delay = 50 * ms * step, [draw.randrange(1 * ms, 9 * ms) for _ in range(2)]
        first.append(Event("send", step, start, start + 1000, 0, "pp.forward", step + 1))
        second.append(Event("recv", step, start + offset, start + delay[0] + offset, 0, "pp.forward", step + 1))
        back = start + 20 * ms
        second.append(Event("send", step, back + offset, back + 1000 + offset, 0, "pp.backward", step + 1))
        first.append(Event("recv", step, start, back + delay[1], 0, "pp.backward", step + 1))
    traces = [Trace(0, "", 0, {}, tuple(first)), Trace(1, "", 0, {}, tuple(second))]
    assert align(traces).offsets[1] == pytest.approx(offset, abs=0.5 * ms)


def test_the_chrome_trace_has_rows_and_arrows():
    rows = json.loads(chrome_trace(skewed((0, 10**9, 0), calls=2)))["traceEvents"]
    spans = [row for row in rows if row["ph"] == "X"]
    assert len(spans) == 6
    assert min(row["ts"] for row in spans) == pytest.approx(0, abs=60)
    starts, ends = ([row for row in rows if row["ph"] == kind] for kind in "sf")
    assert len(starts) == len(ends) == 4
    assert {row["tid"] for row in starts} == {1}  # the one that came last


# --- what ranks write -----------------------------------------------------------------------------------------------------


def test_a_timer_file_comes_back_and_a_torn_line_is_left_out(tmp_path):
    timer = Timer(tmp_path, 3, "node1", 2, {"dp": (0, 3)}, Beacon(tmp_path / "status"))
    for step in (5, 6):
        timer.begin(step)
        with timer.event("backward"), timer.event("all-reduce", "dp", 40):
            assert timer.answer()["channel"] == "dp"
        timer.finish(0.5)
    timer.close()
    path = tmp_path / "timers-2-3.jsonl"
    path.write_text(path.read_text() + '{"step": 7, "eve')
    trace = read_trace(path)
    assert (trace.rank, trace.node, trace.channels) == (3, "node1", {"dp": (0, 3)})
    assert [(e.name, e.step, e.sequence) for e in trace.events] == [
        ("all-reduce", 5, 1), ("backward", 5, 0), ("all-reduce", 6, 2), ("backward", 6, 0),
    ]  # fmt: skip
    status = read_status(tmp_path / "status")
    assert (status.first, status.step, status.done, status.bytes, status.loss) == (5, 6, 2, 80, 0.5)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no timer file"):
        read_trace(path)


def test_a_rank_that_was_killed_at_once_does_not_hide_the_others(tmp_path):
    for rank in (0, 1):
        Timer(tmp_path, rank)  # not closed: killed before its first step
    (tmp_path / "timers-0-2.jsonl").touch()
    assert [trace.rank for trace in read_traces(tmp_path)] == [0, 1]


def test_a_rank_says_where_it_is_and_a_dead_one_is_missing(tmp_path):
    timer = Timer(tmp_path, 0, channels={"dp": (0, 1)})
    Answerer(tmp_path / "ask-0", timer)
    timer.begin(4)
    with timer.event("all-reduce", "dp"):
        found = ask({0: tmp_path / "ask-0", 1: tmp_path / "ask-1"}, tmp_path / "reply", 0.5)
    assert set(found) == {0}
    assert (found[0]["event"], found[0]["entered"], found[0]["step"]) == ("all-reduce", {"dp": 1}, 4)
    assert any("test_a_rank_says_where_it_is" in line for line in found[0]["stack"])


def test_a_diagnosis_of_a_folder(tmp_path):
    work = times(ranks=4, slow=2, steps=60)
    for rank, steps in work.items():
        timer = Timer(tmp_path / "timers", rank, f"node{rank // 2}", 0, {"dp": (0, 1, 2, 3)})
        for step, phases in steps.items():
            timer.begin(step)
            start = step * 20_000_000
            end = start + int(phases["compute"] * 1e6)
            timer._events = [
                Event("forward", step, start, end, int(phases["compute"] * 1e6)),
                Event("all-reduce", step, end, start + 15_000_000, 1000, "dp", step + 1, 64),
            ]
            timer.finish()
        timer.close()
    answers = pipeline(Grid(2, 1, 2), 1)
    (tmp_path / "hang-0.json").write_text(json.dumps({"world": 4, "rounds": [answers, answers]}))
    report = diagnose(tmp_path, grid=Grid(2, 1, 2))
    assert set(report.slow) == {2}
    assert report.waits[2] == max(report.waits.values())
    assert [table.title for table in report.tables()] == ["Ranks by phase", "Hangs"]
    json.dumps(report.to_json())
    files = report.files()
    assert set(files) == {"trace.json", "heat.svg", "ring.svg", "hang-0.svg"}
    for name, text in files.items():
        if name.endswith(".svg"):
            ET.fromstring(text)
    with pytest.raises(ValueError, match="is 8 ranks, the run has 4"):
        diagnose(tmp_path, grid=Grid(2, 2, 2))
    with pytest.raises(ValueError, match="no attempt 3"):
        diagnose(tmp_path, 3)
    with pytest.raises(ValueError, match=r"holds no timers"):
        diagnose(tmp_path / "nothing")
