"""Saving and loading compressed models through transformers.

`seal` gives a compressed model a ``quantization_config`` that says, for every `Packed` module, its class and plain fields.
When ``from_pretrained`` meets such a config, `PackedQuantizer` reads the shapes of the packed tensors from the headers of
the safetensors files, builds the same modules, and transformers fills them in. ``import broadsheet`` registers it.

The config names classes of this package only; anything else is refused, so a hostile config.json can run nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from broadsheet import resolve
from broadsheet.core.numerics.packed import Packed, PackedLinear

from .base import WeightMethod

METHOD = "broadsheet"
VERSION = 1
PACKAGE = "broadsheet.methods.weights."

Base = TypeVar("Base")


class PackedConfig(QuantizationConfigMixin):
    """What config.json says of a compressed model.

    ``method`` and ``parameters``: how it was made. ``modules``: a list of {"kind": "module:Class", "plain": fields, "names":
    full names of the modules that are so}.
    """

    def __init__(
        self,
        method: str = "",
        parameters: dict[str, Any] | None = None,
        modules: list[dict[str, Any]] | None = None,
        version: int = VERSION,
        **kwargs: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.method = method
        self.parameters = parameters or {}
        self.modules = modules or []
        self.version = version
        if version > VERSION:
            raise ValueError(f"this folder was written by a newer broadsheet (format {version}); update to read it")
        for entry in self.modules:
            if not isinstance(entry, dict) or entry.keys() != {"kind", "plain", "names"}:
                raise ValueError("config.json lists a module without kind, plain fields and names; save the model again")


class PackedQuantizer(HfQuantizer):
    """Builds the packed modules before transformers loads their tensors."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        stored = headers(checkpoint_files or [])
        self.folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path()
        for entry in self.quantization_config.modules:
            kind = packed_class(entry["kind"])
            for name in entry["names"]:
                tensors = {
                    key.removeprefix(name + "."): torch.empty(shape, dtype=dtype, device="meta")
                    for key, (dtype, shape) in stored.get(name, {}).items()
                }
                if not tensors and not kind.stored_apart:
                    raise ValueError(f"the weights hold nothing for {name}; the folder is incomplete, save it again")
                try:
                    module = kind(tensors, **entry["plain"])
                    _check(module, model.get_submodule(name))
                    model.set_submodule(name, module)
                except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
                    raise ValueError(f"this folder does not fit together at {name}: {error}") from None
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if _stored_apart(model):
            method_class(self.quantization_config.method).load_beside(model, self.folder)
            for module in model.modules():
                if isinstance(module, Packed):
                    module.check()
            _save_what_is_apart(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check(module: Packed, original: nn.Module) -> None:
    """Raises ValueError unless what a file says of a module fits its tensors and the layer whose place it takes."""
    if isinstance(module, PackedLinear):
        shape = (module.out_features, module.in_features)
        if not isinstance(original, nn.Linear) or shape != (original.out_features, original.in_features):
            raise ValueError(f"a linear layer of {shape[0]} x {shape[1]} for {original}")
    if not module.stored_apart:  # those are checked when all is there
        module.check()


def packed_class(kind: str) -> type[Packed]:
    """The class that a config names; raises ValueError unless it is a packed module of this package."""
    return _class(kind, Packed, "packed module")


def method_class(slug: str) -> type[WeightMethod]:
    """The method that a config names; raises ValueError unless it is one of this package."""
    return _class(slug, WeightMethod, "method")


def _class(name: str, base: type[Base], what: str) -> type[Base]:
    found = None
    if name.startswith(PACKAGE):
        with contextlib.suppress(ImportError, AttributeError):
            found = resolve(name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"config.json names '{name}', which is no {what} of this broadsheet; is it newer?")
    return found


def _stored_apart(model: PreTrainedModel) -> bool:
    return any(isinstance(module, Packed) and module.stored_apart for module in model.modules())


def _save_what_is_apart(model: PreTrainedModel) -> None:
    """Makes ``model.save_pretrained`` write the method's own files too; transformers has no hook that knows the folder."""
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    if kwargs.get("push_to_hub"):
        raise ValueError("save to a folder and upload that: the files beside the weights are written after the others")
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    method_class(model.config.quantization_config.method).save_beside(model, Path(save_directory))


def headers(files: list[str]) -> dict[str, dict[str, tuple[torch.dtype, list[int]]]]:
    """Dtype and shape of every tensor in safetensors files: module name -> full tensor name -> (dtype, shape)."""
    found: dict[str, dict[str, tuple[torch.dtype, list[int]]]] = {}
    for file in files:
        for name, (dtype, shape) in _header(file).items():
            found.setdefault(name.rpartition(".")[0], {})[name] = (dtype, shape)
    return found


def _header(file: str) -> dict[str, tuple[torch.dtype, list[int]]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
        return {name: (_DTYPES[part.get_dtype()], part.get_shape()) for name, part in parts.items()}


_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def seal(model: PreTrainedModel, method: WeightMethod) -> PreTrainedModel:
    """Gives the model the config with which it can be saved and loaded."""
    entries: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            module.check()
            kind = f"{type(module).__module__}:{type(module).__qualname__}"
            key = json.dumps([kind, module.plain], sort_keys=True)
            entries.setdefault(key, {"kind": kind, "plain": module.plain, "names": []})["names"].append(name)
    config = PackedConfig(type(method).slug(), method.parameters, list(entries.values()))
    model.config.quantization_config = config
    quantizer = PackedQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]  # transformers sets it so itself
    model.is_quantized = True  # type: ignore[assignment]
    if _stored_apart(model):
        _save_what_is_apart(model)
    return model


def check_target(target: Path) -> None:
    """Raises ValueError unless a model may be written to this folder: a new one, an empty one, or one with a model in it."""
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(f"{target} holds files that are no model and would be lost; name a new folder")


def save(model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Writes a compressed model to a folder that is whole at every moment, see `replaced`."""
    with replaced(folder) as fresh:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return Path(folder)


@contextlib.contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """A new folder to write a model to, which takes the place of ``folder`` at the end: that is the old one or the new one.

    Raises ValueError when the disk refuses, and for a folder that holds something else.
    """
    target = Path(folder)
    check_target(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(f"cannot write beside {target}: {error.strerror}") from None
    old = fresh.with_name(fresh.name + ".old")
    try:
        yield fresh
        for file in fresh.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        fresh.chmod(0o755)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise ValueError(f"cannot save to {target}: {reason}; free space and save again") from None
        raise
    shutil.rmtree(old, ignore_errors=True)
