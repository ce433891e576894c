"""sb3-contrib's MaskablePPO with a language model: only what ``action_masks()`` allows can be chosen.

The mask is the environment's: made with ``top_k=k`` (or ``top_p``), the reference's k likeliest tokens in each state;
and what ``allowed_tokens`` and a table forbid. Policy and reference are both renormalised on it. Or it is the agent's
own, ``MaskablePPO(envs, top_k=k)`` in an environment that allows every token: then the policy alone is renormalised on
the reference's k likeliest tokens, and the task is that of all other agents.

Objective: E[score] - kl_coef * KL(pi || pi_ref) over whole responses and over those policies only that the mask allows,
with pi_ref renormalised on the environment's mask, and whole beside the agent's own. That one is biased where the optimum
pi* leaves the mask: with S the responses that it allows, it lacks -kl_coef log pi*(S). Without any mask it is
Stable-Baselines3's PPO.

Source:
    Huang and Ontanon 2022, arXiv:2006.14171 (invalid action masking); Ramamurthy et al. 2022, arXiv:2210.01241, whose
    NLPO masks by a copy of the policy that follows it, where this mask is the reference's and stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sb3_contrib
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from rlhf_gym.lm import TokenFilter
from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.forward import forward_at

from ..config import COUNT_OR_NONE, check_fields
from ..nlpo import MaskedLM
from .algorithms import SB3PPO, SB3PPOConfig
from .buffers import CompactMaskableRolloutBuffer
from .policy import LMActorCriticPolicy, sequences
from .vec_env import as_vec_env


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


class ReferenceTopK(VectorWrapper):
    """An environment that also masks what is not among the reference's ``top_k`` likeliest tokens; it refuses none."""

    def __init__(self, env: VectorEnv, top_k: int) -> None:
        super().__init__(env)
        self.token_filter = TokenFilter(top_k=top_k)

    def action_masks(self) -> Tensor:
        """True where a token may be chosen next. Shape (num_envs, V), bool."""
        process = self.unwrapped.process
        return process.action_masks() & self.token_filter.mask(process.next_ref_logprobs())


@dataclass(frozen=True, kw_only=True)
class MaskablePPOConfig(SB3PPOConfig):
    """Settings of MaskablePPO, and those of ``SB3PPOConfig``.

    Attributes:
        top_k: Choose among the reference's k likeliest tokens in each state; None: among what the environment allows.
    """

    top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"top_k": COUNT_OR_NONE})


class MaskablePPO(SB3PPO):
    """sb3-contrib's MaskablePPO; see the module's docstring and ``MaskablePPOConfig``.

    With ``top_k`` its ``policy_model`` is the masked policy, which gives -inf to other tokens; what is saved is the
    language model without the mask, for ``from_pretrained``.

    Mind that its buffer keeps the masks as float32: 4 V bytes per token of a rollout.
    """

    algorithm_class = sb3_contrib.MaskablePPO
    config_class = MaskablePPOConfig
    policy_class = LMMaskablePolicy
    buffer_class = CompactMaskableRolloutBuffer

    def make_policy(self, policy: Any, arguments: dict[str, Any]) -> None:
        """As for every agent; the policy's filter has the agent's own ``top_k``."""
        super().make_policy(policy, arguments)
        top_k = arguments.pop("top_k")
        if top_k is None:
            return
        base, kwargs = self.envs.unwrapped, arguments["policy_kwargs"]
        if not isinstance(self.envs, VectorEnv) or getattr(base, "language_model", None) is None:
            raise ValueError(
                f"top_k needs a vector environment of text with a reference, got {type(base).__name__}; use "
                "gym.make_vec, and leave top_k out where there is no reference"
            )
        if kwargs["token_filter"].uses_reference:
            raise ValueError(f"top_k must be None where the environment has top_k or top_p of its own, got {top_k}")
        kwargs["token_filter"] = replace(kwargs["token_filter"], top_k=top_k)

    def make_venv(self) -> VecEnv:
        """The environment, with the agent's own mask if it has one."""
        top_k = self.config.top_k
        return super().make_venv() if top_k is None else as_vec_env(ReferenceTopK(self.envs, top_k))

    @property
    def policy_model(self) -> Any:
        """The language model; with ``top_k`` under its mask, for evaluation."""
        model = super().policy_model
        if self.config.top_k is None:
            return model
        return MaskedLM(model, self.envs.unwrapped.language_model.model, self.algorithm.policy.token_filter)

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next tokens among those that the masks would allow after these texts."""
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
