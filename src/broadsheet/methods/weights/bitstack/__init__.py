"""BitStack: one compressed model, any size (Wang et al. 2025, arXiv 2410.23918).

Every linear layer becomes a stack of blocks of about one bit a weight (`decompose`), after the channels that carry much
were scaled up (`scale`). One order over the blocks of all layers, the most useful first (`order`, `scores`), makes every
memory budget a prefix of one file (`stack`); what is loaded changes at run time (`set_size`). Nothing is compressed again
for a budget.

    model = BitStack(k="auto").compress(model, calibration)
    set_size(model, 900_000)                # bytes, all tensors of the model counted
    model.save_pretrained(folder)           # bitstack.safetensors and bitstack_index.json beside the other weights
    model = AutoModelForCausalLM.from_pretrained(folder, max_memory_mb=1.2)

Above about three bits a weight a good group quantiser is better, and smaller than its smallest size (one block of every
layer) this method does not go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from transformers import PreTrainedModel

from broadsheet.core.models.walker import blocks as decoder_blocks_of
from broadsheet.core.numerics.packed import bias_of
from broadsheet.core.perf.storage import bits_a_weight

from ..base import Progress, Shape, Unreachable, WeightMethod, check_model, linears, shapes
from .decompose import Layout, auto_rank, decompose, layout_of
from .layer import (
    BitStackLinear,
    Moved,
    Step,
    base_bytes,
    bitstack_layers,
    set_counts,
    set_size,
    size_table,
    stack_of,
)
from .order import Order, error_scores, stack_order
from .scale import apply_scales, find_scales
from .scores import following, model_scores, predictions
from .stack import Index, Stack

__all__ = ["BitStack", "BitStackLinear", "Moved", "Step", "set_size", "size_table"]

MIB = 2**20


@dataclass(frozen=True)
class BitStack(WeightMethod):
    """A stack of ``n_iter`` blocks of rank ``k`` for every linear layer, loaded as far as wanted.

    Parameters: ``n_iter`` (16) and ``k`` (16, or "auto": the largest whose factors cost a quarter of a bit a weight, as
    fits matrices that are not thousands wide); ``scale``: the activation-aware scaling; ``avd``: absolute values are
    decomposed and signs kept, off: plain SVD at as many bytes. ``sort``, what makes a block useful:

    - "ppl" (the paper's): the perplexity with it on the last ``sort_samples`` (32) calibration sequences, which
      the scaling does not see
    - "loss": the loss there with what the uncompressed model predicts as the labels; for models that are not
      meant to predict every token of their inputs
    - "error": the share of the scaled weight's squared error that it takes away, by byte; needs no evaluations
    - "none": the order of the layers

    ``bits``: what the compressed model is loaded to, at most, in bits a weight; None: everything. ``parity`` "official":
    the unrounded factors are subtracted.
    """

    n_iter: int = 16
    k: int | Literal["auto"] = 16
    scale: bool = True
    avd: bool = True
    sort: Literal["ppl", "loss", "error", "none"] = "ppl"
    sort_samples: int = 32
    bits: float | None = None
    parity: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.n_iter < 1:
            raise ValueError(f"n_iter must be at least 1, got {self.n_iter}")
        if self.k != "auto" and (isinstance(self.k, str) or self.k < 1):
            raise ValueError(f"k must be at least 1, or 'auto'; got {self.k!r}")
        if self.sort not in ("ppl", "loss", "error", "none"):
            raise ValueError(f"sort must be 'ppl', 'loss', 'error' or 'none', got {self.sort!r}")
        if self.sort_samples < 1:
            raise ValueError(f"sort_samples must be at least 1, got {self.sort_samples}")
        if self.bits is not None and not self.bits > 0:
            raise ValueError(f"bits must be positive or None, got {self.bits}")
        if self.parity not in (None, "official"):
            raise ValueError(f"parity must be 'official' or None, got {self.parity!r}")

    @property
    def evaluates(self) -> bool:
        """Whether the order is found by running the model."""
        return self.sort in ("ppl", "loss") and self.n_iter > 1

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        """As `WeightMethod.compress`; the stack lies in a temporary folder until the model is saved.

        ``progress`` counts the decoder blocks, then the levels that are sorted.
        """
        check_model(model)
        self.check(shapes(model))
        tuning, held_out = self._split(calibration)
        names = list(linears(model))
        layouts = {name: self.layout(*linear.weight.shape) for name, linear in linears(model).items()}
        parts = list(decoder_blocks_of(model))
        total = len(parts) + (self.n_iter - 1 if self.evaluates else 0)

        labels = None
        if held_out is not None:
            labels = predictions(model, held_out) if self.sort == "loss" else following(held_out)
        scales = [] if tuning is None else find_scales(model, tuning)
        stacks: dict[str, list[torch.Tensor]] = {}
        errors: dict[str, list[float]] = {}
        for block in parts:
            found = block.linears
            dtypes = {name: linear.weight.dtype for name, linear in found.items()}
            for linear in found.values():
                linear.weight.data = linear.weight.data.float()  # or scaling would round it to the model's dtype
            if scales:
                apply_scales(block, scales[block.index])
            for name, linear in found.items():
                try:
                    stacks[name], errors[name] = decompose(linear.weight, layouts[name], self.n_iter, self.parity)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                linear.weight.data = linear.weight.data.to(dtypes[name])
            if progress:
                progress(block.index + 1, total)

        nbytes = [layouts[name].nbytes for name in names]
        if self.evaluates and held_out is not None and labels is not None:
            count = (lambda level: progress(len(parts) + level, total)) if progress else None
            scores = model_scores(model, stacks, layouts, held_out, labels, self.sort, count)  # type: ignore[arg-type]
        elif self.sort == "error":
            scores = error_scores([errors[name] for name in names], nbytes).tolist()
        else:
            scores = [[0.0] * len(names)] * (self.n_iter - 1)
        order = stack_order(scores) if self.n_iter > 1 else []
        return self.install(model, stacks, layouts, order)

    def install(
        self,
        model: PreTrainedModel,
        stacks: dict[str, list[torch.Tensor]],
        layouts: dict[str, Layout],
        order: Order,
    ) -> PreTrainedModel:
        """Puts BitStack layers in the place of the model's linear layers, loaded to `bits`."""
        names = tuple(stacks)
        full = (self.n_iter,) * len(names)
        index = Index(names, tuple(layouts[name] for name in names), self.n_iter, order, loaded=full)
        position = len(index.whole)
        if self.bits is not None:
            weights = sum(layout.rows * layout.columns for layout in index.layouts)
            try:
                position = index.position(int(self.bits * weights / 8), 0)
            except ValueError:
                raise Unreachable(8 * index.offsets[index.layers] / weights) from None
        counts = index.counts(position)
        stack = Stack.write(index, [stacks[name] for name in names])
        dense = linears(model)
        for place, name in enumerate(names):
            linear, layout = dense[name], layouts[name]
            held = {f"block{i}": block for i, block in enumerate(stacks.pop(name)[: counts[place]])}
            layer = BitStackLinear(
                {**bias_of(linear), **held},
                layout.columns,
                layout.rows,
                layout.rank,
                layout.signed,
                self.n_iter,
            )
            layer.attach(stack, place)
            model.set_submodule(name, layer)
        model.config.max_memory_mb = None  # so that from_pretrained takes an argument of this name
        return self.seal(model)

    def layout(self, rows: int, columns: int) -> Layout:
        """The layout of the blocks of a weight [rows, columns]."""
        return layout_of(rows, columns, self.k, self.avd)

    def check(self, layers: Sequence[Shape]) -> None:
        for rows, columns in layers:
            self.layout(rows, columns)

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """This method, loaded to ``bits``; with fewer levels where fewer can be used, so that no more are sorted.

        A ``k`` above "auto" somewhere becomes "auto" (factors are dearer than signs: at equal bytes more blocks of lower
        rank are nearer), and then 1 where one block of every layer is still too much.
        """
        auto = min(auto_rank(rows, columns) for rows, columns in layers)
        for k in ("auto" if self.k == "auto" or self.k > auto else self.k, 1):
            one = replace(self, k=k)
            least = one.stored_bits(layers)
            if least <= bits:
                return replace(one, bits=bits, n_iter=min(self.n_iter, math.ceil(bits / least)))
        raise Unreachable(least)

    def stored_bits(self, layers: Sequence[Shape]) -> float:
        """With one block in every layer: the least."""
        return bits_a_weight(lambda rows, columns: self.layout(rows, columns).nbytes, layers)

    def _split(self, calibration: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The sequences for the scales, and those for sorting; None where none are needed."""
        if not self.scale and not self.evaluates:
            return None, None
        if calibration is None:
            raise ValueError("BitStack needs calibration: token ids [samples, tokens]; or scale=False and sort='error'")
        if calibration.ndim != 2 or not calibration.numel():
            raise ValueError("calibration must be token ids of shape [samples, tokens], at least one of each")
        if not self.evaluates:
            return calibration, None
        if len(calibration) < self.sort_samples + self.scale:
            raise ValueError(
                f"{len(calibration)} calibration sequences are too few: {self.sort_samples} are held out for sorting; give "
                "more or lower sort_samples"
            )
        if calibration.shape[1] < 2:
            raise ValueError("sorting needs calibration sequences of at least two tokens")
        return calibration[: -self.sort_samples] if self.scale else None, calibration[-self.sort_samples :]

    @classmethod
    def save_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        layers = bitstack_layers(model)
        stack_of(layers).save(folder, [layer.n_loaded for layer in layers], base_bytes(model))

    @classmethod
    def load_beside(cls, model: PreTrainedModel, folder: Path) -> None:
        """Loads as many blocks as the index says, or as fit into ``max_memory_mb`` (MiB) of `from_pretrained`."""
        stack = Stack.open(folder)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BitStackLinear)}
        if set(layers) != set(stack.index.names):
            odd = sorted(set(layers) ^ set(stack.index.names))[0]
            raise ValueError(f"{folder}: config.json and the stack differ about {odd}; the files belong to different models")
        in_order = [layers[name] for name in stack.index.names]
        for place, layer in enumerate(in_order):
            layer.attach(stack, place)
        counts: Sequence[int] = stack.index.loaded
        room = getattr(model.config, "max_memory_mb", None)
        if room is not None:
            counts = stack.index.counts(stack.index.position(int(room * MIB), base_bytes(model)))
            model.config.max_memory_mb = None
        homes = {
            id(module): next(block.module.parameters()).device
            for block in decoder_blocks_of(model)
            for module in block.module.modules()
        }
        set_counts(in_order, counts, [homes[id(layer)] for layer in in_order])
