"""What XQuant's rematerialisation costs: FLOP against bytes, and the length at which the one overtakes the
other.

The model of the paper (Tomar et al. 2025, arXiv 2508.10395, section 3 and its appendix), per layer and decode
step, a multiply-add as 2 FLOP, l tokens, hidden size d, g query heads a KV head, e bits:

================  ======================  ==========================================================
what is stored    FLOP                    bytes read
================  ======================  ==========================================================
X                 4 l d d/g               e/8 l d
latents XU        4 l (d/g)^2             2 e/8 l d/g
delta of X        + 2 l d                 + 2 e_b/8 l d (the accumulator, read and written)
delta of XU_kv    8 l d d/g + 2 l d       2 e/8 l d/g, and the accumulator
================  ======================  ==========================================================

With g = 1 the first row is the paper's 4 l d^2. A step is compute-bound once FLOP / (cache bytes + weight
bytes) exceeds the chip's ridge P = peak FLOP/s over bytes/s; the length where they are equal is the
break-even length. As in the paper, only rematerialisation counts as FLOP; the weights count as bytes because
they are read once a step anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from broadsheet.core.perf.hardware import Device, device

from ..base import Geometry
from .streams import stored_size

if TYPE_CHECKING:
    from . import XQuant


@dataclass(frozen=True)
class Cost:
    """One decode step over the whole model. Bytes are read or written once a step; weights are shared by the
    batch."""

    flop: float  #: of rematerialisation
    cache_bytes: float  #: codes, scales and zeros read
    accumulator_bytes: float  #: cross-layer accumulator, both ways
    weight_bytes: float  #: 16-bit weights and factors read
    kv_bytes: float  #: what a 16-bit KV cache would read instead
    ridge: float  #: of the chip, FLOP a byte
    compute_seconds: float
    memory_seconds: float
    kv_seconds: float  #: memory time with the 16-bit KV cache
    break_even: float  #: tokens a row from which on the step is compute-bound; inf: never

    @property
    def bound(self) -> str:
        """``compute`` or ``memory``: which of the two takes longer."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


def break_even(
    hidden: int,
    bits: float,
    ridge: float,
    group: int = 1,
    streams: int = 2,
    weight_bytes: float | None = None,
) -> float:
    """The paper's break-even length of one layer, in tokens; inf when it is never compute-bound.

    ``group`` 1: X itself is stored. Above: latents of width hidden / group, of which ``streams`` are counted
    as read (the paper's printed equation counts one of the two). ``weight_bytes`` of a layer: by default the
    paper's 24 d^2 (an MLP of 8 d^2 parameters) or 26 d^2 + 4 (d/g)^2 (group 4, an MLP of 10.5 d^2).
    """
    width = hidden / group
    flop = 4 * width * width
    cache_bytes = bits / 8 * width * (1 if group == 1 else streams)
    if weight_bytes is None:
        weight_bytes = 24 * hidden**2 if group == 1 else 26 * hidden**2 + 4 * width**2
    return _crossing(flop, cache_bytes, weight_bytes, ridge)


def decode_cost(method: XQuant, config: Any, seq_len: int, batch: int, hardware: str | Device) -> Cost:
    """FLOP, bytes, bound and break-even length of one decode step with ``method``.

    ``config``: a transformers config of a dense gated-MLP model. Bytes include the 32 bits of scale and zero
    a group, which the paper's formula leaves out; the exact tail of per-channel latents is not counted.
    Raises ValueError for an unknown device or a config without an MLP size.
    """
    on = device(hardware).rated()
    peak, ridge = on.peak("bf16"), on.turning_point("bf16")
    geometry = Geometry.of(config)
    mlp = getattr(config.get_text_config(), "intermediate_size", None)
    if not mlp:
        raise ValueError(f"{type(config).__name__} has no intermediate_size; the weights cannot be counted")
    method.check(geometry)
    hidden, kv = geometry.hidden_size, geometry.kv_heads * geometry.head_dim
    rank = min(hidden, kv)
    latent = method.uses_latent(geometry)
    others = 2 * hidden * geometry.heads * geometry.head_dim + 3 * hidden * mlp  # W_q, W_o and the MLP
    dense = 2 * hidden * kv  # W_k and W_v
    flop = cached = accumulated = weights = 0  # FLOP and bytes a token of one row; weights in parameters
    for index in range(geometry.layers):
        crossing = method.crosses(index)
        cached += sum(stored_size(*stream, method.group_size) for stream in method.stream_sizes(index, geometry))
        if latent and crossing:
            flop += 2 * dense + 2 * hidden * min(hidden, 2 * kv)
            weights += others + dense + hidden * min(hidden, 2 * kv)
        elif latent:
            flop += 4 * rank * kv
            weights += others + 2 * hidden * rank + 2 * rank * kv
        else:
            flop += 2 * dense
            weights += others + dense
        if crossing and index >= method.base_layers:
            flop += 2 * hidden
        if crossing:  # the base only writes the accumulator, the last layer only reads it
            ways = (index >= method.base_layers) + (index < geometry.layers - 1)
            accumulated += ways * stored_size(hidden, method.accumulator_bits, method.group_size)
    rows = seq_len * batch
    kv_bytes = geometry.full_bytes(rows)
    kv_weights = geometry.layers * (others + dense)
    return Cost(
        flop=flop * rows,
        cache_bytes=cached * rows,
        accumulator_bytes=accumulated * rows,
        weight_bytes=2 * weights,
        kv_bytes=kv_bytes,
        ridge=ridge,
        compute_seconds=flop * rows / peak,
        memory_seconds=((cached + accumulated) * rows + 2 * weights) / on.bandwidth,
        kv_seconds=(kv_bytes + 2 * kv_weights) / on.bandwidth,
        break_even=_crossing(flop * batch, (cached + accumulated) * batch, 2 * weights, ridge),
    )


def _crossing(flop: float, cache_bytes: float, weight_bytes: float, ridge: float) -> float:
    """The l that solves flop * l / (cache_bytes * l + weight_bytes) = ridge."""
    slope = flop - ridge * cache_bytes
    return weight_bytes * ridge / slope if slope > 0 else float("inf")
