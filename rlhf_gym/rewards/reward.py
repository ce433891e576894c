"""The reward: what scores responses, with a ledger of what each term contributed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .inputs import BATCH_NAMES, RewardError, RewardInputs, Scores, sum_terms
from .outputs import BadOutput, to_score

if TYPE_CHECKING:
    from rlhf_gym.lm import LanguageModel


class Reward:
    """Scores responses. Made by :func:`rlhf_gym.rewards.as_reward`; the environment calls it.

    Attributes:
        names: Terms of the ledger, in order.
        dense: Whether a term pays for each token. The score of a dense term is the sum of its token rewards.
        columns_needed: Columns that a term asks for by name and has no default for.
        needs_language_model: Whether a term waits for the environment's reference (:meth:`with_language_model`).
    """

    names: tuple[str, ...] = ()
    dense: bool = False
    columns_needed: tuple[str, ...] = ()
    needs_language_model: bool = False

    def score(self, inputs: RewardInputs) -> Scores:
        """Score finished responses.

        Args:
            inputs: B responses; never changed, whatever a reward function does with what it is given.

        Raises:
            RewardError: If a term fails, answers anything but one finite number per response, or lacks a column.
                Nothing has changed then.
        """
        raise NotImplementedError

    def token_rewards(self, inputs: RewardInputs) -> list[np.ndarray]:
        """What the dense terms pay for each token of each response, which need not be finished.

        Returns:
            B arrays of shape (len(completion_ids[b]),), float64. Entry t depends on tokens up to t only.
        """
        return [np.zeros(len(ids)) for ids in inputs.completion_ids]

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        """This reward with the reference given to the terms that wait for one; itself when none does."""
        return self

    def check_columns(self, available: Iterable[str]) -> None:
        """Refuse prompts that lack a column, or have one that makes it unclear how to call a function.

        Args:
            available: Names of the columns that every prompt has.

        Raises:
            RewardError: Naming the column, and where one is missing those that there are.
        """
        available = list(available)
        for column in self.columns_needed:
            if column not in available:
                near = difflib.get_close_matches(column, [*available, *BATCH_NAMES], n=1)
                raise RewardError(
                    f"the reward ({', '.join(self.names)}) asks for the column {column!r}, which the prompts lack; "
                    f"they have {', '.join(map(repr, available)) or 'no columns'}"
                    + (f" (did you mean {near[0]!r}?)" if near else "")
                    + "; add the column to every prompt or give the parameter a default",
                    function=self.names[0],
                )

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        """What scoring changes, running moments for instance: the live objects, in a fixed order."""
        return ()

    def __deepcopy__(self, memo: dict) -> Reward:
        # Gymnasium copies the arguments of an environment each time it is made; a reward may hold a model.
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"


class WeightedSum(Reward):
    """A weighted sum of rewards; the ledger is that of the parts, with the weights in it.

    Args:
        parts: Reward, finite weight, and the prefix of its terms: None keeps their names, otherwise a reward of one
            term is called ``prefix`` and one of several ``prefix/term``.

    Raises:
        ValueError: If there is no part, a weight is not a finite number, or two terms carry one name.
    """

    def __init__(self, parts: Sequence[tuple[Reward, float, str | None]]):
        if not parts:
            raise ValueError("a weighted reward must have at least one term, got none")
        self.parts = [
            (reward, check_number(f"weight of {prefix or reward.names[0]!r}", weight), prefix)
            for reward, weight, prefix in parts
        ]
        self.names = unique_names([name for reward, _, prefix in self.parts for name in _prefixed(reward, prefix)])
        self.dense = any(reward.dense for reward, _, _ in self.parts)
        self.columns_needed = tuple(
            dict.fromkeys(column for reward, _, _ in self.parts for column in reward.columns_needed)
        )
        self.needs_language_model = any(reward.needs_language_model for reward, _, _ in self.parts)

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        return WeightedSum(
            [(reward.with_language_model(language_model), weight, prefix) for reward, weight, prefix in self.parts]
        )

    def score(self, inputs: RewardInputs) -> Scores:
        terms: dict[str, np.ndarray] = {}
        totals: dict[str, np.ndarray] = {}  # the parts' own: their terms may cancel, see wrappers
        for reward, weight, prefix in self.parts:
            scores, names = reward.score(inputs), _prefixed(reward, prefix)
            terms |= dict(zip(names, (weight * part for part in scores.terms.values()), strict=True))
            totals[names[-1]] = weight * scores.total
        return Scores(sum_terms(totals), terms)

    def check_columns(self, available: Iterable[str]) -> None:
        for reward, _, _ in self.parts:
            reward.check_columns(available)

    @property
    def memory(self) -> tuple[dict[str, float], ...]:
        return tuple(memory for reward, _, _ in self.parts for memory in reward.memory)

    def token_rewards(self, inputs: RewardInputs) -> list[np.ndarray]:
        totals = super().token_rewards(inputs)
        for reward, weight, _ in self.parts:
            if reward.dense:
                totals = [
                    total + weight * part for total, part in zip(totals, reward.token_rewards(inputs), strict=True)
                ]
        return totals


def _prefixed(reward: Reward, prefix: str | None) -> list[str]:
    if prefix is None:
        return list(reward.names)
    return [prefix] if len(reward.names) == 1 else [f"{prefix}/{name}" for name in reward.names]


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: If one comes twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two reward terms are named {name!r}; name them yourself: "
                '{"first": (reward, 1.0), "second": (reward, 0.5)}'
            )
    return tuple(names)


def check_number(what: str, value: Any) -> float:
    """A finite number, as float.

    Raises:
        ValueError: If it is not one; ``what`` names it.
    """
    try:
        return to_score(value)
    except BadOutput:
        raise ValueError(f"{what} must be a finite number, got {value!r}") from None
