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

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from .base import Agent, as_floats
from .batch import Batch, Rollout
from .functional import (
    advantage_scale,
    aggregate_loss,
    explained_variance,
    gae,
    loss_normaliser,
    masked_mean,
    policy_loss_clipped,
    value_loss_clipped,
)


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO. Counts are per rollout.

    Attributes:
        learning_rate: Of AdamW, at the start, > 0.
        value_learning_rate: Of the value head. None: ten times ``learning_rate``, but not above .05 (nor below it):
            Adam moves a weight by about its learning rate a step, and a table's values would jump by a good part of a
            score.
        lr_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        num_rounds: Episodes per environment row in a rollout: num_envs * num_rounds responses are learnt from at once.
        num_epochs: Passes over each rollout.
        num_minibatches: Optimiser steps per pass.
        micro_batch_size: Responses per forward and backward; gradients are accumulated. None: the whole minibatch.
        gamma: Discount per token. 1: the objective is a sum over the response.
        gae_lambda: 0 trusts the critic, 1 the outcome.
        clip_range: Largest change of the probability ratio that is still rewarded.
        clip_range_vf: The same for values, in units of the reward; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of an entropy bonus (beyond what the KL gives); 0 keeps the objective as stated.
        max_grad_norm: Gradients are scaled down to this norm.
        target_kl: The update ends early once old and new policy differ by 1.5 times this, in nats per token; None
            never.
        ref_kl_target: Mean KL to the reference that an adaptive controller steers kl_coef towards, nats per response;
            None keeps kl_coef fixed.
        kl_horizon: Slowness of that controller, in episodes.
        critic: "shared" (value head on the policy's trunk) or "separate" (a trunk of its own).
        dtype: "auto", "float32" or "bfloat16" (with float32 master weights).
    """

    learning_rate: float = 1e-4
    value_learning_rate: float | None = None
    lr_schedule: str = "linear"
    num_rounds: int = 1
    num_epochs: int = 4
    num_minibatches: int = 4
    micro_batch_size: int | None = None
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    ref_kl_target: float | None = None
    kl_horizon: float = 10_000.0
    critic: str = "shared"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.learning_rate, (bool, str)):
            raise ValueError(f"learning_rate must be a finite number >= 0, got {self.learning_rate!r}")
        if self.value_learning_rate is None:
            rate = max(self.learning_rate, min(10 * self.learning_rate, 0.05))
            object.__setattr__(self, "value_learning_rate", rate)
        rules = {
            "num_rounds num_epochs num_minibatches": ("an integer >= 1", lambda x: type(x) is int and x >= 1),
            "micro_batch_size": ("None or an integer >= 1", lambda x: x is None or (type(x) is int and x >= 1)),
            "learning_rate value_learning_rate vf_coef ent_coef": ("a finite number >= 0", lambda x: 0 <= x < math.inf),
            "gamma gae_lambda clip_range": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
            "max_grad_norm kl_horizon": ("a number > 0", lambda x: x > 0),
            "target_kl ref_kl_target clip_range_vf": (
                "None or a finite number > 0",
                lambda x: x is None or 0 < x < math.inf,
            ),
        }
        for names, (rule, holds) in rules.items():
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, (bool, str)) or not holds(value):
                    raise ValueError(f"{name} must be {rule}, got {value!r}")
        if self.lr_schedule not in ("linear", "constant"):
            raise ValueError(f'lr_schedule must be "linear" or "constant", got {self.lr_schedule!r}')


class PPO(Agent):
    """Proximal policy optimisation; see the module's docstring and :class:`PPOConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)   # doctest: +SKIP
        >>> PPO(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")    # doctest: +SKIP
    """

    config_class = PPOConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        cfg, batch = self.config, rollout.batch
        batch, mismatch = self._training_logprobs(batch)
        mask = batch.response_mask

        advantages = gae(batch.rewards, batch.values, mask, gamma=cfg.gamma, gae_lambda=cfg.gae_lambda)
        returns = advantages + batch.values  # before any scaling: the critic predicts rewards, not whitened ones
        advantages = advantages - masked_mean(advantages, mask)
        advantages = advantages / advantage_scale(advantages, batch.scores, mask).clamp(min=self._score_spread(batch))

        remaining = self.progress_remaining if cfg.lr_schedule == "linear" else 1.0
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * remaining

        stats: dict[str, list[float]] = defaultdict(list)
        num_steps, stopped = 0, False
        for _ in range(cfg.num_epochs):
            for rows in torch.randperm(len(batch), generator=self.generator).to(mask.device).chunk(cfg.num_minibatches):
                losses = self._accumulate_gradients(batch, advantages, returns, rows)
                for name, value in losses.items():
                    stats[name].append(value)
                if cfg.target_kl is not None and losses["approx_kl"] > 1.5 * cfg.target_kl:
                    self.optimizer.zero_grad()
                    stopped = True
                    break
                stats["grad_norm"].append(self.optimizer.step(cfg.max_grad_norm).item())
                num_steps += 1
            if stopped:
                break

        mean = {name: sum(values) / len(values) for name, values in stats.items()}
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
                "train/grad_norm": mean.get("grad_norm", 0.0),
                "train/learning_rate": cfg.learning_rate * remaining,
                "train/n_updates": num_steps,
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

    def _score_spread(self, batch: Batch) -> float:
        """The spread of the scores in the rollouts of late, which fades by 1 % an update.

        One rollout may have none (all of it right, or all wrong); dividing by the noise that is left would then make a
        step many times as large as those that Adam has seen, and can undo the training in one update.
        """
        self.state["score_spread"] = max(
            batch.scores.std(correction=0).item(), 0.99 * self.state.get("score_spread", 0.0)
        )
        return self.state["score_spread"]

    @torch.no_grad()
    def _training_logprobs(self, batch: Batch) -> tuple[Batch, float]:
        """The old log-probs that the ratio is taken to, and how far sampling's were from them (mean, nats per token).

        In float32 those of the sampling pass are the forward's to 1e-5 and are kept. In bfloat16 the two passes round
        differently, the ratio would not begin
        at 1, and clipping would act on rounding errors: the training forward's own are taken.
        """
        if self.policy.model.dtype == torch.float32:
            return batch, 0.0
        logprobs, values = torch.zeros_like(batch.logprobs), torch.zeros_like(batch.values)
        size = self.config.micro_batch_size or max(1, len(batch) // self.config.num_minibatches)
        for rows in torch.arange(len(batch), device=batch.ids.device).split(size):
            part = batch.rows(rows)
            width = part.response_ids.shape[1]
            logprobs[rows, :width], values[rows, :width], _ = self.policy(part)
        mismatch = masked_mean((logprobs - batch.logprobs).abs(), batch.response_mask).item()
        return replace(batch, logprobs=logprobs, values=values), mismatch

    def _accumulate_gradients(
        self, batch: Batch, advantages: torch.Tensor, returns: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, float]:
        """Gradients of one minibatch's loss, micro-batch by micro-batch; returns its parts."""
        cfg = self.config
        # One normaliser for the whole minibatch: a mean of micro-batch means would weigh the tokens of short ones more.
        normaliser = loss_normaliser(batch.response_mask[rows])
        total: dict[str, float] = defaultdict(float)
        for part_rows in rows.split(cfg.micro_batch_size or len(rows)):
            part = batch.rows(part_rows)
            width, mask = part.response_ids.shape[1], part.response_mask
            logprobs, values, entropy = self.policy(part, with_entropy_gradient=cfg.ent_coef != 0)
            policy_loss, stats = policy_loss_clipped(
                logprobs, part.logprobs, advantages[part_rows, :width], mask, clip_range=cfg.clip_range
            )
            value_loss, value_stats = value_loss_clipped(
                values, part.values, returns[part_rows, :width], mask, clip_range_vf=cfg.clip_range_vf
            )
            parts = {
                "policy_loss": aggregate_loss(policy_loss, mask, normaliser=normaliser),
                "value_loss": aggregate_loss(value_loss, mask, normaliser=normaliser),
                "entropy": aggregate_loss(entropy, mask, normaliser=normaliser),
            }
            loss = parts["policy_loss"] + cfg.vf_coef * parts["value_loss"] - cfg.ent_coef * parts["entropy"]
            loss.backward()
            self.optimizer.accumulate()
            share = float(mask.sum() / normaliser)
            for name, value in (stats | value_stats).items():
                total[name] += float(value) * share
            for name, value in (parts | {"loss": loss}).items():
                total[name] += value.item()
        return dict(total)
