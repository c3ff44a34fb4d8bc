"""How useful the next block of every layer is, found by trying (BitStack, arXiv 2410.23918, section 2.2).

At level b every linear layer holds the sum of its first b blocks; each in turn gets one more, the model is run on held-out
tokens, and the block is taken away again. That is (levels) x (layers) evaluations, the dearest part of compressing. An
evaluation begins at the block that was changed: what comes before it is the same for all layers of a level, and is
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.walker import decoder_blocks, walk, widened

from .decompose import Layout, compose

#: samples in one forward pass
BATCH = 8


@torch.no_grad()
def model_scores(
    model: PreTrainedModel,
    blocks: Mapping[str, list[torch.Tensor]],
    layouts: Mapping[str, Layout],
    ids: torch.Tensor,
    labels: torch.Tensor,
    measure: Literal["ppl", "loss"],
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Scores [levels, layers]: the model's perplexity or loss when this layer alone has one block more than the level.

    ``model``: dense, its linear layers named in ``blocks`` are overwritten. ``ids`` and ``labels`` [samples, tokens]: the
    label of a token is what should follow it. ``progress(level)`` is called after every level.
    """
    with widened(model):
        return _model_scores(model, blocks, layouts, ids, labels, measure, progress)


def _model_scores(
    model: PreTrainedModel,
    blocks: Mapping[str, list[torch.Tensor]],
    layouts: Mapping[str, Layout],
    ids: torch.Tensor,
    labels: torch.Tensor,
    measure: str,
    progress: Callable[[int], None] | None,
) -> list[list[float]]:
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in blocks}  # type: ignore[misc]
    levels = len(next(iter(blocks.values()))) - 1
    table = []
    for level in range(1, levels + 1):
        for name, linear in linears.items():
            linear.weight.copy_(compose(blocks[name][:level], layouts[name]))
        scores: dict[str, float] = {}
        for block in walk(model, ids, BATCH):
            for name, linear in block.linears.items():
                below = linear.weight.clone()
                linear.weight.copy_(compose(blocks[name][: level + 1], layouts[name]))
                with _begun(model, block.index, block.run()):
                    scores[name] = _loss(model, ids, labels, measure)
                linear.weight.copy_(below)
        table.append([scores[name] for name in blocks])
        if progress:
            progress(level)
    return table


@torch.no_grad()
def predictions(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The token that the model finds most likely after each of ``ids``, [samples, tokens]."""
    with widened(model):
        return torch.cat([model(part, use_cache=False).logits.argmax(-1) for part in ids.to(model.device).split(BATCH)])


def following(ids: torch.Tensor) -> torch.Tensor:
    """The labels of ``ids`` [samples, tokens] as a text: the next token, and -100 after the last."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


@contextmanager
def _begun(model: PreTrainedModel, index: int, outputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within, every forward pass begins after decoder block ``index``, whose outputs are given, a tensor a pass."""
    modules = list(decoder_blocks(model).values())[: index + 1]
    given = iter(outputs)

    def passed_on(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    def put_in(*args: Any, **kwargs: Any) -> Any:
        return next(given)

    own = [module.__dict__.get("forward") for module in modules]  # accelerate puts one there
    try:
        for module in modules[:-1]:
            module.forward = passed_on
        modules[-1].forward = put_in
        yield
    finally:
        for module, forward in zip(modules, own):
            del module.forward  # which uncovers the method of the class
            if forward is not None:
                module.forward = forward


def _loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, measure: str) -> float:
    """Mean over samples of the mean cross-entropy over labelled tokens, or its exponential in float32."""
    losses = []
    for part, wanted in zip(ids.to(model.device).split(BATCH), labels.to(model.device).split(BATCH)):
        logits = model(part, use_cache=False).logits.float()
        by_token = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        losses.append(by_token.sum(1) / (wanted != -100).sum(1))
    loss = torch.cat(losses).mean()
    return float(loss.exp() if measure == "ppl" else loss)
