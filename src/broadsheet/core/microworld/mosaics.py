"""Mosaics of handwritten digits, and instructions about them: what the vision-language pocket learns and is measured on.

A mosaic is three rows of three digits, 24 x 24 pixels, seen as 144 patches of 2 x 2. The digits are those that scikit-learn
brings along (1,797 images of 8 x 8 pixels; Alpaydin and Kaynak, UCI, 1998). Every fifth is held out from training. In
training digits are also shifted by up to a pixel and dimmed, or 1,400 of them would be learned by heart.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from .sessions import Session, Turn

SIDE, TILE, PATCH = 3, 8, 2
PIXELS = SIDE * TILE
PATCHES = (PIXELS // PATCH) ** 2
#: one token of it stands in the prompt for each patch
IMAGE_TOKEN = "<|image|>"


@dataclass(frozen=True)
class Mosaic:
    """``pixels``: float32 [1, 24, 24] from 0 to 1; ``digits``: the nine, row by row."""

    pixels: torch.Tensor
    digits: tuple[int, ...]

    def row(self, number: int) -> tuple[int, ...]:
        """Row 1, 2 or 3."""
        return self.digits[SIDE * (number - 1) : SIDE * number]

    def column(self, number: int) -> tuple[int, ...]:
        """Column 1, 2 or 3."""
        return self.digits[number - 1 :: SIDE]


@cache
def _digits() -> tuple[torch.Tensor, list[int]]:
    """Images [1797, 8, 8] from 0 to 1 and their labels; raises ValueError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits come with scikit-learn; run: pip install scikit-learn") from None
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, found.target.tolist()


@cache
def _pools(held_out: bool) -> list[list[int]]:
    """The images of each digit."""
    _, labels = _digits()
    return [[i for i, label in enumerate(labels) if label == digit and (i % 5 == 0) == held_out] for digit in range(10)]


def draw_mosaic(rng: random.Random, held_out: bool = False, kinds: int = SIDE**2) -> Mosaic:
    """A mosaic of training digits, each a little changed; or of held-out ones, as they are.

    ``kinds``: 9 digits drawn freely; 3, one for each row; or 1 for all: what is easier to learn first.
    """
    images, labels = _digits()
    digits = [digit for digit in rng.choices(range(10), k=kinds) for _ in range(SIDE**2 // kinds)]
    chosen = [rng.choice(_pools(held_out)[digit]) for digit in digits]
    tiles = images[chosen]
    if not held_out:
        padded = F.pad(tiles, (1, 1, 1, 1))
        corners = [(rng.randrange(3), rng.randrange(3)) for _ in chosen]
        tiles = torch.stack([tile[y : y + TILE, x : x + TILE] for tile, (y, x) in zip(padded, corners, strict=True)])
        tiles = tiles * torch.tensor([rng.uniform(0.7, 1.0) for _ in chosen])[:, None, None]
    pixels = tiles.reshape(SIDE, SIDE, TILE, TILE).permute(0, 2, 1, 3).reshape(1, PIXELS, PIXELS)
    return Mosaic(pixels, tuple(labels[index] for index in chosen))


def _row(digits: tuple[int, ...]) -> str:
    return ", ".join(map(str, digits))


def describe(mosaic: Mosaic) -> Turn:
    """The long caption: all rows, then all columns."""
    lines = [f"Row {n} is {_row(mosaic.row(n))}." for n in range(1, SIDE + 1)]
    lines += [f"Column {n} is {_row(mosaic.column(n))}." for n in range(1, SIDE + 1)]
    return Turn("Describe the picture.", " ".join(lines), "strict", max_new_tokens=100)


def look_up(mosaic: Mosaic, row: int, column: int) -> Turn:
    """One digit by its place, both from 1."""
    return Turn(f"What is at row {row} column {column}?", str(mosaic.row(row)[column - 1]), "strict", max_new_tokens=3)


def read_row(mosaic: Mosaic, number: int) -> Turn:
    """The digits of a row."""
    return Turn(f"Read row {number}.", _row(mosaic.row(number)), "strict", max_new_tokens=8)


def add_row(mosaic: Mosaic, number: int) -> Turn:
    """The sum of a row, its digits written out."""
    digits = mosaic.row(number)
    return Turn(
        f"Add row {number}.", f"{' and '.join(map(str, digits))} make {sum(digits)}", "last_number", max_new_tokens=12
    )


def mosaic_session(rng: random.Random, held_out: bool = False, kinds: int = SIDE**2) -> tuple[Session, Mosaic]:
    """A mosaic and, in any order, a caption, a row read, a row added up and three digits looked up."""
    mosaic = draw_mosaic(rng, held_out, kinds)
    places = rng.sample([(row, column) for row in range(1, SIDE + 1) for column in range(1, SIDE + 1)], 3)
    turns = [look_up(mosaic, *place) for place in places]
    turns += [describe(mosaic), read_row(mosaic, rng.randint(1, SIDE)), add_row(mosaic, rng.randint(1, SIDE))]
    rng.shuffle(turns)
    return Session(f"mosaic-{rng.getrandbits(40):010x}", "mosaics", "", tuple(turns)), mosaic


def with_picture(ids: list[int], image_token: int, filling: int | None = None) -> list[int]:
    """Puts a picture's tokens (for labels: ``filling``) behind the opening and the first user mark of a conversation."""
    return ids[:2] + [image_token if filling is None else filling] * PATCHES + ids[2:]
