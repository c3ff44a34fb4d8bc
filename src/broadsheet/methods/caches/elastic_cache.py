"""Elastic Cache: anchors and buckets for the prompt, a queue with its exit in the middle while generating
(Liu et al. 2024, arXiv 2407.18121).

After prefill the most attended tokens of a layer become anchors. Every other token is averaged into the
nearest anchor, merged and not dropped: one slot for each bucket of neighbours. While generating, whenever
more than ``budget`` of the tokens seen are stored, the slot at a fixed place near the end of the compressed
prompt goes, so that the head of the prompt and the newest output both survive.

Deviations and readings, where the paper leaves a choice:

- Ranks are true ranks. The official code reads `argsort` as ranks, shifts the indices of the tokens that it
  merges and keeps one slot fewer than budgeted; ``official_quirks=True`` does the same, for parity tests
  only.
- New tokens go on at their true positions; the official code counts them from the compressed length.
- Several tokens in one pass (a follow-up question) all see what was stored before the pass, exactly; the
  evictions that they cause come after it, and delete the same slots that one token at a time would have
  deleted.
- The paper names a moving average of the attention without its formula. Here it is exponential, ``decay`` a
  query.
- "Most recent only" is read as sinks and the newest tokens, so that the oldest slot after the sinks goes.

The scores need the prompt's attention, a second pass in blocks of queries: O(T^2) work, O(T * block) memory.
Peak memory at prefill is that of the full cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast, get_args, get_type_hints

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from broadsheet.core.models.rotary import rotate
from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import CacheFormat

from .attention import attention_mass, attention_received, attention_rows
from .base import CacheLayer, CacheMethod, Geometry, MethodCache, Unreachable, check_fraction
from .full import SlotLayer


def importance(prompt: Tokens, scaling: float, statistic: str = "sum", decay: float = 0.9) -> torch.Tensor:
    """How much attention prompt token n receives: float32 [batch, kv_heads, group, T].

    ``statistic`` over the queries m >= n: "sum", "mean" over those T - n, or "moving_average", which weighs
    query m with (1 - decay) * decay**(T - 1 - m). Padding counts nothing.
    """
    total = prompt.count
    if statistic == "moving_average":
        # Weights below 1e-9 of the newest's are beneath float32: the older queries need not be computed.
        ages = torch.arange(total, device=prompt.keys.device).flip(0)
        weights = (1 - decay) * decay ** ages[decay**ages > 1e-9].float()
        first = total - len(weights)
        valid = prompt.valid.unsqueeze(1)
        rows = attention_rows(prompt.queries[:, :, first:], prompt.keys, scaling, first, valid)
        return (rows * (weights * prompt.valid[:, first:])[:, None, None, :, None]).sum(3)
    mass = attention_mass(prompt, scaling)
    if statistic == "mean":
        mass = mass / torch.arange(total, 0, -1, device=mass.device)
    return mass


def choose_anchors(
    scores: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor, n_sink: int, n_recent: int
) -> torch.Tensor:
    """The places of each row's ``counts`` [batch] highest ``scores`` [batch, groups, T], ascending.

    Returns int64 [batch, groups, max(counts)]. The first ``n_sink`` and the last ``n_recent`` real tokens are
    always among them, in the place of the weakest; the lower index wins a tie. Rows with fewer anchors are filled
    with -1 in front. ``valid`` [batch, T]: False is padding.
    """
    rank = valid.long().cumsum(-1)
    fixed = valid & ((rank <= n_sink) | (rank > rank[:, -1:] - n_recent))
    scores = scores.masked_fill(fixed.unsqueeze(1), torch.inf).masked_fill(~valid.unsqueeze(1), -torch.inf)
    width = int(counts.max())
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :width]
    within = torch.arange(width, device=scores.device) < counts[:, None, None]
    return torch.where(within, best, -1).sort(-1).values


def assign_buckets(anchors: torch.Tensor, total: int) -> torch.Tensor:
    """The slot whose anchor is nearest, for each of ``total`` tokens: int64 [batch, groups, total].

    ``anchors`` [batch, groups, slots] ascending, -1 where a slot is filling. The border between two anchors
    is floor((a + b) / 2), which belongs to the left one.
    """
    anchors = torch.where(anchors < 0, -2 * total - 2, anchors)  # so far off that nothing is nearest to it
    borders = torch.div(anchors[..., :-1] + anchors[..., 1:], 2, rounding_mode="floor")
    tokens = torch.arange(total, device=anchors.device).expand(*anchors.shape[:2], total)
    return torch.searchsorted(borders.contiguous(), tokens.contiguous())


def bucket_mean(x: torch.Tensor, buckets: torch.Tensor, valid: torch.Tensor, slots: int) -> torch.Tensor:
    """Plain mean of ``x`` [batch, kv_heads, T, channels] over each bucket, float32 [batch, kv_heads, slots, channels].

    ``buckets`` [batch, 1 or kv_heads, T] as from `assign_buckets`; ``valid`` [batch, T]: padding has no
    weight.
    """
    sizes = bucket_sizes(buckets, valid, slots).clamp(min=1)
    x = x.float().masked_fill(~valid[:, None, :, None], 0)
    sums = x.new_zeros(*x.shape[:2], slots, x.shape[-1])
    return sums.scatter_add(2, buckets.unsqueeze(-1).expand_as(x), x) / sizes.unsqueeze(-1)


def bucket_sizes(buckets: torch.Tensor, valid: torch.Tensor, slots: int) -> torch.Tensor:
    """Real tokens in each bucket, float32 [batch, 1 or kv_heads, slots]."""
    ones = valid.unsqueeze(1).expand_as(buckets).float()
    return ones.new_zeros(*buckets.shape[:2], slots).scatter_add(2, buckets, ones)


def official_selection(scores: torch.Tensor, forget: int, n_sink: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices that the official code keeps, merges and merges into, from one layer's ``scores`` [T].

    ``order[j]``, the index of the j-th smallest score, is read as the rank of token j; the tokens merged lack
    the offset ``n_sink``, so that each means a token further left; sinks and the last token are never
    targets.
    """
    total = len(scores)
    order = scores[n_sink : total - 1].argsort(stable=True)
    inner = (order > forget).nonzero().flatten() + n_sink
    merged = (order <= forget).nonzero().flatten()
    if not len(inner):
        raise ValueError(f"official_quirks keeps no inner token of a prompt of {total}; use a longer prompt")
    targets = inner[(inner - merged[:, None]).abs().argmin(-1)]
    ends = torch.arange(total, device=scores.device)
    return torch.cat([ends[:n_sink], inner, ends[-1:]]), merged, targets


class ElasticLayer(SlotLayer):
    """Slots of a prompt's buckets, then of the tokens generated; the exit of the queue is slot ``exits``."""

    method: ElasticCache
    #: tokens seen, by row: [batch]
    lengths: torch.Tensor | None = None
    #: slot that goes when there are too many, counted among a row's real slots: [batch]
    exits: torch.Tensor | None = None
    #: attention that each slot received so far, float32 [batch, 1 or kv_heads, slots]; only for
    #: discard="frequency"
    mass: torch.Tensor | None = None
    #: prompt tokens averaged into another one's slot, over all rows (and, head-wise, heads)
    merged = 0

    @property
    def scaling(self) -> float:
        return float(self.module.scaling)

    def by_group(self, scores: torch.Tensor) -> torch.Tensor:
        """[batch, kv_heads, group, n] averaged over what shares a selection: [batch, 1 or kv_heads, n]."""
        return scores.mean((1, 2)).unsqueeze(1) if self.method.granularity == "layer" else scores.mean(2)

    def scores(self, prompt: Tokens) -> torch.Tensor:
        """Importance of the prompt's tokens, [batch, 1 or kv_heads, T]."""
        return self.by_group(importance(prompt, self.scaling, self.method.importance, self.method.decay))

    # --- the prompt -------------------------------------------------------------------------------------

    def prefill(self, prompt: Tokens) -> None:
        method = self.method
        if method.budget == 1:
            super().append(prompt)
            return
        self.lengths = prompt.valid.sum(-1)
        if method.official_quirks:
            self.prefill_official(prompt)
            return
        counts = (method.budget * self.lengths.double()).round().long().clamp(min=1)
        least = method.n_sink + method.n_recent
        if int(counts.min()) < least:
            raise ValueError(
                f"a prompt of {int(self.lengths.min())} tokens at budget {method.budget:g} leaves "
                f"{int(counts.min())} slots, fewer than n_sink + n_recent = {least}; raise the budget"
            )
        scores = self.scores(prompt)
        anchors = choose_anchors(scores, prompt.valid, counts, method.n_sink, method.n_recent)
        self.store(prompt, anchors, scores)
        exits = counts - method.distance if method.exit_slot is None else torch.full_like(counts, method.exit_slot)
        self.exits = exits.clamp(min=method.n_sink)

    def store(self, prompt: Tokens, anchors: torch.Tensor, scores: torch.Tensor) -> None:
        """One slot for each anchor: the mean of its bucket, or with ``merge=False`` the anchor itself."""
        method, slots = self.method, anchors.shape[-1]
        real, at = anchors >= 0, anchors.clamp(min=0)
        wide = at.expand(-1, prompt.keys.shape[1], -1).unsqueeze(-1).expand(-1, -1, -1, prompt.keys.shape[-1])
        keys, values = prompt.keys.gather(2, wide), prompt.values.gather(2, wide)
        mass = scores.gather(-1, at)
        if method.merge:
            buckets = assign_buckets(anchors, prompt.count)
            sizes = bucket_sizes(buckets, prompt.valid, slots)
            values = bucket_mean(prompt.values, buckets, prompt.valid, slots).to(values.dtype)
            if method.merge_keys == "post_rope":
                keys = bucket_mean(prompt.keys, buckets, prompt.valid, slots).to(keys.dtype)
            elif method.merge_keys == "pre_rope":
                # A token alone in its bucket keeps its key's bits.
                turned = self.mean_unrotated(prompt, buckets, at).to(keys.dtype)
                keys = torch.where(sizes.unsqueeze(-1) > 1, turned, keys)
            mass = torch.zeros_like(mass).scatter_add(2, buckets, scores.masked_fill(~prompt.valid.unsqueeze(1), 0))
            if method.mass_bias:
                self.bias = sizes.clamp(min=1).log().expand(keys.shape[:3]).contiguous()
        self.merged = int(prompt.valid.sum()) * anchors.shape[1] - int(real.sum()) if method.merge else 0
        self.stored_keys, self.stored_values = keys, values
        self.valid = None if bool(real.all()) else real
        self.mass = mass if method.discard == "frequency" else None

    def mean_unrotated(self, prompt: Tokens, buckets: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Means of the keys before rotation, turned to their anchors' positions: [batch, kv_heads, slots, head_dim]."""
        bare = rotate(prompt.keys.float(), prompt.cos, prompt.sin, inverse=True)
        mean = bucket_mean(bare, buckets, prompt.valid, at.shape[-1])
        batch, heads = mean.shape[:2]
        place = at.expand(-1, heads, -1).unsqueeze(-1)
        cos, sin = (
            x.unsqueeze(1).expand(-1, heads, -1, -1).gather(2, place.expand(-1, -1, -1, x.shape[-1])).flatten(0, 1)
            for x in (prompt.cos, prompt.sin)
        )
        return rotate(mean.flatten(0, 1).unsqueeze(1), cos, sin).squeeze(1).unflatten(0, (batch, heads))

    def prefill_official(self, prompt: Tokens) -> None:
        """The official code's compression, faults included; one row."""
        method, total = self.method, prompt.count
        if prompt.keys.shape[0] > 1 or not bool(prompt.valid.all()):
            raise ValueError("official_quirks takes one row at a time, without padding")
        forget = int(total - total * method.budget)
        exit_slot = method.exit_slot if method.exit_slot is not None else total - forget - method.distance
        if forget < 2 or exit_slot < 0:
            raise ValueError(f"official_quirks does not cover a prompt of {total} tokens; use a longer one")
        kept, merged, targets = official_selection(self.scores(prompt)[0, 0], forget, method.n_sink)
        hits = 1 + torch.zeros(total, device=prompt.keys.device).index_add(0, targets, torch.ones_like(targets).float())

        def merge(x: torch.Tensor) -> torch.Tensor:
            sums = x.float().index_add(2, targets, x[:, :, merged].float())
            return (sums / hits[:, None])[:, :, kept].to(x.dtype)

        self.stored_keys, self.stored_values = merge(prompt.keys), merge(prompt.values)
        self.exits, self.merged = torch.full_like(prompt.positions[:, 0], exit_slot), len(merged)

    # --- generation -------------------------------------------------------------------------------------

    def append(self, new: Tokens) -> None:
        if self.lengths is None:  # budget 1
            super().append(new)
            return
        if self.mass is not None:
            received = self.by_group(attention_received(self.slots(), new, self.scaling))
            self.mass = received + F.pad(self.mass, (0, new.count))
        super().append(new)
        self.lengths = self.lengths + new.valid.sum(-1)
        if self.method.discard != "none":
            self.evict()

    def evict(self) -> None:
        """Deletes the slot at the exit while more than floor(budget * seen) are stored, all at once."""
        assert self.stored_keys is not None
        assert self.lengths is not None
        assert self.exits is not None
        method = self.method
        real = self.valid
        if real is None:
            real = torch.ones(len(self.lengths), 1, self.stored, dtype=torch.bool, device=self.lengths.device)
        stored = real[:, 0].sum(-1)  # every head of a row holds the same number
        share = method.budget * self.lengths.double()
        if method.official_quirks:
            surplus = (stored - share).trunc().long()  # so one slot above the floor may stay
        else:
            allowed = (share + 1e-9).floor().long().clamp(min=method.n_sink + method.n_recent)
            surplus = stored - allowed
        surplus = surplus.clamp(min=0)
        if not int(surplus.max()):
            return
        rank = real.long().cumsum(-1) - 1
        if self.mass is not None:
            fixed = (rank < method.n_sink) | (rank >= (stored - method.n_recent)[:, None, None]) | ~real
            weakest = self.mass.masked_fill(fixed, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
            drop = weakest < surplus[:, None, None]
        else:
            first = self.exits if method.discard == "fixed_point" else torch.full_like(stored, method.n_sink)
            # The newest tokens stay, however far behind the exit was put.
            first = first.minimum(stored - surplus - method.n_recent).clamp(min=0)[:, None, None]
            drop = (rank >= first) & (rank < first + surplus[:, None, None])
        self.keep_where(real & ~drop)

    def keep_where(self, kept: torch.Tensor) -> None:
        """Frees the slots where ``kept`` [batch, 1 or kv_heads, slots] is False; shorter rows are filled in front."""
        assert self.stored_keys is not None
        width = int(kept.sum(-1).max())
        order = kept.long().argsort(dim=-1, stable=True)[..., -width:]
        if self.mass is not None:
            self.mass = self.mass.gather(-1, order)
        self.valid = None
        self.keep(order.expand(-1, self.stored_keys.shape[1], -1), kept.gather(-1, order))


class ElasticStore(MethodCache):
    """The cache of `ElasticCache`; its report also counts the tokens merged."""

    def report(self) -> dict[str, Any]:
        """Tokens seen, slots stored and prompt tokens merged by layer, bytes by part."""
        return super().report() | {"merged": [layer.merged for layer in cast("list[ElasticLayer]", self.layers)]}


@dataclass(frozen=True)
class ElasticCache(CacheMethod):
    """Prompt tokens averaged into the most attended of their neighbourhood; a fixed-point queue while
    generating.

    Parameters:

    - ``budget`` in (0, 1]: slots to keep, of the tokens seen (gamma; the official ``ratio`` is 1 - gamma).
    - ``n_sink``, ``n_recent``: first and last tokens that are always anchors, and are never evicted.
    - ``distance``: how far from the end of the compressed prompt the exit of the queue lies, in slots (25,
      official -25). ``exit_slot``: the exit as a slot's index instead.
    - ``merge``: False keeps the anchors as they are and drops the rest.
    - ``merge_keys``: "post_rope" averages keys as cached, rotated (paper); "pre_rope" averages them unrotated
      and turns the mean to the anchor's position; "none" averages values only.
    - ``importance``: "sum" (paper), "mean" or "moving_average" (with ``decay``) of the attention received.
    - ``granularity``: anchors shared by a "layer" (paper), or chosen by each KV "head".
    - ``discard``: which slot goes while generating: that at the "fixed_point" (paper), the oldest after the
      sinks, so that the "recent" ones stay, the one least attended so far ("frequency"), or "none".
    - ``mass_bias``: adds log(bucket size) to a slot's logit, so that it carries the attention of all its
      tokens (ours).
    - ``official_quirks``: the official code's selection, for parity tests; one unpadded row.

    A prompt whose share is below n_sink + n_recent slots raises ValueError in the forward pass.
    """

    budget: float = 0.5
    n_sink: int = 1
    n_recent: int = 1
    distance: int = 25
    exit_slot: int | None = None
    merge: bool = True
    merge_keys: Literal["post_rope", "pre_rope", "none"] = "post_rope"
    importance: Literal["sum", "mean", "moving_average"] = "sum"
    decay: float = 0.9
    granularity: Literal["layer", "head"] = "layer"
    discard: Literal["fixed_point", "recent", "frequency", "none"] = "fixed_point"
    mass_bias: bool = False
    official_quirks: bool = False

    Layer: ClassVar[type[CacheLayer]] = ElasticLayer

    def __post_init__(self) -> None:
        check_fraction("budget", self.budget)
        for name, least in {"n_sink": 0, "n_recent": 0, "distance": 0, "exit_slot": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        hints = get_type_hints(type(self))
        for name in ("merge_keys", "importance", "granularity", "discard"):
            if getattr(self, name) not in (allowed := get_args(hints[name])):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        if self.official_quirks:
            free = {"budget", "n_sink", "distance", "exit_slot", "official_quirks"}
            usual = ElasticCache(budget=self.budget).parameters
            if changed := [n for n, value in self.parameters.items() if n not in free and value != usual[n]]:
                raise ValueError(f"official_quirks leaves no choice of {changed[0]}; drop one of the two")

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> MethodCache:
        plain = super().cache(model, chunked, dtype)
        return ElasticStore(self, cast("list[CacheLayer]", plain.layers), chunked, dtype)

    def format(self, geometry: Geometry) -> CacheFormat:
        """A float32 a slot for masses and for frequencies; two integers a row: tokens seen, and the exit."""
        frequencies, by_head = self.discard == "frequency", self.granularity == "head"
        slot = 4 * (self.mass_bias and self.merge) + 4 * (frequencies and by_head)
        return CacheFormat(share=self.budget, slot=slot, shared=4 * (frequencies and not by_head), layer=16)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        if fraction >= 1 and not self.mass_bias and self.discard != "frequency":
            return replace(self, budget=1.0)
        count = min(self.most_slots(fraction, tokens, geometry), tokens - 1)
        least = max(self.n_sink + self.n_recent, 1)
        if count < least:
            smallest = replace(self, budget=least / tokens).expected_bytes(tokens, geometry)
            raise Unreachable(smallest / geometry.full_bytes(tokens))
        return replace(self, budget=count / tokens)
