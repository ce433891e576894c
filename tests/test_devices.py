"""The main path on every device that is here: environment, whole responses against stepping, PPO, saving."""

from __future__ import annotations

import pytest
import torch
from worlds import V, make_envs, model

from rlhf_gym.agents import PPO

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_stepping_equals_whole_responses(device):
    envs = make_envs(4, "llama", device=device, output="torch", kl_coef=0.1, autoreset_mode="disabled")
    obs, info = envs.reset(seed=0)
    assert all(x.device.type == device for x in (*obs.values(), *info.values()))
    prompts = [p.ids for p in envs.unwrapped.process.row_prompts]
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(3, V, (4, 6), generator=generator).to(device)
    logprobs = -torch.rand(4, 6, generator=generator).to(device)
    rewards = []
    for t in range(6):
        envs.unwrapped.announce_logprobs(logprobs[:, t])
        obs, reward, terminated, truncated, info = envs.step(actions[:, t])
        assert reward.device.type == terminated.device.type == device
        rewards.append(reward)
    mask = torch.ones_like(actions, dtype=torch.bool)
    whole = envs.unwrapped.evaluate_responses(prompts, actions, mask, logprobs)
    torch.testing.assert_close(torch.stack(rewards, 1), whole.rewards, atol=1e-4, rtol=1e-4)
    assert terminated.all() and not truncated.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_learns_and_saves(device, dtype, tmp_path):
    envs = make_envs(16, "llama", model=model("llama", seed=5).to(device), prompts=["the cat"], kl_coef=0.02)
    assert envs.unwrapped.device.type == device
    seen: list[float] = []
    agent = PPO(envs, seed=0, learning_rate=1e-2, dtype=dtype)
    agent.learn(2000, callback=lambda _, metrics: seen.append(metrics["objective/scores"]))
    assert sum(seen[-3:]) / 3 > seen[0] + 0.5
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=envs)
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name]), name
