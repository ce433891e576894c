"""rlhf_gym: text generation as a Gymnasium environment, with agents, rewards and exact answers.

Importing this package registers the environment ids and imports neither torch nor transformers; everything else is
loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from rlhf_gym.registration import register_environments

__version__ = "0.1.0"

# name -> module that has it; the attribute is looked up on first use.
_LAZY = {
    "AdaptiveKL": "rlhf_gym.kl",
    "FixedKL": "rlhf_gym.kl",
    "LanguageModel": "rlhf_gym.lm",
    "Reward": "rlhf_gym.rewards",
    "TextGenerationEnv": "rlhf_gym.envs.scalar",
    "TextGenerationVectorEnv": "rlhf_gym.envs.vector",
    "as_reward": "rlhf_gym.rewards",
    "check_vector_env": "rlhf_gym.envs.check",
    "load_language_model": "rlhf_gym.lm",
}
__all__ = [*_LAZY, "__version__"]

register_environments()


def __getattr__(name: str) -> Any:
    if name in ("exact", "sft", "wrappers"):
        return importlib.import_module(f"rlhf_gym.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rlhf_gym' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
