"""Mosaics say what they show, and held-out digits stay held out."""

import random

import pytest
import torch

from broadsheet.core.microworld.checkers import check
from broadsheet.core.microworld.mosaics import PATCHES, draw_mosaic, mosaic_session, with_picture

pytest.importorskip("sklearn")


def test_pixels_are_the_digits_row_by_row():
    from sklearn.datasets import load_digits

    found = load_digits()
    mosaic = draw_mosaic(random.Random(1), held_out=True)
    assert mosaic.pixels.shape == (1, 24, 24)
    for place, digit in enumerate(mosaic.digits):
        y, x = divmod(place, 3)
        tile = mosaic.pixels[0, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        matches = [i for i, image in enumerate(found.images) if torch.equal(tile, torch.tensor(image).float() / 16)]
        assert any(found.target[i] == digit and i % 5 == 0 for i in matches)
    assert mosaic.row(2) == mosaic.digits[3:6]
    assert mosaic.column(2) == mosaic.digits[1::3]


def test_sessions_are_seeded_and_gold_answers_score():
    session, mosaic = mosaic_session(random.Random(3))
    again, same = mosaic_session(random.Random(3))
    assert session == again
    assert torch.equal(mosaic.pixels, same.pixels)
    assert 0 <= float(mosaic.pixels.min()) <= float(mosaic.pixels.max()) <= 1
    for turn in session.turns:
        assert check(turn.answer, turn) == 1.0
        assert check("", turn) == 0.0


def test_picture_tokens_follow_the_first_user_mark():
    ids = with_picture([1, 3, 7, 8, 9], 2048)
    assert ids[:2] == [1, 3]
    assert ids[2 : 2 + PATCHES] == [2048] * PATCHES
    assert ids[-3:] == [7, 8, 9]
    assert with_picture([-100] * 5, 2048, -100) == [-100] * (5 + PATCHES)
