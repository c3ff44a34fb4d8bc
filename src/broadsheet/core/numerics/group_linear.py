"""A linear layer in groups of codes: what weight compression stores, and what a runtime of fewer bits computes with."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from .groups import GroupQuantised
from .packed import Form, PackedLinear, bias_of
from .packing import packed_size


class GroupLinear(PackedLinear):
    """A linear layer in groups of codes along its rows: weight = zero + scale * code.

    ``codes`` uint8 [out_features, groups, ceil(group_size * bits / 8)]; ``scale``, ``zero`` float16 [out_features, groups].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    group_size: int

    @classmethod
    def of(cls, linear: nn.Linear, quantised: GroupQuantised) -> Self:
        """The layer whose weight [out_features, in_features] was quantised."""
        return cls(
            {"codes": quantised.codes, "scale": quantised.scale, "zero": quantised.zero, **bias_of(linear)},
            in_features=linear.in_features,
            out_features=linear.out_features,
            bits=quantised.bits,
            group_size=quantised.group_size,
        )

    def form(self) -> dict[str, Form]:
        if not (1 <= self.bits <= 8 and 1 <= self.group_size <= self.in_features):
            raise ValueError(f"{self.bits} bits in groups of {self.group_size} do not fit {self.in_features} inputs")
        rows, groups = self.out_features, -(-self.in_features // self.group_size)
        grid = (torch.float16, (rows, groups))
        codes = (torch.uint8, (rows, groups, packed_size(self.group_size, self.bits)))
        return {**super().form(), "codes": codes, "scale": grid, "zero": grid}

    @property
    def stored(self) -> GroupQuantised:
        return GroupQuantised(self.codes, self.scale, self.zero, self.bits, self.group_size, self.in_features)

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.stored.dequantise(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]; on a CPU multiplied with the codes, in float32."""
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        from .group_matmul import matmul  # numba takes its time to import

        y = matmul(x.detach().reshape(-1, self.in_features).float(), self.stored)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
