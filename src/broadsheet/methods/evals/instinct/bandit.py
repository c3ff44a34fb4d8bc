"""NeuralUCB: a network of one hidden layer that says how good an arm is and how sure of it it is (Zhou et al. 2020).

    f(x) = w2 · relu(W1 x + b1) + b2,    g(x) = its gradient by all weights,    sigma(x)² = lam nu sum(g² / U)

U is a diagonal that starts at ``lam`` and grows by g² of every arm that was pulled: directions of the weights that were used
are certain. Gradients are written out, so that no framework is needed and all candidates cost a few matrix products:

    db2 = 1,  dw2 = relu(a),  db1 = w2 [a > 0],  dW1 = (w2 [a > 0]) xᵀ      with a = W1 x + b1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Weights:
    """``w1`` [hidden, dim], ``b1`` [hidden], ``w2`` [hidden], ``b2`` [1]; float64."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array

    @property
    def parts(self) -> tuple[Array, Array, Array, Array]:
        return self.w1, self.b1, self.w2, self.b2

    def copy(self) -> Weights:
        return Weights(*(part.copy() for part in self.parts))

    def zeros(self) -> Weights:
        return Weights(*(np.zeros_like(part) for part in self.parts))


def initial(dim: int, hidden: int, kind: Literal["scaled", "unit"], seed: int) -> Weights:
    """Initial weights.

    "unit": all from N(0, 1), as in the authors' code. "scaled": as NeuralUCB itself prescribes (Zhou et al. 2020, section
    3), N(0, 1 / inputs) without biases, and every unit twice with opposite output weights: f is 0 everywhere and its
    gradient is not.
    """
    rng = np.random.default_rng(seed)
    if kind == "unit":
        return Weights(*(rng.standard_normal(shape) for shape in ((hidden, dim), (hidden,), (hidden,), (1,))))
    half = -(-hidden // 2)
    w1, w2 = rng.standard_normal((half, dim)) / np.sqrt(dim), rng.standard_normal(half) / np.sqrt(hidden)
    if hidden % 2:
        w2[-1] = 0  # has no twin
    return Weights(np.concatenate([w1, w1])[:hidden], np.zeros(hidden), np.concatenate([w2, -w2])[:hidden], np.zeros(1))


def forward(weights: Weights, x: Array) -> tuple[Array, Array]:
    """Values [n] and hidden activations [n, hidden] of ``x`` [n, dim]."""
    active = np.maximum(x @ weights.w1.T + weights.b1, 0)
    return active @ weights.w2 + weights.b2, active


def gradients(weights: Weights, x: Array) -> Array:
    """The gradient of f for every row of ``x`` [n, dim]: [n, parameters], in the order W1 (row by row), b1, w2, b2."""
    active = forward(weights, x)[1]
    back = (active > 0) * weights.w2
    outer = back[:, :, None] * x[:, None, :]
    return np.concatenate([outer.reshape(len(x), -1), back, active, np.ones((len(x), 1))], axis=1)


def weighted_squares(weights: Weights, active: Array, x: Array, inverse: Weights) -> Array:
    """sum(g² · inverse) [n] of every row, without ever building g."""
    back = ((active > 0) * weights.w2) ** 2
    total = np.einsum("nh,nh->n", back, (x * x) @ inverse.w1.T)
    return total + back @ inverse.b1 + (active * active) @ inverse.w2 + inverse.b2


def fit(start: Weights, x: Array, y: Array, steps: int, lr: float, decay: float) -> Weights:
    """Adam on the mean squared error of all rows at once, with ``decay`` times the weights added to the gradient."""
    weights = start.copy()
    first, second = weights.zeros(), weights.zeros()
    slopes, scratch = weights.zeros(), weights.zeros()
    scale = 2.0 / len(x)
    for step in range(1, steps + 1):
        values, active = forward(weights, x)
        error = scale * (values - y)
        back = (active > 0) * weights.w2
        back *= error[:, None]
        np.matmul(back.T, x, out=slopes.w1)
        np.sum(back, axis=0, out=slopes.b1)
        np.matmul(error, active, out=slopes.w2)
        slopes.b2[0] = error.sum()
        # the bias corrections of both moments, folded into step size and epsilon
        root = np.sqrt(1 - 0.999**step)
        rate, epsilon = lr * root / (1 - 0.9**step), 1e-8 * root
        for part, slope, m, v, room in zip(
            weights.parts, slopes.parts, first.parts, second.parts, scratch.parts, strict=True
        ):
            np.multiply(part, decay, out=room)
            slope += room
            m *= 0.9
            np.multiply(slope, 0.1, out=room)
            m += room
            slope *= slope
            slope *= 0.001
            v *= 0.999
            v += slope
            np.sqrt(v, out=room)
            room += epsilon
            np.divide(m, room, out=room)
            room *= rate
            part -= room
    return weights


@dataclass
class NeuralUCB:
    """A neural bandit over arms with features (paper section 4.2; the network and its training are the authors' code's).

    ``dim``: features of an arm. ``hidden``: units. ``lam``: regularisation, of the loss (lam / n) and of U. ``nu``: how much
    uncertainty is worth. ``init``: "unit", the authors', whose gradients and so sigma dwarf every reward, which makes it a
    random search (measured in ``benchmarks/instinct_study.py``); or "scaled", see `initial`. ``style``: "ucb" takes
    mu + sigma, "ts" draws from N(mu, sigma). ``steps``, ``lr``: Adam's, from the same initial weights every time.
    ``cold``: the first choice is the untrained network's on features as they are, as in the authors' code; else it is
    trained on what was observed.

    Features are standardised by the mean and deviation of the arms observed so far, rewards are taken as they are. U keeps
    gradients of earlier networks on earlier scales: widths of different rounds are not comparable (so in the original).

    Raises ValueError for settings out of range, features of another width and rewards that are no number.
    """

    dim: int
    hidden: int = 100
    lam: float = 0.1
    nu: float = 1.0
    init: Literal["scaled", "unit"] = "scaled"
    style: Literal["ucb", "ts"] = "ucb"
    steps: int = 1000
    lr: float = 1e-3
    seed: int = 0
    cold: bool = False
    start: Weights = field(init=False, repr=False)
    weights: Weights = field(init=False, repr=False)
    u: Weights = field(init=False, repr=False)  #: the diagonal of U, in the shape of the weights

    def __post_init__(self) -> None:
        if self.dim < 1 or self.hidden < 1 or self.steps < 0:
            raise ValueError(f"dim and hidden are at least 1, steps at least 0; got {self.dim}, {self.hidden}, {self.steps}")
        if self.lam <= 0 or self.nu < 0 or self.lr <= 0:
            raise ValueError(f"lam and lr are positive, nu is not negative; got {self.lam}, {self.lr}, {self.nu}")
        if self.init not in ("scaled", "unit") or self.style not in ("ucb", "ts"):
            raise ValueError(f"init is scaled or unit, style ucb or ts; got {self.init} and {self.style}")
        self.start = initial(self.dim, self.hidden, self.init, self.seed)
        self.weights = self.start.copy()
        self.u = Weights(*(np.full_like(part, self.lam) for part in self.start.parts))
        self._x: list[Array] = []
        self._y: list[float] = []
        self._mean, self._deviation = np.zeros(self.dim), np.ones(self.dim)
        self._stale = self._pulled = False
        self._rng = np.random.default_rng((self.seed, 1))

    def observe(self, x: Array, reward: float) -> None:
        """An arm's reward that was not this bandit's choice: it is trained on, U does not hear of it."""
        x = np.asarray(x, dtype=float).reshape(-1)
        if x.size != self.dim:
            raise ValueError(f"an arm has {self.dim} features, got {x.size}")
        if not np.isfinite(reward) or not np.isfinite(x).all():
            raise ValueError(f"features and rewards must be finite numbers, got a reward of {reward}")
        self._x.append(x)
        self._y.append(float(reward))
        self._stale = not self.cold or self._pulled

    def update(self, x: Array, reward: float) -> None:
        """The reward of the arm that was chosen: U grows by its squared gradient under the network that chose it."""
        x = np.asarray(x, dtype=float).reshape(-1)
        self._train()
        squares = gradients(self.weights, self._scaled(x[None])) ** 2
        place = 0
        for part in self.u.parts:
            part += squares[0, place : place + part.size].reshape(part.shape)
            place += part.size
        self._pulled = True
        self.observe(x, reward)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """``mu`` and ``sigma`` [n] of the arms ``x`` [n, dim]."""
        x = np.atleast_2d(np.asarray(x, dtype=float))
        if x.shape[1] != self.dim:
            raise ValueError(f"an arm has {self.dim} features, got {x.shape[1]}")
        self._train()
        x = self._scaled(x)
        mu, active = forward(self.weights, x)
        inverse = Weights(*(1 / part for part in self.u.parts))
        return mu, np.sqrt(self.lam * self.nu * weighted_squares(self.weights, active, x, inverse))

    def rank(self, x: Array) -> Array:
        """What every arm is worth pulling [n]."""
        mu, sigma = self.predict(x)
        return mu + sigma if self.style == "ucb" else self._rng.normal(mu, sigma)

    def select(self, x: Array) -> int:
        """The row of ``x`` [n, dim] to pull; tell `update` what came of it."""
        return int(np.argmax(self.rank(x)))

    def _scaled(self, x: Array) -> Array:
        return (x - self._mean) / self._deviation

    def _train(self) -> None:
        if not self._stale or len(self._x) < 2:
            return
        x, y = np.array(self._x), np.array(self._y)
        self._mean, deviation = x.mean(0), x.std(0, ddof=1)
        self._deviation = np.where(deviation > 0, deviation, 1.0)  # the authors add 1e-30: other values become huge
        self.weights = fit(self.start, self._scaled(x), y, self.steps, self.lr, self.lam / len(x))
        self._stale = False
