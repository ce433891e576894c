"""Stable-Baselines3 on text: an adapter, a policy for language models, a callback for the KL penalty."""

from __future__ import annotations

from .vec_env import GymVectorToSB3

__all__ = ["GymVectorToSB3"]
