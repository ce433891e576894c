"""What value-based algorithms of Stable-Baselines3 need on text: exploration among what is allowed, and the KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from rlhf_gym.lm import sample_tokens

from .announce import announce

EXPLORATIONS = ("uniform", "reference")


class TokenExploration:
    """Epsilon-greedy for text, mixed into DQN or QR-DQN; the update is theirs.

    The stock algorithms draw an exploring action uniformly from the whole action space, forbidden tokens included, and
    for all rows of the environment or for none. Here each row decides for itself, and draws from what ``action_masks()``
    allows. ``exploration="reference"`` draws from the reference's distribution instead: of 50,000 tokens a few make
    sense, and a uniform draw hardly ever finds one.
    """

    exploration = "uniform"
    # The algorithm's own.
    policy: Any
    env: Any
    action_space: Any
    num_timesteps: int
    exploration_rate: float
    _last_obs: Any

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        actions, _ = self.policy.predict(self._last_obs, deterministic=True)
        rate = 1.0 if self.num_timesteps < learning_starts else self.exploration_rate
        explores = np.random.rand(n_envs) < rate
        uniforms = torch.from_numpy(np.random.rand(n_envs).astype(np.float32))
        if explores.any():
            actions = np.where(explores, sample_tokens(self._proposal(), uniforms).numpy(), actions)
        return actions, actions

    def _proposal(self) -> torch.Tensor:
        """Log-probabilities of exploring actions, up to a constant. Shape (num_envs, n), float32."""
        if self.exploration == "reference":
            processes = {id(process): process for process in self.env.get_attr("process")}  # one, or one per row
            return torch.cat([process.next_ref_logprobs().cpu() for process in processes.values()])
        if not self.env.has_attr("action_masks"):
            return torch.zeros(self.env.num_envs, int(self.action_space.n))
        return torch.from_numpy(np.stack(self.env.env_method("action_masks"))).float().log()


def with_token_exploration(algorithm: type[OffPolicyAlgorithm]) -> type[OffPolicyAlgorithm]:
    """The algorithm with the exploration above, under its own name."""
    if issubclass(algorithm, TokenExploration):
        return algorithm
    return type(algorithm.__name__, (TokenExploration, algorithm), {"__doc__": algorithm.__doc__})


class AnnounceCertainty(VecEnvWrapper):
    """Announces log pi = 0 for every action: that of a deterministic policy.

    The KL of a deterministic policy to the reference is the sum of -log pi_ref over what it writes. So with this
    announcement the reward is score + kl_coef * log pi_ref, and its sum over the policy's own response is score - kl_coef
    * KL exactly. An action that was taken to explore is worth what it would be worth to a policy that takes it.

    Attributes:
        last_step: Dones and infos of the last step, for callbacks of algorithms that do not show them.
    """

    last_step: tuple[Any, Any] | None = None

    def step_async(self, actions: np.ndarray) -> None:
        """Announces, then steps."""
        process = self.get_attr("process")[0]
        if process.needs_announcement:
            if process.kl_estimator == "k1" and not any(self._attr("needs_all_logprobs")):
                announce(self.venv, np.zeros(self.num_envs, dtype=np.float32))
            else:  # the whole distribution gives the exact KL, whatever the estimator
                certain = np.full((self.num_envs, int(self.action_space.n)), -np.inf, dtype=np.float32)
                certain[np.arange(self.num_envs), np.asarray(actions)] = 0.0
                announce(self.venv, certain)
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        """As the environment's."""
        result = self.venv.step_wait()
        self.last_step = result[2], result[3]
        return result

    def reset(self) -> Any:
        """As the environment's."""
        return self.venv.reset()

    def _attr(self, name: str) -> list[Any]:
        return self.get_attr(name) if self.has_attr(name) else [False]


def as_certain(venv: VecEnv) -> VecEnv:
    """Wraps a text environment that has a reference; any other stays as it is."""
    has_process = venv.has_attr("process")
    return AnnounceCertainty(venv) if has_process and venv.get_attr("process")[0].language_model else venv
