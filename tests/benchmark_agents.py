"""Agents that the benchmark's tests name as ``benchmark_agents:X``."""

from __future__ import annotations

import os

import numpy as np
import torch


class Idle:
    """Learns nothing; the others below are like it but for one fault."""

    def __init__(self, envs, policy, seed=0, strength=0.0):
        self.envs, self.policy_model, self.strength = envs, policy, strength

    def learn(self, total_timesteps, callback=None):
        return self

    def predict(self, observation, deterministic=False):
        raise NotImplementedError


class Raises(Idle):
    def learn(self, total_timesteps, callback=None):
        self.envs.reset()
        raise IndexError(f"no such row in /somewhere/{os.getpid()}/file.py, see {object()}")


class BecomesNaN(Idle):
    def learn(self, total_timesteps, callback=None):
        with torch.no_grad():
            next(iter(self.policy_model.parameters())).fill_(torch.nan)


class GoesFar(Idle):
    """Always the same token wherever the reference allows it."""

    def learn(self, total_timesteps, callback=None):
        with torch.no_grad():
            next(iter(self.policy_model.parameters()))[:, 0] += 50.0


class NeverStops(Idle):
    def learn(self, total_timesteps, callback=None):
        self.envs.reset()
        while True:
            self.envs.unwrapped.announce_logprobs(np.full(self.envs.num_envs, -1.0))
            self.envs.step(np.zeros(self.envs.num_envs, dtype=int))


class OnlyPredicts:
    """Writes one text; nobody can see its probabilities."""

    TEXT = "我爱你。"

    def __init__(self, envs, policy=None, seed=0):
        base = envs.unwrapped
        self.tokens = np.array([base.tokenizer.convert_tokens_to_ids(word) for word in self.TEXT])
        self.num_prompt_tokens = base.max_prompt_tokens

    def learn(self, total_timesteps, callback=None):
        pass

    def predict(self, observation, deterministic=False):
        return self.tokens[(observation["attention_mask"].sum(1) - self.num_prompt_tokens) % len(self.tokens)], None


class SeesPrompts(Idle):
    """Leaves the seeding to others."""

    seen: list = []

    def learn(self, total_timesteps, callback=None):
        self.seen.append(self.envs.reset()[1]["prompt_index"].tolist())


class NoAgent:
    """Has no predict."""

    def learn(self, total_timesteps, callback=None):
        pass
