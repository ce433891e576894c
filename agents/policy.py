"""The policy of the batched agents: a causal LM with a value head, differentiable over whole responses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_gym.lm import TokenFilter, load_language_model
from rlhf_gym.lm.forward import forward_at, logprobs_at
from rlhf_gym.lm.lora import adapted_copy

from .functional import entropy_from_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .batch import Batch

CRITICS = ("shared", "separate", "none")


class Policy(nn.Module):
    """A language model that chooses tokens, and a value head that says what the state is worth.

    The value head reads what the LM head reads: the hidden state of the last token *before* the action, so V never sees
    the action. It starts at 0.

    Args:
        model: The causal LM to train, taken as it is. Dropout is off always: with it the ratio of new to old would not
            be 1 to begin with.
        critic: "shared" (the head on the LM's trunk), "separate" (a trunk of its own, a copy) or "none" (no value head;
            values are 0).
        token_filter: Temperature and masks of the process.

    Attributes:
        mask_model: Whose logits a top-k or top-p looks at. None: the environment's reference.
    """

    def __init__(self, model: PreTrainedModel, *, critic: str = "shared", token_filter: TokenFilter | None = None):
        super().__init__()
        if critic not in CRITICS:
            raise ValueError(f"critic must be one of {', '.join(map(repr, CRITICS))}, got {critic!r}")
        # Layers that the caller has frozen stay so; a reference's copy comes frozen altogether.
        self.model = model if any(p.requires_grad for p in model.parameters()) else model.requires_grad_(True)
        self.critic = copy.deepcopy(model) if critic == "separate" else None
        self.token_filter = token_filter or TokenFilter()
        self.mask_model: PreTrainedModel | None = None
        self.value_head = None if critic == "none" else self._make_value_head()
        self.eval()

    def _make_value_head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        width = (
            self.model.config.get_text_config().hidden_size
            if head is None or not hasattr(head, "in_features")
            else head.in_features
        )
        # A model may say that only the first of the LM head's inputs are for a value head.
        value_head = nn.Linear(getattr(self.model, "value_width", width), 1, device=self.device)
        nn.init.zeros_(value_head.weight)
        nn.init.zeros_(value_head.bias)
        return value_head

    @property
    def device(self) -> torch.device:
        """Where the LM lives."""
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> Policy:
        """Stays in eval mode whatever is asked, so that dropout is off; gradients do not depend on it."""
        return super().train(False)

    def value(self, hidden: Tensor) -> Tensor:
        """Values of states given the LM head's input. (..., d) -> (...), float32."""
        if self.value_head is None:
            return torch.zeros(hidden.shape[:-1], device=hidden.device)
        # In float32 whatever the trunk computes in: a value rounded to 8 bits would drown the advantages.
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        return nn.functional.linear(hidden[..., : self.value_head.in_features].float(), weight, bias)[..., 0]

    def forward(self, batch: Batch, *, with_entropy_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the response tokens, values of the states they were chosen in, and entropies there.

        The LM head runs on response tokens only, packed, so neither prompts nor padding reach the (tokens, V) logits.

        Args:
            batch: Some rows of a rollout.
            with_entropy_gradient: Whether the entropy is to be differentiated (it costs a copy of the logits).

        Returns:
            Three tensors (B, R), float32, 0 after the end.
        """
        row, step = batch.response_mask.nonzero(as_tuple=True)
        columns = (batch.prompt_lengths[row] - 1 + step)[None]
        tokens = batch.response_ids[row, step]
        known = None
        if not with_entropy_gradient:
            known = logprobs_at(self.model, batch.ids, row, columns[0], tokens, self.token_filter, batch.allowed)
        if known is not None:
            logprobs, entropy, hidden = known[0], known[1], known[2][None]
        else:
            logprobs, entropy, hidden = self._by_logits(batch, row, step, columns, tokens, with_entropy_gradient)
        if self.critic is not None:
            hidden = forward_at(self.critic, batch.ids, row[None], columns, use_cache=False)[1]
        values = self.value(hidden[0])
        return tuple(
            torch.zeros(batch.response_ids.shape, device=x.device).index_put((row, step), x)
            for x in (logprobs, values, entropy)
        )

    def _by_logits(
        self, batch: Batch, row: Tensor, step: Tensor, columns: Tensor, tokens: Tensor, with_entropy_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs (N,), entropies (N,) and hidden states (1, N, d), for any model and any filter."""
        logits, hidden, _ = forward_at(self.model, batch.ids, row[None], columns, use_cache=False)
        logits = logits[0].float()
        allowed = self._allowed(batch, logits, row, step)
        logprobs = self.token_filter.token_logprobs(logits, tokens, allowed)
        with torch.set_grad_enabled(with_entropy_gradient):
            scaled = logits / self.token_filter.temperature
            entropy = entropy_from_logits(scaled if allowed is None else scaled.masked_fill(~allowed, -torch.inf))
        return logprobs, entropy, hidden

    def _allowed(self, batch: Batch, logits: Tensor, row: Tensor, step: Tensor) -> Tensor | None:
        if batch.allowed is not None:
            return batch.allowed[row, step]  # as it was when the token was chosen
        return self.token_filter.mask(logits)


def make_policy_model(base: Any, policy: Any) -> tuple[Any, Any]:
    """The model to train and its tokenizer (None where nobody knows one)."""
    reference = getattr(base, "language_model", None)
    tokenizer = getattr(base, "tokenizer", None)
    if policy is None:
        if reference is None:
            raise ValueError(
                "policy is missing: this environment has no reference to copy; pass policy=, a causal LM or the "
                "name of one"
            )
        return copy.deepcopy(reference.model), tokenizer
    if isinstance(policy, (str, Path)):
        from rlhf_gym.exact import POLICY_KINDS, make_policy

        if policy in POLICY_KINDS:
            return make_policy(base, str(policy)), tokenizer
        loaded = load_language_model(str(policy), device=getattr(base, "device", "auto"), dtype="float32")
        return loaded.model, tokenizer or loaded.tokenizer
    if reference is not None and policy is reference.model:
        # Training it in place would move the reference with it, and the KL would stay 0 for ever.
        return copy.deepcopy(policy), tokenizer
    return policy, tokenizer


def adapted_reference(base: Any, policy: Any, rank: int, seed: int) -> tuple[Any, Any]:
    """The environment's reference with an adapter, and its tokenizer."""
    reference = getattr(base, "language_model", None)
    if policy is not None or reference is None:
        raise ValueError(
            "lora_rank needs an environment with a reference, which is the adapter's base, and no policy of its own; make "
            "the environment with that model"
        )
    return adapted_copy(reference.model, rank, base=reference.name, seed=seed), base.tokenizer
