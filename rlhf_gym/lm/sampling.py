"""Which tokens may be chosen, with what probability, and the choice itself."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenFilter:
    """The distribution that tokens are drawn from, as a function of the model's logits.

    The logits are divided by ``temperature``, tokens outside of a set are forbidden, and what is left is normalised.
    The set is the same for every model that is compared: `top_k` and `top_p` look at the *reference* model's logits.
    If each model made its own cut, log pi_ref would be -inf for many tokens that the policy chooses.
    """

    temperature: float = 1.0
    """Divides the logits, of the reference and of the policy alike; above 0."""
    top_k: int | None = None
    """Allow the k tokens that the reference finds likeliest; at least 1."""
    top_p: float | None = None
    """Allow the smallest set of likeliest tokens (at this temperature) with probability of at least p; in (0, 1]."""
    allowed_tokens: tuple[int, ...] | None = None
    """Allow these ids only; applied before the other two."""

    def __post_init__(self):
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ValueError(
                f"temperature must be a finite number above 0, got {self.temperature!r} (use greedy for 0)"
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            raise ValueError(f"top_k must be None or an integer of at least 1, got {self.top_k!r}")
        if self.top_p is not None and not (isinstance(self.top_p, (int, float)) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be None or a number in (0, 1], got {self.top_p!r}")
        if self.allowed_tokens is not None:
            tokens = tuple(sorted({int(token) for token in self.allowed_tokens}))
            if not tokens or tokens[0] < 0:
                raise ValueError(
                    f"allowed_tokens must be None or some token ids from 0 on, got {self.allowed_tokens!r}"
                )
            object.__setattr__(self, "allowed_tokens", tokens)

    @property
    def uses_reference(self) -> bool:
        """Whether `mask` looks at the values of the reference logits and not only at their shape."""
        return self.top_k is not None or self.top_p is not None

    @property
    def restricts(self) -> bool:
        """Whether some tokens may not be chosen."""
        return self.uses_reference or self.allowed_tokens is not None

    @property
    def is_trivial(self) -> bool:
        """Whether the distribution is the model's own."""
        return self.temperature == 1 and not self.restricts

    def mask(self, reference_logits: Tensor, keep: Tensor | None = None) -> Tensor | None:
        """Which tokens may be chosen.

        Args:
            reference_logits: The reference model's logits. Shape (..., V). Only the shape matters unless
                `uses_reference`.
            keep: Tokens that are known to have been chosen under this filter. Computing the same logits in another way
                changes their last bits, which would now and then put a token at the edge of the set outside of it;
                a kept token within 0.01 of the edge stays inside. Shape (...), int64.

        Returns:
            True where allowed, shape (..., V), bool; None when every token is allowed.
        """
        if self.allowed_tokens is None and not self.uses_reference:
            return None
        vocab_size = reference_logits.shape[-1]
        static = None
        if self.allowed_tokens is not None:
            static = _mask_of(self.allowed_tokens, vocab_size, reference_logits.device)
            if not self.uses_reference:
                return static.clone().expand(reference_logits.shape)
        scaled = reference_logits.float() / self.temperature
        if static is not None:
            scaled = scaled.masked_fill(~static, -math.inf)
        num_ranked = vocab_size if self.top_p is not None else min(self.top_k, vocab_size)
        values, tokens = scaled.topk(num_ranked, dim=-1)
        inside = values > -math.inf
        if self.top_k is not None:
            inside[..., self.top_k :] = False
        if self.top_p is not None:
            probs = torch.softmax(values.masked_fill(~inside, -math.inf), dim=-1)
            inside &= (probs.cumsum(-1) - probs < self.top_p) | (torch.arange(num_ranked, device=probs.device) == 0)
        allowed = torch.zeros(scaled.shape, dtype=torch.bool, device=scaled.device).scatter_(-1, tokens, inside)
        if keep is not None:
            edge = values.masked_fill(~inside, math.inf).amin(-1)
            kept = scaled.gather(-1, keep[..., None])[..., 0]
            near = (kept >= edge - 0.01 / self.temperature)[..., None]
            allowed |= near & (torch.arange(vocab_size, device=scaled.device) == keep[..., None])
        return allowed

    def logprobs(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probabilities of all tokens: log_softmax(logits / temperature) over the allowed ones, -inf elsewhere.

        Args:
            logits: Logits of the model in question, policy or reference. Shape (..., V).
            mask: What `mask` returned. Shape (..., V), bool, or None.

        Returns:
            Log-probabilities in nats. Shape (..., V), float32.
        """
        return torch.log_softmax(self._processed(logits, mask), dim=-1)

    def token_logprobs(self, logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-probabilities of some tokens only, without a log-softmax of the whole vocabulary.

        Args:
            logits: Logits of the model in question. Shape (..., V).
            tokens: One token per position. Shape (...), int64.
            mask: What `mask` returned. Shape (..., V), bool, or None.

        Returns:
            Log-probabilities in nats. Shape (...), float32.
        """
        processed = self._processed(logits, mask)
        return processed.gather(-1, tokens[..., None])[..., 0] - processed.logsumexp(-1)

    def _processed(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits if mask is None else logits.masked_fill(~mask, -math.inf)


@functools.lru_cache(maxsize=8)
def _mask_of(allowed_tokens: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor:
    """True for these tokens, (V,), made once: a GPU would have to be waited for. Not to be changed."""
    if allowed_tokens[-1] >= vocab_size:
        raise ValueError(f"allowed_tokens must be below the vocabulary size {vocab_size}, got {allowed_tokens[-1]}")
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    mask[list(allowed_tokens)] = True
    return mask


def sample_tokens(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token per row by inverting the cumulative distribution.

    One uniform number per token makes a draw a function of its arguments: it depends on no generator and on no other
    row. (It is also far cheaper than ``torch.multinomial`` for a large vocabulary.)

    Args:
        logprobs: Log-probabilities; -inf is never drawn. Shape (B, V), float32.
        uniforms: Numbers in [0, 1). Shape (B,).

    Returns:
        Tokens. Shape (B,), int64.

    Raises:
        ValueError: If a row holds NaN, as the log-probs of a model with broken weights do, or nothing that can be drawn.
    """
    tokens, total = choose_tokens(logprobs, uniforms)
    if not bool((total > 0).all()):
        row = int((~(total > 0)).nonzero()[0])
        raise ValueError(
            f"logprobs must give some token a probability above 0, but those of row {row} sum to {total[row].item()}; "
            "NaN comes from a model whose weights are NaN or infinite"
        )
    return tokens


def choose_tokens(logprobs: Tensor, uniforms: Tensor, restricted: bool = True) -> tuple[Tensor, Tensor]:
    """`sample_tokens` without its check, for which a GPU would have to be waited for.

    Args:
        logprobs, uniforms: As there.
        restricted: Whether some log-probabilities may be -inf.

    Returns:
        Tokens (B,), int64, any at all where the total is not above 0; and the totals of the probabilities (B,).
    """
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1]
    # Below the total, whatever the rounding: the first entry that exceeds it exists and has a probability above 0.
    threshold = torch.minimum(uniforms.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)
    if restricted and logprobs.device.type != "cpu":
        # A parallel scan adds in a different order for different entries, so it can grow by a rounding error at a token
        # of probability 0.
        forbidden = logprobs.gather(1, tokens[:, None])[:, 0] == -math.inf
        tokens = torch.where(forbidden, logprobs.argmax(-1), tokens)
    return tokens, total
