"""ReMax for text: REINFORCE with the likeliest response as the baseline.

    1. Sample a response to each prompt, and generate the likeliest one (greedily, token by token) as well.
    2. The environment scores both: S = score - kl_coef * sum_t (log pi - log pi_ref), the KL in the reward.
    3. Advantage of a whole response: A = S - S of the likeliest one (Li et al. 2023, algorithm 1).
    4. One pass over the batch in num_minibatches steps along mean_i A_i ratio_i grad(log pi(y_i)) / R, where ratio_i =
    pi(y_i) / pi_old(y_i) is that of the whole response and R the longest length that there can be. The ratio is 1 in the
    first step; later ones see a policy that has moved, and without it the baseline would no longer have the expectation
    0. It is not clipped: for more than one pass take RLOO.

Objective: it maximises E[score] - kl_coef * KL(pi || pi_ref) over whole responses, without bias: the likeliest response
depends on the prompt and the policy only. At the optimum every response has the same S, the likeliest one too, so all
advantages are 0 and the noise is gone. On the way there the likeliest response may be far better or worse than the
mean, and the noise is larger than RLOO's: the same number of episodes gets less far (docs/agents.md has figures).

How it differs from Li et al. 2023: their code pays each token its own KL alone, which is short-sighted ("per token" in
docs/exact.md), and leaves the KL out of the baseline, so that advantages do not go to 0; the loss is divided by the
longest length that there can be, not by the number of tokens; scores are not clipped; several steps per rollout.

Timesteps count the tokens of the likeliest responses too. Equal prompts share one; an environment that has to be stepped
generates one for each row, and half of the budget goes there.

Metrics beside those of every agent: ``train/baseline`` (mean S of the likeliest responses), ``train/approx_kl`` (old to
new policy, nats per response, k3), ``train/ratio`` (of whole responses), ``train/policy_gradient_loss``,
``train/entropy_loss`` (minus the mean entropy per token), ``train/grad_norm``, ``train/learning_rate``,
``train/n_updates`` (optimiser steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import AgentConfig, check_fields
from .functional import aggregate_loss, masked_mean, policy_loss_clipped
from .updates import optimise, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class ReMaxConfig(AgentConfig):
    """Settings of ReMax, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_epochs: 1, see the module's docstring.
        num_minibatches: Optimiser steps per rollout. 1 is on-policy throughout.
    """

    num_minibatches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        once = ("1, as nothing is clipped (for several passes take RLOO)", lambda x: x == 1)
        check_fields(self, {"num_epochs": once})


class ReMax(Agent):
    """REINFORCE with a greedy baseline; see the module's docstring and :class:`ReMaxConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)    # doctest: +SKIP
        >>> ReMax(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")   # doctest: +SKIP
    """

    config_class = ReMaxConfig
    needs_baselines = True

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        mask = batch.response_mask
        returns = torch.where(mask, batch.rewards, 0.0).sum(1)
        batch = replace(batch, advantages=(returns - rollout.baselines)[:, None].expand_as(mask))
        found = optimise(self, batch, self.loss, mode="constant")
        return train_metrics(found | {"baseline": rollout.baselines.mean().item()}, mismatch)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        mask = batch.response_mask
        logprobs, _, entropy = self.policy(batch)
        # A response is one action: its log-prob is the sum over its tokens, its mask is True.
        logprob = logprobs.sum(1, keepdim=True)
        old_logprob = torch.where(mask, batch.logprobs, 0.0).sum(1, keepdim=True)
        per_response, stats = policy_loss_clipped(
            logprob, old_logprob, batch.advantages[:, :1], mask[:, :1], clip_range=None
        )
        loss = aggregate_loss(per_response, mask[:, :1], "constant", normaliser=normaliser)
        stats = {"approx_kl": stats["approx_kl"], "ratio": stats["ratio"], "entropy_loss": -masked_mean(entropy, mask)}
        return {"policy_loss": loss, "loss": loss}, stats
