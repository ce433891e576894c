"""RLOO for text: REINFORCE with the other responses to the same prompt as the baseline.

    1. Sample ``group_size`` responses to each prompt.
    2. The environment scores them: S = score - kl_coef * sum_t (log pi - log pi_ref), the KL in the reward.
    3. Advantage of a whole response: A_i = S_i - mean of the other S_j (Kool et al. 2019; Ahmadian et al. 2024, section
    on RLOO). The others are all responses to that prompt in the rollout: several groups may have drawn it.
    4. One pass over the batch in num_minibatches steps of the loss -mean_i min(A_i ratio_i, A_i clip(ratio_i)) / R, with
    ratio_i = pi(y_i) / pi_old(y_i) of the whole response, which is one action, and R the longest length that there can
    be (it keeps gradients within max_grad_norm). In the first step the ratio is 1, and the gradient is that of -mean_i
    A_i log pi(y_i) / R.

Objective: it maximises E[score] - kl_coef * KL(pi || pi_ref) over whole responses, without bias: the other responses say
nothing of y_i, so what they subtract has the expectation 0, and nothing is divided by a spread. At the optimum every
response has the same S, so all advantages are 0 and the noise is gone. On the way there each token bears the noise of the
whole response, and where all tokens are paid (Lexicon) REINFORCE with a learned baseline gets further.

How it differs from TRL's ``RLOOTrainer``: groups of four and not of two; responses to the same prompt count wherever
they stand; several steps per rollout; the learning rate falls linearly to 0.

Metrics beside those of every agent: ``train/approx_kl`` (old to new policy, nats per response, k3),
``train/clip_fraction`` and ``train/ratio`` (of whole responses), ``train/policy_gradient_loss``,
``train/entropy_loss`` (minus the mean entropy per token), ``train/grad_norm``, ``train/learning_rate``,
``train/n_updates`` (optimiser steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import GROUP, SHARE, AgentConfig, check_fields
from .functional import aggregate_loss, masked_mean, policy_loss_clipped
from .updates import optimise, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(AgentConfig):
    """Settings of RLOO, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_epochs, num_minibatches: Passes over each rollout, and optimiser steps per pass. 1 and 1 is on-policy
            throughout.
        group_size: Responses to each prompt, at least; divides the environment's rows.
        clip_range: Largest change of a response's probability ratio that is still rewarded.
    """

    num_minibatches: int = 4
    group_size: int = 4
    clip_range: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"group_size": GROUP, "clip_range": SHARE})


class RLOO(Agent):
    """REINFORCE leave-one-out; see the module's docstring and :class:`RLOOConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)   # doctest: +SKIP
        >>> RLOO(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")   # doctest: +SKIP
    """

    config_class = RLOOConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        mask = batch.response_mask
        returns = torch.where(mask, batch.rewards, 0.0).sum(1)
        advantages = leave_one_out(returns, prompt_numbers(batch.ids, batch.prompt_lengths))
        batch = replace(batch, advantages=advantages[:, None].expand_as(mask))
        return train_metrics(optimise(self, batch, self.loss, mode="constant"), mismatch)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        mask = batch.response_mask
        logprobs, _, entropy = self.policy(batch)
        # A response is one action: its log-prob is the sum over its tokens, its mask is True.
        logprob = logprobs.sum(1, keepdim=True)
        old_logprob = torch.where(mask, batch.logprobs, 0.0).sum(1, keepdim=True)
        per_response, stats = policy_loss_clipped(
            logprob, old_logprob, batch.advantages[:, :1], mask[:, :1], clip_range=self.config.clip_range
        )
        loss = aggregate_loss(per_response, mask[:, :1], "constant", normaliser=normaliser)
        return {"policy_loss": loss, "loss": loss}, stats | {"entropy_loss": -masked_mean(entropy, mask)}


def prompt_numbers(ids: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Which rows have the same prompt: equal numbers, from 0 on. (B, L) and (B,) -> (B,) int64."""
    prompt = torch.arange(ids.shape[1], device=ids.device) < prompt_lengths[:, None]
    return torch.where(prompt, ids, -1).unique(dim=0, return_inverse=True)[1]


def leave_one_out(returns: Tensor, prompts: Tensor) -> Tensor:
    """Return of each response less the mean return of the other responses to the same prompt.

    Args:
        returns: Summed rewards of whole responses. Shape (B,), float32.
        prompts: Number of each one's prompt, from 0 on; at least two responses each. Shape (B,), int64.

    Returns:
        Advantages, exactly 0 where all returns to a prompt are equal, and summing to 0 for every prompt. Shape (B,).

    Source:
        Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".

    Example:
        >>> leave_one_out(torch.tensor([1.0, 5.0, 0.0, 5.0, 0.0]), torch.tensor([0, 1, 0, 1, 0]))
        tensor([ 1.0000,  0.0000, -0.5000,  0.0000, -0.5000])
    """
    which = torch.nn.functional.one_hot(prompts).to(returns.dtype)  # (B, prompts)
    counts = which.sum(0)[prompts]
    # From the smallest return to the prompt, so that equal ones give exactly 0.
    lowest = torch.where(which > 0, returns[:, None], torch.inf).amin(0)
    above = returns - lowest[prompts]
    return (above - (above @ which)[prompts] / counts) * counts / (counts - 1)
