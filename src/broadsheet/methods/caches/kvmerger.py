"""KVMerger: runs of similar keys become one slot each (Wang et al. 2024, arXiv 2407.08454).

Neighbouring tokens' keys point nearly the same way, their values do not. After prefill, runs of tokens whose
adjacent keys have a cosine of at least ``epsilon`` form merging sets, for each layer and KV head by itself; a
set becomes one state, the mean under a Gaussian kernel around its most attended member, the pivot. The most
attended tokens and the last ones are never merged. How much merges is found to be a property of the model:
`profile_model` measures it.

Deviations and readings, where the paper leaves a choice:

- A merged slot stands for |S| tokens but has one share of the softmax. The paper scales the value by |S|,
  which repairs the numerator alone (``value_mass="paper"``). Default is "bias": the plain weighted mean, and
  log|S| on the slot's logit, which is exact when the keys of the set coincide. "mean" does neither.
- The printed bandwidth refers to itself. Default is the fixed 5 of the paper's sweep; ``sigma="fixed_point"``
  iterates the printed definition, sigma = sum(g) / (sqrt(2) |S|). As g <= 1 it cannot exceed 0.71, whereas
  the paper reports about 5.
- With a ``budget``, every head joins its most similar adjacent pairs until the count is right, the limit of
  bisecting epsilon. Dissimilar pairs (cosine below 0) come last, in the order of similarity. Heavy tokens
  split runs: where they would make the count unreachable, fewer are protected.
- Keys are compared and merged as cached, after rotation; a slot keeps the rotation of its mean, new tokens go
  on truly.
- Tokens generated stay as they are; ``every=n`` merges them too, n at a time.

The scores need the prompt's attention, a second pass in blocks of queries: O(T^2) work, O(T * block) memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import InitVar, asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_type_hints

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from broadsheet.core.models import with_cache
from broadsheet.core.models.rotary import find_rotary
from broadsheet.core.models.taps import Tokens, attention_modules
from broadsheet.core.perf.storage import CacheFormat

from .attention import Slots, attention_mass, attention_received
from .base import CacheLayer, CacheMethod, Geometry, MethodCache, Unreachable, check_fraction
from .full import SlotLayer

# --- pure functions -------------------------------------------------------------------------------------


def protect(scores: torch.Tensor, valid: torch.Tensor, recent: torch.Tensor, heavy: torch.Tensor) -> torch.Tensor:
    """The last ``recent`` and the ``heavy`` most attended tokens of each row: bool [batch, kv_heads, T].

    ``scores`` [batch, kv_heads, T]; ``valid`` [batch, T]; ``recent``, ``heavy``: int [batch].
    """
    ranked = scores.masked_fill(~valid.unsqueeze(1), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = ranked.argsort(-1)
    age = valid.flip(-1).long().cumsum(-1).flip(-1) - 1
    chosen = (place < heavy[:, None, None]) | (age < recent[:, None]).unsqueeze(1)
    return chosen & valid.unsqueeze(1)


def similarity(keys: torch.Tensor) -> torch.Tensor:
    """Cosine of each key with the next, float32: [..., T, head_dim] to [..., T - 1]."""
    unit = F.normalize(keys.float(), dim=-1)
    return (unit[..., :-1, :] * unit[..., 1:, :]).sum(-1)


def joinable(protected: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Whether token j may share a set with j + 1: neither is protected or padding. Bool [batch, kv_heads, T - 1]."""
    free = ~protected if valid is None else ~protected & valid.unsqueeze(1)
    return free[..., :-1] & free[..., 1:]


def label(joins: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sets from ``joins`` [batch, kv_heads, T - 1]: each token's set, counted from 0; -1: padding."""
    starts = F.pad(~joins, (1, 0), value=True)
    if valid is None:
        return starts.long().cumsum(-1) - 1
    return ((starts & valid.unsqueeze(1)).long().cumsum(-1) - 1).masked_fill(~valid.unsqueeze(1), -1)


def find_merging_sets(
    keys: torch.Tensor,
    protected: torch.Tensor,
    epsilon: float,
    valid: torch.Tensor | None = None,
    max_norm_ratio: float | None = None,
) -> torch.Tensor:
    """Runs of neighbours with cosine >= ``epsilon`` (merging set identification): int64 [batch, kv_heads, T].

    ``keys`` [batch, kv_heads, T, head_dim]; ``protected`` bool [batch, kv_heads, T]: tokens that stay alone;
    ``valid`` bool [batch, T]: False is (left) padding. Returns each token's set, counted from 0 without gaps;
    -1 for padding. Sets are contiguous. ``max_norm_ratio``: neighbours whose norms differ by more than this
    factor are not joined either.
    """
    joins = (similarity(keys) >= epsilon) & joinable(protected, valid)
    if max_norm_ratio is not None:
        joins &= norm_ratios(keys) <= max_norm_ratio
    return label(joins, valid)


def find_sets_to_count(
    order: torch.Tensor, protected: torch.Tensor, counts: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """``counts`` [batch] merging sets (or as few as protection allows), joining the highest ``order`` first.

    ``order`` [batch, kv_heads, T - 1]: how much tokens j and j + 1 want to share a set; the rest as
    `find_merging_sets`.
    """
    order = order.masked_fill(~joinable(protected, valid), -torch.inf)
    place = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    joins = (place < (valid.sum(-1) - counts)[:, None, None]) & (order > -torch.inf)
    return label(joins, valid)


def norm_ratios(keys: torch.Tensor) -> torch.Tensor:
    """By what factor the norms of neighbouring keys differ, >= 1: [batch, kv_heads, T - 1]."""
    norms = keys.float().norm(dim=-1).clamp(min=1e-12).log()
    return norms.diff(dim=-1).abs().exp()


def gaussian_merge(
    keys: torch.Tensor,
    values: torch.Tensor,
    sets: torch.Tensor,
    scores: torch.Tensor,
    sigma: float | Literal["fixed_point"] = 5.0,
    value_mass: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One state a set: Gaussian kernel weighted merging around the pivot, in float32.

    ``keys``, ``values`` [batch, kv_heads, T, head_dim]; ``sets`` [batch, kv_heads, T] as from
    `find_merging_sets` (tokens of set -1 are dropped); ``scores`` [batch, kv_heads, T]: the pivot p is the
    member with the highest, the first of equals. Weights g_j = exp(-|k_p - k_j|^2 / (2 sigma^2)) over their
    sum; with ``value_mass="paper"`` values are weighted |S| times that. Returns keys and values [batch,
    kv_heads, slots, head_dim] and sizes int64 [batch, kv_heads, slots]; heads with fewer sets than the
    longest end in slots of size 0.
    """
    member, index = sets >= 0, sets.clamp(min=0)
    slots, tokens = int(sets.max()) + 1, sets.shape[-1]
    keys = keys.float().masked_fill(~member.unsqueeze(-1), 0)
    values = values.float().masked_fill(~member.unsqueeze(-1), 0)

    def total(x: torch.Tensor) -> torch.Tensor:  # [batch, kv_heads, T] or [..., T, head_dim], over each set
        flat = x.dim() == 3
        x = x.unsqueeze(-1) if flat else x
        sums = x.new_zeros(*x.shape[:2], slots, x.shape[-1])
        sums = sums.scatter_add(2, index.unsqueeze(-1).expand_as(x), x)
        return sums.squeeze(-1) if flat else sums

    def spread(x: torch.Tensor) -> torch.Tensor:  # [batch, kv_heads, slots], each set's entry to its members
        return x.gather(-1, index)

    ones = member.float()
    sizes = total(ones)
    scores = scores.float().masked_fill(~member, -torch.inf)
    best = scores.new_full((*sets.shape[:2], slots), -torch.inf).scatter_reduce(-1, index, scores, "amax")
    places = torch.arange(tokens, device=sets.device).expand_as(sets)
    places = places.masked_fill(~member | (scores < spread(best)), tokens - 1)
    pivot = places.new_full(best.shape, tokens - 1).scatter_reduce(-1, index, places, "amin")
    centre = keys.gather(2, spread(pivot).unsqueeze(-1).expand_as(keys))
    distance = (keys - centre).square().sum(-1)

    def kernel(width: torch.Tensor) -> torch.Tensor:
        return (-distance / (2 * width.square())).exp() * ones

    if sigma == "fixed_point":
        width = (total(distance * ones) / sizes.clamp(min=1)).sqrt().clamp(min=1e-3)
        for _ in range(10):
            width = (total(kernel(spread(width))) / (math.sqrt(2) * sizes.clamp(min=1))).clamp(min=1e-3)
        weights = kernel(spread(width))
    else:
        weights = kernel(torch.tensor(sigma, device=keys.device))
    weights = weights / spread(total(weights)).clamp(min=1e-30)  # g of the pivot is 1, so only padding is clamped
    shares = weights * spread(sizes) if value_mass == "paper" else weights
    return total(weights.unsqueeze(-1) * keys), total(shares.unsqueeze(-1) * values), sizes.long()


def scatter_order(places: torch.Tensor, heads: int) -> torch.Tensor:
    """A pseudo-random number in [0, 1) for each head and place, whatever the batch: [batch, heads, T]."""
    salt = torch.arange(heads, device=places.device)[:, None] * 40503 + 12345
    mixed = (places.unsqueeze(1) + salt) * 2654435761 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
    return (mixed ^ (mixed >> 13)).float() / 2**32


# --- the layer ------------------------------------------------------------------------------------------


@dataclass
class Merged:
    """Slots after merging, one number for each head or not.

    ``keys``, ``values``: [batch, kv_heads, slots, head_dim] in the "padded" layout, [batch, slots of all
    heads, head_dim] in the "ragged" one. ``sizes``: tokens that each slot stands for, 0 for filling, [batch,
    kv_heads, slots] or [batch, slots of all heads]; None when all are 1. ``counts``: slots of each head,
    int32 [batch, kv_heads], when ragged.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sizes: torch.Tensor | None
    counts: torch.Tensor | None

    @classmethod
    def pack(cls, keys: torch.Tensor, values: torch.Tensor, sizes: torch.Tensor, ragged: bool, mass: bool) -> Merged:
        """From ``keys``, ``values`` [batch, kv_heads, slots, head_dim] and ``sizes``; ``mass``: keep sizes above 1."""
        real = sizes > 0
        counts = real.sum(-1).int() if ragged else None
        if ragged:
            keys, values = keys.flatten(1, 2), values.flatten(1, 2)
            real, sizes = real.flatten(1), sizes.flatten(1)
        if not bool(real.all()):  # real slots to the front, in order
            width = int(real.sum(-1).max())
            order = (~real).long().argsort(dim=-1, stable=True)[..., :width]
            wide = order.unsqueeze(-1).expand(*order.shape, keys.shape[-1])
            keys, values = keys.gather(-2, wide), values.gather(-2, wide)
            sizes, real = sizes.gather(-1, order), real.gather(-1, order)
        kept: torch.Tensor | None
        if mass and int(sizes.max()) > 1:
            kept = sizes.to(torch.int16 if int(sizes.max()) < 2**15 else torch.int32)
        else:
            kept = None if ragged or bool(real.all()) else real
        return cls(keys, values, kept, counts)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and sizes by head, [batch, kv_heads, slots, ...]; size 0 marks filling."""
        keys, values, sizes = self.keys, self.values, self.sizes
        if sizes is None:
            sizes = torch.ones(keys.shape[:-1], dtype=torch.int16, device=keys.device)
        if self.counts is None:
            return keys, values, sizes
        counts = self.counts.long()
        ramp = torch.arange(int(counts.max()), device=keys.device)
        index = (counts.cumsum(-1) - counts).unsqueeze(-1) + ramp  # [batch, kv_heads, slots]
        inside = ramp < counts.unsqueeze(-1)
        flat = index.clamp(max=keys.shape[1] - 1).flatten(1)
        wide = flat.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
        keys, values = (x.gather(1, wide).unflatten(1, index.shape[1:]) for x in (keys, values))
        sizes = sizes.gather(1, flat).unflatten(1, index.shape[1:])
        return keys, values, sizes * inside

    def slots(self, mass: bool) -> Slots:
        """Ready for attention; ``mass``: with log(size) as a bias."""
        keys, values, sizes = self.unpack()
        valid = None
        if (self.sizes is not None or self.counts is not None) and not bool((sizes > 0).all()):
            valid = sizes > 0
        bias = sizes.float().clamp(min=1).log() if mass and self.sizes is not None else None
        return Slots(keys, values, valid, bias)

    def real(self) -> torch.Tensor:
        """Slots that stand for tokens, [batch, kv_heads]."""
        if self.counts is not None:
            return self.counts.long()
        if self.sizes is None:
            return self.keys.new_full(self.keys.shape[:2], self.keys.shape[2], dtype=torch.long)
        return (self.sizes > 0).sum(-1)


def concatenate(first: Slots | None, second: Slots | None) -> Slots | None:
    """``first`` then ``second``, each None when empty."""
    if first is None or second is None:
        return first if second is None else second
    parts = (first, second)

    def joined(name: str, blank: bool | float, dtype: torch.dtype) -> torch.Tensor | None:
        given = [getattr(part, name) for part in parts]
        if all(marks is None for marks in given):
            return None
        shapes = [part.keys.shape[:3] for part in parts]
        full = [
            part.keys.new_full(shape, blank, dtype=dtype) if marks is None else marks.expand(shape)
            for part, marks, shape in zip(parts, given, shapes, strict=True)
        ]
        return torch.cat(full, -1)

    keys, values = (torch.cat([getattr(part, name) for part in parts], 2) for name in ("keys", "values"))
    return Slots(keys, values, joined("valid", True, torch.bool), joined("bias", 0.0, torch.float32))


class KVMergerLayer(CacheLayer):
    """The prompt's merged slots, then the tokens generated as they are."""

    method: KVMerger
    merged: Merged | None = None
    tail: Slots | None = None
    #: attention that the tail's tokens received so far, float32 [batch, kv_heads, tokens]; only with
    #: ``every``
    heat: torch.Tensor | None = None

    @property
    def scaling(self) -> float:
        return float(self.module.scaling)

    def prefill(self, prompt: Tokens) -> None:
        if int(prompt.valid.sum(-1).min()) < 4:
            raise ValueError(f"KVMerger needs at least 4 tokens to merge, got {int(prompt.valid.sum(-1).min())}")
        scores = attention_mass(prompt, self.scaling).sum(2)
        self.merged = self.merge(prompt.keys, prompt.values, scores, prompt.valid)

    def append(self, new: Tokens) -> None:
        every = self.method.every
        if every is not None:
            received = attention_received(self.slots(), new, self.scaling).sum(2)
            before = 0 if self.heat is None else self.heat.shape[-1]
            received = received[..., received.shape[-1] - before - new.count :]
            self.heat = received if self.heat is None else received + F.pad(self.heat, (0, new.count))
        valid = None if bool(new.valid.all()) else new.valid.unsqueeze(1)
        self.tail = concatenate(self.tail, Slots(new.keys.contiguous(), new.values.contiguous(), valid))
        if every is not None and self.tail is not None and self.tail.keys.shape[2] >= every:
            self.merge_tail(self.tail)

    def merge_tail(self, tail: Slots) -> None:
        """Merges the tokens generated so far among themselves, behind what is merged already."""
        assert self.merged is not None
        assert self.heat is not None
        batch, _, count, _ = tail.keys.shape
        valid = torch.ones(batch, count, dtype=torch.bool, device=tail.keys.device)
        if tail.valid is not None:
            valid = tail.valid[:, 0]
        parts = [self.merged.unpack(), self.merge(tail.keys, tail.values, self.heat, valid).unpack()]
        keys, values, sizes = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        self.merged, self.tail, self.heat = self.pack(keys, values, sizes), None, None

    def slots(self) -> Slots | None:
        merged = None if self.merged is None else self.merged.slots(self.method.value_mass == "bias")
        return concatenate(merged, self.tail)

    @property
    def stored(self) -> int:
        merged = 0 if self.merged is None else int(self.merged.real().max())
        return merged + (0 if self.tail is None else self.tail.keys.shape[2])

    def real_slots(self) -> torch.Tensor:
        """Slots that stand for tokens, without filling: [batch, kv_heads]."""
        assert self.merged is not None
        real = self.merged.real()
        if self.tail is None:
            return real
        return real + (self.tail.keys.shape[2] if self.tail.valid is None else self.tail.valid.sum(-1))

    # --- merging ----------------------------------------------------------------------------------------

    def find_sets(self, keys: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Steps 2 and 3: which tokens share a slot, [batch, kv_heads, T]; -1 for those that get none."""
        method, lengths = self.method, valid.sum(-1)
        recent, heavy = ((share * lengths).round().long() for share in (method.recent, method.heavy))
        if method.budget is None:
            protected = protect(scores, valid, recent, heavy)
            if not method.merge:
                return (protected.long().cumsum(-1) - 1).masked_fill(~protected, -1)
            return find_merging_sets(keys, protected, method.epsilon, valid, method.max_norm_ratio)
        assert self.cache is not None
        share = method.layer_share(len(self.cache.layers))
        counts = (share * lengths.double() - 1e-9).ceil().long().clamp(min=1)
        recent = recent.minimum(counts - 1)
        if not method.merge:  # the same protected tokens, and the next most attended ones up to the count
            kept = protect(
                scores.masked_fill(protect(scores, valid, recent, 0 * heavy), torch.inf),
                valid,
                recent,
                counts,
            )
            return (kept.long().cumsum(-1) - 1).masked_fill(~kept, -1)
        # Every protected heavy token costs itself and one run more than there would be: so many fit for
        # certain.
        heavy = heavy.minimum((counts - recent - 1) // 2)
        protected = protect(scores, valid, recent, heavy)
        if method.sets == "random":
            places = valid.long().cumsum(-1)[:, :-1]
            order = scatter_order(places, keys.shape[1])
        else:
            order = similarity(keys)
            if method.max_norm_ratio is not None:  # last of all, as a budget must be met
                order = order - 10 * (norm_ratios(keys) > method.max_norm_ratio)
        return find_sets_to_count(order, protected, counts, valid)

    def merge(self, keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> Merged:
        """Merges tokens [batch, kv_heads, T, head_dim] whose attention was ``scores`` [batch, kv_heads, T]."""
        method = self.method
        sets = self.find_sets(keys, scores, valid)
        if method.pivot == "random":
            scores = scatter_order(valid.long().cumsum(-1), keys.shape[1])
        new_keys, new_values, sizes = gaussian_merge(keys, values, sets, scores, method.sigma, method.value_mass)
        return self.pack(new_keys.to(keys.dtype), new_values.to(values.dtype), sizes)

    def pack(self, keys: torch.Tensor, values: torch.Tensor, sizes: torch.Tensor) -> Merged:
        method = self.method
        return Merged.pack(keys, values, sizes, method.layout == "ragged", method.value_mass == "bias")


class KVMergerCache(MethodCache):
    """The cache of `KVMerger`; its report tells real slots from filling."""

    def report(self) -> dict[str, Any]:
        """Tokens seen, slots by layer and part; ``slots``: mean of real slots over rows and heads, by layer;
        ``padded_bytes``: held by filling, and part of ``nbytes``."""
        slots: list[float] = []
        padded = 0
        for layer in cast("list[CacheLayer]", self.layers):
            if not isinstance(layer, KVMergerLayer) or layer.merged is None:
                slots.append(float(layer.stored))
                continue
            slots.append(float(layer.real_slots().float().mean()))
            merged = layer.merged
            filling = merged.keys[..., 0].numel() - int(merged.real().sum())
            padded += 2 * filling * merged.keys.shape[-1] * merged.keys.element_size()
        return super().report() | {"slots": slots, "padded_bytes": padded}


# --- the method -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KVMerger(CacheMethod):
    """Gaussian merging of runs of similar keys, once after prefill.

    Parameters:

    - ``epsilon`` in [-1, 1]: cosine from which neighbours are joined; the size is then what it is. Ignored
      with a ``budget``.
    - ``budget`` in (0, 1]: slots to keep, of the prompt's tokens, over all layers, the skipped ones included:
      each other layer keeps ceil(b * T) with b = (budget * layers - skipped) / (layers - skipped).
      ``compression_ratio`` = 1 - budget.
    - ``recent``, ``heavy``: shares of the prompt, last and most attended, that stay alone (p_recent, p_attn;
      the paper tuned 0.17 and 0.12 for a budget of 0.5, 0.08 and 0.02 for 0.35).
    - ``sigma``: kernel width, or "fixed_point". Towards 0 a set becomes its pivot, towards infinity the plain
      mean.
    - ``pivot``: "attention" or "random". ``value_mass``: "bias", "paper" or "mean", see above.
    - ``skip_layers``: indices of layers that stay whole (attention is flat in the first two and the last), or
      "all".
    - ``every``: merge the tokens generated too, each time so many have come; None: never (paper).
    - ``layout``: "padded" stores heads at the length of the longest; "ragged" end to end, gathered for each
      pass.
    - ``max_norm_ratio``: do not join neighbours whose norms differ by more than this factor.
    - ``merge``: False drops what would be merged; with a budget the next most attended tokens fill it.
      ``sets``: "random" joins random neighbours instead of similar ones; budget only. Both for ablation.

    A prompt of fewer than 4 tokens raises ValueError in the forward pass.
    """

    epsilon: float = 0.75
    budget: float | None = None
    recent: float = 0.17
    heavy: float = 0.12
    sigma: float | Literal["fixed_point"] = 5.0
    pivot: Literal["attention", "random"] = "attention"
    value_mass: Literal["bias", "paper", "mean"] = "bias"
    skip_layers: tuple[int, ...] | Literal["all"] = (0, 1, -1)
    every: int | None = None
    layout: Literal["padded", "ragged"] = "padded"
    max_norm_ratio: float | None = None
    merge: bool = True
    sets: Literal["similar", "random"] = "similar"
    compression_ratio: InitVar[float | None] = None

    Layer: ClassVar[type[CacheLayer]] = KVMergerLayer

    def __post_init__(self, compression_ratio: float | None) -> None:
        if compression_ratio is not None:
            if self.budget is not None:
                raise ValueError("give budget or compression_ratio, not both")
            object.__setattr__(self, "budget", 1 - compression_ratio)
        if not -1 <= self.epsilon <= 1:
            raise ValueError(f"epsilon must be between -1 and 1, got {self.epsilon}")
        if self.recent < 0 or self.heavy < 0:
            raise ValueError(f"recent and heavy must not be negative, got {self.recent} and {self.heavy}")
        if self.budget is not None:
            check_fraction("budget", self.budget)
            self.check_protection(self.budget, "budget")
        if self.sigma != "fixed_point" and (isinstance(self.sigma, str) or self.sigma <= 0):
            raise ValueError(f"sigma must be positive or 'fixed_point', got {self.sigma!r}")
        hints = get_type_hints(type(self))
        for name in ("pivot", "value_mass", "layout", "sets"):
            if getattr(self, name) not in (allowed := get_args(hints[name])):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.skip_layers, str) and self.skip_layers != "all":
            raise ValueError(f"skip_layers must be indices or 'all', got {self.skip_layers!r}")
        if self.every is not None and self.every < 4:
            raise ValueError(f"every must be at least 4, got {self.every}")
        if self.max_norm_ratio is not None and self.max_norm_ratio < 1:
            raise ValueError(f"max_norm_ratio must be at least 1, got {self.max_norm_ratio}")
        if self.sets == "random" and self.budget is None:
            raise ValueError("sets='random' needs a budget")

    def check_protection(self, share: float, what: str) -> None:
        """Raises ValueError when the protected tokens alone fill ``share``."""
        if self.recent + self.heavy >= share:
            raise ValueError(
                f"recent + heavy = {self.recent + self.heavy:.3g} leaves nothing to merge in a {what} of "
                f"{share:.3g}; lower them"
            )

    def layer_share(self, layers: int) -> float:
        """Slots over tokens in each layer not skipped, so that all layers together meet ``budget``."""
        assert self.budget is not None
        whole = len(skipped(self.skip_layers, layers))
        return (self.budget * layers - whole) / (layers - whole) if whole < layers else 1.0

    def check(self, geometry: Geometry) -> None:
        whole = len(skipped(self.skip_layers, geometry.layers))
        if self.budget is None or whole == 0:
            return
        if whole == geometry.layers or self.layer_share(geometry.layers) <= 0:
            if self.budget < 1:
                raise ValueError(
                    f"budget {self.budget:g} cannot be met: {whole} of {geometry.layers} layers are skipped "
                    "and keep everything; set skip_layers=()"
                )
            return
        self.check_protection(self.layer_share(geometry.layers), "layer's share")

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        rotary, modules = find_rotary(model), attention_modules(model)
        whole = skipped(self.skip_layers, len(modules))
        return [
            (SlotLayer if index in whole else self.Layer)(self, index, module, rotary)
            for index, module in enumerate(modules)
        ]

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> MethodCache:
        plain = super().cache(model, chunked, dtype)
        return KVMergerCache(self, cast("list[CacheLayer]", plain.layers), chunked, dtype)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """See `CacheMethod.at_budget`; turns to ``budget`` mode, with the sizes of sets counted in the bytes.

        ``skip_layers`` is kept for 8 layers and more; below that the first two and the last would be most of
        the model, and none is skipped. ``recent`` and ``heavy`` scale as the paper's tuned pairs do: full at
        0.5 and above, at 0.35 the factors 0.08/0.17 and 0.02/0.12, linear between and proportional below.
        """
        if fraction >= 1:
            return replace(self, budget=1.0)
        layers = geometry.layers
        skip = self.skip_layers if layers >= 8 or self.skip_layers == "all" else ()
        whole = len(skipped(skip, layers))
        sizes = 0 if self.value_mass != "bias" or not self.merge else 2 if tokens < 2**15 else 4
        starts = 4 * geometry.kv_heads * (self.layout == "ragged")
        stored = CacheFormat(share=1 / tokens, slot=sizes, layer=starts)
        sides = (tokens, layers - whole, geometry.kv_heads, geometry.head_dim)
        full = geometry.full_bytes(tokens)
        exact = whole / layers * full
        count = stored.most_slots(fraction * full - exact, *sides) if whole < layers else 0
        if count < 1:
            raise Unreachable((exact + stored.nbytes(*sides)) / full)
        # The ceiling of a share just above count - 1 is count here, and never dearer on a longer prompt.
        share = (count - 1 + 1e-3) / tokens
        recent, heavy = paper_protection(share)
        return replace(
            self,
            budget=(share * (layers - whole) + whole) / layers,
            recent=self.recent * recent,
            heavy=self.heavy * heavy,
            skip_layers=skip,
        )


def skipped(skip_layers: tuple[int, ...] | str, layers: int) -> set[int]:
    """Indices of the layers that stay whole, in a model of ``layers``."""
    if isinstance(skip_layers, str):
        return set(range(layers))
    if outside := [index for index in skip_layers if not -layers <= index < layers]:
        raise ValueError(f"skip_layers names layer {outside[0]} of a model with {layers} layers")
    return {index % layers for index in skip_layers}


def paper_protection(share: float) -> tuple[float, float]:
    """Factors on the default ``recent`` and ``heavy`` for a layer that keeps ``share`` of its tokens."""
    low, high = 0.35, 0.5
    factors = (0.08 / 0.17, 0.02 / 0.12)
    if share <= low:
        return factors[0] * share / low, factors[1] * share / low
    way = min((share - low) / (high - low), 1.0)
    return factors[0] + way * (1 - factors[0]), factors[1] + way * (1 - factors[1])


# --- the model's profile --------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergeProfile:
    """How far a model's keys merge: sets over tokens, for each layer and KV head, over prompts.

    ``mean``, ``std``: [layers][kv_heads]; ``layer_mean``, ``layer_std``: of the mean over heads, [layers];
    ``norm_ratio`` [layers]: mean over sets of more than one token of the largest norm over the smallest.
    """

    epsilon: float
    recent: float
    heavy: float
    prompts: int
    mean: list[list[float]]
    std: list[list[float]]
    layer_mean: list[float]
    layer_std: list[float]
    norm_ratio: list[float]

    def share(self, skip_layers: Iterable[int] = (0, 1, -1)) -> float:
        """Slots over tokens to expect over all layers, with ``skip_layers`` whole."""
        shares = list(self.layer_mean)
        for index in skip_layers:
            shares[index] = 1.0
        return sum(shares) / len(shares)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> MergeProfile:
        """Reads what `save` wrote."""
        return cls(**json.loads(Path(path).read_text()))


class ProfilingLayer(KVMergerLayer):
    """Finds the sets, takes their measures and stores nothing."""

    ratio: torch.Tensor
    norm_ratio: torch.Tensor

    def prefill(self, prompt: Tokens) -> None:
        scores = attention_mass(prompt, self.scaling).sum(2)
        sets = self.find_sets(prompt.keys, scores, prompt.valid)
        self.ratio = (sets.amax(-1) + 1)[0] / prompt.count
        norms = prompt.keys.float().norm(dim=-1)
        bounds = norms.new_zeros(*sets.shape[:2], prompt.count)
        high = bounds.scatter_reduce(-1, sets, norms, "amax", include_self=False)
        low = bounds.scatter_reduce(-1, sets, norms, "amin", include_self=False)
        several = bounds.scatter_add(-1, sets, torch.ones_like(norms)) > 1
        self.norm_ratio = (high / low.clamp(min=1e-12))[several]


@dataclass(frozen=True)
class Profiler(KVMerger):
    """`KVMerger` with layers that measure only."""

    Layer: ClassVar[type[CacheLayer]] = ProfilingLayer


def profile_model(model: PreTrainedModel, prompts: Iterable[torch.Tensor], method: KVMerger | None = None) -> MergeProfile:
    """Measures how far ``model`` merges at ``method.epsilon`` on ``prompts``, int64 [tokens] each; take 50 or
    more.

    All layers are measured, those that the method would skip too. Raises ValueError with fewer than two
    prompts.
    """
    everywhere = {"budget": None, "sets": "similar", "merge": True, "skip_layers": ()}
    profiler = Profiler(**{**(method or KVMerger()).parameters, **everywhere})
    ratios: list[torch.Tensor] = []
    norms: list[list[torch.Tensor]] = []
    for prompt in prompts:
        cache = profiler.cache(model)
        with torch.no_grad():
            model(prompt.reshape(1, -1).to(model.device), **with_cache(cache), use_cache=True)
        layers = cast("list[ProfilingLayer]", cache.layers)
        ratios.append(torch.stack([layer.ratio for layer in layers]))
        norms.append([layer.norm_ratio for layer in layers])
    if len(ratios) < 2:
        raise ValueError(f"a profile needs at least two prompts, got {len(ratios)}")
    every = torch.stack(ratios).double()  # [prompts, layers, kv_heads]
    spans = [torch.cat(layer) for layer in zip(*norms, strict=True)]
    return MergeProfile(
        epsilon=profiler.epsilon,
        recent=profiler.recent,
        heavy=profiler.heavy,
        prompts=len(ratios),
        mean=every.mean(0).tolist(),
        std=every.std(0).tolist(),
        layer_mean=every.mean((0, 2)).tolist(),
        layer_std=every.mean(2).std(0).tolist(),
        norm_ratio=[float(span.mean()) if len(span) else 1.0 for span in spans],
    )
