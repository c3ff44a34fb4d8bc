"""Records survive kills and full disks; statistics agree with known values."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from broadsheet.core import records as module
from broadsheet.core.records import Record, RecordStore, StorageError, cell_key, read_json, write_json
from broadsheet.core.stats import benjamini_hochberg, bootstrap_ci, mcnemar, paired_difference


def record(value=1.0):
    return Record(paper="gear", method="gear", bench="caches", metric="accuracy", value=value, ci=(0.5, 1.5), seed=3)


def test_cells_round_trip(tmp_path):
    store = RecordStore(tmp_path / "deep" / "caches.jsonl")
    store.add("a", [record(1.0), record(2.0)])
    store.add("b", [record(3.0)])
    assert store.cells() == {"a": [record(1.0), record(2.0)], "b": [record(3.0)]}


def test_a_torn_line_loses_only_itself(tmp_path):
    store = RecordStore(tmp_path / "caches.jsonl")
    store.add("a", [record()])
    with open(store.path, "a") as file:
        file.write('{"cell": "b", "records": [{"pa')
    assert list(store.cells()) == ["a"]
    store.add("c", [record()])
    assert list(store.cells()) == ["a", "c"]


def test_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch):
    store = RecordStore(tmp_path / "caches.jsonl")
    store.add("a", [record()])

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left on device; free space or set BROADSHEET_HOME") as caught:
        store.add("b", [record()])
    assert "\n" not in str(caught.value)
    assert store.cells()["a"] == [record()]


def test_full_disk_for_real():
    store = RecordStore("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        store.add("a", [record()])


def test_cell_key_depends_on_everything():
    assert cell_key(a=1, b=(1, 2)) == cell_key(b=[1, 2], a=1)
    assert cell_key(a=1) != cell_key(a=2)


def test_json_file_round_trips(tmp_path):
    path = tmp_path / "out" / "r.json"
    write_json([record()], str(path))
    assert list(read_json(path)) == [record()]
    fields = "paper method parameters bench metric value ci unit n seed model device versions revision time"
    assert set(fields.split()) <= set(json.loads(path.read_text())[0])


def test_bootstrap_covers_the_normal_interval_and_groups_widen_it():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 400)
    low, high = bootstrap_ci(values)
    half = 1.96 * values.std() / 20
    assert abs(low - (values.mean() - half)) < 0.02
    assert abs(high - (values.mean() + half)) < 0.02
    repeated = np.repeat(values[:40], 10)
    narrow, wide = bootstrap_ci(repeated), bootstrap_ci(repeated, np.repeat(np.arange(40), 10))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert bootstrap_ci(values) == (low, high)


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(1)
    easy = rng.normal(0, 5, 200)
    mean, (low, high) = paired_difference(easy + 0.1 + rng.normal(0, 0.01, 200), easy)
    assert low < mean < high
    assert low > 0.09


def test_mcnemar_is_the_exact_binomial():
    a = [1] * 10 + [1] * 8 + [0] * 2 + [0] * 5
    b = [1] * 10 + [0] * 8 + [1] * 2 + [0] * 5
    assert mcnemar(a, b) == pytest.approx(binomtest(8, 10).pvalue)
    assert mcnemar([True], [True]) == 1.0
    with pytest.raises(ValueError, match="differ in length"):
        mcnemar([True], [])


def test_benjamini_hochberg_by_hand():
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
