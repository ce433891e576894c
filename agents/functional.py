"""The mathematics that the agents share: pure functions of tensors, no state, no randomness.

Shapes: B rows (responses), R response tokens, V vocabulary. ``mask`` is the ``response_mask`` (B, R): True on a real
response token, EOS included, False after the end. Every function replaces what stands after the end *before* it
computes (``torch.where``, never ``* mask``), so whatever is there, inf and NaN too, changes values and gradients by
exactly 0: multiplying would turn inf into NaN, and even a where() after an exp() sends NaN backwards.

Losses come per token; `aggregate_loss` makes one number of them. Every function raises TypeError when a mask is not
bool and ValueError when shapes differ: silent broadcasting of (B,) against (B, R) is the classic mistake here.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_gym.kl import estimate_kl, k3

LossMode = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


def _check(mask: Tensor, **tensors: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"The mask must be a bool tensor (True = a real response token), got {mask.dtype}.")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} must have the mask's shape {tuple(mask.shape)}, got {tuple(tensor.shape)}.")


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """The values with 0 after the end, cut off from the gradient there."""
    return torch.where(mask, values, 0.0)


def _above_smallest(values: Tensor, mask: Tensor) -> Tensor:
    """The values measured from the smallest real one: equal values are exactly 0, and so is their standard deviation.

    The mean of equal float32 numbers is off by rounding, and dividing by a standard deviation would magnify that to 1.
    """
    return torch.where(mask, values - torch.where(mask, values, torch.inf).amin(), 0.0)


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> Tensor:
    """Generalised advantage estimates over the response tokens.

    A_t = delta_t + gamma * lambda * A_{t+1},  delta_t = r_t + gamma * V_{t+1} - V_t,  V after the last token is 0.

    Args:
        rewards: Reward received for token t. Shape (B, R), float32.
        values: Value of the state in which token t is chosen. Shape (B, R), float32.
        response_mask: True where t is a real response token. Shape (B, R), bool. Any pattern: t + 1 is the next real
            token of the row, as if the others were not there.
        gamma: Discount per token, in [0, 1].
        gae_lambda: 0 is the one-step TD error, 1 is Monte Carlo.

    Returns:
        Advantages, not normalised, 0 where ``response_mask`` is False. Shape (B, R), float32.

    Raises:
        ValueError: If the shapes differ, or if gamma or gae_lambda is outside [0, 1].

    Source:
        Schulman et al. 2016, eq. 16. Differs from SB3: never bootstraps past the end.

    Example:
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> gae(torch.tensor([[0., 0., 1.]]), torch.zeros(1, 3), mask, gamma=0.1, gae_lambda=1.0)
        tensor([[0.0100, 0.1000, 1.0000]])
    """
    _check(response_mask, rewards=rewards, values=values)
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
    rewards, values = _real(rewards, response_mask), _real(values, response_mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(real, advantage, 0.0)
        # A masked position hands on what came after it: a row in a ragged batch equals the row alone.
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages


def reward_to_go(rewards: Tensor, response_mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from token t to the end: the return of the state in which token t is chosen.

    G_t = r_t + gamma * G_{t+1}

    Args:
        rewards: Reward received for token t. Shape (B, R), float32.
        response_mask: True where t is a real response token. Shape (B, R), bool.
        gamma: Discount per token, in [0, 1].

    Returns:
        Returns, 0 where ``response_mask`` is False. Shape (B, R), float32.

    Raises:
        ValueError: If the shapes differ or gamma is outside [0, 1].

    Example:
        >>> reward_to_go(torch.tensor([[1., 2., 9.]]), torch.tensor([[True, True, False]]))
        tensor([[3., 2., 0.]])
    """
    return gae(rewards, torch.zeros_like(rewards), response_mask, gamma=gamma, gae_lambda=1.0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of the whole batch (each token counts the same, so long rows weigh more).

    Args:
        values: Any float values. Shape (B, R).
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The mean; 0 when no token is real. Shape ().

    Example:
        >>> masked_mean(torch.tensor([[1., 3., torch.nan]]), torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    _check(mask, values=values)
    return _real(values, mask).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Variance over the real tokens of the whole batch, biased (divided by their number, not by one less).

    Args:
        values: Any float values. Shape (B, R).
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The variance; 0 when no token is real. Shape ().

    Example:
        >>> masked_var(torch.tensor([[1., 3., torch.nan]]), torch.tensor([[True, True, False]]))
        tensor(1.)
    """
    _check(mask, values=values)
    values = _above_smallest(values, mask)
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to standard deviation 1 over the real tokens of the whole batch, and to mean 0 unless told otherwise.

    The standard deviation is the biased one (over n, not n - 1). Values that are all equal have none: they become
    0 (``shift_mean=True``) or stay as they are, and rounding errors are never blown up to size 1.

    Args:
        values: Advantages or rewards. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.
        shift_mean: False keeps the mean where it is (for rewards, whose sign and size mean something).

    Returns:
        Whitened values, 0 where ``mask`` is False, without gradient. Shape (B, R).

    Source:
        Ziegler et al. 2019, ``whiten`` in openai/lm-human-preferences (biased there too; TRL takes n - 1). Differs: no
        1e-8 under the root, so that small advantages reach standard deviation 1 as well.

    Example:
        >>> whiten(torch.tensor([[1., 3., 9.]]), torch.tensor([[True, True, False]]))
        tensor([[-1.,  1.,  0.]])
    """
    _check(mask, values=values)
    values = values.detach()
    std = masked_var(values, mask).sqrt()
    above = _above_smallest(values, mask)
    whitened = (above - masked_mean(above, mask)) / torch.where(std > 0, std, 1.0)
    if not shift_mean:
        whitened = whitened + masked_mean(values, mask)
    return _real(whitened, mask)


def group_advantages(
    scores: Tensor,
    group_size: int,
    *,
    baseline: Literal["leave_one_out", "group_mean"] = "leave_one_out",
    divide_by_std: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Advantage of each response over the other responses to the same prompt.

    leave_one_out (RLOO): A_i = r_i - mean of the other r_j. group_mean (GRPO): A_i = r_i - mean of all r_j, smaller by
    the factor (n - 1) / n. ``divide_by_std`` (GRPO as published; off in Dr. GRPO) divides A_i by the group's standard
    deviation + ``eps``; it changes the objective: with a binary reward 2 arcsin sqrt(p) is maximised, not p.

    Args:
        scores: Score of each whole response, KL penalty included if it is part of the reward. Shape (B,), float. The
            ``group_size`` responses to one prompt stand next to each other.
        group_size: Responses per prompt, >= 2; divides B.
        baseline: "leave_one_out" or "group_mean".
        divide_by_std: Divide by the group's standard deviation (Bessel: over n - 1, as in TRL).
        eps: Added to the standard deviation.

    Returns:
        Advantages; exactly 0 in a group of equal scores, and summing to 0 in every group. Shape (B,).

    Raises:
        ValueError: If the scores are not (B,), or the group size does not fit, or the baseline is unknown.

    Source:
        Kool et al. 2019; Ahmadian et al. 2024, eq. 6 (RLOO); Shao et al. 2024, section 4.1.2 (GRPO); Liu et al. 2025
        (Dr. GRPO).

    Example:
        >>> group_advantages(torch.tensor([1., 0., 0., 5., 5., 5.]), group_size=3)
        tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000,  0.0000])
    """
    if scores.ndim != 1:
        raise ValueError(f"scores must have shape (B,), one per response, got {tuple(scores.shape)}.")
    if group_size < 2 or scores.shape[0] % group_size:
        raise ValueError(f"group_size must be >= 2 and divide the {scores.shape[0]} responses, got {group_size!r}.")
    if baseline not in ("leave_one_out", "group_mean"):
        raise ValueError(f"baseline must be 'leave_one_out' or 'group_mean', got {baseline!r}.")
    groups = scores.reshape(-1, group_size)
    # From the group's smallest score, so that equal scores give exactly 0 (see whiten) and a constant added to all
    # scores costs no precision.
    groups = groups - groups.amin(dim=1, keepdim=True)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        advantages = advantages * (group_size / (group_size - 1))
    if divide_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    return advantages.reshape(-1)


def advantage_scale(advantages: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """What to divide PPO's advantages by: the larger of their own standard deviation and that of the scores.

    Near the optimum of the KL-regularised objective the advantages of a good critic go to 0 and are mostly noise.
    Dividing them by their own standard deviation would make that noise as large as the signal was at the start; the
    spread of the scores is the scale of what is still to be won.

    Args:
        advantages: Advantages before scaling. Shape (B, R), float32.
        scores: Score of each whole response. Shape (B,), float.
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The scale, at least 1e-8, without gradient; both standard deviations are biased (over n). Shape ().

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> mask = torch.tensor([[True], [True]])
        >>> advantage_scale(torch.tensor([[-0.1], [0.1]]), torch.tensor([0., 1.]), mask)
        tensor(0.5000)
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have shape (B,) = {tuple(mask.shape[:1])}, got {tuple(scores.shape)}.")
    own = masked_var(advantages, mask).sqrt()
    return torch.maximum(own, scores.to(own.dtype).std(correction=0)).clamp(min=1e-8).detach()


def loss_normaliser(mask: Tensor, mode: LossMode = "token_mean") -> Tensor:
    """What a batch's loss is divided by: compute it once for the whole batch and pass it with every micro-batch.

    Args:
        mask: True on real tokens, of the whole batch. Shape (B, R), bool.
        mode: "token_mean" counts the real tokens; "sequence_mean" and "sequence_sum" count the rows; "constant" is
            B * R, so R must be the longest that a response may be, not the longest that there is.

    Returns:
        The count, at least 1. Shape (), int64.

    Raises:
        ValueError: If the mode is unknown.

    Example:
        >>> loss_normaliser(torch.tensor([[True, True], [True, False]]), "token_mean")
        tensor(3)
    """
    _check(mask)
    if mode not in get_args(LossMode):
        raise ValueError(f"The loss mode must be one of {', '.join(get_args(LossMode))}; got {mode!r}.")
    if mode == "token_mean":
        return mask.sum().clamp(min=1)
    return torch.tensor(mask.numel() if mode == "constant" else mask.shape[0], device=mask.device).clamp(min=1)


def aggregate_loss(
    per_token: Tensor, mask: Tensor, mode: LossMode = "token_mean", *, normaliser: Tensor | float | None = None
) -> Tensor:
    """One number of the losses of all tokens. The mode decides how much a token of a long response weighs.

    token_mean: sum over all real tokens / their number; every token weighs the same (PPO, DAPO).
    sequence_mean: mean over the rows of the row's mean; a token weighs 1 / length (GRPO as published), so in a policy
    loss long bad responses are punished less per token.
    sequence_sum: sum over the tokens / number of rows; the unbiased policy gradient of whole responses (RLOO).
    constant: sum over the tokens / (B * R), which does not depend on the lengths either (Dr. GRPO).

    Gradient accumulation: a mean of micro-batch means is *not* the batch's mean when token counts differ. So take
    ``normaliser = loss_normaliser(mask_of_the_whole_batch, mode)`` once and pass it with each micro-batch; the losses
    (and gradients) then add up to those of the whole batch exactly.

    Args:
        per_token: Loss of each token. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.
        mode: "token_mean", "sequence_mean", "sequence_sum" or "constant".
        normaliser: What to divide by. None is this batch's own ``loss_normaliser(mask, mode)``.

    Returns:
        The loss. Shape ().

    Raises:
        ValueError: If the shapes differ or the mode is unknown.

    Source:
        Yu et al. 2025 (DAPO), section 3.3; Liu et al. 2025 (Dr. GRPO), section 3.1.

    Example:
        >>> loss, mask = torch.tensor([[1., 3.], [8., 0.]]), torch.tensor([[True, True], [True, False]])
        >>> modes = ("token_mean", "sequence_mean", "sequence_sum", "constant")
        >>> [aggregate_loss(loss, mask, mode).item() for mode in modes]
        [4.0, 5.0, 6.0, 3.0]
    """
    _check(mask, per_token=per_token)
    if normaliser is None or mode not in get_args(LossMode):
        normaliser = loss_normaliser(mask, mode)
    per_row = _real(per_token, mask).sum(dim=1)
    if mode == "sequence_mean":
        per_row = per_row / mask.sum(dim=1).clamp(min=1)
    return per_row.sum() / normaliser


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """KL(old || new) per token, estimated on tokens that the old policy sampled: mean of ratio - 1 - log ratio.

    Args:
        logprobs: Log-probabilities under the policy as it is now. Shape (B, R), float32.
        old_logprobs: Log-probabilities under the policy that sampled. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The estimate in nats per token, >= 0 up to rounding, without gradient. Shape ().

    Source:
        Schulman 2020, "Approximating KL divergence", k3; as in SB3 and CleanRL.

    Example:
        >>> approx_kl(torch.tensor([[-1.5]]), torch.tensor([[-1.0]]), torch.tensor([[True]]))
        tensor(0.1065)
    """
    _check(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    return masked_mean(k3(_real(old_logprobs, mask), _real(logprobs, mask)).detach(), mask)


def policy_loss_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float | tuple[float, float] | None = 0.2,
    dual_clip: float | None = None,
    importance_level: Literal["token", "sequence"] = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, per token.

    loss = max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), ratio = pi(a|s) / pi_old(a|s); with ``dual_clip`` c and
    A < 0 not more than -A c. The gradient is 0 where A > 0 and ratio > 1 + high, where A < 0 and ratio < 1 - low, and,
    with dual clip, where A < 0 and ratio > c; elsewhere it is -A ratio grad(log pi). At ratio 1 it is REINFORCE's.

    With ``importance_level="sequence"`` every token has its response's ratio (pi(y) / pi_old(y))^(1/|y|), the geometric
    mean of its tokens' (GSPO, with one advantage per response and the mode "sequence_mean"). It is 1/|y| as sensitive:
    clip ranges are far smaller.

    Args:
        logprobs: Log-probabilities under the policy as it is now, with gradient. Shape (B, R), float32.
        old_logprobs: Log-probabilities under the policy that sampled. Shape (B, R), float32.
        advantages: Advantages. Shape (B, R), float32; spread one per response with ``a[:, None].expand_as(mask)``.
        mask: True on real tokens. Shape (B, R), bool.
        clip_range: One number for both sides, or (low, high), each >= 0 and low <= 1 (DAPO: (0.2, 0.28)). None does not
            clip: what is left are importance weights, under which a baseline still has the expectation 0.
        dual_clip: None (off), or c > 1 + high: bounds the loss of an unlikely bad token whose ratio explodes.
        importance_level: "token" or "sequence".

    Returns:
        The loss of each token, 0 where ``mask`` is False, shape (B, R); and scalars for the log, without gradient:
        ``clip_fraction`` (share of real tokens with the ratio outside the range, whatever the sign of A, as in SB3),
        ``approx_kl`` (see `approx_kl`) and ``ratio`` (its mean; 1 in expectation while the samples are fresh).

    Raises:
        ValueError: If the shapes differ, or clip_range, dual_clip or importance_level is not as above.

    Source:
        Schulman et al. 2017, eq. 7; Ye et al. 2020, eq. 5 (dual clip); Yu et al. 2025, eq. 10 (two-sided range); Zheng
        et al. 2025, eq. 5 and 7 (GSPO).

    Example:
        >>> logprobs, old = torch.tensor([[0.5, 0.0]]).log(), torch.tensor([[0.25, 0.0]]).log()
        >>> policy_loss_clipped(logprobs, old, torch.ones(1, 2), torch.tensor([[True, False]]))[0]
        tensor([[-1.2000,  0.0000]])
    """
    _check(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    low, high = _clip_bounds(clip_range)
    if dual_clip is not None and not 1 + high < dual_clip < math.inf:
        raise ValueError(f"dual_clip must be None or more than 1 + clip_range ({1 + high:g}), got {dual_clip!r}.")
    if importance_level not in ("token", "sequence"):
        raise ValueError(f"importance_level must be 'token' or 'sequence', got {importance_level!r}.")
    log_ratio = _real(logprobs, mask) - _real(old_logprobs, mask)
    if importance_level == "sequence":
        of_response = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = _real(of_response.expand_as(log_ratio), mask)
    ratio = log_ratio.detach().exp()

    # Where the gradient stops, the ratio's bound stands in *before* the exp: min() and max() after it would give the
    # same loss, but an overflowing ratio sends inf * 0 = NaN backwards.
    too_high = (advantages > 0) & (ratio > 1 + high)
    too_low = (advantages < 0) & (ratio < 1 - low)
    stopped, bound = too_high | too_low, ratio.clamp(1 - low, 1 + high)
    if dual_clip is not None:
        exploded = (advantages < 0) & (ratio > dual_clip)
        stopped, bound = stopped | exploded, torch.where(exploded, dual_clip, bound)
    surrogate = advantages * torch.where(stopped, bound, torch.where(stopped, 0.0, log_ratio).exp())

    outside = (ratio < 1 - low) | (ratio > 1 + high)
    stats = {
        "clip_fraction": masked_mean(outside.to(ratio.dtype), mask),
        "approx_kl": approx_kl(logprobs, old_logprobs, mask),
        "ratio": masked_mean(ratio, mask),
    }
    return _real(-surrogate, mask), stats


def _clip_bounds(clip_range: float | tuple[float, float] | None) -> tuple[float, float]:
    if clip_range is None:
        return 1.0, math.inf
    low, high = clip_range if isinstance(clip_range, (tuple, list)) else (clip_range, clip_range)
    if not (0 <= low <= 1 and 0 <= high < math.inf):
        raise ValueError(f"clip_range must be a number in [0, 1] or (low in [0, 1], high >= 0), got {clip_range!r}.")
    return low, high


def value_loss_clipped(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range_vf: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of the values, per token, taken pessimistically once they have moved far.

    loss = max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2

    Args:
        values: Values as they are now, with gradient. Shape (B, R), float32.
        old_values: Values at the time of the rollout. Shape (B, R), float32.
        returns: What they should be. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.
        clip_range_vf: c above, > 0, in units of the reward; None does not clip.

    Returns:
        The loss of each token, 0 where ``mask`` is False, shape (B, R); and ``value_clip_fraction``, the share of real
        tokens whose gradient the clip stops, a scalar without gradient.

    Raises:
        ValueError: If the shapes differ or clip_range_vf is not positive.

    Source:
        OpenAI baselines ``ppo2``; Ziegler et al. 2019's code. SB3 has no factor 1/2 and vf_coef 0.5 instead.

    Example:
        >>> value, mask = torch.tensor([[1.0]]), torch.tensor([[True]])
        >>> value_loss_clipped(value, torch.zeros(1, 1), value, mask, clip_range_vf=0.2)[0]
        tensor([[0.3200]])
    """
    _check(mask, values=values, old_values=old_values, returns=returns)
    if clip_range_vf is not None and not clip_range_vf > 0:
        raise ValueError(f"clip_range_vf must be None or > 0, got {clip_range_vf!r}.")
    values, old_values, returns = _real(values, mask), _real(old_values, mask), _real(returns, mask)
    error = (values - returns).square()
    stopped = torch.zeros_like(mask)
    if clip_range_vf is not None:
        moved = values - old_values
        clipped_error = (old_values + moved.clamp(-clip_range_vf, clip_range_vf) - returns).square()
        # Inside the range the two errors differ by rounding only: that is no clip.
        stopped = (moved.abs() > clip_range_vf) & (clipped_error > error)
        error = torch.where(stopped, clipped_error, error)
    return 0.5 * error, {"value_clip_fraction": masked_mean(stopped.to(error.dtype), mask)}


def entropy_from_logits(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy of the next-token distributions.

    Args:
        logits: Unnormalised log-probabilities; -inf forbids a token, which then counts exactly 0 in value and gradient.
            Shape (..., V), float; half precisions are computed in float32.
        mask: True on real tokens. Shape (...), bool. None: all are.

    Returns:
        Entropies in nats, 0 where ``mask`` is False. Shape (...).

    Raises:
        ValueError: If ``mask`` has not the shape of the logits without V.

    Example:
        >>> entropy_from_logits(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(0.6931)
    """
    if mask is not None:
        _check(mask, **{"logits without the vocabulary": logits[..., 0]})
        logits = torch.where(mask[..., None], logits, 0.0)
    dtype = torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype
    logprobs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    # log p = -inf becomes 0 before it meets p = 0.
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    entropy = -(logprobs.exp() * finite).sum(-1)
    return entropy if mask is None else _real(entropy, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: 1 - Var(G - V) / Var(G), over the real tokens.

    1 is a perfect critic, 0 no better than a constant, negative worse than that.

    Args:
        values: Values. Shape (B, R), float32.
        returns: Returns. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.

    Returns:
        The share, without gradient; NaN when the returns do not vary (as in SB3). Shape ().

    Example:
        >>> explained_variance(torch.tensor([[0., 1.]]), torch.tensor([[0., 2.]]), torch.tensor([[True, True]]))
        tensor(0.7500)
    """
    _check(mask, values=values, returns=returns)
    variance = masked_var(returns.detach(), mask)
    unexplained = masked_var((returns - values).detach(), mask)
    return torch.where(variance > 0, 1 - unexplained / variance, torch.nan)


def kl_in_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k2",
    level: Literal["token", "sequence"] = "sequence",
) -> Tensor:
    """A KL penalty as a term of the loss, on responses that the policy itself sampled.

    Only its gradient matters there, and that of an unbiased estimate of the KL need not be an unbiased estimate of the
    KL's gradient, since the samples come from the policy too:

    * k1: the expected gradient is 0 (that of any log-prob is). No regularisation at all.
    * k2, per sequence, half of (sum_t log ratio_t)^2: exactly the gradient of the KL of whole responses.
    * k2, per token: each state's own KL. Myopic: ignores that a token changes the KL of later ones.
    * k3, per token (GRPO): the gradient of KL(ref || pi) in each state, weighted by the states that pi visits.

    The KL penalty in the *reward*, with k1 and reward-to-go, is the other unbiased way.

    Args:
        logprobs: Log-probabilities under the policy, with gradient. Shape (B, R), float32.
        ref_logprobs: Log-probabilities under the reference. Shape (B, R), float32.
        mask: True on real tokens. Shape (B, R), bool.
        estimator: "k1", "k2" or "k3" of ``rlhf_gym.kl``.
        level: "token" estimates each token's KL, "sequence" that of the whole response from the sums over its tokens.

    Returns:
        The estimates in nats: shape (B, R), 0 where ``mask`` is False, for `aggregate_loss` ("token"); or shape (B,),
        to be averaged over the rows ("sequence"). Not multiplied by kl_coef.

    Raises:
        ValueError: If the shapes differ, or the estimator or the level is unknown.

    Source:
        Tang & Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL"; Shao et al. 2024, eq. 4.

    Example:
        >>> logprobs, ref, mask = torch.tensor([[-1., -2.]]), torch.tensor([[-2., -3.]]), torch.tensor([[True, True]])
        >>> kl_in_loss(logprobs, ref, mask, estimator="k2", level="sequence")
        tensor([2.])
    """
    _check(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"The estimator of a KL term in the loss must be k1, k2 or k3, got {estimator!r}.")
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}.")
    logprobs, ref_logprobs = _real(logprobs, mask), _real(ref_logprobs, mask)
    if level == "sequence":
        logprobs, ref_logprobs = logprobs.sum(dim=1), ref_logprobs.sum(dim=1)
    return estimate_kl(logprobs, ref_logprobs, estimator)


def dpo_loss(log_ratios: Tensor, preferences: Tensor, *, kl_coef: float) -> Tensor:
    """The loss of pairs of responses to one prompt, one of which is preferred with a known probability (DPO).

    loss = -P log sigmoid(m) - (1 - P) log sigmoid(-m), m = kl_coef * (log ratio of the first - that of the second)

    It is smallest where sigmoid(m) = P, and for P = 0 or 1 at an infinite margin only. If P is sigmoid(r_1 - r_2) in all
    pairs, the policy whose margins are m = r_1 - r_2 is the optimal one for kl_coef.

    Args:
        log_ratios: log pi - log pi_ref of each whole response (the sum over its tokens), with gradient. Shape (P, 2),
            float32: the two of each pair.
        preferences: Probability that the first is preferred, in [0, 1]. Shape (P,), float32.
        kl_coef: Price of a nat, > 0.

    Returns:
        The loss of each pair. Shape (P,).

    Raises:
        ValueError: If the shapes do not fit.

    Source:
        Rafailov et al. 2023, eq. 7, with the label's expectation in its place.

    Example:
        >>> dpo_loss(torch.tensor([[2., 0.], [2., 0.]]), torch.tensor([1., 0.5]), kl_coef=0.5)
        tensor([0.3133, 0.8133])
    """
    if log_ratios.shape != (*preferences.shape, 2) or preferences.ndim != 1:
        raise ValueError(
            f"log_ratios must have shape (P, 2) and preferences (P,), got {tuple(log_ratios.shape)} and "
            f"{tuple(preferences.shape)}."
        )
    margins = kl_coef * (log_ratios[:, 0] - log_ratios[:, 1])
    return torch.nn.functional.binary_cross_entropy_with_logits(margins, preferences, reduction="none")
