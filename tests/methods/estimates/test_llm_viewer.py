"""LLM-Viewer: the official numbers, ours where those are wrong, and what a user types."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command import broadsheet
from hypothesis import given, settings
from hypothesis import strategies as st

from broadsheet.core.perf.calibration import Sample, errors, fit
from broadsheet.core.perf.hardware import Device, Efficiency, device, devices, read_device
from broadsheet.core.perf.ops import Setting, operators
from broadsheet.methods.estimates.llm_viewer import LLMViewer, RooflineReport

#: github.com/hahnyuan/LLM-Viewer at 472f71f, run on these shapes; its q_proj rows are also in the paper's table 1
GOLDEN = {
    ("prefill", "q_proj"): {"operations": 6.872e10, "bytes": 6.711e7, "intensity": 1024.0, "bound": "compute"},
    ("decode", "q_proj"): {"operations": 3.355e7, "bytes": 3.357e7, "intensity": 0.9995, "bound": "memory"},
}


def official(**options) -> LLMViewer:
    return LLMViewer("a6000", compat=True, fused=False, **options)


def test_the_paper_s_rows_to_four_digits() -> None:
    report = official().estimate("llama-2-7b", 1, 2048)
    rows = {(row["stage"], row["operator"]): row for row in report.ops}
    for key, golden in GOLDEN.items():
        row = rows[key]
        for name in ("operations", "bytes"):
            assert float(f"{row[name] / row['count']:.4g}") == golden[name]
        assert float(f"{row['intensity']:.4g}") == golden["intensity"]
        assert row["bound"] == golden["bound"]
    assert rows["prefill", "q_proj"]["attainable"] == pytest.approx(154.8e12, rel=1e-3)
    assert rows["decode", "q_proj"]["attainable"] == pytest.approx(0.768e12, rel=1e-3)


def test_the_decode_step_of_the_official_code() -> None:
    step = official().estimate("llama-2-7b", 1, 2048).stage("decode")
    assert (f"{step.operations / 1e9:.2f}", f"{step.nbytes / 1e9:.2f}") == ("14.17", "14.31")
    assert step.seconds * 1e3 == pytest.approx(18.64, abs=0.005)
    quantised = official(weights=4).estimate("llama-2-7b", 1, 2048).stage("decode")
    assert quantised.nbytes / 1e9 == pytest.approx(4.40, abs=0.005)
    assert quantised.seconds * 1e3 == pytest.approx(5.73, abs=0.005)


def test_weight_only_quantisation_helps_one_user_and_hardly_helps_thirty_two() -> None:
    by_bits = {1: (34.6, 17.9, 9.5, 5.3), 32: (69.5, 52.8, 44.4, 41.0)}
    for batch, expected in by_bits.items():
        for bits, milliseconds in zip((16, 8, 4, 2), expected, strict=True):
            step = official(weights=bits).estimate("llama-2-13b", batch, 1024)
            assert step.stage("decode").seconds * 1e3 == pytest.approx(milliseconds, abs=0.05)
            assert step.stage("prefill").seconds == pytest.approx(0.194 if batch == 1 else 6.2, rel=0.02)


def test_official_flash_attention_slows_grouped_heads_and_ours_does_not() -> None:
    seconds, read = {}, {}
    for compat in (True, False):
        for fused in (True, False):
            report = LLMViewer("a100-80g", compat=compat, fused=fused, calibrated=False).estimate("llama-2-70b", 8, 4096)
            seconds[compat, fused] = report.stage("decode").seconds * 1e3
            read[compat, fused] = sum(row["load_kv"] for row in report.ops if row["stage"] == "decode") / 1e9
    assert read[True, True] == pytest.approx(85.9, abs=0.05)
    assert read[True, False] == read[False, False] == read[False, True] == pytest.approx(10.74, abs=0.01)
    assert seconds[True, True] == pytest.approx(110, abs=1)
    assert seconds[True, False] == pytest.approx(73.5, abs=0.5)
    assert seconds[False, True] <= seconds[False, False]


def test_the_bound_flips_at_the_analytic_batch() -> None:
    """b / (1 + b (1/ic + 1/oc)) = peak / bandwidth."""
    on = replace(device("a100-80g").rated(), bandwidth=2.0e12)
    turning, ic, oc = on.turning_point("bf16"), 4096, 11008
    crossover = turning / (1 - turning * (1 / ic + 1 / oc))
    assert crossover == pytest.approx(164.5, abs=0.2)
    label = {}
    for batch in (int(crossover), int(crossover) + 1):
        table = operators_of("llama-2-7b", batch)
        label[batch] = next(op.bound(on) for op in table if op.name == "up_proj")
    assert list(label.values()) == ["memory", "compute"]


def operators_of(model: str, batch: int):
    from broadsheet.core.perf.architecture import architecture

    return operators(architecture(model), Setting(batch, 2048, 1))


def test_an_answer_is_its_prefill_and_all_of_its_steps() -> None:
    viewer = LLMViewer("h100")
    report = viewer.estimate("llama-3.1-8b", 4, 1000, generate=37)
    every = sum(viewer.estimate("llama-3.1-8b", 4, length).stage("decode").seconds for length in range(1001, 1038))
    assert report.stage("answer of 37").seconds == pytest.approx(report.stage("prefill").seconds + every, rel=1e-6)


def test_speculative_decoding_pays_where_drafts_are_right() -> None:
    def each(acceptance: float) -> float:
        report = LLMViewer("h100", draft="llama-3.2-1b", gamma=4, acceptance=acceptance).estimate("llama-3.1-70b", 1, 2048)
        step = report.stage("speculative step")
        return step.seconds / step.tokens

    plain = LLMViewer("h100").estimate("llama-3.1-70b", 1, 2048).stage("decode").seconds
    assert each(0.9) < each(0.5) < plain < each(0.0)
    assert LLMViewer(draft="llama-3.2-1b", acceptance=1.0).estimate("llama-3.1-70b").stage("speculative step").tokens == 5


def test_a_mixture_reads_more_experts_as_the_batch_grows() -> None:
    read = []
    for batch in (1, 8, 64):
        rows = LLMViewer("h100").estimate("mixtral-8x7b", batch, 1024).stage("decode").rows()
        read.append(sum(row["load_weight"] for row in rows if row["operator"].startswith("expert_")))
    one = read[0] / 2
    assert read == [pytest.approx(one * n) for n in (2, 8 * (1 - 0.75**8), 8 * (1 - 0.75**64))]


def test_memory_says_what_would_fit() -> None:
    report = LLMViewer("h100").estimate("llama-3.1-70b", 8, 32768)
    assert not report.memory.fits
    assert "tensor_parallel=4 would do" in report.tables()[1].note
    assert LLMViewer("h100", tensor_parallel=4).estimate("llama-3.1-70b", 8, 32768).memory.fits


def test_files_and_json(tmp_path) -> None:
    report = LLMViewer("a100", cache="quantized:bits=4,group_size=64").estimate("deepseek-v2-lite", 2, 512)
    assert isinstance(report, RooflineReport)
    names = {path.name for path in report.save(tmp_path)}
    assert names == {"operators.csv", "layer.svg", "roofline-prefill.svg", "roofline-decode.svg", "report.html"}
    assert (tmp_path / "report.html").read_text().count("<svg") == 3
    assert json.loads(json.dumps(report.to_json()))["memory"]["fits"]
    lines = (tmp_path / "operators.csv").read_text().splitlines()
    assert len(lines) == 1 + len(report.ops)
    graph = report.graph()
    assert all(name in graph or name in {"embedding"} for inputs in graph.values() for name in inputs)


@given(st.floats(0.3, 1.1), st.floats(0.3, 1.1), st.floats(1e-6, 2e-5))
@settings(max_examples=20, deadline=None)
def test_three_scalars_are_found_again(compute: float, memory: float, overhead: float) -> None:
    truth = replace(device("a100"), efficiency=Efficiency(compute, memory, overhead))
    samples = [
        Sample.one(op.operations, op.nbytes, op.dtype, op.seconds(truth))
        for context in (1, 16, 128, 1024, 4096)
        for op in operators_of_prefill("llama-2-7b", context)
    ]
    found = fit(truth.rated(), samples)
    assert abs(errors(replace(truth, efficiency=found), samples)).max() < 1e-4
    assert (found.compute, found.memory, found.overhead) == (
        pytest.approx(compute, rel=1e-3), pytest.approx(memory, rel=1e-3), pytest.approx(overhead, rel=1e-3),
    )  # fmt: skip


def operators_of_prefill(model: str, context: int):
    from broadsheet.core.perf.architecture import architecture

    return [op for op in operators(architecture(model), Setting(1, context)) if op.kind == "linear"]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least six measured operators or passes; got 1"):
        fit(device("a100"), [Sample.one(1, 1, "bf16", 1)])


def test_every_device_can_be_read_and_written(tmp_path) -> None:
    for name in devices():
        one = device(name)
        (tmp_path / f"{name}.json").write_text(json.dumps(one.to_json()))
        assert read_device(tmp_path / f"{name}.json") == one
        assert all(source for _, source in one.origins.values())
        LLMViewer(name).estimate("llama-3.2-1b", 1, 128)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "describes no device"),
        ('{"bandwidth": 1, "peaks": {}}', "bandwidth is {"),
        ('{"bandwidth": {"value": 1, "origin": "guessed"}, "peaks": {}}', "the origin of bandwidth is one of datasheet"),
        ('{"bandwidth": {"value": 1, "origin": "assumed"}, "peaks": {}}', "names at least one dtype"),
        (
            '{"bandwidth": {"value": 0, "origin": "assumed"}, "peaks": {"bf16": {"value": 1, "origin": "assumed"}}}',
            "is above 0",
        ),
    ],
)
def test_bad_device_files_say_what_is_wrong(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        device(str(path))


def test_peaks_that_a_device_lacks() -> None:
    with pytest.raises(ValueError, match="no int8 rate; it has fp16"):
        Device("x", "x", 1e9, {"fp16": 1e12}).peak("int8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "hardware=h10000"], "no device 'h10000'; known: a100-40g"),
        (["-o", "model=llama-9"], "did you mean llama-2-"),
        (["-o", "batch=0"], "batch is a whole number of at least 1"),
        (["-o", "weights=0"], "bits is between 1 and 32; got 0"),
        (["-o", "weights=rtx"], "no format 'rtx' for weights: give bits from 1 to 32, or one of rtn, gptq"),
        (["-o", "cache=kivi:bit=2"], "kivi has no 'bit'; it takes bits, group_size, residual"),
        (["-o", "tensor_parallel=3", "-o", "model=llama-2-7b"], "32 heads cannot be shared by 3 ranks"),
        (["-o", "flash=true"], "llm-viewer has no option 'flash'; it has model, batch"),
        (["-o", "compat=true", "-o", "hardware=h200"], "LLM-Viewer's own table has no 'h200'"),
        (["-o", "compat=true", "-o", "hardware=v100", "-o", "acceptance=2"], "acceptance is a probability"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    done = broadsheet("run", "llm-viewer", *words, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_holds_the_published_row() -> None:
    words = ("-o", "model=llama-2-7b", "-o", "hardware=a6000", "-o", "batch=1", "-o", "context=2048", "--json", "-")
    found = json.loads(broadsheet("run", "llm-viewer", *words).stdout)
    assert found["official_code"]["decode"]["seconds"] * 1e3 == pytest.approx(18.64, abs=0.005)
    assert found["totals"]["decode"]["seconds"] * 1e3 == pytest.approx(18.62, abs=0.005)
    shown = broadsheet(
        "run", "llm-viewer", "--model", "meta-llama/Llama-3.1-70B", "--hardware", "h100", "-o", "calibrated=false"
    ).stdout
    assert "llama-3.1-70b on NVIDIA H100" in shown
    assert "100% memory" in shown
