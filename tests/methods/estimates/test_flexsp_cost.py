"""FlexSP's cost model: published numbers, bytes, memory, calibration, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest

from broadsheet.methods.estimates.flexsp.cost import Sample, SPCostModel, presets

COST = SPCostModel.from_preset("gpt-7b-a100")


def test_check1_published_constants_give_the_published_times():
    assert COST.all_to_all(8192, 8) == pytest.approx(21.22, abs=0.01)
    assert COST.all_to_all(8192, 16) == pytest.approx(99.13, abs=0.01)
    assert COST.compute(8192, 8) == pytest.approx(231.39, abs=0.01)
    assert COST.compute(8192, 16) == pytest.approx(115.69, abs=0.01)
    assert COST.all_to_all(8192, 1) == 0


def test_a_group_is_its_bias_and_its_sequences():
    lengths = [512, 8192, 30_000]
    total = sum(COST.compute(s, 8) + COST.all_to_all(s, 8) for s in lengths)
    assert COST.group_time(lengths, 8) == pytest.approx(total + COST.beta1)
    assert COST.group_time([], 8) == 0
    assert COST.times(lengths, (1, 8)).tolist() == [[COST.sequence_time(s, d) for d in (1, 8)] for s in lengths]


def test_grouped_query_heads_move_fewer_bytes_and_never_less_than_a_head_each():
    few = replace(COST, heads=64, kv_heads=8)
    assert few.volume(4096, 4) == pytest.approx(COST.volume(4096, 4) * (2 + 2 / 8) / 4)
    assert few.volume(4096, 8) == pytest.approx(COST.volume(4096, 8) * (2 + 2 / 8) / 4)
    assert few.volume(4096, 32) == pytest.approx(COST.volume(4096, 32) * (2 + 2 / 2) / 4)  # 8 heads, each four times
    assert few.volume(4096, 64) == pytest.approx(COST.volume(4096, 64))


@pytest.mark.parametrize(("name", "tokens"), [("gpt-7b-a100", 6449), ("gpt-13b-a100", 6483), ("gpt-30b-a100", 6627)])
def test_capacity_is_that_of_the_official_code(name, tokens):
    """`flexSPCostModel.token_capacity(30)` of PKU-DAIR/Hetu-Galvatron b466689, 64 devices, 192K."""
    assert SPCostModel.from_preset(name).capacity(64, 30, 192_000) == tokens


def test_states_grow_with_the_context_between_and_beyond_what_is_known():
    at = [COST.states(64, thousands * 1000) for thousands in (1, 4, 100, 192, 288, 384, 480)]
    assert at == sorted(at)
    assert at[0] == at[1] == pytest.approx(16 * 6.51 / 64 * 1024)
    assert at[4] == pytest.approx((at[3] + at[5]) / 2)
    assert at[6] - at[5] == pytest.approx(at[4] - at[3])
    assert replace(COST, parameters={192: 7.0}).states(64, 400_000) == pytest.approx(16 * 7 / 64 * 1024)


def test_presets_and_files_round_trip(tmp_path):
    for model in presets().values():
        assert SPCostModel.from_json(json.loads(json.dumps(model.to_json()))) == model
        assert "published" in model.origin
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(COST.to_json()))
    assert SPCostModel.load(str(path)) == COST
    path.write_text('{"alpha1": 1}')
    with pytest.raises(ValueError, match=r"mine\.json holds no cost model"):
        SPCostModel.load(str(path))


def _samples(truth, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for degree in (1, 2, 8):
        for _ in range(12):
            lengths = tuple(int(s) for s in rng.integers(500, 20_000, rng.integers(1, 8)))
            found.append(Sample(lengths, degree, truth.group_time(lengths, degree) * (1 + noise * rng.normal())))
    return found


def test_calibration_recovers_what_made_the_samples():
    truth = replace(COST, alpha1=3e-6, alpha2=0.07, beta1=120.0, bandwidth={2: 55.0, 8: 21.0})
    fit = COST.fit(_samples(truth))
    assert fit.r2 == pytest.approx(1)
    for name in ("alpha1", "alpha2", "beta1"):
        assert getattr(fit.model, name) == pytest.approx(getattr(truth, name), rel=1e-6)
    assert fit.model.bandwidth[2] == pytest.approx(55)
    assert fit.model.bandwidth[8] == pytest.approx(21)
    assert fit.model.bandwidth[64] == COST.bandwidth[64]  # no sample says otherwise
    noisy = COST.fit(_samples(truth, noise=0.02))
    assert 0.99 < noisy.r2 < 1
    assert noisy.model.alpha2 == pytest.approx(truth.alpha2, rel=0.2)


def test_calibration_refuses_samples_that_settle_nothing():
    with pytest.raises(ValueError, match="cannot settle 3 unknowns"):
        COST.fit([Sample((100,), 1, 1.0)])
    with pytest.raises(ValueError, match="vary lengths"):
        COST.fit([Sample((1000,), 1, 5.0)] * 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SPCostModel.from_preset("gpt-8b"), "no cost model 'gpt-8b'; there are gpt-13b-a100"),
        (lambda: COST.degrees(48), "48 devices are no power of two"),
        (lambda: replace(COST, heads=40).degrees(64, 16), "divides 40 heads"),
        (lambda: COST.capacity(64, 1, 192_000), "below the 1.8 GiB"),
        (lambda: COST.all_to_all(100, 128), "no bandwidth is known for groups of 128"),
        (lambda: replace(COST, alpha2=-1), "alpha2 is a time"),
        (lambda: replace(COST, activation=0), "activation must be above 0"),
        (lambda: replace(COST, kv_heads=7), "evenly"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert replace(COST, heads=40).degrees(64) == (1, 2, 4, 8)
