"""What every method of weight compression stands on.

A method is a frozen dataclass of hyperparameters; ``method.compress(model, calibration)`` changes a transformers model in
place and returns it. Most methods implement one verb, `compress_block`: they get the decoder blocks one after the other,
each with the inputs that the already compressed blocks before it give, and put `Packed` modules in the place of linear
layers. Embeddings, norms and the output layer stay what they are.

A compressed model is saved by ``save_pretrained`` and loaded by ``from_pretrained`` like any other, see `quantiser`. Budgets
are bits a weight of the compressed layers, everything counted that is stored for them (`size`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.folds import is_norm
from broadsheet.core.models.walker import Block, blocks, decoder_blocks, walk
from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.perf.storage import Shape, WeightFormat, bits_a_weight

Progress = Callable[[int, int], None]


class Unreachable(ValueError):
    """A method cannot get down to the asked bits."""

    def __init__(self, least: float):
        super().__init__(f"the least this method can do here is {least:.2f} bits a weight")
        self.least = least


@dataclass(frozen=True)
class WeightMethod:
    """Base of all weight methods: hyperparameters as fields, `compress` as the verb."""

    #: whether `compress` needs calibration tokens
    calibrated: ClassVar[bool] = True
    #: a method without budgets stands in a comparison once, as it is
    budgeted: ClassVar[bool] = True

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        """Compresses ``model`` in place and returns it.

        ``calibration``: token ids [samples, tokens]. ``progress(done, total)`` is called after every block. Raises
        ValueError when the model is not covered, has weights that are not finite, is compressed already, or the method needs
        calibration and gets none.
        """
        check_model(model)
        if self.calibrated and calibration is None:
            raise ValueError(f"{type(self).__name__} needs calibration: token ids of shape [samples, tokens]")
        self.check(shapes(model))
        total = len(decoder_blocks(model))
        with torch.no_grad():
            found = walk(model, calibration) if self.calibrated and calibration is not None else blocks(model)
            for block in self.compress_blocks(found):
                if progress:
                    progress(block.index + 1, total)
        return self.seal(model)

    def compress_blocks(self, found: Iterator[Block]) -> Iterator[Block]:
        """Yields every block when it is compressed; overridden by methods that carry something from one to the next."""
        for block in found:
            self.compress_block(block)
            yield block

    def compress_block(self, block: Block) -> None:
        """Replaces the block's linear layers."""
        raise NotImplementedError

    def seal(self, model: PreTrainedModel) -> PreTrainedModel:
        """Declares the model compressed, so that it is saved and loaded as what it is."""
        from .quantiser import seal

        return seal(model, self)

    @classmethod
    def save_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        """Writes the files of its own that a method of `Packed.stored_apart` modules has, into a model's new folder."""

    @classmethod
    def load_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        """Reads them, when everything else of the model is loaded."""

    def check(self, layers: Sequence[Shape]) -> None:
        """Raises ValueError when these parameters do not fit layers of these shapes [out_features, in_features]."""

    def format(self) -> WeightFormat:
        """How a layer is stored. Methods whose bytes the weights or the layer's place decide (DFloat11, BitStack, CRaSh)
        have none."""
        raise NotImplementedError

    def stored_bits(self, layers: Sequence[Shape]) -> float:
        """Bits a weight of layers of these shapes, with all that is stored for them."""
        return bits_a_weight(self.format().nbytes, layers)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """This method with the parameters that come closest to, and not above, ``bits`` a weight of these layers.

        Raises `Unreachable` with the least bits that it can do.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def slug(cls) -> str:
        """``module:Class``, as the catalogue writes it."""
        return f"{cls.__module__}:{cls.__qualname__}"


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that cannot be compressed, saying why."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("this model is compressed already; load the original and compress that")
    if not linears(model):
        raise ValueError(f"{type(model).__name__} has no nn.Linear in its decoder blocks, and no others are covered")
    for name, linear in linears(model).items():
        if not linear.weight.is_floating_point():
            raise ValueError(f"{name} holds {linear.weight.dtype} codes, not weights; load the original model")
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError(f"{name} has weights that are inf or nan; nothing can be made of them")
    owners: dict[int, str] = {}
    for name, linear in linears(model).items():
        first = owners.setdefault(linear.weight.data_ptr(), name)
        if first != name:
            raise ValueError(f"{name} shares its weight with {first}; untie them before compressing")


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks that are not compressed (yet), by full name."""
    return {name: linear for block in blocks(model) for name, linear in block.linears.items()}


def shapes(model: PreTrainedModel) -> list[Shape]:
    """[out_features, in_features] of the linear layers of the decoder blocks, compressed or not."""
    return [(linear.out_features, linear.in_features) for linear in _layers(model)]


def _layers(model: PreTrainedModel) -> Iterator[nn.Linear | PackedLinear]:
    for block in decoder_blocks(model).values():
        for module in block.modules():
            if isinstance(module, nn.Linear | PackedLinear):
                yield module


@dataclass(frozen=True)
class Size:
    """What a model holds.

    ``bits``: bits a weight of the linear layers in the decoder blocks, with all that is stored in these blocks but
    biases and the gains of norms. ``bytes``: all tensors of the model, tied ones once. ``weights``: how many weights these
    layers have.
    """

    bits: float
    bytes: int
    weights: int


def size(model: PreTrainedModel) -> Size:
    """Measured from the tensors that the model holds, never from a formula."""
    held = 0
    seen: set[int] = set()
    for block in decoder_blocks(model).values():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            owner, _, leaf = name.rpartition(".")
            if leaf != "bias" and not (leaf == "weight" and is_norm(block.get_submodule(owner))):
                held += _fresh(tensor, seen)
    weights = sum(rows * columns for rows, columns in shapes(model))
    everything = [*model.parameters(), *model.buffers()]
    seen = set()
    return Size(8 * held / max(weights, 1), sum(_fresh(tensor, seen) for tensor in everything), weights)


def _fresh(tensor: torch.Tensor, seen: set[int]) -> int:
    """Bytes of the tensor's storage, if it was not counted before."""
    storage = tensor.untyped_storage()
    if not storage.nbytes() or storage.data_ptr() in seen:  # empty ones may have the address of another
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
