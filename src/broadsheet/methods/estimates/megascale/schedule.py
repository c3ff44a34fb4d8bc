"""The interleaved 1F1B schedule, played through event by event.

Stage r holds chunks r, r + p, r + 2 p ... of the layers (Megatron-LM's order). A stage runs forward passes until the last
stage can begin to go back, then one forward and one backward pass in turn, then what backward passes are left. Without
``overlap`` a stage stops after every slot (a pass, or a pair of them) until its outputs are taken and its next inputs
are there, as Megatron-LM's joint send-and-receive does; with it messages travel while the stage computes, and only a missing
input is waited for (MegaScale, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from broadsheet.core.perf.events import Event, Resource, Simulation, Span, Steps, Trace

from .plan import Execution


@dataclass(frozen=True)
class Pass:
    """One chunk's forward or backward pass for one microbatch; ``chunk``: 0 to v - 1 on its stage."""

    backward: bool
    microbatch: int
    chunk: int


def slots(stage: int, p: int, v: int, m: int) -> list[list[Pass]]:
    """What a stage does, in order, cut where one without overlap stops to exchange.

    Interleaving (v > 1) goes through groups of p microbatches, chunk by chunk, and exchanges once for a pair of passes
    in the steady phase; else after every pass.
    """

    def kth(k: int, backward: bool) -> Pass:
        group, place = divmod(k, p * v)
        chunk, inside = divmod(place, p)
        return Pass(backward, group * p + inside, v - 1 - chunk if backward else chunk)

    total = m * v
    warm_up = min(total, (p - stage - 1) * 2 + (v - 1) * p if v > 1 else p - stage - 1)
    steady = [[kth(warm_up + k, False), kth(k, True)] for k in range(total - warm_up)]
    if v == 1:
        steady = [[one] for pair in steady for one in pair]
    return [
        *([kth(k, False)] for k in range(warm_up)),
        *steady,
        *([kth(k, True)] for k in range(total - warm_up, total)),
    ]


@dataclass(frozen=True)
class PipelineRun:
    """``seconds`` from the first pass to the last; ``busy``: of each stage; ``events``: how many were simulated."""

    seconds: float
    busy: tuple[float, ...]
    events: int

    @property
    def bubble(self) -> float:
        """Idle over busy time of the busiest stage; (p - 1) / (v m) for uniform stages and free messages."""
        return self.seconds / max(self.busy) - 1


def run_pipeline(
    p: int, v: int, m: int, seconds: Callable[[int, Pass], float], hop: float = 0.0, overlap: bool = True,
    trace: Trace | None = None,
) -> PipelineRun:  # fmt: skip
    """Plays a step of the pipeline. ``seconds(stage, pass)`` is what a pass takes; ``hop`` is what a message takes on the
    sender's NIC, which sends one at a time. Raises ValueError where m cannot be interleaved.
    """
    if v > 1 and m % p:
        raise ValueError(f"an interleaved schedule needs a multiple of p = {p} microbatches, not {m}")
    simulation = Simulation()
    nics = [Resource(simulation) for _ in range(p)]
    arrived: dict[tuple[int, Pass], Event] = {}
    wanted: dict[tuple[int, Pass], Event] = {}
    spans: dict[tuple[int, Pass], Span] = {}
    busy, ended = [0.0] * p, [0.0] * p

    def source(stage: int, one: Pass) -> tuple[int, Pass] | None:
        """Whose output a pass needs, if it comes from elsewhere or from an earlier pass."""
        step = one.chunk * p + stage + (1 if one.backward else -1)
        if step == v * p:  # the last layers go back from their own output
            return stage, Pass(False, one.microbatch, one.chunk)
        return None if step < 0 else (step % p, Pass(one.backward, one.microbatch, step // p))

    def target(stage: int, one: Pass) -> tuple[int, Pass] | None:
        step = one.chunk * p + stage + (-1 if one.backward else 1)
        return None if step in (-1, v * p) else (step % p, Pass(one.backward, one.microbatch, step // p))

    def event_of(table: dict[tuple[int, Pass], Event], key: tuple[int, Pass]) -> Event:
        return table.setdefault(key, Event(simulation))

    def send(stage: int, to: tuple[int, Pass]) -> Steps:
        if not overlap:
            yield event_of(wanted, to)  # a joint operation begins when both sides are in it
        if to[0] != stage:
            yield from nics[stage].use(hop)
        event_of(arrived, to).fire()

    def inputs(stage: int, passes: list[Pass]) -> Iterator[Event]:
        """What has to arrive before the passes can run; says that it is wanted."""
        for one in passes:
            came_from = source(stage, one)
            if came_from and came_from != (stage, Pass(False, one.microbatch, one.chunk)):
                key = (stage, one)
                if not event_of(wanted, key).fired:
                    wanted[key].fire()
                yield event_of(arrived, key)

    def work(stage: int) -> Steps:
        groups = slots(stage, p, v, m)
        if overlap:
            groups = [[one] for group in groups for one in group]
        sending: list[Event] = []
        for group in groups:
            yield simulation.all_of([*sending, *inputs(stage, group)])
            sending = []
            for one in group:
                begun = simulation.now
                yield seconds(stage, one)
                busy[stage] += simulation.now - begun
                if trace is not None:
                    name = f"{'B' if one.backward else 'F'}{one.microbatch}"
                    span = trace.add(name, ("pipeline", f"stage {stage}"), begun, simulation.now, chunk=one.chunk)
                    spans[stage, one] = span
                    if (before := source(stage, one)) and before[0] != stage:
                        trace.arrow(spans[before], span)
            for one in group:
                to = target(stage, one)
                if to:
                    message = simulation.process(send(stage, to))
                    if not overlap:
                        sending.append(message)
        if sending:
            yield simulation.all_of(sending)
        ended[stage] = simulation.now

    stages = [simulation.process(work(stage), f"stage {stage}") for stage in range(p)]
    simulation.run(until=simulation.all_of(stages))
    return PipelineRun(max(ended), tuple(busy), simulation.happened)


def of_costs(
    execution: Execution, forward: float, backward: float, output: tuple[float, float] = (0.0, 0.0),
    slow: dict[int, float] | None = None,
) -> Callable[[int, Pass], float]:  # fmt: skip
    """What a pass takes: chunk times, the output layer on the last chunk, and by how much the ``slow`` stages' forward
    passes take longer (``{stage: 0.1}``)."""
    last, top = execution.pipeline_par - 1, execution.pipeline_interleaving - 1
    slow = slow or {}

    def seconds(stage: int, one: Pass) -> float:
        time = backward if one.backward else forward * (1 + slow.get(stage, 0.0))
        if stage == last and one.chunk == top:
            time += output[one.backward]
        return time

    return seconds
