"""K-sort BFP: keys in block floating point, channels sorted (Trukhanov, Soloveychik, arXiv 2403.20137).

Block floating point (BFP) gives n mantissas one exponent, so one outlier channel ruins its n - 1 neighbours.
Outliers of keys live in fixed channels of each head, and q.k does not care about the order of channels: sort
them by the norm of their row of W_k, and large channels share blocks with large ones. Two ways to the same
numbers:

- `KSortBFP`, a cache for any model: keys are permuted after the rotation, quantised, and put back in order
  when read.
- `ksort`, at compile time: the rows of W_k and W_q themselves are permuted, and the rotation with them. The
  sorted model needs no gather; serve it with ``KSortBFP(rank="none")``.

The rotation couples two channels, so after it both have the norm of the pair: ``pair_aware`` ranks pairs (the
paper ranks rows). ``weight_gain`` weighs a row with the gain of the norm before it, its bias and the gain of
a QK-norm: still free of data. Values are outside the paper; they stay as they are or take the same format
along channels. Queries stay unquantised. Sorting acts within a head, so a block as long as the head gains
nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from broadsheet.core.models.taps import Tokens, attach, attention_modules
from broadsheet.core.numerics.bfp import BFPTensor, bfp_quantise

from .base import CacheLayer, CacheMethod, Geometry, Slots, Unreachable
from .full import Full, SlotLayer

RANKS = ("weight_gain", "weight", "calibration", "none", "random", "interleaved")

#: The ``rope_type`` of a sorted checkpoint. Transformers knows no such rotation, so plain loading stops with
#: this text.
SORTED = "ksort: load this model with broadsheet.methods.caches.block_quant_outliers.load_sorted"


# --- what a model does to its keys ------------------------------------------------------------------------


class _ObserveLayer(SlotLayer):
    def prefill(self, prompt: Tokens) -> None:
        self.prompt = prompt


@dataclass(frozen=True)
class _Observe(Full):
    Layer: ClassVar[type[CacheLayer]] = _ObserveLayer


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: torch.Tensor) -> list[Tokens]:
    """What every layer's attention gets for ``tokens`` [batch, n]: rotated queries and keys, the tables."""
    training = model.training
    cache = _Observe().cache(model.eval())
    model(input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True)
    model.train(training)
    return [cast(_ObserveLayer, layer).prompt for layer in cache.layers]


@dataclass(frozen=True)
class Rotation:
    """What a model's rotary embedding couples: rotated[c] = x[c] cos[t] + sign[c] x[partner[c]] sin[t].

    ``width``: channels that are rotated, the others pass (partial rotary). ``interleaved``: pairs (2c, 2c+1),
    as in GPT-J, instead of (c, c + width/2), as in Llama. ``folded``: t = c // 2 though pairs are
    interleaved, as in GLM; else t = c.
    """

    head_dim: int
    width: int
    interleaved: bool = False
    folded: bool = False

    @property
    def partner(self) -> torch.Tensor:
        """The other channel of each pair, [head_dim]; a channel that passes is its own."""
        channel = torch.arange(self.head_dim)
        other = channel ^ 1 if self.interleaved else (channel + self.width // 2) % self.width
        return torch.where(channel < self.width, other, channel)

    @property
    def sign(self) -> torch.Tensor:
        """-1 for the first of a pair, 1 for the second, 0 for a channel that passes; int8 [head_dim]."""
        return (torch.arange(self.head_dim) - self.partner).sign().to(torch.int8)

    @property
    def table(self) -> torch.Tensor:
        """The column of cos and sin for each channel, [head_dim]; 0 for a channel that passes."""
        channel = torch.arange(self.head_dim)
        return torch.where(channel < self.width, channel // 2 if self.folded else channel, 0)


_rotations: WeakKeyDictionary[PreTrainedModel, Rotation] = WeakKeyDictionary()


def find_rotation(model: PreTrainedModel) -> Rotation:
    """Finds the rotary layout by watching what the first layer does to one token at several places.

    Raises ValueError when it is none of those that `Rotation` describes.
    """
    if model not in _rotations:
        vocabulary = model.config.get_text_config().vocab_size
        tokens = observe(model, torch.full((1, 8), vocabulary // 2))[0]
        keys, cos, sin = (
            tokens.keys[0].float(),
            tokens.cos[0].float(),
            tokens.sin[0].float(),
        )  # sin is 0 at place 0
        head_dim, width = keys.shape[-1], cos.shape[-1]
        errors = {}
        for interleaved, folded in ((False, False), (True, False), (True, True)):
            layout = Rotation(head_dim, width, interleaved, folded)
            plain = keys[:, 0] / torch.where(layout.sign.to(keys.device) != 0, cos[0, 0], 1)
            turn = _Turn(layout, torch.arange(head_dim).expand(keys.shape[0], -1)).to(keys.device)
            turned = turn(plain.expand(1, 8, *plain.shape), cos[None], sin[None])[0].transpose(0, 1)
            errors[layout] = float((turned - keys).norm() / keys.norm())
        best = min(errors, key=errors.__getitem__)
        if not errors[best] < 0.05:
            raise ValueError(
                f"{type(model).__name__} has a rotary layout that is not supported; use pair_aware=False"
            )
        _rotations[model] = best
    return _rotations[model]


def _projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The query and key projection; raises ValueError when their rows cannot be read and permuted."""
    found = []
    for name in ("q_proj", "k_proj"):
        linear = getattr(module, name, None)
        if linear is None:
            raise ValueError(
                f"{type(module).__name__} has no {name}: K-sort by weights needs separate projections"
            )
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(
                f"{type(module).__name__}.{name} is a {type(linear).__name__}, whose rows cannot be "
                "permuted (packed or wrapped): sort the original model"
            )
        found.append(linear)
    return found[0], found[1]


# --- ranking channels -------------------------------------------------------------------------------------


def weight_norms(model: PreTrainedModel, gain: bool = True) -> list[torch.Tensor]:
    """Norms of the rows of W_k, by layer [kv_heads, head_dim], float32.

    With ``gain`` the root mean square that a key channel has when the normalised input is white: rows times
    the gain of the layer's input norm, plus what is constant (bias), times the gain of a QK-norm.
    """
    modules = attention_modules(model)
    head_dim = Geometry.of(model.config).head_dim
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    norms = []
    for module in modules:
        _, projection = _projections(module)
        weight = projection.weight.detach().float()
        constant = 0.0 if projection.bias is None else projection.bias.detach().float()
        k_norm = getattr(module, "k_norm", None)
        if gain:
            before = getattr(parents[module], "input_layernorm", None)
            if before is None:
                raise ValueError(
                    f"{type(parents[module]).__name__} has no input_layernorm; use rank='weight'"
                )
            scale, shift = _affine(before, (weight.shape[1],), weight)
            constant = constant + weight @ shift
            weight = weight * scale
        energy = weight.square().sum(-1)
        if gain:
            energy = energy + torch.as_tensor(constant).square()
        norm = energy.sqrt().unflatten(0, (-1, head_dim))
        if gain and k_norm is not None:
            flat = k_norm.weight.ndim == 1 and k_norm.weight.numel() == norm.numel()
            scale, _ = _affine(k_norm, (norm.numel(),) if flat else tuple(norm.shape), weight)
            norm = norm * scale.abs().reshape(norm.shape)
        norms.append(norm)
    return norms


@torch.no_grad()
def _affine(norm: nn.Module, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift of an RMSNorm or LayerNorm: +1, -1, ... has mean 0 and mean square 1, so shows them."""
    weight = next(norm.parameters(), like)
    probe = 1.0 - 2.0 * (torch.arange(shape[-1], device=weight.device) % 2)
    probe = probe.to(weight.dtype).expand(shape)
    plus, minus = norm(probe[None, None])[0, 0].float(), norm(-probe[None, None])[0, 0].float()
    return (plus - minus) / 2 * probe.float(), (plus + minus) / 2


def calibrated_norms(model: PreTrainedModel, prompts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Root mean square of each key channel after the rotation; ``prompts``: token ids [n] or [batch, n]."""
    totals: list[torch.Tensor] = []
    count = 0
    for prompt in prompts:
        layers = observe(model, prompt if prompt.ndim == 2 else prompt[None])
        energies = [tokens.keys.float().square().sum((0, 2)) for tokens in layers]
        totals = (
            [total + energy for total, energy in zip(totals, energies, strict=True)] if totals else energies
        )
        count += layers[0].keys.shape[0] * layers[0].count
    if not count:
        raise ValueError("rank='calibration' needs prompts: a list of token id tensors")
    return [(total / count).sqrt() for total in totals]


def pair_norms(norms: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Root mean square of a channel and its ``partner``: what both have, over all places, once rotated."""
    energy = norms.square()
    return ((energy + energy[..., partner.to(norms.device)]) / 2).sqrt()


def sort_channels(norms: torch.Tensor, spread: bool = False) -> torch.Tensor:
    """The order of channels by falling norm, stable; ``norms`` [..., head_dim].

    With ``spread`` the opposite of sorting: the largest channels as far from each other as can be, for every
    block size (the places of the ranks are the bit-reversed numbers).
    """
    ranked = norms.argsort(dim=-1, descending=True, stable=True)
    if not spread:
        return ranked
    size = norms.shape[-1]
    bits = (size - 1).bit_length()
    places = [place for rank in range(2**bits) if (place := int(f"{rank:0{bits}b}"[::-1], 2)) < size]
    return torch.empty_like(ranked).index_copy_(-1, torch.tensor(places, device=ranked.device), ranked)


def channel_orders(
    model: PreTrainedModel,
    rank: str = "weight_gain",
    pair_aware: bool = True,
    seed: int = 0,
    prompts: Iterable[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """By layer, the channel at each place, int64 [kv_heads, head_dim]. See `KSortBFP` for ``rank``."""
    if rank not in RANKS:
        raise ValueError(f"rank must be one of {', '.join(RANKS)}, got '{rank}'")
    if rank in {"none", "random"}:
        geometry = Geometry.of(model.config)
        generator = torch.Generator().manual_seed(seed)
        shape = (geometry.kv_heads, geometry.head_dim)
        noise = [torch.rand(shape, generator=generator) for _ in range(geometry.layers)]
        if rank == "none":
            noise = [torch.zeros(shape) for _ in noise]
        return [sort_channels(layer.to(model.device)) for layer in noise]
    norms = (
        calibrated_norms(model, prompts or [])
        if rank == "calibration"
        else weight_norms(model, rank != "weight")
    )
    if pair_aware:
        partner = find_rotation(model).partner
        norms = [pair_norms(layer, partner) for layer in norms]
    return [sort_channels(layer, spread=rank == "interleaved") for layer in norms]


def rank_agreement(
    model: PreTrainedModel,
    prompts: Iterable[torch.Tensor],
    rank: str = "weight_gain",
    pair_aware: bool = True,
) -> torch.Tensor:
    """Spearman's correlation of weight norms with calibrated ones [layers, kv_heads]: are data needed?"""
    weights, measured = weight_norms(model, rank == "weight_gain"), calibrated_norms(model, prompts)
    if pair_aware:
        partner = find_rotation(model).partner
        weights, measured = ([pair_norms(layer, partner) for layer in norms] for norms in (weights, measured))
    return torch.tensor(
        [
            [
                spearmanr(a, b).statistic
                for a, b in zip(guessed.cpu().numpy(), truth.cpu().numpy(), strict=True)
            ]
            for guessed, truth in zip(weights, measured, strict=True)
        ]
    )


# --- the compile-time transform ---------------------------------------------------------------------------


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


def fingerprint(model: PreTrainedModel, orders: list[torch.Tensor] | None = None) -> str:
    """SHA-256 of every W_k in bfloat16; with ``orders``, of what it was before those were applied."""
    digest = hashlib.sha256()
    for index, module in enumerate(attention_modules(model)):
        weight = _projections(module)[1].weight.detach()
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

    W_k^h becomes W_k^h[pi_h], W_q of the group's query heads likewise, biases and QK-norm gains too (section
    3). The rotation then reads cos[pi], sin[pi] and the permuted partner: it runs on the projections'
    outputs, and the model's own rotation is given cos 1 and sin 0. ``rank``, ``seed`` as in `KSortBFP`;
    ``prompts`` for rank="calibration"; or a ready ``plan``.

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
    projections = [linear for module in modules for linear in _projections(module)]
    if len({linear.weight.data_ptr() for linear in projections}) < len(projections):
        raise ValueError(
            f"{type(model).__name__} ties projections with each other; they cannot be permuted apart"
        )
    if plan is None:
        orders = channel_orders(model, rank, pair_aware, seed, prompts)
        plan = KSortPlan(orders, find_rotation(model), fingerprint(model), rank, pair_aware, seed)
    elif plan.fingerprint != fingerprint(model):
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
        raise ValueError(
            f"{folder} holds a model that is not sorted; load it with from_pretrained, then call ksort"
        )
    parameters = {name: value for name, value in marked.items() if name != "unsorted"}
    config.get_text_config().rope_parameters = {**parameters, "rope_type": marked["unsorted"]}
    kind: Any = getattr(transformers, config.architectures[0])

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
    if fingerprint(model, plan.orders) != plan.fingerprint:
        raise ValueError(
            f"the plan in {folder} was made for another model; save the model and its plan together"
        )
    _install(model, plan.rotation, plan.orders)
    model.config.get_text_config().rope_parameters = marked
    return model, plan


def _heads(module: nn.Module, order: torch.Tensor) -> list[tuple[nn.Linear, nn.Module | None, torch.Tensor]]:
    """Query and key projection, each with the norm after it, if any, and the channel order of its heads."""
    queries, keys = _projections(module)
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


class _Turn(nn.Module):
    """The rotation of one projection's heads, channels in sorted order.

    rotated[j] = x[j] cos[pi(j)] + sign[pi(j)] x[rho(j)] sin[pi(j)], where rho(j) is the place of pi(j)'s
    partner.
    """

    partner: torch.Tensor
    table: torch.Tensor
    sign: torch.Tensor

    def __init__(self, rotation: Rotation, order: torch.Tensor):
        super().__init__()
        order = order.cpu()
        partner = order.argsort(-1).gather(-1, rotation.partner[order])
        for name, value in (
            ("partner", partner),
            ("table", rotation.table[order]),
            ("sign", rotation.sign[order]),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """``x`` [batch, tokens, heads, head_dim], or flat; ``cos``, ``sin`` [batch, tokens, width]."""
        heads = x.reshape(*x.shape[:2], *self.table.shape)
        cos = torch.where(self.sign != 0, cos.to(x.dtype)[..., self.table], 1)
        sin = sin.to(x.dtype)[..., self.table] * self.sign
        return (heads * cos + heads.gather(-1, self.partner.expand_as(heads)) * sin).reshape(x.shape)


class _SortedRotation(nn.Module):
    """What `ksort` adds to an attention module: hooks that rotate what the projections give.

    A module, so that it moves and is copied with the model; its methods are the hooks.
    """

    def __init__(self, rotation: Rotation, queries: torch.Tensor, keys: torch.Tensor):
        super().__init__()
        self.queries, self.keys = _Turn(rotation, queries), _Turn(rotation, keys)
        self.tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
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
            raise RuntimeError(
                "a sorted model's projections work inside its attention only; use the unsorted model"
            )
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
                    f"layer {index} of {type(model).__name__} does more to its {name} than project and rotate: "
                    "K-sort does not cover it"
                )


# --- the cache --------------------------------------------------------------------------------------------


class KSortLayer(CacheLayer):
    """Keys permuted by head and quantised; values as they are, or quantised along channels."""

    _outside: ClassVar[frozenset[str]] = CacheLayer._outside | {"fixed", "partner"}

    method: KSortBFP
    #: the compile-time order, int64 [kv_heads, head_dim]; a constant of the model, not state
    fixed: torch.Tensor | None = None
    #: the rotary partner of each channel, for calibration
    partner: torch.Tensor | None = None
    #: the order found on the prompt (rank="calibration"), int16 [batch, kv_heads, head_dim]
    order: torch.Tensor | None = None
    stored_keys: BFPTensor | torch.Tensor | None = None
    stored_values: BFPTensor | torch.Tensor | None = None
    valid: torch.Tensor | None = None  #: bool [batch, slots], None while all are

    def reset(self) -> None:
        fixed, partner = self.fixed, self.partner
        super().reset()
        self.fixed, self.partner = fixed, partner

    @property
    def stored(self) -> int:
        held = self.stored_keys
        return 0 if held is None else (held.codes if isinstance(held, BFPTensor) else held).shape[2]

    def prefill(self, prompt: Tokens) -> None:
        if self.method.rank == "calibration":
            real = prompt.valid[:, None, :, None]
            energy = (prompt.keys.float().square() * real).sum(2) / real.sum(2).clamp(min=1)
            norms = energy.sqrt() if self.partner is None else pair_norms(energy.sqrt(), self.partner)
            self.order = sort_channels(norms).to(torch.int16)
        self.append(prompt)

    def append(self, new: Tokens) -> None:
        if self.valid is not None or not bool(new.valid.all()):
            before = new.valid.new_ones(new.valid.shape[0], self.stored) if self.valid is None else self.valid
            self.valid = torch.cat([before, new.valid], 1)
        order = self._order()
        keys = new.keys if order is None else _reorder(new.keys, order)
        self.stored_keys = _join(self.stored_keys, self._quantise(keys, self.method.key_bits))
        self.stored_values = _join(self.stored_values, self._quantise(new.values, self.method.value_bits))

    def slots(self) -> Slots | None:
        if self.stored_keys is None:
            return None
        keys, values = self._read(self.stored_keys), self._read(self.stored_values)
        order = self._order()
        if order is not None:
            keys = _reorder(keys, order.argsort(-1))
        return Slots(keys, values, None if self.valid is None else self.valid.unsqueeze(1))

    def _order(self) -> torch.Tensor | None:
        """The channel at each place, int64 [batch or 1, kv_heads, head_dim]; None: the model's own order."""
        if self.order is not None:
            return self.order.long()
        return None if self.fixed is None else self.fixed.unsqueeze(0)

    def _quantise(self, x: torch.Tensor, bits: int | None) -> BFPTensor | torch.Tensor:
        return x.contiguous() if bits is None else bfp_quantise(x, bits, self.method.block)

    def _read(self, held: BFPTensor | torch.Tensor | None) -> torch.Tensor:
        assert held is not None
        assert self.dtype is not None
        return held.dequantise(self.dtype) if isinstance(held, BFPTensor) else held


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``x`` [batch, kv_heads, tokens, head_dim] in ``order`` [batch or 1, kv_heads, head_dim]."""
    return x.gather(-1, order.to(x.device).unsqueeze(2).expand(x.shape))


def _join(old: BFPTensor | torch.Tensor | None, new: BFPTensor | torch.Tensor) -> BFPTensor | torch.Tensor:
    """``old`` and then ``new`` along the tokens."""
    if old is None:
        return new
    if isinstance(new, BFPTensor):
        old = cast(BFPTensor, old)
        codes, exponents = torch.cat([old.codes, new.codes], 2), torch.cat([old.exponents, new.exponents], 2)
        return replace(new, codes=codes, exponents=exponents)
    return torch.cat([cast(torch.Tensor, old), new], 2)


@dataclass(frozen=True)
class KSortBFP(CacheMethod):
    """Keys in block floating point, channels sorted by head.

    Parameters: ``key_bits`` mantissa bits with the sign (4: BFP12, 6: BFP14, 8: BFP16), None for keys as they
    are; ``block`` channels that share an exponent of 8 bits; ``value_bits`` the same for values along
    channels, None for values as they are (the paper); ``pair_aware`` ranks both channels of a rotary pair by
    their joint norm. ``rank`` is what channels are sorted by:

    - ``weight_gain``: norm of their row of W_k with the gain before it and what biases and QK-norms add; no
      data
    - ``weight``: norm of the row alone (the paper)
    - ``calibration``: their root mean square after the rotation, over the prompt, by row; the order is held
      with the cache
    - ``none``; ``random`` with ``seed``; ``interleaved``: the worst, large channels spread over all blocks

    Raises ValueError for bits outside 2 to 16, a block that does not divide head_dim, weights that cannot be
    read.
    """

    key_bits: int | None = 4
    block: int = 32
    value_bits: int | None = None
    rank: str = "weight_gain"
    pair_aware: bool = True
    seed: int = 0

    Layer: ClassVar[type[CacheLayer]] = KSortLayer

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits is not None and not 2 <= bits <= 16:
                raise ValueError(f"{name} must be 2 to 16, or None, got {bits}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if self.rank not in RANKS:
            raise ValueError(f"rank must be one of {', '.join(RANKS)}, got '{self.rank}'")

    def check(self, geometry: Geometry) -> None:
        if geometry.head_dim % self.block:
            raise ValueError(
                f"block {self.block} does not divide head_dim {geometry.head_dim}; choose a divisor"
            )

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        layers = super().layers(model)
        if self.rank == "none":
            return layers
        if is_sorted(model):
            raise ValueError("this model's channels are sorted already; use rank='none'")
        if self.rank == "calibration":
            partner = find_rotation(model).partner if self.pair_aware else None
            for layer in layers:
                cast(KSortLayer, layer).partner = partner
            return layers
        orders = channel_orders(model, self.rank, self.pair_aware, self.seed)
        for layer, order in zip(layers, orders, strict=True):
            cast(KSortLayer, layer).fixed = order
        return layers

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """The bits with the least rounding error (4^-bits of keys plus values) that fit, keys first in a tie.

        Among blocks no longer than ``block`` the shortest that still fits. At 1 and above, nothing is
        quantised.
        """
        if fraction >= 1:
            return replace(self, key_bits=None, value_bits=None)
        blocks = [size for size in (2**power for power in range(3, 11)) if size < self.block] + [self.block]
        blocks = [size for size in blocks if geometry.head_dim % size == 0]
        order = 2 * geometry.head_dim if self.rank == "calibration" else 0

        def share(key_bits: int | None, value_bits: int | None, block: int) -> float:
            """The share of the 32 bits that a channel's key and value take in full."""
            channel = 0.0
            for bits in (key_bits, value_bits):
                channel += 2.0 if bits is None else -(-bits * block // 8) / block + 1 / block
            return channel / 4 + order / (4 * geometry.head_dim * tokens)

        options = [
            (4.0**-keys + (0.0 if values is None else 4.0**-values), -keys, block, keys, values)
            for keys in range(2, 9)
            for values in (*range(2, 9), None)
            for block in blocks
        ]
        fitting = [option for option in options if share(option[3], option[4], option[2]) <= fraction]
        if not fitting:
            raise Unreachable(min(share(2, 2, block) for block in blocks))
        _, _, block, keys, values = min(fitting, key=lambda option: option[:3])
        return replace(self, key_bits=keys, value_bits=values, block=block)
