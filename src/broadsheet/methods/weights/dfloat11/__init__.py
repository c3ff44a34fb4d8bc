"""DFloat11: 70% Size, 100% Accuracy, lossless compression by dynamic-length floats (Zhang et al. 2025, arXiv 2504.11651).

The weights of a bfloat16 model use few of the 256 exponents. Exponents are Huffman-coded, sign and mantissa stay as they
are, and every transformer block is decoded just before it is used: about 11 bits a weight, and bit by bit the same model.

- `huffman`: the code and its lookup tables. `codec`: weights to a stream and its index, a `Unit`.
- `decoders`: one weight after the other, and all threads in step (any device). `kernel`: the fast one, for CPUs.
- `units`: which layers are decoded together. `runtime`: decoding before use. `loading`, `files`: the official format.

Files are those of the official package (LeanModels/DFloat11, format 0.5.0) in both directions; equal weights give equal
bytes. Deviations: what the official encoder cannot store but the format can is stored (a single exponent; weights whose
code would need more than 16 tables); what the format cannot hold is refused instead of decoded to something else; and a
last position is written where the official encoder leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base import Progress, Shape, Unreachable, WeightMethod, check_model
from ..quantiser import save
from .codec import Damaged, Unit, encode, exponent_counts, merge, not_storable, split
from .decoders import decode, decode_lanes, decode_scalar
from .files import Report, UnitReport, Verification, config_of, inspect, verify, write_rest, write_unit
from .huffman import EXPONENTS, UNREPRESENTABLE
from .loading import DFloat11Config, DFloat11Model, DFloat11Quantizer
from .runtime import Decompressor, Workspace, attach, compressed, offload, unit_of
from .units import find_units, infer_patterns

__all__ = [
    "DFloat11", "DFloat11Model", "Damaged", "Decompressor", "Report", "Unit", "UnitReport", "Verification",
    "compress_model", "compressed", "decode", "decode_lanes", "decode_scalar", "encode", "infer_patterns", "inspect",
    "merge", "offload", "split", "unit_of", "verify",
]  # fmt: skip


@dataclass(frozen=True)
class DFloat11(WeightMethod):
    """``pattern_dict``: which layers form units (see `units`), inferred for decoder models when None.

    When it is inferred, ``embeddings`` says whether the embedding and the output layer are compressed too (not when they
    share a weight), and ``per_block`` whether the layers of a block are decoded together or each by itself.
    ``check_correctness``: decodes every unit after encoding it and compares it with the original as integers.
    """

    pattern_dict: Mapping[str, Sequence[str]] | None = None
    embeddings: bool = True
    per_block: bool = True
    check_correctness: bool = True

    calibrated: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False  # it has one size

    def compress(
        self, model: PreTrainedModel, calibration: torch.Tensor | None = None, progress: Progress | None = None
    ) -> PreTrainedModel:
        """Compresses ``model`` in place and returns it; ``calibration`` is not used. ``progress`` counts units."""
        check_model(model)
        patterns = self.pattern_dict or infer_patterns(model, self.embeddings, self.per_block)
        units = find_units(model, patterns)
        for done, _ in enumerate(_compress(model, units, self.check_correctness), 1):
            if progress:
                progress(done, len(units))
        model.config.dfloat11_config = config_of(patterns)
        return self.seal(model)

    def seal(self, model: PreTrainedModel) -> PreTrainedModel:
        config = DFloat11Config()
        model.config.quantization_config = config
        model.hf_quantizer = DFloat11Quantizer(config, pre_quantized=True)  # type: ignore[assignment]
        model.is_quantized = True  # type: ignore[assignment]
        return model

    def at_budget(self, bits: float, layers: Sequence[Shape]) -> Self:
        """This method has one size, which depends on the weights, not their shapes: 11 bits are asked for."""
        if bits < 11:
            raise Unreachable(11)
        return self


def compress_model(
    model: nn.Module,
    pattern_dict: Mapping[str, Sequence[str]] | None = None,
    save_path: str | Path = "",
    block_range: tuple[int, int] | None = None,
    save_single_file: bool = True,
    check_correctness: bool = True,
) -> nn.Module:
    """Compresses ``model`` in place, writes it to the folder ``save_path`` in the official format, and returns it.

    ``pattern_dict`` is inferred for decoder models of transformers when None. ``save_single_file=False``: a file for every
    unit and one for the rest. ``block_range``: only the units from the first number up to, without it, the second, so that
    several processes can share the work; the one with the last unit writes the rest. Raises ValueError, before anything is
    changed, for what cannot be compressed.
    """
    if not save_path:
        raise ValueError("save_path must name a folder")
    if block_range is not None and save_single_file:
        raise ValueError("block_range needs save_single_file=False: every process writes the files of its own units")
    if isinstance(model, PreTrainedModel):
        check_model(model)
        patterns = pattern_dict or infer_patterns(model)
    elif pattern_dict is None:
        raise ValueError(f"a {type(model).__name__} is no model of transformers; give its pattern_dict")
    else:
        patterns = pattern_dict
    units = list(find_units(model, patterns).items())
    first, last = block_range or (0, len(units))
    for name in _compress(model, dict(units[first:last]), check_correctness):
        if not save_single_file:
            write_unit(model, name, save_path)
    if last < len(units):
        return model
    config = config_of(patterns)
    if isinstance(model, PreTrainedModel):
        model.config.dfloat11_config = config
        DFloat11(pattern_dict).seal(model)
    if isinstance(model, PreTrainedModel) and save_single_file:
        save(model, save_path)
    else:
        write_rest(model, config, save_path, () if save_single_file else dict(units))
    return model


def _compress(model: nn.Module, units: Mapping[str, Sequence[str]], check: bool) -> Iterator[str]:
    """Makes units of a model's modules, one after the other, and says which. Raises ValueError before the first."""
    for full, weight in _weights(model, units):
        if reason := not_storable([weight]):
            raise ValueError(f"{full}: {reason}")
        if exponent_counts([weight.flatten().cpu()])[EXPONENTS:].any():
            raise ValueError(f"{full} {UNREPRESENTABLE}")
    workspace = Workspace.of(model)
    for name, paths in units.items():
        weights = [weight for _, weight in _weights(model, {name: paths})]
        unit = encode(weights)
        if check:
            parts = decode(unit).split(unit.sizes())
            if not all(torch.equal(_bits(part), _bits(weight.cpu())) for part, weight in zip(parts, weights)):
                raise RuntimeError(f"{name} is not what it was after decoding; please report this")
        attach(
            model.get_submodule(name),
            {key: part.to(weights[0].device) for key, part in unit.tensors().items()},
            paths,
            workspace,
        )
        yield name


def _weights(model: nn.Module, units: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of units by the full names of their layers."""
    for name, paths in units.items():
        for path in paths:
            weight = model.get_submodule(name).get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            yield f"{name}.{path}".rstrip("."), weight.detach()


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten().view(torch.int16)
