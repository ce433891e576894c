"""GRPO and its variants: exact expected gradients by enumeration, invariances, groups without a contrast."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import gymnasium as gym
import pytest
import torch
from worlds import make_envs, model

import rlhf_gym
from rlhf_gym.agents import GRPO, grpo
from rlhf_gym.agents.batch import Batch
from rlhf_gym.agents.grpo import DAPO, DR_GRPO, GSPO
from rlhf_gym.benchmarks import fixed_points
from rlhf_gym.benchmarks.fixed_points import Estimator, expected_gradient, make_task
from rlhf_gym.lm import join_responses

BETA, SIZE, LONGEST = 0.3, 2, 4
ONE_STEP = {"num_epochs": 1, "num_minibatches": 1}


@cache
def task():
    return make_task(gym.make("rlhf_gym/WoAiNi-v0"), BETA)


def random_residual():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(task().reference.shape, generator=generator, dtype=torch.float64)


def agent_at(residual, **config):
    """A tabular agent whose policy is the reference plus this."""
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=8, kl_coef=BETA)
    agent = GRPO(envs, policy="tabular", group_size=SIZE, **config)
    # The states of the graph are the table's first rows.
    agent.policy.model.lm_head.residual.data[: len(residual)] = residual.float()
    return agent


def all_responses(agent):
    """Every response once, with what a rollout would say of it; and its probability (N,)."""
    t, prompt = task(), agent.envs.unwrapped.prompts[0].ids
    ids, _, prompt_lengths = join_responses([prompt] * len(t.mask), t.tokens, t.mask)
    n, zeros = len(t.mask), torch.zeros(t.mask.shape)
    batch = Batch(
        ids=ids, prompt_lengths=prompt_lengths, response_ids=t.tokens, response_mask=t.mask, logprobs=zeros,
        values=zeros, rewards=zeros, scores=t.payoffs.sum(1).float(), ended_by_eos=torch.ones(n, dtype=torch.bool),
        kl=zeros, ref_logprobs=torch.where(t.mask, t.reference[t.states, t.tokens], 0.0).float(),
    )  # fmt: skip
    with torch.no_grad():
        logprobs = agent.policy(batch)[0]
    rewards = t.payoffs - BETA * (logprobs - batch.ref_logprobs)
    batch = replace(batch, logprobs=logprobs, rewards=torch.where(t.mask, rewards, torch.nan).float())
    return batch, logprobs.sum(1).exp()


def agents_gradient(agent, normaliser):
    """The agent's own advantages and loss, in expectation over all pairs of responses."""
    batch, probability = all_responses(agent)
    n = len(batch)
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).unbind(1)
    pairs = torch.stack([first, second], 1).flatten()
    advantages = agent.advantages(grpo._select(batch, pairs)).reshape(n, n, 2)
    expected = (advantages[..., 0] @ probability + probability @ advantages[..., 1]) / 2
    batch = replace(batch, advantages=expected[:, None].expand_as(batch.rewards))
    loss = sum(p * agent.loss(batch.rows(torch.tensor([i])), normaliser)[0]["loss"] for i, p in enumerate(probability))
    return torch.autograd.grad(loss, agent.policy.model.lm_head.residual)[0][: len(task().reference)].double()


K3 = {"kl_loss": ("k3", "token"), "advantages": "group", "baseline": "group_mean", "group_size": SIZE}
VARIANTS = {
    "published": ({}, Estimator("x", divide_by_std=True, mode="sequence_mean", **K3)),
    "GSPO": (GSPO, Estimator("x", divide_by_std=True, mode="sequence_mean", **K3)),  # the ratio is 1 at first
    "DAPO": (DAPO | {"dynamic_sampling": False}, Estimator("x", divide_by_std=True, mode="token_mean", **K3)),
    "Dr. GRPO": (DR_GRPO, Estimator("x", mode="constant", **K3)),
    "k2": (DR_GRPO | {"kl_estimator": "k2"}, Estimator("x", mode="constant", **K3 | {"kl_loss": ("k2", "token")})),
}


def normaliser_of(mode, batch, probability):
    return {"token_mean": probability @ batch.response_mask.sum(1).float(), "constant": LONGEST}.get(mode, 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_expected_gradient_is_the_measured_estimators(name):
    """What docs/exact.md says of the estimators, it says of the agent."""
    config, estimator = VARIANTS[name]
    agent = agent_at(random_residual(), **config)
    normaliser = normaliser_of(agent.config.loss_mode, *all_responses(agent))
    expected, _ = expected_gradient(task(), random_residual(), estimator)
    assert (agents_gradient(agent, normaliser) - expected).abs().max() < 1e-5


def test_the_functions_are_the_measured_ones():
    for function in ("aggregate_loss", "group_advantages", "kl_in_loss", "policy_loss_clipped"):
        assert getattr(grpo, function) is getattr(fixed_points, function)


def test_kl_in_the_reward_without_std_is_unbiased():
    """The gradient of E[score] - kl_coef KL by differentiating the sum over all responses, times (n - 1) / n / longest."""
    t, parameters = task(), random_residual().requires_grad_()
    logprobs = torch.where(t.mask, (t.reference + parameters).log_softmax(-1)[t.states, t.tokens], 0.0).sum(1)
    ref_logprobs = torch.where(t.mask, t.reference[t.states, t.tokens], 0.0).sum(1)
    objective = (logprobs.exp() * (t.payoffs.sum(1) - BETA * (logprobs - ref_logprobs))).sum()
    (exact,) = torch.autograd.grad(objective, parameters)
    unbiased = agents_gradient(agent_at(random_residual(), **DR_GRPO, kl_placement="reward"), LONGEST)
    assert (unbiased * LONGEST * SIZE / (SIZE - 1) + exact).abs().max() < 1e-5
    for config in ({}, DR_GRPO, {"kl_placement": "reward"}):  # negative controls
        found = agents_gradient(agent_at(random_residual(), **config), 1)
        assert (found / found.norm() + exact / exact.norm()).norm() > 0.1


# --- sampled batches ---------------------------------------------------------------------------------------------------


def sampled(rows=16, **config):
    """An agent that is not the reference, and a rollout in groups of four."""
    envs = make_envs(rows, model=model(), kl_coef=0.1)
    agent = GRPO(envs, policy=model(seed=1), seed=0, **{"group_size": 4, "learning_rate": 1e-2} | ONE_STEP | config)
    agent.total_timesteps = 1000
    return agent, agent.collector.collect(seed=0)


def weights_after(config, change):
    """Weights after an update on a batch that was changed."""
    agent, rollout = sampled(**config)
    rollout.batch = change(rollout.batch)
    metrics = agent.update(rollout)
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()]), metrics


SCORES = torch.tensor([0.0, 1.0, 1.0, 3.0, *[2.0] * 4, 0.0, 0.0, 5.0, 1.0, *[0.0] * 4])


def with_scores(batch, shift=0.0):
    return replace(batch, scores=SCORES + shift)


@pytest.mark.parametrize("config", [{}, DR_GRPO, GSPO | ONE_STEP], ids=["published", "dr", "gspo"])
def test_constants_order_and_the_environments_kl_change_nothing(config):
    expected, _ = weights_after(config, with_scores)
    order = (torch.arange(0, 16, 4)[:, None] + torch.tensor([2, 0, 3, 1])).flatten()
    for change in (
        lambda batch: with_scores(batch, 64.0),
        lambda batch: grpo._select(with_scores(batch), order),
        lambda batch: replace(with_scores(batch), rewards=batch.rewards + 3.0),  # the KL is never paid twice
    ):
        torch.testing.assert_close(weights_after(config, change)[0], expected, atol=2e-5, rtol=0)
    across = weights_after(config, lambda batch: grpo._select(with_scores(batch), torch.arange(16).roll(1)))[0]
    assert (across - expected).abs().max() > 1e-3


def test_advantages_by_hand():
    agent, rollout = sampled()
    batch = with_scores(rollout.batch)
    std = (19 / 12) ** 0.5  # of 0, 1, 1, 3: mean 5/4, squares 25/16 + 1/16 + 1/16 + 49/16 over 3
    expected = torch.tensor([-1.25, -0.25, -0.25, 1.75, 0.0, 0.0, 0.0, 0.0]) / (std + 1e-4)
    torch.testing.assert_close(agent.advantages(batch)[:8], expected)
    agent.config = replace(agent.config, divide_by_std=False, kl_placement="reward")
    paid = batch.rewards.sum(1)[:4]
    torch.testing.assert_close(agent.advantages(batch)[:4], paid - paid.mean())


def test_dynamic_sampling_is_an_update_without_those_groups():
    contrast = torch.tensor([True, False, True, False]).repeat_interleave(4)
    for mode in ("token_mean", "constant"):
        config = {"loss_mode": mode, "dynamic_sampling": True}
        found, metrics = weights_after(config, with_scores)
        expected, _ = weights_after({"loss_mode": mode}, lambda batch: grpo._select(with_scores(batch), contrast))
        assert torch.equal(found, expected)
        assert metrics["train/equal_groups"] == 0.5 and metrics["train/n_updates"] == 1
        kept, _ = weights_after({"loss_mode": mode}, with_scores)  # their KL counts otherwise
        assert (kept - found).abs().max() > 1e-3


def test_a_rollout_without_contrast_is_no_step_and_its_tokens_count():
    before, _ = weights_after({"learning_rate": 0.0}, with_scores)
    after, metrics = weights_after({"dynamic_sampling": True}, lambda batch: replace(batch, scores=0 * SCORES))
    assert torch.equal(before, after)
    assert metrics["train/n_updates"] == 0 and metrics["train/equal_groups"] == 1
    # Without dynamic sampling the KL alone is a step.
    assert not torch.equal(before, weights_after({}, lambda batch: replace(batch, scores=0 * SCORES))[0])
    envs, lengths = make_envs(8, model=model(), kl_coef=0.1, reward=lambda completions: [1.0] * len(completions)), []
    agent = GRPO(envs, seed=0, group_size=4, dynamic_sampling=True)
    agent.learn(60, callback=lambda _, metrics: lengths.append(8 * metrics["rollout/ep_len_mean"]))
    assert agent.num_timesteps == pytest.approx(sum(lengths)) and agent.num_timesteps >= 60


def test_micro_batches_and_the_constant():
    """A minibatch is divided by the longest possible response in micro-batches of short ones too."""
    for config in (DR_GRPO, {}):
        whole, metrics = weights_after(config, with_scores)
        parts, metrics_of_parts = weights_after(config | {"micro_batch_size": 4}, with_scores)
        torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)
        assert metrics == pytest.approx(metrics_of_parts, rel=1e-3, abs=1e-5)


def test_learns_towards_the_known_optimum():
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=64, kl_coef=0.3)
    agent = GRPO(envs, policy="tabular", seed=0, learning_rate=0.1, **DR_GRPO, kl_placement="reward").learn(12_000)
    assert rlhf_gym.exact.evaluate(agent, envs).normalised > 0.95


def test_settings_are_checked():
    envs = make_envs(8, model=model(), kl_coef=0.1)
    for name, value in {
        "group_size": 1,
        "loss_mode": "mean",
        "importance_level": "word",
        "kl_placement": "both",
        "kl_estimator": "k1",  # in the loss it regularises nothing
        "divide_by_std": 1,
        "dynamic_sampling": "yes",
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
            GRPO(envs, **{"group_size": 4, name: value})
    for value in (1.5, -0.1, (0.2,), (1.5, 0.2), (0.2, float("inf")), "0.2", None):
        with pytest.raises(ValueError, match="clip_range must be a number in"):
            GRPO(envs, group_size=4, clip_range=value)
    assert GRPO(envs, group_size=4, clip_range=[0.2, 0.28]).config.clip_range == [0.2, 0.28]  # as JSON has it
    with pytest.raises(ValueError, match="group_size must divide the environment's 8 rows, got 3"):
        GRPO(envs, group_size=3)


def test_a_penalty_in_the_loss_needs_a_reference():
    agent, rollout = sampled()
    rollout.batch = replace(rollout.batch, ref_logprobs=None)
    with pytest.raises(ValueError, match=r'kl_coef=0.1 in the loss needs .* or take kl_placement="reward"'):
        agent.update(rollout)
    agent.envs.unwrapped.kl_coef = 0.0
    assert "train/kl_loss" not in agent.update(rollout)
