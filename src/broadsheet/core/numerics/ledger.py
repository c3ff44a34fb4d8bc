"""The byte ledger: what an object really holds.

Counted are storages, not views: a slice of four slots that keeps a prompt's whole key tensor alive is charged in full. The
walk goes through lists, tuples, dicts and dataclasses; modules are weights, not state, and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable from ``value``."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def nbytes(value: Any) -> int:
    """Bytes of the distinct storages that ``value`` keeps alive."""
    storages = {}
    for tensor in tensors(value):
        storage = tensor.untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def tree_map(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A copy of ``value`` with ``function`` applied to every tensor; containers are new, other values shared."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: tree_map(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [tree_map(function, item) for item in value]
    if isinstance(value, tuple):
        return tuple(tree_map(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        twin = copy(value)
        for field in fields(value):
            object.__setattr__(twin, field.name, tree_map(function, getattr(value, field.name)))
        return twin
    return value
