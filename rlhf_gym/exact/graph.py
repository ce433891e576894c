"""The decision process of an environment as an explicit graph: who can follow whom, how likely, and what it pays.

A node is what the future depends on after t response tokens. There are two ways to get it: `product_graph`, for a
reference that is a table and rewards that are automata (nodes are pairs of their states, so many responses share one),
and `rlhf_gym.exact.tree.prefix_tree`, for any reference and any reward (a node is a prefix).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.lm import TokenFilter
from rlhf_gym.rewards import Reward, as_reward
from rlhf_gym.rewards.reward import WeightedSum

from .automaton import Automaton
from .table import TableForCausalLM

SCORE = "score"
# Up to this many combined states the next layer is found by marking them in a table, otherwise by sorting.
_MAX_MARKS = 50_000_000


@dataclass(frozen=True)
class Layer:
    """The nodes after t response tokens: S of them.

    Attributes:
        children: Place in the next layer of the node that a token leads to, -1 where the response ends with it or it
            is impossible. Shape (S, V), int32.
        payoffs: What a token pays, that which is paid at the end included, by name: "score" and the metrics. Each of
            shape (S, V), float64.
        rows: The row of the two tables that is the node's. Shape (S,), int32.
        logits_table: The reference's raw logits, -inf where a token is impossible. Shape (K, V), float32.
        logprobs_table: The same under the environment's temperature and filters, normalised. Shape (K, V), float64.
        labels: Description of a node, for people.
    """

    children: np.ndarray
    payoffs: Mapping[str, np.ndarray]
    rows: np.ndarray
    logits_table: np.ndarray
    logprobs_table: np.ndarray
    labels: Callable[[int], str] = field(default=str, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ref_logprobs(self) -> np.ndarray:
        """log pi_ref of the tokens in each node. Shape (S, V), float64."""
        return self.logprobs_table[self.rows]


@dataclass(frozen=True)
class Graph:
    """A decision process with finitely many nodes, layer by layer.

    Attributes:
        layers: Those in which a token is chosen: at most ``max_response_tokens``.
        roots: Place in the first layer of each prompt's node. Shape (num_prompts,), int64.
        process: The environment's process.
    """

    layers: Sequence[Layer]
    roots: np.ndarray
    process: Any = field(repr=False)

    @property
    def num_states(self) -> int:
        """Number of nodes, a state at another position counting as another."""
        return sum(map(len, self.layers))

    def num_prefixes(self) -> float:
        """Number of prefixes that the reference can produce, those of all prompts and finished ones included."""
        paths = np.bincount(self.roots, minlength=len(self.layers[0])).astype(float)
        total = paths.sum()
        for t, layer in enumerate(self.layers):
            possible = layer.ref_logprobs > -np.inf
            total += (paths[:, None] * possible).sum()
            if t + 1 < len(self.layers):
                goes = layer.children >= 0
                weights = np.broadcast_to(paths[:, None], goes.shape)[goes]
                paths = np.bincount(layer.children[goes], weights, minlength=len(self.layers[t + 1]))
        return float(total)


def filtered_logprobs(token_filter: TokenFilter, logits: Tensor, reference_logits: Tensor) -> np.ndarray:
    """Log-probabilities under an environment's temperature and filters, computed in float64.

    Args:
        token_filter: The environment's.
        logits: Of the model in question. Shape (n, V).
        reference_logits: Of the reference, in the same states. Shape (n, V).

    Returns:
        Shape (n, V), float64.
    """
    scaled = logits.double() / token_filter.temperature
    allowed = token_filter.mask(reference_logits)
    if allowed is not None:
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    return torch.log_softmax(scaled, -1).cpu().numpy()


def weighted_automata(reward: Reward) -> list[tuple[Automaton, float]] | None:
    """The automata that a reward is a weighted sum of; None if it is anything else."""
    if isinstance(reward, Automaton):
        return [(reward, 1.0)]
    if not isinstance(reward, WeightedSum):
        return None
    found: list[tuple[Automaton, float]] = []
    for part, weight, _ in reward.parts:
        inner = weighted_automata(part)
        if inner is None:
            return None
        found += [(automaton, weight * factor) for automaton, factor in inner]
    return found


def is_product(process: Any, rewards: Sequence[Reward] = ()) -> bool:
    """Whether an environment's reference is a table and its reward (and these others) are automata."""
    lm = process.language_model
    is_table = lm is not None and isinstance(lm.model, TableForCausalLM)
    return is_table and all(weighted_automata(reward) is not None for reward in (process.reward, *rewards))


def resolve_metrics(process: Any, metrics: Mapping[str, Any]) -> dict[str, Reward]:
    """Rewards by name, told about the environment's language model."""
    return {name: as_reward(spec, language_model=process.language_model) for name, spec in metrics.items()}


def product_graph(process: Any, metrics: Mapping[str, Reward] | None = None) -> Graph:
    """The graph of a table with automata: nodes are (reference's state, automata's states).

    Args:
        process: The environment's process, for which `is_product` holds.
        metrics: Other rewards to keep account of; their automata become part of the nodes.
    """
    model = process.language_model.model
    rewards = {SCORE: process.reward} | dict(metrics or {})
    terms = {name: weighted_automata(reward) for name, reward in rewards.items()}
    automata = list({id(a): a for parts in terms.values() for a, _ in parts or ()}.values())
    column = {id(automaton): 1 + i for i, automaton in enumerate(automata)}
    logits = model.row_logits().cpu()
    logprobs = filtered_logprobs(process.token_filter, logits, logits)
    possible = logprobs > -np.inf
    transitions = model.transitions.cpu().numpy()
    eos = np.isin(np.arange(process.vocab_size), process.eos_token_ids)

    starts = [[model.state_after(prompt.ids), *[0] * len(automata)] for prompt in process.prompts]
    nodes, roots = np.unique(np.array(starts), axis=0, return_inverse=True)
    layers: list[Layer] = []
    for t in range(process.max_response_tokens):
        for i, automaton in enumerate(automata):
            automaton.table.expand(np.unique(nodes[:, 1 + i]))
        following = [transitions[nodes[:, 0]]]
        following += [a.table.next[nodes[:, 1 + i]] for i, a in enumerate(automata)]
        last = t + 1 == process.max_response_tokens
        goes = possible[nodes[:, 0]] & ~eos & (not last)
        sizes = [len(transitions), *(len(automaton.table.states) for automaton in automata)]
        children, next_nodes = _merge(following, goes, sizes)

        payoffs = {}
        for name, parts in terms.items():
            payoff = np.zeros(children.shape)
            for automaton, weight in parts or ():
                table, states = automaton.table, nodes[:, column[id(automaton)]]
                payoff += weight * table.rewards[states]
                payoff[:, eos] += weight * table.finals(states)[:, 1:]
                if last:
                    after = following[column[id(automaton)]][:, ~eos]
                    payoff[:, ~eos] += weight * table.finals(after.ravel())[:, 0].reshape(after.shape)
            if last and name == SCORE:
                payoff[:, ~eos] -= process.scorer.missing_eos_penalty
            payoffs[name] = payoff
        labels = _labels(process, model, automata, nodes)
        layers.append(Layer(children, payoffs, nodes[:, 0].astype(np.int32), logits.numpy(), logprobs, labels))
        if len(next_nodes) == 0:
            break
        nodes = next_nodes
    return Graph(layers, roots.reshape(-1), process)


def _merge(following: list[np.ndarray], goes: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Children (S, V), -1 where a token does not go on, and the next layer's distinct nodes (S', components)."""
    keys = np.zeros(goes.shape, dtype=np.int64)
    for states, size in zip(following, sizes, strict=True):
        keys = keys * size + states
    children = np.full(goes.shape, -1, dtype=np.int32)
    wanted = keys[goes]
    combinations = int(np.prod([float(size) for size in sizes]))
    assert combinations < 2**62, "combined states are numbered by int64"
    if combinations <= _MAX_MARKS:
        marks = np.zeros(combinations, dtype=bool)
        marks[wanted] = True
        distinct = np.flatnonzero(marks)
        place = np.cumsum(marks, dtype=np.int32)
        children[goes] = place[wanted] - 1
    else:
        distinct, places = np.unique(wanted, return_inverse=True)
        children[goes] = places
    columns = []
    for size in reversed(sizes):
        distinct, column = np.divmod(distinct, size)
        columns.append(column)
    return children, np.stack(columns[::-1], 1)


def _labels(process: Any, model: Any, automata: list[Automaton], nodes: np.ndarray) -> Callable[[int], str]:
    def label(i: int) -> str:
        states = [repr(a.table.states[state]) for a, state in zip(automata, nodes[i, 1:].tolist(), strict=True)]
        return ", ".join([f"context {int(nodes[i, 0])}", *states])

    return label
