"""FlexSP's executor on this machine: gloo processes, groups of several sizes, a link between "nodes", a fitted cost model.

    python benchmarks/flexsp_executor.py [--parts exact link calibrate]

``exact``: loss, gradients and bytes of plans on 8 ranks beside one process. ``link``: SIMULATED link: 8 ranks on two nodes
of 4, and bytes between the nodes take time (the ranks sleep); whole training steps by wall clock. What is shown is the order
of the plans, not how fast a cluster is. ``calibrate``: alpha1, alpha2 and beta1 of a small Llama on one processor core, from
timed passes, and how well they predict passes that were not fitted on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from broadsheet.core.records import Record, now, provenance, read_json, write_results
from broadsheet.methods.estimates.flexsp import Plan, Problem, Sample, SPCostModel, planned
from broadsheet.methods.estimates.flexsp.planners import static
from broadsheet.methods.estimates.flexsp.ulysses import Groups, Link, Shard, Traffic, launch, pack, train_step

RANKS, NODE = 8, 4
HIDDEN, LAYERS, HEADS = 64, 2, 8
#: MiB/ms between nodes: so slow that the link, not this machine's cores, decides
SLOW = 2e-4


def llama(kv_heads: int, hidden: int = HIDDEN, layers: int = LAYERS, attention: str = "ulysses") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=kv_heads, max_position_embeddings=8192, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch() -> list[list[int]]:
    """A long tail: one sequence needs all ranks, most fit on one."""
    rng = np.random.default_rng(0)
    lengths = [900, 300, 180, 150, *rng.integers(8, 90, 24).tolist()]
    return [rng.integers(0, 97, length).tolist() for length in lengths]


def problem(kv_heads: int = HEADS, capacity: int = 128) -> Problem:
    """``capacity`` tokens a rank. Costs: of a link that is slow between nodes, beside which computation matters little."""
    preset = SPCostModel.from_preset("gpt-7b-a100")
    cost = replace(
        preset, alpha1=1e-4, alpha2=0.5, beta1=10.0, layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=kv_heads,
        itemsize=4, bandwidth={2: 100.0, 4: 100.0, 8: 2 * SLOW}, origin="assumed",
    )  # fmt: skip
    return Problem(tuple(map(len, batch())), RANKS, capacity, (1, 2, 4, 8), cost)


# --- exact ---


def exact_rank(rank: int, plan: Plan, kv_heads: int) -> tuple[float, float, Traffic]:
    """Loss, the largest difference of a gradient from one process's, traffic."""
    model, groups = llama(kv_heads), Groups()
    loss = train_step(model, plan, batch(), groups)
    other, predicted = llama(kv_heads, attention="sdpa"), sum(len(ids) - 1 for ids in batch())
    total = 0.0
    for ids in map(torch.tensor, batch()):
        one = F.cross_entropy(other(ids[None]).logits[0, :-1], ids[1:], reduction="sum") / predicted
        one.backward()
        total += float(one.detach())
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return abs(loss - total), max(float((a.grad - b.grad).abs().max()) for a, b in pairs), groups.traffic


def exact(study: Study) -> None:
    for kv_heads in (8, 2):
        plan = planned(problem(kv_heads, 360), "greedy")  # room for groups of several sizes
        found = launch(RANKS, exact_rank, plan, kv_heads, timeout=300)
        expected = [0.0] * RANKS
        for number in range(len(plan.micro_batches)):
            for ranks, group in plan.ranks(number):
                tokens = sum(plan.problem.lengths[i] for i in group.sequences)
                tokens += -tokens % group.degree
                for rank in ranks:
                    expected[rank] += plan.problem.cost.volume(tokens, group.degree) * 2**20 if group.degree > 1 else 0
        degrees = sorted({group.degree for groups in plan.micro_batches for group in groups})
        setting = {"kv_heads": kv_heads, "degrees": degrees, "micro_batches": len(plan.micro_batches)}
        study.record("ulysses", "loss_difference", max(row[0] for row in found), **setting)
        study.record("ulysses", "gradient_difference", max(row[1] for row in found), **setting)
        off = max(abs(row[2].buffers - want) for row, want in zip(found, expected, strict=True))
        study.record("ulysses", "bytes_off_formula", off, "B", **setting)
        study.record("ulysses", "bytes", statistics.fmean(row[2].buffers for row in found), "B", **setting)


# --- link ---


def link_rank(rank: int, plans: Sequence[Plan], steps: int) -> list[tuple[float, float, int]]:
    """Of each plan: median seconds of a step, of these on the link, bytes across nodes a step."""
    model, sequences, rows = llama(HEADS), batch(), []
    for plan in plans:
        groups = Groups(Link(NODE, SLOW))
        train_step(model, plan, sequences, groups)  # makes the groups
        groups.traffic, taken = Traffic(), []
        for _ in range(steps):
            dist.barrier()
            begun = time.perf_counter()
            train_step(model, plan, sequences, groups)
            taken.append(time.perf_counter() - begun)
        rows.append((statistics.median(taken), groups.traffic.waited / steps, groups.traffic.crossing // steps))
    return rows


def link(study: Study) -> None:
    given = problem()
    plans = {"static": static(given, 8), **{name: planned(given, name) for name in ("adaptive", "balanced", "search")}}
    found = launch(RANKS, link_rank, list(plans.values()), study.arguments.steps, timeout=600)
    for place, (name, plan) in enumerate(plans.items()):
        seconds = max(rows[place][0] for rows in found)
        setting = {"link": "simulated", "node": NODE, "bandwidth_mib_ms": SLOW}
        study.record(name, "step_seconds", seconds, "s", n=study.arguments.steps, **setting)
        study.record(name, "predicted_seconds", plan.time / 1000, "s", **setting)
        study.record(name, "link_seconds", max(rows[place][1] for rows in found), "s", **setting)
        study.record(name, "crossing_bytes", max(rows[place][2] for rows in found), "B", **setting)


# --- calibration ---


def timed_pass(model: LlamaForCausalLM, lengths: Sequence[int], repeats: int) -> float:
    """Processor milliseconds of forward and backward of packed sequences on one device: the least of ``repeats``."""
    rng = np.random.default_rng(0)
    part = pack([rng.integers(0, 97, length).tolist() for length in lengths], 1, 0)
    shard = Shard(range(1), None, part.bounds, Traffic())
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        logits = model(part.ids[None], position_ids=part.positions[None], use_cache=False, ulysses=shard).logits[0]
        F.cross_entropy(logits, part.labels, ignore_index=-100).backward()
        taken.append(1000 * (time.process_time() - begun))
    return min(taken)


def calibrate(study: Study) -> None:
    torch.set_num_threads(1)
    model, rng = llama(HEADS, 256, 4), np.random.default_rng(0)
    drawn = []
    for count in range(40):
        longest = int(rng.choice([256, 1024, 3072]))
        drawn.append(rng.integers(64, longest, rng.integers(1, max(2, 4096 // longest))).tolist())
        drawn[-1] = drawn[-1] if count % 4 else [longest]
    timed_pass(model, drawn[0], 2)
    samples = []
    for number, lengths in enumerate(drawn):
        samples.append(Sample(tuple(lengths), 1, timed_pass(model, lengths, study.arguments.repeats)))
        print(f"  {number + 1} of {len(drawn)}: {sum(lengths)} tokens, {samples[-1].ms:.1f} ms", flush=True)
    preset = SPCostModel.from_preset("gpt-7b-a100")
    fit = preset.fit(samples[::2])
    held = samples[1::2]
    predicted = np.array([fit.model.group_time(one.lengths, 1) for one in held])
    measured = np.array([one.ms for one in held])
    setting = {
        "model": "llama 256x4",
        "cost": {k: v for k, v in asdict(fit.model).items() if k in ("alpha1", "alpha2", "beta1")},
    }
    study.record("cost model", "r2", fit.r2, n=len(samples) - len(held), **setting)
    held_out = 1 - ((measured - predicted) ** 2).sum() / ((measured - measured.mean()) ** 2).sum()
    study.record("cost model", "held_out_r2", float(held_out), n=len(held), **setting)
    study.record("cost model", "held_out_error", float(np.median(abs(predicted / measured - 1))), n=len(held), **setting)
    study.record("cost model", "held_out_spearman", float(spearmanr(predicted, measured).statistic), n=len(held), **setting)


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.records, self.part = arguments, list[Record](), ""

    def record(self, method: str, metric: str, value: float, unit: str = "", n: int = 1, **setting: Any) -> None:
        model = setting.pop("model", f"llama {HIDDEN}x{LAYERS}")
        self.records.append(
            Record(
                paper="flexsp", method=method, bench="flexsp-executor", metric=metric, value=float(value), unit=unit, n=n,
                model=model, parameters={"ranks": RANKS}, setting={"part": self.part, **setting}, time=now(), **provenance(),
            )
        )  # fmt: skip
        print(f"{self.part:<10} {method:<10} {metric:<22} {value:.6g} {unit} {setting}", flush=True)


PARTS: dict[str, Callable[[Study], None]] = {"exact": exact, "link": link, "calibrate": calibrate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each plan on the simulated link")
    parser.add_argument("--repeats", type=int, default=5, help="passes of which the fastest counts, in calibrate")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "flexsp_executor.records.json"))
    study = Study(arguments := parser.parse_args())
    for part in arguments.parts:
        study.part = part
        PARTS[part](study)
        kept = [r for r in read_json(arguments.out) if r.setting["part"] != part] if Path(arguments.out).exists() else []
        write_results(kept + [r for r in study.records if r.setting["part"] == part], arguments.out)


if __name__ == "__main__":
    main()
