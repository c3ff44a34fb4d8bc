"""Offsite tuning with emulators of a small model: CRaSh against dropping layers evenly, at random, and a distilled emulator.

    python benchmarks/crash_study.py [--base FOLDER] [--seeds 3] [--steps 60] [--random 20] [--layers 12]

The base model is trained on the built-in world without the private tasks (`--base` keeps it, and resumes its training when
that was stopped; what the study has measured is kept beside it, and not measured again). For every private task and seed
each emulator's adapters (as many for all, as many steps, the learning rate chosen by the emulator's own loss) are tuned on
the client's sessions and plugged into the full model. Measured on other sessions: answers that are right, and loss, of the
full model before and after tuning all of it, of the emulator before and after, and of the full model with the adapters
plugged in. Then the losses on the straight line between the full model tuned as a whole and the plugged-in one.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.microworld.encoding import IGNORE, encode_session, padded
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.microworld.train import RECIPES, Recipe, Stage, train
from broadsheet.core.models import fingerprint, load
from broadsheet.core.models.walker import decoder_blocks
from broadsheet.core.records import Record, RecordStore, cell_key, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.weights.crash import (
    CRaSh,
    EmulatorPlan,
    barrier,
    extract_adapters,
    interpolate,
    plug_in,
    representations,
)
from broadsheet.methods.weights.crash.layers import adjacent

PRIVATE = ("lists", "functions", "many_shot")
RATES = (1e-3, 3e-3)
#: arguments that a stored cell does not depend on
UNEQUAL = ("base", "seeds", "random", "threads")
BATCH = 16
Batch = tuple[torch.Tensor, torch.Tensor]


def recipe(layers: int) -> Recipe:
    return Recipe(
        f"crash-{layers}", layers=layers, hidden=128, heads=2, kv_heads=2, positions=1024, without=(*PRIVATE, "vt", "facts"),
        stages=(*RECIPES["pocket-2m-mha"].stages[:1], Stage("short", 900, 2_400, 48, 192, arithmetic=2, rates=(1.0, 0.0))),
    )  # fmt: skip


def batches(task: str, count: int, seed: str, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """``count`` sessions of short contexts, padded, in batches."""
    rows = [encode_session(session, tokenizer) for session in make_sessions(task, count, 64, 4, seed)]
    return [padded(rows[first : first + BATCH], int(tokenizer.pad_token_id)) for first in range(0, count, BATCH)]


def losses(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    ids, labels = batch
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


@torch.inference_mode()
def evaluated(model: PreTrainedModel, work: Sequence[Batch]) -> tuple[float, list[float]]:
    """Mean loss, and for every session the share of its answer tokens that are right."""
    model.eval()
    total, right = [], []
    for ids, labels in work:
        logits, wanted = model(ids, use_cache=False).logits[:, :-1], labels[:, 1:]
        total.append(float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)))
        marked = wanted != IGNORE
        hit = ((logits.argmax(-1) == wanted) & marked).sum(1) / marked.sum(1).clamp(min=1)
        right += hit.tolist()
    return statistics.fmean(total), right


def tuned(model: PreTrainedModel, work: Sequence[Batch], steps: int, rate: float) -> PreTrainedModel:
    """``model`` after so many steps on what is trainable in it; cosine schedule, clipped at 1, no weight decay."""
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for step in range(steps):
        losses(model, work[step % len(work)]).backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return model.eval()


def distilled(plan: EmulatorPlan, model: PreTrainedModel, work: Sequence[Batch], steps: int) -> PreTrainedModel:
    """A shallow emulator whose frozen layers were trained to give what the model's do: loss + 30 x squared error of the
    states that reach the last adapters (the segment's output), as offsite-tuning has it."""
    emulator = plan.materialize(model)
    adapters = {plan.place(layer) for layer in plan.adapters}
    blocks = list(decoder_blocks(emulator).values())
    frozen = [p for place, block in enumerate(blocks) if place not in adapters for p in block.parameters()]
    trainable = [p for p in emulator.parameters() if p.requires_grad]
    for parameter in emulator.parameters():
        parameter.requires_grad_(False)
    for parameter in frozen:
        parameter.requires_grad_(True)
    last = plan.adapters[len(plan.adapters) - len(plan.adapters) // 2]  # the first of the outer adapters
    seen: dict[str, torch.Tensor] = {}
    full = list(decoder_blocks(model).values())

    def see(name: str):
        return lambda module, args: seen.__setitem__(name, args[0])

    handles = [
        blocks[plan.place(last)].register_forward_pre_hook(see("student")),
        full[last].register_forward_pre_hook(see("teacher")),
    ]
    optimiser = torch.optim.AdamW(frozen, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        batch = work[step % len(work)]
        with torch.no_grad():
            model(batch[0], use_cache=False)
        loss = losses(emulator, batch)
        (loss + 30 * F.mse_loss(seen["student"], seen["teacher"])).backward()
        torch.nn.utils.clip_grad_norm_(frozen, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    for handle in handles:
        handle.remove()
    for parameter in frozen:
        parameter.requires_grad_(False)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return emulator


@dataclass
class Study:
    arguments: argparse.Namespace
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    records: list[Record] = field(default_factory=list)

    def record(self, method: str, metric: str, value: float, seed: int, n: int = 1, ci=None, **setting: object) -> None:
        model = f"crash-{self.arguments.layers}@{fingerprint(self.model)}"
        self.records.append(
            Record(
                paper="crash", method=method, bench="crash-study", metric=metric, value=value, ci=ci, n=n, seed=seed,
                model=model, setting=setting, time=now(), **provenance(),
            )
        )  # fmt: skip
        where = " ".join(f"{key}={value}" for key, value in setting.items())
        print(f"seed {seed} {metric:<10} {method:<14} {where:<36} {value:.4f}", flush=True)

    def add(self, method: str, system: str, task: str, seed: int, model: PreTrainedModel, work: Sequence[Batch]) -> float:
        loss, right = evaluated(model, work)
        self.record(
            method, "accuracy", statistics.fmean(right), seed, len(right), bootstrap_ci(right), task=task, system=system
        )
        self.record(method, "loss", loss, seed, len(right), task=task, system=system)
        return loss

    def offsite(
        self, method: str, plan: EmulatorPlan, task: str, seed: int, emulator: PreTrainedModel | None = None
    ) -> PreTrainedModel:
        """The emulator's adapters tuned and plugged in; records of all three. The rate is chosen by the emulator's loss."""
        a = self.arguments
        private = batches(task, a.sessions, f"private/{seed}", self.tokenizer)
        validation = batches(task, 4 * BATCH, f"validation/{seed}", self.tokenizer)
        test = batches(task, 8 * BATCH, f"test/{seed}", self.tokenizer)
        start = emulator or plan.materialize(self.model)
        self.add(method, "emulator", task, seed, start, test)
        clock = time.perf_counter()
        made = [tuned(copy.deepcopy(start), private, a.steps, rate) for rate in RATES]
        seconds = (time.perf_counter() - clock) / len(RATES)
        best = min(made, key=lambda one: evaluated(one, validation)[0])
        self.add(method, "emulator tuned", task, seed, best, test)
        with tempfile.TemporaryDirectory() as folder:
            file = extract_adapters(best, Path(folder) / "adapters.safetensors")
            plugged = plug_in(copy.deepcopy(self.model), file)
            returned = file.stat().st_size
        self.add(method, "plug-in", task, seed, plugged, test)
        if seed == 0 and task == PRIVATE[0]:
            sent = sum(tensor.nbytes for tensor in {id(t): t for t in plan.compact(self.model).parameters()}.values())
            full = sum(tensor.nbytes for tensor in {id(t): t for t in self.model.parameters()}.values())
            for metric, value in (
                ("sent_bytes", sent),
                ("returned_bytes", returned),
                ("full_bytes", full),
                ("tuning_s", seconds),
            ):
                self.record(method, metric, value, seed)
        return plugged

    def run(self, task: str, seed: int) -> None:
        a = self.arguments
        test = batches(task, 8 * BATCH, f"test/{seed}", self.tokenizer)
        zero = self.add("full", "zero-shot", task, seed, self.model, test)
        private = batches(task, a.sessions, f"private/{seed}", self.tokenizer)
        validation = batches(task, 4 * BATCH, f"validation/{seed}", self.tokenizer)
        whole = [tuned(copy.deepcopy(self.model).requires_grad_(True), private, a.steps, rate) for rate in RATES]
        full = min(whole, key=lambda one: evaluated(one, validation)[0])
        best = self.add("full", "tuned", task, seed, full, test)

        ids = self.calibration(seed)
        shape = {"n_keep": a.keep, "n_adapters": 4}
        crash = CRaSh(**shape).plan(self.model, ids)
        if task == PRIVATE[0]:
            for layer, value in enumerate(adjacent(representations(self.model, ids))):
                self.record("full", "cka", value, seed, len(ids), layer=layer)
            print(f"clusters {crash.clusters} kept {crash.kept} adapters {crash.adapters}", flush=True)
        plugged = self.offsite("crash", crash, task, seed)
        self.offsite("crash, no sharing", CRaSh(**shape, share="none").plan(self.model, ids), task, seed)
        uniform = CRaSh(**shape, select="uniform", share="none").plan(self.model)
        self.offsite("uniform", uniform, task, seed)
        self.offsite("uniform, shared", CRaSh(**shape, select="uniform").plan(self.model), task, seed)
        general = [
            b
            for name in ("kv", "needle", "kv_and_rules")
            for b in batches(name, 8 * BATCH, f"general/{seed}", self.tokenizer)
        ]
        self.offsite("distilled", uniform, task, seed, distilled(uniform, self.model, general, 2 * a.steps))
        self.offsite("cka_drop", CRaSh(**shape, select="cka_drop").plan(self.model, ids), task, seed)
        line = [(alpha, evaluated(between, test)[0]) for alpha, between in interpolate(full, plugged)]
        for alpha, loss in line:
            self.record("crash", "line_loss", loss, seed, task=task, alpha=round(alpha, 4))
        share = barrier([loss for _, loss in line]) / max(zero - best, 1e-9)
        self.record("crash", "barrier", share, seed, task=task)

    def random(self, task: str, seed: int, draw: int) -> None:
        """An emulator of layers kept at random."""
        plan = CRaSh(n_keep=self.arguments.keep, n_adapters=4, select="random", seed=draw, adapters=None).plan(self.model)
        self.offsite(f"random {draw}", plan, task, seed)

    def kept(self, store: RecordStore, cell: str, measure: Callable[[], None]) -> None:
        """Measures a cell, or takes it from what an earlier run measured with these arguments."""
        key = cell_key(cell=cell, **{name: value for name, value in vars(self.arguments).items() if name not in UNEQUAL})
        if (found := store.cells().get(key)) is not None:
            self.records += found
            return
        before = len(self.records)
        measure()
        store.add(key, self.records[before:])

    def calibration(self, seed: int) -> torch.Tensor:
        """256 samples of the tasks that the owner knows, cut to one length."""
        rows = [
            encode_session(session, self.tokenizer)[0][:96]
            for name in ("kv", "needle", "kv_and_rules", "prefix_suffix")
            for session in make_sessions(name, 64, 128, 2, f"support/{seed}")
        ]
        return torch.tensor([row for row in rows if len(row) == 96])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(Path(__file__).parents[1] / "out" / "crash-base"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--keep", type=int, default=6, help="layers of an emulator")
    parser.add_argument("--sessions", type=int, default=256, help="private sessions a task")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--random", type=int, default=20, help="random sets of kept layers, on the first task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not (Path(arguments.base) / "config.json").is_file():
        for row in train(recipe(arguments.layers), arguments.base, every=50):
            print(
                f"{row['step']:>5}/{row['of']} {row['stage']:<10} loss {row['loss']:.3f} right {row['accuracy']:.3f}",
                flush=True,
            )
    model, tokenizer = load(arguments.base, dtype=torch.float32)
    study, store = Study(arguments, model, tokenizer), RecordStore(Path(arguments.base) / "study.jsonl")
    cells = [(f"{task} {seed}", partial(study.run, task, seed)) for seed in range(arguments.seeds) for task in PRIVATE]
    cells += [(f"random {draw}", partial(study.random, PRIVATE[0], 0, draw)) for draw in range(arguments.random)]
    for cell, measure in cells:
        study.kept(store, cell, measure)
        write_results(study.records, Path(__file__).parent / "results" / f"crash_study.{arguments.layers}.records.json")


if __name__ == "__main__":
    main()
