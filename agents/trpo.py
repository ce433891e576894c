"""Trust Region Policy Optimisation for language models.

Maximise the surrogate objective E[A ratio] under E[KL(new || old)] <= target_kl: a conjugate-gradient step along the
natural gradient F^-1 g, as long as the trust region allows; then a line search on the true surrogate and KL.

Objective: E[score] - kl_coef * KL(pi || pi_ref) over whole responses, with the defaults: the KL (k1) stands in the
reward as announced, and gamma is 1. ``target_kl`` bounds the step from the old policy and is no part of the objective.
The critic is only a baseline (gae_lambda 1), except where the end of a rollout cuts a response off: there its value
stands for the rest.

Source:
    Schulman et al. 2015, arXiv:1502.05477; the numbers are those of ``sb3_contrib.TRPO``, which cannot be used with a
    transformer as it is (see ``MicroBatchTRPO``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn
from torch.nn import functional as F

from .sb3.agent import SB3Agent
from .sb3.algorithms import OnPolicyConfig
from .sb3.buffers import CompactRolloutBuffer
from .trust_region import hessian_vector_product, line_search, mean_kl, natural_direction, twice_differentiable


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(OnPolicyConfig):
    """Settings of TRPO, and those of ``OnPolicyConfig``; ``learning_rate`` is the critic's only.

    Attributes:
        target_kl: Largest mean KL of one update, in nats per token; with much damping a step stays well below it.
        target_kl_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        cg_max_steps: Fisher-vector products per update.
        cg_damping: Added to the Fisher matrix. A batch of episodes determines few of a model's directions; damping
            keeps the step out of the others, where there is only noise (on TinyReviews .01 learns far more slowly).
        relative_damping: ``cg_damping`` is in units of the curvature along the gradient. That is 1 to 7 for the
            transformers here, but .002 to .1 for tables of the tasks with known answers: an absolute .5 leaves of their
            natural gradient nothing but the plain one, and steps of a hundredth of ``target_kl``.
        line_search_shrinking_factor: From one try of the line search to the next.
        line_search_max_iter: Its tries.
        n_critic_updates: Passes of the critic over each rollout.
        batch_size: States per step of the critic; None is an eighth of the rollout.
        sub_sampling_factor: The policy learns from every k-th state only.
        fisher_sub_sampling_factor: The Fisher matrix is that of every k-th row's trajectories only.
        micro_batch_size: States whose graph is in memory at a time; None is all of them.
    """

    learning_rate: float = 1e-3
    lr_schedule: str = "constant"
    target_kl: float = 0.05
    target_kl_schedule: str = "linear"
    cg_max_steps: int = 5
    cg_damping: float = 0.5
    relative_damping: bool = False
    line_search_shrinking_factor: float = 0.8
    line_search_max_iter: int = 10
    n_critic_updates: int = 10
    batch_size: int | None = None
    sub_sampling_factor: int = 1
    fisher_sub_sampling_factor: int = 4
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_kl", "cg_damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


class MicroBatchTRPO(sb3_contrib.TRPO):
    """``sb3_contrib.TRPO`` for deep networks: the same update in a fraction of the time and memory.

    Four things differ from the stock algorithm, none of them in the numbers:

    * One backward pass differentiates all parameters (stock: one pass per parameter tensor).
    * Gradient, Fisher-vector products and line search can run in micro-batches, with one in memory at a time (stock:
      one twice differentiable graph of the whole rollout).
    * The actor's parameters are those that the distribution depends on (stock: those without "value" anywhere in their
      name, which leaves Pythia's and Bloom's ``query_key_value`` to the critic's Adam). A critic on top of the actor's
      features has them computed once, since its updates do not change them.
    * Attention runs in the only kernel of torch that can be differentiated twice, and ``sub_sampling_factor`` works
      with Dict observations.

    The policy must compute in float32 and without dropout, as ``LMActorCriticPolicy`` does.

    Args:
        *args: Those of ``sb3_contrib.TRPO``. Mind that ``learning_rate`` is the critic's only, and that there is no
            entropy bonus.
        micro_batch_size: States per micro-batch. None takes the whole rollout at once; the graph of the Fisher-vector
            products is then built once and kept, otherwise it is rebuilt for each.
        target_kl_schedule: "constant" (the stock algorithm), or "linear": ``target_kl`` falls to 0 over the timesteps
            of ``learn``, for near the optimum a step of fixed length follows noise.
        relative_damping: ``cg_damping`` is in units of g^T F g / g^T g, the curvature along the gradient g, and so means
            the same whatever the parametrisation. False is the stock algorithm: it is added as it stands.
        fisher_sub_sampling_factor: Fisher-vector products use the trajectories of every k-th environment row only; the
            gradient and the line search use all. 1 is the stock algorithm; the Fisher matrix only shapes the step, so a
            part of the states is enough (Schulman et al. 2015, appendix C.1, take a tenth).
        **kwargs: Those of ``sb3_contrib.TRPO``.

    Raises:
        ValueError: If ``micro_batch_size`` or ``fisher_sub_sampling_factor`` is below 1, or the schedule unknown.
    """

    def __init__(
        self,
        *args: Any,
        micro_batch_size: int | None = None,
        target_kl_schedule: str = "constant",
        fisher_sub_sampling_factor: int = 1,
        relative_damping: bool = False,
        **kwargs: Any,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be None or at least 1, got {micro_batch_size}")
        if fisher_sub_sampling_factor < 1:
            raise ValueError(f"fisher_sub_sampling_factor must be at least 1, got {fisher_sub_sampling_factor}")
        if target_kl_schedule not in ("constant", "linear"):
            raise ValueError(f"target_kl_schedule must be 'constant' or 'linear', got {target_kl_schedule!r}")
        self.micro_batch_size = micro_batch_size
        self.target_kl_schedule = target_kl_schedule
        self.fisher_sub_sampling_factor = fisher_sub_sampling_factor
        self.relative_damping = relative_damping
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        """One update of policy and critic from the rollout buffer."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        actor, metrics = self._update_actor()
        value_losses = self._update_critic(actor)
        self._n_updates += 1
        buffer = self.rollout_buffer
        for name, value in metrics.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/value_loss", float(np.mean(value_losses)) if value_losses else 0.0)
        self.logger.record(
            "train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        )
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_actor(self) -> tuple[list[nn.Parameter], dict[str, float]]:
        """Returns the actor's parameters and the metrics."""
        data, row = self._rollout()
        target_kl = self.target_kl
        if self.target_kl_schedule == "linear":  # what was left when the rollout began, so that the last one counts too
            target_kl *= min(1.0, self._current_progress_remaining + len(row) / self._total_timesteps)
        keep = torch.arange(0, len(row), self.sub_sampling_factor, device=row.device)
        in_fisher = row[keep] % self.fisher_sub_sampling_factor == self._n_updates % self.fisher_sub_sampling_factor
        actions = data.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else data.actions
        advantages = data.advantages[keep]
        if self.normalize_advantage:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        advantages = torch.zeros_like(data.advantages).index_copy(0, keep, advantages)

        def surrogate(new: Distribution, batch: Tensor) -> Tensor:
            ratio = torch.exp(new.log_prob(actions[batch]) - data.old_log_prob[batch])
            return (advantages[batch] * ratio).mean()

        with twice_differentiable():
            parts = self._micro_batches(data.observations, keep)
            candidates = [p for p in self.policy.parameters() if p.requires_grad]
            gradients: list[Tensor | None] = [None] * len(candidates)
            objective = 0.0
            for batch, states, _ in parts:
                share = surrogate(self.policy.get_distribution(states), batch) * (len(batch) / len(keep))
                objective += share.item()
                for i, gradient in enumerate(torch.autograd.grad(share, candidates, allow_unused=True)):
                    if gradient is not None:
                        gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient
            actor = [p for p, gradient in zip(candidates, gradients, strict=True) if gradient is not None]

            def kl_part(states: Any, old: Distribution, share: float) -> Tensor:
                return mean_kl(self.policy.get_distribution(states), old) * share

            chosen = keep[in_fisher] if in_fisher.any() else keep
            fisher_parts = parts if len(chosen) == len(keep) else self._micro_batches(data.observations, chosen)
            kl_parts = [partial(kl_part, states, old, len(batch) / len(chosen)) for batch, states, old in fisher_parts]
            gradient = torch.cat([g.reshape(-1) for g in gradients if g is not None])
            direction, curvature, damping = natural_direction(
                hessian_vector_product(kl_parts, actor),  # without a name, for it keeps a graph
                gradient,
                damping=self.cg_damping,
                relative=self.relative_damping,
                max_iter=self.cg_max_steps,
            )

        def measure() -> tuple[float, float]:
            kl = gain = 0.0
            for batch, states, old in parts:
                new, share = self.policy.get_distribution(states), len(batch) / len(keep)
                kl += mean_kl(new, old).item() * share
                gain += surrogate(new, batch).item() * share
            return kl, gain

        found = None
        if curvature > 0:  # without a gradient there is no direction (0 / 0)
            found = line_search(
                actor,
                direction * math.sqrt(2 * target_kl / curvature),  # the KL of a step s is half of s^T F s
                measure,
                lambda measured: measured[0] < target_kl and measured[1] > objective,  # False for NaN
                shrink=self.line_search_shrinking_factor,
                max_iter=self.line_search_max_iter,
            )
        kl, gain = (0.0, objective) if found is None else found
        return actor, {
            "target_kl": target_kl,
            "cg_damping": damping,
            "policy_objective": gain,
            "kl_divergence_loss": kl,
            "is_line_search_success": float(found is not None),
        }

    def _rollout(self) -> tuple[Any, Tensor]:
        """All states of the buffer, in the order in which the stock algorithm takes them, and the row of each."""
        buffer, before = self.rollout_buffer, np.random.get_state()
        data = next(iter(buffer.get(batch_size=None)))
        np.random.set_state(before)
        order = np.random.permutation(len(data.actions))  # what get() has just drawn; row by row before
        return data, torch.as_tensor(order // buffer.buffer_size, device=data.actions.device)

    @torch.no_grad()
    def _micro_batches(self, observations: Any, keep: Tensor) -> list[tuple[Tensor, Any, Distribution]]:
        """The states to use in groups that are computed together: their places, themselves as the policy takes them,
        and its present distributions there."""
        groups = []
        for batch in self._split(observations, keep):
            states = _take(observations, batch)
            if hasattr(self.policy, "prepare"):  # each is passed to the policy several times
                states = self.policy.prepare(states)
            # SB3's distribution object is filled anew at each call, hence the copy.
            groups.append((batch, states, copy.copy(self.policy.get_distribution(states))))
        return groups

    def _split(self, observations: Any, keep: Tensor) -> list[Tensor]:
        if self.micro_batch_size is None or len(keep) <= self.micro_batch_size:
            return [keep]
        if hasattr(self.policy, "sharing_order"):  # states of an episode into the same group
            keep = keep[self.policy.sharing_order(_take(observations, keep))]
        return list(keep.split(self.micro_batch_size))

    def _update_critic(self, actor: Sequence[nn.Parameter]) -> list[float]:
        losses = []
        for returns, values in self._value_batches():
            loss = F.mse_loss(returns, values)
            losses.append(loss.item())
            self.policy.optimizer.zero_grad()
            loss.backward()
            for parameter in actor:  # what the critic shares with the actor stays inside the trust region
                parameter.grad = None
            self.policy.optimizer.step()
        return losses

    def _value_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches of the critic: returns and values, both (n,)."""
        features = self._value_features()
        buffer = self.rollout_buffer
        for _ in range(self.n_critic_updates):
            if features is None:
                for data in buffer.get(self.batch_size):
                    yield data.returns, self.policy.predict_values(data.observations).flatten()
                continue
            returns = buffer.to_torch(buffer.returns.flatten())
            order = buffer.to_torch(np.random.permutation(len(returns)))  # as buffer.get() draws it
            for batch in order.split(self.batch_size):
                yield returns[batch], self.policy.value_head(features[batch]).flatten()

    @torch.no_grad()
    def _value_features(self) -> Tensor | None:
        """What a critic on the actor's features reads in each state of the buffer; None for any other critic."""
        if not hasattr(self.policy, "value_features"):
            return None
        buffer = self.rollout_buffer
        observations = {key: buffer.to_torch(value) for key, value in buffer.observations.items()}
        everything = torch.arange(len(buffer.returns.flatten()), device=self.device)
        features = None
        for batch in self._split(observations, everything):
            part = self.policy.value_features(_take(observations, batch))
            if part is None:
                return None
            features = part.new_empty(len(everything), part.shape[1]) if features is None else features
            features[batch] = part
        return features


def _take(observations: Any, index: Tensor) -> Any:
    return {k: v[index] for k, v in observations.items()} if isinstance(observations, dict) else observations[index]


class TRPO(SB3Agent):
    """Trust region policy optimisation of a language model; see the module's docstring and ``TRPOConfig``.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)   # doctest: +SKIP
        >>> TRPO(envs, seed=0).learn(100_000, progress_bar=True).save("runs/trpo")      # doctest: +SKIP
    """

    algorithm_class = MicroBatchTRPO
    config_class = TRPOConfig
    buffer_class = CompactRolloutBuffer

    def prepare(self, arguments: dict[str, Any], num_states: int) -> None:
        """Fills in the critic's batch size."""
        if arguments["batch_size"] is None:
            arguments["batch_size"] = max(1, num_states // 8)
