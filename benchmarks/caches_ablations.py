"""Which part of GEAR, XQuant, KVMerger and Elastic Cache earns its keep: each paper's ablations on one model.

    python benchmarks/caches_ablations.py --model NAME_OR_FOLDER [--text FILE] [--study gear ...] [--scale 1.0]

The work is sessions of the microworld (the context is compressed once, then every question is asked of a fork of that
cache), or with ``--text`` documents of a text file. All variants see the same prompts. ``kl`` is the mean divergence from
the 16-bit full cache on the gold answer (or the document's continuation), in nats a token; intervals are 95 % bootstrap over
prompts. Records go to benchmarks/results/caches_ablations.<model>.records.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.microworld.sessions import Session
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import load, with_cache
from broadsheet.core.models.outliers import inject_input_outliers, inject_key_outliers
from broadsheet.core.models.rotary import find_rotary, rotate
from broadsheet.core.models.taps import attention_modules
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.caches.base import CacheMethod, Geometry, Unreachable
from broadsheet.methods.caches.bench import documents, likelihood
from broadsheet.methods.caches.elastic_cache import ElasticCache
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.gear import GEAR
from broadsheet.methods.caches.kivi import KIVI
from broadsheet.methods.caches.kvmerger import KVMerger, profile_model
from broadsheet.methods.caches.scbench import SessionRunner, encode
from broadsheet.methods.caches.xquant import XQuant

BATCH = 25


@dataclass
class Scores:
    """What one method did, prompt by prompt."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  #: bytes held over those of the 16-bit full cache

    def add(self, seed: int, ratio: float, **metrics: float) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)
        self.seeds.append(seed)
        self.ratios.append(ratio)


@dataclass
class Work:
    """Prompts for one model; ``seeds`` draws of ``prompts`` each."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seeds: int
    prompts: int
    tokens: int  #: of a context, or of a document's prefix

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.model.config)

    @property
    def about(self) -> dict[str, Any]:
        """What the prompts are, for the records."""
        return {"seeds": self.seeds, "tokens": self.tokens}

    def run(self, method: CacheMethod) -> Scores:
        raise NotImplementedError

    def contexts(self) -> list[tuple[str, torch.Tensor]]:
        """(task, ids [tokens]) of every prompt of seed 0."""
        raise NotImplementedError


@dataclass
class Text(Work):
    """Documents of a file: a prefix is cached, the continuation scored."""

    path: str = ""
    continuation: int = 64

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"text": Path(self.path).name, "continuation": self.continuation}

    @cached_property
    def rows(self) -> torch.Tensor:
        """Documents of all seeds in turn, [seeds * prompts, tokens + continuation]."""
        length = self.tokens + self.continuation
        seeds = range(self.seeds)
        return torch.cat([documents(self.path, self.tokenizer, length, self.prompts, seed) for seed in seeds])

    @cached_property
    def reference(self) -> list[torch.Tensor]:
        return [likelihood(Full(), self.model, ids, self.tokens)[1] for ids in self.rows.split(BATCH)]

    def run(self, method: CacheMethod) -> Scores:
        scores = Scores()
        for ids, true in zip(self.rows.split(BATCH), self.reference, strict=True):
            nll, ours, held = likelihood(method, self.model, ids, self.tokens)
            kl = (true.exp() * (true - ours)).sum(-1).mean(-1)
            ratio = held / len(ids) / self.geometry.full_bytes(self.tokens)
            for row in range(len(ids)):
                seed = len(scores.seeds) // self.prompts
                scores.add(seed, ratio, kl=float(kl[row]), nll=float(nll[row].mean()))
        return scores

    def contexts(self) -> list[tuple[str, torch.Tensor]]:
        return [("text", row[: self.tokens]) for row in self.rows[: self.prompts]]


@dataclass
class Sessions(Work):
    """Sessions of several tasks, ``prompts`` in all; every question goes to the same compressed context."""

    tasks: tuple[str, ...] = ("kv", "vt", "many_shot", "needle")
    turns: int = 2

    @property
    def about(self) -> dict[str, Any]:
        return super().about | {"tasks": self.tasks, "turns": self.turns}

    @cached_property
    def drawn(self) -> list[tuple[int, Session]]:
        """(seed, session), the sessions of a task together."""
        count = -(-self.prompts // len(self.tasks))
        return [
            (seed, replace(session, id=f"{seed}/{session.id}"))
            for task in self.tasks
            for seed in range(self.seeds)
            for session in make_sessions(task, count, self.tokens, self.turns, seed)
        ]

    def run(self, method: CacheMethod) -> Scores:
        scores = Scores()
        runner = SessionRunner(self.model, self.tokenizer, method, reference=Full())
        for first in range(0, len(self.drawn), BATCH):
            batch = self.drawn[first : first + BATCH]
            results = runner.run([session for _, session in batch], "multi-request")
            for seed, session in batch:
                turns = [result for result in results if result.session == session.id]
                scores.add(
                    seed,
                    turns[0].cache_bytes / self.geometry.full_bytes(turns[0].prompt_tokens),
                    kl=statistics.mean(turn.kl or 0.0 for turn in turns),
                    nll=statistics.mean(turn.gold_nll or 0.0 for turn in turns),
                    accuracy=statistics.mean(turn.score for turn in turns),
                    **{f"accuracy_{turn.turn + 1}": turn.score for turn in turns},
                )
        return scores

    def contexts(self) -> list[tuple[str, torch.Tensor]]:
        first = [session for seed, session in self.drawn if seed == 0]
        return [(session.task, torch.tensor(encode(session, self.tokenizer).context)) for session in first]


# --- the studies --------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """Runs the variants of one study and keeps their records."""

    paper: str
    name: str
    work: Work
    model_name: str
    setting: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def add(self, variant: str, metric: str, value: float, **fields: Any) -> None:
        setting = {"study": self.name, **self.work.about, **self.setting, **fields.pop("setting", {})}
        self.records.append(
            Record(
                paper=self.paper,
                method=variant,
                bench="caches-ablations",
                metric=metric,
                value=value,
                model=self.model_name,
                setting=setting,
                time=now(),
                **provenance(),
                **fields,
            )
        )

    def run(self, variant: str, method: CacheMethod) -> Scores:
        """Measures one variant on all prompts."""
        scores = self.scores[variant] = self.work.run(method)
        ratio = statistics.mean(scores.ratios)
        shown = [f"{self.name:<12} {variant:<26} {ratio:.3f} of full"]
        common = {"parameters": method.parameters, "setting": {"bytes_ratio": round(ratio, 4)}}
        self.add(variant, "bytes_ratio", ratio, unit="of full 16-bit cache", n=len(scores.ratios), **common)
        for metric, values in scores.metrics.items():
            mean, interval = statistics.mean(values), bootstrap_ci(values)
            unit = "nats per token" if metric in ("kl", "nll") else ""
            self.add(variant, metric, mean, ci=interval, n=len(values), unit=unit, **common)
            if not metric.startswith("accuracy_"):
                shown.append(f"{metric} {mean:.4f} [{interval[0]:.4f}, {interval[1]:.4f}]")
        print("  ".join(shown), self.setting, flush=True)
        return scores

    def compare(self, better: str, worse: str, metric: str = "kl", **more: Any) -> None:
        """How much higher ``metric`` is with ``worse``, paired by prompt; and in how many seeds it is higher."""
        ours, theirs = self.scores[better], self.scores[worse]
        values = ours.metrics[metric], theirs.metrics[metric]
        difference, interval = paired_difference(values[1], values[0])
        seeds = sorted(set(ours.seeds))
        means = [
            [statistics.mean(v for v, s in zip(part, ours.seeds, strict=True) if s == seed) for seed in seeds]
            for part in values
        ]
        won = sum(first < second for first, second in zip(*means, strict=True))
        setting = {"against": worse, "lower_in_seeds": won, **more}
        self.add(better, f"{metric}_saved", difference, ci=interval, n=len(values[0]), setting=setting)
        print(
            f"{self.name:<12} {metric}({worse}) - {metric}({better}) = {difference:+.4f} "
            f"[{interval[0]:+.4f}, {interval[1]:+.4f}], lower in {won} of {len(seeds)} seeds",
            flush=True,
        )


Begin = Callable[..., Study]


def gear(begin: Begin, work: Work) -> Iterator[Study]:
    """Parts at 2 bits: backbone, + low rank, + sparse, both; plain keys and with outlier channels.

    Also KIVI near GEAR's bytes (its settings by its own choice). The rank
    is the paper's 4, at most a sixteenth of head_dim; groups of 32, as prompts are short.
    """
    geometry = work.geometry
    rank = max(1, min(4, geometry.head_dim // 16))
    common: dict[str, Any] = {"bits": 2, "rank_prefill": rank, "rank_decode": min(2, rank)}
    common["group_size"] = math.gcd(32, geometry.kv_heads * geometry.head_dim)
    off: dict[str, Any] = {"sparsity": 0.0, "rank_prefill": 0, "rank_decode": 0}
    for factor in (1, 10):
        some = work if factor == 1 else replace(work, prompts=min(work.prompts, 24))
        study = begin("gear", some, outliers=factor, change=lambda m, f=factor: inject_key_outliers(m, f, pairs=1))
        study.run("backbone", GEAR(**{**common, **off}))
        study.run("+ low rank", GEAR(**common, sparsity=0.0))
        study.run("+ sparse", GEAR(**{**common, "rank_prefill": 0, "rank_decode": 0}))
        study.run("GEAR", GEAR(**common))
        for worse in ("+ low rank", "+ sparse", "backbone"):
            study.compare("GEAR", worse)
        study.compare("+ low rank", "backbone")
        _against_kivi(study, "GEAR")
        yield study


def xquant(begin: Begin, work: Work) -> Iterator[Study]:
    """Bits, with and without the cross-layer deltas; plain inputs and with outlier channels."""
    changes: dict[str, Any] = {
        "none": None,
        "same": lambda model: inject_input_outliers(model, 10, same=True),
        "other": lambda model: inject_input_outliers(model, 10),
    }
    for outliers, change in changes.items():
        study = begin("xquant", work, change, outliers=outliers)
        _layer_similarity(study)
        for bits in (8, 4, 3, 2):
            study.run(f"XQuant {bits}", XQuant(bits))
            if bits < 8:
                study.run(f"XQuant-CL {bits}", XQuant(bits, cross_layer=True))
                study.compare(f"XQuant-CL {bits}", f"XQuant {bits}")
        _against_kivi(study, "XQuant 4")
        yield study


def _against_kivi(study: Study, variant: str) -> None:
    """KIVI near the bytes of ``variant``; with more of them where it takes more for two bits, the paper's fewest.

    On prompts of mixed lengths its whole groups make the bytes differ; the record says by how much.
    """
    ratio, work = statistics.mean(study.scores[variant].ratios), study.work
    method: KIVI | None = None
    budget = ratio
    while method is None or min(method.bits, method.value_bits or method.bits) < 2:
        try:
            method = KIVI().at_budget(budget, work.tokens, work.geometry)
        except Unreachable as error:
            budget = error.least
        budget *= 1.02
    rival = f"KIVI for {variant}"
    scores = study.run(rival, method)
    study.compare(variant, rival, bytes_ratio=ratio, bytes_ratio_against=statistics.mean(scores.ratios))


@torch.inference_mode()
def _layer_similarity(study: Study) -> None:
    """Cosine between neighbouring layers: of their inputs X, and of their keys before the rotation."""
    work = study.work
    modules: list[Any] = attention_modules(work.model)
    inputs: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, __, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True)
        for module in modules
    ]
    found: dict[str, list[float]] = {"inputs X": [], "keys": []}
    for _, ids in work.contexts()[:20]:
        inputs.clear()
        work.model(ids[None])
        keys = [module.k_proj(x).unflatten(-1, (-1, work.geometry.head_dim)) for module, x in zip(modules, inputs)]
        for name, states in (("inputs X", inputs), ("keys", keys)):
            pairs = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
            found[name].append(float(torch.stack(pairs).mean()))
    for hook in hooks:
        hook.remove()
    for name, values in found.items():
        study.add(name, "cosine_next_layer", statistics.mean(values), ci=bootstrap_ci(values), n=len(values))
        print(f"{study.name:<12} cosine of {name} with the next layer's {statistics.mean(values):.3f}", flush=True)


def kvmerger(begin: Begin, work: Work) -> Iterator[Study]:
    """Pivot, kernel width, value mass, sets, protection, merge against evict at equal bytes; then the threshold."""
    variants: dict[str, dict[str, Any]] = {
        "KVMerger": {},
        "evict": {"merge": False},
        "random pivot": {"pivot": "random"},
        "random sets": {"sets": "random"},
        "nothing protected": {"recent": 0.0, "heavy": 0.0},
        "sigma 0.1": {"sigma": 0.1},
        "sigma 1": {"sigma": 1.0},
        "sigma 20": {"sigma": 20.0},
        "sigma fixed point": {"sigma": "fixed_point"},
        "value mass mean": {"value_mass": "mean"},
        "value mass paper": {"value_mass": "paper"},
    }
    for budget in (0.5, 0.2):
        study = begin("kvmerger", work, budget=budget)
        for name, options in variants.items():
            method = KVMerger(budget=0.5, **options).at_budget(budget, work.tokens, work.geometry)
            study.run(name, method)
            if name != "KVMerger":
                study.compare("KVMerger", name)
        yield study
    study = begin("kvmerger", work, mode="epsilon")
    for epsilon in (0.5, 0.75, 0.9, 0.95):
        study.run(f"epsilon {epsilon}", KVMerger(epsilon=epsilon, skip_layers=()))
    yield study


@torch.inference_mode()
def similarity(begin: Begin, work: Work) -> Iterator[Study]:
    """KVMerger's two findings: neighbouring keys are alike, values are not; how far a layer merges is the model's."""
    study = begin("kvmerger", work)
    study.name = "similarity"
    rotary: Any = find_rotary(work.model)
    contexts = work.contexts()
    steps = (1, 2, 4, 8, 16, 32, 64)
    found: dict[tuple[str, int], list[float]] = {}
    for _, ids in contexts:
        cache = Full().cache(work.model)
        work.model(ids[None], **with_cache(cache))
        states: dict[str, list[torch.Tensor]] = {"keys": [], "keys before rotation": [], "values": []}
        for layer in cache.layers:
            keys, values = layer.stored_keys, layer.stored_values
            cos, sin = rotary(values, torch.arange(keys.shape[2])[None])
            states["keys"].append(keys)
            states["keys before rotation"].append(rotate(keys, cos, sin, inverse=True))
            states["values"].append(values)
        for name, parts in states.items():
            stack = torch.stack(parts)
            for step in steps:
                cosine = torch.cosine_similarity(stack[..., step:, :], stack[..., :-step, :], dim=-1)
                found.setdefault((name, step), []).append(float(cosine.mean()))
    for (name, step), values in found.items():
        mean, interval = statistics.mean(values), bootstrap_ci(values)
        study.add(name, "cosine", mean, ci=interval, n=len(values), setting={"distance": step})
        if step in (1, 64):
            print(f"similarity   {name:<22} {step:>2} apart {mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]", flush=True)
    for epsilon in (0.5, 0.75, 0.9):
        profile = profile_model(work.model, [ids for _, ids in contexts], KVMerger(epsilon=epsilon))
        over_prompts = statistics.mean(s / m for s, m in zip(profile.layer_std, profile.layer_mean, strict=True))
        over_layers = statistics.stdev(profile.layer_mean) / statistics.mean(profile.layer_mean)
        setting: dict[str, Any] = {"epsilon": epsilon, "layer_mean": profile.layer_mean, "layer_std": profile.layer_std}
        common: dict[str, Any] = {"n": profile.prompts, "setting": setting}
        study.add("sets", "share_of_tokens", statistics.mean(profile.layer_mean), **common)
        study.add("sets", "variation_over_prompts", over_prompts, unit="std / mean", **common)
        study.add("sets", "variation_over_layers", over_layers, unit="std / mean", **common)
        print(
            f"similarity   epsilon {epsilon}: sets / tokens {[round(x, 3) for x in profile.layer_mean]}, "
            f"variation over prompts {over_prompts:.3f}, over layers {over_layers:.3f}",
            flush=True,
        )
    yield study


def elastic(begin: Begin, work: Work) -> Iterator[Study]:
    """Merge against evict, importance, who shares a selection, which slot goes while generating; ten seeds."""
    variants: dict[str, dict[str, Any]] = {
        "Elastic": {},
        "evict": {"merge": False},
        "importance mean": {"importance": "mean"},
        "importance moving average": {"importance": "moving_average"},
        "anchors by head": {"granularity": "head"},
        "discard recent": {"discard": "recent"},
        "discard frequency": {"discard": "frequency"},
        "discard none": {"discard": "none"},
        "keys before rotation": {"merge_keys": "pre_rope"},
        "values only": {"merge_keys": "none"},
        "mass bias": {"mass_bias": True},
    }
    many = replace(work, seeds=10, prompts=max(4, work.seeds * work.prompts // 10))
    for budget in (0.5, 0.2):
        study = begin("elastic-cache", many, budget=budget)
        for name, options in variants.items():
            study.run(name, ElasticCache(**options).at_budget(budget, work.tokens, work.geometry))
            if name != "Elastic":
                study.compare("Elastic", name)
        yield study


STUDIES = {"gear": gear, "xquant": xquant, "kvmerger": kvmerger, "similarity": similarity, "elastic": elastic}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket-2m")
    parser.add_argument("--text", default="", help="a text file; default: microworld sessions")
    parser.add_argument("--study", action="append", choices=list(STUDIES), help="default: all")
    parser.add_argument("--tokens", type=int, default=192, help="of a context")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print only")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    name = Path(asked.model).name
    counts = {"gear": (3, 70), "similarity": (1, 100)}  # seeds, prompts of each
    least = {"gear": 70}  # whatever the scale: differences between its parts are small
    records: list[Record] = []
    for key in asked.study or STUDIES:
        seeds, prompts = counts.get(key, (3, 12))
        prompts = max(least.get(key, 4), round(prompts * asked.scale))

        def work() -> Work:
            model, tokenizer = load(asked.model)
            common = (model, tokenizer, seeds, prompts, asked.tokens)  # noqa: B023 (called at once)
            return Text(*common, path=asked.text) if asked.text else Sessions(*common)

        def begin(paper: str, on: Work, change: Callable[[PreTrainedModel], Any] | None = None, **setting: Any) -> Study:
            if change is not None:  # a model of its own: the change is made in place
                on = replace(on, model=load(asked.model)[0])
                change(on.model)
            return Study(paper, paper, on, name, setting)

        start = time.perf_counter()
        for study in STUDIES[key](begin, work()):
            records += study.records
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
    if not asked.dry:
        target = Path(__file__).parent / "results" / f"caches_ablations.{name}.records.json"
        write_results(records, target)
        print(f"{len(records)} records in {target}")


if __name__ == "__main__":
    main()
