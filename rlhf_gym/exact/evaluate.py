"""How good a policy is, measured against the best possible one.

The regret of any policy is J* - J(pi) = kl_coef KL(pi || pi*), a sum over the states it visits of KL(pi(.|s) ||
pi*(.|s)). So a walk through the states, weighted by how likely the policy is to be there, gives everything; and where
there are too many to walk through, samples of it with the exact sum over the vocabulary in each state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.lm import generate, join_responses, make_engine, response_logits
from rlhf_gym.lm.engine import inference

from .graph import SCORE, Graph, filtered_logprobs, is_product, resolve_metrics
from .samples import best_of_n_of, best_of_n_probs, score_classes
from .solve import Solution, process_of, solve_graph, task_graph
from .table import TableForCausalLM
from .tree import MAX_PREFIXES, join, next_logits


@dataclass(frozen=True)
class Evaluation:
    """A policy beside the optimum. Numbers are means over the prompts; arrays are per prompt, (num_prompts,) float64.

    Attributes:
        objective: J = reward - kl_coef * kl. `objectives` per prompt.
        reward: Mean score; where it is sampled, J + kl_coef * KL, which may be above what is possible by its noise.
            `rewards` per prompt.
        kl: KL to the reference in nats per response. `kls` per prompt.
        regret: J* - J, >= 0. `regrets` per prompt.
        normalised: (J - J_ref) / (J* - J_ref): 1 is optimal, 0 the reference, below 0 worse than not training.
        metrics: Means of the environment's metrics, where they can be computed.
        state_kl: KL(pi || pi*) in each node of the solution's graph that the policy visits, NaN in others; a list of
            (S,) float64 per layer. Where several histories lead to a node, their mean. Empty for best-of-N, which
            chooses whole responses.
        occupancy: Probability of visiting each node, the mean over prompts. Like `state_kl`.
        exact: Whether no sampling was involved.
        standard_error: Of `regret`, 0 when exact.
        solution: The optimum that it was measured against.
    """

    objectives: np.ndarray
    rewards: np.ndarray
    kls: np.ndarray
    metrics: dict[str, float]
    state_kl: list[np.ndarray] = field(repr=False)
    occupancy: list[np.ndarray] = field(repr=False)
    exact: bool
    standard_error: float
    solution: Solution = field(repr=False)

    objective = property(lambda self: float(self.objectives.mean()))
    reward = property(lambda self: float(self.rewards.mean()))
    kl = property(lambda self: float(self.kls.mean()))
    regrets = property(lambda self: self.solution.objectives - self.objectives)
    regret = property(lambda self: float(self.regrets.mean()))

    @property
    def normalised(self) -> float:
        """See the class. NaN where the reference is optimal already."""
        room = self.solution.objective - self.solution.reference_objective
        return (self.objective - self.solution.reference_objective) / room if room > 1e-12 else np.nan


def evaluate(
    policy: Any,
    envs: Any,
    kl_coef: float | None = None,
    *,
    max_prefixes: int = MAX_PREFIXES,
    num_samples: int = 4096,
    seed: int = 0,
) -> Evaluation:
    """Objective, reward, KL and regret of a policy.

    A table (`TabularForCausalLM`, an n-gram model) is walked through by states. Any other model is run on all prefixes
    that the reference can produce, where they are not too many; otherwise on samples of its own, with exact sums over
    the vocabulary. The environment's temperature and filters apply.

    Args:
        policy: A causal language model, an agent (its ``policy_model`` is taken), or None for the reference. An agent
            with ``num_candidates`` N > 1 samples so many responses of its model and keeps the best: then the model must
            be the reference, and the numbers are exact on any task.
        envs: As in `rlhf_gym.exact.solve`.
        kl_coef: beta, > 0; None is the environment's own.
        max_prefixes: The most prefixes to run the policy on.
        num_samples: Responses to sample where there are more, spread evenly over the prompts.
        seed: Of that sampling.

    Raises:
        ValueError: As `solve`; if the policy can choose a token that the reference cannot: its KL is infinite; or if
            best-of-N is not that of the reference.
    """
    process = process_of(envs)
    kl_coef = process.kl_coef if kl_coef is None else kl_coef
    model = process.language_model.model if policy is None else getattr(policy, "policy_model", policy)
    graph = _graph_with_metrics(process, max_prefixes)
    walk = _Walk(graph, solve_graph(graph, kl_coef))
    # By samples: one number per response; otherwise one per prompt.
    exact, groups = True, len(graph.roots)
    if isinstance(model, TableForCausalLM):
        _by_states(walk, model)
    elif graph.num_prefixes() <= max_prefixes:
        _by_prefixes(walk, model)
    else:
        exact, groups = False, _by_samples(walk, model, num_samples, seed)
    found, num_candidates = _result(walk, exact, groups), getattr(policy, "num_candidates", 1)
    return found if num_candidates == 1 else _best_of(found, graph, num_candidates)


def _graph_with_metrics(process: Any, max_prefixes: int) -> Graph:
    """With the metrics where that leaves it a graph of states; a metric is no reason to enumerate prefixes."""
    metrics = dict(process.metrics)
    if is_product(process) and not is_product(process, list(resolve_metrics(process, metrics).values())):
        metrics = {}
    return task_graph(process, metrics, max_prefixes=max_prefixes)


class _Walk:
    """Adds up what a policy earns and pays in the nodes it visits."""

    def __init__(self, graph: Graph, solution: Solution):
        self.graph, self.solution, self.token_filter = graph, solution, graph.process.token_filter
        self.names = [name for name in graph.layers[0].payoffs]
        self.totals: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.occupancy = [np.zeros(len(layer)) for layer in graph.layers]
        self.weighted_kl = [np.zeros(len(layer)) for layer in graph.layers]

    def visit(self, t: int, group: np.ndarray, node: np.ndarray, weight: np.ndarray, logits: Tensor) -> np.ndarray:
        """Notes n visits.

        Args:
            t: The layer.
            group: Which sum each visit counts for. Shape (n,), integers.
            node: Shape (n,), integers.
            weight: Probability of the visit. Shape (n,), float64.
            logits: The policy's there. Shape (n, V).

        Returns:
            Probability of each token under the policy. Shape (n, V), float64.
        """
        layer = self.graph.layers[t]
        reference_logits = torch.from_numpy(layer.logits_table[layer.rows[node]])
        logprobs = filtered_logprobs(self.token_filter, logits, reference_logits)
        probs, ref_logprobs = np.exp(logprobs), layer.ref_logprobs[node]
        impossible = (probs > 0) & (ref_logprobs == -np.inf)
        if impossible.any():
            row, token = np.argwhere(impossible)[0]
            raise ValueError(
                f"the policy chooses token {token} with probability {probs[row, token]:.2g} in a state where the "
                'reference cannot: the KL is infinite. Start it from the reference (policy="tabular", '
                "residual_policy), or forbid such tokens by action_masks()"
            )
        optimum = self.solution.logprobs(t)[node]
        # Where the policy is 0 all is 0, and -inf - -inf is not to be computed.
        chosen = np.where(probs > 0, logprobs, 0.0)
        kl = (probs * (chosen - np.where(probs > 0, ref_logprobs, 0.0))).sum(1)
        to_optimum = (probs * (chosen - np.where(probs > 0, optimum, 0.0))).sum(1)
        self._add("kl", group, weight * kl)
        self._add("to_optimum", group, weight * to_optimum)
        for name in self.names:
            self._add(name, group, weight * (probs * layer.payoffs[name][node]).sum(1))
        self.occupancy[t] += np.bincount(node, weight, minlength=len(layer))
        self.weighted_kl[t] += np.bincount(node, weight * to_optimum, minlength=len(layer))
        return probs

    def _add(self, name: str, group: np.ndarray, values: np.ndarray) -> None:
        self.totals.setdefault(name, []).append((group, values))

    def sums(self, name: str, num_groups: int) -> np.ndarray:
        """Sum of each group. Shape (num_groups,), float64."""
        parts = [np.bincount(group, values, minlength=num_groups) for group, values in self.totals[name]]
        return np.sum(parts, axis=0)


def _by_states(walk: _Walk, model: TableForCausalLM) -> None:
    """A table's future depends on its state: histories that share it, the node and the prompt are one."""
    graph, logits = walk.graph, model.row_logits().cpu()
    transitions, num_states = model.transitions.cpu().numpy(), len(logits)
    group, node = np.arange(len(graph.roots)), graph.roots
    weight: np.ndarray = np.ones(len(graph.roots))
    state = np.array([model.state_after(prompt.ids) for prompt in graph.process.prompts])
    for t, layer in enumerate(graph.layers):
        probs = walk.visit(t, group, node, weight, logits[state]) * weight[:, None]
        if t + 1 == len(graph.layers):
            break
        row, token = np.nonzero((layer.children[node] >= 0) & (probs > 0))
        places = len(graph.layers[t + 1])
        keys = (group[row] * places + layer.children[node[row], token]) * num_states + transitions[state[row], token]
        keys, index = np.unique(keys, return_inverse=True)
        weight = np.bincount(index, probs[row, token], minlength=len(keys))
        rest, state = np.divmod(keys, num_states)
        group, node = np.divmod(rest, places)


def _by_prefixes(walk: _Walk, model: Any) -> None:
    """Any model, on every prefix that it has a chance to come to."""
    graph, process = walk.graph, walk.graph.process
    for prompt, root in enumerate(graph.roots):
        node, weight = np.array([root]), np.ones(1)
        responses = np.zeros((1, 0), dtype=np.int64)
        for t, layer in enumerate(graph.layers):
            logits = next_logits(model, join(process.prompts[prompt].ids, responses), process.vocab_size)
            probs = walk.visit(t, np.full(len(node), prompt), node, weight, logits) * weight[:, None]
            row, token = np.nonzero((layer.children[node] >= 0) & (probs > 0))
            node, weight = layer.children[node[row], token].astype(np.int64), probs[row, token]
            responses = np.concatenate([responses[row], token[:, None]], 1)
            if len(node) == 0:
                break


def _by_samples(walk: _Walk, model: Any, num_samples: int, seed: int, rows_per_batch: int = 512) -> int:
    """Samples of the policy, each a group of its own; returns their number, a multiple of that of the prompts.

    Group g belongs to prompt g % num_prompts.
    """
    graph, process = walk.graph, walk.graph.process
    if num_samples < 2 * len(graph.roots):
        raise ValueError(f"num_samples must be at least two per prompt, {2 * len(graph.roots)}, got {num_samples}")
    num_samples -= num_samples % len(graph.roots)
    width = process.max_response_tokens
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    engine = make_engine(model, min(rows_per_batch, num_samples), process.max_tokens)
    filtered = process.token_filter.uses_reference
    reference = make_engine(process.language_model.model, engine.num_rows, process.max_tokens) if filtered else None
    for groups in np.array_split(np.arange(num_samples), -(-num_samples // rows_per_batch)):
        which = groups % len(graph.roots)
        prompts = [process.prompts[p].ids.to(device) for p in which]
        responses = generate(
            engine,
            prompts,
            max_response_tokens=width,
            eos_token_ids=process.eos_token_ids,
            uniforms=torch.rand(len(groups), width, generator=generator),
            token_filter=process.token_filter,
            reference_engine=reference,
        )
        ids, lengths, prompt_lengths = join_responses(prompts, responses.response_ids, responses.response_mask)
        with inference(model):
            logits = response_logits(model, ids, lengths, prompt_lengths - 1, width)[0].float().cpu()
        tokens, going = responses.response_ids.cpu().numpy(), responses.response_mask.cpu().numpy()
        node = graph.roots[which]
        for t, layer in enumerate(graph.layers):
            rows = np.flatnonzero(going[:, t])
            if len(rows):
                weight = np.full(len(rows), 1.0)
                walk.visit(t, groups[rows], node[rows], weight, logits[rows, t])
                node[rows] = layer.children[node[rows], tokens[rows, t]]
    return num_samples


def _result(walk: _Walk, exact: bool, num_groups: int) -> Evaluation:
    graph, solution = walk.graph, walk.solution
    num_prompts = len(graph.roots)

    def per_prompt(name: str) -> np.ndarray:
        return walk.sums(name, num_groups).reshape(-1, num_prompts).mean(0)

    beta, kls = solution.kl_coef, per_prompt("kl")
    objectives = solution.objectives - beta * per_prompt("to_optimum")
    # Samples give the regret with far less noise than they give the score, and J = E[r] - beta KL ties the three.
    rewards = per_prompt(SCORE) if exact else objectives + beta * kls
    standard_error = 0.0
    if not exact:
        regrets = beta * walk.sums("to_optimum", num_groups).reshape(-1, num_prompts)
        standard_error = float(np.sqrt((regrets.var(0, ddof=1) / len(regrets)).sum()) / num_prompts)
    with np.errstate(invalid="ignore"):
        state_kl = [kl / weight for kl, weight in zip(walk.weighted_kl, walk.occupancy, strict=True)]
    return Evaluation(
        objectives=objectives,
        rewards=rewards,
        kls=kls,
        metrics={name: float(per_prompt(name).mean()) for name in walk.names if name != SCORE},
        state_kl=state_kl,
        occupancy=[weight / num_groups for weight in walk.occupancy],
        exact=exact,
        standard_error=standard_error,
        solution=solution,
    )


def _best_of(reference: Evaluation, graph: Graph, num_candidates: int) -> Evaluation:
    """The numbers of best-of-N from those of the policy that it samples from."""
    if reference.kls.max() > 1e-6:
        raise ValueError(
            "best-of-N is known exactly where it samples from the reference, and this agent's policy_model is "
            f"{reference.kls.max():.2g} nats from it; evaluate it by samples (rlhf_gym.evaluation.evaluate)"
        )
    found, metrics = [], []
    for root in graph.roots.tolist():
        scores, probs, means = score_classes(graph, root, list(reference.metrics))
        found.append(best_of_n_of(scores, probs, num_candidates))
        metrics.append([best_of_n_probs(probs, num_candidates) @ means[name] for name in reference.metrics])
    rewards, kls = np.array(found).T
    return replace(
        reference,
        objectives=rewards - reference.solution.kl_coef * kls,
        rewards=rewards,
        kls=kls,
        metrics=dict(zip(reference.metrics, np.mean(metrics, axis=0).tolist(), strict=True)),
        state_kl=[],
        occupancy=[],
        exact=True,
        standard_error=0.0,
    )
