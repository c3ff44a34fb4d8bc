"""OutlierTune: a fixed scale for each activation channel in a plain integer product (Wang et al. 2024, arXiv 2406.18832).

Outliers sit in a few channels, so a scale for each channel is what activations want; but it cannot leave the sum over
channels. It can be multiplied into the weight's columns before that is quantised ("pre-execution of dequantisation"), and
its inverse folded into the norm before, which then makes codes: nothing is rescaled at run time. That makes columns uneven,
so channels are first centred ("symmetrisation"): the midpoint of each one's range goes out of the norm's bias and comes
back, times the weight, in the bias of the linear layers. In this order, for a norm and the layers that it feeds:

1. z_j: the mean over samples of (max over tokens + min over tokens) / 2;
2. norm bias - z; every layer's bias + W z;
3. s_j = max |x_j - z_j| / (2**(bits-1) - 1);
4. norm / s; every W[:, j] * s_j;
5. W quantised by output row, asymmetric;
6. run time: y = w_scale * (sum of codes of x * codes of W) + bias, the sum in whole numbers (`integer`).

Layers that no norm feeds (out_proj, fc2; o_proj, down_proj) quantise their input by token at run time, as do q, k and v
their output. Attention itself, embeddings, norms and lm_head are not quantised.

Deviations. RMS norms have no bias: the official LLaMA code leaves symmetrisation out (``symmetrize="biased"``); here they
get one, in float32, which is exact (its folding of the gain into the weights changes nothing, since scales are taken after
it, and is left out). Each block is calibrated on what the quantised blocks before it give, not on the original model's
activations. q, k and v are rounded by token on every model; the official OPT code rounds by tensor (``bmm="tensor"``), with
which a token depends on the tokens after it and on its batch. What they are multiplied by stays a float product of rounded
values. Codes are always clipped; the official OPT code forgets that. ``threshold`` looks at |z|; the official one zeroes
every negative midpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models import folds
from broadsheet.core.models.folds import Fold, norm_folds
from broadsheet.core.models.observers import Gram, Range
from broadsheet.core.models.walker import Block, Observer, walk
from broadsheet.core.numerics import integer
from broadsheet.core.perf.storage import WeightFormat, integer_weight

from .base import Progress, Shape, Unreachable, WeightMethod, check_model
from .integer import (
    OUTPUTS,
    FoldedNorm,
    IntegerLinear,
    attention_output,
    clip_rates,
    makes_attention,
    quantise_rows,
    widen,
)

__all__ = ["OutlierTune", "Peaks", "clip_rates"]

SYMMETRIZE = ("auto", "biased", "off")
CENTERS = ("mean_midpoint", "midpoint")
SCALES = ("channel", "token", "tensor")
WEIGHTS = ("rtn", "gptq")


class Peaks:
    """The observer of step 3: ``largest`` [channels], the magnitude that each channel's scale is to reach.

    ``center`` is taken off first. ``clamp``: every sample's values are cut at this share of its largest and smallest one
    (the official LLaMA code: 0.8). ``bits``: when not 0, each sample tries p = 1, 0.99, ... 0.21 of its largest |x| and
    takes that of the least sum of |rounded - x|**2.4, channel by channel; the largest over samples remains.
    """

    def __init__(self, center: torch.Tensor | float = 0.0, clamp: float = 1.0, bits: int = 0):
        self.center, self.clamp, self.bits = center, clamp, bits
        self.largest = torch.zeros(())

    def __call__(self, x: torch.Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32)) - self.center
        if self.clamp < 1:
            edges = [self.clamp * edge.view(-1, 1, 1) for edge in (x.amin((1, 2)), x.amax((1, 2)))]
            x = torch.minimum(torch.maximum(x, edges[0]), edges[1])
        peaks = x.abs().amax(1)  # of each sample
        if self.bits:
            peaks = torch.stack([self._searched(sample, peak) for sample, peak in zip(x, peaks, strict=True)])
        self.largest = torch.maximum(self.largest.to(x), peaks.amax(0))

    def _searched(self, x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
        """``x`` [tokens, channels] and its largest magnitudes to the best share of these, [channels]."""
        peak = peak.clamp(min=integer.LEAST)
        best, least = peak, torch.full_like(peak, float("inf"))
        for hundredth in range(100, 20, -1):
            tried = peak * (hundredth / 100)
            scale = integer.scale_of(tried, self.bits)
            error = (integer.round_to_codes(x / scale, self.bits) * scale - x).abs().pow(2.4).sum(0)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        return best


@dataclass(frozen=True)
class OutlierTune(WeightMethod):
    """Weights and activations of a decoder in ``bits`` bits, with static scales by channel where a norm feeds the layer.

    ``w_bits``: bits of the weights, if other than ``bits``. ``symmetrize``: "auto", everywhere (RMS norms get a bias);
    "biased", only norms that have one; "off". ``center``: "mean_midpoint" of samples as in the paper, or the "midpoint" of
    the whole range as in Outlier Suppression+. ``threshold`` h: z_j below h * max |z| are left 0. ``scales`` of norm-fed
    inputs: "channel" as in the paper, "token" (dynamic), one "tensor" (static). ``fold`` off: the norm stays apart and the
    layer divides by s itself. ``clip_search``, ``clamp``: how peaks are taken, see `Peaks`. ``weight_method``: "rtn", or
    "gptq" with the ranges of its rows searched too (`quantise_rows`). ``quantize_bmm``: round q, k and v, ``bmm`` by
    "token" or "tensor".

    Calibration: the paper takes 512 samples of 512 tokens. ``at_budget`` chooses ``w_bits`` and leaves the activations'
    bits. Raises ValueError for values out of range, for blocks in which no norm feeds linear layers alone, and for
    activations that are not finite.
    """

    bits: int = 8
    w_bits: int | None = None
    symmetrize: str = "auto"
    center: str = "mean_midpoint"
    threshold: float = 0.0
    scales: str = "channel"
    fold: bool = True
    clip_search: bool = False
    clamp: float = 1.0
    weight_method: str = "rtn"
    quantize_bmm: bool = True
    bmm: str = "token"

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("w_bits", self.weight_bits)):
            if not 2 <= bits <= 8:
                raise ValueError(f"{name} must be 2 to 8, got {bits}")
        for name, value, known in (
            ("symmetrize", self.symmetrize, SYMMETRIZE),
            ("center", self.center, CENTERS),
            ("scales", self.scales, SCALES),
            ("weight_method", self.weight_method, WEIGHTS),
            ("bmm", self.bmm, OUTPUTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold is a share of the largest midpoint, from 0 to below 1; got {self.threshold}")
        if not 0 < self.clamp <= 1:
            raise ValueError(f"clamp is a share of the range, above 0 and at most 1; got {self.clamp}")

    @property
    def weight_bits(self) -> int:
        return self.bits if self.w_bits is None else self.w_bits

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        _check_tokens(calibration)
        return super().compress(model, calibration, progress)

    @torch.no_grad()
    def transform(self, model: PreTrainedModel, calibration: torch.Tensor) -> PreTrainedModel:
        """Steps 1 to 4 alone, in place: the same function as before, ready to be quantised by anything.

        16-bit models become float32 ones, since what is folded would be rounded.
        """
        check_model(model)
        _check_tokens(calibration)
        if model.dtype != torch.float64:
            model.float()
        for block in walk(model, calibration):
            for fold, moved in self.statistics(block).items():
                self.fold_in(block, fold, moved)
        return model

    def statistics(self, block: Block) -> dict[Fold, Moved]:
        """Steps 1 and 3 for every norm and its readers."""
        found = norm_folds(block)
        if not found:
            raise ValueError(f"{block.name} has no norm that feeds linear layers alone; this family is not covered")
        centered = [fold for fold in found if self._centers(block.get(fold.producer))]
        ranges = {fold: Range() for fold in centered}
        if centered:
            block.observe({fold.readers[0]: ranges[fold] for fold in centered})
        centers = {fold: self.center_of(fold.readers[0], seen) for fold, seen in ranges.items()}
        bits = self.bits if self.clip_search else 0
        peaks = {fold: Peaks(centers.get(fold, 0.0), self.clamp, bits) for fold in found}
        block.observe({fold.readers[0]: peaks[fold] for fold in found})
        return {fold: Moved(centers.get(fold), self.scale_of(fold.readers[0], seen)) for fold, seen in peaks.items()}

    def _centers(self, norm: nn.Module) -> bool:
        return self.symmetrize == "auto" or (self.symmetrize == "biased" and getattr(norm, "bias", None) is not None)

    def center_of(self, name: str, seen: Range) -> torch.Tensor:
        """z [channels] of what the layer ``name`` was seen to get."""
        z = seen.midpoint if self.center == "mean_midpoint" else (seen.low + seen.high) / 2
        _check_finite(name, z)
        return z.masked_fill(z.abs() < self.threshold * z.abs().max(), 0)

    def scale_of(self, name: str, seen: Peaks) -> torch.Tensor:
        """s [channels]: all the same with ``scales`` "tensor", ones with "token"."""
        _check_finite(name, seen.largest)
        scale = integer.scale_of(seen.largest, self.bits)
        if self.scales == "channel":
            return scale
        return torch.ones_like(scale) if self.scales == "token" else scale.max().expand_as(scale).clone()

    def fold_in(self, block: Block, fold: Fold, moved: Moved) -> None:
        """Steps 2 and 4; the norm and its readers become wide modules. With ``fold`` off, only the weights are scaled."""
        widen(block, fold, biased=moved.center is not None)
        if moved.center is not None:
            folds.shift(block, fold, moved.center)
        if self.fold:
            folds.scale(block, fold, moved.scale)
        else:
            for name in fold.readers:
                block.get(name).weight.mul_(moved.scale)

    def compress_block(self, block: Block) -> None:
        found = self.statistics(block)
        grams = self.grams(block, found) if self.weight_method == "gptq" else {}
        for fold, moved in found.items():
            self.fold_in(block, fold, moved)
            kind, scale = "token", None
            if self.scales != "token":
                kind, scale = ("codes", None) if self.fold else ("static", moved.scale)
            if kind == "codes":
                norm: FoldedNorm = block.get(fold.producer)
                block.replace(fold.producer, norm.rounding(self.bits, moved.scale))
            for name in fold.readers:
                block.replace(name, self.quantise(block, name, grams.get(name), kind, scale))
        for name in block.linears:  # those that no norm feeds
            block.replace(name, self.quantise(block, name, grams.get(name)))

    def grams(self, block: Block, found: Mapping[Fold, Moved]) -> dict[str, torch.Tensor]:
        """The Gram matrix of every layer's input, of its codes where these are static."""
        seen = {name: Gram() for name in block.linears}
        observers: dict[str, Observer] = dict(seen)
        if self.scales != "token":
            for fold, moved in found.items():
                for name in fold.readers:
                    observers[name] = partial(_see_codes, seen[name], moved, self.bits)
        block.observe(observers)
        return {name: gram.matrix for name, gram in seen.items()}

    def quantise(
        self,
        block: Block,
        name: str,
        gram: torch.Tensor | None,
        kind: str = "token",
        input_scale: torch.Tensor | None = None,
    ) -> IntegerLinear:
        """Step 5 for the block's layer of this full name."""
        linear = block.get(name)
        rows = quantise_rows(linear.weight, self.weight_bits, clip=gram is not None, gram=gram)
        attends = self.quantize_bmm and makes_attention(name)
        return IntegerLinear.of(
            linear, rows, kind, self.bits, input_scale, self.bmm,
            output_bits=self.bits if attends else 0, output_shape=attention_output(block, name) if attends else None,
        )  # fmt: skip

    def format(self) -> WeightFormat:
        return integer_weight(self.weight_bits, channels=True)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """As many bits a weight as fit."""
        for codes in range(8, 1, -1):
            one = replace(self, w_bits=codes)
            if one.stored_bits(layers) <= bits:
                return one
        raise Unreachable(one.stored_bits(layers))


@dataclass(frozen=True)
class Moved:
    """What goes from a norm into its readers: ``center`` z, or None, and ``scale`` s, both [channels]."""

    center: torch.Tensor | None
    scale: torch.Tensor

    def codes(self, x: torch.Tensor, bits: int) -> torch.Tensor:
        """The codes of the norm's output ``x`` as it is now, in whole floats."""
        return integer.round_to_codes((x if self.center is None else x - self.center) / self.scale, bits)


def _see_codes(gram: Gram, moved: Moved, bits: int, x: torch.Tensor) -> None:
    gram(moved.codes(x, bits))


def _check_tokens(calibration: torch.Tensor | None) -> None:
    if calibration is not None and calibration.numel() < 2:
        raise ValueError(f"calibration holds {calibration.numel()} tokens; give at least 2 (the paper: 512 x 512)")


def _check_finite(name: str, statistics: torch.Tensor) -> None:
    if not bool(torch.isfinite(statistics).all()):
        raise ValueError(f"{name} gets inf or nan on the calibration tokens; check the model in this dtype")
