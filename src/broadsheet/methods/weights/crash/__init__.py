"""CRaSh: fine-tuning without the full model (Zhang et al. 2023, EMNLP, arXiv 2310.15477).

The owner of a model and the owner of the data keep both to themselves: an *emulator* goes out, a few tuned layers come back.
The emulator needs no training: layers that are alike (CKA of what they put out) are clustered, one of each cluster is kept,
and the kept ones are used several times to restore the depth.

    plan = CRaSh(n_keep=12, n_adapters=4).plan(model, calibration)
    plan.save(model, "out")                                  # to the client, who never sees the rest

    emulator = load_emulator("out")                          # the client tunes it with any trainer
    extract_adapters(emulator, "adapters.safetensors")       # back to the owner

    plug_in(model, "adapters.safetensors")

- `layers`: likeness, clusters, which layers are kept. `emulator`: the plan, the emulator, the way back.

Deviations from the official code: outputs of the blocks are compared, not the last one after the final norm; the search for
the nearest kept layer stops at both ends of the model; a layer that is used several times has its own place in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from broadsheet.core.models import fingerprint
from broadsheet.core.models.walker import decoder_blocks

from .emulator import (
    EmulatorPlan,
    adapter_tensors,
    barrier,
    extract_adapters,
    interpolate,
    load_emulator,
    plug_in,
    with_layers,
)
from .layers import POOLINGS, adjacent, centres, cka, clusters, dropped_in_turn, evenly, representations

__all__ = [
    "POOLINGS", "CRaSh", "EmulatorPlan", "adapter_tensors", "barrier", "cka", "clusters", "extract_adapters", "interpolate",
    "load_emulator", "plug_in", "representations",
]  # fmt: skip


@dataclass(frozen=True)
class CRaSh:
    """Plans an emulator of ``n_keep`` layers, ``n_adapters`` of which are tuned.

    ``select``, which layers are kept: "crash" (one of each cluster), "uniform" (offsite-tuning's: the outermost are tuned,
    the others evenly spaced between), "cka_drop" (one of the two most alike is dropped, again and again), "random" (by
    ``seed``). ``pooling``: see `layers.pool`. ``share``: see `EmulatorPlan`; "none" leaves the emulator shallow.
    ``adapters``: the layers that are tuned; None: the first and last kept, and those nearest to even distances between (the
    paper's lists are literal; this is our reading of them).
    """

    n_keep: int = 12
    n_adapters: int = 4
    select: Literal["crash", "uniform", "cka_drop", "random"] = "crash"
    pooling: str = "mean_weighted"
    share: Literal["nearest", "nearest_frozen", "none"] = "nearest"
    adapters: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.select not in ("crash", "uniform", "cka_drop", "random"):
            raise ValueError(f"select must be crash, uniform, cka_drop or random, got '{self.select}'")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got '{self.pooling}'")
        if not 1 <= self.n_adapters <= self.n_keep:
            raise ValueError(f"n_adapters must be from 1 to n_keep ({self.n_keep}), got {self.n_adapters}")

    def plan(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> EmulatorPlan:
        """``calibration`` [samples, tokens] and ``mask``: see `layers.representations`; "uniform" and "random" need none."""
        layers = len(decoder_blocks(model))
        if self.n_keep > layers:
            raise ValueError(f"n_keep is {self.n_keep}, the model has {layers} layers")
        groups: list[list[int]] = []
        if self.select == "uniform":
            kept = self._uniform(layers)
        elif self.select == "random":
            draw = torch.Generator().manual_seed(self.seed)
            kept = sorted(torch.randperm(layers, generator=draw)[: self.n_keep].tolist())
        elif calibration is None:
            raise ValueError(f"select='{self.select}' needs calibration: token ids [samples, tokens]")
        elif self.select == "crash":
            groups = clusters(adjacent(representations(model, calibration, mask, self.pooling)), self.n_keep)
            kept = centres(groups)
        else:
            ids = calibration

            def similarities(some: list[int]) -> list[float]:
                return adjacent(representations(with_layers(model, some), ids, mask, self.pooling))

            kept = dropped_in_turn(layers, self.n_keep, similarities)
        adapters = self._adapters(kept, layers) if self.adapters is None else self.adapters
        return EmulatorPlan(layers, tuple(kept), tuple(adapters), fingerprint(model), tuple(map(tuple, groups)), self.share)

    def _uniform(self, layers: int) -> list[int]:
        first, last = self._ends()
        inner = list(range(first, layers - last))
        middle = evenly(inner, self.n_keep - self.n_adapters) if self.n_keep > self.n_adapters else []
        return [*range(first), *middle, *range(layers - last, layers)]

    def _ends(self) -> tuple[int, int]:
        return self.n_adapters - self.n_adapters // 2, self.n_adapters // 2

    def _adapters(self, kept: Sequence[int], layers: int) -> list[int]:
        if self.select == "uniform":
            first, last = self._ends()
            return [*kept[:first], *kept[len(kept) - last :]]
        chosen: list[int] = []
        for wanted in (i * (layers - 1) / max(self.n_adapters - 1, 1) for i in range(self.n_adapters)):
            free = [layer for layer in kept if layer not in chosen]
            chosen.append(min(free, key=lambda layer: abs(layer - wanted)))
        return sorted(chosen)
