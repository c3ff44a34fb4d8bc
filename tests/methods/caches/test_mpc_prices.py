"""Prices of secret-shared operators: the measurements, and the model fitted to them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from broadsheet.methods.caches import mpc_prices as prices
from broadsheet.methods.caches.mpc_prices import Operator, calibrate, operator_price, spu_prices

needs_spu = pytest.mark.skipif("BROADSHEET_SPU_PYTHON" not in os.environ, reason="BROADSHEET_SPU_PYTHON is not set")
#: the step of 18 fractional bits
ULP = 2.0**-18


@pytest.fixture(scope="module")
def records():
    return [r for r in json.loads(prices.RESULTS.read_text()) if r["op"] != "setup"]


# --- against real SPU runs ----------------------------------------------------------------------------------


@needs_spu
@pytest.mark.timeout(1800)
def test_acceptance_7_spu_reproduces_reference_costs():
    """The reference is one run's rank 0; ABY3 draws at random which rank does the heavy part of a truncation or
    conversion, so the reference must be within 15 % of one of the ranks."""
    reference = {"qk": 65_536, "softmax_stock": 2.87e6, "one_hot": 6.82e6}
    items = [{"op": op, "T": 512, "k": 64, "H": 8, "d": 64} for op in reference]
    items += [{"op": "topk", "T": 512, "k": 64, "H": 8, "repeats": 8}]
    done = subprocess.run(
        [os.environ["BROADSHEET_SPU_PYTHON"], str(prices.SPU_JOB)],
        capture_output=True,
        text=True,
        input=json.dumps({"protocol": "aby3", "ops": items}),
        check=True,
    )
    results = {r["op"]: r for r in json.loads(done.stdout)["results"]}
    assert all(r["max_abs_error"] <= 1e-2 for r in results.values())
    for op, expected in reference.items():
        ranks = results[op]["samples"][0]["bytes"]
        assert min(abs(sent / expected - 1) for sent in ranks) <= 0.15, (op, ranks)
    # Top-k picks random pivots: the reference, one draw, must lie among the draws.
    draws = [s["bytes"][0] for s in results["topk"]["samples"]]
    assert min(draws) <= 0.44e6 <= max(draws)


# --- on the committed records -------------------------------------------------------------------------------


def test_acceptance_7_recorded_results_equal_plaintext(records):
    """Within 1e-2 for the operators of the check, whatever the protocol and size. Attention is the exception, by SPU's
    exponential, (1 + x / 256)**256, off by x**2 / 512: against plaintext that computes it so, it is right too."""
    assert {r["protocol"] for r in records} == set(prices.PROTOCOLS)
    for r in records:
        if not r["op"].startswith("attention"):
            assert r["max_abs_error"] <= 1e-2, r
    worst = max((r for r in records if r["op"] == "attention"), key=lambda r: r["max_abs_error"])
    assert worst["max_abs_error"] > 1e-2  # so the exception is needed ...
    assert worst["max_abs_error"] > 10 * worst["max_fixed_point_error"]  # ... and exp is its cause


def fixed_point_bound(op: str, T: int, d: int) -> float:
    """The largest error that 18 fractional bits can leave in the operators, on standard normal inputs.

    Each term of a sum of products is off by up to 2 steps through its rounded factors (mean |a| + |b| is 1.6) and 2
    through its truncation; a few single numbers by up to twice their size of 4. The exponential squares a number near
    1 eight times: what that is off by, up to 3 steps, becomes 2**8 times as much, relative to the result, in
    numerator and denominator of a softmax.
    """
    terms = {"qk": d, "cosine": d, "gather": 1, "gather_fixed": 1}.get(op, d if op.startswith("sim") else 0)
    steps = 4 * terms + 8
    if op.startswith(("softmax", "attention")):
        steps += 2 * 3 * 2**8
    if op.startswith("attention"):
        steps += 4 * (d + T)
    return steps * ULP


def test_arithmetic_errors_are_those_of_fixed_point(records):
    for r in records:
        assert r["max_fixed_point_error"] <= fixed_point_bound(r["op"], r["T"], r["d"]), r


def test_aby3_total_does_not_depend_on_the_draw_of_ranks(records):
    """The per-party mean is exactly linear in the tokens although every rank's own count is random."""
    sent = {r["T"]: r for r in records if r["op"] == "qk" and r["protocol"] == "aby3" and (r["H"], r["d"]) == (8, 64)}
    assert sent[1024]["bytes"] == pytest.approx(2 * sent[512]["bytes"], rel=1e-9)
    assert len(set(sent[512]["bytes_by_rank"] + sent[1024]["bytes_by_rank"])) > 2


def held_out_errors(records, protocol):
    """By operator, the largest relative errors of bytes and rounds on sizes that were not fitted."""
    worst: dict[str, tuple[float, float]] = {}
    for r in records:
        if r["protocol"] == protocol and r["split"] == "held_out":
            operator = Operator(r["op"], r["T"], r["k"], r["H"], r["d"])
            sent, rounds, _ = operator_price(operator, protocol)
            old = worst.get(r["op"], (0.0, 0.0))
            new = abs(sent / r["bytes"] - 1), abs(rounds / r["actions"] - 1)
            worst[r["op"]] = (max(old[0], new[0]), max(old[1], new[1]))
    return worst


@pytest.mark.parametrize("protocol", ["aby3", "semi2k"])
def test_acceptance_9_model_error_on_held_out_sizes(records, protocol):
    errors = held_out_errors(records, protocol)
    assert len(errors) == 16
    for op, (sent, rounds) in errors.items():
        assert sent <= 0.10, op
        assert rounds <= 0.10, op


def test_acceptance_9_cheetah_holds_for_some_operators_only(records):
    errors = held_out_errors(records, "cheetah")
    beyond = {op for op, error in errors.items() if max(error) > 0.10}
    # Refills of the pool of oblivious transfers are random (top-k, one-hot), and how elementwise products are cut into
    # ciphertexts below 16,384 elements is not modelled (the two `sim`, which no step under "linear" uses).
    assert beyond == {"topk", "one_hot", "sim_max", "sim_linear"}
    assert len(errors) == 12
    assert errors["topk"][0] <= 0.5


def test_calibrate_reproduces_the_shipped_model(tmp_path):
    refitted = calibrate(prices.RESULTS, tmp_path / "fit.json")
    shipped = json.loads(prices.FITTED.read_text())
    assert refitted["protocols"].keys() == shipped["protocols"].keys()
    for protocol, fits in shipped["protocols"].items():
        assert refitted["protocols"][protocol]["ops"].keys() == fits["ops"].keys()
        for op, fit in fits["ops"].items():
            for target in ("bytes", "rounds", "cpu_s"):
                assert refitted["protocols"][protocol]["ops"][op][target] == pytest.approx(fit[target])
    assert json.loads((tmp_path / "fit.json").read_text()) == refitted


def test_calibrate_uses_fit_sizes_only(tmp_path):
    """Spoiling the held-out records changes the reported error, not the coefficients."""
    measured = json.loads(prices.RESULTS.read_text())
    spoiled = [{**r, "bytes": 2 * r["bytes"]} if r.get("split") == "held_out" else r for r in measured]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(spoiled))
    fit = calibrate(path, tmp_path / "fit.json")["protocols"]["aby3"]["ops"]["softmax"]
    shipped = json.loads(prices.FITTED.read_text())["protocols"]["aby3"]["ops"]["softmax"]
    assert fit["bytes"] == pytest.approx(shipped["bytes"])
    assert fit["max_relative_error"]["bytes"]["held_out"] == pytest.approx(0.5, abs=0.01)


# --- pieces of the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(16, 3), (512, 64), (1024, 128)])
def test_quickselect_simulation_agrees_with_theory(n, k):
    """Knuth (1971): expected comparisons of quickselect for the k-th of n."""

    def harmonic(m):
        return np.sum(1 / np.arange(1, m + 1))

    expected = 2 * (n + 3 + (n + 1) * harmonic(n) - (k + 2) * harmonic(k) - (n + 3 - k) * harmonic(n + 1 - k))
    comparisons, calls = prices._quickselect(n, k)
    assert comparisons == pytest.approx(expected, rel=0.03)
    assert prices._quickselect(n, k, heads=8)[1] > 1.2 * calls


def test_ciphertexts_of_a_product():
    # [1, 64] x [64, 128] fits one polynomial of 8192: one sent, one returned.
    assert prices._product_ciphertexts(1, 64, 128) == (1, 1, 0)
    assert prices._product_ciphertexts(3, 26, 16) == (1, 1, 0)
    # Larger ones, as SPU's messages show: [1, 410] x [410, 64] sends two, [6, 64] x [64, 2048] returns two.
    assert prices._product_ciphertexts(1, 410, 64) == (2, 1, 1)
    assert prices._product_ciphertexts(6, 64, 2048) == (1, 2, 1)
    # [64, 512] x [512, 64]: SPU sends 40 messages for eight heads.
    assert sum(prices._product_ciphertexts(64, 512, 64)[:2]) == 5


def test_noisy_values_are_not_fitted_to_their_lows():
    """Refills of a pool: rare and large. Fitted relative to the values, the mean would come out far too low."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, 400)
    values = 1.0 * sizes + 500 * rng.poisson(sizes / 500)
    fit = prices._fit([{"size": float(size)} for size in sizes], values.tolist())
    assert fit["size"] == pytest.approx(2.0, rel=0.2)


# --- bad input ----------------------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(ValueError, match="unknown operator 'sort' for aby3: use one of attention"):
        operator_price(Operator("sort"))
    with pytest.raises(ValueError, match="unknown protocol 'spdz': use one of aby3, semi2k, cheetah"):
        operator_price(Operator("qk", 16, 0, 1, 64), "spdz")
    with pytest.raises(FileNotFoundError, match=r"run benchmarks/mpc/measure\.py first"):
        calibrate("/nowhere/results.json")


def test_spu_environment_missing(monkeypatch):
    monkeypatch.delenv("BROADSHEET_SPU_PYTHON", raising=False)
    with pytest.raises(RuntimeError, match="needs BROADSHEET_SPU_PYTHON") as caught:
        spu_prices([Operator("qk", 16, 0, 1, 64)], "aby3")
    assert "\n" not in str(caught.value)


def test_spu_environment_wrong(monkeypatch):
    monkeypatch.setenv("BROADSHEET_SPU_PYTHON", "/nowhere/python")
    with pytest.raises(RuntimeError, match="/nowhere/python cannot be run"):
        spu_prices([Operator("qk", 16, 0, 1, 64)], "aby3")
    monkeypatch.setenv("BROADSHEET_SPU_PYTHON", sys.executable)  # a python without spu
    with pytest.raises(RuntimeError, match=r"SPU run failed: .*No module named"):
        spu_prices([Operator("qk", 16, 0, 1, 64)], "aby3")
