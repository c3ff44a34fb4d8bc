"""Training what is not codes: codebooks, scales and norms, towards what the uncompressed block or model puts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.folds import is_norm
from broadsheet.core.models.walker import Block, widened

from .layer import Tunable


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Codebooks, scales and the parameters of norms, each once."""
    found = [p for part in module.modules() if isinstance(part, Tunable) or is_norm(part) for p in part.parameters(False)]
    return list(dict.fromkeys(found))


def tune_block(block: Block, targets: Sequence[torch.Tensor], epochs: int, lr: float, early_stop: int, seed: int) -> None:
    """Trains a block to give ``targets`` (a tensor a batch), which the uncompressed one gave on the same inputs.

    A step a batch of the walk; a batch in eight, at least one, is held out to see when it gets no better.
    """

    def loss(batch: int) -> torch.Tensor:
        return F.mse_loss(block.output(block.passes[batch]), targets[batch])

    _tune(block.module, loss, len(targets), epochs, lr, (0.9, 0.95), early_stop, seed)


def tune_model(
    model: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, epochs: int, lr: float, early_stop: int, seed: int
) -> None:
    """Trains a model to predict as ``teacher`` does: KL over all tokens of ``ids`` [samples, tokens], a step a sample."""

    def loss(sample: int) -> torch.Tensor:
        row = ids[sample : sample + 1].to(model.device)
        with torch.no_grad():
            truth = teacher(row, use_cache=False).logits[0].float().log_softmax(-1)
        guess = model(row, use_cache=False).logits[0].float().log_softmax(-1)
        return F.kl_div(guess, truth, reduction="batchmean", log_target=True)

    with widened(teacher):
        _tune(model, loss, len(ids), epochs, lr, (0.9, 0.999), early_stop, seed)


def _tune(
    module: nn.Module,
    loss: Callable[[int], torch.Tensor],
    count: int,
    epochs: int,
    lr: float,
    betas: tuple[float, float],
    early_stop: int,
    seed: int,
) -> None:
    """Adam over batches 0 .. count; the parameters of least loss on the held out ones, which may be those of the start."""
    parameters = trained(module)
    held_out = max(1, count // 8) if count > 1 else 0
    train = list(range(count - held_out))
    judge = list(range(count - held_out, count)) or train
    draw = torch.Generator().manual_seed(seed)
    needed = {p: p.requires_grad for p in module.parameters()}
    with widened(module):
        for p in needed:
            p.requires_grad_(p in set(parameters))

        def held() -> tuple[float, list[torch.Tensor]]:
            with torch.no_grad():
                return sum(float(loss(batch)) for batch in judge), [p.detach().clone() for p in parameters]

        optimiser = torch.optim.Adam(parameters, lr=lr, betas=betas)
        (least, best), worse = held(), 0
        for _ in range(epochs):
            with torch.enable_grad():
                for place in torch.randperm(len(train), generator=draw).tolist():
                    optimiser.zero_grad()
                    loss(train[place]).backward()
                    optimiser.step()
            now, values = held()
            worse = 0 if now < least else worse + 1
            if now < least:
                least, best = now, values
            if worse >= early_stop:
                break
        optimiser.zero_grad()
        for p, needs in needed.items():
            p.requires_grad_(needs)
    with torch.no_grad():
        for p, value in zip(parameters, best):
            p.copy_(value)  # in the model's own dtype
