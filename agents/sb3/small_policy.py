"""A small policy on the reference's hidden state as the language model that it is."""

from __future__ import annotations

import copy

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_gym.exact.table import TableForCausalLM, encode_states
from rlhf_gym.wrappers.hidden_state import value_width
from rlhf_gym.wrappers.top_k import Ranks, rank_tokens

from .derived import DerivedLM, certain, set_rows


@torch.no_grad()
def action_logprobs(policy: BasePolicy, features: Tensor) -> Tensor:
    """Log-probabilities of all actions in n states, whatever the kind of policy.

    Args:
        policy: Of an on-policy algorithm, of DQN or QR-DQN (the greedy one), or any other (its deterministic choice).
        features: Observations, (n, d) float32.

    Returns:
        Shape (n, k), float32, in nats.
    """
    if hasattr(policy, "get_distribution"):  # actor-critic, with masks or without
        return policy.get_distribution(features).distribution.logits
    if hasattr(policy, "q_net"):
        return certain(policy.q_net(features).argmax(-1), int(policy.action_space.n))
    if hasattr(policy, "quantile_net"):
        return certain(policy.quantile_net(features).mean(1).argmax(-1), int(policy.action_space.n))
    return certain(policy._predict(features, deterministic=True).flatten(), int(policy.action_space.n))


class SmallPolicyLM(DerivedLM):
    """The reference, with its next-token distribution replaced by a policy over its k likeliest tokens.

    Args:
        policy: A policy whose observation is the reference's hidden state.
        ranks: What its actions stand for.
    """

    def __init__(self, policy: BasePolicy, ranks: Ranks) -> None:
        super().__init__(ranks.process.language_model.model)
        self.policy, self.ranks = policy, ranks

    @torch.no_grad()
    def next_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The policy's logits (n, V) where the reference's are these and its hidden states (n, d) those."""
        ranks, token_filter = self.ranks, self.ranks.process.token_filter
        mask = token_filter.mask(logits)
        tokens, possible = rank_tokens(token_filter.logprobs(logits, mask), ranks.k)
        logprobs = action_logprobs(self.policy, hidden[:, : value_width(self.lm)].float())
        if ranks.forbidden == "likeliest":
            tokens = torch.where(possible, tokens, tokens[:, :1])
        else:  # what the masks leave
            logprobs = logprobs.masked_fill(~possible, -torch.inf).log_softmax(-1)
        probs = torch.zeros(logits.shape, device=logits.device).scatter_add_(1, tokens, logprobs.exp())
        # Whoever uses these logits divides by the environment's temperature.
        return probs.log() * token_filter.temperature

    def as_table(self) -> PreTrainedModel | None:
        """The same model as a table where the reference is one (its exact evaluation is then exact), else None."""
        if not isinstance(self.lm, TableForCausalLM):
            return None
        table = copy.deepcopy(self.lm).requires_grad_(False)
        num_states = table.config.num_states
        hidden = encode_states(torch.arange(num_states, device=self.device), num_states)
        set_rows(table, self.next_logits(self.lm.row_logits(), hidden))
        return table
