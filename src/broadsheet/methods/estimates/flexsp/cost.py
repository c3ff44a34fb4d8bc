"""What a group of devices takes for its sequences, in time and memory (section 4.1 of the paper).

Sequence parallelism of Ulysses' kind: a group of ``d`` devices shares every one of its sequences, s/d tokens each, and
trades tokens for heads by an all-to-all before and after attention. Times in ms, sizes in MiB, memory in GiB, lengths in
tokens; MiB/ms is about GiB/s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One timed pass, forward and backward, of a group of ``degree`` devices over ``lengths``, in ms."""

    lengths: tuple[int, ...]
    degree: int
    ms: float


@dataclass(frozen=True)
class SPCostModel:
    """Costs of sequence parallelism; every degree is a power of two that divides ``heads``.

    ``alpha1`` (ms/token²), ``alpha2`` (ms/token), ``beta1`` (ms a group): computation. ``bandwidth``: degree -> MiB/ms of an
    all-to-all. ``activation``: MiB a token. ``parameters``: context in thousands of tokens -> 10⁹ parameters (learned
    positions grow with the context), between which we interpolate. ``kv_heads``: of grouped-query attention; None: as many
    as ``heads``. ``itemsize``: bytes of an activation.

    Model states are 16 bytes a parameter, sharded over all devices (ZeRO-3), with 10⁹ bytes counted as 1 GiB as the authors
    do: 7 % too much.
    """

    alpha1: float
    alpha2: float
    beta1: float
    layers: int
    hidden: int
    heads: int
    bandwidth: Mapping[int, float]
    activation: float
    parameters: Mapping[float, float]
    kv_heads: int | None = None
    itemsize: int = 2
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("alpha1", "alpha2", "beta1"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is a time and cannot be {getattr(self, name)}")
        if not (self.alpha1 or self.alpha2):
            raise ValueError("alpha1 and alpha2 cannot both be 0: then no sequence would take any time")
        for name in ("layers", "hidden", "heads", "activation", "itemsize"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.parameters or any(not value > 0 for value in self.bandwidth.values()):
            raise ValueError("a cost model needs parameters, and bandwidths above 0")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly")

    @classmethod
    def from_preset(cls, name: str) -> SPCostModel:
        """The authors' profiles of A100 nodes: "gpt-7b-a100", "gpt-13b-a100", "gpt-30b-a100"."""
        known = presets()
        if name not in known:
            raise ValueError(
                f"no cost model '{name}'; there are {', '.join(sorted(known))}, or give a JSON file of your own"
            )
        return known[name]

    @classmethod
    def load(cls, name: str) -> SPCostModel:
        """A preset by name, or a file that `to_json` wrote."""
        if not name.endswith(".json"):
            return cls.from_preset(name)
        try:
            return cls.from_json(json.loads(Path(name).read_text(encoding="utf-8")))
        except (OSError, TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} holds no cost model: {error}") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        bandwidth = {int(degree): float(speed) for degree, speed in row["bandwidth"].items()}
        parameters = {float(context): float(count) for context, count in row["parameters"].items()}
        return cls(**{**row, "bandwidth": bandwidth, "parameters": parameters})

    # --- time ---

    def compute(self, length: float, degree: int) -> float:
        """(alpha1 s² + alpha2 s) / d."""
        return (self.alpha1 * length**2 + self.alpha2 * length) / degree

    def volume(self, length: float, degree: int) -> float:
        """MiB in a device's all-to-all buffers over forward and backward: queries, keys, values and outputs of every layer.

        2 x 4 L h s itemsize / d for multi-head attention. Fewer key/value heads shrink their two tensors, down to one head a
        device: where d is above ``kv_heads`` they are repeated.
        """
        shared = max(self.kv_heads or self.heads, degree) / self.heads
        return 2 * (2 + 2 * shared) * self.layers * self.hidden * length * self.itemsize / 2**20 / degree

    def all_to_all(self, length: float, degree: int) -> float:
        """`volume` over the bandwidth of the degree; nothing for a group of one."""
        return self.volume(length, degree) / self._speed(degree) if degree > 1 else 0.0

    def _speed(self, degree: int) -> float:
        if degree not in self.bandwidth:
            raise ValueError(f"no bandwidth is known for groups of {degree}: measure it, or plan for fewer devices")
        return self.bandwidth[degree]

    def sequence_time(self, length: float, degree: int) -> float:
        """What a sequence adds to its group's time."""
        return self.compute(length, degree) + self.all_to_all(length, degree)

    def group_time(self, lengths: Sequence[int], degree: int) -> float:
        """beta1 and what the sequences add; an idle group takes nothing."""
        return self.beta1 + sum(self.sequence_time(length, degree) for length in lengths) if len(lengths) else 0.0

    def times(self, lengths: Sequence[int] | NDArray[np.int64], degrees: Sequence[int]) -> Floats:
        """`sequence_time` of all: [sequences, degrees]."""
        column: Any = np.asarray(lengths, float)
        return np.stack([np.asarray(self.sequence_time(column, degree)) for degree in degrees], 1)

    # --- memory ---

    def states(self, devices: int, context: int) -> float:
        """MiB of model states a device, for sequences of at most ``context`` tokens."""
        known = sorted(self.parameters)
        thousands = context / 1000
        if thousands > known[-1] and len(known) > 1:  # as steep as between the last two
            slope = (self.parameters[known[-1]] - self.parameters[known[-2]]) / (known[-1] - known[-2])
            count = self.parameters[known[-1]] + slope * (thousands - known[-1])
        else:
            count = float(np.interp(thousands, known, [self.parameters[key] for key in known]))
        return 16 * count / devices * 1024

    def capacity(self, devices: int, memory_gb: float, context: int) -> int:
        """Tokens that a device can hold beside its states, in ``memory_gb`` GiB."""
        free = memory_gb * 1024 - self.states(devices, context)
        tokens = int(free / self.activation)
        if tokens < 1:
            need = (self.states(devices, context) + self.activation) / 1024
            raise ValueError(
                f"{memory_gb:g} GiB are below the {need:.1f} GiB that model states and one token take on {devices} devices: "
                "give more memory or more devices"
            )
        return tokens

    # --- degrees ---

    def degrees(self, devices: int, smallest: int = 1) -> tuple[int, ...]:
        """The sizes that a group can have, ascending. Raises ValueError for a number of devices that is no power of two."""
        if devices < 1 or devices & (devices - 1):
            raise ValueError(f"{devices} devices are no power of two: groups are halves of halves of all devices")
        powers = [1 << power for power in range(devices.bit_length())]
        allowed = tuple(d for d in powers if d >= min(smallest, devices) and self.heads % d == 0)
        if not allowed:
            raise ValueError(f"no group of {smallest} or more devices divides {self.heads} heads: allow smaller groups")
        return allowed

    # --- calibration ---

    def fit(self, samples: Sequence[Sample]) -> Fit:
        """This model with alpha1, alpha2, beta1 and the bandwidths of the degrees sampled replaced by what fits best.

        Least squares with nothing below 0, over what every unknown is multiplied by: sums of s²/d, s/d, 1, and MiB.
        """
        wide = sorted({sample.degree for sample in samples if sample.degree > 1})
        if len(samples) < 3 + len(wide):
            raise ValueError(f"{len(samples)} samples cannot settle {3 + len(wide)} unknowns: time more")
        from scipy.optimize import nnls

        rows = []
        for one in samples:
            s = np.asarray(one.lengths, float)
            volumes = [self.volume(float(s.sum()), d) if d == one.degree else 0.0 for d in wide]
            rows.append([float((s**2).sum()) / one.degree, float(s.sum()) / one.degree, 1.0, *volumes])
        matrix, ms = np.array(rows), np.array([sample.ms for sample in samples])
        scale = np.abs(matrix).max(0)
        if (scale == 0).any() or np.linalg.matrix_rank(matrix / scale) < len(scale):
            raise ValueError("the samples cannot tell the unknowns apart: vary lengths and their number at every degree")
        found = nnls(matrix / scale, ms)[0] / scale
        predicted = matrix @ found
        r2 = 1 - float(((ms - predicted) ** 2).sum() / ((ms - ms.mean()) ** 2).sum())
        speeds = {d: float(1 / x) if x > 0 else float("inf") for d, x in zip(wide, found[3:], strict=True)}
        fields = {"alpha1": float(found[0]), "alpha2": float(found[1]), "beta1": float(found[2])}
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__}
        model = SPCostModel(**{**kept, **fields, "bandwidth": {**self.bandwidth, **speeds}, "origin": "measured"})
        return Fit(model, r2, tuple(float(value) for value in predicted))


@dataclass(frozen=True)
class Fit:
    """A calibrated model, its R² and its prediction of every sample."""

    model: SPCostModel
    r2: float
    predicted: tuple[float, ...]


@cache
def presets() -> dict[str, SPCostModel]:
    """All of presets.json."""
    data = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
    shared = {"bandwidth": data["bandwidth"], "origin": data["origin"]}
    return {name: SPCostModel.from_json({**shared, **row}) for name, row in data["models"].items()}
