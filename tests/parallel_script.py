"""Trains agents for `test_parallel`, in one process when imported and in several under ``torchrun``."""

from __future__ import annotations

import sys

import gymnasium as gym

import rlhf_gym.agents
from rlhf_gym.agents import parallel
from rlhf_gym.cli import main

SETTINGS = {
    # 30 rows in 4 steps: 8, 8, 8 and 6; then 15 groups: 4, 4, 4 and 3, which two cannot share evenly.
    "PPO": {"num_epochs": 2, "num_minibatches": 4, "target_kl": 10.0, "micro_batch_size": 3},
    "RLOO": {"group_size": 2, "num_minibatches": 4},
    # 60 responses in 60 steps: the second process has none of its own.
    "ReMax": {"num_minibatches": 60, "num_rounds": 2},
}
TRAIN = (
    "train --model tiny-reviews --prompts tiny-reviews --reward sentiment --num-envs 8 --kl-coef 0.05 --eval-episodes 8"
)
TRAIN += " --max-prompt-tokens 24 --max-response-tokens 24 --no-progress-bar"


def train(name: str, seed: int = 3):
    envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=30, kl_coef=0.05)
    agent = getattr(rlhf_gym.agents, name)(envs, seed=seed, **SETTINGS[name])
    return agent.learn(700)


if __name__ == "__main__":
    # Before anything else: the command joins the processes by itself.
    assert main([*TRAIN.split(), "--total-timesteps", "150", "--out", f"{sys.argv[1]}/run"]) == 0
    assert not parallel.any_of(False)
    assert parallel.any_of(parallel.rank() == 1)
    for name in SETTINGS:
        agent = train(name)
        if parallel.rank() == 0:
            agent.save(f"{sys.argv[1]}/{name}")
        total = sum(p.detach().double().sum() for p in agent.policy.parameters())
        line = f"{parallel.rank()} {parallel.size()} {name} {agent.num_timesteps} {float(total)!r}\n"
        sys.stdout.write(line)  # in one piece: the other process writes here too
        sys.stdout.flush()
