"""Networks and trees with intervals: fit, predict, rank, adapt, save, load.

A few networks on the program's graph, each trained without a part of the *templates*, and gradient-boosted trees on its
counts. Every part of the templates also has trees that were trained without it. What these networks and trees say of the
templates that they never saw decides twice: how much of each target the networks and how much the trees are believed (the
stacking of Wolpert 1992, one number a target), and how wide the intervals are (their half width is the 90 % quantile of
those errors: split conformal prediction, as in the CV+ of Barber et al. 2021 with groups as folds; every template has the
same weight). The trees that answer are then trained on all templates. When to abstain: where too many words are unknown,
where the networks differ more than one that did not know the template differed from the others, or where the program is
longer than what was learnt from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .corpus import Row, folds
from .features import Counts, Features, TotalScale, count
from .forest import Forest
from .labels import TARGETS, machine
from .models import Array, Scale
from .networks import GraphNetwork, Training, fit_network, run_networks
from .nodes import EncodedGraph, NodeVocabulary
from .stablehlo import Function, parse

SHIPPED = {"stablehlo-cpu": Path(__file__).parent / "stablehlo-cpu.safetensors"}
FOREST = tuple(one.name for one in fields(Forest))
#: time labels whose repetition differs by more are left out
NOISE_LIMIT = 0.2


class Prediction(NamedTuple):
    """In the target's unit; ``low`` and ``high`` hold 90 % of new kinds of programs."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answer:
    """``abstain``: why the values should not be trusted; empty where they should. ``unknown``: share of unknown tokens;
    ``spread``: how much the members differ, in standard deviations of the target (the worst target's)."""

    predictions: dict[str, Prediction]
    abstain: str
    unknown: float
    spread: float
    tokens: int


def values(rows: Sequence[Row], targets: Sequence[str], limit: float = NOISE_LIMIT) -> tuple[Array, int]:
    """(labels [rows, targets] with NaN for what is missing, how many times were left out as noisy)."""
    found = np.array(
        [[np.nan if (v := row["labels"].get(name)) is None else float(v) for name in targets] for row in rows], dtype=float
    )
    noisy = np.array([row["labels"].get("noise", 0.0) > limit for row in rows], dtype=bool)
    if "time" in targets:
        found[noisy, list(targets).index("time")] = np.nan
    return found, int(noisy.sum())


@dataclass
class CostModel:
    """``members``: networks, at least 2 and at most as many as templates; ``trees``: boosting iterations of each target.
    Raises ValueError for settings out of range."""

    targets: tuple[str, ...] = tuple(TARGETS)
    members: int = 3
    trees: int = 150
    level: float = 0.9
    training: Training = field(default_factory=lambda: Training(lr=1e-3))
    seed: int = 0
    networks: list[GraphNetwork] = field(default_factory=list, repr=False)
    forest: Forest | None = field(default=None, repr=False)
    vocabulary: NodeVocabulary = field(default_factory=lambda: NodeVocabulary((), 0), repr=False)
    features: Features = field(default_factory=lambda: Features(()), repr=False)
    totals: TotalScale = field(default_factory=lambda: TotalScale(()), repr=False)
    scale: Scale = field(default_factory=lambda: Scale((), (), ()), repr=False)
    mix: Array = field(default_factory=lambda: np.zeros(0), repr=False)  #: share of the networks [targets]
    half: Array = field(default_factory=lambda: np.zeros(0), repr=False)  #: half widths, standardised [targets]
    limits: dict[str, float] = field(default_factory=dict)  #: of unknown words and spread
    card: dict[str, Any] = field(default_factory=dict, repr=False)  #: what it was trained on

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(TARGETS):
            raise ValueError(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
        if self.members < 2 or not 0 < self.level < 1:
            raise ValueError(f"members are at least 2 and the level is between 0 and 1; got {self.members}, {self.level}")

    def fit(self, rows: Sequence[Row], tick: Callable[[int, int, float], None] | None = None) -> CostModel:
        """``tick(member, epoch, validation loss)``. Raises ValueError for fewer templates than members."""
        names = [row["template"] for row in rows]
        if len(set(names)) < self.members:
            raise ValueError(f"{self.members} members need as many templates to leave out; the rows have {len(set(names))}")
        programs = [count(parse(row["text"])) for row in rows]
        goal, noisy = values(rows, self.targets)
        parts = list(folds(names, self.members, self.seed))
        part_of = {name: part for part, some in enumerate(parts) for name in some}
        # One vocabulary for all, of words from at least two parts: every member has learnt from each of them.
        self.vocabulary = NodeVocabulary.build(programs, [part_of[name] for name in names])
        self.features, self.scale = Features.build(programs), Scale.fit(self.targets, goal)
        self.totals = TotalScale.fit(np.array([one.totals for one in programs]), goal)
        codes, x, y = self.encode(programs), self.features(programs), self.scale.forward(goal)
        inputs = np.array([one.totals for one in codes], float)
        self.networks = []
        strange = np.zeros((2, *y.shape))  # what the network and the trees say that were trained without the row's template
        member_of = np.array([part_of[name] for name in names])
        for member in range(self.members):
            out = member_of == member
            torch.manual_seed(self.training.seed + member)
            network = GraphNetwork(len(self.vocabulary), len(self.targets), self.totals.width)
            network.head.start(inputs[~out], y[~out])
            training = replace(self.training, seed=self.training.seed + member)
            say = (lambda epoch, loss, m=member: tick(m, epoch, loss)) if tick else None
            fit_network(network, codes, y, np.flatnonzero(out).tolist(), training, say)
            self.networks.append(network)
            strange[1, out] = Forest.fit(x[~out], y[~out], self.trees, self.seed)(x[out])
        said = run_networks(self.networks, codes)
        strange[0] = said[member_of, np.arange(len(names))]
        weight = np.array([1 / names.count(name) for name in names])
        self._calibrate(strange[0], strange[1], y, weight)
        others = (said.sum(0) - strange[0]) / (self.members - 1)
        self.limits = {
            "spread": float(np.quantile(np.abs(strange[0] - others).max(1), 0.95)),
            "unknown": max(0.02, float(np.quantile([one.unknown for one in codes], 0.99))),
        }
        self.forest = Forest.fit(x, y, self.trees, self.seed)
        self.card = {
            "rows": len(rows), "noisy_times": noisy, "templates": sorted(set(names)),
            **{key: rows[0].get(key, "") for key in ("dialect", "machine", "compiler", "isa")},
        }  # fmt: skip
        return self

    def encode(self, programs: Sequence[Counts]) -> list[EncodedGraph]:
        totals = self.totals(np.array([one.totals for one in programs]))
        return [self.vocabulary.encode(one, row) for one, row in zip(programs, totals, strict=True)]

    def _calibrate(self, network: Array, forest: Array, y: Array, weight: Array) -> None:
        """``mix`` and ``half`` from predictions of rows of unknown templates, all [rows, targets]; ``weight`` [rows]."""
        apart = np.where(np.isnan(y), 0, network - forest) * weight[:, None]
        share = (apart * np.nan_to_num(y - forest)).sum(0) / np.maximum((apart * (network - forest)).sum(0), 1e-9)
        self.mix = np.clip(share, 0, 1)  # least squares of y on mix * network + (1 - mix) * forest
        errors = np.abs(self.mix * network + (1 - self.mix) * forest - y)
        self.half = np.array([_quantile(column, weight, self.level) for column in errors.T])

    def parts(self, programs: Sequence[Counts]) -> tuple[Array, Array, list[EncodedGraph]]:
        """(what every network says [members, programs, targets], what the trees say [programs, targets], both standardised;
        the programs encoded). Raises ValueError where nothing is trained."""
        if self.forest is None:
            raise ValueError("the model is not trained; load one (CostModel.load) or fit it")
        codes = self.encode(programs)
        return run_networks(self.networks, codes), self.forest(self.features(programs)), codes

    def member_values(self, programs: Sequence[Counts], target: str) -> Array:
        """What every member says of one target, in its unit [members, programs]: their differences say how sure they are."""
        networks, forest, _ = self.parts(programs)
        said = self.mix * networks + (1 - self.mix) * forest
        return np.stack([self.scale.backward(one)[:, self.targets.index(target)] for one in said])

    def answer(self, program: str | Function) -> Answer:
        """Everything about one program. Raises ValueError for text that cannot be read (with its line)."""
        return self.answers([program])[0]

    def answers(self, programs: Sequence[str | Function]) -> list[Answer]:
        networks, forest, codes = self.parts([count(parse(one) if isinstance(one, str) else one) for one in programs])
        mean, spread = self.mix * networks.mean(0) + (1 - self.mix) * forest, networks.std(0).max(1)
        value, low, high = (self.scale.backward(mean + sign * self.half) for sign in (0, -1, 1))
        answers = []
        for place, code in enumerate(codes):
            row = {
                name: Prediction(*(float(part[place, column]) for part in (value, low, high)))
                for column, name in enumerate(self.targets)
            }
            reason = self._reason(code.unknown, float(spread[place]), code.cut)
            answers.append(Answer(row, reason, code.unknown, float(spread[place]), code.length + code.cut))
        return answers

    def _reason(self, unknown: float, spread: float, cut: int) -> str:
        if unknown > self.limits["unknown"]:
            return f"{unknown:.0%} of its words are unknown to the model (limit {self.limits['unknown']:.0%})"
        if cut:
            return f"the program is {cut} operations longer than what the model has seen"
        if spread > self.limits["spread"]:
            return f"the networks disagree by {spread:.2f} standard deviations (limit {self.limits['spread']:.2f})"
        return ""

    def adapt(self, rows: Sequence[Row]) -> CostModel:
        """The model for another compiler or machine, from a few rows labelled there.

        Networks and trees are brought to the new labels by a line of their own for each target; then every network is
        trained on from there, without the validation that a few rows cannot spare. Intervals become the quantile of the
        new rows' errors where that is wider.
        """
        programs = [count(parse(row["text"])) for row in rows]
        goal, _ = values(rows, self.targets)
        y = self.scale.forward(goal)
        said, forest, codes = self.parts(programs)
        assert self.forest is not None
        networks = []
        for one, before in zip(self.networks, said, strict=True):
            network = deepcopy(one)
            network.head.rescale(*_lines(before, y))
            fit_network(network, codes, y, [], replace(self.training, epochs=5, lr=self.training.lr / 4))
            networks.append(network)
        adapted = replace(self, networks=networks, forest=self.forest.rescaled(*_lines(forest, y)))
        said, forest, _ = adapted.parts(programs)
        errors = np.abs(self.mix * said.mean(0) + (1 - self.mix) * forest - y)
        wide = [_quantile(column, np.ones(len(rows)), self.level) for column in errors.T]
        adapted.half = np.maximum(self.half, wide)
        adapted.card = self.card | {
            "adapted_rows": len(rows),
            **{key: rows[0].get(key, "") for key in ("machine", "compiler", "isa")},
        }
        return adapted

    def predict(self, program: str | Function, targets: Sequence[str] = ()) -> dict[str, Prediction]:
        """(value, low, high) of every target asked for; all without any. Warns where the model had better abstain, and
        for another machine than the one it learnt. Raises ValueError for a target that was not trained."""
        if unknown := set(targets) - set(self.targets):
            raise ValueError(f"target {', '.join(sorted(unknown))} is not trained; there are {', '.join(self.targets)}")
        found = self.answer(program)
        if found.abstain:
            warnings.warn(found.abstain, stacklevel=2)
        if note := self.mismatch():
            warnings.warn(note, stacklevel=2)
        return {name: found.predictions[name] for name in (targets or self.targets)}

    def mismatch(self) -> str:
        """A sentence where this machine is not the one that the labels are from."""
        trained = self.card.get("machine", "")
        return f"labels are from {trained}; this is {machine()}" if trained and trained != machine() else ""

    def rank(self, programs: Sequence[str | Function], target: str = "time") -> list[int]:
        """Places of the programs, the cheapest first."""
        if target not in self.targets:
            raise ValueError(f"target {target} is not trained; there are {', '.join(self.targets)}")
        costs = [one.predictions[target].value for one in self.answers(programs)]
        return sorted(range(len(costs)), key=costs.__getitem__)

    def save(self, path: str | Path) -> None:
        """One safetensors file: weights and trees, and as its metadata everything else."""
        from safetensors.torch import save_file

        if self.forest is None:
            raise ValueError("the model is not trained; fit it before it is saved")
        tensors = {f"forest.{name}": torch.from_numpy(array) for name, array in asdict(self.forest).items()}
        for member, network in enumerate(self.networks):
            tensors |= {f"{member}.{name}": tensor.contiguous() for name, tensor in network.state_dict().items()}
        state = {
            "targets": self.targets, "members": self.members, "trees": self.trees, "level": self.level, "seed": self.seed,
            "words": self.vocabulary.words, "limit": self.vocabulary.limit, "opcodes": self.features.opcodes,
            "totals": self.totals.weights, "mean": self.scale.mean, "std": self.scale.std, "mix": self.mix.tolist(),
            "half": self.half.tolist(), "limits": self.limits, "card": self.card,
        }  # fmt: skip
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(path), {"cost_model": json.dumps(state)})

    @classmethod
    def load(cls, name: str | Path = "stablehlo-cpu") -> CostModel:
        """A shipped model by its name, or a file that `save` wrote. Raises ValueError for what is neither."""
        from safetensors import SafetensorError, safe_open

        path = SHIPPED.get(str(name), Path(name))
        if not path.exists():
            raise ValueError(
                f"no cost model '{name}': give {', '.join(SHIPPED)} or a .safetensors file that CostModel.save wrote"
            )
        try:
            with safe_open(str(path), "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
                state = json.loads((file.metadata() or {})["cost_model"])
        except (SafetensorError, KeyError, json.JSONDecodeError):
            raise ValueError(f"{path} is no cost model; give a file that CostModel.save wrote") from None
        model = cls(tuple(state["targets"]), state["members"], state["trees"], state["level"], seed=state["seed"])
        model.vocabulary = NodeVocabulary(tuple(state["words"]), state["limit"])
        model.features = Features(tuple(state["opcodes"]))
        model.totals = TotalScale(tuple(map(tuple, state["totals"])))
        model.scale = Scale(model.targets, tuple(state["mean"]), tuple(state["std"]))
        model.mix, model.half = np.array(state["mix"]), np.array(state["half"])
        model.limits, model.card = state["limits"], state["card"]
        model.forest = Forest(**{name: tensors[f"forest.{name}"].numpy() for name in FOREST})
        for member in range(model.members):
            prefix = f"{member}."
            own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            network = GraphNetwork(len(model.vocabulary), len(model.targets), model.totals.width)
            network.load_state_dict(own)
            model.networks.append(network.eval())
        return model


def _lines(x: Array, y: Array) -> tuple[Array, Array]:
    """Slopes and intercepts of y on x, column by column, where y is known; drawn towards the slope 1."""
    slopes, shifts = np.ones(y.shape[1]), np.zeros(y.shape[1])
    for column in range(y.shape[1]):
        known = ~np.isnan(y[:, column])
        if known.any():
            a, b = x[known, column], y[known, column]
            ridge, away = 0.01 * len(a), a - a.mean()
            slopes[column] = (away @ b + ridge) / (away @ away + ridge)
            shifts[column] = b.mean() - slopes[column] * a.mean()
    return slopes, shifts


def _quantile(values: Array, weight: Array, level: float) -> float:
    """The weighted quantile of the values that are numbers; the largest where the level asks for more than there are."""
    known = ~np.isnan(values)
    order = np.argsort(values[known])
    total = np.cumsum(weight[known][order])
    place = min(int(np.searchsorted(total, level * total[-1])), len(order) - 1)
    return float(values[known][order][place])
