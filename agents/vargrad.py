"""VarGrad, or trajectory balance with a batch's own estimate of log Z: make the certificate of optimality constant.

    1. Sample groups of responses to the same prompt.
    2. S(y) = r(y) - beta * (log pi(y) - log pi_ref(y)) of each, with beta = kl_coef, r the score of the whole
    response and log pi that of the policy as it is now: S has a gradient.
    3. Loss: the variance of S within each group (over n - 1), divided by 2 beta.

Objective: E[score] - kl_coef * KL(pi || pi_ref) over whole responses. S is the same for all responses, namely J* =
beta log Z, if and only if pi is the optimal policy; so the variance is 0 there and nowhere else, **whatever policy
the responses come from**, as long as it can produce all of them. Several epochs need no importance weights and no
clipping, and at the optimum every sample's gradient is 0: there is no noise left to go round in. kl_coef must be > 0.

Relation to RLOO: with A_i = S_i minus the mean of the group's other S_j, the gradient of a group's loss is -1/n sum_i
A_i grad(log pi(y_i)). In the first step on fresh samples that is RLOO's with the KL in the reward, sample by sample
and not only in expectation (Richter et al. 2020); and its expectation is the gradient of the objective.
Afterwards RLOO's A_i stay what they were while the policy moves on; these are computed anew with it, and shrink as
the group comes into balance.

Source:
    Richter et al. 2020, "VarGrad"; Malkin et al. 2022, "Trajectory balance", whose learnt log Z is the group's mean
    here; Bartoldson et al. 2025, "Trajectory Balance with Asynchrony", for language models. Differs: the variance is
    over n - 1 and divided by 2 beta, so that one learning rate does for any group size and price; there is no replay.

Metrics beside those of every agent: ``train/variance`` (of S, within groups), ``train/approx_kl`` (old to new policy,
nats per token, k3), ``train/loss``, ``train/grad_norm``, ``train/learning_rate``, ``train/n_updates``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import GROUP, AgentConfig, check_fields
from .functional import approx_kl, group_advantages
from .updates import optimise, positive_kl_coef, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class VarGradConfig(AgentConfig):
    """Settings of VarGrad, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        group_size: Responses per prompt, >= 2; divides the environment's rows. The estimate of log Z adds about
            1 / (n - 1) to the gradient's variance, so there is little to be won beyond 8.
        num_epochs, num_minibatches: Passes over each rollout, and optimiser steps per pass.
    """

    group_size: int = 8
    num_epochs: int = 4
    num_minibatches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"group_size": GROUP})


class VarGrad(Agent):
    """VarGrad / trajectory balance; see the module's docstring and :class:`VarGradConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)      # doctest: +SKIP
        >>> VarGrad(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")    # doctest: +SKIP
    """

    config_class = VarGradConfig

    def before_rollout(self) -> None:
        """Refuses an environment without a KL penalty."""
        positive_kl_coef(self)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        return train_metrics(optimise(self, batch, self.loss, mode="sequence_sum"), mismatch)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some groups with its parts, and numbers for the log."""
        kl_coef, mask = positive_kl_coef(self, batch), batch.response_mask
        logprobs = self.policy(batch)[0]
        per_row = group_variance(
            logprobs, batch.ref_logprobs, batch.scores, mask, kl_coef=kl_coef, group_size=self.config.group_size
        )
        variance = per_row.sum() / normaliser
        parts = {"loss": variance / (2 * kl_coef), "variance": variance}
        return parts, {"approx_kl": approx_kl(logprobs.detach(), batch.logprobs, mask)}


def group_variance(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float, group_size: int
) -> Tensor:
    """Variance of S(y) = r(y) - kl_coef * (log pi(y) - log pi_ref(y)) among the responses to one prompt.

    Args:
        logprobs: Log-probabilities under the policy as it is now, with gradient. Shape (B, R), float32.
        ref_logprobs: Log-probabilities under the reference. Shape (B, R), float32.
        scores: Score of each response, without any KL. Shape (B,), float32.
        mask: True on real tokens. Shape (B, R), bool.
        kl_coef: Price of a nat.
        group_size: Responses per prompt, next to each other; n >= 2, divides B.

    Returns:
        Each response's share, n / (n - 1) * (S - group's mean)^2: their mean over a group is its variance. Exactly 0
        in a group of equal S. Shape (B,).

    Raises:
        ValueError: If the group size does not fit.

    Source:
        Richter et al. 2020 (the log-variance loss), in units of the score.

    Example:
        >>> logprobs, mask = torch.tensor([[0.5], [0.25]]).log(), torch.tensor([[True], [True]])
        >>> group_variance(logprobs, logprobs, torch.tensor([1., 0.]), mask, kl_coef=0.1, group_size=2)
        tensor([0.5000, 0.5000])
    """
    log_ratio = torch.where(mask, logprobs, 0.0).sum(1) - torch.where(mask, ref_logprobs, 0.0).sum(1)
    # S minus the mean of the others is n / (n - 1) times S minus the mean of all. Scores and KL one by one: small
    # differences of the KL, added to a large score, would be rounded away.
    differences = group_advantages(scores, group_size) - kl_coef * group_advantages(log_ratio, group_size)
    return differences.square() * ((group_size - 1) / group_size)
