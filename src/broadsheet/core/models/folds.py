"""Where a channel's scale (or offset) can be moved between the module that makes it and those that read it.

A `Fold` is such a place: a norm and the linear layers fed by it, ``up_proj`` and ``down_proj``, ``v_proj`` and ``o_proj``.
Scaling there preserves the function. Smoothing, activation-aware scaling, symmetrisation and the injection of outliers all
stand on it. Arithmetic is in float32 (float64 for float64 models), whatever the weights are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .walker import Block


@dataclass(frozen=True)
class Fold:
    """``producer`` makes the channels that all ``readers`` take in; full names within one block."""

    producer: str
    readers: tuple[str, ...]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm or RMS norm with a gain."""
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def adds_one(norm: nn.Module) -> bool:
    """Gemma's norms multiply by 1 + weight."""
    return "gemma" in type(norm).__name__.lower()


def norm_folds(block: Block) -> list[Fold]:
    """The block's norms whose output goes into linear layers and nowhere else, with those layers.

    Found by running the block's first batch. Norms that feed something else as well (the residual stream of an OPT that
    norms after its blocks, a router) are left out: nothing can be moved there.
    """
    if not block.passes:
        raise ValueError("folds are found by running the block: walk the model with calibration tokens")
    made: dict[int, str] = {}
    alive: list[torch.Tensor] = []  # an id is only the tensor's own while it lives
    readers: dict[str, list[str]] = {}
    first = replace(block, passes=block.passes[:1])

    def leaves(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> None:
            made[id(result)] = name
            alive.append(result)

        return hook

    def enters(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in made:
                readers.setdefault(made[id(args[0])], []).append(name)

        return hook

    handles = []
    for local, module in block.module.named_modules():
        name = f"{block.name}.{local}"
        if is_norm(module):
            handles.append(module.register_forward_hook(leaves(name)))
        elif isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(enters(name)))
    try:
        first.run()
    finally:
        for handle in handles:
            handle.remove()
    return [fold for fold in (Fold(name, tuple(found)) for name, found in readers.items()) if _alone(first, fold)]


def _alone(block: Block, fold: Fold) -> bool:
    """Whether only the readers see what the producer makes: with theirs held, the block gives the same whatever it makes."""
    held: dict[str, torch.Tensor] = {}
    changing = False

    def changes(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor | None:
        return result + 1 if changing else None

    def holds(name: str) -> Callable[..., torch.Tensor]:
        return lambda module, args, result: held.setdefault(name, result)

    handles = [block.get(fold.producer).register_forward_hook(changes)]
    handles += [block.get(name).register_forward_hook(holds(name)) for name in fold.readers]
    try:
        before = block.run()
        changing = True
        return all(_same(one, other) for one, other in zip(before, block.run(), strict=True))
    finally:
        for handle in handles:
            handle.remove()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def linear_folds(block: Block) -> list[Fold]:
    """Linear layers whose rows are another one's columns: up -> down (gated), fc1 -> fc2 (ReLU), v -> o (no grouping)."""
    names = {name.rsplit(".", 1)[-1]: name for name in block.linears}
    found = []
    if {"up_proj", "gate_proj", "down_proj"} <= names.keys():
        found.append(Fold(names["up_proj"], (names["down_proj"],)))
    if {"fc1", "fc2"} <= names.keys() and isinstance(getattr(block.module, "activation_fn", None), nn.ReLU):
        found.append(Fold(names["fc1"], (names["fc2"],)))
    for out in ("o_proj", "out_proj"):
        if "v_proj" in names and out in names:
            v, o = block.linears[names["v_proj"]], block.linears[names[out]]
            if v.out_features == o.in_features:
                found.append(Fold(names["v_proj"], (names[out],)))
    return found


@torch.no_grad()
def scale(block: Block, fold: Fold, factor: torch.Tensor) -> None:
    """Divides the fold's channels by ``factor`` [channels] and multiplies the readers' columns by it, in place.

    A gain in 16 bits is rounded by the division; the readers are multiplied by what the gain was really divided by, so that
    the rounding changes the scale a little and the function not at all. Raises ValueError for factors that are not positive
    and finite.
    """
    if not bool(torch.isfinite(factor).all()) or bool((factor <= 0).any()):
        raise ValueError(f"{fold.producer}: scales must be positive and finite")
    producer = block.get(fold.producer)
    weight: torch.Tensor = producer.weight
    bias: torch.Tensor | None = getattr(producer, "bias", None)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factor = factor.to(weight.device, wide)
    if weight.ndim == 2:  # a linear layer: its rows
        weight.copy_(weight.to(wide) / factor.unsqueeze(1))
    else:
        one = 1 if adds_one(producer) else 0
        gain = one + weight.to(wide)
        held = (gain / factor - one).to(weight.dtype)
        lost = (one + held.to(wide)) * gain <= 0  # too small for the dtype: such a channel keeps its scale
        held = torch.where(lost, weight, held)
        factor = torch.where(gain == 0, factor, gain / (one + held.to(wide)))
        weight.copy_(held)
    if bias is not None:
        bias.copy_(bias.to(wide) / factor)
    for name in fold.readers:
        reader: torch.Tensor = block.get(name).weight
        reader.copy_(reader.to(wide) * factor)


@torch.no_grad()
def shift(block: Block, fold: Fold, offset: torch.Tensor) -> None:
    """Subtracts ``offset`` [channels] from the fold's channels and adds W offset to the readers' biases, in place.

    Readers without a bias get one. Raises ValueError when the producer has no bias to take it.
    """
    producer = block.get(fold.producer)
    bias: torch.Tensor | None = getattr(producer, "bias", None)
    if bias is None:
        raise ValueError(f"{fold.producer} has no bias that could take an offset")
    wide = torch.float64 if bias.dtype == torch.float64 else torch.float32
    offset = offset.to(bias.device, wide)
    bias.copy_(bias.to(wide) - offset)
    for name in fold.readers:
        reader = block.get(name)
        weight: torch.Tensor = reader.weight
        correction = weight.to(wide) @ offset
        if reader.bias is None:
            reader.bias = nn.Parameter(correction.to(weight.dtype), requires_grad=False)
        else:
            reader.bias.copy_(reader.bias.to(wide) + correction)
