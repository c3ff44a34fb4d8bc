"""n:m sparsity: which n of every m neighbouring weights of a row stay, and how their places are stored.

Neighbours stand along the input: hardware picks n of m inputs for each multiplier group. Scores: magnitude, Wanda
(Sun et al. 2023, arXiv 2306.11695) and SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), which also changes the
weights that stay. A mask keeps exactly n of every m places, so that every row stores as many.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import torch

from broadsheet.core.numerics.packing import pack, unpack
from broadsheet.core.perf import storage


class Sparsity(storage.Sparsity):
    """With the places of a mask as they are stored."""

    def encode(self, mask: torch.Tensor) -> torch.Tensor:
        """Packs the places of ``mask`` bool [rows, columns], n of every m true: uint8 [rows, `row_bytes`]."""
        grouped = mask.unflatten(-1, (-1, self.m))
        if not bool((grouped.sum(-1) == self.n).all()):
            raise ValueError(f"the mask does not keep {self.n} of every {self.m} weights")
        if self.places == "indices":
            places = grouped.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : self.n]
            return pack(places.to(torch.uint8).flatten(-2), self.bits)
        numbers = torch.zeros(2**self.m, dtype=torch.uint8, device=mask.device)
        for number, pattern in enumerate(patterns(self.n, self.m)):
            numbers[sum(1 << place for place in pattern)] = number
        return pack(numbers[(grouped.long() << torch.arange(self.m, device=mask.device)).sum(-1)], self.bits)

    def decode(self, packed: torch.Tensor, columns: int) -> torch.Tensor:
        """The inverse of `encode`: int64 [rows, kept], the column of every weight that stays, ascending."""
        numbers = unpack(packed, self.bits, columns // self.m * self.numbers).long()
        if self.places == "patterns":
            places = torch.tensor(patterns(self.n, self.m), device=packed.device)[numbers]
        else:
            places = numbers.unflatten(-1, (-1, self.n))
        starts = torch.arange(0, columns, self.m, device=packed.device).unsqueeze(-1)
        return (places + starts).flatten(-2)


@lru_cache
def patterns(n: int, m: int) -> tuple[tuple[int, ...], ...]:
    """The sets of n of m places in lexical order: number -> places."""
    return tuple(combinations(range(m), n))


def mask_nm(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True for the ``n`` highest scores of every ``m`` neighbours in a row of ``score`` [rows, columns]; ties: the first."""
    order = score.unflatten(-1, (-1, m)).argsort(dim=-1, descending=True, stable=True)[..., :n]
    grouped = torch.zeros(*score.shape[:-1], score.shape[-1] // m, m, dtype=torch.bool, device=score.device)
    return grouped.scatter_(-1, order, True).flatten(-2)


def wanda_score(weight: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """|W_ij| ||X_j||_2 for ``weight`` [rows, columns] and the inputs' 2-norms ``norm`` [columns] (Wanda, section 3)."""
    return weight.abs() * norm


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, n: int, m: int, damping: float = 0.01, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes ``weight`` [rows, columns] for inputs with Gram matrix ``gram`` [columns, columns]: the new weight, its mask.

    SparseGPT's algorithm 1 with n:m masks: the m - n weights of least w^2 / [H^-1]_jj (in the order of elimination) are
    removed, and each one's loss is made good in the columns that follow. ``damping``: this share of the mean diagonal is
    added to H. Inputs that never were anything but zero get weight zero.
    """
    columns = weight.shape[1]
    dead = gram.diagonal() == 0
    left = weight.float().masked_fill(dead, 0)
    hessian = gram.double() + torch.diag(dead.double())
    hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64, device=gram.device)
    # Upper Cholesky factor of the inverse: row i holds what the loss of column i does to later ones.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    mask = torch.zeros_like(left, dtype=torch.bool)
    step = max(block // m, 1) * m
    for first in range(0, columns, step):
        last = min(first + step, columns)
        part, errors = left[:, first:last].clone(), torch.zeros_like(left[:, first:last])
        for index in range(last - first):
            column = first + index
            if index % m == 0:
                group = part[:, index : index + m]
                score = (group / inverse.diagonal()[column : column + m]).square()
                mask[:, column : column + m] = mask_nm(score, n, m)
            stays = torch.where(mask[:, column], part[:, index], 0)
            error = (part[:, index] - stays) / inverse[column, column]
            part[:, index + 1 :] -= error.unsqueeze(1) * inverse[column, column + 1 : last]
            left[:, column], errors[:, index] = stays, error
        left[:, last:] -= errors @ inverse[first:last, last:]
    return left, mask
