"""Reward models: from judgements of responses to a reward; see ``docs/reward_models.md``."""

from .config import RewardModelConfig
from .examples import Ranking, load_judgements
from .model import RewardModel
from .train import train_reward_model

__all__ = ["Ranking", "RewardModel", "RewardModelConfig", "load_judgements", "train_reward_model"]
