"""What training gives: one classifier or several that score texts, with their report, to be used or saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.atomic import replaced_directory
from rlhf_gym.rewards.classify import RECORDED, Classifier
from rlhf_gym.rewards.ensemble import ENSEMBLE_FILE, Ensemble, combine, disagreement_of, ensemble


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A trained reward model; ``reward=`` takes it as it is, or its directory."""

    members: tuple[Classifier, ...]
    kind: str
    """What it learnt from, see `RewardModelConfig.kind`."""
    rule: str = "mean"
    """How the scores of several members are combined, see `rlhf_gym.rewards.ensemble.combine`."""
    std_coef: float = 1.0
    """Price of disagreement under the rule "mean-std"."""
    details: dict[str, Any] = field(default_factory=dict)
    """How it was trained, JSON-able."""
    report: Any = None
    """What held-out judgements say of it; None when none were held out."""

    __name__ = "reward_model"

    def __deepcopy__(self, memo: dict) -> RewardModel:
        return self

    def __call__(
        self, prompts: list[str], completions: list[str], continuations: list[str] | None = None
    ) -> np.ndarray:
        """Scores of some responses. Shape (B,), float64."""
        return combine(self.member_scores(prompts, completions, continuations), self.rule, self.std_coef)

    def member_scores(
        self, prompts: list[str], completions: list[str], continuations: list[str] | None = None
    ) -> np.ndarray:
        """Score of each member. Shape (K, B), float64."""
        return np.stack([member(prompts, completions, continuations) for member in self.members])

    def disagreement(
        self, prompts: list[str], completions: list[str], continuations: list[str] | None = None
    ) -> np.ndarray:
        """Standard deviation over the members, 0 for one: what people should be asked about. Shape (B,), float64."""
        return disagreement_of(self.member_scores(prompts, completions, continuations))

    def preference_probability(self, scores: np.ndarray, others: np.ndarray) -> np.ndarray:
        """P(a is preferred to b) of a preference model: the mean over its members.

        Args:
            scores: Of the responses a, as `member_scores` gives them. Shape (K, B).
            others: Of the responses b. Shape (K, B).
        """
        from scipy.special import expit

        spread = np.array([[spread_of(member)] for member in self.members])
        return expit(spread * (scores - others)).mean(0)

    @property
    def reward(self) -> Ensemble:
        """The members as a reward with its rule."""
        return ensemble(self.members, rule=self.rule, std_coef=self.std_coef)

    def save(self, directory: str | Path) -> None:
        """Write a directory that ``reward=`` takes.

        One member is a directory of ``AutoModelForSequenceClassification.from_pretrained``; of several, each is one, in
        ``member_0``, ``member_1``, ... beside ``ensemble.json``. The report lies beside them. The directory appears
        whole or not at all.

        Raises:
            FileExistsError: If there is something else at ``directory``.
        """
        with replaced_directory(directory) as folder, _quiet():
            names = [f"member_{i}" for i in range(len(self.members))]
            for member, name in zip(self.members, names, strict=True):
                place = folder if len(self.members) == 1 else folder / name
                place.mkdir(exist_ok=True)
                member.model.save_pretrained(place)
                member.tokenizer.save_pretrained(place)
            if len(self.members) > 1:
                recorded = {"members": names, "rule": self.rule, "std_coef": self.std_coef}
                (folder / ENSEMBLE_FILE).write_text(json.dumps(recorded, indent=1))
            (folder / "training.json").write_text(json.dumps(self.details, indent=1, ensure_ascii=False))
            if self.report is not None:
                self.report.save(folder)


def spread_of(member: Classifier) -> float:
    """What a difference of scores is to be multiplied by to be a logit: the spread that normalisation divided by."""
    return float((getattr(member.model.config, RECORDED, None) or {}).get("spread", 1.0))


def texts_of(examples: Any) -> tuple[list[str], list[str]]:
    """Prompts and responses of all judgements, one after the other."""
    pairs = [(item.prompt, response) for item in examples.items for response in item.responses]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def split_by_item(values: np.ndarray, items: Sequence[Any]) -> list[np.ndarray]:
    """Values of texts, one array for each judgement. The last axis is split."""
    ends = np.cumsum([len(item.responses) for item in items])[:-1]
    return np.split(values, ends, axis=-1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
