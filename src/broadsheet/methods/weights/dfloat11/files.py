"""Folders in the official format: what they say, whether they are sound, what compression gives.

A folder holds safetensors files, each unit's six tensors under the full name of its module (``model.layers.0.luts`` ...) and
all else as it was, and a config.json with ``dfloat11_config``. Units may stand in the model's own files or in one file each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..quantiser import headers
from .codec import BLOCK_BYTES, GAP_BYTES, Damaged, Stream, Unit, exponent_counts, not_storable, split
from .decoders import decode
from .huffman import END, Code, code_of
from .runtime import UNIT_TENSORS

#: the version that is written; from 0.2 on the format did not change
VERSION, READABLE = "0.5.0", ("0.2", "0.3", "0.4", "0.5")


def config_of(patterns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The ``dfloat11_config`` of a model compressed by these patterns."""
    listed = {pattern: list(paths) for pattern, paths in patterns.items()}
    return {"version": VERSION, "threads_per_block": [512], "bytes_per_thread": 8, "pattern_dict": listed}


def check_config(config: Any) -> dict[str, Any]:
    """A ``dfloat11_config`` that can be read. Raises ValueError for another."""
    if not isinstance(config, dict) or not isinstance(config.get("pattern_dict"), dict):
        raise ValueError("config.json has no dfloat11_config with a pattern_dict; give a folder that DFloat11 wrote")
    version = str(config.get("version"))
    if version.rpartition(".")[0] not in READABLE:
        raise ValueError(f"DFloat11 format {version} is not supported, only {READABLE[0]} to {VERSION}; compress again")
    if list(config.get("threads_per_block", [])) != [512] or config.get("bytes_per_thread") != 8:
        raise ValueError("only blocks of 512 threads of 8 bytes are supported; compress the model again")
    return config


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder. Raises ValueError when there is none."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{folder} has no config.json; give the folder of a model") from None
    except ValueError:
        raise ValueError(f"{file} is not JSON; copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no configuration; copy it again")
    return config


class Stored:
    """The tensors of all safetensors files of a folder, read when they are asked for.

    ``files``: the file of each tensor; ``nbytes``: its size.
    """

    def __init__(self, folder: str | Path):
        self.files: dict[str, str] = {}
        self.nbytes: dict[str, int] = {}
        for file in map(str, sorted(Path(folder).glob("*.safetensors"))):
            with _explained(file):
                for names in headers([file]).values():
                    for name, (dtype, shape) in names.items():
                        self.files[name], self.nbytes[name] = file, math.prod(shape) * dtype.itemsize
        if not self.files:
            raise ValueError(f"{folder} has no safetensors files; give the folder of a model")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ValueError(f"the folder has no tensor '{name}'; copy all of its files")
        with _explained(self.files[name]), safe_open(self.files[name], "pt") as handle:
            return handle.get_tensor(name)

    def unit_names(self) -> list[str]:
        return [name.removesuffix(".encoded_exponent") for name in self.files if name.endswith(".encoded_exponent")]

    def units(self) -> Iterator[tuple[str, Unit]]:
        for name in self.unit_names():
            yield name, Unit(**{part: self[f"{name}.{part}"] for part in UNIT_TENSORS})


@contextmanager
def _explained(file: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}); copy it again") from None


# --- what compression gives -----------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitReport:
    """What is known of one unit.

    ``entropy`` of its exponents and ``mean_length``, ``longest`` of their codes, in bits; ``exponents``: how many occur;
    ``tables``: lookup tables; ``bits``: stored for a weight, everything included; ``ratio``: of bytes to those of bfloat16.
    """

    name: str
    weights: int
    entropy: float
    mean_length: float
    longest: int
    exponents: int
    tables: int
    nbytes: int

    @property
    def bits(self) -> float:
        return 8 * self.nbytes / self.weights

    @property
    def ratio(self) -> float:
        return self.bits / 16

    @classmethod
    def of(cls, name: str, counts: np.ndarray, lengths: np.ndarray, tables: int, nbytes: int) -> UnitReport:
        """From ``counts`` int64 [256] and ``lengths`` uint8 [256] of the exponents."""
        used = counts > 0
        share = counts[used] / counts.sum()
        return cls(
            name,
            weights=int(counts.sum()),
            entropy=float(-(share * np.log2(share)).sum()),
            mean_length=float(share @ lengths[used]),
            longest=int(lengths[used].max()),
            exponents=int(used.sum()),
            tables=tables,
            nbytes=nbytes,
        )


@dataclass(frozen=True)
class Report:
    """What `inspect` found. ``compressed``: the folder is in the DFloat11 format; else the numbers are what it would be.

    ``nbytes``, ``bf16_bytes``: of the whole model, compressed and not. ``no_gain``: why compression would not pay, or ''.
    """

    compressed: bool
    units: list[UnitReport] = field(default_factory=list)
    nbytes: int = 0
    bf16_bytes: int = 0
    no_gain: str = ""

    @property
    def ratio(self) -> float:
        return self.nbytes / self.bf16_bytes

    def __str__(self) -> str:
        if self.no_gain:
            return f"no gain: {self.no_gain}"
        width = max(len(unit.name) for unit in self.units)
        lines = [f"{'unit':<{width}}     weights  entropy  mean  longest  exponents  tables   bits  ratio"]
        lines += [
            f"{unit.name:<{width}} {unit.weights:>11,}  {unit.entropy:7.3f} {unit.mean_length:5.3f}  {unit.longest:7d}"
            f"  {unit.exponents:9d}  {unit.tables:6d}  {unit.bits:5.2f}  {unit.ratio:5.1%}"
            for unit in self.units
        ]
        state = "holds" if self.compressed else "would hold"
        return "\n".join([*lines, f"the whole model {state} {self.nbytes:,} bytes, {self.ratio:.1%} of {self.bf16_bytes:,}"])


def inspect(folder: str | Path, patterns: Mapping[str, Sequence[str]] | None = None) -> Report:
    """Entropy, code lengths, tables and size of every unit of a folder; str() of the report is a table.

    Of a folder in the DFloat11 format as it is; of any other as it would be, counted exactly but not encoded (``patterns``:
    a pattern_dict, inferred when None). For weights that are not bfloat16 the report says that there is no gain. Raises
    ValueError when the folder cannot be read.
    """
    config, stored = read_config(folder), Stored(folder)
    if "dfloat11_config" not in config:
        return _forecast(Path(folder), stored, patterns)
    check_config(config["dfloat11_config"])
    reports, held, dense = [], 0, 0
    for name, unit in stored.units():
        counts = exponent_counts([_decoded(name, unit)])
        reports.append(UnitReport.of(name, counts, unit.luts[-1].numpy(), unit.luts.shape[0] - 1, unit.nbytes))
        held, dense = held + unit.nbytes, dense + 2 * unit.weights
    if not reports:
        raise ValueError(f"{folder} holds no compressed unit; copy all of its files")
    everything = sum(stored.nbytes.values())
    return Report(True, reports, everything, everything - held + dense)


def _forecast(folder: Path, stored: Stored, patterns: Mapping[str, Sequence[str]] | None) -> Report:
    from transformers import AutoConfig, AutoModelForCausalLM

    from .units import find_units, infer_patterns

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot tell the layers of {folder}: {str(error).splitlines()[0]}") from None
    units = find_units(model, patterns or infer_patterns(model))
    reports, held, total = [], 0, 0
    for name, paths in units.items():
        tensors = [stored[".".join(filter(None, [name, path, "weight"]))].flatten() for path in paths]
        if reason := not_storable(tensors):
            return Report(False, no_gain=reason)
        counts = exponent_counts(tensors)
        try:
            code = code_of(counts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        bits = int(counts @ code.lengths[:END].astype(np.int64))
        tables, blocks = len(code.prefixes()), -(-bits // (8 * BLOCK_BYTES))
        nbytes = 256 * (tables + 1) + -(-bits // 8) + int(counts.sum()) + 4 * (blocks + 1)
        nbytes += GAP_BYTES * blocks + 8 * (len(paths) - 1)
        reports.append(UnitReport.of(name, counts, code.lengths[:END], tables, nbytes))
        held, total = held + nbytes, total + 2 * int(counts.sum())
    everything = sum(stored.nbytes.values())
    return Report(False, reports, everything - total + held, everything)


# --- whether a folder is sound --------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What `verify` went through: ``units``, ``weights``, and how many of these were ``compared`` with the original."""

    units: int
    weights: int
    compared: int

    def __str__(self) -> str:
        against = f"{self.compared:,} equal to the original bit by bit" if self.compared else "not compared with an original"
        return f"{self.units} units of {self.weights:,} weights are sound; {against}"


def verify(folder: str | Path, original: str | Path | None = None) -> Verification:
    """Decodes every unit and checks all that a decoder relies on: shapes, positions, gaps, the end of the stream.

    ``original``: the folder of the bfloat16 model, with which all weights are then compared as integers (so that -0 is not
    0, and whatever was stored is equal to itself). Raises `Damaged` (a ValueError) that names the first unit that is wrong.
    """
    config, stored = check_config(read_config(folder).get("dfloat11_config")), Stored(folder)
    source = None if original is None else Stored(original)
    units = weights = compared = 0
    for name, unit in stored.units():
        decoded = _decoded(name, unit)
        _check_index(name, unit, decoded)
        units, weights = units + 1, weights + unit.weights
        if source is not None:
            parts = decoded.split(unit.sizes())
            for path, part in zip(_paths_of(name, config["pattern_dict"], len(parts)), parts, strict=True):
                full = ".".join(filter(None, [name, path, "weight"]))
                wanted = source[full].flatten()
                if wanted.dtype != torch.bfloat16 or not torch.equal(wanted.view(torch.int16), part.view(torch.int16)):
                    raise Damaged(f"{full} is not that of the original; compress the model again")
                compared += part.numel()
    if not units:
        raise ValueError(f"{folder} holds no compressed unit; copy all of its files")
    return Verification(units, weights, compared)


def _decoded(name: str, unit: Unit) -> torch.Tensor:
    try:
        return decode(unit)
    except Damaged as error:
        raise Damaged(f"{name}: {error}") from None


def _check_index(name: str, unit: Unit, decoded: torch.Tensor) -> None:
    """Raises `Damaged` unless gaps and positions are those of the stream; the decoder for CPUs uses few of the gaps."""
    exponents = split(decoded)[0]
    lengths = np.append(unit.luts[-1].numpy(), 0).astype(np.uint8)
    stream = Stream(Code(lengths, np.zeros(END + 1, np.int64)), int(lengths[exponents].sum(dtype=np.int64)))
    stream.write(exponents)
    _, gaps, positions = stream.finish()
    if not np.array_equal(gaps, unit.gaps.numpy()) or not np.array_equal(positions, unit.positions()):
        raise Damaged(f"{name}: gaps or output_positions are not those of the stream; compress the model again")


def _paths_of(name: str, patterns: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """The paths of a unit's ``count`` layers."""
    paths = next((list(paths) for pattern, paths in patterns.items() if re.fullmatch(pattern, name)), [])
    if count != len(paths or [""]):
        raise ValueError(f"dfloat11_config does not tell the {count} layers of {name}; copy config.json again")
    return paths or [""]


# --- writing --------------------------------------------------------------------------------------------


def write_unit(model: nn.Module, name: str, folder: str | Path) -> None:
    """Writes all that a unit's module holds into a file of its own, as the official package does."""
    tensors = {f"{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
    _write(tensors, Path(folder), name.replace(".", "_") + ".safetensors")


def write_rest(model: nn.Module, config: dict[str, Any], folder: str | Path, units: Collection[str]) -> None:
    """Writes model.safetensors with all that is in none of the ``units`` (names of modules), and config.json.

    A tensor that has several names is written under the first.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(unit + ".") for unit in units) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    _write(tensors, Path(folder), "model.safetensors")
    configs: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    for saved in configs:
        if hasattr(saved, "save_pretrained"):
            saved.save_pretrained(folder)
    if not hasattr(configs[0], "save_pretrained"):
        (Path(folder) / "config.json").write_text(json.dumps({"dfloat11_config": config}, indent=2), encoding="utf-8")


def _write(tensors: dict[str, torch.Tensor], folder: Path, file: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{file}.part", {"format": "pt"})
        (folder / f"{file}.part").replace(folder / file)  # whole or not there
    except (SafetensorError, OSError) as error:
        (folder / f"{file}.part").unlink(missing_ok=True)
        raise ValueError(f"cannot write {folder / file}: {str(error).splitlines()[0]}; free space and write again") from None
