"""A linear head on fixed features, solved: on frozen trunks, and on bags of words as the baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .examples import Example
from .objectives import Objective, plain_objective

PENALTIES = tuple(float(10.0**k) for k in np.arange(2.0, -4.1, -0.5))
"""Tried from the largest down, each from the solution before."""
NUM_FOLDS = 4


class LinearFit:
    """outputs = features @ weight + bias.

    Attributes:
        weight: Shape (d, C), float64.
        bias: Shape (C,), float64.
        extra: The objective's parameters, shape (num_extra,), float64.
        penalty: The L2 penalty that was taken.
    """

    def __init__(self, parameters: np.ndarray, num_features: int, objective: Objective, penalty: float):
        size = num_features * objective.num_outputs
        self.weight = parameters[:size].reshape(num_features, objective.num_outputs)
        self.bias = parameters[size : size + objective.num_outputs]
        self.extra = parameters[size + objective.num_outputs :]
        self.penalty = penalty

    def __call__(self, features: Any) -> np.ndarray:
        """Outputs, shape (N, C)."""
        return features @ self.weight + self.bias


def fit_linear(
    features: Any, items: Sequence[Example], objective: Objective, *, weights: np.ndarray | None = None
) -> LinearFit:
    """Minimise the mean loss plus penalty / 2 * |weight|^2, with the penalty that cross-validation finds best.

    The folds are made of whole prompts; the bias bears no penalty. A convex problem (regression, logistic losses), so
    nothing depends on a seed.

    Args:
        features: Of the responses of the judgements one after the other: numpy (T, d), or a scipy sparse matrix.
        items: The judgements.
        objective: Their loss.
        weights: How often each judgement counts. Shape (B,); None: once.
    """
    weights = np.ones(len(items)) if weights is None else weights
    folds = np.array([int(hashlib.sha256(item.key.encode()).hexdigest()[:8], 16) % NUM_FOLDS for item in items])
    rows = np.repeat(np.arange(len(items)), [len(item.responses) for item in items])
    plain = plain_objective(objective)
    totals = np.zeros(len(PENALTIES))
    for fold in range(NUM_FOLDS) if len(set(folds)) > 1 else ():
        inside, outside = folds != fold, folds == fold
        if not (inside.any() and outside.any()):
            continue
        training = [item for item, kept in zip(items, inside, strict=True) if kept]
        held_out = [item for item, kept in zip(items, outside, strict=True) if kept]
        path = _path(features[inside[rows]], training, objective, weights[inside], PENALTIES)
        for i, fit in enumerate(path):
            outputs = torch.from_numpy(fit(features[outside[rows]]))
            losses = plain.losses(outputs, held_out, torch.from_numpy(fit.extra)).numpy()
            totals[i] += float(losses @ weights[outside])
    best = int(np.argmin(totals)) if totals.any() else len(PENALTIES) // 2
    *_, found = _path(features, items, objective, weights, PENALTIES[: best + 1])
    return found


def _path(
    features: Any, items: Sequence[Example], objective: Objective, weights: np.ndarray, penalties: Sequence[float]
) -> list[LinearFit]:
    from scipy.optimize import minimize

    num = features.shape[1]
    at = np.zeros((num + 1) * objective.num_outputs + objective.num_extra)
    at[len(at) - objective.num_extra :] = objective.start().numpy()
    found = []
    for penalty in penalties:
        function = _loss(features, items, objective, weights / weights.sum(), penalty)
        at = minimize(function, at, jac=True, method="L-BFGS-B", options={"maxiter": 200, "gtol": 1e-5}).x
        found.append(LinearFit(at, num, objective, penalty))
    return found


def _loss(
    features: Any, items: Sequence[Example], objective: Objective, weights: np.ndarray, penalty: float
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    num, share, losses = features.shape[1], torch.from_numpy(weights), objective.prepare(items)

    def function(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        fit = LinearFit(parameters, num, objective, penalty)
        outputs = torch.from_numpy(fit(features)).requires_grad_()
        extra = torch.from_numpy(fit.extra).requires_grad_()
        loss = (losses(outputs, extra) * share).sum()
        loss.backward()
        slope = outputs.grad.numpy()
        of_extra = np.zeros(objective.num_extra) if extra.grad is None else extra.grad.numpy()
        gradient = [(features.T @ slope + penalty * fit.weight).ravel(), slope.sum(0) * objective.uses_bias, of_extra]
        return float(loss.detach()) + penalty / 2 * float((fit.weight**2).sum()), np.concatenate(gradient)

    return function
