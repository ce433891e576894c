"""Estimates with 95 % intervals *over prompts*: responses to one prompt are alike, so prompts are what is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
MAX_GROUPS = 50


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval; the two ends are None when one prompt alone says nothing about others."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            text = f"{self.mean:.3f}"
        elif math.isclose(self.high - self.mean, self.mean - self.low, rel_tol=1e-6, abs_tol=1e-9):
            text = f"{self.mean:.3f} ± {self.high - self.mean:.3f}"
        else:
            text = f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return text.replace("-0.000", "0.000")


def mean_estimate(values: np.ndarray, prompt_index: np.ndarray) -> Estimate:
    """Mean of one number per response with Student's interval.

    Each prompt counts once, with the mean of its responses; NaN entries are left out.

    Args:
        values: Shape (N,), float64.
        prompt_index: Which prompt each response answers. Shape (N,), integers.
    """
    from scipy.stats import t

    means = _prompt_means(values, prompt_index)
    if len(means) < 2:
        return Estimate(float(means.mean()) if len(means) else math.nan, None, None, None)
    mean, error = float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(means) - 1)) * error
    return Estimate(mean, mean - half, mean + half, error)


def share_estimate(happened: np.ndarray, prompt_index: np.ndarray) -> Estimate:
    """Share of responses of which something is true, with Wilson's interval for as many draws as there are prompts.

    Unlike Student's it has a width also where all agree: 10 of 10 is [.722, 1]. Where prompts have several responses it
    is wider than need be, since the spread of their means is at most that of a coin.

    Args:
        happened: Shape (N,), bool, or float64 with NaN where unknown.
        prompt_index: As in :func:`mean_estimate`.

    Source:
        Wilson 1927; Brown, Cai and DasGupta 2001, "Interval estimation for a binomial proportion".
    """
    from scipy.stats import norm

    means = _prompt_means(np.asarray(happened, dtype=np.float64), prompt_index)
    n = len(means)
    if n < 2:
        return Estimate(float(means.mean()) if n else math.nan, None, None, None)
    p, z = float(means.mean()), float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # Exactly 0 and 1 at the ends, where rounding would leave the estimate outside of its interval.
    return Estimate(p, min(p, centre - half), max(p, centre + half), float(means.std(ddof=1) / math.sqrt(n)))


def binomial_upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """One-sided upper bound of the probability of something that happened in so many of so many independent trials.

    Exact: the true probability is above it in at most 5 % of repetitions, however small the numbers. 0 of n gives
    1 - .05^(1/n), near 3 / n; 1 without a trial.

    Args:
        events: In 0 .. trials.
        trials: >= 0.
        confidence: In (0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial".

    Example:
        >>> round(binomial_upper_bound(0, 59), 4)  # 59 trials without one show "below 5 %"
        0.0495
    """
    from scipy.stats import beta

    if not 0 <= events <= trials or not 0 < confidence < 1:
        raise ValueError(
            f"events must be in 0 .. trials and confidence in (0, 1), got {events} of {trials} at {confidence}"
        )
    return 1.0 if events == trials else float(beta.ppf(confidence, events + 1, trials - events))


def bootstrap_estimate(
    statistic: Callable[[np.ndarray], float],
    sums: np.ndarray,
    prompt_index: np.ndarray,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
) -> Estimate:
    """A statistic of the whole corpus that depends on sums over its responses (BLEU, perplexity), with the bootstrap's percentiles.

    Prompts are drawn with replacement, each with all its responses.

    Args:
        statistic: From the sums, shape (k,), to a number.
        sums: What each response adds to the sums. Shape (N, k).
        prompt_index: As in :func:`mean_estimate`.
        seed: Seed of the resampling.
        num_resamples: Resamples, >= 1.

    Source:
        Efron and Tibshirani 1993, ch. 13; Koehn 2004 for BLEU.
    """
    prompts, row = np.unique(prompt_index, return_inverse=True)
    whole = float(statistic(sums.sum(0))) if len(sums) else math.nan
    if len(prompts) < 2:
        return Estimate(whole, None, None, None)
    per_prompt = np.zeros((len(prompts), sums.shape[1]), dtype=sums.dtype)
    np.add.at(per_prompt, row, sums)
    rng = np.random.default_rng(seed)
    times_drawn = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=num_resamples)
    found = np.array([statistic(resampled) for resampled in times_drawn.astype(sums.dtype) @ per_prompt])
    found = found[~np.isnan(found)]
    if not len(found):
        return Estimate(whole, None, None, None)
    low, high = np.quantile(found, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Estimate(whole, float(low), float(high), float(found.std()))


def jackknife_estimate(statistic: Callable[[np.ndarray], float], prompt_index: np.ndarray) -> Estimate:
    """A statistic of how responses differ from one another (distinct-n, self-BLEU), with the jackknife's interval.

    The prompts go into at most 50 groups, and the statistic is computed again without each. Not the bootstrap: it draws
    prompts twice, and then the same text twice is repetition that the policy did not make. Its interval for distinct-n
    lies below the estimate as a rule, and does not hold it.

    Args:
        statistic: From the responses to keep, shape (N,) bool, to a number.
        prompt_index: As in :func:`mean_estimate`.

    Source:
        Efron and Stein 1981, "The jackknife estimate of variance": too large rather than too small on average, whatever
        the statistic.
    """
    from scipy.stats import t

    prompts, row = np.unique(prompt_index, return_inverse=True)
    whole = float(statistic(np.ones(len(prompt_index), dtype=bool)))
    num_groups = min(len(prompts), MAX_GROUPS)
    if num_groups < 2:
        return Estimate(whole, None, None, None)
    without = np.array([statistic(row % num_groups != group) for group in range(num_groups)])
    if np.isnan(without).any():
        return Estimate(whole, None, None, None)
    error = math.sqrt((num_groups - 1) / num_groups * float(((without - without.mean()) ** 2).sum()))
    half = float(t.ppf(0.5 + CONFIDENCE / 2, num_groups - 1)) * error
    return Estimate(whole, whole - half, whole + half, error)


def _prompt_means(values: np.ndarray, prompt_index: np.ndarray) -> np.ndarray:
    """Mean over the responses to each prompt, NaN left out. Shape (number of prompts with a value,), float64."""
    known = ~np.isnan(values)
    prompts, row = np.unique(prompt_index[known], return_inverse=True)
    row = row.reshape(-1)
    return np.bincount(row, values[known], len(prompts)) / np.bincount(row, minlength=len(prompts))
