"""The operator table of a decoder: operations and bytes of every operator of one forward pass, by origin.

Notation: b sequences, n new tokens of each, s keys that the last of them sees (prefill: n = s; decode: n = 1), h hidden, H
query heads and K kv heads of size d, t tensor-parallel ranks. Operations count a multiply-add as two. Bytes are what has to
pass between memory and units once: weights, activations read and written, cache read and written; an operator's output is
written and read again by the next unless an attention kernel is fused. All rows are per rank.

This is what every method of the toolkit changes: weights and cache stored otherwise (`core.perf.storage`, which the methods
count by too), fused attention, other heads (`Architecture.grouped`), fewer layers (`Architecture.kept`), more tokens a pass
(``queries``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .architecture import Architecture, Attention, Block, LatentAttention, Mlp
from .hardware import Device
from .storage import EXACT, EXACT_WEIGHT, CacheFormat, GroupedWeight, Stream, WeightFormat, plain

Kind = Literal["embedding", "norm", "linear", "rope", "attention", "softmax", "elementwise", "collective"]


@dataclass(frozen=True)
class Setting:
    """One forward pass and the formats of its numbers.

    Attributes:
        batch: sequences.
        context: keys that the last new token sees, itself included.
        queries: new tokens a sequence; None: all of the context (prefill). 1 is a decode step, 1 + gamma a verification.
        weights: how linear layers in blocks are stored. head_bits: of embeddings, head and norms.
        activation_bits: of activations. cache: how keys and values are stored (None: as activations).
        fused: attention in one kernel (FlashAttention): no score matrix in memory, and masked blocks are skipped.
        absorb: latent attention works on the latent cache itself where that is cheaper (every pass but prefill).
        all_logits: the head sees every position, not only the last.
        tensor_parallel: ranks that share heads and MLP columns; two all-reduces a layer.
    """

    batch: int = 1
    context: int = 2048
    queries: int | None = None
    weights: WeightFormat = EXACT_WEIGHT
    head_bits: float = 16
    activation_bits: float = 16
    cache: CacheFormat | None = None
    fused: bool = True
    absorb: bool = True
    all_logits: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "context", "tensor_parallel"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a whole number of at least 1; got {value!r}")
        for name in ("head_bits", "activation_bits"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 1 <= value <= 32):
                raise ValueError(f"{name} is between 1 and 32; got {value!r}")
        if self.queries is not None and not (isinstance(self.queries, int) and 1 <= self.queries <= self.context):
            raise ValueError(f"queries is between 1 and the context of {self.context}; got {self.queries!r}")

    @property
    def new(self) -> int:
        """Tokens that a sequence puts through."""
        return self.context if self.queries is None else self.queries

    @property
    def head_bytes(self) -> float:
        return self.head_bits / 8

    @property
    def activation_bytes(self) -> float:
        return self.activation_bits / 8

    @property
    def stored(self) -> CacheFormat:
        """How the cache is stored."""
        if self.cache:
            return self.cache
        stream = Stream(EXACT if self.activation_bits == 16 else plain(self.activation_bits))
        return CacheFormat(stream, stream)

    @property
    def past(self) -> int:
        """Slots that the new tokens find in the cache."""
        return self.stored.slots(self.context - self.new)

    @property
    def linear_dtype(self) -> str:
        """The rate linear layers run at: 8-bit units need 8-bit weights and activations (W4A16 is dequantised first)."""
        return _dtype(max(self.weights.bits, self.activation_bits))

    @property
    def attention_dtype(self) -> str:
        return _dtype(max(self.activation_bits, self.stored.bits))


def _dtype(bits: float) -> str:
    return "int8" if bits <= 8 else "bf16" if bits <= 16 else "fp32"


@dataclass(frozen=True)
class Op:
    """One operator of one layer, per rank; ``count`` is how often it runs (in so many layers, times so many steps).

    operations: multiply-adds count twice. load_weight .. store_kv: bytes. link_bytes: bytes that leave the rank.
    weight_held: bytes of all its weights (a lookup reads a few rows, a step the chosen experts). inputs: names of those it
    waits for.
    """

    name: str
    kind: Kind
    operations: float = 0.0
    load_weight: float = 0.0
    load_act: float = 0.0
    store_act: float = 0.0
    load_kv: float = 0.0
    store_kv: float = 0.0
    link_bytes: float = 0.0
    weight_held: float = 0.0
    dtype: str = "bf16"
    count: float = 1
    layers: str = ""
    inputs: tuple[str, ...] = field(default=(), compare=False)

    @property
    def nbytes(self) -> float:
        """Bytes between memory and units."""
        return self.load_weight + self.load_act + self.store_act + self.load_kv + self.store_kv

    @property
    def intensity(self) -> float:
        """Operations a byte; 0 where no bytes are moved."""
        return self.operations / self.nbytes if self.nbytes else 0.0

    def seconds(self, device: Device) -> float:
        """Time of one on ``device``: the roofline; a collective takes its link's time. Raises ValueError without a link."""
        if self.kind == "collective":
            if not device.link:
                raise ValueError(f"{device.name} has no link to a peer: tensor_parallel is 1 on it")
            return self.link_bytes / device.link + device.efficiency.overhead
        return device.seconds(self.operations, self.nbytes, self.dtype)

    def bound(self, device: Device) -> str:
        """What its time is made of: memory, compute, link or overhead."""
        if self.kind == "collective":
            return "link"
        e = device.efficiency
        memory = self.nbytes / (e.memory * device.bandwidth)
        compute = self.operations / (e.compute * device.peak(self.dtype)) if self.operations else 0.0
        if e.overhead > max(memory, compute):
            return "overhead"
        return "memory" if memory > compute else "compute"


def operators(arch: Architecture, setting: Setting) -> list[Op]:
    """The table of one forward pass, in the order it runs: embedding, every run of equal layers once, final norm, head."""
    t = setting.tensor_parallel
    if arch.vocab % t and t > 1:
        arch = replace(arch, vocab=-(-arch.vocab // t) * t)  # padded, as every engine does
    tokens = setting.batch * setting.new
    ba, bh = setting.activation_bytes, setting.head_bytes
    held = arch.vocab * arch.hidden * bh / t
    row = arch.hidden * bh
    positions = arch.positions * row
    table = [
        Op(
            "embedding", "embedding", operations=tokens * arch.hidden * bool(arch.positions),
            load_weight=tokens * row * (1 + bool(arch.positions)), store_act=tokens * arch.hidden * ba,
            weight_held=held + positions, dtype=setting.attention_dtype,
        )
    ]  # fmt: skip
    before, first = "embedding", 0
    for count, block in arch.blocks:
        rows = _block(arch, block, setting, before)
        label = (
            "all layers"
            if count == arch.layers
            else f"layer {first}"
            if count == 1
            else f"layers {first} to {first + count - 1}"
        )
        table += [replace(op, count=count, layers=label) for op in rows]
        before, first = rows[-1].name, first + count
    table.append(_norm("final_norm", arch, tokens, setting, before))
    table.append(_head(arch, setting))
    return table


def _linear(
    name: str,
    width: int,
    out: int,
    tokens: float,
    setting: Setting,
    inputs: tuple[str, ...],
    bias: bool = False,
    stored: float = -1.0,
) -> Op:
    """``width`` -> ``out``; ``stored``: bytes of the output that go to the cache instead of to activations."""
    ba = setting.activation_bytes
    weights = setting.weights.nbytes(out, width) + out * bias * setting.head_bytes
    return Op(
        name, "linear", operations=2 * width * out * tokens + out * bias * tokens, load_weight=weights,
        load_act=width * tokens * ba, store_act=out * tokens * ba if stored < 0 else 0.0, store_kv=max(stored, 0.0),
        weight_held=weights, dtype=setting.linear_dtype, inputs=inputs,
    )  # fmt: skip


def _norm(name: str, arch: Architecture, tokens: float, setting: Setting, before: str, width: int = 0, count: int = 1) -> Op:
    """Seven operations an element (paper, section 3.1): sum, subtract, square, sum, divide, multiply, add."""
    weights = (width or arch.hidden) * (1 + (arch.norm_bias and not width)) * setting.head_bytes
    numbers = (width or arch.hidden) * tokens * count
    ba = setting.activation_bytes
    return Op(
        name, "norm", operations=7 * numbers, load_weight=weights, load_act=numbers * ba, store_act=numbers * ba,
        weight_held=weights, dtype=setting.attention_dtype, inputs=(before,),
    )  # fmt: skip


def _elementwise(name: str, numbers: float, each: float, reads: int, setting: Setting, inputs: tuple[str, ...]) -> Op:
    ba = setting.activation_bytes
    return Op(
        name, "elementwise", operations=each * numbers, load_act=reads * numbers * ba, store_act=numbers * ba,
        dtype=setting.attention_dtype, inputs=inputs,
    )  # fmt: skip


def _head(arch: Architecture, setting: Setting) -> Op:
    """lm_head: of the last position only, unless ``all_logits``. Tied weights are read again and held once."""
    tokens = setting.batch * (setting.new if setting.all_logits or setting.new < setting.context else 1)
    out, ba = arch.vocab // setting.tensor_parallel, setting.activation_bytes
    weights = arch.hidden * out * setting.head_bytes + out * arch.head_bias * setting.head_bytes
    bits = max(setting.head_bits, setting.activation_bits)
    return Op(
        "lm_head", "linear", operations=2 * arch.hidden * out * tokens + out * arch.head_bias * tokens, load_weight=weights,
        load_act=arch.hidden * tokens * ba, store_act=out * tokens * ba, dtype=_dtype(bits), inputs=("final_norm",),
        weight_held=out * arch.head_bias * setting.head_bytes if arch.tied else weights,
    )  # fmt: skip


def _block(arch: Architecture, block: Block, setting: Setting, before: str) -> list[Op]:
    """One layer. With one norm attention and MLP stand side by side (GPT-J, Phi), else one after the other."""
    tokens = setting.batch * setting.new
    rows = [_norm("attn_norm", arch, tokens, setting, before)]
    rows += _attention(arch, block.attention, setting, "attn_norm")
    if block.norms == 4:
        rows.append(_norm("attn_post_norm", arch, tokens, setting, rows[-1].name))
    rows.append(_elementwise("attn_add", arch.hidden * tokens, 1, 2, setting, (before, rows[-1].name)))
    entry = "attn_norm"
    if block.norms > 1:
        rows.append(_norm("mlp_norm", arch, tokens, setting, "attn_add"))
        entry = "mlp_norm"
    rows += _mlp(arch, block.mlp, setting, entry)
    if block.norms == 4:
        rows.append(_norm("mlp_post_norm", arch, tokens, setting, rows[-1].name))
    rows.append(_elementwise("mlp_add", arch.hidden * tokens, 1, 2, setting, ("attn_add", rows[-1].name)))
    return rows


def _split(what: str, number: int, ranks: int) -> int:
    if number % ranks:
        raise ValueError(f"{number} {what} cannot be shared by {ranks} ranks: tensor_parallel divides them")
    return number // ranks


def _attention(arch: Architecture, attention: Attention, setting: Setting, before: str) -> list[Op]:
    t, tokens = setting.tensor_parallel, setting.batch * setting.new
    heads = _split("heads", attention.heads, t)
    if attention.latent:
        rows = _latent(arch, attention, attention.latent, heads, setting, before)
    else:
        kv_heads = max(1, attention.kv_heads // t)  # more ranks than kv heads hold copies of them
        q, kv, v = heads * attention.head_dim, kv_heads * attention.head_dim, kv_heads * attention.value_dim
        bias, bk = attention.qkv_bias, _number_bytes(attention, setting)
        rows = [
            _linear("q_proj", arch.hidden, q, tokens, setting, (before,), bias),
            _linear("k_proj", arch.hidden, kv, tokens, setting, (before,), bias, stored=kv * tokens * bk),
            _linear("v_proj", arch.hidden, v, tokens, setting, (before,), bias, stored=v * tokens * bk),
        ]
        query, key = "q_proj", "k_proj"
        if attention.query_norm:
            whole = attention.query_norm != attention.head_dim
            widths = (attention.query_norm, attention.key_norm)
            rows.append(_norm("q_norm", arch, tokens, setting, query, widths[0], 1 if whole else heads))
            rows.append(_norm("k_norm", arch, tokens, setting, key, widths[1], 1 if whole else kv_heads))
            query, key = "q_norm", "k_norm"
        if attention.rope:
            rows.append(replace(_elementwise("rope", (q + kv) * tokens, 3, 1, setting, (query, key)), kind="rope"))
            query = key = "rope"
        rows += _scores(attention.heads // t, kv_heads, attention, setting, (query, key, "v_proj"))
    out = heads * attention.value_dim
    rows.append(_linear("o_proj", out, arch.hidden, tokens, setting, (rows[-1].name,), attention.out_bias))
    if t > 1:
        rows.append(_all_reduce("attn_all_reduce", arch.hidden * tokens, setting, "o_proj"))
    return rows


def keys_read(setting: Setting, window: int | None) -> float:
    """Keys of a sequence that a pass reads: the kept part of the past and the new ones, as far as windows reach."""
    return min(setting.past + setting.new, (window or setting.context) + setting.new - 1)


def pairs(setting: Setting, window: int | None) -> float:
    """(query, key) pairs of one head of one sequence. A fused kernel skips what is masked: query i of the new ones meets
    min(window, past + i) keys. Otherwise all new queries meet all keys that are there, and a mask is laid over."""
    n, limit = setting.new, window or setting.context
    if not setting.fused:
        return n * keys_read(setting, window)
    past = setting.past
    short = min(n, max(0, limit - past))  # queries that meet less than a full window
    return short * past + short * (short + 1) / 2 + (n - short) * limit


def _scores(heads: int, kv_heads: int, attention: Attention, setting: Setting, inputs: tuple[str, ...]) -> list[Op]:
    """Queries against keys, softmax (five operations: max, subtract, exp, sum, divide), times values."""
    b, n, ba, dtype = setting.batch, setting.new, setting.activation_bytes, setting.attention_dtype
    bk = _number_bytes(attention, setting)
    d, v = attention.head_dim, attention.value_dim
    met = b * heads * pairs(setting, attention.window)
    read = keys_read(setting, attention.window)
    sinks = attention.sinks * heads * setting.head_bytes
    queries, out = b * n * heads * d * ba, b * n * heads * v * ba
    if setting.fused:
        # FlashAttention-2 (arXiv 2307.08691): a block of query rows stays on chip while keys and values stream past it, so
        # they are read once a block; with a causal mask a block sees half of them on average. Shared kv heads are read once.
        blocks = -(-n // max(128, d))
        part = (blocks + 1) / (2 * blocks) if n == setting.context else 1.0
        load = b * read * kv_heads * (d + v) * bk * blocks * part
        return [
            Op(
                "attention", "attention", operations=met * (2 * d + 2 * v + 5), load_act=queries, store_act=out,
                load_kv=load, load_weight=sinks, weight_held=sinks, dtype=dtype, inputs=inputs,
            )
        ]  # fmt: skip
    scores, keys = met * ba, b * read * kv_heads * bk
    return [
        Op(
            "qk_matmul", "attention", operations=2 * d * met, load_act=queries, store_act=scores, load_kv=keys * d,
            dtype=dtype, inputs=inputs[:2],
        ),
        Op(
            "softmax", "softmax", operations=5 * met, load_act=scores, store_act=scores, load_weight=sinks,
            weight_held=sinks, dtype=dtype, inputs=("qk_matmul",),
        ),
        Op(
            "sv_matmul", "attention", operations=2 * v * met, load_act=scores, store_act=out, load_kv=keys * v, dtype=dtype,
            inputs=("softmax", inputs[2]),
        ),
    ]  # fmt: skip


def _latent(
    arch: Architecture, attention: Attention, latent: LatentAttention, heads: int, setting: Setting, before: str
) -> list[Op]:
    """Latent attention (arXiv 2405.04434, section 2.1.2 and appendix C). Prefill expands keys and values of all tokens;
    other passes absorb the expansion into queries and outputs and attend to the latent itself, shared by all heads."""
    tokens, bk = setting.batch * setting.new, _number_bytes(attention, setting)
    width, bias = latent.kv_rank + latent.rope_dim, attention.qkv_bias
    rows: list[Op] = []
    source = before
    if latent.query_rank:
        rows.append(_linear("q_a_proj", arch.hidden, latent.query_rank, tokens, setting, (before,), bias))
        rows.append(_norm("q_a_norm", arch, tokens, setting, "q_a_proj", latent.query_rank))
        source = "q_a_norm"
    rows.append(_linear("q_proj", latent.query_rank or arch.hidden, heads * attention.head_dim, tokens, setting, (source,)))
    rows.append(_linear("kv_a_proj", arch.hidden, width, tokens, setting, (before,), bias))
    rows.append(_norm("kv_a_norm", arch, tokens, setting, "kv_a_proj", latent.kv_rank))
    rotated = (heads + 1) * latent.rope_dim * tokens
    rope = _elementwise("rope", rotated, 3, 1, setting, ("q_proj", "kv_a_proj"))
    rows.append(replace(rope, kind="rope", store_kv=width * tokens * bk))
    expand = latent.nope_dim + attention.value_dim
    if setting.new == setting.context or not setting.absorb:
        every = setting.batch * setting.context
        up = _linear("kv_b_proj", latent.kv_rank, heads * expand, every, setting, ("kv_a_norm",))
        rows.append(replace(up, load_kv=(setting.context - setting.new) * setting.batch * width * bk))
        rows += _scores(heads, heads, attention, setting, ("rope", "kv_b_proj", "kv_b_proj"))
        return rows
    rows.append(_each_head("q_absorb", heads, latent.nope_dim, latent.kv_rank, setting, "rope"))
    seen = replace(attention, head_dim=width, value_dim=latent.kv_rank)
    scores = _scores(heads, 1, seen, setting, ("q_absorb", "kv_a_norm", "kv_a_norm"))
    # the latent is key and value at once: one read serves both
    rows += [replace(op, load_kv=op.load_kv * width / (width + latent.kv_rank)) if setting.fused else op for op in scores]
    rows.append(_each_head("v_expand", heads, latent.kv_rank, attention.value_dim, setting, rows[-1].name))
    return rows


def _each_head(name: str, heads: int, width: int, out: int, setting: Setting, before: str) -> Op:
    """A matrix of its own for every head."""
    op = _linear(name, width, heads * out, setting.batch * setting.new, setting, (before,))
    return replace(op, load_act=op.load_act * heads)


def _mlp(arch: Architecture, mlp: Mlp, setting: Setting, before: str) -> list[Op]:
    t, tokens = setting.tensor_parallel, setting.batch * setting.new
    if mlp.experts:
        rows = _experts(arch, mlp, setting, before)
    else:
        width = _split("MLP columns", mlp.intermediate, t)
        rows = _feed_forward("", arch, width, mlp, tokens, setting, before)
    if t > 1:
        rows.append(_all_reduce("mlp_all_reduce", arch.hidden * tokens, setting, rows[-1].name))
    return rows


def _feed_forward(
    prefix: str, arch: Architecture, width: int, mlp: Mlp, tokens: float, setting: Setting, before: str
) -> list[Op]:
    rows = [_linear(f"{prefix}up_proj", arch.hidden, width, tokens, setting, (before,), mlp.bias)]
    if mlp.gated:
        rows.insert(0, _linear(f"{prefix}gate_proj", arch.hidden, width, tokens, setting, (before,), mlp.bias))
    names = tuple(op.name for op in rows)
    rows.append(_elementwise(f"{prefix}mlp_act", width * tokens, 1 + mlp.gated, 1 + mlp.gated, setting, names))
    rows.append(_linear(f"{prefix}down_proj", width, arch.hidden, tokens, setting, (f"{prefix}mlp_act",), mlp.bias))
    return rows


def distinct_experts(experts: int, active: int, tokens: float) -> float:
    """Experts that ``tokens`` tokens meet, each with ``active`` of them: E (1 - (1 - k/E)^tokens), under even routing."""
    return experts * (1 - (1 - active / experts) ** tokens)


def expert_op(arch: Architecture, mlp: Mlp, loads: Sequence[int] | NDArray[np.integer], setting: Setting) -> Op:
    """The experts of one rank in one layer as one operator: ``loads`` [its experts] tokens each, as a trace has them
    (`core.perf.routing`), instead of even routing. A token pays for the products of its expert; the weights of every expert
    that has a token are read once, however many it has."""
    tokens, met = int(np.sum(loads)), int(np.count_nonzero(loads))
    rows = [op for op in _feed_forward("", arch, mlp.intermediate, mlp, tokens, setting, "") if op.kind == "linear"]
    weights = sum(op.weight_held for op in rows)
    return Op(
        "experts", "linear", operations=sum(op.operations for op in rows), load_weight=met * weights,
        load_act=sum(op.load_act for op in rows), store_act=sum(op.store_act for op in rows),
        weight_held=len(loads) * weights, dtype=setting.linear_dtype,
    )  # fmt: skip


def _experts(arch: Architecture, mlp: Mlp, setting: Setting, before: str) -> list[Op]:
    """Every token pays for its own experts' operations; a step reads the experts that its tokens meet together."""
    t, tokens = setting.tensor_parallel, setting.batch * setting.new
    router = replace(setting, weights=GroupedWeight(plain(setting.head_bits)))
    rows = [_linear("router", arch.hidden, mlp.experts, tokens, router, (before,), mlp.router_bias)]
    width = _split("expert columns", mlp.intermediate, t)
    met = distinct_experts(mlp.experts, mlp.active, tokens)
    for op in _feed_forward("expert_", arch, width, mlp, tokens * mlp.active, setting, "router"):
        rows.append(replace(op, load_weight=op.load_weight * met, weight_held=op.weight_held * mlp.experts))
    rows.append(_elementwise("expert_sum", arch.hidden * tokens * mlp.active, 2, 1, setting, ("expert_down_proj",)))
    if mlp.shared:
        rows += _feed_forward("shared_", arch, _split("shared columns", mlp.shared, t), mlp, tokens, setting, before)
        if mlp.shared_gate:
            rows.append(_linear("shared_gate", arch.hidden, 1, tokens, router, (before,)))
        rows.append(_elementwise("shared_add", arch.hidden * tokens, 1, 2, setting, ("expert_sum", "shared_down_proj")))
    return rows


def _all_reduce(name: str, numbers: float, setting: Setting, before: str) -> Op:
    """A ring: every rank sends 2 (t-1)/t of the activations."""
    t, size = setting.tensor_parallel, numbers * setting.activation_bytes
    return Op(name, "collective", load_act=size, store_act=size, link_bytes=2 * (t - 1) / t * size, inputs=(before,))


# --- what a model holds -------------------------------------------------------------------------------------------


def weight_bytes(arch: Architecture, setting: Setting | None = None) -> float:
    """Bytes of all weights of one rank; tied embeddings once."""
    return sum(op.weight_held * op.count for op in operators(arch, setting or Setting(context=1)))


def parameters(arch: Architecture) -> int:
    """Weights, tied ones once."""
    return round(weight_bytes(arch, Setting(context=1)) / 2)


def cache_bytes(arch: Architecture, setting: Setting) -> float:
    """Bytes of the cache of one rank with ``context`` tokens of every sequence; a window holds no more than its keys."""
    return setting.batch * sum(count * _layer_bytes(block.attention, setting) for count, block in arch.blocks)


def kv_bytes_per_token(arch: Architecture, setting: Setting | None = None) -> float:
    """Bytes that an exact cache of one rank grows by with each token (2·L·K·d·Bk), as long as no window is full."""
    return cache_bytes(arch, replace(setting or Setting(), batch=1, context=1, queries=None, cache=None))


def _layer_bytes(attention: Attention, setting: Setting) -> float:
    """Bytes of one layer's cache of one sequence. More ranks than kv heads hold copies of them; latents are never split."""
    tokens = min(setting.context, attention.window or setting.context)
    if attention.latent:
        return setting.stored.layer_bytes(tokens, 1, attention.kv_width, 0)
    heads = max(1, attention.kv_heads // setting.tensor_parallel)
    return setting.stored.layer_bytes(tokens, heads, attention.head_dim, attention.value_dim)


def _number_bytes(attention: Attention, setting: Setting) -> float:
    """Bytes of one of the numbers that a layer's full cache stands for, with its part of all that is stored besides."""
    slots = setting.stored.slots(min(setting.context, attention.window or setting.context))
    heads = max(1, attention.kv_heads // setting.tensor_parallel)
    width = attention.kv_width if attention.latent else heads * (attention.head_dim + attention.value_dim)
    return _layer_bytes(attention, setting) / (max(slots, 1) * width)


def activation_bytes(table: Iterable[Op]) -> float:
    """Most bytes of activations that are alive at once: the largest operator's input and output, and the residual."""
    table = list(table)
    residual = max((op.store_act for op in table if op.name == "mlp_add"), default=0.0)
    return residual + max(op.load_act + op.store_act for op in table)
