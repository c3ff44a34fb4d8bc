"""Loading folders in the official format: through transformers' from_pretrained, or into a model that exists.

``import broadsheet`` registers the quantiser "dfloat11". Folders that Broadsheet writes name it in their config.json beside
``dfloat11_config``; those of the official package have ``dfloat11_config`` alone, which is taken for the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..quantiser import headers
from .files import Stored, check_config, read_config
from .runtime import UNIT_TENSORS, Workspace, attach, compressed, layer_shape, offload

METHOD = "dfloat11"


class DFloat11Config(QuantizationConfigMixin):
    """Says in config.json that ``dfloat11_config`` stands there too."""

    def __init__(self, **kwargs: Any):
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of transformers' own methods


class DFloat11Quantizer(HfQuantizer):
    """Makes units of a model's modules before transformers loads their tensors."""

    #: the model is offloaded, so that its state has no units
    offloaded = False

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        files = checkpoint_files if checkpoint_files is not None else []
        # The official package may have given every unit a file of its own, of which transformers does not know.
        folders = dict.fromkeys(str(Path(file).parent) for file in files)
        for file in (str(file) for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))):
            if file not in files and any(f"{module}.luts" in names for module, names in headers([file]).items()):
                files.append(file)
        stored = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for names in headers(files).values()
            for name, (dtype, shape) in names.items()
        }
        # Some models are built with other names than they are stored with.
        renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
        _attach(
            model, getattr(model.config, "dfloat11_config", None), stored, {n: apply_renamings(n, renamings) for n in stored}
        )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_units(model)
        return model

    def is_serializable(self) -> bool:
        return not self.offloaded

    @property
    def is_trainable(self) -> bool:
        return False


def _attach(model: nn.Module, config: Any, stored: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Makes units of the modules that are units in the files.

    ``names``: what the ``stored`` tensors are called in the model. Raises ValueError when the files do not
    fit the model or hold only a part of what the config says.
    """
    patterns = check_config(config)["pattern_dict"]
    units = {name.removesuffix(".luts") for name in stored if name.endswith(".luts")}
    if not units:
        raise ValueError("the files hold no compressed unit; copy all files of the folder")
    workspace, present = Workspace.of(model), set(names.values())
    for unit in sorted(units):
        name = names[f"{unit}.luts"].removesuffix(".luts")
        tensors = {part: stored[f"{unit}.{part}"] for part in UNIT_TENSORS if f"{unit}.{part}" in stored}
        try:
            module = model.get_submodule(name)
            paths = next(
                (list(paths) for key in (unit, name) for pattern, paths in patterns.items() if re.fullmatch(pattern, key)),
                [],
            )
            attach(module, tensors, [""] if isinstance(module, nn.Linear | nn.Embedding) else paths, workspace)
        except AttributeError as error:
            raise ValueError(f"{name}: {error}; the files belong to another model") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    _check_complete(model, patterns, present)
    _untie(model)


def _check_complete(model: nn.Module, patterns: dict[str, list[str]], present: set[str]) -> None:
    """Raises ValueError for a layer that should be in a unit and of which the files have nothing.

    Units that were left as they are do no harm, as in the official package.
    """
    for name, module in model.named_modules():
        if any(re.fullmatch(pattern, name) for pattern in patterns) and f"{name}.luts" not in present:
            wanted = {f"{name}.{key}" for key, _ in module.named_parameters()} - set(
                getattr(model, "all_tied_weights_keys", {})
            )
            if missing := sorted(wanted - present):
                raise ValueError(f"the files hold nothing for {missing[0]}; copy all files of the folder")


def _untie(model: nn.Module) -> None:
    """Forgets ties of weights that are compressed, each by itself; transformers would fill or tie them again."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    layers = {
        f"{name}.{path}".rstrip("."): layer
        for name, module, unit in compressed(model)
        for path, layer in zip(unit.paths, unit.layers(module))
    }
    for layer in layers.values():
        if not any(True for _ in layer.parameters()):
            layer._is_hf_initialized = True  # type: ignore[assignment]  # transformers would fill its weight with noise
    for pair in list(ties.items()):
        both = [weight.removesuffix(".weight") in layers for weight in pair]
        if all(both):
            del ties[pair[0]]
        elif any(both):
            raise ValueError(
                f"{pair[0]} is tied to {pair[1]}, and one of them is compressed alone; compress the model again"
            )


def check_units(model: nn.Module) -> None:
    """Raises ValueError when a unit's tensors do not fit each other or its layers; does not read the streams."""
    for name, module, decompressor in compressed(model):
        unit = decompressor.unit(module)
        shapes = [layer_shape(layer) for layer in decompressor.layers(module)]
        try:
            unit.check()
            unit.positions()
            if unit.sizes() != [rows * columns for rows, columns in shapes]:
                raise ValueError("split_positions are not those of its layers; the files belong to another model")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


class DFloat11Model:
    """The entry of the official package, for CPUs too."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        cpu_offload: bool = False,
        bfloat16_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """The model of a folder in the official format, on ``device``.

        ``cpu_offload``: keeps what takes most of the units in host memory and copies it for each use. ``bfloat16_model``: a
        model of any kind, in bfloat16, that gets the weights of the folder; without it a causal language model is made from
        config.json, with ``kwargs`` for transformers. Raises ValueError.
        """
        folder = Path(path)
        config = read_config(folder)
        check_config(config.get("dfloat11_config"))
        if bfloat16_model is None:
            model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kwargs)
        else:
            model = _fill(bfloat16_model, Stored(folder), config["dfloat11_config"])
        if not cpu_offload:
            return model.to(device)
        if isinstance(quantizer := getattr(model, "hf_quantizer", None), DFloat11Quantizer):
            quantizer.offloaded = True
        return offload(model, device)


def _fill(model: nn.Module, stored: Stored, config: Any) -> nn.Module:
    """Gives ``model`` the tensors of a folder."""
    tensors = {name: stored[name] for name in stored.files}
    _attach(model, config, tensors, {name: name for name in tensors})
    check_units(model)
    units = {f"{name}.{part}" for name, _, _ in compressed(model) for part in UNIT_TENSORS}
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in tensors.keys() - units:
            value = tensors[name]
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"the model has no {name} of shape {list(value.shape)}; give the model that was compressed")
            own[name].copy_(value)
    return model
