"""Stable-Baselines3's PPO and A2C as agents, with defaults for text.

Objective of both, with the defaults: E[score] - kl_coef * KL(pi || pi_ref) over whole responses, the KL (k1) standing in
the reward as announced. gamma < 1 or ent_coef > 0 change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import stable_baselines3

from .agent import SB3Agent
from .buffers import CompactRolloutBuffer


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig:
    """What the on-policy algorithms have in common; the names are Stable-Baselines3's.

    Attributes:
        learning_rate: Of the optimiser, at the start, > 0.
        lr_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        n_steps: Tokens per row and rollout; None is twice the longest response, so that most episodes lie within one.
        gamma: Discount per token. 1: the objective is a sum over the response.
        gae_lambda: 0 trusts the critic, 1 the outcome. Below 1 a critic that lags behind the policy acts as a bonus for
            ending early.
        normalize_advantage: To mean 0 and standard deviation 1.
        critic: "shared" (value head on the policy's trunk) or "separate" (a trunk of its own).
        ref_kl_target: Mean KL to the reference that an adaptive controller steers kl_coef towards, nats per response;
            None keeps kl_coef fixed.
        kl_horizon: Slowness of that controller, in episodes.
    """

    learning_rate: float = 3e-4
    lr_schedule: str = "linear"
    n_steps: int | None = None
    gamma: float = 1.0
    gae_lambda: float = 1.0
    normalize_advantage: bool = True
    critic: str = "shared"
    ref_kl_target: float | None = None
    kl_horizon: float = 10_000.0

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        if self.lr_schedule not in ("linear", "constant"):
            raise ValueError(f"lr_schedule must be 'linear' or 'constant', got {self.lr_schedule!r}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("n_steps", "batch_size", "n_epochs", "n_critic_updates", "cg_max_steps", "micro_batch_size"):
            value = getattr(self, name, None)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class SB3PPOConfig(OnPolicyConfig):
    """Settings of Stable-Baselines3's PPO, and those of ``OnPolicyConfig``.

    Attributes:
        n_epochs: Passes over each rollout.
        batch_size: States per optimiser step; None is half of the rollout. Mind that a small batch of shuffled states
            costs as much as a large one: it holds some state of nearly every episode.
        clip_range: Largest change of the probability ratio that is still rewarded.
        clip_range_vf: The same for values; None does not clip.
        vf_coef: Weight of the value loss.
        ent_coef: Weight of an entropy bonus, beyond what the KL gives.
        max_grad_norm: Gradients are scaled down to this norm.
        target_kl: The update ends early once old and new policy differ by 1.5 times this, nats per token; None never.
    """

    n_epochs: int = 4
    batch_size: int | None = None
    clip_range: float = 0.2
    clip_range_vf: float | None = None
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    max_grad_norm: float = 1.0
    target_kl: float | None = 0.03


class SB3PPO(SB3Agent):
    """Stable-Baselines3's own PPO, unmodified: it goes by steps and shuffled states, ours by whole responses."""

    algorithm_class = stable_baselines3.PPO
    config_class = SB3PPOConfig
    buffer_class = CompactRolloutBuffer

    def prepare(self, arguments: dict[str, Any], num_states: int) -> None:
        """Fills in the batch size."""
        if arguments.get("batch_size") is None:
            arguments["batch_size"] = max(2, num_states // 2)


@dataclass(frozen=True, kw_only=True)
class A2CConfig(OnPolicyConfig):
    """Settings of Stable-Baselines3's A2C, and those of ``OnPolicyConfig``.

    Attributes:
        vf_coef: Weight of the value loss.
        ent_coef: Weight of an entropy bonus, beyond what the KL gives.
        max_grad_norm: Gradients are scaled down to this norm.
        use_rms_prop: RMSprop as in the paper instead of Adam.
    """

    learning_rate: float = 1e-3
    vf_coef: float = 0.5
    ent_coef: float = 0.0
    max_grad_norm: float = 1.0
    use_rms_prop: bool = False


class A2C(SB3Agent):
    """Stable-Baselines3's own A2C, unmodified: one gradient step per rollout."""

    algorithm_class = stable_baselines3.A2C
    config_class = A2CConfig
    buffer_class = CompactRolloutBuffer
