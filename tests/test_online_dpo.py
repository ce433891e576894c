"""Online DPO: what soft and hard labels lead to, by enumeration; pairs by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import gymnasium as gym
import pytest
import torch
from worlds import make_envs, model

import rlhf_gym
from rlhf_gym.agents.functional import dpo_loss
from rlhf_gym.agents.online_dpo import OnlineDPO, pairs_of_groups
from rlhf_gym.agents.updates import accumulate_gradients
from rlhf_gym.benchmarks.fixed_points import make_task, measure

BETA = 0.3


# ---- the loss


def test_loss_by_hand():
    log_ratios = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    preferences = torch.tensor([1.0, 0.0, 0.25, 0.7], dtype=torch.float64)
    won, lost = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))  # -log sigmoid(.5), -log sigmoid(-.5)
    expected = [won, lost, 0.25 * won + 0.75 * lost, math.log(2)]
    assert dpo_loss(log_ratios, preferences, kl_coef=0.5).tolist() == pytest.approx(expected, abs=1e-12)


def test_soft_labels_have_a_best_margin_and_hard_ones_have_none():
    """With P = sigmoid(r_1 - r_2) it is r_1 - r_2 = .7; a certain preference wants ever more."""
    log_ratios = torch.stack([torch.linspace(-100, 100, 20_001, dtype=torch.float64), torch.zeros(20_001)], 1)
    soft = dpo_loss(log_ratios, torch.tensor(0.7).double().sigmoid().expand(20_001), kl_coef=0.1)
    assert 0.1 * log_ratios[soft.argmin(), 0].item() == pytest.approx(0.7, abs=1e-3)
    hard = dpo_loss(log_ratios, torch.ones(20_001).double(), kl_coef=0.1)
    assert (hard.diff() < 0).all()


def test_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"log_ratios must have shape \(P, 2\) and preferences \(P,\)"):
        dpo_loss(torch.zeros(3, 2), torch.zeros(3, 1), kl_coef=0.1)
    with pytest.raises(ValueError, match="log_ratios must have shape"):
        dpo_loss(torch.zeros(3), torch.zeros(3), kl_coef=0.1)


def test_huge_margins_are_finite():
    log_ratios = torch.tensor([[1e6, -1e6], [-1e6, 1e6]], requires_grad=True)
    loss = dpo_loss(log_ratios, torch.tensor([1.0, 1.0]), kl_coef=1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 2e6] and log_ratios.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


# ---- pairs


def test_pairs_of_groups_by_hand():
    scores = torch.tensor([0.0, 2.0, 2.0, 5.0, 5.0, 5.0])
    assert pairs_of_groups(scores, 3, "all").tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]]
    # Of equals the first is the best and the last is the worst: never one and the same.
    assert pairs_of_groups(scores, 3, "best_worst").tolist() == [[1, 0], [3, 5]]
    assert pairs_of_groups(scores, 2, "best_worst").tolist() == [[1, 0], [3, 2], [4, 5]]


def gradients(agent, batch):
    agent.optimizer.zero_grad()
    stats = accumulate_gradients(agent, batch, agent.loss, torch.arange(len(batch)), "sequence_sum")
    return [p.grad.clone() for p in agent.policy.parameters()], stats


def sampled(group_size=4, **config):
    """An agent that is not the reference, and a rollout of sixteen."""
    envs = make_envs(16, model=model(), kl_coef=0.1)
    agent = OnlineDPO(envs, policy=model(seed=1), seed=0, group_size=group_size, **config)
    return agent, agent.collector.collect(seed=0).batch


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_of_two_there_is_one_pair():
    agent, batch = sampled(group_size=2)
    (every, stats) = gradients(agent, batch)
    agent.config = replace(agent.config, pairs="best_worst")
    (best_worst, stats_again) = gradients(agent, batch)
    assert_same(every, best_worst)
    assert stats == pytest.approx(stats_again, abs=1e-5)


@pytest.mark.parametrize("pairs", ["all", "best_worst"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_constants_order_and_micro_batches_change_nothing(pairs, labels):
    agent, batch = sampled(pairs=pairs, labels=labels)
    expected, _ = gradients(agent, batch)
    assert max(g.abs().max() for g in expected) > 1e-2
    assert_same(gradients(agent, replace(batch, scores=batch.scores + 100.0))[0], expected)
    if pairs == "all":  # which of equals is the best depends on the order
        shuffled = (torch.arange(0, 16, 4)[:, None] + torch.tensor([2, 0, 3, 1])).flatten()
        assert_same(gradients(agent, batch.rows(shuffled))[0], expected)
    for size in (1, 9):
        agent.config = replace(agent.config, micro_batch_size=size)
        assert_same(gradients(agent, batch)[0], expected)


# ---- where it leads


@cache
def listed(name="WoAiNi", max_response_tokens=4):
    """All responses of a small task, their log pi_ref and their scores."""
    task = make_task(gym.make(f"rlhf_gym/{name}-v0", max_response_tokens=max_response_tokens), BETA)
    return task, log_probs(task, torch.zeros_like(task.reference)), task.payoffs.sum(1)


def log_probs(task, residual):
    """log pi of every response, (N,) float64."""
    logprobs = (task.reference + residual).log_softmax(-1)
    return torch.where(task.mask, logprobs[task.states, task.tokens], 0.0).sum(1)


def minimise(name, length, preferences_of, iterations=500):
    """Follows the expected loss over all pairs of the reference's responses; the residual, the loss and the pairs."""
    task, reference, scores = listed(name, length)
    pairs = torch.cartesian_prod(*[torch.arange(len(reference))] * 2)
    weights, preferences = reference.exp()[pairs].prod(1), preferences_of(scores[pairs[:, 0]] - scores[pairs[:, 1]])
    policy = torch.zeros_like(task.reference).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [policy], max_iter=iterations, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        log_ratios = (log_probs(task, policy) - reference)[pairs]
        loss = weights @ dpo_loss(log_ratios, preferences, kl_coef=BETA)
        loss.backward()
        return loss

    optimizer.step(closure)
    return policy.detach(), closure().item(), weights, preferences


@pytest.mark.parametrize(("name", "length"), [("WoAiNi", 4), ("Brackets", 6)])
def test_soft_labels_lead_to_the_optimum_whoever_samples(name, length):
    """Pairs of the reference for ever, and no importance weights: the minimum is pi*(y) ~ pi_ref(y) exp(r / beta)."""
    task, reference, scores = listed(name, length)
    assert measure(task, torch.zeros_like(task.reference)).regret > 0.05
    policy, *_ = minimise(name, length, torch.sigmoid)
    optimum = (reference + scores / BETA).softmax(0)
    assert log_probs(task, policy).exp().numpy() == pytest.approx(optimum.numpy(), abs=1e-6)
    assert measure(task, policy).regret < 1e-6


def test_hard_labels_lead_to_certain_success_whatever_the_price():
    """The lowest loss, that of the pairs of equals, is never reached; responses of equal score keep the reference's odds."""
    task, reference, scores = listed()
    policy, loss, weights, preferences = minimise("WoAiNi", 4, lambda difference: (difference.sign() + 1) / 2)
    infimum = weights[preferences == 0.5].sum().item() * math.log(2)
    assert infimum < loss < infimum + 1e-4
    logprobs, failures = log_probs(task, policy), scores == 0
    found = measure(task, policy)
    assert found.reward > 0.999 and found.solution.reward < 0.9
    assert found.kl == pytest.approx(-math.log(0.24), abs=0.01)
    odds = (logprobs - reference)[failures]
    assert (odds - odds.mean()).abs().max() < 0.05


def test_the_agent_at_the_optimum():
    """Soft labels: each margin is the difference of scores, 1, and no sample has a gradient. Hard labels push on."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=256, kl_coef=BETA)
    for labels, least, most in (("soft", 0.0, 1e-6), ("hard", 1e-3, 1.0)):
        best = rlhf_gym.exact.solve(envs, BETA).policy.requires_grad_(True)
        agent = OnlineDPO(envs, policy=best, seed=0, labels=labels, learning_rate=0.05, num_minibatches=1)
        found = {}
        agent.learn(1, callback=lambda _, m, found=found: found.update(m))
        assert least <= found["train/grad_norm"] < most
        assert found["train/margin"] == pytest.approx(1.0, abs=1e-4) and found["train/accuracy"] == 1.0
        p = 0.8985
        assert found["train/equal_pairs"] == pytest.approx(p * p + (1 - p) ** 2, abs=0.06)
        after = rlhf_gym.exact.evaluate(agent, envs)
        assert after.reward == pytest.approx(p, abs=1e-3) if labels == "soft" else after.reward > p + 1e-3


def test_learns():
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    soft, hard = (
        rlhf_gym.exact.evaluate(
            OnlineDPO(envs, policy="tabular", seed=0, labels=labels, learning_rate=0.05).learn(8_000), envs
        )
        for labels in ("soft", "hard")
    )
    assert soft.normalised > 0.98 and hard.normalised < soft.normalised and hard.reward > soft.reward


def test_settings():
    envs = make_envs(6, kl_coef=0.1)
    for name, value, rule in (
        ("group_size", 1, "an integer >= 2"), ("pairs", "some", '"all" or "best_worst"'), ("labels", "firm", '"hard" or "soft"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be {rule}, got {value!r}"):
            OnlineDPO(envs, **{name: value})
