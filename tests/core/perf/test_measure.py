"""Measuring this machine, and the timer."""

from __future__ import annotations

import json
import os

import pytest
import torch
from command import broadsheet

from broadsheet.core.perf import measure
from broadsheet.core.perf.hardware import device
from broadsheet.core.perf.timing import alternately, pinned, spread


def test_contenders_take_turns_and_the_first_run_does_not_count() -> None:
    order: list[str] = []
    clock = iter(range(100))
    found = alternately({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, lambda: next(clock))
    assert order == ["a", "b"] * 3
    assert found == {"a": [1, 1], "b": [1, 1]}


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == pytest.approx(1.0)
    assert spread([1.0, 2.0]) == pytest.approx(1 / 1.5)


def test_pinning_ends_with_the_block() -> None:
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores)
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == before
    assert torch.get_num_threads() == threads


def test_two_processes_meet_and_their_link_has_a_rate() -> None:
    rate, latency = measure.link(megabytes=1)
    assert 1e6 < rate.value < 1e12
    assert rate.spread >= 0
    assert 0 < latency < 5


def test_this_machine_becomes_a_device(monkeypatch, tmp_path) -> None:
    """With few and small samples: the numbers are real, only noisier."""
    monkeypatch.setattr(measure, "WIDTHS", (64,))
    monkeypatch.setattr(measure, "ROWS", (1, 32))
    monkeypatch.setattr(measure, "SHAPES", ((64, 64), (256, 256)))
    monkeypatch.setattr(measure, "FLUSHED", 1_000_000)
    monkeypatch.setattr(measure, "link", lambda: (measure.Rate(1e9, 0.0), 1e-4))
    monkeypatch.setenv("BROADSHEET_HOME", str(tmp_path))
    shown = broadsheet("measure-hardware", "mine").stdout
    assert "--hardware mine" in shown
    mine = device("mine")
    assert set(mine.peaks) == {"fp32", "bf16", "fp16"}
    assert {origin for origin, _ in mine.origins.values()} == {"measured"}
    assert mine.efficiency.origin == "measured"
    words = ("--hardware", "mine", "--model", "pocket-2m", "-o", "context=64", "-o", "activation_bits=32", "--json", "-")
    found = json.loads(broadsheet("run", "llm-viewer", *words).stdout)
    assert found["totals"]["decode"]["seconds"] > 0
    assert "mine" in broadsheet("hardware").stdout
    assert "interquartile range is" in broadsheet("hardware", "mine").stdout


def test_a_device_that_ships_keeps_its_name() -> None:
    done = broadsheet("measure-hardware", "h100", check=False)
    assert done.returncode == 2
    assert "'h100' cannot be this machine's name" in done.stderr
