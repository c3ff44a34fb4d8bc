"""What every KV-cache method stands on.

A method is a frozen dataclass of hyperparameters; ``method.cache(model)`` is a transformers `Cache` for
``model.generate`` or plain forward calls. A method brings one `CacheLayer` subclass with three verbs:

- ``prefill(prompt)``: the whole prompt, once, however many chunks it came in. Prompt attention has been exact by then.
- ``append(new)``: tokens that follow.
- ``slots()``: what is stored now, ready for attention.

The rule that makes multi-token follow-ups right: new tokens attend to the slots stored *before* the pass and causally
to each other, exactly; only then are they stored. Slots carry their own validity, so no mask column is ever mistaken for a
position. ``nbytes`` is taken from the storages a layer keeps alive, never from a formula.

Tensors are never changed in place, and all have the batch first. That makes ``fork`` (a cheap snapshot that shares memory),
beam search and batch selection generic.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from broadsheet.core.models.rotary import find_rotary
from broadsheet.core.models.taps import Tokens, attach, attention_modules
from broadsheet.core.numerics.ledger import nbytes, tree_map
from broadsheet.core.perf.storage import FULL, CacheFormat

from .attention import Slots, as_slots, attend_slots


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that decide what its cache costs."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int

    @classmethod
    def of(cls, config: Any) -> Geometry:
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
        )

    def full_bytes(self, tokens: int) -> int:
        """Bytes of an uncompressed cache of ``tokens`` tokens in 16 bits, one batch row."""
        return int(FULL.nbytes(tokens, self.layers, self.kv_heads, self.head_dim))


class CacheLayer(CacheLayerMixin):
    """One layer's store. Subclasses implement `prefill`, `append` and `slots`."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    #: attributes that are references or bookkeeping, not state
    _outside: ClassVar[frozenset[str]] = frozenset({"method", "module", "rotary", "cache", "keys", "values"})

    # Any: a layer reads the fields of its own method, and attributes of attention that nn.Module does not declare.
    method: Any
    module: Any
    cache: Any  # the `MethodCache` it is part of

    def __init__(self, method: CacheMethod, index: int, module: nn.Module, rotary: nn.Module | None):
        self.method = method
        self.index = index
        self.module = module
        self.rotary = rotary
        self.cache = None
        self.seen = 0
        self.dtype: torch.dtype | None = None
        self.filling = True
        self.pending: list[Tokens] = []
        self.tapped = False
        self.is_initialized = True

    # --- what a method implements -------------------------------------------------------------------------------

    @abstractmethod
    def prefill(self, prompt: Tokens) -> None:
        """Stores the whole prompt."""

    @abstractmethod
    def append(self, new: Tokens) -> None:
        """Stores tokens that follow the prompt."""

    @abstractmethod
    def slots(self) -> Slots | None:
        """What is stored now, decompressed to the model's dtype; None when nothing is."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """Slots that a query attends to (of the longest row and head)."""

    def attend(self, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        """Attention of the new queries over the stored slots and, causally, each other. [batch, tokens, heads, head_dim]."""
        return attend_slots(self.module, self.slots(), new, mask, scaling)

    # --- the life of a layer ------------------------------------------------------------------------------------

    def receive(self, module: nn.Module, new: Tokens, mask: torch.Tensor | None, scaling: float | None) -> torch.Tensor:
        self.tapped = False
        if self.filling and self.pending and new.count == 1:
            self.end_prefill()
        if self.filling:
            past = as_slots(Tokens.join(self.pending)) if self.pending else None
            output = attend_slots(module, past, new, mask, scaling)
            self.pending.append(new)
            self.seen += new.count
            if not self.cache.chunked:
                self.end_prefill()
            return output
        output = self.attend(new, mask, scaling)
        self.seen += new.count
        self.append(self._stored_dtype(new))
        return output

    def end_prefill(self) -> None:
        """Compresses what the chunks brought; a no-op once done."""
        if self.filling and self.pending:
            prompt = self._stored_dtype(Tokens.join(self.pending))
            self.pending, self.filling = [], False
            self.prefill(prompt)

    def _stored_dtype(self, new: Tokens) -> Tokens:
        self.dtype = new.keys.dtype
        dtype = self.cache.dtype or new.keys.dtype
        return replace(new, keys=new.keys.to(dtype), values=new.values.to(dtype))

    # --- transformers' contract ---------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes the new states through: the tapped attention call that follows stores them."""
        if not self.tapped:
            raise RuntimeError(
                f"this cache serves the model it was made for; call {type(self.method).__name__}(...).cache(model) again "
                "after changing the model's attention implementation"
            )
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens seen, not slots stored: positions go on truly."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = sum(part.count for part in self.pending) if self.filling else self.stored
        return stored + query_length, self.seen - stored

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        fresh = type(self)(self.method, self.index, self.module, self.rotary)
        fresh.cache = self.cache
        self.__dict__ = fresh.__dict__

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a compressed cache cannot be cropped; use fork() before the tokens to be undone")

    # --- generic bookkeeping ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything this layer holds, by name."""
        return {name: value for name, value in self.__dict__.items() if name not in self._outside}

    def parts(self) -> dict[str, int]:
        """Bytes really held, by part."""
        sizes = {name: nbytes(value) for name, value in self.state().items()}
        return {name: size for name, size in sizes.items() if size}

    def map(self, function: Any) -> None:
        """Applies ``function`` to every tensor held."""
        for name, value in self.state().items():
            self.__dict__[name] = tree_map(function, value)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.map(lambda tensor: tensor[indices])


class MethodCache(Cache):
    """A transformers `Cache` of one method's layers, for one model.

    ``chunked``: the prompt comes in several multi-token passes; compression waits for the first single token or for
    `end_prefill`. ``dtype``: what exact parts are stored in (default: the model's own).
    """

    layers: list[Any]  # of `CacheLayer`; transformers' own annotation does not know their methods

    def __init__(self, method: CacheMethod, layers: list[CacheLayer], chunked: bool, dtype: torch.dtype | None):
        super().__init__(layers=layers)  # type: ignore[arg-type]  # a list of subclasses
        self.method = method
        self.chunked = chunked
        self.dtype = dtype
        for layer in layers:
            layer.cache = self

    def end_prefill(self) -> None:
        """Declares the prompt complete: every layer compresses now."""
        for layer in self.layers:
            layer.end_prefill()

    def fork(self) -> MethodCache:
        """A snapshot that shares memory; what is done to either leaves the other alone."""
        twin = copy(self)
        twin.layers = []
        for layer in self.layers:
            other = copy(layer)
            other.map(lambda tensor: tensor)
            other.cache = twin
            twin.layers.append(other)
        return twin

    @property
    def seen(self) -> int:
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes really held, over all layers and rows."""
        return nbytes([layer.state() for layer in self.layers])

    def report(self) -> dict[str, Any]:
        """Tokens seen, slots stored by layer, bytes by part."""
        parts: dict[str, int] = {}
        for layer in self.layers:
            for name, size in layer.parts().items():
                parts[name] = parts.get(name, 0) + size
        return {
            "method": type(self.method).__name__,
            "seen": self.seen,
            "stored": [layer.stored for layer in self.layers],
            "nbytes": self.nbytes,
            "parts": parts,
        }


@dataclass(frozen=True)
class CacheMethod:
    """Base of all cache methods: hyperparameters as fields, `cache` as the verb."""

    Layer: ClassVar[type[CacheLayer]]
    #: a method without budgets stands in a comparison once, as it is
    budgeted: ClassVar[bool] = True

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        """One layer per attention module; a method overrides it to treat layers differently."""
        rotary = find_rotary(model)
        return [self.Layer(self, index, module, rotary) for index, module in enumerate(attention_modules(model))]

    def cache(self, model: PreTrainedModel, chunked: bool = False, dtype: torch.dtype | None = None) -> MethodCache:
        """A fresh cache for ``model``; pass it as ``cache`` (``past_key_values`` before transformers 5.24).

        Raises ValueError when the model's attention is not covered or the method's parameters do not fit the model.
        """
        attach(model)
        self.check(Geometry.of(model.config))
        return MethodCache(self, self.layers(model), chunked, dtype)

    def check(self, geometry: Geometry) -> None:
        """Raises ValueError when these parameters do not fit a model of this geometry."""

    def format(self, geometry: Geometry) -> CacheFormat:
        """How a cache of this method stores a prompt. Methods whose layers are not alike (XQuant), or whose slots the prompt
        decides (KVMerger), have none."""
        raise NotImplementedError

    def expected_bytes(self, tokens: int, geometry: Geometry) -> int:
        """Bytes of one row after a prompt of ``tokens``, exact parts in 16 bits: what ``nbytes`` will say."""
        return int(self.format(geometry).nbytes(tokens, geometry.layers, geometry.kv_heads, geometry.head_dim))

    def most_slots(self, fraction: float, tokens: int, geometry: Geometry) -> int:
        """The most slots a layer within ``fraction`` of a 16-bit cache; 0 where one is too many."""
        room = fraction * geometry.full_bytes(tokens)
        return self.format(geometry).most_slots(room, tokens, geometry.layers, geometry.kv_heads, geometry.head_dim)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """This method with the parameters that come closest to, and not above, ``fraction`` of a 16-bit cache's bytes.

        ``tokens``: length of the prompt. Raises `Unreachable` with the least fraction that it can do.
        """
        raise NotImplementedError

    @property
    def parameters(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Unreachable(ValueError):
    """A method cannot get down to the asked budget."""

    def __init__(self, least: float):
        super().__init__(f"the least this method can do here is {least:.3f} of the full cache")
        self.least = least


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
