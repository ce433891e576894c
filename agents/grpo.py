"""Group relative policy optimisation: several responses to each prompt, compared with each other; no critic.

    1. Sample ``group_size`` responses to each prompt.
    2. A_i = (r_i - mean of the group's r) / (their standard deviation + 1e-4); every token of response i has A_i. r is
    the score, without any KL penalty.
    3. Minimise, per token, -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + kl_coef k3, with k3 = pi_ref / pi - 1 -
    log(pi_ref / pi): the mean over each response's tokens, then over the responses.

Source: Shao et al. 2024 (DeepSeekMath), eq. 3 and 4 and algorithm 1. Each later correction is a switch, and those that
go by a name are settings to be splatted, ``GRPO(envs, **DR_GRPO)``:

* ``DR_GRPO`` (Liu et al. 2025, section 3.2): no standard deviation, no division by a response's own length.
* ``DAPO`` (Yu et al. 2025, eq. 8 to 12): a higher bound for rising probabilities, the mean over all tokens, no groups
  without a contrast. Not its penalty of overlong responses, which is a matter of the reward.
* ``GSPO`` (Zheng et al. 2025, eq. 5 to 7): one ratio for the whole response, (pi(y) / pi_old(y))^(1 / length). Its bounds
  of 3e-4 and 4e-4 are for a learning rate of 1e-6; larger steps leave them at once.

All three were published without a KL penalty: make the environment with ``kl_coef=0`` for that. Clipping acts from the
second optimiser step on a rollout, so with the published one step DAPO's and GSPO's bounds would do nothing: their
settings bring the number of minibatches of their papers.

Objective: as published, it is not the environment's E[score] - kl_coef KL(pi || pi_ref). Its fixed points, exactly
(docs/exact.md): the standard deviation turns the success rate p into 2 arcsin sqrt(p) in large groups and makes
kl_coef mean another thing for every prompt; k3 in the loss has the gradient of KL(pi_ref || pi), in each state by
itself; the group's mean, which holds the response's own score, makes the KL dearer by n / (n - 1); and 1 / length
weighs tokens by what comes after them. With ``divide_by_std=False, kl_placement="reward"`` and ``loss_mode="constant"``
the expected gradient is (n - 1) / n that of the environment's objective, divided by the longest length: no bias.

How it differs from TRL 1.x's ``GRPOTrainer``: that averages over all tokens (DAPO) and has no KL unless told; here the
default is the paper. One step per rollout as in the paper and in TRL. AdamW with a learning rate that falls to 0.

Metrics beside those of every agent: ``train/equal_groups``, the share of groups in which all are paid the same and
nothing is learnt from; ``train/kl_loss``, kl_coef times the penalty in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import GROUP, AgentConfig, check_fields, flag, one_of
from .functional import LossMode, aggregate_loss, group_advantages, kl_in_loss, masked_mean, policy_loss_clipped
from .updates import optimise, train_metrics, training_logprobs

DR_GRPO: dict[str, Any] = {"divide_by_std": False, "loss_mode": "constant"}
DAPO: dict[str, Any] = {
    "loss_mode": "token_mean", "clip_range": (0.2, 0.28), "dynamic_sampling": True, "num_minibatches": 16,
}  # fmt: skip
GSPO: dict[str, Any] = {"importance_level": "sequence", "clip_range": (3e-4, 4e-4), "num_minibatches": 4}


def _is_clip_range(x: Any) -> bool:
    low, high = x if isinstance(x, (tuple, list)) and len(x) == 2 else (x, x)
    return isinstance(low, (int, float)) and isinstance(high, (int, float)) and 0 <= low <= 1 and 0 <= high < torch.inf


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(AgentConfig):
    """Settings of GRPO, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        group_size: Responses to each prompt, n; divides the environment's rows.
        divide_by_std: Divide a group's advantages by its standard deviation; False is Dr. GRPO.
        loss_mode: What the sum over tokens is divided by: "sequence_mean" (each token by its response's length),
            "token_mean" (all by the number of tokens), "sequence_sum" (by the number of responses) or "constant" (by
            that times ``max_response_tokens``).
        clip_range: Largest change of the ratio that is still rewarded: one number, or (downwards, upwards).
        importance_level: Ratios of each "token", or of the whole "sequence" (for the mode "sequence_mean").
        kl_placement: "loss" (the score is the reward, and the penalty is a term of the loss) or "reward" (what the
            environment pays, KL included, is the reward).
        kl_estimator: "k3" or "k2" per token; of the loss only.
        dynamic_sampling: Leave out groups in which all are paid the same, whose advantages are 0. DAPO generates others
            instead until the batch is full; here a rollout is what it is: the batch shrinks, a rollout without any
            contrast is no step, and all tokens that were generated count. The KL in the loss of such groups is left out
            too: the policy is held back less where it always succeeds or always fails.
    """

    group_size: int = 8
    divide_by_std: bool = True
    loss_mode: LossMode = "sequence_mean"
    clip_range: float | tuple[float, float] = 0.2
    importance_level: Literal["token", "sequence"] = "token"
    kl_placement: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k2", "k3"] = "k3"
    dynamic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(
            self,
            {
                "group_size": GROUP,
                "divide_by_std dynamic_sampling": flag(),
                "loss_mode": one_of("sequence_mean", "token_mean", "sequence_sum", "constant"),
                "clip_range": ("a number in [0, 1] or (low in [0, 1], high >= 0)", _is_clip_range),
                "importance_level": one_of("token", "sequence"),
                "kl_placement": one_of("loss", "reward"),
                "kl_estimator": one_of("k2", "k3"),
            },
        )


class GRPO(Agent):
    """Group relative policy optimisation; see the module's docstring and :class:`GRPOConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)             # doctest: +SKIP
        >>> GRPO(envs, seed=0, **DR_GRPO, kl_placement="reward").learn(100_000).save("runs/dr")   # doctest: +SKIP
    """

    config_class = GRPOConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        cfg = self.config
        batch, mismatch = training_logprobs(self, rollout.batch)
        if self._kl_coef and batch.ref_logprobs is None:
            raise ValueError(
                f"kl_coef={self._kl_coef:g} in the loss needs log-probs of the reference, and this environment tells "
                'none; give it a reference, set its kl_coef to 0, or take kl_placement="reward"'
            )
        advantages = self.advantages(batch)
        batch = replace(batch, advantages=advantages[:, None].expand_as(batch.rewards))
        differ = advantages.reshape(-1, cfg.group_size).any(dim=1)
        if cfg.dynamic_sampling:
            batch = _select(batch, differ.repeat_interleave(cfg.group_size))
        found = optimise(self, batch, self.loss, mode=cfg.loss_mode) if len(batch) else {"num_steps": 0.0}
        return train_metrics(found, mismatch) | {"train/equal_groups": 1 - differ.float().mean().item()}

    def advantages(self, batch: Batch) -> Tensor:
        """Advantage of each response over its group. (B,) float32."""
        cfg, paid = self.config, batch.scores
        if cfg.kl_placement == "reward":
            paid = torch.where(batch.response_mask, batch.rewards, 0.0).sum(1)
        return group_advantages(paid, cfg.group_size, baseline="group_mean", divide_by_std=cfg.divide_by_std)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        cfg, mask = self.config, batch.response_mask
        logprobs, _, entropy = self.policy(batch)
        policy_loss, stats = policy_loss_clipped(
            logprobs, batch.logprobs, batch.advantages, mask,
            clip_range=cfg.clip_range, importance_level=cfg.importance_level,
        )  # fmt: skip
        parts = {"policy_loss": aggregate_loss(policy_loss, mask, cfg.loss_mode, normaliser=normaliser)}
        if self._kl_coef:
            penalty = kl_in_loss(logprobs, batch.ref_logprobs, mask, estimator=cfg.kl_estimator, level="token")
            parts["kl_loss"] = self._kl_coef * aggregate_loss(penalty, mask, cfg.loss_mode, normaliser=normaliser)
        return parts | {"loss": sum(parts.values())}, stats | {"entropy": masked_mean(entropy, mask)}

    @property
    def _kl_coef(self) -> float:
        """The environment's coefficient where the penalty is a term of the loss, otherwise 0: it is never paid twice."""
        return getattr(self.envs.unwrapped, "kl_coef", 0.0) if self.config.kl_placement == "loss" else 0.0


def _select(batch: Batch, rows: Tensor) -> Batch:
    """Some rows in their whole width, unlike `Batch.rows`: "constant" divides by it."""
    tensors = {item.name: getattr(batch, item.name) for item in fields(Batch)}
    return Batch(**{name: tensor if tensor is None else tensor[rows] for name, tensor in tensors.items()})
