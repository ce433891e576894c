"""What held-out judgements say of a reward model and of simple models: JSON, Markdown and a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_gym.atomic import write_json, write_text
from rlhf_gym.intervals import Estimate
from rlhf_gym.plots import STYLES
from rlhf_gym.rewards import RewardInputs, as_reward
from rlhf_gym.rewards.classify import RECORDED
from rlhf_gym.rewards.ensemble import combine, disagreement_of

from .baselines import ORDERS, fit_baseline
from .config import RewardModelConfig
from .examples import Examples
from .losses import ordered
from .metrics import Predictions, measure, pairs_of, wilson
from .model import RewardModel, split_by_item, texts_of
from .objectives import RegressionObjective, make_objective

REWARD_MODEL, LONGER = "reward model", "longer"
MIN_SHOWN = 10  # judgements of a step of confidence in the picture; report.json has all of them
MAX_ANNOTATORS = 20  # in the table, those with the most judgements; report.json has them all
LABELS = {
    "accuracy": "accuracy",
    "log_loss": "log-loss, nats",
    "ece": "calibration error (ECE)",
    "rmse": "root mean square error",
    "mean_absolute_error": "mean absolute error",
    "correlation": "correlation with the rating",
    "rank_correlation": "rank correlation with the rating",
    "length_correlation": "correlation of score and length",
}


@dataclass(frozen=True)
class Report:
    """Numbers about held-out judgements."""

    kind: str
    num_judgements: int
    num_prompts: int
    num_ties: int
    """Pairs that were judged equally good."""
    models: dict[str, dict[str, Any]]
    """By model (the reward model first, then the baselines), what `rlhf_gym.reward_models.metrics.measure` found."""
    disagreement: float | None = None
    """Mean standard deviation of the members' scores; None for one member."""
    members: tuple[Estimate, ...] = ()
    """Accuracy of each member of an ensemble, where there is an accuracy."""

    @property
    def accuracy(self) -> Estimate | None:
        """That of the reward model; None for ratings."""
        return self.models[REWARD_MODEL].get("accuracy")

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: None for what is not known."""
        return _plain(dataclasses.asdict(self))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, as texts: a row for each number, a column for each model."""
        rows = []
        for name, label in LABELS.items():
            cells = [found.get(name) for found in self.models.values()]
            if any(cell is not None for cell in cells):
                rows.append([label, *map(_shown, cells)])
        for name in sorted({n for found in self.models.values() for n in found.get("gold", {})}):
            label = {"agreement": "agreement with gold", "rank_correlation": "rank correlation with gold"}.get(name)
            if label is not None:
                rows.append([label, *(_shown(found.get("gold", {}).get(name)) for found in self.models.values())])
        what = "accuracy" if self.accuracy is not None else "minus the absolute error"
        annotators = self.models[REWARD_MODEL]["annotators"].items()
        for annotator, (count, _) in sorted(annotators, key=lambda entry: -entry[1][0])[:MAX_ANNOTATORS]:
            cells = [found["annotators"].get(annotator) for found in self.models.values()]
            rows.append([f"{what}, {annotator} ({count})", *(_shown(cell and cell[1]) for cell in cells)])
        return ["", *self.models], rows

    def as_markdown(self) -> str:
        """The table with what has to be said about it."""
        header, rows = self.table()
        lines = ["| " + " | ".join(_cell(c) for c in row) + " |" for row in [header, ["---"] * len(header), *rows]]
        said = [
            f"{self.num_judgements} held-out judgements ({self.kind}) of {self.num_prompts} prompts; ± and [low, high] "
            "are 95 % intervals over prompts."
        ]
        if self.kind == "preference":
            said.append(
                f"Judged equal: {self.num_ties} of the pairs. They count in the log-loss, as half a win for each, and not "
                "in the accuracy; equal scores count as half right."
            )
        gold = self.models[REWARD_MODEL].get("gold", {}).get("agreement_of_the_judgements")
        if gold is not None:
            said.append(f"The judgements themselves agree with gold in a share of {gold}.")
        if self.disagreement is not None:
            said.append(f"The members disagree by a standard deviation of {self.disagreement:.3f} on average.")
            if self.members:
                said.append(f"Accuracy of the members: {', '.join(map(str, self.members))}.")
        return "\n".join([*said, "", *lines])

    def figure(self) -> Any:
        """How often each model is right when it is sure to some degree; of the reward model with 95 % intervals."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        axes = figure.add_subplot()
        curves = {name: found["calibration"] for name, found in self.models.items() if "calibration" in found}
        low = min((step["confidence"] for curve in curves.values() for step in curve), default=0.5)
        low = 0.5 if low >= 0.5 else 0.0
        axes.plot([low, 1], [low, 1], color="grey", linewidth=1, label="calibrated")
        for (name, curve), style in zip(curves.items(), STYLES * len(curves), strict=False):
            shown = [step for step in curve if step["count"] >= MIN_SHOWN] or curve
            x, y, n = (np.array([step[axis] for step in shown]) for axis in ("confidence", "accuracy", "count"))
            axes.plot(x, y, label=name, markersize=4, **style)
            if name == REWARD_MODEL:
                axes.fill_between(x, *wilson(y, n), color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="probability given to what it predicts", ylabel="share that is right", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def save(self, directory: Path) -> None:
        """Write ``report.json``, ``README.md`` and, where there are probabilities, ``calibration.png``."""
        write_json(directory / "report.json", self.as_dict())
        text = f"# Reward model\n\nMade by `rlhf-gym train-rm`; how is in `training.json`.\n\n{self.as_markdown()}\n"
        if "calibration" in self.models[REWARD_MODEL]:
            self.figure().savefig(directory / "calibration.png", dpi=150)
            text += "\n![How often it is right when it is sure to some degree](calibration.png)\n"
        write_text(directory / "README.md", text)


def make_report(model: RewardModel, held_out: Examples, training: Examples | None = None, gold: Any = None) -> Report:
    """Measure a reward model on judgements that it has not seen.

    Args:
        model: The reward model.
        held_out: The judgements.
        training: What it was trained on, for the baselines; None: no baselines.
        gold: A reward that knows the truth, in any form that ``reward=`` takes.
    """
    if gold is not None:
        held_out = with_gold(held_out, gold)
    outputs, thresholds, to_rating = _raw_outputs(model, held_out)
    prompts, responses = texts_of(held_out)
    scores = model.member_scores(prompts, responses)
    combined = combine(scores, model.rule, model.std_coef)
    predictions = {REWARD_MODEL: predict(held_out, outputs, thresholds, to_rating, combined)}
    if training is not None:
        objective = make_objective(training, RewardModelConfig(margins=False, center_coef=0.0))
        rating = (objective.mean, objective.std) if isinstance(objective, RegressionObjective) else (0.0, 1.0)
        # The class whose probability is the reward: the baselines' scores are of the same one.
        label = getattr(model.members[0].model.config, RECORDED).get("label")
        paid = -1 if label is None else held_out.classes.index(label)
        for name, order in ORDERS.items():
            baseline = fit_baseline(training, objective, order)
            steps = _ordered(baseline.fit.extra)
            predictions[name] = predict(held_out, baseline(held_out)[None], [steps], [rating], paid=paid)
        lengths = np.array([float(len(response)) for response in responses])
        if held_out.kind == "preference":
            predictions[LONGER] = Predictions(lengths)
    members: list[Estimate] = []
    if len(model.members) > 1:
        for k in range(len(model.members)):
            alone = predict(held_out, outputs[k : k + 1], thresholds[k : k + 1], to_rating[k : k + 1])
            members += [e for e in [measure(held_out, alone).get("accuracy")] if e is not None]
    pairs = pairs_of(held_out.items) if held_out.kind == "preference" else None
    return Report(
        held_out.kind,
        len(held_out),
        len({item.key for item in held_out.items}),
        0 if pairs is None else int(pairs.tied.sum()),
        {name: measure(held_out, each) for name, each in predictions.items()},
        float(disagreement_of(scores).mean()) if len(model.members) > 1 else None,
        tuple(members),
    )


def predict(
    examples: Examples,
    outputs: np.ndarray,
    thresholds: Sequence[np.ndarray],
    to_rating: Sequence[tuple[float, float]],
    scores: np.ndarray | None = None,
    paid: int = -1,
) -> Predictions:
    """From the outputs of K members to what they say together: the mean of their probabilities.

    Args:
        examples: The judgements.
        outputs: Shape (K, T, C).
        thresholds: Of ordinal levels, for each member.
        to_rating: Of ratings, for each member: rating = first + second * output.
        scores: The reward, shape (T,); when left out the mean of the first outputs, of classes P(``paid``).
        paid: The class whose probability is the reward.
    """
    from scipy.special import expit, softmax

    first = outputs[:, :, 0]
    if examples.kind == "multi-class":
        probabilities = softmax(outputs, axis=2).mean(0)
        return Predictions(probabilities[:, paid] if scores is None else scores, probabilities)
    scores = first.mean(0) if scores is None else scores
    if examples.kind == "preference":
        pairs = pairs_of(examples.items)
        return Predictions(scores, expit(first[:, pairs.better] - first[:, pairs.worse]).mean(0))
    if examples.kind == "regression":
        rated = [start + per * each for (start, per), each in zip(to_rating, first, strict=True)]
        return Predictions(scores, values=np.mean(rated, axis=0))
    if examples.kind == "binary":
        positive = expit(first).mean(0)
        return Predictions(scores, np.stack([1 - positive, positive], 1))
    above = np.mean([expit(each[:, None] - steps) for each, steps in zip(first, thresholds, strict=True)], axis=0)
    ends = np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], 1)
    levels = ends[:, :-1] - ends[:, 1:]
    return Predictions(scores, levels, values=levels @ np.arange(levels.shape[1]))


def _raw_outputs(model: RewardModel, examples: Examples) -> tuple[np.ndarray, list[np.ndarray], list[Any]]:
    """The outputs before normalisation, whose differences are logits, with thresholds and the way to ratings."""
    outputs, thresholds, to_rating = [], [], []
    for member in model.members:
        recorded = getattr(member.model.config, RECORDED)
        mean, spread = recorded.get("mean", 0.0), recorded.get("spread", 1.0)
        outputs.append(spread * (member.logits(*texts_of(examples)) - member.shift) + mean)
        thresholds.append(spread * np.array(recorded.get("thresholds", [])) + mean)
        per = recorded.get("rating_per_score", 1.0) / spread
        to_rating.append((recorded.get("rating_mean", 0.0) - per * mean, per))
    return np.stack(outputs), thresholds, to_rating


def with_gold(examples: Examples, gold: Any) -> Examples:
    """The judgements with the true scores of their responses, by a reward that knows them."""
    prompts, responses = texts_of(examples)
    empty: list[list[int]] = [[] for _ in prompts]
    scores = as_reward(gold).score(RewardInputs(prompts, responses, empty, empty)).total
    of_item = split_by_item(scores, examples.items)
    items = [
        dataclasses.replace(item, gold=tuple(map(float, own)))
        for item, own in zip(examples.items, of_item, strict=True)
    ]
    return dataclasses.replace(examples, items=items)


def _ordered(extra: np.ndarray) -> np.ndarray:
    import torch

    return ordered(torch.from_numpy(extra)).numpy() if len(extra) else extra


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Estimate) else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
