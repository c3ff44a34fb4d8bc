"""One BitStack at many sizes against group quantisers, each at its own size; and what its parts are worth.

    python benchmarks/bitstack_study.py [--model pocket-2m] [--text FILE] [--sizes 32] [--seeds 3] [--sort ppl]

For every seed one stack is made and set to ``--sizes`` sizes between its smallest and its largest. Every rival, with groups
of 128 and 2, 3 or 4 bits, is compared with the stack set to the rival's size in bytes, all tensors of both models counted.
Variants without the activation-aware scaling, and with plain SVD instead of the decomposition of absolute values, are set
to six sizes of their own. Quality is that of the family's bench.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from broadsheet.core.models.walker import widened
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import paired_difference
from broadsheet.methods.weights.base import WeightMethod, size
from broadsheet.methods.weights.bench import Scored, Workload, base_model, calibration, evaluation, reference_of, score
from broadsheet.methods.weights.bitstack import BitStack, set_size, size_table
from broadsheet.methods.weights.gptq import GPTQ
from broadsheet.methods.weights.hqq import HQQ
from broadsheet.methods.weights.rtn import RTN

RIVALS: dict[str, type] = {"rtn": RTN, "hqq": HQQ, "gptq": GPTQ}
VARIANTS = {"no scaling": {"scale": False}, "plain SVD": {"avd": False}}


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.records = arguments, list[Record]()
        work = Workload(model=arguments.model, text=arguments.text, sessions=arguments.sessions, timing=False)
        self.work = replace(work, tasks=work.tasks[:1]) if arguments.text else work
        self.stack = BitStack(n_iter=arguments.levels, k="auto", sort=arguments.sort, sort_samples=16)

    def compressed(self, method: WeightMethod, seed: int) -> PreTrainedModel:
        model, tokenizer, _ = base_model(self.work)
        ids = calibration(replace(self.work, seed=seed), tokenizer) if method.calibrated else None
        return method.compress(copy.deepcopy(model), ids)

    @torch.inference_mode()
    def scored(self, model: PreTrainedModel) -> list[Scored]:
        with widened(model):
            return score(model, reference_of(self.work), evaluation(self.work, base_model(self.work)[1]))

    def add(self, method: str, seed: int, model: PreTrainedModel, results: list[Scored], **setting: object) -> None:
        """Bits, perplexity and KL of one model."""
        held = size(model)
        setting = {"bytes": held.bytes, "bits": round(held.bits, 4), **setting}
        loss, kl = statistics.fmean(r.nll for r in results), statistics.fmean(r.kl for r in results)
        self.record(method, "perplexity", math.exp(loss), seed, len(results), None, setting)
        self.record(method, "kl", kl, seed, len(results), None, setting)
        print(f"seed {seed} {method:<12} {held.bits:6.3f} bits  perplexity {math.exp(loss):9.4f}  KL {kl:.4f}", flush=True)

    def record(self, method: str, metric: str, value: float, seed: int, n: int, ci: object, setting: dict) -> None:
        _, _, mark = base_model(self.work)
        self.records.append(
            Record(
                paper="bitstack", method=method, bench="bitstack-study", metric=metric, value=value, ci=ci, n=n, seed=seed,
                model=f"{Path(self.work.model).name}@{mark}", setting=setting, time=now(), **provenance(),
            )  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self, seed: int) -> None:
        stack = self.compressed(self.stack, seed)
        steps = [step.bytes for step in size_table(stack)]
        for number in range(self.arguments.sizes):
            set_size(stack, steps[round(number * (len(steps) - 1) / (self.arguments.sizes - 1))])
            self.add("bitstack", seed, stack, self.scored(stack), part="curve")
        for name, rival in RIVALS.items():
            for bits in (2, 3, 4):
                other = self.compressed(rival(bits=bits, group_size=128), seed)
                set_size(stack, size(other).bytes)
                theirs, ours = self.scored(other), self.scored(stack)
                self.add(name, seed, other, theirs, part="rival", codes=bits)
                self.add("bitstack", seed, stack, ours, part="against", against=name, codes=bits)
                value, interval = paired_difference([r.nll for r in theirs], [r.nll for r in ours])
                setting = {"against": name, "codes": bits}
                self.record("bitstack", "loss_saved", value, seed, len(ours), interval, setting)
        for name, changes in VARIANTS.items():
            other = self.compressed(replace(self.stack, **changes), seed)
            steps = [step.bytes for step in size_table(other)]
            for number in range(6):
                set_size(other, steps[number * (len(steps) - 1) // 5])
                set_size(stack, size(other).bytes)
                theirs, ours = self.scored(other), self.scored(stack)
                self.add(name, seed, other, theirs, part="variant")
                value, interval = paired_difference([r.nll for r in theirs], [r.nll for r in ours])
                setting = {"against": name, "bytes": size(other).bytes, "bits": round(size(other).bits, 4)}
                self.record("bitstack", "loss_saved", value, seed, len(ours), interval, setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-2m", help="built-in name, folder or hub name")
    parser.add_argument("--text", default="", help="a text file; without it microworld sessions are used")
    parser.add_argument("--sessions", type=int, default=4, help="sessions a task, or pieces of the text")
    parser.add_argument("--sizes", type=int, default=32)
    parser.add_argument("--levels", type=int, default=6, help="blocks of every layer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sort", default="ppl", help="what orders the blocks: ppl (the paper's), loss")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    study = Study(arguments)
    target = Path(__file__).parent / "results" / f"bitstack_study.{Path(arguments.model).name}.records.json"
    for seed in range(arguments.seeds):
        study.run(seed)
        write_results(study.records, target)  # a kill loses at most the seed under way


if __name__ == "__main__":
    main()
