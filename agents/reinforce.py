"""REINFORCE for text: raise the log-probs of tokens by what came of them, less what was to be expected.

    1. Sample a batch of responses.
    2. The environment scores them: r_t = -kl_coef * (log pi - log pi_ref), plus the score on the last token.
    3. Advantage of a token: A_t = G_t - b_t, where G_t = r_t + r_{t+1} + ... is what came after it (Williams 1992; Sutton
    et al. 2000, theorem 1) and b_t a baseline that knows nothing of the token.
    4. One pass over the batch in num_minibatches steps along 1 / (B R) sum_i sum_t A_t ratio_t grad(log pi(a_t | s_t)),
    R being the longest length that there can be. The ratio pi / pi_old is 1 in the first step; later ones see a policy
    that has moved, and without it a baseline would no longer have the expectation 0. It is not clipped: for more than
    one pass take PPO or RLOO.

Baselines: "learned", a value head V(s_t) (Williams' adaptive baseline; Sutton et al. 2000); "mean", the mean of G_t over
the other responses of the batch that have a token t; "ema", a running mean of all G_t of earlier rollouts; "none".

Objective: it maximises E[score] - kl_coef * KL(pi || pi_ref) over whole responses, without bias and with any of the
baselines: advantages are divided by no spread, and responses by no length of theirs. Adam takes care of the scale. What differs is the noise. At the
optimum G_t is V(s_t) on every path, so with a learned baseline the noise goes as the policy gets there; the others are
constants, beside which G_t still varies from state to state, and only the learning rate, falling to 0, ends the noise.

How it differs from Williams 1992: batches, Adam, the ratio, and rewards that depend on log pi themselves. That does no
harm: the expectation of grad(log pi) is 0.

Metrics beside those of every agent: ``train/approx_kl`` (old to new policy, nats per token, k3), ``train/ratio``,
``train/policy_gradient_loss``, ``train/value_loss`` and ``train/explained_variance`` (of the learned baseline),
``train/entropy_loss`` (minus the mean entropy per token), ``train/grad_norm``, ``train/learning_rate``,
``train/n_updates`` (optimiser steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import NOT_NEGATIVE, SHARE, AgentConfig, check_fields, one_of
from .functional import (
    aggregate_loss,
    explained_variance,
    masked_mean,
    policy_loss_clipped,
    reward_to_go,
    value_loss_clipped,
)
from .updates import optimise, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class REINFORCEConfig(AgentConfig):
    """Settings of REINFORCE, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_epochs: 1, see the module's docstring.
        num_minibatches: Optimiser steps per rollout. 1 is on-policy throughout.
        baseline: "learned", "mean", "ema" or "none".
        critic: Of the learned baseline: "shared" (value head on the policy's trunk) or "separate" (a trunk of its own).
            "none" with any other.
        value_learning_rate: Of the value head. None: as in PPO, ten times ``learning_rate``, but not above .05 (nor
            below it).
        vf_coef: Weight of the value loss.
        ema_decay: Weight of the past in the running mean.
    """

    num_minibatches: int = 4
    baseline: str = "learned"
    critic: str = "shared"
    value_learning_rate: float | None = None
    vf_coef: float = 0.5
    ema_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_learning_rate is None:
            rate = max(self.learning_rate, min(10 * self.learning_rate, 0.05))
            object.__setattr__(self, "value_learning_rate", rate)
        if self.baseline != "learned":
            object.__setattr__(self, "critic", "none")
        critics = ("shared", "separate") if self.baseline == "learned" else ("none",)
        check_fields(
            self,
            {
                "num_epochs": ("1, as nothing is clipped (for several passes take PPO or RLOO)", lambda x: x == 1),
                "baseline": one_of("learned", "mean", "ema", "none"),
                "critic": one_of(*critics),
                "value_learning_rate vf_coef": NOT_NEGATIVE,
                "ema_decay": SHARE,
            },
        )


class REINFORCE(Agent):
    """REINFORCE with reward-to-go; see the module's docstring and :class:`REINFORCEConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)        # doctest: +SKIP
        >>> REINFORCE(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")   # doctest: +SKIP
    """

    config_class = REINFORCEConfig

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        mask = batch.response_mask
        returns = reward_to_go(batch.rewards, mask)
        batch = replace(batch, advantages=returns - self._baselines(batch, returns), returns=returns)
        found = optimise(self, batch, self.loss, mode="constant")
        if self.config.baseline == "learned":
            found["explained_variance"] = explained_variance(batch.values, returns, mask).item()
        return train_metrics(found, mismatch)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        mask = batch.response_mask
        logprobs, values, entropy = self.policy(batch)
        per_token, stats = policy_loss_clipped(logprobs, batch.logprobs, batch.advantages, mask, clip_range=None)
        loss = aggregate_loss(per_token, mask, "constant", normaliser=normaliser)
        parts = {"policy_loss": loss}
        if self.config.baseline == "learned":
            errors, _ = value_loss_clipped(values, batch.values, batch.returns, mask)
            parts["value_loss"] = aggregate_loss(errors, mask, "constant", normaliser=normaliser)
            loss = loss + self.config.vf_coef * parts["value_loss"]
        stats = {"approx_kl": stats["approx_kl"], "ratio": stats["ratio"], "entropy_loss": -masked_mean(entropy, mask)}
        return parts | {"loss": loss}, stats

    def _baselines(self, batch: Batch, returns: Tensor) -> Tensor:
        """What to expect of each token, (B, R): nothing in it comes from the token itself or from later ones."""
        kind, mask = self.config.baseline, batch.response_mask
        if kind == "learned":
            return batch.values
        if kind == "mean":
            return mean_of_others(returns, mask)
        if kind == "none":
            return torch.zeros_like(returns)
        # From the smallest, so that equal returns have exactly themselves as their mean. The first rollout has no past
        # and takes its own mean, which makes its advantages smaller by about 1 / B.
        lowest = returns[mask].amin()
        mean = float(lowest + masked_mean(returns - lowest, mask))
        before = self.state.setdefault("mean_return", mean)
        self.state["mean_return"] = before + (1 - self.config.ema_decay) * (mean - before)
        return torch.full_like(returns, before)


def mean_of_others(returns: Tensor, mask: Tensor) -> Tensor:
    """Mean of the other responses' returns at the same token; where no other is that long, that of all their tokens.

    Leaving the response itself out keeps the baseline independent of it, so that the gradient has no bias, not even a
    factor.

    Args:
        returns: Rewards to go. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The means, 0 where there are no other responses at all. Shape (B, R).

    Example:
        >>> mask = torch.tensor([[True, True], [True, False], [True, False]])
        >>> mean_of_others(torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 0.0]]), mask)
        tensor([[4., 4.],
                [3., 2.],
                [2., 2.]])
    """
    lowest = returns[mask].amin()  # equal returns are then exactly their mean
    above = torch.where(mask, returns - lowest, 0.0)
    others_here = (mask.sum(0) - mask.long()).clamp(min=0)
    here = (above.sum(0) - above) / others_here.clamp(min=1)
    others = mask.sum() - mask.sum(1, keepdim=True)
    anywhere = (above.sum() - above.sum(1, keepdim=True)) / others.clamp(min=1)
    means = lowest + torch.where(others_here > 0, here, anywhere)
    return torch.where(others > 0, means, 0.0)
