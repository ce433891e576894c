"""Losses of reward models against hand numbers, enumeration and stationarity."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math

import numpy as np
import pytest
import torch

from rlhf_gym.reward_models.examples import Example
from rlhf_gym.reward_models.linear import _path, fit_linear
from rlhf_gym.reward_models.losses import ordered, orders_of, ordinal, plackett_luce
from rlhf_gym.reward_models.objectives import (
    BinaryObjective,
    MultiClassObjective,
    OrdinalObjective,
    PreferenceObjective,
    RegressionObjective,
)

NONE = torch.zeros(0)
BT1 = math.log(1 + math.exp(-1))  # -log sigmoid(1)


def pair(ranks=(0.0, 1.0), **more):
    return Example("p", ("a", "b"), ranks, **more)


@pytest.mark.parametrize("module", ["reward_models.losses", "rewards.sequences"])
def test_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"rlhf_gym.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_two_responses_are_bradley_and_terry():
    mask = torch.ones(2, 2, dtype=torch.bool)
    found = plackett_luce(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), mask, torch.tensor([0.5, 0.0]))
    np.testing.assert_allclose(found, [math.log(1 + math.exp(-0.5)), BT1 + 1], rtol=1e-6)


def test_rankings_are_a_distribution_and_masked_scores_do_not_count():
    scores = torch.tensor([0.3, -1.2, 2.0])
    orders = torch.tensor(list(itertools.permutations(range(3))))
    losses = plackett_luce(scores[orders], torch.ones(6, 3, dtype=torch.bool))
    assert math.isclose(float((-losses).exp().sum()), 1.0, rel_tol=1e-6)
    # exp(.3) / all three, then exp(-1.2) / the other two
    e = np.exp(scores.numpy())
    np.testing.assert_allclose((-losses[0]).exp(), e[0] / e.sum() * e[1] / e[1:].sum(), rtol=1e-6)
    for junk in (50.0, -50.0, math.nan):
        wide = torch.tensor([[2.0, 1.0, junk]], requires_grad=True)
        loss = plackett_luce(wide, torch.tensor([[True, True, False]])).sum()
        loss.backward()
        np.testing.assert_allclose(loss.item(), BT1, rtol=1e-6)
        assert wide.grad[0, 2] == 0 and bool(wide.grad.isfinite().all())


def test_orders_of_ties_and_smoothing():
    assert orders_of([1, 0]) == [((1, 0), 1.0)]
    found = dict(orders_of([0, 1, 1], label_smoothing=0.2))
    assert found == pytest.approx({(0, 1, 2): 0.4, (0, 2, 1): 0.4, (2, 1, 0): 0.1, (1, 2, 0): 0.1})
    with pytest.raises(ValueError, match="ties leave 120 orders"):
        orders_of([0] * 5)


@pytest.mark.parametrize(
    ("objective", "item", "expected"),
    [
        (PreferenceObjective(), pair(), BT1),
        (PreferenceObjective(), pair((1.0, 0.0)), BT1 + 1),
        (PreferenceObjective(), pair((3.0, 3.0)), BT1 + 0.5),  # half a win for each
        (PreferenceObjective(label_smoothing=0.1), pair(), 0.9 * BT1 + 0.1 * (BT1 + 1)),
        (PreferenceObjective(), pair(margin=1.0), math.log(2)),
        (PreferenceObjective(), pair((0.0, 0.0), margin=1.0), BT1 + 0.5),  # equal ones differ by no margin
        (PreferenceObjective(margins=False), pair(margin=1.0), BT1),
        (PreferenceObjective(center_coef=0.01), pair(), BT1 + 0.01 * 9),  # scores 2 and 1
    ],
)
def test_preference_objective(objective, item, expected):
    found = objective.losses(torch.tensor([[2.0], [1.0]]), [item], NONE)
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_judgements_of_several_sizes_in_one_batch():
    three = Example("p", ("a", "b", "c"), (2.0, 0.0, 1.0))
    scores = torch.tensor([[2.0], [1.0], [0.1], [0.7], [-0.4]])
    alone = [
        PreferenceObjective().losses(scores[rows], [item], NONE).item()
        for rows, item in ((slice(0, 2), pair()), (slice(2, 5), three))
    ]
    np.testing.assert_allclose(PreferenceObjective().losses(scores, [pair(), three], NONE), alone, rtol=1e-6)
    e = np.exp([0.7, -0.4, 0.1])  # from the best to the worst
    np.testing.assert_allclose(alone[1], -math.log(e[0] / e.sum() * e[1] / e[1:].sum()), rtol=1e-6)


def test_ordinal():
    thresholds = torch.tensor([-1.0, 0.5])
    scores = torch.tensor([0.2, -30.0, 30.0])
    p = torch.stack([(-ordinal(scores, torch.full((3,), level), thresholds)).exp() for level in range(3)])
    np.testing.assert_allclose(p.sum(0), 1, rtol=1e-5)
    above = 1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(0.3))
    np.testing.assert_allclose(p[:, 0], [1 - above[0], above[0] - above[1], above[1]], rtol=1e-5)
    far = torch.tensor([300.0, -300.0], requires_grad=True)
    ordinal(far, torch.tensor([1, 1]), thresholds).sum().backward()
    assert far.grad.tolist() == [1.0, -1.0]  # pulled back with full force, not lost in rounding
    free = OrdinalObjective([0.2, 0.3, 0.5]).start()
    np.testing.assert_allclose(torch.sigmoid(ordered(free)), [0.2, 0.5], rtol=1e-5)  # the shares at score 0


def test_labels():
    def loss(objective, outputs, target):
        return objective.losses(torch.tensor([outputs]), [Example("p", ("a",), target=target)], NONE).item()

    assert loss(RegressionObjective(3.0, 2.0), [0.5], 5.0) == pytest.approx(0.25)
    assert loss(BinaryObjective(), [1.0], 1.0) == pytest.approx(BT1)
    assert loss(BinaryObjective(0.1), [1.0], 1.0) == pytest.approx(0.9 * BT1 + 0.1 * (BT1 + 1))
    assert loss(MultiClassObjective(3), [0.0, 0.0, 0.0], 2.0) == pytest.approx(math.log(3))


def items_and_features(seed=0, n=40, d=3):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * n, d))
    truth = features @ np.array([2.0, -1.0, 0.0])
    wins = rng.random(n) < 1 / (1 + np.exp(truth[1::2] - truth[0::2]))
    items = [Example("p", ("a", "b"), (0.0, 1.0) if win else (1.0, 0.0), key=f"{i}") for i, win in enumerate(wins)]
    return items, features, np.where(wins[:, None], 1, -1) * (features[0::2] - features[1::2])


def test_linear_fit_is_where_the_gradient_vanishes():
    items, features, gaps = items_and_features()
    for fit in _path(features, items, PreferenceObjective(), np.ones(len(items)), (1.0, 0.01)):
        w = fit.weight[:, 0]
        gradient = -(gaps / (1 + np.exp(gaps @ w))[:, None]).mean(0) + fit.penalty * w
        np.testing.assert_allclose(gradient, 0, atol=1e-4)
        assert np.abs(w).max() > 0.05 and fit.bias[0] == 0


def test_linear_fit_weights_repeat_judgements_and_the_penalty_is_chosen():
    items, features, _ = items_and_features(n=60)
    weights = np.r_[np.full(30, 2.0), np.zeros(30)]
    twice = [item for item in items[:30] for _ in range(2)]
    rows = np.repeat(np.arange(60).reshape(30, 2), 2, axis=0).ravel()
    fit, repeated = (
        _path(f, i, PreferenceObjective(), w, (0.1,))[0]
        for f, i, w in ((features, items, weights), (features[rows], twice, np.ones(60)))
    )
    np.testing.assert_allclose(fit.weight, repeated.weight, atol=1e-3)
    chosen = fit_linear(features, items, PreferenceObjective())
    noise = fit_linear(np.random.default_rng(1).normal(size=features.shape), items, PreferenceObjective())
    assert chosen.weight[0, 0] > 0.5 > -0.2 > chosen.weight[1, 0]
    assert chosen.penalty < noise.penalty  # nothing to be learnt: as little as possible is
