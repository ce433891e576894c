"""Agents: one file per algorithm, over the shared rollout (``rollout.py``) and pure functions (``functional.py``)."""

from __future__ import annotations

import importlib
from typing import Any

# Name on the command line -> where the class is. Loaded when first used: torch and Stable-Baselines3 take seconds to
# import.
AGENTS = {
    "ppo": "rlhf_gym.agents.ppo:PPO",
    "nlpo": "rlhf_gym.agents.nlpo:NLPO",
    "reinforce": "rlhf_gym.agents.reinforce:REINFORCE",
    "rloo": "rlhf_gym.agents.rloo:RLOO",
    "remax": "rlhf_gym.agents.remax:ReMax",
    "grpo": "rlhf_gym.agents.grpo:GRPO",
    "trpo": "rlhf_gym.agents.trpo:TRPO",
    "vargrad": "rlhf_gym.agents.vargrad:VarGrad",
    "soft-q": "rlhf_gym.agents.soft_q:SoftQ",
    "q-learning": "rlhf_gym.agents.q_learning:QLearning",
    "best-of-n": "rlhf_gym.agents.best_of_n:BestOfN",
    "expert-iteration": "rlhf_gym.agents.expert_iteration:ExpertIteration",
    "online-dpo": "rlhf_gym.agents.online_dpo:OnlineDPO",
    "sb3-ppo": "rlhf_gym.agents.sb3:SB3PPO",
    "a2c": "rlhf_gym.agents.sb3:A2C",
    "dqn": "rlhf_gym.agents.sb3:DQN",
    "qrdqn": "rlhf_gym.agents.sb3:QRDQN",
    "maskable-ppo": "rlhf_gym.agents.sb3:MaskablePPO",
    "recurrent-ppo": "rlhf_gym.agents.sb3:RecurrentPPO",
}
_LAZY = {path.partition(":")[2]: path for path in AGENTS.values()} | {
    "Agent": "rlhf_gym.agents.base:Agent",
    "AnnounceLogprobs": "rlhf_gym.agents.sb3:AnnounceLogprobs",
    "DQNConfig": "rlhf_gym.agents.sb3:DQNConfig",
    "GymVectorToSB3": "rlhf_gym.agents.sb3:GymVectorToSB3",
    "BestOfNConfig": "rlhf_gym.agents.best_of_n:BestOfNConfig",
    "ExpertIterationConfig": "rlhf_gym.agents.expert_iteration:ExpertIterationConfig",
    "GRPOConfig": "rlhf_gym.agents.grpo:GRPOConfig",
    "NLPOConfig": "rlhf_gym.agents.nlpo:NLPOConfig",
    "OnlineDPOConfig": "rlhf_gym.agents.online_dpo:OnlineDPOConfig",
    "MlpAgent": "rlhf_gym.agents.sb3:MlpAgent",
    "PPOConfig": "rlhf_gym.agents.ppo:PPOConfig",
    "QRDQNConfig": "rlhf_gym.agents.sb3:QRDQNConfig",
    "QLearningConfig": "rlhf_gym.agents.q_learning:QLearningConfig",
    "REINFORCEConfig": "rlhf_gym.agents.reinforce:REINFORCEConfig",
    "RLOOConfig": "rlhf_gym.agents.rloo:RLOOConfig",
    "ReMaxConfig": "rlhf_gym.agents.remax:ReMaxConfig",
    "SB3Agent": "rlhf_gym.agents.sb3:SB3Agent",
    "SoftQConfig": "rlhf_gym.agents.soft_q:SoftQConfig",
    "VarGradConfig": "rlhf_gym.agents.vargrad:VarGradConfig",
}
__all__ = ["AGENTS", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
