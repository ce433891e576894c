"""GRPO's expected gradient on tasks with too many responses to list: by states, as in backward induction.

A response's advantage depends on its score alone, once the scores that the others of its group may have are averaged
over. So a state is split by what has been paid on the way to it, and a dynamic program does the rest. With A the
advantage of a whole response, |y| its length, c the slope of the penalty in log pi (k3: 1 - pi_ref / pi) and P the
probability of coming to state s and choosing token a, the expected gradient of the loss on the logits of s is

    q(s, b) - pi(b|s) sum_a q(s, a),        q(s, a) = P(s, a) E[(-A + kl_coef c(s, a)) / |y| given s, a]

Both expectations, of A / |y| and of 1 / |y|, go backwards from the ends. A and c are those of the agent's own functions.
Everything is float64. `rlhf_gym.benchmarks.fixed_points` lists responses instead, and knows other estimators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import qmc
from torch import Tensor

from rlhf_gym.agents.functional import group_advantages, kl_in_loss
from rlhf_gym.agents.grpo import GRPOConfig
from rlhf_gym.exact import Solution, solve
from rlhf_gym.exact.graph import SCORE

from .fixed_points import Table

# As many different groups of others are averaged over one by one; of more, 2^LOG2_POINTS are drawn.
MAX_GROUPS = 5_000
LOG2_POINTS = 12


@dataclass(frozen=True)
class Layer:
    """The nodes after t tokens, n of them: a state of the task with what has been paid so far.

    Attributes:
        rows: The state of each node, as a row of the table. (n,) int64.
        children: Place in the next layer of the node that a token leads to, -1 where the response ends with it or it
            is impossible. (n, V) int64.
        outcomes: Place of the response's score among all that there are, -1 where it does not end. (n, V) int64.
    """

    rows: np.ndarray
    children: np.ndarray
    outcomes: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """All that can follow one prompt.

    Attributes:
        layers: The nodes.
        scores: What a response can score, K different numbers. (K,) float64.
        advantages: Maps the policy's probability of each score, (K,), to the mean advantage of a response with that
            score, (K,).
        is_exact: Whether that mean is over all groups, and not over some.
    """

    layers: Sequence[Layer]
    scores: np.ndarray
    advantages: Callable[[np.ndarray], np.ndarray]
    is_exact: bool


@dataclass(frozen=True)
class States(Table):
    """A task by its states.

    Attributes:
        prompts: What follows each prompt.
        config: GRPO's settings.
    """

    prompts: Sequence[Prompt] = field(repr=False)
    config: GRPOConfig


def make_states(envs: Any, kl_coef: float, config: GRPOConfig) -> States:
    """The states of an environment.

    Args:
        envs: A text-generation environment with a reference, as in `rlhf_gym.exact.solve`.
        kl_coef: beta, > 0.
        config: GRPO's settings.

    Raises:
        ValueError: If these are not GRPO as published, with one step per rollout (then nothing is ever clipped).
    """
    published = {"loss_mode": "sequence_mean", "kl_placement": "loss", "num_epochs": 1, "num_minibatches": 1}
    wrong = [f"{name}={getattr(config, name)!r}" for name, value in published.items() if getattr(config, name) != value]
    if wrong or config.dynamic_sampling:
        raise ValueError(
            f"config must be GRPO as published, in one step per rollout, got {wrong or 'dynamic_sampling=True'}; "
            "list the responses of a small task instead (fixed_points)"
        )
    solution = solve(envs, kl_coef)
    reference = np.concatenate([layer.ref_logprobs for layer in solution.graph.layers])
    prompts = []
    for root in solution.graph.roots.tolist():
        layers, scores = _unfold(solution, root)
        advantages, is_exact = _advantages_of(scores, config)
        prompts.append(Prompt(layers, scores, advantages, is_exact))
    return States(envs, solution, torch.from_numpy(reference), prompts, config)


def _unfold(solution: Solution, root: int) -> tuple[list[Layer], np.ndarray]:
    """The layers below a root, and all final scores in ascending order."""
    graph, unnamed, first_row = solution.graph, [], 0
    nodes, paid = np.array([root]), np.zeros(1)
    for layer in graph.layers:
        # Rounded, so that equal sums of floats are equal.
        totals = np.round(paid[:, None] + layer.payoffs[SCORE][nodes], 6)
        possible, following = layer.ref_logprobs[nodes] > -np.inf, layer.children[nodes]
        goes, ends = possible & (following >= 0), possible & (following < 0)
        pairs, place = np.unique(np.stack([following[goes], totals[goes]], 1), axis=0, return_inverse=True)
        children = np.full(following.shape, -1, dtype=np.int64)
        children[goes] = place.ravel()
        unnamed.append((first_row + nodes, children, np.where(ends, totals, np.nan)))
        first_row += len(layer)
        nodes, paid = pairs[:, 0].astype(np.int64), pairs[:, 1]
    scores = np.unique(np.concatenate([totals[~np.isnan(totals)] for *_, totals in unnamed]))
    layers = [
        Layer(rows, children, np.where(np.isnan(totals), -1, np.searchsorted(scores, totals)))
        for rows, children, totals in unnamed
    ]
    return layers, scores


def _advantages_of(scores: np.ndarray, config: GRPOConfig) -> tuple[Callable[[np.ndarray], np.ndarray], bool]:
    """`Prompt.advantages`, and whether it is exact."""
    num_others, own = config.group_size - 1, torch.from_numpy(scores)

    def advantages(others: np.ndarray) -> np.ndarray:
        """Of a response with each score, (K,), beside groups of others, (M, n - 1): (K, M)."""
        shape = (len(own), *others.shape)
        groups = torch.cat([own[:, None, None].expand(*shape[:2], 1), torch.from_numpy(others).expand(shape)], 2)
        found = group_advantages(
            groups.flatten(), config.group_size, baseline="group_mean", divide_by_std=config.divide_by_std
        )
        return found.reshape(groups.shape)[..., 0].numpy()

    if math.comb(len(scores) + num_others - 1, num_others) <= MAX_GROUPS:
        groups = np.array(list(combinations_with_replacement(range(len(scores)), num_others)))
        counts = (groups[:, :, None] == np.arange(len(scores))).sum(1)
        orders = np.exp(gammaln(num_others + 1) - gammaln(counts + 1).sum(1))  # in which a group can be drawn
        of_all = advantages(scores[groups])
        return lambda chances: of_all @ (orders * chances[groups].prod(1)), True
    # Evenly spread points instead of random ones, and the same ones each time: the result is a function of the policy.
    points = qmc.Sobol(num_others, scramble=False).random_base2(LOG2_POINTS) + 0.5**LOG2_POINTS / 2

    def of_some(chances: np.ndarray) -> np.ndarray:
        drawn = np.searchsorted(np.cumsum(chances), points).clip(max=len(scores) - 1)
        return advantages(scores[drawn]).mean(1)

    return of_some, False


def expected_gradient(task: States, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of GRPO's loss, in expectation over the policy's groups of responses, the same number to each prompt.

    Args:
        task: From `make_states`.
        residual: The policy's parameters: its logits are log pi_ref plus these. (S, V) float64.

    Returns:
        The gradient, and the probability of each action (state and token) under the policy. Both (S, V) float64.
    """
    logprobs = (task.reference + residual).log_softmax(-1)
    policy, slopes = logprobs.exp().numpy(), _slopes(task, logprobs)
    pull, actions = np.zeros((2, *policy.shape))
    for prompt in task.prompts:
        arrivals, chances = _forward(prompt, policy)
        advantages = prompt.advantages(chances)
        of_advantage = of_length = np.zeros(0)  # E[A / |y|] and E[1 / |y|] in the nodes of the next layer
        for t in reversed(range(len(prompt.layers))):
            layer = prompt.layers[t]
            ends, goes = layer.outcomes >= 0, layer.children >= 0
            share = np.where(ends, 1 / (t + 1), 0.0)
            pushed = share * advantages[layer.outcomes]
            share[goes], pushed[goes] = of_length[layer.children[goes]], of_advantage[layer.children[goes]]
            chosen = policy[layer.rows]
            visits = arrivals[t][:, None] * chosen
            np.add.at(pull, layer.rows, visits * (task.solution.kl_coef * slopes[layer.rows] * share - pushed))
            np.add.at(actions, layer.rows, visits)
            of_advantage, of_length = (chosen * pushed).sum(1), (chosen * share).sum(1)
    gradient = (pull - policy * pull.sum(1, keepdims=True)) / len(task.prompts)
    return torch.from_numpy(gradient), torch.from_numpy(actions / len(task.prompts))


def _slopes(task: States, logprobs: Tensor) -> np.ndarray:
    """Derivative of the penalty by each token's log pi. (S, V) float64."""
    of = logprobs.detach().requires_grad_()
    penalty = kl_in_loss(
        of, task.reference, task.reference > -torch.inf, estimator=task.config.kl_estimator, level="token"
    )
    return torch.autograd.grad(penalty.sum(), of)[0].numpy()


def _forward(prompt: Prompt, policy: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Probability of coming to each node, layer by layer, and of each score."""
    chances = np.zeros(len(prompt.scores))
    arrivals: list[np.ndarray] = [np.ones(1)]
    for layer in prompt.layers:
        visits = arrivals[-1][:, None] * policy[layer.rows]
        ends, goes = layer.outcomes >= 0, layer.children >= 0
        np.add.at(chances, layer.outcomes[ends], visits[ends])
        arrivals.append(np.bincount(layer.children[goes], visits[goes]))
    return arrivals, chances
