"""What is trained, on what, and how it is split: three JSON files with calculon's names.

``model`` (hidden, feedforward, seq_size, attn_heads, attn_size, num_blocks), ``system`` (matrix, mem1, networks) and
``execution`` (num_procs, tensor_par, pipeline_par, data_par, batch_size, microbatch_size, ...). calculon's own files load;
what they ask for that is not modelled here (offloading, multi-query attention ...) is refused by name, what only shapes
calculon's own cost curves (vector units, a second memory, network operations) is not read. ``vocab_size`` and ``window`` are
additions. Units as calculon's: TFLOP/s, GB/s (10^9), GiB (2^30), seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

Recompute = Literal["none", "attn_only", "full"]
GIB = 2**30


def positive(what: str, **values: float) -> None:
    """Raises ValueError for what is no number above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{what}: {name} must be a number above 0, not {value!r}")


def whole(what: str, **values: float) -> None:
    """Raises ValueError for what is no whole number above 0."""
    positive(what, **values)
    for name, value in values.items():
        if value != int(value):
            raise ValueError(f"{what}: {name} must be a whole number, not {value!r}")


class _Json:
    """Reads and writes a dataclass of numbers; says which field is missing or unknown."""

    #: keys that may stand in the file and are not read
    ignored: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        what = cls.__name__.lower()
        if not isinstance(data, Mapping):
            raise ValueError(f"{what}: a JSON object is wanted, not {type(data).__name__}")
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        if unknown := sorted(data.keys() - known - cls.ignored):
            raise ValueError(f"{what}: unknown field '{unknown[0]}'; known: {', '.join(sorted(known))}")
        try:
            return cls(**{name: value for name, value in data.items() if name in known})
        except TypeError as error:
            missing = str(error).partition("argument")[2].lstrip("s: ")
            raise ValueError(f"{what}: missing {missing}") from None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses


@dataclass(frozen=True)
class Model(_Json):
    """A decoder with a GPT's layers. ``window``: how many tokens a token looks back on average where windows slide."""

    hidden: int
    feedforward: int
    seq_size: int
    attn_heads: int
    attn_size: int
    num_blocks: int
    vocab_size: int = 51_200
    window: int = 0  #: 0: none known
    name: str = "model"

    def __post_init__(self) -> None:
        whole(
            self.name, hidden=self.hidden, feedforward=self.feedforward, seq_size=self.seq_size,
            attn_heads=self.attn_heads, attn_size=self.attn_size, num_blocks=self.num_blocks, vocab_size=self.vocab_size,
        )  # fmt: skip
        if not 0 <= self.window <= self.seq_size:
            raise ValueError(f"{self.name}: window must be from 0 (none) to seq_size = {self.seq_size}, not {self.window}")

    @property
    def attention_width(self) -> int:
        return self.attn_heads * self.attn_size

    @cached_property
    def block_parameters(self) -> int:
        """Of one layer: four attention and two feed-forward matrices, their biases, two LayerNorms."""
        matrices = 4 * self.hidden * self.attention_width + 2 * self.hidden * self.feedforward
        return matrices + 3 * self.attention_width + self.feedforward + 6 * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All of them; the embedding is tied to the output layer, positions are learnt."""
        return self.num_blocks * self.block_parameters + (self.vocab_size + self.seq_size) * self.hidden

    def flops(self, tokens: float, window: float = 0) -> float:
        """Model FLOPs of training on so many tokens: 6 P + 12 L h s each.

        A multiply-add is two, a backward pass two forwards; recomputation is not counted, and the causal half not halved.
        """
        seen = window or self.seq_size
        return tokens * (6 * self.parameters + 12 * self.num_blocks * self.attention_width * seen)


@dataclass(frozen=True)
class Network(_Json):
    """A network that joins ``size`` processors: GB/s of each, one way; ``efficiency``: the share that is reached."""

    bandwidth: float
    size: int
    efficiency: float = 1.0
    latency: float = 0.0  #: seconds
    ignored = frozenset({"ops", "must_be_filled", "processor_usage"})

    def __post_init__(self) -> None:
        positive("network", bandwidth=self.bandwidth, size=self.size, efficiency=self.efficiency)

    def seconds(self, count: float, efficiency: float = 0.0) -> float:
        """Of a transfer of ``count`` bytes at the given efficiency, or its own; without the latency."""
        return count / (self.bandwidth * 1e9 * (efficiency or self.efficiency))


@dataclass(frozen=True)
class System(_Json):
    """A cluster of equal processors. ``tflops``: dense peak of the training precision; memory of one processor.

    ``networks``: the first joins the processors of a machine, the second the machines.
    """

    tflops: float
    memory_gib: float
    memory_gbps: float
    networks: tuple[Network, Network]
    name: str = "system"

    def __post_init__(self) -> None:
        positive(self.name, tflops=self.tflops, memory_gib=self.memory_gib, memory_gbps=self.memory_gbps)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """calculon's layout: matrix.float16.tflops, mem1.GiB and mem1.GBps, networks."""
        try:
            networks = tuple(Network.from_json(network) for network in data["networks"])
            memory = data["mem1"]
            peak, gib, gbps = data["matrix"]["float16"]["tflops"], memory["GiB"], memory["GBps"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"system: missing {error}; it has matrix.float16.tflops, mem1 (GiB, GBps), networks") from None
        if len(networks) != 2:
            raise ValueError(f"system: two networks are wanted (in a machine, between machines), not {len(networks)}")
        return cls(peak, gib, gbps, networks, data.get("name", "system"))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "matrix": {"float16": {"tflops": self.tflops}},
            "mem1": {"GiB": self.memory_gib, "GBps": self.memory_gbps}, "networks": [asdict(n) for n in self.networks],
        }  # fmt: skip

    @property
    def machine_size(self) -> int:
        return self.networks[0].size


@dataclass(frozen=True)
class Execution(_Json):
    """How the training is split. ``num_procs = tensor_par * pipeline_par * data_par``.

    ``pipeline_interleaving``: model chunks a stage (virtual stages v). ``optimizer_sharding``: ZeRO over data_par.
    ``seq_par``: the LayerNorms' activations are split over tensor_par too. ``grad_bytes``: of a gradient when it is
    reduced over data_par (where it is summed up, in memory, it has 4).
    """

    num_procs: int
    tensor_par: int
    pipeline_par: int
    data_par: int
    batch_size: int
    microbatch_size: int = 1
    pipeline_interleaving: int = 1
    activation_recompute: Recompute = "none"
    optimizer_sharding: bool = True
    seq_par: bool = True
    grad_bytes: int = 2

    #: read by `from_json`, or of no meaning here
    ignored = frozenset({
        "tensor_par_net", "pipeline_par_net", "data_par_net", "datatype", "fused_activation", "attention_type",
        "tensor_par_comm_type", "tensor_par_overlap", "seq_par_ag_redo", "data_par_overlap", "weight_offload",
        "activations_offload", "optimizer_offload", "training", "in_network_reduction",
    })  # fmt: skip
    #: what calculon can do and this cannot: the only value that is accepted
    _only = {  # noqa: RUF012  # no field of the dataclass
        "attention_type": "multihead", "weight_offload": False, "activations_offload": False, "optimizer_offload": False,
        "training": True, "tensor_par_net": 0, "in_network_reduction": False,
    }  # fmt: skip

    def __post_init__(self) -> None:
        whole(
            "execution", num_procs=self.num_procs, tensor_par=self.tensor_par, pipeline_par=self.pipeline_par,
            data_par=self.data_par, batch_size=self.batch_size, microbatch_size=self.microbatch_size,
            pipeline_interleaving=self.pipeline_interleaving, grad_bytes=self.grad_bytes,
        )  # fmt: skip
        product = self.tensor_par * self.pipeline_par * self.data_par
        if product != self.num_procs:
            split = f"{self.tensor_par} x {self.pipeline_par} x {self.data_par}"
            raise ValueError(f"execution: tensor x pipeline x data = {split} = {product}, but num_procs is {self.num_procs}")
        each = self.data_par * self.microbatch_size
        if self.batch_size % each:
            raise ValueError(
                f"execution: batch_size {self.batch_size} is no multiple of data_par x microbatch_size = {each}; "
                f"the nearest are {self.batch_size // each * each or each} and {(self.batch_size // each + 1) * each}"
            )
        if self.pipeline_interleaving > 1 and self.microbatches % self.pipeline_par:
            raise ValueError(
                f"execution: an interleaved schedule needs a multiple of pipeline_par = {self.pipeline_par} microbatches, "
                f"not {self.microbatches}; set pipeline_interleaving to 1 or change batch_size"
            )
        if self.pipeline_interleaving > 1 and self.pipeline_par == 1:
            raise ValueError("execution: with pipeline_par = 1 there is nothing to interleave; set it to 1")
        if self.activation_recompute not in ("none", "attn_only", "full"):
            raise ValueError(
                f"execution: activation_recompute is none, attn_only or full, not {self.activation_recompute!r}"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        for name, value in cls._only.items():
            if data.get(name, value) != value:
                raise ValueError(f"execution: {name} = {data[name]!r} is not modelled; only {value!r} is")
        read = dict(data)
        if "tensor_par_comm_type" in data:
            read.setdefault("seq_par", data["tensor_par_comm_type"] == "rs_ag")
        return super().from_json(read)

    @property
    def microbatches(self) -> int:
        """Of one data-parallel replica in a step."""
        return self.batch_size // (self.data_par * self.microbatch_size)

    def fits(self, model: Model) -> None:
        """Raises ValueError where the model cannot be split like this."""
        if model.attn_heads % self.tensor_par:
            raise ValueError(f"{model.attn_heads} attention heads cannot be split over tensor_par = {self.tensor_par}")
        chunks = self.pipeline_par * self.pipeline_interleaving
        if model.num_blocks % chunks:
            raise ValueError(
                f"{model.num_blocks} layers cannot be split over pipeline_par x pipeline_interleaving = {chunks} chunks"
            )


def split(num_procs: int, tensor_par: int, pipeline_par: int, batch_size: int, interleaving: int = 1) -> Execution:
    """An execution with the data-parallel size that is left over. Raises ValueError."""
    each = tensor_par * pipeline_par
    if num_procs % each:
        raise ValueError(f"{num_procs} processors are no multiple of tensor_par x pipeline_par = {each}")
    return Execution(num_procs, tensor_par, pipeline_par, num_procs // each, batch_size, 1, interleaving)


def folder() -> Any:
    """The package's data files."""
    return files("broadsheet.methods.estimates.megascale") / "data"


def read(kind: type[Model] | type[System] | type[Execution], source: str | Path | Mapping[str, Any]) -> Any:
    """A built-in name, a JSON file or an object. Raises ValueError in one line."""
    if isinstance(source, Mapping):
        return kind.from_json(source)
    path = Path(source)
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        try:
            return kind.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: line {error.lineno}: {error.msg}") from None
    built_in = json.loads((folder() / "plans.json").read_text(encoding="utf-8"))[kind.__name__.lower()]
    if str(source) not in built_in:
        raise ValueError(f"unknown {kind.__name__.lower()} '{source}': a JSON file, or one of {', '.join(sorted(built_in))}")
    return kind.from_json({"name": str(source), **built_in[str(source)]} if kind is not Execution else built_in[str(source)])


def check_memory(need: Mapping[str, float], system: System) -> None:
    """Raises ValueError where the parts (bytes) are more than the processor has, and says by how much."""
    total = math.fsum(need.values())
    if total > system.memory_gib * GIB:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in need.items())
        over = total / GIB - system.memory_gib
        raise ValueError(
            f"{total / GIB:.1f} GiB a processor, {over:.1f} more than the {system.memory_gib:g} there are: {parts}"
        )
