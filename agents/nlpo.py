"""Natural language policy optimisation: PPO that chooses among the likeliest tokens of a slowly moving policy.

    1. A masking policy is a copy of the policy, renewed every ``mask_update_interval`` updates.
    2. In each state the tokens outside of the masking policy's top-p (or top-k) are forbidden, and the policy is
    renormalised on the rest: in the sampling, in the ratios and entropies of the update, and when it acts later.
    3. The rest is PPO (``ppo.py``).

Objective: the environment's E[score] - kl_coef * KL(pi || pi_ref), with pi the *masked* policy and pi_ref the *whole*
reference, over those policies only that the mask allows. With a mask that stays, S the responses that it allows, the best
that can be had is kl_coef log sum_{y in S} pi_ref(y) exp(score(y) / kl_coef): it lacks -kl_coef log pi*(S) of the
optimum, which is nothing where pi* stays within the mask and everything where S has no good response. Which S that
will be depends on the way: a token that has once fallen out is neither sampled nor learnt from, and comes back only
if the others in its state become less likely than it. So there is a bias, and no estimate of it from the inside: at the
optimum within the mask the certificate of ``audit/`` is 0 too.

What it is for: a large vocabulary, most of which is never sensible, without a word about which part.

How it differs from Ramamurthy et al. 2022 (algorithm 1) and their code, RL4LMs: there EOS is always allowed, and some
minimum of tokens; the KL in the reward is that of the policy without its mask, while the tokens come from the masked
one, so the penalty is not the KL of what is sampled.

``policy_model`` is the masked policy, as a module that gives -inf to forbidden tokens. A saved agent's directory holds the
language model without its mask, for ``from_pretrained``, and the masking policy in ``mask/``.

Metrics beside those of PPO: ``train/allowed_tokens``, their mean number over the states that were visited.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlhf_gym.lm import TokenFilter

from .batch import Rollout
from .config import COUNT, COUNT_OR_NONE, check_fields
from .ppo import PPO, PPOConfig


@dataclass(frozen=True, kw_only=True)
class NLPOConfig(PPOConfig):
    """Settings of NLPO, and those of PPO.

    Attributes:
        mask_top_p: Probability that the allowed tokens have at least under the masking policy; None: no such bound.
        mask_top_k: Most tokens that are allowed; None: any number.
        mask_update_interval: Updates from one copy of the policy to the next.
    """

    mask_top_p: float | None = 0.9
    mask_top_k: int | None = None
    mask_update_interval: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            {
                "mask_top_p": ("None or a number in (0, 1]", lambda x: x is None or 0 < x <= 1),
                "mask_top_k": COUNT_OR_NONE,
                "mask_update_interval": COUNT,
            },
        )
        if self.mask_top_p is None and self.mask_top_k is None:
            raise ValueError("mask_top_p or mask_top_k must be given, got None for both; without a mask it is PPO")
        if self.fsdp:
            raise ValueError("fsdp must be False for NLPO, whose mask is a whole copy of the policy; leave it out")


class NLPO(PPO):
    """Natural language policy optimisation; see the module's docstring and :class:`NLPOConfig`.

    Args:
        envs, policy, seed, **arguments: As in :class:`~rlhf_gym.agents.base.Agent`; the environment has no top-k or
            top-p of its own.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)      # doctest: +SKIP
        >>> NLPO(envs, seed=0, mask_top_p=0.95).learn(100_000).save("runs/nlpo")           # doctest: +SKIP
    """

    config_class = NLPOConfig

    def __init__(self, envs: VectorEnv, policy: Any = None, seed: int = 0, **arguments: Any):
        super().__init__(envs, policy, seed, **arguments)
        cfg, policy = self.config, self.policy
        if policy.token_filter.uses_reference:
            raise ValueError(
                "envs must have no top_k and top_p, which are taken on the reference: NLPO's mask is the policy's own. "
                "Give mask_top_k or mask_top_p to the agent instead"
            )
        if cfg.lora_rank is not None:
            raise ValueError("lora_rank must be None: NLPO's mask is a copy of the whole policy")
        policy.token_filter = replace(policy.token_filter, top_p=cfg.mask_top_p, top_k=cfg.mask_top_k)
        policy.mask_model = copy.deepcopy(policy.model).requires_grad_(False)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """PPO's update, and now and then another mask; returns the ``train/`` metrics."""
        metrics = super().update(rollout)
        if (self.num_updates + 1) % self.config.mask_update_interval == 0:
            self.policy.mask_model.load_state_dict(self.policy.model.state_dict())
        num_allowed = rollout.batch.allowed[rollout.batch.response_mask].sum(1)
        return metrics | {"train/allowed_tokens": num_allowed.float().mean().item()}

    @property
    def policy_model(self) -> MaskedLM:
        """The policy with its mask, for evaluation."""
        return MaskedLM(self.policy.model, self.policy.mask_model, self.policy.token_filter)


class MaskedLM(nn.Module):
    """A causal language model that gives -inf to the tokens that another one's top-k or top-p leaves out.

    It has no cache, which is enough for evaluation; rollouts run both models with theirs.

    Args:
        model: The model.
        mask_model: The one whose logits the filter looks at.
        token_filter: The filter.
    """

    def __init__(self, model: Any, mask_model: Any, token_filter: TokenFilter):
        super().__init__()
        self.model, self.mask_model, self.token_filter = model, mask_model, token_filter
        self.config = model.config

    has_cache = False
    device = property(lambda self: self.model.device)
    dtype = property(lambda self: self.model.dtype)

    def get_output_embeddings(self) -> None:
        """None: what comes out is not the product of any head."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits of every position, (B, L, V)."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        allowed = self.token_filter.mask(self.mask_model(**given).logits)
        return CausalLMOutputWithPast(logits=self.model(**given).logits.masked_fill(~allowed, -torch.inf))
