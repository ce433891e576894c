"""Wrappers: clip, scale, running normalisation, length penalty. Each takes any reward and gives a reward.

What a wrapper changes is a term of its own in the ledger (``score/clip``, ...), so the terms always sum to the score
and show who did what.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .inputs import RewardInputs, Scores, sum_terms
from .resolve import as_reward
from .reward import Reward, WeightedSum, check_number, unique_names

if TYPE_CHECKING:
    from rlhf_gym.lm import LanguageModel


def clip(reward: Any, low: float | None = None, high: float | None = None) -> Reward:
    """Keep the score within [low, high]; None leaves a side open.

    Dense rewards are paid as they are, the correction with the last token.

    Raises:
        ValueError: If both are None, one is not finite, or low > high.
    """
    if low is None and high is None:
        raise ValueError("clip: give low, high or both")
    lowest = -math.inf if low is None else check_number("clip: low", low)
    highest = math.inf if high is None else check_number("clip: high", high)
    if lowest > highest:
        raise ValueError(f"clip: low must be <= high, got {low} and {high}")
    return _Clipped(as_reward(reward), lowest, highest)


def scale(reward: Any, factor: float) -> Reward:
    """Multiply the score, and every term of its ledger, by a finite number."""
    return WeightedSum([(as_reward(reward), check_number("scale: factor", factor), None)])


def normalize(reward: Any, *, epsilon: float = 1e-8) -> Reward:
    """(score - mean) / (std + epsilon), over all scores so far, the current batch included.

    mean and the biased std are running ones. It has a memory: a score depends on what was scored before, so the same
    responses in another order, stepwise or whole, score differently. Where that matters, normalise advantages in the
    agent instead. Evaluate with the reward that was wrapped, not with this. ``rlhf_gym.evaluation`` and scores that fail
    leave the memory as it was; every environment with the same reward object shares it, and checkpoints lack it.

    Raises:
        ValueError: If the reward is dense: what it paid for the first tokens was not normalised by what came later.
    """
    if not check_number("normalize: epsilon", epsilon) > 0:
        raise ValueError(f"normalize: epsilon must be > 0, got {epsilon}")
    inner = as_reward(reward)
    if inner.dense:
        raise ValueError(f"normalize: {inner.names} pays for each token; only whole scores can be normalised")
    return _Normalized(inner, float(epsilon))


def length_penalty(reward: Any, coef: float, *, free_tokens: int = 0) -> Reward:
    """Subtract ``coef`` for each token of the response beyond the first ``free_tokens``.

    Raises:
        ValueError: If ``coef`` or ``free_tokens`` is negative or not finite.
    """
    if check_number("length_penalty: coef", coef) < 0 or check_number("length_penalty: free_tokens", free_tokens) < 0:
        raise ValueError(f"length_penalty: coef and free_tokens must be >= 0, got {coef} and {free_tokens}")
    return _LengthPenalty(as_reward(reward), float(coef), int(free_tokens))


class _Adjusted(Reward):
    """A reward with one more term, computed from its score."""

    def __init__(self, inner: Reward, term: str):
        self.inner, self.term = inner, term
        self.names = unique_names([*inner.names, term])
        self.dense, self.columns_needed, self.needs_language_model = (
            inner.dense,
            inner.columns_needed,
            inner.needs_language_model,
        )

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        bound = copy.copy(self)
        bound.inner = self.inner.with_language_model(language_model)
        bound.needs_language_model = bound.inner.needs_language_model
        return bound

    def score(self, inputs: RewardInputs) -> Scores:
        scores = self.inner.score(inputs)
        total = self.adjusted(scores.total, inputs)
        terms = scores.terms | {self.term: total - scores.total}
        sum_terms(terms)  # refuses what is too large; its sum is not as exact as the total: 1e20 + (1 - 1e20) is 0
        return Scores(total, terms)

    def token_rewards(self, inputs: RewardInputs) -> list[np.ndarray]:
        return self.inner.token_rewards(inputs)

    def check_columns(self, available: Iterable[str]) -> None:
        self.inner.check_columns(available)

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        return self.inner.memory

    def adjusted(self, total: np.ndarray, inputs: RewardInputs) -> np.ndarray:
        """The score in place of the inner one. Both of shape (B,), float64."""
        raise NotImplementedError


class _Clipped(_Adjusted):
    def __init__(self, inner: Reward, low: float, high: float):
        super().__init__(inner, "clip")
        self.low, self.high = low, high

    def adjusted(self, total: np.ndarray, inputs: RewardInputs) -> np.ndarray:
        return np.clip(total, self.low, self.high)


class _LengthPenalty(_Adjusted):
    def __init__(self, inner: Reward, coef: float, free_tokens: int):
        super().__init__(inner, "length_penalty")
        self.coef, self.free_tokens = coef, free_tokens

    def adjusted(self, total: np.ndarray, inputs: RewardInputs) -> np.ndarray:
        lengths = np.array([len(ids) for ids in inputs.completion_ids], dtype=np.float64)
        return total - self.coef * np.maximum(0.0, lengths - self.free_tokens)


class _Normalized(_Adjusted):
    def __init__(self, inner: Reward, epsilon: float):
        super().__init__(inner, "normalize")
        self.epsilon = epsilon
        self.moments = {"count": 0, "mean": 0.0, "m2": 0.0}  # shared by copies that are bound to a language model

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        return (*super().memory, self.moments)

    def adjusted(self, total: np.ndarray, inputs: RewardInputs) -> np.ndarray:
        # Welford's update, one score at a time: no digits are lost when the mean is large.
        moments = self.moments
        for value in total.tolist():
            moments["count"] += 1
            difference = value - moments["mean"]
            moments["mean"] += difference / moments["count"]
            moments["m2"] += difference * (value - moments["mean"])
        std = math.sqrt(moments["m2"] / max(1, moments["count"]))
        return (total - moments["mean"]) / (std + self.epsilon)
