"""Tells the environment log pi for Stable-Baselines3's algorithms, which know nothing of a KL penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from .vec_env import GymVectorToSB3


def announce(venv: VecEnv, logprobs: np.ndarray) -> None:
    """Tells all rows of an environment log pi of their next actions, (num_envs,) or (num_envs, n), in nats."""
    if isinstance(venv.unwrapped, GymVectorToSB3):
        venv.env_method("announce_logprobs", logprobs)  # the batch at once
        return
    for i in range(venv.num_envs):  # scalar environments, each a batch of one
        venv.env_method("announce_logprobs", np.array(logprobs[i : i + 1]), indices=i)


class AnnounceLogprobs(BaseCallback):
    """Announces the log-probabilities of the actions just sampled, before the environment is stepped.

    With ``kl_coef > 0`` a text environment needs log pi of each action (``env.unwrapped.announce_logprobs``). While it
    collects a rollout, every on-policy algorithm of SB3 calls ``policy(obs)`` right before ``env.step``, and the third
    thing that answers are the log-probabilities (in ``RecurrentPPO`` and ``MaskablePPO`` too). A forward hook on the
    policy passes them on, so the algorithm and the policy stay as they are. Where an environment needs those of all
    actions (``rlhf_gym.wrappers.TopKAction(forbidden="likeliest")``), the policy's distribution gives them.

    ``predict`` does not call the policy in this way: give ``evaluate_policy`` an environment with ``kl_coef=0``.

    Raises (when learning starts):
        TypeError: If the environment has no ``announce_logprobs``, or the algorithm has no rollout to listen to.

    Example:
        >>> PPO(LMActorCriticPolicy, venv, policy_kwargs=policy_kwargs(envs)).learn(
        ...     10_000, callback=AnnounceLogprobs())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self._hook: Any = None
        self._collecting = self._needs_all = False

    def _init_callback(self) -> None:
        if not self.training_env.has_attr("announce_logprobs"):
            raise TypeError(
                "AnnounceLogprobs needs an environment with announce_logprobs(), such as rlhf_gym/TextGeneration-v0"
            )
        if not hasattr(self.model, "rollout_buffer"):
            raise TypeError(
                f"AnnounceLogprobs works with on-policy algorithms; {type(self.model).__name__} samples no log-probs: "
                "make its environment with kl_coef=0 or kl_term='reference'"
            )
        venv = self.training_env
        self._needs_all = venv.has_attr("needs_all_logprobs") and any(venv.get_attr("needs_all_logprobs"))
        self.close()  # a learn() that ended in an exception left its hook behind
        self._hook = self.model.policy.register_forward_hook(self._announce)

    def _announce(self, policy: Any, args: Any, output: tuple) -> None:
        if not self._collecting:  # somebody else's forward: an evaluation, a probe
            return
        logprobs = policy.action_dist.distribution.logits if self._needs_all else output[2].reshape(-1)
        announce(self.training_env, logprobs.detach().cpu().numpy())

    def _on_rollout_start(self) -> None:
        self._collecting = True

    def _on_rollout_end(self) -> None:
        self._collecting = False

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hook off the policy; also called when learning ends."""
        self._collecting = False
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
