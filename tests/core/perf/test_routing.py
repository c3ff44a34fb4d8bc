"""Routing traces and what they cost: counts by hand, against the operator table, and against a real model's router."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from broadsheet.core.perf.architecture import architecture
from broadsheet.core.perf.hardware import device
from broadsheet.core.perf.ops import Setting, distinct_experts, expert_op, operators
from broadsheet.core.perf.routing import (
    Links,
    RoutingTrace,
    contiguous,
    dispatch,
    expert_parallel,
    imbalance,
)


def even(experts: int, active: int, tokens: int, layers: int = 2) -> RoutingTrace:
    roll = np.random.default_rng(0)
    ids = roll.random((layers, tokens, experts)).argsort(-1)[..., :active]
    place = np.arange(tokens)
    return RoutingTrace(experts, ids, np.full(ids.shape, 1 / active), place // 64, place % 64)


def test_even_routing_meets_the_experts_of_the_formula() -> None:
    trace = even(8, 2, 4096)
    for batch in (1, 4, 16):
        assert trace.distinct(batch) == pytest.approx(distinct_experts(8, 2, batch), rel=0.02)
    assert trace.loads().sum() == trace.ids.size
    with pytest.raises(ValueError, match="a batch of 5000 tokens, of a trace of 4096"):
        trace.distinct(5000)


def test_a_trace_comes_back_from_its_file_and_nothing_else_does(tmp_path: Path) -> None:
    trace, path = even(8, 2, 32), tmp_path / "trace.npz"
    trace.save(path)
    again = RoutingTrace.load(path)
    assert all(np.array_equal(getattr(trace, name), getattr(again, name)) for name in ("ids", "weights", "sequence"))
    path.write_bytes(b"not a trace")
    with pytest.raises(ValueError, match="is no routing trace"):
        RoutingTrace.load(path)
    np.savez(path, experts=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="is no routing trace"):
        RoutingTrace.load(path)
    with pytest.raises(ValueError, match="ids are 0 to 7, or 8 for none"):
        RoutingTrace(8, trace.ids + 5, trace.weights, trace.sequence, trace.position)


def test_a_router_s_choices_are_counted_as_they_are() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.no_grad():
        logits = MixtralForCausalLM(config)(torch.randint(1, 64, (3, 10)), output_router_logits=True).router_logits
    weights, ids = torch.stack(logits).softmax(-1).topk(2)
    place = np.arange(30)
    trace = RoutingTrace(4, ids.numpy(), weights.numpy(), place // 10, place % 10)
    assert trace.loads().sum(1).tolist() == [60, 60]
    assert 2 <= trace.distinct(1) == 2 <= trace.distinct(10) <= 4


def test_a_token_goes_to_a_rank_once_and_conserves() -> None:
    ids = np.array([[0, 1], [0, 2], [3, 2], [4, 4], [1, 3]])  # expert 4 of 4: none
    sent = dispatch(ids, np.array([0, 0, 1, 1, 1]), contiguous(4, 2), 2)
    assert sent.tolist() == [[2, 1], [1, 2]]
    trace, placement = even(8, 2, 512), contiguous(8, 4)
    sent = dispatch(trace.ids[0], np.arange(512) % 4, placement, 4)
    distinct = sum(len(set(placement[row])) for row in trace.ids[0])
    assert sent.sum() == distinct


def test_the_busiest_rank_sets_the_time() -> None:
    links = Links(inside=100.0, between=10.0, node=2, latency=0.5)
    flat = np.full((4, 4), 5.0)
    assert links.all_to_all_s(flat) == 0.5 + 10 / 10  # two ranks in the other node, five bytes each
    skewed = flat.copy()
    skewed[0, 3] = 45.0
    assert links.all_to_all_s(skewed) == 0.5 + 50 / 10
    assert links.all_to_all_s(np.diag([9.0] * 4)) == 0  # nothing is sent
    assert imbalance([1, 1, 2]) == 1.5
    with pytest.raises(ValueError, match="rates are above 0"):
        Links(0, 1)
    with pytest.raises(ValueError, match="6 experts cannot be shared by 4 ranks"):
        contiguous(6, 4)


def test_one_rank_s_experts_are_the_operator_table_s() -> None:
    """Where all experts are met, the table's three matrices together."""
    arch, setting = architecture("mixtral-8x7b"), Setting(batch=64, context=1024, queries=1)
    mlp = arch.blocks[0][1].mlp
    table = [op for op in operators(arch, setting) if op.name.startswith("expert_") and op.kind == "linear"]
    one = expert_op(arch, mlp, [16] * 8, setting)
    assert one.operations == sum(op.operations for op in table)
    assert one.weight_held == sum(op.weight_held for op in table) == one.load_weight
    assert (one.load_act, one.store_act) == (sum(op.load_act for op in table), sum(op.store_act for op in table))
    assert expert_op(arch, mlp, [128, *[0] * 7], setting).load_weight == one.load_weight / 8


def test_skew_costs_compute_and_links() -> None:
    arch, on, links = architecture("mixtral-8x7b"), device("h100").rated(), Links(450e9, 50e9, 4, 5e-6)
    mlp, setting, source = arch.blocks[0][1].mlp, Setting(batch=4096, context=2048, queries=1), np.arange(4096) % 8
    fair = even(8, 2, 4096, 1).ids[0]
    hot = np.where(np.arange(4096)[:, None] % 2 == 0, np.array([0, 1]), fair)
    flat, skewed = (expert_parallel(arch, mlp, ids, source, contiguous(8, 8), links, on, setting) for ids in (fair, hot))
    assert flat.token_skew < 1.1
    assert skewed.token_skew > 2
    assert skewed.dispatch_s > 1.8 * flat.dispatch_s
    assert skewed.compute_s > 1.8 * flat.compute_s
    assert skewed.seconds == skewed.dispatch_s + skewed.compute_s + skewed.combine_s
