"""OliVe: outlier-victim pairs for weights and activations (Guo et al. 2023, ISCA, arXiv 2304.07493).

Values are paired with their neighbours. A pair with an outlier in it gives up the other value, the victim, whose slot then
says that the outlier's code is to be read as a wide-range float. So 4 bits (or 8) reach fourteen times as far as their
normal values, and every value still has its slot: no index of outliers, no second path.

- `grids`: the number types; `pairs`: a tensor in pairs, the search for its scale; `kernel`: products straight from codes.
- `Olive`: a model's linear layers in pairs, weights by output row, inputs with one static scale a layer.

The hardware of the paper (decoders beside a systolic array or tensor core) is not part of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.observers import Keep
from broadsheet.core.models.walker import Block, walk
from broadsheet.core.numerics.packed import Form, PackedLinear, bias_of
from broadsheet.core.perf.storage import WeightFormat, pair_weight

from ..base import Progress, Shape, Unreachable, WeightMethod, check_model, linears, shapes
from .grids import PairType
from .pairs import MODES, POLICIES, OVPTensor, Search, choose, decode, encode, halves, kernels, kinds, scale_of, spread

__all__ = ["MODES", "PAIRINGS", "POLICIES", "OVPLinear", "OVPTensor", "Olive", "PairType", "Search", "saturation"]

PAIRINGS = ("adjacent", "halves", "spread")


class OVPLinear(PackedLinear):
    """A linear layer whose weight, and with ``input_type`` also its input, is in outlier-victim pairs.

    ``codes`` uint8 [out_features, bytes], ``alpha`` float32 [out_features]: an `OVPTensor`, always signed. ``input_alpha``
    float32 [1]: the input's, fixed at calibration. ``order`` int32 [in_features], for ``pairing`` "spread": the channel at
    each place. An input value beyond the largest outlier saturates; `saturation` says how often that happened.
    """

    codes: torch.Tensor
    alpha: torch.Tensor
    input_alpha: torch.Tensor
    weight_type: str
    input_type: str | None
    input_signed: bool
    outliers: bool
    oo_policy: str
    pairing: str

    def __init__(self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int, **plain: str | bool | None):
        super().__init__(tensors, in_features, out_features, **plain)
        #: input values since the module was made, and those of them that saturated
        self.seen = self.saturated = 0

    def form(self) -> dict[str, Form]:
        if self.oo_policy not in POLICIES or self.pairing not in PAIRINGS:
            raise ValueError(f"pairs '{self.pairing}' with '{self.oo_policy}' outliers are not covered")
        even = self.in_features + self.in_features % 2
        codes = (torch.uint8, (self.out_features, even * self.weight_kind.bits // 8))
        form = {**super().form(), "codes": codes, "alpha": (torch.float32, (self.out_features,))}
        if self.input_kind is not None:
            form["input_alpha"] = (torch.float32, (1,))
        if self.pairing == "spread":
            form["order"] = (torch.int32, (self.in_features,))
        return form

    @property
    def weight_kind(self) -> PairType:
        return PairType(self.weight_type, True, self.outliers)

    @property
    def input_kind(self) -> PairType | None:
        return PairType(self.input_type, self.input_signed, self.outliers) if self.input_type else None

    @property
    def channels(self) -> torch.Tensor | None:
        """The channel at each place; None where they stand as they are."""
        return halves(self.in_features) if self.pairing == "halves" else self.tensors.get("order")

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = decode(self.codes, self.weight_kind)[:, : self.in_features]
        weight = (values.float() * scale_of(self.alpha, self.weight_kind).unsqueeze(1)).to(dtype)
        return weight if self.channels is None else weight[:, self.channels.argsort()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]. A quantised input carries no gradient."""
        compiled: Any = kernels() if x.device.type == "cpu" else None
        kind = self.input_kind
        if kind is None and (compiled is None or (x.requires_grad and torch.is_grad_enabled())):
            return super().forward(x)
        rows = x.detach().reshape(-1, self.in_features).float()
        if self.channels is not None:
            rows = rows[:, self.channels]
        scale = scale_of(self.alpha, self.weight_kind)
        if kind is None:
            y = compiled.float_matmul(rows, self.codes, self.weight_kind)
        else:
            if not bool(torch.isfinite(rows).all()):
                raise ValueError("a layer's input holds inf or nan, which has no code; check the model that was compressed")
            input_scale = scale_of(self.input_alpha, kind)
            codes, _, saturated = encode(rows, input_scale.expand(len(rows)), kind, self.oo_policy)
            self.seen, self.saturated = self.seen + rows.numel(), self.saturated + saturated
            if compiled is not None:
                y = compiled.integer_matmul(codes, kind, self.codes, self.weight_kind).float()
            else:  # the integers are the same, and so are their sums up to 2**24 (in float64 all of them)
                wide = torch.float64 if x.device.type == "cpu" else torch.float32
                y = F.linear(decode(codes, kind).to(wide), decode(self.codes, self.weight_kind).to(wide)).float()
            scale = scale * input_scale
        y = y * scale
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)


def saturation(model: nn.Module) -> dict[str, float]:
    """The share of input values of each layer that saturated, over everything the model has been fed since it was made."""
    return {
        name: module.saturated / module.seen
        for name, module in model.named_modules()
        if isinstance(module, OVPLinear) and module.seen
    }


@dataclass(frozen=True)
class Olive(WeightMethod):
    """Linear layers with weights and inputs in outlier-victim pairs of 4 or 8 bits, without any training.

    Parameters: ``w_bits``, ``a_bits`` 4 or 8; ``a_bits`` None leaves the inputs as they are (weights alone: not what the
    paper claims). ``mode``: types of normals, "ant-int-flint" chooses for each tensor. ``w_low``, ``w_up``, ``a_low``,
    ``a_up``: where alpha is searched, in percent of three standard deviations. ``oo_policy``: which of two outliers stays.
    ``outliers`` off: normals only, clipped (percent are then of max |x|). ``layer_8bit_n``: so many layers go to 8 bits, the
    last two first, then those of the largest squared error of weights and inputs; ``layer_8bit_l``: their full names.
    ``pairing``: which channels are neighbours (an extension): "adjacent" as they are, "halves" i and i + width / 2, "spread"
    the largest with the smallest, by the inputs seen (by the weights without ``a_bits``), with an index of 4 bytes for each.

    Inputs are calibrated, as in the official code, layer after layer on the first batch (of 8 samples), each layer with the
    inputs that the compressed ones before it give. Deviations: errors for ``layer_8bit_n`` come from the uncompressed
    model; and Conv1D layers (GPT-2) are not covered: the official code gives each of their input channels a scale of its
    own, which no integer product can leave out of its sum.
    """

    w_bits: int = 4
    a_bits: int | None = 4
    mode: str = "ant-int-flint"
    w_low: int = 75
    w_up: int = 250
    a_low: int = 75
    a_up: int = 250
    oo_policy: str = "larger"
    outliers: bool = True
    layer_8bit_n: int = 0
    layer_8bit_l: tuple[str, ...] = ()
    pairing: str = "adjacent"

    def __post_init__(self) -> None:
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits)):
            if bits not in (4, 8) and not (name == "a_bits" and bits is None):
                raise ValueError(f"{name} must be 4 or 8, got {bits}")
        for name, value, known in (("mode", self.mode, MODES), ("oo_policy", self.oo_policy, POLICIES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got '{value}'")
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing must be one of {', '.join(PAIRINGS)}, got '{self.pairing}'")
        if self.layer_8bit_n < 0:
            raise ValueError(f"layer_8bit_n must be at least 0, got {self.layer_8bit_n}")
        _ = self.w_search, self.a_search  # these raise for an empty range

    @property
    def calibrated(self) -> bool:  # type: ignore[override]  # weights alone need no data
        return self.a_bits is not None

    @property
    def w_search(self) -> Search:
        return Search(self.w_low, self.w_up)

    @property
    def a_search(self) -> Search:
        return Search(self.a_low, self.a_up)

    def check(self, layers: Sequence[Shape]) -> None:
        if self.layer_8bit_n > len(layers):
            raise ValueError(f"layer_8bit_n {self.layer_8bit_n} is more than the model's {len(layers)} linear layers")

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        if not self.layer_8bit_n:
            return super().compress(model, calibration, progress)
        check_model(model)
        self.check(shapes(model))
        if calibration is None:
            raise ValueError("layer_8bit_n needs calibration: token ids of shape [samples, tokens]")
        names = list(linears(model))
        last, errors = names[-2:][::-1], self.errors(model, calibration)
        ranked = last + sorted((name for name in names if name not in last), key=lambda name: -errors[name])
        wide = tuple(dict.fromkeys([*ranked[: self.layer_8bit_n], *self.layer_8bit_l]))
        return replace(self, layer_8bit_n=0, layer_8bit_l=wide).compress(model, calibration, progress)

    @torch.no_grad()
    def errors(self, model: PreTrainedModel, calibration: torch.Tensor) -> dict[str, float]:
        """Mean squared error of every layer's weight and input in this method's bits, added up, on the model as it is."""
        found = {}
        for block in walk(model, calibration):
            for name, linear in block.linears.items():
                weight = linear.weight.float()
                error = choose(weight, self._kinds(self.w_bits, True), True, self.oo_policy, self.w_search).error
                found[name] = error / weight.numel()
                if self.a_bits:
                    x = self._inputs(block, name)
                    types = self._kinds(self.a_bits, bool(x.min() < 0))
                    found[name] += choose(x, types, False, self.oo_policy, self.a_search).error / x.numel()
        return found

    def compress_block(self, block: Block) -> None:
        for name, linear in block.linears.items():
            x = self._inputs(block, name) if self.a_bits else None
            try:
                block.replace(name, self.pack(linear, x, name in self.layer_8bit_l))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def pack(self, linear: nn.Linear, x: torch.Tensor | None = None, wide: bool = False) -> OVPLinear:
        """The layer in pairs. ``x`` float32 [rows, in_features]: inputs to calibrate on; ``wide``: in 8 bits."""
        weight, tensors = linear.weight.detach().float(), bias_of(linear)
        if self.pairing != "adjacent":
            largest = (weight if x is None else x).abs().amax(0)
            order = halves(linear.in_features) if self.pairing == "halves" else spread(largest)
            if self.pairing == "spread":
                tensors["order"] = order.to(torch.int32)
            weight, x = weight[:, order], None if x is None else x[:, order]
        bits = 8 if wide else self.w_bits
        packed = OVPTensor.pack(
            weight, bits=bits, mode=self.mode, signed=True, oo_policy=self.oo_policy, search=self.w_search,
            outliers=self.outliers,
        )  # fmt: skip
        tensors |= {"codes": packed.codes, "alpha": packed.alpha}
        kind = None
        if self.a_bits and x is not None:
            if not bool(torch.isfinite(x).all()):
                raise ValueError("its input holds inf or nan on the calibration tokens; check the model")
            types = self._kinds(8 if wide else self.a_bits, bool(x.min() < 0))
            found = choose(x, types, False, self.oo_policy, self.a_search)
            kind, tensors["input_alpha"] = found.kind, found.alpha.reshape(1)
        return OVPLinear(
            tensors,
            in_features=linear.in_features,
            out_features=linear.out_features,
            weight_type=packed.kind.name,
            input_type=kind.name if kind else None,
            input_signed=kind.signed if kind else True,
            outliers=self.outliers,
            oo_policy=self.oo_policy,
            pairing=self.pairing,
        )

    def _kinds(self, bits: int, signed: bool) -> list[PairType]:
        return kinds(bits, self.mode, signed, self.outliers)

    def _inputs(self, block: Block, name: str) -> torch.Tensor:
        """What the layer gets on the first batch, float32 [rows, in_features]."""
        keep = Keep()
        Block(block.index, block.name, block.module, block.passes[:1]).observe({name: keep})
        if not sum(x.numel() for x in keep.inputs):
            raise ValueError(f"{name} got no input from the first batch of calibration tokens; give more of them")
        return torch.cat([x.flatten(0, -2) for x in keep.inputs]).float()

    def format(self) -> WeightFormat:
        """Of the layers that are not in 8 bits for their error."""
        return pair_weight(self.w_bits, self.a_bits is not None, self.pairing == "spread")

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """8 bits where all layers fit, else 4 and as many layers in 8 as fit whichever they are."""
        weights = sum(rows * columns for rows, columns in layers)
        narrow, wide = (replace(self, w_bits=w_bits).format().nbytes for w_bits in (4, 8))
        held = sum(narrow(*shape) for shape in layers)
        if 8 * held / weights > bits:
            raise Unreachable(8 * held / weights)
        count = 0
        for more in sorted((wide(*shape) - narrow(*shape) for shape in layers), reverse=True):
            held += more
            if 8 * held / weights > bits:
                break
            count += 1
        if count == len(layers):
            return replace(self, w_bits=8, a_bits=self.a_bits and 8, layer_8bit_n=0, layer_8bit_l=())
        return replace(self, w_bits=4, a_bits=self.a_bits and 4, layer_8bit_n=count, layer_8bit_l=())
