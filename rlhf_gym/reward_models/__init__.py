"""Reward models: from judgements of responses to a reward; see ``docs/reward_models.md``.

What is here is imported when it is first used: the command line reads the options of `RewardModelConfig` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RewardModelConfig
    from .examples import Judgements, Ranking, load_judgements
    from .model import RewardModel
    from .train import train_reward_model

_PLACES = {
    "Judgements": ".examples",
    "Ranking": ".examples",
    "RewardModel": ".model",
    "RewardModelConfig": ".config",
    "load_judgements": ".examples",
    "train_reward_model": ".train",
}

__all__ = ["Judgements", "Ranking", "RewardModel", "RewardModelConfig", "load_judgements", "train_reward_model"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
