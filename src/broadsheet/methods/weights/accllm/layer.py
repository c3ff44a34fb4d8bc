"""The linear layer of an AccLLM model: the weights that stay, as codes or in 16 bits, and where they stand."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.numerics.integer import quantise_per_token
from broadsheet.core.numerics.packed import Form, PackedLinear, bias_of
from broadsheet.core.numerics.packing import packed_size

from .clipping import Grid
from .sparsity import Sparsity


class SparseLinear(PackedLinear):
    """A linear layer of which n of every m weights of a row are stored; n = m is a dense one.

    ``bits`` 1 to 8: ``values`` uint8 [out_features, bytes] are codes, ``scale`` and ``zero`` float16 [out_features, groups]
    belong to ``group_size`` neighbouring columns each, pruned ones counted (see `Grid`). ``bits`` 16: ``values``
    [out_features, kept] are the weights themselves, in float16 if they had more bits. ``positions`` uint8 [out_features,
    bytes]: see `Sparsity`. ``activation_bits`` 8: each token's input is rounded to codes of -128 to 127 with the scale of
    its largest |x|, and these codes are multiplied; 0: the input is taken as it is.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int
    n: int
    m: int
    places: str
    activation_bits: int

    @classmethod
    def of(
        cls, linear: nn.Linear, mask: torch.Tensor, layout: Sparsity, grid: Grid | None = None, activation_bits: int = 0
    ) -> Self:
        """What ``mask`` bool [out_features, in_features] keeps of ``linear``, rounded to ``grid`` if there is one."""
        kept = linear.weight.detach()[mask].view(linear.out_features, -1)
        tensors = bias_of(linear)
        if not layout.dense:
            tensors["positions"] = layout.encode(mask)
        if grid is None:
            narrow = torch.float16 if kept.dtype.itemsize > 2 else kept.dtype
            tensors["values"] = kept.to(narrow, copy=True)
        else:
            tensors |= {"values": grid.encode(kept.float()), "scale": grid.scale, "zero": grid.zero}
        return cls(
            tensors,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bits=16 if grid is None else grid.bits,
            group_size=linear.in_features if grid is None else grid.group * layout.m // layout.n,
            n=layout.n,
            m=layout.m,
            places=layout.places,
            activation_bits=activation_bits,
        )

    def form(self) -> dict[str, Form]:
        rows, kept = self.out_features, self.layout.kept(self.in_features)
        if self.bits not in (*range(1, 9), 16) or not self.m <= self.group_size <= self.in_features:
            raise ValueError(f"{self.bits} bits in groups of {self.group_size} do not fit {self.in_features} inputs")
        if not 0 <= self.activation_bits <= 8:
            raise ValueError(f"activations cannot have {self.activation_bits} bits")
        form = super().form()
        if not self.layout.dense:
            form["positions"] = (torch.uint8, (rows, self.layout.row_bytes(self.in_features)))
        if self.bits == 16:
            return {**form, "values": (self.values.dtype, (rows, kept))}
        grid = (torch.float16, (rows, -(-kept // self.grid.group)))
        return {**form, "values": (torch.uint8, (rows, packed_size(kept, self.bits))), "scale": grid, "zero": grid}

    @property
    def layout(self) -> Sparsity:
        return Sparsity(self.n, self.m, self.places)

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero, self.bits, self.group_size // self.m * self.n)

    @property
    def mask(self) -> torch.Tensor:
        """Which weights are stored: bool [out_features, in_features]."""
        mask = torch.ones(self.out_features, self.in_features, dtype=torch.bool, device=self.values.device)
        if self.layout.dense:
            return mask
        return mask.zero_().scatter_(1, self.layout.decode(self.tensors["positions"], self.in_features), True)

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        kept = self.layout.kept(self.in_features)
        values = self.values if self.bits == 16 else self.grid.decode(self.values, kept)
        if self.layout.dense:
            return values.to(dtype)
        weight = torch.zeros(self.out_features, self.in_features, dtype=dtype, device=values.device)
        return weight.scatter_(1, self.layout.decode(self.tensors["positions"], self.in_features), values.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias, computed in float32; an input in codes carries no gradient."""
        learns = torch.is_grad_enabled() and x.requires_grad
        if not self.activation_bits and (learns or self.bits == 16):
            return super().forward(x)
        rows, scale = x.detach().reshape(-1, self.in_features).float(), None
        if self.activation_bits:
            codes, scale = quantise_per_token(rows, self.activation_bits)
            rows = codes.float()
        y = self.product(rows)
        if scale is not None:
            y = y * scale
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` float32 [tokens, in_features] times W^T; on a CPU straight from the codes, see `kernel`."""
        kernel: Any = _kernel() if self.bits <= 8 and rows.device.type == "cpu" else None
        if kernel is None:
            return F.linear(rows, self.weight())
        return kernel.forward(rows, self.values, self.tensors.get("positions"), self.grid, self.layout)


@cache
def _kernel() -> Any:
    """The compiled kernel; None where numba does not run. Imported at the first use, since numba is heavy."""
    try:
        return import_module(f"{__package__}.kernel")
    except ImportError:
        return None
