"""What a model does to the channels of its keys: the rotary layout, and how large each channel is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from scipy.stats import spearmanr
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.taps import attention_modules

from ..base import Geometry
from ..observe import observe

RANKS = ("weight_gain", "weight", "calibration", "none", "random", "interleaved")


# --- the rotation -------------------------------------------------------------------------------------------


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


class Turn(nn.Module):
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


_rotations: WeakKeyDictionary[PreTrainedModel, Rotation] = WeakKeyDictionary()


def find_rotation(model: PreTrainedModel) -> Rotation:
    """Finds the rotary layout by watching what the first layer does to one token at several places.

    Raises ValueError when it is none of those that `Rotation` describes.
    """
    if model not in _rotations:
        vocabulary = model.config.get_text_config().vocab_size
        tokens = observe(model, torch.full((1, 8), vocabulary // 2))[0]
        keys, cos, sin = (part[0].float() for part in (tokens.keys, tokens.cos, tokens.sin))
        head_dim, width = keys.shape[-1], cos.shape[-1]
        errors = {}
        for interleaved, folded in ((False, False), (True, False), (True, True)):
            layout = Rotation(head_dim, width, interleaved, folded)
            # At place 0 the sine is 0, the cosine is the rotation's scale.
            plain = keys[:, 0] / torch.where(layout.sign.to(keys.device) != 0, cos[0, 0], 1)
            turn = Turn(layout, torch.arange(head_dim).expand(keys.shape[0], -1)).to(keys.device)
            turned = turn(plain.expand(1, 8, *plain.shape), cos[None], sin[None])[0].transpose(0, 1)
            errors[layout] = float((turned - keys).norm() / keys.norm())
        best = min(errors, key=errors.__getitem__)
        if not errors[best] < 0.05:
            raise ValueError(f"{type(model).__name__} has a rotary layout that is not supported; use pair_aware=False")
        _rotations[model] = best
    return _rotations[model]


# --- ranking channels ---------------------------------------------------------------------------------------


def projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The query and key projection; raises ValueError when their rows cannot be read and permuted."""
    found = []
    for name in ("q_proj", "k_proj"):
        linear = getattr(module, name, None)
        if linear is None:
            raise ValueError(f"{type(module).__name__} has no {name}: K-sort by weights needs separate projections")
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise ValueError(
                f"{type(module).__name__}.{name} is a {type(linear).__name__}, whose rows cannot be "
                "permuted (packed or wrapped): sort the original model"
            )
        found.append(linear)
    return found[0], found[1]


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
        _, projection = projections(module)
        weight = projection.weight.detach().float()
        constant = 0.0 if projection.bias is None else projection.bias.detach().float()
        k_norm = getattr(module, "k_norm", None)
        if gain:
            before = getattr(parents[module], "input_layernorm", None)
            if before is None:
                raise ValueError(f"{type(parents[module]).__name__} has no input_layernorm; use rank='weight'")
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
        totals = [total + energy for total, energy in zip(totals, energies, strict=True)] if totals else energies
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
        noise = torch.rand(geometry.layers, geometry.kv_heads, geometry.head_dim, generator=generator)
        return list(sort_channels((noise if rank == "random" else 0 * noise).to(model.device)))
    if rank == "calibration":
        norms = calibrated_norms(model, [] if prompts is None else prompts)
    else:
        norms = weight_norms(model, gain=rank != "weight")
    if pair_aware:
        norms = _by_pair(model, norms)
    return [sort_channels(layer, spread=rank == "interleaved") for layer in norms]


def rank_agreement(
    model: PreTrainedModel,
    prompts: Iterable[torch.Tensor],
    rank: str = "weight_gain",
    pair_aware: bool = True,
) -> torch.Tensor:
    """Spearman's correlation of weight norms with calibrated ones [layers, kv_heads]: are data needed?"""
    weights, measured = weight_norms(model, gain=rank == "weight_gain"), calibrated_norms(model, prompts)
    if pair_aware:
        weights, measured = _by_pair(model, weights), _by_pair(model, measured)
    table = [
        [spearmanr(a, b).statistic for a, b in zip(guessed.cpu().numpy(), truth.cpu().numpy(), strict=True)]
        for guessed, truth in zip(weights, measured, strict=True)
    ]
    return torch.tensor(table)


def _by_pair(model: PreTrainedModel, norms: list[torch.Tensor]) -> list[torch.Tensor]:
    partner = find_rotation(model).partner
    return [pair_norms(layer, partner) for layer in norms]
