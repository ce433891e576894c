"""The tree of all prefixes: the graph of any environment that is small enough, whatever its reference and reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.lm import response_logits
from rlhf_gym.lm.engine import inference
from rlhf_gym.rewards import Reward

from .graph import SCORE, Graph, Layer, filtered_logprobs

MAX_PREFIXES = 1_000_000
# Entries of the logits of one forward, and responses scored at once.
_LOGITS_PER_CHUNK, _RESPONSES_PER_CHUNK = 2**22, 8192


def next_logits(model: Any, ids: Tensor, vocab_size: int) -> Tensor:
    """Logits after n sequences of one length.

    Args:
        model: A causal language model.
        ids: Shape (n, L), int64.
        vocab_size: V.

    Returns:
        Shape (n, V), float32, on the CPU.
    """
    device = next(model.parameters()).device
    length = ids.shape[1]
    out = torch.empty(len(ids), vocab_size)
    chunk = max(1, _LOGITS_PER_CHUNK // max(vocab_size, 64 * length))
    with inference(model):
        for rows in torch.arange(len(ids)).split(chunk):
            lengths = torch.full((len(rows),), length, device=device)
            out[rows] = response_logits(model, ids[rows].to(device), lengths, lengths - 1, 1)[0][:, 0].float().cpu()
    return out


def prefix_tree(
    process: Any, metrics: Mapping[str, Reward] | None = None, *, max_prefixes: int = MAX_PREFIXES
) -> Graph:
    """The graph whose nodes are the unfinished prefixes that the reference can produce.

    Args:
        process: The environment's process, with a reference.
        metrics: Other rewards to keep account of.
        max_prefixes: The most prefixes, finished ones included.

    Raises:
        ValueError: If there are more.
    """
    token_filter, vocab_size = process.token_filter, process.vocab_size
    eos = np.isin(np.arange(vocab_size), process.eos_token_ids)
    prompt = np.arange(len(process.prompts))  # of each node
    responses = np.zeros((len(prompt), 0), dtype=np.int64)
    num_prefixes = len(prompt)
    layers: list[Layer] = []
    for t in range(process.max_response_tokens):
        logits = _logits_by_prompt(process, prompt, responses)
        logprobs = filtered_logprobs(token_filter, logits, logits)
        possible = logprobs > -np.inf
        num_prefixes += int(possible.sum())
        if num_prefixes > max_prefixes:
            raise ValueError(
                f"the reference can produce more than {max_prefixes:,} prefixes ({num_prefixes:,} up to {t + 1} of "
                f"max_response_tokens={process.max_response_tokens}), too many to go through. Exact answers need a "
                "shorter or a narrower response (allowed_tokens, top_k), or a reference made by ngram_from_table or "
                "ngram_from_corpus with a reward made of automata. Without them `certificate` and `plugin_objective` "
                "judge a policy by its samples."
            )
        last = t + 1 == process.max_response_tokens
        goes = possible & ~eos & (not last)
        children = np.full(goes.shape, -1, dtype=np.int32)
        children[goes] = np.arange(goes.sum())
        payoffs = _payoffs(process, prompt, responses, possible & ~goes, metrics or {})
        labels = _labels(process, prompt, responses)
        table = logits.numpy()
        layers.append(Layer(children, payoffs, np.arange(len(prompt), dtype=np.int32), table, logprobs, labels))
        node, token = np.nonzero(goes)
        if len(node) == 0:
            break
        prompt, responses = prompt[node], np.concatenate([responses[node], token[:, None]], 1)
    return Graph(layers, np.arange(len(process.prompts)), process)


def _logits_by_prompt(process: Any, prompt: np.ndarray, responses: np.ndarray) -> Tensor:
    """Raw logits of the reference in each node. Shape (n, V), float32."""
    out = torch.empty(len(prompt), process.vocab_size)
    for p in np.unique(prompt):  # sequences of one prompt have one length
        rows = torch.from_numpy(np.flatnonzero(prompt == p))
        ids = join(process.prompts[p].ids, responses[rows.numpy()])
        out[rows] = next_logits(process.language_model.model, ids, process.vocab_size)
    return out


def join(prompt_ids: Tensor, responses: np.ndarray) -> Tensor:
    """A prompt (p,) before each of n responses (n, t). Shape (n, p + t), int64."""
    return torch.cat([prompt_ids.cpu().expand(len(responses), -1), torch.from_numpy(responses)], 1)


def _payoffs(
    process: Any, prompt: np.ndarray, responses: np.ndarray, ends: np.ndarray, metrics: Mapping[str, Reward]
) -> dict[str, np.ndarray]:
    """Scores of the responses that end here, dense ones too: on a tree it is all one when they are paid."""
    payoffs = {name: np.zeros(ends.shape) for name in (SCORE, *metrics)}
    node, token = np.nonzero(ends)
    for start in range(0, len(node), _RESPONSES_PER_CHUNK):
        nodes, tokens = node[start : start + _RESPONSES_PER_CHUNK], token[start : start + _RESPONSES_PER_CHUNK]
        finished = np.concatenate([responses[nodes], tokens[:, None]], 1).tolist()
        prompts = [process.prompts[p] for p in prompt[nodes]]
        scored = process.scorer.score(prompts, finished, np.isin(tokens, process.eos_token_ids))
        payoffs[SCORE][nodes, tokens] = scored.totals
        inputs = process.scorer.inputs(prompts, finished) if metrics else None
        for name, reward in metrics.items():
            payoffs[name][nodes, tokens] = reward.score(inputs).total
    return payoffs


def _labels(process: Any, prompt: np.ndarray, responses: np.ndarray) -> Any:
    return lambda i: f"{process.prompts[prompt[i]].text} | {process.scorer.decode(responses[i].tolist())}"
