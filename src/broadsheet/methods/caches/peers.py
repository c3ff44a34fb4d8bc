"""transformers' `QuantizedCache` as a method of this family: the library's own class, run as it is.

What differs from a method made here: keys and values alike are grouped along the channels of a token (its other
layouts do not fit every number of tokens); whenever ``residual`` exact tokens have gathered, *everything* is
dequantised and quantised anew; it knows no padding mask, so in a padded batch padding is quantised along.

What works with transformers 5.23 and torch 2.13 on a CPU (tried with the versions named):

- ``fp8`` (no further package): 8 bits with one scale for all keys of a layer, set by the first pass.
- ``quanto`` (optimum-quanto 0.2.7): 2 and 4 bits. A group must divide the entries of an index of ``axis`` -1 or 0;
  the library compiles a C++ extension (``ninja``, a compiler) at the first use, which takes minutes.
- ``hqq`` (hqq 0.2.8.post1): 1, 2, 4 and 8 bits. Its 3 bits are left out: with groups that do not fill its
  ten-to-an-int32 packing, dequantising raises a RuntimeError.

kvpress 0.5.5 cannot be run beside these: it requires transformers<5.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from transformers import PreTrainedModel, QuantizedCache

from broadsheet.core.perf.storage import CacheFormat, cache_format, token_cache

from .base import CacheMethod, Geometry
from .blocks import GROUP_SIZES, best_within, quantisation_error

Backend = Literal["fp8", "quanto", "hqq"]
BITS: dict[str, tuple[int, ...]] = {"fp8": (8,), "quanto": (2, 4), "hqq": (1, 2, 4, 8)}
#: makes groups of neighbouring channels of a token, the only layout that fits every number of tokens
AXIS = {"quanto": 0, "hqq": 1}


class PeerCache(QuantizedCache):
    """`QuantizedCache` with the verbs that the bench needs; what it stores and computes is the library's.

    ``dtype``: what states are given to it in, and so what its exact tokens and scales are stored in (default: the
    model's own); what it returns is cast back.
    """

    def __init__(self, method: TransformersQuantized, model: PreTrainedModel, dtype: torch.dtype | None):
        super().__init__(config=model.config, **method.options)
        self.method, self.dtype = method, dtype

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = key_states.dtype
        dtype = self.dtype or own
        keys, values = super().update(key_states.to(dtype), value_states.to(dtype), layer_idx, *args, **kwargs)
        return keys.to(own), values.to(own)

    def end_prefill(self) -> None:
        """Nothing to do: the first pass was quantised as it came."""

    def fork(self) -> PeerCache:
        """A snapshot that shares memory: the layers replace their tensors, they do not change them."""
        twin = copy(self)
        twin.layers = [copy(layer) for layer in self.layers]
        return twin

    @property
    def seen(self) -> int:
        return self.get_seq_length()

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages that the layers keep alive, exact tokens included."""
        return _bytes([vars(layer) for layer in self.layers])

    def report(self) -> dict[str, Any]:
        """Tokens seen, slots stored by layer, bytes by part."""
        layers: list[Any] = self.layers
        exact = _bytes([(layer.keys, layer.values) for layer in layers])
        return {
            "method": type(self.method).__name__,
            "seen": self.seen,
            "stored": [layer.get_seq_length() for layer in layers],
            "nbytes": self.nbytes,
            "parts": {name: size for name, size in (("codes", self.nbytes - exact), ("buffer", exact)) if size},
        }


def _plain(value: Any) -> Iterator[torch.Tensor]:
    """Every ordinary tensor within ``value``, those inside the libraries' tensor subclasses too."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _plain(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _plain(item)


def _bytes(value: Any) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _plain(value)}
    return sum(storages.values())


@dataclass(frozen=True)
class TransformersQuantized(CacheMethod):
    """transformers' `QuantizedCache`.

    Parameters: ``backend`` "fp8", "quanto" or "hqq"; ``bits`` (fp8: 8; quanto: 2, 4; hqq: 1, 2, 4, 8);
    ``group_size`` channels share a scale; ``residual``: exact tokens that gather before everything is quantised
    anew. fp8 has neither of the last two.

    Raises ValueError for a backend or bits that are not covered, and ImportError, naming the package, when the
    backend's is not installed.
    """

    backend: Backend = "quanto"
    bits: int = 4
    group_size: int = 64
    residual: int = 128

    def __post_init__(self) -> None:
        if self.backend not in BITS:
            raise ValueError(f"backend must be one of {', '.join(BITS)}, got {self.backend!r}")
        if self.bits not in BITS[self.backend]:
            allowed = ", ".join(map(str, BITS[self.backend]))
            raise ValueError(f"bits must be {allowed} with {self.backend}, got {self.bits}")
        if self.group_size < 1 or self.residual < 1:
            raise ValueError("group_size and residual must be at least 1")

    @property
    def options(self) -> dict[str, Any]:
        """What `QuantizedCache` is made with."""
        if self.backend == "fp8":
            return {"backend": "fp8"}
        axis = AXIS[self.backend]
        return {
            "backend": self.backend,
            "nbits": self.bits,
            "axis_key": axis,
            "axis_value": axis,
            "q_group_size": self.group_size,
            "residual_length": self.residual,
        }

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> Any:
        """A fresh `PeerCache`. ``chunked`` makes no difference: every pass is quantised as it comes."""
        self.check(Geometry.of(model.config))
        return PeerCache(self, model, dtype)

    def check(self, geometry: Geometry) -> None:
        if self.backend != "fp8" and geometry.head_dim % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide head_dim {geometry.head_dim}; choose a divisor")

    def format(self, geometry: Geometry) -> CacheFormat:
        if self.backend == "fp8":  # a float32 scale a layer for keys, one for values
            return replace(cache_format(8), layer=8)
        return token_cache(self.bits, self.group_size)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """Bits and group size of the least error on normal data within the budget."""
        groups = [size for size in GROUP_SIZES if geometry.head_dim % size == 0]
        choices = []
        for group in [self.group_size] if self.backend == "fp8" else groups:
            for bits in BITS[self.backend]:
                one = replace(self, bits=bits, group_size=group)
                choices.append((one, one.expected_bytes(tokens, geometry), quantisation_error(bits, group)))
        return best_within(choices, fraction, tokens, geometry)
