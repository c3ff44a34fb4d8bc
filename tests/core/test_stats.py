"""Paired tests against scipy, statsmodels (values of its 0.15.0) and hand values."""

import math
import random

import pytest
from scipy.stats import binomtest, false_discovery_control, wilcoxon

from broadsheet.core.stats import benjamini_hochberg, discordant, grouped_wilcoxon, mcnemar, paired_odds_ratio


def pairs(only_a, only_b, both=50, neither=30):
    """Two lists of verdicts with these counts, shuffled together."""
    rows = [(1, 0)] * only_a + [(0, 1)] * only_b + [(1, 1)] * both + [(0, 0)] * neither
    random.Random(0).shuffle(rows)
    return [bool(a) for a, _ in rows], [bool(b) for _, b in rows]


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (2, 10, 0.03857421875),  # by hand: 2 (1 + 12 + 66) / 2^12
        (0, 5, 0.0625),
        (7, 7, 1.0),
        (31, 12, 0.005401572654591291),
        (1, 0, 1.0),
        (120, 83, 0.011330084012628094),
        (0, 0, 1.0),
    ],
)
def test_acceptance_6_mcnemar_is_exact(only_a, only_b, p):
    a, b = pairs(only_a, only_b)
    assert discordant(a, b) == (only_a, only_b)
    assert mcnemar(a, b) == pytest.approx(p, abs=1e-6)
    assert mcnemar(b, a) == pytest.approx(p, abs=1e-6)


def test_acceptance_6_odds_ratio_and_its_exact_interval():
    ratio, interval = paired_odds_ratio(*pairs(2, 10))
    assert ratio == pytest.approx(0.2, abs=1e-6)
    assert interval == pytest.approx((0.021307044212004904, 0.9385019885695386), abs=1e-6)
    shares = binomtest(31, 43).proportion_ci(0.95, "exact")
    ratio, interval = paired_odds_ratio(*pairs(31, 12))
    assert ratio == pytest.approx(31 / 12, abs=1e-6)
    assert interval == pytest.approx([share / (1 - share) for share in shares], abs=1e-6)
    assert paired_odds_ratio(*pairs(3, 0))[0] == math.inf
    assert paired_odds_ratio(*pairs(3, 0))[1][1] == math.inf
    assert paired_odds_ratio(*pairs(0, 3))[0] == paired_odds_ratio(*pairs(0, 3))[1][0] == 0
    assert math.isnan(paired_odds_ratio(*pairs(0, 0))[0])


def test_acceptance_6_benjamini_hochberg():
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216]
    known = [0.01, 0.04, 0.084, 0.084, 0.084, 0.1, 0.10571428571428572, 0.216, 0.216, 0.216]
    assert benjamini_hochberg(p) == pytest.approx(known, abs=1e-6)
    rng = random.Random(1)
    drawn = [rng.random() ** 3 for _ in range(40)]
    assert benjamini_hochberg(drawn) == pytest.approx(false_discovery_control(drawn).tolist(), abs=1e-6)
    assert benjamini_hochberg([0.2]) == [0.2]


def test_wilcoxon_takes_one_number_a_task():
    rng = random.Random(2)
    groups = [task for task in range(30) for _ in range(5)]
    a = [rng.random() < 0.7 for _ in groups]
    b = [rng.random() < 0.4 for _ in groups]
    means = [sum(x - y for x, y, g in zip(a, b, groups) if g == task) / 5 for task in range(30)]
    means = [round(mean, 12) for mean in means if mean]
    assert grouped_wilcoxon(a, b, groups) == pytest.approx(wilcoxon(means).pvalue, abs=1e-6)
    assert grouped_wilcoxon(a, a, groups) == 1
    with pytest.raises(ValueError, match="differ in length"):
        grouped_wilcoxon(a, b[1:], groups)


def test_one_task_is_one_witness_however_often_it_is_sampled():
    a, b, groups = [True] * 40, [False] * 20 + [True] * 20, [0] * 20 + [1] * 20
    assert mcnemar(a, b) < 1e-5
    assert grouped_wilcoxon(a, b, groups) == 1
