"""AccLLM, the weights: 2:4 pruning and 2-bit codes with a learned range (Liang et al. 2026, arXiv 2505.03745).

The paper prunes weights 2:4, quantises them to 2 bits, activations to 8 and the cache to 4, and attends to a few first
tokens and a recent window. This package is what is done to the model; the cache is `broadsheet.methods.caches.lambda_kv4`,
and `broadsheet.lab.recipes.accllm` chains the two.

- `sparsity`: which weights stay, and where they stand; `clipping`: rounding what stays, with a learned range
- `layer`, `kernel`: what is stored and multiplied
- `AccLLM`: the method; `prune_nm`: its first step alone

The paper names the steps and not how they are done; criteria and settings here are those of the works it builds on (Wanda or
SparseGPT for pruning, OmniQuant for the range).

2:4 with two bits a value and a two-bit index each takes exactly what dense two-bit weights take: it halves the products, not
the bytes. With a number for each of the six patterns it takes an eighth less (2.0 against 2.25 bits with scales).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from broadsheet.core.models import folds
from broadsheet.core.models.observers import Gram, Norms, Range
from broadsheet.core.models.walker import Block, Pass, blocks, walk, widened
from broadsheet.core.perf.storage import PLACES, WeightFormat, sparse_weight

from ..base import Shape, Unreachable, WeightMethod, check_model
from ..smoothquant import smoothing
from .clipping import Clip, Grid, plain_grid
from .layer import SparseLinear
from .sparsity import Sparsity, mask_nm, sparsegpt, wanda_score

__all__ = ["CLIPS", "ORDERS", "PLACES", "SCORES", "AccLLM", "SparseLinear", "Sparsity", "prune_nm"]

SCORES = ("sparsegpt", "wanda", "magnitude", "given", "none")
CLIPS = ("learned", "none")
ORDERS = ("prune first", "quantise first")


@dataclass(frozen=True)
class AccLLM(WeightMethod):
    """Linear layers with n of every m weights in ``bits`` bits.

    Pruning: ``n``, ``m``; ``score`` "sparsegpt" (which also makes losses good, with ``damping``), "wanda", "magnitude",
    "given" (the model is n:m sparse already; its zeros are pruned), "none" (dense); ``places``, how places are stored:
    "patterns" (1.75 bits a weight for 2:4 with two bits) or "indices" (2.0).

    Rounding: ``bits`` 1 to 8, or 16 for none; ``group_size`` weights of a row, pruned ones counted, share a range (a shorter
    row is one group); ``clip`` "learned" trains it block after block, so that the block's output becomes that of the
    uncompressed block in the uncompressed model: Adam, ``epochs`` times over the calibration set in batches of 8 samples,
    ``learning_rate`` (OmniQuant's is 0.01, for eight times as many steps); "none" is round to nearest.
    ``weight_learning_rate``: above 0, the weights that stay are trained with it (recovery, an extension). ``order``
    "quantise first" rounds all weights and prunes the rounded ones: the paper's order turned round.

    Activations: ``activation_bits`` 8 rounds each token's input of every layer (0: not), in the compressed model; while
    ranges are learned it is as it comes. ``smooth``, with it: SmoothQuant's alpha; channels of what the norms make are
    divided by max |x|^alpha / max |w|^(1 - alpha) and weights multiplied by it, before anything is scored (0: not).

    Blocks are done one after the other; each gets the inputs that the compressed ones before it give. Within a block all
    layers are scored on the block as it comes. Memory beside the model: one block's inputs twice.

    Raises ValueError for values outside these, for in_features that m does not divide, and where a "given" weight is denser.
    """

    n: int = 2
    m: int = 4
    score: str = "sparsegpt"
    places: str = "patterns"
    bits: int = 2
    group_size: int = 128
    clip: str = "learned"
    order: str = "prune first"
    epochs: int = 20
    learning_rate: float = 0.03
    weight_learning_rate: float = 0.0
    damping: float = 0.01
    activation_bits: int = 8
    smooth: float = 0.5

    def __post_init__(self) -> None:
        known = (("score", SCORES), ("places", PLACES), ("clip", CLIPS), ("order", ORDERS))
        for name, values in known:
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got '{getattr(self, name)}'")
        Sparsity(self.n, self.m, self.places)
        if not (1 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(f"bits must be 1 to 8, or 16 for weights that are only pruned, got {self.bits}")
        if self.group_size < 1 or self.group_size % self.layout.m:
            raise ValueError(f"group_size must be a multiple of {self.layout.m}, got {self.group_size}")
        if self.epochs < 1 or self.learning_rate <= 0 or self.weight_learning_rate < 0 or self.damping <= 0:
            raise ValueError("epochs, learning_rate and damping must be above 0, weight_learning_rate not below 0")
        if self.activation_bits not in (0, 8):
            raise ValueError(f"activation_bits must be 8, or 0 for activations as they are, got {self.activation_bits}")
        if not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth must be between 0 and 1, got {self.smooth}")
        if self.order == "quantise first" and self.score == "sparsegpt":
            raise ValueError("sparsegpt changes the weights that stay, so they cannot have been rounded; prune first")

    @property
    def calibrated(self) -> bool:  # type: ignore[override]  # magnitudes and plain ranges need no data
        return self.score in ("wanda", "sparsegpt") or self.learns or self.smooths

    @property
    def learns(self) -> bool:
        return self.bits < 16 and self.clip == "learned"

    @property
    def smooths(self) -> bool:
        return self.activation_bits > 0 and self.smooth > 0

    @property
    def layout(self) -> Sparsity:
        return Sparsity(1, 1) if self.score == "none" else Sparsity(self.n, self.m, self.places)

    @property
    def group(self) -> int:
        """Weights that stay of a full group."""
        return self.group_size // self.layout.m * self.layout.n

    def check(self, layers: Sequence[Shape]) -> None:
        for _, columns in layers:
            self.layout.kept(columns)

    def compress_blocks(self, found: Iterator[Block]) -> Iterator[Block]:
        exact: list[torch.Tensor] | None = None  # what this block would get in the uncompressed model
        for block in found:
            if self.learns:
                inputs = [step.hidden for step in block.passes] if exact is None else exact
                exact = Block(block.index, block.name, block.module, _with(block.passes, inputs)).run()
            self.compress_with(block, exact)
            yield block

    def compress_with(self, block: Block, target: list[torch.Tensor] | None) -> None:
        """Compresses one block, whose outputs should be ``target`` [batch, tokens, hidden_size] for each of its passes."""
        if self.smooths:
            smooth(block, self.smooth)
        masks = None
        if self.order == "prune first":
            masks = self.prune(block)
        full = {name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in block.linears.items()}
        grids = self.fit(block, masks or full, target) if self.bits < 16 else {}
        if masks is None:
            masks = self.prune_rounded(block, grids)
        for name, linear in block.linears.items():
            block.replace(name, SparseLinear.of(linear, masks[name], self.layout, grids.get(name), self.activation_bits))

    def prune(self, block: Block) -> dict[str, torch.Tensor]:
        """Sets the pruned weights of the block to zero, in place; returns what stays, by layer."""
        statistics: dict[str, Any] = {}
        if self.score in ("wanda", "sparsegpt"):
            statistics = {name: Norms() if self.score == "wanda" else Gram() for name in block.linears}
            block.observe(statistics)
        masks = {}
        for name, linear in block.linears.items():
            weight = linear.weight.detach().float()
            if self.score == "sparsegpt":
                weight, mask = sparsegpt(weight, statistics[name].matrix, self.n, self.m, self.damping)
            else:
                mask = self.mask(weight, statistics.get(name), name)
            linear.weight.copy_(weight * mask)
            masks[name] = mask
        return masks

    def mask(self, weight: torch.Tensor, norms: Norms | None, name: str) -> torch.Tensor:
        """What stays of ``weight`` [rows, columns]."""
        if self.score == "none":
            return torch.ones_like(weight, dtype=torch.bool)
        if self.score == "given" and int((weight != 0).unflatten(-1, (-1, self.m)).sum(-1).max()) > self.n:
            raise ValueError(f"{name} is not {self.n}:{self.m} sparse; prune it first, or choose another score")
        score = weight.abs() if norms is None else wanda_score(weight, norms.norm)
        return mask_nm(score, self.n, self.m)

    def prune_rounded(self, block: Block, grids: dict[str, Grid]) -> dict[str, torch.Tensor]:
        """Quantise first: rounds all weights in place, prunes them, and gives the grids the group of what stays."""
        for name, linear in block.linears.items():
            if name in grids:
                kept = linear.in_features
                linear.weight.copy_(grids[name].decode(grids[name].encode(linear.weight.float()), kept))
                grids[name] = replace(grids[name], group=grids[name].group // self.layout.m * self.layout.n)
        return self.prune(block)

    def fit(self, block: Block, masks: dict[str, torch.Tensor], target: list[torch.Tensor] | None) -> dict[str, Grid]:
        """The ranges of all layers. With `weight_learning_rate` the weights that stay are changed in place."""
        share = next(iter(masks.values())).float().mean().item()  # n / m, or 1 where nothing is pruned yet
        group = round(self.group_size * share)
        kept = {
            name: linear.weight.detach()[masks[name]].view(linear.out_features, -1).float()
            for name, linear in block.linears.items()
        }
        if not self.learns or target is None:
            return {name: plain_grid(values, self.bits, group) for name, values in kept.items()}
        with torch.enable_grad():
            clips = {name: Clip(values, self.bits, group) for name, values in kept.items()}
            self.train(block, masks, clips, target)
        if self.weight_learning_rate:
            for name, linear in block.linears.items():
                linear.weight.masked_scatter_(masks[name], clips[name].values.to(linear.weight.dtype))
        return {name: clip.grid() for name, clip in clips.items()}

    def train(
        self, block: Block, masks: dict[str, torch.Tensor], clips: dict[str, Clip], target: list[torch.Tensor]
    ) -> None:
        ranges = [part for clip in clips.values() for part in (clip.gamma, clip.beta)]
        learned: list[dict[str, Any]] = [{"params": ranges, "lr": self.learning_rate}]
        if self.weight_learning_rate:
            weights = [clip.grouped.requires_grad_() for clip in clips.values()]
            learned.append({"params": weights, "lr": self.weight_learning_rate})
        optimiser = torch.optim.Adam(learned)
        steps = [*zip(block.passes, target, strict=True)] * self.epochs
        with widened(block.module):
            for step, wanted in steps:
                rounded = {
                    name: torch.zeros(masks[name].shape, device=wanted.device).masked_scatter(masks[name], clip.rounded())
                    for name, clip in clips.items()
                }
                loss = F.mse_loss(block.output(step, rounded).float(), wanted.float())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """The most bits a code, then the smallest group, that fit; 16 bits without codes where they fit."""
        choices = [replace(self, bits=16)]
        sizes = [size for size in (32, 64, 128, 256, 512, 1024) if size % self.layout.m == 0]
        choices += [replace(self, bits=codes, group_size=size) for codes in range(8, 0, -1) for size in sizes]
        held = {}
        for choice in choices:
            held[choice] = choice.stored_bits(layers)
            if held[choice] <= bits:
                return choice
        raise Unreachable(min(held.values()))

    def format(self) -> WeightFormat:
        layout = self.layout
        return sparse_weight(self.bits, self.group_size, layout.n, layout.m, layout.places)


def smooth(block: Block, alpha: float) -> None:
    """Divides the channels of what the block's norms make by s and multiplies the weights that read them, in place.

    s_j = max |x_j|^alpha / max |w_j|^(1 - alpha) over calibration tokens and all readers' rows (SmoothQuant: Xiao et al.
    2023, arXiv 2211.10438, equation 4). The block computes what it did; its inputs' outliers have moved to the weights.
    """
    for fold in folds.norm_folds(block):
        seen = Range()
        block.observe({fold.readers[0]: seen})
        scale = smoothing(seen.largest, [block.get(name).weight for name in fold.readers], alpha)
        folds.scale(block, fold, scale)


def _with(passes: list[Pass], hidden: list[torch.Tensor]) -> list[Pass]:
    return [replace(step, hidden=states) for step, states in zip(passes, hidden, strict=True)]


@torch.no_grad()
def prune_nm(
    model: PreTrainedModel,
    calibration: torch.Tensor | None = None,
    n: int = 2,
    m: int = 4,
    score: str = "sparsegpt",
    damping: float = 0.01,
) -> PreTrainedModel:
    """Sets m - n of every m weights of the decoder blocks' linear layers to zero, in place; the model stays an ordinary one.

    ``calibration``: token ids [samples, tokens], for "wanda" and "sparsegpt". `AccLLM` with ``score`` "given" then packs it,
    with other tools' fine-tuning between the two if wanted.
    """
    method = AccLLM(n=n, m=m, score=score, damping=damping, clip="none", bits=16, activation_bits=0)
    check_model(model)
    if method.calibrated and calibration is None:
        raise ValueError(f"the score '{score}' needs calibration: token ids of shape [samples, tokens]")
    for block in walk(model, calibration) if method.calibrated and calibration is not None else blocks(model):
        method.check([(linear.out_features, linear.in_features) for linear in block.linears.values()])
        method.prune(block)
    return model
