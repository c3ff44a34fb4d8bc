"""The time of one training step: what each optimisation saves, from plan, hardware and six fitted constants.

MegaScale sections 3.1-3.4, each as a flag of `Levers`. `costs` prices one chunk of layers for one microbatch on one GPU;
`closed_form` and `schedule.run_pipeline` (events) turn that into the time of the pipeline, and the two agree; `simulate`
adds what a step pays once. With p stages of v chunks, m microbatches, chunk times f and b and a hop c between stages:

    pipeline = (m v + p - 1) (f + b)  +  m (output layer)  +  (2 (m v + p - 1) - m - 1) c    (with pp_overlap 2 (v p - 1) c)
    step     = pipeline + exposed data-parallel traffic + optimiser + late ranks + fixed seconds

so that the bubble of uniform stages is (p - 1) / (v m) of the ideal time. MFU counts (6 P + 12 L h s) FLOPs a token over the
dense peak, with s the window where attention slides; recomputation and the causal half change nothing.

Simulated are: everything. What is not fitted and not from a datasheet is a field of `Calibration` marked assumed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Self

from .plan import GIB, Execution, Model, System, check_memory, folder

#: Euler's number: the n-th harmonic number is ln n + this
EULER = 0.5772156649


@dataclass(frozen=True)
class Levers:
    """MegaScale's optimisations. ``lamb``: the batch is this many times as large (with the LAMB optimiser; 1: off)."""

    parallel_block: bool = False  #: PTB: attention and MLP read one LayerNorm, and share their communication
    sliding_window: bool = False
    tp_overlap: bool = False
    pp_overlap: bool = False
    dp_overlap: bool = False
    operators: bool = False  #: FlashAttention-2, fused LayerNorm and GeLU
    misc: bool = False  #: data pipeline, code that made ranks late
    lamb: int = 1

    def __post_init__(self) -> None:
        if self.lamb < 1 or self.lamb != int(self.lamb):
            raise ValueError(f"lamb is by how much the batch grows: a whole number from 1, not {self.lamb}")

    @classmethod
    def all(cls, lamb: int = 1) -> Self:
        return cls(*(True,) * 7, lamb=lamb)

    @classmethod
    def named(cls, names: str) -> Self:
        """From "all", "none" or a comma-separated list such as "tp_overlap,lamb=3". Raises ValueError."""
        known = [f.name for f in fields(cls)]
        given: dict[str, Any] = {}
        for name in filter(None, (part.strip() for part in names.split(","))):
            word, _, number = name.partition("=")
            if word == "all":
                given |= dict.fromkeys(known[:-1], True)
            elif word == "lamb" and number.isdigit():
                given["lamb"] = int(number)
            elif word in known[:-1] and not number:
                given[word] = True
            elif word != "none":
                raise ValueError(f"unknown lever '{name}'; known: all, none, {', '.join(known[:-1])}, lamb=N")
        return cls(**given)

    @classmethod
    def ladder(cls, lamb: int = 3) -> dict[str, Levers]:
        """The ablation: one lever more at each rung, in the paper's order."""
        rungs = {"baseline": cls()}
        now: Any = cls()
        for name in [f.name for f in fields(cls)]:
            now = replace(now, **{name: lamb if name == "lamb" else True})
            rungs[name] = now
        return rungs


@dataclass(frozen=True)
class Calibration:
    """Six constants that are fitted, and those that are assumed.

    The fitted ones belong to the cluster and the software on it; `calibrated` has those of MegaScale's tables.
    """

    matrix_efficiency: float  #: share of the peak that matrix products reach
    tp_efficiency: float  #: share of the bandwidth in a machine that all-gather and reduce-scatter reach
    network_efficiency: float  #: share of the NIC's bandwidth
    p2p_seconds: float  #: what a hop between stages costs whatever its size
    late_seconds: float  #: how late a rank is on average (garbage collection, data); of n, the last is H(n) times that
    step_seconds: float  #: what a step costs whatever its size and levers
    tp_chunks: int = 4  #: assumed: parts of a matrix product that hides its communication
    attention_efficiency: float = 0.6  #: assumed: FlashAttention-2's share of the peak
    operator_slowdown: float = 2.0  #: assumed: attention and elementwise operators before lever ``operators``
    memory_efficiency: float = 0.8  #: assumed: share of the memory's bandwidth
    slow_share: float = 0.005  #: published: share of machines that are slow
    slow_forward: float = 0.10  #: published: by how much longer their forward passes take

    #: what `calibration.fit` may change
    fitted = (
        "matrix_efficiency", "tp_efficiency", "network_efficiency", "p2p_seconds", "late_seconds", "step_seconds",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in (
            "matrix_efficiency",
            "tp_efficiency",
            "network_efficiency",
            "attention_efficiency",
            "memory_efficiency",
        ):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"calibration: {name} is a share from 0 to 1, not {getattr(self, name)}")
        for name in ("p2p_seconds", "late_seconds", "step_seconds", "slow_share", "slow_forward"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"calibration: {name} must not be negative: {getattr(self, name)}")
        if self.tp_chunks < 1 or self.operator_slowdown < 1 or self.slow_share > 1:
            raise ValueError("calibration: tp_chunks and operator_slowdown are at least 1, slow_share at most 1")


@cache
def calibrated() -> Calibration:
    """The constants that benchmarks/megascale_tables.py fitted to MegaScale's small runs."""
    data = json.loads((folder() / "fitted.json").read_text(encoding="utf-8"))
    return Calibration(**data["constants"])


@dataclass(frozen=True)
class Costs:
    """Seconds on one GPU. ``forward`` and ``backward``: of one chunk for one microbatch, exposed communication included;
    ``parts``: of one layer's forward and backward, by kind; ``output``: forward and backward of the output layer."""

    forward: float
    backward: float
    output: tuple[float, float]
    hop: float
    data_parallel: float
    optimizer: float
    late: float
    fixed: float
    parts: Mapping[str, float] = field(default_factory=dict)


def exposed(communication: float, work: float, chunks: int) -> float:
    """What is left to wait for when work and communication run in ``chunks`` that follow each other in a pipeline:
    max + min / chunks in all, less the work. Never more than the communication itself."""
    return max(communication, work) + min(communication, work) / chunks - work


def costs(model: Model, system: System, execution: Execution, levers: Levers, c: Calibration) -> Costs:
    """What a microbatch of T = microbatch_size * seq_size tokens costs."""
    t, v, p = execution.tensor_par, execution.pipeline_interleaving, execution.pipeline_par
    tokens, h, width = execution.microbatch_size * model.seq_size, model.hidden, model.attention_width
    layers = model.num_blocks // (p * v)
    peak, memory = system.tflops * 1e12, system.memory_gbps * 1e9 * c.memory_efficiency
    inside, between = system.networks

    # matrices, attention, elementwise: forward; a backward pass is twice that
    linear = 2 * tokens * (4 * h * width + 2 * h * model.feedforward) / t / (peak * c.matrix_efficiency)
    feedforward = 2 * tokens * 2 * h * model.feedforward / t / (peak * c.matrix_efficiency)
    window = model.window if levers.sliding_window and model.window else model.seq_size
    slower = 1.0 if levers.operators else c.operator_slowdown
    attention = slower * 4 * tokens * window * width / t / (peak * c.attention_efficiency)
    # 16-bit tensors of [tokens, hidden] read or written: LayerNorm 2, sum of two 3 (of three 4), GeLU on the wide one 2
    passes = (2 + 4 if levers.parallel_block else 2 * (2 + 3)) + 2 * model.feedforward / h
    elementwise = slower * passes * 2 * tokens * h / (t if execution.seq_par else 1) / memory

    # tensor and sequence parallelism: all-gather and reduce-scatter around attention and MLP, or around both at once
    operations = 2 if levers.parallel_block else 4
    ring = inside if t <= inside.size else between
    once = 0.0
    if t > 1:
        share = c.tp_efficiency if ring is inside else c.network_efficiency
        once = ring.seconds(2 * tokens * h * (t - 1) / t, share) + ring.latency
    waits = []
    for work in (feedforward, 2 * feedforward):
        # the lever hides an operation behind its share of the feed-forward products
        waits.append(operations * (exposed(once, work / operations, c.tp_chunks) if levers.tp_overlap else once))

    again = {"none": 0.0, "attn_only": attention, "full": linear + attention + elementwise + waits[0]}
    forward = linear + attention + elementwise + waits[0]
    backward = 2 * (linear + attention + elementwise) + waits[1] + again[execution.activation_recompute]

    message = 2 * tokens * h / (t if execution.seq_par else 1)
    hop = between.seconds(message, c.network_efficiency) + c.p2p_seconds if p > 1 else 0.0

    # data parallelism: reduce-scatter of gradients, all-gather of 16-bit weights, each over a ring
    own = model.parameters / (t * p)
    d = execution.data_par
    synchronise = between.seconds(own * (execution.grad_bytes + 2) * (d - 1) / d, c.network_efficiency)
    synchronise += 2 * between.latency * (d - 1)
    if levers.dp_overlap:
        synchronise /= 2 * v
    shard = own / (d if execution.optimizer_sharding else 1)
    last = c.late_seconds * (math.log(execution.num_procs) + EULER)  # of n exponential delays the longest, on average
    output = 2 * tokens * h * model.vocab_size / t / (peak * c.matrix_efficiency)
    return Costs(
        forward=layers * forward,
        backward=layers * backward,
        output=(output, 2 * output),
        hop=hop,
        data_parallel=synchronise,
        optimizer=shard * (24 + 4 + 2) / memory,  # weight and two moments read and written in 32 bits, gradient, 16-bit copy
        late=0.0 if levers.misc else last,
        fixed=c.step_seconds,
        parts={
            "linear": 3 * linear,
            "attention": 3 * attention,
            "elementwise": 3 * elementwise,
            "tensor_parallel": sum(waits),
            "recompute": again[execution.activation_recompute],
        },
    )


@dataclass(frozen=True)
class StepReport:
    """One step, simulated. ``parts`` sum to ``seconds``; ``memory``: bytes of the fullest stage, by kind."""

    seconds: float
    mfu: float  #: share of the peak
    tokens_per_second: float
    bubble: float  #: (p - 1) / (v m)
    parts: Mapping[str, float]
    memory: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "parts": dict(self.parts), "memory": dict(self.memory)}


def closed_form(cost: Costs, p: int, v: int, m: int, overlap: bool) -> dict[str, float]:
    """The pipeline's time by parts.

    Without overlap every slot of the schedule ends with its messages, N = 2 (m v + p - 1) of them along the longest
    path: that of the last stage, which has the output layer and m + 1 messages less, or that of the others. With overlap
    a message is waited for only while the pipeline fills and drains (v rounds of p stages, less one), or where there is
    no slack for it: messages longer than the work beside them, and, with v = 1, a round trip through p stages that has
    only p microbatches under way. Exact with three stages and two chunks or more and messages shorter than the output
    layer; else within some percent of the events.
    """
    pair, output, hop = cost.forward + cost.backward, sum(cost.output), cost.hop
    slots = 2 * (m * v + p - 1)
    waits = max(hop * (slots - m - 1), hop * max(0, slots - 4) - m * output)
    if overlap:
        slack = output if v == 1 else pair + output / v
        stall = 2 * hop * (p - 1) / p if v == 1 else 2 * hop
        waits = min(waits, 2 * (v * p - 1) * hop + m * v * max(0.0, stall - slack))
    return {
        "compute": m * v * pair,
        "output": m * output,
        "bubble": (p - 1) * pair,
        "pipeline_parallel": waits if p > 1 else 0.0,
    }


def slowed(cost: Costs, v: int, m: int, overlap: bool, slow: float, last: bool) -> float:
    """By how many seconds a pipeline takes longer in which one stage's forward passes take ``slow`` (a share) longer.

    All of the delay shows where it is the last stage, which has the output layer already. Another stage hides as much behind
    that layer: in all, or without overlap in the one slot of v that has it.
    """
    if last:
        return m * v * cost.forward * slow
    once, output = cost.forward * slow, sum(cost.output)
    return max(0.0, m * (v * once - output)) if overlap else m * (v * once - min(once, output))


def straggling(cost: Costs, execution: Execution, machines: int, overlap: bool, share: float, slow: float) -> float:
    """The expected delay in seconds where each machine is slow with probability ``share``; a stage of a replica is on
    machines of its own, and the slowest pipeline makes the step."""
    p, v, m = execution.pipeline_par, execution.pipeline_interleaving, execution.microbatches
    at_last = 1 - (1 - share) ** (machines / p)
    elsewhere = 1 - (1 - share) ** (machines * (p - 1) / p)
    delay = (1 - at_last) * elsewhere * slowed(cost, v, m, overlap, slow, last=False)
    return delay + at_last * slowed(cost, v, m, overlap, slow, last=True)


def memory(model: Model, execution: Execution, levers: Levers | None = None) -> dict[str, float]:
    """Bytes on a GPU of the first stage, which holds most (Korthikanti et al., equations 1-6, and 18 bytes a parameter).

    Weights 2 and summed gradients 4 bytes a parameter, the optimiser's 12 shared out over data_par where it is sharded.
    Activations of s b h (34 / t + 5 a s / (h t)) a layer: the second term is gone where attention is recomputed or
    (lever ``operators``) fused, all but the input with full recomputation; the first stage holds p microbatches of
    its layers, 1 + (p - 1) / (p v) times with interleaving.
    """
    t, p, v = execution.tensor_par, execution.pipeline_par, execution.pipeline_interleaving
    own = model.parameters / (t * p)
    tokens_width = model.seq_size * execution.microbatch_size * model.hidden
    scores = 5 * model.attn_heads * model.seq_size / (model.hidden * t)
    linear = 34 / t if execution.seq_par else 10 + 24 / t
    fused = levers is not None and levers.operators
    each = linear + (0 if execution.activation_recompute == "attn_only" or fused else scores)
    if execution.activation_recompute == "full":
        each = 2 / t if execution.seq_par else 2
    held = min(p * (1 + (p - 1) / (p * v) if v > 1 else 1), execution.microbatches)
    return {
        "weights": 2 * own,
        "gradients": 4 * own,
        "optimizer": 12 * own / (execution.data_par if execution.optimizer_sharding else 1),
        "activations": each * tokens_width * model.num_blocks / p * held,
    }


def simulate(
    model: Model,
    system: System,
    execution: Execution,
    levers: Levers | None = None,
    calibration: Calibration | None = None,
    stragglers: bool = True,
    check: bool = True,
) -> StepReport:
    """One step on average. ``stragglers``: slow machines are as likely as the calibration says, else there are none.

    Raises ValueError where heads or layers cannot be split, or (``check``) where the memory does not suffice.
    """
    levers, c = levers or Levers(), calibration or calibrated()
    execution.fits(model)
    if levers.lamb > 1:
        execution = replace(execution, batch_size=execution.batch_size * levers.lamb)
    need = memory(model, execution, levers)
    if check:
        check_memory(need, system)
    p, v, m = execution.pipeline_par, execution.pipeline_interleaving, execution.microbatches
    cost = costs(model, system, execution, levers, c)
    machines = max(1, execution.num_procs // system.machine_size)
    parts = closed_form(cost, p, v, m, levers.pp_overlap) | {
        "stragglers": straggling(cost, execution, machines, levers.pp_overlap, c.slow_share, c.slow_forward) * stragglers,
        "data_parallel": cost.data_parallel, "optimizer": cost.optimizer, "late": cost.late, "fixed": cost.fixed,
    }  # fmt: skip
    seconds = math.fsum(parts.values())
    tokens = execution.batch_size * model.seq_size
    work = model.flops(tokens, model.window if levers.sliding_window else 0)
    mfu = work / (seconds * execution.num_procs * system.tflops * 1e12)
    return StepReport(seconds, mfu, tokens / seconds, (p - 1) / (v * m), parts, need)


def gib(need: Mapping[str, float]) -> float:
    """The sum of a memory report in GiB."""
    return math.fsum(need.values()) / GIB
