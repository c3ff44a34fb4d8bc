"""Long-context peak: the paper's numbers, the algebra of reductions, the simulation against closed forms, the real loop."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from command import broadsheet
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from broadsheet.core.perf.hardware import Device, device
from broadsheet.core.records import Record
from broadsheet.methods.estimates.long_context_peak import (
    KVReduction,
    LongContextPeak,
    Session,
    SessionModel,
    read_trace,
    service_of,
    simulate,
)
from broadsheet.methods.estimates.long_context_peak.loop import (
    CacheBudget,
    NoRoom,
    OwnClock,
    WallClock,
    run_loop,
    temporary_machine,
)
from broadsheet.methods.estimates.long_context_peak.sessions import measured_reductions
from broadsheet.methods.estimates.long_context_peak.simulate import Service

#: the paper's A100: 312 T/s, 2 TB/s, 80 GB, a host link of 20 GB/s; its 34 B model
A100 = replace(device("a100-80g").rated(), bandwidth=2e12)


def yi(**options) -> SessionModel:
    return SessionModel("yi-34b-200k", A100, weights=34e9, **options)


def test_the_derived_numbers_of_the_paper_s_example() -> None:
    one, two = yi(), yi(tp=2)
    assert one.room() / one.cache_bytes(4096) == pytest.approx(11.9, rel=0.02)
    assert one.room() / one.cache_bytes(50_000) == pytest.approx(0.98, rel=0.02)
    assert two.room() / two.cache_bytes(4096) == pytest.approx(91, rel=0.02)
    assert two.room() / two.cache_bytes(100_000) == pytest.approx(3.7, rel=0.02)
    assert yi(attention="none").prefill_s(4096) == pytest.approx(0.89, rel=0.02)
    assert one.prefill_s(50_000) == pytest.approx(17.8, rel=0.02)
    assert yi(attention="none").prefill_s(50_000) == pytest.approx(10.9, rel=0.02)
    assert [one.decode_s(n, 1, 250) for n in (4096, 50_000)] == pytest.approx([8.6, 10.0], rel=0.02)
    assert one.switch_s(50_000) == pytest.approx(0.61, rel=0.02)
    assert 2 * one.switch_s(50_000) == pytest.approx(1.23, rel=0.02)


def test_critical_intensities() -> None:
    assert round(yi().critical_intensity) == 156
    h100 = SessionModel("yi-34b-200k", device("h100").rated())
    assert round(h100.critical_intensity) == 295


def test_concurrency_is_whole_and_goes_as_the_length_with_memory() -> None:
    huge = replace(A100, memory=1e15)
    model = SessionModel("yi-34b-200k", huge, weights=34e9)
    assert model.concurrency(4096) / model.concurrency(50_000) == pytest.approx(50_000 / 4096, rel=1e-4)
    assert isinstance(yi().concurrency(4096), int)
    assert yi().concurrency(4096) == 11


@given(
    st.lists(
        st.builds(
            KVReduction,
            layer=st.sampled_from([1.0, 0.5]),
            head=st.sampled_from([1.0, 0.25]),
            token=st.sampled_from([1.0, 0.5]),
            hidden=st.sampled_from([1.0, 0.125]),
            at=st.sampled_from([("decode",), ("rest",), ("rest", "decode"), ("rest", "decode", "prefill")]),
        ),
        min_size=2,
        max_size=4,
    ),
    st.randoms(),
)
@settings(max_examples=60)
def test_reductions_commute_and_multiply(reductions: list[KVReduction], roll) -> None:
    shuffled = list(reductions)
    roll.shuffle(shuffled)
    for phase in ("rest", "decode", "prefill"):
        product, either = 1.0, KVReduction(at=())
        for one in reductions:
            product *= one.factor(phase)
        for one in shuffled:
            either = either | one
        assert either.factor(phase) == pytest.approx(product)


def test_a_reduction_while_decoding_leaves_prefill_and_switch() -> None:
    exit_early = yi(reduction=KVReduction(layer=0.5, at=("decode",)))
    assert exit_early.prefill_s(50_000) == yi().prefill_s(50_000)
    assert exit_early.switch_s(50_000) == yi().switch_s(50_000)
    assert exit_early.decode_s(50_000) < yi().decode_s(50_000)
    evicted = yi(reduction=KVReduction(token=0.25))
    assert evicted.prefill_s(50_000) == yi().prefill_s(50_000)
    assert evicted.switch_s(50_000) == yi().switch_s(50_000) / 4


@pytest.mark.parametrize("users", [1, 3, 7])
def test_the_simulation_is_the_closed_form_where_nobody_thinks(users: int) -> None:
    model = yi(tp=2)
    assert model.concurrency(50_000) == 7
    run = simulate(service_of(model), Session(50_000, 5, 250, 0.0), users, 4, random_think=False)
    assert run.sessions_per_hour == pytest.approx(model.sessions_per_hour(50_000, users, 5, 0.0)[0], rel=1e-9)
    assert run.swaps == 0


@pytest.mark.parametrize("policy", ["lru", "recompute", "none"])
@pytest.mark.parametrize("overlap", [True, False])
def test_little_s_law_and_work_is_conserved(policy: str, overlap: bool) -> None:
    service = service_of(yi(tp=2))
    run = simulate(service, Session(50_000, 3, 100, 5.0), 10, 15, policy, overlap, seed=3)  # type: ignore[arg-type]
    waiting, expected = run.little()
    assert waiting == pytest.approx(expected, rel=0.01)
    assert sum(run.shares[what] for what in ("prefill", "decode")) <= 1 + 1e-9
    assert (run.swaps == 0) == (policy == "none")
    assert (run.recomputed > 0) == (policy == "recompute")
    again = simulate(service, Session(50_000, 3, 100, 5.0), 10, 15, policy, overlap, seed=3)  # type: ignore[arg-type]
    assert (again.seconds, again.swaps) == (run.seconds, run.swaps)


@pytest.mark.parametrize(("part", "fit"), [(1.0, 4), (0.25, 16)])
def test_the_knee_is_where_caches_stop_fitting(part: float, fit: int) -> None:
    """Users beyond the caches that fit are swapped; a cache of a quarter moves the knee four times as far."""
    service = Service(
        lambda _: 0.4, lambda held: 0.01 * len(held), lambda _: 0.008 * part, lambda _: 100.0 * part, 400.0, batch=1
    )
    session = Session(1024, 1_000_000, 1, 0.01 * fit / 2)
    rates = {
        users: simulate(service, session, users, overlap=False, random_think=False, seconds=60).steady_rounds_per_hour
        for users in (1, *range(fit - 2, fit + 4), 2 * fit)
    }
    knee = max(users for users, rate in rates.items() if rate >= 0.95 * max(rates.values()))
    assert abs(knee - fit) <= 1


def test_who_asks_while_its_cache_goes_out_brings_it_back() -> None:
    """One user more than caches, who ask as soon as they can: the longest reader is always the next to ask, so every answer
    takes a swap, and copies that stop compute are not cut in two by a step."""
    service = Service(lambda _: 0.4, lambda held: 0.03 * len(held), lambda _: 0.01, lambda _: 1.0, 4.0, batch=1)
    run = simulate(service, Session(1024, 1_000_000, 1, 0.06), 5, overlap=False, random_think=False, seconds=30, trace=True)
    assert run.swaps / run.rounds == pytest.approx(1, abs=0.02)
    assert run.steady_rounds_per_hour == pytest.approx(3600 / (0.03 + 2 * 0.01), rel=0.01)
    copies = [span for span in run.trace.spans if span.track[1] == "switch"]
    assert all(back.start == pytest.approx(out.end) for out, back in zip(copies[1::2], copies[2::2], strict=False))


def test_a_trace_of_arrivals(tmp_path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,4096,10\n0.5,50000,20\n3.0,1000,5\n")
    sessions = read_trace(path)
    run = simulate(service_of(yi(tp=2)), sessions, trace=True)
    assert run.sessions == run.rounds == 3
    assert json.loads(run.trace.to_json())["traceEvents"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="it wants the columns arrived_at"):
        read_trace(path)
    with pytest.raises(ValueError, match="the trace is empty"):
        simulate(service_of(yi(tp=2)), [])


def test_a_cache_beyond_all_room_is_refused() -> None:
    with pytest.raises(ValueError, match="there is room for"):
        simulate(service_of(yi()), Session(200_000, 1, 1, 0.0))


def test_the_real_loop_holds_swaps_and_gives_back() -> None:
    """Two caches fit, three users come: real tensors go to files and come back as they were."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    machine, folder = temporary_machine(LlamaForCausalLM(config).eval(), clock=OwnClock())
    with folder:
        size = machine.size(64)
        assert size == 2 * 2 * 4 * 16 * 64 * 4
        visitor = machine.visitor(64, 7)
        machine.prefill(visitor)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in visitor.cache.layers]
        machine.swap_out(visitor)
        assert visitor.cache is None
        assert visitor.file.stat().st_size == size
        machine.swap_in(visitor)
        for (keys, values), layer in zip(before, visitor.cache.layers, strict=True):
            assert torch.equal(keys, layer.keys)
            assert torch.equal(values, layer.values)
        budget = CacheBudget(2 * size)
        run = run_loop(machine, Session(64, 4, 2, 0.001), 3, budget, 1.0)
        assert budget.held == 0
        assert run.rounds > 6
        assert run.swaps > 0
        assert all(share > 0 for share in run.shares.values())
        alone = run_loop(machine, Session(64, 4, 2, 0.001), 2, budget, 0.5)
        assert alone.swaps == 0
    with pytest.raises(NoRoom, match="are allowed"):
        CacheBudget(10, 5).take(6)


@pytest.mark.parametrize(("clock", "slept"), [(WallClock(), True), (OwnClock(), False)])
def test_waiting_takes_time_on_both_clocks_and_none_on_our_own(clock, slept: bool) -> None:
    begun, wall = clock.now(), time.monotonic()
    clock.wait(begun + 0.05)
    assert clock.now() - begun >= 0.05
    assert (time.monotonic() - wall >= 0.05) == slept
    clock.wait(begun)  # already past


def test_lossless_is_said_of_retrieval_at_every_depth_only() -> None:
    shared = {"paper": "", "bench": "caches"}
    cuts = [{"mode": "multi-turn", "task": "kv", "turn": turn} for turn in (1, 2)]

    def rows(method: str, accuracies: tuple[float, float], **budget) -> list[Record]:
        found = [Record(method=method, metric="bytes_ratio", value=0.25, setting=budget, **shared)]
        found.append(Record(method=method, metric="accuracy", value=sum(accuracies) / 2, setting=budget, **shared))
        pairs = zip(cuts, accuracies, strict=True)
        return found + [
            Record(method=method, metric="accuracy", value=v, setting={**c, **budget}, **shared) for c, v in pairs
        ]

    records = rows("full", (1.0, 1.0)) + rows("a", (1.0, 0.995), budget=0.25) + rows("b", (1.0, 0.9), budget=0.25)
    found = {one.method: one for one in measured_reductions(records)}
    assert found["a"].lossless
    assert not found["b"].lossless
    assert found["b"].worst_drop == pytest.approx(0.1)
    assert found["a"].reduction.factor("rest") == 0.25


def test_the_report_and_its_files(tmp_path) -> None:
    report = LongContextPeak(tp=2, rounds=2).estimate(context=50_000)
    titles = [table.title for table in report.tables()]
    assert titles == [
        "yi-34b-200k on 2 x NVIDIA A100 SXM 80 GB",
        "sessions an hour",
        "what a reduction changes",
        "measured reductions",
    ]
    assert "SIMULATED" in report.tables()[1].note
    assert report.four(50_000)["concurrency"] == 7
    assert {path.name for path in report.save(tmp_path)} == {"sessions.svg", "trace.json"}
    json.dumps(report.to_json())
    assert "at most 0." in LongContextPeak(tp=2, target=14, simulated=False).estimate(context=50_000).tables()[2].note


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["-o", "model=llama-3.1-405b"],
            "does not fit 2 x a100-80g: 651.7 GB are missing for its weights; tp=11 holds them",
        ),
        (
            ["-o", "tp=1"],
            "no user of 50000 tokens fits: a cache takes 12.3 GB of 11.2 that the weights leave; tp=2 holds one",
        ),
        (["-o", "tp=2", "-o", "reduce=3-bit cache"], "no reduction '3-bit cache'; there is none, 8-bit cache"),
        (["-o", "tp=2", "-o", "attention=half"], "attention is causal, full or none"),
        (["-o", "tp=2", "-o", "think_s=-1"], "not negative"),
        (["-o", "tp=2", "-o", "policy=fifo"], "policy is of lru, recompute, none"),
        (["-o", "tp=2", "-o", "hardware=i9-13900k"], "has no host_link"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    done = broadsheet("run", "long-context-peak", *words, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_device_without_a_link_says_so() -> None:
    bare = Device("bare", "bare", 2e12, {"bf16": 312e12}, 80e9)
    with pytest.raises(ValueError, match="put the link's bytes a second into its file"):
        SessionModel("llama-2-7b", bare).switch_s(100)
