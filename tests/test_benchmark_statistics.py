"""Statistics of runs against scipy, closed forms, enumeration and hand values; and what a bootstrap must not do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlhf_gym.benchmarks import statistics

RNG = np.random.default_rng(0)
# As hard as they are unlike: tasks whose runs do not overlap.
TASKS = [RNG.normal(mean, scale, 10) for mean, scale in ((0.1, 0.05), (0.5, 0.1), (0.95, 0.02))]


def pooled_iqm(*samples, axis=-1):
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def test_iqm_by_hand():
    assert statistics.iqm(np.array([-100.0, 1, 2, 3, 4, 5, 6, 100])) == 3.5  # of 2, 3, 4, 5
    assert statistics.iqm(np.array([9.0, 0, 3, 1, 2])) == 2  # a quarter of five is one whole run
    np.testing.assert_array_equal(statistics.iqm(np.array([[0.0, 1, 2, 9], [5, 5, 5, 5]]), axis=1), [1.5, 5])


# ---- the bootstrap


def test_bootstrap_against_scipy():
    """scipy draws each of several samples by itself, which is what strata are."""
    found = statistics.bootstrap(TASKS, num_resamples=20_000)
    theirs = stats.bootstrap(
        TASKS, pooled_iqm, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(pooled_iqm(*TASKS), abs=1e-12)
    width = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_bootstrap_draws_within_tasks():
    """Negative control: runs of all tasks in one heap make the difference between tasks look like noise."""
    stratified, heap = statistics.bootstrap(TASKS), statistics.bootstrap([np.concatenate(TASKS)])
    assert stratified.value == heap.value
    assert stratified.high - stratified.low < 0.5 * (heap.high - heap.low)
    constant = statistics.bootstrap([np.full(4, 0.2), np.full(4, 0.9)], np.mean)
    assert constant == pytest.approx((0.55, 0.55, 0.55), abs=1e-12)


def test_bootstrap_against_enumeration():
    """Two runs on each of two tasks have 16 resamples, all as likely."""
    a, b = np.array([0.0, 1.0]), np.array([10.0, 14.0])
    draws = [np.mean([*x, *y]) for x in itertools.product(a, a) for y in itertools.product(b, b)]
    low, high = np.quantile(np.repeat(draws, 1000), [0.025, 0.975])
    assert statistics.bootstrap([a, b], np.mean, num_resamples=20_000) == (6.25, low, high) == (6.25, 5.0, 7.5)


def test_bootstrap_of_one_seed_has_no_interval():
    found = statistics.bootstrap([np.array([0.3]), np.array([0.9])], np.mean)
    assert found.value == pytest.approx(0.6) and math.isnan(found.low) and math.isnan(found.high)
    assert not math.isnan(statistics.bootstrap([np.array([0.3]), np.array([0.9, 1.0])], np.mean).low)
    for nothing in ([], [np.array([])]):
        with pytest.raises(ValueError, match="at least one task and one run on each"):
            statistics.bootstrap(nothing)


def test_bootstrap_of_curves_is_that_of_their_points():
    curves = [np.stack([scores, 1 - scores, 0 * scores + 0.5], axis=1) for scores in TASKS]
    found = statistics.bootstrap(curves)
    for k, column in enumerate(zip(*(curve.T for curve in curves), strict=True)):
        one = statistics.bootstrap(list(column))  # the same seed draws the same runs
        assert [end[k] for end in found] == pytest.approx(list(one), abs=1e-12)
    assert found.low[2] == found.high[2] == 0.5


def test_bootstrap_covers():
    """Of 95 % intervals of a mean, about as many hold the truth: a little fewer, with ten runs on each task."""
    rng = np.random.default_rng(3)
    truth, count, held = np.mean([0.0, 1.0, 5.0]), 300, 0
    for _ in range(count):
        tasks = [rng.normal(mean, 1, 10) for mean in (0, 1, 5)]
        found = statistics.bootstrap(tasks, np.mean, num_resamples=400, seed=int(rng.integers(1 << 31)))
        held += found.low <= truth <= found.high
    assert 0.88 <= held / count <= 0.98


def test_bootstrap_repeats():
    assert statistics.bootstrap(TASKS) == statistics.bootstrap(TASKS) != statistics.bootstrap(TASKS, seed=1)


# ---- pairs, profiles, failures, means


def test_improvement_against_mann_whitney():
    """The mean of U / (N M), ties half."""
    ours = [np.array([1.0, 2, 2, 5]), np.array([0.0, 0, 1])]
    theirs = [np.array([2.0, 2, 3]), np.array([0.0, -1, 4, 0])]
    expected = np.mean([
        stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in zip(ours, theirs, strict=True)
    ])  # fmt: skip
    found, back = statistics.improvement(ours, theirs), statistics.improvement(theirs, ours)
    assert found.value == pytest.approx(expected, abs=1e-12) and back.value == pytest.approx(1 - expected, abs=1e-12)
    assert statistics.improvement([[1.0, 2]], [[0.0, -1]]) == (1, 1, 1)  # always better
    assert statistics.improvement([[1.0, 1]], [[1.0, 1]]) == (0.5, 0.5, 0.5)
    assert math.isnan(statistics.improvement([[1.0]], [[0.0]]).low)


def test_interval_of_improvement_against_scipy():
    a, b = TASKS[0], TASKS[0] + RNG.normal(0.02, 0.05, 10)

    def share(x, y, axis=-1):
        return np.mean(x[..., :, None] > y[..., None, :], axis=(-2, -1))

    found = statistics.improvement([a], [b], num_resamples=20_000)
    theirs = stats.bootstrap(
        (a, b), share, n_resamples=20_000, method="percentile", vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval  # fmt: skip
    assert found.low == pytest.approx(theirs.low, abs=0.02) and found.high == pytest.approx(theirs.high, abs=0.02)


def test_profile_by_hand():
    tasks = [np.array([0.0, 1.0]), np.array([0.5, 0.5])]
    found = statistics.profile(tasks, np.array([-1.0, 0.0, 0.4, 0.5, 1.0]))
    np.testing.assert_array_equal(found.value, [1, 0.75, 0.75, 0.25, 0])  # more than, not as much as
    np.testing.assert_array_equal(found.low, [1, 0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(found.high, [1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("n", [1, 10, 120])
def test_failure_rate_by_its_closed_form(n):
    """None of n: (1 - p)^n = .025 at the upper end, and the other way round for all of n."""
    edge = 1 - 0.025 ** (1 / n)
    assert statistics.failure_rate(0, n) == pytest.approx((0, 0, edge), abs=1e-9)
    assert statistics.failure_rate(n, n) == pytest.approx((1, 1 - edge, 1), abs=1e-9)


def test_failure_rate_is_where_binomial_tails_are():
    found = statistics.failure_rate(3, 20)
    assert found.value == 0.15
    assert stats.binom.sf(2, 20, found.low) == pytest.approx(0.025, abs=1e-6)
    assert stats.binom.cdf(3, 20, found.high) == pytest.approx(0.025, abs=1e-6)


def test_mean_by_hand():
    half = 4.302653 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert statistics.mean([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-6)
