"""People who compare, as a model: simulated ones with known faults, and a fit that finds the faults of real ones.

The model is Bradley and Terry's with three numbers for each annotator:

    logit P(left is chosen) = skill * (quality of left - quality of right) + left_bias + length_bias * length gap

with skill = 1 / temperature, and the length gap in hundreds of characters, left minus right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf_gym.intervals import CONFIDENCE, Estimate

from .judgements import Comparison, Item, Judgement
from .store import FeedbackStore

LENGTH_UNIT = 100
_NODES = np.linspace(-6.0, 6.0, 61)  # of the integral over a quality gap; the trapezoid rule is exact to 1e-8 here
_PRIOR_SPREADS = (10.0, 3.0, 3.0)  # of skill, left bias and length bias, on the logits


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Somebody who compares by the model above, and at times clicks anywhere."""

    name: str
    temperature: float = 1.0
    """In units of the reward, > 0: at a gap of one temperature 73 % of choices are right. Infinity knows nothing."""
    left_bias: float = 0.0
    """Added to the logit of the left response."""
    length_bias: float = 0.0
    """Added to the logit for every hundred characters by which the left response is longer."""
    random_rate: float = 0.0
    """Share of comparisons answered by a coin, in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 <= self.random_rate <= 1:
            raise ValueError(f"random_rate must be in [0, 1], got {self.random_rate}")
        for name in ("left_bias", "length_bias"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")

    def probability_left(self, reward_gap: np.ndarray | float, length_gap: np.ndarray | float = 0.0) -> np.ndarray:
        """How probably the left response is chosen.

        Args:
            reward_gap: Reward of left minus right. Any shape.
            length_gap: In hundreds of characters, left minus right. The same shape.
        """
        from scipy.special import expit

        logit = np.asarray(reward_gap) / self.temperature + self.left_bias + self.length_bias * np.asarray(length_gap)
        return self.random_rate / 2 + (1 - self.random_rate) * expit(logit)

    def compare(self, item: Item, rewards: Sequence[float], key: str, np_random: np.random.Generator) -> Judgement:
        """Compare the first two responses of an item, shown in random order.

        Args:
            item: What is judged.
            rewards: True reward of each response. Shape (responses,).
            key: Key of the judgement.
            np_random: Source of the order and the choice.

        Raises:
            ValueError: If the item has fewer than two responses, or another number of rewards.
        """
        if len(item.responses) < 2 or len(rewards) != len(item.responses):
            raise ValueError(
                f"item must have at least two responses and one reward for each, got {len(item.responses)} "
                f"and {len(rewards)}"
            )
        left, right = shown = (0, 1) if np_random.random() < 0.5 else (1, 0)
        length_gap = (len(item.responses[left]) - len(item.responses[right])) / LENGTH_UNIT
        probability = float(self.probability_left(rewards[left] - rewards[right], length_gap))
        choice = left if np_random.random() < probability else right
        return Judgement(key, self.name, item.id, Comparison(choice), shown)


class Choice(NamedTuple):
    """One comparison, as the fit sees it."""

    annotator: str
    pair: Hashable
    """Names the two responses, in one order whichever was shown left."""
    first_left: bool
    """Whether the first of the two was shown left."""
    left_won: bool
    length_gap: float = 0.0
    """In hundreds of characters, left minus right."""


@dataclass(frozen=True)
class FittedAnnotator:
    """What is known of an annotator, each number with its standard error and 95 % interval."""

    annotator: str
    num_comparisons: int
    skill: Estimate
    """1 / temperature: about 0 for one who clicks at random, below 0 for one who prefers the worse."""
    left_bias: Estimate
    length_bias: Estimate


def choices(store: FeedbackStore) -> list[Choice]:
    """The comparisons of a store that stand, without "tie" and "both bad"."""
    items = {item.id: item for item in store.items()}
    found = []
    for event in store.standing():
        judgement = event.judgement
        if isinstance(judgement.verdict, Comparison) and not isinstance(judgement.verdict.choice, str):
            left, right = judgement.shown
            texts = items[judgement.item].responses
            gap = (len(texts[left]) - len(texts[right])) / LENGTH_UNIT
            pair = (judgement.item, min(left, right), max(left, right))
            found.append(Choice(judgement.annotator, pair, left < right, judgement.verdict.choice == left, gap))
    return found


def fit_annotators(
    comparisons: Iterable[Choice], quality_gap: Mapping[Hashable, float] | None = None
) -> dict[str, FittedAnnotator]:
    """Fit the model to comparisons by maximum likelihood.

    Where the quality is unknown, the gap of each pair is drawn from a standard normal distribution and integrated out. It
    then is the unit of ``skill``, and people must have judged the same pairs: who agrees with the others is skilled.
    Fitting each gap instead would give every pair a parameter for a handful of choices, and all biases come out too large.

    A liking for length that all share cannot be told from long responses being better; give ``quality_gap`` where it is
    known. A wide normal prior (spread 10 for the skill, 3 for the biases, on the logits) keeps finite what has no maximum:
    one who always clicks left.

    Args:
        comparisons: See `choices`.
        quality_gap: Quality of the first response of each pair minus the second, in any unit; ``skill`` is then per that
            unit. None: unknown.

    Returns:
        The fit of each annotator by name, sorted.

    Raises:
        ValueError: If there are no comparisons, or a pair has no finite quality gap.
        RuntimeError: If the optimiser does not converge.

    Source:
        Bradley and Terry 1952; Chen et al. 2013, "Pairwise ranking aggregation in a crowdsourced setting", for the skill
        per annotator. Differs: marginal likelihood, biases, skills below 0.
    """
    from scipy.optimize import minimize
    from scipy.stats import norm

    data = list(comparisons)
    if not data:
        raise ValueError("comparisons must hold at least one choice between two responses, got none")
    names = sorted({choice.annotator for choice in data})
    likelihood = _Likelihood(data, names, quality_gap)
    start = np.concatenate([np.ones(len(names)), np.zeros(2 * len(names))])
    found = minimize(likelihood, start, jac=True, method="BFGS", options={"gtol": 1e-5 * len(data)})
    if not found.success and np.abs(found.jac).max() > 1e-3 * len(data):
        raise RuntimeError(f"the fit of {len(names)} annotators did not converge: {found.message}")
    at, unit = found.x, likelihood.unit
    if at[: len(names)].sum() < 0 and quality_gap is None:
        at[: len(names)] *= -1  # the other sign of all gaps and skills fits as well; most people are taken to be right
    errors = np.sqrt(np.diag(np.linalg.inv(_curvature(likelihood, at)))) / unit
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    values = [
        Estimate(float(value), float(value - z * error), float(value + z * error), float(error))
        for value, error in zip(at / unit, errors, strict=True)
    ]
    num = len(names)
    counts = np.bincount(likelihood.who, minlength=num)
    return {
        name: FittedAnnotator(name, int(counts[i]), values[i], values[num + i], values[2 * num + i])
        for i, name in enumerate(names)
    }


class _Likelihood:
    """Minus the log-likelihood, and its gradient, of (skills, left biases, length biases). Shape (3 * annotators,).

    Gaps and lengths are divided by their root mean square, so that the prior means the same in all units; ``unit`` is what
    the parameters are to be divided by.
    """

    def __init__(self, data: list[Choice], names: list[str], quality_gap: Mapping[Hashable, float] | None) -> None:
        place = {pair: index for index, pair in enumerate(dict.fromkeys(choice.pair for choice in data))}
        data = sorted(data, key=lambda choice: place[choice.pair])
        index = {name: i for i, name in enumerate(names)}
        self.who = np.array([index[choice.annotator] for choice in data])
        self.pair = np.array([place[choice.pair] for choice in data])
        self.starts = np.flatnonzero(np.diff(self.pair, prepend=-1))
        self.sign = np.where([choice.left_won for choice in data], 1.0, -1.0)[:, None]
        side = np.where([choice.first_left for choice in data], 1.0, -1.0)[:, None]
        length = np.array([choice.length_gap for choice in data])
        if quality_gap is None:
            gap, gap_scale = side * _NODES, 1.0
            weight = -(_NODES**2) / 2
            self.log_weight = weight - np.log(np.exp(weight).sum())
        else:
            known = np.array([quality_gap.get(choice.pair, math.nan) for choice in data], dtype=np.float64)
            if not np.isfinite(known).all():
                pair = data[int(np.flatnonzero(~np.isfinite(known))[0])].pair
                raise ValueError(f"quality_gap must have a finite number for each pair compared, not for {pair!r}")
            gap_scale = _scale(known)
            gap, self.log_weight = side * known[:, None] / gap_scale, np.zeros(1)
        length_scale = _scale(length)
        self.gap, self.length = gap, length / length_scale
        self.precision = np.repeat(np.array(_PRIOR_SPREADS) ** -2, len(names))
        self.unit = np.repeat([gap_scale, 1.0, length_scale], len(names))

    def __call__(self, parameters: np.ndarray) -> tuple[float, np.ndarray]:
        from scipy.special import expit, logsumexp

        skill, left, longer = parameters.reshape(3, -1)[:, self.who]
        logit = self.sign * (skill[:, None] * self.gap + (left + longer * self.length)[:, None])  # (choices, nodes)
        joint = np.add.reduceat(-np.logaddexp(0, -logit), self.starts) + self.log_weight  # (pairs, nodes)
        of_pair = logsumexp(joint, axis=1, keepdims=True)
        # The gradient of a log-integral is the mean of the gradient under what the choices say of the gap.
        slope = self.sign * expit(-logit) * np.exp(joint - of_pair)[self.pair]
        num = len(parameters) // 3
        gradient = [
            np.bincount(self.who, weights=each, minlength=num)
            for each in ((slope * self.gap).sum(1), slope.sum(1), slope.sum(1) * self.length)
        ]
        prior = float((self.precision * parameters**2).sum()) / 2
        return prior - float(of_pair.sum()), self.precision * parameters - np.concatenate(gradient)


def _curvature(likelihood: _Likelihood, at: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Second derivatives by central differences of the gradient. Shape (parameters, parameters)."""
    moves = np.eye(len(at)) * step
    rows = np.array([(likelihood(at + move)[1] - likelihood(at - move)[1]) / (2 * step) for move in moves])
    return (rows + rows.T) / 2


def _scale(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) or 1.0
