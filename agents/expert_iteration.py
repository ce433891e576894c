"""Expert iteration: sample several responses to each prompt, keep the best, and learn to say what was kept.

    1. Sample ``group_size`` responses to each prompt.
    2. Weigh them, w_i, with a mean of 1 in each group.
    ``weights="best"``: the ``keep`` responses of the highest score share all the weight, the first among equals.
    Groups in which all scores are equal have no best, and are left out.
    ``weights="optimal"``: w_i is proportional to pi_ref(y_i) / pi_old(y_i) * exp(r_i / kl_coef), normalised in the
    group.
    3. One pass of log-likelihood training, or several: minimise -mean_i w_i log pi(y_i) over whole responses.

Objective of "best": **E[score], and nothing about the KL**, however large kl_coef is. Every policy that only says the
best is a fixed point. If each rollout were infinite and fitted completely it would come to one of them, the
reference's own distribution over the best responses, which is the optimum for kl_coef -> 0: responses of equal score
are kept equally often. With samples that is not safe: what was kept by chance is kept more often afterwards, and the
odds among equally good responses drift. What `rlhf_gym.exact.evaluate` finds as its regret is the price of both. For
a score of 0 or 1 the expected gradient of a first step is that of E[score], times a number.

Objective of "optimal": KL(pi* || pi), where pi* ~ pi_ref exp(r / kl_coef) is the optimal policy: the weights are those
of importance sampling from pi*. That is not E[score] - kl_coef KL, but it has the same optimum, which here has no
noise either: added to the gradient is that of the mean of pi / pi_old, whose expectation is 0, so that a response
pulls with w_i - pi(y_i) / pi_old(y_i), nothing at all at pi* or once its probability has grown by the factor w_i.
(The ratio counts as 10 at most.) Normalising in the group makes weights smaller, by 1 / n of what they should be, as
long as they differ; the fixed point stays. kl_coef must be > 0.

Source: Anthony et al. 2017, with best-of-n as the expert; Dong et al. 2023 (RAFT, algorithm 1); Gulcehre et al. 2023
(ReST), which keeps what is above a threshold; Peters & Schaal 2007 (reward-weighted regression). Differs: each
rollout is learnt from once and forgotten. RAFT trains on groups of equal scores too, which pushes to the score that
most responses have; in Singh et al. 2023 (ReST-EM), too, failures are no examples.

Metrics beside those of every agent: ``train/equal_groups``, the share of groups in which all scores are equal;
``train/effective_samples``, (sum w)^2 / sum w^2 as a share of the group; ``train/approx_kl`` (old to new policy, nats
per token, k3), ``train/loss``, ``train/grad_norm``, ``train/learning_rate``, ``train/n_updates``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import COUNT, GROUP, AgentConfig, check_fields, one_of
from .functional import approx_kl
from .updates import optimise, positive_kl_coef, train_metrics, training_logprobs

MAX_RATIO = 10.0


@dataclass(frozen=True, kw_only=True)
class ExpertIterationConfig(AgentConfig):
    """Settings of expert iteration, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_minibatches: Optimiser steps per pass.
        group_size: Responses to each prompt, n; divides the environment's rows.
        weights: "best" or "optimal", see the module's docstring.
        keep: How many of a group are the best, below ``group_size``; of "best" only.
    """

    num_minibatches: int = 4
    group_size: int = 8
    weights: str = "best"
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"group_size": GROUP, "weights": one_of("best", "optimal"), "keep": COUNT})
        if self.keep >= self.group_size:
            raise ValueError(
                f"keep must be below group_size={self.group_size}, got {self.keep}: to keep all is to choose nothing"
            )


class ExpertIteration(Agent):
    """Expert iteration; see the module's docstring and :class:`ExpertIterationConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)          # doctest: +SKIP
        >>> ExpertIteration(envs, seed=0).learn(100_000, progress_bar=True).save("runs/best")  # doctest: +SKIP
    """

    config_class = ExpertIterationConfig

    def before_rollout(self) -> None:
        """Refuses an environment without a KL penalty where the weights are made of it."""
        if self.config.weights == "optimal":
            positive_kl_coef(self)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        cfg = self.config
        batch, mismatch = training_logprobs(self, rollout.batch)
        weights, scores = self.weights(batch), batch.scores.reshape(-1, cfg.group_size)
        batch = replace(batch, advantages=weights[:, None].expand_as(batch.rewards))
        differ = (scores != scores[:, :1]).any(dim=1)
        used = differ if cfg.weights == "best" else torch.ones_like(differ)
        rows = used.repeat_interleave(cfg.group_size).nonzero()[:, 0]
        found = optimise(self, batch.rows(rows), self.loss, mode="sequence_sum") if len(rows) else {"num_steps": 0.0}
        found["equal_groups"] = 1 - differ.float().mean().item()
        found["effective_samples"] = (1 / weights.reshape(-1, cfg.group_size).square().mean(1)).mean().item()
        return train_metrics(found, mismatch)

    def weights(self, batch: Batch) -> Tensor:
        """Weight of each response, with a mean of 1 in each group. (B,) float32."""
        cfg = self.config
        if cfg.weights == "best":
            return best_weights(batch.scores, cfg.group_size, cfg.keep)
        kl_coef = positive_kl_coef(self, batch)
        log_ratio = torch.where(batch.response_mask, batch.ref_logprobs - batch.logprobs, 0.0).sum(1)
        return optimal_weights(batch.scores, log_ratio, cfg.group_size, kl_coef)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some groups, and numbers for the log."""
        is_best = self.config.weights == "best"
        if is_best:  # all others are not even looked at
            batch = batch.rows((batch.advantages[:, 0] > 0).nonzero()[:, 0])
        mask, pull = batch.response_mask, batch.advantages[:, 0]
        logprobs = self.policy(batch)[0]
        if not is_best:
            log_ratio = torch.where(mask, logprobs.detach() - batch.logprobs, 0.0).sum(1)
            pull = pull - log_ratio.exp().clamp(max=MAX_RATIO)
        parts = {"loss": -(pull * logprobs.sum(1)).sum() / normaliser}
        return parts, {"approx_kl": approx_kl(logprobs.detach(), batch.logprobs, mask)}


def best_weights(scores: Tensor, group_size: int, keep: int) -> Tensor:
    """All the weight on the best responses of each group.

    Args:
        scores: Score of each response. Shape (B,), float32.
        group_size: Responses per prompt, next to each other; n divides B.
        keep: How many are the best; the first among equals.

    Returns:
        n / keep for those and 0 for all others. Shape (B,), float32.

    Example:
        >>> best_weights(torch.tensor([0., 2., 2., 1.]), group_size=4, keep=1)
        tensor([0., 4., 0., 0.])
    """
    groups = scores.reshape(-1, group_size)
    best = groups.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(groups).scatter(1, best, group_size / keep).reshape(-1)


def optimal_weights(scores: Tensor, log_ratio: Tensor, group_size: int, kl_coef: float) -> Tensor:
    """Importance weights of the optimal policy for KL-regularised rewards, normalised in each group.

    Args:
        scores: Score r of each response. Shape (B,), float32.
        log_ratio: log pi_ref - log pi_old of each whole response. Shape (B,), float32.
        group_size: Responses per prompt, next to each other; n divides B.
        kl_coef: Price of a nat.

    Returns:
        Proportional to pi_ref / pi_old * exp(r / kl_coef), with a mean of 1 in each group. Shape (B,), float32.

    Source:
        Rafailov et al. 2023, eq. 4 (the optimal policy).

    Example:
        >>> optimal_weights(torch.tensor([0.3, 0.]), torch.tensor([0., 0.]), group_size=2, kl_coef=0.3)
        tensor([1.4621, 0.5379])
    """
    groups = (scores / kl_coef + log_ratio).reshape(-1, group_size)
    return (group_size * groups.softmax(dim=1)).reshape(-1)
