"""What each kind of reward model minimises: from a head's outputs for the texts of some judgements to their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import RewardModelConfig
from .examples import Example, Examples
from .losses import ordered, orders_of, ordinal, plackett_luce

Losses = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The loss of one kind of judgements.

    Attributes:
        num_outputs: C, outputs of the head.
        num_extra: Parameters of the loss itself, trained beside the model's.
        uses_bias: Whether a constant in the outputs matters. Preferences do not see it.
    """

    num_outputs = 1
    num_extra = 0
    uses_bias = True

    def start(self) -> Tensor:
        """First values of the extra parameters. Shape (num_extra,), float32."""
        return torch.zeros(self.num_extra)

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        """The loss of each of B judgements as a function of outputs and extra parameters.

        Returns:
            A function of outputs (T, C), the head's for the responses of the judgements one after the other, and extra
            (num_extra,), whose answer has the shape (B,): nats; squared error of standardised ratings for regression.
        """
        raise NotImplementedError

    def losses(self, outputs: Tensor, items: Sequence[Example], extra: Tensor) -> Tensor:
        """The same at once."""
        return self.prepare(items, outputs.device)(outputs, extra)


class PreferenceObjective(Objective):
    """Bradley and Terry's model of pairs, Plackett and Luce's of rankings; see `.losses`."""

    uses_bias = False

    def __init__(self, label_smoothing: float = 0.0, margins: bool = True, center_coef: float = 0.0):
        self.label_smoothing, self.margins, self.center_coef = label_smoothing, margins, center_coef

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        rows, weights, of_order, margins = [], [], [], []
        start = 0
        longest = max(len(item.responses) for item in items)
        for b, item in enumerate(items):
            # Only a pair has one margin, and it holds for the order that was given.
            margin = item.margin if self.margins and item.margin is not None and len(item.responses) == 2 else 0.0
            for order, weight in orders_of(item.ranks, self.label_smoothing):
                given = item.ranks[order[0]] < item.ranks[order[-1]]
                rows.append([start + i for i in order] + [-1] * (longest - len(order)))
                weights.append(weight)
                of_order.append(b)
                margins.append(margin if given else 0.0)
            start += len(item.responses)
        of_response = [b for b, item in enumerate(items) for _ in item.responses]
        index, order_owner, owner = (torch.tensor(v, device=device) for v in (rows, of_order, of_response))
        weight, margin = (torch.tensor(v, device=device, dtype=torch.float64) for v in (weights, margins))

        def losses(outputs: Tensor, extra: Tensor) -> Tensor:
            scores = outputs[:, 0]
            found = plackett_luce(scores[index.clamp(min=0)], index >= 0, margin.to(scores))
            zeros = scores.new_zeros(len(items))
            total = zeros.index_add(0, order_owner, found * weight.to(scores))
            if self.center_coef:
                total = total + self.center_coef * zeros.index_add(0, owner, scores).square()
            return total

        return losses


class RegressionObjective(Objective):
    """Squared error of ratings, in units of their standard deviation over the training data."""

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        targets = (_targets(items, device) - self.mean) / self.std
        return lambda outputs, extra: (outputs[:, 0] - targets.to(outputs)).square()


class OrdinalObjective(Objective):
    """Cumulative logits; the extra parameters are the thresholds, see `.losses.ordered`."""

    def __init__(self, shares: Sequence[float]):
        self.num_extra = len(shares) - 1
        self.shares = shares

    def start(self) -> Tensor:
        # The thresholds that give the levels their shares at a score of 0.
        below = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)[:-1].clamp(1e-3, 1 - 1e-3)
        thresholds = torch.logit(below)
        steps = thresholds.diff().clamp(min=1e-2).log()
        return torch.cat([thresholds[:1], steps]).float()

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        levels = _targets(items, device).long()
        return lambda outputs, extra: ordinal(outputs[:, 0], levels, ordered(extra.to(outputs)))


class BinaryObjective(Objective):
    """Logistic loss; the output is the logit of the positive class."""

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        targets = _targets(items, device)
        targets = targets + self.label_smoothing * (1 - 2 * targets)

        def losses(outputs: Tensor, extra: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs), reduction="none")

        return losses


class MultiClassObjective(Objective):
    """Cross-entropy of the softmax."""

    def __init__(self, num_classes: int, label_smoothing: float = 0.0):
        self.num_outputs, self.label_smoothing = num_classes, label_smoothing

    def prepare(self, items: Sequence[Example], device: torch.device | str = "cpu") -> Losses:
        targets = _targets(items, device).long()

        def losses(outputs: Tensor, extra: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

        return losses


def _targets(items: Sequence[Example], device: torch.device | str) -> Tensor:
    return torch.tensor([item.target for item in items], device=device, dtype=torch.float64)


def make_objective(examples: Examples, config: RewardModelConfig) -> Objective:
    """What training on these judgements minimises."""
    if examples.kind == "preference":
        return PreferenceObjective(config.label_smoothing, config.margins, config.center_coef)
    if examples.kind in ("regression", "ordinal") and config.label_smoothing:
        raise ValueError(f"label_smoothing is for preferences and classes, not ratings; got {config.label_smoothing}")
    targets = torch.tensor([item.target for item in examples.items], dtype=torch.float64)
    if examples.kind == "regression":
        std = float(targets.std(correction=0))
        return RegressionObjective(float(targets.mean()), std if math.isfinite(std) and std > 0 else 1.0)
    if examples.kind == "ordinal":
        counts = torch.bincount(targets.long(), minlength=len(examples.classes))
        return OrdinalObjective((counts / counts.sum()).tolist())
    if examples.kind == "binary":
        return BinaryObjective(config.label_smoothing)
    return MultiClassObjective(len(examples.classes), config.label_smoothing)


def plain_objective(objective: Objective) -> Objective:
    """The same without what only regularises: the likelihood, by which models are compared."""
    if isinstance(objective, PreferenceObjective):
        return PreferenceObjective(margins=False)
    if isinstance(objective, BinaryObjective):
        return BinaryObjective()
    if isinstance(objective, MultiClassObjective):
        return MultiClassObjective(objective.num_outputs)
    return objective
