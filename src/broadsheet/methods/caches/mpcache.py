"""MPCache: look-once eviction, then attention to picked clusters (Zeng et al. 2025, arXiv 2501.06807).

Made for inference on secret-shared prompts, where comparisons and look-ups by secret index are what costs.
After the prompt, tokens that its last queries did not look at are freed, once. Every later query scores
clusters of adjacent keys by one linear function of their channel-wise maxima and minima, opens coarse
clusters, picks fine ones among their children, and attends exactly to the tokens of those. Neighbouring
layers take over each other's choices. All counts follow from lengths alone, so nothing leaks through sizes.
This module is the algorithm on plain tensors; ``static_keep`` sets the bytes held, ``ratios`` what is read
and multiplied.

Deviations, and why:

- The first and the newest cluster are always attended to, and the top ones are taken *beside* them. The paper
  adds them to the top ones, where they may be already, so its number of attended tokens depends on secret
  data.
- The newest cluster is the one that the next token falls into, so the token being generated is always
  attended to; in a pass of several tokens the new ones attend to each other exactly. With fewer than two
  coarse clusters visible all stored tokens are attended to.
- Layers that share choices also share the tokens kept after the prompt, those of the first of them. The paper
  evicts by layer; but then a cluster's number would mean other tokens in every layer, and sharing it would
  mean nothing.
- The newest ``recent`` tokens of the prompt stay. Votes are summed over causal queries, so the last tokens
  are seen by few and would go first, the end of the question among them; ``recent=0`` is the paper's rule.
- With grouped-query attention each query head picks for itself, unless ``share_group``.
- A cluster is summarised when it is full, from the stored keys: the newest, still open, is attended to anyway
  and needs no score. On secret shares its maxima and minima would be updated with every token instead, which
  is what `mpc_cost` prices; the numbers are the same.
- The released code differs in more: its static step keeps what exceeds a threshold on unscaled, uncausal
  attention (a count that depends on data), and it masks instead of gathering.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F

from broadsheet.core.models.taps import Tokens
from broadsheet.core.perf.storage import CacheFormat

from .attention import Slots, attend_slots, attention_mass
from .base import CacheLayer, CacheMethod, Geometry, Unreachable, check_fraction

#: beyond this prompt length half the window votes (released code: 20 % of the prompt, 10 % beyond)
LONG_PROMPT = 24_000
#: elements of keys that one tile of a multi-token pass gathers
TILE = 1 << 22


class Counts(NamedTuple):
    """The public sizes of one pass; they depend on the number of stored tokens alone."""

    coarse: int  #: coarse clusters, the newest (perhaps still empty) one included: G1
    fine: int  #: fine clusters, likewise: G2
    opened: int  #: coarse clusters opened beside the first and the newest
    candidates: int  #: fine clusters in the opened, the first and the newest coarse ones, less first and newest
    picked: int  #: fine clusters picked beside the first and the newest
    tail: int  #: stored tokens in the newest fine cluster

    @property
    def everything(self) -> bool:
        """Whether all clusters are attended to."""
        return self.picked == self.fine - 2


@dataclass
class Store:
    """What rows of equal length hold.

    ``keys``, ``values``: [batch, kv_heads, tokens, head_dim]. ``coarse``, ``fine``: summaries of the full clusters,
    [batch, kv_heads, tokens // size, width], see `MPCache.summarise`; None when nothing is selected.
    """

    keys: torch.Tensor
    values: torch.Tensor
    coarse: torch.Tensor | None = None
    fine: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, method: MPCache) -> Store:
        if not method.selects:
            return cls(keys, values)
        return cls(keys, values, *(method.summarise(keys, size) for size in method.clusters))

    def extend(self, new: Tokens, method: MPCache) -> Store:
        """This store with ``new`` after it; clusters that they fill get their summary."""
        keys, values = torch.cat([self.keys, new.keys], 2), torch.cat([self.values, new.values], 2)
        if self.coarse is None or self.fine is None:
            return Store(keys, values)
        levels = []
        for summary, size in zip((self.coarse, self.fine), method.clusters, strict=True):
            full = summary.shape[2]
            if keys.shape[2] // size > full:
                summary = torch.cat([summary, method.summarise(keys[:, :, full * size :], size)], 2)
            levels.append(summary)
        return Store(keys, values, *levels)


class MPCacheLayer(CacheLayer):
    """Slots in order of position, left-aligned: row b holds ``lengths[b]`` tokens, or all slots (None)."""

    _outside: ClassVar[frozenset[str]] = CacheLayer._outside | {"kept", "picked"}

    method: MPCache
    stored_keys: torch.Tensor  #: [batch, kv_heads, slots, head_dim]
    stored_values: torch.Tensor
    coarse: torch.Tensor | None = None  #: summaries, see `Store`
    fine: torch.Tensor | None = None
    lengths: torch.Tensor | None = None  #: [batch]
    #: tokens that the last query attended to, stored and new, itself included; the same for all heads
    attended: int = 0
    #: choices of this pass for the layers that share them, one entry a `Store`; gone when the last has read
    #: them
    kept: list[torch.Tensor | None] | None = None
    picked: list[torch.Tensor | None] | None = None

    @property
    def stored(self) -> int:
        return self.stored_keys.shape[2] if hasattr(self, "stored_keys") else 0

    def slots(self) -> Slots | None:
        if not self.stored:
            return None
        valid = None
        if self.lengths is not None:
            valid = torch.arange(self.stored, device=self.lengths.device) < self.lengths[:, None, None]
        return Slots(self.stored_keys, self.stored_values, valid)

    # --- the prompt ---------------------------------------------------------------------------------------

    def prefill(self, prompt: Tokens) -> None:
        leader = self._leader()
        shared = leader.kept if leader else None
        kept: list[torch.Tensor | None] = []
        stores = []
        for number, tokens in enumerate(_equal_rows(prompt)):
            kept.append(shared[number] if shared else self._look_once(tokens))
            stores.append(self._store(tokens, kept[-1]))
        self._pass_on("kept", kept, leader)
        self._hold(stores)
        least = min(store.count for store in stores)
        if self.index == 0 and self.method.selects and least + 1 < 2 * self.method.clusters[0]:
            large = self.method.clusters[0]
            warnings.warn(
                f"only {least} tokens are kept, so all are attended to; selection starts at {2 * large}",
                stacklevel=2,
            )

    def _look_once(self, prompt: Tokens) -> torch.Tensor | None:
        """Look-once static eviction: the tokens that stay, ascending [batch, kept]; None: all do.

        a_j sums over the last queries of the prompt the mean over heads of softmax(q_i K^T / sqrt(d))_j; the
        top share of ``static_keep`` stays, the newest ``recent`` tokens in it.
        """
        total = prompt.count
        kept = self.method.kept(total)
        if kept >= total:
            return None
        window = self.method.voters(total)
        votes = attention_mass(prompt, self.module.scaling, slice(total - window, total)).mean((1, 2))
        votes[:, total - min(self.method.recent, kept) :] = float("inf")
        return votes.topk(kept, -1).indices.sort(-1).values

    def _store(self, prompt: Tokens, kept: torch.Tensor | None) -> Store:
        keys, values = prompt.keys.contiguous(), prompt.values.contiguous()
        if kept is not None:
            wide = kept[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values = keys.gather(2, wide), values.gather(2, wide)
        return Store.of(keys, values, self.method)

    # --- tokens that follow -------------------------------------------------------------------------------

    def append(self, new: Tokens) -> None:
        if self.lengths is None and bool(new.valid.all()):
            grown = [(self._whole(), new)]
        else:
            grown = list(zip(self._rows(), _rows(new), strict=True))
        self._hold([store.extend(tokens, self.method) for store, tokens in grown])

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """Exact attention over the clusters picked by each query and head, and the new tokens."""
        leader = self._leader()
        shared = leader.picked if leader else None
        scaling = new.keys.shape[-1] ** -0.5 if scaling is None else scaling
        if self.lengths is None:
            parts = [(self._whole(), new)]
        else:
            parts = list(zip(self._rows(), _rows(new, trim=False), strict=True))
        picked: list[torch.Tensor | None] = []
        outputs = []
        self.attended = 0
        for number, (store, tokens) in enumerate(parts):
            counts = self.method.counts(store.count)
            if store.fine is None or counts.everything:
                picked.append(None)
                stored = Slots(store.keys, store.values)
                outputs.append(attend_slots(self.module, stored, tokens, mask, scaling))
                attended = store.count
            else:
                chosen = shared[number] if shared else None
                chosen = pick(self.method, store, tokens.queries) if chosen is None else chosen
                picked.append(chosen)
                outputs.append(attend_clusters(store, self.method.clusters[1], chosen, tokens, scaling))
                attended = counts.tail + (1 + counts.picked) * self.method.clusters[1]
            self.attended = max(self.attended, attended + new.count)
        self._pass_on("picked", picked, leader)
        return torch.cat(outputs)

    # --- sharing between layers ---------------------------------------------------------------------------

    def _leader(self) -> MPCacheLayer | None:
        """The layer whose choices this one takes over, or None when it makes its own."""
        method = self.method
        if self.index < method.share_from or method.share_span == 1:
            return None
        place = (self.index - method.share_from) % method.share_span
        return cast(MPCacheLayer, self.cache.layers[self.index - place]) if place else None

    def _pass_on(self, name: str, choices: list[torch.Tensor | None], leader: MPCacheLayer | None) -> None:
        """Leaves ``choices`` for the followers, or forgets them after the last follower."""
        method = self.method
        last = (
            self.index < method.share_from
            or (self.index - method.share_from) % method.share_span == method.share_span - 1
            or self.index == len(self.cache.layers) - 1
        )
        setattr(leader or self, name, None if last else choices)

    # --- rows of unequal length ---------------------------------------------------------------------------

    def _whole(self) -> Store:
        return Store(self.stored_keys, self.stored_values, self.coarse, self.fine)

    def _rows(self) -> Iterator[Store]:
        """Each row by itself, without the padding on its right."""
        for row in range(self.stored_keys.shape[0]):
            count = self.stored if self.lengths is None else int(self.lengths[row])
            one = slice(row, row + 1)
            levels = (
                None if summary is None else summary[one, :, : count // size]
                for summary, size in zip((self.coarse, self.fine), self.method.clusters, strict=True)
            )
            yield Store(self.stored_keys[one, :, :count], self.stored_values[one, :, :count], *levels)

    def _hold(self, stores: list[Store]) -> None:
        """Takes over ``stores`` (one for all rows, or one a row) as this layer's state."""
        counts = [store.count for store in stores]
        self.stored_keys = _stack([store.keys for store in stores])
        self.stored_values = _stack([store.values for store in stores])
        for name in ("coarse", "fine"):
            levels = [getattr(store, name) for store in stores]
            setattr(self, name, None if levels[0] is None else _stack(levels))
        self.lengths = None
        if len(set(counts)) > 1:
            self.lengths = torch.tensor(counts, device=self.stored_keys.device)


def pick(method: MPCache, store: Store, queries: torch.Tensor) -> torch.Tensor:
    """Two-level selection: each query's fine clusters beside the first and the newest.

    ``queries``: [batch, heads, n, head_dim]. Returns indices [batch, kv_heads, group, n, picked], ascending.
    """
    counts = method.counts(store.count)
    coarse, fine = store.coarse, store.fine
    assert coarse is not None
    assert fine is not None
    n = queries.shape[2]
    grouped = queries.unflatten(1, (store.keys.shape[1], -1))
    group = grouped.shape[2]
    children = method.clusters[0] // method.clusters[1]

    def scores(summary: torch.Tensor) -> torch.Tensor:
        """Similarity of each query, or of a group's together, with the full clusters of a level."""
        each = method.similarities(grouped.flatten(2, 3), summary).unflatten(2, (group, n))
        return each.sum(2, keepdim=True) if method.share_group else each

    # Level 1. Only full clusters have a summary, so the newest is out already.
    opened = scores(coarse)[..., 1:].topk(counts.opened, -1).indices + 1
    candidates = (opened.unsqueeze(-1) * children + torch.arange(children, device=opened.device)).flatten(-2)
    first = torch.arange(1, children, device=opened.device)
    newest = torch.arange(children * (counts.coarse - 1), counts.fine - 1, device=opened.device)
    always = torch.cat([first, newest]).expand(*candidates.shape[:-1], -1)
    candidates = torch.cat([candidates, always], -1)
    # Level 2. On plain tensors one product with all summaries is cheaper than gathering the candidates'.
    best = scores(fine).gather(-1, candidates).topk(counts.picked, -1).indices
    return candidates.gather(-1, best).sort(-1).values.expand(-1, -1, group, -1, -1)


def attend_clusters(store: Store, size: int, picked: torch.Tensor, new: Tokens, scaling: float) -> torch.Tensor:
    """Softmax over the first, the picked and the newest fine clusters and, causally, the new tokens.

    ``size``: tokens of a fine cluster; ``picked``: [batch, kv_heads, group, n, k] fine clusters of each query.
    Tokens are gathered, in tiles of queries; float32 inside. Returns [batch, n, heads, head_dim].
    """
    batch, kv_heads, group, n, chosen = picked.shape
    dim = store.keys.shape[-1]
    wide = torch.promote_types(new.keys.dtype, torch.float32)
    tail = store.count // size * size
    # What every query sees: no gather.
    keys, values = (
        torch.cat([part.to(wide) for part in (old[:, :, :size], old[:, :, tail:], fresh)], 2)
        for old, fresh in ((store.keys, new.keys), (store.values, new.values))
    )
    causal = torch.ones(n, n, dtype=torch.bool, device=keys.device).tril() & new.valid[:, None, :]
    seen = torch.cat([causal.new_ones(batch, n, keys.shape[2] - n), causal], -1)[:, None, None]
    queries = new.queries.to(wide).reshape(batch, kv_heads, group, n, dim)
    within = torch.arange(size, device=picked.device)
    tile = max(1, TILE // (batch * kv_heads * group * max(chosen, 1) * size * dim))
    outputs = []
    for start in range(0, n, tile):
        stop = min(start + tile, n)
        asked = queries[:, :, :, start:stop]
        places = (picked[:, :, :, start:stop, :, None] * size + within).flatten(2)
        places = places.unsqueeze(-1).expand(-1, -1, -1, dim)
        own_keys, own_values = (
            states.gather(2, places).to(wide).reshape(*asked.shape[:4], chosen * size, dim)
            for states in (store.keys, store.values)
        )
        common = torch.einsum("bhgnd,bhtd->bhgnt", asked, keys)
        common = common.masked_fill(~seen[:, :, :, start:stop], float("-inf"))
        own = torch.einsum("bhgnd,bhgntd->bhgnt", asked, own_keys)
        weights = (torch.cat([common, own], -1) * scaling).softmax(-1)
        shared, single = weights.split([keys.shape[2], chosen * size], -1)
        output = torch.einsum("bhgnt,bhtd->bhgnd", shared, values)
        outputs.append(output + torch.einsum("bhgnt,bhgntd->bhgnd", single, own_values))
    return torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).flatten(2, 3).to(new.queries.dtype)


def recall(method: MPCache, queries: torch.Tensor, keys: torch.Tensor, top: int = 16) -> tuple[float, float]:
    """The shares that the selection opens of the ``top`` tokens with the largest q.k, and of all tokens.

    ``queries`` [batch, heads, n, head_dim]; ``keys`` [batch, kv_heads, T, head_dim], what is stored when they
    ask. Tokens chosen at random would recall the second number.
    """
    store = Store.of(keys, keys, method)
    batch, heads, n, _ = queries.shape
    kv_heads, total = keys.shape[1:3]
    group = heads // kv_heads
    size = method.clusters[1]
    opened = torch.ones(batch, kv_heads, group, n, total, dtype=torch.bool, device=keys.device)
    if not method.counts(total).everything:
        picked = pick(method, store, queries)
        marked = torch.zeros(*picked.shape[:-1], total // size + 1, dtype=torch.bool, device=keys.device)
        marked.scatter_(-1, picked, True)
        marked[..., 0] = marked[..., -1] = True
        opened = marked.repeat_interleave(size, -1)[..., :total]
    scores = torch.einsum("bhgnd,bhtd->bhgnt", queries.float().unflatten(1, (kv_heads, group)), keys.float())
    found = opened.gather(-1, scores.topk(top, -1).indices)
    return float(found.float().mean()), float(opened.float().mean())


@torch.no_grad()
def model_recall(method: MPCache, states: Sequence[Tokens], asking: int = 16, top: int = 16) -> tuple[float, float]:
    """`recall` over the layers of a model, whose ``states`` `observe` gave: the last ``asking`` queries look at the keys
    before them, nothing evicted. Returns the mean recall and the mean share of tokens opened."""
    pairs = [recall(method, layer.queries[:, :, -asking:], layer.keys[:, :, :-asking], top) for layer in states]
    found, opened = zip(*pairs, strict=True)
    return sum(found) / len(found), sum(opened) / len(opened)


@torch.no_grad()
def commonality(method: MPCache, states: Sequence[Tokens], asking: int = 16) -> list[float]:
    """The share of its fine clusters that each layer has in common with the one before, for layers 1, 2, ...

    Only picked clusters count, not the first and the newest. Queries and keys as in `model_recall`.
    """
    marks = []
    for layer in states:
        keys = layer.keys[:, :, :-asking]
        picked = pick(method, Store.of(keys, keys, method), layer.queries[:, :, -asking:])
        marked = torch.zeros(*picked.shape[:-1], method.counts(keys.shape[2]).fine, device=picked.device)
        marks.append(marked.scatter_(-1, picked, 1.0).flatten(1, 2))  # by query head
    return [float((a * b).sum() / b.sum()) for a, b in pairwise(marks)]


def _equal_rows(prompt: Tokens) -> list[Tokens]:
    """The prompt in one piece when no row has padding, else row by row without it."""
    return [prompt] if bool(prompt.valid.all()) else _rows(prompt)


def _rows(tokens: Tokens, trim: bool = True) -> list[Tokens]:
    """Each row by itself; with ``trim`` without its padding."""
    rows = []
    for row in range(tokens.valid.shape[0]):
        parts = {field.name: getattr(tokens, field.name)[row : row + 1] for field in fields(Tokens)}
        if trim and not bool(tokens.valid[row].all()):
            real = tokens.valid[row].nonzero()[:, 0]
            parts = {
                name: part.index_select(2 if name in {"queries", "keys", "values"} else 1, real)
                for name, part in parts.items()
            }
        rows.append(Tokens(**parts))
    return rows


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates along the batch, padding axis 2 on the right."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])


@dataclass(frozen=True)
class MPCache(CacheMethod):
    """Look-once eviction and clustered, two-level dynamic selection.

    Parameters: ``static_keep`` share of the prompt's tokens kept after prefill (tuned by task in the paper;
    0.4 is lossless there on average); ``window`` share of the prompt whose queries vote (halved beyond 24k
    tokens); ``alpha`` weight of the maxima in the linear score; ``clusters`` coarse and fine size in tokens;
    ``ratios`` shares of the coarse and fine clusters chosen (of all there are, beside the first and the
    newest); ``share_span`` layers that share choices, from layer ``share_from`` on; ``similarity`` of query
    and cluster; ``recent`` newest tokens of the prompt that stay in any case; ``share_group`` lets the query
    heads of a KV head choose together, by the sum of their similarities (a choice per KV head is what secret
    sharing would rather pay for).

    Parts off: ``static_keep=1`` no eviction; ``ratios=(1, 1)`` no selection, and no cluster state is held;
    ``ratios=(1, r)`` one level; ``clusters=(1, 1)`` token by token; ``share_span=1`` no sharing;
    ``recent=0`` the paper's votes alone; ``similarity="max"`` the bound that the linear score stands for (as
    in Quest), ``"mean"`` mean-pooled keys (as in InfLLM).

    Raises ValueError for shares outside (0, 1], alpha outside [0, 1] and clusters that do not nest.
    """

    static_keep: float = 0.4
    window: float = 0.2
    alpha: float = 0.6
    clusters: tuple[int, int] = (32, 16)
    ratios: tuple[float, float] = (0.5, 0.2)
    share_span: int = 2
    share_from: int = 2
    similarity: str = "linear"
    recent: int = 16
    share_group: bool = False

    Layer: ClassVar[type[CacheLayer]] = MPCacheLayer

    def __post_init__(self) -> None:
        check_fraction("static_keep", self.static_keep)
        check_fraction("window", self.window)
        for ratio in self.ratios:
            check_fraction("each of ratios", ratio)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {self.alpha}")
        coarse, fine = self.clusters
        if fine < 1 or coarse < fine or coarse % fine:
            raise ValueError(f"clusters must nest (coarse a multiple of fine), got {self.clusters}")
        if self.share_span < 1:
            raise ValueError(f"share_span must be at least 1, got {self.share_span}")
        for name, value in (("share_from", self.share_from), ("recent", self.recent)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if self.similarity not in {"linear", "max", "mean"}:
            raise ValueError(f"similarity must be linear, max or mean, got '{self.similarity}'")

    # --- public sizes -------------------------------------------------------------------------------------

    @property
    def selects(self) -> bool:
        """Whether there is a dynamic selection at all."""
        return tuple(self.ratios) != (1, 1)

    def kept(self, tokens: int) -> int:
        """Tokens of a prompt that stay."""
        return max(1, round(self.static_keep * tokens))

    def voters(self, tokens: int) -> int:
        """Last queries of a prompt that vote in the static step."""
        share = self.window if tokens <= LONG_PROMPT else self.window / 2
        return max(1, _floor(share * tokens))

    def counts(self, stored: int) -> Counts:
        """The sizes of a pass over ``stored`` tokens and a new one."""
        (large, small), (ratio1, ratio2) = self.clusters, self.ratios
        coarse, fine = stored // large + 1, stored // small + 1
        if stored + 1 < 2 * large:
            return Counts(coarse, fine, coarse - 2, fine - 2, fine - 2, stored % small)
        opened = min(_floor(coarse * ratio1), coarse - 2)
        candidates = large // small * (1 + opened) + fine - large // small * (coarse - 1) - 2
        picked = min(_floor(fine * ratio2), candidates)
        return Counts(coarse, fine, opened, candidates, picked, stored % small)

    # --- similarity ---------------------------------------------------------------------------------------

    def summarise(self, keys: torch.Tensor, size: int) -> torch.Tensor:
        """What queries are multiplied with, for every full run of ``size`` adjacent keys.

        ``keys``: [batch, kv_heads, tokens, head_dim]. linear: u_c = alpha * max + (1 - alpha) * min, by channel; max:
        both ends, side by side; mean: the mean. Returns [batch, kv_heads, tokens // size, width], in the keys' dtype.
        """
        runs = keys[:, :, : keys.shape[2] // size * size].unflatten(2, (-1, size))
        if self.similarity == "mean":
            return runs.float().mean(3).to(keys.dtype)
        high, low = runs.amax(3), runs.amin(3)
        if self.similarity == "max":
            return torch.cat([high, low], -1)
        return (self.alpha * high.float() + (1 - self.alpha) * low.float()).to(keys.dtype)

    def similarities(self, queries: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        """One matrix product: queries [..., n, head_dim] with summaries [..., runs, width], float32.

        The max form sum_i max(q_i high_i, q_i low_i) is linear too once the query is split by sign.
        """
        queries = queries.float()
        if self.similarity == "max":
            queries = torch.cat([queries.clamp(min=0), queries.clamp(max=0)], -1)
        return queries @ summary.float().transpose(-1, -2)

    def reading(self, fraction: float, stored: int) -> Self:
        """With the largest fine ratio that attends to at most ``fraction`` of ``stored`` tokens (first and newest included).

        Raises ValueError when the first and the newest cluster alone are more.
        """
        small = self.clusters[1]
        picked = int(fraction * stored) // small - 2
        if picked < 1:
            raise ValueError(f"{fraction} of {stored} tokens are fewer than three clusters of {small}")
        return replace(self, ratios=(self.ratios[0], picked / (stored // small + 1)))

    # --- budget -------------------------------------------------------------------------------------------

    def format(self, geometry: Geometry) -> CacheFormat:
        """Slots, and summaries of clusters."""
        clusters = self.clusters if self.selects else ()
        return CacheFormat(share=self.static_keep, summaries=clusters * (2 if self.similarity == "max" else 1))

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """The largest ``static_keep`` whose slots and cluster state fit; ``ratios`` (what is read) stay.

        At 1 and above the full cache: everything kept, nothing selected.
        """
        if fraction >= 1:
            return replace(self, static_keep=1.0, ratios=(1.0, 1.0))
        kept = self.most_slots(fraction, tokens, geometry)
        if kept < 1:
            smallest = replace(self, static_keep=1 / tokens).expected_bytes(tokens, geometry)
            raise Unreachable(smallest / geometry.full_bytes(tokens))
        return replace(self, static_keep=kept / tokens)


def _floor(value: float) -> int:
    """Rounds down, forgiving what floating point took off a whole number."""
    return math.floor(value + 1e-9)
