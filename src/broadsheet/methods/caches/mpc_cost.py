"""What one decode step costs when the KV cache is secret-shared between parties (MPCache, arXiv 2501.06807).

Under secure multi-party computation an attention step is paid for in bytes and message rounds, not in FLOPs:
a sum is free, a product costs one exchange, and every comparison, exponential or look-up by a secret index
costs many. `mpc_cost` prices one decode step of a model under MPCache, `cost_ladder` prices each part of the
method on its own, `static_cost` prices the one-off eviction after prefill, `operator_cost` a single operator.

Two sources of prices:

- ``source="model"``: linear functions of the sizes, fitted to measurements and shipped as `mpc_costs.json`.
  Refit with ``python -m broadsheet.methods.caches.mpc_cost calibrate [results.json]``. Numbers outside the
  measured sizes are extrapolations.
- ``source="spu"``: runs every operator under SecretFlow SPU now. SPU 0.9.5 needs jax 0.4.34 and numpy < 2, so
  it lives in an environment of its own, named by an environment variable::

      python3.11 -m venv spu-env
      spu-env/bin/pip install spu==0.9.5 jax==0.4.34 jaxlib==0.4.34 "numpy<2"
      export BROADSHEET_SPU_PYTHON=$PWD/spu-env/bin/python

Protocols, all semi-honest, 64-bit ring, 18 fractional bits: ``aby3`` (3 parties, honest majority), ``semi2k``
(2 parties; SPU's trusted dealer hands out the multiplication triples, whose bytes are not counted) and
``cheetah`` (2 parties, no dealer; the keys and base transfers of a session, about 11 MB, are not counted).
The last two are therefore not comparable with each other.

Units. *bytes*: sent per party, the total over all parties divided by their number (ABY3 draws at random who
sends the larger share of a truncation or conversion, so one rank's count is not reproducible; the total is).
*rounds*: messages sent per party (SPU's send actions), which stand in for the sequential rounds. *seconds* =
8 bytes / bandwidth + rounds * RTT + CPU time per party on one core; the CPU time is the roughest part of the
model (its error is in `mpc_costs.json`).

``parallel_heads=True`` prices the rounds as if all heads shared one call (the paper patches SPU's top-k to do
that; top-k then waits for its slowest head); ``False`` is what stock SPU does: top-k and matrix products loop
over the heads. Bytes are the same.

How the method is laid out under MPC (paper section 4):

- Only public counts are revealed. The first and the newest cluster are always attended, so their position
  is public and they need no gathering; candidates for top-k are the others.
- With u_c kept per cluster, the similarity of a step is one product; the newest cluster's r_max, r_min,
  u_c are updated once per step.
- Two levels: similarities of all fine clusters cost one cheap product, so the children of the chosen
  coarse clusters are gathered as similarities (one number each), not as vectors.
- Gathering is a product with a one-hot matrix built from the secret indices. The one-hot must be
  converted from boolean to arithmetic shares before a product can use it; that conversion is priced.
- With grouped-query attention the query heads of a group share one choice (their similarities are summed,
  which is free), so top-k, one-hot and gathering are priced per KV head, similarity and attention per query
  head.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from scipy.optimize import nnls

__all__ = [
    "LAN",
    "WAN",
    "CachePolicy",
    "CostRow",
    "CostTable",
    "Network",
    "Operator",
    "Rung",
    "calibrate",
    "cost_ladder",
    "mpc_cost",
    "operator_cost",
    "static_cost",
]

PROTOCOLS = ("aby3", "semi2k", "cheetah")
FITTED = Path(__file__).with_name("mpc_costs.json")
CHECKOUT = Path(__file__).resolve().parents[4]
SPU_JOB = CHECKOUT / "benchmarks" / "mpc" / "spu_job.py"
RESULTS = CHECKOUT / "benchmarks" / "results" / "mpc_costs.json"

# Operators that SPU runs head by head: their rounds grow with the heads unless the heads share one call.
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
Source = Literal["model", "spu"]
Price = tuple[float, float, float]  # bytes, rounds, CPU seconds, each per party


# ----------------------------------------------------------------------------------------------- public types


class CachePolicy(Protocol):
    """What `mpc_cost` reads of an eviction policy; `MPCache` is one."""

    static_keep: float
    window: float
    alpha: float
    clusters: tuple[int, int]
    ratios: tuple[float, float]
    share_span: int
    share_from: int


@dataclass(frozen=True)
class Network:
    """The link between the parties: bandwidth of each party in Gbit/s (each way), round-trip time in
    milliseconds."""

    bandwidth_gbps: float
    rtt_ms: float

    def __post_init__(self) -> None:
        if not self.bandwidth_gbps > 0:
            raise ValueError(f"bandwidth_gbps must be above 0, got {self.bandwidth_gbps}")
        if not self.rtt_ms >= 0:
            raise ValueError(f"rtt_ms must be at least 0, got {self.rtt_ms}")

    def seconds(self, sent: float, rounds: float) -> float:
        """Time on the wire for `sent` bytes per party in `rounds` messages."""
        return sent * 8 / (self.bandwidth_gbps * 1e9) + rounds * self.rtt_ms / 1e3


LAN = Network(bandwidth_gbps=3.0, rtt_ms=0.8)
WAN = Network(bandwidth_gbps=0.1, rtt_ms=40.0)


@dataclass(frozen=True)
class Operator:
    """One secret-shared operator: T entries, k picked, H heads, d = head_dim (or row width of a gather
    product)."""

    op: str
    T: int = 0
    k: int = 0
    H: int = 1
    d: int = 0
    label: str = field(default="", compare=False)


@dataclass(frozen=True)
class CostRow:
    """One line of a cost table: bytes and rounds per party, summed over `calls` calls of the operator."""

    op: str
    calls: int
    bytes: float
    rounds: float
    seconds: float


@dataclass(frozen=True)
class CostTable:
    """The operators of one decode step, their sums, and where the prices come from."""

    rows: tuple[CostRow, ...]
    protocol: str
    net: Network
    source: Source
    attended: int  # tokens in the exact softmax, per head

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    @property
    def rounds(self) -> float:
        return sum(row.rounds for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        link = f"{self.net.bandwidth_gbps:g} Gbit/s, RTT {self.net.rtt_ms:g} ms"
        head = f"{self.protocol}, {link}, prices: {self.source}"
        total = CostRow("total", sum(row.calls for row in self.rows), self.bytes, self.rounds, self.seconds)
        lines = [
            f"{r.op:<40} {r.calls:>6} {r.bytes / 1e6:>10.3f} {r.rounds:>10.0f} {r.seconds:>9.3f}"
            for r in (*self.rows, total)
        ]
        return "\n".join(
            [head, f"{'operator':<40} {'calls':>6} {'MB/party':>10} {'rounds':>10} {'seconds':>9}", *lines]
        )


@dataclass(frozen=True)
class Rung:
    """One rung of the ablation ladder: a decode step of all layers."""

    name: str
    bytes: float
    rounds: float
    seconds: float
    attended: int
    in_paper: bool
    table: CostTable = field(repr=False)


# -------------------------------------------------------------------------------------- the fitted cost model
# A cost is a sum of non-negative coefficients times features of the sizes. The features are what the
# protocols charge for: elements of inputs and outputs, ciphertexts, expected comparisons and calls of a
# quickselect.

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
def _product_ciphertexts(m: int, n: int, p: int) -> int:
    """Ciphertexts exchanged for a secret [m, n] x [n, p] product by packed homomorphic encryption (BumbleBee,
    section 4).

    The product is cut into blocks of m0 x n0 x p0 <= 8192 coefficients (n0 a power of two). The side with
    fewer blocks is encrypted and sent; n0 responses fit in one ciphertext. The cheapest cut counts.
    """
    best = math.inf
    for m0 in range(1, min(m, SLOTS) + 1):
        n0 = 1
        while n0 <= n and m0 * n0 <= SLOTS:
            p0 = min(p, SLOTS // (m0 * n0))
            rows, inner, columns = -(-m // m0), -(-n // n0), -(-p // p0)
            best = min(best, min(rows, columns) * inner + -(-rows * columns // n0))
            n0 *= 2
    return int(best)


def _ciphertexts(elements: int) -> int:
    """Ciphertexts for an elementwise operation."""
    return -(-elements // SLOTS)


def _features(
    op: str, T: int, k: int, H: int, d: int, loops: int, packed: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Features of (bytes, rounds).

    `loops`: how many times a per-head operator is called (H, or 1 in parallel); `packed`: the protocol sends
    ciphertexts.
    """
    rows: dict[str, float] = {"1": 1.0, "H": H}
    rounds: dict[str, float] = {"1": 1.0}

    def product(m: int, n: int, p: int, name: str) -> None:
        rows.update({f"H*in({name})": H * (m * n + n * p), f"H*out({name})": H * m * p})
        rounds["loops"] = loops
        if packed:
            ciphertexts = _product_ciphertexts(m, n, p)
            rows[f"H*ct({name})"] = H * ciphertexts
            rounds[f"loops*ct({name})"] = loops * ciphertexts

    def elementwise(n: int, name: str) -> None:
        rows[name] = n
        if packed:
            rows[f"ct({name})"] = rounds[f"ct({name})"] = _ciphertexts(n)

    if op in ("softmax", "softmax_stock", "attention", "attention_stock"):
        elementwise(H * T, "H*T")
        # The max halves its entries level by level and meets every odd one out in a further comparison.
        rounds["levels"] = T.bit_length() + T.bit_count() - 2
        if op.startswith("attention"):
            product(1, d, T, "q*K")
            product(1, T, d, "p*V")
    elif op == "qk":
        product(1, d, T, "q*K")
    elif op == "topk":
        comparisons, calls = _quickselect(T, k)
        rows.update({"H*T": H * T, "H*comparisons": H * comparisons, "H*calls": H * calls})
        rounds = {"loops": loops, "loops*calls": loops * calls}
        if packed:
            rows["H*ct(T)"] = H * _ciphertexts(T)
    elif op in ("one_hot", "one_hot_arithmetic"):
        elementwise(H * k * T, "H*k*T")
    elif op in ("gather", "gather_fixed"):
        product(k, T, d, "one_hot*table")
    elif op == "cosine":
        elementwise(H * T * d, "H*T*d")
        elementwise(H * T, "H*T")
        elementwise(H * d, "H*d")
        product(1, d, T, "q*K")
    elif op in ("sim_max", "sim_linear"):
        elementwise(H * T * d, "H*T*d")
        elementwise(H * d, "H*d")
    elif op == "sim_linear_matmul":
        elementwise(H * T * d, "H*T*d")
        product(1, d, T, "q*U")
    elif op == "sim_max_by_sign":
        elementwise(H * d, "H*d")
        product(1, 2 * d, T, "q*R")
    elif op == "cluster_update":
        elementwise(H * d, "H*d")
    else:
        raise ValueError(f"unknown operator {op!r}")
    return rows, rounds


def _multiplications(op: str, T: int, k: int, H: int, d: int) -> float:
    """Local multiplications: what CPU time depends on beside what is sent."""
    return H * d * T * (k if op.startswith("gather") else 1)


@cache
def _fitted(path: Path = FITTED) -> dict[str, Any]:
    return json.loads(path.read_text())


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")


def operator_cost(
    op: str,
    T: int = 0,
    k: int = 0,
    H: int = 8,
    d: int = 64,
    protocol: str = "aby3",
    parallel_heads: bool = False,
) -> Price:
    """Bytes, rounds and CPU seconds per party of one operator, by the fitted model.

    Raises ValueError for an unknown operator or protocol.
    """
    _check_protocol(protocol)
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
    """Non-negative least squares on the *relative* error; coefficients that come out as 0 are left out."""
    names = list(features[0])
    y = np.asarray(values, float)
    x = np.array([[f[name] for name in names] for f in features]) / y[:, None]
    scale = np.maximum(x.max(0), 1e-300)
    solution, _ = nnls(x / scale, np.ones(len(y)))
    return {name: float(c) for name, c in zip(names, solution / scale) if c > 0}


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
                abs(_evaluate(fitted[name], f) / r[key] - 1)
                for f, r in zip(features, records)
                if r["split"] == split
            )
            for split in ("fit", "held_out")
        }
    fitted["sizes"] = {
        name: [min(s[name] for s in sizes), max(s[name] for s in sizes)] for name in ("T", "k", "H", "d")
    }
    return fitted


# ----------------------------------------------------------------------------------------- measuring with SPU


def _measured(operators: Sequence[Operator], protocol: str, parallel_heads: bool) -> dict[Operator, Price]:
    """Runs each operator under SPU once and counts.

    In parallel, the rounds of a per-head operator are those of one head; of top-k, whose rounds are random,
    those of the slowest of H heads.
    """
    python = os.environ.get("BROADSHEET_SPU_PYTHON")
    if not python:
        raise RuntimeError(
            'source="spu" needs BROADSHEET_SPU_PYTHON, the python of an environment with spu 0.9.5 '
            "(how to make it: docstring of broadsheet.methods.caches.mpc_cost)"
        )
    if not SPU_JOB.exists():
        raise RuntimeError(f'source="spu" needs a source checkout of Broadsheet: {SPU_JOB} does not exist')
    items: list[dict[str, Any]] = []
    for o in operators:
        items.append({"op": o.op, "T": o.T, "k": o.k, "H": o.H, "d": o.d})
        if parallel_heads and o.op in PER_HEAD:
            items.append(
                {"op": o.op, "T": o.T, "k": o.k, "H": 1, "d": o.d, "repeats": o.H if o.op == "topk" else 1}
            )
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
        if not result["equals_plaintext"]:
            warnings.warn(
                f"{result['op']} over {result['T']} entries: secret and plaintext results differ by "
                f"{result['max_abs_error']:.3g}",
                stacklevel=2,
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


def _table(
    calls: Mapping[Operator, int],
    protocol: str,
    net: Network,
    source: Source,
    parallel_heads: bool,
    attended: int,
) -> CostTable:
    """Prices operators, each called `calls[operator]` times."""
    _check_protocol(protocol)
    if source == "spu":
        prices = _measured(list(calls), protocol, parallel_heads)
    elif source == "model":
        prices = {o: operator_cost(o.op, o.T, o.k, o.H, o.d, protocol, parallel_heads) for o in calls}
    else:
        raise ValueError(f'unknown source {source!r}: use "model" or "spu"')
    rows = []
    for operator, n in calls.items():
        sent, rounds, compute = (n * x for x in prices[operator])
        rows.append(
            CostRow(operator.label or operator.op, n, sent, rounds, net.seconds(sent, rounds) + compute)
        )
    return CostTable(tuple(rows), protocol, net, source, attended)


# ----------------------------------------------------------------------------- the operators of a decode step

Similarity = Literal["max", "max_by_sign", "linear"]


@dataclass(frozen=True)
class _Step:
    """One layer's decode step: what selects (skipped by a layer that shares indices) and what attends."""

    select: tuple[Operator, ...]
    attend: tuple[Operator, ...]
    attended: int


@dataclass(frozen=True)
class _Heads:
    """Sizes of one layer: query heads, KV heads, head_dim."""

    query: int
    kv: int
    dim: int


def _full(T: int, heads: _Heads) -> _Step:
    return _Step((), (Operator("attention", T, 0, heads.query, heads.dim, f"attention over {T} tokens"),), T)


def _naive_dynamic(T: int, k: int, heads: _Heads) -> _Step:
    """Token-level selection: score all T tokens, pick k, gather their keys and values, attend to them."""
    return _Step(
        (
            Operator("qk", T, 0, heads.query, heads.dim, "token scores"),
            Operator("topk", T, k, heads.kv, 0, "top-k tokens"),
            Operator("one_hot_arithmetic", T, k, heads.kv, 0, "one-hot of token indices"),
        ),
        (
            Operator("gather", T, k, heads.kv, 2 * heads.dim, "gather tokens"),
            Operator("attention", k, 0, heads.query, heads.dim, f"attention over {k} tokens"),
        ),
        k,
    )


def _clustered(
    T: int,
    heads: _Heads,
    clusters: tuple[int, int],
    ratios: tuple[float, float],
    similarity: Similarity = "linear",
    levels: int = 2,
    gather: Literal["kv", "scores"] = "kv",
) -> _Step:
    """Cluster-level selection (paper section 4.2) among the T tokens that static eviction left."""
    coarse, fine = clusters
    H, kv, d = heads.query, heads.kv, heads.dim
    children = coarse // fine
    coarse_count, fine_count = -(-T // coarse), -(-T // fine)
    coarse_picks = math.floor(coarse_count * ratios[0])
    two_levels = (
        levels == 2 and coarse_picks < coarse_count - 2
    )  # otherwise the coarse level keeps every cluster
    # Candidates exclude the first and the newest fine cluster, which are always attended.
    candidates = coarse_picks * children + 2 * children - 2 if two_levels else fine_count - 2
    picks = min(math.floor(fine_count * ratios[1]), candidates)
    if picks <= 0 and fine_count <= 2:
        return _full(T, heads)
    select = [Operator("cluster_update", 0, 0, kv, d, "update newest cluster")] * (2 if two_levels else 1)
    score = {"max": "sim_max", "max_by_sign": "sim_max_by_sign", "linear": "qk"}[similarity]
    select += [Operator(score, fine_count, 0, H, d, f"similarity to {fine_count} clusters")]
    if two_levels:
        select += [Operator(score, coarse_count, 0, H, d, f"similarity to {coarse_count} clusters")]
        if coarse_picks:
            select += [
                Operator("topk", coarse_count - 2, coarse_picks, kv, 0, "top-k coarse clusters"),
                Operator(
                    "one_hot_arithmetic", coarse_count - 2, coarse_picks, kv, 0, "one-hot of coarse indices"
                ),
                Operator(
                    "gather", coarse_count - 2, coarse_picks, kv, children, "similarities of their children"
                ),
            ]
    if picks:
        select += [
            Operator("topk", candidates, picks, kv, 0, "top-k fine clusters"),
            Operator("one_hot_arithmetic", candidates, picks, kv, 0, "one-hot of fine indices"),
        ]
        if (
            two_levels
        ):  # choice among candidates x identity of the candidates = one-hot over all fine clusters
            select += [
                Operator("gather", candidates, picks, kv, fine_count, "one-hot over all fine clusters")
            ]
    attended = min((picks + 2) * fine, T)
    attend: list[Operator] = []
    if gather == "kv":
        if picks:
            attend += [Operator("gather", fine_count, picks, kv, 2 * fine * d, "gather clusters")]
        attend += [Operator("attention", attended, 0, H, d, f"attention over {attended} tokens")]
    else:
        # Not in the paper: products with the whole kept cache are cheap to exchange (one number per token),
        # so only scores are gathered, and the probabilities are put back by the transposed one-hot.
        attend += [Operator("qk", T, 0, H, d, f"scores of {T} tokens")]
        if picks:
            attend += [Operator("gather", fine_count, picks, H, fine, "gather scores")]
        attend += [Operator("softmax", attended, 0, H, 0, f"softmax over {attended} tokens")]
        if picks:
            attend += [Operator("gather", picks, fine_count, H, fine, "scatter probabilities")]
        attend += [Operator("qk", d, 0, H, T, "probabilities x V")]
    return _Step(tuple(select), tuple(attend), attended)


def _selecting_layers(layers: int, share_span: int, share_from: int) -> int:
    """Layers that pick their own indices: all before `share_from`, then the first of every `share_span`
    layers."""
    return min(layers, share_from) + -(-max(layers - share_from, 0) // share_span)


def _calls(step: _Step, layers: int, selecting: int) -> dict[Operator, int]:
    counts: dict[Operator, int] = {}
    for operators, n in ((step.select, selecting), (step.attend, layers)):
        for operator in operators:
            counts[operator] = counts.get(operator, 0) + n
    return counts


def _kept(seq_len: int, static_keep: float) -> int:
    return max(1, round(seq_len * static_keep))


def _dimensions(config: Any) -> tuple[int, _Heads]:
    """Layers and heads of a transformers config or a mapping with the same names."""
    get = (
        config.get
        if isinstance(config, Mapping)
        else lambda name, default=None: getattr(config, name, default)
    )
    layers, heads = get("num_hidden_layers"), get("num_attention_heads")
    if not layers or not heads:
        raise ValueError("config needs num_hidden_layers and num_attention_heads")
    head_dim = get("head_dim") or (get("hidden_size") or 0) // heads
    if not head_dim:
        raise ValueError("config needs head_dim or hidden_size")
    return layers, _Heads(heads, get("num_key_value_heads") or heads, head_dim)


def mpc_cost(
    policy: CachePolicy,
    config: Any,
    seq_len: int,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
    parallel_heads: bool = True,
) -> CostTable:
    """Bytes, rounds and seconds per party of one decode step of a whole model under MPCache.

    `config`: a transformers config (or a mapping) with num_hidden_layers, num_attention_heads,
    num_key_value_heads (if fewer) and head_dim or hidden_size.
    `seq_len`: tokens seen so far. Covers the attention of every layer, not the linear layers, which are the
    same for every cache. A sequence shorter than two coarse clusters falls back to full attention, with a
    warning.

    Raises ValueError for an unknown protocol or source, a bad seq_len or a config without sizes; RuntimeError
    if source="spu" and there is no SPU environment.
    """
    _check_protocol(protocol)
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")
    layers, heads = _dimensions(config)
    if seq_len < 2 * policy.clusters[0]:
        warnings.warn(
            f"{seq_len} tokens are fewer than two clusters of {policy.clusters[0]}: priced as full attention",
            stacklevel=2,
        )
        step, selecting = _full(seq_len, heads), layers
    else:
        step = _clustered(_kept(seq_len, policy.static_keep), heads, policy.clusters, policy.ratios)
        selecting = _selecting_layers(layers, policy.share_span, policy.share_from)
    return _table(_calls(step, layers, selecting), protocol, net, source, parallel_heads, step.attended)


def cost_ladder(
    seq_len: int,
    budget: float,
    static_keep: float = 0.4,
    clusters: tuple[int, int] = (32, 16),
    coarse_ratio: float = 0.5,
    share_span: int = 2,
    share_from: int = 2,
    layers: int = 32,
    heads: int = 8,
    head_dim: int = 64,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
    parallel_heads: bool = True,
) -> list[Rung]:
    """The ablation ladder: one decode step of all layers, one component more on every rung.

    full -> + static -> naive dynamic -> clusters -> linear similarity -> two levels -> index sharing; then
    two rungs that are not in the paper (`in_paper=False`), each a change to the last: the max-form bound by
    the signs of q instead of the linear similarity, and gathering scores instead of keys and values.

    `budget`: fraction of the tokens picked by the dynamic part (static_keep * ratios[1] of the policy); the
    first and the newest cluster come on top, as in the paper, so look at `Rung.attended`. Raises ValueError
    if the budget is not in (0, static_keep], for an unknown protocol or source; RuntimeError if source="spu"
    and there is no SPU environment.
    """
    if not 0 < budget <= static_keep <= 1:
        raise ValueError(
            f"need 0 < budget <= static_keep <= 1, got budget {budget}, static_keep {static_keep}"
        )
    if seq_len < 2 * clusters[0]:
        raise ValueError(f"seq_len must be at least two clusters of {clusters[0]}, got {seq_len}")
    kept = _kept(seq_len, static_keep)
    shape = _Heads(heads, heads, head_dim)
    sizes = (kept, shape, clusters, (coarse_ratio, budget / static_keep))
    sharing = _selecting_layers(layers, share_span, share_from)
    rungs: list[tuple[str, _Step, int, bool]] = [
        ("full", _full(seq_len, shape), layers, True),
        ("+ static", _full(kept, shape), layers, True),
        ("+ naive dynamic", _naive_dynamic(kept, max(1, round(seq_len * budget)), shape), layers, True),
        ("+ clusters", _clustered(*sizes, similarity="max", levels=1), layers, True),
        ("+ linear similarity", _clustered(*sizes, levels=1), layers, True),
        ("+ two levels", _clustered(*sizes), layers, True),
        ("+ index sharing", _clustered(*sizes), sharing, True),
        ("max bound by sign", _clustered(*sizes, similarity="max_by_sign"), sharing, False),
        ("score gather", _clustered(*sizes, gather="scores"), sharing, False),
    ]
    ladder = []
    for name, step, selecting, in_paper in rungs:
        table = _table(_calls(step, layers, selecting), protocol, net, source, parallel_heads, step.attended)
        ladder.append(Rung(name, table.bytes, table.rounds, table.seconds, step.attended, in_paper, table))
    return ladder


def static_cost(
    seq_len: int,
    static_keep: float = 0.4,
    layers: int = 32,
    heads: int = 8,
    head_dim: int = 64,
    protocol: str = "aby3",
    net: Network = LAN,
    source: Source = "model",
) -> CostTable:
    """The one-off price of static eviction after prefill for all layers.

    Column sums of the prefill's attention weights are local. One top-k over the tokens, shared by the heads
    of a layer, finds the threshold; one comparison per token gives secret keep bits, whose running sum is
    each kept token's new place; a one-hot of those places moves keys and values of all heads. Only the public
    count is revealed.
    """
    kept = _kept(seq_len, static_keep)
    operators = (
        Operator("topk", seq_len, kept, 1, 0, "top-k tokens"),
        Operator(
            "cluster_update", 0, 0, 1, seq_len, "keep bits"
        ),  # two comparisons per entry: an upper bound
        Operator("one_hot_arithmetic", seq_len, kept, 1, 0, "one-hot of the new places"),
        Operator("gather", seq_len, kept, 1, 2 * heads * head_dim, "move keys and values"),
    )
    return _table(dict.fromkeys(operators, layers), protocol, net, source, parallel_heads=True, attended=kept)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] != "calibrate" or len(arguments) > 2:
        raise SystemExit("usage: python -m broadsheet.methods.caches.mpc_cost calibrate [results.json]")
    try:
        model = calibrate(*arguments[1:])
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(f"{'protocol':<8} {'operator':<20} {'max relative error on held-out sizes':>40}")
    for protocol, fits in model["protocols"].items():
        for op, fit in fits["ops"].items():
            errors = "  ".join(
                f"{name} {e['held_out']:6.1%}" for name, e in fit["max_relative_error"].items()
            )
            print(f"{protocol:<8} {op:<20} {errors:>40}")


if __name__ == "__main__":
    main(sys.argv[1:])
