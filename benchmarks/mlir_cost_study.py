"""Cost models of StableHLO programs on XLA's CPU compiler: a corpus, models on two splits, and what they are good for.

    python benchmarks/mlir_cost_study.py corpus    # two to four programs a second; stopped and resumed at will
    python benchmarks/mlir_cost_study.py plans      # measures the candidates of the fusion study, as long
    python benchmarks/mlir_cost_study.py ensemble models order speed clock transfer fusion unroll remat report

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
from contextlib import suppress
from dataclasses import asdict
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci
from broadsheet.methods.estimates.mlir_cost_model import corpus as corpora
from broadsheet.methods.estimates.mlir_cost_model import order, unroll
from broadsheet.methods.estimates.mlir_cost_model.capture import capture, to_linalg
from broadsheet.methods.estimates.mlir_cost_model.cost_model import SHIPPED, CostModel, values
from broadsheet.methods.estimates.mlir_cost_model.features import count
from broadsheet.methods.estimates.mlir_cost_model.fusion import Choice, Decision, best_margin, recovered
from broadsheet.methods.estimates.mlir_cost_model.generate import whole
from broadsheet.methods.estimates.mlir_cost_model.labels import (
    TARGETS,
    compile_text,
    compiler_version,
    label_for,
    machine,
    measure,
    measure_net,
    peak_live_bytes,
    pin,
)  # fmt: skip
from broadsheet.methods.estimates.mlir_cost_model.models import Line, TokenModel, Trees
from broadsheet.methods.estimates.mlir_cost_model.networks import Training, run_networks
from broadsheet.methods.estimates.mlir_cost_model.recompute import Recompute
from broadsheet.methods.estimates.mlir_cost_model.stablehlo import parse
from broadsheet.methods.estimates.mlir_cost_model.templates import TEMPLATES

FOLDS, MEMBERS = 4, 3
NAMES = tuple(TARGETS)
COUNTS = ("kernels", "fusions", "instructions", "spills")
#: name -> how it is made. Networks on tokens are the paper's; the cost model that is shipped is "model"
MODELS: dict[str, Callable[[], Any]] = {
    "mean": lambda: Line(NAMES, "mean"),
    "flops": lambda: Line(NAMES, "flops"),
    "roofline": lambda: Line(NAMES, "roofline"),
    "additive": lambda: Line(NAMES, "additive"),
    "trees": lambda: Trees(NAMES),
    "trees_counts": lambda: Trees(NAMES, sized=False),
    "bag_ops": lambda: TokenModel(NAMES, "bag", "ops"),
    "bag": lambda: TokenModel(NAMES, "bag"),
    "conv_ops": lambda: TokenModel(NAMES, "conv", "ops"),
    "conv": lambda: TokenModel(NAMES, "conv"),
    "lstm": lambda: TokenModel(NAMES, "lstm"),
    "transformer": lambda: TokenModel(NAMES, "transformer", training=Training(epochs=4, batch=8, lr=1e-3)),
}
#: on all folds of templates; the others on the first alone, to keep the study within an hour or two of one core
EVERY_FOLD = ("mean", "flops", "roofline", "additive", "trees")
#: the whole and its networks alone
PARTS = ("graph", "model")
#: model of order pairs -> programs it learns from; what can only guess guesses from fewer
ORDER = {"trees": 3000, "bag_ops": 3000, "bag": 3000, "conv_ops": 6000, "conv": 6000}
RANDOM = ("mean", "flops", "additive", "trees")
#: rows of the second target to learn from
FEW = (20, 50, 100, 200)
ISAS = ("AVX2", "SSE4_2")
#: processors of the unrolling study: 16 and 32 vector registers
CPUS = ("haswell", "skylake-avx512")


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
        for name in ("trees", "bag"):
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
        counts = [count(self.programs[place]) for place in test]
        answers = model.answers([self.programs[place] for place in test])
        networks = model.parts(counts)[0].mean(0)
        return {
            "graph": model.scale.backward(networks).tolist(),
            "mix": model.mix.tolist(),
            "predictions": [[tuple(one.predictions[name]) for name in NAMES] for one in answers],
            "abstain": [one.abstain for one in answers],
        }  # fmt: skip

    def order(self) -> None:
        """Pairs of programs that differ in operands or order alone: which has the larger peak?"""
        for name, rows in ORDER.items():
            self.cell(f"order.{name}.{rows}", lambda name=name, rows=rows: self.fit_order(name, rows))

    def fit_order(self, name: str, count: int) -> dict[str, list[float]]:
        programs = [parse(text) for text in order.programs(np.random.default_rng(self.arguments.seed), count)]
        goal = np.array([[float(peak_live_bytes(program))] for program in programs])
        kinds = {"trees": lambda: Trees(("peak_bytes",))} | {
            f"{kind}{'_ops' * (scheme == 'ops')}": lambda kind=kind, scheme=scheme: TokenModel(
                ("peak_bytes",), kind, scheme, Training(epochs=16, lr=1e-3)
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
        codes = model.encode([count(function)])

        def least(do: Callable[[], Any]) -> float:
            """The lower quartile: other work on the machine only adds."""
            spent = []
            for _ in range(100):
                began = time.process_time()
                do()
                spent.append((time.process_time() - began) * 1e3)
            return float(np.quantile(spent[10:], 0.25))

        began = time.process_time()
        compiled = compile_text(text)
        measure([compiled])
        measured = (time.process_time() - began) * 1e3
        return {
            "operations": len(function), "parse": least(lambda: parse(text)),
            "network": least(lambda: run_networks(model.networks[:1], codes)),
            "answer": least(lambda: model.answer(function)), "compile_and_measure": measured,
            "compile": compiled.seconds * 1e3,
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

    def clock(self) -> None:
        """The same programs at five moments, each timed on end and all by turns: does the time depend on the moment?"""
        pin()
        self.cell("clock", self.measure_moments)

    def measure_moments(self) -> dict[str, list[list[list[float]]]]:
        """[moments, programs, (even rounds, odd rounds)]."""
        rows = self.rows[:: len(self.rows) // 40][:40]
        compiled = [compile_text(row["text"], inspect=False) for row in rows]
        found: dict[str, list[list[list[float]]]] = {"on_end": [], "by_turns": []}
        for _ in range(5):
            for name, timings in (
                ("on_end", [measure([one])[0] for one in compiled]), ("by_turns", measure(compiled)),
            ):  # fmt: skip
                found[name].append([[one.time, one.again] for one in timings])
            time.sleep(5)
        return found

    def transfer(self) -> None:
        """The first fold's model on another instruction set: as it is, adapted from a few rows, and trees from those alone.

        The few rows are of templates that the model knows, the test rows of those that it does not."""
        for isa in ISAS:
            self.cell(f"second.{isa}", lambda isa=isa: self.second_labels(isa))
            self.cell(f"transfer.{isa}", lambda isa=isa: self.fit_transfer(isa))

    def second_places(self) -> tuple[list[int], list[int]]:
        """Places of the rows to learn from and to test on."""
        test, rng = self.folds("template")[0], np.random.default_rng(self.arguments.seed)
        train = np.setdiff1d(np.arange(len(self.rows)), test)
        return rng.permutation(train)[: max(FEW)].tolist(), rng.permutation(test)[:200].tolist()

    def second_labels(self, isa: str) -> list[dict[str, Any]]:
        pin()
        few, test = self.second_places()
        places = few + test
        found: list[dict[str, Any]] = []
        for at in range(0, len(places), 100):
            found += label_for([self.rows[place]["text"] for place in places[at : at + 100]], isa)
        return found

    def fit_transfer(self, isa: str) -> dict[str, list[list[float]]]:
        few, test = self.second_places()
        labels = self.kept(f"second.{isa}")
        rows = [{**self.rows[place], "labels": one, "isa": isa} for place, one in zip(few + test, labels, strict=True)]
        model = CostModel.load(self.work / "fold0.safetensors")
        programs = [self.programs[place] for place in test]

        def said(one: CostModel) -> list[list[float]]:
            return [[answer.predictions[name].value for name in NAMES] for answer in one.answers(programs)]

        found = {"0": said(model), "truth": values(rows[len(few) :], NAMES)[0].tolist()}
        for number in FEW:
            found[str(number)] = said(model.adapt(rows[:number]))
            trees = Trees(NAMES).fit([self.programs[place] for place in few[:number]], values(rows[:number], NAMES)[0])
            found[f"trees.{number}"] = trees.predict(programs).tolist()
        return found

    def plans(self) -> None:
        """Times of the candidates of the fusion study."""
        pin()
        for start in range(0, self.arguments.graphs, 8):
            some = range(start, min(start + 8, self.arguments.graphs))
            numbers = [n for n in some if not self.path(f"fusion.{n}").exists()]
            for number, found in zip(numbers, self.measure_plans(numbers) if numbers else [], strict=True):
                self.cell(f"fusion.{number}", lambda found=found: found)

    def decision(self, number: int) -> Decision:
        """Of graph ``number``: a whole program of any template, on random sizes that the corpus has not (another stream)."""
        rng = np.random.default_rng([7, self.arguments.seed, number])
        while True:
            graph = whole(list(TEMPLATES)[int(rng.integers(len(TEMPLATES)))], rng)
            if 4 <= len(graph.nodes) <= 14:
                return Decision(graph, int(np.ceil(0.6 * len(graph.nodes))), most=12)

    def measure_plans(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Every segment of every plan of some graphs, and each graph as one segment, timed by turns."""
        texts: dict[tuple[int, int, int], str] = {}
        for number in numbers:
            graph = (decision := self.decision(number)).graph
            every = decision.texts() | {(0, len(graph.nodes)): capture(graph.function(), *graph.arguments())}
            texts |= {(number, a, b): text for (a, b), text in every.items()}
        timings, call = measure_net([compile_text(text, inspect=False) for text in texts.values()])
        found = dict(zip(texts, timings, strict=True))
        return [
            {"call": call, "times": [[a, b, one.time, one.again] for (n, a, b), one in found.items() if n == number]}
            for number in numbers
        ]

    def fusion(self) -> None:
        for number in range(self.arguments.graphs):
            self.cell(f"promise.{number}", lambda number=number: self.promises(number))
        margins = {fold: self.margins(fold) for fold in range(FOLDS)}
        for number in range(self.arguments.graphs):
            self.cell(f"choice.{number}", lambda number=number: self.choice(number, margins))

    def fold_of(self, template: str) -> int:
        return next(
            n for n, some in enumerate(corpora.folds(self.templates, FOLDS, self.arguments.seed)) if template in some
        )

    def promises(self, number: int) -> dict[str, Any]:
        """Microseconds of every segment, by each member of models that have not seen the graph's template ("model",
        "trees") and of such that have ("model_seen"); seconds of CPU that the ensemble needed a segment."""
        decision = self.decision(number)
        programs = [parse(text) for text in decision.texts().values()]
        away = self.fold_of(decision.graph.template)
        found, spent = {}, 0.0
        for name, fold in (("model_seen", (away + 1) % FOLDS), ("model", away)):
            began = time.process_time()
            found[name] = self.load(fold).member_values([count(one) for one in programs], "time").T.tolist()
            spent = (time.process_time() - began) / len(programs)
        found["trees"] = [[value] for value in self.time_trees(away).predict(programs)[:, 0].tolist()]
        return {"spans": list(decision.texts()), "promised": found, "seconds": spent}

    def case(self, number: int) -> tuple[Decision, dict[str, dict[Any, Any]], Any, Any, float]:
        """(decision, promises of every model, first and second measured times, cost of a call)."""
        decision, found, said = self.decision(number), self.kept(f"fusion.{number}"), self.kept(f"promise.{number}")
        first, second = ({(a, b): pair[which] for a, b, *pair in found["times"]} for which in (0, 1))
        spans = [tuple(span) for span in said["spans"]]
        promised = {name: dict(zip(spans, rows, strict=True)) for name, rows in said["promised"].items()}
        return decision, promised, first, second, found["call"]

    def margins(self, fold: int) -> dict[str, float]:
        """For graphs of the fold's templates, chosen on the graphs of all others; each was predicted by a model that did not
        know its own template."""
        every = [self.case(number) for number in range(self.arguments.graphs)]
        cases = [case for case in every if self.fold_of(case[0].graph.template) != fold]
        return {
            name: best_margin([(d, d.costs(said[name], call), d.costs(second, call)) for d, said, _, second, call in cases])
            for name in ("model", "model_seen", "trees")
        }

    def choice(self, number: int, margins: dict[int, dict[str, float]]) -> tuple[dict[str, Any], float, float]:
        """What everyone chooses ("_always": without a margin); the time of the graph as one segment; seconds a segment."""
        decision, promised, first, second, call = self.case(number)
        mine = margins[self.fold_of(decision.graph.template)]
        every = promised | {f"{name}_always": said for name, said in promised.items()}
        limits = mine | {f"{name}_always": 0.0 for name in promised}
        chosen = decision.decide(first, second, every, call, limits)
        seconds = self.kept(f"promise.{number}")["seconds"]
        return asdict(chosen), second[0, len(decision.graph.nodes)] + call, seconds

    def unroll(self) -> None:
        """How far to unroll loops, by predicted spills; two halves of the kinds, each predicted by the other's model."""
        pin()
        kernels = unroll.kernels()
        for cpu in CPUS:
            self.cell(f"unroll.{cpu}", lambda cpu=cpu: unroll.rows(kernels, cpu))
        self.cell("unroll.times", lambda: unroll.run_times([(one, n) for one in kernels for n in unroll.FACTORS]))
        self.cell("unroll.said", self.fit_unroll)

    def fit_unroll(self) -> dict[str, list[float]]:
        """Predicted spills of every row: by the model and by trees for the first processor; for the second by the first's
        model as it is, adapted from 200 rows, and by trees on those."""
        first, second = (self.kept(f"unroll.{cpu}") for cpu in CPUS)
        names = [row["template"] for row in first]
        programs = [parse(row["text"]) for row in first]
        found = {name: np.zeros(len(first)) for name in ("model", "trees", "as_it_is", "adapted", "few_trees")}
        for part in corpora.folds(names, 2, self.arguments.seed):
            test = np.flatnonzero(np.isin(names, part))
            train = np.setdiff1d(np.arange(len(names)), test)
            few = np.random.default_rng(self.arguments.seed).permutation(train)[:200]
            strange = [programs[place] for place in test]
            model = CostModel(("spills", "instructions"), members=3, seed=self.arguments.seed)
            model.fit([first[place] for place in train])
            adapted = model.adapt([second[place] for place in few])
            for name, one in (("model", model), ("as_it_is", model), ("adapted", adapted)):
                found[name][test] = [answer.predictions["spills"].value for answer in one.answers(strange)]
            for name, rows, places in (("trees", first, train), ("few_trees", second, few)):
                spills = np.array([[float(rows[place]["labels"]["spills"])] for place in places])
                trees = Trees(("spills",)).fit([programs[place] for place in places], spills)
                found[name][test] = trees.predict(strange)[:, 0]
        return {name: values.tolist() for name, values in found.items()}

    def remat(self) -> None:
        """What to store under half the bytes: graphs of the fusion study's stream, cut where most sets fit."""
        pin()
        numbers = range(1000, 1000 + self.arguments.remat)
        for start in range(0, len(numbers), 8):
            some = [number for number in numbers[start : start + 8] if not self.path(f"remat.{number}").exists()]
            for number, found in zip(some, self.measure_sets(some) if some else [], strict=True):
                self.cell(f"remat.{number}", lambda found=found: found)

    def stored(self, number: int) -> Recompute:
        rng = np.random.default_rng([7, self.arguments.seed, number])
        while True:
            graph = whole(list(TEMPLATES)[int(rng.integers(len(TEMPLATES)))], rng)
            found = []
            for cut in range(1, len(graph.nodes)):
                with suppress(ValueError):
                    found.append(Recompute(graph, cut))
            if found:
                return max(found, key=lambda one: len(one.sets))

    def measure_sets(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Measured and promised microseconds of every set, by turns and by the model that does not know the template."""
        decisions = {number: self.stored(number) for number in numbers}
        texts = {(number, *key): text for number, one in decisions.items() for key, text in one.texts().items()}
        timings, call = measure_net([compile_text(text, inspect=False) for text in texts.values()])
        measured = dict(zip(texts, timings, strict=True))
        rows = []
        for number, one in decisions.items():
            mine = {key[1:]: text for key, text in texts.items() if key[0] == number}
            programs = [count(parse(text)) for text in mine.values()]
            said = self.load(self.fold_of(one.graph.template)).member_values(programs, "time").mean(0)
            first, second = (
                one.costs({key: getattr(measured[number, *key], which) for key in mine}, call) for which in ("time", "again")
            )
            model = one.costs(dict(zip(mine, said, strict=True)), call)
            row = {"first": first, "second": second, "model": model, "flops": one.flops()}
            rows.append({name: values.tolist() for name, values in row.items()} | {"template": one.graph.template})
        return rows

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
        """Records of every step that has run; the others are named."""
        parts = (
            self.labels, self.moments, self.splits, self.intervals, self.pairs, self.milliseconds,
            *[partial(self.second, isa) for isa in ISAS], self.decisions, self.unrolling, self.recomputing,
        )  # fmt: skip
        for part in parts:
            before = len(self.records)
            try:
                part()
            except ValueError as error:
                del self.records[before:]
                print(error, file=sys.stderr)
        path = Path(__file__).parent / "results" / "mlir_cost_study.records.json"
        write_results(self.records, path)
        sample = [row for row in self.rows if row["number"] % 3 < 2][:2000]
        corpora.write(sample, path.with_name("mlir_cost_corpus.sample.jsonl.gz"))
        print(f"{len(self.records)} records in {path}")

    def labels(self) -> None:
        noise = np.array([row["labels"]["noise"] for row in self.rows])
        self.add("corpus", "rows", len(self.rows))
        self.add("corpus", "duplicates", len(self.rows) - len({row["id"] for row in self.rows}), n=len(self.rows))
        self.add("corpus", "noise_median", float(np.median(noise)), n=len(noise))
        self.add("corpus", "noisy_dropped", int((noise > 0.2).sum()), n=len(noise))
        self.add("corpus", "compile_ms_median", float(np.median([row["labels"]["compile_ms"] for row in self.rows])), "ms")

    def moments(self) -> None:
        """How far apart a time's two halves are; and at five moments its ratio to the moment's median program."""
        for name, moments in self.kept("clock").items():
            times = np.log(np.array(moments))
            repeat = np.abs(times[..., 0] - times[..., 1])
            ratio = times[..., 0] - np.median(times[..., 0], 1, keepdims=True)
            away = ratio.max(0) - ratio.min(0)
            self.add(name, "clock_repeat", float(np.exp(np.median(repeat)) - 1), n=repeat.size)
            for share in (0.5, 0.9, 1.0):
                between = float(np.exp(np.quantile(away, share)) - 1)
                self.add(name, "clock_between_moments", between, n=len(away), quantile=share)

    def pairs(self) -> None:
        for name, rows in ORDER.items():
            for kind, right in self.kept(f"order.{name}.{rows}").items():
                accuracy, interval = float(np.mean(right)), bootstrap_ci(right)
                self.add(name, "order_accuracy", accuracy, ci=interval, n=len(right), pairs=kind, programs=rows)

    def milliseconds(self) -> None:
        for name, value in self.kept("speed").items():
            self.add("model", f"speed_{name}", value, "" if name == "operations" else "ms")
        for name, found in self.kept("dialects").items():
            self.add("model", "abstain", float(np.mean(found)), n=len(found), on=name)

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
            ("template", [*EVERY_FOLD, *PARTS], range(FOLDS)), ("template-0", [*MODELS, *PARTS], range(1)),
            ("random-0", RANDOM, range(1)), ("shuffled-0", ("trees", "bag"), range(1)),
        ):  # fmt: skip
            parts = self.folds("random" if split == "random-0" else "template")
            places = np.concatenate([parts[fold] for fold in folds])
            for name in names:
                if name not in PARTS and not all(self.path(f"{split.split('-')[0]}.{name}.{n}").exists() for n in folds):
                    print(f"{split} {name} has not run", file=sys.stderr)
                    continue
                found = [self.said(split.split("-")[0], name, fold) for fold in folds]
                for column, target in enumerate(NAMES):
                    self.errors(split, name, target, np.concatenate(found)[:, column], places)
        for column, target in enumerate(NAMES):
            shares = [self.kept(f"ensemble.{fold}")["mix"][column] for fold in range(FOLDS)]
            self.add("model", "share_of_networks", float(np.mean(shares)), n=FOLDS, target=target)

    def said(self, split: str, name: str, fold: int) -> np.ndarray[Any, Any]:
        if name == "model":
            return np.array(self.kept(f"ensemble.{fold}")["predictions"])[:, :, 0]
        if name in PARTS:
            return np.array(self.kept(f"ensemble.{fold}")[name])
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

    def second(self, isa: str) -> None:
        """Errors on another instruction set: RMSE of log(1 + value), by rows learnt from."""
        found = {name: np.array(rows, dtype=float) for name, rows in self.kept(f"transfer.{isa}").items()}
        truth = found.pop("truth")
        for name, said in found.items():
            method, number = ("trees", name.split(".")[1]) if "." in name else ("model", name)
            for column, target in enumerate(NAMES):
                known = ~np.isnan(truth[:, column])
                a, b = said[known, column], truth[known, column]
                if target != "vector_util":
                    a, b = np.log1p(a), np.log1p(b)
                for metric, value in (("rmse", np.sqrt(((a - b) ** 2).mean())), ("spearman", spearmanr(a, b).statistic)):
                    value = float(np.nan_to_num(value))
                    self.add(method, f"transfer_{metric}", value, n=len(b), isa=isa, adapted=int(number), target=target)

    def decisions(self) -> None:
        """The fusion study: gain over the default on the mean, part of the oracle's, how often worse than the default."""
        count = self.arguments.graphs
        found = [self.kept(f"choice.{number}") for number in range(count)]
        choices = [Choice(**choice) for choice, _, _ in found]
        for name in ("default", "random", "bytes", "oracle", *choices[0].models):
            gains = [one.gain(name) for one in choices]
            if name in choices[0].models:
                moved = [float(one.models[name] != one.default) for one in choices]
                self.add(name, "moved", float(np.mean(moved)), n=count, study="fusion")
            self.add(name, "gain", float(np.mean(gains)), ci=bootstrap_ci(gains), n=count, study="fusion")
            self.add(name, "recovered", recovered(choices, name), n=count, study="fusion")
            worse = [float(one.worse(name)) for one in choices]
            self.add(name, "worse", float(np.mean(worse)), ci=bootstrap_ci(worse), n=count, study="fusion")
        for name in ("model", "trees"):
            promised, true, ranks = list[float](), list[float](), list[float]()
            for number in range(count):
                decision, said, _, second, call = self.case(number)
                costs, judged = decision.costs(said[name], call).mean(1), decision.costs(second, call)
                promised += np.log(costs[1:] / costs[0]).tolist()
                true += np.log(judged[1:] / judged[0]).tolist()
                ranks.append(float(np.nan_to_num(spearmanr(costs, judged).statistic)))
            error = float(np.median(np.abs(np.array(promised) - np.array(true))))
            self.add(name, "plan_ratio_error", error, n=len(true), study="fusion")
            self.add(name, "plan_spearman", float(np.mean(ranks)), n=count, study="fusion")
        away = [1 - choice.oracle / choice.default for choice in choices]
        self.add("oracle", "gain_median", float(np.median(away)), n=count, study="fusion")
        whole = [1 - one / choice.oracle for choice, (_, one, _) in zip(choices, found, strict=True)]
        self.add("whole", "gain_over_oracle", float(np.median(whole)), n=count, study="fusion")
        slower = [float(one < -0.1) for one in whole]
        self.add("whole", "slower_by_a_tenth", float(np.mean(slower)), ci=bootstrap_ci(slower), n=count, study="fusion")
        compile_ms = float(np.median([row["labels"]["compile_ms"] for row in self.rows]))
        share = [1e3 * spent / compile_ms for _, _, spent in found]
        self.add("model", "of_compile_time", float(np.median(share)), n=count, study="fusion")

    def unrolling(self) -> None:
        """Errors in spills, how often "does it spill" is right, and the gain of the rule in measured time over factor 1."""
        count = len(unroll.FACTORS)
        said = {name: np.array(values) for name, values in self.kept("unroll.said").items()}
        times = np.array(self.kept("unroll.times")).reshape(-1, count, 2)
        first, judged = times[..., 0], times[..., 1]
        kinds = [row["template"] for row in self.kept(f"unroll.{CPUS[0]}")][::count]
        for name, spills in said.items():
            cpu = CPUS[name not in ("model", "trees")]
            truth = np.array([float(row["labels"]["spills"]) for row in self.kept(f"unroll.{cpu}")])
            a, b = np.log1p(spills), np.log1p(truth)
            right = ((spills >= 0.5) == (truth > 0)).astype(float).tolist()
            groups = [kind for kind in kinds for _ in unroll.FACTORS]
            where = {"study": "unroll", "cpu": cpu}
            self.add(name, "spills_rmse", float(np.sqrt(((a - b) ** 2).mean())), n=len(b), **where)
            self.add(name, "spills_spearman", float(spearmanr(a, b).statistic), n=len(b), **where)
            self.add(name, "spilling_known", float(np.mean(right)), ci=bootstrap_ci(right, groups), n=len(b), **where)
        truth = np.array([float(row["labels"]["spills"]) for row in self.kept(f"unroll.{CPUS[0]}")])
        every = {name: said[name].reshape(-1, count) for name in ("model", "trees")} | {"compiled": truth.reshape(-1, count)}
        rows = np.arange(len(judged))
        chosen = {name: np.array([unroll.choose(row) for row in values]) for name, values in every.items()}
        chosen |= {f"always_{factor}": np.full(len(rows), place) for place, factor in enumerate(unroll.FACTORS)}
        chosen["oracle"] = first.argmin(1)
        random = judged.mean(1)
        for name, spent in [(name, judged[rows, place]) for name, place in chosen.items()] + [("random", random)]:
            gains = (1 - spent / judged[:, 0]).tolist()
            worse = [float(one < -0.02) for one in gains]
            where = {"study": "unroll", "cpu": CPUS[0]}
            self.add(name, "gain", float(np.mean(gains)), ci=bootstrap_ci(gains, kinds), n=len(gains), **where)
            self.add(name, "worse", float(np.mean(worse)), ci=bootstrap_ci(worse, kinds), n=len(gains), **where)

    def recomputing(self) -> None:
        """Gain over the default (drop the largest) in measured time, of sets that store at most half of the bytes."""
        found = [self.kept(f"remat.{number}") for number in range(1000, 1000 + self.arguments.remat)]
        groups = [one["template"] for one in found]
        for name in ("model", "flops", "oracle", "random"):
            gains = []
            for one in found:
                judged = np.array(one["second"])
                by = one["first"] if name == "oracle" else one.get(name)
                spent = judged.mean() if by is None else judged[int(np.argmin(by))]
                gains.append(float(1 - spent / judged[0]))
            worse = [float(one < -0.02) for one in gains]
            self.add(name, "gain", float(np.mean(gains)), ci=bootstrap_ci(gains, groups), n=len(gains), study="recompute")
            self.add(name, "worse", float(np.mean(worse)), ci=bootstrap_ci(worse, groups), n=len(gains), study="recompute")
        sets = float(np.mean([len(one["second"]) for one in found]))
        self.add("default", "candidates", sets, n=len(found), study="recompute")


STEPS = (
    "corpus",
    "plans",
    "models",
    "ensemble",
    "order",
    "speed",
    "clock",
    "transfer",
    "fusion",
    "unroll",
    "remat",
    "report",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--work", default="mlir_cost", help="folder of the corpus and of what the steps found")
    parser.add_argument("--rows", type=int, default=3181)
    parser.add_argument("--graphs", type=int, default=100, help="of the fusion study")
    parser.add_argument("--remat", type=int, default=40, help="graphs of the recomputation study")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments)
    for step in arguments.steps:
        getattr(study, step)()


if __name__ == "__main__":
    main()
