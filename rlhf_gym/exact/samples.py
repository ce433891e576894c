"""What can be said from samples alone, on tasks of any size; and best-of-N, for which samples are enough in theory.

All of it rests on one fact: every trade-off between reward and KL depends on the distribution of the score under the
reference, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .graph import SCORE, Graph
from .solve import MAX_PREFIXES, task_graph

# (node, sum so far) pairs per layer. Scores on a grid stay far below it.
_MAX_CLASSES = 5_000_000


@dataclass(frozen=True)
class BestOfN:
    """Best-of-N sampling from the reference, exactly. Arrays follow `n`, means over the prompts, float64.

    Attributes:
        n: Numbers of samples.
        reward: Mean score of the best of them.
        kl: KL of its distribution to the reference, in nats.
    """

    n: np.ndarray
    reward: np.ndarray
    kl: np.ndarray


def best_of_n(envs: Any, ns: Sequence[int], *, max_prefixes: int = MAX_PREFIXES) -> BestOfN:
    """Mean score and KL of the policy that samples N responses and keeps the best (the first, among equals).

    The usual KL, log N - (N - 1) / N, is an upper bound that holds with equality only where no two responses have the
    same score. For a score that is 0 or 1 the policy lies exactly on the frontier.

    Args:
        envs: As in `rlhf_gym.exact.solve`.
        ns: Numbers of samples, each >= 1.
        max_prefixes: As there.

    Source:
        Beirami et al. 2024, arXiv:2401.01879 (the bound); with ties the KL is sum_l q_l log(q_l / p_l), where p_l is
        the probability of the score l and q_l = F_l^N - F_{l-1}^N.
    """
    if not len(ns) or min(ns) < 1:
        raise ValueError(f"ns must be one or more numbers of samples >= 1, got {list(ns)}")
    graph = task_graph(envs, max_prefixes=max_prefixes)
    rewards, kls = np.zeros(len(ns)), np.zeros(len(ns))
    for root in graph.roots:
        scores, probs = score_distribution(graph, int(root))
        for i, n in enumerate(ns):
            reward, kl = best_of_n_of(scores, probs, n)
            rewards[i] += reward / len(graph.roots)
            kls[i] += kl / len(graph.roots)
    return BestOfN(np.array(ns), rewards, kls)


def best_of_n_of(scores: np.ndarray, probs: np.ndarray, n: int) -> tuple[float, float]:
    """Mean and KL of best-of-n of a distribution.

    Args:
        scores: Distinct scores, ascending. Shape (k,), float64.
        probs: Their probabilities, > 0. Shape (k,), float64.
        n: Number of samples.
    """
    best = best_of_n_probs(probs, n)
    real = best > 0
    log_ratio = np.log(probs[real] / best[real])
    # k3 of each score: as both sum to 1 it comes to the KL, and no term is negative, whatever was rounded.
    kl = (best[real] * (np.expm1(log_ratio) - log_ratio)).sum() + probs[~real].sum()
    return float((best * scores).sum()), float(kl)


def best_of_n_probs(probs: np.ndarray, n: int) -> np.ndarray:
    """Probability of each score in best-of-n, F_l^n - F_{l-1}^n; arguments as in `best_of_n_of`. Shape (k,), float64."""
    # 1 - F from the top, since F^n - F'^n of two numbers next to 1 would lose all digits.
    above = np.append(np.cumsum(probs[::-1])[::-1], 0.0)  # P(score >= l), and 0
    powers = np.expm1(n * np.log1p(-np.minimum(above, 1.0), where=above < 1, out=np.full(len(above), -np.inf)))
    return np.diff(powers)


def score_distribution(graph: Graph, root: int) -> tuple[np.ndarray, np.ndarray]:
    """The distribution of the score under the reference, for a node of the first layer.

    Returns:
        The scores, ascending, and their probabilities, > 0; both (k,), float64.

    Raises:
        ValueError: If there are too many different sums of token rewards.
    """
    return score_classes(graph, root, ())[:2]


def score_classes(
    graph: Graph, root: int, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """`score_distribution`, and the mean of other payoffs of the graph (metrics) among the responses of each score."""
    node: np.ndarray = np.array([root])
    so_far: np.ndarray = np.zeros(1)
    prob: np.ndarray = np.ones(1)
    others: dict[str, Any] = {name: np.zeros(1) for name in names}  # sums so far, times the probability
    scores, probs = [], []
    ended: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for layer in graph.layers:
        factors = np.exp(layer.ref_logprobs[node])
        token_probs = prob[:, None] * factors
        others = {
            name: value[:, None] * factors + token_probs * layer.payoffs[name][node] for name, value in others.items()
        }
        sums = np.round(so_far[:, None] + layer.payoffs[SCORE][node], 9)
        child = layer.children[node]
        ends, goes = (child < 0) & (token_probs > 0), (child >= 0) & (token_probs > 0)
        scores.append(sums[ends])
        probs.append(token_probs[ends])
        for name, values in others.items():
            ended[name].append(values[ends])
        if goes.sum() > _MAX_CLASSES:
            raise ValueError(
                f"the score takes too many values on the way ({goes.sum():,} pairs of state and sum); round the "
                "scores of words to a grid, to tenths for instance"
            )
        sums, sum_index = np.unique(sums[goes], return_inverse=True)
        keys, index = np.unique(child[goes].astype(np.int64) * max(1, len(sums)) + sum_index, return_inverse=True)
        node, so_far = keys // max(1, len(sums)), sums[keys % max(1, len(sums))] if len(sums) else sums
        prob = np.bincount(index, token_probs[goes], minlength=len(keys))
        others = {name: np.bincount(index, values[goes], minlength=len(keys)) for name, values in others.items()}
    distinct, index = np.unique(np.concatenate(scores), return_inverse=True)
    total = np.bincount(index, np.concatenate(probs), minlength=len(distinct))
    means = {name: np.bincount(index, np.concatenate(parts)) / total for name, parts in ended.items()}
    return distinct, total, means


@dataclass(frozen=True)
class Certificate:
    """How far from constant S = score - kl_coef (log pi - log pi_ref) is. It is constant only at the optimum.

    Attributes:
        variance: Of S within prompts, an unbiased estimate.
        low, high: Its 95 % confidence interval.
        objective: Mean of S: the policy's objective J.
        regret_estimate: variance / (2 kl_coef), which J* - J comes to as the policy comes near the optimum. Far from it
            it may be off either way.
        num_samples: M.
    """

    variance: float
    low: float
    high: float
    objective: float
    regret_estimate: float
    num_samples: int


def certificate(
    scores: Any, logprobs: Any, ref_logprobs: Any, *, kl_coef: float, prompt_index: Any | None = None
) -> Certificate:
    """Tests a policy for optimality by its own samples, with no knowledge of the optimum.

    Args:
        scores: Score of M responses sampled from the policy. Shape (M,).
        logprobs: log pi of each whole response (the sum over its tokens), in nats. Shape (M,).
        ref_logprobs: The same under the reference. Shape (M,).
        kl_coef: beta, > 0.
        prompt_index: The prompt of each response, (M,); the optimum is constant for each prompt. None: all have one.

    Raises:
        ValueError: If shapes differ, a value is not finite, or no prompt has two responses.

    Source:
        The variance is the VarGrad loss (Richter et al. 2020, arXiv:2010.10436).
    """
    scores, logprobs, ref_logprobs = (np.asarray(x, dtype=np.float64) for x in (scores, logprobs, ref_logprobs))
    index = np.zeros(len(scores), dtype=int) if prompt_index is None else np.asarray(prompt_index)
    if not scores.shape == logprobs.shape == ref_logprobs.shape == index.shape or scores.ndim != 1:
        raise ValueError(
            "scores, logprobs, ref_logprobs (sums over each response) and prompt_index must have one shape (M,), got "
            f"{scores.shape}, {logprobs.shape}, {ref_logprobs.shape} and {index.shape}"
        )
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be > 0, got {kl_coef}")
    s = scores - kl_coef * (logprobs - ref_logprobs)
    if not np.isfinite(s).all():
        raise ValueError(f"scores and log-probs must be finite, got {s[~np.isfinite(s)][0]} in S")
    _, group, count = np.unique(index, return_inverse=True, return_counts=True)
    centred = s - (np.bincount(group, s) / count)[group]
    several = count[group] > 1
    if not several.any():
        raise ValueError("no prompt has two responses: the variance within a prompt cannot be estimated")
    # Squares that are each an unbiased estimate of their prompt's variance; their mean has a standard error as usual.
    squares = (centred**2 * count[group] / np.maximum(1, count[group] - 1))[several]
    variance = float(squares.mean())
    margin = 1.96 * float(squares.std()) / np.sqrt(len(squares))
    return Certificate(
        variance, max(0.0, variance - margin), variance + margin, float(s.mean()), variance / (2 * kl_coef), len(s)
    )


@dataclass(frozen=True)
class PluginObjective:
    """J* estimated from samples of the reference.

    Attributes:
        objective: beta log mean exp(score / beta), the mean over prompts. Biased low.
        effective_samples: (sum w)^2 / sum w^2 of w = exp(score / beta); the least over the prompts.
        reliable: Whether that is at least 100. Below, do not publish the number.
    """

    objective: float
    effective_samples: float
    reliable: bool


def plugin_objective(scores: Any, *, kl_coef: float, prompt_index: Any | None = None) -> PluginObjective:
    """Estimates the best objective from scores of the reference's own responses, where nothing can be enumerated.

    Args:
        scores: Of M responses sampled from the reference. Shape (M,).
        kl_coef: beta, > 0.
        prompt_index: The prompt of each, (M,). None: all have one.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite and of shape (M,), M >= 1, got shape {scores.shape}")
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be > 0, got {kl_coef}")
    index = np.zeros(len(scores), dtype=int) if prompt_index is None else np.asarray(prompt_index)
    objectives, sizes = [], []
    for prompt in np.unique(index):
        scaled = scores[index == prompt] / kl_coef
        weights = np.exp(scaled - scaled.max())
        objectives.append(kl_coef * (scaled.max() + np.log(weights.mean())))
        sizes.append(weights.sum() ** 2 / (weights**2).sum())
    return PluginObjective(float(np.mean(objectives)), float(min(sizes)), min(sizes) >= 100)
