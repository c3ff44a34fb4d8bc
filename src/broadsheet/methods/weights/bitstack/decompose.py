"""Iterative absolute value decomposition (BitStack, arXiv 2410.23918, section 2.1).

A weight W [out, in] becomes a stack of blocks, each of about one bit a weight. From R_0 = W:

    S_i = sign(R_i), sign(0) = +1;   |R_i| ~ A_i B_i, the best approximation of rank k (a truncated SVD);
    R_{i+1} = R_i - S_i * (A_i B_i)

with A_i = U_k sqrt(sigma_k) [out, k] and B_i = sqrt(sigma_k) V_k^T [k, in] in float16. Any prefix of the blocks adds up to
an approximation of W. Absolute values of a matrix are nearly of rank one (their mean is not zero), which is
why the signs are worth their bit: `signed` False is the paper's ablation, the plain SVD of R_i at as many bytes.

Deviation: the factors are subtracted as they are stored, in float16, so that the next block takes up their rounding; the
official code subtracts them before rounding (``parity="official"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, svds

from broadsheet.core.numerics.packing import pack, unpack
from broadsheet.core.perf.storage import SignedFactors

#: the overhead over one bit a weight that `auto_rank` allows
AUTO_OVERHEAD = 0.25


@dataclass(frozen=True)
class Layout:
    """What a block of one weight [rows, columns] consists of: A, B and, if ``signed``, the signs.

    A block is one uint8 tensor [nbytes] of its own, so that dropping it frees it: A [rows, rank] and B [rank, columns] in
    float16, then the packed signs (last, since their length may be odd). Being bytes, it survives `model.half()`.
    """

    rows: int
    columns: int
    rank: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= min(self.rows, self.columns):
            raise ValueError(
                f"rank {self.rank} does not fit a weight of {self.rows} x {self.columns}; choose k from 1 to "
                f"{min(self.rows, self.columns)} (or 'auto')"
            )

    @property
    def factor_bytes(self) -> int:
        return SignedFactors(self.rank, signed=False).nbytes(self.rows, self.columns)

    @property
    def nbytes(self) -> int:
        """Bytes of a block: ceil(rows * columns / 8) + 2 rank (rows + columns)."""
        return SignedFactors(self.rank, signed=self.signed).nbytes(self.rows, self.columns)

    @property
    def bits(self) -> float:
        """Bits a weight of a block."""
        return 8 * self.nbytes / (self.rows * self.columns)

    def join(self, a: torch.Tensor, b: torch.Tensor, signs: torch.Tensor | None) -> torch.Tensor:
        """The block of float16 factors and packed signs."""
        parts = [factor.flatten().contiguous().view(torch.uint8) for factor in (a, b)]
        return torch.cat([*parts, *([] if signs is None else [signs])])

    def split(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Views of A, B and the packed signs."""
        factors = block[: self.factor_bytes].view(torch.float16)
        a, b = factors.split([self.rows * self.rank, self.rank * self.columns])
        signs = block[self.factor_bytes :] if self.signed else None
        return a.view(self.rows, self.rank), b.view(self.rank, self.columns), signs

    def dense(self, block: torch.Tensor) -> torch.Tensor:
        """S * (A B), float32 [rows, columns]."""
        a, b, signs = self.split(block)
        product = a.float() @ b.float()
        return product if signs is None else product.mul_(unpack_signs(signs, product.shape))


def pack_signs(positive: torch.Tensor) -> torch.Tensor:
    """Packs bools, row by row, eight to a byte: the first into the top bit, the last byte filled up with zeros."""
    flat = positive.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    return pack(flat.view(-1, 8).flip(-1), 1).flatten()  # `pack` begins with the lowest bit


def unpack_signs(packed: torch.Tensor, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
    """The inverse of `pack_signs`: float32, +1 where the bit is set and -1 elsewhere."""
    count = int(np.prod(shape))
    bits = unpack(packed.unsqueeze(-1), 1, 8).flip(-1).flatten()[:count]
    return bits.view(shape).float().mul_(2).sub_(1)


def auto_rank(rows: int, columns: int) -> int:
    """The largest rank whose factors cost at most a quarter of a bit a weight, at least 1."""
    return max(1, int(AUTO_OVERHEAD * rows * columns / (16 * (rows + columns))))


def layout_of(rows: int, columns: int, k: int | Literal["auto"], signed: bool = True) -> Layout:
    """The layout of the blocks of a weight [rows, columns].

    Without signs, the rank grows by what the signs would have cost, rounded down. Raises ValueError when k does not fit.
    """
    rank = auto_rank(rows, columns) if k == "auto" else k
    if not signed:
        rank += rows * columns // (16 * (rows + columns))
    return Layout(rows, columns, rank, signed)


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U sqrt(sigma) [rows, rank] and sqrt(sigma) V^T [rank, columns] of the largest singular values, float32.

    Few of many are found by the Lanczos method, run to the precision of float32: about 15 times as fast on a matrix of
    1024 x 1024, with the same error. Its start is fixed, so that the result is.
    """
    least = min(matrix.shape)
    if matrix.device.type == "cpu" and 8 * rank <= least:
        start = np.random.default_rng(0).standard_normal(least).astype(np.float32)
        try:
            found = svds(matrix.numpy(), k=rank, v0=start)
        except ArpackError:  # no convergence: a matrix of zeros, for one
            pass
        else:
            u, sigma, vt = (torch.from_numpy(part.copy("C")) for part in found)
            order = sigma.argsort(descending=True)
            root = sigma[order].sqrt()
            return u[:, order] * root, root.unsqueeze(1) * vt[order]
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]


def decompose(
    weight: torch.Tensor, layout: Layout, n_iter: int, parity: Literal["official"] | None = None
) -> tuple[list[torch.Tensor], list[float]]:
    """The blocks of ``weight`` [rows, columns], and the squared Frobenius error after 0, 1, 2, ... of them.

    ``parity`` "official": the unrounded factors are subtracted, as the authors' code does. Raises ValueError for a weight
    that is not finite or whose factors float16 cannot hold.
    """
    if tuple(weight.shape) != (layout.rows, layout.columns):
        raise ValueError(f"a weight of {tuple(weight.shape)} has no blocks of {layout.rows} x {layout.columns}")
    residual = weight.detach().float()
    if not residual.isfinite().all():
        raise ValueError("the weight has infinite or NaN entries; repair the checkpoint first")
    blocks, errors = [], [float(residual.double().square().sum())]
    for _ in range(n_iter):
        positive = residual >= 0
        a, b = truncated_svd(residual.abs() if layout.signed else residual, layout.rank)
        block = layout.join(a.half(), b.half(), pack_signs(positive) if layout.signed else None)
        blocks.append(block)
        if parity == "official":
            product = a @ b
            if layout.signed:
                product = torch.where(positive, product, -product)
        else:
            product = layout.dense(block)
        residual = residual - product
        errors.append(float(residual.double().square().sum()))
        if not np.isfinite(errors[-1]):
            raise ValueError("the factors exceed float16; divide the weight by a constant or compress without scaling")
    return blocks, errors


def compose(blocks: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """The weight that ``blocks`` stand for, summed in float32: [rows, columns]."""
    total = layout.dense(blocks[0])
    for block in blocks[1:]:
        total += layout.dense(block)
    return total
