"""Stable-Baselines3 on text: an adapter, a policy for language models, a callback for the KL penalty, and agents."""

from __future__ import annotations

from .agent import SB3Agent
from .algorithms import A2C, SB3PPO, A2CConfig, OnPolicyConfig, SB3PPOConfig
from .announce import AnnounceLogprobs
from .buffers import CompactMaskableRolloutBuffer, CompactReplayBuffer, CompactRolloutBuffer
from .masked import LMMaskablePolicy, MaskablePPO, MaskablePPOConfig
from .mlp import MlpAgent
from .policy import LMActorCriticPolicy, policy_kwargs
from .q_policy import LMQPolicy
from .recurrent import LMRecurrentPolicy, RecurrentPPO
from .value import DQN, QRDQN, DQNConfig, QRDQNConfig, ValueAgent
from .vec_env import GymVectorToSB3

__all__ = [
    "A2C",
    "A2CConfig",
    "AnnounceLogprobs",
    "CompactMaskableRolloutBuffer",
    "CompactReplayBuffer",
    "CompactRolloutBuffer",
    "DQN",
    "DQNConfig",
    "GymVectorToSB3",
    "LMActorCriticPolicy",
    "LMMaskablePolicy",
    "LMQPolicy",
    "LMRecurrentPolicy",
    "MaskablePPO",
    "MaskablePPOConfig",
    "MlpAgent",
    "OnPolicyConfig",
    "QRDQN",
    "QRDQNConfig",
    "RecurrentPPO",
    "SB3Agent",
    "SB3PPO",
    "SB3PPOConfig",
    "ValueAgent",
    "policy_kwargs",
]
