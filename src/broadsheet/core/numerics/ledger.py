"""The byte ledger: what an object really holds.

Counted are storages, not views: a slice of four slots that keeps a prompt's whole key tensor alive is charged in full. The
walk goes through lists, tuples, dicts and dataclasses; modules are weights, not state, and are left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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


class PeakBytes(TorchDispatchMode):
    """Counts the bytes that are alive at once among tensors made inside it: ``with PeakBytes() as meter: ...; meter.peak``.

    What lived before is not counted, nor what a kernel allocates for itself and frees before it returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors([list(args), kwargs or {}])}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors(result if isinstance(result, list | tuple) else [result]):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address and address not in given and address not in self._known:
                self._known.add(address)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        return result

    def _freed(self, address: int, size: int) -> None:
        if address in self._known:
            self._known.remove(address)
            self.alive -= size
