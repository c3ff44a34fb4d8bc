"""The universal order of a stack: which block is loaded next (BitStack, arXiv 2410.23918, section 2.2).

The stack begins with block 0 of every layer. Level b = 1, 2, ... brings block b of every layer, the most useful first, so
that the block counts of any two layers differ by one at most. How useful is a score, the lower the better. The paper's:
with b blocks in every layer, the perplexity when this layer alone has b + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

#: (layer, block), both from 0
Order = list[tuple[int, int]]


def stack_order(scores: Sequence[Sequence[float]] | np.ndarray) -> Order:
    """The order after block 0 of every layer, from ``scores`` [levels, layers].

    Ties go to the earlier layer. A NaN becomes the same layer's score one level up plus the largest finite score of its
    level, which puts it after those that have one. Raises ValueError for a NaN at the last level.
    """
    table = np.array(scores, dtype=np.float64, ndmin=2)
    if np.isnan(table[-1:]).any():
        raise ValueError("a score of the last level is NaN; check the model and the calibration tokens, or use sort='error'")
    for level in range(len(table) - 2, -1, -1):
        row, missing = table[level], np.isnan(table[level])
        finite = row[np.isfinite(row)]
        row[missing] = table[level + 1][missing] + (finite.max() if finite.size else 0.0)
    return [(int(layer), level + 1) for level, row in enumerate(table) for layer in row.argsort(kind="stable")]


def whole_order(order: Order, layers: int) -> Order:
    """Block 0 of every layer, then ``order``; raises ValueError unless every block comes once, after those below it."""
    whole = [(layer, 0) for layer in range(layers)] + list(order)
    counts = [0] * layers
    for layer, block in whole:
        if not 0 <= layer < layers:
            raise ValueError(f"the order names layer {layer}; there are {layers} layers")
        if block != counts[layer]:
            raise ValueError(f"the order has block {block} of layer {layer} where {counts[layer]} is due")
        counts[layer] += 1
    if len(set(counts)) > 1:
        raise ValueError(f"the order gives some layers {min(counts)} blocks and some {max(counts)}")
    return whole


def counts_at(whole: Order, layers: int, position: int) -> list[int]:
    """Blocks of every layer when the first ``position`` entries of the whole order are loaded."""
    counts = [0] * layers
    for layer, _ in whole[:position]:
        counts[layer] += 1
    return counts


def prefix_bytes(whole: Order, block_bytes: Sequence[int]) -> list[int]:
    """Bytes of the first 0, 1, 2, ... blocks; ``block_bytes`` by layer."""
    return [0, *accumulate(block_bytes[layer] for layer, _ in whole)]


def error_scores(errors: Sequence[Sequence[float]], block_bytes: Sequence[int]) -> np.ndarray:
    """Scores [levels, layers] without a model: minus the share of its squared error that a block takes away, by byte.

    ``errors`` [layers, blocks + 1]: squared error after 0, 1, ... blocks, of the scaled weight, which weighs an input
    channel by the norm of what comes in there. A share of the weight's square, since layers differ in magnitude.
    """
    table = np.array(errors, dtype=np.float64)
    share = table / np.maximum(table[:, :1], np.finfo(np.float64).tiny)
    return (np.diff(share[:, 1:], axis=1) / np.array(block_bytes)[:, None]).T
