"""sb3-contrib's MaskablePPO with a language model: only what ``action_masks()`` allows can be chosen.

The mask is the environment's: made with ``top_k=k`` (or ``top_p``), the reference's k likeliest tokens in each state;
and what ``allowed_tokens`` and a table forbid. Policy and reference are both renormalised on it.

Objective: E[score] - kl_coef * KL(pi || pi_ref) over whole responses, with pi_ref renormalised on the mask; policies that
write anything else are not searched. Without filters it is Stable-Baselines3's PPO.

Source:
    Huang and Ontanon 2022, arXiv:2006.14171 (invalid action masking); Ramamurthy et al. 2022, arXiv:2210.01241, whose
    NLPO masks by a copy of the policy that follows it, where this mask is the reference's and stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import sb3_contrib
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor

from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.forward import forward_at

from .algorithms import SB3PPO
from .buffers import CompactMaskableRolloutBuffer
from .policy import LMActorCriticPolicy, sequences


class LMMaskablePolicy(LMActorCriticPolicy):
    """`LMActorCriticPolicy` for an algorithm that hands it the masks, in the rollout and in the update."""

    takes_masks = True
    _given: Tensor | None = None

    def forward(
        self, obs: dict[str, Tensor], deterministic: bool = False, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples a token per row among those that its mask (B, V) allows; see the base class."""
        with self._masked_by(action_masks):
            return super().forward(obs, deterministic)

    def evaluate_actions(
        self, obs: dict[str, Tensor], actions: Tensor, action_masks: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values (n, 1), log-probs (n,) and entropies (n,) of n states with their actions and masks (n, V)."""
        with self._masked_by(action_masks):
            return super().evaluate_actions(obs, actions)

    def get_distribution(self, obs: Any, action_masks: Any = None) -> Any:
        """The distribution of the next token in n states."""
        with self._masked_by(action_masks):
            return super().get_distribution(obs)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, Any]:
        """As every policy of Stable-Baselines3, with masks (n, V)."""
        with self._masked_by(action_masks):
            return super().predict(observation, state, episode_start, deterministic)

    @contextlib.contextmanager
    def _masked_by(self, masks: Any) -> Iterator[None]:
        before = self._given
        if masks is not None:  # without, those of whoever is outside hold
            self._given = torch.as_tensor(masks, device=self.device).bool()
        try:
            yield
        finally:
            self._given = before

    def _mask(self, logits: Tensor) -> Tensor | None:
        if self._given is not None:
            return self._given.reshape(logits.shape)
        if self.token_filter.uses_reference:
            raise ValueError("top_k and top_p are the reference's, which a policy does not know; pass action_masks=")
        return super()._mask(logits)


# Not a subclass: its constructor builds another network. The algorithm asks for no more than the methods.
MaskableActorCriticPolicy.register(LMMaskablePolicy)


class MaskablePPO(SB3PPO):
    """sb3-contrib's MaskablePPO; see the module's docstring and ``SB3PPOConfig``.

    Mind that its buffer keeps the masks as float32: 4 V bytes per token of a rollout.
    """

    algorithm_class = sb3_contrib.MaskablePPO
    policy_class = LMMaskablePolicy
    buffer_class = CompactMaskableRolloutBuffer

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next tokens among those that the environment would allow after these texts."""
        with self.algorithm.policy._masked_by(self._masks_of(observation)):
            return super().predict(observation, deterministic)

    @torch.no_grad()
    def _masks_of(self, observation: dict[str, Any]) -> Tensor | None:
        token_filter = self.algorithm.policy.token_filter
        if not token_filter.uses_reference:
            return None
        model = self.envs.unwrapped.language_model.model
        device = next(model.parameters()).device
        obs = {key: torch.as_tensor(value, device=device) for key, value in observation.items()}
        ids, lengths = sequences({key: value[None] if value.dim() == 1 else value for key, value in obs.items()})
        with inference(model):
            at = ids, torch.arange(len(ids), device=device)[None], lengths[None] - 1
            logits = forward_at(model, *at, use_cache=False)[0][0]
        return token_filter.mask(logits) & (logits > -torch.inf)
