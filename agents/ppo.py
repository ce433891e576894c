"""Proximal policy optimisation for text, batched by whole responses.

    1. Sample a batch of responses with the engine; log pi and V come out of the same pass.
    2. The environment scores them: r_t = -kl_coef * (log pi - log pi_ref), plus the score on the last token.
    3. Advantages by GAE over the tokens of each response, scaled by max(own std, std of the scores).
    4. num_epochs passes over minibatches of responses with the clipped surrogate (Schulman et al. 2017, eq. 7) and a
    squared-error critic.

Objective: it maximises E[score] - kl_coef * KL(pi || pi_ref) over whole responses: the KL stands in the reward, so a
token's advantage counts the KL of all that it leads to (KL placed in the loss does not). No bias but the critic's own, at
gae_lambda < 1.

How it differs from Ziegler et al. 2019 and TRL's ``PPOTrainer``: the advantage scale has the scores' spread as its
floor (with its own spread alone, the noise left near the optimum would be blown up to the size of the signal); the
learning rate falls linearly to 0 over ``total_timesteps`` (a constant one ends in a limit cycle); every token counts
the same in the loss; no reward whitening; one prompt-conditioned value per token, zero at the start.

Metrics beside those of every agent: ``train/approx_kl`` (old to new policy, nats per token, k3),
``train/clip_fraction``, ``train/ratio``, ``train/policy_gradient_loss``, ``train/value_loss``, ``train/entropy_loss``
(minus the mean entropy per token), ``train/explained_variance``, ``train/grad_norm``, ``train/learning_rate``,
``train/n_updates`` (optimiser steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .base import Agent, as_floats
from .batch import Batch, Rollout
from .config import NOT_NEGATIVE, POSITIVE_OR_NONE, SHARE, AgentConfig, check_fields
from .functional import (
    advantage_scale,
    aggregate_loss,
    explained_variance,
    gae,
    masked_mean,
    policy_loss_clipped,
    value_loss_clipped,
)
from .updates import optimise, training_logprobs


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Settings of PPO, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_epochs, num_minibatches: Passes over each rollout, and optimiser steps per pass.
        value_learning_rate: Of the value head. None: ten times ``learning_rate``, but not above .05 (nor below it):
            Adam moves a weight by about its learning rate a step, and a table's values would jump by a good part of a
            score.
        gamma: Discount per token. 1: the objective is a sum over the response.
        gae_lambda: 0 trusts the critic, 1 the outcome.
        clip_range: Largest change of the probability ratio that is still rewarded.
        clip_range_vf: The same for values, in units of the reward; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of an entropy bonus (beyond what the KL gives); 0 keeps the objective as stated.
        target_kl: The update ends early once old and new policy differ by 1.5 times this, in nats per token; None
            never.
        critic: "shared" (value head on the policy's trunk) or "separate" (a trunk of its own).
    """

    num_epochs: int = 4
    num_minibatches: int = 4
    value_learning_rate: float | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    target_kl: float | None = None
    critic: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_learning_rate is None:
            rate = max(self.learning_rate, min(10 * self.learning_rate, 0.05))
            object.__setattr__(self, "value_learning_rate", rate)
        check_fields(
            self,
            {
                "value_learning_rate vf_coef ent_coef": NOT_NEGATIVE,
                "gamma gae_lambda clip_range": SHARE,
                "target_kl clip_range_vf": POSITIVE_OR_NONE,
            },
        )


class PPO(Agent):
    """Proximal policy optimisation; see the module's docstring and :class:`PPOConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)   # doctest: +SKIP
        >>> PPO(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")    # doctest: +SKIP
    """

    config_class = PPOConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        cfg = self.config
        batch, mismatch = training_logprobs(self, rollout.batch)
        mask = batch.response_mask

        advantages = gae(batch.rewards, batch.values, mask, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda)
        returns = advantages + batch.values  # before any scaling: the critic predicts rewards, not whitened ones
        advantages = advantages - masked_mean(advantages, mask)
        advantages = advantages / advantage_scale(advantages, batch.scores, mask).clamp(min=self._score_spread(batch))

        batch = replace(batch, advantages=advantages, returns=returns)
        mean = optimise(self, batch, self.loss, target_kl=cfg.target_kl)
        return as_floats(
            {
                "train/approx_kl": mean["approx_kl"],
                "train/clip_fraction": mean["clip_fraction"],
                "train/clip_range": cfg.clip_range,
                "train/ratio": mean["ratio"],
                "train/loss": mean["loss"],
                "train/policy_gradient_loss": mean["policy_loss"],
                "train/value_loss": mean["value_loss"],
                "train/entropy_loss": -mean["entropy"],
                "train/explained_variance": explained_variance(batch.values, returns, mask),
                "train/grad_norm": mean["grad_norm"],
                "train/learning_rate": mean["learning_rate"],
                "train/n_updates": mean["num_steps"],
                "train/logprob_mismatch": mismatch,
                "policy/approxkl_avg": mean["approx_kl"],
                "policy/clipfrac_avg": mean["clip_fraction"],
                "policy/entropy_avg": mean["entropy"],
                "loss/policy_avg": mean["policy_loss"],
                "loss/value_avg": mean["value_loss"],
                "val/clipfrac_avg": mean["value_clip_fraction"],
                "val/ratio": mean["ratio"],
            }
        )

    def loss(self, batch: Batch, normaliser: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        cfg, mask = self.config, batch.response_mask
        logprobs, values, entropy = self.policy(batch, with_entropy_gradient=cfg.ent_coef != 0)
        policy_loss, stats = policy_loss_clipped(
            logprobs, batch.logprobs, batch.advantages, mask, clip_range=cfg.clip_range
        )
        value_loss, value_stats = value_loss_clipped(
            values, batch.values, batch.returns, mask, clip_range_vf=cfg.clip_range_vf
        )
        parts = {
            "policy_loss": aggregate_loss(policy_loss, mask, normaliser=normaliser),
            "value_loss": aggregate_loss(value_loss, mask, normaliser=normaliser),
            "entropy": aggregate_loss(entropy, mask, normaliser=normaliser),
        }
        loss = parts["policy_loss"] + cfg.vf_coef * parts["value_loss"] - cfg.ent_coef * parts["entropy"]
        return parts | {"loss": loss}, stats | value_stats

    def _score_spread(self, batch: Batch) -> float:
        """The spread of the scores in the rollouts of late, which fades by 1 % an update.

        One rollout may have none (all of it right, or all wrong); dividing by the noise that is left would then make a
        step many times as large as those that Adam has seen, and can undo the training in one update.
        """
        self.state["score_spread"] = max(
            batch.scores.std(correction=0).item(), 0.99 * self.state.get("score_spread", 0.0)
        )
        return self.state["score_spread"]
