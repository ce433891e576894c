"""PPO with gradient checkpointing: the same training."""

from __future__ import annotations

import gymnasium as gym
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO


def trained(checkpointed: bool) -> dict[str, torch.Tensor]:
    envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=4, kl_coef=0.05, max_response_tokens=6)
    agent = PPO(envs, seed=0, num_minibatches=1, gradient_checkpointing=checkpointed)
    agent.learn(1)
    return agent.policy.state_dict()


def test_it_changes_no_weight():
    plain, checkpointed = trained(False), trained(True)
    assert plain.keys() == checkpointed.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(checkpointed[name], weight, atol=1e-6, rtol=1e-5)
