"""VarGrad: its gradient and its fixed point by enumeration, and that it is RLOO's first step (CORRECTNESS 14, 15)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import gymnasium as gym
import pytest
import torch
from worlds import make_envs, model

import rlhf_gym
from rlhf_gym.agents.functional import group_advantages, policy_loss_clipped
from rlhf_gym.agents.updates import accumulate_gradients
from rlhf_gym.agents.vargrad import VarGrad, group_variance
from rlhf_gym.benchmarks.fixed_points import make_task, measure

BETA = 0.3


@cache
def task(name, max_response_tokens):
    return make_task(gym.make(f"rlhf_gym/{name}-v0", max_response_tokens=max_response_tokens), BETA)


def logprobs_of(task, residual):
    """log pi and log pi_ref of the tokens of all responses. Both (N, R) float64."""
    logprobs = (task.reference + residual).log_softmax(-1)
    return (torch.where(task.mask, x[task.states, task.tokens], 0.0) for x in (logprobs, task.reference))


def expected_loss(task, residual, weights, group_size):
    """The loss in expectation over all groups of independent responses, each drawn with these probabilities (N,)."""
    logprobs, ref_logprobs = logprobs_of(task, residual)
    groups = torch.tensor(list(itertools.product(range(len(weights)), repeat=group_size)))
    rows = groups.flatten()
    per_row = group_variance(
        logprobs[rows],
        ref_logprobs[rows],
        task.payoffs.sum(1)[rows],
        task.mask[rows],
        kl_coef=BETA,
        group_size=group_size,
    )
    return (weights[groups].prod(1) @ per_row.reshape(groups.shape).mean(1)) / (2 * BETA)


@pytest.mark.parametrize(("max_response_tokens", "group_size"), [(4, 2), (2, 3)])
def test_expected_gradient_is_that_of_the_objective(max_response_tokens, group_size):
    listed = task("WoAiNi", max_response_tokens)
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(listed.reference.shape, dtype=torch.float64, generator=generator).requires_grad_()
    logprobs, ref_logprobs = logprobs_of(listed, policy)
    probability = logprobs.sum(1).exp()
    objective = probability @ (listed.payoffs.sum(1) - BETA * (logprobs - ref_logprobs).sum(1))
    (exact,) = torch.autograd.grad(objective, policy)
    loss = expected_loss(listed, policy, probability.detach(), group_size)
    (found,) = torch.autograd.grad(loss, policy)
    assert exact.norm() > 0.1 and (found + exact).abs().max() < 1e-10


@pytest.mark.parametrize(("name", "max_response_tokens"), [("WoAiNi", 4), ("Brackets", 6)])
def test_fixed_point_is_the_optimum_whoever_samples(name, max_response_tokens):
    """Responses of the reference for ever, no importance weights: the minimum is pi*(y) ~ pi_ref(y) exp(r / beta)."""
    listed = task(name, max_response_tokens)
    policy = torch.zeros_like(listed.reference).requires_grad_()
    _, ref_logprobs = logprobs_of(listed, policy)
    sampler = ref_logprobs.sum(1).exp()
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = expected_loss(listed, policy, sampler, 2)
        loss.backward()
        return loss

    start = closure().item()
    optimizer.step(closure)
    assert start > 0.01 and closure().item() < 1e-12
    logprobs, _ = logprobs_of(listed, policy)
    optimum = (ref_logprobs.sum(1) + listed.payoffs.sum(1) / BETA).softmax(0)
    assert logprobs.sum(1).exp().detach().numpy() == pytest.approx(optimum.numpy(), abs=1e-6)
    assert measure(listed, policy.detach()).regret < 1e-6


def test_the_agent_at_the_optimum_and_at_the_reference():
    """At pi* the variance is 0 on every sample; at the reference it is p (1 - p) of a score of 0 or 1."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=512, kl_coef=BETA)
    best = rlhf_gym.exact.solve(envs, BETA).policy.requires_grad_(True)
    for policy, expected, margin in ((best, 0.0, 1e-10), ("tabular", 0.24 * 0.76, 0.03)):
        agent = VarGrad(envs, policy=policy, seed=0, learning_rate=0.0)
        found = {}
        agent.learn(1, callback=lambda _, m, found=found: found.update(m))
        assert found["train/variance"] == pytest.approx(expected, abs=margin)
        assert found["train/loss"] == pytest.approx(found["train/variance"] / (2 * BETA))


def gradients(agent, batch, loss=None):
    agent.optimizer.zero_grad()
    accumulate_gradients(agent, batch, loss or agent.loss, torch.arange(len(batch)), "sequence_sum")
    return [p.grad.clone() for p in agent.policy.parameters()]


@pytest.fixture
def sampled():
    """An agent that is not the reference, and a rollout of four groups of four."""
    agent = VarGrad(make_envs(16, model=model(), kl_coef=0.1), policy=model(seed=1), seed=0, group_size=4)
    return agent, agent.collector.collect(seed=0).batch


def test_first_step_is_rloo(sampled):
    """KL in the reward, leave-one-out, sample by sample."""
    agent, batch = sampled
    advantages = group_advantages(batch.rewards.sum(1), 4)[:, None].expand_as(batch.rewards)

    def rloo(part, normaliser):
        logprobs = agent.policy(part)[0]
        per_token, _ = policy_loss_clipped(logprobs, part.logprobs, part.advantages, part.response_mask)
        return {"loss": per_token.sum() / normaliser}, {}

    expected = gradients(agent, replace(batch, advantages=advantages), rloo)
    for a, b in zip(gradients(agent, batch), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert max(g.abs().max() for g in expected) > 0.1


def test_constants_and_the_order_in_a_group_change_nothing(sampled):
    agent, batch = sampled
    before = gradients(agent, batch)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = (torch.arange(0, 16, 4)[:, None] + order).flatten()
    for other in (replace(batch, scores=batch.scores + 100.0), batch.rows(shuffled)):
        for a, b in zip(before, gradients(agent, other), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    across = batch.rows(torch.arange(16).roll(1))  # other groups are another loss
    assert max((a - b).abs().max() for a, b in zip(before, gradients(agent, across), strict=True)) > 0.1


@pytest.mark.parametrize("size", [1, 4, 9])
def test_micro_batches_keep_groups_whole(sampled, size):
    agent, batch = sampled
    whole = gradients(agent, batch)
    agent.config = replace(agent.config, micro_batch_size=size)
    for a, b in zip(whole, gradients(agent, batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_learns():
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    agent = VarGrad(envs, policy="tabular", seed=0, learning_rate=0.05).learn(8_000)
    assert rlhf_gym.exact.evaluate(agent, envs).normalised > 0.98


def test_group_size_must_fit():
    envs = make_envs(6, kl_coef=0.1)
    with pytest.raises(ValueError, match="group_size must divide the environment's 6 rows, got 8"):
        VarGrad(envs)
    with pytest.raises(ValueError, match="group_size must be an integer >= 2, got 1"):
        VarGrad(envs, group_size=1)
