"""Weights as sums of codebook vectors, fitted to a layer's outputs (Egiazarian et al. 2024, arXiv 2401.06118, section 3).

A weight is cut into groups of ``out_group`` rows by ``in_group`` columns. Each is a sum of one vector from each of M
codebooks, times the scale of its rows:

    W^[o, j] = s[o] * sum_m C[m][code[o, j, m]]

`residual_kmeans` finds first codebooks and codes, `beam_search` better codes for given codebooks, and `fit` takes turns
between that and gradient steps on codebooks and scales. What is made small is the error of the layer's outputs,
tr((W^ - W) H (W^ - W)^T) / rows with H = ``gram``, the mean of x x^T over calibration inputs.

Several layers may share one set of codebooks; then the errors, each relative to its layer's outputs, are added.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

#: numbers that a table of candidates holds at most; larger ones are made in parts
ROOM = 2**22
#: added to the norms that scales begin with
EPSILON = 1e-9


@dataclass(frozen=True)
class Additive:
    """``codes`` int64 [rows / out_group, groups, M], ``codebooks`` [M, entries, out_group, in_group], ``scales``
    [rows / out_group]: the official layout, with the scales' axes of one left out."""

    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """[rows, columns]; gradients reach codebooks and scales."""
        books, entries, out_group, in_group = self.codebooks.shape
        places = self.codes + entries * torch.arange(books, device=self.codes.device)
        vectors = self.codebooks.flatten(0, 1).flatten(1)
        # one codebook after the other: the gradient of index_select is far faster than that of an embedding
        summed = sum(vectors.index_select(0, places[..., book].flatten()) for book in range(books))
        scaled = summed.unflatten(0, self.codes.shape[:2]) * self.scales[:, None, None]  # type: ignore[union-attr]
        return scaled.unflatten(2, (out_group, in_group)).transpose(1, 2).flatten(2).flatten(0, 1)


def squared_error(weight: torch.Tensor, stored: Additive, gram: torch.Tensor) -> float:
    """tr((W^ - W) H (W^ - W)^T) / rows: the mean squared error of an output row, summed in float64."""
    error = (stored.weight - weight).double()
    return float((error @ gram.double() * error).sum()) / len(weight)


# --- first codebooks --------------------------------------------------------------------------------------------------


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The index of the nearest centre [k, d] of each point [n, d]."""
    half = centres.square().sum(1) / 2
    parts = points.split(max(1, ROOM // len(centres)))
    return torch.cat([_smallest(torch.addmm(half, part, centres.T, alpha=-1)) for part in parts])


def _smallest(table: torch.Tensor) -> torch.Tensor:
    """The column of each row's smallest entry. On a CPU numpy finds it about five times as fast as torch."""
    if table.device.type != "cpu":
        return table.argmin(1)
    return torch.from_numpy(table.numpy().argmin(1))


def kmeans(points: torch.Tensor, k: int, iterations: int, draw: torch.Generator, reseed: bool = True) -> torch.Tensor:
    """Centres [k, d] of ``points`` [n, d], begun at random points; stops early when they stand still.

    A centre that no point is nearest to goes where the error is largest (``reseed``; the official code leaves it where it
    is). Raises ValueError for fewer points than centres.
    """
    if k > len(points):
        raise ValueError(f"{k} centres need at least as many points, got {len(points)}")
    centres = points[torch.randperm(len(points), generator=draw).to(points.device)[:k]]
    for iteration in range(iterations):
        found = nearest(points, centres)
        counts = found.bincount(minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, found, points)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero().flatten().tolist()
        if reseed and empty:
            error = (points - moved[found]).square().sum(1)
            for centre in empty:
                worst = error.argmax()
                if error[worst] <= 0:
                    break
                moved[centre] = points[worst]
                error = torch.minimum(error, (points - points[worst]).square().sum(1))
        if iteration % 10 == 0 and torch.allclose(moved, centres, rtol=1e-6, atol=1e-8):
            break
        centres = moved
    return centres


def grouped(weight: torch.Tensor, out_group: int, in_group: int) -> torch.Tensor:
    """[rows, columns] as [rows / out_group, groups, out_group * in_group]."""
    return weight.unflatten(1, (-1, in_group)).unflatten(0, (-1, out_group)).transpose(1, 2).flatten(2)


def residual_kmeans(
    weights: Sequence[torch.Tensor],
    num_codebooks: int,
    nbits: int,
    in_group: int,
    out_group: int = 1,
    iterations: int = 100,
    draw: torch.Generator | None = None,
    reseed: bool = True,
) -> list[Additive]:
    """First codebooks of layers that share them: k-means of the groups, then of what is left of them, and so on.

    Rows are divided by their norms first, which are the scales. Raises ValueError when there are fewer groups than entries.
    """
    draw = draw or torch.Generator().manual_seed(0)
    parts = [grouped(weight, out_group, in_group) for weight in weights]
    scales = [part.flatten(1).norm(dim=1) + EPSILON for part in parts]
    left = torch.cat([(part / scale[:, None, None]).flatten(0, 1) for part, scale in zip(parts, scales)])
    if 2**nbits > len(left):
        raise ValueError(f"a codebook of {2**nbits} entries is more than the {len(left)} groups there are; lower its bits")
    codebooks, codes = [], []
    for _ in range(num_codebooks):
        centres = kmeans(left, 2**nbits, iterations, draw, reseed)
        codes.append(nearest(left, centres))
        codebooks.append(centres)
        left = left - centres[codes[-1]]
    books = torch.stack(codebooks).unflatten(2, (out_group, in_group))
    by_layer = torch.stack(codes, 1).split([part.shape[0] * part.shape[1] for part in parts])
    return [
        Additive(found.unflatten(0, part.shape[:2]), books, scale) for found, part, scale in zip(by_layer, parts, scales)
    ]


# --- better codes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(
    weight: torch.Tensor, stored: Additive, gram: torch.Tensor, beam_size: int = 1, rng: random.Random | None = None
) -> torch.Tensor:
    """Better codes for ``weight`` [rows, columns] with the codebooks as they are, one round (section 3.2, equation 8).

    One group of columns after the other, and in it one codebook after the other, in shuffled order (``rng``; None: as they
    stand): all entries are tried against what the codes of *all* other groups leave over, and the ``beam_size`` best
    choices of a row so far are kept. All rows at once; rows do not depend on each other.
    """
    books, entries, _, _ = stored.codebooks.shape
    orders = [(group, _order(books, rng)) for group in _order(stored.codes.shape[1], rng)]
    step = max(1, ROOM // (entries * beam_size))
    parts = zip(grouped_rows(weight, stored).split(step), stored.codes.split(step), stored.scales.split(step))
    found = []
    for rows, codes, scales in parts:
        found.append(_search(rows, replace(stored, codes=codes, scales=scales), gram, beam_size, orders))
    return torch.cat(found)


def grouped_rows(weight: torch.Tensor, stored: Additive) -> torch.Tensor:
    """[rows, columns] as [rows / out_group, out_group, columns]."""
    return weight.unflatten(0, (-1, stored.codebooks.shape[2]))


def _order(count: int, rng: random.Random | None) -> list[int]:
    order = list(range(count))
    if rng is not None:
        rng.shuffle(order)
    return order


def _search(
    weight: torch.Tensor, stored: Additive, gram: torch.Tensor, beam_size: int, orders: list[tuple[int, list[int]]]
) -> torch.Tensor:
    """`beam_search` of rows [rows, out_group, columns]. The beam is the second axis of what follows.

    With the error D = W - W^ a row's loss is D H D^T, and its slope is D H (``slope``), kept for all columns. Taking the old
    vector u out of group j and putting v in changes the loss by 2 u slope'_j - u H_jj u + v H_jj v - 2 v slope'_j, where
    slope'_j = slope_j + u H_jj is the slope without u.
    """
    _, entries, out_group, in_group = stored.codebooks.shape
    scales = stored.scales[:, None, None]
    codes = stored.codes[:, None].clone()  # [rows, beam, groups, M]
    slope = ((weight - grouped_rows(stored.weight, stored)) @ gram)[:, None]  # [rows, beam, out_group, columns]
    loss = slope.new_zeros(len(weight), 1)  # against the loss at the start
    every = torch.arange(len(weight), device=weight.device)[:, None]
    for group, order in orders:
        columns = slice(group * in_group, (group + 1) * in_group)
        own = gram[columns, columns]
        here, pull = codes[:, :, group], slope[..., columns]
        change, source = torch.zeros_like(pull), torch.zeros_like(every)  # the vectors' change; where a beam comes from
        if beam_size > 1:
            source = torch.arange(codes.shape[1], device=weight.device).expand(len(weight), -1)
        for book in order:
            vectors = stored.codebooks[book]
            weighed = vectors @ own
            cost = (weighed * vectors).sum((1, 2))
            was = here[..., book]
            pull = pull + weighed[was] * scales[..., None]
            flat, old = pull.flatten(2), vectors.flatten(1)[was] * scales
            # s^2 v H v - 2 s v pull, for all v in one product
            known = torch.cat([flat * (-2 * scales), (scales * scales).expand(-1, flat.shape[1], 1)], 2)
            scores = known.flatten(0, 1) @ torch.cat([vectors.flatten(1), cost[:, None]], 1).T
            if beam_size == 1:
                chosen = _smallest(scores)[:, None]
            else:
                loss = loss + 2 * (old * flat).sum(2) - cost[was] * scales[..., 0] ** 2
                scores = scores.unflatten(0, flat.shape[:2]) + loss[..., None]
                loss, best = scores.flatten(1).topk(beam_size, 1, largest=False)
                parent, chosen = best // entries, best % entries
                source, here, pull, change, old = (t[every, parent] for t in (source, here, pull, change, old))
            here = here.clone()
            here[..., book] = chosen
            change = change + (vectors[chosen] * scales[..., None] - old.unflatten(2, (out_group, in_group)))
            pull = pull - weighed[chosen] * scales[..., None]
        if beam_size > 1:
            codes, slope = codes[every, source], slope[every, source]
        codes[:, :, group] = here
        slope -= change @ gram[columns]
    return codes[:, 0]


# --- taking turns -----------------------------------------------------------------------------------------------------


def fit(
    weights: Sequence[torch.Tensor],
    grams: Sequence[torch.Tensor],
    start: Sequence[Additive],
    beam_size: int = 1,
    max_epochs: int = 1000,
    steps_per_epoch: int = 100,
    lr: float = 1e-4,
    relative_mse_tolerance: float = 0.01,
    seed: int = 0,
) -> list[Additive]:
    """Codebooks and scales by Adam, then codes by beam search, in turns (algorithm 1 of the paper), from ``start`` on.

    Ends when a round lowers the error by less than ``relative_mse_tolerance`` of it, or after ``max_epochs`` rounds. The
    best state seen at the end of a round is what is returned (the official code returns the last). Off: ``beam_size`` 0
    keeps the codes, ``steps_per_epoch`` 0 codebooks and scales. Raises ValueError when the error is not finite.
    """
    rng = random.Random(seed)
    books = start[0].codebooks.detach().clone().requires_grad_()
    scales = [one.scales.detach().clone().requires_grad_() for one in start]
    codes = [one.codes.clone() for one in start]
    optimiser = torch.optim.Adam([books, *scales], lr=lr, betas=(0.0, 0.95), amsgrad=True, fused=True)
    shares = [1.0 / len(weight) for weight in weights]
    if len(weights) > 1:  # layers that share codebooks count by their relative errors
        shares = [1.0 / max(float((weight @ gram * weight).sum()), 1e-30) for weight, gram in zip(weights, grams)]

    def slopes(wanted: bool = False) -> float:
        """Leaves the loss's gradient at codebooks and scales; returns the loss, where it is ``wanted``."""
        optimiser.zero_grad()
        total = 0.0
        for weight, gram, code, scale, share in zip(weights, grams, codes, scales, shares):
            rebuilt = Additive(code, books, scale).weight
            error = rebuilt.detach() - weight
            slope = error @ gram
            if wanted:
                total += share * float((slope * error).sum(dtype=torch.float64))
            rebuilt.backward(slope.mul_(2 * share))
        return total

    def state() -> list[Additive]:
        return [Additive(code.clone(), books.detach().clone(), scale.detach().clone()) for code, scale in zip(codes, scales)]

    best, least, previous = state(), float("inf"), float("inf")
    with torch.enable_grad():
        for epoch in range(max_epochs + 1):
            loss = slopes(wanted=True)
            if not loss < float("inf"):
                raise ValueError(f"the error is {loss} in round {epoch}: inputs or weights are too large, or lr is")
            if loss < least:
                best, least = state(), loss
            if epoch == max_epochs or loss > (1 - relative_mse_tolerance) * previous or loss == 0:
                break
            previous = min(previous, loss)
            for step in range(steps_per_epoch):
                if step:
                    slopes()
                optimiser.step()
            if beam_size:
                shuffle = rng.getrandbits(256)
                for place, (weight, gram) in enumerate(zip(weights, grams)):
                    now = Additive(codes[place], books.detach(), scales[place].detach())
                    codes[place] = beam_search(weight, now, gram, beam_size, random.Random(shuffle))
    return best
