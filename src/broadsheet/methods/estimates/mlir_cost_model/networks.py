"""Networks of cost, on tokens (`Network`, the paper's) and on graphs (`GraphNetwork`), and how they are trained.

They share their trunk between targets and have a head for each; targets are standardised, a missing label (NaN) has no
part in the Huber loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .nodes import SIZES, EncodedGraph
from .tokens import Encoded

Array = np.ndarray[Any, Any]
Kind = Literal["bag", "lstm", "conv", "transformer"]
KINDS: tuple[Kind, ...] = ("bag", "lstm", "conv", "transformer")
Program = Encoded | EncodedGraph
Batch = tuple[Tensor, ...]


class Head(nn.Module):
    """[batch, places, width] -> standardised targets [batch, targets].

    The places are pooled as their mean and as log-sum-exp, because cost adds up along a program and is learnt as a
    logarithm; then two dense layers. These also see ``more`` numbers of the program, where it has any, and a line from
    them to the targets runs beside the network; `start` lets training begin with that line and a network that says
    nothing.
    """

    def __init__(self, width: int, targets: int, more: int = 0):
        super().__init__()
        self.spread = nn.Linear(width, width)
        self.line = nn.Linear(more, targets) if more else None
        self.dense = nn.Sequential(nn.Linear(2 * width + more, 64), nn.ReLU(), nn.Linear(64, targets))

    def forward(self, x: Tensor, mask: Tensor, more: Tensor | None = None) -> Tensor:
        """``mask`` [batch, places, 1]: 0 at padding."""
        mean = (x * mask).sum(1) / mask.sum(1).clamp(min=1)
        total = self.spread(x).masked_fill(mask == 0, -1e4).logsumexp(1)
        if self.line is None or more is None:
            return self.dense(torch.cat([mean, total], -1))
        return self.dense(torch.cat([mean, total, more], -1)) + self.line(more)

    def start(self, totals: Array, scaled: Array) -> None:
        """The line at its ridge solution on ``totals``, the first of its inputs; the network's last layer at nothing."""
        assert self.line is not None
        x = np.concatenate([totals, np.ones((len(totals), 1))], 1)
        ridge = np.diag([1.0] * totals.shape[1] + [0.0])
        last = self.dense[-1]
        self.line.weight.data.zero_()
        with torch.no_grad():
            for target in range(scaled.shape[1]):
                known = ~np.isnan(scaled[:, target])
                solved = np.linalg.solve(x[known].T @ x[known] + ridge, x[known].T @ scaled[known, target])
                self.line.weight[target, : totals.shape[1]] = torch.from_numpy(solved[:-1])
                self.line.bias[target] = float(solved[-1])
            for parameter in last.parameters():
                parameter.zero_()

    def rescale(self, slope: Array, shift: Array) -> None:
        """Predictions times ``slope`` plus ``shift``, each [targets]."""
        assert self.line is not None
        by, plus = torch.from_numpy(slope).float(), torch.from_numpy(shift).float()
        with torch.no_grad():
            for layer in (self.dense[-1], self.line):
                layer.weight *= by[:, None]  # type: ignore[operator]  # a Linear's
                layer.bias *= by  # type: ignore[operator]
            self.line.bias.add_(plus)


class Network(nn.Module):
    """Tokens [batch, length] (0 is padding) -> standardised targets [batch, targets].

    ``bag``: embeddings alone. ``lstm``: one layer. ``conv``: six convolutions of width 3 and decreasing filters, each but
    the last followed by max pooling by 2 (the paper's best). ``transformer``: two encoder layers with sinusoidal
    positions. Tokens are all they see.
    """

    FILTERS = (48, 48, 40, 40, 32, 32)

    def __init__(self, kind: Kind, vocabulary: int, targets: int, width: int = 48):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"the network is {', '.join(KINDS)}, not {kind!r}")
        self.kind, self.width, self.targets = kind, width, targets
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
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
        self.head = Head(self.FILTERS[-1] if kind == "conv" else width, targets)

    @staticmethod
    def collate(programs: Sequence[Encoded]) -> Batch:
        length = max((len(one.numbers) for one in programs), default=1)
        numbers = np.zeros((len(programs), length), np.int64)
        for row, one in enumerate(programs):
            numbers[row, : len(one.numbers)] = one.numbers
        return (torch.from_numpy(numbers),)

    def forward(self, numbers: Tensor) -> Tensor:
        mask = (numbers > 0).unsqueeze(-1).float()
        x = self.embedding(numbers)
        if self.kind == "bag":
            x = torch.relu(self.mix(x))
        elif self.kind == "lstm":
            x = self.lstm(x)[0]
        elif self.kind == "conv":
            x, mask = self._convolve(x, mask)
        else:
            x = self.encoder(x + _positions(x.shape[1], self.width), src_key_padding_mask=numbers == 0)
        return self.head(x, mask)

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


class Layer(nn.Module):
    """A node learns from its neighbours in program order, the mean of what it reads and the sum of its readers; residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, mask: Tensor, reads: Tensor, share: Tensor) -> Tensor:
        """``x`` [batch, nodes, width], ``reads`` [batch, reader, read]: how often, ``share``: the same as parts of one."""
        z = self.norm(x) * mask
        wide = nn.functional.pad(z, (0, 0, 1, 1))
        seen = torch.cat([wide[:, :-2], z, wide[:, 2:], share @ z, reads.transpose(1, 2) @ z], -1)
        return x + torch.relu(self.mix(seen)) * mask


class GraphNetwork(nn.Module):
    """Graphs (`nodes`) -> standardised targets [batch, targets]. Beside the paper.

    A node starts as the sum of its words' embeddings and a linear map of its sizes. Pressure is what lives at the same
    time: every node says ``HEADS`` weights of the value it makes, they are summed over the values that live at each place
    of the program (`live`), and the largest sums go to the head beside what it pools itself.
    """

    HEADS = 8

    def __init__(self, vocabulary: int, targets: int, totals: int, width: int = 48, layers: int = 3):
        super().__init__()
        self.targets = targets
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.size = nn.Linear(SIZES, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.weigh = nn.Linear(width + SIZES, self.HEADS)
        self.head = Head(width, targets, totals + self.HEADS)

    @staticmethod
    def collate(programs: Sequence[EncodedGraph]) -> Batch:
        """Words [batch, nodes, words], sizes [batch, nodes, SIZES], last [batch, nodes], reads [batch, reader, read],
        totals [batch, totals]."""
        length = max(one.length for one in programs)
        words = np.zeros((len(programs), length, max(one.words.shape[1] for one in programs)), np.int64)
        sizes = np.zeros((len(programs), length, SIZES), np.float32)
        last = np.zeros((len(programs), length), np.int64)
        reads = np.zeros((len(programs), length, length), np.float32)
        for row, one in enumerate(programs):
            words[row, : one.length, : one.words.shape[1]] = one.words
            sizes[row, : one.length] = one.sizes
            last[row, : one.length] = one.last
            np.add.at(reads[row], (one.edges[:, 0], one.edges[:, 1]), 1)
        totals = np.stack([one.totals for one in programs])
        return tuple(torch.from_numpy(one) for one in (words, sizes, last, reads, totals))

    def forward(self, words: Tensor, sizes: Tensor, last: Tensor, reads: Tensor, totals: Tensor) -> Tensor:
        mask = (words[..., :1] > 0).float()
        share = reads / reads.sum(-1, keepdim=True).clamp(min=1)
        x = (self.embedding(words).sum(2) + self.size(sizes)) * mask
        weights = 3.0 * self.weigh(torch.cat([x, sizes], -1))
        for layer in self.layers:
            x = layer(x, mask, reads, share)
        return self.head(x, mask, torch.cat([totals, live(weights, last, mask).amax(1)], -1))


def live(weights: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of ``weights`` [batch, nodes, heads] over the values that live at every node:
    from where they are made to ``last`` [batch, nodes], both included. A third of it, to be of the size of other inputs."""
    amount = weights.clamp(-12, 12).exp() * mask
    end = (last + 1).unsqueeze(-1).expand_as(amount)
    change = nn.functional.pad(amount, (0, 0, 0, 1)).scatter_add(1, end, -amount)
    return (change.cumsum(1)[:, :-1].clamp(min=1e-5).log() / 3).masked_fill(mask == 0, -4)  # below what any value has


AnyNetwork = Network | GraphNetwork


@dataclass(frozen=True)
class Training:
    """How a network is trained. Stops when ``patience`` epochs bring no better validation loss; the best weights stay."""

    epochs: int = 10
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-2
    patience: int = 4
    seed: int = 0


#: a batch has at most so many places for each program that it may hold: long programs come in smaller batches
_PLACES = 256


def _batches(network: AnyNetwork, programs: Sequence[Any], size: int) -> list[tuple[list[int], Batch]]:
    """Programs of similar length together: (their places, what the network takes)."""
    parts: list[list[int]] = [[]]
    for place in sorted(range(len(programs)), key=lambda place: programs[place].length):
        if (parts[-1] and (len(parts[-1]) + 1) * programs[place].length > size * _PLACES) or len(parts[-1]) == size:
            parts.append([])
        parts[-1].append(place)
    return [(chosen, network.collate([programs[place] for place in chosen])) for chosen in parts if chosen]


def fit_network(
    network: AnyNetwork, programs: Sequence[Program], scaled: Array, validation: Sequence[int], training: Training,
    tick: Callable[[int, float], None] | None = None,
) -> None:  # fmt: skip
    """Trains on all rows but those of ``validation``, which say when to stop. ``tick(epoch, validation loss)``."""
    held = set(validation)
    places = [place for place in range(len(programs)) if place not in held]
    goal = torch.tensor(scaled, dtype=torch.float32)
    parts = _batches(network, [programs[place] for place in places], training.batch)
    checks = _batches(network, [programs[place] for place in validation], 4 * training.batch)
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
    network.eval()


def _huber(found: Tensor, goal: Tensor) -> Tensor:
    known = ~goal.isnan()
    return nn.functional.huber_loss(found[known], goal[known])


def run_networks(networks: Sequence[AnyNetwork], programs: Sequence[Any]) -> Array:
    """Of networks of one kind and size: [networks, programs, targets], standardised."""
    found = np.zeros((len(networks), len(programs), networks[0].targets))
    with torch.inference_mode():
        for places, batch in _batches(networks[0], programs, 64):
            for place, network in enumerate(networks):
                found[place, places] = network(*batch).numpy()
    return found
