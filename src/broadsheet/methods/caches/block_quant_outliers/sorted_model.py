"""The compile-time transform: a model whose query and key channels are sorted by head, and its plan on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from broadsheet.core.models.taps import attach, attention_modules

from ..base import Geometry
from ..observe import observe
from .channels import Rotation, Turn, channel_orders, find_rotation, projections

#: The ``rope_type`` of a sorted checkpoint. Transformers knows no such rotation, so plain loading stops with
#: this text.
SORTED = "ksort: load this model with broadsheet.methods.caches.block_quant_outliers.load_sorted"


@dataclass(frozen=True)
class KSortPlan:
    """A sorted model's permutations: ``orders`` by layer [kv_heads, head_dim], the channel at each place.

    ``fingerprint``: hash of the unsorted W_k in bfloat16, the same for a float32 checkpoint and its bfloat16
    copy.
    """

    orders: list[torch.Tensor]
    rotation: Rotation
    fingerprint: str
    rank: str
    pair_aware: bool
    seed: int = 0

    def save(self, folder: str | Path) -> None:
        """Writes ``ksort.safetensors`` (int16, ``layers.{i}.perm``) and ``ksort.json`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layers.{i}.perm": order.to("cpu", torch.int16) for i, order in enumerate(self.orders)}
        save_file(tensors, folder / "ksort.safetensors")
        settings = {name: getattr(self, name) for name in ("fingerprint", "rank", "pair_aware", "seed")}
        settings["rotation"] = asdict(self.rotation)
        (folder / "ksort.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> KSortPlan:
        """Reads what `save` wrote; raises FileNotFoundError when it is not there."""
        folder = Path(folder)
        for name in ("ksort.safetensors", "ksort.json"):
            if not (folder / name).exists():
                raise FileNotFoundError(
                    f"{folder} has no {name}; save the plan that ksort returned there: plan.save(folder)"
                )
        tensors = load_file(folder / "ksort.safetensors")
        settings = json.loads((folder / "ksort.json").read_text())
        rotation = Rotation(**settings.pop("rotation"))
        orders = [tensors[f"layers.{i}.perm"].long() for i in range(len(tensors))]
        return cls(orders=orders, rotation=rotation, **settings)


def key_fingerprint(model: PreTrainedModel, orders: list[torch.Tensor] | None = None) -> str:
    """SHA-256 of every W_k in bfloat16; with ``orders``, of what it was before those were applied."""
    digest = hashlib.sha256()
    for index, module in enumerate(attention_modules(model)):
        weight = projections(module)[1].weight.detach()
        if orders is not None:
            weight = weight[_rows(orders[index].argsort(-1).to(weight.device))]
        digest.update(weight.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def ksort(
    model: PreTrainedModel,
    rank: str = "weight_gain",
    pair_aware: bool = True,
    inplace: bool = False,
    seed: int = 0,
    prompts: Iterable[torch.Tensor] | None = None,
    plan: KSortPlan | None = None,
) -> tuple[PreTrainedModel, KSortPlan]:
    """Permutes the channels of every query and key head; the model's outputs stay what they are.

    W_k^h becomes W_k^h[pi_h], W_q of the group's query heads likewise, biases and QK-norm gains too. The
    rotation then reads cos[pi], sin[pi] and the permuted partner: it runs on the projections' outputs, and
    the model's own rotation is given cos 1 and sin 0. ``rank``, ``seed`` as in `KSortBFP`; ``prompts`` for
    rank="calibration"; or a ready ``plan``.

    The result is for `KSortBFP(rank="none")` and every method that does not undo the rotation. To keep it,
    call both ``model.save_pretrained(folder)`` and ``plan.save(folder)``, then `load_sorted`; plain
    ``from_pretrained`` refuses it.

    Raises ValueError for fused, latent, tied, packed or wrapped projections, rotary layouts that `Rotation`
    does not describe, layers without rotation, models sorted before, and a plan of another model.
    """
    if is_sorted(model):
        raise ValueError("this model is sorted already")
    if "rope_type" not in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
        raise ValueError(f"{type(model).__name__}: K-sort needs one rotary setting for all layers")
    modules = attention_modules(model)
    linears = [linear for module in modules for linear in projections(module)]
    if len({linear.weight.data_ptr() for linear in linears}) < len(linears):
        raise ValueError(f"{type(model).__name__} ties projections with each other; they cannot be permuted apart")
    if plan is None:
        orders = channel_orders(model, rank, pair_aware, seed, prompts)
        plan = KSortPlan(orders, find_rotation(model), key_fingerprint(model), rank, pair_aware, seed)
    elif plan.fingerprint != key_fingerprint(model):
        raise ValueError("this plan was made for another model; make one with ksort(model)")
    model = model if inplace else copy.deepcopy(model)
    _check_rotation(model, plan.rotation)
    for module, order in zip(attention_modules(model), plan.orders, strict=True):
        for linear, norm, heads in _heads(module, order):
            _permute(linear, norm, heads)
    _install(model, plan.rotation, plan.orders)
    parameters = model.config.get_text_config().rope_parameters
    marked = {**parameters, "rope_type": SORTED, "unsorted": parameters["rope_type"]}
    model.config.get_text_config().rope_parameters = marked
    return model, plan


def is_sorted(model: PreTrainedModel) -> bool:
    """Whether `ksort` made this model."""
    return (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get("rope_type") == SORTED


def load_sorted(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, KSortPlan]:
    """Loads a sorted model and its plan; ``options`` go to ``from_pretrained``.

    ``folder`` holds what ``model.save_pretrained(folder)`` and ``plan.save(folder)`` wrote.

    Raises FileNotFoundError without the plan, ValueError for a plan of another model or a model that is not
    sorted.
    """
    plan = KSortPlan.load(folder)
    config = AutoConfig.from_pretrained(folder)
    marked = dict(config.get_text_config().rope_parameters)
    if marked["rope_type"] != SORTED:
        raise ValueError(f"{folder} holds a model that is not sorted; load it with from_pretrained, then call ksort")
    parameters = {name: value for name, value in marked.items() if name != "unsorted"}
    config.get_text_config().rope_parameters = {**parameters, "rope_type": marked["unsorted"]}
    kind: Any = getattr(transformers, config.architectures[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"{folder}: transformers has no model {config.architectures[0]}")
    geometry = Geometry.of(config)
    shape = [(geometry.kv_heads, geometry.head_dim)] * geometry.layers
    mismatch = f"the plan in {folder} was made for another model; save the model and its plan together"
    if [tuple(order.shape) for order in plan.orders] != shape:
        raise ValueError(mismatch)

    class Wide(kind):
        """The same model with a QK-norm gain for every head, as sorting left them."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            for module, order in zip(attention_modules(self), plan.orders, strict=True):
                for _, norm, heads in _heads(module, order):
                    for name, parameter in _head_parameters(norm, heads):
                        setattr(norm, name, nn.Parameter(parameter.new_empty(heads.shape)))

    Wide.__name__ = kind.__name__
    model = Wide.from_pretrained(folder, config=config, **options)
    model.__class__ = kind
    if key_fingerprint(model, plan.orders) != plan.fingerprint:
        raise ValueError(mismatch)
    _install(model, plan.rotation, plan.orders)
    model.config.get_text_config().rope_parameters = marked
    return model, plan


def _heads(module: nn.Module, order: torch.Tensor) -> list[tuple[nn.Linear, nn.Module | None, torch.Tensor]]:
    """Query and key projection, each with the norm after it, if any, and the channel order of its heads."""
    queries, keys = projections(module)
    group = queries.out_features // keys.out_features
    return [
        (queries, getattr(module, "q_norm", None), order.repeat_interleave(group, 0)),
        (keys, getattr(module, "k_norm", None), order),
    ]


def _head_parameters(norm: nn.Module | None, heads: torch.Tensor) -> list[tuple[str, nn.Parameter]]:
    """The parameters of ``norm`` that all heads share, [head_dim], where there is more than one head."""
    if norm is None:
        return []
    return [(name, p) for name, p in norm.named_parameters() if p.numel() == heads.shape[1] < heads.numel()]


def _rows(order: torch.Tensor) -> torch.Tensor:
    """``order`` [heads, head_dim] as an order of the projection's rows, [heads * head_dim]."""
    starts = torch.arange(order.shape[0], device=order.device) * order.shape[1]
    return (starts[:, None] + order).flatten()


@torch.no_grad()
def _permute(linear: nn.Linear, norm: nn.Module | None, heads: torch.Tensor) -> None:
    rows = _rows(heads.to(linear.weight.device))
    linear.weight.data = linear.weight.data[rows]
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[rows]
    if norm is None:
        return
    shared = dict(_head_parameters(norm, heads))
    for name, parameter in list(norm.named_parameters()):
        wide = parameter.data.expand(heads.shape) if name in shared else parameter.data
        permuted = wide.flatten()[rows].view(wide.shape)
        setattr(norm, name, nn.Parameter(permuted, requires_grad=parameter.requires_grad))


class _SortedRotation(nn.Module):
    """What `ksort` adds to an attention module: hooks that rotate what the projections give.

    A module, so that it moves and is copied with the model; its methods are the hooks.
    """

    def __init__(self, rotation: Rotation, queries: torch.Tensor, keys: torch.Tensor):
        super().__init__()
        self.queries, self.keys = Turn(rotation, queries), Turn(rotation, keys)
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the rotation's tables and leaves cos 1, sin 0, which turn nothing."""
        cos, sin = self.tables = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    def after(self, *_: Any) -> None:
        self.tables = None

    def turn_queries(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self.queries(output, *self._tables())

    def turn_keys(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self.keys(output, *self._tables())

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tables is None:
            raise RuntimeError("a sorted model's projections work inside its attention only; use the unsorted model")
        return self.tables


def _install(model: PreTrainedModel, rotation: Rotation, orders: list[torch.Tensor]) -> list[Any]:
    """Puts the sorted rotation into every layer; returns the handles of its hooks."""
    attach(model)  # first, so that caches see the true tables
    handles = []
    for module, order in zip(attention_modules(model), orders, strict=True):
        (queries, q_norm, q_heads), (keys, k_norm, k_heads) = _heads(module, order)
        turn = _SortedRotation(rotation, q_heads, k_heads).to(keys.weight.device)
        module.sorted_rotation = turn
        handles += [
            module.register_forward_pre_hook(turn.before, with_kwargs=True),
            module.register_forward_hook(turn.after),
            (queries if q_norm is None else q_norm).register_forward_hook(turn.turn_queries),
            (keys if k_norm is None else k_norm).register_forward_hook(turn.turn_keys),
        ]
    return handles


def _check_rotation(model: PreTrainedModel, rotation: Rotation) -> None:
    """Raises ValueError unless all queries and keys are the projections' outputs, rotated as described."""
    geometry = Geometry.of(model.config)
    tokens = torch.arange(geometry.heads + 1)[None] % model.config.get_text_config().vocab_size
    before = observe(model, tokens)
    unsorted = torch.arange(geometry.head_dim).expand(geometry.kv_heads, -1)
    handles = _install(model, rotation, [unsorted] * geometry.layers)
    try:
        after = observe(model, tokens)
    except RuntimeError:  # a norm that gets its heads in another layout
        raise ValueError(f"{type(model).__name__} has queries and keys of a shape that K-sort does not cover") from None
    finally:
        for handle in handles:
            handle.remove()
        for module in attention_modules(model):
            del module.sorted_rotation
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        for name in ("queries", "keys"):
            x, y = getattr(old, name).float(), getattr(new, name).float()
            if not (y - x).norm() <= max(1e-3, torch.finfo(old.keys.dtype).eps ** 0.5) * x.norm():
                raise ValueError(
                    f"layer {index} of {type(model).__name__} does more to its {name} than to project and "
                    "rotate them; K-sort does not cover it"
                )
