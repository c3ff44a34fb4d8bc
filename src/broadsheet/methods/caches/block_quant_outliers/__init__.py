"""K-sort BFP: keys in block floating point, channels sorted (Trukhanov, Soloveychik, arXiv 2403.20137).

Block floating point (BFP) gives n mantissas one exponent, so one outlier channel ruins its n - 1 neighbours.
Outliers of keys live in fixed channels of each head, and q.k does not care about the order of channels: sort
them by the norm of their row of W_k, and large channels share blocks with large ones. Two ways to the same
numbers:

- `KSortBFP`, a cache for any model: keys are permuted after the rotation, quantised, and put back in order
  when read.
- `ksort`, at compile time: the rows of W_k and W_q themselves are permuted, and the rotation with them. The
  sorted model needs no gather; serve it with ``KSortBFP(rank="none")``.

The rotation couples two channels, so after it both have the norm of the pair: ``pair_aware`` ranks pairs (the
paper ranks rows). ``weight_gain`` weighs a row with the gain of the norm before it, its bias and the gain of
a QK-norm: still free of data. Values are outside the paper; they stay as they are or take the same format
along channels. Queries stay unquantised. Sorting acts within a head, so a block as long as the head gains
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import torch
from transformers import PreTrainedModel

from broadsheet.core.models.taps import Tokens
from broadsheet.core.numerics.bfp import BFPTensor, bfp_quantise
from broadsheet.core.perf.storage import CacheFormat, block_float_cache

from ..attention import Slots
from ..base import CacheLayer, CacheMethod, Geometry, Unreachable
from .channels import (
    RANKS,
    calibrated_norms,
    channel_orders,
    find_rotation,
    pair_norms,
    rank_agreement,
    sort_channels,
    weight_norms,
)
from .sorted_model import KSortPlan, is_sorted, ksort, load_sorted

__all__ = [
    "KSortBFP",
    "KSortPlan",
    "calibrated_norms",
    "channel_orders",
    "find_rotation",
    "ksort",
    "load_sorted",
    "rank_agreement",
    "score_error",
    "sort_channels",
    "weight_norms",
]


class KSortLayer(CacheLayer):
    """Keys permuted by head and quantised; values as they are, or quantised along channels."""

    _outside: ClassVar[frozenset[str]] = CacheLayer._outside | {"fixed", "partner"}

    method: KSortBFP
    #: the compile-time order, int64 [kv_heads, head_dim]; a constant of the model, not state
    fixed: torch.Tensor | None = None
    #: the rotary partner of each channel, for calibration
    partner: torch.Tensor | None = None
    #: the order found on the prompt (rank="calibration"), int16 [batch, kv_heads, head_dim]
    order: torch.Tensor | None = None
    stored_keys: BFPTensor | torch.Tensor | None = None
    stored_values: BFPTensor | torch.Tensor | None = None
    valid: torch.Tensor | None = None  #: bool [batch, slots], None while all are

    def reset(self) -> None:
        fixed, partner = self.fixed, self.partner
        super().reset()
        self.fixed, self.partner = fixed, partner

    @property
    def stored(self) -> int:
        held = self.stored_keys
        return 0 if held is None else (held.codes if isinstance(held, BFPTensor) else held).shape[2]

    def prefill(self, prompt: Tokens) -> None:
        if self.method.rank == "calibration":
            real = prompt.valid[:, None, :, None]
            energy = (prompt.keys.float().square() * real).sum(2) / real.sum(2).clamp(min=1)
            norms = energy.sqrt() if self.partner is None else pair_norms(energy.sqrt(), self.partner)
            self.order = sort_channels(norms).to(torch.int16)
        self.append(prompt)

    def append(self, new: Tokens) -> None:
        if self.valid is not None or not bool(new.valid.all()):
            before = new.valid.new_ones(new.valid.shape[0], self.stored) if self.valid is None else self.valid
            self.valid = torch.cat([before, new.valid], 1)
        order = self._order()
        keys = new.keys if order is None else _reorder(new.keys, order)
        self.stored_keys = _join(self.stored_keys, self._quantise(keys, self.method.key_bits))
        self.stored_values = _join(self.stored_values, self._quantise(new.values, self.method.value_bits))

    def slots(self) -> Slots | None:
        if self.stored_keys is None:
            return None
        keys, values = self._read(self.stored_keys), self._read(self.stored_values)
        order = self._order()
        if order is not None:
            keys = _reorder(keys, order.argsort(-1))
        return Slots(keys, values, None if self.valid is None else self.valid.unsqueeze(1))

    def _order(self) -> torch.Tensor | None:
        """The channel at each place, int64 [batch or 1, kv_heads, head_dim]; None: the model's own order."""
        if self.order is not None:
            return self.order.long()
        return None if self.fixed is None else self.fixed.unsqueeze(0)

    def _quantise(self, x: torch.Tensor, bits: int | None) -> BFPTensor | torch.Tensor:
        return x.contiguous() if bits is None else bfp_quantise(x, bits, self.method.block)

    def _read(self, held: BFPTensor | torch.Tensor | None) -> torch.Tensor:
        assert held is not None
        assert self.dtype is not None
        return held.dequantise(self.dtype) if isinstance(held, BFPTensor) else held


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``x`` [batch, kv_heads, tokens, head_dim] in ``order`` [batch or 1, kv_heads, head_dim]."""
    return x.gather(-1, order.to(x.device).unsqueeze(2).expand(x.shape))


def _join(old: BFPTensor | torch.Tensor | None, new: BFPTensor | torch.Tensor) -> BFPTensor | torch.Tensor:
    """``old`` and then ``new`` along the tokens."""
    if old is None:
        return new
    if isinstance(new, BFPTensor):
        old = cast(BFPTensor, old)
        codes, exponents = torch.cat([old.codes, new.codes], 2), torch.cat([old.exponents, new.exponents], 2)
        return replace(new, codes=codes, exponents=exponents)
    return torch.cat([cast(torch.Tensor, old), new], 2)


@dataclass(frozen=True)
class KSortBFP(CacheMethod):
    """Keys in block floating point, channels sorted by head.

    Parameters: ``key_bits`` mantissa bits with the sign (4: BFP12, 6: BFP14, 8: BFP16), None for keys as they
    are; ``block`` channels that share an exponent of 8 bits; ``value_bits`` the same for values along
    channels, None for values as they are (the paper); ``pair_aware`` ranks both channels of a rotary pair by
    their joint norm. ``rank`` is what channels are sorted by:

    - ``weight_gain``: norm of their row of W_k with the gain before it and what biases and QK-norms add; no
      data
    - ``weight``: norm of the row alone (the paper)
    - ``calibration``: their root mean square after the rotation, over the prompt, by row; the order is held
      with the cache
    - ``none``; ``random`` with ``seed``; ``interleaved``: the worst, large channels spread over all blocks

    Raises ValueError for bits outside 2 to 16, a block that does not divide head_dim, weights that cannot be
    read.
    """

    key_bits: int | None = 4
    block: int = 32
    value_bits: int | None = None
    rank: str = "weight_gain"
    pair_aware: bool = True
    seed: int = 0

    Layer: ClassVar[type[CacheLayer]] = KSortLayer

    def __post_init__(self) -> None:
        for name, bits in (("key_bits", self.key_bits), ("value_bits", self.value_bits)):
            if bits is not None and not 2 <= bits <= 16:
                raise ValueError(f"{name} must be 2 to 16, or None, got {bits}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        if self.rank not in RANKS:
            raise ValueError(f"rank must be one of {', '.join(RANKS)}, got '{self.rank}'")

    def check(self, geometry: Geometry) -> None:
        if geometry.head_dim % self.block:
            raise ValueError(f"block {self.block} does not divide head_dim {geometry.head_dim}; choose a divisor")

    def layers(self, model: PreTrainedModel) -> list[CacheLayer]:
        layers = super().layers(model)
        if self.rank == "none":
            return layers
        if is_sorted(model):
            raise ValueError("this model's channels are sorted already; use rank='none'")
        if self.rank == "calibration":
            partner = find_rotation(model).partner if self.pair_aware else None
            for layer in layers:
                cast(KSortLayer, layer).partner = partner
            return layers
        orders = channel_orders(model, self.rank, self.pair_aware, self.seed)
        for layer, order in zip(layers, orders, strict=True):
            cast(KSortLayer, layer).fixed = order
        return layers

    def format(self, geometry: Geometry) -> CacheFormat:
        order = 2 * geometry.kv_heads * geometry.head_dim if self.rank == "calibration" else 0  # int16, held with the cache
        return block_float_cache(self.key_bits, self.block, self.value_bits, order)

    def at_budget(self, fraction: float, tokens: int, geometry: Geometry) -> Self:
        """The bits with the least rounding error (4^-bits of keys plus values) that fit, keys first in a tie.

        Among blocks no longer than ``block`` the shortest that still fits. At 1 and above, nothing is
        quantised.
        """
        if fraction >= 1:
            return replace(self, key_bits=None, value_bits=None)
        blocks = [size for size in (2**power for power in range(3, 11)) if size < self.block] + [self.block]
        blocks = [size for size in blocks if geometry.head_dim % size == 0] or [geometry.head_dim]

        def share(key_bits: int | None, value_bits: int | None, block: int) -> float:
            one = replace(self, key_bits=key_bits, value_bits=value_bits, block=block)
            return one.expected_bytes(tokens, geometry) / geometry.full_bytes(tokens)

        options = [
            (4.0**-keys + (0.0 if values is None else 4.0**-values), -keys, block, keys, values)
            for keys in range(2, 9)
            for values in (*range(2, 9), None)
            for block in blocks
        ]
        fitting = [option for option in options if share(option[3], option[4], option[2]) <= fraction]
        if not fitting:
            raise Unreachable(min(share(2, 2, block) for block in blocks))
        _, _, block, keys, values = min(fitting, key=lambda option: option[:3])
        return replace(self, key_bits=keys, value_bits=values, block=block)


@torch.no_grad()
def score_error(model: PreTrainedModel, method: KSortBFP, states: Sequence[Tokens]) -> float:
    """Relative error that quantised keys leave in the scores: |Q K' - Q K_hat'| / |Q K'| in Frobenius norms.

    ``states``: what `observe` gave for a prompt; all its queries and keys count. Returns the mean over layers.
    """
    errors = []
    for layer, seen in zip(method.cache(model).layers, states, strict=True):
        layer.pending = [seen]
        layer.end_prefill()
        group = seen.queries.shape[1] // seen.keys.shape[1]
        truth, held = (keys.float().repeat_interleave(group, 1) for keys in (seen.keys, layer.slots().keys))
        queries = seen.queries.float()
        scores = queries @ truth.transpose(-1, -2)
        errors.append(float((queries @ (held - truth).transpose(-1, -2)).norm() / scores.norm()))
    return sum(errors) / len(errors)
