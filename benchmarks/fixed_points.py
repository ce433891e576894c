"""Where an estimator of the policy gradient leads when nothing is left to chance: the zero of its exact expectation.

The task is so small that all its responses can be listed. Each is given to the agents' own loss functions as if it had
been sampled, weighted by its probability under the policy as it is now: that is the expected loss, and its gradient is
the expected gradient of an infinitely large batch. A policy with one row of logits per state follows it to where it
vanishes. Everything is float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from rlhf_gym.agents.functional import (
    LossMode,
    aggregate_loss,
    gae,
    group_advantages,
    kl_in_loss,
    policy_loss_clipped,
    reward_to_go,
)
from rlhf_gym.exact import Evaluation, Solution, evaluate, solve, tabular_policy
from rlhf_gym.kl import KLEstimator, estimate_kl

MAX_RESPONSES = 100_000


@dataclass(frozen=True)
class Estimator:
    """What an algorithm puts into its loss.

    Attributes:
        name: For people.
        kl_reward: Estimator of the KL penalty that is part of each token's reward; None: there is none.
        kl_loss: Estimator and level ("token" or "sequence") of the KL term of the loss; None: there is none.
        advantages: "reward_to_go"; "gae", with the policy's exact values as the critic; or "group", of whole responses.
        gamma, gae_lambda: Of the first two.
        group_size: Responses to the prompt that are compared. None: any number of them, which makes no difference to
            leave-one-out advantages.
        baseline, divide_by_std: Of `rlhf_gym.agents.functional.group_advantages`.
        dynamic_sampling: Groups of equal scores are left out of the batch.
        mode: Of `rlhf_gym.agents.functional.aggregate_loss`.
    """

    name: str
    kl_reward: KLEstimator | None = None
    kl_loss: tuple[KLEstimator, Literal["token", "sequence"]] | None = None
    advantages: Literal["reward_to_go", "gae", "group"] = "reward_to_go"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    group_size: int | None = None
    baseline: Literal["leave_one_out", "group_mean"] = "leave_one_out"
    divide_by_std: bool = False
    dynamic_sampling: bool = False
    mode: LossMode = "sequence_sum"


@dataclass(frozen=True)
class Table:
    """An environment and its states, each of which is a row of a table.

    Attributes:
        envs: The environment.
        solution: Its optimum at the KL coefficient in question.
        reference: log pi_ref of the V tokens in each of the S states (nodes of the solution's graph, layer by layer).
            (S, V) float64.
    """

    envs: Any
    solution: Solution
    reference: Tensor = field(repr=False)


@dataclass(frozen=True)
class Task(Table):
    """An environment with one prompt and all its N responses, of at most R tokens.

    Attributes:
        envs, solution, reference: Of a `Table`.
        states: State in which each token is chosen, 0 after the end. (N, R) int64.
        tokens: The tokens, 0 after the end. (N, R) int64.
        mask: True on real tokens. (N, R) bool.
        payoffs: What each token pays, without any KL. (N, R) float64.
    """

    states: Tensor = field(repr=False)
    tokens: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    payoffs: Tensor = field(repr=False)


def make_task(envs: Any, kl_coef: float) -> Task:
    """List all responses that the reference can produce.

    Args:
        envs: A text-generation environment with a reference, as in `rlhf_gym.exact.solve`.
        kl_coef: beta, > 0.

    Raises:
        ValueError: If the environment has more than one prompt or too many responses.
    """
    solution = solve(envs, kl_coef)
    graph = solution.graph
    if len(graph.roots) != 1:
        raise ValueError(f"the environment must have one prompt, got {len(graph.roots)}; pass prompts=[...] with one")
    if graph.num_prefixes() > MAX_RESPONSES:
        raise ValueError(
            f"the environment must have at most {MAX_RESPONSES:,} prefixes, got {graph.num_prefixes():,.0f}; lower "
            "max_response_tokens"
        )
    first_state = np.cumsum([0, *map(len, graph.layers)])
    responses: list[list[tuple]] = []
    unfinished: list[tuple[list[tuple], int]] = [([], int(graph.roots[0]))]
    while unfinished:
        steps, node = unfinished.pop()
        layer, state = graph.layers[len(steps)], int(first_state[len(steps)]) + node
        for token in np.flatnonzero(layer.ref_logprobs[node] > -np.inf).tolist():
            path = [*steps, (state, token, layer.payoffs["score"][node, token])]
            child = int(layer.children[node, token])
            if child < 0:
                responses.append(path)
            else:
                unfinished.append((path, child))
    longest = max(map(len, responses))
    padded = np.array([path + [(0, 0, 0.0)] * (longest - len(path)) for path in responses])
    return Task(
        envs=envs,
        solution=solution,
        reference=torch.from_numpy(np.concatenate([layer.ref_logprobs for layer in graph.layers])),
        states=torch.from_numpy(padded[..., 0]).long(),
        tokens=torch.from_numpy(padded[..., 1]).long(),
        mask=torch.tensor([[t < len(path) for t in range(longest)] for path in responses]),
        payoffs=torch.from_numpy(padded[..., 2]),
    )


def expected_gradient(task: Task, residual: Tensor, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Gradient of an estimator's loss, in expectation over responses of the policy.

    Args:
        task: From `make_task`.
        residual: The policy's parameters: its logits are log pi_ref plus these. (S, V) float64.
        estimator: What the loss is made of.

    Returns:
        The gradient, and the probability of each action (state and token) under the policy. Both (S, V) float64.

    Raises:
        ValueError: If the estimator's setting has no exact expectation here.
    """
    kl_coef, mask = task.solution.kl_coef, task.mask
    parameters = residual.detach().requires_grad_()
    all_logprobs = (task.reference + parameters).log_softmax(-1)
    logprobs = torch.where(mask, all_logprobs[task.states, task.tokens], 0.0)
    ref_logprobs = torch.where(mask, task.reference[task.states, task.tokens], 0.0)
    old_logprobs = logprobs.detach()  # nothing has been learnt from these samples yet: ratio 1
    probability = old_logprobs.sum(1).exp()
    # Responses that reach the loss. In groups that are left out advantages are 0 and only the KL goes missing.
    kept = probability * _chance_of_contrast(task, probability, estimator)
    # What a large batch is divided by, per response that was generated.
    normaliser = {"token_mean": kept @ mask.sum(1).double(), "constant": kept.sum() * mask.shape[1]}.get(
        estimator.mode, kept.sum()
    )

    def expectation(per_token: Tensor, weights: Tensor) -> Tensor:
        return aggregate_loss(per_token * weights[:, None], mask, estimator.mode, normaliser=normaliser)

    rewards = task.payoffs
    if estimator.kl_reward == "exact":
        rewards = rewards - kl_coef * _exact_kl(task, all_logprobs.detach())
    elif estimator.kl_reward:
        rewards = rewards - kl_coef * estimate_kl(old_logprobs, ref_logprobs, estimator.kl_reward)
    advantages = _advantages(task, rewards, probability, estimator)
    loss = expectation(policy_loss_clipped(logprobs, old_logprobs, advantages, mask)[0], probability)
    if estimator.kl_loss == ("exact", "token"):
        loss = loss + kl_coef * expectation(_exact_kl(task, all_logprobs), kept)
    elif estimator.kl_loss:
        kind, level = estimator.kl_loss
        penalty = kl_in_loss(logprobs, ref_logprobs, mask, estimator=kind, level=level)
        loss = loss + kl_coef * (
            expectation(penalty, kept) if level == "token" else (kept * penalty).sum() / kept.sum()
        )

    actions = torch.zeros_like(task.reference)
    weights = probability[:, None].expand_as(mask)[mask]
    actions.index_put_((task.states[mask], task.tokens[mask]), weights, accumulate=True)
    return torch.autograd.grad(loss, parameters)[0], actions


def _exact_kl(task: Task, all_logprobs: Tensor) -> Tensor:
    """KL to the reference in the state of each token, summed over the vocabulary. (N, R)."""
    return torch.where(task.mask, estimate_kl(all_logprobs, task.reference, "exact")[task.states], 0.0)


def _advantages(task: Task, rewards: Tensor, probability: Tensor, estimator: Estimator) -> Tensor:
    """Advantage of each token, in expectation over what else is in the batch. (N, R)."""
    if estimator.advantages == "group":
        return _group_advantages(rewards.sum(1), probability, estimator)[:, None].expand_as(rewards)
    returns = reward_to_go(rewards, task.mask, gamma=estimator.gamma)
    if estimator.advantages == "reward_to_go":
        return returns
    mask, states = task.mask, task.states
    visits, totals = torch.zeros(2, len(task.reference), dtype=torch.float64)
    visits.index_put_((states[mask],), probability[:, None].expand_as(mask)[mask], accumulate=True)
    totals.index_put_((states[mask],), (probability[:, None] * returns)[mask], accumulate=True)
    values = torch.where(visits > 0, totals / visits.clamp(min=torch.finfo(torch.float64).tiny), 0.0)[states]
    return gae(rewards, values, mask, gamma=estimator.gamma, gae_lambda=estimator.gae_lambda)


def _group_advantages(scores: Tensor, probability: Tensor, estimator: Estimator) -> Tensor:
    """Advantage of each response, in expectation over the others in its group. (N,)."""
    size = estimator.group_size
    if size is None and (estimator.baseline != "leave_one_out" or estimator.divide_by_std):
        raise ValueError("group_size=None is exact for the plain leave-one-out baseline only; give a group_size")
    if not estimator.divide_by_std:  # linear in the others' scores: their mean may stand for each
        others = (probability @ scores).expand(len(scores), (size or 2) - 1)
        groups = torch.cat([scores[:, None], others], 1)
        return group_advantages(groups.flatten(), size or 2, baseline=estimator.baseline).reshape(groups.shape)[:, 0]
    right = _is_right(scores)
    of_wrong, of_right = _binary_group_advantages(size, estimator.baseline, estimator.divide_by_std)
    # How many of the others are right.
    chances = torch.from_numpy(binom.pmf(np.arange(size), size - 1, min(1.0, float(probability @ scores))))
    return torch.where(right, chances @ of_right, chances @ of_wrong)


def _chance_of_contrast(task: Task, probability: Tensor, estimator: Estimator) -> Tensor:
    """Probability that a response's group reaches the loss. (N,), or 1 for all."""
    if not estimator.dynamic_sampling:
        return torch.ones_like(probability)
    scores = task.payoffs.sum(1)
    share = probability @ scores
    if estimator.kl_reward or estimator.group_size is None:
        raise ValueError("dynamic_sampling needs a group_size, and scores without KL that can be equal")
    return 1 - torch.where(_is_right(scores), share, 1 - share) ** (estimator.group_size - 1)


def _is_right(scores: Tensor) -> Tensor:
    """Whether each score is 1 and not 0. (N,) bool."""
    right = scores == 1
    if not (right | (scores == 0)).all():
        raise ValueError("such groups need scores that are 0 or 1 (no KL in the reward): they are then told by counts")
    return right


@functools.cache
def _binary_group_advantages(size: int, baseline: Any, divide_by_std: bool) -> tuple[Tensor, Tensor]:
    """Advantage of a wrong and of a right response when k of the other ``size - 1`` are right, k = 0, 1, ... (size,)."""
    groups = (torch.arange(size) < torch.arange(size + 1)[:, None]).double()  # row k: k are right, and stand first
    advantages = group_advantages(groups.flatten(), size, baseline=baseline, divide_by_std=divide_by_std)
    advantages = advantages.reshape(size + 1, size)
    return advantages[:-1, -1], advantages[1:, 0]


@dataclass(frozen=True)
class FixedPoint:
    """Where an estimator leads from the reference.

    Attributes:
        residual: The policy, see `expected_gradient`. (S, V) float64.
        gradient_norm: Of the expected gradient there.
        iterations: How many it took.
        converged: Whether the gradient has vanished. If not, the policy was still on its way, maybe to infinity.
    """

    residual: Tensor = field(repr=False)
    gradient_norm: float
    iterations: int
    converged: bool


def fixed_point(
    task: Task,
    estimator: Estimator,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 3000,
) -> FixedPoint:
    """Where an estimator leads from a policy.

    Args:
        task: From `make_task`.
        estimator: What to follow.
        start: Where to begin. None: at the reference, all 0. (S, V) float64.
        tolerance, max_iterations: Of `follow`.
    """
    return follow(
        lambda residual: expected_gradient(task, residual, estimator),
        torch.zeros_like(task.reference) if start is None else start,
        step=1 / max(1.0, task.solution.kl_coef),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def follow(
    gradient_at: Callable[[Tensor], tuple[Tensor, Tensor]],
    residual: Tensor,
    *,
    step: float = 1.0,
    tolerance: float = 1e-10,
    max_iterations: int = 3000,
) -> FixedPoint:
    """Follow the expected natural gradient until the gradient vanishes.

    The natural gradient of a table is the gradient divided by the probability of each action (the Fisher matrix of a
    state's row is that of a softmax, times the probability of the state), so that states that are hardly ever visited
    are learnt as fast as others. With the KL in the reward, steps of 1 / kl_coef would be soft policy iteration.

    Args:
        gradient_at: Gradient and probability of each action at a policy, see `expected_gradient`.
        residual: Where to begin. (S, V) float64.
        step: Length of the first steps.
        tolerance: Norm of the gradient at which to stop.
        max_iterations: Where to stop at the latest: there may be no fixed point.
    """
    lowest, since_lowest = float("inf"), 0
    for iteration in range(max_iterations + 1):
        gradient, actions = gradient_at(residual)
        norm = float(gradient.norm())
        if norm < tolerance or iteration == max_iterations:
            break
        # An estimator that is steep near its fixed point makes the policy go round it: shorter steps then.
        lowest, since_lowest = (norm, 0) if norm < lowest else (lowest, since_lowest + 1)
        if since_lowest == 50:
            step, since_lowest = step / 2, 0
        natural = torch.where(actions > 0, gradient / actions.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        residual = residual - step * natural.clamp(-1, 1)  # a token that has become rare may be pulled back with force
    return FixedPoint(residual, norm, iteration, converged=norm < tolerance)


def measure(task: Table, residual: Tensor) -> Evaluation:
    """How far that policy is from the optimum, by the same `rlhf_gym.exact.evaluate` as any agent."""
    policy = tabular_policy(task.envs)
    # The states of the graph are the table's first rows.
    policy.lm_head.residual.data[: len(residual)] = residual.float()
    return evaluate(policy, task.envs, task.solution.kl_coef)


def unregularised_regrets(task: Task) -> tuple[float, float]:
    """Lowest and highest regret of the policies that earn the most and do not care about the KL.

    Among all distributions over the best responses the reference's own, renormalised, is nearest to it, and that which
    always takes the least likely one is farthest.
    """
    scores = task.payoffs.sum(1)
    best = scores > scores.max() - 1e-9
    ref_logprobs = torch.where(task.mask, task.reference[task.states, task.tokens], 0.0).sum(1)[best]
    most_kl, least_kl = -float(ref_logprobs.min()), -float(ref_logprobs.logsumexp(0))
    lost = task.solution.objective - float(scores.max())
    return lost + task.solution.kl_coef * least_kl, lost + task.solution.kl_coef * most_kl
