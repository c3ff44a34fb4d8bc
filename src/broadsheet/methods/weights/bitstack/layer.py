"""The linear layer of a BitStack model, and the size of the model, which can be changed at any time.

A `BitStackLinear` holds the first few blocks of its stack, each in memory of its own. More are read from the stack's file,
and those that are dropped are freed. `set_size` moves a whole model to a number of bytes along the universal order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import nn

from broadsheet.core.numerics.packed import Form, PackedLinear

from . import kernel
from .decompose import Layout, compose
from .stack import Stack


class BitStackLinear(PackedLinear):
    """A linear layer of ``n_loaded`` of ``n_iter`` blocks, see `Layout`; block i is the uint8 buffer ``block<i>``.

    ``rank``, ``signed``: its layout. The blocks are not among the model's weights: the stack's file has them.
    """

    stored_apart: ClassVar[bool] = True
    rank: int
    signed: bool
    n_iter: int

    def __init__(
        self, tensors: dict[str, torch.Tensor], in_features: int, out_features: int, rank: int, signed: bool, n_iter: int
    ):
        super().__init__(tensors, in_features, out_features, rank=rank, signed=signed, n_iter=n_iter)
        self._non_persistent_buffers_set.update(name for name in tensors if name.startswith("block"))
        self.layout = Layout(out_features, in_features, rank, signed)
        self.n_loaded = sum(name.startswith("block") for name in tensors)
        self.stack: Stack | None = None
        self.place = 0

    def form(self) -> dict[str, Form]:
        """Of what lies in the model's own files; the stack's file is checked when it is read."""
        names = [name for name in self.tensors if name.startswith("block")]
        return {**super().form(), **dict.fromkeys(names, (torch.uint8, (self.layout.nbytes,)))}

    def attach(self, stack: Stack, place: int) -> None:
        """Names where more blocks are read: layer ``place`` of ``stack``."""
        layout = stack.index.layouts[place]
        if layout != self.layout or stack.index.n_iter != self.n_iter:
            raise ValueError(
                f"the stack has blocks of {layout.rows} x {layout.columns}, rank {layout.rank}, for "
                f"{stack.index.names[place]}, which is {self.out_features} x {self.in_features}, rank {self.rank}; "
                "the files belong to different models"
            )
        self.stack, self.place = stack, place

    @property
    def blocks(self) -> list[torch.Tensor]:
        """The blocks held, in order."""
        return [self._buffers[f"block{i}"] for i in range(self.n_loaded)]  # type: ignore[misc]

    def memory_bytes(self) -> int:
        """Bytes held: the blocks and the bias."""
        return self.nbytes

    def set_blocks(self, count: int, device: torch.device | None = None) -> None:
        """Holds exactly the first ``count`` blocks: drops the others, or reads what is missing.

        The first blocks go to ``device``, later ones to where these are. Raises ValueError for a count outside 1 .. n_iter,
        and where the stack is missing or damaged; the layer then holds what it held.
        """
        if not 1 <= count <= self.n_iter:
            raise ValueError(f"a layer holds 1 to {self.n_iter} blocks, not {count}")
        missing = [(self.place, block) for block in range(self.n_loaded, count)]
        if missing and self.stack is None:
            raise ValueError("this layer has no stack to read from; load the model from its folder")
        if missing and self.stack is not None:
            fresh = [block for _, block in self.stack.read(missing)]
            for block in fresh:
                self.push(block, device)
        self.keep(count)

    def push(self, block: torch.Tensor, device: torch.device | None = None) -> None:
        """Adds the next block."""
        if self.n_loaded:
            device = self.blocks[0].device
        self.register_buffer(f"block{self.n_loaded}", block.to(device or block.device), persistent=False)
        self.n_loaded += 1

    def keep(self, count: int) -> None:
        """Drops all but the first ``count`` blocks."""
        while self.n_loaded > count:
            self.n_loaded -= 1
            del self._buffers[f"block{self.n_loaded}"]
            self._non_persistent_buffers_set.discard(f"block{self.n_loaded}")

    def weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """sum of S_i * (A_i B_i), in float32, then ``dtype``. Raises ValueError while no block is loaded."""
        if not self.n_loaded:
            raise ValueError("no block of this layer is loaded; load the model from its folder")
        return compose(self.blocks, self.layout).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + bias. On a CPU some rows of W at a time are rebuilt and multiplied, see `kernel`."""
        if not self.n_loaded or not kernel.covers(x, self.layout):
            return super().forward(x)
        y = kernel.forward(x, self.blocks, self.layout)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Moved(TypedDict):
    """What a change of size moved: ``moved_bytes`` and ``blocks`` (how many) that were read or dropped."""

    moved_bytes: int
    blocks: int


class Step(NamedTuple):
    """One size of the model: ``bytes`` in all, when ``layer`` has got ``blocks`` blocks. The first: one block in every."""

    bytes: int
    layer: str
    blocks: int


def bitstack_layers(model: nn.Module) -> list[BitStackLinear]:
    """The model's BitStack layers in the order of their stack. Raises ValueError when there are none."""
    found = [module for module in model.modules() if isinstance(module, BitStackLinear)]
    if not found:
        raise ValueError("this model has no BitStack layers; compress it with BitStack or load a folder that was")
    return sorted(found, key=lambda layer: layer.place)


def stack_of(layers: Sequence[BitStackLinear]) -> Stack:
    """The stack that all layers read from."""
    stack = layers[0].stack
    if stack is None:
        raise ValueError("these layers have no stack to read from; load the model from its folder")
    return stack


def base_bytes(model: nn.Module) -> int:
    """Bytes of all that is not a block: embeddings, norms, biases, buffers; tied tensors once."""
    storages = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not (isinstance(module, BitStackLinear) and name.startswith("block")):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(storages.values())


def size_table(model: nn.Module) -> list[Step]:
    """Every size that the model can be set to, from one block of every layer to all."""
    index = stack_of(bitstack_layers(model)).index
    sizes = index.sizes(base_bytes(model))
    raised = [Step(size, index.names[layer], block + 1) for size, (layer, block) in zip(sizes[1:], index.order)]
    return [Step(sizes[0], "", 1), *raised]


def set_size(model: nn.Module, room: int) -> Moved:
    """Loads or drops blocks so that the model holds as much of its stack as fits into ``room`` bytes, and no more.

    Only the blocks between the two sizes move, read from one contiguous range of the stack's file. Raises ValueError, naming
    the minimum, when one block of every layer does not fit, and when the file is damaged; the model then stays as it was.
    """
    layers = bitstack_layers(model)
    index = stack_of(layers).index
    return set_counts(layers, index.counts(index.position(room, base_bytes(model))))


def set_counts(
    layers: Sequence[BitStackLinear], counts: Sequence[int], devices: Sequence[torch.device] | None = None
) -> Moved:
    """Gives every layer so many blocks, reading in the order of the file; a layer's first block goes to its device."""
    stack = stack_of(layers)
    before = [layer.n_loaded for layer in layers]
    wanted = [(layer, block) for layer, block in stack.index.whole if before[layer] <= block < counts[layer]]
    if wanted:
        try:
            for (place, _), block in stack.read(wanted):
                layers[place].push(block, devices[place] if devices else None)
        except ValueError:
            for layer, count in zip(layers, before):
                layer.keep(count)
            raise
    moved = [abs(count - old) for count, old in zip(counts, before)]
    for layer, count in zip(layers, counts):
        layer.keep(count)
    return Moved(moved_bytes=sum(n * layer.layout.nbytes for n, layer in zip(moved, layers)), blocks=sum(moved))
