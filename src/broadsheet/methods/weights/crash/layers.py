"""Which layers of a model are alike, and which of them an emulator keeps (CRaSh, arXiv 2310.15477, sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from broadsheet.core.models.walker import decoder_blocks, widened

POOLINGS = ("mean_weighted", "mean", "mean_all", "max", "max_nonpad", "last")
#: samples in one forward pass
BATCH = 8


@torch.no_grad()
def representations(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, pooling: str = "mean_weighted"
) -> torch.Tensor:
    """What every decoder block puts out, pooled over the tokens of a sample: float32 [layers, samples, hidden_size].

    ``ids`` [samples, tokens]; ``mask`` of the same shape, 1 where a token counts: padding does not, and what follows the
    context need not. These are the blocks' own outputs; the last hidden state that transformers returns, which the official
    code takes, has gone through the final norm, so that the last block looks unlike the others whatever it does.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ValueError("calibration must be token ids of shape [samples, tokens], at least one of each")
    mask = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    if mask.shape != ids.shape or not bool(mask.any(1).all()):
        raise ValueError("mask must have the shape of the ids and keep a token of every sample")
    outputs: list[torch.Tensor] = []
    found: list[torch.Tensor] = []

    def see(module: torch.nn.Module, args: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    handles = [block.register_forward_hook(see) for block in decoder_blocks(model).values()]
    try:
        with widened(model):
            for some, kept in zip(ids.to(model.device).split(BATCH), mask.to(model.device).split(BATCH)):
                outputs.clear()
                model(some, attention_mask=kept, use_cache=False, logits_to_keep=1)
                found.append(torch.stack([pool(output.float(), kept, pooling) for output in outputs]))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found, 1)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """``hidden`` [samples, tokens, hidden_size] as [samples, hidden_size].

    "mean_weighted": weights 1, 2, 3 ... over the tokens that count (positions, in the official code, which is the same
    unless samples are padded on the left); "mean" of the tokens that count, "mean_all" of all; "max" of all, "max_nonpad" of
    those that count; "last" that counts.
    """
    counts = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "mean_weighted":
        counts = counts * mask.cumsum(1).unsqueeze(-1)
    if pooling in ("mean_weighted", "mean"):
        return (hidden * counts).sum(1) / counts.sum(1)
    if pooling == "mean_all":
        return hidden.mean(1)
    if pooling == "max":
        return hidden.amax(1)
    if pooling == "max_nonpad":
        return hidden.masked_fill(counts == 0, -torch.inf).amax(1)
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device) * mask
        return hidden[torch.arange(len(hidden), device=hidden.device), places.argmax(1)]
    raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got '{pooling}'")


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of ``x`` [samples, d] and ``y`` [samples, e]: <K, L> / (|K| |L|) of centred Grams.

    1 for equal representations up to rotation and scale. Biased upwards when there are fewer samples than dimensions; of
    256 samples or more the order is that of the unbiased one.
    """
    grams = []
    for z in (x.double(), y.double()):
        centred = z - z.mean(0)
        grams.append(centred @ centred.T)
    scale = grams[0].norm() * grams[1].norm()
    if not scale > 0:
        raise ValueError("a layer gives the same representation for every sample; give samples that differ")
    return float((grams[0] * grams[1]).sum() / scale)


def adjacent(hidden: torch.Tensor) -> list[float]:
    """CKA of each layer of ``hidden`` [layers, samples, d] with the next one."""
    return [cka(left, right) for left, right in pairwise(hidden)]


def clusters(similarities: Sequence[float], count: int) -> list[list[int]]:
    """Runs of layers, ``count`` of them, cut where neighbours are least alike.

    The paper merges, again and again, the two neighbouring clusters whose facing layers are most alike; as those are always
    neighbouring layers, that is cutting at the count - 1 smallest ``similarities`` (of layer i and i + 1). Of equal ones the
    left is merged first, so the right is cut first.
    """
    order = sorted(range(len(similarities)), key=lambda i: (similarities[i], -i))
    cuts = sorted(order[: count - 1])
    bounds = [0, *(cut + 1 for cut in cuts), len(similarities) + 1]
    return [list(range(first, last)) for first, last in pairwise(bounds)]


def centres(groups: Sequence[Sequence[int]]) -> list[int]:
    """The layer of each cluster that is kept: the middle one, of two the right."""
    return [group[len(group) // 2] for group in groups]


def dropped_in_turn(layers: int, count: int, similarities: Callable[[list[int]], Sequence[float]]) -> list[int]:
    """What is left of ``layers`` when the right one of the most alike neighbours is dropped until ``count`` are left.

    ``similarities(kept)``: those of neighbours in the model of these layers alone, measured again after every drop.
    """
    kept = list(range(layers))
    while len(kept) > count:
        found = similarities(kept)
        del kept[max(range(len(found)), key=found.__getitem__) + 1]
    return kept


def evenly(layers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``layers``, ends included, as evenly as can be."""
    if count == 1:
        return [layers[len(layers) // 2]]
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def nearest(index: int, kept: Sequence[int]) -> tuple[int, int | None]:
    """The kept layer nearest to ``index``, of two the right one, and the nearest on its other side, if there is one."""
    left = max((layer for layer in kept if layer < index), default=None)
    right = min((layer for layer in kept if layer > index), default=None)
    if left is None or right is None:
        only = right if left is None else left
        assert only is not None
        return only, None
    return (left, right) if index - left < right - index else (right, left)
