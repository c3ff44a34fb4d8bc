"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): part of the activations' range moves into the weights.

Between a norm and the layers that it feeds, channel j is divided by s_j = max |x_j|**alpha / max |W_j|**(1 - alpha)
(equation 4), the weights' columns are multiplied by it, and both are quantised to integers: weights symmetrically by output
row, activations by token at run time, or with one static scale a tensor (the paper's O3). Layers that no norm feeds are
quantised alike, without smoothing. q, k and v are rounded for the attention, as in the authors' code. Each block is
calibrated on what the quantised blocks before it give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from broadsheet.core.models import folds
from broadsheet.core.models.folds import norm_folds
from broadsheet.core.models.observers import Range
from broadsheet.core.models.walker import Block
from broadsheet.core.numerics import integer
from broadsheet.core.perf.storage import WeightFormat, integer_weight

from .base import Shape, Unreachable, WeightMethod
from .integer import IntegerLinear, attention_output, makes_attention, quantise_rows, widen


@dataclass(frozen=True)
class SmoothQuant(WeightMethod):
    """``alpha``: how much of the range moves, 0 to 1. ``activations``: "token" (dynamic) or "static" (a scale a tensor).

    ``symmetric``: of the weights; off, each row has a zero too, as in OutlierTune. ``w_bits``: the weights', if not
    ``bits``. ``smooth`` off: plain integers. ``at_budget`` chooses ``w_bits``. Raises ValueError for values out of range.
    """

    bits: int = 8
    w_bits: int | None = None
    alpha: float = 0.5
    activations: str = "token"
    symmetric: bool = True
    smooth: bool = True
    quantize_bmm: bool = True

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("w_bits", self.weight_bits)):
            if not 2 <= bits <= 8:
                raise ValueError(f"{name} must be 2 to 8, got {bits}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")
        if self.activations not in ("token", "static"):
            raise ValueError(f"activations must be token or static, got '{self.activations}'")

    @property
    def weight_bits(self) -> int:
        return self.bits if self.w_bits is None else self.w_bits

    def compress_block(self, block: Block) -> None:
        largest = self.largest(block)
        for fold in norm_folds(block) if self.smooth else ():
            weights = [block.get(name).weight for name in fold.readers]
            factor = smoothing(largest[fold.readers[0]], weights, self.alpha)
            widen(block, fold)
            folds.scale(block, fold, factor)
            for name in fold.readers:
                largest[name] = largest[name] / factor
        for name, linear in block.linears.items():
            rows = quantise_rows(linear.weight, self.weight_bits, self.symmetric)
            scale = None
            if self.activations == "static":
                scale = integer.scale_of(largest[name].max(), self.bits)
                rows = replace(rows, scale=rows.scale * scale)  # that of a weight multiplied by one number
            attends = self.quantize_bmm and makes_attention(name)
            packed = IntegerLinear.of(
                linear, rows, self.activations, self.bits, scale,
                output_bits=self.bits if attends else 0, output_shape=attention_output(block, name) if attends else None,
            )  # fmt: skip
            block.replace(name, packed)

    def largest(self, block: Block) -> dict[str, torch.Tensor]:
        """The largest |x| of each layer's input channels, [in_features]."""
        seen = {name: Range() for name in block.linears}
        block.observe(seen)
        for name, found in seen.items():
            if not bool(torch.isfinite(found.largest).all()):
                raise ValueError(f"{name} gets inf or nan on the calibration tokens; check the model in this dtype")
        return {name: found.largest for name, found in seen.items()}

    def format(self) -> WeightFormat:
        return integer_weight(self.weight_bits, zeros=not self.symmetric)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """As many bits a weight as fit."""
        for codes in range(8, 1, -1):
            one = replace(self, w_bits=codes)
            if one.stored_bits(layers) <= bits:
                return one
        raise Unreachable(one.stored_bits(layers))


def smoothing(largest: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """s [channels] from the inputs' largest magnitudes and the weights [out_features, channels] that read them."""
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).to(largest.dtype)
    least = integer.LEAST
    return (largest.clamp(min=least) ** alpha / columns.clamp(min=least) ** (1 - alpha)).clamp(min=least)
