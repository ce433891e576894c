"""Tabular policies: one row of logits per state of the decision process, added to the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from .graph import Graph
from .solve import process_of, task_graph
from .table import TableConfig, TableForCausalLM, TableHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .solve import Solution

POLICY_KINDS = ("tabular", "transformer", "lstm")


class TabularConfig(TableConfig):
    """Sizes of a `TabularForCausalLM`."""

    model_type = "rlhf_gym_tabular"

    def __init__(self, **kwargs):  # transformers makes one of its own where there is none
        super().__init__(**kwargs)


class _TabularHead(TableHead):
    def __init__(self, num_states: int, vocab_size: int):
        super().__init__(num_states, vocab_size)
        self.register_buffer("reference", torch.zeros(num_states, vocab_size))
        self.residual = nn.Parameter(torch.zeros(num_states, vocab_size))

    def rows(self) -> Tensor:
        return self.reference + self.residual


class TabularForCausalLM(TableForCausalLM):
    """A policy with one row of logits per state: the reference's, which are fixed, plus trained ones that begin at 0.

    The state is found by reading the prompt and the response, so it knows the environment's own prompts only: after
    any other text all tokens are equally likely.
    """

    config_class = TabularConfig

    def __init__(self, config: TabularConfig):
        super().__init__(config, _TabularHead(config.num_states, config.vocab_size))


AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM, exist_ok=True)


def make_policy(envs: Any, kind: str) -> PreTrainedModel:
    """The policy that agents call by this name: "tabular", "transformer" or "lstm" (`residual_policy`)."""
    if kind == "tabular":
        return tabular_policy(envs)
    from .residual import residual_policy

    return residual_policy(envs, kind)


def tabular_policy(envs: Any) -> TabularForCausalLM:
    """A policy for an environment with a row for each of its states, equal to the reference as long as it is untrained.

    Args:
        envs: As in `rlhf_gym.exact.solve`.

    Raises:
        ValueError: If the environment is too large, or a prompt begins another one: what comes next could then be
            prompt or response, and a model cannot tell.
    """
    graph = task_graph(process_of(envs))
    return _tabular(graph, [np.zeros_like(layer.payoffs["score"]) for layer in graph.layers])


def optimal_policy(solution: Solution) -> TabularForCausalLM:
    """pi* of a solved environment, under whose temperature and filters it is to be used."""
    temperature = solution.graph.process.token_filter.temperature
    residuals = []
    for t, layer in enumerate(solution.graph.layers):
        possible = layer.ref_logprobs > -np.inf
        difference = np.subtract(solution.logprobs(t), layer.ref_logprobs, where=possible, out=np.zeros(possible.shape))
        residuals.append(temperature * difference)
    return _tabular(solution.graph, residuals).requires_grad_(False)


def _tabular(graph: Graph, residuals: Sequence[np.ndarray]) -> TabularForCausalLM:
    """The graph's nodes are the first states, layer by layer; the beginnings of prompts and the end follow them."""
    process, num_nodes = graph.process, graph.num_states
    offsets = np.cumsum([0, *map(len, graph.layers)])
    beginnings = _beginnings([tuple(prompt.ids.tolist()) for prompt in process.prompts])
    end = num_nodes + len(beginnings)
    numbers = {beginning: num_nodes + i for i, beginning in enumerate(beginnings)}
    for prompt, root in zip(process.prompts, graph.roots.tolist(), strict=True):
        numbers[tuple(prompt.ids.tolist())] = root

    config = TabularConfig(
        vocab_size=process.vocab_size,
        num_states=end + 1,
        start_state=numbers[()],
        eos_token_id=list(process.eos_token_ids),
        bos_token_id=process.bos_token_id,
        pad_token_id=process.pad_token_id,
    )
    model = TabularForCausalLM(config)
    transitions, head = model.transitions.fill_(end).numpy(), model.lm_head
    for t, layer in enumerate(graph.layers):
        nodes = slice(offsets[t], offsets[t + 1])
        transitions[nodes] = np.where(layer.children >= 0, layer.children + offsets[t + 1], end)
        head.reference[nodes] = torch.from_numpy(layer.logits_table[layer.rows])
        head.residual.data[nodes] = torch.from_numpy(residuals[t]).float()
    for ids, number in numbers.items():
        if ids:
            transitions[numbers[ids[:-1]], ids[-1]] = number
    return model.to(process.device).eval()


def _beginnings(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """All proper beginnings of the prompts, () first.

    Raises:
        ValueError: If one of them is a prompt itself.
    """
    found = dict.fromkeys(prompt[:end] for prompt in sorted(prompts, key=len) for end in range(len(prompt)))
    both = set(prompts) & set(found)
    if both:
        raise ValueError(
            f"the prompt with the tokens {list(min(both))} begins another prompt, so that a policy cannot tell what is "
            "prompt and what is response; end every prompt with a word of its own"
        )
    return sorted(found, key=len)
