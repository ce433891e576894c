"""Expert iteration: weights by hand, gradients and fixed points by enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache

import gymnasium as gym
import pytest
import torch
from worlds import make_envs, model

import rlhf_gym
from rlhf_gym.agents.batch import Rollout
from rlhf_gym.agents.expert_iteration import ExpertIteration, best_weights, optimal_weights
from rlhf_gym.agents.updates import accumulate_gradients
from rlhf_gym.benchmarks.fixed_points import make_task

BETA = 0.3


def test_best_weights_by_hand():
    scores = torch.tensor([1.0, 3.0, 3.0, 2.0, 0.0, -1.0, 5.0, 4.0])
    assert best_weights(scores, 4, 1).tolist() == [0, 4, 0, 0, 0, 0, 4, 0]  # the first among equals
    assert best_weights(scores, 4, 2).tolist() == [0, 2, 2, 0, 0, 0, 2, 2]
    assert best_weights(scores, 4, 3).tolist() == pytest.approx([0, 4 / 3, 4 / 3, 4 / 3, 4 / 3, 0, 4 / 3, 4 / 3])


def test_optimal_weights_by_hand():
    """Scores that are worth odds of 2 to 1 at kl_coef .5, and a response that the reference finds three times likelier."""
    two, three = 0.5 * torch.tensor(2.0).log(), torch.tensor(3.0).log()
    scores, log_ratio = torch.tensor([1.0 + two, 1.0, 7.0, 7.0]), torch.tensor([0.0, 0.0, three, 0.0])
    assert optimal_weights(scores, log_ratio, 2, 0.5).tolist() == pytest.approx([4 / 3, 2 / 3, 1.5, 0.5])
    huge = optimal_weights(torch.tensor([1e4, 0.0]), torch.zeros(2), 2, 0.01)
    assert huge.tolist() == [2.0, 0.0]


@cache
def listed():
    return make_task(gym.make("rlhf_gym/WoAiNi-v0", max_response_tokens=4), BETA)


@pytest.mark.parametrize("group_size", [2, 3])
def test_expected_gradient_of_best_is_that_of_the_score(group_size):
    """Score 0 or 1, success rate p: a group with both learns from a success, and the gradient of its log pi is that of
    p / p in the mean. So the whole is (1 - p^n - (1 - p)^n) / p times the gradient of p."""
    task, generator = listed(), torch.Generator().manual_seed(0)
    policy = torch.randn(task.reference.shape, dtype=torch.float64, generator=generator).requires_grad_()
    logprobs = (task.reference + policy).log_softmax(-1)
    logprobs = torch.where(task.mask, logprobs[task.states, task.tokens], 0.0).sum(1)
    scores, probability = task.payoffs.sum(1), logprobs.detach().exp()
    (exact,) = torch.autograd.grad(logprobs.exp() @ scores, policy, retain_graph=True)
    groups = torch.tensor(list(itertools.product(range(len(scores)), repeat=group_size)))
    weights = best_weights(scores[groups].flatten(), group_size, 1).reshape(groups.shape).double()
    contrast = (scores[groups] != scores[groups][:, :1]).any(1)
    chance = probability[groups].prod(1) * contrast
    loss = -(chance @ (weights * logprobs[groups]).mean(1))
    (found,) = torch.autograd.grad(loss, policy)
    p = (probability @ scores).item()
    factor = (1 - p**group_size - (1 - p) ** group_size) / p
    assert exact.norm() > 1e-2 and (found + factor * exact).abs().max() < 1e-12


def iterate(weights_of, times):
    """From the reference, the policy becomes what its weighted samples are distributed like, again and again."""
    task = listed()
    reference = torch.where(task.mask, task.reference[task.states, task.tokens], 0.0).sum(1)
    scores, probability = task.payoffs.sum(1), reference.exp()
    pairs = torch.cartesian_prod(*[torch.arange(len(scores))] * 2)
    for _ in range(times):
        chance = probability[pairs].prod(1)
        weights = weights_of(scores[pairs], (reference - probability.log())[pairs]) * chance[:, None] / 2
        probability = torch.zeros_like(probability).index_add(0, pairs.flatten(), weights.flatten())
        probability /= probability.sum()  # squared each time, the rounding error of a sum of 1 would grow
    return probability, reference, scores


def test_fixed_point_of_optimal_is_the_optimum():
    """Although weights are normalised in pairs, which makes each step too small."""

    def weights(scores, log_ratio):
        return optimal_weights(scores.flatten(), log_ratio.flatten(), 2, BETA).reshape(scores.shape)

    probability, reference, scores = iterate(weights, 60)
    optimum = (reference + scores / BETA).softmax(0)
    assert (reference.exp() - optimum).abs().max() > 0.5
    assert (probability - optimum).abs().max() < 1e-9
    once, *_ = iterate(weights, 1)
    share = 1 / (1 + math.exp(-1 / BETA))  # of the weight of a success beside a failure
    assert once @ scores == pytest.approx(0.24**2 + 2 * 0.24 * 0.76 * share, abs=1e-6)  # on the way to .8985


def test_fixed_point_of_best_is_success_with_the_odds_of_the_reference():
    """The best of two, again and again: success rates 1 - (1 - p)^2; those who fail keep their odds."""
    probability, reference, scores = iterate(
        lambda scores, _: best_weights(scores.flatten(), 2, 1).reshape(scores.shape).double(), 3
    )
    rates = [1 - (1 - 0.24) ** 8, (1 - 0.24) ** 8]
    failed = scores == 0
    assert [probability[~failed].sum().item(), probability[failed].sum().item()] == pytest.approx(rates)
    odds = probability[failed] / reference.exp()[failed]
    assert odds.max() - odds.min() < 1e-12


def sampled(**config):
    """An agent that is not the reference, and a rollout of four groups of four."""
    envs = make_envs(16, model=model(), kl_coef=0.1)
    agent = ExpertIteration(envs, policy=model(seed=1), seed=0, group_size=4, **config)
    return agent, agent.collector.collect(seed=0).batch


def gradients(agent, batch):
    batch = replace(batch, advantages=agent.weights(batch)[:, None].expand_as(batch.rewards))
    agent.optimizer.zero_grad()
    accumulate_gradients(agent, batch, agent.loss, torch.arange(len(batch)), "sequence_sum")
    return [p.grad.clone() for p in agent.policy.parameters()]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("weights", "baseline"), [("best", 0.0), ("optimal", 1.0)])
def test_gradient_on_fresh_samples(weights, baseline):
    """-mean_i (w_i - b) grad log pi(y_i): with "optimal" the ratio is 1, and what it takes away is 0 in expectation."""
    agent, batch = sampled(weights=weights)
    found = gradients(agent, batch)
    pull = agent.weights(batch) - baseline
    agent.optimizer.zero_grad()
    (-(pull * agent.policy(batch)[0].sum(1)).mean()).backward()
    expected = [p.grad for p in agent.policy.parameters()]
    assert max(g.abs().max() for g in expected) > 0.1
    assert_same(found, expected)


@pytest.mark.parametrize("weights", ["best", "optimal"])
def test_constants_and_micro_batches_change_nothing(weights):
    agent, batch = sampled(weights=weights)
    expected = gradients(agent, batch)
    assert_same(gradients(agent, replace(batch, scores=batch.scores + 100.0)), expected)
    for size in (1, 9):
        agent.config = replace(agent.config, micro_batch_size=size)
        assert_same(gradients(agent, batch), expected)


def test_groups_of_equals_are_no_examples():
    agent, batch = sampled(num_minibatches=1, learning_rate=0.1)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    metrics = agent.update(Rollout(replace(batch, scores=torch.full_like(batch.scores, 0.1))))
    assert (metrics["train/equal_groups"], metrics["train/n_updates"]) == (1.0, 0.0)
    assert all(torch.equal(p, kept) for p, kept in zip(agent.policy.parameters(), before, strict=True))
    metrics = agent.update(Rollout(replace(batch, scores=torch.eye(16)[5])))
    assert (metrics["train/equal_groups"], metrics["train/n_updates"]) == (0.75, 1.0)


def test_a_rollout_is_learnt_from_until_each_response_has_its_weight():
    """The pull ends once pi / pi_old is w; without that it would go on."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=4, kl_coef=BETA)
    agent = ExpertIteration(
        envs, policy="tabular", seed=3, group_size=4, weights="optimal", num_minibatches=1, num_epochs=300, learning_rate=0.05,
    )  # fmt: skip
    rollout = agent.collector.collect(seed=0)
    batch, agent.total_timesteps = rollout.batch, 1000
    weights = agent.weights(batch)
    assert 0 < batch.scores.sum() < 4 and weights.max() - weights.min() > 1
    agent.update(rollout)
    ratio = (agent.policy(batch)[0].sum(1) - batch.logprobs.sum(1)).exp()
    torch.testing.assert_close(ratio.detach(), weights, atol=0.02, rtol=0)


def test_at_the_optimum():
    """Optimal weights leave it alone, on every sample; the best responses pull on."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    for weights in ("optimal", "best"):
        best = rlhf_gym.exact.solve(envs, BETA).policy.requires_grad_(True)
        agent, found = ExpertIteration(envs, policy=best, weights=weights), {}
        agent.learn(1, callback=lambda _, m, found=found: found.update(m))
        assert found["train/grad_norm"] < 1e-4 if weights == "optimal" else found["train/grad_norm"] > 0.01
        if weights == "optimal":
            assert found["train/effective_samples"] == pytest.approx(1.0, abs=1e-4)


def test_learns():
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    optimal, best = (
        rlhf_gym.exact.evaluate(
            ExpertIteration(envs, policy="tabular", seed=0, weights=weights, learning_rate=0.05).learn(8_000), envs
        )
        for weights in ("optimal", "best")
    )
    assert optimal.normalised > 0.98 and best.normalised < optimal.normalised and best.reward > optimal.reward


def test_settings():
    envs = make_envs(8, kl_coef=0.0)
    with pytest.raises(ValueError, match="keep must be below group_size=4, got 4"):
        ExpertIteration(envs, group_size=4, keep=4)
    with pytest.raises(ValueError, match='weights must be "best" or "optimal", got \'all\''):
        ExpertIteration(envs, weights="all")
    ExpertIteration(envs).learn(10)  # knows no KL, needs none
    with pytest.raises(ValueError, match="ExpertIteration needs an environment with kl_coef > 0"):
        ExpertIteration(envs, weights="optimal").learn(10)
