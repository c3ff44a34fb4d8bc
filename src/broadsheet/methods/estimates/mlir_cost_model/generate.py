"""Tensor programs to learn from: templates of the blocks of deep networks, random graphs, pieces of both, resampled shapes.

A `Graph` is a list of nodes in program order. It can be run as a JAX function, split at every k-th node, and cut into
segments that run one after the other, so that no fusion passes a cut. `generate` is a stream without an end: program
number n depends on the seed and n alone, so that a corpus can be made in parts. Weights are arguments, never constants,
because a compiler would fold those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

Shape = tuple[int, ...]
#: a graph must stay below these, so that one call takes milliseconds
MAX_FLOPS, MAX_ELEMENTS = 6e7, 2**19
UNARY = ("tanh", "exp", "gelu", "silu", "relu", "sigmoid", "erf", "square", "rsqrt", "log1p", "sin", "negate")
BINARY = ("add", "multiply", "subtract", "maximum", "divide")


@dataclass(frozen=True)
class Node:
    """``inputs`` index the graph's values: its parameters first, then its nodes. ``options``: of the operation (`JAX`)."""

    op: str
    inputs: tuple[int, ...]
    shape: Shape
    options: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Graph:
    """``parameters``: shapes of the arguments, float32; those in ``ids`` (place -> size) are int32 indices below that
    size."""

    template: str
    parameters: tuple[Shape, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    ids: tuple[tuple[int, int], ...] = ()

    def shape(self, value: int) -> Shape:
        count = len(self.parameters)
        return self.parameters[value] if value < count else self.nodes[value - count].shape

    def live(self, after: int) -> tuple[int, ...]:
        """Nodes' values that exist after node ``after`` and are needed later, the graph's outputs among them."""
        first = len(self.parameters)
        later = {value for node in self.nodes[after + 1 :] for value in node.inputs} | set(self.outputs)
        return tuple(sorted(value for value in later if first <= value <= first + after))

    def segments(self, cuts: Sequence[int]) -> tuple[Graph, ...]:
        """The pieces between the cuts; a cut at p stands before node p. Run in order they compute what the graph does.

        A segment is a function of its own, because a barrier inside one function (`optimization_barrier`) does not stop
        XLA's fusion on the CPU: it is removed before.
        """
        bounds = [0, *sorted(cuts), len(self.nodes)]
        return tuple(self.piece(start, stop) for start, stop in pairwise(bounds))

    def piece(self, start: int, stop: int) -> Graph:
        """Nodes ``start`` to ``stop`` alone: what they need becomes parameters, what is needed later becomes outputs."""
        first = len(self.parameters)
        outputs = [value for value in self.live(start + len(self.nodes[start:stop]) - 1) if value >= first + start]
        return self.part(range(start, min(stop, len(self.nodes))), outputs)

    def part(self, chosen: Sequence[int], outputs: Sequence[int]) -> Graph:
        """Some nodes alone, in their order; ``outputs``: values that they make. What else they need becomes parameters."""
        inside = [len(self.parameters) + place for place in chosen]
        outer = sorted({value for place in chosen for value in self.nodes[place].inputs} - set(inside))
        places = {value: place for place, value in enumerate([*outer, *inside])}
        nodes, sizes = [self.nodes[place] for place in chosen], dict(self.ids)
        return Graph(
            self.template, tuple(self.shape(value) for value in outer),
            tuple(replace(node, inputs=tuple(places[value] for value in node.inputs)) for node in nodes),
            tuple(places[value] for value in outputs),
            tuple((places[value], sizes[value]) for value in outer if value in sizes),
        )  # fmt: skip

    def makers(self, values: Sequence[int], given: Sequence[int] = ()) -> list[int]:
        """Nodes that make the values from parameters and from what is ``given``, in order."""
        first, found = len(self.parameters), set[int]()
        waiting = list(values)
        while waiting:
            place = waiting.pop() - first
            if place >= 0 and place not in found:
                found.add(place)
                waiting += [value for value in self.nodes[place].inputs if value not in given]
        return sorted(found)

    def function(self) -> Callable[..., tuple[Any, ...]]:
        """The graph as a JAX function of its parameters; returns a tuple."""

        def run(*arguments: Any) -> tuple[Any, ...]:
            values = list(arguments)
            table = _jax()
            for node in self.nodes:
                values.append(table[node.op](*[values[value] for value in node.inputs], *node.options))
            return tuple(values[value] for value in self.outputs)

        return run

    def arguments(self) -> list[Any]:
        """Shapes and dtypes of the arguments, for `capture`."""
        import jax

        ids = dict(self.ids)
        kinds = ["int32" if place in ids else "float32" for place in range(len(self.parameters))]
        return [jax.ShapeDtypeStruct(shape, kind) for shape, kind in zip(self.parameters, kinds, strict=True)]

    @property
    def flops(self) -> float:
        """Multiply-adds of the contractions, times two; one for each element of anything else."""
        return float(sum(self._flops(node) for node in self.nodes))

    def _flops(self, node: Node) -> int:
        if node.op in ("dot", "matmul", "matmul_t"):
            return 2 * prod(node.shape) * self.shape(node.inputs[0])[-1]
        if node.op == "conv":
            return 2 * prod(node.shape) * prod(self.shape(node.inputs[1])[1:])
        return prod(node.shape)


def _jax() -> dict[str, Callable[..., Any]]:
    """What every operation is in JAX."""
    import jax
    import jax.numpy as jnp

    def layer_norm(x: Any, scale: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * scale

    def halves(x: Any) -> tuple[Any, Any]:
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    def rotate(x: Any, cos: Any, sin: Any) -> Any:
        a, b = halves(x)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def pool(x: Any, size: int) -> Any:
        window = (1, 1, size, size)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")

    return {
        "tanh": jnp.tanh, "exp": jnp.exp, "gelu": jax.nn.gelu, "silu": jax.nn.silu, "relu": lambda x: jnp.maximum(x, 0.0),
        "sigmoid": jax.nn.sigmoid, "erf": jax.scipy.special.erf, "square": lambda x: x * x, "negate": jnp.negative,
        "rsqrt": lambda x: jax.lax.rsqrt(x * x + 1.0), "log1p": lambda x: jnp.log1p(jnp.abs(x)), "sin": jnp.sin,
        "add": jnp.add, "multiply": jnp.multiply, "subtract": jnp.subtract, "maximum": jnp.maximum,
        "divide": lambda x, y: x / (1.0 + jnp.abs(y)),
        "where": lambda x, y: jnp.where(x > 0, x, y),
        "scale": lambda x, factor: x * factor,
        "dot": jnp.dot, "matmul": jnp.matmul, "matmul_t": lambda x, y: jnp.matmul(x, jnp.swapaxes(y, -1, -2)),
        "softmax": lambda x: jax.nn.softmax(x, -1), "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
        "layer_norm": layer_norm,
        "rms_norm": lambda x, scale: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale,
        "sum": lambda x, axis, keep: x.sum(axis, keepdims=keep), "mean": lambda x, axis, keep: x.mean(axis, keepdims=keep),
        "max": lambda x, axis, keep: x.max(axis, keepdims=keep), "cumsum": lambda x, axis: jnp.cumsum(x, axis),
        "transpose": jnp.transpose, "reshape": jnp.reshape, "concat": lambda x, y, axis: jnp.concatenate([x, y], axis),
        "first_half": lambda x: halves(x)[0], "second_half": lambda x: halves(x)[1], "rotate": rotate,
        "row": lambda x, place: x[:, place],
        "causal": lambda x: jnp.where(jnp.tril(jnp.ones(x.shape[-2:], bool)), x, -1e9),
        "take": lambda table, index: jnp.take(table, index, axis=0, mode="clip"),
        "conv": lambda x, w, stride: jax.lax.conv(x, w, (stride, stride), "SAME"), "pool": pool,
        "outer_subtract": lambda x, y: x[:, None, :] - y[None, :, :],
    }  # fmt: skip


class Builder:
    """Builds a graph line by line; every method returns the new value's number."""

    def __init__(self, template: str):
        self.template = template
        self.parameters: list[Shape] = []
        self.nodes: list[tuple[str, tuple[Any, ...], Shape, tuple[Any, ...]]] = []
        self.ids: dict[int, int] = {}

    def parameter(self, *shape: int, below: int = 0) -> int:
        """Parameters are numbered -1, -2, ... until the graph is built: more may come after nodes."""
        self.parameters.append(shape)
        if below:
            self.ids[len(self.parameters) - 1] = below
        return -len(self.parameters)

    def shape(self, value: int) -> Shape:
        return self.parameters[-value - 1] if value < 0 else self.nodes[value][2]

    def node(self, op: str, inputs: Sequence[int], shape: Shape, *options: Any) -> int:
        self.nodes.append((op, tuple(inputs), shape, options))
        return len(self.nodes) - 1

    def unary(self, op: str, x: int) -> int:
        return self.node(op, [x], self.shape(x))

    def binary(self, op: str, x: int, y: int) -> int:
        return self.node(op, [x, y], np.broadcast_shapes(self.shape(x), self.shape(y)))

    def dot(self, x: int, width: int) -> int:
        """With a new weight of ``width`` columns."""
        return self.node("dot", [x, self.parameter(self.shape(x)[-1], width)], (*self.shape(x)[:-1], width))

    def linear(self, x: int, width: int) -> int:
        return self.binary("add", self.dot(x, width), self.parameter(width))

    def matmul(self, x: int, y: int, transposed: bool = False) -> int:
        width = self.shape(y)[-2 if transposed else -1]
        return self.node("matmul_t" if transposed else "matmul", [x, y], (*self.shape(x)[:-1], width))

    def norm(self, op: str, x: int) -> int:
        return self.node(op, [x, self.parameter(self.shape(x)[-1])], self.shape(x))

    def reduce(self, op: str, x: int, axis: int, keep: bool = False) -> int:
        shape = list(self.shape(x))
        axis %= len(shape)
        if keep:
            shape[axis] = 1
        else:
            shape.pop(axis)
        return self.node(op, [x], tuple(shape), axis, keep)

    def reshape(self, x: int, *shape: int) -> int:
        return self.node("reshape", [x], shape, shape)

    def transpose(self, x: int, *order: int) -> int:
        return self.node("transpose", [x], tuple(self.shape(x)[axis] for axis in order), order)

    def concat(self, x: int, y: int, axis: int) -> int:
        shape = list(self.shape(x))
        shape[axis] += self.shape(y)[axis]
        return self.node("concat", [x, y], tuple(shape), axis)

    def half(self, x: int, which: str) -> int:
        *rest, last = self.shape(x)
        return self.node(f"{which}_half", [x], (*rest, last // 2 if which == "first" else last - last // 2))

    def conv(self, x: int, channels: int, size: int, stride: int = 1) -> int:
        batch, before, height, width = self.shape(x)
        weight = self.parameter(channels, before, size, size)
        return self.node("conv", [x, weight], (batch, channels, -(-height // stride), -(-width // stride)), stride)

    def graph(self, *outputs: int) -> Graph:
        """Raises ValueError where a value has no use: a compiler would remove it."""
        count = len(self.parameters)
        nodes = tuple(
            Node(op, tuple(-v - 1 if v < 0 else count + v for v in inputs), shape, options)
            for op, inputs, shape, options in self.nodes
        )
        ends = tuple(count + value for value in outputs)
        used = {value for node in nodes for value in node.inputs} | set(ends)
        if unused := set(range(count + len(nodes))) - used:
            raise ValueError(f"template {self.template} makes values without a use: {sorted(unused)}")
        return Graph(self.template, tuple(self.parameters), nodes, ends, tuple(self.ids.items()))


def generate(seed: int = 0, start: int = 0, templates: Sequence[str] | None = None) -> Iterator[tuple[int, Graph]]:
    """Numbered programs from number ``start`` on: the templates by turns, half of them whole, the rest pieces of k
    nodes. Raises ValueError for an unknown template."""
    from .templates import TEMPLATES

    names = list(templates or TEMPLATES)
    if unknown := set(names) - set(TEMPLATES):
        raise ValueError(f"no template {', '.join(sorted(unknown))}; there are {', '.join(TEMPLATES)}")
    number = start
    while True:
        yield number, one(names[number % len(names)], np.random.default_rng([seed, number]))
        number += 1


def one(template: str, rng: np.random.Generator) -> Graph:
    """A random program of a template within the limits."""
    graph = whole(template, rng)
    if rng.random() < 0.5 and len(graph.nodes) > 3:  # a piece: the graph is split at every k-th node
        k = int(rng.integers(2, min(10, len(graph.nodes))))
        start = k * int(rng.integers(0, -(-len(graph.nodes) // k)))
        graph = graph.piece(start, start + k)
    return graph


def whole(template: str, rng: np.random.Generator) -> Graph:
    """A random program of a template, not split."""
    from .templates import TEMPLATES

    for _ in range(1000):
        graph = TEMPLATES[template](Builder(template), rng)
        sizes = [*graph.parameters, *(node.shape for node in graph.nodes)]
        if graph.flops <= MAX_FLOPS and max(map(prod, sizes)) <= MAX_ELEMENTS:
            return graph
    raise ValueError(f"template {template} gives no program below {MAX_FLOPS:.0e} FLOPs in 1000 tries")
