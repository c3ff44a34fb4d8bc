"""The linear layer of an AQLM model: stored in additive codes, or (`Tunable`) with codebooks and scales to be trained."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from broadsheet.core.numerics.packed import Form, PackedLinear
from broadsheet.core.numerics.packing import pack, packed_size, unpack

from .additive import Additive

#: what scales and codebooks are stored in
HALF = torch.float16


class AQLMLinear(PackedLinear):
    """A linear layer in additive codes of ``nbits`` bits, see `Additive`.

    ``codes`` uint8 [out_features / out_group, ceil(groups * M * nbits / 8)], a row's codes group by group without gaps;
    ``codebooks`` float16 [M, 2**nbits, out_group, in_group]; ``scales`` float16 [out_features / out_group].
    """

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor
    nbits: int

    @classmethod
    def of(cls, stored: Additive, bias: torch.Tensor | None = None, **plain: str) -> Self:
        """The layer with this weight. Raises ValueError when a scale or codebook is beyond what 16 bits hold."""
        _, entries, out_group, in_group = stored.codebooks.shape
        nbits = (entries - 1).bit_length()
        scales, codebooks = stored.scales.detach().to(HALF), stored.codebooks.detach().to(HALF)
        if not bool(torch.isfinite(scales).all() and torch.isfinite(codebooks).all()):
            raise ValueError("a row's norm or a codebook is beyond the range of float16; scale the weights down")
        codes = stored.codes.flatten(1)
        rows, groups = stored.codes.shape[:2]
        tensors = {"codes": pack(codes.to(torch.uint8) if nbits <= 8 else codes, nbits)}
        tensors |= {"codebooks": codebooks, "scales": scales, **({} if bias is None else {"bias": bias.detach().clone()})}
        return cls(tensors, in_features=groups * in_group, out_features=rows * out_group, nbits=nbits, **plain)

    def form(self) -> dict[str, Form]:
        if self.codebooks.ndim != 4 or not self.codebooks.numel() or not 1 <= self.nbits <= 16:
            raise ValueError(f"codebooks of {list(self.codebooks.shape)} and {self.nbits} bits are no codebooks")
        books, _, out_group, in_group = self.codebooks.shape
        if self.in_features % in_group or self.out_features % out_group:
            raise ValueError(f"groups of {out_group} x {in_group} do not divide {self.out_features} x {self.in_features}")
        rows, count = self.out_features // out_group, self.in_features // in_group * books
        return {
            **super().form(),
            "codes": (torch.uint8, (rows, packed_size(count, self.nbits))),
            "codebooks": (HALF, (books, 2**self.nbits, out_group, in_group)),
            "scales": (HALF, (rows,)),
        }

    @property
    def stored(self) -> Additive:
        """What is stored, in float32."""
        groups, books = self.in_features // self.codebooks.shape[3], self.codebooks.shape[0]
        codes = unpack(self.codes, self.nbits, groups * books).long().unflatten(1, (groups, books))
        return Additive(codes, self.codebooks.float(), self.scales.float())

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.stored.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]; on a CPU multiplied with the codes, in float32."""
        if x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        from . import kernel  # numba takes its time to import

        rows = x.detach().reshape(-1, self.in_features).float().contiguous()
        y = kernel.matmul(rows, self.codes, self.codebooks.float(), self.scales.float(), self.nbits)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def official(self) -> dict[str, torch.Tensor]:
        """The tensors as the aqlm package has them: ``codes`` int8 (int16 above 8 bits) [O / out_group, groups, M], in two's
        complement, ``codebooks`` float16 [M, 2**nbits, out_group, in_group], ``scales`` float16 [O / out_group, 1, 1, 1].

        Only with 8 and 16 bits a codebook are these as small as what is stored here.
        """
        codes, kind = self.stored.codes, torch.int8 if self.nbits <= 8 else torch.int16
        codes = torch.where(codes >= 2 ** (self.nbits - 1), codes - 2**self.nbits, codes).to(kind)
        tensors = {"codes": codes, "codebooks": self.codebooks, "scales": self.scales[:, None, None, None]}
        return {**tensors, **({} if self.bias is None else {"bias": self.bias})}

    @classmethod
    def from_official(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """The layer of tensors in the official layout."""
        codebooks, scales = tensors["codebooks"], tensors["scales"]
        if scales.ndim != 4 or scales[0].numel() != 1:
            raise ValueError(f"scales must be [rows, 1, 1, 1], got {list(scales.shape)}; scales by group are not covered")
        codes = tensors["codes"].long() % codebooks.shape[1]
        return cls.of(Additive(codes, codebooks, scales.flatten()), tensors.get("bias"))


class SharedAQLMLinear(AQLMLinear):
    """One whose codebooks all layers of a decoder block have in common: one tensor in memory, and one, by the name of the
    ``block``, in a file beside the model's weights."""

    stored_apart: ClassVar[bool] = True
    block: str

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int, **plain: Any):
        super().__init__(tensors, in_features, out_features, **plain)
        if "codebooks" not in tensors:
            self.register_buffer("codebooks", None, persistent=False)
        self._non_persistent_buffers_set.add("codebooks")


class Tunable(nn.Module):
    """An `AQLMLinear` whose codes stand and whose ``codebooks`` and ``scales`` are float32 parameters."""

    def __init__(self, layer: AQLMLinear, codebooks: nn.Parameter):
        super().__init__()
        stored = layer.stored
        self.codes, self.bias, self.block = stored.codes, layer.bias, getattr(layer, "block", "")
        self.codebooks, self.scales = codebooks, nn.Parameter(stored.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = Additive(self.codes, self.codebooks, self.scales).weight
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def packed(self) -> AQLMLinear:
        """The layer with what was trained, rounded to 16 bits."""
        stored = Additive(self.codes, self.codebooks, self.scales)
        return SharedAQLMLinear.of(stored, self.bias, block=self.block) if self.block else AQLMLinear.of(stored, self.bias)


def tunable(layers: dict[str, AQLMLinear]) -> dict[str, Tunable]:
    """The layers, by name, as ones that can be trained; what they share they go on sharing."""
    books: dict[str, nn.Parameter] = {}
    parts = {}
    for name, layer in layers.items():
        owner = getattr(layer, "block", name)
        if owner not in books:
            books[owner] = nn.Parameter(layer.codebooks.float())
        parts[name] = Tunable(layer, books[owner])
    return parts


def packed(parts: dict[str, Tunable]) -> dict[str, AQLMLinear]:
    """The inverse of `tunable`."""
    layers = {name: part.packed() for name, part in parts.items()}
    books: dict[str, torch.Tensor] = {}
    for layer in layers.values():
        if isinstance(layer, SharedAQLMLinear):
            layer.codebooks = books.setdefault(layer.block, layer.codebooks)
    return layers
