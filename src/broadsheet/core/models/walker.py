"""The block walker: a model's decoder blocks one after the other, each with the inputs that it really gets.

`walk(model, ids)` yields `Block`s in order. While the caller holds a block it may look at what its linear layers are fed
(`Block.observe`) and change it; the next block's inputs then come from the changed one. One block's activations are held
at a time. It works on every transformers causal model whose decoder blocks stand in one ModuleList and take the hidden
states first: Llama, Qwen, Mistral, Gemma, OPT, GPT-NeoX and their kin.

On a CPU, blocks of a 16-bit model run in float32, with the same weights: few processors have fast 16-bit products, and the
rounding of activations is none of a method's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from broadsheet.core.numerics.packed import Packed

Observer = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Pass:
    """One batch on its way: ``hidden`` [batch, tokens, hidden_size] and the block's other arguments."""

    hidden: torch.Tensor
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Block:
    """One decoder block: its full name, its module, and (when walked) the batches that reach it."""

    index: int
    name: str
    module: nn.Module
    passes: list[Pass]
    running: Pass = field(init=False, repr=False)  # the one that `run` is at

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Its linear layers by full name, those replaced by `replace` no longer among them."""
        return {
            f"{self.name}.{name}": module for name, module in self.module.named_modules() if isinstance(module, nn.Linear)
        }

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """The block's outputs, a tensor [batch, tokens, hidden_size] a batch."""
        with widened(self.module):
            return [self.output(step) for step in self.passes]

    def observe(self, observers: Mapping[str, Observer]) -> list[torch.Tensor]:
        """Runs the block and shows every named module's input [batch, tokens, in_features] to its observer.

        Names are full ones, as in `linears`. Returns the outputs, as `run` does.
        """
        handles = [
            self.get(name).register_forward_pre_hook(lambda module, args, see=observer: see(self._by_sample(args[0])))
            for name, observer in observers.items()
        ]
        try:
            return self.run()
        finally:
            for handle in handles:
                handle.remove()

    def output(self, step: Pass, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the block makes of one pass, with other ``weights`` for the linear layers of these full names.

        [batch, tokens, hidden_size], with gradients to ``weights`` and parameters, if taken within `widened`. The block
        stays what it is.
        """
        self.running = step
        with widened(self.module):
            local = {
                f"{name.removeprefix(self.name + '.')}.weight": weight.to(self.get(name).weight.dtype)
                for name, weight in (weights or {}).items()
            }
            output = functional_call(self.module, local, (_wide(step.hidden),), _wide(step.arguments))
        return output[0] if isinstance(output, tuple) else output

    def _by_sample(self, x: torch.Tensor) -> torch.Tensor:
        """A module's input as [batch, tokens, channels]; OPT flattens the first two between its norm and ``fc1``."""
        x, shape = x.detach(), self.running.hidden.shape
        return x.unflatten(0, shape[:2]) if x.ndim == 2 and x.shape[0] == shape[0] * shape[1] else x

    def get(self, name: str) -> Any:  # nn.Module does not declare what layers and norms have
        """A module of the block by its full name."""
        return self.module.get_submodule(name.removeprefix(self.name + "."))

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts ``module`` in the place of the one of this full name."""
        path, _, leaf = name.removeprefix(self.name + ".").rpartition(".")
        setattr(self.module.get_submodule(path), leaf, module)


def _wide(value: Any) -> Any:
    """``value`` with the 16-bit tensors in it, if they are on the CPU, in float32."""
    if isinstance(value, torch.Tensor):
        narrow = value.device.type == "cpu" and value.is_floating_point() and value.itemsize == 2
        return value.float() if narrow else value
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return {name: _wide(one) for name, one in value.items()} if isinstance(value, dict) else value


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """On a CPU, ``module`` with its 16-bit tensors in float32 for a while. What is packed stays as it is.

    After it the tensors are what they were: changes that were made to them in place are gone.
    """
    tensors = [
        t for m in module.modules() if not isinstance(m, Packed) for t in [*m._parameters.values(), *m._buffers.values()]
    ]
    held = {tensor: tensor.data for tensor in tensors if tensor is not None}
    try:
        for tensor, data in held.items():
            tensor.data = _wide(data)
        yield
    finally:
        for tensor, data in held.items():
            tensor.data = data


def decoder_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder blocks by full name, in order. Raises ValueError when the model has no list of them."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count > 0 and name.rsplit(".", 1)[-1] in {"layers", "h"}:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder blocks; this family of models is not covered")


def blocks(model: PreTrainedModel) -> Iterator[Block]:
    """The decoder blocks, for methods that need no data."""
    for index, (name, module) in enumerate(decoder_blocks(model).items()):
        yield Block(index, name, module, [])


def walk(model: PreTrainedModel, ids: torch.Tensor, batch: int = 8) -> Iterator[Block]:
    """The decoder blocks with their inputs on ``ids`` [samples, tokens], ``batch`` samples at a time.

    Raises ValueError when there is nothing to walk on.
    """
    if ids.ndim != 2 or not ids.numel():
        raise ValueError("calibration must be token ids of shape [samples, tokens], at least one of each")
    passes = _entries(model, ids, batch)
    for index, (name, module) in enumerate(decoder_blocks(model).items()):
        block = Block(index, name, module, passes[index])
        yield block
        if index + 1 < len(passes):
            passes[index + 1] = [
                replace(step, hidden=hidden) for step, hidden in zip(passes[index + 1], block.run(), strict=True)
            ]
        passes[index] = block.passes = []


@torch.no_grad()
def _entries(model: PreTrainedModel, ids: torch.Tensor, batch: int) -> list[list[Pass]]:
    """For every block and batch what it is called with. Only the first block's hidden states are kept.

    Masks, positions and rotations do not depend on the weights, so one pass of the model as it is serves all blocks. In it
    the first block computes once, and whatever is called after gives back what that gave.
    """
    modules = list(decoder_blocks(model).values())
    passes: list[list[Pass]] = [[] for _ in modules]

    def catch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            nothing = hidden.new_empty(0)
            passes[index].append(Pass(hidden if index == 0 else nothing, kwargs))

        return hook

    given: list[Any] = []

    def instead(forward: Callable[..., Any]) -> Callable[..., Any]:
        def once(*args: Any, **kwargs: Any) -> Any:
            if not given:
                given.append(forward(*args, **kwargs))
            return given[0]

        return once

    handles = [module.register_forward_pre_hook(catch(i), with_kwargs=True) for i, module in enumerate(modules)]
    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = instead(module.forward)
    try:
        for first in range(0, len(ids), batch):
            model(ids[first : first + batch].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        for module, forward in zip(modules, own):
            del module.forward
            if forward is not None:
                module.forward = forward
    return passes
