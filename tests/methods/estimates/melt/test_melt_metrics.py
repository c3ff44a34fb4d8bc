"""Energy of windows, rates, spreads; conversations."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from broadsheet.methods.estimates.melt.conversations import (
    draw_conversations,
    microworld_starters,
    read_conversations,
    sustained,
    write_conversations,
)
from broadsheet.methods.estimates.melt.metrics import (
    Energy,
    PowerTrace,
    Spread,
    Turn,
    Window,
    over_time,
    row,
    stability,
    tokens_per_battery,
)

PUBLIC = Path(os.environ.get("MELT_PUBLIC", "/nowhere")) / "src" / "prompts"


def turn(start=0.0, prefill=1.0, decode=2.0, tokens=10, iteration=0):
    middle = start + 0.1 + prefill
    return Turn(
        iteration, 0, 0, Window(start, middle + decode + 0.1), Window(start + 0.1, middle), Window(middle, middle + decode),
        0.2, 20, tokens, 0, middle,
    )  # fmt: skip


def test_constant_power_has_the_energy_of_the_schoolbook():
    time = np.arange(0, 37.0)
    trace = PowerTrace.of_samples(time, np.full(37, 500.0), np.full(37, 4.0))
    assert trace.energy(0, 36) == pytest.approx(20.0, rel=1e-12)
    assert trace.discharge(0, 36) == pytest.approx(5.0, rel=1e-12)
    # the authors' selection of samples strictly inside loses two intervals
    golden = json.loads((Path(__file__).parents[3] / "golden" / "melt_official.json").read_text())["power_constant"]
    assert golden["all"] == pytest.approx([trace.energy(0, 36), trace.discharge(0, 36)])
    assert golden["inside"][0] == pytest.approx(trace.energy(1, 35))


def test_irregular_samples_and_windows_cut_between_them():
    rng = np.random.default_rng(0)
    time = np.concatenate([[0], np.cumsum(rng.uniform(0.001, 0.5, 200))])
    trace = PowerTrace.of_samples(time, 100 + 20 * time, np.full(201, 4.0))  # mA, a ramp: linear between samples, so exact
    for start, end in ((0.0, 5.0), (0.123, 17.77), (3.3, 3.301)):
        exact = (100 * (end - start) + 10 * (end**2 - start**2)) / 3600
        assert trace.discharge(start, end) == pytest.approx(exact, rel=1e-9)
        assert trace.energy(start, end) == pytest.approx(4 * exact, rel=1e-9)
    cut = 7.654321
    assert trace.energy(0, cut) + trace.energy(cut, 20) == pytest.approx(trace.energy(0, 20), rel=1e-12)


def test_counter_of_joules():
    trace = PowerTrace.of_joules([0, 1, 2, 3], [10, 12, 16, 16])
    assert trace.energy(0, 3) == pytest.approx(6 / 3.6)
    assert trace.energy(1.5, 2.5) == pytest.approx(2 / 3.6)
    assert trace.discharge(0, 1) is None
    assert trace.mean_power(0, 1) == pytest.approx(2000.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerTrace.of_samples([0.0], [1.0], [1.0]), "at least 2"),
        (lambda: PowerTrace.of_samples([0, 1, 1], [1.0] * 3, [1.0] * 3), "must increase"),
        (lambda: PowerTrace.of_samples([0, 1], [1.0, np.nan], [1.0] * 2), "finite"),
        (lambda: PowerTrace.of_samples([0, 1], [1.0] * 2, [1.0] * 2).energy(0.5, 1.5), r"covers 0.000 to 1.000 s"),
        (lambda: PowerTrace.of_samples([0, 1], [1.0] * 2, [1.0] * 2).energy(1, 0), "before it starts"),
        (lambda: tokens_per_battery(0, 3.8, 1), "above 0"),
    ],
)
def test_bad_power_is_refused_in_a_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_energy_of_a_turn():
    trace = PowerTrace.of_samples(np.arange(0, 10, 0.5), np.full(20, 900.0), np.full(20, 4.0))  # 3.6 W: 1 mWh a second
    energy = Energy.of(turn(), trace, idle_power=1800.0)
    assert energy.total == pytest.approx(3.2)
    assert energy.prefill == pytest.approx(1.0)
    assert energy.decode == pytest.approx(2.0)
    assert energy.per_token == pytest.approx(0.32)  # as the authors: prefill is charged to the output tokens
    assert energy.decode_per_token == pytest.approx(0.2)
    assert energy.discharge_per_token == pytest.approx(0.08)
    assert energy.net == pytest.approx(1.6)
    assert tokens_per_battery(4000, 3.85, energy.per_token) == pytest.approx(4000 * 3.85 / 0.32)


def test_rates_and_what_is_missing():
    one = turn()
    assert one.prefill_tps == pytest.approx(20)
    assert one.decode_tps == pytest.approx(5)
    assert one.ttft == pytest.approx(1.1)
    assert one.unaccounted == pytest.approx(0, abs=1e-9)
    silent = turn(tokens=0, decode=0.0)
    trace = PowerTrace.of_samples([0, 10], [900.0] * 2, [4.0] * 2)
    assert silent.decode_tps is None
    assert Energy.of(silent, trace).per_token is None
    assert row(silent)["tps"] is None
    spread = Spread.of([1.0, None, 3.0, 2.0, None])
    assert (spread.median, spread.n, spread.missing) == (2.0, 3, 2)
    assert Spread.of([None]) is None


def test_stability_is_of_repetitions():
    steady = [turn(decode=2 + 0.01 * i, iteration=i) for i in range(3)]
    spread, stable = stability(steady)
    assert stable
    assert spread < 0.01
    shaky = [turn(decode=2 + i, iteration=i) for i in range(3)]
    assert not stability(shaky)[1]
    assert not stability(steady[:1])[1]  # one repetition proves nothing


def test_the_rate_over_time():
    turns = [turn(start=start, decode=decode) for start, decode in ((0, 1.0), (10, 1.0), (61, 2.0), (200, 4.0))]
    assert [(span.start, span.turns, span.rate) for span in over_time(turns)] == [
        (0, 2, pytest.approx(10)), (60, 1, pytest.approx(5)), (180, 1, pytest.approx(2.5)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="longer than 0 seconds"):
        over_time(turns, 0)


def test_the_drawing_rule():
    starters = microworld_starters(60)
    drawn = draw_conversations(starters, 50, 42)
    assert len(drawn) == 50
    assert {len(one) for one in drawn} == {6, 7, 8, 9, 10}
    assert all(len(set(one)) == len(one) for one in drawn)
    assert drawn == draw_conversations(starters, 50, 42)
    assert drawn != draw_conversations(starters, 50, 43)
    long = [*starters, "x" * 1500]
    assert draw_conversations(long, 50, 42) == drawn  # 1500 characters are too many
    with pytest.raises(ValueError, match="9 usable starters"):
        draw_conversations(starters[:9])
    assert [len(one) for one in sustained(starters, 70)] == [70]


def test_files_in_the_public_format(tmp_path):
    path = tmp_path / "conversations.json"
    conversations = [("a", "b"), ("ä?",)]
    write_conversations(conversations, path)
    assert read_conversations(path) == conversations
    for text, message in (
        ("[", "is not JSON"),
        ("{}", "no list of conversations"),
        ('[["a"], "b"]', "conversation 1 is not"),
        ('[["a", " "]]', "conversation 0 is not"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conversations(path)
    with pytest.raises(ValueError, match="no conversations at"):
        read_conversations(tmp_path / "none")


@pytest.mark.skipif(not PUBLIC.is_dir(), reason="MELT_PUBLIC names no checkout of brave-experiments/MELT-public")
def test_the_public_files_unchanged():
    found = read_conversations(PUBLIC / "conversations.json")
    assert len(found) == 50
    assert {len(one) for one in found} == {6, 7, 8, 9, 10}
    assert max(len(prompt) for one in found for prompt in one) < 1500
    assert [len(one) for one in read_conversations(PUBLIC / "input_sustained.json")] == [48]
