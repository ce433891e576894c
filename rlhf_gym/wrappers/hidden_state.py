"""The reference's last hidden state as the observation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from torch import Tensor

if TYPE_CHECKING:
    from rlhf_gym.envs.core import TextGenerationProcess


class HiddenStateObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Observe what the reference's LM head reads at the last token: one flat vector for the text so far.

    What the reference says next is a function of it, for most models a linear one. It costs next to nothing, for the
    environment runs the reference anyway.

    The vector holds what the reference remembers, and no more. A transformer's tells much of the whole text; that of a
    table (`rlhf_gym.exact.ngram_from_table`) is its state: the last word or two, one-hot. Where the reward needs more
    than that, such an observation is not the whole state, and the best policy on it may be worse than the best one.

    Args:
        env: A text-generation environment with a reference.

    Raises:
        TypeError: If it is none, or its observations are not token ids any more.
        ValueError: If the reference has no LM head.
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.observation_space = hidden_space(env, env.observation_space)

    def observation(self, observation: Any) -> np.ndarray:
        """The hidden state (d,) float32 of the text that the environment now holds."""
        return hidden_states(self.unwrapped.process)[0].cpu().numpy().copy()


def text_process(env: Any) -> TextGenerationProcess:
    """The process of a wrapped text environment.

    Raises:
        TypeError: If it is no text environment, or has no reference.
    """
    process = getattr(env.unwrapped, "process", None)
    if getattr(process, "language_model", None) is None:
        raise TypeError(
            f"env must be a text-generation environment with a reference model, such as rlhf_gym/TinyReviews-v0, got "
            f"{env.unwrapped}; give it model="
        )
    return process


def hidden_space(env: Any, observation_space: spaces.Space) -> spaces.Box:
    """The space of one row's hidden states.

    Raises:
        TypeError, ValueError: See `HiddenStateObservation`.
    """
    process = text_process(env)
    if not isinstance(observation_space, spaces.Dict) or "input_ids" not in observation_space.spaces:
        raise TypeError(
            f"observations must still be Dict(input_ids, attention_mask), got {observation_space}; put "
            "HiddenStateObservation under the wrappers that change observations"
        )
    model = process.language_model.model
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"the reference, a {type(model).__name__}, has no LM head whose input could be observed")
    return spaces.Box(-np.inf, np.inf, (value_width(model),), np.float32)


def value_width(model: Any) -> int:
    """How many of the LM head's inputs are features: a model of ours may append a mere number to them."""
    return getattr(model, "value_width", model.get_output_embeddings().weight.shape[1])


def hidden_states(process: TextGenerationProcess) -> Tensor:
    """Hidden states of all rows as they now are. Shape (N, d), float32."""
    return process.last_ref_hidden()[:, : value_width(process.language_model.model)]
