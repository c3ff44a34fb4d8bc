"""The templates of `generate`: blocks of deep networks with random sizes and activations, and random graphs.

Each takes a `Builder` and a random generator and returns a `Graph`. Sizes: batch 1-128, width 16-512.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .generate import BINARY, UNARY, Builder, Graph

ACTIVATIONS = ("tanh", "gelu", "silu", "relu", "sigmoid")
_WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_HEADS = ((2, 16), (2, 32), (4, 8), (4, 16), (4, 32), (8, 8), (8, 16))


class Draw:
    """Random choices of sizes."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def width(self) -> int:
        return int(self.rng.choice(_WIDTHS))

    def batch(self) -> int:
        return int(self.rng.choice(_BATCHES))

    def count(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(self.rng.integers(low, high + 1))

    def activation(self) -> str:
        return str(self.rng.choice(ACTIVATIONS))

    def coin(self) -> bool:
        return bool(self.rng.random() < 0.5)


def mlp(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    x, act = b.parameter(draw.batch(), draw.width()), draw.activation()
    for _ in range(draw.count(1, 4)):
        x = b.unary(act, b.linear(x, draw.width()))
    return b.graph(b.node("softmax", [x], b.shape(x)) if draw.coin() else b.linear(x, draw.width()))


def residual_mlp(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    x, act, norm = b.parameter(draw.batch(), draw.width()), draw.activation(), draw.coin()
    for _ in range(draw.count(1, 3)):
        h = b.norm("layer_norm", x) if norm else x
        x = b.binary("add", x, b.linear(b.unary(act, b.linear(h, draw.width())), b.shape(x)[-1]))
    return b.graph(x)


def gated_mlp(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    x, width = b.parameter(draw.batch(), draw.width()), draw.width()
    for _ in range(draw.count(1, 2)):
        h = b.norm("rms_norm", x)
        gated = b.binary("multiply", b.unary(draw.activation(), b.dot(h, width)), b.dot(h, width))
        x = b.binary("add", x, b.dot(gated, b.shape(x)[-1]))
    return b.graph(x)


def _heads(b: Builder, x: int, heads: int, size: int) -> int:
    """[tokens, heads*size] -> [heads, tokens, size]."""
    tokens = b.shape(x)[0]
    return b.transpose(b.reshape(x, tokens, heads, size), 1, 0, 2)


def _attend(b: Builder, q: int, k: int, v: int, causal: bool) -> int:
    heads, tokens, size = b.shape(q)
    scores = b.node("scale", [b.matmul(q, k, transposed=True)], (heads, tokens, tokens), size**-0.5)
    if causal:
        scores = b.node("causal", [scores], b.shape(scores))
    mixed = b.matmul(b.node("softmax", [scores], b.shape(scores)), v)
    return b.reshape(b.transpose(mixed, 1, 0, 2), tokens, heads * size)


def attention(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    heads, size = _HEADS[draw.count(0, len(_HEADS) - 1)]
    x = b.parameter(draw.batch() + 2, draw.width())
    q, k, v = (_heads(b, b.dot(x, heads * size), heads, size) for _ in range(3))
    x = b.binary("add", x, b.dot(_attend(b, q, k, v, draw.coin()), b.shape(x)[-1]))
    return b.graph(b.norm("layer_norm", x) if draw.coin() else x)


def llama_block(b: Builder, rng: np.random.Generator) -> Graph:
    """RMSNorm, rotary attention, RMSNorm, SwiGLU."""
    draw = Draw(rng)
    heads, size = _HEADS[draw.count(0, len(_HEADS) - 1)]
    tokens, width = draw.batch() + 1, heads * size
    x, h = b.parameter(tokens, width), 0
    cos, sin = b.parameter(tokens, size // 2), b.parameter(tokens, size // 2)
    h = b.norm("rms_norm", x)
    q, k, v = (_heads(b, b.dot(h, width), heads, size) for _ in range(3))
    q, k = (b.node("rotate", [one, cos, sin], b.shape(one)) for one in (q, k))
    x = b.binary("add", x, b.dot(_attend(b, q, k, v, True), width))
    if draw.coin():
        h, inner = b.norm("rms_norm", x), draw.width()
        x = b.binary(
            "add", x, b.dot(b.binary("multiply", b.unary("silu", b.dot(h, inner)), b.dot(h, inner)), width)
        )  # fmt: skip
    return b.graph(x)


def convnet(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    side = int(rng.choice((8, 12, 16, 24, 32)))
    x = b.parameter(draw.count(1, 4), draw.count(1, 8), side, side)
    for _ in range(draw.count(1, 3)):
        x = b.unary(draw.activation(), b.conv(x, int(rng.choice((4, 8, 16, 32))), int(rng.choice((1, 3, 5)))))
        batch, channels, high, wide = b.shape(x)
        if draw.coin() and high >= 4:
            x = b.node("pool", [x], (batch, channels, high // 2, wide // 2), 2)
    if draw.coin():
        x = b.linear(b.reduce("mean", b.reduce("mean", x, -1), -1), draw.width())
    return b.graph(x)


def resnet_block(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    side, channels = int(rng.choice((8, 12, 16, 24))), int(rng.choice((4, 8, 16, 32)))
    x = b.parameter(draw.count(1, 4), channels, side, side)
    for _ in range(draw.count(1, 2)):
        h = b.unary("relu", b.binary("multiply", b.conv(x, channels, 3), b.parameter(channels, 1, 1)))
        h = b.binary("add", b.conv(h, channels, 3), b.parameter(channels, 1, 1))
        x = b.unary("relu", b.binary("add", x, h))
    return b.graph(x)


def moe(b: Builder, rng: np.random.Generator) -> Graph:
    """Every expert runs on every token; gates weigh them."""
    draw = Draw(rng)
    x, experts, width = b.parameter(draw.batch(), draw.width()), draw.count(2, 4), draw.width()
    tokens = b.shape(x)[0]
    gates, total, act = b.linear(x, experts), None, draw.activation()
    gates = b.node("softmax", [gates], b.shape(gates))
    for expert in range(experts):
        h = b.dot(b.unary(act, b.dot(x, width)), b.shape(x)[-1])
        gate = b.reshape(b.node("row", [gates], (tokens,), expert), tokens, 1)
        h = b.binary("multiply", h, gate)
        total = h if total is None else b.binary("add", total, h)
    return b.graph(total)  # type: ignore[arg-type]  # two experts at least


def recurrent(b: Builder, rng: np.random.Generator) -> Graph:
    """An unrolled gated cell."""
    draw = Draw(rng)
    batch, width = draw.batch(), draw.width()
    h, into, back = b.parameter(batch, width), b.parameter(width, width), b.parameter(width, width)
    for _ in range(draw.count(2, 4)):
        x = b.parameter(batch, width)
        mixed = b.binary("add", b.node("dot", [x, into], (batch, width)), b.node("dot", [h, back], (batch, width)))
        gate = b.unary("sigmoid", mixed)
        h = b.binary(
            "add", b.binary("multiply", gate, h), b.binary("multiply", b.unary("negate", gate), b.unary("tanh", mixed))
        )
    return b.graph(h)


def embedding(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    rows, width, tokens = int(rng.choice((64, 128, 256, 512, 1024))), draw.width(), draw.batch()
    table, index = b.parameter(rows, width), b.parameter(tokens, below=rows)
    x = b.node("take", [table, index], (tokens, width))
    x = b.binary("add", x, b.parameter(tokens, width)) if draw.coin() else x
    x = b.norm("layer_norm", x) if draw.coin() else x
    x = b.reduce(str(rng.choice(("mean", "max", "sum"))), x, 0) if draw.coin() else b.linear(x, draw.width())
    return b.graph(b.unary(draw.activation(), x))


def loss(b: Builder, rng: np.random.Generator) -> Graph:
    """Cross entropy against soft labels, or a scaled squared error."""
    draw = Draw(rng)
    x, labels = b.linear(b.parameter(draw.batch(), draw.width()), draw.width()), 0
    labels = b.parameter(*b.shape(x))
    if draw.coin():
        each = b.binary("multiply", b.node("log_softmax", [x], b.shape(x)), labels)
    else:
        each = b.unary("square", b.binary("subtract", x, labels))
    each = b.reduce("sum", each, -1)
    return b.graph(b.reduce("mean", b.unary("negate", each), 0) if draw.coin() else b.unary("log1p", each))


def mixer(b: Builder, rng: np.random.Generator) -> Graph:
    """Mixing over tokens, then over channels."""
    draw = Draw(rng)
    x = b.parameter(draw.batch() + 2, draw.width())
    tokens, width = b.shape(x)
    for _ in range(draw.count(1, 2)):
        h = b.transpose(b.norm("layer_norm", x), 1, 0)
        h = b.dot(b.unary("gelu", b.dot(h, draw.width())), tokens)
        x = b.binary("add", x, b.transpose(h, 1, 0))
        x = b.binary("add", x, b.dot(b.unary("gelu", b.dot(b.norm("layer_norm", x), draw.width())), width))
    return b.graph(x)


def reductions(b: Builder, rng: np.random.Generator) -> Graph:
    """Statistics over rows and columns, and values standardised by them."""
    draw = Draw(rng)
    x = b.parameter(draw.batch() + 1, draw.width())
    for _ in range(draw.count(1, 4)):
        axis, kind = draw.count(0, 1), str(rng.choice(("sum", "mean", "max")))
        statistic = b.reduce(kind, b.unary(str(rng.choice(UNARY)), x), axis, keep=True)
        x = b.binary(str(rng.choice(BINARY)), x, statistic)
    return b.graph(b.reduce("sum", x, draw.count(0, 1)) if draw.coin() else x)


def elementwise(b: Builder, rng: np.random.Generator) -> Graph:
    draw = Draw(rng)
    x = b.parameter(draw.batch(), draw.width())
    shape = b.shape(x)
    for _ in range(draw.count(2, 12)):
        if draw.coin():
            x = b.unary(str(rng.choice(UNARY)), x)
        else:
            other = b.parameter(*(shape if draw.coin() else shape[1:]))
            x = b.binary(str(rng.choice(BINARY)), x, other)
    return b.graph(x)


def optimiser(b: Builder, rng: np.random.Generator) -> Graph:
    """Adam's update of one to three weights."""
    draw = Draw(rng)
    outputs = []
    for _ in range(draw.count(1, 3)):
        shape = (draw.batch(), draw.width())
        weight, gradient, first, second = (b.parameter(*shape) for _ in range(4))
        m = b.binary("add", b.node("scale", [first], shape, 0.9), b.node("scale", [gradient], shape, 0.1))
        v = b.binary(
            "add", b.node("scale", [second], shape, 0.99), b.node("scale", [b.unary("square", gradient)], shape, 0.01)
        )
        step = b.node("scale", [b.binary("multiply", m, b.unary("rsqrt", v))], shape, 1e-3)
        outputs += [b.binary("subtract", weight, step), m, v]
    return b.graph(*outputs)


def distances(b: Builder, rng: np.random.Generator) -> Graph:
    """All pairs of rows: [n, 1, d] - [1, m, d]."""
    draw = Draw(rng)
    width = int(rng.choice(_WIDTHS[:5]))
    x, y = b.parameter(draw.batch(), width), b.parameter(draw.batch(), width)
    away = b.node("outer_subtract", [x, y], (b.shape(x)[0], b.shape(y)[0], width))
    kernel = b.reduce("sum", b.unary("square", away), -1)
    kernel = b.unary("exp", b.node("scale", [kernel], b.shape(kernel), -0.5))
    return b.graph(b.dot(kernel, draw.width()) if draw.coin() else b.reduce("mean", kernel, draw.count(0, 1)))


def scan(b: Builder, rng: np.random.Generator) -> Graph:
    """Cumulative sums, as of linear attention."""
    draw = Draw(rng)
    x = b.parameter(draw.batch() + 1, draw.width())
    gate = b.unary("sigmoid", b.dot(x, b.shape(x)[-1]))
    total = b.node("cumsum", [b.binary("multiply", gate, x)], b.shape(x), 0)
    x = b.binary("divide", total, b.node("cumsum", [gate], b.shape(x), 0)) if draw.coin() else b.binary("add", total, gate)
    return b.graph(b.unary(draw.activation(), x))


def random_graph(b: Builder, rng: np.random.Generator) -> Graph:
    """2 to 14 operations on values of matching shapes; every value that nobody reads is an output."""
    draw = Draw(rng)
    batch = draw.batch() + 1
    values = [b.parameter(batch, draw.width())]
    read: set[int] = set()

    def pick() -> int:
        value = values[draw.count(0, len(values) - 1)] if draw.coin() else values[-1]
        read.add(value)
        return value

    for _ in range(draw.count(2, 14)):
        x, kind = pick(), draw.count(0, 9)
        if kind <= 2:
            new = b.unary(str(rng.choice(UNARY)), x)
        elif kind <= 4:
            twins = [value for value in values if b.shape(value) == b.shape(x) and value != x]
            other = twins[draw.count(0, len(twins) - 1)] if twins else b.parameter(b.shape(x)[-1])
            read.add(other)
            new = b.binary(str(rng.choice(BINARY)), x, other)
        elif kind == 5:
            new = b.dot(x, draw.width())
        elif kind == 6:
            new = b.norm(str(rng.choice(("layer_norm", "rms_norm"))), x)
        elif kind == 7:
            new = b.node(str(rng.choice(("softmax", "log_softmax"))), [x], b.shape(x))
        elif kind == 8:
            new = b.binary("subtract", x, b.reduce(str(rng.choice(("max", "mean", "sum"))), x, draw.count(0, 1), keep=True))
        else:
            new = b.concat(x, b.half(x, str(rng.choice(("first", "second")))), 1)
        values.append(new)
    return b.graph(*[value for value in values if value not in read and value >= 0])


TEMPLATES: dict[str, Callable[[Builder, np.random.Generator], Graph]] = {
    function.__name__: function
    for function in (
        mlp, residual_mlp, gated_mlp, attention, llama_block, convnet, resnet_block, moe, recurrent, embedding, loss, mixer,
        reductions, elementwise, optimiser, distances, scan, random_graph,
    )
}  # fmt: skip
