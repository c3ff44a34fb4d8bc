"""Linear layers that multiply integers, and norms that make their inputs: what OutlierTune and SmoothQuant leave behind.

Weights are quantised by output row (`quantise_rows`): W is close to scale * (code - zero). Activations are quantised
symmetrically (`core.numerics.integer`), so that

    y = scale * input_scale * (sum of x_code * code - zero * sum of x_code) + bias,

where both sums are of whole numbers and exact. 8-bit weights are stored as int8, fewer bits packed without gaps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.models.folds import Fold, adds_one
from broadsheet.core.models.walker import Block
from broadsheet.core.numerics import integer
from broadsheet.core.numerics.packed import Form, Packed, PackedLinear
from broadsheet.core.numerics.packing import packed_size

from .gptq import compensate

#: where the scale of a layer's input comes from, see `IntegerLinear`
INPUTS = ("codes", "static", "token")
#: by what q, k and v are quantised
OUTPUTS = ("token", "tensor")
#: columns beyond which a sum of products of 8 bits could leave 32
WIDEST = 2**31 // (128 * 255)


@dataclass(frozen=True)
class Rows:
    """A weight quantised by rows: ``codes`` int8 [rows, columns], ``scale`` float32 [rows], ``zero`` int8 [rows] or None.

    Codes and zeros are stored less 2**(bits-1), which cancels, so that both fit int8.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int

    @property
    def whole(self) -> torch.Tensor:
        """What is multiplied: code - zero, int16 [rows, columns]."""
        codes = self.codes.to(torch.int16)
        return codes if self.zero is None else codes - self.zero.to(torch.int16).unsqueeze(1)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (self.whole * self.scale.unsqueeze(1)).to(dtype)


def quantise_rows(
    weight: torch.Tensor,
    bits: int,
    symmetric: bool = False,
    clip: bool = False,
    gram: torch.Tensor | None = None,
    damping: float = 0.01,
) -> Rows:
    """``weight`` [rows, columns] in ``bits`` bits, a scale (and a zero) for each row.

    Asymmetric: the row's range, with 0 in it, is 2**bits - 1 steps long and begins at a whole number of them below 0.
    Symmetric: max |w| is 2**(bits-1) - 1 steps. ``clip``: ranges shortened to p = 1, 0.99, ... 0.21 of it are tried, and
    each row takes that of the least sum of |error|**2.4. Codes are the nearest, or, given the Gram matrix of the inputs
    [columns, columns], those of GPTQ (largest inputs first).
    """
    weight = weight.detach().float()
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    middle = 2 ** (bits - 1)
    steps = 2 * (middle - 1) if symmetric else 2**bits - 1

    def grid(share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero (less ``middle``), float32 [rows, 1]."""
        scale = (share * (high - low) / steps).unsqueeze(1)
        scale = torch.where(scale > 0, scale, 1.0)
        zero = torch.zeros_like(scale) if symmetric else (-share * low.unsqueeze(1) / scale).round() - middle
        return scale, zero

    def nearest(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return ((values / scale).round() + zero).clamp(-middle, middle - 1)

    scale, zero = grid(1.0)
    if clip:
        least = torch.full_like(scale, float("inf"))
        for hundredth in range(100, 20, -1):
            tried, offset = grid(hundredth / 100)
            error = ((nearest(weight, tried, offset) - offset) * tried - weight).abs().pow(2.4).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    if gram is None:
        codes = nearest(weight, scale, zero)
    else:
        codes = torch.empty_like(weight)

        def keep(column: int, values: torch.Tensor, left: Callable[[], torch.Tensor]) -> torch.Tensor:
            codes[:, column] = nearest(values, scale[:, 0], zero[:, 0])
            return (codes[:, column] - zero[:, 0]) * scale[:, 0]

        compensate(weight, gram, keep, damping, act_order=True)
    return Rows(codes.to(torch.int8), scale[:, 0], None if symmetric else zero[:, 0].to(torch.int8), bits)


class IntegerLinear(PackedLinear):
    """A linear layer whose weight and input are quantised, and whose product is of integers.

    ``codes`` int8 [out_features, in_features], or with fewer than 8 bits packed uint8 (`integer.pack_codes`); ``scale``
    float32, ``zero`` int8 [out_features]: `Rows`; ``bias`` float32.

    ``input``: "codes", the input is codes already (a `FoldedNorm` made it); "static", it is divided by ``input_scale``
    float32 [1] or [in_features], fixed at calibration, which the weight was multiplied by before it was quantised; "token",
    each token has the scale of its largest |x|. ``input_bits``: its codes' bits, beyond which they are clipped.

    ``output_bits``: when not 0, the output is rounded to so many bits, by token or with ``output`` "tensor" by tensor, as an
    attention that multiplies integers would get it; ``output_shape``: for projections that make q, k and v together, their
    [heads, 3, head_dim], which then have scales of their own.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    input_scale: torch.Tensor | None
    bits: int
    input: str
    input_bits: int
    output: str
    output_bits: int
    output_shape: list[int] | None

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int, **plain: Any):
        super().__init__(tensors, in_features, out_features, **plain)
        for name in ("zero", "input_scale"):
            if name not in tensors:
                self.register_buffer(name, None)

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        rows: Rows,
        input: str = "token",
        input_bits: int = 8,
        input_scale: torch.Tensor | None = None,
        output: str = "token",
        output_bits: int = 0,
        output_shape: list[int] | None = None,
    ) -> Self:
        """The layer whose weight was quantised to ``rows``."""
        if linear.in_features > WIDEST:
            raise ValueError(f"{linear.in_features} inputs are too many for sums in 32 bits; the most is {WIDEST}")
        tensors = {"codes": integer.pack_codes(rows.codes, rows.bits), "scale": rows.scale}
        if rows.zero is not None:
            tensors["zero"] = rows.zero
        if linear.bias is not None:
            tensors["bias"] = linear.bias.detach().float().clone()
        if input_scale is not None:
            tensors["input_scale"] = input_scale.float().reshape(-1)
        return cls(
            tensors, in_features=linear.in_features, out_features=linear.out_features, bits=rows.bits, input=input,
            input_bits=input_bits, output=output, output_bits=output_bits, output_shape=output_shape,
        )  # fmt: skip

    def form(self) -> dict[str, Form]:
        rows, columns = self.out_features, self.in_features
        if not (2 <= self.bits <= 8 and 2 <= self.input_bits <= 8 and self.output_bits in (0, *range(2, 9))):
            raise ValueError(f"{self.bits}, {self.input_bits} and {self.output_bits} bits are not covered")
        if self.input not in INPUTS or self.output not in OUTPUTS or columns > WIDEST:
            raise ValueError(f"an input '{self.input}' of {columns} channels or an output '{self.output}' is not covered")
        if self.output_shape is not None and (len(self.output_shape) != 3 or prod(self.output_shape) != rows):
            raise ValueError(f"outputs of shape {self.output_shape} are not {rows}")
        codes: Form = (torch.uint8, (rows, packed_size(columns, self.bits)))
        form = {**super().form(), "scale": (torch.float32, (rows,))}
        form["codes"] = (torch.int8, (rows, columns)) if self.bits == 8 else codes
        if self.zero is not None:
            form["zero"] = (torch.int8, (rows,))
        if self.input == "static":
            single = self.input_scale is not None and self.input_scale.numel() == 1
            form["input_scale"] = (torch.float32, (1,) if single else (columns,))
        return form

    @property
    def rows(self) -> Rows:
        return Rows(integer.unpack_codes(self.codes, self.bits, self.in_features), self.scale, self.zero, self.bits)

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """For inputs as they come: of "codes", the multiplied weight; of "static", divided by the input's scale again."""
        weight = self.rows.dequantise()
        return (weight if self.input_scale is None else weight / self.input_scale).to(dtype)

    def scaled(self, x: torch.Tensor) -> torch.Tensor | None:
        """A static layer's input in steps, before it is rounded and clipped; None in others."""
        return None if self.input_scale is None else x / self.input_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], computed in float32. Carries no gradient."""
        sums, scale = self.sums(x.detach())
        y = sums.float() * self.scale
        if scale is not None:
            y = y * scale
        if self.bias is not None:
            y = y + self.bias
        if self.output_bits:
            y = self.round_output(y)
        return y.to(x.dtype)

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The exact sums int32 [..., out_features] of products of codes, and the scale [..., 1] of dynamic inputs."""
        scale = None
        if self.input == "token":
            codes, scale = integer.quantise_per_token(x, self.input_bits)
        elif self.input_scale is not None:
            codes = integer.quantise(x, self.input_scale, self.input_bits)
        else:
            codes = x.to(torch.int8)
        sums = integer.integer_product(codes, self.codes, self.bits, self.input_bits)
        if self.zero is not None:
            sums = sums - codes.sum(-1, keepdim=True, dtype=torch.int32) * self.zero.to(torch.int32)
        return sums, scale

    def round_output(self, y: torch.Tensor) -> torch.Tensor:
        """``y`` rounded to ``output_bits`` bits."""
        if self.output == "tensor":
            dims: tuple[int, ...] = tuple(range(y.ndim))
        else:
            dims = (-1,)
        parts = y
        if self.output_shape is not None:
            parts = y.unflatten(-1, self.output_shape)
            dims = (*(range(y.ndim - 1) if self.output == "tensor" else ()), -3, -1)
        scale = integer.scale_of(parts.abs().amax(dims, keepdim=True), self.output_bits)
        return (integer.round_to_codes(parts / scale, self.output_bits) * scale).view(y.shape)


class FoldedNorm(Packed):
    """A layer norm or RMS norm in float32 that has taken in scales and offsets, and rounds to codes if it has ``bits``.

    ``weight``, ``bias`` [channels], of which an RMS norm may have none of the second; ``input_scale`` [channels]: what the
    two were divided by, kept to look at. ``kind``: "layer" or "rms". With ``bits`` the output, in the input's dtype, is
    whole numbers: the input of `IntegerLinear`s that need do nothing to it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    kind: str
    eps: float
    bits: int

    def __init__(self, tensors: dict[str, torch.Tensor], **plain: Any):
        super().__init__(tensors, **plain)
        if "bias" not in tensors:
            self.register_buffer("bias", None)

    def form(self) -> dict[str, Form]:
        if self.kind not in ("layer", "rms") or not (self.bits == 0 or 2 <= self.bits <= 8):
            raise ValueError(f"a norm of kind '{self.kind}' with {self.bits} bits is not covered")
        if self.weight.ndim != 1 or not self.weight.is_floating_point():
            raise ValueError(f"a norm's weight cannot be {self.weight.dtype} {list(self.weight.shape)}")
        return {name: (tensor.dtype, tuple(self.weight.shape)) for name, tensor in self.tensors.items()}

    @classmethod
    def of(cls, norm: nn.Module, biased: bool = False) -> Self:
        """``norm`` as it is, wide; ``biased``: with a bias of zeros if it has none.

        Raises ValueError for a norm of a kind that is not known, which is tried.
        """
        module: Any = norm
        name = type(norm).__name__
        kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        weight = module.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        tensors = {"weight": weight.to(wide) + (1 if adds_one(norm) else 0)}
        if getattr(module, "bias", None) is not None:
            tensors["bias"] = module.bias.detach().to(wide, copy=True)
        elif biased:
            tensors["bias"] = torch.zeros_like(tensors["weight"])
        made = cls({part: tensor.clone() for part, tensor in tensors.items()}, kind=kind, eps=eps or 0.0, bits=0)
        x = torch.linspace(-1, 3, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).view(2, -1)
        with torch.no_grad():
            true = module(x).to(wide)
            same = eps is not None and float((made(x).to(wide) - true).norm()) <= 0.02 * float(true.norm())
        if not same:
            raise ValueError(f"{name} is neither a LayerNorm nor an RMSNorm of a known kind; this family is not covered")
        return made

    def rounding(self, bits: int, input_scale: torch.Tensor) -> FoldedNorm:
        """This norm, whose output was divided by ``input_scale``, giving codes."""
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        return FoldedNorm({**tensors, "input_scale": input_scale.float()}, kind=self.kind, eps=self.eps, bits=bits)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """The output before it is rounded and clipped, in float32 (or wider)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if self.kind == "layer":
            bias = None if self.bias is None else self.bias.to(wide)
            return F.layer_norm(x, x.shape[-1:], self.weight.to(wide), bias, self.eps)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(wide)
        return y if self.bias is None else y + self.bias.to(wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.scaled(x)
        return (integer.round_to_codes(y, self.bits) if self.bits else y).to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.plain.items())


def widen(block: Block, fold: Fold, biased: bool = False) -> None:
    """Makes the fold's norm a `FoldedNorm` and its readers' weights float32, so that what is folded is not rounded."""
    block.replace(fold.producer, FoldedNorm.of(block.get(fold.producer), biased))
    for name in fold.readers:
        reader = block.get(name)
        block.replace(name, copy.deepcopy(reader).to(torch.promote_types(reader.weight.dtype, torch.float32)))


def attention_output(block: Block, name: str) -> list[int] | None:
    """The ``output_shape`` of a projection whose output attention multiplies; raises ValueError for those it cannot tell.

    None for one that makes q, k or v alone. See `makes_attention`.
    """
    path, _, leaf = name.rpartition(".")
    if leaf in {"q_proj", "k_proj", "v_proj"}:
        return None
    linear, attention = block.get(name), block.get(path)
    config = getattr(attention, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(attention, "num_heads", None)
    if leaf == "query_key_value" and heads and linear.out_features == 3 * linear.in_features:
        return [heads, 3, linear.in_features // heads]  # GPT-NeoX, BLOOM
    raise ValueError(f"{name} makes q, k and v together in an unknown order; set quantize_bmm to False")


def makes_attention(name: str) -> bool:
    """Whether the linear layer of this full name makes q, k or v."""
    return name.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "query_key_value", "qkv_proj", "qkv", "Wqkv"}


@torch.no_grad()
def clip_rates(model: nn.Module, ids: torch.Tensor, batch: int = 8) -> dict[str, float]:
    """The share of values that static scales clip on ``ids`` [samples, tokens], by the module that rounds them.

    To be asked on texts that the model was not calibrated on, above all of another kind.
    """
    counts: dict[str, list[int]] = {}

    def counts_of(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            bits = module.bits if isinstance(module, FoldedNorm) else module.input_bits
            steps = module.scaled(args[0]).round()
            most = integer.largest(bits)
            count = counts.setdefault(name, [0, 0])
            count[0] += int(((steps > most) | (steps < -most - 1)).sum())
            count[1] += steps.numel()

        return hook

    handles = [
        module.register_forward_pre_hook(counts_of(name))
        for name, module in model.named_modules()
        if (isinstance(module, FoldedNorm) and module.bits)
        or (isinstance(module, IntegerLinear) and module.input_scale is not None)
    ]
    try:
        for first in range(0, len(ids), batch):
            model(ids[first : first + batch])
    finally:
        for handle in handles:
            handle.remove()
    return {name: clipped / seen for name, (clipped, seen) in counts.items()}
