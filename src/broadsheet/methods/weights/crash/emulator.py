"""An emulator made, sent, tuned and undone again (CRaSh, arXiv 2310.15477; offsite-tuning, arXiv 2302.04870).

The owner makes a plan and sends `EmulatorPlan.save`'s folder: the kept layers alone. The client loads it (`load_emulator`),
which restores the depth by using layers several times, tunes the adapters by any means (everything else is frozen), and
sends `extract_adapters`' file back. The owner plugs it into the full model (`plug_in`).

This hides data and most of the weights; it proves nothing about what can be learned from either side's files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.models import fingerprint
from broadsheet.core.models.walker import decoder_blocks

from ..quantiser import save
from .layers import nearest

PLAN_FILE = "crash.json"
FORMAT = "broadsheet crash adapters 1"
SHARING = ("nearest", "nearest_frozen", "none")


@dataclass(frozen=True)
class EmulatorPlan:
    """Which layers of a model an emulator has.

    ``layers``: how many the model has; ``clusters``: runs of like layers (empty when they were chosen otherwise); ``kept``:
    the original numbers of those that are kept, ``adapters``: of these the ones that are tuned; ``share``: how the depth is
    restored; ``base``: the fingerprint of the model. Raises ValueError when these do not fit together.
    """

    layers: int
    kept: tuple[int, ...]
    adapters: tuple[int, ...]
    base: str
    clusters: tuple[tuple[int, ...], ...] = ()
    share: str = "nearest"

    def __post_init__(self) -> None:
        if list(self.kept) != sorted(set(self.kept)) or not self.kept or not set(self.kept) <= set(range(self.layers)):
            raise ValueError(f"kept must be different layers from 0 to {self.layers - 1} in order, got {list(self.kept)}")
        if not set(self.adapters) <= set(self.kept) or not self.adapters:
            raise ValueError(f"adapters must be kept layers: {list(self.adapters)} are not all among {list(self.kept)}")
        if self.share not in SHARING:
            raise ValueError(f"share must be one of {', '.join(SHARING)}, got '{self.share}'")

    @property
    def layer_map(self) -> tuple[int, ...]:
        """The layer that stands at each place of the emulator.

        A removed layer's place is taken by the nearest kept one, of two the right one. "nearest_frozen" takes the one on the
        other side when the nearest is tuned and that is not. (The official search reaches beyond both ends of the model when
        they are not kept.)
        """
        if self.share == "none":
            return self.kept
        found = []
        for index in range(self.layers):
            if index in self.kept:
                found.append(index)
                continue
            first, second = nearest(index, self.kept)
            swapped = self.share == "nearest_frozen" and first in self.adapters and second not in (None, *self.adapters)
            found.append(second if swapped and second is not None else first)
        return tuple(found)

    def place(self, layer: int) -> int:
        """Where in the emulator an original layer itself stands."""
        return self.kept.index(layer) if self.share == "none" else layer

    def compact(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of ``model`` with the kept layers alone: what is sent. Raises ValueError for another model."""
        self._check(model)
        return with_layers(model, self.kept)

    def expand(self, compact: PreTrainedModel) -> PreTrainedModel:
        """The emulator, made of what was sent: at its depth, everything but the adapters frozen. ``compact`` is used up.

        A frozen layer that stands at several places is one set of weights (each place has its own number in the cache). In
        the place of a tuned one stands a frozen copy of what it was before.
        """
        blocks = dict(zip(self.kept, decoder_blocks(compact).values(), strict=True))
        for parameter in compact.parameters():
            parameter.requires_grad_(False)
        copies = {layer: copy.deepcopy(block) for layer, block in blocks.items() if layer in self.adapters}
        frozen = [block for layer, block in blocks.items() if layer not in self.adapters]
        for block in [*frozen, *copies.values()]:
            block.eval().train = partial(_stay, block)  # type: ignore[method-assign]  # no dropout in what is frozen
        places: list[nn.Module] = []
        for index, layer in enumerate(self.layer_map):
            own = index == self.place(layer)
            places.append(blocks[layer] if own else _again(copies.get(layer, blocks[layer])))
        for layer in self.adapters:
            blocks[layer].requires_grad_(True)
        emulator = _put(compact, places)
        _set_depth(emulator, [self.kept.index(layer) for layer in self.layer_map])
        emulator.crash_plan = self  # type: ignore[assignment]
        return emulator.eval()

    def materialize(self, model: PreTrainedModel) -> PreTrainedModel:
        """The emulator of ``model``, which stays as it is."""
        return self.expand(self.compact(model))

    def save(self, model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Writes what the client gets: the kept layers as a model of their own, and the plan."""
        target = save(self.compact(model), folder, tokenizer)
        (target / PLAN_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads the plan of a folder. Raises ValueError."""
        path = Path(folder) / PLAN_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            kept, adapters = (tuple(map(int, stored[name])) for name in ("kept", "adapters"))
            groups = tuple(tuple(map(int, group)) for group in stored["clusters"])
            return cls(int(stored["layers"]), kept, adapters, str(stored["base"]), groups, str(stored["share"]))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no emulator's plan: {error}") from None

    def _check(self, model: PreTrainedModel) -> None:
        if (found := fingerprint(model)) != self.base:
            raise ValueError(f"the plan was made for another model ({self.base}, this is {found}); load that one")


def load_emulator(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The emulator of a folder that `EmulatorPlan.save` wrote, ready to be tuned; ``kwargs`` go to from_pretrained."""
    plan = EmulatorPlan.load(folder)
    compact = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if len(decoder_blocks(compact)) != len(plan.kept):
        raise ValueError(f"{folder} holds {len(decoder_blocks(compact))} layers, its plan {len(plan.kept)}; copy it again")
    return plan.expand(compact)


# --- the adapters' way back -----------------------------------------------------------------------------------------------


def adapter_tensors(emulator: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What was tuned, in the dtype that it was tuned in: "<original layer>.<name in the block>" -> tensor.

    Raises ValueError when LoRA or the like still stands beside the weights.
    """
    plan = _plan_of(emulator)
    blocks = list(decoder_blocks(emulator).values())
    found = {}
    for layer in plan.adapters:
        for name, tensor in blocks[plan.place(layer)].state_dict().items():
            if "lora_" in name or "base_layer" in name or "modules_to_save" in name:
                raise ValueError(
                    f"layer {layer} holds {name}: merge it first (merge_and_unload), the full model has no such"
                )
            found[f"{layer}.{name}"] = tensor.detach().cpu().contiguous()
    return found


def extract_adapters(emulator: PreTrainedModel, file: str | Path) -> Path:
    """Writes the tuned layers to one safetensors file, which names the model that it belongs to."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(emulator), file, {"format": FORMAT, "base": _plan_of(emulator).base})
    return file


@torch.no_grad()
def plug_in(model: PreTrainedModel, file: str | Path, cast: bool = False) -> PreTrainedModel:
    """Puts the tuned layers of ``file`` into the full ``model``, in place, and returns it.

    ``cast``: also into a model of another dtype than they were tuned in, which changes them. Raises ValueError, before
    anything is changed, when the file belongs to another model or holds anything else.
    """
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is no file of adapters; extract_adapters writes one")
    if (found := fingerprint(model)) != metadata.get("base"):
        raise ValueError(
            f"{file} was tuned for another model (base {metadata.get('base')}, this is {found}); give the one that the "
            "emulator was made from"
        )
    targets: dict[str, torch.Tensor] = {}
    for index, block in enumerate(decoder_blocks(model).values()):
        targets |= {f"{index}.{name}": tensor for name, tensor in block.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.items():
        if name not in targets or targets[name].shape != tensor.shape:
            raise ValueError(f"{file} holds {name} {list(tensor.shape)}, which this model has not")
        if targets[name].dtype != tensor.dtype and not cast:
            raise ValueError(
                f"{file} was tuned in {tensor.dtype}, the model is {targets[name].dtype}: load it in that dtype, or pass "
                "cast=True and have the layers rounded"
            )
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
    return model


# --- the way between two models -------------------------------------------------------------------------------------------


@torch.no_grad()
def interpolate(a: PreTrainedModel, b: PreTrainedModel, n: int = 25) -> Iterator[tuple[float, PreTrainedModel]]:
    """``n`` models on the straight line from ``a`` to ``b``, with their places from 0 to 1 (section 5.2).

    It is one model, changed from step to step. Raises ValueError when the two have not the same weights by name and shape.
    """
    first, last = a.state_dict(), b.state_dict()
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in last.items()}:
        raise ValueError("only models of one shape can be interpolated")
    between = copy.deepcopy(a)
    differing = [
        name for name, tensor in first.items() if tensor.is_floating_point() and not torch.equal(tensor, last[name])
    ]
    moving = between.state_dict()
    for step in range(n):
        alpha = step / max(n - 1, 1)
        for name in differing:
            moving[name].copy_(first[name] + alpha * (last[name] - first[name]))
        yield alpha, between


def barrier(losses: Sequence[float]) -> float:
    """How much higher the loss gets on the way than at the worse of both ends."""
    return max(losses) - max(losses[0], losses[-1])


# --- models with other layers ---------------------------------------------------------------------------------------------


def _plan_of(emulator: PreTrainedModel) -> EmulatorPlan:
    plan = getattr(emulator, "crash_plan", None)
    if not isinstance(plan, EmulatorPlan):
        raise ValueError("this model is no emulator: EmulatorPlan.materialize or load_emulator makes one")
    return plan


def with_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A copy of ``model`` with these of its layers; the others are not copied."""
    blocks = list(decoder_blocks(model).values())
    _put(model, [blocks[layer] for layer in layers])
    try:
        twin = copy.deepcopy(model)
    finally:
        _put(model, blocks)
    _set_depth(twin, layers)
    return twin


def _put(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> PreTrainedModel:
    """Replaces the model's list of layers, and nothing else."""
    name = next(iter(decoder_blocks(model))).rpartition(".")[0]
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.ModuleList(blocks))
    model.config.get_text_config().num_hidden_layers = len(blocks)  # which is how they are found
    return model


def _set_depth(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Numbers the layers for the cache, and takes what the config says of each from the one that it is."""
    config = model.config.get_text_config()
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) > max(layers) and name.startswith(("layer", "no_rope", "mlp_layer")):
            setattr(config, name, [value[layer] for layer in layers])
    for index, block in enumerate(decoder_blocks(model).values()):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def _again(block: nn.Module) -> nn.Module:
    """The same weights as another module, so that it can have another number."""
    twin = copy.copy(block)
    twin._modules = {
        name: _again(child) if child is not None and any(hasattr(m, "layer_idx") for m in child.modules()) else child
        for name, child in block._modules.items()
    }
    return twin


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `nn.Module.train`."""
    return module
