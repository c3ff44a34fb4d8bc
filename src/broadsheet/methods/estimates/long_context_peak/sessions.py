"""The four numbers of a long context, in closed form (paper, section 2), and what reductions of the cache do to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from broadsheet.core.perf.architecture import Architecture, architecture
from broadsheet.core.perf.hardware import Device, device
from broadsheet.core.perf.ops import Setting, cache_bytes, parameters
from broadsheet.core.perf.storage import CacheFormat, cache_format

#: when a reduction acts: on what is held (and moved), on what a decode step reads, on prefill's attention
Phase = Literal["rest", "decode", "prefill"]
PHASES: tuple[Phase, ...] = ("rest", "decode", "prefill")


@dataclass(frozen=True)
class KVReduction:
    """What a method leaves of the cache along the paper's four axes (section 3), and when it does.

    ``layer``, ``head``, ``token``, ``hidden``: the part that is left, in (0, 1]. ``at``: phases in which it acts; an early
    exit only reads less while decoding, eviction leaves prefill as it was. ``a | b`` does both: parts multiply phase by
    phase, in any order.
    """

    layer: float = 1.0
    head: float = 1.0
    token: float = 1.0
    hidden: float = 1.0
    at: tuple[Phase, ...] = ("rest", "decode")
    name: str = ""
    more: tuple[KVReduction, ...] = ()

    def __post_init__(self) -> None:
        for axis in ("layer", "head", "token", "hidden"):
            left = getattr(self, axis)
            if not 0 < left <= 1:
                raise ValueError(f"{axis} is the part of the cache that is left, above 0 and at most 1; got {left}")
        if unknown := set(self.at) - set(PHASES):
            raise ValueError(f"at is of {', '.join(PHASES)}; got {', '.join(sorted(unknown))}")

    def factor(self, phase: Phase) -> float:
        """The part that is left in a phase."""
        own = self.layer * self.head * self.token * self.hidden if phase in self.at else 1.0
        return own * math.prod(one.factor(phase) for one in self.more)

    def __or__(self, other: KVReduction) -> KVReduction:
        name = " + ".join(one.name for one in (self, other) if one.name)
        return KVReduction(at=(), name=name, more=(self, other))


NONE = KVReduction(name="none")
#: the paper's examples (table 3), with round parts; what a model loses by them is not said here
REDUCTIONS = {
    "none": NONE,
    "8-bit cache": KVReduction(hidden=1 / 2, name="8-bit cache"),
    "4-bit cache": KVReduction(hidden=4.5 / 16, name="4-bit cache, groups of 64"),
    "2-bit cache": KVReduction(hidden=2.5 / 16, name="2-bit cache, groups of 64"),
    "a quarter of the tokens": KVReduction(token=1 / 4, name="a quarter of the tokens"),
    "retrieval heads": KVReduction(head=1 / 4, name="full context in a quarter of the heads"),
    "layers in pairs": KVReduction(layer=1 / 2, at=PHASES, name="two layers share a cache"),
    "one layer's cache": KVReduction(layer=1 / 32, at=PHASES, name="one cache for 32 layers (YOCO)"),
    "early exit": KVReduction(layer=1 / 2, at=("decode",), name="early exit in the middle"),
}


@dataclass(frozen=True)
class SessionModel:
    """A decoder on ``tp`` equal devices, and users who each hold a context of n tokens.

    ``cache``: how many bits its numbers have, or a format (`core.perf.storage.cache_format`). ``reserve_gb``: kept free for
    activations (decimal GB, all devices together). ``reduction``: of the cache, besides. ``weights``: how many parameters,
    where a paper rounds. ``attention``: what of prefill's quadratic part is computed: "causal" (half), "full", or "none" (as
    the paper's own 4K number seems to be). Raises ValueError where not even the weights fit.
    """

    config: Any
    hardware: str | Device = "a100-80g"
    tp: int = 1
    cache: float | str | CacheFormat = 16
    reserve_gb: float = 0.0
    reduction: KVReduction = NONE
    weights: float | None = None
    attention: Literal["causal", "full", "none"] = "causal"
    arch: Architecture = field(init=False)
    on: Device = field(init=False)
    #: bytes of caches by tokens: a simulation asks thousands of times
    _sizes: dict[int, float] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.tp < 1 or self.reserve_gb < 0:
            raise ValueError("tp is at least 1, reserve_gb not negative")
        if self.attention not in ("causal", "full", "none"):
            raise ValueError(f"attention is causal, full or none; got '{self.attention}'")
        object.__setattr__(self, "arch", architecture(self.config))
        object.__setattr__(self, "on", device(self.hardware))
        if (short := self.weight_bytes + self.reserve_gb * 1e9 - self.tp * self.on.memory) > 0:
            need = math.ceil((self.weight_bytes + self.reserve_gb * 1e9) / self.on.memory)
            raise ValueError(
                f"{self.arch.name} does not fit {self.tp} x {self.on.name}: {short / 1e9:.1f} GB are missing for its weights"
                f"; tp={need} holds them"
            )

    @property
    def count(self) -> float:
        """Parameters P."""
        return self.weights or parameters(self.arch)

    @property
    def weight_bytes(self) -> float:
        """W = 2 P: bytes of the weights in 16 bits."""
        return 2 * self.count

    def cache_bytes(self, tokens: int, phase: Phase = "rest") -> float:
        """S(n): bytes of one user's cache, as far as the reduction leaves it in a phase; 2 L K d Bk n where every token is
        kept as it is. Layers with a window hold no more than that."""
        if _positive(tokens) not in self._sizes:
            setting = Setting(context=tokens, cache=cache_format(self.cache))
            self._sizes[tokens] = cache_bytes(self.arch, setting)
        return self._sizes[tokens] * self.reduction.factor(phase)

    @property
    def critical_intensity(self) -> float:
        """Operations a byte, so tokens a pass, above which prefill is bound by compute: peak / bandwidth."""
        return self.on.peak("bf16") / self.on.bandwidth

    def room(self) -> float:
        """Bytes left for caches."""
        return self.tp * self.on.memory - self.weight_bytes - self.reserve_gb * 1e9

    def concurrency(self, tokens: int) -> int:
        """C = floor((g M - W - A) / S(n)): users whose caches are held at once (section 2.1)."""
        return math.floor(self.room() / self.cache_bytes(tokens))

    def prefill_s(self, tokens: int) -> float:
        """(2 P n + a 4 L n² d H) / peak, a = 1/2 under a causal mask (section 2.2)."""
        return (2 * self.count * _positive(tokens) + self.quadratic(tokens)) / (self.tp * self._peak)

    def quadratic(self, tokens: int) -> float:
        """Operations of prefill's attention: 4 n² d H in each layer, of which a causal kernel does half."""
        part = {"full": 1.0, "causal": 0.5, "none": 0.0}[self.attention] * self.reduction.factor("prefill")
        heads = sum(count * block.attention.heads * block.attention.head_dim for count, block in self.arch.blocks)
        return part * 4 * tokens**2 * heads

    def decode_s(self, tokens: int, users: int = 1, answer: int = 1) -> float:
        """G (W + Σ S(n)) / bandwidth: ``answer`` steps that read the weights once and every user's cache (section 2.3)."""
        read = self.weight_bytes + _positive(users) * self.cache_bytes(tokens, "decode")
        return answer * read / (self.tp * self.on.bandwidth * self.on.efficiency.memory)

    def switch_s(self, tokens: int) -> float:
        """S(n) / link: one cache's way to the host, or back (section 2.4). Raises ValueError where the link is not known."""
        if not self.on.host_link:
            raise ValueError(f"{self.on.name} has no host_link: put the link's bytes a second into its file")
        return self.cache_bytes(tokens) / (self.tp * self.on.host_link)

    def swap_s(self, tokens: int) -> tuple[float, str]:
        """What it takes to bring a user back whose cache is not held, and by which way: another's cache out and this one's
        in, or its prefill anew, whichever is faster."""
        swap, again = 2 * self.switch_s(tokens), self.prefill_s(tokens)
        return (swap, "swap") if swap <= again else (again, "recompute")

    def demand_s(self, tokens: int, users: int, rounds: int, answer: int = 250) -> float:
        """Seconds of the machine that one session takes: prefill, and each round its share of a batched answer, and the
        bringing back where more users are there than caches."""
        held = min(users, max(self.concurrency(tokens), 1))
        back = self.swap_s(tokens)[0] if users > self.concurrency(tokens) else 0.0
        return self.prefill_s(tokens) + rounds * (self.decode_s(tokens, held, answer) / held + back)

    def sessions_per_hour(
        self, tokens: int, users: int, rounds: int = 5, think_s: float = 60.0, answer: int = 250
    ) -> tuple[float, float]:
        """The two bounds: of a machine that is always busy, 1 / D, and of users who think, N / (response + R think)."""
        if think_s < 0 or rounds < 1:
            raise ValueError("think_s is not negative, rounds at least 1")
        demand = self.demand_s(tokens, users, rounds, answer)
        held = min(users, max(self.concurrency(tokens), 1))
        back = self.swap_s(tokens)[0] if users > self.concurrency(tokens) else 0.0
        alone = self.prefill_s(tokens) + rounds * (self.decode_s(tokens, held, answer) + back + think_s)
        return 3600 / demand, 3600 * users / alone

    @property
    def _peak(self) -> float:
        return self.on.peak("bf16") * self.on.efficiency.compute


def _positive(number: int) -> int:
    if number < 1:
        raise ValueError(f"tokens, users and rounds are at least 1; got {number}")
    return number


# --- measured reductions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A cache method as the caches family measured it: the part of the bytes that is left, accuracy and the full cache's,
    and the worst difference over tasks of retrieval, modes and turns."""

    method: str
    budget: float
    left: float
    accuracy: float
    full: float
    worst_drop: float

    @property
    def lossless(self) -> bool:
        """Retrieval stays within a point wherever it was asked: perplexity would not show what is lost."""
        return self.worst_drop <= 0.01

    @property
    def reduction(self) -> KVReduction:
        return KVReduction(hidden=min(1.0, self.left), name=f"{self.method} at {self.budget:g}")


#: tasks whose answers stand in the context
RETRIEVAL = ("kv", "kv_and_rules", "copy", "repoqa", "needle", "prefix_suffix")


def measured_reductions(records: Iterable[Any]) -> list[Measured]:
    """What is left and what is lost, from records of `compare caches` (means over seeds)."""
    sums: dict[tuple[str, float | None], dict[tuple[Any, ...], list[float]]] = {}
    for record in records:
        if record.bench != "caches" or record.metric not in ("bytes_ratio", "accuracy"):
            continue
        setting: Mapping[str, Any] = record.setting
        cut = (setting.get("mode"), setting.get("task"), setting.get("turn"))
        if "group" in setting or (cut != (None, None, None) and None in cut):
            continue
        sums.setdefault((record.method, setting.get("budget")), {}).setdefault((record.metric, *cut), []).append(
            record.value
        )
    means = {key: {cut: sum(v) / len(v) for cut, v in cuts.items()} for key, cuts in sums.items()}
    full = means.get(("full", None))
    found = []
    for (method, budget), cuts in means.items():
        if budget is None or full is None or ("bytes_ratio", None, None, None) not in cuts:
            continue
        drops = [full[cut] - value for cut, value in cuts.items() if cut in full and cut[2] in RETRIEVAL]
        accuracy = ("accuracy", None, None, None)
        if drops and accuracy in cuts:
            left = cuts["bytes_ratio", None, None, None]
            found.append(Measured(method, budget, left, cuts[accuracy], full[accuracy], max(drops)))
    return sorted(found, key=lambda one: (one.left, -one.accuracy))
