"""Modules whose weights are stored packed.

A `Packed` module is what its tensors and its plain fields say, and nothing else: ``cls(tensors, **plain)`` builds it again.
That makes saving and loading generic (the tensors go into the safetensors file, the plain fields into config.json), and
memory honest: what is held is what `nbytes` counts.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import get_annotations
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

#: dtype and shape of a tensor
Form = tuple[torch.dtype, tuple[int, ...]]
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
        if unknown := [name for name in plain if name not in _fields(self.__class__)]:
            raise TypeError(f"a {type(self).__name__} has no field {', '.join(unknown)}")
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

    def form(self) -> dict[str, Form]:
        """The tensors that the plain fields call for, by name; those that may be missing only where they are there.

        Raises ValueError for plain fields that are no such layer's.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError unless the tensors are of the `form` that the plain fields say.

        So that no kernel reads past a tensor's end, whatever a file says. Tensors may be on the meta device.
        """
        form, held = self.form(), {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        for name in sorted(form.keys() | held.keys()):
            if form.get(name) != held.get(name):
                raise ValueError(f"{name} must be {_shown(form.get(name))}, is {_shown(held.get(name))}")

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

    def form(self) -> dict[str, Form]:
        """Of the bias, which may have any floating dtype."""
        if min(self.in_features, self.out_features) < 1:
            raise ValueError(f"a layer of {self.out_features} x {self.in_features} has no weights")
        if self.bias is None:
            return {}
        if not self.bias.is_floating_point():
            raise ValueError(f"the bias is {self.bias.dtype}")
        return {"bias": (self.bias.dtype, (self.out_features,))}

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as the layer computes with it, [out_features, in_features]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight(x.dtype), bias)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.plain.items())


def _fields(kind: type) -> set[str]:
    """The names that a class and its bases annotate."""
    return {name for base in kind.__mro__ for name in get_annotations(base)}


def _shown(form: Form | None) -> str:
    return "missing" if form is None else f"{str(form[0]).removeprefix('torch.')} {list(form[1])}"


def bias_of(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """``{"bias": ...}`` of a linear layer that has one: to be put among a packed layer's tensors."""
    return {} if linear.bias is None else {"bias": linear.bias.detach().clone()}
