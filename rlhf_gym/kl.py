"""How far the policy is from the reference: estimators of KL(pi || pi_ref), and controllers of its price.

The estimators are pure tensor functions of log-probabilities in nats, differentiable in ``logprobs``. The first three
see one sampled token (or one whole response: pass the sums over its tokens) and are named as in Schulman 2020,
http://joschu.net/blog/kl-approx.html; ``exact_kl`` sees the whole vocabulary. With r = pi_ref(a) / pi(a), a ~ pi:

======== ======================== =============================================================================
k1       -log r                   unbiased; may be negative
k2       (log r)^2 / 2            biased; never negative; its gradient is an unbiased estimate of KL's gradient
k3       r - 1 - log r            unbiased; never negative; heavy-tailed when the policy leaves the reference
exact    sum_a pi(a) (-log r(a))  no sampling noise for this token; costs the full vocabulary
======== ======================== =============================================================================

"Unbiased" is about values. What the gradient of each estimator does inside a loss is another matter, see
``rlhf_gym.agents.functional.kl_in_loss``.

The controllers own ``kl_coef``: ``update`` is called once after each rollout, never inside one, because the rewards of
a rollout must all be made with the same coefficient.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "exact"]


def _check_shapes(logprobs: Tensor, ref_logprobs: Tensor) -> None:
    if logprobs.shape != ref_logprobs.shape:
        # Broadcasting (B,) against (B, 1) would give a (B, B) table of differences and no error.
        raise ValueError(
            "logprobs and ref_logprobs must have the same shape, got "
            f"{tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}."
        )


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The plain estimator log pi(a) - log pi_ref(a): unbiased, sometimes negative.

    Args:
        logprobs: Log-probability of the sampled token under the policy, in nats. Any shape, float.
        ref_logprobs: The same under the reference. Same shape.

    Returns:
        The estimate for each token, in nats. Same shape.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Schulman 2020, "Approximating KL divergence", k1. It is the penalty in Ziegler et al. 2019, eq. 2.

    Example:
        >>> k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])
    """
    _check_shapes(logprobs, ref_logprobs)
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log-ratio: never negative, biased by the third order of the difference.

    Args:
        logprobs: Log-probability of the sampled token under the policy, in nats. Any shape, float.
        ref_logprobs: The same under the reference. Same shape.

    Returns:
        The estimate for each token, in nats. Same shape.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Schulman 2020, "Approximating KL divergence", k2.

    Example:
        >>> k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1250])
    """
    _check_shapes(logprobs, ref_logprobs)
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r with r = pi_ref(a) / pi(a): unbiased and never negative.

    Args:
        logprobs: Log-probability of the sampled token under the policy, in nats. Any shape, float.
        ref_logprobs: The same under the reference. Same shape.

    Returns:
        The estimate for each token, in nats. Same shape.

    Raises:
        ValueError: If the shapes differ.

    Source:
        Schulman 2020, "Approximating KL divergence", k3; Shao et al. 2024 (GRPO), eq. 4.

    Example:
        >>> k3(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1065])
    """
    _check_shapes(logprobs, ref_logprobs)
    log_r = ref_logprobs - logprobs
    # expm1: near 0, exp(x) - 1 - x in float32 is all rounding error and can come out negative.
    return torch.expm1(log_r) - log_r


def exact_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The KL divergence itself, summed over the vocabulary.

    A token that the policy cannot choose (probability 0: a masked action) contributes exactly 0 to the value and to the
    gradient, whatever the reference says about it. A token that the policy can choose and the reference cannot makes
    the result infinite, as it is: forbid such tokens to both.

    Args:
        logprobs: Log-probabilities of all tokens under the policy, normalised, in nats; -inf is allowed.
            Shape (..., V), float.
        ref_logprobs: The same under the reference. Shape (..., V).

    Returns:
        KL(pi || pi_ref) of each distribution, in nats. Shape (...).

    Raises:
        ValueError: If the shapes differ or there is no vocabulary dimension.

    Example:
        >>> exact_kl(torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.75, 0.0]).log())
        tensor(0.1438)
    """
    _check_shapes(logprobs, ref_logprobs)
    if logprobs.ndim == 0:
        raise ValueError("exact_kl needs log-probabilities over a vocabulary, shape (..., V); got a single number.")
    impossible = logprobs.exp() == 0
    # Both arguments are replaced before the arithmetic: a where() around 0 * -inf would still send NaN backwards.
    logp = logprobs.masked_fill(impossible, 0.0)
    ref_logp = ref_logprobs.masked_fill(impossible, 0.0)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def estimate_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """KL(pi || pi_ref) by the estimator of that name.

    Args:
        logprobs: Under the policy, in nats: of the sampled tokens, any shape; for "exact" of all tokens, (..., V).
        ref_logprobs: The same under the reference. Same shape.
        estimator: "k1", "k2", "k3" or "exact"; the module's docstring compares them.

    Returns:
        The estimate for each token, in nats. Shape of ``logprobs``, for "exact" without its last dimension.

    Raises:
        ValueError: If the estimator is unknown or the shapes differ.

    Example:
        >>> estimate_kl(torch.tensor([-1.0]), torch.tensor([-1.5]), "k1")
        tensor([0.5000])
    """
    estimators = {"k1": k1, "k2": k2, "k3": k3, "exact": exact_kl}
    if estimator not in estimators:
        raise ValueError(f"The KL estimator must be one of {', '.join(estimators)}; got {estimator!r}.")
    return estimators[estimator](logprobs, ref_logprobs)


def _finite(name: str, value: float, *, above_zero: bool) -> float:
    rule = "a finite number " + ("> 0" if above_zero else ">= 0")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {rule}, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name} must be {rule}, got {value!r}.")
    return float(value)


class FixedKL:
    """A KL coefficient that stays as it is.

    Attributes:
        coef: The current ``kl_coef``.

    Args:
        coef: Price of one nat of KL, in units of the score; >= 0.

    Raises:
        TypeError: If ``coef`` is not a number.
        ValueError: If it is negative, infinite or NaN.

    Example:
        >>> FixedKL(0.05).update(kl=30.0, num_episodes=64)
        0.05
    """

    def __init__(self, coef: float) -> None:
        self.coef = _finite("kl_coef", coef, above_zero=False)

    def update(self, kl: float, num_episodes: int) -> float:
        """Return the coefficient for the next rollout: the same one.

        Args:
            kl: Ignored. Mean KL of the last rollout's responses, in nats.
            num_episodes: Ignored. Number of responses in that rollout.

        Returns:
            ``coef``.
        """
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs to go on, JSON-able."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the coefficient in it is not one this controller could have.
        """
        self.coef = _finite("kl_coef", state["coef"], above_zero=False)


class AdaptiveKL:
    """A KL coefficient that is steered so that the KL of whole responses stays near a target.

    coef <- coef * (1 + clip((kl - target) / target, -0.2, 0.2) * num_episodes / horizon)

    The KL that counts is that of whole responses (sum over the tokens), averaged over the rollout. It is an integral
    controller in log space: while the KL is 20 % or more off the target, the coefficient changes by a factor e in about
    5 * horizon episodes.

    Attributes:
        coef: The current ``kl_coef``.
        target: The wanted KL per response, in nats.
        horizon: Number of episodes, see above.

    Args:
        coef: Where to start; > 0, for the rule multiplies and would never leave 0.
        target: KL per response to aim at, in nats; > 0.
        horizon: How slow the controller is, in episodes; > 0, and more than a fifth of a rollout.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is not finite and > 0.

    Source:
        Ziegler et al. 2019, section 2.2, with the per-episode form of its code (openai/lm-human-preferences,
        ``AdaptiveKLController``): the paper's K_beta = 0.1 is num_episodes / horizon there.

    Example:
        >>> round(AdaptiveKL(0.1, target=6.0, horizon=10_000).update(kl=60.0, num_episodes=500), 6)
        0.101
    """

    MAX_ERROR = 0.2

    def __init__(self, coef: float, target: float, horizon: float = 10_000) -> None:
        self.coef = _finite("kl_coef", coef, above_zero=True)
        self.target = _finite("ref_kl_target", target, above_zero=True)
        self.horizon = _finite("kl_horizon", horizon, above_zero=True)

    def update(self, kl: float, num_episodes: int) -> float:
        """Steer, and return the coefficient for the next rollout.

        Args:
            kl: Mean over the last rollout's responses of the KL summed over each response, in nats. An estimate may be
                negative.
            num_episodes: Number of responses in that rollout, > 0.

        Returns:
            The new ``coef``.

        Raises:
            ValueError: If ``kl`` is not finite, or the rollout is so large that one update could make ``coef`` zero or
                negative. ``coef`` is unchanged then.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {kl!r}: the policy or the reference returned a broken log-prob.")
        if num_episodes <= 0:
            raise ValueError(f"num_episodes must be > 0, got {num_episodes!r}.")
        gain = num_episodes / self.horizon
        if self.MAX_ERROR * gain >= 1:
            raise ValueError(
                f"kl_horizon must be more than a fifth of the episodes per rollout, got {self.horizon:g} for "
                f"{num_episodes} episodes: one update could make kl_coef zero or negative. Raise kl_horizon."
            )
        error = min(max(kl / self.target - 1, -self.MAX_ERROR), self.MAX_ERROR)
        self.coef *= 1 + error * gain
        return self.coef

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs to go on, JSON-able. Target and horizon are configuration."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the coefficient in it is not one this controller could have.
        """
        self.coef = _finite("kl_coef", state["coef"], above_zero=True)
