"""Activation-aware scaling (BitStack, arXiv 2410.23918, section 2.1).

A linear layer's column j is multiplied by s_j, and what makes the channel j is divided by it, so that the decomposition
spends its precision on the channels that carry much:

    s_j = mean over samples of || X[sample, :, j] ||_2 + 1e-3

There is no exponent, no normalisation and no search. What makes a channel (a norm's gain, ``up_proj``, ``v_proj``) is a
`Fold` of the walker; a layer whose producer cannot take the scale, such as ``o_proj`` under grouped-query attention, stays
as it is.

The scales are those of the original model, all found in one walk: scaling preserves the function, so scaling on the way
would change none of them. They are applied afterwards, block by block, in float32.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from broadsheet.core.models import folds
from broadsheet.core.models.folds import Fold
from broadsheet.core.models.observers import Norms
from broadsheet.core.models.walker import Block, walk

EPSILON = 1e-3

#: the folds of one block with their scales [channels]
Scales = list[tuple[Fold, torch.Tensor]]


@torch.no_grad()
def find_scales(model: PreTrainedModel, ids: torch.Tensor) -> list[Scales]:
    """The scales of every block on ``ids`` [samples, tokens]; the model stays as it is.

    Raises ValueError where scaling would change what a block computes.
    """
    found = []
    for block in walk(model, ids):
        places = [*folds.norm_folds(block), *folds.linear_folds(block)]
        norms = {fold: Norms() for fold in places}
        outputs = block.observe({fold.readers[0]: observer for fold, observer in norms.items()})
        scales = [(fold, norms[fold].mean + EPSILON) for fold in places]
        _check(block, scales, outputs[0])
        found.append(scales)
    return found


def apply_scales(block: Block, scales: Scales) -> None:
    """Scales the block in place; hand it over with linear layers in float32, or their weights are rounded again."""
    for fold, factor in scales:
        folds.scale(block, fold, factor)


def _check(block: Block, scales: Scales, output: torch.Tensor) -> None:
    """Raises ValueError unless a scaled copy of the block answers its first batch as the block does.

    The tolerance is the square root of the weights' precision, relative to what the block adds to its input: far above
    rounding, far below what a wrong fold does.
    """
    first = block.passes[0]
    twin = replace(block, module=deepcopy(block.module), passes=[first])
    apply_scales(twin, scales)
    off = (twin.run()[0].float() - output.float()).norm() / (output.float() - first.hidden.float()).norm()
    if not off <= torch.finfo(next(block.module.parameters()).dtype).eps ** 0.5:
        raise ValueError(
            f"scaling changes what {block.name} computes (by {float(off):.2g} of its update); compress with scale=False"
        )
