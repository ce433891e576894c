"""Policies that are computed from a language model, as the language models that they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_gym.exact.table import TableForCausalLM
from rlhf_gym.lm.forward import forward_at

from .policy import FORBIDDEN


class DerivedLM(nn.Module):
    """A model with its next-token distribution replaced by what `next_logits` makes of its logits and hidden states.

    It can be called, with a cache too, as a causal language model of transformers can. It cannot be saved as one.

    Args:
        lm: The model underneath.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm, self.config = lm, lm.config

    device = property(lambda self: self.lm.device)
    dtype = property(lambda self: self.lm.dtype)
    has_fixed_size_cache = property(lambda self: getattr(self.lm, "has_fixed_size_cache", False))

    def get_output_embeddings(self) -> None:
        """None: there is no linear head at the end."""

    def next_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The policy's logits (n, V) where the model's are these, and the inputs of its head (n, d) those."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        """Logits (B, L, V) of every position; ``kwargs`` (mask, cache) are the model's."""
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        logits, hidden, output = forward_at(self.lm, input_ids, rows, columns, **kwargs)
        found = self.next_logits(logits.flatten(0, 1), hidden.flatten(0, 1)).unflatten(0, input_ids.shape)
        return SimpleNamespace(logits=found, past_key_values=getattr(output, "past_key_values", None))


def certain(actions: Tensor, num_actions: int) -> Tensor:
    """Logits of a policy that takes these actions (n,) for certain. Shape (n, num_actions), float32, finite."""
    return (1.0 - nn.functional.one_hot(actions.long(), num_actions).float()) * FORBIDDEN


@torch.no_grad()
def set_rows(table: TableForCausalLM, rows: Tensor) -> None:
    """Gives the states of a table these logits, (S, V); -inf becomes a large number, for weights are to be finite."""
    head = table.lm_head
    if hasattr(head, "residual"):
        head.residual.zero_()
    (head.reference if hasattr(head, "reference") else head.logprobs).copy_(rows.clamp(min=FORBIDDEN))
