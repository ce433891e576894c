"""Wrappers that make text look like the small vectors that most reinforcement learning is written for.

As in Gymnasium, the wrappers of a single environment are here and those of a batch in ``rlhf_gym.wrappers.vector``,
under the same names. With both an observation is a flat Box and an action one of k, so that any algorithm for such
spaces (Stable-Baselines3's ``MlpPolicy``, say) generates text:

    >>> env = TopKAction(HiddenStateObservation(gym.make("rlhf_gym/TinyReviews-v0")), k=16)          # doctest: +SKIP
"""

from . import vector
from .hidden_state import HiddenStateObservation
from .top_k import TopKAction

__all__ = ["HiddenStateObservation", "TopKAction", "vector"]
