"""Ranking, report, plots, resume and claims, on records made by hand."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from broadsheet.catalogue import Claim, papers
from broadsheet.core import verdicts
from broadsheet.core.records import Record, RecordStore, write_json
from broadsheet.lab import claims, plots
from broadsheet.lab import compare as lab
from broadsheet.lab.report import html
from broadsheet.lab.table import rows
from broadsheet.methods.caches.bench import VIEW


def record(method, metric, value, budget=None, seed=0, ci=None, **setting):
    setting = {**({} if budget is None else {"budget": budget}), **setting}
    return Record("", method, "caches", metric, value, seed=seed, ci=ci, setting=setting, model="m@1")


def comparison():
    found = [record("full", "accuracy", 0.9), record("full", "bytes_ratio", 1.0)]
    for method, value in (("a", 0.5), ("b", 0.8), ("<script>", 0.1)):
        for seed in (0, 1):
            spread = 0.1 if seed else -0.1
            found.append(
                record(method, "accuracy", value + spread, 0.25, seed, (value + spread - 0.04, value + spread + 0.04))
            )
            found.append(record(method, "bytes_ratio", 0.24, 0.25, seed))
            for turn in (1, 2):
                found.append(record(method, "accuracy", value / turn, 0.25, seed, mode="multi-turn", turn=turn))
        found.append(record(method, "decode_time_ratio", 1.5, 0.25))
        found.append(record(method, "prefill_time_ratio", 2.0, 0.25))
    return [*found, record("c", "reachable", 0.0, 0.25, least=0.4)]


def test_rows_are_ranked_within_a_budget_with_the_unreachable_last():
    table = rows(comparison())
    assert [row.method for row in table] == ["full", "b", "a", "<script>", "c"]
    assert table[1].values["accuracy"] == pytest.approx(0.8)
    # Two independent seeds of half-width 0.04: the mean's is 0.04 / sqrt(2).
    low, high = table[1].intervals["accuracy"]
    assert (high - low) / 2 == pytest.approx(0.04 / 2**0.5)
    assert table[1].get("accuracy", mode="multi-turn", turn=2) == pytest.approx(0.4)
    assert table[-1].least == 0.4


def test_text_is_ranked_by_divergence_smallest_first():
    found = [record(name, "kl", value, 0.5) for name, value in (("a", 0.3), ("b", 0.1), ("c", 0.2))]
    assert [row.method for row in rows(found)] == ["b", "c", "a"]


def test_the_report_is_one_page_without_scripts_and_escapes_names():
    page = html(comparison(), "A & B")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "A &amp; B" in page
    assert page.count("<svg") == 3
    assert "cannot go below 0.400" in page
    for outside in ("src=", "@import", "url("):
        assert outside not in page.replace("url(#", "")


def test_pictures_are_the_same_bytes_for_the_same_records():
    table = rows(comparison())
    assert plots.svg(plots.quality_against_price(table, VIEW.qualities[0], VIEW)) == plots.svg(
        plots.quality_against_price(table, VIEW.qualities[0], VIEW)
    )
    assert plots.quality_by_turn(rows([record("a", "accuracy", 0.5, 0.5)]), "multi-turn", "full") is None
    assert plots.time_bars(rows([record("a", "accuracy", 0.5, 0.5)]), VIEW) is None


@dataclasses.dataclass(frozen=True)
class Workload:
    model: str = "m"
    seed: int = 0


class Bench:
    """A bench that counts its cells and can be interrupted in one of them."""

    VIEW = VIEW

    def __init__(self):
        self.ran = []
        self.stop_at = None

    def methods(self):
        return {name: SimpleNamespace(parameters={}, budgeted=name != "full") for name in ("full", "a", "b")}

    def workload_key(self, workload):
        return dataclasses.asdict(workload)

    def measure(self, name, method, workload, budget):
        if (name, workload.seed) == self.stop_at:
            raise KeyboardInterrupt
        self.ran.append((name, budget, workload.seed))
        return [record(name, "accuracy", 0.5, budget, workload.seed)]


@pytest.fixture
def bench(monkeypatch):
    fake = Bench()
    monkeypatch.setattr(lab, "bench", lambda family: fake)
    monkeypatch.setattr(lab, "identity", lambda model: model)
    return fake


def test_an_interrupted_comparison_goes_on_where_it_stopped(bench, tmp_path):
    store = RecordStore(tmp_path / "records.jsonl")
    bench.stop_at = ("b", 1)
    with pytest.raises(KeyboardInterrupt):
        lab.compare("caches", Workload(), budgets=(0.5,), seeds=2, store=store)
    before = list(bench.ran)
    bench.stop_at = None
    records = lab.compare("caches", Workload(), budgets=(0.5,), seeds=2, store=store)
    assert bench.ran[: len(before)] == before
    assert len(bench.ran) == len(set(bench.ran)) == 6, "no cell ran twice"
    assert {(r.method, r.seed) for r in records} == {(m, s) for m in ("full", "a", "b") for s in (0, 1)}
    lab.compare("caches", Workload(), budgets=(0.5,), seeds=2, store=store)
    assert len(bench.ran) == 6
    lab.compare("caches", Workload(), budgets=(0.5,), seeds=2, store=store, fresh=True)
    assert len(bench.ran) == 12


def test_cells_of_other_code_or_another_model_are_measured_again(bench, tmp_path, monkeypatch):
    store = RecordStore(tmp_path / "records.jsonl")
    lab.compare("caches", Workload(), methods=["a"], budgets=(0.5,), store=store)
    monkeypatch.setattr(lab, "source_digest", lambda family: "other")
    lab.compare("caches", Workload(), methods=["a"], budgets=(0.5,), store=store)
    lab.compare("caches", Workload(model="n"), methods=["a"], budgets=(0.5,), store=store)
    assert len(bench.ran) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["z"]}, "unknown method 'z'"),
        ({"budgets": (0.0,)}, "above 0"),
        ({"budgets": (1.5,)}, "at most 1"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_bad_input(bench, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.compare("caches", Workload(), store=RecordStore(tmp_path / "r"), **arguments)


def test_a_claims_status_comes_from_records_alone(tmp_path):
    write_json([record("a", "accuracy", 0.7)], str(tmp_path / "x.records.json"))
    records = claims.committed(tmp_path)
    assert [r.value for r in records] == [0.7]
    claim = Claim("i", "metric", "setting", "paper", test="how", check="lab.test_lab:verdict")
    assert claims.status(claim, records) == claims.Status("holds", "0.7")
    assert claims.status(claim, ()) == claims.Status(claims.OPEN)
    assert claims.status(Claim("i", "m", "s", "p", reason="why"), records).status == claims.UNTESTABLE


def verdict(records):
    return (verdicts.HOLDS, f"{records[0].value}") if records else None


def test_every_check_in_the_catalogue_gives_a_known_verdict():
    known = {verdicts.HOLDS, verdicts.DIRECTION, verdicts.FAILS, claims.UNTESTABLE, claims.OPEN}
    for paper in papers().values():
        for status in claims.statuses(paper):
            assert status.status in known
            assert status.ours or status.status in (claims.UNTESTABLE, claims.OPEN)


def test_the_claims_page_is_what_the_records_say():
    page = Path(claims.__file__).parents[3] / "docs" / "claims.md"
    if not page.is_file():
        pytest.skip("not a checkout")
    written = page.read_text(encoding="utf-8")
    assert written == claims.page(), "run: broadsheet claims --write"


def test_sizes_are_read_as_people_write_them():
    from broadsheet.lab.run import _bytes

    assert [_bytes(text) for text in ("120MB", "300KB", "300 kb", "1.5GiB", "2g", "4000000", 7)] == [
        120_000_000, 300_000, 300_000, 1_610_612_736, 2_000_000_000, 4_000_000, 7,
    ]  # fmt: skip
    for text in ("", "MB", "-3", "0", "1.2.3", "3TB"):
        with pytest.raises(ValueError, match="120MB"):
            _bytes(text)


def test_run_and_compare_find_each_others_cells(monkeypatch):
    from broadsheet.lab import compare
    from broadsheet.lab.run import run_method

    measured, module = [], compare.bench("caches")
    real = module.measure

    def measure(name, *more):
        measured.append(name)
        return real(name, *more)

    monkeypatch.setattr(module, "measure", measure)
    small = {"tasks": ("kv",), "modes": ("multi-turn",), "sessions": 1, "context_tokens": 128, "turns": 1, "timing": False}
    first = run_method("caches", "snapkv", small)
    assert measured == ["full", "snapkv"]
    told = []
    again = run_method("caches", "snapkv", small, since="", progress=lambda cell, n, of, stored: told.append(stored))
    assert again == first
    assert told == [True, True]
    compare.compare("caches", module.Workload(**small), ["full"], [0.5])
    assert measured == ["full", "snapkv"]  # compare had it from run
    run_method("caches", "snapkv", small, since="9999-01-01T00:00:00Z")
    run_method("caches", "snapkv", small)
    assert measured == ["full", "snapkv"] * 3


def test_a_sheet_is_the_table_as_text():
    from broadsheet.lab import report

    shown = report.sheet([record("full", "accuracy", 0.9), record("gear", "accuracy", 0.8, 0.25)])
    assert shown.heads[:2] == ("method", "budget")
    assert [(kind, cells[0]) for kind, cells in shown.rows] == [("", "full"), ("best", "gear")]
    out = report.sheet([record("full", "accuracy", 0.9), record("gear", "reachable", 0.0, 0.1, least=0.2)])
    assert out.rows[-1] == ("out", ("gear", "0.1", "cannot go below 0.200 of the full cache here"))
