"""Soft Q-learning: targets by hand, gradient and fixed point by enumeration, sampling by somebody else."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import gymnasium as gym
import numpy as np
import pytest
import torch
from worlds import make_envs

import rlhf_gym
from rlhf_gym.agents.batch import Batch, Rollout
from rlhf_gym.agents.soft_q import SoftQ
from rlhf_gym.agents.updates import token_scores
from rlhf_gym.benchmarks.fixed_points import make_task
from rlhf_gym.lm import join_responses

BETA = 0.3


def envs(name="WoAiNi", **changes):
    return gym.make_vec(f"rlhf_gym/{name}-v0", num_envs=4, **{"kl_coef": BETA, **changes})


@cache
def listed(name, max_response_tokens):
    """All responses: tokens (N, R) and mask, what each token pays, and the state it is chosen in."""
    return make_task(gym.make(f"rlhf_gym/{name}-v0", max_response_tokens=max_response_tokens), BETA)


def every_response(agent, task):
    """A batch with each response once, as the environment pays the agent's policy for it."""
    base, count = agent.envs.unwrapped, len(task.tokens)
    prompts = [base.prompts[0].ids] * count
    ids, _, prompt_lengths = join_responses(prompts, task.tokens, task.mask, pad_token_id=base.pad_token_id)
    nothing = torch.zeros(task.mask.shape)
    batch = Batch(
        ids=ids, prompt_lengths=prompt_lengths, response_ids=task.tokens, response_mask=task.mask,
        logprobs=nothing, values=nothing,
        rewards=nothing, scores=nothing[:, 0], ended_by_eos=torch.ones(count, dtype=torch.bool), kl=nothing,
    )  # fmt: skip
    with torch.no_grad():
        logprobs, values, _ = agent.policy(batch)
    paid = base.evaluate_responses(prompts, task.tokens, task.mask, logprobs, [0] * count)
    return replace(
        batch, logprobs=logprobs, values=values, rewards=paid.rewards, scores=paid.scores, kl=paid.kl,
        ref_logprobs=paid.ref_logprobs,
    )  # fmt: skip


def randomise(agent):
    generator = torch.Generator().manual_seed(0)
    agent.policy.model.lm_head.residual.data.normal_(generator=generator)
    agent.policy.value_head.weight.data.normal_(generator=generator)


@pytest.mark.parametrize(
    ("td_lambda", "expected"),
    [
        (0.0, [0.5 + 2.0, 0.0 + 3.0, 1.0]),  # r_t + V(s_{t+1})
        # r_t and all later rewards minus their KL, .1 nats times a price of .5 each.
        (1.0, [0.5 + 0.0 - 0.05 + 1.0 - 0.05, 0.0 + 1.0 - 0.05, 1.0]),
        # Half of each: errors d = (1.45, .95, -2.05), Q = V + .05.
        (0.5, [1.05 + 1.45 + 0.475 - 0.5125, 2.05 + 0.95 - 1.025, 3.05 - 2.05]),
    ],
)
def test_targets_by_hand(td_lambda, expected):
    agent = SoftQ(make_envs(2, kl_coef=0.5), td_lambda=td_lambda)
    batch = agent.collector.collect(seed=0).batch
    row = torch.tensor([[True, True, True]])
    logprobs = torch.full((1, 3), -1.0)
    batch = replace(
        batch, response_mask=row, logprobs=logprobs, ref_logprobs=logprobs - 0.1, kl=torch.full((1, 3), 0.1),
        values=torch.tensor([[1.0, 2.0, 3.0]]), rewards=torch.tensor([[0.5 - 0.05, -0.05, 1.0 - 0.05]]),
    )  # fmt: skip
    torch.testing.assert_close(agent.targets(batch), torch.tensor([expected]))


@pytest.mark.parametrize("td_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["WoAiNi", "Brackets"])
def test_fixed_point_is_the_optimum_on_every_path(name, td_lambda):
    """With pi* and V* from backward induction, Q is its own target for all responses; elsewhere it is not."""
    length = {"WoAiNi": 4, "Brackets": 6}[name]
    world, task = envs(name, max_response_tokens=length), listed(name, length)
    solution = rlhf_gym.exact.solve(world, BETA)
    agent = SoftQ(world, policy=solution.policy.requires_grad_(True), td_lambda=td_lambda)
    values = torch.from_numpy(np.concatenate(solution.values)).float()
    agent.policy.value_head.weight.data[0, : len(values)] = values
    batch = every_response(agent, task)

    def largest_error(batch):
        q_values = BETA * (batch.logprobs - batch.ref_logprobs) + batch.values
        return (agent.targets(batch) - q_values)[batch.response_mask].abs().max().item()

    assert largest_error(batch) < 1e-5
    agent.policy.value_head.weight.data[0, 1] += 0.1
    assert largest_error(every_response(agent, task)) == pytest.approx(0.1, abs=1e-4)
    assert largest_error(every_response(SoftQ(world, policy="tabular"), task)) == pytest.approx(1.0)


def test_first_gradient_is_that_of_the_objective():
    """With lambda 1 and any V, in expectation over responses of the policy, and of V that of vf_coef (V - G)^2 / 2."""
    agent, task = SoftQ(envs(), policy="tabular", td_lambda=1.0), listed("WoAiNi", 4)
    randomise(agent)
    residual = agent.policy.model.lm_head.residual
    parameters = residual.detach().double()[: len(task.reference)].requires_grad_()
    logprobs = torch.where(task.mask, (task.reference + parameters).log_softmax(-1)[task.states, task.tokens], 0.0)
    ref_logprobs = torch.where(task.mask, task.reference[task.states, task.tokens], 0.0)
    probability = logprobs.sum(1).exp()
    objective = probability @ (task.payoffs.sum(1) - BETA * (logprobs - ref_logprobs).sum(1))
    (exact,) = torch.autograd.grad(objective, parameters)

    batch = every_response(agent, task)
    batch = replace(batch, returns=agent.targets(batch))
    for row in range(len(batch)):
        loss = agent.loss(batch.rows(torch.tensor([row])), torch.tensor(1))[0]["loss"]
        (probability[row].item() * loss).backward()
    found = residual.grad[: len(exact)].double()
    assert exact.abs().max() > 0.1
    assert (found + exact).abs().max() < 1e-5
    to_go = (task.payoffs - BETA * (logprobs - ref_logprobs)).detach().flip(1).cumsum(1).flip(1)
    errors = torch.where(task.mask, batch.values - to_go, 0.0)
    expected = torch.zeros(len(exact), dtype=torch.float64)
    expected.index_add_(0, task.states.flatten(), (probability.detach()[:, None] * 0.5 * errors).flatten())
    assert (agent.policy.value_head.weight.grad[0, : len(exact)] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("td_lambda", [0.0, 1.0])
def test_learns_from_responses_that_somebody_else_chose(td_lambda):
    """Every response equally often, whatever the policy thinks of it: no importance weights, and still the optimum."""
    agent = SoftQ(
        envs(), policy="tabular", td_lambda=td_lambda, num_epochs=5, num_minibatches=1, learning_rate=0.2,
        value_learning_rate=0.1,
    )  # fmt: skip
    task, agent.total_timesteps, before = listed("WoAiNi", 4), 60, rlhf_gym.exact.evaluate(agent, agent.envs).regret
    for agent.num_timesteps in range(60):
        agent.update(Rollout(every_response(agent, task)))
    after = rlhf_gym.exact.evaluate(agent, agent.envs)
    assert before > 0.3 and after.regret < 1e-3 and after.normalised > 0.99


def test_how_the_environment_puts_the_kl_does_not_matter():
    """k1 or k3 in the reward, or the reference's log-probs alone: scores and targets come out the same."""
    found = []
    for changes in ({}, {"kl_estimator": "k3"}, {"kl_term": "reference"}, {"kl_coef": 0.0}):
        agent = SoftQ(envs("Lexicon", **changes), policy="tabular")
        randomise(agent)
        batch = agent.collector.collect(seed=0).batch
        found.append((token_scores(agent, batch), None if "kl_coef" in changes else agent.targets(batch)))
        torch.testing.assert_close(found[-1][0].sum(1), batch.scores, atol=1e-4, rtol=0)
    assert (found[0][0] != 0).sum(1).max() > 1  # words are paid as they come
    for scores, targets in found[1:]:
        torch.testing.assert_close(scores, found[0][0], atol=1e-5, rtol=0)
        if targets is not None:
            torch.testing.assert_close(targets, found[0][1], atol=1e-5, rtol=0)


def test_an_update_goes_to_its_targets_and_stops_there():
    """From V = 0 and lambda 0, Q becomes the payoff of each token: V is 1 before the last token of the only good
    response and 0 everywhere else."""
    agent = SoftQ(
        envs(), policy="tabular", td_lambda=0.0, num_epochs=200, num_minibatches=1, learning_rate=0.02,
        value_learning_rate=0.02,
    )  # fmt: skip
    task, agent.total_timesteps = listed("WoAiNi", 4), 1000
    agent.update(Rollout(every_response(agent, task)))
    good = int(task.states[task.payoffs.sum(1) == 1, -1])
    expected = torch.zeros(len(task.reference))
    expected[good] = 1.0
    values = agent.policy.value_head.weight[0, : len(expected)] + agent.policy.value_head.bias
    torch.testing.assert_close(values.detach()[task.states.unique()], expected[task.states.unique()], atol=5e-3, rtol=0)


def test_learns():
    world = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=BETA)
    agent = SoftQ(world, policy="tabular", seed=0, learning_rate=0.05).learn(8_000)
    assert rlhf_gym.exact.evaluate(agent, world).normalised > 0.98


def test_settings():
    assert SoftQ(make_envs(2, kl_coef=0.1)).config.value_learning_rate == pytest.approx(1e-3)
    with pytest.raises(ValueError, match=r"td_lambda must be a number in \[0, 1\], got 2"):
        SoftQ(make_envs(2, kl_coef=0.1), td_lambda=2)
