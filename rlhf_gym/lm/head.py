"""From hidden states to log-probabilities of given tokens, without keeping logits over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul import linear

LOGITS_PER_PIECE = 2**24  # a piece of the logits that exists at a time: 64 MiB in float32
# So many may be kept from the forward to the backward pass, 128 MiB; more are computed twice.
PROBABILITIES_KEPT = 2**25


def head_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature) at some tokens, and the entropies of these distributions.

    Args:
        hidden: What the head reads. Shape (N, d). Differentiable, once.
        weight: The head's. Shape (V, d), of the same dtype.
        tokens: Shape (N,), int64.
        temperature: Divides the logits; above 0.

    Returns:
        Log-probabilities (N,) in nats, float32, differentiable; and entropies (N,) in nats, float32, which are not.
    """
    return _HeadLogprobs.apply(hidden, weight, tokens, temperature)


class _HeadLogprobs(torch.autograd.Function):
    """The gradient with respect to the logits is (one-hot - probabilities) / temperature, made piece by piece."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        num_tokens, vocab_size = len(tokens), len(weight)
        logprobs, entropies = torch.empty(2, num_tokens, device=hidden.device).unbind(0)
        keep = any(ctx.needs_input_grad) and num_tokens * vocab_size <= PROBABILITIES_KEPT
        kept = []
        for piece in _pieces(num_tokens, vocab_size):
            all_logprobs = _all_logprobs(linear(hidden[piece], weight), temperature)
            logprobs[piece] = all_logprobs.gather(1, tokens[piece, None])[:, 0]
            probabilities = all_logprobs.exp()
            entropies[piece] = -torch.linalg.vecdot(probabilities, all_logprobs)
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(hidden, weight, tokens, *kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, *_rest = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight = None
        for number, piece in enumerate(_pieces(len(tokens), len(weight))):
            share = gradient[piece, None] / ctx.temperature
            if kept:
                to_logits = kept[number] * -share
            else:
                to_logits = _all_logprobs(linear(hidden[piece], weight), ctx.temperature).exp_().mul_(-share)
            to_logits.scatter_add_(1, tokens[piece, None], share)
            to_logits = to_logits.to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[piece] = linear(to_logits, weight.t())
            if wants_weight:
                part = linear(to_logits.t(), hidden[piece].t())
                to_weight = part if to_weight is None else to_weight.add_(part)
        return to_hidden, to_weight, None, None


def _all_logprobs(logits: Tensor, temperature: float) -> Tensor:
    """(N, V), float32."""
    return torch.log_softmax(logits if temperature == 1 else logits.float() / temperature, -1, dtype=torch.float32)


def _pieces(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(1, LOGITS_PER_PIECE // vocab_size)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
