"""Logs of timed operators, against what the authors' parser made of their own sample log."""

import json
import os
from pathlib import Path

import pytest

from broadsheet.methods.estimates.melt.opslog import parse_ops

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "melt_official.json").read_text())
#: a checkout of brave-experiments/MELT-public, for the whole 4 MB log
PUBLIC = Path(os.environ.get("MELT_PUBLIC", "/nowhere")) / "src"


@pytest.fixture
def excerpt(tmp_path):
    """The first 72 nodes of the sample log; the count line says so."""
    lines = ["n_nodes = 72" if line == "n_nodes = 1124" else line for line in GOLDEN["excerpt"]]
    path = tmp_path / "excerpt.log"
    path.write_text("\n".join([*lines, "n_leafs = 0", *GOLDEN["excerpt_sums"], "=" * 40]))
    return path


def test_sums_equal_the_authors_parser(excerpt):
    log = parse_ops(excerpt)
    assert log.backend == "llama.cpp"
    assert (log.evaluations, len(log.nodes), len(log.weights)) == (1, 72, 5)
    for share in log.merged("per_op"):
        assert share.wall_ms == pytest.approx(GOLDEN["excerpt_wall_ms"][share.name], abs=2e-3)
        assert share.cpu_ms == pytest.approx(GOLDEN["excerpt_cpu_ms"][share.name], abs=2e-3)
    assert sum(share.share for share in log.merged("per_op")) == pytest.approx(1)
    assert log.printed()[0].name == "MUL_MAT"
    assert log.weights["token_embd.weight"] == ("q4_0", (4096, 32000, 1, 1))


def test_modules_follow_the_norms(excerpt):
    nodes = parse_ops(excerpt).nodes
    assert nodes[0].module == "embedding"
    assert nodes[0].op == "GET_ROWS"
    assert [node.module for node in nodes if node.op == "RMS_NORM"][:3] == ["attention", "mlp", "attention"]
    assert {node.module for node in nodes if node.op == "ROPE"} == {"attention"}
    assert {node.module for node in nodes if node.op == "UNARY"} == {"mlp"}


def test_per_node_keeps_nodes_apart(excerpt):
    log = parse_ops(excerpt)
    assert len(log.merged("per_node")) == 72
    assert sum(share.wall_ms for share in log.merged("per_node")) == pytest.approx(sum(n.wall_ms for n in log.nodes))


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="MELT_PUBLIC names no checkout of brave-experiments/MELT-public")
def test_whole_sample_log():
    log = parse_ops(PUBLIC / "parsers" / "test_files" / "dummy_file.llamacpp.log")
    assert log.evaluations == 29
    assert len(log.nodes) == 29 * 1124
    first, second = log.printed()[:2]
    assert first.name == "MUL_MAT"
    assert first.share == pytest.approx(0.974, abs=0.001)
    assert second.name == "CPY"
    assert second.share == pytest.approx(0.010, abs=0.001)
    assert {share.name: round(share.wall_ms, 3) for share in log.printed()} == GOLDEN["printed_ms"]


def _report(durations):
    def call(name, us):
        return {
            "Name": {"string": name}, "Count": {"count": 2}, "Device": {"string": "metal0"},
            "Duration (us)": {"microseconds": us}, "Argument Shapes": {"string": "float16[1]"}, "Percent": {"percent": 1.0},
        }  # fmt: skip

    return json.dumps({"calls": [call(name, us) for name, us in durations], "device_metrics": {}, "configuration": {}})


def test_mlc_whole_and_in_pieces(tmp_path):
    text = _report([("matmul", 3000.0), ("norm", 1000.0)])
    whole = f"vm.cc:973: Report from function decode:\n{text}\n\nsome table\n"
    cut = len(text) // 2
    pieces = "".join(
        f"I/vm: Report from function prefill[{number}/1]:\n{part}\n" for number, part in enumerate((text[:cut], text[cut:]))
    )
    path = tmp_path / "mlc.log"
    path.write_text(whole + pieces)
    log = parse_ops(path)
    assert log.backend == "mlc"
    assert log.evaluations == 2
    assert [(s.name, s.wall_ms, s.count) for s in log.merged("per_op")] == [("matmul", 6.0, 4), ("norm", 2.0, 4)]
    assert {s.name: s.share for s in log.merged("per_module")} == {"decode": 0.5, "prefill": 0.5}


def test_damaged_logs_say_where(tmp_path, excerpt):
    path = tmp_path / "bad.log"
    path.write_text("\n".join(excerpt.read_text().splitlines()[:40]))
    with pytest.raises(ValueError, match=r"line 41: node 33 of 72 is missing"):
        parse_ops(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="no operator times"):
        parse_ops(path)
    path.write_text("Report from function decode:\n{'calls'")
    with pytest.raises(ValueError, match="line 2: not a profiler report"):
        parse_ops(path)
    with pytest.raises(ValueError, match="no log at"):
        parse_ops(tmp_path / "none.log")
    with pytest.raises(ValueError, match="merge is one of"):
        parse_ops(excerpt).merged("per_layer")
