"""Several rewards as one: their mean, the least of them, or the mean less what they disagree by.

A policy that is trained on one reward model finds what that model is wrong about. Models that were trained apart are
wrong
about different things: where they disagree, a careful rule pays less.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .classify import classifier
from .inputs import RewardInputs, Scores, sum_terms
from .resolve import as_reward
from .reward import Reward, check_number
from .text import check_choice

if TYPE_CHECKING:
    import torch

    from rlhf_gym.lm import LanguageModel

ENSEMBLE_FILE = "ensemble.json"
RULES = ("mean", "min", "mean-std")


def combine(scores: np.ndarray, rule: str, std_coef: float = 1.0) -> np.ndarray:
    """One score from those of K members.

    Args:
        scores: Shape (K, B), float64.
        rule: "mean"; "min", the least of the members; or "mean-std", mean - std_coef * std.
        std_coef: Price of disagreement, for "mean-std".

    Returns:
        Shape (B,), float64.

    Source:
        Coste et al. 2024, "Reward model ensembles help mitigate overoptimization". Differs: the standard deviation,
        which has the unit of the score, where they take the variance.
    """
    if rule == "min":
        return scores.min(0)
    return scores.mean(0) - (std_coef * disagreement_of(scores) if rule == "mean-std" else 0.0)


def disagreement_of(scores: np.ndarray) -> np.ndarray:
    """Standard deviation over the members (Bessel's), 0 for one member. Shape (K, B) -> (B,)."""
    return scores.std(0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])


class Ensemble(Reward):
    """See :func:`ensemble`.

    Attributes:
        members: K rewards.
        rule: How their scores are combined, see :func:`combine`.
        std_coef: Price of disagreement.
    """

    names = ("ensemble",)

    def __init__(self, members: Sequence[Reward], rule: str, std_coef: float):
        self.members, self.rule, self.std_coef = tuple(members), rule, std_coef
        self.columns_needed = tuple(dict.fromkeys(name for member in members for name in member.columns_needed))
        self.needs_language_model = any(member.needs_language_model for member in members)

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        return Ensemble([m.with_language_model(language_model) for m in self.members], self.rule, self.std_coef)

    def check_columns(self, available: Any) -> None:
        available = list(available)
        for member in self.members:
            member.check_columns(available)

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        return tuple(memory for member in self.members for memory in member.memory)

    def member_scores(self, inputs: RewardInputs) -> np.ndarray:
        """Score of each member for each response. Shape (K, B), float64."""
        return np.stack([member.score(inputs).total for member in self.members])

    def score(self, inputs: RewardInputs) -> Scores:
        terms = {self.names[0]: combine(self.member_scores(inputs), self.rule, self.std_coef)}
        return Scores(sum_terms(terms), terms)


class Disagreement(Reward):
    """See :func:`disagreement`."""

    names = ("disagreement",)

    def __init__(self, members: Ensemble):
        self.ensemble = members
        self.columns_needed, self.needs_language_model = members.columns_needed, members.needs_language_model

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        bound = self.ensemble.with_language_model(language_model)
        assert isinstance(bound, Ensemble), "an ensemble with a language model is one"
        return Disagreement(bound)

    def check_columns(self, available: Any) -> None:
        self.ensemble.check_columns(available)

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        return self.ensemble.memory

    def score(self, inputs: RewardInputs) -> Scores:
        terms = {"disagreement": disagreement_of(self.ensemble.member_scores(inputs))}
        return Scores(sum_terms(terms), terms)


def ensemble(
    members: Any, *, rule: str | None = None, std_coef: float | None = None, device: torch.device | str = "auto"
) -> Ensemble:
    """Several rewards as one.

    Args:
        members: A directory that ``rlhf-gym train-rm --members`` wrote, an :class:`Ensemble` (for another rule), or
            rewards of any form that ``reward=`` takes. Their scores should have one scale, as those of reward models
            have.
        rule: "mean", "min" or "mean-std", see :func:`combine`. None takes that of the directory, else "mean".
        std_coef: The price of disagreement under "mean-std", >= 0. None takes that of the directory, else 1.
        device: Where models go that are loaded here.

    Raises:
        ValueError: If there is no member, one is dense, or the rule is unknown.
    """
    recorded: dict[str, Any] = {}
    if isinstance(members, Ensemble):
        recorded, members = {"rule": members.rule, "std_coef": members.std_coef}, members.members
    elif isinstance(members, (str, os.PathLike)):
        directory = Path(members).expanduser()
        file = directory / ENSEMBLE_FILE
        if not file.is_file():
            raise ValueError(
                f"ensemble: {directory} holds no {ENSEMBLE_FILE}; give a list of rewards, or that directory"
            )
        recorded = json.loads(file.read_text(encoding="utf-8"))
        members = [classifier(directory / name, device=device) for name in recorded["members"]]
    rewards = [as_reward(member) for member in members]
    if not rewards:
        raise ValueError("ensemble: members must hold at least one reward, got none")
    for reward in rewards:
        if reward.dense:
            raise ValueError(
                f"ensemble: {', '.join(reward.names)} pays for each token; members must score whole responses"
            )
    rule = recorded.get("rule", "mean") if rule is None else rule
    check_choice("ensemble: rule", rule, RULES)
    price = check_number("ensemble: std_coef", recorded.get("std_coef", 1.0) if std_coef is None else std_coef)
    if price < 0:
        raise ValueError(f"ensemble: std_coef must be >= 0, got {price}")
    return Ensemble(rewards, rule, price)


def disagreement(members: Any) -> Disagreement:
    """How much the members disagree about a response: the standard deviation of their scores.

    As a metric of the environment (``metrics={"disagreement": disagreement(DIR)}``) it is reported and not paid; where
    it is large, people should be asked.

    Args:
        members: As of :func:`ensemble`.
    """
    return Disagreement(ensemble(members))
