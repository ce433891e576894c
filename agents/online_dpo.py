"""Online DPO: pairs of the policy's own responses, the better one preferred by the score.

    1. Sample ``group_size`` responses to each prompt, and make pairs of them: all, or the best with the worst.
    2. P, the probability that the first is preferred. ``labels="hard"``: 1 if its score is higher, 0 if it is lower, 1/2
    if they are equal. ``labels="soft"``: sigmoid(r_1 - r_2), the Bradley-Terry model with the score as the reward.
    3. Minimise -P log sigmoid(m) - (1 - P) log sigmoid(-m), the margin m being beta times the difference of log pi -
    log pi_ref of the two whole responses, beta = kl_coef. The samples are fresh, but nothing accounts for where they
    come from: the loss is right for pairs from anywhere.

Objective of "soft": a pair's loss is smallest where m = r_1 - r_2, and all pairs agree if and only if r - beta (log pi -
log pi_ref) is the same for all responses, which is the optimum of E[score] - kl_coef KL(pi || pi_ref) (Rafailov et al.
2023, eq. 4 to 7). So the fixed point is that optimum, whoever samples, and no noise is left there; on the way it is a
divergence of preferences that falls. Near the optimum each pair counts as in VarGrad, but by its share of doubt, P (1 -
P): where scores differ by 10 and more, little is left to learn from.

Objective of "hard", as published: not the environment's. A deterministic label is met by an infinite margin only: what
the score says of *how much* better is lost, and with it what kl_coef weighs against. Every pair of unequal scores
pushes for ever, whatever kl_coef is, until none is sampled any more: **E[score], slowly**. Pairs of equals pull the odds
of the two back to the reference's, so the limit is the reference restricted to its best responses, the optimum for
kl_coef -> 0. Until then kl_coef is a learning rate; the fewer updates, the less of it is seen.

Source: Rafailov et al. 2023, eq. 7; Guo et al. 2024, "Direct language model alignment from online AI feedback",
algorithm 1, where an annotator chooses between two responses; TRL's ``OnlineDPOTrainer``: two responses, hard labels,
of equals the first is preferred, which comes to 1/2 in the mean. The best with the worst is that of Dong et al. 2024,
"RLHF workflow". Differs: more pairs than one by default; whole batches of rollouts, AdamW with a learning rate that
falls to 0.

kl_coef must be > 0. Metrics beside those of every agent: ``train/accuracy``, the share of pairs of unequal scores that
the policy and the reference together order rightly (m > 0 for the better one); ``train/margin``, mean of m of those,
better minus worse; ``train/equal_pairs``; ``train/approx_kl`` (old to new policy, nats per token, k3), ``train/loss``,
``train/grad_norm``, ``train/learning_rate``, ``train/n_updates``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import GROUP, AgentConfig, check_fields, one_of
from .functional import approx_kl, dpo_loss
from .updates import optimise, positive_kl_coef, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(AgentConfig):
    """Settings of online DPO, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_minibatches: Optimiser steps per pass.
        group_size: Responses to each prompt, n; divides the environment's rows.
        pairs: "all" n (n - 1) / 2 of a group, or "best_worst": only that of its highest and its lowest score.
        labels: "hard" (as published) or "soft" (whose optimum is the environment's).
    """

    num_minibatches: int = 4
    group_size: int = 8
    pairs: str = "all"
    labels: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self, {"group_size": GROUP, "pairs": one_of("all", "best_worst"), "labels": one_of("hard", "soft")}
        )


class OnlineDPO(Agent):
    """Online direct preference optimisation; see the module's docstring and :class:`OnlineDPOConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)               # doctest: +SKIP
        >>> OnlineDPO(envs, seed=0, labels="soft").learn(100_000, progress_bar=True).save("run")    # doctest: +SKIP
    """

    config_class = OnlineDPOConfig

    def before_rollout(self) -> None:
        """Refuses an environment without a KL penalty."""
        positive_kl_coef(self)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        return train_metrics(optimise(self, batch, self.loss, mode="sequence_sum"), mismatch)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some groups, and numbers for the log."""
        cfg, kl_coef = self.config, positive_kl_coef(self, batch)
        pairs = pairs_of_groups(batch.scores, cfg.group_size, cfg.pairs)
        num_pairs = normaliser * (len(pairs) / len(batch))  # of the whole minibatch, which has so many rows
        if cfg.pairs == "best_worst":  # all others are not even looked at
            batch, pairs = batch.rows(pairs.flatten()), torch.arange(pairs.numel(), device=pairs.device).reshape(-1, 2)
        logprobs, mask = self.policy(batch)[0], batch.response_mask
        log_ratios = torch.where(mask, logprobs - batch.ref_logprobs, 0.0).sum(1)[pairs]
        difference = batch.scores[pairs[:, 0]] - batch.scores[pairs[:, 1]]
        preferences = difference.sigmoid() if cfg.labels == "soft" else (difference.sign() + 1) / 2
        parts = {"loss": dpo_loss(log_ratios, preferences, kl_coef=kl_coef).sum() / num_pairs}

        differs = difference != 0
        num_differing = differs.sum().clamp(min=1)
        margins = kl_coef * (log_ratios[:, 0] - log_ratios[:, 1]).detach() * difference.sign()  # better minus worse
        stats = {
            # A policy that has not moved is right about nothing: log-ratios of less are rounding.
            "accuracy": (margins > kl_coef * 1e-4).sum() / num_differing,
            "margin": margins.sum() / num_differing,
            "equal_pairs": 1 - differs.float().mean(),
            "approx_kl": approx_kl(logprobs.detach(), batch.logprobs, mask),
        }
        return parts, stats


def pairs_of_groups(scores: Tensor, group_size: int, which: str) -> Tensor:
    """Rows of the pairs that are compared.

    Args:
        scores: Score of each response. Shape (B,), float32.
        group_size: Responses per prompt, next to each other; n divides B.
        which: "all" pairs of a group, each once, or its "best_worst": the first of the highest score and the last of
            the lowest.

    Returns:
        Shape (P, 2), int64, P = B (n - 1) / 2 or B / n; group by group.

    Example:
        >>> pairs_of_groups(torch.tensor([1., 3., 1.]), 3, "all").tolist()
        [[0, 1], [0, 2], [1, 2]]
        >>> pairs_of_groups(torch.tensor([1., 3., 1.]), 3, "best_worst").tolist()
        [[1, 2]]
    """
    groups = scores.reshape(-1, group_size)
    if which == "all":
        pairs = torch.combinations(torch.arange(group_size, device=scores.device)).expand(len(groups), -1, 2)
    else:
        pairs = groups.argsort(dim=1, descending=True, stable=True)[:, None, [0, -1]]
    firsts = torch.arange(0, len(scores), group_size, device=scores.device)
    return (firsts[:, None, None] + pairs).reshape(-1, 2)
