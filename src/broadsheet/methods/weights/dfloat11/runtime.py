"""Running a compressed model: a unit is decoded just before it is used, and dropped after (section 2.3.4).

All units of a model share one bfloat16 buffer a device, as large as the largest of them. Before a unit's forward pass its
weights are decoded into the buffer and its layers get views of it; after the pass the views are taken away, so that a layer
that is called by itself fails instead of computing with another unit's weights. (A model that is loaded in another dtype
computes in that one, with copies of the same weights: exactly the same in float32.)

Hence the weights of two units cannot be used at once: no training, no gradient checkpointing, no two threads in one model.
`unit_of` and `decode` serve those who want to read weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from .codec import Unit
from .decoders import decode

UNIT_TENSORS = tuple(field.name for field in fields(Unit))
#: what stays in host memory when a model is offloaded: nearly all of its bytes
OFFLOADED = ("encoded_exponent", "sign_mantissa")


class Workspace(nn.Module):
    """The buffers, one a device, of ``most`` weights each. A part of the model, so that its bytes are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    @classmethod
    def of(cls, model: nn.Module) -> Workspace:
        """The workspace of a model, which it gets here if it has none."""
        found = getattr(model, "dfloat11_workspace", None) or cls()
        if isinstance(model, nn.Sequential):  # would call it
            model.__dict__["dfloat11_workspace"] = found
        else:
            model.dfloat11_workspace = found
        return found

    def take(self, weights: int, device: torch.device) -> torch.Tensor:
        """Room for so many weights, bfloat16."""
        name = f"on_{device}"
        if name not in self._buffers:
            with torch.inference_mode(False):  # so that it serves both inside and outside of inference mode
                self.register_buffer(name, torch.empty(self.most, dtype=torch.bfloat16, device=device), persistent=False)
        buffer = self.get_buffer(name)
        torch.autograd.graph.increment_version(buffer)  # a backward pass through weights that are gone fails
        return buffer[:weights]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Workspace:
        self._buffers.clear()  # what is in them is not worth moving
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that were needed so far."""
        return sum(buffer.nbytes for buffer in self.buffers())


@dataclass(eq=False)
class Decompressor:
    """What stands at a unit's module as ``module.dfloat11``: gives the layers at ``paths`` weights and takes them away.

    ``dtype``: what the model computes in.
    """

    paths: list[str]
    workspace: Workspace
    dtype: torch.dtype
    host: dict[str, torch.Tensor] = field(default_factory=dict)  # the tensors of `OFFLOADED`, if it is

    def unit(self, module: nn.Module) -> Unit:
        """The unit on the module's device; what is offloaded is copied there."""
        device = module.get_buffer("luts").device
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.host.items()}
        return Unit(**{name: moved[name] if name in moved else getattr(module, name) for name in UNIT_TENSORS})

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        unit = self.unit(module)
        weights = decode(unit, self.workspace.take(unit.weights, unit.luts.device))
        layers = self.layers(module)
        shapes = [layer_shape(layer) for layer in layers]
        for layer, shape, part in zip(layers, shapes, weights.split([rows * columns for rows, columns in shapes])):
            layer.weight = part.view(shape).to(self.dtype)  # itself, in bfloat16

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for layer in self.layers(module):
            if "weight" in layer.__dict__:
                del layer.weight

    def layers(self, module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule(path) for path in self.paths]


def attach(module: nn.Module, tensors: dict[str, torch.Tensor], paths: Sequence[str], workspace: Workspace) -> None:
    """Makes ``module`` a unit: it gets the six ``tensors`` as buffers, and the layers at ``paths`` lose their weights.

    Tensors may be on the meta device. The layers will compute in the dtype that their weights had. Raises ValueError when
    the shapes do not fit.
    """
    layers = [module.get_submodule(path) for path in paths]
    sizes = [rows * columns for rows, columns in map(layer_shape, layers)]
    if missing := [name for name in UNIT_TENSORS if name not in tensors]:
        raise ValueError(f"{', '.join(missing)} of it missing in the file; copy or compress the model again")
    if tensors["sign_mantissa"].numel() != sum(sizes) or tensors["split_positions"].numel() != len(sizes) - 1:
        stored = tensors["sign_mantissa"].numel()
        raise ValueError(f"the file holds {stored} weights for layers of {sum(sizes)}; it belongs to another model")
    (dtype, *_) = [layer.get_parameter("weight").dtype for layer in layers]
    for layer in layers:
        del layer.weight
    for name in UNIT_TENSORS:
        module.register_buffer(name, tensors[name])
    decompressor = Decompressor(list(paths), workspace, dtype)
    workspace.most = max(workspace.most, sum(sizes))
    module.dfloat11 = decompressor  # type: ignore[assignment]  # neither module nor tensor
    module.register_forward_pre_hook(decompressor.before)
    module.register_forward_hook(decompressor.after, always_call=True)


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """The shape of a layer's weight. Raises ValueError for layers that are neither linear nor an embedding."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    raise ValueError(f"a {type(layer).__name__} is neither nn.Linear nor nn.Embedding; leave it out of pattern_dict")


def compressed(model: nn.Module) -> Iterator[tuple[str, nn.Module, Decompressor]]:
    """The units of a model: full name, module, decompressor."""
    for name, module in model.named_modules():
        if "dfloat11" in module.__dict__:
            yield name, module, module.__dict__["dfloat11"]


def unit_of(model: nn.Module, name: str) -> Unit:
    """A unit of a compressed model by the full name of its module."""
    return model.get_submodule(name).__dict__["dfloat11"].unit(model.get_submodule(name))


def offload(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Moves ``model`` to ``device`` except what takes most of a unit, which stays in host memory and is copied for each use.

    Host memory is pinned for a GPU. Returns the model.
    """
    device = torch.device(device)
    for _, module, decompressor in compressed(model):
        for name in OFFLOADED:
            tensor = module.get_buffer(name).cpu()
            del module._buffers[name]
            decompressor.host[name] = tensor.pin_memory() if device.type == "cuda" else tensor
    return model.to(device)
