"""What held-out judgements say of predictions: accuracy, log-loss, calibration, length, annotators, gold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_gym.intervals import CONFIDENCE, Estimate, mean_estimate, share_estimate

from .examples import Example, Examples

NUM_BINS = 10
_SMALLEST = 1e-12  # probabilities are kept off 0, or one judgement would make the log-loss infinite


@dataclass(frozen=True)
class Predictions:
    """What a model says of T responses."""

    scores: np.ndarray
    """Shape (T,), float64: the reward."""
    probabilities: np.ndarray | None = None
    """Of compared responses P(the better one of each pair is preferred), shape (number of pairs,); of classes and
    levels (T, C); None for ratings."""
    values: np.ndarray | None = None
    """The rating, or the expected level. Shape (T,)."""


@dataclass(frozen=True)
class Pairs:
    """All pairs of compared responses: ``better`` and ``worse`` are places among the T responses."""

    better: np.ndarray
    worse: np.ndarray
    tied: np.ndarray
    """Judged equally good; then which is called better means nothing."""
    item: np.ndarray
    """The judgement that each belongs to."""


def pairs_of(items: Sequence[Example]) -> Pairs:
    """The pairs of each judgement."""
    found, start = [], 0
    for b, item in enumerate(items):
        for i in range(len(item.responses)):
            for j in range(i + 1, len(item.responses)):
                first, second = (i, j) if item.ranks[i] <= item.ranks[j] else (j, i)
                found.append((start + first, start + second, item.ranks[i] == item.ranks[j], b))
        start += len(item.responses)
    better, worse, tied, item_of = (np.array(column) for column in zip(*found, strict=True))
    return Pairs(better, worse, tied.astype(bool), item_of)


def prompt_index(items: Sequence[Example]) -> np.ndarray:
    """The number of each judgement's prompt. Shape (B,), int64."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(item.key, len(numbers)) for item in items], dtype=np.int64)


def measure(examples: Examples, predictions: Predictions) -> dict[str, Any]:
    """All numbers about one model's predictions, each an `Estimate`, a number or a dict of them."""
    items, index = examples.items, prompt_index(examples.items)
    if examples.kind == "preference":
        return _of_pairs(items, index, predictions)
    targets = np.array([item.target for item in items])
    lengths = np.array([len(item.responses[0]) for item in items], dtype=np.float64)
    found: dict[str, Any] = {}
    if predictions.probabilities is not None:
        chosen, confidence = predictions.probabilities.argmax(1), predictions.probabilities.max(1)
        right = (chosen == targets).astype(np.float64)
        of_truth = predictions.probabilities[np.arange(len(items)), targets.astype(int)]
        found["accuracy"] = share_estimate(right, index)
        found["log_loss"] = mean_estimate(-np.log(np.maximum(of_truth, _SMALLEST)), index)
        found["ece"] = calibration_error(confidence, right)
        found["calibration"] = calibration_curve(confidence, right)
        quality = right
    if predictions.values is not None:
        errors = predictions.values - targets
        found["rmse"] = float(np.sqrt(np.mean(errors**2)))
        found["mean_absolute_error"] = mean_estimate(np.abs(errors), index)
        found["correlation"] = correlation(predictions.values, targets)
        found["rank_correlation"] = rank_correlation(predictions.values, targets)
        quality = -np.abs(errors)
    found["length_correlation"] = correlation(predictions.scores, lengths)
    found["annotators"] = _by_annotator([item.annotator for item in items], quality, index)
    if any(item.gold is not None for item in items):
        gold = _gold(items)
        found["gold"] = {"rank_correlation": rank_correlation(predictions.scores, gold)}
    return found


def _of_pairs(items: Sequence[Example], index: np.ndarray, predictions: Predictions) -> dict[str, Any]:
    pairs = pairs_of(items)
    prompts = index[pairs.item]
    difference = predictions.scores[pairs.better] - predictions.scores[pairs.worse]
    lengths = np.array([len(response) for item in items for response in item.responses], dtype=np.float64)
    longer = lengths[pairs.better] - lengths[pairs.worse]
    right = np.where(pairs.tied, np.nan, wins(difference))
    found: dict[str, Any] = {"accuracy": share_estimate(right, prompts)}
    if predictions.probabilities is not None:
        p = np.clip(predictions.probabilities, _SMALLEST, 1 - _SMALLEST)
        # A tie is half a win for each, in the report as in training.
        losses = np.where(pairs.tied, -(np.log(p) + np.log1p(-p)) / 2, -np.log(p))
        found["log_loss"] = mean_estimate(losses, prompts)
        decided = ~pairs.tied
        confidence = np.maximum(p, 1 - p)[decided]
        found["ece"] = calibration_error(confidence, wins(p - 0.5)[decided])
        found["calibration"] = calibration_curve(confidence, wins(p - 0.5)[decided])
    # Which of two is called better is known; their order is turned round for half of the sum, so that the correlation
    # is about length and score, and not about chosen ones being longer.
    both = np.concatenate([difference, -difference]), np.concatenate([longer, -longer])
    found["length_correlation"] = correlation(*both)
    found["annotators"] = _by_annotator([items[b].annotator for b in pairs.item], right, prompts)
    if any(item.gold is not None for item in items):
        gold = _gold(items)
        gap = gold[pairs.better] - gold[pairs.worse]
        gap[gap == 0] = np.nan  # truly equal, and nothing to agree with
        known = np.where(np.isnan(gap), np.nan, wins(difference * np.sign(gap)))
        judged = np.where(np.isnan(gap) | pairs.tied, np.nan, gap > 0)
        found["gold"] = {
            "agreement": share_estimate(known, prompts),
            "agreement_of_the_judgements": share_estimate(judged, prompts),
            "rank_correlation": rank_correlation(predictions.scores, gold),
        }
    return found


def wins(difference: np.ndarray) -> np.ndarray:
    """1 where it is above 0, 1/2 where it is 0, else 0."""
    return (np.sign(difference) + 1) / 2


def calibration_curve(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """What a model that is sure to some degree gets right, in ten equal steps of confidence, without empty ones.

    Args:
        confidence: Probability that it gave to what it predicted. Shape (N,), in (0, 1].
        right: Whether that was right, 1/2 for a coin. Shape (N,).
    """
    low = float(np.min(confidence, initial=0.5))
    low = 0.5 if low >= 0.5 else 0.0  # more than two classes
    place = np.clip(((confidence - low) / (1 - low) * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    return [
        {
            "confidence": float(confidence[place == step].mean()),
            "accuracy": float(right[place == step].mean()),
            "count": int((place == step).sum()),
        }
        for step in range(NUM_BINS)
        if (place == step).any()
    ]


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean distance of the curve from the diagonal, each step with its share.

    Source:
        Guo et al. 2017, "On calibration of modern neural networks", eq. 3.
    """
    if not len(confidence):
        return math.nan
    curve = calibration_curve(confidence, right)
    return sum(step["count"] * abs(step["accuracy"] - step["confidence"]) for step in curve) / len(confidence)


def wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of Wilson's 95 % intervals of shares."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation; None where one of the two does not vary."""
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's correlation, with mean ranks of equal values, where ``y`` is not NaN; None where one does not vary."""
    from scipy.stats import rankdata

    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    return correlation(rankdata(x), rankdata(y))


def _gold(items: Sequence[Example]) -> np.ndarray:
    """True scores of all responses, NaN where unknown. Shape (T,)."""
    unknown = (math.nan,)
    return np.array([g for item in items for g in item.gold or unknown * len(item.responses)], dtype=np.float64)


def _by_annotator(
    annotators: Sequence[str | None], quality: np.ndarray, index: np.ndarray
) -> dict[str, tuple[int, Estimate]]:
    """Number of judgements and mean quality (accuracy, or minus the absolute error), by annotator."""
    names = sorted({name for name in annotators if name is not None})
    found = {}
    for name in names:
        own = np.array([annotator == name for annotator in annotators])
        shares = not (quality[own] < 0).any()
        estimate = share_estimate if shares else mean_estimate
        found[name] = (int(own.sum()), estimate(quality[own], index[own]))
    return found
