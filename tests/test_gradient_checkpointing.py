"""PPO with gradient checkpointing: the same gradient. That blocks then run twice is tested in test_lm_packed.py."""

from __future__ import annotations

import gymnasium as gym
import pytest

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO


def first_update(checkpointed: bool) -> dict[str, float]:
    envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=8, kl_coef=0.05, reward="length")
    agent = PPO(envs, seed=0, num_minibatches=1, num_epochs=1, gradient_checkpointing=checkpointed)
    assert any(getattr(module, "gradient_checkpointing", False) for module in agent.policy.modules()) == checkpointed
    found: list[dict[str, float]] = []
    agent.learn(1, callback=lambda agent, metrics: found.append(metrics))
    return found[0]


def test_the_gradient_is_the_same():
    plain, checkpointed = first_update(False), first_update(True)
    for name in ("train/loss", "train/value_loss", "train/grad_norm", "objective/scores"):
        assert checkpointed[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6)
    assert plain["objective/scores"] > 0  # or there was nothing to learn from
