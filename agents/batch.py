"""What the batched agents learn from: whole episodes, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B episodes, or some of them. R response columns, L = longest prompt + R.

    Attributes:
        ids: Prompt and response, right-padded. (B, L) int64.
        prompt_lengths: (B,) int64.
        response_ids: (B, R) int64.
        response_mask: True where a token is real. (B, R) bool.
        logprobs: log pi of the tokens when they were sampled, in nats. (B, R) float32.
        values: V of the states in which they were chosen. (B, R) float32.
        rewards: What the environment paid. (B, R) float32.
        scores: Score of each response. (B,) float32.
        ended_by_eos: (B,) bool.
        kl: KL estimate of each token; zeros where the environment has no reference. (B, R) float32.
        ref_logprobs: log pi_ref of the tokens, in nats; None where the environment has no reference. (B, R) float32.
        advantages, returns: What the algorithm made of the rewards; None before. (B, R) float32.
        allowed: Which tokens could be chosen; only with top-k or top-p, or where the environment tells masks of its
            own. (B, R, V) bool.
    """

    ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    values: Tensor
    rewards: Tensor
    scores: Tensor
    ended_by_eos: Tensor
    kl: Tensor
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    allowed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: Tensor) -> Batch:
        """These rows, cut to their longest response so that padding is not computed."""
        mask = self.response_mask[index]
        num_tokens = int(mask.sum(1).max())
        width = int((self.prompt_lengths[index] + mask.sum(1)).max())
        cut: dict[str, Any] = {}
        for item in fields(Batch):
            tensor = getattr(self, item.name)
            if tensor is None:
                continue
            tensor = tensor[index]
            cut[item.name] = (
                tensor[:, :width] if item.name == "ids" else tensor[:, :num_tokens] if tensor.dim() > 1 else tensor
            )
        return Batch(**cut)


@dataclass
class Rollout:
    """A batch of episodes with what is logged about it.

    Attributes:
        batch: The episodes.
        prompts, completions: Their texts where the environment tells them, for samples.
        terms: The reward's ledger, each (B,) float32.
        metrics: The environment's metrics, each (B,) float32, NaN where one did not apply; no part of the rewards.
        baselines: Summed reward of the likeliest response to each episode's prompt, (B,) float32; only for agents that
            ask for it.
        num_baseline_tokens: What those took to generate.
        num_tokens: Response tokens that were generated, EOS included: what a timestep counts.
    """

    batch: Batch
    prompts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    baselines: Tensor | None = None
    num_baseline_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.batch.response_mask.sum()) + self.num_baseline_tokens
