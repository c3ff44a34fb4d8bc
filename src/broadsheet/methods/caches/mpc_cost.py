"""What one decode step costs when the KV cache is secret-shared between parties (MPCache, arXiv 2501.06807).

Under secure multi-party computation an attention step is paid for in bytes and message rounds, not in FLOPs:
a sum is free, a product costs one exchange, and every comparison, exponential or look-up by a secret index
costs many. `mpc_cost` prices one decode step of a model under an `MPCache`, `cost_ladder` switches its parts on one
after the other, `static_cost` prices the one-off eviction after prefill. Prices of single operators come from
`mpc_prices` (protocols and units there), fitted (``source="model"``) or run now (``source="spu"``). Covered is the
attention of every layer, not the linear layers, which are the same for every cache.

*seconds* = 8 bytes / bandwidth + rounds * RTT + CPU time per party on one core.

``parallel_heads=True`` prices the rounds as if all heads shared one call (the paper patches SPU's top-k to do
that; top-k then waits for its slowest head); ``False`` is what stock SPU does: top-k and matrix products loop
over the heads. Bytes are the same.

How the method is laid out under MPC:

- The sizes are `MPCache.kept` and `MPCache.counts`, the ones that the method itself works with; only they are
  revealed. The first and the newest cluster are always attended, so their position is public and they need no
  gathering.
- With u_c kept per cluster, the similarity of a step is one product; the newest cluster's r_max, r_min, u_c are
  updated once per step. ``similarity="max"`` compares per cluster and channel, as the paper's bound does.
- Two levels: similarities of all fine clusters cost one cheap product, so the children of the chosen coarse
  clusters are gathered as similarities (one number each), not as vectors.
- Gathering is a product with a one-hot matrix built from the secret indices. The one-hot must be converted from
  boolean to arithmetic shares before a product can use it; that conversion is priced.
- Every query head picks and gathers for itself. With ``share_group`` the query heads of a KV head pick once, by
  summed similarities, and a sum is free: top-k, one-hot and gathering are then priced per KV head.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from .mpc_prices import Operator, check_protocol, operator_price, spu_prices

if TYPE_CHECKING:
    from .mpcache import MPCache

Source = Literal["model", "spu"]


@dataclass(frozen=True)
class Network:
    """The link between the parties: Gbit/s of each party, each way; round-trip time in milliseconds."""

    bandwidth_gbps: float
    rtt_ms: float

    def __post_init__(self) -> None:
        if not self.bandwidth_gbps > 0:
            raise ValueError(f"bandwidth_gbps must be above 0, got {self.bandwidth_gbps}")
        if not self.rtt_ms >= 0:
            raise ValueError(f"rtt_ms must be at least 0, got {self.rtt_ms}")

    def seconds(self, sent: float, rounds: float) -> float:
        """Time on the wire for ``sent`` bytes per party in ``rounds`` messages."""
        return sent * 8 / (self.bandwidth_gbps * 1e9) + rounds * self.rtt_ms / 1e3


LAN = Network(bandwidth_gbps=3.0, rtt_ms=0.8)
WAN = Network(bandwidth_gbps=0.1, rtt_ms=40.0)


@dataclass(frozen=True)
class CostRow:
    """One line of a cost table: bytes, rounds and seconds per party, summed over ``calls`` calls."""

    op: str
    calls: int
    bytes: float
    rounds: float
    seconds: float


@dataclass(frozen=True)
class CostTable:
    """The operators of a step, their sums, and where the prices come from."""

    rows: tuple[CostRow, ...]
    protocol: str
    net: Network
    source: Source
    attended: int  #: tokens in the exact softmax, per head

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    @property
    def rounds(self) -> float:
        return sum(row.rounds for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        link = f"{self.net.bandwidth_gbps:g} Gbit/s, RTT {self.net.rtt_ms:g} ms"
        total = CostRow("total", sum(row.calls for row in self.rows), self.bytes, self.rounds, self.seconds)
        lines = [
            f"{self.protocol}, {link}, prices: {self.source}",
            f"{'operator':<40} {'calls':>6} {'MB/party':>10} {'rounds':>10} {'seconds':>9}",
        ]
        for row in (*self.rows, total):
            sizes = f"{row.calls:>6} {row.bytes / 1e6:>10.3f} {row.rounds:>10.0f} {row.seconds:>9.3f}"
            lines.append(f"{row.op:<40} {sizes}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Model:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> _Model:
        """Sizes of a transformers config, or of a mapping with the same names."""
        get = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
        layers, heads = get("num_hidden_layers"), get("num_attention_heads")
        if not layers or not heads:
            raise ValueError("config needs num_hidden_layers and num_attention_heads")
        head_dim = get("head_dim") or (get("hidden_size") or 0) // heads
        if not head_dim:
            raise ValueError("config needs head_dim or hidden_size")
        return cls(layers, heads, get("num_key_value_heads") or heads, head_dim)


def mpc_cost(
    policy: MPCache,
    config: Any,
    seq_len: int,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
    parallel_heads: bool = True,
) -> CostTable:
    """Bytes, rounds and seconds per party of one decode step of a whole model under ``policy``.

    ``config``: a transformers config (or a mapping) with num_hidden_layers, num_attention_heads,
    num_key_value_heads (if fewer) and head_dim or hidden_size. ``seq_len``: tokens seen so far, the one that attends
    among them. When fewer than two coarse clusters are left after the static step, all tokens left are attended
    to, with a warning.

    Raises ValueError for an unknown protocol or source, a bad ``seq_len`` or a config without sizes; RuntimeError
    for source="spu" without an SPU environment.
    """
    return _price(*_step(policy, config, seq_len), protocol, net, source, parallel_heads)


def cost_ladder(
    policy: MPCache,
    config: Any,
    seq_len: int,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
    parallel_heads: bool = True,
) -> dict[str, CostTable]:
    """The ablation ladder: ``policy`` with one part more on every rung, each a decode step of all layers.

    The last rung is not in the paper: the max-form bound for the linear similarity, but by one product with the
    positive and the negative part of q, which compares H * d signs instead of H * d * clusters pairs. The naive
    rung picks as many tokens as the clustered ones (the first and the newest come on top everywhere, so look at
    ``attended``). Raises what `mpc_cost` raises, and ValueError when ``seq_len`` leaves nothing to select from.
    """
    large = policy.clusters[0]
    if policy.kept(seq_len) < 2 * large:
        raise ValueError(f"seq_len {seq_len} keeps fewer than two clusters of {large}; there is no ladder")
    alone = replace(policy, share_span=1, similarity="linear")
    one_level = replace(alone, ratios=(1.0, policy.ratios[1]))
    rungs = {
        "full": replace(alone, static_keep=1.0, ratios=(1.0, 1.0)),
        "+ static": replace(alone, ratios=(1.0, 1.0)),
        "+ naive dynamic": replace(one_level, clusters=(1, 1)),
        "+ clusters": replace(one_level, similarity="max"),
        "+ linear similarity": one_level,
        "+ two levels": alone,
        "+ index sharing": replace(policy, similarity="linear"),
    }
    steps = {name: _step(rung, config, seq_len) for name, rung in rungs.items()}
    steps["max bound by sign"] = _step(replace(policy, similarity="max"), config, seq_len, "sim_max_by_sign")
    return {name: _price(*step, protocol, net, source, parallel_heads) for name, step in steps.items()}


def static_cost(
    policy: MPCache,
    config: Any,
    seq_len: int,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
) -> CostTable:
    """The one-off price of the static eviction after a prefill of ``seq_len`` tokens, for all layers.

    Column sums of the prefill's attention weights are local. One top-k over the tokens, shared by the heads of a
    layer, finds the threshold; one comparison per token gives secret keep bits, whose running sum is each kept
    token's new place; a one-hot of those places moves keys and values of all heads. Only the public count is
    revealed. Layers that share choices share the places too.
    """
    model = _Model.of(config)
    kept = policy.kept(seq_len)
    choose = (
        Operator("topk", seq_len, kept, 1, 0, "top-k tokens"),
        # Two comparisons per entry are priced, one is needed: an upper bound.
        Operator("cluster_update", 0, 0, 1, seq_len, "keep bits"),
        Operator("one_hot_arithmetic", seq_len, kept, 1, 0, "one-hot of the new places"),
    )
    move = Operator("gather", seq_len, kept, 1, 2 * model.kv_heads * model.head_dim, "move keys and values")
    calls = dict.fromkeys(choose, _selecting_layers(policy, model.layers)) | {move: model.layers}
    return _price(calls, kept, protocol, net, source, parallel_heads=True)


# --- the operators of a step ----------------------------------------------------------------------------------


def _step(policy: MPCache, config: Any, seq_len: int, max_form: str = "sim_max") -> tuple[dict[Operator, int], int]:
    """The operators of a decode step, each with its number of calls, and the tokens attended to per head."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    model = _Model.of(config)
    T = policy.kept(seq_len)
    counts = policy.counts(T - 1)
    H, d = model.heads, model.head_dim
    if not policy.selects or counts.everything:
        large = policy.clusters[0]
        if policy.selects and 2 * large > T:
            text = f"{T} tokens are fewer than two clusters of {large}: priced as attention to all"
            warnings.warn(text, stacklevel=3)
        return {Operator("attention", T, 0, H, d, f"attention over {T} tokens"): model.layers}, T
    pickers = model.kv_heads if policy.share_group else H
    large, small = policy.clusters
    children = large // small
    score = max_form if policy.similarity == "max" else "qk"
    two_levels = counts.opened < counts.coarse - 2
    levels = [counts.fine, counts.coarse] if two_levels else [counts.fine]
    select = [Operator(score, n, 0, H, d, f"similarity to {n} clusters") for n in levels]
    if large > 1:
        select += [Operator("cluster_update", 0, 0, model.kv_heads, d, "update newest cluster")] * len(levels)
    if two_levels and counts.opened:
        n = counts.coarse - 2
        select += [
            Operator("topk", n, counts.opened, pickers, 0, "top-k coarse clusters"),
            Operator("one_hot_arithmetic", n, counts.opened, pickers, 0, "one-hot of coarse indices"),
            Operator("gather", n, counts.opened, pickers, children, "similarities of their children"),
        ]
    attend = []
    if counts.picked:
        n, k = counts.candidates, counts.picked
        select += [
            Operator("topk", n, k, pickers, 0, "top-k fine clusters"),
            Operator("one_hot_arithmetic", n, k, pickers, 0, "one-hot of fine indices"),
        ]
        if two_levels:  # which candidate, times which cluster that candidate is
            select.append(Operator("gather", n, k, pickers, counts.fine, "one-hot over all fine clusters"))
        attend.append(Operator("gather", counts.fine, k, pickers, 2 * small * d, "gather clusters"))
    attended = (1 + counts.picked) * small + counts.tail + 1
    attend.append(Operator("attention", attended, 0, H, d, f"attention over {attended} tokens"))
    calls: dict[Operator, int] = {}
    for operators, layers in ((select, _selecting_layers(policy, model.layers)), (attend, model.layers)):
        for operator in operators:
            calls[operator] = calls.get(operator, 0) + layers
    return calls, attended


def _selecting_layers(policy: MPCache, layers: int) -> int:
    """Layers that choose for themselves: all before ``share_from``, then the first of every ``share_span``."""
    return min(layers, policy.share_from) + -(-max(layers - policy.share_from, 0) // policy.share_span)


def _price(
    calls: Mapping[Operator, int],
    attended: int,
    protocol: str,
    net: Network,
    source: Source,
    parallel_heads: bool,
) -> CostTable:
    check_protocol(protocol)
    if source == "spu":
        prices = spu_prices(list(calls), protocol, parallel_heads)
    elif source == "model":
        prices = {operator: operator_price(operator, protocol, parallel_heads) for operator in calls}
    else:
        raise ValueError(f'unknown source {source!r}: use "model" or "spu"')
    rows = []
    for operator, n in calls.items():
        sent, rounds, compute = (n * x for x in prices[operator])
        rows.append(CostRow(operator.label or operator.op, n, sent, rounds, net.seconds(sent, rounds) + compute))
    return CostTable(tuple(rows), protocol, net, source, attended)
