"""Tensors quantised to outlier-victim pairs (OliVe, arXiv 2304.07493, section 3).

With G the largest normal value and alpha the magnitude that it stands for, scale = alpha / G and

    y = x / scale,   q = the value of the type nearest to y,   x_q = q * scale.

Neighbours (2i, 2i+1) of a row form a pair. If one of them is an outlier, |q| > G, the other one, its victim, becomes 0. Of
two outliers one survives: the larger (``oo_policy`` "larger", as the paper has it) or the even one ("even", the official
code). A pair is stored in two slots of ``bits`` bits: two normals, or an outlier beside the identifier. Nothing else is
stored but alpha.

alpha is searched over base * i / 100, i = 75, 77 .. 249, base = max(|mean + 3 sd|, |mean - 3 sd|), for the least squared
error with victims counted: one for each row (weights) or for the whole tensor (activations). Mode "ant-int-flint" does so
for both types of normals and keeps the better one for the tensor. Without outliers base is max |x|, as in the official code.

Deviations from the official code, which is otherwise followed to the bit (the code is the same, see the golden test):
values beyond the largest outlier saturate (its CUDA kernel makes them 0 beyond 102,400 / 4 of int4's steps); rows of zeros
are zeros (there: NaN); an odd row is padded with one zero (there: pairs run across rows); mean, deviation and errors are
summed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Self

import numpy as np
import torch

from .grids import PairType, tables

MODES = ("ant-int-flint", "int", "flint")
POLICIES = ("larger", "even")
#: values handled at a time by the reference path
BLOCK = 1 << 20


@dataclass(frozen=True)
class Search:
    """Where alpha is looked for: base * i / 100 for i from ``low`` up to, not including, ``up`` in steps of 2."""

    low: int = 75
    up: int = 250

    def __post_init__(self) -> None:
        if not 0 < self.low < self.up:
            raise ValueError(f"the search needs 0 < low < up, got {self.low} to {self.up}")

    @property
    def ratios(self) -> torch.Tensor:
        return torch.tensor([i * 0.01 for i in range(self.low, self.up, 2)], dtype=torch.float32)


@dataclass(frozen=True)
class Found:
    """The best ``alpha`` (float32 [rows], or [] for the whole tensor) of a type, and its squared error, summed."""

    kind: PairType
    alpha: torch.Tensor
    error: float


@dataclass(frozen=True)
class OVPTensor:
    """A tensor in outlier-victim pairs.

    ``codes`` uint8 [..., bytes], pairs along the last axis: a byte holds a pair of 4-bit codes, the even one in its low
    half, or one 8-bit code. ``alpha`` float32 [...] (a scale for every row) or []. ``width``: values of a row, without the
    zero that pads an odd one. ``axis``: which axis of the original is the last one here. ``outlier_pairs`` and
    ``saturated``: pairs that lost an outlier, and values beyond the largest outlier, when it was packed.
    """

    codes: torch.Tensor
    alpha: torch.Tensor
    kind: PairType
    width: int
    axis: int = -1
    outlier_pairs: int = 0
    saturated: int = 0

    @classmethod
    def pack(
        cls,
        x: torch.Tensor,
        axis: int = -1,
        bits: int = 4,
        mode: str = "ant-int-flint",
        alpha: torch.Tensor | None = None,
        per_row: bool = True,
        signed: bool | None = None,
        oo_policy: str = "larger",
        search: Search | None = None,
        pad: bool = True,
        outliers: bool = True,
    ) -> Self:
        """Quantises ``x``, pairs running along ``axis``.

        ``alpha`` given: it is used as it is, and ``mode`` must name one type. ``per_row``: one alpha for each row along
        ``axis``, else one in all. ``signed``: None looks whether a value is negative. ``outliers`` off: normals only.
        Raises ValueError for values that are not finite, for unknown modes and policies, bits other than 4 and 8, and, with
        ``pad`` off, for odd rows.
        """
        check(bits, mode, oo_policy)
        if x.ndim == 0 or not x.numel():
            raise ValueError("there is nothing to pack: the tensor needs an axis and at least one value")
        x, axis = x.detach().movedim(axis, -1).float(), axis % x.ndim - x.ndim
        if not bool(torch.isfinite(x).all()):
            raise ValueError("the tensor holds inf or nan; clean or clip it before packing")
        width = x.shape[-1]
        if width % 2 and not pad:
            raise ValueError(f"rows of {width} values cannot be paired; allow pad=True or give an even number")
        signed = bool(x.min() < 0) if signed is None else signed
        rows = x.reshape(-1, width)
        if alpha is None:
            found = choose(rows, kinds(bits, mode, signed, outliers), per_row, oo_policy, search)
            kind, alpha = found.kind, found.alpha.reshape(x.shape[:-1] if per_row else ())
        else:
            if mode == "ant-int-flint" and bits == 4:
                raise ValueError("a given alpha belongs to one type: set mode to 'int' or 'flint'")
            kind = kinds(bits, mode, signed, outliers)[0]
            if not bool(torch.isfinite(alpha).all()) or bool((alpha < 0).any()):
                raise ValueError("alpha must be finite and not negative")
            if alpha.shape != () and alpha.shape != x.shape[:-1]:
                raise ValueError(f"alpha must have shape {list(x.shape[:-1])} or [], not {list(alpha.shape)}")
        scale = scale_of(alpha.float(), kind).reshape(-1).expand(rows.shape[0])
        codes, outlier_pairs, saturated = encode(rows, scale, kind, oo_policy)
        return cls(codes.reshape(*x.shape[:-1], -1), alpha.float(), kind, width, axis, outlier_pairs, saturated)

    def values(self) -> torch.Tensor:
        """q, the integers that the codes stand for: int16 [..., width]."""
        return decode(self.codes, self.kind)[..., : self.width]

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """q * alpha / G in the original's shape."""
        scale = scale_of(self.alpha, self.kind)
        if scale.ndim:
            scale = scale.unsqueeze(-1)
        return (self.values().float() * scale).to(dtype).movedim(-1, self.axis)

    def stats(self) -> dict[str, int]:
        """Pairs of two normals (``nn``), of an outlier and a normal (``on``), of two outliers, one of them lost (``oo``),
        and ``saturated`` values."""
        pairs = split(self.codes, self.kind)
        mixed = int((pairs == self.kind.identifier).any(-1).sum())
        nn = pairs[..., 0].numel() - mixed
        return {"nn": nn, "on": mixed - self.outlier_pairs, "oo": self.outlier_pairs, "saturated": self.saturated}

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.alpha.nbytes


def check(bits: int, mode: str, oo_policy: str) -> None:
    """Raises ValueError for what `OVPTensor.pack` does not know."""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got '{mode}'")
    if oo_policy not in POLICIES:
        raise ValueError(f"oo_policy must be one of {', '.join(POLICIES)}, got '{oo_policy}'")


def kinds(bits: int, mode: str, signed: bool, outliers: bool = True) -> list[PairType]:
    """The types that a mode chooses from; 8 bits are always int."""
    if bits == 8:
        return [PairType("int8", signed, outliers)]
    names = {"ant-int-flint": ("int4", "flint4"), "int": ("int4",), "flint": ("flint4",)}[mode]
    return [PairType(name, signed, outliers) for name in names]


def scale_of(alpha: torch.Tensor, kind: PairType) -> torch.Tensor:
    """alpha / G: what the value 1 stands for."""
    return alpha / kind.top


# --- the search -------------------------------------------------------------------------------------------------------


def choose(
    x: torch.Tensor, types: Sequence[PairType], per_row: bool, oo_policy: str = "larger", search: Search | None = None
) -> Found:
    """The type of least squared error in all, and its alpha, for ``x`` float32 [rows, width]. Ties go to the first."""
    found = [find(x, kind, per_row, oo_policy, search) for kind in types]
    return min(found, key=lambda one: one.error)


def find(x: torch.Tensor, kind: PairType, per_row: bool, oo_policy: str = "larger", search: Search | None = None) -> Found:
    """The alpha of least squared error for ``x`` float32 [rows, width]; of equal ones the smallest."""
    stats = x.double() if per_row else x.double().reshape(1, -1)
    mean = stats.mean(-1)
    deviation = stats.std(-1) if stats.shape[-1] > 1 else torch.zeros_like(mean)
    base = torch.maximum((mean + 3 * deviation).abs(), (mean - 3 * deviation).abs())
    if not kind.outliers:
        base = stats.abs().amax(-1)
    ratios = (search or Search()).ratios.to(x.device)
    limit = torch.finfo(torch.float32).max
    alphas = (base.clamp(max=limit).float().unsqueeze(-1) * ratios).clamp(max=limit)  # [rows or 1, candidates]
    scales, x = scale_of(alphas, kind), _even(x)
    if per_row:
        parts = [errors(part, scale, kind, oo_policy) for part, scale in zip(_blocks(x), _blocks(scales, x.shape[1]))]
        lost = torch.cat(parts)
    else:
        lost = torch.stack([errors(part.reshape(1, -1), scales, kind, oo_policy) for part in _blocks(x)]).sum(0)
    best = lost.argmin(-1, keepdim=True)
    alpha = alphas.gather(-1, best).squeeze(-1)
    return Found(kind, alpha if per_row else alpha[0], float(lost.gather(-1, best).sum()))


def errors(x: torch.Tensor, scales: torch.Tensor, kind: PairType, oo_policy: str = "larger") -> torch.Tensor:
    """Squared error of each row of ``x`` [rows, even width] at each of its scales [rows, candidates]: float64.

    A row is sorted by magnitude once. Then, with s the scale and v the value that the magnitudes between two borders go to,
    sum (a - s v)^2 = sum a^2 - 2 s sum v a + s^2 sum v^2 needs but the running sums of a at the borders. That leaves out
    what outliers do to their neighbours; as they are few, every pair with an outlier is put right by itself: its victim
    loses all of its square instead of what rounding takes from it.
    """
    levels = torch.tensor([value for value in kind.values if value >= 0], dtype=torch.float64, device=x.device)
    borders, steps, squares = (levels[1:] + levels[:-1]) / 2, levels.diff(), levels.square().diff()
    first_outlier = (kind.top + min((value for value in kind.values if value > kind.top), default=np.inf)) / 2
    size = x.abs() if kind.signed else x.clamp(min=0)
    ordered = _sorted(size)
    running = torch.nn.functional.pad(ordered.double().cumsum(-1), (1, 0))
    pairs = size.unflatten(-1, (-1, 2))
    largest = pairs.amax(-1)
    most = int((largest >= first_outlier * scales.amin(-1, keepdim=True) * (1 - 1e-6)).sum(-1).max())
    chosen = largest.topk(most).indices.unsqueeze(-1).expand(-1, -1, 2)
    pairs = pairs.gather(1, chosen)  # of each row those that have an outlier at some scale, the largest first
    wide = scales.double()
    bounds = (borders * wide.unsqueeze(-1)).float().flatten(1)
    below = torch.searchsorted(ordered, bounds)  # how many magnitudes are below each border
    values = levels[-1] * running[:, -1:] - running.gather(-1, below).unflatten(1, (-1, len(steps))) @ steps
    squared = levels[-1].square() * x.shape[-1] - below.unflatten(1, (-1, len(steps))).double() @ squares
    squared += victims(pairs, scales, kind, oo_policy)
    return x.double().square().sum(-1, keepdim=True) - 2 * wide * values + wide.square() * squared


def victims(pairs: torch.Tensor, scales: torch.Tensor, kind: PairType, oo_policy: str) -> torch.Tensor:
    """What the victims among ``pairs`` [rows, pairs, 2] lose more than by rounding, in squared steps: [rows, candidates].

    Pairs are sorted by their larger magnitude, the largest first; no magnitude is negative.
    """
    compiled = kernels() if pairs.device.type == "cpu" else None
    if compiled is not None:
        return compiled.victims(pairs.flatten(1), scales, kind, oo_policy == "larger")
    return victims_reference(pairs, scales, kind, oo_policy)


def victims_reference(pairs: torch.Tensor, scales: torch.Tensor, kind: PairType, oo_policy: str) -> torch.Tensor:
    """What `victims` gives, in torch alone."""
    found = []
    for some in scales.split(max(1, BLOCK // max(pairs.numel(), 1)), 1):
        y = _relative(pairs.flatten(1).unsqueeze(1), some)
        rounded, resolved, _ = _resolve(y, kind, oo_policy)
        more = y.double().square() - (rounded - y).double().square()
        found.append((more * (rounded != resolved)).sum(-1))
    return torch.cat(found, 1)


# --- values and codes -------------------------------------------------------------------------------------------------


def encode(x: torch.Tensor, scale: torch.Tensor, kind: PairType, oo_policy: str = "larger") -> tuple[torch.Tensor, int, int]:
    """Codes uint8 [rows, bytes] of ``x`` float32 [rows, width] at ``scale`` [rows].

    Also how many pairs lost an outlier, and how many values were beyond the type's reach. ``x`` must be finite.
    """
    compiled = kernels() if x.device.type == "cpu" else None
    if compiled is not None:
        return compiled.encode(_even(x), scale, kind, oo_policy == "larger")
    return encode_reference(x, scale, kind, oo_policy)


def encode_reference(
    x: torch.Tensor, scale: torch.Tensor, kind: PairType, oo_policy: str = "larger"
) -> tuple[torch.Tensor, int, int]:
    """What `encode` gives, in torch alone."""
    *_, code_of = (table.to(x.device) for table in tables(kind))
    parts, outlier_pairs, saturated = [], 0, 0
    for part, of_part in zip(_blocks(_even(x)), _blocks(scale, x.shape[1])):
        y = _relative(part, of_part)
        _, q, lost = _resolve(y, kind, oo_policy)
        outlier_pairs += lost
        saturated += int((y > kind.reach).sum() + (y < (-kind.reach if kind.signed else -0.5)).sum())
        pairs = q.unflatten(-1, (-1, 2))
        codes = code_of[(pairs + kind.reach).long()]
        beside = pairs.flip(-1).abs() > kind.top
        parts.append(join(torch.where(beside, kind.identifier, codes), kind))
    return torch.cat(parts), outlier_pairs, saturated


def decode(codes: torch.Tensor, kind: PairType) -> torch.Tensor:
    """The values of codes uint8 [..., bytes]: int16 [..., padded width]."""
    normals, outliers, *_ = (table.to(codes.device) for table in tables(kind))
    pairs = split(codes, kind).long()
    return torch.where(pairs.flip(-1) == kind.identifier, outliers[pairs], normals[pairs]).flatten(-2)


def join(pairs: torch.Tensor, kind: PairType) -> torch.Tensor:
    """Bytes uint8 [..., bytes] of codes [..., pairs, 2]."""
    return pairs[..., 0] | pairs[..., 1] << 4 if kind.bits == 4 else pairs.flatten(-2)


def split(codes: torch.Tensor, kind: PairType) -> torch.Tensor:
    """Codes [..., pairs, 2] of bytes uint8 [..., bytes]."""
    return torch.stack([codes & 15, codes >> 4], -1) if kind.bits == 4 else codes.unflatten(-1, (-1, 2))


def _resolve(y: torch.Tensor, kind: PairType, oo_policy: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Nearest values of ``y`` [rows, even width], the same with the victims zero, and how many outliers fell victim."""
    _, _, nearest, _ = tables(kind)
    clipped = y.clamp(-kind.reach, kind.reach)
    place = (2 * clipped).floor() + (2 * clipped).ceil() + 4 * kind.reach
    values = nearest.to(y.device)[place.long()]
    even, odd = (values.abs() > kind.top).unflatten(-1, (-1, 2)).unbind(-1)
    both = even & odd
    if oo_policy == "larger":
        first, second = y.abs().unflatten(-1, (-1, 2)).unbind(-1)
        even = even & ~(both & (second > first))
    victims = torch.stack([odd & ~even, even], -1).flatten(-2)
    return values, values.masked_fill(victims, 0), int(both.sum())


def _relative(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale, 0 where the scale is 0."""
    scale = scale.unsqueeze(-1)
    return torch.where(scale > 0, x / scale, 0.0)


def _even(x: torch.Tensor) -> torch.Tensor:
    """Rows padded with a zero to an even length."""
    return torch.nn.functional.pad(x, (0, x.shape[-1] % 2))


def _sorted(x: torch.Tensor) -> torch.Tensor:
    """Rows in ascending order; numpy does that ten times as fast, as it keeps no indices."""
    return torch.from_numpy(np.sort(x.contiguous().numpy())) if x.device.type == "cpu" else x.sort(-1).values


def _blocks(x: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, ...]:
    """``x`` in runs of rows, as many as make up `BLOCK` values of rows of ``width`` (default: its own)."""
    return x.split(max(1, BLOCK // (width or x.shape[-1])))


@cache
def kernels() -> Any:
    """The compiled kernels; None where numba does not run. Imported at the first use, since numba is heavy."""
    try:
        return import_module(f"{__package__}.kernel")
    except ImportError:
        return None


# --- another order of channels ----------------------------------------------------------------------------------------


def halves(width: int) -> torch.Tensor:
    """The order of channels that pairs i with i + width / 2: int64 [width]."""
    half = width // 2
    order = torch.arange(2 * half).unflatten(0, (2, half)).T.flatten()
    return torch.cat([order, torch.arange(2 * half, width)])


def spread(magnitude: torch.Tensor) -> torch.Tensor:
    """The order that pairs the largest channel with the smallest, the next largest with the next smallest, and so on.

    ``magnitude`` [width]; int64 [width]. The middle channel of an odd number comes last, beside the padding.
    """
    ranked = magnitude.argsort(descending=True, stable=True)
    half = len(ranked) // 2
    large, middle, small = ranked[:half], ranked[half : len(ranked) - half], ranked[len(ranked) - half :]
    return torch.cat([torch.stack([large, small.flip(0)], -1).flatten(), middle])
