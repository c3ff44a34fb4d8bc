"""The shape of a decoder, from any transformers configuration: what operator tables are made of.

A configuration is a dict as ``config.json`` holds it, a ``PreTrainedConfig``, a folder, a hub name, or one of the well-known
models whose shapes ship with the package (``shapes.json``), so that no estimate needs a download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parent / "shapes.json"


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1): the cache holds ``kv_rank + rope_dim``
    numbers a token. ``query_rank`` 0: queries are not compressed."""

    kv_rank: int
    rope_dim: int
    nope_dim: int
    query_rank: int = 0


@dataclass(frozen=True)
class Attention:
    """heads and kv_heads of head_dim (values: value_dim); ``window``: keys a query sees at most, None for all."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    #: weights of the norms of queries and of keys: 0 where there are none
    query_norm: int = 0
    key_norm: int = 0
    #: learned attention sinks, one a head
    sinks: bool = False
    rope: bool = True
    latent: LatentAttention | None = None

    @property
    def kv_width(self) -> int:
        """Numbers that the cache holds for one token in one layer."""
        if self.latent:
            return self.latent.kv_rank + self.latent.rope_dim
        return self.kv_heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Mlp:
    """``intermediate``: of one expert where there are ``experts``, of which every token takes ``active``; ``shared``: the
    width of the experts that every token takes; ``shared_gate``: their output is scaled by a learned gate."""

    intermediate: int
    gated: bool = True
    bias: bool = False
    experts: int = 0
    active: int = 0
    shared: int = 0
    shared_gate: bool = False
    router_bias: bool = False


@dataclass(frozen=True)
class Block:
    """One kind of decoder layer; ``norms``: how many of width hidden."""

    attention: Attention
    mlp: Mlp
    norms: int = 2


@dataclass(frozen=True)
class Architecture:
    """A decoder. ``blocks``: runs of equal layers, (how many, block), in order. ``norm_bias``: LayerNorm, not RMSNorm."""

    name: str
    family: str
    hidden: int
    vocab: int
    blocks: tuple[tuple[int, Block], ...]
    tied: bool = False
    norm_bias: bool = False
    #: rows of the learned position embedding, 0 where there is none
    positions: int = 0
    head_bias: bool = False
    #: tokens that it was made for; None where the configuration does not say
    longest: int | None = None

    @property
    def layers(self) -> int:
        return sum(count for count, _ in self.blocks)

    def kept(self, layers: int) -> Architecture:
        """The first ``layers`` layers: pruned depth, or early exit. Raises ValueError."""
        if not 0 < layers <= self.layers:
            raise ValueError(f"layers is between 1 and {self.layers}; got {layers}")
        blocks, left = [], layers
        for count, block in self.blocks:
            if left:
                blocks.append((min(count, left), block))
                left -= blocks[-1][0]
        return replace(self, blocks=tuple(blocks))

    def grouped(self, kv_heads: int) -> Architecture:
        """The same with other kv heads (1: multi-query attention). Raises ValueError."""

        def changed(block: Block) -> Block:
            if block.attention.latent or block.attention.heads % kv_heads:
                raise ValueError(f"{block.attention.heads} heads cannot share {kv_heads} kv heads: take a divisor")
            return replace(block, attention=replace(block.attention, kv_heads=kv_heads))

        return replace(self, blocks=tuple((count, changed(block)) for count, block in self.blocks))


# --- from a configuration -----------------------------------------------------------------------------------------


def _get(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    if default is None:
        raise ValueError(f"the configuration lacks '{names[0]}'")
    return default


def _dense(config: Mapping[str, Any], **more: Any) -> Attention:
    heads = _get(config, "num_attention_heads", "n_head")
    hidden = _get(config, "hidden_size", "n_embd")
    kv_heads = _get(config, "num_key_value_heads", default=heads)
    dim = _get(config, "head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise ValueError(
            f"{heads} heads cannot share {kv_heads} kv heads: num_attention_heads is a multiple of num_key_value_heads"
        )
    if "head_dim" not in config and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of {heads} heads: give head_dim")
    return Attention(heads, kv_heads, dim, dim, **more)


def _biased(config: Mapping[str, Any]) -> dict[str, bool]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias}


def _llama(config: Mapping[str, Any]) -> Block:
    return Block(
        _dense(config, **_biased(config)), Mlp(_get(config, "intermediate_size"), bias=bool(config.get("mlp_bias", False)))
    )


def _plain(config: Mapping[str, Any]) -> Block:
    """No biases but those of the queries, keys and values (Qwen2)."""
    return Block(_dense(config, qkv_bias=True), Mlp(_get(config, "intermediate_size")))


def _qwen3(config: Mapping[str, Any]) -> Block:
    dim = _get(config, "head_dim", default=128)
    attention = _dense({**config, "head_dim": dim}, query_norm=dim, key_norm=dim, **_biased(config))
    return Block(attention, Mlp(_get(config, "intermediate_size")))


def _olmo2(config: Mapping[str, Any]) -> Block:
    attention = _dense(config, **_biased(config))
    query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    return Block(replace(attention, query_norm=query, key_norm=key), Mlp(_get(config, "intermediate_size")))


def _mixtral(config: Mapping[str, Any]) -> Block:
    experts = _get(config, "num_local_experts", default=8)
    mlp = Mlp(_get(config, "intermediate_size"), experts=experts, active=_get(config, "num_experts_per_tok", default=2))
    return Block(_dense(config), mlp)


def _qwen2_moe(config: Mapping[str, Any]) -> Block:
    mlp = Mlp(
        _get(config, "moe_intermediate_size"), experts=_get(config, "num_experts"),
        active=_get(config, "num_experts_per_tok"), shared=_get(config, "shared_expert_intermediate_size"), shared_gate=True,
    )  # fmt: skip
    return replace(_plain(config), mlp=mlp)


def _qwen3_moe(config: Mapping[str, Any]) -> Block:
    active = _get(config, "num_experts_per_tok", default=8)
    mlp = Mlp(_get(config, "moe_intermediate_size"), experts=_get(config, "num_experts", "num_local_experts"), active=active)
    return replace(_qwen3(config), mlp=mlp)


def _gemma(config: Mapping[str, Any]) -> Block:
    return Block(_dense({"head_dim": 256, **config}, **_biased(config)), Mlp(_get(config, "intermediate_size")))


def _gemma2(config: Mapping[str, Any]) -> Block:
    return replace(_gemma(config), norms=4)


def _gemma3(config: Mapping[str, Any]) -> Block:
    block, dim = _gemma2(config), config.get("head_dim", 256)
    return replace(block, attention=replace(block.attention, query_norm=dim, key_norm=dim))


def _gpt_oss(config: Mapping[str, Any]) -> Block:
    attention = _dense({"head_dim": 64, **config}, qkv_bias=True, out_bias=True, sinks=True)
    experts, active = _get(config, "num_local_experts", default=128), _get(config, "num_experts_per_tok", default=4)
    mlp = Mlp(_get(config, "intermediate_size"), bias=True, experts=experts, active=active, router_bias=True)
    return Block(attention, mlp)


def _deepseek(config: Mapping[str, Any]) -> Block:
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent = LatentAttention(config["kv_lora_rank"], rope, nope, config.get("q_lora_rank") or 0)
    attention = Attention(heads, heads, nope + rope, config["v_head_dim"], latent=latent, **_biased(config))
    experts, width = _get(config, "n_routed_experts"), _get(config, "moe_intermediate_size")
    shared = (config.get("n_shared_experts") or 0) * width
    return Block(attention, Mlp(width, experts=experts, active=_get(config, "num_experts_per_tok"), shared=shared))


def _four(config: Mapping[str, Any]) -> int:
    return _get(config, "n_inner", "intermediate_size", "ffn_dim", default=4 * _get(config, "hidden_size", "n_embd"))


def _gpt2(config: Mapping[str, Any]) -> Block:
    return Block(_dense(config, qkv_bias=True, out_bias=True, rope=False), Mlp(_four(config), gated=False, bias=True))


def _opt(config: Mapping[str, Any]) -> Block:
    bias = bool(config.get("enable_bias", True))
    return Block(_dense(config, qkv_bias=bias, out_bias=bias, rope=False), Mlp(_four(config), gated=False, bias=bias))


def _neox(config: Mapping[str, Any]) -> Block:
    bias = bool(config.get("attention_bias", True))
    return Block(_dense(config, qkv_bias=bias, out_bias=bias), Mlp(_four(config), gated=False, bias=True))


def _gptj(config: Mapping[str, Any]) -> Block:
    return Block(_dense(config), Mlp(_four(config), gated=False, bias=True), norms=1)


def _phi(config: Mapping[str, Any]) -> Block:
    return Block(_dense(config, qkv_bias=True, out_bias=True), Mlp(_four(config), gated=False, bias=True), norms=1)


def _starcoder2(config: Mapping[str, Any]) -> Block:
    bias = bool(config.get("use_bias", True))
    return Block(_dense(config, qkv_bias=bias, out_bias=bias), Mlp(_four(config), gated=False, bias=bias))


@dataclass(frozen=True)
class _Family:
    """How one ``model_type`` reads its configuration; ``tied`` is its default for tie_word_embeddings."""

    block: Callable[[Mapping[str, Any]], Block]
    tied: bool = False
    norm_bias: bool = False
    #: learned positions beyond max_position_embeddings; None: rotary
    positions: int | None = None
    head_bias: bool = False
    #: sliding windows apply where the configuration names one
    window: bool = False


FAMILIES = {
    "llama": _Family(_llama),
    "mistral": _Family(_llama, window=True),
    "mixtral": _Family(_mixtral, window=True),
    "qwen2": _Family(_plain),
    "qwen3": _Family(_qwen3),
    "qwen2_moe": _Family(_qwen2_moe),
    "qwen3_moe": _Family(_qwen3_moe),
    "gemma": _Family(_gemma, tied=True),
    "gemma2": _Family(_gemma2, tied=True, window=True),
    "gemma3_text": _Family(_gemma3, tied=True, window=True),
    "phi3": _Family(_llama, window=True),
    "olmo2": _Family(_olmo2),
    "gpt_oss": _Family(_gpt_oss, window=True),
    "deepseek_v2": _Family(_deepseek),
    "deepseek_v3": _Family(_deepseek),
    "gpt2": _Family(_gpt2, tied=True, norm_bias=True, positions=0),
    "opt": _Family(_opt, tied=True, norm_bias=True, positions=2),
    "gpt_neox": _Family(_neox, norm_bias=True),
    "gptj": _Family(_gptj, norm_bias=True, head_bias=True),
    "phi": _Family(_phi, norm_bias=True, head_bias=True),
    "starcoder2": _Family(_starcoder2, tied=True, norm_bias=True, window=True),
}


def from_config(config: Mapping[str, Any], name: str = "") -> Architecture:
    """The architecture of a configuration's dict (of a vision-language model: of its text part). Raises ValueError."""
    config = config.get("text_config") or config
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise ValueError(f"no operator table for model_type '{kind}'; there is one for {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    layers = _get(config, "num_hidden_layers", "n_layer")
    try:
        block = family.block(config)
    except KeyError as missing:
        raise ValueError(f"the configuration lacks {missing}") from None
    each = [_at(index, block, config, family) for index in range(layers)]
    longest = _get(config, "max_position_embeddings", "n_positions", "n_ctx", default=0) or None
    return Architecture(
        name=name or kind, family=kind, hidden=_get(config, "hidden_size", "n_embd"), vocab=_get(config, "vocab_size"),
        blocks=tuple((len(list(equal)), kept) for kept, equal in groupby(each)),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        norm_bias=family.norm_bias, head_bias=family.head_bias, longest=longest,
        positions=0 if family.positions is None or not longest else longest + family.positions,
    )  # fmt: skip


def _at(index: int, block: Block, config: Mapping[str, Any], family: _Family) -> Block:
    """The layer at ``index``: its window, and a dense MLP where the experts do not begin yet."""
    window = config.get("sliding_window") if family.window or config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds:
        window = window if kinds[index] == "sliding_attention" else None
    elif config.get("model_type") == "gemma2":
        window = window if index % 2 == 0 else None
    elif config.get("model_type") == "gemma3_text":
        window = window if (index + 1) % config.get("sliding_window_pattern", 6) else None
    elif config.get("model_type") == "gpt_oss":
        window = window if index % 2 == 0 else None
    elif config.get("use_sliding_window"):
        window = window if index >= config.get("max_window_layers", 0) else None
    if window:
        block = replace(block, attention=replace(block.attention, window=window))
    dense = index < config.get("first_k_dense_replace", 0) or index in config.get("mlp_only_layers", ())
    sparse_step = config.get("decoder_sparse_step", 1)
    if block.mlp.experts and (dense or (index + 1) % sparse_step):
        block = replace(block, mlp=Mlp(_get(config, "intermediate_size")))
    return block


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Name -> configuration of the models whose shapes ship with the package."""
    return json.loads(SHAPES.read_text(encoding="utf-8"))


def architecture(model: Any) -> Architecture:
    """The architecture of a shipped shape ("llama-2-7b", also by its hub name), a dict, a PreTrainedConfig, a model, a
    ``config.json``, a folder, a built-in model or a hub name. Raises ValueError, naming the nearest."""
    if isinstance(model, Architecture):
        return model
    if isinstance(model, Mapping):
        return from_config(model)
    if hasattr(model, "config") and not isinstance(model, str):
        model = model.config
    if hasattr(model, "to_dict"):
        config = model.get_text_config() if hasattr(model, "get_text_config") else model
        return from_config({**config.to_dict(), "model_type": config.model_type})
    name = str(model)
    path = Path(name)
    if path.suffix == ".json" or (path / "config.json").is_file():
        path = path if path.suffix == ".json" else path / "config.json"
        try:
            return from_config(json.loads(path.read_text(encoding="utf-8")), path.parent.name or path.stem)
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
    known = shapes()
    if name in known:
        return from_config(known[name], name)
    for short, config in known.items():
        if name.lower() in {hub.lower() for hub in config.get("hub", ())}:
            return from_config(config, short)
    from broadsheet.core.models import load_config
    from broadsheet.core.models import pockets as built_in

    if name in built_in() or name.count("/") == 1:
        config = load_config(name)
        return replace(architecture(config), name=name)
    near = get_close_matches(name.lower(), known, 3, 0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"no model '{name}'{hint} Give a shipped shape ({', '.join(known)}), a config.json, a folder or a hub name"
    )
