"""An ensemble of networks with intervals: fit, predict, rank, save, load.

A few networks, each trained without a part of the *templates*. What a member says of the templates that it never saw
shows how wrong it is on a new kind of program: the 90 % quantile of those errors is the interval's half width (split
conformal prediction, as in the CV+ of Barber et al. 2021 with groups as folds; every template has the same weight). The
same members say when to abstain: where too many tokens are unknown, where they differ more than a member that did not
know the template differed from the others, or where the program is longer than what was learnt from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .corpus import Row, folds
from .features import TotalScale
from .labels import TARGETS, machine
from .models import Array, Kind, Network, Scale, TokenModel, Training
from .stablehlo import Function, parse
from .tokens import Encoded, Scheme, Vocabulary

SHIPPED = {"stablehlo-cpu": Path(__file__).parent / "stablehlo-cpu.safetensors"}
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
    """``members`` at least 2 and at most the number of templates. Raises ValueError for settings out of range."""

    targets: tuple[str, ...] = tuple(TARGETS)
    kind: Kind = "conv"
    scheme: Scheme = "operands"
    sizes: bool = True
    members: int = 5
    level: float = 0.9
    training: Training = field(default_factory=Training)
    seed: int = 0
    models: list[TokenModel] = field(default_factory=list, repr=False)
    half: Array = field(default_factory=lambda: np.zeros(0), repr=False)  #: half widths, standardised
    limits: dict[str, float] = field(default_factory=dict)  #: of unknown tokens and spread
    card: dict[str, Any] = field(default_factory=dict, repr=False)  #: what it was trained on

    def __post_init__(self) -> None:
        if unknown := set(self.targets) - set(TARGETS):
            raise ValueError(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
        if self.members < 2 or not 0 < self.level < 1:
            raise ValueError(f"members are at least 2 and the level is between 0 and 1; got {self.members}, {self.level}")

    def fit(self, rows: Sequence[Row], tick: Callable[[int, int, float], None] | None = None) -> CostModel:
        """``tick(member, epoch, validation loss)``. Raises ValueError for fewer templates than members."""
        from dataclasses import replace

        names = [row["template"] for row in rows]
        if len(set(names)) < self.members:
            raise ValueError(f"{self.members} members need as many templates to leave out; the rows have {len(set(names))}")
        programs = [parse(row["text"]) for row in rows]
        goal, noisy = values(rows, self.targets)
        parts = list(folds(names, self.members, self.seed))
        part_of = {name: part for part, some in enumerate(parts) for name in some}
        # One vocabulary for all, of words from at least two parts: every member has learnt from each of them.
        vocabulary = Vocabulary.build(programs, self.scheme, [part_of[name] for name in names])
        self.models, held = [], []
        for member in range(self.members):
            validation = [place for place, name in enumerate(names) if part_of[name] == member]
            training = replace(self.training, seed=self.training.seed + member)
            model = TokenModel(self.targets, self.kind, self.scheme, self.sizes, training)
            say = (lambda epoch, loss, m=member: tick(m, epoch, loss)) if tick else None
            self.models.append(model.fit(programs, goal, validation, vocabulary, say))
            held.append(validation)
        self._calibrate(programs, goal, names, held)
        self.card = {
            "rows": len(rows), "noisy_times": noisy, "templates": sorted(set(names)), "dialect": "stablehlo",
            "machine": rows[0].get("machine", ""), "compiler": rows[0].get("compiler", ""),
        }  # fmt: skip
        return self

    def _scaled(self, programs: Sequence[Encoded]) -> Array:
        """[members, programs, targets], standardised by the first member's scale so that members can be compared."""
        base = self.models[0].scale
        return np.stack([base.forward(model.run(programs)) for model in self.models])

    def _calibrate(
        self, programs: Sequence[Function], goal: Array, names: Sequence[str], held: Sequence[Sequence[int]]
    ) -> None:
        codes = self.models[0].encode(programs)
        said, truth = self._scaled(codes), self.models[0].scale.forward(goal)
        errors, apart, unknown, weight = [], [], [], []
        for member, places in enumerate(held):
            others = np.delete(said, member, 0)[:, places].mean(0)
            errors.append(np.abs(said[member][places] - truth[places]))
            apart.append(np.abs(said[member][places] - others).max(1))
            unknown += [codes[place].unknown for place in places]
            sizes = {name: sum(names[place] == name for place in places) for name in {names[place] for place in places}}
            weight += [1 / sizes[names[place]] for place in places]
        every = np.concatenate(errors)
        self.half = np.array(
            [_quantile(every[:, place], np.array(weight), self.level) for place in range(len(self.targets))]
        )
        self.limits = {
            "spread": float(np.quantile(np.concatenate(apart), 0.95)),
            "unknown": max(0.02, float(np.quantile(unknown, 0.99))),
        }

    def answer(self, program: str | Function) -> Answer:
        """Everything about one program. Raises ValueError for text that cannot be read (with its line)."""
        return self.answers([program])[0]

    def answers(self, programs: Sequence[str | Function]) -> list[Answer]:
        if not self.models:
            raise ValueError("the model is not trained; load one (CostModel.load) or fit it")
        read = [parse(one) if isinstance(one, str) else one for one in programs]
        codes = self.models[0].encode(read)
        said = self._scaled(codes)
        mean, spread = said.mean(0), said.std(0).max(1)
        value, low, high = (self.models[0].scale.backward(mean + sign * self.half) for sign in (0, -1, 1))
        answers = []
        for place, code in enumerate(codes):
            row = {
                name: Prediction(*(float(part[place, column]) for part in (value, low, high)))
                for column, name in enumerate(self.targets)
            }
            reason = self._reason(code.unknown, float(spread[place]), code.cut)
            answers.append(Answer(row, reason, code.unknown, float(spread[place]), len(code.numbers) + code.cut))
        return answers

    def _reason(self, unknown: float, spread: float, cut: int) -> str:
        if unknown > self.limits["unknown"]:
            return f"{unknown:.0%} of its tokens are unknown to the model (limit {self.limits['unknown']:.0%})"
        if cut:
            return f"the program is {cut} tokens longer than what the model has seen"
        if spread > self.limits["spread"]:
            return f"the models disagree by {spread:.2f} standard deviations (limit {self.limits['spread']:.2f})"
        return ""

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
        """One safetensors file: the weights, and as its metadata everything else."""
        from safetensors.torch import save_file

        tensors = {
            f"{member}.{name}": tensor.contiguous()
            for member, model in enumerate(self.models)
            for name, tensor in model.network.state_dict().items()
        }
        state = {
            "targets": self.targets, "kind": self.kind, "scheme": self.scheme, "level": self.level, "seed": self.seed,
            "half": self.half.tolist(), "limits": self.limits, "card": self.card,
            "sizes": self.sizes, "vocabulary": self.models[0].vocabulary.to_json(),
            "members": [
                {"mean": model.scale.mean, "std": model.scale.std, "totals": model.totals.weights} for model in self.models
            ],
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
        model = cls(
            tuple(state["targets"]), state["kind"], state["scheme"], state["sizes"], len(state["members"]), state["level"],
            seed=state["seed"],
        )  # fmt: skip
        vocabulary = Vocabulary.from_json(state["vocabulary"])
        model.half, model.limits, model.card = np.array(state["half"]), state["limits"], state["card"]
        for member, row in enumerate(state["members"]):
            one = TokenModel(model.targets, model.kind, model.scheme, model.sizes)
            one.vocabulary, one.totals = vocabulary, TotalScale(tuple(row["totals"]))
            one.scale = Scale(model.targets, tuple(row["mean"]), tuple(row["std"]))
            one.network = Network(model.kind, len(vocabulary), len(model.targets), model.sizes)
            prefix = f"{member}."
            one.network.load_state_dict(
                {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            )
            one.network.eval()
            model.models.append(one)
        return model


def _quantile(values: Array, weight: Array, level: float) -> float:
    """The weighted quantile of the values that are numbers; the largest where the level asks for more than there are."""
    known = ~np.isnan(values)
    order = np.argsort(values[known])
    total = np.cumsum(weight[known][order])
    place = min(int(np.searchsorted(total, level * total[-1])), len(order) - 1)
    return float(values[known][order][place])
