"""Modules whose weights are stored packed.

A `Packed` module is what its tensors and its plain fields say, and nothing else: ``cls(tensors, **plain)`` builds it again.
That makes saving and loading generic (the tensors go into the safetensors file, the plain fields into config.json), and
memory honest: what is held is what `nbytes` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

#: what a plain field may be
Plain = int | float | str | bool | None | list[Any]


class Packed(nn.Module):
    """``tensors`` become buffers of their names, ``plain`` fields become attributes.

    The tensors keep their dtypes whatever the model is cast to: codes are no numbers, and scales that are rounded again are
    other scales. Tensors may be on the meta device: constructors of subclasses do no arithmetic on values.
    """

    #: some of its tensors lie in a file of the method's own, see `WeightMethod.save_beside`; they are no persistent buffers
    stored_apart: ClassVar[bool] = False

    def __init__(self, tensors: dict[str, torch.Tensor], **plain: Plain):
        super().__init__()
        self.plain = plain
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        for name, value in plain.items():
            setattr(self, name, value)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)


class PackedLinear(Packed):
    """A linear layer that is stored packed; ``bias`` [out_features] is one of its tensors, if it has one.

    Subclasses say how to get the weight back; a faster `forward` must agree with this one.
    """

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int, **plain: Plain):
        super().__init__(tensors, in_features=in_features, out_features=out_features, **plain)
        if "bias" not in tensors:
            self.register_buffer("bias", None)

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as the layer computes with it, [out_features, in_features]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight(x.dtype), bias)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.plain.items())


def bias_of(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """``{"bias": ...}`` of a linear layer that has one: to be put among a packed layer's tensors."""
    return {} if linear.bias is None else {"bias": linear.bias.detach().clone()}
