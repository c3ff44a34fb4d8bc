"""torchao's quantisation of weights as a method of this family: the library's own tensors and products, run as they are.

- 8 bits: ``Int8WeightOnlyConfig``; symmetric, a scale a row.
- 4 bits: ``PrototypeInt4WeightOnlyConfig``, the layout for CPUs; groups along the input with a 16-bit scale and zero.

What works was tried with torchao 0.18.0 and torch 2.13 on a CPU. Its other widths (``IntxWeightOnlyConfig``) are stored a
code a byte there, so they save no memory and have no place here. llm-compressor 0.14, the maintained home of GPTQ,
requires transformers before 5.18 and so is not run beside these; our GPTQ agrees with it bit for bit on its own grid
(tests/golden).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.models.walker import Block
from broadsheet.core.numerics.packed import Form, PackedLinear, bias_of
from broadsheet.core.perf.storage import WeightFormat, grouped_weight, integer_weight

from .base import Shape, Unreachable, WeightMethod

GROUP_SIZES = (32, 64, 128, 256)


def quantised(weight: torch.Tensor, bits: int, group_size: int) -> Any:
    """torchao's tensor of a weight [out_features, in_features]."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of its CUDA kernels
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=group_size))
    return linear.weight.data


@lru_cache
def _pattern(shape: Shape, bits: int, group_size: int) -> tuple[type, Any, dict[str, Form]]:
    """For a weight of this shape torchao's class, what it keeps beside tensors, and the form of these."""
    some = quantised(torch.zeros(shape, dtype=torch.bfloat16, device="cpu"), bits, group_size)
    names, context = some.__tensor_flatten__()
    return type(some), context, {name: (getattr(some, name).dtype, tuple(getattr(some, name).shape)) for name in names}


class TorchAOLinear(PackedLinear):
    """A linear layer whose weight is a tensor of torchao; its inner tensors, by torchao's names, are what is stored."""

    scale_and_zero: torch.Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, linear: nn.Linear, bits: int, group_size: int) -> Self:
        weight = quantised(linear.weight.detach(), bits, group_size)
        tensors = {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
        return cls(
            {**tensors, **bias_of(linear)},
            in_features=linear.in_features,
            out_features=linear.out_features,
            bits=bits,
            group_size=group_size,
        )

    def form(self) -> dict[str, Form]:
        TorchAO(self.bits, self.group_size).check([(self.out_features, self.in_features)])
        *_, inner = _pattern((self.out_features, self.in_features), self.bits, self.group_size)
        form = {**super().form(), **inner}
        if self.bits == 4 and self.scale_and_zero.is_floating_point():  # in the dtype that the weight had
            form["scale_and_zero"] = (self.scale_and_zero.dtype, form["scale_and_zero"][1])
        return form

    def theirs(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor of torchao, to be multiplied with inputs of ``dtype``."""
        kind, context, _ = _pattern((self.out_features, self.in_features), self.bits, self.group_size)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name != "bias"}
        if self.bits == 4:  # its product wants them in the dtype of the inputs
            tensors["scale_and_zero"] = tensors["scale_and_zero"].to(dtype)
        return kind.__tensor_unflatten__(tensors, context, None, None)  # type: ignore[attr-defined]

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        unit = torch.eye(self.in_features, dtype=dtype, device=next(self.buffers()).device)
        return F.linear(unit, self.theirs(dtype)).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], by torchao."""
        return F.linear(x, self.theirs(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@dataclass(frozen=True)
class TorchAO(WeightMethod):
    """``bits``: 8, or 4 in groups of ``group_size``. Raises ValueError for others and for layers that torchao would skip."""

    bits: int = 4
    group_size: int = 128

    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {self.group_size}")

    def compress_block(self, block: Block) -> None:
        for name, linear in block.linears.items():
            block.replace(name, TorchAOLinear.of(linear, self.bits, self.group_size))

    def check(self, layers: Sequence[Shape]) -> None:
        for rows, columns in layers if self.bits == 4 else []:
            if columns % self.group_size or rows % 16:
                raise ValueError(
                    f"torchao's 4 bits take layers of rows that 16 divides and columns that group_size divides, got "
                    f"{rows} x {columns}; choose a smaller group_size of {', '.join(map(str, GROUP_SIZES))}, or 8 bits"
                )

    def format(self) -> WeightFormat:
        return grouped_weight(4, self.group_size) if self.bits == 4 else integer_weight(8)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """8 bits where they fit, else the smallest groups of 4."""
        least = float("inf")
        for choice in (replace(self, bits=8), *(replace(self, bits=4, group_size=size) for size in GROUP_SIZES)):
            try:
                choice.check(layers)
            except ValueError:
                continue
            held = choice.stored_bits(layers)
            if held <= bits:
                return choice
            least = min(least, held)
        raise Unreachable(least)
