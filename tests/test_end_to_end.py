"""Agents trained with their default settings against the exact optimum (CORRECTNESS 28)."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from rlhf_gym.agents import PPO
from rlhf_gym.exact import evaluate

NUM_ENVS, NUM_SEEDS = 256, 5


def train(task, num_episodes, seed, **arguments):
    """A tabular policy at kl_coef .3: its exact normalised score, and the certificate's variance first and last."""
    envs = gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=NUM_ENVS, kl_coef=0.3, **arguments)
    num_updates, variances = num_episodes // NUM_ENVS, []

    def look(agent, metrics):
        variances.append(metrics.get("audit/certificate_variance"))
        return agent.num_updates < num_updates

    agent = PPO(envs, policy="tabular", seed=seed, learning_rate=0.02, audit_interval=num_updates - 1)
    agent.learn(num_episodes * envs.unwrapped.max_response_tokens, callback=look)
    assert len(variances) == num_updates
    return evaluate(agent, envs).normalised, variances[0], variances[-1]


@pytest.mark.parametrize(("task", "num_episodes"), [("WoAiNi", 5_120), ("Difficulty", 6_400)])
def test_tabular_ppo_reaches_the_optimum(task, num_episodes):
    """.99 in the mean of five seeds, in a tenth and an eighth of the 51,200 episodes that it may take."""
    scores, first, last = np.array([train(task, num_episodes, seed) for seed in range(NUM_SEEDS)]).T
    assert np.mean(scores) >= 0.99
    assert (last < 0.05 * first).all()


def test_another_objective_does_not():
    """The negative control: k3 in the reward. The certificate alone does not tell, for a policy that has given up all
    responses but one has a constant S as well."""
    score, first, last = train("WoAiNi", 5_120, 0, kl_estimator="k3")
    assert score < 0.97 and last < 0.05 * first
