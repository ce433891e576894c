"""Soft Q-learning with the reference as prior: the language model and its value head together are the Q-function.

    1. Q(s, a) = beta * (log pi(a|s) - log pi_ref(a|s)) + V(s), beta = kl_coef: pi is the policy, V the value head.
    Then V(s) = beta log sum_a pi_ref(a|s) exp(Q(s, a) / beta) whatever the weights are, and pi is the soft-greedy
    policy of Q.
    2. Sample responses from pi. Soft TD errors with the weights that sampled: d_t = r_t + V(s_{t+1}) - Q(s_t, a_t), V
    after the last token 0, r the score without any KL.
    3. Targets, fixed for this rollout: G_t = Q(s_t, a_t) + sum_k lambda^k d_{t+k}. lambda 0 is r_t + V(s_{t+1}), the
    soft Bellman equation; 1 is r_t plus all later rewards minus their KL.
    4. num_epochs passes over minibatches with the loss (Q - G)^2 / (2 beta), summed over a response. The next
    rollout's targets come from the new weights: the sampling policy is the lagging copy. V's gradient is multiplied
    by beta * vf_coef, which moves no fixed point: as it stands it would be 1 / beta times the policy's, and drown that
    in a shared trunk.

Objective: E[score] - kl_coef * KL(pi || pi_ref) over whole responses. Writing a token leads to one state only, so at
the optimum all d_t are 0 on every path, not just in the mean: the fixed point is pi* and V* for any lambda and for
any policy that may have sampled, and no noise is left there. kl_coef must be > 0. No exploration is added.

Relation to policy gradients: before the first step, the loss's gradient is that of an actor-critic with the KL in the
reward and GAE (Schulman et al. 2017). Afterwards an actor-critic, PPO too, pushes on while its advantages stay what
they were; a squared error stops at its target.

Source:
    Nachum et al. 2017 (path consistency learning), with V and pi parts of one Q-function as in their unified PCL; Guo
    et al. 2021, "Text generation with efficient (soft) Q-learning", where Q is the logits themselves, and the prior
    is uniform. Differs: targets are not differentiated; lambda averages over path lengths; there is no replay, whose
    samples would have to be saved with the agent.

Metrics beside those of every agent: ``train/td_error`` (mean of |sum_k lambda^k d_{t+k}|),
``train/explained_variance`` (of the targets, by Q), ``train/approx_kl`` (old to new policy, nats per token, k3),
``train/loss``, ``train/grad_norm``, ``train/learning_rate``, ``train/n_updates``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Agent
from .batch import Batch, Rollout
from .config import NOT_NEGATIVE, SHARE, AgentConfig, check_fields
from .functional import aggregate_loss, approx_kl, explained_variance, gae, masked_mean
from .updates import optimise, positive_kl_coef, token_scores, train_metrics, training_logprobs


@dataclass(frozen=True, kw_only=True)
class SoftQConfig(AgentConfig):
    """Settings of soft Q-learning, and those of every agent (:class:`~rlhf_gym.agents.config.AgentConfig`).

    Attributes:
        num_epochs, num_minibatches: Passes over each rollout, and optimiser steps per pass.
        value_learning_rate: Of the value head. None: ten times ``learning_rate``, but not above .05 (nor below it).
        vf_coef: Weight of the value head's gradient: it is vf_coef * (Q - G) per token, the policy's (Q - G).
        td_lambda: 0 trusts the next state's value, 1 the outcome.
        critic: "shared" (value head on the policy's trunk) or "separate" (a trunk of its own).
    """

    num_epochs: int = 4
    num_minibatches: int = 4
    value_learning_rate: float | None = None
    vf_coef: float = 0.5
    td_lambda: float = 0.95
    critic: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value_learning_rate is None:
            rate = max(self.learning_rate, min(10 * self.learning_rate, 0.05))
            object.__setattr__(self, "value_learning_rate", rate)
        check_fields(self, {"value_learning_rate vf_coef": NOT_NEGATIVE, "td_lambda": SHARE})


class SoftQ(Agent):
    """Soft Q-learning; see the module's docstring and :class:`SoftQConfig`.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)   # doctest: +SKIP
        >>> SoftQ(envs, seed=0).learn(100_000, progress_bar=True).save("runs/reviews")  # doctest: +SKIP
    """

    config_class = SoftQConfig

    def before_rollout(self) -> None:
        """Refuses an environment without a KL penalty."""
        positive_kl_coef(self)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One rollout's worth of learning; returns the ``train/`` metrics."""
        batch, mismatch = training_logprobs(self, rollout.batch)
        batch = replace(batch, returns=self.targets(batch))
        found = optimise(self, batch, self.loss, mode="sequence_sum")
        q_values, mask = self._q_values(batch, batch.logprobs, batch.values), batch.response_mask
        found["td_error"] = masked_mean((batch.returns - q_values).abs(), mask).item()
        found["explained_variance"] = explained_variance(q_values, batch.returns, mask).item()
        return train_metrics(found, mismatch)

    def targets(self, batch: Batch) -> Tensor:
        """What Q should be, by the weights that sampled; 0 after the end. (B, R)."""
        q_values = self._q_values(batch, batch.logprobs, batch.values)
        # Q - V is the price of the token's KL. With it in the rewards, soft TD errors are those that GAE adds up.
        rewards = token_scores(self, batch) - (q_values - batch.values)
        return q_values + gae(rewards, batch.values, batch.response_mask, gae_lambda=self.config.td_lambda)

    def loss(self, batch: Batch, normaliser: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss of some rows with its parts, and numbers for the log."""
        kl_coef, mask = positive_kl_coef(self, batch), batch.response_mask
        logprobs, values, _ = self.policy(batch)
        # The same number with another gradient.
        values = values.detach() + kl_coef * self.config.vf_coef * (values - values.detach())
        errors = self._q_values(batch, logprobs, values) - batch.returns
        parts = {"loss": aggregate_loss(errors.square() / (2 * kl_coef), mask, "sequence_sum", normaliser=normaliser)}
        return parts, {"approx_kl": approx_kl(logprobs.detach(), batch.logprobs, mask)}

    def _q_values(self, batch: Batch, logprobs: Tensor, values: Tensor) -> Tensor:
        """Q of the tokens, 0 after the end. (B, R)."""
        return torch.where(
            batch.response_mask, positive_kl_coef(self, batch) * (logprobs - batch.ref_logprobs) + values, 0.0
        )
