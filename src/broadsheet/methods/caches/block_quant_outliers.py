"""K-sort BFP: keys in block floating point, channels sorted (Trukhanov and Soloveychik 2024, arXiv 2403.20137).

Block floating point (BFP) gives n mantissas one exponent, so one outlier channel ruins its n - 1 neighbours. Outliers of keys
live in fixed channels of each head, and q.k does not care about the order of channels: sort them by the norm of their
row of W_k, and large channels share blocks with large ones. Two ways to the same numbers:

- `KSortBFP`, a cache for any model: keys are permuted after the rotation, quantised, and put back in order when read.
- `ksort`, at compile time: the rows of W_k and W_q themselves are permuted, and the rotation with them. The sorted model needs
  no gather; serve it with ``KSortBFP(rank="none")``.

The rotation couples two channels, so after it both have the norm of the pair: ``pair_aware`` ranks pairs (the paper ranks
rows). ``weight_gain`` weighs a row with the gain of the norm before it, its bias and the gain of a QK-norm: still free of
data. Values are outside the paper; they stay as they are or take the same format along channels. Queries stay unquantised.
Sorting acts within a head, so a block as long as the head gains nothing.
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

#: The ``rope_type`` of a sorted checkpoint. Transformers knows no such rotation, so plain loading stops with this text.
SORTED = "ksort: load this model with broadsheet.methods.caches.block_quant_outliers.load_sorted"


# --- what a model does to its keys -----------------------------------------------------------------------------


class _ObserveLayer(SlotLayer):
    def prefill(self, prompt: Tokens) -> None:
        self.prompt = prompt


@dataclass(frozen=True)
class _Observe(Full):
    Layer: ClassVar[type[CacheLayer]] = _ObserveLayer


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: torch.Tensor) -> list[Tokens]:
    """What every layer's attention gets for ``tokens`` [batch, n]: queries and keys after the rotation, its tables."""
    training = model.training
    cache = _Observe().cache(model.eval())
    model(input_ids=tokens.to(model.device), past_key_values=cache, use_cache=True)
    model.train(training)
    return [cast(_ObserveLayer, layer).prompt for layer in cache.layers]


@dataclass(frozen=True)
class Rotation:
    """Which channels a model's rotary embedding couples: rotated[c] = x[c] cos[t] + sign[c] x[partner[c]] sin[t].

    ``width``: channels that are rotated, the others pass (partial rotary). ``interleaved``: pairs (2c, 2c+1), as in GPT-J,
    instead of (c, c + width/2), as in Llama. ``folded``: t = c // 2 though pairs are interleaved, as in GLM; else t = c.
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
        keys, cos, sin = tokens.keys[0].float(), tokens.cos[0].float(), tokens.sin[0].float()  # sin is 0 at place 0
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
            raise ValueError(f"{type(model).__name__}: its rotary layout is not supported; use pair_aware=False or another model")
        _rotations[model] = best
    return _rotations[model]


def _projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The query and key projection; raises ValueError when their rows cannot be read and permuted."""
    found = []
    for name in ("q_proj", "k_proj"):
        linear = getattr(module, name, None)
        if linear is None:
            raise ValueError(
                f"{type(module).__name__} has no {name} (fused or latent projections); K-sort by weights needs separate ones"
            )
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(
                f"{type(module).__name__}.{name} is a {type(linear).__name__}: rows of packed or wrapped weights cannot be "
                "permuted; sort the original model"
            )
        found.append(linear)
    return found[0], found[1]


# --- ranking channels -----------------------------------------------------------------------------------------


def weight_norms(model: PreTrainedModel, gain: bool = True) -> list[torch.Tensor]:
    """Norms of the rows of W_k, by layer [kv_heads, head_dim], float32.

    With ``gain`` the root mean square that a key channel has when the normalised input is white: rows times the gain of
    the layer's input norm, plus what is constant (bias), times the gain of a QK-norm.
    """
    modules = attention_modules(model)
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
                    f"{type(parents[module]).__name__} has no input_layernorm; use rank='weight' or 'calibration'"
                )
            scale, shift = _affine(before, (weight.shape[1],), weight)
            constant = constant + weight @ shift
            weight = weight * scale
        energy = weight.square().sum(-1)
        if gain:
            energy = energy + torch.as_tensor(constant).square()
        shape = (-1, int(cast(int, module.head_dim)))
        norm = energy.sqrt().reshape(shape)
        if gain and k_norm is not None:
            flat = k_norm.weight.ndim == 1 and k_norm.weight.numel() == norm.numel()
            scale, _ = _affine(k_norm, (norm.numel(),) if flat else tuple(norm.shape), weight)
            norm = norm * scale.reshape(shape).abs()
        norms.append(norm)
    return norms


@torch.no_grad()
def _affine(norm: nn.Module, shape: tuple[int, ...], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift of any RMSNorm or LayerNorm: +1 and -1 in turn have mean 0 and mean square 1, so come out as these."""
    weight = next(norm.parameters(), like)
    probe = 1.0 - 2.0 * (torch.arange(shape[-1], device=weight.device) % 2)
    probe = probe.to(weight.dtype).expand(shape)
    plus, minus = norm(probe[None, None])[0, 0].float(), norm(-probe[None, None])[0, 0].float()
    return (plus - minus) / 2 * probe.float(), (plus + minus) / 2


def calibrated_norms(model: PreTrainedModel, prompts: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Root mean square of each key channel after the rotation, over ``prompts`` (token ids, each [n] or [batch, n])."""
    totals: list[torch.Tensor] = []
    count = 0
    for prompt in prompts:
        layers = observe(model, prompt if prompt.ndim == 2 else prompt[None])
        energies = [tokens.keys.float().square().sum((0, 2)) for tokens in layers]
        totals = [total + energy for total, energy in zip(totals, energies, strict=True)] if totals else energies
        count += layers[0].keys.shape[0] * layers[0].count
    if not count:
        raise ValueError("rank='calibration' needs prompts: a list of token id tensors")
    return [(total / count).sqrt() for total in totals]


def pair_norms(norms: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """The root mean square of each channel and its ``partner``: what both have, over all places, after the rotation."""
    energy = norms.square()
    return ((energy + energy[..., partner.to(norms.device)]) / 2).sqrt()


def sort_channels(norms: torch.Tensor, spread: bool = False) -> torch.Tensor:
    """The order of channels by falling norm, stable; ``norms`` [..., head_dim].

    With ``spread`` the opposite of sorting: the largest channels as far from each other as can be, for every block size
    (the places of the ranks are the bit-reversed numbers).
    """
    ranked = norms.argsort(-1, descending=True, stable=True)
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
    """For every layer which channel comes at which place, int64 [kv_heads, head_dim]. See `KSortBFP` for ``rank``."""
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
    norms = calibrated_norms(model, prompts or []) if rank == "calibration" else weight_norms(model, rank != "weight")
    if pair_aware:
        partner = find_rotation(model).partner
        norms = [pair_norms(layer, partner) for layer in norms]
    return [sort_channels(layer, spread=rank == "interleaved") for layer in norms]


def rank_agreement(
    model: PreTrainedModel, prompts: Iterable[torch.Tensor], rank: str = "weight_gain", pair_aware: bool = True
) -> torch.Tensor:
    """Spearman's correlation of weight norms with calibrated ones, [layers, kv_heads]: is the data-free order right?"""
    weights, measured = weight_norms(model, rank == "weight_gain"), calibrated_norms(model, prompts)
    if pair_aware:
        partner = find_rotation(model).partner
        weights, measured = ([pair_norms(layer, partner) for layer in norms] for norms in (weights, measured))
    return torch.tensor(
        [
            [spearmanr(a, b).statistic for a, b in zip(guessed.cpu().numpy(), truth.cpu().numpy(), strict=True)]
            for guessed, truth in zip(weights, measured, strict=True)
        ]
    )


# --- the compile-time transform -------------------------------------------------------------------------------


@dataclass(frozen=True)
class KSortPlan:
    """The permutations of a sorted model. ``orders``: by layer [kv_heads, head_dim], the channel at each place.

    ``fingerprint``: hash of the unsorted W_k in bfloat16, the same for a float32 checkpoint and its bfloat16 copy.
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
                raise FileNotFoundError(f"{folder} has no {name}; save the plan that ksort returned there: plan.save(folder)")
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

    W_k^h becomes W_k^h[pi_h], W_q of the group's query heads likewise, biases and QK-norm gains too (section 3). The rotation
    then reads cos[pi], sin[pi] and the permuted partner: it runs on the projections' outputs, and the model's own rotation is
    given cos 1 and sin 0. ``rank``, ``seed`` as in `KSortBFP`; ``prompts`` for rank="calibration"; or a ready ``plan``.

    The result is for `KSortBFP(rank="none")` and every method that does not undo the rotation. To keep it, call both
    ``model.save_pretrained(folder)`` and ``plan.save(folder)``, then `load_sorted`; plain ``from_pretrained`` refuses it.

    Raises ValueError for fused, latent, tied, packed or wrapped projections, rotary layouts that `Rotation` does not
    describe, layers without rotation, models sorted before, and a plan of another model.
    """
    if is_sorted(model):
        raise ValueError("this model is sorted already")
    if "rope_type" not in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
        raise ValueError(f"{type(model).__name__}: K-sort needs one rotary setting for all layers")
    modules = attention_modules(model)
    projections = [linear for module in modules for linear in _projections(module)]
    if len({linear.weight.data_ptr() for linear in projections}) < len(projections):
        raise ValueError(f"{type(model).__name__} ties projections with each other; they cannot be permuted apart")
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
    config = model.config.get_text_config()
    config.rope_parameters = {**config.rope_parameters, "rope_type": SORTED, "unsorted": config.rope_parameters["rope_type"]}
    return model, plan


def is_sorted(model: PreTrainedModel) -> bool:
    """Whether `ksort` made this model."""
    return (getattr(model.config.get_text_config(), "rope_parameters", None) or {}).get("rope_type") == SORTED


def load_sorted(folder: str | Path, **options: Any) -> tuple[PreTrainedModel, KSortPlan]:
    """Loads what ``model.save_pretrained(folder)`` and ``plan.save(folder)`` wrote; ``options`` go to ``from_pretrained``.

    Raises FileNotFoundError without the plan, ValueError for a plan of another model or a model that is not sorted.
    """
    plan = KSortPlan.load(folder)
    config = AutoConfig.from_pretrained(folder)
    parameters = dict(config.get_text_config().rope_parameters)
    if parameters["rope_type"] != SORTED:
        raise ValueError(f"{folder} holds a model that is not sorted; load it with from_pretrained, then call ksort")
    config.get_text_config().rope_parameters = {**parameters, "rope_type": parameters.pop("unsorted")}
    kind = getattr(transformers, config.architectures[0])

    class Wide(kind):
        """The same model with QK-norm gains by head, as sorting made them."""

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            for module, order in zip(attention_modules(self), plan.orders, strict=True):
                for _, norm, heads in _heads(module, order):
                    _permute_norm(norm, heads)

    model = Wide.from_pretrained(folder, config=config, **options)
    model.__class__ = kind
    if fingerprint(model, plan.orders) != plan.fingerprint:
        raise ValueError(f"the plan in {folder} was made for another model; save the model and its plan together")
    _install(model, plan.rotation, plan.orders)
    model.config.get_text_config().rope_parameters = {**parameters, "rope_type": SORTED, "unsorted": "..."}
    return model, plan
