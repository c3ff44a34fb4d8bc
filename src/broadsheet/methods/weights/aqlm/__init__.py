"""AQLM: linear layers as sums of codebook vectors (Egiazarian et al. 2024, ICML, arXiv 2401.06118).

Every group of weights is a sum of one vector from each of a few codebooks. These are learned for the layer, and so are the
codes, to keep the layer's outputs on calibration data, not its weights (`additive`). Then what is not codes is trained until
the block puts out what it did (`tuning`). It is the quantiser of the study in `quantizing_code_llms`.

    model = AQLM(num_codebooks=1, nbits_per_codebook=8, in_group_size=4).compress(model, calibration)
    export(model, folder)                   # the format of the aqlm package

A codebook of B bits costs 2**B vectors of 16-bit numbers, in every layer. On layers of a few hundred rows that is most of
what is stored, unless B is small; `AQLM.at_budget` looks for what is best at the true bits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.observers import Gram
from broadsheet.core.models.walker import Block
from broadsheet.core.perf.storage import AdditiveWeight, bits_a_weight

from ..base import Progress, Shape, Unreachable, WeightMethod, check_model
from ..quantiser import replaced
from .additive import Additive, beam_search, fit, residual_kmeans, squared_error
from .layer import AQLMLinear, SharedAQLMLinear, packed, tunable
from .tuning import tune_block, tune_model

__all__ = ["AQLM", "AQLMLinear", "Additive", "SharedAQLMLinear", "beam_search", "export", "fit", "residual_kmeans"]
__all__ += ["squared_error"]

#: the codebooks that layers share, by block
SHARED = "aqlm_codebooks.safetensors"


@dataclass(frozen=True)
class AQLM(WeightMethod):
    """``num_codebooks`` codebooks of ``nbits_per_codebook`` bits for groups of ``out_group_size`` by ``in_group_size``.

    Parameters, with the names of the official code:

    - ``init_max_iter``: iterations of k-means for each first codebook
    - at most ``max_epochs`` rounds of ``steps_per_epoch`` Adam steps of ``lr`` on codebooks and scales, then a beam search
      of ``beam_size`` over the codes, until a round gains less than ``relative_mse_tolerance``. 0 switches off: all
      rounds, the steps, the search
    - ``hessian``: errors are those of the layer's outputs; off: those of its weights (XTX = I), which needs no data
    - ``finetune_*``: training of each block's codebooks, scales and norms towards its uncompressed outputs, for at most so
      many epochs (0: off), ended by ``finetune_early_stop`` epochs without gain on the held-out eighth of the samples
    - ``e2e_*``: the same of the whole model towards its own uncompressed predictions (KL), after all blocks
    - ``shared_codebooks``: the layers of a block share their codebooks, an extension for small layers

    `WeightMethod` says that norms stay: here fine-tuning changes them. Deviations from the paper's code: empty clusters of
    k-means are put where the error is largest; the best round is kept, not the last; batches of fine-tuning are those of the
    walk, 8 samples; and ``finetune_lr`` is 3e-4 instead of 1e-5, for calibration sets of tens of samples, not a thousand:
    eight batches an epoch move codebooks a hundred times less far than a thousand.

    Raises ValueError for groups that do not divide a layer's width, and codebooks of more entries than a layer has groups.
    """

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    beam_size: int = 1
    relative_mse_tolerance: float = 0.01
    max_epochs: int = 1000
    steps_per_epoch: int = 100
    lr: float = 1e-4
    init_max_iter: int = 100
    hessian: bool = True
    finetune_max_epochs: int = 10
    finetune_lr: float = 3e-4
    finetune_early_stop: int = 3
    e2e_max_epochs: int = 0
    e2e_lr: float = 1e-5
    e2e_early_stop: int = 3
    shared_codebooks: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.nbits_per_codebook <= 16:
            raise ValueError(f"nbits_per_codebook must be 1 to 16, got {self.nbits_per_codebook}")
        for name in ("num_codebooks", "in_group_size", "out_group_size", "finetune_early_stop", "e2e_early_stop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beam_size", "max_epochs", "steps_per_epoch", "init_max_iter", "finetune_max_epochs", "e2e_max_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0 (which switches it off), got {getattr(self, name)}")
        for name in ("lr", "finetune_lr", "e2e_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.beam_size > 2**self.nbits_per_codebook:
            raise ValueError(
                f"beam_size {self.beam_size} is more than the {2**self.nbits_per_codebook} entries of a codebook"
            )
        if not 0 <= self.relative_mse_tolerance < 1:
            raise ValueError(f"relative_mse_tolerance must be at least 0 and below 1, got {self.relative_mse_tolerance}")

    @property
    def calibrated(self) -> bool:  # type: ignore[override]  # without Hessian and training no data is looked at
        return self.hessian or self.finetune_max_epochs > 0 or self.e2e_max_epochs > 0

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        if not self.e2e_max_epochs or calibration is None:
            return super().compress(model, calibration, progress)
        check_model(model)
        teacher = copy.deepcopy(model)
        model = super().compress(model, calibration, progress)
        parts = tunable({name: layer for name, layer in model.named_modules() if isinstance(layer, AQLMLinear)})
        for name, part in parts.items():
            model.set_submodule(name, part)
        tune_model(model, teacher, calibration, self.e2e_max_epochs, self.e2e_lr, self.e2e_early_stop, self.seed)
        for name, layer in packed(parts).items():
            model.set_submodule(name, layer)
        return model

    def compress_block(self, block: Block) -> None:
        linears = block.linears
        grams = {name: Gram() for name in linears}
        targets = block.observe(grams) if self.calibrated else []
        names = [tuple(linears)] if self.shared_codebooks else [(name,) for name in linears]
        found: dict[str, Additive] = {}
        for some in names:
            try:
                found |= dict(zip(some, self._fit([linears[name].weight for name in some], [grams[name] for name in some])))
            except ValueError as error:
                raise ValueError(f"{some[0]}: {error}") from None
        of: Any = partial(SharedAQLMLinear.of, block=block.name) if self.shared_codebooks else AQLMLinear.of
        parts = tunable({name: of(stored, linears[name].bias) for name, stored in found.items()})
        for name, part in parts.items():
            block.replace(name, part)
        if self.finetune_max_epochs:
            epochs, patience = self.finetune_max_epochs, self.finetune_early_stop
            tune_block(block, targets, epochs, self.finetune_lr, patience, self.seed + block.index)
        for name, layer in packed(parts).items():
            block.replace(name, layer)

    def _fit(self, weights: list[torch.Tensor], grams: list[Gram]) -> list[Additive]:
        wide = [weight.detach().float() for weight in weights]
        metric = [
            gram.matrix if self.hessian else torch.eye(weight.shape[1], device=weight.device)
            for weight, gram in zip(wide, grams)
        ]
        start = residual_kmeans(
            wide,
            self.num_codebooks,
            self.nbits_per_codebook,
            self.in_group_size,
            self.out_group_size,
            self.init_max_iter,
            torch.Generator().manual_seed(self.seed),
        )
        tolerance = self.relative_mse_tolerance
        return fit(wide, metric, start, self.beam_size, self.max_epochs, self.steps_per_epoch, self.lr, tolerance, self.seed)

    def check(self, layers: Sequence[Shape]) -> None:
        for rows, columns in layers:
            if columns % self.in_group_size or rows % self.out_group_size:
                raise ValueError(
                    f"a layer of {rows} x {columns} does not divide into groups of {self.out_group_size} x "
                    f"{self.in_group_size}; choose in_group_size and out_group_size that divide it"
                )
            groups = rows * columns // (self.in_group_size * self.out_group_size)
            if 2**self.nbits_per_codebook > groups and not self.shared_codebooks:
                raise ValueError(
                    f"a codebook of 2^{self.nbits_per_codebook} entries is more than the {groups} groups of a layer of "
                    f"{rows} x {columns}; lower nbits_per_codebook or in_group_size"
                )

    def format(self) -> AdditiveWeight:
        return AdditiveWeight(self.num_codebooks, self.nbits_per_codebook, self.in_group_size, self.out_group_size)

    def stored_bits(self, layers: Sequence[Shape], blocks: int | None = None) -> float:
        """``blocks``: how many decoder blocks they stand in, which counts if codebooks are shared; None: see `_blocks`."""
        if not self.shared_codebooks:
            return super().stored_bits(layers)
        books = _blocks(layers) if blocks is None else blocks
        own = bits_a_weight(self.format().code_bytes, layers)
        return own + 8 * books * self.format().codebook_bytes / sum(rows * columns for rows, columns in layers)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """The codebooks and groups, of those that fit, that `_promise` the most; others of its fields stay.

        Codebooks of up to 8 bits are looked at: larger ones take hours without a GPU, and are multiplied more slowly.
        """
        weights = sum(rows * columns for rows, columns in layers)
        scales = 16 * sum(rows for rows, _ in layers) / weights
        best, least = (-float("inf"), 0.0, self), float("inf")
        for group, nbits, books in product((1, 2, 4, 8, 16), range(2, 9), range(1, 9)):
            one = replace(
                self,
                num_codebooks=books,
                nbits_per_codebook=nbits,
                in_group_size=group,
                out_group_size=1,
                beam_size=min(self.beam_size, 2**nbits),
            )
            try:
                one.check(layers)
            except ValueError:
                continue
            held = one.stored_bits(layers)
            least = min(least, held)
            if held <= bits:
                best = max(best, (one._promise(held - scales), -held, one), key=lambda found: found[:2])
        if least > bits:
            raise Unreachable(least)
        return best[2]

    def _promise(self, stored: float) -> float:
        """How many bits a weight these codes are worth (half the fall of log2 of the error).

        ``stored``: bits of codes and codebooks. A rule read off the errors of 49 configurations on layers of pocket-2m, at 2
        and 3 bits: a bit of codes is worth one and a bit of codebooks a quarter; entries that are chosen among more do more;
        and sums of several codebooks do less than one of as many bits, the more bits the less.
        """
        codes = self.num_codebooks * self.nbits_per_codebook / self.in_group_size
        lost = 0.06 * math.log2(self.num_codebooks) * max(0.0, codes - 1)
        return codes + 0.25 * (stored - codes) + 0.04 * self.nbits_per_codebook - lost

    @classmethod
    def save_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        books = {layer.block: layer.codebooks for layer in model.modules() if isinstance(layer, SharedAQLMLinear)}
        save_file({name: tensor.contiguous().cpu() for name, tensor in books.items()}, folder / SHARED)

    @classmethod
    def load_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        file = folder / SHARED
        if not file.is_file():
            raise ValueError(f"{folder} has no {SHARED}, which holds the codebooks; save the model again")
        books = load_file(file)
        for name, layer in model.named_modules():
            if isinstance(layer, SharedAQLMLinear):
                if layer.block not in books:
                    raise ValueError(f"{file} has no codebooks for {name}; the files belong to different models")
                books[layer.block] = layer.codebooks = books[layer.block].to(layer.codes.device)


def _blocks(layers: Sequence[Shape]) -> int:
    """How many decoder blocks of equal layers these are; where blocks are not equal, as many as there are layers."""
    for period in range(1, len(layers) // 2 + 1):
        if len(layers) % period == 0 and list(layers) == list(layers[:period]) * (len(layers) // period):
            return len(layers) // period
    return len(layers)


def export(model: PreTrainedModel, folder: str | Path) -> None:
    """Writes a model of this method in the format of the aqlm package, which transformers loads where that is installed.

    Codes take a byte each up to 8 bits and two above, whatever `AQLM.stored_bits` says. Raises ValueError for other models.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AQLMLinear)}
    shapes = {(*layer.codebooks.shape, layer.nbits) for layer in layers.values()}
    if len(shapes) != 1:
        raise ValueError("export takes a model that AQLM compressed, with one size of codebooks")
    ((books, _, out_group, in_group, nbits),) = shapes
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    whole = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for tied in getattr(model, "all_tied_weights_keys", {}):
        tensors.pop(tied, None)
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.official().items()}
    config = model.config.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = {
        "quant_method": "aqlm",
        "num_codebooks": books,
        "nbits_per_codebook": nbits,
        "in_group_size": in_group,
        "out_group_size": out_group,
        "linear_weights_not_to_quantize": [*whole, *(f"{name}.weight" for name in whole)],  # old releases want these
    }
    held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with replaced(folder) as fresh:
        save_file(held, fresh / "model.safetensors", {"format": "pt"})
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n")
