"""What one operator on secret-shared data costs: bytes, rounds and CPU time per party.

Two sources of prices:

- `operator_price`: linear functions of the sizes, fitted to measurements and shipped as `mpc_costs.json`.
  Refit with ``broadsheet mpc calibrate [results.json]``. The measured sizes and
  the largest errors, operator by operator, stand in that file; sizes beyond them are extrapolations.
- `spu_prices`: runs the operators under SecretFlow SPU now. SPU 0.9.5 needs jax 0.4.34 and numpy < 2, so it
  lives in an environment of its own, named by an environment variable::

      python3.11 -m venv spu-env
      spu-env/bin/pip install spu==0.9.5 jax==0.4.34 jaxlib==0.4.34 "numpy<2"
      export BROADSHEET_SPU_PYTHON=$PWD/spu-env/bin/python

Protocols, all semi-honest, 64-bit ring, 18 fractional bits: ``aby3`` (3 parties, honest majority), ``semi2k``
(2 parties; SPU's trusted dealer hands out the multiplication triples, whose bytes are not counted) and
``cheetah`` (2 parties, no dealer; the keys and base transfers of a session, about 11 MB, are not counted).
The last two are therefore not comparable with each other. The fits of aby3 and semi2k are within 10 % on held-out
sizes; those of cheetah are not for all operators (it refills its pool of oblivious transfers, 0.6 MB at a time, in
whichever operator empties it, and cuts work by the machine's cores).

Units. *bytes*: sent per party, the total over all parties divided by their number (ABY3 draws at random who
sends the larger share of a truncation or conversion, so one rank's count is not reproducible; the total is).
*rounds*: messages sent per party (SPU's send actions), which stand in for the sequential rounds. CPU time is the
roughest part of the model.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

PROTOCOLS = ("aby3", "semi2k", "cheetah")
FITTED = Path(__file__).with_name("mpc_costs.json")
CHECKOUT = Path(__file__).resolve().parents[4]
SPU_JOB = CHECKOUT / "benchmarks" / "mpc" / "spu_job.py"
RESULTS = CHECKOUT / "benchmarks" / "results" / "mpc_costs.json"

#: largest error of fixed-point arithmetic that passes for a right result
TOLERANCE = 1e-2
#: operators that SPU runs head by head: their rounds grow with the heads unless the heads share one call
PER_HEAD = {
    "qk",
    "attention",
    "attention_stock",
    "topk",
    "gather",
    "gather_fixed",
    "cosine",
    "sim_linear_matmul",
    "sim_max_by_sign",
}
Price = tuple[float, float, float]  # bytes, rounds, CPU seconds, each per party


@dataclass(frozen=True)
class Operator:
    """One secret-shared operator: T entries, k picked, H heads, d = head_dim (or row width of a gather)."""

    op: str
    T: int = 0
    k: int = 0
    H: int = 1
    d: int = 0
    label: str = field(default="", compare=False)


def check_protocol(protocol: str) -> None:
    """Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")


# --- the fitted model ---------------------------------------------------------------------------------------
# A cost is a sum of non-negative coefficients times features of the sizes. The features are what the protocols
# charge for: elements of inputs and outputs, ciphertexts, expected comparisons and calls of a quickselect.

SLOTS = 8192  # coefficients of one ciphertext (polynomial degree for a 64-bit ring)


@cache
def _quickselect(T: int, k: int, heads: int = 1) -> tuple[float, float]:
    """Expected (comparisons per head, comparison calls of the slowest of `heads`) of SPU's top-k, by
    simulation.

    SPU shuffles secretly, then quickselects: every call compares an interval with a random pivot, opens the
    outcome and goes on with the side that holds the k-th place; an interval of two takes one comparison.
    """
    rng = np.random.default_rng(0)
    size = np.full((4096, heads), T)
    rank = np.full_like(size, k)  # place of the k-th largest in the interval, from 1
    comparisons, calls = np.zeros_like(size), np.zeros_like(size)
    while (live := size >= 2).any():
        comparisons += np.where(live, size - 1, 0)
        calls += live
        pivot = rng.integers(1, np.maximum(size, 1) + 1)
        left, right = live & (rank < pivot), live & (rank > pivot)
        rank = np.where(right, rank - pivot, rank)
        size = np.where((size == 2) | ~live, 0, np.where(left, pivot - 1, np.where(right, size - pivot, 0)))
    return float(comparisons.mean()), float(calls.max(1).mean())


@cache
def _product_ciphertexts(m: int, n: int, p: int) -> tuple[int, int, int]:
    """Ciphertexts of a secret [m, n] x [n, p] product by packed homomorphic encryption (BumbleBee, section 4).

    A product of at most 8192 multiplications is one polynomial each way. A larger one is cut into blocks of
    m0 x n0 x p0 <= 8192 coefficients, n0 a power of two: the side with fewer blocks is encrypted and sent, n0 result
    polynomials are packed into one reply, at a cost in time that grows with n0. Returns (sent, replies, packed) of
    the cheapest cut; packed is 0 if the result is a single polynomial, for which smaller ciphertexts do.
    """
    if m * n * p <= SLOTS:
        return 1, 1, 0
    best = (math.inf, 0, 0, 0)
    for m0 in range(1, min(m, SLOTS) + 1):
        n0 = 1
        while n0 <= n and m0 * n0 <= SLOTS:
            rows, inner = -(-m // m0), -(-n // n0)
            columns = -(-p // min(p, SLOTS // (m0 * n0)))
            sent, replies = min(rows, columns) * inner, -(-rows * columns // n0)
            best = min(best, (sent + replies + n0 * 1e-6, sent, replies, int(rows * columns > 1)))
            n0 *= 2
    return best[1:]


def _ciphertexts(elements: int) -> int:
    """Ciphertexts of an elementwise product: two halves, each in blocks of 8192."""
    return 2 * -(-elements // (2 * SLOTS))


def _pieces(elements: int) -> int:
    """Parallel pieces of an oblivious transfer: one per 2048 elements, at most three on the measured machine.

    SPU bounds them by the number of cores, so CHEETAH sends a little more on a larger machine.
    """
    return min(3, -(-elements // 2048))


def _features(
    op: str, T: int, k: int, H: int, d: int, loops: int, packed: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Features of (bytes, rounds).

    `loops`: how many times a per-head operator is called (H, or 1 in parallel); `packed`: the protocol sends
    ciphertexts.
    """
    rows: dict[str, float] = {"1": 1.0, "H": H}
    rounds: dict[str, float] = {"1": 1.0}

    def add(features: dict[str, float], **more: float) -> None:
        for name, value in more.items():
            features[name] = features.get(name, 0.0) + value

    def product(m: int, n: int, p: int) -> None:
        add(rows, inputs=H * (m * n + n * p), outputs=H * m * p)
        rounds["loops"] = loops
        if packed:
            sent, replies, packing = _product_ciphertexts(m, n, p)
            add(rows, packed=H * packing, sent_packed=H * sent * packing, sent_alone=H * sent * (1 - packing))
            add(rows, replies=H * replies)
            add(rounds, ciphertexts=loops * (sent + replies))

    def elementwise(n: int, name: str) -> None:
        rows[name] = n
        if packed:
            rows[f"ct({name})"] = _ciphertexts(n)
            rows[f"pieces({name})"] = rounds[f"pieces({name})"] = _pieces(n)

    if op in ("softmax", "softmax_stock", "attention", "attention_stock"):
        elementwise(H * T, "H*T")
        # The max halves its entries level by level and meets every odd one out in a further comparison.
        rounds["levels"] = T.bit_length() + T.bit_count() - 2
        if op.startswith("attention"):
            product(1, d, T)
            product(1, T, d)
    elif op == "qk":
        product(1, d, T)
    elif op == "topk":
        comparisons, calls = _quickselect(T, k)
        rows.update({"H*T": H * T, "H*comparisons": H * comparisons, "H*calls": H * calls})
        rounds = {"loops": loops, "loops*calls": loops * calls}
        if packed:
            rows["H*ct(T)"] = H * _ciphertexts(T)
    elif op in ("one_hot", "one_hot_arithmetic"):
        elementwise(H * k * T, "H*k*T")
    elif op in ("gather", "gather_fixed"):
        product(k, T, d)
    elif op == "cosine":
        elementwise(H * T * d, "H*T*d")
        elementwise(H * T, "H*T")
        elementwise(H * d, "H*d")
        product(1, d, T)
    elif op in ("sim_max", "sim_linear"):
        elementwise(H * T * d, "H*T*d")
        elementwise(H * d, "H*d")
    elif op == "sim_linear_matmul":
        elementwise(H * T * d, "H*T*d")
        product(1, d, T)
    elif op == "sim_max_by_sign":
        elementwise(H * d, "H*d")
        product(1, 2 * d, T)
    elif op == "cluster_update":
        elementwise(H * d, "H*d")
    else:
        raise ValueError(f"unknown operator {op!r}")
    return rows, rounds


def _multiplications(op: str, T: int, k: int, H: int, d: int) -> float:
    """Local multiplications: what CPU time depends on beside what is sent."""
    return H * d * T * (k if op.startswith("gather") else 1)


@cache
def _fitted() -> dict[str, Any]:
    return json.loads(FITTED.read_text())


def operator_price(operator: Operator, protocol: str = "aby3", parallel_heads: bool = False) -> Price:
    """Bytes, rounds and CPU seconds per party of one operator, by the fitted model.

    Raises ValueError for an unknown operator or protocol.
    """
    check_protocol(protocol)
    op, T, k, H, d = operator.op, operator.T, operator.k, operator.H, operator.d
    fits = _fitted()["protocols"][protocol]["ops"]
    if op not in fits:
        raise ValueError(f"unknown operator {op!r} for {protocol}: use one of {', '.join(sorted(fits))}")
    rows, rounds = _features(op, T, k, H, d, loops=1 if parallel_heads else H, packed=protocol == "cheetah")
    if op == "topk" and parallel_heads:
        rounds["loops*calls"] = _quickselect(T, k, heads=H)[1]  # all wait for the slowest head
    compute = rows | {"multiplications": _multiplications(op, T, k, H, d)}
    fit = fits[op]
    return _evaluate(fit["bytes"], rows), _evaluate(fit["rounds"], rounds), _evaluate(fit["cpu_s"], compute)


def _evaluate(coefficients: Mapping[str, float], features: Mapping[str, float]) -> float:
    return sum(c * features[name] for name, c in coefficients.items())


def _fit(features: list[dict[str, float]], values: list[float]) -> dict[str, float]:
    """Non-negative least squares on the *relative* error; coefficients that come out as 0, or as what rounding leaves of it
    (which depends on the machine), are left out.

    Relative first to the values, then to what that fit expects: where values are random (top-k's pivots, refills of
    a pool), dividing by the value itself would let chance lows count most.
    """
    names = list(features[0])
    x = np.array([[f[name] for name in names] for f in features], float)
    y = np.asarray(values, float)
    expected = y
    for _ in range(2):
        relative = x / expected[:, None]
        scale = np.maximum(relative.max(0), 1e-300)
        solution = nnls(relative / scale, y / expected)[0] / scale
        expected = np.maximum(x @ solution, 1e-300)
    shares = (x * solution / expected[:, None]).max(0)
    return {name: float(c) for name, c, share in zip(names, solution, shares) if share > 1e-9}


def calibrate(results_path: str | Path = RESULTS, out: str | Path = FITTED) -> dict[str, Any]:
    """Refits the cost model from measured results, writes it to `out` and returns it.

    Each fit uses the records marked "fit"; its largest relative errors on them and on the records marked
    "held_out" are written beside the coefficients. Raises FileNotFoundError if there are no results.
    """
    results_path = Path(results_path)
    if not results_path.exists():
        raise FileNotFoundError(f"{results_path} does not exist: run benchmarks/mpc/measure.py first")
    records = json.loads(results_path.read_text())
    model: dict[str, Any] = {
        "units": "bytes and messages sent per party, CPU seconds per party on one core",
        "versions": records[0]["versions"],
        "date": max(r["date"] for r in records),
        "protocols": {},
    }
    for protocol in PROTOCOLS:
        measured = [r for r in records if r["protocol"] == protocol]
        if not measured:
            continue
        setup = next(r for r in measured if r["op"] == "setup")
        ops: dict[str, Any] = {}
        for op in dict.fromkeys(r["op"] for r in measured if r["op"] != "setup"):
            ops[op] = _fit_operator(op, [r for r in measured if r["op"] == op])
        model["protocols"][protocol] = {
            "parties": setup["parties"],
            "setup_bytes": setup["bytes"],
            "ops": ops,
        }
    Path(out).write_text(json.dumps(model, indent=1) + "\n")
    _fitted.cache_clear()
    return model


def _fit_operator(op: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    sizes = [{name: r[name] for name in ("T", "k", "H", "d")} for r in records]
    packed = records[0]["protocol"] == "cheetah"
    pairs = [_features(op, **s, loops=s["H"], packed=packed) for s in sizes]
    targets = {
        "bytes": ("bytes", [rows for rows, _ in pairs]),
        "rounds": ("actions", [rounds for _, rounds in pairs]),
        "cpu_s": (
            "cpu_s",
            [rows | {"multiplications": _multiplications(op, **s)} for (rows, _), s in zip(pairs, sizes)],
        ),
    }
    fitted: dict[str, Any] = {"max_relative_error": {}}
    for name, (key, features) in targets.items():
        chosen = [i for i, r in enumerate(records) if r["split"] == "fit"]
        fitted[name] = _fit([features[i] for i in chosen], [records[i][key] for i in chosen])
        fitted["max_relative_error"][name] = {
            split: max(
                abs(_evaluate(fitted[name], f) / r[key] - 1) for f, r in zip(features, records) if r["split"] == split
            )
            for split in ("fit", "held_out")
        }
    fitted["sizes"] = {name: [min(s[name] for s in sizes), max(s[name] for s in sizes)] for name in ("T", "k", "H", "d")}
    return fitted


# --- measuring with SPU -----------------------------------------------------------------------------------


def spu_prices(operators: Sequence[Operator], protocol: str, parallel_heads: bool = False) -> dict[Operator, Price]:
    """Runs each operator under SPU once and counts.

    In parallel, the rounds of a per-head operator are those of one head; of top-k, whose rounds are random,
    those of the slowest of H heads. Raises RuntimeError when there is no SPU environment or it fails.
    """
    check_protocol(protocol)
    python = os.environ.get("BROADSHEET_SPU_PYTHON")
    if not python:
        raise RuntimeError(
            'source="spu" needs BROADSHEET_SPU_PYTHON, the python of an environment with spu 0.9.5 '
            "(how to make it: docstring of broadsheet.methods.caches.mpc_prices)"
        )
    if not SPU_JOB.exists():
        raise RuntimeError(f'source="spu" needs a source checkout of Broadsheet: {SPU_JOB} does not exist')
    items: list[dict[str, Any]] = []
    for o in operators:
        items.append({"op": o.op, "T": o.T, "k": o.k, "H": o.H, "d": o.d})
        if parallel_heads and o.op in PER_HEAD:
            items.append({"op": o.op, "T": o.T, "k": o.k, "H": 1, "d": o.d, "repeats": o.H if o.op == "topk" else 1})
    try:
        done = subprocess.run(
            [python, str(SPU_JOB)],
            input=json.dumps({"protocol": protocol, "ops": items}),
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise RuntimeError(f"BROADSHEET_SPU_PYTHON={python} cannot be run: {error}") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"the SPU run failed: {last[0]}")
    answer = json.loads(done.stdout)
    results = iter(answer["results"])

    def per_party(result: dict[str, Any], key: str) -> list[float]:
        if result["max_fixed_point_error"] > TOLERANCE:
            warnings.warn(
                f"{result['op']} over {result['T']} entries: secret and plaintext results differ by "
                f"{result['max_fixed_point_error']:.3g}",
                stacklevel=3,
            )
        return [sum(sample[key]) / answer["parties"] for sample in result["samples"]]

    prices = {}
    for o in operators:
        together = next(results)
        alone = next(results) if parallel_heads and o.op in PER_HEAD else together
        prices[o] = (
            per_party(together, "bytes")[0],
            max(per_party(alone, "actions")),
            per_party(together, "cpu_s")[0],
        )
    return prices
