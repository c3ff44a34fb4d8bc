"""Models of cost: networks on tokens, trees on counts, lines on FLOPs. All learn a matrix of targets, [programs, targets].

A target is learnt as a standardised logarithm (of 1 + value; a share as it is), with a Huber loss; a missing label (NaN)
has no part in it. The networks share their trunk between targets and have a head for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .features import TOTALS, Features, TotalScale, flops, interface, totals
from .stablehlo import Function
from .tokens import Encoded, Scheme, Vocabulary, tokenise

Array = np.ndarray[Any, Any]
Kind = Literal["bag", "lstm", "conv", "transformer"]
KINDS: tuple[Kind, ...] = ("bag", "lstm", "conv", "transformer")
#: learnt as they are
_LINEAR = ("vector_util",)


@dataclass(frozen=True)
class Scale:
    """Targets to standardised numbers and back."""

    targets: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, targets: Sequence[str], values: Array) -> Scale:
        raw = cls(tuple(targets), (0.0,) * len(targets), (1.0,) * len(targets)).forward(values)
        std = np.nanstd(raw, 0)
        return cls(tuple(targets), tuple(np.nanmean(raw, 0).tolist()), tuple(np.where(std > 0, std, 1.0).tolist()))

    def forward(self, values: Array) -> Array:
        columns = [
            values[:, place] if name in _LINEAR else np.log1p(values[:, place]) for place, name in enumerate(self.targets)
        ]
        return (np.stack(columns, 1) - self.mean) / self.std

    def backward(self, scaled: Array) -> Array:
        raw = scaled * self.std + self.mean
        columns = [
            np.clip(raw[:, place], 0, 1) if name in _LINEAR else np.expm1(np.clip(raw[:, place], 0, 50))
            for place, name in enumerate(self.targets)
        ]
        return np.stack(columns, 1)


class Network(nn.Module):
    """Tokens [batch, length] (0 is padding), their sizes [batch, length, 2] -> standardised targets [batch, targets].

    ``bag``: embeddings alone. ``lstm``: one layer. ``conv``: six convolutions of width 3 and decreasing filters, each but
    the last followed by max pooling by 2 (the paper's best). ``transformer``: two encoder layers with sinusoidal
    positions. What comes out at the positions is pooled as its mean and as log-sum-exp, because cost adds up along a
    program and is learnt as a logarithm; then two dense layers. With ``sizes`` the dense layers also see the program's
    totals (`features.totals`, [batch, TOTALS + 1], `TotalScale`), and a line from them to the targets runs beside the
    network; training starts from the line's least squares and a network that says nothing. Without: tokens alone, as in
    the paper.
    """

    FILTERS = (48, 48, 40, 40, 32, 32)

    def __init__(self, kind: Kind, vocabulary: int, targets: int, sizes: bool = True, width: int = 48):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"the network is {', '.join(KINDS)}, not {kind!r}")
        self.kind, self.width, self.targets = kind, width, targets
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.size = nn.Linear(2, width, bias=False) if sizes else None
        out = self.FILTERS[-1] if kind == "conv" else width
        if kind == "bag":
            self.mix = nn.Linear(width, width)
        elif kind == "lstm":
            self.lstm = nn.LSTM(width, width, batch_first=True)
        elif kind == "conv":
            filters = (width, *self.FILTERS)
            self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in pairwise(filters))
        else:
            layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.spread = nn.Linear(out, out)
        self.line = nn.Linear(TOTALS + 1, targets) if sizes else None
        self.dense = nn.Sequential(nn.Linear(2 * out + (TOTALS + 1) * sizes, 64), nn.ReLU(), nn.Linear(64, targets))

    def forward(self, numbers: Tensor, sizes: Tensor, totals: Tensor) -> Tensor:
        mask = (numbers > 0).unsqueeze(-1).float()
        x = self.embedding(numbers)
        if self.size is not None:
            x = x + self.size(sizes)
        if self.kind == "bag":
            x = torch.relu(self.mix(x))
        elif self.kind == "lstm":
            x = self.lstm(x)[0]
        elif self.kind == "conv":
            x, mask = self._convolve(x, mask)
        else:
            x = self.encoder(x + _positions(x.shape[1], self.width), src_key_padding_mask=numbers == 0)
        mean = (x * mask).sum(1) / mask.sum(1).clamp(min=1)
        total = self.spread(x).masked_fill(mask == 0, -1e4).logsumexp(1)
        if self.line is None:
            return self.dense(torch.cat([mean, total], -1))
        return self.dense(torch.cat([mean, total, totals], -1)) + self.line(totals)

    def _convolve(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = (x * mask).transpose(1, 2), mask.transpose(1, 2)
        for place, conv in enumerate(self.convs):
            x = torch.relu(conv(x)) * mask  # padding stays 0, so that a program's value does not depend on its batch
            if place < len(self.convs) - 1:
                x = nn.functional.max_pool1d(x, 2, ceil_mode=True)
                mask = nn.functional.max_pool1d(mask, 2, ceil_mode=True)
        return x.transpose(1, 2), mask.transpose(1, 2)


def _positions(length: int, width: int) -> Tensor:
    """Sinusoids, [length, width]."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.cat([angles.sin(), angles.cos()], -1)


@dataclass(frozen=True)
class Training:
    """How a network is trained. Stops when ``patience`` epochs bring no better validation loss; the best weights stay."""

    epochs: int = 10
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-2
    patience: int = 4
    seed: int = 0


Batch = tuple[Tensor, Tensor, Tensor]


def batches(programs: Sequence[Encoded], size: int, scale: TotalScale) -> list[tuple[list[int], Batch]]:
    """Programs of similar length together: (their places, what `Network` takes)."""
    order = sorted(range(len(programs)), key=lambda place: len(programs[place].numbers))
    parts = (order[at : at + size] for at in range(0, len(order), size))
    return [(chosen, padded([programs[place] for place in chosen], scale)) for chosen in parts]


def padded(programs: Sequence[Encoded], scale: TotalScale) -> Batch:
    length = max((len(one.numbers) for one in programs), default=1)
    numbers, sizes = np.zeros((len(programs), length), np.int64), np.zeros((len(programs), length, 2), np.float32)
    for row, one in enumerate(programs):
        numbers[row, : len(one.numbers)] = one.numbers
        sizes[row, : len(one.sizes)] = one.sizes
    return (
        torch.from_numpy(numbers),
        torch.from_numpy(sizes),
        torch.from_numpy(scale(np.array([one.totals for one in programs])).astype(np.float32)),
    )


def fit_network(
    network: Network, programs: Sequence[Encoded], totals: TotalScale, scaled: Array, validation: Sequence[int],
    training: Training,
    tick: Callable[[int, float], None] | None = None,
) -> Network:  # fmt: skip
    """Trains on all rows but those of ``validation``, which say when to stop. ``tick(epoch, validation loss)``."""
    held = set(validation)
    places = [place for place in range(len(programs)) if place not in held]
    goal = torch.tensor(scaled, dtype=torch.float32)
    parts = batches([programs[place] for place in places], training.batch, totals)
    checks = batches([programs[place] for place in validation], 4 * training.batch, totals)
    optimiser = torch.optim.AdamW(network.parameters(), training.lr, weight_decay=training.weight_decay)
    total = training.epochs * len(parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * max(0.05, 1 - step / total)
    )
    order = np.random.default_rng(training.seed)
    best, state, waited = math.inf, {}, 0
    for epoch in range(training.epochs):
        network.train()
        for part in order.permutation(len(parts)):
            chosen, batch = parts[part]
            loss = _huber(network(*batch), goal[[places[place] for place in chosen]])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            losses = [_huber(network(*batch), goal[[validation[p] for p in c]]).item() * len(c) for c, batch in checks]
        value = sum(losses) / max(len(validation), 1)
        if tick:
            tick(epoch, value)
        if value < best - 1e-4:
            best, waited = value, 0
            state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        else:
            waited += 1
            if waited >= training.patience:
                break
    if state:
        network.load_state_dict(state)
    return network.eval()


def _huber(found: Tensor, goal: Tensor) -> Tensor:
    known = ~goal.isnan()
    return nn.functional.huber_loss(found[known], goal[known])


def run_network(network: Network, programs: Sequence[Encoded], totals: TotalScale) -> Array:
    """[programs, targets], standardised."""
    with torch.inference_mode():
        if len(programs) == 1:
            return network(*padded(programs, totals)).numpy().astype(float)
        found = np.zeros((len(programs), network.targets))
        for places, batch in batches(programs, 64, totals):
            found[places] = network(*batch).numpy()
    return found


# --- estimators: fit(programs, values), predict(programs) ------------------------------------------------------------------


@dataclass
class TokenModel:
    """A network with its vocabulary and scale."""

    targets: tuple[str, ...]
    kind: Kind = "conv"
    scheme: Scheme = "operands"
    sizes: bool = True
    training: Training = field(default_factory=Training)

    def fit(
        self, programs: Sequence[Function], values: Array, validation: Sequence[int], vocabulary: Vocabulary | None = None,
        tick: Callable[[int, float], None] | None = None,
    ) -> TokenModel:  # fmt: skip
        """``validation``: places of the rows that say when to stop. Vocabulary (unless given) and scale are of the
        others."""
        held = set(validation)
        rest = [place for place in range(len(programs)) if place not in held]
        self.vocabulary = vocabulary or Vocabulary.build([programs[place] for place in rest], self.scheme)
        self.scale = Scale.fit(self.targets, values[rest])
        codes, scaled = self.encode(programs), self.scale.forward(values)
        raw = np.array([codes[place].totals for place in rest])
        self.totals = TotalScale.fit(raw, values[rest, 0])
        torch.manual_seed(self.training.seed)
        network = Network(self.kind, len(self.vocabulary), len(self.targets), self.sizes)
        if self.sizes:
            _start(network, self.totals(raw), scaled[rest])
        self.network = fit_network(network, codes, self.totals, scaled, validation, self.training, tick)
        return self

    def run(self, codes: Sequence[Encoded]) -> Array:
        """[programs, targets] in their units."""
        return self.scale.backward(run_network(self.network, codes, self.totals))

    def encode(self, programs: Sequence[Function]) -> list[Encoded]:
        return [self.vocabulary.encode(tokenise(program, self.scheme)) for program in programs]

    def predict(self, programs: Sequence[Function]) -> Array:
        return self.run(self.encode(programs))


def _start(network: Network, totals: Array, scaled: Array) -> None:
    """The line at its ridge solution, the network's last layer at nothing."""
    x = np.concatenate([totals, np.ones((len(totals), 1))], 1)
    ridge = np.diag([1.0] * totals.shape[1] + [0.0])
    with torch.no_grad():
        for target in range(scaled.shape[1]):
            known = ~np.isnan(scaled[:, target])
            solved = np.linalg.solve(x[known].T @ x[known] + ridge, x[known].T @ scaled[known, target])
            network.line.weight[target] = torch.from_numpy(solved[:-1])  # type: ignore[union-attr]  # sizes have a line
            network.line.bias[target] = float(solved[-1])  # type: ignore[union-attr]
        for last in (network.dense[-1].weight, network.dense[-1].bias):
            last.zero_()  # type: ignore[operator]  # a Linear's


@dataclass
class Trees:
    """Gradient-boosted trees on counts and sizes (scikit-learn's histogram trees), one model a target."""

    targets: tuple[str, ...]
    sized: bool = True
    seed: int = 0

    def fit(self, programs: Sequence[Function], values: Array, validation: Sequence[int] = ()) -> Trees:
        from sklearn.ensemble import HistGradientBoostingRegressor

        self.features = Features.build(programs, self.sized)
        self.scale = Scale.fit(self.targets, values)
        x, y = self.features(programs), self.scale.forward(values)
        self.models = []
        for place in range(len(self.targets)):
            known = ~np.isnan(y[:, place])
            model = HistGradientBoostingRegressor(
                max_iter=150, learning_rate=0.1, min_samples_leaf=10, random_state=self.seed
            )
            self.models.append(model.fit(x[known], y[known, place]))
        return self

    def predict(self, programs: Sequence[Function]) -> Array:
        x = self.features(programs)
        return self.scale.backward(np.stack([model.predict(x) for model in self.models], 1))


@dataclass
class Line:
    """Least squares in the scaled target on log2 of FLOPs ("flops"), on a roofline's time ("roofline"), on a weighted sum
    of `features.totals` ("additive"), or nothing ("mean").

    The roofline is max(FLOPs / peak, bytes of the interface / bandwidth); only the ratio of the two matters to a line in
    its logarithm, and that is chosen among powers of two by the fit.
    """

    targets: tuple[str, ...]
    kind: Literal["mean", "flops", "roofline", "additive"] = "flops"

    def _inputs(self, programs: Sequence[Function], ratio: float, sums: TotalScale) -> Array:
        if self.kind == "mean":
            return np.zeros(len(programs))
        if self.kind == "flops":
            return np.log2(1 + np.array([flops(program) for program in programs]))
        if self.kind == "additive":
            return sums(np.array([totals(program) for program in programs]))[:, -1]
        return np.log2([1 + max(flops(program), ratio * interface(program)) for program in programs])

    def fit(self, programs: Sequence[Function], values: Array, validation: Sequence[int] = ()) -> Line:
        self.scale = Scale.fit(self.targets, values)
        y = self.scale.forward(values)
        self.lines = list[tuple[float, TotalScale, Array]]()
        for place in range(len(self.targets)):
            known = ~np.isnan(y[:, place])
            chosen = [programs[row] for row in np.flatnonzero(known).tolist()]
            sums = TotalScale((0.0,) * (TOTALS + 1))
            if self.kind == "additive":
                sums = TotalScale.fit(np.array([totals(program) for program in chosen]), values[known, place])
            tried = []
            for ratio in (2.0 ** np.arange(-2, 9)).tolist() if self.kind == "roofline" else (1.0,):
                x = np.stack([self._inputs(chosen, ratio, sums), np.ones(len(chosen))], 1)
                line = np.linalg.lstsq(x, y[known, place], rcond=None)[0]
                tried.append((float(((x @ line - y[known, place]) ** 2).sum()), ratio, line))
            _, ratio, line = min(tried, key=lambda one: one[0])
            self.lines.append((ratio, sums, line))
        return self

    def predict(self, programs: Sequence[Function]) -> Array:
        columns = [self._inputs(programs, ratio, sums) * line[0] + line[1] for ratio, sums, line in self.lines]
        return self.scale.backward(np.stack(columns, 1))
