"""Which layers of a model form units: the official ``pattern_dict``.

``{pattern: paths}``: every module whose full name the regular expression ``pattern`` matches as a whole is a unit. Of a
linear layer or an embedding it is the module's own weight, and ``paths`` is empty; of any other module the weights of the
layers at these paths, in this order, form one stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from broadsheet.core.models.walker import decoder_blocks

from .runtime import layer_shape

Patterns = Mapping[str, Sequence[str]]


def infer_patterns(model: PreTrainedModel, embeddings: bool = True, per_block: bool = True) -> dict[str, list[str]]:
    """The pattern_dict for a decoder such as Llama, Qwen, Mistral or Gemma.

    Its decoder blocks, and (``embeddings``) its embedding and output layer unless these share one weight: a shared weight
    would be needed at both ends of the model and stays as it is. ``per_block=False``: every linear layer is a unit of its
    own.
    """
    patterns: dict[str, list[str]] = {}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if embeddings and not _ties(model) else [None, None]
    names = {id(module): name for name, module in model.named_modules()}
    if ends[0] is not None:
        patterns[re.escape(names[id(ends[0])])] = []
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, block in decoder_blocks(model).items():
        paths = tuple(path for path, module in block.named_modules() if isinstance(module, nn.Linear))
        groups.setdefault(paths, []).append(name)
    for paths, blocks in groups.items():
        stem = re.escape(blocks[0].rpartition(".")[0])
        numbers = r"\d+" if len(groups) == 1 else f"({'|'.join(name.rpartition('.')[2] for name in blocks)})"
        if per_block:
            patterns[rf"{stem}\.{numbers}"] = list(paths)
        else:
            patterns |= {rf"{stem}\.{numbers}\.{re.escape(path)}": [] for path in paths}
    if ends[1] is not None:
        patterns[re.escape(names[id(ends[1])])] = []
    return patterns


def _ties(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "all_tied_weights_keys", None)) or getattr(model.config, "tie_word_embeddings", False)


def find_units(model: nn.Module, patterns: Patterns) -> dict[str, list[str]]:
    """The units of ``model``: full name of the module -> paths of its layers from there ('' is the module itself).

    In the official order: pattern after pattern, modules as they stand. Raises ValueError for what cannot be a unit.
    """
    if not isinstance(patterns, Mapping) or not patterns:
        raise ValueError("pattern_dict must map regular expressions of module names to lists of layers")
    units: dict[str, list[str]] = {}
    owner: dict[int, str] = {}
    holders = _holders(model)
    for pattern, paths in patterns.items():
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern_dict: '{pattern}' is no regular expression ({error})") from None
        matched = [(name, module) for name, module in model.named_modules() if expression.fullmatch(name)]
        if not matched:
            raise ValueError(f"pattern_dict: '{pattern}' matches no module of {type(model).__name__}; name its modules")
        for name, module in matched:
            units[name] = _paths(name, module, paths)
            for path in units[name]:
                layer, full = module.get_submodule(path), f"{name}.{path}".rstrip(".")
                layer_shape(layer)
                if not isinstance(getattr(layer, "weight", None), torch.Tensor):
                    raise ValueError(f"{full} has no weight; is this model compressed already?")
                if id(layer) in owner:
                    raise ValueError(
                        f"pattern_dict: {full} is in the units {owner[id(layer)]} and {name}; leave it out of one"
                    )
                owner[id(layer)] = name
                if others := holders[id(layer.weight)] - {full}:
                    raise ValueError(
                        f"{full} shares its weight with {', '.join(sorted(others))}; leave it out of pattern_dict"
                    )
    return units


def _paths(name: str, module: nn.Module, paths: Sequence[str]) -> list[str]:
    if isinstance(module, nn.Linear | nn.Embedding):
        return [""]
    if isinstance(paths, str) or not paths:
        raise ValueError(f"pattern_dict: {name} is a {type(module).__name__}; list the layers in it")
    for path in paths:
        try:
            module.get_submodule(path)
        except AttributeError:
            raise ValueError(f"pattern_dict: {name} has no '{path}'; list layers that are in it") from None
    return list(paths)


def _holders(model: nn.Module) -> dict[int, set[str]]:
    """The modules that hold each weight."""
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(name)
    return holders
