"""Sampling many responses: rows that finish are refilled with the next prompt while the others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .engine import Engine
from .forward import pad_sequences
from .on_device import REFILLS_PER_TURN, DeviceLoop, run
from .sampling import TokenFilter, sample_tokens


@dataclass
class Responses:
    """Responses to B prompts, in the order of the prompts."""

    response_ids: Tensor
    """Tokens, the one that ends a response included; the first EOS id after the end. Shape (B, R), int64."""
    response_mask: Tensor
    """True where a token is real. Shape (B, R), bool."""
    logprobs: Tensor
    """Log-probability of each token when it was chosen, 0 after the end. Shape (B, R), float32."""
    values: Tensor | None
    """What ``value_fn`` said of the state in which each token was chosen, 0 after the end. Shape (B, R), float32."""
    ended_by_eos: Tensor
    """False where the response was cut off at R tokens. Shape (B,), bool."""


def generate(
    engine: Engine,
    prompts: Sequence[Tensor],
    *,
    max_response_tokens: int,
    eos_token_ids: Sequence[int],
    uniforms: Tensor | None,
    token_filter: TokenFilter | None = None,
    reference_engine: Engine | None = None,
    value_fn: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Responses:
    """Samples one response to each prompt.

    Response b is a function of ``prompts[b]`` and ``uniforms[b]`` alone: it depends neither on the other prompts nor
    on the number of rows (but for the last bits of the logits).

    Args:
        engine: Where to sample from. All its rows are overwritten.
        prompts: B prompts. Each of shape (p,), int64, with 1 <= p and p + R - 1 <= ``engine.max_tokens``. Where the very
            same tensor stands several times in a row, for several samples of a prompt, it is computed once.
        max_response_tokens: R, the most tokens of a response.
        eos_token_ids: Tokens that end a response.
        uniforms: Numbers in [0, 1), entry t chooses token t. Shape (B, R). None: the likeliest token each time.
        token_filter: Temperature and allowed tokens; None is the model's own distribution.
        reference_engine: Holds the model that a top-k or top-p filter looks at, with as many rows as ``engine``.
        value_fn: Maps hidden states (k, d) to values (k,), for every token as it is chosen.
        progress: Called with the number of new tokens after each step (on a GPU after the one that follows).

    Returns:
        The responses, on the engine's device.

    Raises:
        ValueError: If a prompt is empty or does not fit, or the filter needs a reference engine that is not given.
    """
    token_filter = token_filter or TokenFilter()
    num_episodes, num_rows, device = len(prompts), engine.num_rows, engine.device
    _check(engine, prompts, max_response_tokens, uniforms, token_filter, reference_engine)
    engines = [engine] + ([reference_engine] if token_filter.uses_reference else [])
    if device.type != "cpu" and num_episodes:
        return _generate_on_device(
            DeviceLoop(engines, prompts, max_response_tokens, eos_token_ids, uniforms, token_filter, value_fn),
            [len(prompt) for prompt in prompts],
            progress,
        )
    eos = torch.tensor(sorted(set(eos_token_ids)), dtype=torch.long, device=device)
    shape = (num_episodes, max_response_tokens)
    pad = int(eos[0]) if len(eos) else 0
    response_ids = torch.full(shape, pad, dtype=torch.long, device=device)
    response_mask = torch.zeros(shape, dtype=torch.bool, device=device)
    logprobs = torch.zeros(shape, device=device)
    values = torch.zeros(shape, device=device) if value_fn is not None else None
    ended_by_eos = torch.zeros(num_episodes, dtype=torch.bool, device=device)
    if uniforms is not None:
        uniforms = uniforms.to(device)

    episode = torch.full((num_rows,), -1, device=device)  # which prompt a row is at, -1: none
    step = torch.zeros(num_rows, dtype=torch.long, device=device)  # tokens of its response so far
    num_started = 0
    while True:
        idle = (episode < 0).nonzero()[:, 0]
        if num_started < num_episodes and len(idle) * REFILLS_PER_TURN >= num_rows:
            idle = idle[: num_episodes - num_started]
            for each in engines:
                _prefill(each, idle, prompts[num_started : num_started + len(idle)])
            episode[idle] = torch.arange(num_started, num_started + len(idle), device=device)
            step[idle] = 0
            num_started += len(idle)
        busy = (episode >= 0).nonzero()[:, 0]
        if not len(busy):
            break

        at = (episode[busy], step[busy])
        logits = [each.state["logits"][busy] for each in engines]
        all_logprobs = token_filter.logprobs(logits[0], token_filter.mask(logits[-1]))
        tokens = all_logprobs.argmax(-1) if uniforms is None else sample_tokens(all_logprobs, uniforms[at])
        response_ids[at] = tokens
        response_mask[at] = True
        logprobs[at] = all_logprobs.gather(1, tokens[:, None])[:, 0]
        if values is not None:
            values[at] = value_fn(engine.last_hidden[busy]).to(values)
        if progress is not None:
            progress(len(busy))

        by_eos = torch.isin(tokens, eos)
        ended_by_eos[episode[busy]] = by_eos
        step[busy] += 1
        ended = by_eos | (step[busy] == max_response_tokens)
        episode[busy[ended]] = -1
        left = busy[~ended]
        if len(left):
            newest = torch.zeros(num_rows, dtype=torch.long, device=device)
            newest[busy] = tokens
            if num_started == num_episodes and 2 * len(left) <= int(left[-1]) + 1:
                # No prompt waits and half of the rows are idle: the others move together, for decode skips idle ends.
                front = torch.arange(len(left), device=device)
                for each in engines:
                    each.copy_rows(left, front)
                newest[front], step[front] = newest[left], step[left]
                moved, episode = episode[left], torch.full_like(episode, -1)
                episode[front] = moved
            for each in engines:
                each.advance(newest, episode >= 0)
    return Responses(response_ids, response_mask, logprobs, values, ended_by_eos)


def _generate_on_device(loop: DeviceLoop, lengths: list[int], progress: Callable[[int], object] | None) -> Responses:
    run(loop, lengths, progress)
    num_tokens, max_response_tokens = loop.num_tokens[:-1], loop.response_ids.shape[1]
    if not bool(loop.logprobs[:-1].isfinite().all()):
        raise ValueError(
            "the model must give some token a probability above 0 at each step; NaN comes from a model whose weights are "
            "NaN or infinite"
        )
    return Responses(
        response_ids=loop.response_ids[:-1],
        response_mask=torch.arange(max_response_tokens, device=loop.device) < num_tokens[:, None],
        logprobs=loop.logprobs[:-1],
        values=None if loop.values is None else loop.values[:-1],
        ended_by_eos=loop.ended_by_eos[:-1],
    )


def _prefill(engine: Engine, rows: Tensor, prompts: Sequence[Tensor]) -> None:
    """Fills rows with prompts; of the same prompt several times in a row, one is computed and copied."""
    new = [i for i, prompt in enumerate(prompts) if i == 0 or prompt is not prompts[i - 1]]
    ids, lengths = pad_sequences([prompts[i] for i in new], device=engine.device)
    engine.prefill(rows[new], ids, lengths)
    if len(new) == len(prompts):
        return
    is_new = torch.zeros(len(prompts), dtype=torch.long, device=engine.device)
    is_new[new] = 1
    which = is_new.cumsum(0) - 1
    engine.copy_rows(rows[new][which], rows)


def _check(engine, prompts, max_response_tokens, uniforms, token_filter, reference_engine) -> None:
    if max_response_tokens < 1:
        raise ValueError(f"max_response_tokens must be at least 1, got {max_response_tokens}")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= engine.max_tokens - max_response_tokens + 1:
            raise ValueError(
                f"prompts[{i}] must have from 1 to {engine.max_tokens - max_response_tokens + 1} tokens, so that "
                f"{max_response_tokens} more fit into the engine's {engine.max_tokens}; it has {len(prompt)}"
            )
    if uniforms is not None and uniforms.shape != (len(prompts), max_response_tokens):
        raise ValueError(
            f"uniforms must have one number per response token, shape {(len(prompts), max_response_tokens)}, got "
            f"{tuple(uniforms.shape)}"
        )
    if token_filter.uses_reference:
        if reference_engine is None:
            raise ValueError("reference_engine must be given: top_k and top_p look at the reference model's logits")
        if reference_engine.num_rows != engine.num_rows:
            raise ValueError(
                f"reference_engine must have as many rows as engine, {engine.num_rows}, got {reference_engine.num_rows}"
            )
