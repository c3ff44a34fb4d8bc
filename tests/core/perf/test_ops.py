"""Operator tables: against real models of every family (weights, operations, cache), and as properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from broadsheet.core.models import with_cache
from broadsheet.core.perf.architecture import FAMILIES, Architecture, Block, architecture, shapes
from broadsheet.core.perf.hardware import Efficiency, device
from broadsheet.core.perf.ops import (
    Op,
    Setting,
    activation_bytes,
    cache_bytes,
    distinct_experts,
    kv_bytes_per_token,
    operators,
    pairs,
    parameters,
    weight_bytes,
)
from broadsheet.core.perf.storage import CacheFormat, cache_format, weight_format

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 160, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "n_routed_experts": 6,
    "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
MORE = {
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "qwen3": {"head_dim": 20},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**EXPERTS, "head_dim": 20},
    "gemma": {"head_dim": 20},
    "gemma2": {"head_dim": 20, "sliding_window": 8},
    "gemma3_text": {"head_dim": 20, "sliding_window": 8},
    "phi3": {"pad_token_id": 0},
    "gpt_oss": {**EXPERTS, "sliding_window": 8, "head_dim": 16},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gptj": {"rotary_dim": 8},
    "starcoder2": {"sliding_window": 8},
}


def small(family: str, **more):
    """A tiny random model of a family."""
    torch.manual_seed(0)
    options = {**SMALL, **MORE.get(family, {}), **more}
    if family in {"gpt2", "gptj"}:
        renamed = {
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
        }  # fmt: skip
        options = {renamed.get(name, name): value for name, value in options.items() if name != "num_key_value_heads"}
    if family in {"phi", "gpt_neox", "opt"}:
        options.pop("num_key_value_heads")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options), attn_implementation="eager").eval()


def unbiased(arch: Architecture) -> Architecture:
    def block(one: Block) -> Block:
        attention = replace(one.attention, qkv_bias=False, out_bias=False)
        return replace(one, attention=attention, mlp=replace(one.mlp, bias=False))

    return replace(arch, head_bias=False, blocks=tuple((count, block(one)) for count, one in arch.blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_holds_the_weights_that_a_real_model_holds(family: str) -> None:
    model = small(family)
    held = sum(p.numel() for p in model.parameters())
    assert parameters(architecture(model.config)) == held
    setting = Setting(context=1, weights=weight_format(32), head_bits=32)
    assert weight_bytes(architecture(model.config), setting) == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek_v2", "deepseek_v3"}))
def test_a_token_grows_the_cache_by_what_a_real_one_grows(family: str) -> None:
    """The latent families' cache in transformers holds expanded keys and values, which is what they were made to avoid."""
    model = small(family)
    arch = architecture(model.config)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(1, 160, (2, 7)), **with_cache(cache), use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    setting = Setting(batch=2, context=7, activation_bits=32)
    assert cache_bytes(arch, setting) == held
    assert kv_bytes_per_token(arch, setting) * 2 * 7 == held


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "phi", "opt", "gptj", "olmo2", "phi3", "deepseek_v2", "deepseek_v3"],
)
def test_prefill_operations_of_matrix_products_are_those_that_torch_counts(family: str) -> None:
    more = (
        {"first_k_dense_replace": 3} if family.startswith("deepseek") else {}
    )  # experts run in kernels that it does not count
    model = small(family, **more)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            part.bias = None  # nor what a bias adds
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(1, 160, (2, 12)))
    counted = counter.get_flop_counts()["Global"]
    arch = unbiased(architecture(model.config))
    table = operators(arch, Setting(batch=2, context=12, all_logits=True, fused=False))
    assert total(table, "linear") == counted[torch.ops.aten.mm] + counted.get(torch.ops.aten.addmm, 0)
    # gemma2's eager mask keeps all 12 keys of a window of 8, and so do we: the window is only skipped by fused kernels
    assert total(table, "attention") == counted[torch.ops.aten.bmm]


def total(table: list[Op], kind: str) -> float:
    return sum(op.count * op.operations for op in table if op.kind == kind)


def test_decode_reads_the_weights_once_and_the_cache_of_every_sequence() -> None:
    arch = architecture("llama-3.1-8b")
    one, many = (operators(arch, Setting(batch=b, context=4096, queries=1)) for b in (1, 8))
    read = [sum(op.count * op.load_weight for op in table if op.kind == "linear") for table in (one, many)]
    assert read[0] == read[1] == weight_bytes(arch) - 2 * (arch.vocab * arch.hidden + arch.hidden * 65)
    caches = [sum(op.count * op.load_kv for op in table) for table in (one, many)]
    assert caches[0] * 8 == caches[1] == 8 * 4096 * kv_bytes_per_token(arch)


def test_absorbed_latent_attention_reads_the_latent_and_costs_less_than_expanding_the_past() -> None:
    arch = architecture("deepseek-v3")
    absorbed, expanded = (operators(arch, Setting(context=8192, queries=1, absorb=a)) for a in (True, False))
    assert sum(op.count * op.load_kv for op in absorbed) == 8192 * kv_bytes_per_token(arch) == 8192 * 61 * 576 * 2
    assert sum(op.count * op.operations for op in absorbed) < 0.2 * sum(op.count * op.operations for op in expanded)


@given(
    st.sampled_from(["llama-3.1-8b", "gemma-2-9b", "llama-2-7b", "gpt-oss-20b", "gemma-3-1b"]),
    st.integers(1, 3),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([4, 8, 16]),
)
@hypothesis_settings(max_examples=150, deadline=None)
def test_fused_attention_never_reads_more_than_unfused(name: str, batch: int, context: int, queries: int, bits: int) -> None:
    setting = Setting(batch=batch, context=context, queries=min(queries, context), cache=cache_format(bits))
    arch = architecture(name)

    def moved(fused: bool) -> tuple[float, float]:
        rows = [op for op in operators(arch, replace(setting, fused=fused)) if op.kind in {"attention", "softmax"}]
        return sum(op.count * op.nbytes for op in rows), sum(op.count * op.operations for op in rows)

    for less, more in zip(moved(True), moved(False), strict=True):
        assert less <= more * (1 + 1e-12)


@given(st.integers(1, 64), st.integers(1, 64), st.none() | st.integers(1, 40), st.sampled_from([1.0, 0.5, 0.25]))
def test_pairs_are_those_that_a_mask_leaves(context: int, queries: int, window: int | None, ratio: float) -> None:
    queries = min(queries, context)
    cache = CacheFormat(share=ratio)
    past = cache.slots(context - queries)
    expected = sum(min(window or context, past + i) for i in range(1, queries + 1))
    found = pairs(Setting(context=context, queries=queries, cache=cache), window)
    assert found == expected


@given(st.integers(2, 64), st.data())
def test_distinct_experts(experts: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, experts))
    assert distinct_experts(experts, active, 1) == pytest.approx(active)
    assert active <= distinct_experts(experts, active, 7) + 1e-9 <= experts + 2e-9


def test_every_shipped_shape_has_the_parameters_of_its_name() -> None:
    billions = {
        "llama-2-7b": 6.738, "llama-2-70b": 68.977, "llama-3.1-8b": 8.030, "llama-3.1-405b": 405.853, "mixtral-8x7b": 46.703,
        "qwen2.5-7b": 7.616, "qwen3-30b-a3b": 30.532, "gemma-2-9b": 9.242, "deepseek-v3": 671.026, "gpt-oss-120b": 116.829,
        "deepseek-v2-lite": 15.706, "phi-2": 2.780, "opt-6.7b": 6.658, "gpt-j-6b": 6.051, "gpt2": 0.124,
    }  # fmt: skip  # as their model cards and safetensors indices give them
    for name, value in billions.items():
        assert parameters(architecture(name)) / 1e9 == pytest.approx(value, abs=6e-4)
    assert all(operators(architecture(name), Setting(context=64)) for name in shapes())


def test_ranks_share_the_work_and_pay_with_a_link() -> None:
    arch = architecture("llama-3.1-70b")
    one, eight = (operators(arch, Setting(context=512, tensor_parallel=t)) for t in (1, 8))
    assert total(one, "linear") == pytest.approx(8 * total(eight, "linear"))
    sent = sum(op.count * op.link_bytes for op in eight)
    assert sent == 2 * 7 / 8 * 512 * arch.hidden * 2 * 2 * arch.layers
    assert all(op.seconds(device("h100")) > 0 for op in eight)
    sixteen = sum(op.count * op.load_kv for op in operators(arch, Setting(context=512, queries=1, tensor_parallel=16)))
    assert sixteen == sum(
        op.count * op.load_kv for op in operators(arch, Setting(context=512, queries=1, tensor_parallel=8))
    )
    with pytest.raises(ValueError, match="has no link"):
        [op.seconds(device("l4")) for op in eight]
    with pytest.raises(ValueError, match="64 heads cannot be shared by 7 ranks"):
        operators(arch, Setting(context=512, tensor_parallel=7))


@pytest.mark.parametrize("name", ["a100", "h100"])
@given(batch=st.integers(1, 40), context=st.integers(1, 3000), queries=st.integers(1, 3000))
@hypothesis_settings(max_examples=40, deadline=None)
def test_time_is_the_roofline_and_grows_with_the_work(name: str, batch: int, context: int, queries: int) -> None:
    setting, on = Setting(batch=batch, context=context, queries=min(queries, context)), device(name).rated()
    arch = architecture("llama-3.2-1b")
    for op in operators(arch, setting):
        expected = max(op.operations / on.peak(op.dtype), op.nbytes / on.bandwidth)
        assert op.seconds(on) == pytest.approx(expected)
        assert (op.bound(on) == "memory") == (op.intensity < on.turning_point(op.dtype))
    seconds = lambda s, d: sum(op.count * op.seconds(d) for op in operators(arch, s))  # noqa: E731
    assert seconds(replace(setting, batch=batch + 1), on) >= seconds(setting, on)
    longer = replace(setting, context=context + 7, queries=setting.new + 7)
    assert seconds(longer, on) >= seconds(setting, on)
    assert seconds(setting, replace(on, bandwidth=2 * on.bandwidth)) <= seconds(setting, on)
    assert seconds(setting, replace(on, peaks={k: 2 * v for k, v in on.peaks.items()})) <= seconds(setting, on)
    slower = replace(on, efficiency=Efficiency(0.7, 0.8, 1e-6))
    assert seconds(setting, slower) > seconds(setting, on)


def test_nothing_takes_no_time() -> None:
    assert device("a100").seconds(0, 0, "bf16") == 0
    assert Op("x", "linear").intensity == 0


def test_rewrites() -> None:
    arch = architecture("llama-3.1-8b")
    assert kv_bytes_per_token(arch.grouped(1)) * 8 == kv_bytes_per_token(arch)
    assert arch.kept(8).layers == 8
    half = operators(arch, Setting(context=4097, queries=1, cache=cache_format("snapkv:share=0.5")))
    assert sum(op.load_kv * op.count for op in half) == 2049 * kv_bytes_per_token(arch)
    assert activation_bytes(half) > 0
    windowed = architecture("mistral-7b")
    assert cache_bytes(windowed, Setting(context=8192)) == 4096 * kv_bytes_per_token(windowed)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"batch": 0}, "batch is a whole number of at least 1"),
        ({"context": -5}, "context is a whole number"),
        ({"head_bits": 64}, "head_bits is between 1 and 32"),
        ({"queries": 4000}, "queries is between 1 and the context"),
    ],
)
def test_bad_settings_say_what_is_wrong(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Setting(**wrong)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "rwkv"}, "no operator table for model_type 'rwkv'; there is one for llama"),
        ({"model_type": "llama", **SMALL, "num_key_value_heads": 3}, "4 heads cannot share 3 kv heads"),
        ({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}, "lacks 'num_attention_heads'"),
        ("lama-2-7b", "did you mean llama-2-7b"),
        ("./nothing.json", "cannot read"),
    ],
)
def test_bad_architectures_say_what_is_wrong(config: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        architecture(config)
