"""Trust Region Policy Optimisation for language models.

Maximise the surrogate objective E[A ratio] under E[KL(new || old)] <= target_kl: a conjugate-gradient step along the
natural gradient F^-1 g, as long as the trust region allows; then a line search on the true objective and KL.

Source:
    Schulman et al. 2015, arXiv:1502.05477; the numbers are those of ``sb3_contrib.TRPO``, which cannot be used with a
    transformer as it is (see ``MicroBatchTRPO``).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import sb3_contrib
import torch
from gymnasium import spaces
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution, kl_divergence
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .sb3.agent import SB3Agent
from .sb3.algorithms import OnPolicyConfig


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(OnPolicyConfig):
    """Settings of TRPO, and those of ``OnPolicyConfig``; ``learning_rate`` is the critic's only.

    Attributes:
        target_kl: Largest mean KL of one update, in nats per token; with much damping a step stays well below it.
        target_kl_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        cg_max_steps: Fisher-vector products per update.
        cg_damping: Added to the Fisher matrix. A batch of episodes determines few of a model's directions; damping
            keeps the step out of the others, where there is only noise (on TinyReviews .01 learns far more slowly).
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

        def distribution(batch: Tensor) -> Distribution:
            return self.policy.get_distribution(_take(data.observations, batch))

        def surrogate(new: Distribution, batch: Tensor) -> Tensor:
            ratio = torch.exp(new.log_prob(actions[batch]) - data.old_log_prob[batch])
            return (advantages[batch] * ratio).mean()

        with _twice_differentiable():
            parts = self._micro_batches(data.observations, keep)
            candidates = [p for p in self.policy.parameters() if p.requires_grad]
            gradients: list[Tensor | None] = [None] * len(candidates)
            objective = 0.0
            for batch, _ in parts:
                share = surrogate(distribution(batch), batch) * (len(batch) / len(keep))
                objective += share.item()
                for i, gradient in enumerate(torch.autograd.grad(share, candidates, allow_unused=True)):
                    if gradient is not None:
                        gradients[i] = gradient if gradients[i] is None else gradients[i] + gradient
            actor = [p for p, gradient in zip(candidates, gradients, strict=True) if gradient is not None]

            def kl_part(batch: Tensor, old: Distribution, num_states: int) -> Tensor:
                return _mean_kl(distribution(batch), old) * (len(batch) / num_states)

            chosen = keep[in_fisher] if in_fisher.any() else keep
            fisher_parts = parts if len(chosen) == len(keep) else self._micro_batches(data.observations, chosen)
            kl_parts = [partial(kl_part, batch, old, len(chosen)) for batch, old in fisher_parts]
            fisher = hessian_vector_product(kl_parts, actor, damping=self.cg_damping)
            gradient = torch.cat([g.reshape(-1) for g in gradients if g is not None])
            direction = conjugate_gradient_solver(fisher, gradient, max_iter=self.cg_max_steps)
            curvature = float(direction @ fisher(direction))  # s^T F s: the KL of a step s is half of it
            del fisher  # with the graph that it keeps
        step = direction * (math.sqrt(2 * target_kl / curvature) if curvature > 0 else math.nan)

        def measure() -> tuple[float, float]:
            kl = gain = 0.0
            for batch, old in parts:
                new, share = distribution(batch), len(batch) / len(keep)
                kl += _mean_kl(new, old).item() * share
                gain += surrogate(new, batch).item() * share
            return kl, gain

        found = line_search(
            actor,
            step,
            measure,
            lambda measured: measured[0] < target_kl and measured[1] > objective,  # False for NaN
            shrink=self.line_search_shrinking_factor,
            max_iter=self.line_search_max_iter,
        )
        kl, gain = (0.0, objective) if found is None else found
        return actor, {
            "target_kl": target_kl,
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
    def _micro_batches(self, observations: Any, keep: Tensor) -> list[tuple[Tensor, Distribution]]:
        """The states to use in groups that are computed together, with the policy's present distributions there."""
        # SB3's distribution object is filled anew at each call, hence the copies.
        return [
            (batch, copy.copy(self.policy.get_distribution(_take(observations, batch))))
            for batch in self._split(observations, keep)
        ]

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


def hessian_vector_product(
    losses: Sequence[Callable[[], Tensor]], parameters: Sequence[Tensor], *, damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """The function v -> (H + damping I) v, where H is the Hessian of the sum of the losses.

    H v = d/dtheta (grad L . v), summed over the losses. A single loss is evaluated now, and its graph kept for every
    product; several are evaluated anew for each product, so that one graph is in memory at a time.

    Args:
        losses: Each returns a scalar that depends on the parameters, twice differentiable.
        parameters: Tensors that require gradients; v is flat, in their order.
        damping: Added to the diagonal.

    Returns:
        A function of a flat vector; it takes and ignores keyword arguments.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product([lambda: (x ** 3).sum()], [x])(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """

    def gradient(loss: Callable[[], Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True))

    kept = [gradient(losses[0])] if len(losses) == 1 else None

    def product(vector: Tensor, **_: Any) -> Tensor:
        pieces = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]
        result = damping * vector
        for grads in kept if kept is not None else map(gradient, losses):
            dot = sum((g * v).sum() for g, v in zip(grads, pieces, strict=True) if g is not None)
            seconds = torch.autograd.grad(dot, parameters, retain_graph=kept is not None, allow_unused=True)
            flat = [torch.zeros_like(p) if s is None else s for s, p in zip(seconds, parameters, strict=True)]
            result = result + torch.cat([f.reshape(-1) for f in flat])
        return result

    return product


@torch.no_grad()
def line_search(
    parameters: Sequence[Tensor],
    step: Tensor,
    measure: Callable[[], Any],
    acceptable: Callable[[Any], bool],
    *,
    shrink: float,
    max_iter: int,
) -> Any | None:
    """Tries ever shorter steps, in place, until one is acceptable; else restores the parameters, whatever ends it.

    Args:
        parameters: Changed in place.
        step: Flat, in their order: the longest step.
        measure: Measures the parameters as they then are.
        acceptable: Judges what was measured.
        shrink: Factor from one try to the next, in (0, 1).
        max_iter: Number of tries.

    Returns:
        What was measured at the accepted step, or None.
    """
    original = [p.detach().clone() for p in parameters]
    pieces = [s.view_as(p) for s, p in zip(step.split([p.numel() for p in parameters]), parameters, strict=True)]
    accepted = False
    try:
        for i in range(max_iter):
            for p, start, piece in zip(parameters, original, pieces, strict=True):
                p.copy_(start + shrink**i * piece)
            measured = measure()
            accepted = acceptable(measured)
            if accepted:
                return measured
        return None
    finally:  # also when it was interrupted: a trial step must not be taken for the result
        if not accepted:
            for p, start in zip(parameters, original, strict=True):
                p.copy_(start)


def _mean_kl(new: Distribution, old: Distribution) -> Tensor:
    if isinstance(new, CategoricalDistribution):
        # torch's own is the same, but calls it infinite where the old probability has underflowed to 0.
        p, q = new.distribution, old.distribution
        return (p.probs * (p.logits - q.logits)).sum(-1).mean()
    return kl_divergence(new, old).mean()


@contextlib.contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Inside, attention and recurrent layers run in kernels with a second derivative, which the fast ones lack."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


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

    def prepare(self, arguments: dict[str, Any], num_states: int) -> None:
        """Fills in the critic's batch size."""
        if arguments["batch_size"] is None:
            arguments["batch_size"] = max(1, num_states // 8)
