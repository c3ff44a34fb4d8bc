"""FlexSP (Wang et al., ASPLOS 2025, arXiv 2412.01523): groups of different sizes for sequences of different lengths.

A batch of sequence lengths, a cluster and a cost model (`cost`) go in; a plan (`plans`) comes out: micro-batches, the groups
of devices of each, and the sequences of each group. Long sequences get wide groups, because they need the memory; short ones
get narrow groups inside a node, whose all-to-alls are cheap.

    cost = SPCostModel.from_preset("gpt-7b-a100")
    found = plan(lengths, devices=64, memory_gb=30, cost=cost)          # a Plan: micro_batches, time, bound, gap, to_json()
    report = FlexSP(devices=64).estimate("lengths.txt", batches=25)     # every planner on the same batches
    for step in plan_batches(dataset, batch=512, devices=64): ...       # of a dataset with input_ids, for a trainer

`planners` has ours and the authors' baselines, `program` their mixed-integer program, `ulysses` the executor: real
sequence-parallel training over torch.distributed. All times are predicted by the cost model (simulated), never measured.

Deviations from the authors' code: groups of one device are allowed (``smallest=2`` is theirs); every plan's time is computed
on real lengths; sequences are never cut: `estimate` leaves out those above ``context``, and says how many.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from broadsheet.core.stats import bootstrap_ci

from ..base import Report, Table
from .cost import Fit, Sample, SPCostModel
from .lengths import corpora, corpus, padded, read_lengths
from .picture import picture
from .planners import Greedy, adaptive, in_chunks, static
from .plans import Group, Plan, Problem
from .program import Exhaustive, Milp

__all__ = [
    "Fit",
    "FlexSP",
    "Group",
    "Plan",
    "Problem",
    "SPCostModel",
    "Sample",
    "plan",
    "plan_batches",
]

Planner = Literal["static", "adaptive", "balanced", "greedy", "search", "milp", "exhaustive"]
PLANNERS: tuple[str, ...] = get_args(Planner)


def plan(
    lengths: Sequence[int],
    devices: int,
    memory_gb: float,
    cost: SPCostModel,
    planner: str = "search",
    micro_batches: int | str = "auto",
    time_limit: float = 5.0,
    seed: int = 0,
    context: int | None = None,
    smallest: int = 1,
    order: str = "sorted",
) -> Plan:
    """Plans one global batch.

    ``memory_gb``: GiB a device. ``planner``: "static" (one degree, the smallest that holds ``context`` or this batch's
    longest sequence), "adaptive" (the best single degree), "balanced" (one degree in each micro-batch, well filled),
    "greedy" (every set of groups), "search" (greedy and on from there), "milp" (``time_limit`` seconds a micro-batch),
    "exhaustive" (up to 12 sequences a micro-batch). ``context``, ``smallest``: see `Problem.of`; ``order``: see
    `Problem.chunks`.

    Raises ValueError for bad input, see `Problem.of`, and where nothing fits the memory.
    """
    if planner not in PLANNERS:
        raise ValueError(f"no planner '{planner}'; there are {', '.join(PLANNERS)}")
    problem = Problem.of(lengths, devices, memory_gb, cost, context, smallest)
    return planned(problem, planner, micro_batches, time_limit, seed, order, context)


def planned(
    problem: Problem,
    planner: str,
    micro_batches: int | str = "auto",
    time_limit: float = 5.0,
    seed: int = 0,
    order: str = "sorted",
    context: int | None = None,
) -> Plan:
    """`plan` of a problem that is stated already."""
    if planner == "static":
        return static(problem, problem.smallest_degree(context) if context else None)
    if planner == "adaptive":
        return adaptive(problem)
    solvers: dict[str, Callable[[], Any]] = {
        "balanced": lambda: Greedy(problem, alike=True),
        "greedy": lambda: Greedy(problem),
        "search": lambda: Greedy(problem, search=True),
        "milp": lambda: Milp(problem, time_limit, seed=seed),
        "exhaustive": lambda: Exhaustive(problem),
    }
    found = in_chunks(problem, micro_batches, order, planner, solvers[planner]())
    if planner == "search" and micro_batches == "auto":  # the baseline takes milliseconds: never be slower
        plain = adaptive(problem)
        if plain.time < found.time:
            return Plan(
                problem, plain.micro_batches, planner, found.seconds + plain.seconds, {**plain.detail, "from": "adaptive"}
            )
        return replace(found, seconds=found.seconds + plain.seconds)
    return found


def plan_batches(
    dataset: Any, batch: int, devices: int, memory_gb: float = 30, cost: SPCostModel | None = None, **options: Any
) -> Iterator[tuple[list[int], Plan]]:
    """For a trainer: the rows of each global batch, in the order of ``dataset``, and their plan.

    ``dataset``: any sequence of rows with ``input_ids``, or a list of lengths. Ids in the plan count within the batch: row
    ``rows[i]`` is sequence ``i``. A step is all micro-batches of a plan; the loss is to be averaged over the tokens of the
    whole batch (`ulysses.train_step` does). The last, smaller batch is kept. Plans are made one ahead of the step that asks,
    in a thread, so that planning costs a training loop no time.
    """
    from concurrent.futures import ThreadPoolExecutor

    if batch < 1:
        raise ValueError(f"a batch has 1 or more sequences, not {batch}")
    cost = cost or SPCostModel.from_preset("gpt-7b-a100")
    lengths = [row if isinstance(row, int) else len(row["input_ids"]) for row in dataset]
    options = {"context": max(lengths, default=1)} | options

    def solve(first: int) -> tuple[list[int], Plan]:
        rows = list(range(first, min(first + batch, len(lengths))))
        return rows, plan([lengths[row] for row in rows], devices, memory_gb, cost, **options)

    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        ahead = None
        for first in range(0, len(lengths), batch):
            current = ahead or pool.submit(solve, first)
            ahead = pool.submit(solve, first + batch) if first + batch < len(lengths) else None
            yield current.result()


# --- the estimate ---


@dataclass(frozen=True)
class Row:
    """One planner over all batches: predicted seconds a step, with its interval over batches."""

    planner: str
    plans: tuple[Plan, ...]

    @property
    def seconds(self) -> list[float]:
        """Predicted, of each batch."""
        return [plan.time / 1000 for plan in self.plans]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)


@dataclass(frozen=True)
class FlexSPReport(Report):
    """Every planner on the same batches. ``skipped``: sequences above the context, which no batch has."""

    rows: tuple[Row, ...]
    source: str
    skipped: int

    def row(self, planner: str) -> Row:
        for row in self.rows:
            if row.planner == planner:
                return row
        raise ValueError(f"'{planner}' was not asked for; there is {', '.join(row.planner for row in self.rows)}")

    def speedups(self, over: str, planner: str) -> list[float]:
        """Predicted time of ``over`` to that of ``planner``, batch by batch."""
        pairs = zip(self.row(over).plans, self.row(planner).plans, strict=True)
        return [theirs.time / ours.time for theirs, ours in pairs]

    def tables(self) -> list[Table]:
        base = self.row("adaptive" if any(row.planner == "adaptive" for row in self.rows) else self.rows[0].planner)
        rows = []
        for row in self.rows:
            ratios = self.speedups(base.planner, row.planner)
            low, high = bootstrap_ci(ratios) if len(ratios) > 1 else (ratios[0], ratios[0])

            def mean(what: str, plans: tuple[Plan, ...] = row.plans) -> float:
                return round(statistics.fmean(getattr(plan, what) for plan in plans), 3)

            rows.append(
                (
                    row.planner, round(row.mean, 3), round(statistics.fmean(ratios), 3), f"{low:.2f}-{high:.2f}",
                    round(min(ratios), 3), mean("gap"), mean("all_to_all"), mean("idle"),
                    round(statistics.fmean(len(plan.micro_batches) for plan in row.plans), 1),
                    round(statistics.median(plan.seconds for plan in row.plans), 3),
                )
            )  # fmt: skip
        first = self.rows[0].plans[0].problem
        bound = statistics.fmean(plan.bound for plan in self.rows[0].plans) / 1000
        left_out = f"; {self.skipped} longer sequences left out" if self.skipped else ""
        return [
            Table(
                f"{len(base.plans)} batches of {self.source} on {first.devices} devices (simulated)",
                (
                    "planner", "step s", "speedup", "95 %", "worst", "gap", "all to all", "idle", "micro batches",
                    "planning s",
                ),
                tuple(rows),
                f"simulated: all times of steps are the cost model's. speedup: over {base.planner}, mean, its interval and "
                f"the worst batch. gap: share of the time above a lower bound, {bound:.3f} s on average. all to all, idle: "
                "shares of device time. planning s: of a processor, median, measured here. Capacity "
                f"{first.capacity:,} tokens a device"
                f"{left_out}.",
            ),
            _groups(self.rows[-1].plans[0]),
        ]  # fmt: skip

    def files(self) -> dict[str, str]:
        """``plans.svg``: the first batch by every planner, devices against time."""
        return {"plans.svg": picture([row.plans[0] for row in self.rows])}

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "skipped": self.skipped,
            "simulated": True,
            "planners": {row.planner: [plan.to_json() for plan in row.plans] for row in self.rows},
        }


def _groups(plan: Plan) -> Table:
    """What one plan looks like: groups of one degree in a row."""
    rows = []
    lengths = plan.problem.lengths
    for number, groups in enumerate(plan.micro_batches):
        for degree in sorted({group.degree for group in groups}, reverse=True):
            alike = [group for group in groups if group.degree == degree]
            inside = [lengths[i] for group in alike for i in group.sequences]
            rows.append(
                (number, f"{len(alike)} x {degree}", len(inside), sum(inside), max(inside), min(inside),
                 round(max(map(plan.group_time, alike)) / 1000, 3))
            )  # fmt: skip
    columns = ("micro-batch", "groups", "sequences", "tokens", "longest", "shortest", "slowest s")
    return Table(f"the first batch by {plan.planner}", columns, tuple(rows), "simulated: times are the cost model's.")


@dataclass(frozen=True)
class FlexSP:
    """What training takes with each planner. ``cost``: a preset or a JSON file (`SPCostModel.to_json`); ``memory_gb``: GiB a
    device; ``context``: the longest sequence that the run accepts, in tokens; ``planner``: ours, compared last;
    ``time_limit``: seconds of the mixed-integer program a micro-batch; ``smallest``: the smallest group."""

    cost: str = "gpt-7b-a100"
    devices: int = 64
    memory_gb: float = 30.0
    context: int = 192_000
    planner: str = "search"
    micro_batches: int | str = "auto"
    time_limit: float = 5.0
    smallest: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.planner not in PLANNERS:
            raise ValueError(f"no planner '{self.planner}'; there are {', '.join(PLANNERS)}")
        if self.context < 2 * self.devices:
            raise ValueError(
                f"a context of {self.context} tokens is too short: lengths are padded to multiples of {2 * self.devices} "
                "tokens"
            )
        self.model.degrees(self.devices, self.smallest)

    @property
    def model(self) -> SPCostModel:
        return SPCostModel.load(self.cost)

    def batches(self, lengths: str | Sequence[int], batch: int, batches: int) -> tuple[list[list[int]], str, int]:
        """Global batches of padded lengths, what they are of, and how many sequences were too long.

        ``lengths``: the lengths, a file of them, or a corpus ("wikipedia") whose fitted generator draws them.
        """
        if batch < 1 or batches < 1:
            raise ValueError(f"batch and batches are 1 or more, not {batch} and {batches}")
        if isinstance(lengths, str) and lengths in corpora():
            # padding rounds up: what would pass the context then is drawn again
            given = corpus(lengths).draw(batch * batches, self.seed, self.context - self.context % (2 * self.devices))
            source = f"{batch} lengths like {lengths}'s"
        else:
            given = read_lengths(lengths) if isinstance(lengths, str) else list(lengths)
            source = f"{batch} of {len(given):,} lengths"
        known = padded(given, self.devices)
        kept = [length for length in known if length <= self.context][: batch * batches]
        if not kept:
            raise ValueError(f"all {len(known)} sequences are longer than the context of {self.context:,} tokens")
        return [kept[a : a + batch] for a in range(0, len(kept), batch)], source, sum(s > self.context for s in known)

    def estimate(
        self,
        lengths: str | Sequence[int] = "wikipedia",
        batch: int = 512,
        batches: int = 5,
        planners: Sequence[str] = ("static", "adaptive", "balanced", "greedy"),
        progress: Callable[[str, int, int], None] | None = None,
    ) -> FlexSPReport:
        """Plans the first ``batches`` global batches by each of ``planners`` and by ours."""
        groups, source, skipped = self.batches(lengths, batch, batches)
        cost, names = self.model, list(dict.fromkeys((*planners, self.planner)))
        for name in names:
            if name not in PLANNERS:
                raise ValueError(f"no planner '{name}'; there are {', '.join(PLANNERS)}")
        problems = [Problem.of(g, self.devices, self.memory_gb, cost, self.context, self.smallest) for g in groups]
        rows = []
        for name in names:
            plans = []
            for number, problem in enumerate(problems):
                if progress:
                    progress(name, number, len(problems))
                plans.append(planned(problem, name, self.micro_batches, self.time_limit, self.seed, context=self.context))
            rows.append(Row(name, tuple(plans)))
        return FlexSPReport(tuple(rows), source, skipped)


def warm_up() -> float:
    """Compiles the planners' loops, which the first plan would otherwise wait for; the seconds that took."""
    begun = time.perf_counter()
    cost = SPCostModel.from_preset("gpt-7b-a100")
    plan([512, 1024, 2048], 8, 40, cost)
    plan([512, 1024, 2048], 8, 40, cost, "greedy")
    return time.perf_counter() - begun
