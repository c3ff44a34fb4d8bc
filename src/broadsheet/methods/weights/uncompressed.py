"""The model as it is: what every method is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from transformers import PreTrainedModel

from broadsheet.core.perf.storage import EXACT_WEIGHT, WeightFormat

from .base import Progress, Shape, Unreachable, WeightMethod


@dataclass(frozen=True)
class Uncompressed(WeightMethod):
    """Weights as they are stored: 16 bits each."""

    calibrated: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        return model

    def format(self) -> WeightFormat:
        return EXACT_WEIGHT

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        if bits < 16:
            raise Unreachable(16.0)
        return self
