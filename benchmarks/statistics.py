"""What runs of a random algorithm on several tasks say, with 95 % intervals: pure functions on arrays of scores.

Scores come as one array per task, an entry for each run. A bootstrap draws new runs within each task (stratified): the
tasks are chosen, not drawn, and how hard one is compared with another must not look like noise. Every run counts once.
A run that failed is a score like the others, see `rlhf_gym.benchmarks.outcomes`; nothing here leaves one out.

Source:
    Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .cells import mean_and_half_width

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A number and its interval; the ends are NaN where the data allow none. Arrays where there are several."""

    value: Any
    low: Any
    high: Any


def iqm(scores: np.ndarray, axis: int = -1) -> Any:
    """Interquartile mean: of the middle half of the scores.

    Less noisy than the median, and a few runs that blow up do not decide it, as they would the mean. It cuts whole
    runs: a quarter of them, rounded down, at each end.
    """
    from scipy.stats import trim_mean

    return trim_mean(scores, 0.25, axis=axis)


def bootstrap(
    tasks: Sequence[np.ndarray],
    statistic: Callable[..., Any] = iqm,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """A statistic of all runs, with its stratified percentile interval.

    Args:
        tasks: Scores of the runs on each task. Shapes (N,) or (N, K), N per task; with K columns (points of a curve) a
            run is drawn with its whole row.
        statistic: Takes runs and ``axis``.
        num_resamples: Draws of new runs.
        seed: Of the draws.

    Returns:
        A number, or an array (K,) each. The interval is NaN where every task has one run: such a bootstrap would find
        no spread at all.

    Raises:
        ValueError: If a task has no run.
    """
    tasks = [np.asarray(scores, dtype=float) for scores in tasks]
    if not tasks or min(map(len, tasks)) == 0:
        raise ValueError("a bootstrap needs at least one task and one run on each; leave tasks without runs out")
    value = statistic(np.concatenate(tasks), axis=0)
    if max(map(len, tasks)) == 1:
        return Estimate(value, np.full_like(value, math.nan)[()], np.full_like(value, math.nan)[()])
    rng = np.random.default_rng(seed)
    drawn = [scores[rng.integers(len(scores), size=(num_resamples, len(scores)))] for scores in tasks]
    return Estimate(value, *_percentiles(statistic(np.concatenate(drawn, axis=1), axis=1)))


def improvement(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """Probability that a run of ours beats one of theirs on the same task, the mean over tasks; a tie is half.

    P = mean over tasks of U / (N M), U the statistic of Mann and Whitney, N and M the runs of the two. It says how
    often, not by how much.

    Args:
        ours: Scores on each task. Shapes (N,).
        theirs: Scores on the same tasks in the same order. Shapes (M,).
        num_resamples: Draws of new runs, of both.
        seed: Of the draws.
    """
    rng, value, resampled = np.random.default_rng(seed), [], []
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
        value.append(wins.mean())
        # How often each run is drawn; the same as comparing the runs that are drawn, without comparing them again.
        left, right = (
            rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=num_resamples) / len(x) for x in (a, b)
        )
        resampled.append(((left @ wins) * right).sum(1))
    if max(max(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)) == 1:
        return Estimate(float(np.mean(value)), math.nan, math.nan)
    low, high = _percentiles(np.mean(resampled, axis=0))
    return Estimate(float(np.mean(value)), float(low), float(high))


def profile(tasks: Sequence[np.ndarray], thresholds: np.ndarray, **options: Any) -> Estimate:
    """Performance profile: the share of runs with a score above each threshold, with pointwise intervals.

    Args:
        tasks: Scores of the runs on each task. Shapes (N,).
        thresholds: Shape (K,).
        options: Of `bootstrap`.

    Returns:
        Arrays of shape (K,).
    """
    above = [np.asarray(scores, dtype=float)[:, None] > thresholds for scores in tasks]
    return bootstrap(above, np.mean, **options)


def failure_rate(num_failed: int, num_runs: int) -> Estimate:
    """Share of the runs that failed, with the interval of Clopper and Pearson (never too narrow)."""
    from scipy.stats import binomtest

    found = binomtest(num_failed, num_runs).proportion_ci(CONFIDENCE, method="exact")
    return Estimate(num_failed / num_runs, float(found.low), float(found.high))


def mean(values: Sequence[float]) -> Estimate:
    """Mean with Student's interval; for the runs on one task."""
    middle, half = mean_and_half_width(values)
    return Estimate(middle, middle - half, middle + half)


def _percentiles(resampled: np.ndarray) -> Any:
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(resampled, [tail, 1 - tail], axis=0)
