"""Agreement between annotators, against published worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_gym.feedback import cohen_kappa, krippendorff_alpha, reliability_table

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability": A (binary, two observers, no missing data), B (nominal,
# two observers, no missing data), C (any number of observers, missing data; the same data under three metrics).
BINARY = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
NOMINAL = [list("aabbdcccedda"), list("babbbccceddd")]
_ = None
MISSING = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]


@pytest.mark.parametrize(
    ("data", "level", "published"),
    [
        (BINARY, "nominal", 0.095),
        (NOMINAL, "nominal", 0.692),
        (MISSING, "nominal", 0.743),
        (MISSING, "ordinal", 0.815),
        (MISSING, "interval", 0.849),
    ],
)
def test_alpha_of_the_published_examples(data, level, published):
    assert round(krippendorff_alpha(data, level).mean, 3) == published
    as_nan = np.array([[math.nan if x is None else x for x in row] for row in data]) if data is MISSING else data
    assert krippendorff_alpha(as_nan, level).mean == krippendorff_alpha(data, level).mean


def test_alpha_of_all_pairs_by_hand():
    # Units (1, 1), (1, 3), (3, 3): n = 6, one unit in three disagrees. By pairs, D_e is 2 * 3 * 3 / (6 * 5).
    assert krippendorff_alpha([[1, 1, 3], [1, 3, 3]]).mean == pytest.approx(1 - (2 / 6) / (18 / 30))


def test_metrics_see_what_they_should():
    near, far = [[1, 2, 3, 4], [2, 2, 3, 4]], [[1, 2, 3, 4], [4, 2, 3, 4]]
    assert krippendorff_alpha(near, "interval").mean > krippendorff_alpha(far, "interval").mean
    # Only the order matters to "ordinal", only identity to "nominal".
    stretched = [[10**x for x in row] for row in near]
    assert krippendorff_alpha(near, "ordinal").mean == pytest.approx(krippendorff_alpha(stretched, "ordinal").mean)
    assert krippendorff_alpha(near, "interval").mean != pytest.approx(krippendorff_alpha(stretched, "interval").mean)
    shuffled = [[{1: "d", 2: "a", 3: "c", 4: "b"}[x] for x in row] for row in far]
    assert krippendorff_alpha(far).mean == pytest.approx(krippendorff_alpha(shuffled).mean)


def test_alpha_at_its_limits():
    rng = np.random.default_rng(0)
    assert krippendorff_alpha([[1, 2, 3]] * 5).mean == 1
    assert abs(krippendorff_alpha(rng.integers(0, 2, (3, 4000)), num_resamples=10).mean) < 0.03
    assert krippendorff_alpha([[0, 1] * 50, [1, 0] * 50]).mean == pytest.approx(-1, abs=0.02)
    for nothing in ([[1, 1], [1, 1]], [[1, None], [None, 1]], [[1, 2]], [[], []], []):
        found = krippendorff_alpha(nothing)
        assert math.isnan(found.mean) and found.low is None


def test_interval_is_seeded_and_covers():
    """Two people who agree with probability .8 and else guess: alpha is .8 in the limit."""
    rng = np.random.default_rng(1)
    held = 0
    for _trial in range(100):
        first, guess = rng.integers(0, 2, (2, 100))
        second = np.where(rng.random(100) < 0.8, first, guess)
        found = krippendorff_alpha([first, second], num_resamples=100)
        held += found.low <= 0.8 <= found.high
    assert 88 <= held <= 100  # 95 expected; the percentiles of 100 units fall short by a little
    assert krippendorff_alpha(MISSING, seed=3) == krippendorff_alpha(MISSING, seed=3)
    assert krippendorff_alpha(MISSING, seed=3).low != krippendorff_alpha(BINARY, seed=4).low


def pairs(table):
    first = [row for row, counts in enumerate(table) for count in counts for _i in range(count)]
    return first, [column for counts in table for column, count in enumerate(counts) for _i in range(count)]


def test_kappa_by_hand():
    # p_o = 140 / 200 = .70 and p_e = .5 * .6 + .3 * .3 + .2 * .1 = .41, in the manner of Cohen 1960.
    found = cohen_kappa(*pairs([[88, 10, 2], [14, 40, 6], [18, 10, 12]]))
    assert found.mean == pytest.approx(0.29 / 0.59)


def test_kappa_of_the_published_example():
    # SAS/STAT 9.2, FREQ procedure, "Agreement study": .3449 with the asymptotic limits .2030 and .4868.
    found = cohen_kappa(*pairs([[10, 4, 1, 0], [5, 10, 12, 2], [2, 4, 12, 5], [0, 2, 6, 13]]))
    assert round(found.mean, 4) == 0.3449
    assert found.low == pytest.approx(0.2030, abs=0.03) and found.high == pytest.approx(0.4868, abs=0.03)


def test_kappa_of_two_who_never_say_the_same():
    assert cohen_kappa(["a", "a"], ["b", "b"]).mean == 0  # p_o = p_e = 0


def test_kappa_leaves_out_what_one_did_not_judge():
    assert cohen_kappa(["a", None, "b", "a"], ["a", "a", "b", math.nan]).mean == 1
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]).mean)
    assert math.isnan(cohen_kappa([], []).mean)


def test_table_from_judgements():
    said = [("bo", "u1", 1), ("al", "u2", 2), ("bo", "u2", 3), ("bo", "u1", 4)]
    assert reliability_table(said) == ([[None, 2], [4, 3]], ["al", "bo"], ["u1", "u2"])


@pytest.mark.parametrize(
    ("data", "level", "message"),
    [
        ([[1, 2], [1]], "nominal", "one entry per unit"),
        ([[1, 2], [1, 2]], "ratio", "level must be one of nominal, ordinal, interval, got 'ratio'"),
        ([["a"], ["b"]], "ordinal", "finite numbers unless level is 'nominal', got 'a'"),
        ([[math.inf], [1]], "interval", "finite numbers"),
        ([range(65), range(65)], "interval", "at most 64 different ones, got 65; round"),
    ],
)
def test_errors(data, level, message):
    with pytest.raises(ValueError, match=message):
        krippendorff_alpha(data, level)
