"""LLM-Viewer: where the time of a model goes, operator by operator, without the model or the machine.

Yuan et al. 2024, "LLM Inference Unveiled: Survey and Roofline Model Insights", arXiv 2402.16363.

Every operator of a forward pass has operations F and bytes Q (`core.perf.ops`). A device has a peak and a bandwidth; below
the turning point peak / bandwidth an operator is bound by memory, above it by compute (section 3.1, equation 1), and takes
max(F / peak, Q / bandwidth). Times add up: operators do not overlap. The survey's methods are rewrites of that table:
fewer bits (section 4), fewer cached tokens (5.3), grouped heads and fused attention (6), fewer layers (5.1), experts and
drafts (5.2).

Beyond the paper: three scalars fitted on measured operators turn the roofline, a lower bound, into a prediction
(`core.perf.calibration`); every number of a device says where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from broadsheet.core.perf.architecture import Architecture, architecture
from broadsheet.core.perf.hardware import Device, device
from broadsheet.core.perf.ops import Op, Setting, activation_bytes, cache_bytes, operators, parameters, weight_bytes
from broadsheet.core.perf.storage import CacheFormat, WeightFormat, cache_format, weight_format

from .compat import compat_device, compat_operators
from .report import Memory, RooflineReport, Stage


@dataclass(frozen=True)
class LLMViewer:
    """Times, bytes and bounds of every operator of a decoder on a device.

    Attributes:
        hardware: a device's name ("h100") or the JSON file of one (`core.perf.hardware`).
        weights: of linear layers: how many bits, or a format of `core.perf.storage`, "gptq:bits=3,group_size=64", with all
            the bytes that the method of that name stores.
        activation_bits: 16, 8 (the 8-bit rate, where the weights have 8 bits at most) or 32.
        cache: as ``weights``: 8, "kivi:bits=2,group_size=32,residual=128", "snapkv:share=0.25"; None: as activations.
        kv_heads: other kv heads than the model has (1: multi-query attention).
        layers: only the first so many (pruned depth, early exit).
        fused: attention in one kernel.
        tensor_parallel: ranks; times are of each, and of the all-reduces between them.
        draft, gamma, acceptance: speculative decoding: the draft's shape, its tokens a step, how probable each is right.
        calibrated: with the device's fitted efficiencies, where it has some; else the rated roofline, a lower bound.
        compat: count as the official code does, with its faults and its devices' numbers.
    """

    hardware: str = "a100"
    weights: float | str | WeightFormat = 16
    activation_bits: float = 16
    cache: float | str | CacheFormat | None = None
    kv_heads: int | None = None
    layers: int | None = None
    fused: bool = True
    tensor_parallel: int = 1
    draft: str = ""
    gamma: int = 4
    acceptance: float = 0.8
    calibrated: bool = True
    compat: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance is a probability; got {self.acceptance}")
        if self.gamma < 1:
            raise ValueError(f"gamma is at least 1; got {self.gamma}")
        self._setting(1, 1, None)

    def estimate(self, model: Any = "pocket-2m", batch: int = 1, context: int = 2048, generate: int = 0) -> RooflineReport:
        """Prefill of ``context`` tokens, one decode step behind them, and where ``generate`` is given all of an answer.

        ``model``: what `core.perf.architecture.architecture` takes. The decode step attends to ``context`` keys. Raises
        ValueError for what it does not know, naming what it does.
        """
        if generate < 0:
            raise ValueError(f"generate is not negative; got {generate}")
        on, arch = self._device(), self._architecture(model)
        prefill = self._stage("prefill", arch, on, self._setting(batch, context, None))
        decode = self._stage("decode", arch, on, self._setting(batch, context, 1))
        stages = [prefill, decode]
        if self.draft:
            stages.append(self._speculative(arch, on, batch, context))
        if generate:
            stages.append(self._answer(arch, on, batch, context, generate, prefill))
        memory = self._memory(arch, on, batch, context + generate, prefill)
        official = None if self.compat else self._official(arch, batch, context)
        return RooflineReport(self, arch, on, batch, context, tuple(stages), memory, official)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _device(self) -> Device:
        found = device(self.hardware)
        if self.compat:
            return compat_device(found)
        return found if self.calibrated else found.rated()

    def _architecture(self, model: Any) -> Architecture:
        arch = architecture(model)
        if self.kv_heads:
            arch = arch.grouped(self.kv_heads)
        return arch.kept(self.layers) if self.layers else arch

    def _setting(self, batch: int, context: int, queries: int | None) -> Setting:
        head_bits = max(16, min(self.activation_bits, 32))
        cache = None if self.cache is None else cache_format(self.cache)
        return Setting(
            batch, context, queries, weight_format(self.weights), head_bits, self.activation_bits, cache, self.fused,
            tensor_parallel=self.tensor_parallel,
        )  # fmt: skip

    def _table(self, arch: Architecture, on: Device, setting: Setting) -> list[Op]:
        return compat_operators(arch, setting, on) if self.compat else operators(arch, setting)

    def _stage(self, name: str, arch: Architecture, on: Device, setting: Setting) -> Stage:
        tokens = setting.batch * (setting.new if name == "prefill" else 1)
        return Stage(name, tuple(self._table(arch, on, setting)), tokens, on)

    def _official(self, arch: Architecture, batch: int, context: int) -> dict[str, float] | None:
        """Seconds of both stages as the official code has them, unfused as its default is; None where it cannot."""
        try:
            theirs = replace(self, compat=True, fused=False)
            on = theirs._device()
            passes = {"prefill": None, "decode": 1}
            tables = {name: theirs._table(arch, on, theirs._setting(batch, context, new)) for name, new in passes.items()}
            return {name: sum(op.count * op.seconds(on) for op in table) for name, table in tables.items()}
        except ValueError:  # a device or a rate that it does not know
            return None

    def _speculative(self, arch: Architecture, on: Device, batch: int, context: int) -> Stage:
        """gamma draft steps and a verification of gamma + 1 tokens give (1 - a^(gamma+1)) / (1 - a) tokens (section 5.2)."""
        small = replace(self, draft="", kv_heads=None, layers=None)
        draft = small._table(architecture(self.draft), on, self._setting(batch, context, 1))
        check = self._table(arch, on, self._setting(batch, max(context, self.gamma + 1), self.gamma + 1))
        a = self.acceptance
        expected = self.gamma + 1 if a == 1 else (1 - a ** (self.gamma + 1)) / (1 - a)
        rows = [replace(op, name=f"draft.{op.name}", count=op.count * self.gamma) for op in draft]
        return Stage("speculative step", (*rows, *check), batch * expected, on)

    def _answer(self, arch: Architecture, on: Device, batch: int, context: int, generate: int, prefill: Stage) -> Stage:
        """Prefill and all decode steps; steps are alike enough that ten lengths stand for all (trapezoids between them)."""
        lengths = np.unique(np.linspace(context + 1, context + generate, min(10, generate)).round().astype(int))
        tables = [self._table(arch, on, self._setting(batch, int(length), 1)) for length in lengths]
        weights = np.ones(1) * generate if len(lengths) == 1 else _trapezoids(lengths) * generate
        rows = list(prefill.ops)
        for table, weight in zip(tables, weights, strict=True):
            rows += [replace(op, count=op.count * float(weight)) for op in table]
        return Stage(f"answer of {generate}", tuple(rows), batch * generate, on)

    def _memory(self, arch: Architecture, on: Device, batch: int, context: int, prefill: Stage) -> Memory:
        setting = self._setting(batch, context, 1)
        weights = weight_bytes(arch, setting)
        if self.draft:
            weights += weight_bytes(architecture(self.draft), setting)
        return Memory(weights, cache_bytes(arch, setting), activation_bytes(prefill.ops), on.memory, parameters(arch))


def _trapezoids(lengths: np.ndarray) -> np.ndarray:
    """Weights, summing to 1, of the mean over all lengths between the first and the last."""
    gaps = np.diff(lengths)
    weights = np.zeros(len(lengths))
    weights[:-1] += gaps / 2
    weights[1:] += gaps / 2
    return weights / weights.sum()
