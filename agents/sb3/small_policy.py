"""A small policy on the reference's hidden state as the language model that it is."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_gym.exact.table import TableForCausalLM, encode_states
from rlhf_gym.lm.forward import forward_at
from rlhf_gym.wrappers.hidden_state import value_width
from rlhf_gym.wrappers.top_k import Ranks, rank_tokens

from .q_policy import SHARPNESS, set_rows


@torch.no_grad()
def action_logprobs(policy: BasePolicy, features: Tensor) -> Tensor:
    """Log-probabilities of all actions in n states, whatever the kind of policy.

    Args:
        policy: Of an on-policy algorithm, of DQN or QR-DQN (the greedy one), or any other (its deterministic choice).
        features: Observations, (n, d) float32.

    Returns:
        Shape (n, k), float32, in nats.
    """
    if isinstance(policy, ActorCriticPolicy):
        return policy.get_distribution(features).distribution.logits
    if hasattr(policy, "q_net"):
        return torch.log_softmax(SHARPNESS * policy.q_net(features), -1)
    if hasattr(policy, "quantile_net"):
        return torch.log_softmax(SHARPNESS * policy.quantile_net(features).mean(1), -1)
    chosen = policy._predict(features, deterministic=True)
    return nn.functional.one_hot(chosen.long().flatten(), int(policy.action_space.n)).float().log()


class SmallPolicyLM(nn.Module):
    """The reference, with its next-token distribution replaced by a policy over its k likeliest tokens.

    It can be called as a causal language model of transformers can, and saves nothing: it is what the reference and
    the policy are together.

    Args:
        policy: A policy whose observation is the reference's hidden state.
        ranks: What its actions stand for.
    """

    def __init__(self, policy: BasePolicy, ranks: Ranks) -> None:
        super().__init__()
        self.policy, self.reference, self._ranks = policy, ranks.process.language_model.model, (ranks,)
        self.config = self.reference.config

    device = property(lambda self: self.reference.device)
    dtype = property(lambda self: self.reference.dtype)
    has_fixed_size_cache = property(lambda self: getattr(self.reference, "has_fixed_size_cache", False))

    def get_output_embeddings(self) -> None:
        """None: what the policy makes of a hidden state is no linear head."""

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        """Logits (B, L, V) of every position; ``kwargs`` (mask, cache) are the reference's."""
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        logits, hidden, output = forward_at(self.reference, input_ids, rows, columns, **kwargs)
        found = self.next_logits(logits.flatten(0, 1), hidden.flatten(0, 1)).unflatten(0, input_ids.shape)
        return SimpleNamespace(logits=found, past_key_values=getattr(output, "past_key_values", None))

    def next_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The policy's logits (n, V) where the reference's are these and its hidden states (n, d) those."""
        ranks = self._ranks[0]
        token_filter = ranks.process.token_filter
        mask = token_filter.mask(logits)
        tokens, possible = rank_tokens(token_filter.logprobs(logits, mask), ranks.k)
        logprobs = action_logprobs(self.policy, hidden[:, : value_width(self.reference)].float())
        if ranks.forbidden == "likeliest":
            tokens = torch.where(possible, tokens, tokens[:, :1])
        else:  # what the masks leave
            logprobs = logprobs.masked_fill(~possible, -torch.inf).log_softmax(-1)
        probs = torch.zeros(logits.shape, device=logits.device).scatter_add_(1, tokens, logprobs.exp())
        # Whoever uses these logits divides by the environment's temperature.
        return probs.log() * token_filter.temperature

    def as_table(self) -> PreTrainedModel | None:
        """The same model as a table where the reference is one (its exact evaluation is then exact), else None."""
        if not isinstance(self.reference, TableForCausalLM):
            return None
        table = copy.deepcopy(self.reference).requires_grad_(False)
        num_states = table.config.num_states
        hidden = encode_states(torch.arange(num_states, device=self.device), num_states)
        set_rows(table, self.next_logits(self.reference.row_logits(), hidden))
        return table
