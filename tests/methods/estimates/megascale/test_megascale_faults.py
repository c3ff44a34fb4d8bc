"""Failures, the start of groups, and flows that collide."""

import math
import threading
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from broadsheet.methods.estimates.megascale.fabric import free_of_collisions, hash_flows, remedies
from broadsheet.methods.estimates.megascale.faults import DAY, FaultModel, Incident, read_csv, report_of, to_csv
from broadsheet.methods.estimates.megascale.groups import Topology, messages, run_on_store, simulate_start, topologies

JOB = FaultModel(64, 64 * 3600.0, 1.0, interval=250, save=10, write=0, detect=10, diagnose=10, restart=10, automatic=1.0)


# --- failures -----------------------------------------------------------------------------------------------------------


def test_without_failures_only_saving_costs():
    job = replace(JOB, node_mtbf=1e15)
    run = job.run(2600.0)
    assert (run.incidents, run.steps, run.effective) == ((), 2500, 2500 / 2600)
    assert math.isnan(run.automatic)
    assert job.expected(250) == pytest.approx(250 / 260)


@pytest.mark.parametrize("interval", [60.0, 250.0, 1000.0])
def test_simulated_goodput_is_what_theory_expects(interval):
    """Daly's exact expectation for exponential failures; 20 runs of ten days."""
    job = replace(JOB, interval=interval)
    found = [job.run(10 * DAY, seed).effective for seed in range(20)]
    error = np.std(found) / 20**0.5
    # what was trained since the last save counts at the end of a run: up to a segment in ten days
    assert np.mean(found) == pytest.approx(job.expected(interval), abs=4 * error + interval / (10 * DAY))


def test_the_best_interval_is_near_youngs_and_is_the_best_that_is_played():
    best = JOB.best_interval()
    assert best == pytest.approx(math.sqrt(2 * JOB.save * JOB.mtbf), rel=0.1)
    curve = {interval: value for interval, value, _ in JOB.curve([best / 6, best, best * 6], 10 * DAY, 4)}
    assert max(curve, key=curve.get) == best


def test_lost_work_is_what_was_not_on_stable_storage():
    job = replace(JOB, write=100.0)
    run = job.run(5 * DAY, seed=3)
    plain = JOB.run(5 * DAY, seed=3)
    assert run.catch_up_seconds > plain.catch_up_seconds + 20
    for one in run.incidents:
        assert one.lost_steps <= job.interval + (job.save + job.write) / job.step_seconds + job.interval
        assert one.failed_at < one.detected_at < one.resumed_at


def test_a_person_takes_longer():
    by_hand = replace(JOB, automatic=0.0, manual=1800.0).run(5 * DAY)
    assert by_hand.automatic == 0
    assert by_hand.down_seconds > 1830
    assert by_hand.effective < JOB.run(5 * DAY).effective


def test_the_same_seed_gives_the_same_run():
    assert JOB.run(DAY, 5) == JOB.run(DAY, 5) != JOB.run(DAY, 6)


def test_known_failures_are_played_by_hand():
    """100 steps of 1 s, then 10 s of saving; failures at 300 and 1000 s, each followed by 30 s of recovery."""
    job = replace(JOB, interval=100)
    run = job.run(1500.0, failures=[1000.0, 300.0])
    first, second = run.incidents
    # saved at 110 and 220 s
    assert (first.failed_at, first.detected_at, first.resumed_at, first.lost_steps) == (300, 310, 330, 80)
    # from 330 on saved at 440, 550 ... 990 s
    assert (second.failed_at, second.lost_steps) == (1000, 10)
    # two segments, six, and from 1030 to 1500 four and 30 s
    assert run.steps == 200 + 600 + 400 + 30
    with pytest.raises(ValueError, match="before the run begins"):
        job.run(10.0, failures=[-1.0])


def test_bad_jobs_are_refused():
    for change, message in (({"nodes": 0}, "nodes"), ({"save": -1}, "save"), ({"automatic": 2}, "automatic")):
        with pytest.raises(ValueError, match=message):
            replace(JOB, **change)
    with pytest.raises(ValueError, match="length above 0"):
        JOB.run(0)


def test_a_trace_gives_back_the_report(tmp_path):
    run = JOB.run(5 * DAY, seed=1)
    path = tmp_path / "faults.csv"
    path.write_text(to_csv(run.incidents))
    incidents = read_csv(path)
    assert tuple(incidents) == run.incidents
    up = run.seconds - sum(one.resumed_at - one.failed_at for one in incidents)
    again = report_of(incidents, run.seconds, run.step_seconds, run.saving_seconds / up)
    assert again.effective == pytest.approx(run.effective, abs=0.002)
    assert again.catch_up_seconds == run.catch_up_seconds


def test_bad_traces_are_refused_in_one_line(tmp_path):
    path = tmp_path / "trace.csv"
    with pytest.raises(ValueError, match="cannot read"):
        read_csv(path)
    for text, message in (
        ("failed_at,detected_at\n1,2\n", "no column 'resumed_at'"),
        ("failed_at,detected_at,resumed_at,lost_steps\n1,2,x,0\n", "line 2: .* must be numbers"),
        ("failed_at,detected_at,resumed_at,lost_steps\n5,2,6,0\n", "line 2: wanted failed_at <= detected_at"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_csv(path)
    one, two = Incident(10, 20, 30, 5), Incident(25, 30, 40, 5)
    for incidents, seconds, message in (
        ([one, two], 100, "overlaps"),
        ([one], 20, "ends after 20"),
        ([replace(one, lost_steps=1000)], 100, "check the step's seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            report_of(incidents, seconds, 1.0)


# --- groups -------------------------------------------------------------------------------------------------------------


def test_every_rank_is_in_one_group_of_each_dimension():
    topology = Topology(2, 3, 4)
    for dimension, size in (("tp", 2), ("pp", 3), ("dp", 4)):
        groups = topology.groups()[dimension]
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(24))


@pytest.mark.parametrize("ordered", [True, False])
def test_the_simulated_store_serves_what_the_formula_counts(ordered):
    topology = Topology(2, 2, 3)
    seconds, asked = simulate_start(topology, ordered, 0.001)
    assert asked == messages(topology, ordered)
    assert seconds == pytest.approx(asked * 0.001)  # the store is never idle: it is the bottleneck


@pytest.mark.parametrize("ordered", [True, False])
def test_a_real_store_serves_as_many(ordered):
    """torch's TCPStore, a thread and a connection for every process."""
    distributed = pytest.importorskip("torch.distributed")
    topology, limit = Topology(2, 2, 2), timedelta(seconds=60)
    server = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
    clients = [distributed.TCPStore("localhost", server.port, is_master=False, timeout=limit) for _ in range(8)]
    counts = [0] * 8

    def work(rank):
        counts[rank] = run_on_store(rank, topology, clients[rank], ordered)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == messages(topology, ordered)


def test_naive_grows_with_the_square_and_ordered_with_the_size():
    sizes = [1024, 2048, 4096]
    for ordered, least, most in ((False, 1.8, 2.05), (True, 0.95, 1.2)):
        counts = [messages(topology, ordered) for topology in topologies(sizes)]
        assert least <= np.polyfit(np.log(sizes), np.log(counts), 1)[0] <= most
    with pytest.raises(ValueError, match="100 processes"):
        topologies([100])
    with pytest.raises(ValueError, match="at least 1"):
        Topology(0, 1, 1)


# --- flows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flows", "uplinks"), [(2, 4), (5, 32), (8, 32)])
def test_hashing_is_the_birthday_problem(flows, uplinks):
    exact = math.prod((uplinks - place) / uplinks for place in range(flows))
    assert free_of_collisions(flows, uplinks) == pytest.approx(exact)
    found = hash_flows(flows, uplinks, 400, 400, draws=4000)
    assert found.none == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)
    assert free_of_collisions(uplinks + 1, uplinks) == 0


def test_remedies_help():
    plain, split_ports, _, both, _ = remedies(500).values()
    assert plain.slowest < split_ports.slowest < both.slowest
    assert plain.mean < split_ports.mean
    alone = hash_flows(1, 4, 400, 400)
    assert (alone.none, alone.mean, alone.slowest) == (1, 1, 1)
    assert hash_flows(8, 2, 400, 400, local=1.0).slowest == 1
    # one uplink: four flows of half its rate get half of what they ask for; one asks for no more than it gets
    assert (hash_flows(4, 1, 200, 400).mean, hash_flows(1, 1, 200, 400).mean) == (0.5, 1)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        hash_flows(8, 2, 400, 400, local=2.0)
