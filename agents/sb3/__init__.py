"""Stable-Baselines3 on text: an adapter, a policy for language models, a callback for the KL penalty, and agents."""

from __future__ import annotations

from .agent import SB3Agent
from .algorithms import A2C, SB3PPO, A2CConfig, OnPolicyConfig, SB3PPOConfig
from .announce import AnnounceLogprobs
from .policy import LMActorCriticPolicy, policy_kwargs
from .vec_env import GymVectorToSB3

__all__ = [
    "A2C",
    "A2CConfig",
    "AnnounceLogprobs",
    "GymVectorToSB3",
    "LMActorCriticPolicy",
    "OnPolicyConfig",
    "SB3Agent",
    "SB3PPO",
    "SB3PPOConfig",
    "policy_kwargs",
]
