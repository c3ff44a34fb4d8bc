"""The family's bench: predicted against measured, on this machine and on public kernel times."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from command import broadsheet

from broadsheet.core.perf.hardware import Efficiency, device
from broadsheet.methods.estimates import bench
from broadsheet.methods.estimates.llm_viewer.traces import read_vidur


def test_passes_of_this_machine(monkeypatch) -> None:
    """Two small models, really run; the reference is the same passes once more."""
    monkeypatch.setattr(bench, "RANDOM", {"random-256x2": (256, 2), "random-256x3": (256, 3)})
    monkeypatch.setattr(bench, "FITTED", (("random-256x2", 1, 32), ("random-256x2", 2, 64), ("random-256x2", 4, 64)))
    monkeypatch.setattr(bench, "PASSES", (("random-256x3", 1, 48), ("random-256x3", 4, 48)))
    workload = bench.Workload(dtypes=("fp32",), repeats=3)
    for name, method in bench.methods().items():
        records = {record.metric: record for record in bench.measure(name, method, workload)}
        assert records["passes"].value == 4
        assert records["median_error"].value >= 0
        assert records["predicted"].setting["measured"] > 0
    assert len(bench._MEASURED) >= 1


def made(folder: Path, truth) -> Path:
    """A checkout of vidur's profiles with two models whose times follow a known roofline."""
    root = folder / "data" / "profiling" / "compute" / "a100"
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    for model, hidden, inner in (("meta-llama/Llama-2-7b-hf", 4096, 11008), ("other/thirteen", 5120, 13824)):
        (root / model).mkdir(parents=True)
        with open(root / model / "mlp.csv", "w", newline="") as file:
            heads = [
                "n_head",
                "n_kv_head",
                "n_embd",
                "n_expanded_embd",
                "use_gated_mlp",
                "num_tokens",
                "num_tensor_parallel_workers",
            ]
            writer = csv.DictWriter(file, [*(f"time_stats.{name}.median" for name in names), *heads])
            writer.writeheader()
            for tokens in (1, 8, 64, 256, 1024, 4096):
                shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden))
                seconds = [truth.seconds(2 * i * o * tokens, 2 * (i * o + tokens * (i + o)), "fp16") for i, o in shapes]
                row = dict(zip(heads, (32, 32, hidden, inner, True, tokens, 1), strict=True))
                writer.writerow(row | {f"time_stats.{n}.median": s * 1e3 for n, s in zip(names, seconds, strict=True)})
    return folder


def test_public_kernel_times_give_their_roofline_back(tmp_path) -> None:
    truth = replace(device("a100"), efficiency=Efficiency(0.7, 0.8, 8e-6))
    made(tmp_path, truth)
    workload = bench.Workload(data=str(tmp_path), hardware="a100")
    errors = {
        name: {record.metric: record.value for record in bench.measure(name, method, workload)}
        for name, method in bench.methods().items()
    }
    assert errors["llm-viewer"]["worst_error"] < 0.02
    assert errors["roofline"]["below_measured"] == 1
    assert errors["roofline"]["median_error"] > 0.1
    assert errors["measured again"]["worst_error"] == 0
    samples = read_vidur(tmp_path / "data/profiling/compute/a100/other/thirteen/mlp.csv")
    assert len(samples) == 24
    assert samples[0].operations == 2 * 5120 * 3 * 5120


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "data=/nowhere"], "is no checkout of microsoft/vidur"),
        (["-o", "data=/nowhere", "-o", "hardware=l4"], "vidur's profiles are of a100-80g, h100, a40"),
        (["-o", 'dtypes=["int8"]'], "dtypes are of fp32, bf16, fp16"),
        (["-o", "threads=0"], "threads is at least 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str) -> None:
    done = broadsheet("compare", "estimates", *words, check=False)
    assert done.returncode == 2
    assert says in done.stderr


def test_what_is_no_profile_is_said_to_be_none(tmp_path) -> None:
    path = tmp_path / "mlp.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"is no mlp\.csv of vidur's profiles"):
        read_vidur(path)
