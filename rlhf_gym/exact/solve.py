"""The exact optimum of a text-generation environment, by dynamic programming backwards over its graph.

The objective is J(pi) = E_pi[score] - kl_coef KL(pi || pi_ref), the KL over whole responses, gamma = 1. Then, with
beta = kl_coef,

    V(s) = beta log sum_a pi_ref(a|s) exp((r(s, a) + V(s')) / beta)
    pi*(a|s) = pi_ref(a|s) exp((r(s, a) + V(s') - V(s)) / beta)

and V of the empty response is the best objective there is, J*. (Ziegler et al. 2019; Rafailov et al. 2023, eq. 4.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_gym.rewards import Reward

from .graph import SCORE, Graph, is_product, product_graph, resolve_metrics
from .tree import MAX_PREFIXES, prefix_tree


@dataclass(frozen=True)
class Solution:
    """The optimum of an environment. Numbers are means over its prompts; arrays are per prompt, (num_prompts,) float64.

    Attributes:
        kl_coef: beta.
        objective: J*, the most that any policy can reach. `objectives` per prompt.
        reward: E[score] under the optimal policy. `rewards` per prompt.
        kl: Its KL to the reference in nats per response. `kls` per prompt.
        reference_objective: J of the reference: its mean score. `reference_objectives` per prompt.
        values: V of each node of `graph`, a list of (S,) float64 per layer.
        graph: The decision process.
    """

    kl_coef: float
    objectives: np.ndarray
    rewards: np.ndarray
    kls: np.ndarray
    reference_objectives: np.ndarray
    values: Sequence[np.ndarray] = field(repr=False)
    graph: Graph = field(repr=False)

    objective = property(lambda self: float(self.objectives.mean()))
    reward = property(lambda self: float(self.rewards.mean()))
    kl = property(lambda self: float(self.kls.mean()))
    reference_objective = property(lambda self: float(self.reference_objectives.mean()))

    def logprobs(self, t: int) -> np.ndarray:
        """log pi* in the nodes of layer t. Shape (S, V), float64."""
        layer = self.graph.layers[t]
        return layer.ref_logprobs + (self._returns(t) - self.values[t][:, None]) / self.kl_coef

    def _returns(self, t: int) -> np.ndarray:
        return with_future(self.graph, t, self.graph.layers[t].payoffs[SCORE], self.values)

    def expected(self, reward: Any) -> float:
        """Mean of another reward under the optimal policy: a metric of the environment by name, or any reward.

        Raises:
            ValueError: If the two rewards together are too much to enumerate.
        """
        process = self.graph.process
        spec = process.metrics[reward] if isinstance(reward, str) and reward in process.metrics else reward
        graph = task_graph(process, {"other": spec})
        return float(expectation(graph, "other", self.kl_coef)[graph.roots].mean())

    @functools.cached_property
    def policy(self) -> Any:
        """pi* as a language model to sample from, a `TabularForCausalLM`."""
        from .policies import optimal_policy

        return optimal_policy(self)


def solve(envs: Any, kl_coef: float, *, max_prefixes: int = MAX_PREFIXES) -> Solution:
    """The best that any policy can do in an environment.

    Args:
        envs: A text-generation environment, scalar or vector, wrapped or not. If its reference is a table
            (`ngram_from_table`, `ngram_from_corpus`) and its reward is made of automata, the graph of their states is
            solved, which may have a million of them; otherwise all prefixes that the reference can produce are.
        kl_coef: beta, > 0: the price of a nat of KL. The environment's own is not looked at.
        max_prefixes: The most prefixes to enumerate.

    Raises:
        ValueError: If the environment has no reference, is too large, or ``kl_coef`` is not > 0.

    Example:
        >>> round(solve(gym.make("rlhf_gym/WoAiNi-v0"), kl_coef=1.0).objective, 5)
        0.34528
    """
    return solve_graph(task_graph(envs, max_prefixes=max_prefixes), kl_coef)


def task_graph(envs: Any, metrics: Mapping[str, Any] | None = None, *, max_prefixes: int = MAX_PREFIXES) -> Graph:
    """The graph of an environment (or its process), by states where that is possible, else by prefixes.

    Args:
        envs: As in `solve`.
        metrics: Other rewards to keep account of, by name.
        max_prefixes: As in `solve`.
    """
    process = process_of(envs)
    rewards: dict[str, Reward] = resolve_metrics(process, metrics or {})
    if is_product(process, list(rewards.values())):
        return product_graph(process, rewards)
    return prefix_tree(process, rewards, max_prefixes=max_prefixes)


def process_of(envs: Any) -> Any:
    """The process behind an environment.

    Raises:
        TypeError: If it is not one of ours.
        ValueError: If it has no reference.
    """
    base = getattr(envs, "unwrapped", envs)
    process = getattr(base, "process", base)
    if not hasattr(process, "scorer"):
        raise TypeError(f"envs must be a text-generation environment of rlhf_gym, got {type(base).__name__}")
    if process.language_model is None:
        raise ValueError("the environment has no reference, so there is no KL to it; make it with model=")
    return process


def solve_graph(graph: Graph, kl_coef: float) -> Solution:
    """`solve` for a graph that is there already."""
    if not (np.isfinite(kl_coef) and kl_coef > 0):
        raise ValueError(f"kl_coef must be a finite number > 0, got {kl_coef}: at 0 the optimum is no distribution")
    beta, values = float(kl_coef), [np.zeros(len(layer)) for layer in graph.layers]
    for t, layer in backwards(graph):
        returns = with_future(graph, t, layer.payoffs[SCORE], values)
        values[t] = beta * logsumexp(layer.ref_logprobs + returns / beta)
    objectives = values[0][graph.roots]
    rewards = expectation(graph, SCORE, beta, values)[graph.roots]
    reference = reference_expectation(graph)[graph.roots]
    # J = E[r] - beta KL holds at the optimum too, but where the KL is 0 the difference is rounding.
    kls = np.maximum(0.0, (rewards - objectives) / beta)
    return Solution(beta, objectives, rewards, kls, reference, values, graph)


def expectation(graph: Graph, name: str, kl_coef: float, values: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """Mean payoff of this name under pi*, for the nodes of the first layer. Shape (S_0,), float64."""
    solution_values = solve_graph(graph, kl_coef).values if values is None else values
    means = [np.zeros(len(layer)) for layer in graph.layers]
    for t, layer in backwards(graph):
        returns = with_future(graph, t, layer.payoffs[SCORE], solution_values)
        policy = np.exp(layer.ref_logprobs + (returns - solution_values[t][:, None]) / kl_coef)
        means[t] = (policy * with_future(graph, t, layer.payoffs[name], means)).sum(1)
    return means[0]


def reference_expectation(graph: Graph, name: str = SCORE) -> np.ndarray:
    """Mean payoff of this name under the reference, for the nodes of the first layer. Shape (S_0,), float64."""
    means = [np.zeros(len(layer)) for layer in graph.layers]
    for t, layer in backwards(graph):
        means[t] = (np.exp(layer.ref_logprobs) * with_future(graph, t, layer.payoffs[name], means)).sum(1)
    return means[0]


def backwards(graph: Graph) -> Iterator[tuple[int, Any]]:
    """(t, layer) from the last layer to the first."""
    return ((t, graph.layers[t]) for t in reversed(range(len(graph.layers))))


def with_future(graph: Graph, t: int, payoff: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """Payoff of each token plus the value of the node it leads to. Shape (S, V), float64."""
    if t + 1 == len(graph.layers):
        return payoff
    # A place for -1, the end: there is nothing to come.
    return payoff + np.append(values[t + 1], 0.0)[graph.layers[t].children]


def logsumexp(x: np.ndarray) -> np.ndarray:
    """log sum exp over the last axis. No row is all -inf."""
    highest = x.max(-1, keepdims=True)
    return np.log(np.exp(x - highest).sum(-1)) + highest[..., 0]


@dataclass(frozen=True)
class Frontier:
    """The best trade-offs between reward and KL: no policy lies above. Arrays follow `kl_coef`, float64.

    Attributes:
        kl_coef: The prices of a nat.
        kl, reward, objective: Of the optimal policy at each price, means over the prompts.
        metrics: Means of the environment's metrics there (gold rewards, say).
    """

    kl_coef: np.ndarray
    kl: np.ndarray
    reward: np.ndarray
    objective: np.ndarray
    metrics: dict[str, np.ndarray]


def frontier(envs: Any, kl_coefs: Sequence[float], *, max_prefixes: int = MAX_PREFIXES) -> Frontier:
    """The optima at several prices of KL, with the environment's metrics under each.

    Its slope dE[score]/dKL is ``kl_coef``, and it is concave.

    Args:
        envs: As in `solve`.
        kl_coefs: Each > 0.
        max_prefixes: As in `solve`.
    """
    process = process_of(envs)
    graph = task_graph(process, process.metrics, max_prefixes=max_prefixes)
    solutions = [solve_graph(graph, kl_coef) for kl_coef in kl_coefs]
    metrics = {
        name: np.array([expectation(graph, name, s.kl_coef, s.values)[graph.roots].mean() for s in solutions])
        for name in process.metrics
    }
    columns = {name: np.array([getattr(s, name) for s in solutions]) for name in ("kl", "reward", "objective")}
    return Frontier(np.array(kl_coefs, dtype=float), **columns, metrics=metrics)
