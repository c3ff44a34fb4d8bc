"""The discrete-event core."""

import json
import math

import numpy as np
import pytest

from broadsheet.core.perf.events import Interrupted, Link, Preemption, Queue, Resource, Simulation, Trace


def test_a_process_waits_and_returns():
    simulation = Simulation()

    def steps():
        yield 1.5
        yield 2
        return "done"

    assert simulation.run(until=simulation.process(steps())) == "done"
    assert simulation.now == 3.5


def test_the_same_time_keeps_the_order():
    simulation, seen = Simulation(), []

    def steps(name):
        yield 1.0
        seen.append(name)

    for name in "abcd":
        simulation.process(steps(name))
    simulation.call(1.0, lambda: seen.append("call"))
    simulation.run()
    assert seen == ["call", *"abcd"]  # processes only start at 0, and so wait for 1 after the call did


def test_run_until_a_time_stops_the_clock_there():
    simulation, seen = Simulation(), []
    for delay in (1.0, 2.0, 3.0):
        simulation.call(delay, lambda delay=delay: seen.append(delay))
    simulation.run(until=2.5)
    assert (seen, simulation.now) == ([1.0, 2.0], 2.5)
    simulation.run()
    assert seen == [1.0, 2.0, 3.0]


def test_events_gather():
    simulation = Simulation()

    def steps():
        first = yield simulation.any_of([simulation.after(5.0, "slow"), simulation.after(2.0, "fast")])
        assert (first.value, simulation.now) == ("fast", 2.0)
        both = yield simulation.all_of([simulation.after(1.0, 1), simulation.after(4.0, 2)])
        assert simulation.now == 6.0
        assert (yield simulation.all_of([])) == []
        return both

    assert simulation.run(until=simulation.process(steps())) == [1, 2]


def test_waiting_for_what_cannot_happen_names_who_waits():
    simulation = Simulation()

    def steps():
        yield simulation.event()

    with pytest.raises(RuntimeError, match="still waiting: stuck"):
        simulation.run(until=simulation.process(steps(), "stuck"))


def test_bad_use_is_refused():
    simulation = Simulation()
    with pytest.raises(ValueError, match="into the past"):
        simulation.call(-1.0, print)
    with pytest.raises(ValueError, match="into the past"):
        simulation.call(math.nan, print)
    with pytest.raises(RuntimeError, match="once"):
        simulation.event().fire().fire()
    with pytest.raises(ValueError, match="capacity"):
        Resource(simulation, 0)
    with pytest.raises(ValueError, match="rate"):
        Link(simulation, 0)
    simulation.process((step for step in ["what"]), "odd")
    with pytest.raises(TypeError, match="'odd' yielded 'what'"):
        simulation.run()


def test_a_resource_serves_by_priority_then_arrival():
    simulation, seen = Simulation(), []
    gpu = Resource(simulation)

    def steps(name, priority):
        with gpu.request(priority) as turn:
            yield turn
            seen.append(name)
            yield 1.0

    for name, priority in (("first", 0), ("low", 5), ("high", -1), ("low too", 5)):
        simulation.process(steps(name, priority))
    simulation.run()
    assert seen == ["first", "high", "low", "low too"]
    assert (simulation.now, gpu.busy_time, gpu.held, gpu.waiting) == (4.0, 4.0, set(), 0)


def test_who_is_interrupted_in_line_leaves_it():
    simulation = Simulation()
    gpu = Resource(simulation)

    def holder():
        with gpu.request() as turn:
            yield turn
            yield 10.0

    def impatient():
        try:
            with gpu.request() as turn:
                yield turn
        except Interrupted as interrupt:
            return interrupt.cause

    simulation.process(holder())
    waits = simulation.process(impatient())
    last = simulation.process(holder())
    simulation.call(3.0, lambda: waits.interrupt("enough"))
    simulation.run(until=waits)
    assert (waits.value, simulation.now, gpu.waiting) == ("enough", 3.0, 1)
    simulation.run(until=last)
    assert simulation.now == 20.0


def test_preemption_takes_the_place_of_the_worst_and_the_rest_is_done_later():
    simulation, ended = Simulation(), {}
    gpu = Resource(simulation)

    def steps(name, start, duration, priority):
        yield start
        yield from gpu.use(duration, priority, preempt=True)
        ended[name] = simulation.now

    simulation.process(steps("long", 0.0, 10.0, 2))
    simulation.process(steps("middle", 1.0, 4.0, 1))
    simulation.process(steps("urgent", 2.0, 1.0, 0))
    simulation.process(steps("equal", 2.5, 1.0, 0))  # the same priority does not preempt
    simulation.run()
    assert ended == {"urgent": 3.0, "equal": 4.0, "middle": 7.0, "long": 16.0}
    assert gpu.busy_time == 16.0


def test_a_preemption_at_the_very_end_is_no_preemption_of_what_follows():
    simulation, ended = Simulation(), {}
    gpu = Resource(simulation)

    def thief():
        yield 2.0  # begun first, so that it comes before the victim's own end at 2
        yield from gpu.use(3.0, 0, preempt=True)
        ended["thief"] = simulation.now

    def victim():
        yield from gpu.use(2.0, 1)
        ended["victim"] = simulation.now
        yield 4.0
        return simulation.now

    simulation.process(thief())
    assert simulation.run(until=simulation.process(victim())) == 6.0
    assert ended == {"victim": 2.0, "thief": 5.0}


def test_a_preempted_process_is_told_by_whom():
    simulation, causes = Simulation(), []
    gpu = Resource(simulation)

    def victim():
        with gpu.request(priority=1) as turn:
            yield turn
            try:
                yield 5.0
            except Interrupted as interrupt:
                causes.append(interrupt.cause)

    def thief():
        yield 2.0
        with gpu.request(preempt=True) as turn:
            assert turn.fired  # at once
            yield turn
            yield 1.0

    simulation.process(victim())
    simulation.process(thief())
    simulation.run()
    assert isinstance(causes[0], Preemption)
    assert causes[0].since == 0.0
    assert simulation.now == 5.0  # the victim's old time-out passes, and wakes nobody


def test_a_killed_process_gives_back_what_it_holds():
    simulation = Simulation()
    gpu = Resource(simulation)

    def steps():
        with gpu.request() as turn:
            yield turn
            yield 100.0

    first, second = simulation.process(steps()), simulation.process(steps())
    simulation.call(1.0, first.kill)
    simulation.run(until=second)
    assert simulation.now == 101.0
    assert first.value is None


def test_queues_hand_over_in_order_and_hold_back_the_full():
    simulation, seen = Simulation(), []
    queue = Queue(simulation, capacity=1)

    def producer():
        for item in range(3):
            yield queue.put(item)
            seen.append(("put", item, simulation.now))

    def consumer():
        for _ in range(3):
            yield 2.0
            seen.append(("got", (yield queue.get()), simulation.now))

    simulation.process(producer())
    simulation.process(consumer())
    simulation.run()
    assert [row for row in seen if row[0] == "put"] == [("put", 0, 0.0), ("put", 1, 2.0), ("put", 2, 4.0)]
    assert [row for row in seen if row[0] == "got"] == [("got", 0, 2.0), ("got", 1, 4.0), ("got", 2, 6.0)]


def test_a_queue_by_key():
    simulation = Simulation()
    queue = Queue(simulation, key=lambda item: -item)
    for item in (1, 3, 2):
        queue.put(item)
    assert [queue.get().value for _ in range(3)] == [3, 2, 1]


def test_a_link_is_shared_equally():
    """Sizes 4 and 8 from 0, and 2 from 1, over 2 units a second: worked out by hand."""
    simulation, ended = Simulation(), {}
    link = Link(simulation, rate=2.0)

    def steps(name, start, size):
        yield start
        yield link.transfer(size)
        ended[name] = simulation.now

    for name, start, size in (("four", 0.0, 4.0), ("eight", 0.0, 8.0), ("two", 1.0, 2.0)):
        simulation.process(steps(name, start, size))
    simulation.run()
    # until 1: one unit each; three share 2/s: "two" through at 4, "four" left with 1 of 3; both 1/s: 5; the last 4 at 2/s
    assert ended == pytest.approx({"two": 4.0, "four": 5.0, "eight": 7.0})
    assert link.active == 0


def test_a_link_moves_all_bytes_whatever_the_arrivals():
    rng, simulation = np.random.default_rng(0), Simulation()
    link = Link(simulation, rate=3.0)
    sizes = rng.uniform(1, 2, 300)
    for size in sizes:
        link.transfer(size)
    simulation.run()
    assert simulation.now == pytest.approx(sizes.sum() / 3.0)


def test_a_queue_in_front_of_one_server_waits_as_theory_says():
    """M/M/1 at a load of 0.5: the mean time in the system is 1 / (mu - lambda) = 2."""
    rng, simulation, times = np.random.default_rng(1), Simulation(), []
    server = Resource(simulation)

    def customer(duration):
        came = simulation.now
        yield from server.use(duration)
        times.append(simulation.now - came)

    def arrivals():
        for gap, duration in zip(rng.exponential(2.0, 20_000), rng.exponential(1.0, 20_000)):
            yield gap
            simulation.process(customer(duration))

    simulation.process(arrivals())
    simulation.run()
    assert np.mean(times) == pytest.approx(2.0, rel=0.08)  # the standard error is about 0.03
    assert server.busy_time / simulation.now == pytest.approx(0.5, rel=0.05)


def test_a_trace_is_what_chrome_reads():
    trace = Trace()
    first = trace.add("forward", ("rank 0", "compute"), 0.0, 0.5, microbatch=3)
    second = trace.add("forward", ("rank 1", "compute"), 0.6, 1.0)
    trace.arrow(first, second)
    events = json.loads(trace.to_json())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(e["ts"], e["dur"], e["args"]) for e in spans] == [(0.0, 5e5, {"microbatch": 3}), (6e5, 4e5, {})]
    assert spans[0]["pid"] != spans[1]["pid"]
    start, finish = (next(event for event in events if event["ph"] == phase) for phase in "sf")
    assert (start["id"], start["ts"], finish["ts"]) == (finish["id"], 5e5, 6e5)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"rank 0", "rank 1", "compute"}
    with pytest.raises(ValueError, match="before it starts"):
        trace.add("odd", "line", 1.0, 0.0)
