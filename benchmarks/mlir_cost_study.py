"""Cost models of StableHLO programs on XLA's CPU compiler: a corpus, models on two splits, and what they are good for.

    python benchmarks/mlir_cost_study.py corpus    # two to four programs a second; stopped and resumed at will
    python benchmarks/mlir_cost_study.py models ensemble order speed fusion report

What a step finds is kept in ``--work``, cell by cell, so that every step goes on where it was stopped; ``report`` writes the
records. Four folds of templates: a program is predicted by models that saw no program of its template ("template"); all
models ran on the first of them ("template-0"); for the leak, one fold of rows ("random-0"). Errors are of log(1 + value)
(of the share itself), because times and bytes span orders of magnitude; ``mape`` and ``exact`` are of the values. Times are
CPU time of one pinned core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.mlir_cost_model import corpus as corpora
from broadsheet.methods.estimates.mlir_cost_model import order
from broadsheet.methods.estimates.mlir_cost_model.capture import capture, to_linalg
from broadsheet.methods.estimates.mlir_cost_model.cost_model import SHIPPED, CostModel, values
from broadsheet.methods.estimates.mlir_cost_model.fusion import Choice, Decision, recovered
from broadsheet.methods.estimates.mlir_cost_model.generate import whole
from broadsheet.methods.estimates.mlir_cost_model.labels import (
    TARGETS,
    compile_text,
    compiler_version,
    dispatch_us,
    machine,
    peak_live_bytes,
    pin,
)  # fmt: skip
from broadsheet.methods.estimates.mlir_cost_model.models import Line, TokenModel, Training, Trees
from broadsheet.methods.estimates.mlir_cost_model.stablehlo import parse
from broadsheet.methods.estimates.mlir_cost_model.templates import TEMPLATES

FOLDS, MEMBERS = 4, 3
NAMES = tuple(TARGETS)
COUNTS = ("kernels", "fusions", "instructions", "spills")
#: name -> how it is made. "conv" and so on are the paper's: tokens alone; "conv_sizes" is one member of our ensemble
MODELS: dict[str, Callable[[], Any]] = {
    "mean": lambda: Line(NAMES, "mean"),
    "flops": lambda: Line(NAMES, "flops"),
    "roofline": lambda: Line(NAMES, "roofline"),
    "additive": lambda: Line(NAMES, "additive"),
    "trees": lambda: Trees(NAMES),
    "trees_counts": lambda: Trees(NAMES, sized=False),
    "bag_ops": lambda: TokenModel(NAMES, "bag", "ops", sizes=False),
    "bag": lambda: TokenModel(NAMES, "bag", sizes=False),
    "conv_ops": lambda: TokenModel(NAMES, "conv", "ops", sizes=False),
    "conv": lambda: TokenModel(NAMES, "conv", sizes=False),
    "conv_sizes": lambda: TokenModel(NAMES, "conv"),
    "lstm": lambda: TokenModel(NAMES, "lstm", sizes=False),
}  # fmt: skip
#: on all folds of templates; the others on the first alone, to keep the study within an hour or two of one core
EVERY_FOLD = ("mean", "flops", "roofline", "additive", "trees")
#: model of order pairs -> programs it learns from; what can only guess guesses from fewer
ORDER = {"trees": 3000, "bag_ops": 3000, "bag": 3000, "conv_ops": 6000, "conv": 6000}
RANDOM = ("mean", "flops", "additive", "trees", "conv_sizes")


class Study:
    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.work = arguments, Path(arguments.work)
        self.records = list[Record]()

    # --- what is kept between steps ---------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> list[corpora.Row]:
        return corpora.read(self.work / "corpus.jsonl")

    @cached_property
    def programs(self) -> list[Any]:
        return [parse(row["text"]) for row in self.rows]

    @cached_property
    def goal(self) -> np.ndarray[Any, Any]:
        return values(self.rows, NAMES)[0]

    @cached_property
    def templates(self) -> list[str]:
        return [row["template"] for row in self.rows]

    def folds(self, split: str) -> list[np.ndarray[Any, Any]]:
        """Places of the test rows of every fold."""
        if split == "template":
            parts = corpora.folds(self.templates, FOLDS, self.arguments.seed)
            return [np.flatnonzero(np.isin(self.templates, part)) for part in parts]
        return np.array_split(np.random.default_rng(self.arguments.seed).permutation(len(self.rows)), FOLDS)

    def cell(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this name, from the work folder if it is there."""
        path = self.path(name)
        if not path.exists():
            began = time.time()
            found = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
            path.with_suffix(".part").rename(path)
            print(f"{name}: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def path(self, name: str) -> Path:
        return self.work / "cells" / f"{name}.json"

    def kept(self, name: str) -> Any:
        """A cell that a step before has made. Raises ValueError where it has not."""

        def missing() -> Any:
            raise ValueError(f"{name} is missing in {self.work}; run its step first")

        return self.cell(name, missing)

    # --- steps ------------------------------------------------------------------------------------------------------

    def corpus(self) -> None:
        began, count = time.time(), 0

        def tick(done: int, of: int) -> None:
            nonlocal count
            count += 1
            if done % 50 == 0:
                print(f"{done} of {of}, {count / (time.time() - began):.1f} a second", file=sys.stderr, flush=True)

        corpora.build(self.work / "corpus.jsonl", self.arguments.rows, self.arguments.seed, tick)

    def models(self) -> None:
        """Predictions of every model on every fold; and of labels that were shuffled among the training rows."""
        for name in MODELS:
            for fold in range(FOLDS if name in EVERY_FOLD else 1):
                self.predictions("template", name, fold)
        for name in RANDOM:
            self.predictions("random", name, 0)
        for name in ("trees", "conv_sizes"):
            self.predictions("shuffled", name, 0)

    def predictions(self, split: str, name: str, fold: int) -> np.ndarray[Any, Any]:
        """[test rows, targets]."""

        def make() -> list[list[float]]:
            test = self.folds("template" if split == "shuffled" else split)[fold]
            train = np.setdiff1d(np.arange(len(self.rows)), test)
            goal = self.goal[train]
            if split == "shuffled":
                goal = np.random.default_rng(0).permutation(goal)
            # A quarter of the training templates says when a network stops: as new to it as those of the test.
            some = [self.templates[place] for place in train]
            held = next(corpora.folds(some, MEMBERS, self.arguments.seed + 1))
            validation = [place for place, template in enumerate(some) if template in held]
            model = MODELS[name]().fit([self.programs[place] for place in train], goal, validation)
            return model.predict([self.programs[place] for place in test]).tolist()

        return np.array(self.cell(f"{split}.{name}.{fold}", make))

    def ensemble(self) -> None:
        """The cost model of every fold, kept as a file; that of the first is the one that is shipped."""
        for fold, test in enumerate(self.folds("template")):
            self.cell(f"ensemble.{fold}", lambda fold=fold, test=test: self.fit_ensemble(fold, test))

    def fit_ensemble(self, fold: int, test: np.ndarray[Any, Any]) -> dict[str, Any]:
        train = np.setdiff1d(np.arange(len(self.rows)), test)

        def tick(member: int, epoch: int, loss: float) -> None:
            print(f"fold {fold} member {member} epoch {epoch}: {loss:.3f}", file=sys.stderr, flush=True)

        model = CostModel(NAMES, members=MEMBERS, seed=self.arguments.seed).fit([self.rows[place] for place in train], tick)
        model.card["held_out"] = sorted({self.templates[place] for place in test})
        model.save(self.work / f"fold{fold}.safetensors")
        if fold == 0:
            model.save(SHIPPED["stablehlo-cpu"])
        answers = model.answers([self.programs[place] for place in test])
        return {
            "predictions": [[tuple(one.predictions[name]) for name in NAMES] for one in answers],
            "abstain": [one.abstain for one in answers],
        }

    def order(self) -> None:
        """Pairs of programs that differ in operands or order alone: which has the larger peak?"""
        for name, count in ORDER.items():
            self.cell(f"order.{name}.{count}", lambda name=name, count=count: self.fit_order(name, count))

    def fit_order(self, name: str, count: int) -> dict[str, list[float]]:
        programs = [parse(text) for text in order.programs(np.random.default_rng(self.arguments.seed), count)]
        goal = np.array([[float(peak_live_bytes(program))] for program in programs])
        kinds = {"trees": lambda: Trees(("peak_bytes",))} | {
            f"{kind}{'_ops' * (scheme == 'ops')}": lambda kind=kind, scheme=scheme: TokenModel(
                ("peak_bytes",), kind, scheme, False, Training(epochs=16, lr=1e-3)
            )
            for kind in ("bag", "conv")
            for scheme in ("ops", "operands")
        }
        model = kinds[name]().fit(programs, goal, list(range(0, len(programs), 10)))
        found = {}
        for kind in ("operands", "order"):
            pairs = [order.pair(np.random.default_rng([1 + self.arguments.seed, n]), kind) for n in range(400)]
            more, less = (model.predict([parse(pair[side]) for pair in pairs])[:, 0] for side in (0, 1))
            found[kind] = np.where(np.isclose(more, less, rtol=1e-6), 0.5, more > less).astype(float).tolist()
        return found

    def speed(self) -> None:
        """Milliseconds of reading, predicting, compiling and measuring a program of about 200 operations; abstention."""
        self.cell("speed", self.time_prediction)
        self.cell("dialects", self.abstention)

    def time_prediction(self) -> dict[str, float]:
        torch.set_num_threads(1)
        model = CostModel.load(self.work / "fold0.safetensors")
        near = min(range(len(self.rows)), key=lambda place: abs(len(self.programs[place]) - 200))
        text, function = self.rows[near]["text"], self.programs[near]
        code = model.models[0].encode([function])
        whole, one = model.answer, model.models[0]

        def median(do: Callable[[], Any]) -> float:
            spent = []
            for _ in range(50):
                began = time.process_time()
                do()
                spent.append((time.process_time() - began) * 1e3)
            return float(np.median(spent[5:]))

        began = time.process_time()
        compiled = compile_text(text)
        compiled.measure()
        return {
            "operations": len(function), "tokens": len(code[0].numbers), "parse": median(lambda: parse(text)),
            "network": median(lambda: one.run(code)), "answer": median(lambda: whole(function)),
            "compile_and_measure": (time.process_time() - began) * 1e3, "compile": compiled.seconds * 1e3,
        }  # fmt: skip

    def abstention(self) -> dict[str, list[float]]:
        """How often the first fold's model abstains: on held-out templates, and on the same programs as linalg."""
        model = CostModel.load(self.work / "fold0.safetensors")
        test = self.folds("template")[0]
        own = model.answers([self.programs[place] for place in test])
        foreign = model.answers([to_linalg(self.rows[place]["text"]) for place in test[:200]])
        seen = np.setdiff1d(np.arange(len(self.rows)), test)[:: len(self.rows) // 400]
        known = model.answers([self.programs[place] for place in seen])
        answers = {"training": known, "held_out": own, "linalg": foreign}
        return {name: [float(bool(one.abstain)) for one in some] for name, some in answers.items()}

    def fusion(self) -> None:
        pin()
        for number in range(self.arguments.graphs):
            self.cell(f"fusion.{number}", lambda number=number: self.measure_plans(number))
        for number in range(self.arguments.graphs):
            self.cell(f"choice.{number}", lambda number=number: self.choices(number))

    def decision(self, number: int) -> Decision:
        """Of graph ``number``: a whole program of any template, on random sizes that the corpus has not (another stream)."""
        rng = np.random.default_rng([7, self.arguments.seed, number])
        while True:
            graph = whole(list(TEMPLATES)[int(rng.integers(len(TEMPLATES)))], rng)
            if 4 <= len(graph.nodes) <= 14:
                return Decision(graph, int(np.ceil(0.6 * len(graph.nodes))), most=12)

    def measure_plans(self, number: int) -> dict[str, Any]:
        """Every segment of every plan of one graph, and the graph as one segment, timed twice."""
        decision = self.decision(number)
        graph, call = decision.graph, dispatch_us(2)
        texts = decision.texts() | {(0, len(graph.nodes)): capture(graph.function(), *graph.arguments())}
        times = []
        for span, text in texts.items():
            timing = compile_text(text).measure()
            times.append([*span, max(timing.time - call, 0.1), max(timing.again - call, 0.1)])
        return {"call": call, "times": times}

    def choices(self, number: int) -> tuple[dict[str, Any], float, float]:
        """What everyone chooses; the time of the graph as one segment; seconds of CPU that the ensemble needed a segment.

        "model" and "trees" have not seen the graph's template, "model_seen" and "trees_seen" have (not the graph).
        """
        decision, found = self.decision(number), self.kept(f"fusion.{number}")
        first, second = ({(a, b): (x, y)[which] for a, b, x, y in found["times"]} for which in (0, 1))
        programs = {span: parse(text) for span, text in decision.texts().items()}
        template = decision.graph.template
        away = next(n for n, test in enumerate(self.folds("template")) if template in {self.templates[p] for p in test})
        predicted, spent = {}, 0.0
        for suffix, fold in (("", away), ("_seen", (away + 1) % FOLDS)):
            model, trees = self.load(fold), self.time_trees(fold)
            began = time.process_time()
            answers = model.answers(list(programs.values()))
            spent = (time.process_time() - began) / len(programs)
            predicted[f"model{suffix}"] = {
                span: one.predictions["time"].value for span, one in zip(programs, answers, strict=True)
            }
            predicted[f"trees{suffix}"] = dict(
                zip(programs, trees.predict(list(programs.values()))[:, 0].tolist(), strict=True)
            )
        choice = decision.decide(first, second, predicted, found["call"])
        return asdict(choice), second[0, len(decision.graph.nodes)] + found["call"], spent

    @cache  # noqa: B019  # one study a process
    def load(self, fold: int) -> CostModel:
        return CostModel.load(self.work / f"fold{fold}.safetensors")

    @cache  # noqa: B019
    def time_trees(self, fold: int) -> Trees:
        """Trees for the time alone, without the fold's templates."""
        train = np.setdiff1d(np.arange(len(self.rows)), self.folds("template")[fold])
        goal = self.goal[train][:, [NAMES.index("time")]]
        return Trees(("time",)).fit([self.programs[place] for place in train], goal)

    # --- records ----------------------------------------------------------------------------------------------------

    def report(self) -> None:
        noise = np.array([row["labels"]["noise"] for row in self.rows])
        self.add("corpus", "rows", len(self.rows))
        self.add("corpus", "duplicates", len(self.rows) - len({row["id"] for row in self.rows}), n=len(self.rows))
        self.add("corpus", "noise_median", float(np.median(noise)), n=len(noise))
        self.add("corpus", "noisy_dropped", int((noise > 0.2).sum()), n=len(noise))
        self.add("corpus", "compile_ms_median", float(np.median([row["labels"]["compile_ms"] for row in self.rows])), "ms")
        self.splits()
        self.intervals()
        for name, count in ORDER.items():
            for kind, right in self.kept(f"order.{name}.{count}").items():
                accuracy, interval = float(np.mean(right)), bootstrap_ci(right)
                self.add(name, "order_accuracy", accuracy, ci=interval, n=len(right), pairs=kind, programs=count)
        for name, value in self.kept("speed").items():
            self.add("model", f"speed_{name}", value, "" if name in ("operations", "tokens") else "ms")
        for name, found in self.kept("dialects").items():
            self.add("model", "abstain", float(np.mean(found)), n=len(found), on=name)
        self.decisions()
        path = Path(__file__).parent / "results" / "mlir_cost_study.records.json"
        write_results(self.records, path)
        sample = [row for row in self.rows if row["number"] % 3 < 2][:2000]
        corpora.write(sample, path.with_name("mlir_cost_corpus.sample.jsonl.gz"))
        print(f"{len(self.records)} records in {path}")

    def add(
        self, method: str, metric: str, value: float, unit: str = "", ci: tuple[float, float] | None = None, n: int = 1,
        **setting: Any,
    ) -> None:  # fmt: skip
        versions = provenance()["versions"] | {"compiler": compiler_version()}
        self.records.append(
            Record(
                paper="mlir-cost-model", method=method, bench="mlir-cost-study", metric=metric, value=float(value),
                unit=unit, ci=ci, n=n, seed=self.arguments.seed, model="generated", setting=setting, device=machine(),
                time=now(), parameters={"rows": len(self.rows), "folds": FOLDS, "members": MEMBERS}, versions=versions,
                revision=provenance()["revision"],
            )
        )  # fmt: skip

    def splits(self) -> None:
        """Errors of every model and target; the networks that ran on the first fold alone stand beside the others there."""
        for split, names, folds in (
            ("template", [*EVERY_FOLD, "model"], range(FOLDS)), ("template-0", [*MODELS, "model"], range(1)),
            ("random-0", RANDOM, range(1)), ("shuffled-0", ("trees", "conv_sizes"), range(1)),
        ):  # fmt: skip
            parts = self.folds("random" if split == "random-0" else "template")
            places = np.concatenate([parts[fold] for fold in folds])
            for name in names:
                if name != "model" and not all(self.path(f"{split.split('-')[0]}.{name}.{n}").exists() for n in folds):
                    print(f"{split} {name} has not run", file=sys.stderr)
                    continue
                found = [self.said(split.split("-")[0], name, fold) for fold in folds]
                for column, target in enumerate(NAMES):
                    self.errors(split, name, target, np.concatenate(found)[:, column], places)

    def said(self, split: str, name: str, fold: int) -> np.ndarray[Any, Any]:
        if name == "model":
            return np.array(self.kept(f"ensemble.{fold}")["predictions"])[:, :, 0]
        return self.predictions(split, name, fold)

    def errors(self, split: str, name: str, target: str, found: np.ndarray[Any, Any], places: np.ndarray[Any, Any]) -> None:
        truth = self.goal[places, NAMES.index(target)]
        known = ~np.isnan(truth)
        found, truth = found[known], truth[known]
        templates = np.array(self.templates)[places][known]
        a, b = (found, truth) if target == "vector_util" else (np.log1p(found), np.log1p(truth))
        rmse = float(np.sqrt(((a - b) ** 2).mean()))
        taus = [kendalltau(found[templates == one], truth[templates == one]).statistic for one in set(templates)]
        rows = {
            "mae": np.abs(found - truth).mean(), "rmse": rmse, "rmse_of_range": rmse / (b.max() - b.min()),
            "r2": 1 - ((a - b) ** 2).sum() / ((b - b.mean()) ** 2).sum(),
            "mape": (np.abs(found - truth)[truth > 0] / truth[truth > 0]).mean(),
            "spearman": spearmanr(found, truth).statistic, "kendall_same_template": np.nanmean(taus),
        }  # fmt: skip
        if target in COUNTS:
            rows["exact"] = (np.round(found) == truth).mean()
        for metric, value in rows.items():
            interval = None
            if metric in ("spearman", "rmse"):
                interval = self.by_template(metric, found, truth, a, b, templates)
            self.add(name, metric, float(np.nan_to_num(value)), ci=interval, n=len(truth), split=split, target=target)

    def by_template(self, metric: str, found: Any, truth: Any, a: Any, b: Any, templates: Any) -> tuple[float, float]:
        """95 % bootstrap over templates: programs of one are not independent."""
        rng, names = np.random.default_rng(0), sorted(set(templates))
        where = {name: np.flatnonzero(templates == name) for name in names}
        drawn = []
        for _ in range(200):
            chosen = np.concatenate([where[names[pick]] for pick in rng.integers(0, len(names), len(names))])
            if metric == "rmse":
                drawn.append(np.sqrt(((a[chosen] - b[chosen]) ** 2).mean()))
            else:
                drawn.append(np.nan_to_num(spearmanr(found[chosen], truth[chosen]).statistic))
        low, high = np.quantile(drawn, [0.025, 0.975])
        return float(low), float(high)

    def intervals(self) -> None:
        """How many labels of held-out templates are in the 90 % intervals, and how wide those are (high over low)."""
        for column, target in enumerate(NAMES):
            inside, width, groups = [], [], []
            for fold, places in enumerate(self.folds("template")):
                said = np.array(self.kept(f"ensemble.{fold}")["predictions"])[:, column]
                truth = self.goal[places, column]
                known = ~np.isnan(truth)
                slack = 1e-9 * (1 + np.abs(truth))
                inside += ((said[:, 1] - slack <= truth) & (truth <= said[:, 2] + slack))[known].astype(float).tolist()
                width += ((1 + said[:, 2]) / (1 + said[:, 1]))[known].tolist()
                groups += np.array(self.templates)[places][known].tolist()
            interval = bootstrap_ci(inside, groups)
            self.add("model", "coverage", float(np.mean(inside)), ci=interval, n=len(inside), target=target)
            self.add("model", "interval_factor", float(np.median(width)), n=len(width), target=target)

    def decisions(self) -> None:
        """The fusion study: gain over the default on the mean, part of the oracle's, how often worse than the default."""
        count = len(list((self.work / "cells").glob("choice.*.json")))
        found = [self.kept(f"choice.{number}") for number in range(count)]
        choices = [Choice(**choice) for choice, _, _ in found]
        for name in ("default", "random", "bytes", "oracle", *choices[0].models):
            gains = [one.gain(name) for one in choices]
            self.add(name, "gain", float(np.mean(gains)), ci=bootstrap_ci(gains), n=count, study="fusion")
            self.add(name, "recovered", recovered(choices, name), n=count, study="fusion")
            worse = [float(one.worse(name)) for one in choices]
            self.add(name, "worse", float(np.mean(worse)), ci=bootstrap_ci(worse), n=count, study="fusion")
        whole = [1 - one / choice.oracle for choice, (_, one, _) in zip(choices, found, strict=True)]
        self.add("whole", "gain_over_oracle", float(np.median(whole)), n=count, study="fusion")
        slower = [float(one < -0.1) for one in whole]
        self.add("whole", "slower_by_a_tenth", float(np.mean(slower)), ci=bootstrap_ci(slower), n=count, study="fusion")
        compile_ms = float(np.median([row["labels"]["compile_ms"] for row in self.rows]))
        share = [1e3 * spent / compile_ms for _, _, spent in found]
        self.add("model", "of_compile_time", float(np.median(share)), n=count, study="fusion")


STEPS = ("corpus", "models", "ensemble", "order", "speed", "fusion", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--work", default="mlir_cost", help="folder of the corpus and of what the steps found")
    parser.add_argument("--rows", type=int, default=3181)
    parser.add_argument("--graphs", type=int, default=100, help="of the fusion study")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments)
    for step in arguments.steps:
        getattr(study, step)()


if __name__ == "__main__":
    main()
